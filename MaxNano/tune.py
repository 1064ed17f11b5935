"""Finds the fastest settings for a model on the devices of this machine, by measurement.

    .venv/bin/python MaxNano/tune.py configs/base.yml model=d24
    .venv/bin/python MaxNano/tune.py configs/base.yml model=d12 tune_minutes=8

Checks every kernel that the config can choose, measures train steps with other settings, each in a
process of its own, and writes configs/tuned/<device>-<devices>-<model>.yml, which train.py uses. No
setting changes the numbers beyond rounding. What the command line or the stage sets is kept. The
same command resumes after Ctrl-C.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    if not __package__:  # run as a script: MaxNano/ itself must not be on the module search path
        sys.path[0] = str(Path(__file__).resolve().parents[1])
    from MaxNano import pyconfig

    pyconfig.check_command_line()  # reports a typo before JAX is imported

import datetime
import shlex
import signal
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import FrozenConfigDict

from MaxNano import pyconfig
from MaxNano.storage import files
from MaxNano.tuning import candidates, children, search, tuned_file
from MaxNano.tuning.candidates import Facts, Overrides
from MaxNano.tuning.results import Journal, to_csv, to_markdown
from MaxNano.tuning.search import FIRST_STEPS, Trial
from MaxNano.tuning.session import Session, words_of

EXIT_STOPPED = 75  # as train.py exits after SIGTERM: the same command resumes
PROBE_LIMIT_SECONDS = 600.0
OPTIONS = "The other key=value words are those of train.py, whose --help lists them.\n"


def main(config: FrozenConfigDict, argv: Sequence[str]) -> int:
    """Search, compare with the defaults, write; returns the exit status."""
    if config.stage == "rl":
        raise ValueError("stage=rl: tune.py measures the steps of pretraining and of stage=sft")
    files.check_writable(tuned_file.FOLDER, "tune.py writes its result there")
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return tune(config, argv)
    except KeyboardInterrupt:
        print("Stopped; the same command resumes the search", flush=True)
        return EXIT_STOPPED
    finally:
        signal.signal(signal.SIGTERM, previous)


def tune(config: FrozenConfigDict, argv: Sequence[str]) -> int:
    """As main, without what surrounds it."""
    facts = probe(argv)
    name = tuned_file.file_name(config, facts.device, facts.devices).removesuffix(".yml")
    folder = files.run_directory(config, "tune")
    print(f"Tuning {config.model} on {facts.devices} x {facts.device}, {facts.dtype}", flush=True)
    journal = Journal(folder / f"{name}.jsonl", identity(config, facts))
    if journal.is_other:
        print("The journal was of another search and is replaced", flush=True)
    elif journal.resumed:
        print(f"Resuming from {journal.path}, which has {journal.resumed} results", flush=True)
    session = Session(config, argv, facts, journal)
    winner = best = find(session)
    default_seconds, best_seconds = search.compare(
        session.start, winner, session.measure, lambda: session.seconds_left(to_compare=True) > 0
    )
    if not default_seconds:  # each turn failed, so the first measurement has to do
        default_seconds = [session.row(Trial(session.start, FIRST_STEPS))["seconds"]]
        best_seconds = default_seconds
    if not search.is_faster(default_seconds, best_seconds):
        best, best_seconds = session.start, default_seconds
    session.say(f"fastest: {words_of(best)}")
    print(operations := session.trace(best), flush=True)
    last = session.row(search.final_trial(best, winner, 0))
    row = result_row(session, best, default_seconds, best_seconds, last)
    path = tuned_file.FOLDER / f"{name}.yml"
    description = tuned_file.description(config, facts.device, facts.devices, facts.versions)
    comments = {
        **row,
        **description,
        **tuned_file.replaced(config, best),
        "command": shlex.join(["python", "MaxNano/tune.py", *argv]),
        "all versions": " ".join(f"{name}={text}" for name, text in facts.versions.items()),
    }
    tuned_file.write(path, comments, best)
    files.write_whole(folder / f"{name}.md", f"{to_markdown(row)}\n\n```\n{operations}\n```\n")
    files.write_whole(folder / f"{name}.csv", to_csv(row))
    print(f"\n{to_markdown(row)}\n\n{to_csv(row)}\nWrote {path}, {folder / name}.md and .csv")
    print(f"To search again, delete {journal.path}", flush=True)
    return 0


def probe(argv: Sequence[str]) -> Facts:
    """The facts of this machine. Raises ValueError if the config does not fit its devices."""
    report = children.run({"task": "probe", "argv": argv}, PROBE_LIMIT_SECONDS)
    if report.failure:
        raise ValueError(report.failure)
    return Facts(**report.answer["facts"])


def identity(config: FrozenConfigDict, facts: Facts) -> dict[str, Any]:
    """What the results of a search depend on."""
    free = ("tune_minutes", "run_name", "base_output_directory", "tuned")
    set_by_user = {key: value for key, value, _ in pyconfig.describe(config) if key not in free}
    versions = {name: facts.versions[name] for name in (*tuned_file.VERSIONS, "jaxlib", "libtpu")}
    facts_now = facts._replace(versions=versions)
    return {"config": set_by_user, "facts": facts_now._asdict()}


def find(session: Session) -> Overrides:
    """The fastest settings: kernels are checked first, then the defaults and all knobs measured."""
    config, facts = session.config, session.facts
    attention = candidates.attention_choices(config, facts)
    gradients = candidates.gradient_choices(config, facts)
    products = candidates.product_choices(config, facts)
    results = session.check_kernels([*attention, *gradients, *products])
    correct = [not (result.get("failure") or result["problem"]) for result in results]
    right = [
        (result["milliseconds"], index)
        for index, result in enumerate(results[: len(attention)])
        if correct[index]
    ]
    others = [*gradients, *products]
    others = [choice for choice, ok in zip(others, correct[len(attention) :], strict=True) if ok]
    attention = [attention[index] for _, index in sorted(right)]
    # With one choice the user has set the key.
    replaced = {} if len(products) < 2 or products[0] in others else products[1]
    session.start = first_settings(session, attention, replaced)
    half = max(3, (len(attention) + 1) // 2)
    knobs = candidates.knobs(config, facts, attention[:half], others)
    for knob in knobs:
        values = "; ".join(words_of(session.merge({}, choice)) for choice in knob.choices)
        print(f"To try for {knob.name}: {values}", flush=True)
    return search.search(session.start, knobs, session.measure, session.seconds_left, session.merge)


def first_settings(
    session: Session, attention: Sequence[Overrides], products: Overrides
) -> Overrides:
    """The defaults; where their attention kernel is wrong, with the fastest correct one; where they
    do not fit in memory, with fewer rows or remat.

    attention: the correct choices, fastest first. products: what replaces the layers' products, if
    those are wrong. Raises ValueError if nothing runs.
    """
    config = session.config
    start = dict(products)
    if start:
        session.say(f"the default layer products are struck off: starting from {words_of(start)}")
    if attention and {} not in [session.merge({}, choice) for choice in attention]:
        start = session.merge(start, attention[0])
        session.say(f"the default attention is struck off: starting from {words_of(start)}")
    outcome = None
    for smaller in ({}, *candidates.allowed(config, candidates.SMALLER)):
        session.start = session.merge(start, smaller)
        outcome = session.measure(Trial(session.start, FIRST_STEPS))
        if outcome.seconds is not None:
            return session.start
    raise ValueError(f"no settings could be measured: {outcome.failure}")


def result_row(
    session: Session,
    best: Overrides,
    default_seconds: Sequence[float],
    best_seconds: Sequence[float],
    measured: Mapping[str, Any],
) -> dict[str, str]:
    """The row of a table of results, by column. measured: a measurement of the best settings."""
    facts = session.facts
    before, now = (
        session.tokens_per_second(statistics.median(seconds))
        for seconds in (default_seconds, best_seconds)
    )
    mfu = (
        f"{100 * now * facts.flops_per_token / facts.peak_flops:.1f} %" if facts.peak_flops else ""
    )
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": facts.device,
        "devices": str(facts.devices),
        "model": session.config.model,
        "defaults tokens/s": f"{before:.0f}",
        "tokens/s": f"{now:.0f}",
        "times": f"{now / before:.3f}",
        "MFU": mfu,
        "GiB": f"{measured.get('gib') or 0:.1f}",
        "rows": str(measured.get("micro_rows", "")),
        "settings": words_of(best),
        "jax": str(facts.versions["jax"]),
    }


if __name__ == "__main__":
    words = sys.argv[1:]
    sys.exit(pyconfig.launch(lambda config: main(config, words), words, options=OPTIONS))

"""Inspects a run for the scripts of end_to_end/: its state, its results, and whether it is sound.

    .venv/bin/python end_to_end/results.py COMMAND [--OPTION=VALUE ...] configs/base.yml [key=value ...]

    text                          checks that a document of each split can be read
    core                          checks the CORE tasks
    chat                          checks the conversations and the chat tasks
    tokenizer                     checks the tokenizer
    inputs                        checks that the run was trained with this config and these data
    state                         prints new, finished, or the step from which the run resumes
    saved --run=RUN               prints the saved config of RUN
    summary [--chips= --price=]   prints loss, bits per byte, throughput and price of the run
    smoke                         checks that the run is finished, its loss fell, no update was skipped
    resumed --before=FILE [--like=RUN]
                                  checks that the run resumed where it stopped, given FILE, a copy of
                                  metrics.jsonl from then, and that its losses equal those of RUN

Exit status 0: the check passed; 1: it failed, with one line on stderr that says why; 2: wrong
arguments. Never imports JAX.
"""

import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import yaml  # noqa: E402
from etils import epath  # noqa: E402
from ml_collections import FrozenConfigDict  # noqa: E402

from MaxNano import console, pyconfig  # noqa: E402
from MaxNano.storage import files  # noqa: E402

# Scripts call this often: commands import slow modules themselves.


class CheckFailed(Exception):
    """A check failed; the message says why."""


# ---- Reading ------------------------------------------------------------------------------------


def rows_of(folder: epath.Path) -> list[dict[str, Any]]:
    """Returns the rows of metrics.jsonl."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        raise CheckFailed(f"{path} does not exist")
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows of train steps, at least one."""
    steps = [row for row in rows if "event" not in row]
    if not steps:
        raise CheckFailed("metrics.jsonl has no train step")
    return steps


def bpb_of(rows: Sequence[dict[str, Any]]) -> list[float]:
    """Returns the bits per byte of every validation."""
    return [row["bpb"] for row in rows if row.get("event") == "validation"]


def last_checkpoint(folder: epath.Path) -> int | None:
    """Returns the step of the last complete checkpoint."""
    root = folder / "checkpoints"
    whole = [
        int(name)
        for name in files.names(root)
        if name.isdigit() and (root / name / "MANIFEST.json").exists()
    ]
    return max(whole, default=None)


def total_steps(config: FrozenConfigDict) -> float:
    """Returns the number of steps of the run. In later stages the data set it, so the saved config
    has it.
    """
    if not pyconfig.horizon_is_open(config):
        return config.steps
    path = files.run_directory(config) / "config.yml"
    return yaml.safe_load(path.read_text())["steps"] if path.exists() else math.inf


def evaluated_core(folder: epath.Path, step: int) -> float | None:
    """Returns CORE after `step`, or None if it was not evaluated."""
    path = folder / f"evals/step_{step:06}.json"
    core = json.loads(path.read_text())["evals"].get("core") if path.exists() else None
    return core["values"]["core"] if core else None


def median_of(steps: Sequence[dict[str, Any]], key: str) -> float | None:
    """Returns the median of a metric over the steps after warm-up, or None if no step has it."""
    from MaxNano.training.display import FIRST_TIMED_STEP

    values = [row[key] for row in steps[FIRST_TIMED_STEP:] or steps if key in row]
    return statistics.median(values) if values else None


def price_of(seconds: float, options: dict[str, str]) -> float | None:
    """Returns the price in US dollars of `seconds` on all chips, or None without a price."""
    price, chips = options.get("price"), options.get("chips")
    return seconds / 3600 * float(chips) * float(price) if price and chips else None


# ---- Commands -----------------------------------------------------------------------------------


def check_text(config: FrozenConfigDict, options: dict[str, str]) -> None:
    from MaxNano.data import sources, stream

    where = sources.open_source(config, "train").where
    for split in ("train", "validation"):
        if next(stream.iterate_texts(config, split), None) is None:
            raise CheckFailed(f"{where} has no document for {split}")
    print(f"{where} has documents for training and validation")


def check_core(config: FrozenConfigDict, options: dict[str, str]) -> None:
    from MaxNano.evals.core_tasks import load_bundle

    print(f"{config.core_bundle}: {len(load_bundle(config.core_bundle))} tasks")


def check_chat(config: FrozenConfigDict, options: dict[str, str]) -> None:
    from MaxNano import tasks
    from MaxNano.data import conversations

    mixtures = [conversations.Mixture(config, split) for split in ("train", "validation")]
    chat_tasks = [tasks.open_task(config, name) for name in config.chat_tasks]
    print(
        f"{len(mixtures[0]):,} conversations for training, {len(mixtures[1]):,} for validation, "
        f"{len(chat_tasks)} chat tasks"
    )


def check_tokenizer(config: FrozenConfigDict, options: dict[str, str]) -> None:
    from MaxNano import train_tokenizer
    from MaxNano.tokenization.tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(config)
    except ValueError as error:
        raise CheckFailed(str(error)) from None
    if tokenizer.vocab_size != config.vocab_size:
        raise CheckFailed(
            f"{config.tokenizer_path} has {tokenizer.vocab_size} tokens, not {config.vocab_size}"
        )
    train_tokenizer.check_inputs(config)
    print(f"{config.tokenizer_path} is complete")


def check_run_inputs(config: FrozenConfigDict, options: dict[str, str]) -> None:
    from MaxNano.data import fingerprint
    from MaxNano.storage.checkpoints import newest_extra
    from MaxNano.training import config_changes

    folder = files.run_directory(config)
    extra = newest_extra(folder)
    if pyconfig.horizon_is_open(config):  # the data set the steps
        steps = extra["run"]["config"]["steps"]
        config = pyconfig.replace(config, "the run", steps=steps)
    config_changes.check_resume(config, extra, fingerprint.contents_of_run(config))
    print(f"{folder} has this config and these data")


def print_state(config: FrozenConfigDict, options: dict[str, str]) -> None:
    step = last_checkpoint(files.run_directory(config))
    print("new" if step is None else "finished" if step >= total_steps(config) else step)


def print_saved(config: FrozenConfigDict, options: dict[str, str]) -> None:
    print((files.run_directory(config, options["run"]) / "config.yml").read_text(), end="")


def print_summary(config: FrozenConfigDict, options: dict[str, str]) -> None:
    rows = rows_of(files.run_directory(config))
    steps, bpb = steps_of(rows), bpb_of(rows)
    last = steps[-1]
    mfu, seconds = median_of(steps, "mfu"), last["elapsed_seconds"]
    lines = {
        "steps": f"{last['step'] + 1:,} of {config.steps:,}, {last['skipped_in_all']} updates skipped",
        "tokens": f"{(last['step'] + 1) * config.global_batch_tokens:,}",
        "loss": f"{steps[0]['loss']:.4f} at the start, {last['smoothed_loss']:.4f} at the end (smoothed)",
        "bits per byte": f"{bpb[0]:.4f} at the start, {bpb[-1]:.4f} at the end"
        if bpb
        else "not evaluated",
        "speed": f"{median_of(steps, 'tokens_per_second'):,.0f} tokens/s (median)"
        + (f", MFU {100 * mfu:.1f} %" if mfu else ""),
        "time": f"{last['training_seconds'] / 60:.1f} minutes of training steps, {seconds / 60:.1f} in total",
    }
    evaluated = evaluated_core(files.run_directory(config), config.steps)
    if evaluated is not None:
        lines["CORE"] = f"{evaluated:.4f}"
    dollars = price_of(seconds, options)
    if dollars is not None:
        lines["price"] = (
            f"{options['chips']} chips x {seconds / 3600:.2f} h x {options['price']} USD = {dollars:.2f} USD"
        )
    lines["files"] = str(files.run_directory(config))
    for name, value in lines.items():
        print(f"{name:<14} {value}")


def check_smoke(config: FrozenConfigDict, options: dict[str, str]) -> None:
    rows = check_whole(config)
    steps = steps_of(rows)
    if not steps[-1]["smoothed_loss"] < steps[0]["loss"]:
        raise CheckFailed(
            f"the loss did not fall: {steps[0]['loss']:.4f}, then {steps[-1]['smoothed_loss']:.4f}"
        )
    if steps[-1]["skipped_in_all"]:
        raise CheckFailed(
            f"{steps[-1]['skipped_in_all']} updates were skipped: loss or gradient was not finite"
        )
    bpb = bpb_of(rows)
    if len(bpb) > 1 and not bpb[-1] < bpb[0]:
        raise CheckFailed(
            f"validation bits per byte did not fall: {bpb[0]:.4f}, then {bpb[-1]:.4f}"
        )
    print(
        f"sound: {len(steps)} steps, loss {steps[0]['loss']:.4f} -> {steps[-1]['smoothed_loss']:.4f}"
    )


def check_resumed(config: FrozenConfigDict, options: dict[str, str]) -> None:
    before = Path(options["before"]).read_text().splitlines()
    after = (files.run_directory(config) / "metrics.jsonl").read_text().splitlines()
    stopped = steps_of([json.loads(line) for line in before])[-1]["step"] + 1
    if not 0 < stopped < config.steps:
        raise CheckFailed(
            f"the run stopped after {stopped} of {config.steps} steps, so it did not resume"
        )
    # Rows contain the time of writing: equal rows were not written again.
    if after[: len(before)] != before:
        raise CheckFailed(
            f"the run did not resume from step {stopped}: the rows written before the stop have changed"
        )
    steps = steps_of(check_whole(config))
    if "like" in options:
        whole = steps_of(rows_of(files.run_directory(config, options["like"])))
        for ours, theirs in zip(steps, whole, strict=True):
            if ours["loss"] != theirs["loss"]:
                raise CheckFailed(
                    f"step {ours['step']} has loss {ours['loss']!r}, but {theirs['loss']!r} "
                    f"in the uninterrupted run {options['like']}"
                )
    print(
        f"resumed: stopped after {stopped} of {config.steps} steps, final loss {steps[-1]['loss']:.6f}"
        + (
            f", every loss equals that of {options['like']} bit for bit"
            if "like" in options
            else ""
        )
    )


def check_whole(config: FrozenConfigDict) -> list[dict[str, Any]]:
    """Returns the rows of a finished run: each step once, finite losses, a last checkpoint."""
    folder = files.run_directory(config)
    rows = rows_of(folder)
    steps = steps_of(rows)
    if [row["step"] for row in steps] != list(range(config.steps)):
        raise CheckFailed(
            f"{folder} has {len(steps)} rows of steps, not each of the {config.steps} steps once"
        )
    # metrics.jsonl has null for a loss that is not finite.
    if not all(isinstance(row["loss"], float) and math.isfinite(row["loss"]) for row in steps):
        raise CheckFailed(f"{folder} has a loss that is not finite")
    if last_checkpoint(folder) != config.steps:
        raise CheckFailed(f"{folder} has no complete checkpoint of step {config.steps}")
    return rows


COMMANDS: dict[str, Callable[[FrozenConfigDict, dict[str, str]], None]] = {
    "text": check_text,
    "core": check_core,
    "chat": check_chat,
    "tokenizer": check_tokenizer,
    "inputs": check_run_inputs,
    "state": print_state,
    "saved": print_saved,
    "summary": print_summary,
    "smoke": check_smoke,
    "resumed": check_resumed,
}


def main(argv: Sequence[str]) -> int:
    console.keep_output()
    if not argv or argv[0] not in COMMANDS:
        print(__doc__)
        return 2
    options = dict(word[2:].split("=", 1) for word in argv[1:] if word.startswith("--"))
    try:
        config = pyconfig.initialize([word for word in argv[1:] if not word.startswith("--")])
        COMMANDS[argv[0]](config, options)
    except CheckFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

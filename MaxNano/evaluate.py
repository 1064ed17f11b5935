"""Evaluates a checkpoint of a run: bits per byte, CORE, samples.

    python MaxNano/evaluate.py configs/base.yml model=d4 run_name=NAME evals=bpb,core,samples core_bundle=PATH

What the run was trained with counts, save for what the command line says. Results go to `evals/step_<step>.json` and,
for CORE, `.csv` in the run's folder, after every task: started again, it goes on with the task that was under way, and
what is there for the same questions, tokenizer and numbers is not computed again.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    if not __package__:  # run as a script: MaxNano/ itself must not be where modules are looked for
        sys.path[0] = str(Path(__file__).resolve().parents[1])
    from MaxNano import pyconfig

    pyconfig.check_command_line()  # a typo is told now, not when JAX has been imported

import csv
import datetime
import io
import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import jax
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import FrozenConfigDict
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from MaxNano import pyconfig, runtime, sharding, train
from MaxNano.checkpointing import Checkpointer
from MaxNano.data.loader import put_global
from MaxNano.evals import bpb, branches, core, samples
from MaxNano.metrics import print_table
from MaxNano.tokenizer import Tokenizer

EVALS = ("bpb", "core", "samples")
PROBE_QUESTIONS = 8  # of each task, whose tokens say how much work it is


# ---- Results --------------------------------------------------------------------------------------------------------


class Results:
    """Finished evaluations of one checkpoint, kept in a file: name -> what it is of, and its values."""

    def __init__(self, path: epath.Path):
        self._path = path
        self._writes = jax.process_index() == 0
        found = None
        if self._writes and path.exists():
            try:
                found = json.loads(path.read_text())["evals"]
            except (ValueError, KeyError, TypeError):
                print(f"warning: {path} is damaged and is written anew", file=sys.stderr)
        self._evals = runtime.gather_json(found)[0] or {}

    def get(self, name: str, of: Mapping[str, Any]) -> dict[str, Any] | None:
        """The values of an evaluation, if it is finished and was of the same things."""
        entry = self._evals.get(name)
        return entry["values"] if entry and entry["of"] == json.loads(json.dumps(of)) else None

    def put(self, name: str, of: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """Keep an evaluation, in the file too."""
        self._evals[name] = {"of": dict(of), "values": dict(values)}
        self.write(self._path, json.dumps({"evals": self._evals}, indent=1) + "\n")

    def write(self, path: epath.Path, text: str) -> None:
        """Write a file, whole or not at all; only process 0 does."""
        if self._writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.parent / f".{path.name}.partial"
            temporary.write_text(text)
            temporary.replace(path)


# ---- Bits per byte --------------------------------------------------------------------------------------------------


def evaluate_bpb(setup: train.Setup, vocabulary: Tokenizer, params: Any, results: Results) -> None:
    """Bits per byte on the beginning of both splits, eval_tokens of each, the same rows for any number of devices."""
    config, plan = setup.config, setup.plan
    count = max(1, config.eval_tokens // config.global_batch_tokens)
    rows = sharding.batch_sharding(setup.mesh, config.logical_axis_rules)
    evaluate = train.jit_evaluate(setup)
    token_bytes = jax.device_put(vocabulary.token_bytes(), NamedSharding(setup.mesh, PartitionSpec()))
    table = []
    for split in ("train", "validation"):
        tokens = count * config.global_batch_tokens
        of = {
            "data": [config.dataset_type, config.dataset_path, config.dataset_name, list(config.dataset_splits)],
            "rows": [count, config.global_batch_tokens, config.max_target_length, config.data_readers],
            "tokenizer": vocabulary.fingerprint(),
            "dtype": setup.numerics.dtype,
        }
        values = results.get(f"bpb {split}", of)
        if values is None:
            started = time.monotonic()
            with train.open_loader(config, plan, vocabulary, split) as batches, _progress() as shown:
                batches = shown.track(islice(batches, count), total=count, description=f"bits per byte, {split}")
                values = bpb.evaluate_bpb(
                    lambda batch: evaluate(params, put_global(batch, rows), token_bytes), batches
                )
            values |= {"tokens": tokens, "seconds": time.monotonic() - started}
            results.put(f"bpb {split}", of, values)
        table.append((split, f"{values['tokens']:,}", f"{values['bpb']:.6f}", f"{values['seconds']:.1f}"))
    _show("bits per byte", ("split", "tokens", "bpb", "seconds"), table)


# ---- CORE -----------------------------------------------------------------------------------------------------------


def evaluate_core(setup: train.Setup, vocabulary: Tokenizer, params: Any, results: Results, path: epath.Path) -> None:
    """CORE, task by task; `path` is where the table goes."""
    config = setup.config
    tasks = core.load_bundle(config.core_bundle)

    def of(task):
        return {
            "task": task.fingerprint(),
            "max_per_task": config.core_max_per_task,
            "max_length": config.core_max_length,
            "tokenizer": vocabulary.fingerprint(),
            "dtype": setup.numerics.dtype,
        }

    left = [task for task in tasks if results.get(f"core {task.label}", of(task)) is None]
    if len(left) < len(tasks):
        _say(f"{len(tasks) - len(left)} of {len(tasks)} CORE tasks are done already")
    scorer = branches.Scorer(setup, vocabulary.bos_id)
    with _progress() as shown:
        bar = shown.add_task("CORE", total=_work(left, vocabulary, scorer, config) if left else 0)
        found = core.evaluate(
            left, vocabulary, scorer.bind(params),
            max_per_task=config.core_max_per_task, max_length=config.core_max_length,
            progress=lambda prompt: shown.advance(bar, scorer.cost(prompt)),
        )  # fmt: skip
        started = time.monotonic()
        for task, result in zip(left, found, strict=True):
            values = {name: value for name, value in result._asdict().items() if name not in ("label", "answers")}
            results.put(f"core {task.label}", of(task), values)
            state = shown.tasks[0]
            rest = (time.monotonic() - started) * (state.total / max(1, state.completed) - 1)
            _say(
                f"{result.label}: {result.examples} questions, accuracy {result.accuracy:.4f}, centred "
                f"{result.centered:.4f}, {result.seconds:.1f} s; about {_duration(rest)} left"
            )
    rows = {task.label: results.get(f"core {task.label}", of(task)) for task in tasks}
    score = core.summarize({label: values["centered"] for label, values in rows.items()})["core"]
    seconds = sum(values["seconds"] for values in rows.values())
    results.put("core", {}, {"core": score, "seconds": seconds})
    results.write(path, _csv(rows, score, seconds))
    lines = [(label, v["shots"], v["examples"], f"{v['accuracy']:.6f}", f"{v['centered']:.6f}", f"{v['seconds']:.1f}")
             for label, v in rows.items()]  # fmt: skip
    header = ("task", "shots", "questions", "accuracy", "centred", "seconds")
    _show("CORE", header, [*lines, ("CORE", "", "", "", f"{score:.6f}", f"{seconds:.1f}")])


def _work(tasks: Sequence[core.Task], vocabulary: Tokenizer, scorer: branches.Scorer, config: FrozenConfigDict) -> int:
    """Tokens that tasks are about to be, guessed from a few questions of each."""
    total = 0.0
    for task in tasks:
        count = task.content.count(b"\n")
        count = min(count, config.core_max_per_task or count)
        few = task.questions(4 * PROBE_QUESTIONS)
        prompts = core.build_prompts(
            task, few, vocabulary, max_length=config.core_max_length, limit=PROBE_QUESTIONS
        )
        total += count * sum(map(scorer.cost, prompts)) / len(prompts)
    return max(1, round(total))


def _csv(rows: Mapping[str, Mapping[str, Any]], score: float, seconds: float) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ("shots", "examples", "accuracy", "centered", "seconds")
    writer.writerow(("task", *names))
    writer.writerows((label, *(values[name] for name in names)) for label, values in rows.items())
    writer.writerow(("CORE", "", "", "", score, seconds))
    return text.getvalue()


# ---- Samples --------------------------------------------------------------------------------------------------------


def evaluate_samples(setup: train.Setup, vocabulary: Tokenizer, params: Any, results: Results) -> None:
    """Greedy continuations of a few prompts."""
    programs = train.build_programs(setup, None, vocabulary.token_bytes())
    texts = samples.sample(partial(programs.greedy, params), vocabulary, setup.config.sample_tokens)
    results.put("samples", {}, texts)
    _show("samples", ("prompt", "greedy continuation"), [(key, repr(text)[1:-1]) for key, text in texts.items()])


# ---- Command --------------------------------------------------------------------------------------------------------


def chosen(config: FrozenConfigDict) -> list[str]:
    """The evaluations that `evals` names. Raises ValueError for any other."""
    names = [name.strip() for name in config.evals.split(",")]
    for name in names:
        if name not in EVALS:
            raise ValueError(f"evals={config.evals} names {name!r}: choose among {','.join(EVALS)}")
    return names


def config_of_run(config: FrozenConfigDict, argv: Sequence[str]) -> FrozenConfigDict:
    """The config with which the run was trained, if it is there, with the command line's values in it."""
    saved = train.run_directory(config) / "config.yml"
    if Path(argv[0]).name == saved.name or not saved.exists():
        return config
    words = [word for word in argv[1:] if not word.startswith("model=")]
    names = ("base_output_directory", "run_name")  # the folder may have been moved
    return pyconfig.initialize([str(saved), *(f"{name}={config[name]}" for name in names), *words])


def evaluate(config: FrozenConfigDict) -> None:
    """Load the checkpoint, evaluate, print and write."""
    names = chosen(config)
    directory = train.run_directory(config)
    if not (directory / "checkpoints").exists():
        raise ValueError(f"{directory} holds no checkpoint: give run_name and base_output_directory of a trained run")
    if "core" in names:
        core.load_bundle(config.core_bundle)  # what is wrong with it is told now
    runtime.initialize(config)
    setup = train.set_up(config)
    vocabulary = train.load_tokenizer(config)
    with jax.set_mesh(setup.mesh):
        with Checkpointer(
            config, directory, tokenizer_fingerprint=vocabulary.fingerprint(), writer=False
        ) as checkpointer:
            params, extra = checkpointer.restore_params_only(setup.abstract.params, config.step)
        step = extra["run"]["step"]
        path = directory / "evals" / f"step_{step:06}.json"
        results = Results(path)
        _say(f"{directory}, step {step}, on {setup.mesh.size} x {setup.mesh.devices.flat[0].device_kind}")
        for name in EVALS:
            if name not in names:
                continue
            if name == "bpb":
                evaluate_bpb(setup, vocabulary, params, results)
            elif name == "core":
                evaluate_core(setup, vocabulary, params, results, path.with_suffix(".csv"))
            else:
                evaluate_samples(setup, vocabulary, params, results)
    _say(f"written to {path}")


def main(config: FrozenConfigDict, argv: Sequence[str]) -> int:
    """Evaluate; Ctrl-C leaves what is finished."""
    try:
        evaluate(config_of_run(config, argv))
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _progress() -> Progress:
    """A bar with the time left, on a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, transient=True, disable=not sys.stdout.isatty() or jax.process_index() != 0)


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)


def _show(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    if jax.process_index() == 0:
        print()
        print_table(title, header, rows)


if __name__ == "__main__":
    sys.exit(pyconfig.launch(lambda config: main(config, sys.argv[1:])))

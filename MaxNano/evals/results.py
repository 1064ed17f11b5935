"""Finished evaluations of a checkpoint, kept in a file beside the run; and CORE over such a file, task by task."""

import csv
import datetime
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import FrozenConfigDict

from MaxNano import console
from MaxNano.distributed import runtime
from MaxNano.evals import core
from MaxNano.inference import prefix_scoring
from MaxNano.storage import files
from MaxNano.tokenization.tokenizer import Tokenizer

PROBE_QUESTIONS = 8  # of each task, whose tokens say how much work it is


class Results:
    """Finished evaluations of the checkpoint of a step: name -> what it is of, and its values.

    run: an id of the training run, so that another run in the same folder does not take over what is there.
    """

    def __init__(self, directory: epath.Path, step: int, run: str | None = None):
        self.path = directory / "evals" / f"step_{step:06}.json"
        self._run = run
        self._writes = jax.process_index() == 0
        found = None
        if self._writes and self.path.exists():
            try:
                found = json.loads(self.path.read_text())["evals"]
            except (ValueError, KeyError, TypeError):
                console.warn(f"{self.path} is damaged and is overwritten")
        self._evals = runtime.gather_json(found)[0] or {}

    def get(self, name: str, of: Mapping[str, Any]) -> dict[str, Any] | None:
        """The values of an evaluation, if it is finished and was of the same things."""
        entry = self._evals.get(name)
        return (
            entry["values"]
            if entry and entry["of"] == json.loads(json.dumps(self._complete(of)))
            else None
        )

    def put(self, name: str, of: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """Keep an evaluation, in the file too."""
        self._evals[name] = {"of": self._complete(of), "values": dict(values)}
        self.write(self.path, json.dumps({"evals": self._evals}, indent=1) + "\n")

    def write(self, path: epath.Path, text: str) -> None:
        """Write a file, whole or not at all; only process 0 does."""
        if self._writes:
            files.write_whole(path, text)

    def _complete(self, of: Mapping[str, Any]) -> dict[str, Any]:
        return {"run": self._run, **of}


def run_id(extra: Mapping[str, Any]) -> str | None:
    """The id of the training run that saved a checkpoint, from what was saved with it; None if it was imported."""
    return (extra.get("metrics") or {}).get("run_id")


# ---- CORE -----------------------------------------------------------------------------------------------------------


def evaluate_tasks(
    config: FrozenConfigDict,
    tasks: Sequence[core.Task],
    tokenizer: Tokenizer,
    scorer: prefix_scoring.PrefixScorer,
    params: Any,
    results: Results,
    *,
    say: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> tuple[float, dict[str, dict[str, Any]]]:
    """CORE and the values of each task by label, of which those that `results` has are not computed again.

    Each task goes into `results` when it is done, and in the end a table beside them. say: gets a line for each task.
    progress: gets, after each question, how many tokens are done and how many there are about to be.
    """

    def of(task):
        return {
            "task": task.fingerprint(),
            "max_per_task": config.core_max_per_task,
            "max_length": config.core_max_length,
            "tokenizer": tokenizer.fingerprint(),
            "dtype": scorer.dtype,
        }

    left = [task for task in tasks if results.get(f"core {task.label}", of(task)) is None]
    if len(left) < len(tasks):
        say(f"{len(tasks) - len(left)} of {len(tasks)} CORE tasks are done already")
    total = _work(left, tokenizer, scorer, config)
    done = 0

    def count(prompt):
        nonlocal done
        done += scorer.cost(prompt)
        progress(done, total)

    found = core.evaluate(
        left,
        tokenizer,
        scorer.bind(params),
        max_per_task=config.core_max_per_task,
        max_length=config.core_max_length,
        progress=count,
    )
    started = time.monotonic()
    for task, result in zip(left, found, strict=True):
        values = {
            name: value
            for name, value in result._asdict().items()
            if name not in ("label", "answers")
        }
        results.put(f"core {task.label}", of(task), values)
        rest = (time.monotonic() - started) * max(0, total / done - 1)
        say(
            f"{result.label}: {result.examples} questions, accuracy {result.accuracy:.4f}, centered "
            f"{result.centered:.4f}, {result.seconds:.1f} s; about {datetime.timedelta(seconds=round(rest))} left"
        )
    rows = {task.label: results.get(f"core {task.label}", of(task)) for task in tasks}
    score = core.summarize({label: values["centered"] for label, values in rows.items()})["core"]
    seconds = sum(values["seconds"] for values in rows.values())
    results.put("core", {}, {"core": score, "seconds": seconds})
    results.write(results.path.with_suffix(".csv"), _csv(rows, score, seconds))
    return score, rows


def _work(
    tasks: Sequence[core.Task],
    tokenizer: Tokenizer,
    scorer: prefix_scoring.PrefixScorer,
    config: FrozenConfigDict,
) -> int:
    """Tokens that tasks are about to be, guessed from a few questions of each."""
    total = 0.0
    for task in tasks:
        count = task.content.count(b"\n")
        count = min(count, config.core_max_per_task or count)
        few = task.questions(4 * PROBE_QUESTIONS)
        prompts = core.build_prompts(
            task, few, tokenizer, max_length=config.core_max_length, limit=PROBE_QUESTIONS
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

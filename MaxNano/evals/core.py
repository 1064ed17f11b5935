"""CORE, the benchmark of base models: the mean of 22 tasks answered by likelihood.

core_tasks.py has the questions and their prompts. Sources: https://arxiv.org/abs/2406.11794 (CORE);
nanochat/core_eval.py and scripts/base_eval.py@92d63d4, with the same prompts, draws and choices, so
that scores can be compared.
"""

import csv
import datetime
import io
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from ml_collections import FrozenConfigDict

from MaxNano.evals.core_tasks import (
    CoreTask,
    Question,
    build_prompts,
    center,
    core_score,
    load_bundle,
)
from MaxNano.evals.results import Results, ResultTable, measured_with
from MaxNano.inference.prompts import Prompt, Scorer
from MaxNano.tokenization.tokenizer import Tokenizer
from MaxNano.training.context import RunContext

PROBE_QUESTIONS = 8  # of each task, whose prompts give an estimate of the task's tokens

# ---- Scoring ------------------------------------------------------------------------------------


def logits_scorer(forward: Callable[[np.ndarray], Any], bos_id: int) -> Scorer:
    """A scorer from `forward(tokens (B, L) int32) -> logits (B, L, V)` of any causal model.

    It scores one prompt at a time: each branch is a row, padded on the right with `bos_id`.
    """

    def score(prompts, *, greedy):
        for index, prompt in enumerate(prompts):
            rows = [np.concatenate([prompt.prefix, branch]) for branch in prompt.branches]
            tokens = np.full((len(rows), max(map(len, rows))), bos_id, np.int32)
            for row, ids in zip(tokens, rows, strict=True):
                row[: len(ids)] = ids
            logits = np.asarray(forward(tokens), np.float32)
            scores = []
            for row, ids, start in zip(logits, rows, prompt.starts, strict=True):
                first = len(prompt.prefix) + start
                row, targets = row[first - 1 : len(ids) - 1], ids[first:]
                if greedy:
                    scores.append(row.argmax(-1) == targets)
                else:
                    highest = row.max(-1, keepdims=True)
                    total = np.log(np.exp(row - highest).sum(-1)) + highest[:, 0]
                    scores.append(total - row[np.arange(len(targets)), targets])
            yield index, scores

    return score


# ---- Answers ------------------------------------------------------------------------------------


class CoreAnswer(NamedTuple):
    """A model's answer to a question.

    choice and losses, the mean loss of each option, belong to questions with options.
    """

    correct: bool
    choice: int | None = None
    losses: tuple[float, ...] = ()


def decide(prompt: Prompt, scores: Sequence[np.ndarray], gold: int | None) -> CoreAnswer:
    """The option with the lowest mean loss, the first of equals; without gold, whether each token
    is the most likely.

    An option whose tokens are a prefix of all others has no scored token: it wins if it comes
    first.
    """
    if gold is None:
        return CoreAnswer(bool(scores[0].all()))
    means = [float(np.mean(losses)) if len(losses) else math.nan for losses in scores]
    losses = [means[branch] for branch in prompt.answers]
    choice = losses.index(min(losses))
    return CoreAnswer(choice == gold, choice, tuple(losses))


class CoreResult(NamedTuple):
    """A task's result. `centered` is 0 for guessing and 1 for a perfect score."""

    label: str
    shots: int
    examples: int
    accuracy: float
    centered: float
    seconds: float
    answers: list[CoreAnswer]


def answer(
    task: CoreTask,
    questions: Sequence[Question],
    prompts: Sequence[Prompt],
    score: Scorer,
    progress: Callable[[Prompt], None] = lambda prompt: None,
) -> list[CoreAnswer]:
    """The answers to prompts, in their order. `progress` is called with each prompt that is done."""
    answers: dict[int, CoreAnswer] = {}
    for index, scores in score(prompts, greedy=task.kind == "language_modeling"):
        answers[index] = decide(prompts[index], scores, questions[index].get("gold"))
        progress(prompts[index])
    return [answers[index] for index in range(len(prompts))]


def evaluate(
    tasks: Sequence[CoreTask],
    tokenizer: Tokenizer,
    score: Scorer,
    *,
    max_per_task: int = 0,
    max_length: int = 0,
    progress: Callable[[Prompt], None] = lambda prompt: None,
) -> Iterator[CoreResult]:
    """The result of each task when it is done; a thread tokenizes the next task meanwhile.

    max_per_task: questions, 0 for all. max_length: see build_prompts.
    """

    def prepare(task):
        questions = task.questions(max_per_task)
        return questions, build_prompts(task, questions, tokenizer, max_length=max_length)

    pool = ThreadPoolExecutor(1)
    try:
        pending = [pool.submit(prepare, task) for task in tasks[:1]]
        for number, task in enumerate(tasks, 1):
            started = time.monotonic()
            questions, prompts = pending.pop().result()
            pending = [pool.submit(prepare, task) for task in tasks[number : number + 1]]
            answers = answer(task, questions, prompts, score, progress)
            accuracy = sum(given.correct for given in answers) / len(answers)
            yield CoreResult(
                task.label,
                task.shots,
                len(answers),
                accuracy,
                center(accuracy, task.baseline),
                time.monotonic() - started,
                answers,
            )
    finally:
        pool.shutdown(cancel_futures=True)


# ---- The evaluation -----------------------------------------------------------------------------


class CoreEval:
    """The CORE score and the centered accuracy of each task; see base.Eval."""

    event = "core"
    at_start = False

    def __init__(self, run: RunContext):
        self._run = run
        self._tasks = load_bundle(run.config.core_bundle)

    @staticmethod
    def interval(config: FrozenConfigDict) -> int:
        return config.core_interval

    def measure(self, results: Results) -> dict[str, float]:
        score, rows = self._evaluate_tasks(results)
        return {"core": score, **{label: values["centered"] for label, values in rows.items()}}

    def table(self, results: Results) -> ResultTable:
        score, rows = self._evaluate_tasks(results)
        lines = [
            (
                label,
                values["shots"],
                values["examples"],
                f"{values['accuracy']:.6f}",
                f"{values['centered']:.6f}",
                f"{values['seconds']:.1f}",
            )
            for label, values in rows.items()
        ]
        seconds = sum(values["seconds"] for values in rows.values())
        lines.append(("CORE", "", "", "", f"{score:.6f}", f"{seconds:.1f}"))
        header = ("task", "shots", "questions", "accuracy", "centered", "seconds")
        return ResultTable("CORE", header, lines)

    def _evaluate_tasks(self, results: Results) -> tuple[float, dict[str, dict[str, Any]]]:
        """The CORE score, and the values of each task by label; tasks in `results` are not computed
        again.

        Each task goes into `results` when it is done, and a CSV table of all is written at the end.
        """
        run, names = self._run, {task.label: f"core {task.label}" for task in self._tasks}
        missing = [
            task
            for task in self._tasks
            if results.get(names[task.label], self._measured_on(task)) is None
        ]
        if len(missing) < len(self._tasks):
            done = len(self._tasks) - len(missing)
            run.say(f"{done} of {len(self._tasks)} CORE tasks are already done")
        for task, result, seconds_left in self._answer(missing):
            values = result._asdict()
            del values["label"], values["answers"]
            results.put(names[task.label], self._measured_on(task), values)
            run.say(
                f"{result.label}: {result.examples} questions, accuracy {result.accuracy:.4f}, "
                f"centered {result.centered:.4f}, {result.seconds:.1f} s; "
                f"about {datetime.timedelta(seconds=round(seconds_left))} left"
            )
        rows = {
            task.label: results.get(names[task.label], self._measured_on(task))
            for task in self._tasks
        }
        score = core_score({label: values["centered"] for label, values in rows.items()})
        seconds = sum(values["seconds"] for values in rows.values())
        results.put("core", {}, {"core": score, "seconds": seconds})
        results.write(results.path.with_suffix(".csv"), _to_csv(rows, score, seconds))
        return score, rows

    def _answer(self, tasks: list[CoreTask]) -> Iterator[tuple[CoreTask, CoreResult, float]]:
        """(task, result, estimated seconds left) of each task when it is done."""
        run, config = self._run, self._run.config
        total = self._estimate_tokens(tasks)
        done = 0

        def count(prompt: Prompt) -> None:
            nonlocal done
            done += run.scorer.cost(prompt)
            run.progress(done, total)

        evaluated = evaluate(
            tasks,
            run.tokenizer,
            run.scorer.bind(run.params),
            max_per_task=config.core_max_per_task,
            max_length=config.core_max_length,
            progress=count,
        )
        started = time.monotonic()
        for task, result in zip(tasks, evaluated, strict=True):
            yield task, result, (time.monotonic() - started) * max(0, total / done - 1)

    def _measured_on(self, task: CoreTask) -> dict[str, Any]:
        config = self._run.config
        return {
            "task": task.fingerprint(),
            "max_per_task": config.core_max_per_task,
            "max_length": config.core_max_length,
            **measured_with(self._run),
        }

    def _estimate_tokens(self, tasks: Sequence[CoreTask]) -> int:
        """Tokens to compute for tasks, estimated from a few questions of each."""
        run, config = self._run, self._run.config
        total = 0.0
        for task in tasks:
            count = task.content.count(b"\n")
            count = min(count, config.core_max_per_task or count)
            few = task.questions(4 * PROBE_QUESTIONS)
            prompts = build_prompts(
                task, few, run.tokenizer, max_length=config.core_max_length, limit=PROBE_QUESTIONS
            )
            total += count * sum(map(run.scorer.cost, prompts)) / len(prompts)
        return max(1, round(total))


def _to_csv(rows: Mapping[str, Mapping[str, Any]], score: float, seconds: float) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ("shots", "examples", "accuracy", "centered", "seconds")
    writer.writerow(("task", *names))
    writer.writerows((label, *(values[name] for name in names)) for label, values in rows.items())
    writer.writerow(("CORE", "", "", "", score, seconds))
    return text.getvalue()

"""Chat tasks, answered by a letter or in words, and ChatCORE, the centered mean of five of them.

Source: nanochat/scripts/chat_eval.py@92d63d4.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from etils import epath
from ml_collections import FrozenConfigDict

from MaxNano.evals import core
from MaxNano.evals.core_tasks import center
from MaxNano.evals.results import Results, ResultTable, measured_with
from MaxNano.inference.chat_tasks import (
    ProblemSet,
    Record,
    generate_answers,
    load_problems,
    make_engine,
)
from MaxNano.inference.engine import Engine
from MaxNano.inference.prompts import Prompt, Scorer
from MaxNano.tokenization.tokenizer import Tokenizer
from MaxNano.training.context import RunContext

CHATCORE = ("ARC-Easy/test", "ARC-Challenge/test", "MMLU/test", "GSM8K/test", "HumanEval/test")


class ChatEval:
    """Accuracy on chat_tasks, task by task, and ChatCORE; see base.Eval."""

    event = "chat"
    at_start = False

    def __init__(self, run: RunContext):
        config = run.config
        self._run = run
        limits = dict.fromkeys(("categorical", "generative"), config.chat_max_per_task)
        if run.is_training:
            limits = {
                "categorical": config.chat_interval_categorical,
                "generative": config.chat_interval_generative,
            }
        self._problem_sets = [
            load_problems(config, name, run.tokenizer, limits) for name in config.chat_tasks
        ]

    @staticmethod
    def interval(config: FrozenConfigDict) -> int:
        return config.chat_interval

    def measure(self, results: Results) -> dict[str, float]:
        values = self._evaluate_tasks(results)
        accuracies = {name: entry["accuracy"] for name, entry in values.items()}
        return {**chatcore(values), **accuracies}

    def table(self, results: Results) -> ResultTable:
        values = self._evaluate_tasks(results)
        scores = chatcore(values)
        results.put("chat", {}, scores)
        rows = [
            (
                name,
                entry["problems"],
                f"{entry['accuracy']:.6f}",
                f"{entry['centered']:.6f}",
                f"{entry['stopped']:.2f}" if "stopped" in entry else "",
                f"{entry['seconds']:.1f}",
            )
            for name, entry in values.items()
        ]
        rows += [(name, "", "", f"{score:.6f}", "", "") for name, score in scores.items()]
        header = ("task", "problems", "accuracy", "centered", "stopped", "seconds")
        return ResultTable("chat tasks", header, rows)

    def _evaluate_tasks(self, results: Results) -> dict[str, dict[str, Any]]:
        """{task: values}; those in `results` are not computed again.

        A task that cannot be judged on this machine, because no sandbox works, is left out.
        """
        run = self._run
        answer = _Answerer(run)
        values = {}
        for problems in self._problem_sets:
            measured_on = self._measured_on(problems)
            entry = results.get(f"chat {problems.name}", measured_on)
            if entry is not None:
                run.say(f"{problems.name} is already done")
            elif fault := _fault_of(problems):
                run.say(f"{problems.name} is left out: {fault}")
                continue
            else:
                started = time.monotonic()
                records = answer(problems)
                entry = _summarize(problems, records) | {"seconds": time.monotonic() - started}
                write_records(results, problems.name, records)
                results.put(f"chat {problems.name}", measured_on, entry)
                run.say(
                    f"{problems.name}: {len(records)} problems, accuracy {entry['accuracy']:.4f}, "
                    f"centered {entry['centered']:.4f}, {entry['seconds']:.1f} s"
                )
            values[problems.name] = entry
        return values

    def _measured_on(self, problems: ProblemSet) -> dict[str, Any]:
        config = self._run.config
        measured_on = {"content": problems.digest(), **measured_with(self._run)}
        if problems.task.kind == "generative":
            measured_on |= {
                "samples": config.chat_samples,
                "temperature": config.chat_temperature,
                "top_k": config.top_k,
                "seed": config.seed,
                "max_new_tokens": config.max_new_tokens,
                "max_length": config.decode_max_length or config.max_target_length,
            }
        return measured_on


class _Answerer:
    """Answers problems with the run's current parameters; scorer and engine are made when first
    needed.
    """

    def __init__(self, run: RunContext):
        self._run = run

    @cached_property
    def _score(self) -> Scorer:
        return self._run.scorer.bind(self._run.params)

    @cached_property
    def _engine(self) -> Engine:
        run = self._run
        return make_engine(run.setup, run.params, run.tokenizer)

    def __call__(self, problems: ProblemSet) -> list[Record]:
        """A record for each problem."""
        run, config = self._run, self._run.config
        if problems.task.kind == "categorical":
            return choose_letters(problems, run.tokenizer, self._score, run.progress)
        return generate_answers(
            problems,
            self._engine,
            samples=config.chat_samples,
            temperature=config.chat_temperature,
            top_k=config.top_k,
            max_tokens=config.max_new_tokens,
            seed=config.seed,
            on_step=run.progress,
        )


def choose_letters(
    problems: ProblemSet,
    tokenizer: Tokenizer,
    score: Scorer,
    on_answer: Callable[[], Any] = lambda: None,
) -> list[Record]:
    """A record for each problem: the model's answer is the most likely of the problem's letters."""
    prompts = []
    for conversation, ids in zip(problems.conversations, problems.prompts, strict=True):
        letters = [tokenizer.encode(letter) for letter in conversation["letters"]]
        branches = tuple(np.array([ids[-1], *letter], np.int32) for letter in letters)
        starts, answers = (1,) * len(letters), tuple(range(len(letters)))
        prompts.append(Prompt(np.array(ids[:-1], np.int32), branches, starts, answers))
    records: dict[int, Record] = {}
    for index, losses in score(prompts, greedy=False):
        conversation = problems.conversations[index]
        answer = core.decide(prompts[index], losses, gold=-1)
        said = conversation["letters"][answer.choice]
        records[index] = {
            **problems.record(index),
            "losses": dict(zip(conversation["letters"], answer.losses, strict=True)),
            "said": said,
            "right": problems.task.evaluate(conversation, said),
        }
        on_answer()
    return [records[index] for index in range(len(prompts))]


def _summarize(problems: ProblemSet, records: Sequence[Record]) -> dict[str, float]:
    """Number of problems, accuracy, and for free answers the share that ended with a stop token."""
    accuracy = sum(record["right"] for record in records) / len(records)
    values = {
        "problems": len(records),
        "accuracy": accuracy,
        "centered": center(accuracy, problems.task.baseline),
    }
    completions = [entry for record in records for entry in record.get("completions", ())]
    if completions:
        stopped = sum(completion["finish"] == "stop" for completion in completions)
        values["stopped"] = stopped / len(completions)
    return values


def chatcore(values: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """ChatCORE, the mean of its five tasks, and that of the three with letters, if they were
    measured.
    """
    parts = {"chatcore": CHATCORE, "chatcore_categorical": CHATCORE[:3]}
    return {
        name: sum(values[task]["centered"] for task in part) / len(part)
        for name, part in parts.items()
        if all(task in values for task in part)
    }


def write_records(results: Results, name: str, records: Sequence[Record]) -> epath.Path:
    """Write a task's records as JSON lines into the folder beside the results; returns the file."""
    stem = "".join(c if c.isalnum() or c in "-_" else "-" for c in name)
    path = results.path.with_suffix("") / f"{stem}.jsonl"
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    results.write(path, "".join(lines))
    return path


def _fault_of(problems: ProblemSet) -> str | None:
    """Why answers to a task cannot be judged on this machine; None if they can."""
    if problems.task.kind == "generative":
        try:
            problems.task.evaluate(problems.conversations[0], "")
        except ValueError as error:  # sandbox.SandboxError is a ValueError
            return str(error)
    return None

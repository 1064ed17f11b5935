"""Chat tasks put to a model, to choose letters or answer in words; and ChatCORE, their mean centered on guessing.

Every problem leaves a record, which can be read beside the run: what was asked, what was said, whether it is right.
Source: nanochat/scripts/chat_eval.py@92d63d4.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from MaxNano import tasks
from MaxNano.distributed import sharding
from MaxNano.evals import core
from MaxNano.evals.results import Results
from MaxNano.inference.engine import Engine
from MaxNano.inference.requests import Completion, Request
from MaxNano.models.setup import set_up_model
from MaxNano.tokenization.tokenizer import Tokenizer

SLOTS = {"cpu": 8, "other": 16}  # of a device, where chat_slots leaves it open
CHATCORE = ("ARC-Easy/test", "ARC-Challenge/test", "MMLU/test", "GSM8K/test", "HumanEval/test")

Record = dict[str, Any]


class Exam(NamedTuple):
    """Problems of one task, and their prompts in tokens."""

    name: str
    task: tasks.Task
    conversations: list[tasks.Conversation]
    prompts: list[list[int]]

    def digest(self) -> str:
        """sha256, in hex, of what is asked and of what is right."""
        return hashlib.sha256(json.dumps(self.conversations, sort_keys=True).encode()).hexdigest()


def make_exam(
    config: FrozenConfigDict, name: str, tokenizer: Tokenizer, limits: Mapping[str, int]
) -> Exam:
    """The exam of a task, at most limits[its kind] of its problems if that is not 0.

    Raises ValueError for a task that is only trained on, one without problems, and where data are missing.
    """
    task = tasks.open_task(config, name)
    if task.kind is None:
        raise ValueError(f"the task {name} is only trained on, it cannot be evaluated")
    count = min(len(task), limits[task.kind] or len(task))
    if not count:
        raise ValueError(f"the task {name} has no problems")
    conversations = [task.conversation(index) for index in range(count)]
    prompts = [tokenizer.render_for_completion(conversation) for conversation in conversations]
    return Exam(name, task, conversations, prompts)


def make_engine(
    config: FrozenConfigDict,
    mesh: Mesh,
    params: Any,
    tokenizer: Tokenizer,
    max_length: int | None = None,
) -> Engine:
    """The engine that answers, on all devices of a mesh; max_length as of Engine."""
    each = SLOTS.get(mesh.devices.flat[0].platform, SLOTS["other"])
    slots = config.chat_slots or each * sharding.data_parallel_size(mesh, config.logical_axis_rules)
    setup = set_up_model(config, mesh=mesh)
    return Engine(setup, params, tokenizer, slots=slots, max_length=max_length)


# ---- Answers ---------------------------------------------------------------------------------------------------------


def choose_letters(
    exam: Exam,
    tokenizer: Tokenizer,
    score: core.Scorer,
    on_answer: Callable[[], Any] = lambda: None,
) -> list[Record]:
    """A record for each problem: the likeliest of its letters is what the model says."""
    prompts = []
    for conversation, ids in zip(exam.conversations, exam.prompts, strict=True):
        letters = [tokenizer.encode(letter) for letter in conversation["letters"]]
        branches = tuple(np.array([ids[-1], *letter], np.int32) for letter in letters)
        several = range(len(letters))
        prompts.append(
            core.Prompt(np.array(ids[:-1], np.int32), branches, (1,) * len(letters), tuple(several))
        )
    records: dict[int, Record] = {}
    for index, losses in score(prompts, greedy=False):
        conversation = exam.conversations[index]
        answer = core.decide(prompts[index], losses, gold=-1)
        said = conversation["letters"][answer.choice]
        records[index] = {
            **_asked(exam, index),
            "losses": dict(zip(conversation["letters"], answer.losses, strict=True)),
            "said": said,
            "right": exam.task.evaluate(conversation, said),
        }
        on_answer()
    return [records[index] for index in range(len(prompts))]


def answer_in_words(
    exam: Exam,
    engine: Engine,
    *,
    samples: int,
    temperature: float,
    top_k: int,
    max_tokens: int,
    seed: int,
    on_step: Callable[[], Any] = lambda: None,
) -> list[Record]:
    """A record for each problem, with all its completions; right is a problem of which one completion is right.

    A prompt that leaves no room for an answer has no completion. on_step is called between steps of the engine.
    """
    special = engine.tokenizer.special
    posed = [index for index, prompt in enumerate(exam.prompts) if len(prompt) < engine.max_length]
    requests = [
        Request(
            prompt=tuple(exam.prompts[index]),
            max_tokens=max_tokens,
            samples=samples,
            temperature=temperature,
            top_k=top_k,
            seed=seed + index,
            stop_ids=frozenset({special.assistant_end, special.bos}),
            tools=True,
        )
        for index in posed
    ]
    answers = dict(zip(posed, engine.generate(requests, on_step), strict=True))

    def judge(index: int) -> Record:
        completions = [
            _judged(exam, index, one, engine.tokenizer) for one in answers.get(index, ())
        ]
        right = any(completion["right"] for completion in completions)
        return {**_asked(exam, index), "completions": completions, "right": right}

    # Some tasks run programs, each in two processes.
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        return list(pool.map(judge, range(len(exam.prompts))))


def _asked(exam: Exam, index: int) -> Record:
    *messages, answer = exam.conversations[index]["messages"]
    return {"problem": index, "messages": messages, "answer": answer["content"]}


def _judged(exam: Exam, index: int, completion: Completion, tokenizer: Tokenizer) -> Record:
    text = tokenizer.decode(
        completion.tokens
    )  # with the names of special tokens, as nanochat's graders see it
    right = exam.task.evaluate(exam.conversations[index], text)
    return {
        "text": text,
        "tokens": len(completion.tokens),
        "finish": completion.finish,
        "right": right,
    }


# ---- All tasks -------------------------------------------------------------------------------------------------------


def evaluate_exams(
    config: FrozenConfigDict,
    exams: Sequence[Exam],
    tokenizer: Tokenizer,
    score: core.Scorer,
    make_engine: Callable[[], Engine],
    results: Results,
    *,
    dtype: str,
    say: Callable[[str], None],
    on_step: Callable[[], Any] = lambda: None,
) -> dict[str, dict[str, Any]]:
    """The values of each task by name, of which those that `results` has are not computed again.

    Each task goes into `results` when it is done, its records into a file beside. make_engine is called once, if a
    task is to be answered in words; say gets a line for each task. A task that cannot be judged on this machine, for
    want of a sandbox, is left out. dtype: in which the model computes.
    """
    engine = None
    found = {}
    for exam in exams:
        of = {
            "content": exam.digest(),
            "tokenizer": tokenizer.fingerprint(),
            "dtype": dtype,
        }
        if exam.task.kind == "generative":
            of |= {
                "samples": config.chat_samples,
                "temperature": config.chat_temperature,
                "max_new_tokens": config.max_new_tokens,
                "max_length": config.decode_max_length or config.max_target_length,
            }
        values = results.get(f"chat {exam.name}", of)
        if values is not None:
            say(f"{exam.name} is done already")
        else:
            problem = _fault_of(exam)
            if problem:
                say(f"{exam.name} is left out: {problem}")
                continue
            started = time.monotonic()
            if exam.task.kind == "categorical":
                records = choose_letters(exam, tokenizer, score, on_step)
            else:
                engine = engine or make_engine()
                records = answer_in_words(
                    exam,
                    engine,
                    samples=config.chat_samples,
                    temperature=config.chat_temperature,
                    top_k=config.top_k,
                    max_tokens=config.max_new_tokens,
                    seed=config.seed,
                    on_step=on_step,
                )
            accuracy = sum(record["right"] for record in records) / len(records)
            values = {
                "problems": len(records),
                "accuracy": accuracy,
                "centered": core.center(accuracy, exam.task.baseline),
                "seconds": time.monotonic() - started,
            }
            completions = [one for record in records for one in record.get("completions", ())]
            if completions:  # by a token that ends a turn, not by max_new_tokens
                values["stopped"] = sum(one["finish"] == "stop" for one in completions) / len(
                    completions
                )
            write_records(results, exam.name, records)
            results.put(f"chat {exam.name}", of, values)
            say(
                f"{exam.name}: {len(records)} problems, accuracy {accuracy:.4f}, centered {values['centered']:.4f}, "
                f"{values['seconds']:.1f} s"
            )
        found[exam.name] = values
    return found


def summarize(found: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """{"chatcore": the mean over its five tasks, "chatcore_categorical": over the three with letters}, if asked."""
    parts = {"chatcore": CHATCORE, "chatcore_categorical": CHATCORE[:3]}
    return {
        name: sum(found[task]["centered"] for task in own) / len(own)
        for name, own in parts.items()
        if all(task in found for task in own)
    }


def write_records(results: Results, name: str, records: Sequence[Record]) -> epath.Path:
    """Write a task's records, a JSON object a line, into the folder beside the results; returns the file."""
    path = (
        results.path.with_suffix("")
        / f"{''.join(c if c.isalnum() or c in '-_' else '-' for c in name)}.jsonl"
    )
    results.write(
        path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    )
    return path


def _fault_of(exam: Exam) -> str | None:
    """Why no answer to a task can be judged here, None if it can."""
    if exam.task.kind == "generative":
        try:
            exam.task.evaluate(exam.conversations[0], "")
        except ValueError as error:  # sandbox.SandboxError is one
            return str(error)
    return None

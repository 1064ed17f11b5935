"""Runs a chat task on a model: the engine generates answers, the task grades them.

Reinforcement learning and the chat evaluation share this. Each problem leaves a record: what was
asked, what the model said, whether it is right.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from ml_collections import FrozenConfigDict

from MaxNano import tasks
from MaxNano.inference.engine import Engine
from MaxNano.inference.requests import Completion, Request
from MaxNano.models.setup import ModelSetup
from MaxNano.tokenization.tokenizer import Tokenizer

SLOTS = {"cpu": 8, "other": 16}  # sequences per data-parallel shard if chat_slots is null

Record = dict[str, Any]


class ProblemSet(NamedTuple):
    """Problems of one task, and their prompts in tokens."""

    name: str
    task: tasks.Task
    conversations: list[tasks.Conversation]
    prompts: list[list[int]]

    def digest(self) -> str:
        """sha256 in hex of the problems and their answers."""
        return hashlib.sha256(json.dumps(self.conversations, sort_keys=True).encode()).hexdigest()

    def record(self, index: int) -> Record:
        """The first part of a problem's record: what is asked, and the reference answer."""
        *messages, answer = self.conversations[index]["messages"]
        return {"problem": index, "messages": messages, "answer": answer["content"]}


def load_problems(
    config: FrozenConfigDict, name: str, tokenizer: Tokenizer, limits: Mapping[str, int]
) -> ProblemSet:
    """The problems of a task, at most limits[its kind] of them if that is not 0.

    Raises ValueError for a task that only serves training, one without problems, and missing data.
    """
    task = tasks.open_task(config, name)
    if task.kind is None:
        raise ValueError(f"the task {name} is for training only and cannot be evaluated")
    count = min(len(task), limits[task.kind] or len(task))
    if not count:
        raise ValueError(f"the task {name} has no problems")
    conversations = [task.conversation(index) for index in range(count)]
    prompts = [tokenizer.render_for_completion(conversation) for conversation in conversations]
    return ProblemSet(name, task, conversations, prompts)


def make_engine(
    setup: ModelSetup, params: Any, tokenizer: Tokenizer, max_length: int | None = None
) -> Engine:
    """An engine with chat_slots slots on all devices; max_length as in Engine."""
    per_device = SLOTS.get(setup.mesh.devices.flat[0].platform, SLOTS["other"])
    slots = setup.config.chat_slots or per_device * setup.data_parallel_size
    return Engine(setup, params, tokenizer, slots=slots, max_length=max_length)


def generate_answers(
    problems: ProblemSet,
    engine: Engine,
    *,
    samples: int,
    temperature: float,
    top_k: int,
    max_tokens: int,
    seed: int,
    on_step: Callable[[], Any] = lambda: None,
) -> list[Record]:
    """A record for each problem with all its completions; it is right if one completion is right.

    A prompt that leaves no room for an answer has no completion. on_step is called between steps of
    the engine.
    """
    special = engine.tokenizer.special
    fitting = [i for i, prompt in enumerate(problems.prompts) if len(prompt) < engine.max_length]
    requests = [
        Request(
            prompt=tuple(problems.prompts[index]),
            max_tokens=max_tokens,
            samples=samples,
            temperature=temperature,
            top_k=top_k,
            seed=seed + index,
            stop_ids=frozenset({special.assistant_end, special.bos}),
            tools=True,
        )
        for index in fitting
    ]
    completions = dict(zip(fitting, engine.generate(requests, on_step), strict=True))

    def grade(index: int) -> Record:
        graded = [
            _grade(problems, index, completion, engine.tokenizer)
            for completion in completions.get(index, ())
        ]
        right = any(entry["right"] for entry in graded)
        return {**problems.record(index), "completions": graded, "right": right}

    # Grading may run code; each sandbox takes two processes.
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        return list(pool.map(grade, range(len(problems.prompts))))


def _grade(
    problems: ProblemSet, index: int, completion: Completion, tokenizer: Tokenizer
) -> Record:
    # The text holds the names of special tokens, as nanochat's graders see it.
    text = tokenizer.decode(completion.tokens)
    return {
        "text": text,
        "tokens": len(completion.tokens),
        "finish": completion.finish,
        "right": problems.task.evaluate(problems.conversations[index], text),
    }

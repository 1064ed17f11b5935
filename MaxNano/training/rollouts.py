"""Reinforcement learning as a source of data: the model answers problems, and its answers become weighted rows.

Of the answers to one problem, those with more reward than their mean get positive weights and the others negative ones
(REINFORCE with that mean as baseline, as in GRPO, without its division by the spread). The weights are divided by the
tokens of all answers to the problem, so that every problem counts alike, and the train step is that of every stage.

Answers are drawn at temperature 1 from all tokens, which is the distribution whose log-probabilities are trained, by
the engine on the training mesh with the parameters of the step. Trained are the tokens that the model drew, the one
with which it stopped among them; not the prompt, and not what a tool said.
Sources: nanochat/scripts/chat_rl.py@92d63d4; https://arxiv.org/abs/2402.03300 (GRPO, and its estimate of the
divergence from a reference); https://arxiv.org/abs/2503.14476 (the mean over tokens).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, Sharding
from ml_collections import FrozenConfigDict

from MaxNano import pyconfig, tasks
from MaxNano.data.loader import Batch
from MaxNano.evals import chat
from MaxNano.inference.requests import Completion, Request
from MaxNano.tokenization.tokenizer import Tokenizer

Params = dict[str, Any]


class Answer(NamedTuple):
    """One answer to a problem."""

    prompt: Sequence[int]
    tokens: Sequence[int]  # what was drawn, and what tools said between it
    forced: Sequence[bool]  # of each token: a tool said it
    stopped: bool  # by drawing the token that ends an answer, which is not among the tokens
    reward: float
    logprobs: Sequence[float] | None = None  # of each token, when it was drawn


# ---- Problems -------------------------------------------------------------------------------------------------------


class Position(NamedTuple):
    """Where in the endless order of a task's problems the next one stands."""

    place: int
    left_out: int  # problems before it whose prompts were too long


class Problem(NamedTuple):
    """A problem and its prompt."""

    conversation: tasks.Conversation
    prompt: list[int]


def next_problems(
    task: tasks.Task, tokenizer: Tokenizer, position: Position, count: int, length: int
) -> tuple[list[Problem], Position]:
    """The next `count` problems with prompts of less than `length` tokens, and the position behind them.

    Raises ValueError where no problem of a whole pass has such a prompt.
    """
    place, left_out = position
    problems: list[Problem] = []
    while len(problems) < count:
        conversation = task.conversation(place % len(task))
        prompt = tokenizer.render_for_completion(conversation)
        place += 1
        if len(prompt) < length:
            problems.append(Problem(conversation, prompt))
            continue
        left_out += 1
        if not problems and place - position.place >= len(task):
            raise ValueError(
                f"rl_task: all prompts have {length} tokens or more; raise rl_row_tokens"
            )
    return problems, Position(place, left_out)


def open_task(config: FrozenConfigDict) -> tasks.Task:
    """rl_task. Raises ValueError where it has no problems or no reward, or its data are missing."""
    task = tasks.open_task(config, config.rl_task)
    if type(task).evaluate is tasks.Task.evaluate and type(task).reward is tasks.Task.reward:
        raise ValueError(
            f"rl_task={config.rl_task} is only trained on; choose a task that judges or rewards an answer"
        )
    if not len(task):
        raise ValueError(f"rl_task={config.rl_task} has no problems")
    return task


def steps_of_passes(config: FrozenConfigDict) -> int:
    """Optimizer steps in which `chat_epochs` passes over the problems of rl_task are used up."""
    return max(1, int(config.chat_epochs * (len(open_task(config)) // config.rl_problems)))


# ---- Batches --------------------------------------------------------------------------------------------------------


def make_batch(groups: Sequence[Sequence[Answer]], length: int, end_id: int) -> Batch:
    """Rows of `length` tokens, an answer each, of the answers to each problem.

    weights: an answer's reward less the mean of its group, divided so that the train step's mean over all targets
    becomes the mean over groups of the mean over their tokens. Beside what every batch has: `drawn_losses`, minus the
    log-probability with which each target was drawn, nan where it is not known; `shares`, the weights of a reward of 1.
    """
    rows = sum(map(len, groups))
    batch = {
        "inputs": np.full((rows, length), end_id, np.int32),
        "targets": np.full((rows, length), -1, np.int32),
        "weights": np.zeros((rows, length), np.float32),
        "drawn_losses": np.full((rows, length), np.nan, np.float32),
        "shares": np.zeros((rows, length), np.float32),
    }
    start = 0
    for group in groups:
        part = slice(start, start + len(group))
        for row, answer in enumerate(group, start):
            ids = [*answer.prompt, *answer.tokens, *[end_id] * answer.stopped]
            is_drawn = [not forced for forced in answer.forced] + [True] * answer.stopped
            first = len(answer.prompt) - 1  # whose target is the first token of the answer
            batch["inputs"][row, : len(ids) - 1] = ids[:-1]
            batch["targets"][row, first : len(ids) - 1] = np.where(is_drawn, ids[first + 1 :], -1)
            if answer.logprobs is not None:
                batch["drawn_losses"][row, first : first + len(answer.tokens)] = np.negative(
                    answer.logprobs
                )
        rewards = np.array([answer.reward for answer in group])
        is_target = batch["targets"][part] >= 0
        batch["shares"][part] = is_target / max(1, is_target.sum()) / len(groups)
        batch["weights"][part] = batch["shares"][part] * (rewards - rewards.mean())[:, None]
        start += len(group)
    count = (batch["targets"] >= 0).sum()
    batch["weights"] *= count
    batch["shares"] *= count
    return batch


class Rollouts:
    """Endless batches, each drawn with the parameters of its step: what train.py's loop takes for a loader.

    params: gives the parameters of now. sharding: how the arrays of a batch lie. score_reference: a batch -> losses
    (rows, length) of its targets by the model from which rl_kl must not stray. on_step is called between steps of the
    engine.
    """

    def __init__(
        self,
        config: FrozenConfigDict,
        mesh: Mesh,
        tokenizer: Tokenizer,
        params: Callable[[], Params],
        sharding: Sharding,
        *,
        state: Mapping[str, Any] | None = None,
        score_reference: Callable[[dict[str, jax.Array]], jax.Array] | None = None,
        on_step: Callable[[], Any] = lambda: None,
    ):
        self._config = config
        self._task = open_task(config)
        self._params = params
        self._sharding = sharding
        self._score_reference = score_reference
        self._on_step = on_step
        self._vocabulary = tokenizer
        self._position = Position(state["place"], state["left_out"]) if state else Position(0, 0)
        self._length = pyconfig.row_length(config)
        self._engine = chat.make_engine(config, mesh, params(), tokenizer, max_length=self._length)
        self._exam = None
        if config.eval_interval:
            limits = dict.fromkeys(("categorical", "generative"), config.rl_eval_problems)
            self._exam = chat.make_exam(config, config.rl_eval_task, tokenizer, limits)
            if self._exam.task.kind != "generative":
                raise ValueError(
                    f"rl_eval_task={config.rl_eval_task} is not answered in words; choose another"
                )
        self._ready: tuple[dict[str, jax.Array], Position] | None = None
        self._facts: dict[str, float] = {}

    def fill(self) -> None:
        """Draw the answers of the next batch."""
        if self._ready is not None:
            return
        config, end_id = self._config, self._vocabulary.special.assistant_end
        started = time.monotonic()
        problems, position = next_problems(
            self._task, self._vocabulary, self._position, config.rl_problems, self._length
        )
        groups = self._draw(problems)
        host = make_batch(groups, self._length, end_id)
        shares = host.pop("shares")
        if not config.rl_clip:
            del host["drawn_losses"]
        batch = {name: self._place(rows) for name, rows in host.items()}
        if config.rl_kl:
            batch["kl_weights"] = self._place(config.rl_kl * shares)
            batch["reference_losses"] = self._score_reference(batch)
        self._ready = batch, position
        answers = [answer for group in groups for answer in group]
        self._facts = {
            "epoch": 1 + (position.place - 1) // len(self._task),
            "reward": float(np.mean([answer.reward for answer in answers])),
            "answer_tokens": float(np.mean([len(answer.tokens) for answer in answers])),
            "stopped": float(np.mean([answer.stopped for answer in answers])),
            "rollout_seconds": time.monotonic() - started,
        }

    def __next__(self) -> dict[str, jax.Array]:
        self.fill()
        (batch, self._position), self._ready = self._ready, None
        return batch

    def evaluate(self) -> dict[str, float]:
        """{pass@1 ... pass@rl_eval_samples} on rl_eval_task: problems of which one of the first k answers is right."""
        config = self._config
        self._engine.set_params(self._params())
        records = chat.answer_in_words(
            self._exam,
            self._engine,
            samples=config.rl_eval_samples,
            temperature=1.0,
            top_k=0,
            max_tokens=config.max_new_tokens,
            seed=config.seed,
            on_step=self._on_step,
        )
        return pass_at_k(records, config.rl_eval_samples)

    def state(self) -> dict[str, Any]:
        """What a later Rollouts needs to go on behind the last batch handed out; JSON-able."""
        return {**self._position._asdict(), "readers": {}}

    def position(self) -> dict[str, float]:
        """How the answers of the last batch were, in numbers."""
        return {**self._facts, "problems_left_out": self._position.left_out}

    def close(self) -> None:
        """Nothing is under way between batches."""

    def _draw(self, problems: Sequence[Problem]) -> list[list[Answer]]:
        """The answers to each problem, by the parameters of now."""
        config = self._config
        requests = [
            Request(
                prompt=tuple(problem.prompt),
                max_tokens=config.max_new_tokens,
                samples=config.rl_samples,
                seed=(config.seed << 40) + self._position.place + number,
                stop_ids=frozenset({self._vocabulary.special.assistant_end}),
                logprobs=0 if config.rl_clip else None,
                tools=True,
            )
            for number, problem in enumerate(problems)
        ]
        self._engine.set_params(self._params())
        completions = self._engine.generate(requests, self._on_step)
        return [
            [self._rewarded(problem, one) for one in group]
            for problem, group in zip(problems, completions, strict=True)
        ]

    def _rewarded(self, problem: Problem, completion: Completion) -> Answer:
        text = self._vocabulary.decode(completion.tokens)
        return Answer(
            prompt=problem.prompt,
            tokens=completion.tokens,
            forced=completion.forced,
            stopped=completion.finish == "stop",
            reward=self._task.reward(problem.conversation, text),
            logprobs=[one.logprob for one in completion.logprobs] if completion.logprobs else None,
        )

    def _place(self, rows: np.ndarray) -> jax.Array:
        """Rows that every host has, as a global array."""
        return jax.make_array_from_callback(rows.shape, self._sharding, lambda part: rows[part])


def pass_at_k(records: Sequence[chat.Record], samples: int) -> dict[str, float]:
    """The share of problems of which one of the first k answers is right, for each k."""
    right = np.array(
        [[one["right"] for one in r["completions"]] or [False] * samples for r in records]
    )
    return {f"pass@{k}": float(right[:, :k].any(axis=1).mean()) for k in range(1, samples + 1)}

"""The stage of reinforcement learning: rollouts of the model become weighted training rows.

The advantage of a rollout is its reward minus the mean reward of all rollouts of its problem
(REINFORCE with a group baseline, as in GRPO, without the division by the standard deviation).
Advantages are divided by the number of tokens of the group, so that every problem counts alike. The
train step is the same as in every other stage.

The engine samples rollouts on the training mesh at temperature 1 from the whole distribution, with
the parameters of the current step. The targets are the sampled tokens, the stop token included;
prompts and tool outputs are no targets. Sources: nanochat/scripts/chat_rl.py@92d63d4;
https://arxiv.org/abs/2402.03300 (GRPO, and its estimate of the KL divergence);
https://arxiv.org/abs/2503.14476 (the mean over tokens).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from MaxNano import pyconfig, tasks
from MaxNano.data.loader import Batch
from MaxNano.inference import chat_tasks
from MaxNano.inference.requests import Completion, Request
from MaxNano.models import losses
from MaxNano.tokenization.tokenizer import Tokenizer
from MaxNano.training.start import load_start_params

if TYPE_CHECKING:
    from MaxNano.training.context import RunContext


class Rollout(NamedTuple):
    """One sampled answer to a problem."""

    prompt: Sequence[int]
    tokens: Sequence[int]  # sampled tokens and tool outputs
    forced: Sequence[bool]  # for each token: it is tool output
    stopped: bool  # it ended with the stop token, which is not among the tokens
    reward: float
    logprobs: Sequence[float] | None = None  # of each token when it was sampled


# ---- Problems -----------------------------------------------------------------------------------


class ProblemPosition(NamedTuple):
    """A position in the endless sequence of a task's problems."""

    index: int  # of the next problem, over all passes
    left_out: int  # problems before it whose prompts were too long


class Problem(NamedTuple):
    """A problem and its prompt."""

    conversation: tasks.Conversation
    prompt: list[int]


def next_problems(
    task: tasks.Task, tokenizer: Tokenizer, position: ProblemPosition, count: int, length: int
) -> tuple[list[Problem], ProblemPosition]:
    """The next `count` problems with prompts shorter than `length` tokens, and the position after
    them.

    Raises ValueError if no problem of a whole pass has such a prompt.
    """
    index, left_out = position
    problems: list[Problem] = []
    while len(problems) < count:
        conversation = task.conversation(index % len(task))
        prompt = tokenizer.render_for_completion(conversation)
        index += 1
        if len(prompt) < length:
            problems.append(Problem(conversation, prompt))
            continue
        left_out += 1
        if not problems and index - position.index >= len(task):
            raise ValueError(
                f"rl_task: all prompts have {length} tokens or more; raise rl_row_tokens"
            )
    return problems, ProblemPosition(index, left_out)


def open_task(config: FrozenConfigDict) -> tasks.Task:
    """rl_task. Raises ValueError if it has no problems or no reward, or if its data are missing."""
    task = tasks.open_task(config, config.rl_task)
    if type(task).evaluate is tasks.Task.evaluate and type(task).reward is tasks.Task.reward:
        raise ValueError(
            f"rl_task={config.rl_task} is for training only; choose a task that grades answers"
        )
    if not len(task):
        raise ValueError(f"rl_task={config.rl_task} has no problems")
    return task


def steps_of_passes(config: FrozenConfigDict) -> int:
    """Optimizer steps in chat_epochs passes over the problems of rl_task."""
    return max(1, int(config.chat_epochs * (len(open_task(config)) // config.rl_problems)))


# ---- Batches ------------------------------------------------------------------------------------


def make_batch(groups: Sequence[Sequence[Rollout]], length: int, end_id: int) -> Batch:
    """One row of `length` tokens per rollout; a group holds the rollouts of one problem.

    weights: advantages, scaled so that the train step's mean over all targets becomes the mean over
    groups of the mean over the tokens of a group. Columns beside those of every batch:
    old_losses: minus the log-probability of each target when it was sampled, nan if unknown.
    shares: the weights that an advantage of 1 has.
    """
    rows = sum(map(len, groups))
    batch = {
        "inputs": np.full((rows, length), end_id, np.int32),
        "targets": np.full((rows, length), -1, np.int32),
        "weights": np.zeros((rows, length), np.float32),
        "old_losses": np.full((rows, length), np.nan, np.float32),
        "shares": np.zeros((rows, length), np.float32),
    }
    first_row = 0
    for group in groups:
        part = slice(first_row, first_row + len(group))
        for row, rollout in enumerate(group, first_row):
            ids = [*rollout.prompt, *rollout.tokens, *[end_id] * rollout.stopped]
            is_sampled = [not forced for forced in rollout.forced] + [True] * rollout.stopped
            first = len(rollout.prompt) - 1  # its target is the first token of the answer
            batch["inputs"][row, : len(ids) - 1] = ids[:-1]
            batch["targets"][row, first : len(ids) - 1] = np.where(is_sampled, ids[first + 1 :], -1)
            if rollout.logprobs is not None:
                batch["old_losses"][row, first : first + len(rollout.tokens)] = np.negative(
                    rollout.logprobs
                )
        rewards = np.array([rollout.reward for rollout in group])
        is_target = batch["targets"][part] >= 0
        batch["shares"][part] = is_target / max(1, is_target.sum()) / len(groups)
        batch["weights"][part] = batch["shares"][part] * (rewards - rewards.mean())[:, None]
        first_row += len(group)
    count = (batch["targets"] >= 0).sum()
    batch["weights"] *= count
    batch["shares"] *= count
    return batch


class Rollouts:
    """The training batches: each is sampled with the parameters of its step. A stages.BatchStream."""

    def __init__(self, run: RunContext, state: Mapping[str, Any] | None):
        """state: from `state` of an earlier stream, None at the start of a run."""
        config = run.config
        self._run, self._config, self._tokenizer = run, config, run.tokenizer
        self._task = open_task(config)
        self._reference = _load_reference(run)
        self._position = (
            ProblemPosition(state["place"], state["left_out"]) if state else ProblemPosition(0, 0)
        )
        self._length = pyconfig.row_length(config)
        self._ready: tuple[dict[str, jax.Array], ProblemPosition] | None = None
        self._facts: dict[str, float] = {}
        self._eval_problems = _load_eval_problems(run) if config.eval_interval else None

    @cached_property
    def _engine(self) -> chat_tasks.Engine:
        run = self._run
        return chat_tasks.make_engine(run.setup, run.params, run.tokenizer, max_length=self._length)

    def fill(self) -> None:
        """Sample the rollouts of the next batch."""
        if self._ready is not None:
            return
        config, end_id = self._config, self._tokenizer.special.assistant_end
        started = time.monotonic()
        problems, position = next_problems(
            self._task, self._tokenizer, self._position, config.rl_problems, self._length
        )
        groups = self._sample(problems)
        host = make_batch(groups, self._length, end_id)
        shares = host.pop("shares")
        if not config.rl_clip:
            del host["old_losses"]
        batch = {name: self._put(rows) for name, rows in host.items()}
        if config.rl_kl:
            batch["kl_weights"] = self._put(config.rl_kl * shares)
            batch["reference_losses"] = self._run.programs.score(self._reference, batch)
        self._ready = batch, position
        rollouts = [rollout for group in groups for rollout in group]
        self._facts = {
            "epoch": 1 + (position.index - 1) // len(self._task),
            "reward": float(np.mean([rollout.reward for rollout in rollouts])),
            "answer_tokens": float(np.mean([len(rollout.tokens) for rollout in rollouts])),
            "stopped": float(np.mean([rollout.stopped for rollout in rollouts])),
            "rollout_seconds": time.monotonic() - started,
        }

    def shortage(self) -> None:
        """Nothing runs ahead: `fill` raises."""

    def __next__(self) -> dict[str, jax.Array]:
        self.fill()
        (batch, self._position), self._ready = self._ready, None
        return batch

    def evaluate(self) -> dict[str, float]:
        """{"pass@k": share of the problems of rl_eval_task with a right answer among the first k}."""
        config = self._config
        self._engine.set_params(self._run.params)
        records = chat_tasks.generate_answers(
            self._eval_problems,
            self._engine,
            samples=config.rl_eval_samples,
            temperature=1.0,
            top_k=0,
            max_tokens=config.max_new_tokens,
            seed=config.seed,
            on_step=self._run.progress,
        )
        return pass_at_k(records, config.rl_eval_samples)

    def state(self) -> dict[str, Any]:
        """What resumes the stream after the last batch that was handed out; JSON-able."""
        index, left_out = self._position
        return {"place": index, "left_out": left_out, "readers": {}}

    def position(self) -> dict[str, float]:
        """Mean reward, length and duration of the last batch's rollouts, for the step line."""
        return {**self._facts, "problems_left_out": self._position.left_out}

    def close(self) -> None:
        """Nothing runs between batches."""

    def _sample(self, problems: Sequence[Problem]) -> list[list[Rollout]]:
        """rl_samples rollouts of each problem, with the current parameters."""
        config = self._config
        requests = [
            Request(
                prompt=tuple(problem.prompt),
                max_tokens=config.max_new_tokens,
                samples=config.rl_samples,
                seed=(config.seed << 40) + self._position.index + number,
                stop_ids=frozenset({self._tokenizer.special.assistant_end}),
                logprobs=0 if config.rl_clip else None,
                tools=True,
            )
            for number, problem in enumerate(problems)
        ]
        self._engine.set_params(self._run.params)
        completions = self._engine.generate(requests, self._run.progress)
        return [
            [self._reward(problem, completion) for completion in group]
            for problem, group in zip(problems, completions, strict=True)
        ]

    def _reward(self, problem: Problem, completion: Completion) -> Rollout:
        text = self._tokenizer.decode(completion.tokens)
        logprobs = [entry.logprob for entry in completion.logprobs]
        return Rollout(
            prompt=problem.prompt,
            tokens=completion.tokens,
            forced=completion.forced,
            stopped=completion.finish == "stop",
            reward=self._task.reward(problem.conversation, text),
            logprobs=logprobs or None,
        )

    def _put(self, rows: np.ndarray) -> jax.Array:
        """Rows that every host has, as a global array."""
        sharding = self._run.rows_sharding
        return jax.make_array_from_callback(rows.shape, sharding, lambda part: rows[part])


def _load_eval_problems(run: RunContext) -> chat_tasks.ProblemSet:
    config = run.config
    limits = dict.fromkeys(("categorical", "generative"), config.rl_eval_problems)
    problems = chat_tasks.load_problems(config, config.rl_eval_task, run.tokenizer, limits)
    if problems.task.kind != "generative":
        raise ValueError(
            f"rl_eval_task={config.rl_eval_task} is answered by a letter; choose a task with free answers"
        )
    return problems


def _load_reference(run: RunContext) -> dict[str, Any] | None:
    """The parameters of load_from, to which rl_kl measures the divergence; None if rl_kl is 0."""
    if not run.config.rl_kl:
        return None
    if run.config.load_from is None:
        raise ValueError("rl_kl needs load_from, the run of the reference model; or set rl_kl=0")
    return load_start_params(run.setup, run.tokenizer.fingerprint())


# ---- Loss and validation ------------------------------------------------------------------------


def batch_columns(config: FrozenConfigDict) -> dict[str, Any]:
    """The dtypes of the columns that rl_clip and rl_kl add to a batch."""
    columns = {"old_losses": jnp.float32} if config.rl_clip else {}
    if config.rl_kl:
        columns |= {"kl_weights": jnp.float32, "reference_losses": jnp.float32}
    return columns


def policy_losses(
    config: FrozenConfigDict, nll: jax.Array, batch: Mapping[str, jax.Array]
) -> jax.Array:
    """What each target adds to the loss, (rows, L): the policy gradient, clipped, and the KL
    penalty.
    """
    if config.rl_clip:
        terms = losses.clipped_policy_losses(
            nll, batch["old_losses"], batch["weights"], config.rl_clip
        )
    else:
        terms = nll * batch["weights"]
    if config.rl_kl:
        terms += batch["kl_weights"] * losses.divergence(nll, batch["reference_losses"])
    return terms


def evaluate(run: RunContext) -> dict[str, float]:
    """pass@k on rl_eval_task, with the engine that samples the rollouts."""
    return run.batches.evaluate()


def pass_at_k(records: Sequence[chat_tasks.Record], samples: int) -> dict[str, float]:
    """The share of problems with a right answer among the first k, for each k up to `samples`."""
    right = np.array(
        [
            [completion["right"] for completion in record["completions"]] or [False] * samples
            for record in records
        ]
    )
    return {f"pass@{k}": float(right[:, :k].any(axis=1).mean()) for k in range(1, samples + 1)}

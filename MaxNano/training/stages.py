"""STAGES: pretraining, supervised fine-tuning and reinforcement learning, one row each.

A batch is `inputs`, `targets` and `weights`, each (rows, length), and the columns that a stage
adds. A target of -1 is ignored. Everything else about a stage that training must know is in its
row; what the config must know before JAX is imported is in stage_configs.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from ml_collections import FrozenConfigDict

from MaxNano import pyconfig
from MaxNano.data import conversations
from MaxNano.data.loader import (
    DevicePrefetch,
    Loader,
    Shortage,
    host_share,
    make_loader,
    put_global,
)
from MaxNano.distributed.preemption import LOOKAHEAD_BATCHES
from MaxNano.stage_configs import stage_config
from MaxNano.tokenization.tokenizer import load_tokenizer
from MaxNano.training import rollouts
from MaxNano.training.validation import bits_per_byte, tell_if_long

if TYPE_CHECKING:
    from MaxNano.training.context import RunContext

Columns = Mapping[str, jax.Array]


class BatchStream(Protocol):
    """Endless batches of global arrays, which can be resumed."""

    def fill(self) -> None:
        """Wait until the next batch is ready, or known to be impossible to make."""

    def shortage(self) -> Shortage | None:
        """What is left if no further batch can be made; else None."""

    def __next__(self) -> dict[str, jax.Array]: ...

    def state(self) -> dict[str, Any]:
        """What resumes the stream after the last batch that __next__ returned; JSON-able."""

    def position(self) -> Mapping[str, float]:
        """Where in the data the last batch is, for the step line."""

    def close(self) -> None: ...


class Stage(NamedTuple):
    """A way to train. `run` is a RunContext."""

    # (run, state of a checkpoint's stream or None) -> the training batches.
    open_batches: Callable[[RunContext, Mapping[str, Any] | None], BatchStream]
    # run -> {metric: value} on held-out data.
    evaluate: Callable[[RunContext], dict[str, float]]
    # (config, negative log-likelihood of each target (rows, L), batch) -> terms whose sum over the
    # whole batch, divided by `loss_count` of it, is the loss.
    loss: Callable[[FrozenConfigDict, jax.Array, Columns], jax.Array]
    loss_count: Callable[[Columns], jax.Array]
    # config -> dtypes of the columns beside inputs, targets and weights, each (rows, L).
    batch_columns: Callable[[FrozenConfigDict], dict[str, Any]] = lambda config: {}
    # config -> optimizer steps, if the stage's horizon follows from the data.
    horizon_steps: Callable[[FrozenConfigDict], int] | None = None


def stage_of(config: FrozenConfigDict) -> Stage:
    """The stage that a config chooses."""
    return STAGES[stage_config(config).name]


def with_horizon(config: FrozenConfigDict) -> FrozenConfigDict:
    """The config with the steps that follow from the data, unless a key sets them."""
    if not pyconfig.horizon_is_open(config):
        return config
    return pyconfig.replace(config, "chat_epochs", steps=stage_of(config).horizon_steps(config))


# ---- Stages that read text or conversations -----------------------------------------------------


def weigh_losses(config: FrozenConfigDict, nll: jax.Array, batch: Columns) -> jax.Array:
    """Each target's negative log-likelihood times its weight, (rows, L)."""
    return nll * batch["weights"]


def count_targets(batch: Columns) -> jax.Array:
    """Number of targets that are not ignored, int32."""
    return jnp.sum(batch["targets"] >= 0)


def open_loader(run: RunContext, split: str, state: Mapping[str, Any] | None = None) -> Loader:
    """This host's rows of the batches of a split. A line says if data_readers is reduced."""
    rows, asked = run.setup.plan.rows, run.config.data_readers
    share = host_share(run.rows_sharding, rows)
    loader = make_loader(run.config, run.tokenizer, split, batch_rows=rows, state=state, **share)
    if loader.readers < asked:
        data = "training" if split == "train" else split
        readers = "1 reader" if loader.readers == 1 else f"{loader.readers} readers"
        run.say(f"Reading the {data} data with {readers}: too little for data_readers={asked}")
    return loader


def open_text_batches(run: RunContext, state: Mapping[str, Any] | None) -> DevicePrefetch:
    """The training split, packed, with batches in transfer to the devices ahead of the step."""
    loader = open_loader(run, "train", state)
    least = LOOKAHEAD_BATCHES if jax.process_count() > 1 else 0
    return DevicePrefetch(loader, run.rows_sharding, max(run.config.prefetch_batches, least))


def count_text_bits(run: RunContext) -> Callable[[Mapping], tuple[jax.Array, jax.Array]]:
    """batch of this host -> (nats, bytes) of the global batch, with the current parameters."""
    params, rows = run.params, run.rows_sharding
    return lambda batch: run.programs.evaluate(params, put_global(batch, rows))


def evaluate_text(run: RunContext) -> dict[str, float]:
    """{"bpb": bits per byte} of the held-out rows."""

    def checked() -> Iterator[Mapping]:
        for batch in tell_if_long(run.held_out, len(run.held_out), "Each validation", run.say):
            run.progress()
            yield batch

    return {"bpb": bits_per_byte(count_text_bits(run), checked())}


def _steps_of_conversations(config: FrozenConfigDict) -> int:
    return conversations.steps_of_passes(config, load_tokenizer(config))


STAGES: dict[str, Stage] = {
    "pretrain": Stage(open_text_batches, evaluate_text, weigh_losses, count_targets),
    "sft": Stage(
        open_text_batches,
        evaluate_text,
        weigh_losses,
        count_targets,
        horizon_steps=_steps_of_conversations,
    ),
    "rl": Stage(
        rollouts.Rollouts,
        rollouts.evaluate,
        rollouts.policy_losses,
        count_targets,
        batch_columns=rollouts.batch_columns,
        horizon_steps=rollouts.steps_of_passes,
    ),
}

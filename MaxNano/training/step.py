"""The steps of a run: train, evaluate, score and greedy, as functions, jitted and compiled.

The train step is the same in every stage. The stage (stages.py) gives the batches and the loss of
each target.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from MaxNano import pyconfig
from MaxNano.distributed import hardware, sharding
from MaxNano.models import losses
from MaxNano.models.transformer import STACKED, Transformer
from MaxNano.optimizers import schedules
from MaxNano.training.setup import RunSetup
from MaxNano.training.state import TrainState


def run_model(setup: RunSetup, params, tokens: jax.Array) -> tuple[Transformer, jax.Array]:
    """Inside shard_map: the model around a working copy, and its hidden states of tokens (rows, L).

    Embedding and head, which are still sharded with FSDP, are gathered here; layers gather theirs.
    """
    specs = setup.gather_specs()[1] if setup.gathers_by_layer else None
    with jax.named_scope("gather"):
        params = {
            name: sharding.gather_in_pass(x, specs[name], setup.numerics.dtype)
            if specs and name not in STACKED and any(specs[name])
            else x
            for name, x in params.items()
        }
    bound = setup.model.bind(params)
    return bound, bound(tokens, specs)


def batch_losses(setup: RunSetup, params, batch) -> jax.Array:
    """Negative log-likelihood of each target in nats, float32 (rows, L), 0 where the target is -1.

    params: a working copy.
    """
    config = setup.config
    bound, hidden = run_model(setup, params, batch["inputs"])
    with jax.named_scope("loss"):
        return losses.token_losses(
            hidden,
            bound.lm_head[...],
            batch["targets"],
            config.vocab_size,
            config.logits_soft_cap,
            setup.vocab_chunk,
        )


def count_bits(token_losses: jax.Array, targets: jax.Array, token_bytes: jax.Array):
    """(nats, bytes) of the targets that stand for bytes, float32 scalars; their quotient gives bits
    per byte.
    """
    size = jnp.where(targets >= 0, token_bytes[jnp.maximum(targets, 0)], 0)
    return jnp.sum(jnp.where(size > 0, token_losses, 0)), jnp.sum(size).astype(jnp.float32)


def working_copy(setup: RunSetup, params):
    """Inside shard_map: the parameters, all-gathered from their shards once per step.

    Matrices are cast to the compute dtype before the all-gather. With FSDP they stay sharded over
    its axis, in their dtype: `run_model` gathers them.
    """

    def gather(x, now, later):
        cast = x.ndim > 1 and not any(later)
        return sharding.gather(x.astype(setup.numerics.dtype) if cast else x, now)

    with jax.named_scope("gather"):
        return jax.tree.map(gather, params, *setup.gather_specs())


def reduce_gradients(setup: RunSetup, grads):
    """Inside shard_map: gradients of a working copy, summed over the devices in the parameters'
    dtypes; each device keeps its shards.

    The backward pass has summed what it gathered by layer.
    """

    def reduce(g, p, now, later):
        summed = {axis for part in later for axis in sharding.axes_of(part)}
        left = [axis for axis in setup.batch_axes if axis not in summed]
        return sharding.reduce(g.astype(p.dtype), now, left)

    with jax.named_scope("reduce"):
        return jax.tree.map(reduce, grads, setup.abstract.params, *setup.gather_specs())


def train_step(
    state: TrainState, batch: dict[str, jax.Array], token_bytes: jax.Array, *, setup: RunSetup
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update from one batch of `plan.rows` rows; returns the next state and the step's metrics.

    Gradient accumulation: each device sums the gradients of its micro-batches in float32. One
    reduce-scatter then sums them over the devices, and each device updates its shard of the
    parameters and optimizer state (ZeRO). With FSDP each layer's gradients are reduce-scattered in
    every backward pass, and each device sums its shards. The loss is the sum of the stage's terms
    over the count of the whole batch, so that micro-batches with few targets have little weight. If
    the loss or the gradient is not finite, parameters and optimizer state stay bit for bit as they
    are, and the metric `skipped` is 1.
    """
    config, plan, stage = setup.config, setup.plan, setup.stage
    axes = setup.batch_axes
    specs = setup.manual_specs(setup.abstract.params)

    def local_gradients(params, batch, token_bytes):
        params = working_copy(setup, params)
        count = sharding.sum_over(stage.loss_count(batch), axes)

        def loss_fn(params, micro):
            nll = batch_losses(setup, params, micro)
            loss = jnp.sum(stage.loss(config, nll, micro)) / jnp.maximum(count, 1)
            return loss, count_bits(nll, micro["targets"], token_bytes)

        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        if plan.accumulation_steps == 1:
            sums, grads = grad_fn(params, batch)
        else:

            def accumulate(total, micro):
                return jax.tree.map(jnp.add, total, grad_fn(params, micro)), None

            def zeros(tree):
                return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)

            start = ((jnp.float32(0), (jnp.float32(0), jnp.float32(0))), zeros(params))
            (sums, grads), _ = jax.lax.scan(accumulate, start, jax.tree.map(plan.split, batch))
        grads = reduce_gradients(setup, grads)
        with jax.named_scope("reduce"):
            return sharding.sum_over(sums, axes), grads

    (loss, (nats, size)), grads = setup.over_devices(
        local_gradients, (specs, setup.batch_spec, PartitionSpec()), (PartitionSpec(), specs)
    )(state.params, batch, token_bytes)

    with jax.named_scope("optimizer"):
        grad_norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        updates, opt_state = setup.optimizer.update(
            grads, state.opt_state, state.params, step=state.step
        )
        params = optax.apply_updates(state.params, updates)
        params, opt_state = jax.tree.map(
            partial(jnp.where, finite), (params, opt_state), (state.params, state.opt_state)
        )
    metrics = {
        "loss": loss,
        "bpb": nats / (math.log(2) * jnp.maximum(size, 1)),
        "grad_norm": grad_norm,
        "lr_multiplier": schedules.lr_multiplier(
            state.step,
            config.steps,
            config.warmup_steps,
            config.warmdown_ratio,
            config.final_lr_fraction,
        ),
        "skipped": 1 - finite.astype(jnp.int32),
    }
    return TrainState(state.step + 1, params, opt_state), metrics


def eval_step(params, batch, token_bytes, *, setup: RunSetup) -> tuple[jax.Array, jax.Array]:
    """(nats, bytes) of a batch of `plan.rows` rows; see count_bits."""

    def local_bits(params, batch, token_bytes):
        params = working_copy(setup, params)

        def micro_bits(micro):
            nll = batch_losses(setup, params, micro)
            return count_bits(nll, micro["targets"], token_bytes)

        bits = jax.lax.map(micro_bits, jax.tree.map(setup.plan.split, batch))
        return sharding.sum_over(jax.tree.map(jnp.sum, bits), setup.batch_axes)

    specs = setup.manual_specs(setup.abstract.params)
    return setup.over_devices(
        local_bits, (specs, setup.batch_spec, PartitionSpec()), PartitionSpec()
    )(params, batch, token_bytes)


def score_step(params, batch, *, setup: RunSetup) -> jax.Array:
    """Negative log-likelihood of each target of a batch of `plan.rows` rows; see batch_losses."""

    def local_losses(params, batch):
        params = working_copy(setup, params)
        micro = jax.tree.map(setup.plan.split, batch)
        rows = jax.lax.map(partial(batch_losses, setup, params), micro)
        return rows.reshape(-1, rows.shape[-1])

    specs = setup.manual_specs(setup.abstract.params)
    return setup.over_devices(local_losses, (specs, setup.batch_spec), setup.batch_spec)(
        params, batch
    )


def greedy_step(params, tokens, last, *, setup: RunSetup) -> jax.Array:
    """The most likely token after position `last` (P,) of each row of `tokens` (P, L), int32 (P,)."""

    def local_greedy(params, tokens, last):
        bound, hidden = run_model(setup, working_copy(setup, params), tokens)
        hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
        return jnp.argmax(bound.logits(hidden)[:, 0], axis=-1)

    rows = PartitionSpec(setup.batch_axes)
    specs = setup.manual_specs(setup.abstract.params)
    return setup.over_devices(local_greedy, (specs, rows, rows), rows)(params, tokens, last)


class RunPrograms(NamedTuple):
    """The compiled programs of a run."""

    train: Callable[[TrainState, dict], tuple[TrainState, dict]]
    evaluate: Callable[[Any, dict], tuple[jax.Array, jax.Array]]
    score: Callable[[Any, dict], jax.Array]
    greedy: Callable[[Any, np.ndarray, np.ndarray], np.ndarray]


def jit_train(setup: RunSetup):
    """The jitted train step; it donates the state."""
    in_place = jax.tree.map(lambda leaf: leaf.sharding, setup.abstract)
    return jax.jit(
        partial(train_step, setup=setup),
        donate_argnums=0,
        out_shardings=(in_place, setup.replicated),
        compiler_options=hardware.compiler_options(setup.config, setup.numerics.backend),
    )


def jit_evaluate(setup: RunSetup):
    """The jitted evaluation step."""
    return jax.jit(
        partial(eval_step, setup=setup),
        out_shardings=setup.replicated,
        compiler_options=hardware.compiler_options(setup.config, setup.numerics.backend),
    )


def abstract_batch(setup: RunSetup) -> tuple[dict[str, jax.ShapeDtypeStruct], jax.ShapeDtypeStruct]:
    """A batch and the table of token bytes as abstract arrays with shardings, to lower the steps
    with.
    """
    config = setup.config
    rows = sharding.batch_sharding(setup.mesh, config.logical_axis_rules)
    shape = (setup.plan.rows, pyconfig.row_length(config))
    dtypes = {"inputs": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    dtypes |= setup.stage.batch_columns(config)
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for name, dtype in dtypes.items()
    }
    return batch, jax.ShapeDtypeStruct((config.vocab_size,), jnp.int32, sharding=setup.replicated)


def lower_train(setup: RunSetup) -> jax.stages.Lowered:
    """The train step, lowered for the set-up's devices."""
    with jax.sharding.use_abstract_mesh(setup.mesh.abstract_mesh):
        return jit_train(setup).lower(setup.abstract, *abstract_batch(setup))


def lower_evaluate(setup: RunSetup) -> jax.stages.Lowered:
    """The evaluation step, lowered for the set-up's devices."""
    with jax.sharding.use_abstract_mesh(setup.mesh.abstract_mesh):
        return jit_evaluate(setup).lower(setup.abstract.params, *abstract_batch(setup))


def build_programs(setup: RunSetup, step: Callable | None, token_bytes: np.ndarray) -> RunPrograms:
    """The programs of a run; step: the compiled train step, None where nothing is trained.

    The other programs are compiled at their first call. token_bytes (vocab,) int32: bytes per
    token.
    """
    # Hosts read replicated arrays, so that each of several hosts has the numbers.
    token_bytes = jax.device_put(token_bytes, setup.replicated)
    evaluate = jit_evaluate(setup)
    rows = sharding.batch_sharding(setup.mesh, setup.config.logical_axis_rules)
    score = jax.jit(partial(score_step, setup=setup), out_shardings=rows)
    greedy = jax.jit(partial(greedy_step, setup=setup), out_shardings=setup.replicated)

    def greedy_rows(params, tokens, last):
        # Every device takes the same number of rows.
        missing = -len(tokens) % setup.plan.data_parallel_size
        tokens = np.pad(tokens, ((0, missing), (0, 0)))
        return np.asarray(greedy(params, tokens, np.pad(last, (0, missing))))[: len(last)]

    return RunPrograms(
        train=lambda state, batch: step(state, batch, token_bytes),
        evaluate=lambda params, batch: evaluate(params, batch, token_bytes),
        score=score,
        greedy=greedy_rows,
    )

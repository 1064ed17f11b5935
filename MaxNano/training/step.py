"""The steps of a run: train, evaluate, score and greedy, as functions, jitted and compiled.

The train step is the same in every stage. The stage (stages.py) gives the batches and the loss of
each target.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec
from ml_collections import FrozenConfigDict

from MaxNano import pyconfig
from MaxNano.distributed import hardware, runtime, sharding
from MaxNano.models import losses
from MaxNano.models.setup import Architecture
from MaxNano.optimizers import schedules
from MaxNano.training.setup import BatchPlan, RunSetup, largest_divisor, needed_bytes, set_up
from MaxNano.training.state import TrainState


def batch_losses(config: FrozenConfigDict, model: Architecture, params, batch) -> jax.Array:
    """Negative log-likelihood of each target in nats, float32 (rows, L), 0 where the target is -1."""
    bound = model.bind(params)
    hidden = bound(batch["inputs"])
    with jax.named_scope("loss"):
        return losses.token_losses(
            hidden,
            bound.lm_head[...],
            batch["targets"],
            config.vocab_size,
            config.logits_soft_cap,
            losses.vocab_chunk(config.vocab_size, config.vocab_chunk_size),
        )


def count_bits(token_losses: jax.Array, targets: jax.Array, token_bytes: jax.Array):
    """(nats, bytes) of the targets that stand for bytes, float32 scalars; their quotient gives bits
    per byte.
    """
    size = jnp.where(targets >= 0, token_bytes[jnp.maximum(targets, 0)], 0)
    return jnp.sum(jnp.where(size > 0, token_losses, 0)), jnp.sum(size).astype(jnp.float32)


def working_copy(setup: RunSetup, params):
    """Inside shard_map: the whole parameters, all-gathered from their FSDP shards once per step.

    Matrices are cast to the compute dtype before the all-gather.
    """
    specs = setup.manual_specs(setup.abstract.params)

    def gather(x, spec):
        return sharding.gather(x.astype(setup.numerics.dtype) if x.ndim > 1 else x, spec)

    with jax.named_scope("gather"):
        return jax.tree.map(gather, params, specs)


def train_step(
    state: TrainState, batch: dict[str, jax.Array], token_bytes: jax.Array, *, setup: RunSetup
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update from one batch of `plan.rows` rows; returns the next state and the step's metrics.

    Gradient accumulation: each device sums the gradients of its micro-batches in float32. One
    reduce-scatter then sums them over the devices, and each device updates its shard of the
    parameters and optimizer state (ZeRO). The loss is the sum of the stage's terms over the count
    of the whole batch, so that micro-batches with few targets have little weight. If the loss or
    the gradient is not finite, parameters and optimizer state stay bit for bit as they are, and the
    metric `skipped` is 1.
    """
    config, plan, stage = setup.config, setup.plan, setup.stage
    axes = setup.batch_axes
    specs = setup.manual_specs(setup.abstract.params)

    def local_gradients(params, batch, token_bytes):
        params = working_copy(setup, params)
        count = jax.lax.psum(stage.loss_count(batch), axes)

        def loss_fn(params, micro):
            nll = batch_losses(config, setup.model, params, micro)
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
        with jax.named_scope("reduce"):
            grads = jax.tree.map(
                lambda g, p, spec: sharding.reduce(g.astype(p.dtype), spec, axes),
                grads,
                setup.abstract.params,
                specs,
            )
            return jax.lax.psum(sums, axes), grads

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
    config = setup.config

    def local_bits(params, batch, token_bytes):
        params = working_copy(setup, params)

        def micro_bits(micro):
            nll = batch_losses(config, setup.model, params, micro)
            return count_bits(nll, micro["targets"], token_bytes)

        bits = jax.lax.map(micro_bits, jax.tree.map(setup.plan.split, batch))
        return jax.lax.psum(jax.tree.map(jnp.sum, bits), setup.batch_axes)

    specs = setup.manual_specs(setup.abstract.params)
    return setup.over_devices(
        local_bits, (specs, setup.batch_spec, PartitionSpec()), PartitionSpec()
    )(params, batch, token_bytes)


def score_step(params, batch, *, setup: RunSetup) -> jax.Array:
    """Negative log-likelihood of each target of a batch of `plan.rows` rows; see batch_losses."""

    def local_losses(params, batch):
        params = working_copy(setup, params)
        micro = jax.tree.map(setup.plan.split, batch)
        rows = jax.lax.map(partial(batch_losses, setup.config, setup.model, params), micro)
        return rows.reshape(-1, rows.shape[-1])

    specs = setup.manual_specs(setup.abstract.params)
    return setup.over_devices(local_losses, (specs, setup.batch_spec), setup.batch_spec)(
        params, batch
    )


def greedy_step(params, tokens, last, *, setup: RunSetup) -> jax.Array:
    """The most likely token after position `last` (P,) of each row of `tokens` (P, L), int32 (P,)."""

    def local_greedy(params, tokens, last):
        bound = setup.model.bind(working_copy(setup, params))
        hidden = jnp.take_along_axis(bound(tokens), last[:, None, None], axis=1)
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


def compile_train(setup: RunSetup) -> tuple[RunSetup, jax.stages.Compiled]:
    """The compiled train step, and the set-up with the micro-batch size that it was compiled for.

    If the step does not fit in memory, smaller memory plans are tried. Raises ValueError if none
    fits.
    """
    while True:
        reason = None
        try:
            compiled = lower_train(setup).compile()
            if not _exceeds_memory(setup, compiled):
                return setup, compiled
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = error
        rows, setup = setup.plan.micro_rows, smaller(setup)
        if setup is None:
            raise ValueError(
                f"a step with {rows} rows per device does not fit in memory: choose a smaller "
                "per_device_batch_size, remat_policy=full, more devices or a smaller model"
            ) from reason
        print(f"{rows} rows per device do not fit in memory", flush=True)
        print(f"Compiling for {describe_memory_plan(setup)}", flush=True)


# ---- Memory plan: rows per device, rematerialization, chunks of the loss

MEMORY_PLAN = "the memory plan"  # the origin of values that `smaller` sets
SMALL_VOCAB_CHUNK = 2048


def smaller(setup: RunSetup) -> RunSetup | None:
    """The set-up with the next smaller memory plan; None if the config leaves none open.

    First fewer rows per device with more gradient accumulation, then rematerialization, then
    smaller chunks of the vocabulary in the loss: the same losses up to rounding. What a file or the
    command line sets stays.
    """
    config, plan = setup.config, setup.plan

    def is_open(key: str) -> bool:
        return config.origin[key] in ("base", MEMORY_PLAN)

    if config.per_device_batch_size is None and plan.micro_rows > 1:
        return replace(setup, plan=with_micro_rows(plan, plan.micro_rows - 1))
    chunk = losses.vocab_chunk(config.vocab_size, config.vocab_chunk_size) or config.vocab_size
    if is_open("remat_policy") and config.remat_policy in ("none", "minimal"):
        values = {"remat_policy": "minimal" if config.remat_policy == "none" else "full"}
    elif is_open("vocab_chunk_size") and chunk > SMALL_VOCAB_CHUNK:
        values = {"vocab_chunk_size": SMALL_VOCAB_CHUNK}
    else:
        return None
    config = pyconfig.replace(config, MEMORY_PLAN, **values)
    return replace(set_up(config, list(setup.mesh.devices.flat)), plan=plan)


def fit_memory(setup: RunSetup) -> RunSetup:
    """The set-up with the largest memory plan whose estimate fits in a device's memory.

    The estimate is a lower bound: the compiler, and on a GPU the first step, may ask for less. If
    nothing fits, the smallest plan. On a CPU, whose memory others use too, nothing changes.
    """
    limit = None if setup.numerics.backend == "cpu" else _shared_memory_limit()
    while limit and sum(needed_bytes(setup).values()) > limit and (less := smaller(setup)):
        setup = less
    return setup


def _shared_memory_limit() -> int | None:
    """Bytes that a device has in every process, so that all choose the same plan; None: unknown."""
    limits = runtime.gather_json(hardware.memory_limit_bytes())
    return None if None in limits else min(limits)


def describe_memory_plan(setup: RunSetup) -> str:
    """The rows per device, and what `smaller` has changed besides."""
    config = setup.config
    keys = [key for key in pyconfig.keys_of(config) if config.origin[key] == MEMORY_PLAN]
    return ", ".join(
        [f"{setup.plan.micro_rows} rows per device", *(f"{key}={config[key]}" for key in keys)]
    )


def is_out_of_memory(error: jax.errors.JaxRuntimeError) -> bool:
    """Whether a compiler or a device ran out of memory."""
    return "RESOURCE_EXHAUSTED" in str(error)


def _exceeds_memory(setup: RunSetup, compiled: jax.stages.Compiled) -> bool:
    """Whether the program needs more than this GPU has; a TPU's compiler refuses such a program."""
    if setup.numerics.backend != "gpu" or setup.mesh.devices.flat[0] not in jax.devices():
        return False
    limit, stats = _shared_memory_limit(), compiled.memory_analysis()
    return None not in (limit, stats) and stats.peak_memory_in_bytes > limit


@contextlib.contextmanager
def explain_out_of_memory(setup_now: Callable[[], RunSetup]) -> Iterator[None]:
    """Turn a device's lack of memory into a ValueError that names the setting to change.

    setup_now: returns the set-up that is used when the memory runs out.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        setup = setup_now()
        plan, remedy = (
            setup.plan,
            "choose a smaller model, or more devices with ici_fsdp_parallelism",
        )
        if plan.micro_rows > 1:
            rows = with_micro_rows(plan, plan.micro_rows - 1).micro_rows
            remedy = f"set per_device_batch_size={rows}, with the same losses up to rounding"
        elif setup.config.remat_policy != "full":
            remedy = "set remat_policy=full, with the same losses up to rounding"
        raise ValueError(
            f"a device ran out of memory with {describe_memory_plan(setup)}: {remedy}; the same "
            "command resumes from the newest checkpoint"
        ) from error


def with_micro_rows(plan: BatchPlan, limit: int) -> BatchPlan:
    """The plan with micro-batches of at most `limit` rows."""
    device_rows = plan.accumulation_steps * plan.micro_rows
    rows = largest_divisor(device_rows, limit)
    return plan._replace(accumulation_steps=device_rows // rows, micro_rows=rows)


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

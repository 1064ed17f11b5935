"""Trains a model: the one program, the one loop, the one train step of every stage.

    python MaxNano/train.py configs/base.yml model=d24

The same command started again goes on where the run stopped. A batch is `inputs`, `targets` and `weights`, each
(rows, length); a target of -1 is ignored, a weight scales its token's loss. What a stage trains on is therefore
a matter of its data, and this file knows nothing about it.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    if not __package__:  # run as a script: MaxNano/ itself must not be where modules are looked for
        sys.path[0] = str(Path(__file__).resolve().parents[1])
    from MaxNano import pyconfig

    pyconfig.check_command_line()  # a typo is told now, not when JAX has been imported

import contextlib
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import FrozenConfigDict

from MaxNano import pyconfig, scaling
from MaxNano.data import conversations
from MaxNano.data.loader import DevicePrefetch, Loader, make_loader, merge_states, put_global
from MaxNano.distributed import compile_cache, runtime, sharding
from MaxNano.evals import bpb, chat, core, samples
from MaxNano.evals.results import Results, evaluate_tasks
from MaxNano.inference import engine, prefix_scoring
from MaxNano.models import losses, quantization
from MaxNano.models.transformer import Numerics, kept_residuals
from MaxNano.optimizers import groups, schedules
from MaxNano.reporting import run_history
from MaxNano.tokenization.tokenizer import Tokenizer, load_tokenizer
from MaxNano.training import rollouts
from MaxNano.training.checkpointing import Checkpointer
from MaxNano.training.metrics import MetricLogger, print_table
from MaxNano.training.state import (
    Architecture,
    TrainState,
    abstract_state,
    architecture,
    initialize,
)

LARGEST_MICRO_BATCH = 32  # rows a device takes at once where per_device_batch_size leaves it open
LARGEST_REPLICATED = 0.02  # share of the parameters' bytes that may lie whole on every device


# ---- The step -------------------------------------------------------------------------------------------------------


class BatchPlan(NamedTuple):
    """How the rows of a step are spread: over `ways` devices, and over `micro_steps` on each of `micro_rows` rows."""

    ways: int
    micro_steps: int
    micro_rows: int

    @property
    def rows(self) -> int:
        """Rows of a step over all devices."""
        return self.ways * self.micro_steps * self.micro_rows

    def split(self, x: jax.Array) -> jax.Array:
        """A device's rows (micro_steps x micro_rows, L) -> (micro_steps, micro_rows, L)."""
        return x.reshape(self.micro_steps, self.micro_rows, x.shape[1])


def weighted_losses(config: FrozenConfigDict, nll: jax.Array, batch) -> jax.Array:
    """What each target adds to the loss, (rows, L), from its negative log-likelihood."""
    if "drawn_losses" in batch:
        terms = losses.clipped_policy_losses(
            nll, batch["drawn_losses"], batch["weights"], config.rl_clip
        )
    else:
        terms = nll * batch["weights"]
    if "reference_losses" in batch:
        terms += batch["kl_weights"] * losses.divergence(nll, batch["reference_losses"])
    return terms


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
    """(nats, bytes) of the targets that stand for bytes, as float32: what bits per byte are made of."""
    size = jnp.where(targets >= 0, token_bytes[jnp.maximum(targets, 0)], 0)
    return jnp.sum(jnp.where(size > 0, token_losses, 0)), jnp.sum(size).astype(jnp.float32)


def working_copy(setup: "Setup", params):
    """Inside shard_map: the parameters that a device computes with, gathered from their parts.

    Matrices travel in the compute dtype, once a step.
    """
    specs = setup.manual_specs(setup.abstract.params)

    def gather(x, spec):
        return sharding.gather(x.astype(setup.numerics.dtype) if x.ndim > 1 else x, spec)

    with jax.named_scope("gather"):
        return jax.tree.map(gather, params, specs)


def train_step(
    state: TrainState, batch: dict[str, jax.Array], token_bytes: jax.Array, *, setup: "Setup"
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update from one batch of `plan.rows` rows; returns the next state and the step's metrics.

    Each device adds up the gradients of its own rows, micro-batch by micro-batch, in float32; then they are summed
    over the devices, once, and each device updates the part of the parameters that it keeps.
    The loss is the weighted sum of token losses over the number of targets in the whole batch, so micro-batches
    with few targets count for little. Where the loss or the gradient is not finite, parameters and optimizer
    state stay as they were, bit for bit, and `skipped` is 1.
    """
    config, plan = setup.config, setup.plan
    axes = setup.batch_axes
    specs = setup.manual_specs(setup.abstract.params)

    def local_gradients(params, batch, token_bytes):
        params = working_copy(setup, params)
        targets = jax.lax.psum(jnp.sum(batch["targets"] >= 0), axes)

        def loss_fn(params, micro):
            nll = batch_losses(config, setup.model, params, micro)
            loss = jnp.sum(weighted_losses(config, nll, micro)) / jnp.maximum(targets, 1)
            return loss, count_bits(nll, micro["targets"], token_bytes)

        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        if plan.micro_steps == 1:
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
        local_gradients, (specs, setup.batch_specs, PartitionSpec()), (PartitionSpec(), specs)
    )(state.params, batch, token_bytes)

    with jax.named_scope("update"):
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


def eval_step(params, batch, token_bytes, *, setup: "Setup") -> tuple[jax.Array, jax.Array]:
    """(nats, bytes) of a batch of `plan.rows` rows: see count_bits."""
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
        local_bits, (specs, setup.batch_specs, PartitionSpec()), PartitionSpec()
    )(params, batch, token_bytes)


def score_step(params, batch, *, setup: "Setup") -> jax.Array:
    """batch_losses of a batch of `plan.rows` rows."""

    def local_losses(params, batch):
        params = working_copy(setup, params)
        micro = jax.tree.map(setup.plan.split, batch)
        rows = jax.lax.map(partial(batch_losses, setup.config, setup.model, params), micro)
        return rows.reshape(-1, rows.shape[-1])

    specs = setup.manual_specs(setup.abstract.params)
    return setup.over_devices(local_losses, (specs, setup.batch_specs), setup.batch_specs)(
        params, batch
    )


def greedy_step(params, tokens, last, *, setup: "Setup") -> jax.Array:
    """The likeliest token after position `last` (P,) of each row of `tokens` (P, L)."""

    def local_greedy(params, tokens, last):
        bound = setup.model.bind(working_copy(setup, params))
        hidden = jnp.take_along_axis(bound(tokens), last[:, None, None], axis=1)
        return jnp.argmax(bound.logits(hidden)[:, 0], axis=-1)

    rows = PartitionSpec(setup.batch_axes)
    specs = setup.manual_specs(setup.abstract.params)
    return setup.over_devices(local_greedy, (specs, rows, rows), rows)(params, tokens, last)


# ---- Set-up ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """What a run is made of, before any array exists."""

    config: FrozenConfigDict
    mesh: Mesh
    numerics: Numerics
    model: Architecture
    optimizer: optax.GradientTransformationExtraArgs
    abstract: TrainState
    plan: BatchPlan

    @property
    def batch_axes(self) -> tuple[str, ...]:
        """The mesh axes over which the rows of a batch are cut: along them every device computes by itself."""
        return sharding.batch_axes(self.mesh, self.config.logical_axis_rules)

    @property
    def batch_specs(self) -> PartitionSpec:
        """How a batch's arrays (rows, L) lie."""
        return PartitionSpec(self.batch_axes)

    def manual_specs(self, tree):
        """For abstract arrays: how `batch_axes` cut them."""
        return jax.tree.map(
            lambda leaf: sharding.manual_spec(leaf.sharding.spec, self.batch_axes), tree
        )

    def over_devices(self, function, in_specs, out_specs):
        """`function` of each device's part of its arguments; what it exchanges over `batch_axes` it says itself."""
        # An axis of one device needs no management either, which kernels that only know one device are glad of.
        single = {axis for axis, size in self.mesh.shape.items() if size == 1}
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names=single.union(self.batch_axes),
            check_vma=False,
        )


def set_up(config: FrozenConfigDict, devices=None) -> Setup:
    """Resolve what depends on the devices. Raises ValueError where batch, layout and devices do not fit together."""
    mesh = sharding.make_mesh(config, devices)
    quantization.check(config.quantization, mesh.devices.flat)
    numerics = engine.numerics_of(config, mesh)
    model = architecture(config, numerics)
    optimizer = groups.make_optimizer(config, dtype=numerics.dtype)
    abstract = abstract_state(config, model, optimizer, mesh)
    plan = plan_batch(config, sharding.batch_ways(mesh, config.logical_axis_rules))
    check_sharding(config, mesh, abstract)
    return Setup(config, mesh, numerics, model, optimizer, abstract, plan)


def check_sharding(config: FrozenConfigDict, mesh: Mesh, abstract: TrainState) -> None:
    """Refuse a layout that leaves more than LARGEST_REPLICATED of the parameters whole on each of several devices.

    Rules that name no mesh axis for any axis of parameters ask for that.
    """
    rules = {rule[0]: rule[1:] for rule in config.logical_axis_rules}
    asked = not any(
        rules.get(axis) for axis in ("layers", "vocab", "embed", "heads", "kv_heads", "mlp")
    )
    share = sharding.replicated_share(abstract.params)
    if mesh.size > 1 and share > LARGEST_REPLICATED and not asked:
        raise ValueError(
            f"{share:.0%} of the parameters would lie whole on each of {mesh.size} devices: choose ici_*_parallelism "
            f"that divide num_decoder_layers={config.num_decoder_layers} or emb_dim={config.emb_dim}, or take the "
            "mesh axes out of logical_axis_rules"
        )


def plan_batch(config: FrozenConfigDict, ways: int) -> BatchPlan:
    """Rows per device and accumulation steps for `ways` devices that share the rows of a step."""
    length = pyconfig.row_length(config)
    rows = config.global_batch_tokens // length
    if rows % ways:
        raise ValueError(
            f"global_batch_tokens={config.global_batch_tokens} is {rows} rows of {length} tokens, "
            f"which {ways} devices cannot share equally: make it a multiple of {ways * length}"
        )
    share = rows // ways
    micro_rows = config.per_device_batch_size or largest_divisor(share, LARGEST_MICRO_BATCH)
    if share % micro_rows:
        raise ValueError(
            f"per_device_batch_size={micro_rows} does not divide the {share} rows that each of {ways} devices gets: "
            f"choose a divisor of {share}, or leave it null"
        )
    return BatchPlan(ways, share // micro_rows, micro_rows)


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`."""
    return max(n for n in range(1, min(number, limit) + 1) if number % n == 0)


def needed_bytes(setup: Setup) -> dict[str, int]:
    """Estimated bytes on the fullest device by kind; a floor, since what the compiler adds is not in it."""
    config, plan = setup.config, setup.plan

    def on_device(tree):
        return sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )

    def gathered(itemsize):
        ways = setup.mesh.size // setup.plan.ways  # what does not cut the batch stays cut
        return (
            sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(setup.abstract.params))
            // ways
            * itemsize
        )

    tokens = plan.micro_rows * pyconfig.row_length(config)
    size = jnp.dtype(setup.numerics.dtype).itemsize
    widths = {
        "qkv": (config.num_query_heads + 2 * config.num_kv_heads) * config.head_dim,
        "attention_out": config.num_query_heads * config.head_dim,
        "attention_residual": config.emb_dim,
        "mlp_hidden": config.mlp_dim,
    }
    kept = kept_residuals(config)
    width = config.emb_dim + sum(widths[name] for name in kept or ())
    if kept is None:  # besides the named ones: what the norms and the activation read
        width = 3 * config.emb_dim + sum(widths.values()) + config.mlp_dim
    chunk = losses.vocab_chunk(config.vocab_size, config.vocab_chunk_size) or config.vocab_size
    return {
        "parameters": on_device(setup.abstract.params),
        "optimizer state": on_device(setup.abstract.opt_state),
        "working copy": gathered(size),
        "gradients": gathered(size if plan.micro_steps == 1 else 4),
        "activations": tokens * config.num_decoder_layers * width * size + 2 * 4 * tokens * chunk,
    }


def check_memory(setup: Setup) -> None:
    """Refuse a run that cannot fit, before anything is allocated."""
    limit = runtime.memory_limit_bytes()
    needed = needed_bytes(setup)
    total = sum(needed.values())
    if limit is not None and total > limit:
        parts = ", ".join(f"{kind} {size / 1e9:.1f}" for kind, size in needed.items())
        raise ValueError(
            f"{setup.config.model} needs at least {total / 1e9:.1f} GB on each of {setup.mesh.size} devices ({parts}) "
            f"and {limit / 1e9:.1f} GB are there: take a smaller model, a smaller per_device_batch_size, "
            "remat_policy=full, more devices with ici_fsdp_parallelism, or on a CPU num_cpu_devices=1"
        )


def print_plan(setup: Setup) -> None:
    """The start-up table: what differs from base.yml, what will be trained, and how."""
    config, plan = setup.config, setup.plan
    shape = scaling.shape_of(config)
    flops = flops_per_token(config)
    tokens = config.steps * config.global_batch_tokens
    print_table("config", ("key", "value", "from"), pyconfig.describe(config))
    rows_of_groups = groups.group_summary(setup.model.shapes, config)
    rows = [
        (
            row.group,
            f"{row.parameters:,}",
            f"{row.settings.learning_rate:.6g}",
            ", ".join(f"{beta:g}" for beta in row.settings.betas),
            f"{row.settings.weight_decay:.6g}",
        )
        for row in rows_of_groups
    ]
    total = f"{sum(row.parameters for row in rows_of_groups):,}"
    header = ("group", "parameters", "learning rate", "betas", "weight decay")
    print_table("parameters", header, [*rows, ("total", total, "", "", "")])
    memory = ", ".join(f"{kind} {size / 1e9:.2f}" for kind, size in needed_bytes(setup).items())
    device = setup.mesh.devices.flat[0].device_kind
    layout = " x ".join(f"{axis} {size}" for axis, size in setup.mesh.shape.items())
    facts = {
        "devices": f"{setup.mesh.size} x {device}, {layout}",
        "numbers": f"{setup.numerics.dtype}, embedding tables {setup.numerics.embedding_dtype}"
        + (
            ""
            if config.quantization == "none"
            else f", products of the layers {config.quantization}"
        ),
        "attention": setup.numerics.attention,
        "FLOPs": f"{flops:,} a token, {flops * tokens:.4g} in all",
        "batch": f"{config.global_batch_tokens:,} tokens = {plan.ways} devices x {plan.micro_steps} micro-steps "
        f"x {plan.micro_rows} rows x {pyconfig.row_length(config)}",
        "horizon": f"{config.steps:,} steps, {tokens:,} tokens, "
        f"{tokens / scaling.parameter_counts(shape).scaling:.2f} a scaling parameter",
        "memory": f"at least {memory} GB a device (estimate)",
        "data": data_summary(config),
        "run": str(run_directory(config)),
    }
    print_table("run", ("what", "value"), list(facts.items()))


def data_summary(config: FrozenConfigDict) -> str:
    """What is trained on, in words."""
    if config.dataset_type == "rollouts":
        return f"{config.rl_samples} answers to each of {config.rl_problems} problems of {config.rl_task}"
    data = f"{config.dataset_type} in {config.dataset_path}"
    if config.dataset_type == "chat":
        data = ", ".join(f"{row[0]} x {row[1]}" for row in config.chat_train_mixture)
    return f"{data}, {config.data_readers} readers"


def run_directory(config: FrozenConfigDict) -> epath.Path:
    """Where the run keeps everything it writes."""
    return epath.Path(config.base_output_directory).expanduser() / config.run_name


# ---- A start from another run ---------------------------------------------------------------------------------------


def load_start(setup: Setup, tokenizer_fingerprint: str) -> TrainState:
    """The newest checkpoint of config.load_from as step 0: its parameters and, with load_optimizer, optimizer state.

    Raises ValueError where there is none, or where it is of another model or tokenizer.
    """
    config, place = setup.config, start_directory(setup.config)
    with Checkpointer(
        config, place, tokenizer_fingerprint=tokenizer_fingerprint, writer=False
    ) as source:
        if config.load_optimizer:
            try:
                state, extra = source.restore(setup.abstract)
            except ValueError as error:
                raise ValueError(
                    f"{error}; load_optimizer=false would read its parameters only"
                ) from error
            params, opt_state = state.params, state.opt_state
        else:
            params, extra = source.restore_params_only(setup.abstract.params)
            in_place = jax.tree.map(lambda leaf: leaf.sharding, setup.abstract.opt_state)
            opt_state = jax.jit(setup.optimizer.init, out_shardings=in_place)(params)
    check_windows(config, extra["run"]["config"])
    if jax.process_index() == 0:
        print(f"starting from step {extra['run']['step']} of {place}", flush=True)
    return TrainState(jax.device_put(np.int32(0), setup.abstract.step.sharding), params, opt_state)


def start_directory(config: FrozenConfigDict) -> epath.Path:
    """The folder of the run that load_from names. Raises ValueError where it is this run's own."""
    place = run_history.start_folder(config.load_from, run_directory(config))
    if place == run_directory(config):
        raise ValueError(
            f"load_from={config.load_from} is the folder of this run itself; choose another run_name"
        )
    return place


def check_windows(config: FrozenConfigDict, saved: Mapping[str, Any]) -> None:
    """Raise ValueError where a layer would see another window than it was trained with, as far as the context goes."""
    length, known = config.max_target_length, pyconfig.windows_of(saved)
    expected = tuple(length if w >= saved["max_target_length"] else min(w, length) for w in known)
    if pyconfig.windows_of(config) != expected:
        raise ValueError(
            f"the layers' windows are {pyconfig.windows_of(config)} tokens but {known} in {config.load_from}: set "
            f"window_pattern={saved['window_pattern']} short_window_fraction={min(expected) / length:g}"
        )


def with_start(config: FrozenConfigDict) -> FrozenConfigDict:
    """The config of a run that goes on, which was started from another run though nobody says so again."""
    saved = run_directory(config) / "config.yml"
    if config.load_from is not None or not config.enable_checkpointing or not saved.exists():
        return config
    was = pyconfig.saved_values(saved).get("load_from")
    return config if was is None else pyconfig.replace(config, "the run", load_from=was)


def check_start(config: FrozenConfigDict, saved: Mapping[str, Any]) -> None:
    """Raise ValueError where a run that goes on was started from another run than it is told now."""
    was = saved.get("load_from")
    if config.load_from not in (None, was):
        start = f"from {was}" if was else "from random parameters"
        raise ValueError(
            f"{run_directory(config)} was started {start}, not from {config.load_from}; choose another run_name"
        )


# ---- The loop -------------------------------------------------------------------------------------------------------


class Programs(NamedTuple):
    """The compiled programs of a run."""

    train: Callable[[TrainState, dict], tuple[TrainState, dict]]
    evaluate: Callable[[Any, dict], tuple[jax.Array, jax.Array]]
    greedy: Callable[[Any, np.ndarray, np.ndarray], np.ndarray]


def jit_train(setup: Setup):
    """The jitted train step; it takes the state's memory for the next state."""
    in_place = jax.tree.map(lambda leaf: leaf.sharding, setup.abstract)
    everywhere = NamedSharding(setup.mesh, PartitionSpec())
    return jax.jit(
        partial(train_step, setup=setup),
        donate_argnums=0,
        out_shardings=(in_place, everywhere),
        compiler_options=runtime.compiler_options(setup.config, setup.numerics.backend),
    )


def jit_evaluate(setup: Setup):
    """The jitted evaluation step."""
    return jax.jit(
        partial(eval_step, setup=setup),
        out_shardings=NamedSharding(setup.mesh, PartitionSpec()),
        compiler_options=runtime.compiler_options(setup.config, setup.numerics.backend),
    )


def compile_train(setup: Setup) -> tuple[Setup, jax.stages.Compiled]:
    """The compiled train step, and the set-up with the rows that a device takes at once in it.

    Where per_device_batch_size leaves that open and the compiler says that a step does not fit into memory, fewer rows
    are tried. Raises ValueError where none fit.
    """
    while True:
        try:
            return setup, lower_train(setup).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            plan = setup.plan
            if setup.config.per_device_batch_size or plan.micro_rows == 1:
                raise ValueError(
                    f"a step with {plan.micro_rows} rows on each device does not fit into its memory: take a smaller "
                    "per_device_batch_size, remat_policy=full, more devices or a smaller model"
                ) from error
            rows = plan.micro_steps * plan.micro_rows
            fewer = largest_divisor(rows, plan.micro_rows - 1)
            print(
                f"{plan.micro_rows} rows a device do not fit into memory, compiling for {fewer}",
                flush=True,
            )
            setup = replace(setup, plan=BatchPlan(plan.ways, rows // fewer, fewer))


def abstract_batch(setup: Setup) -> tuple[dict[str, jax.ShapeDtypeStruct], jax.ShapeDtypeStruct]:
    """A batch and the table of token bytes, as shapes with shardings: what the jitted steps are lowered with."""
    rows = sharding.batch_sharding(setup.mesh, setup.config.logical_axis_rules)
    shape = (setup.plan.rows, pyconfig.row_length(setup.config))
    dtypes = {"inputs": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    if setup.config.dataset_type == "rollouts":
        dtypes |= {"drawn_losses": jnp.float32} if setup.config.rl_clip else {}
        dtypes |= (
            {"kl_weights": jnp.float32, "reference_losses": jnp.float32}
            if setup.config.rl_kl
            else {}
        )
    batch = {
        key: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for key, dtype in dtypes.items()
    }
    everywhere = NamedSharding(setup.mesh, PartitionSpec())
    return batch, jax.ShapeDtypeStruct((setup.config.vocab_size,), jnp.int32, sharding=everywhere)


def lower_train(setup: Setup) -> jax.stages.Lowered:
    """The train step, ready to be compiled for the set-up's devices."""
    with jax.sharding.use_abstract_mesh(setup.mesh.abstract_mesh):
        return jit_train(setup).lower(setup.abstract, *abstract_batch(setup))


def lower_evaluate(setup: Setup) -> jax.stages.Lowered:
    """The evaluation step, ready to be compiled for the set-up's devices."""
    with jax.sharding.use_abstract_mesh(setup.mesh.abstract_mesh):
        return jit_evaluate(setup).lower(setup.abstract.params, *abstract_batch(setup))


def build_programs(setup: Setup, step: Callable, token_bytes: np.ndarray) -> Programs:
    """The three programs around `step`, the train step; the others are compiled when they are first called."""
    # Numbers that the host reads lie on every device, so that each of several hosts has them.
    everywhere = NamedSharding(setup.mesh, PartitionSpec())
    token_bytes = jax.device_put(token_bytes, everywhere)
    evaluate = jit_evaluate(setup)
    greedy = jax.jit(partial(greedy_step, setup=setup), out_shardings=everywhere)
    ways = setup.plan.ways

    def greedy_rows(params, tokens, last):
        missing = -len(tokens) % ways  # every device takes the same number of rows
        tokens = np.pad(tokens, ((0, missing), (0, 0)))
        return np.asarray(greedy(params, tokens, np.pad(last, (0, missing))))[: len(last)]

    return Programs(
        train=lambda state, batch: step(state, batch, token_bytes),
        evaluate=lambda params, batch: evaluate(params, batch, token_bytes),
        greedy=greedy_rows,
    )


def due(step: int, interval: int) -> bool:
    """Whether something that happens every `interval` steps happens at `step`; an interval of 0 never comes."""
    return bool(interval) and step % interval == 0


def open_loader(
    config: FrozenConfigDict, plan: BatchPlan, tokenizer, split: str, state=None
) -> Loader:
    """This host's part of the batches of a split."""
    return make_loader(
        config,
        tokenizer,
        split,
        batch_rows=plan.rows,
        state=state,
        host_index=jax.process_index(),
        host_count=jax.process_count(),
    )


def train(setup: Setup, preemption: runtime.Preemption) -> int:
    """Train from the run's last checkpoint, or from the start, to config.steps; returns the exit status."""
    config = setup.config
    directory = run_directory(config)
    tokenizer = load_tokenizer(config)
    core_tasks = core.load_bundle(config.core_bundle) if config.core_interval else []
    exams = make_exams(config, tokenizer) if config.chat_interval else []
    rows_sharding = sharding.batch_sharding(setup.mesh, config.logical_axis_rules)

    with contextlib.ExitStack() as cleanup:
        checkpointer = cleanup.enter_context(
            Checkpointer(config, directory, tokenizer_fingerprint=tokenizer.fingerprint())
        )

        # ---- State: from the last checkpoint, from that of another run, or new
        extra = {
            "data": None,
            "metrics": None,
            "evaluated_step": None,
            "core_step": None,
            "chat_step": None,
        }
        if config.enable_checkpointing and checkpointer.latest_step() is not None:
            state, extra = checkpointer.restore(setup.abstract)
            check_start(config, extra["run"]["config"])
        elif config.load_from is not None:
            state = load_start(setup, tokenizer.fingerprint())
        else:
            state = initialize(config, setup.numerics, setup.optimizer, setup.abstract)
        start = int(state.step)
        if config.enable_checkpointing:
            checkpointer.check_free_space(setup.abstract)
        setup, step = compile_train(setup)
        plan = setup.plan
        programs = build_programs(setup, step, tokenizer.token_bytes())

        # ---- Data, metrics
        if config.dataset_type == "rollouts":
            batches = rollouts.Rollouts(
                config,
                setup.mesh,
                tokenizer,
                lambda: state.params,
                rows_sharding,
                state=extra["data"],
                score_reference=reference_scorer(setup, tokenizer),
                on_step=preemption.check,
            )
        else:
            batches = DevicePrefetch(
                open_loader(config, plan, tokenizer, "train", extra["data"]),
                rows_sharding,
                config.prefetch_batches,
            )
        cleanup.callback(batches.close)
        held_out = None
        if jax.process_index() == 0:
            pyconfig.save(config, directory / "config.yml")
        logger = MetricLogger(
            config,
            directory,
            total_steps=config.steps,
            start_step=start,
            tokens_per_step=config.global_batch_tokens,
            flops_per_token=flops_per_token(config),
            peak_flops=runtime.peak_flops(list(setup.mesh.devices.flat)),
            is_main=jax.process_index() == 0,
            state=extra["metrics"],
        )
        cleanup.callback(logger.close)
        cleanup.callback(compile_cache.finish)
        if start:
            logger.message(f"going on from step {start} of {directory}")

        def save(step: int) -> None:
            extra = {
                "data": merge_states(runtime.gather_json(batches.state())),
                "metrics": logger.state(),
                "evaluated_step": evaluated_step,
                "core_step": core_step,
                "chat_step": chat_step,
            }
            checkpointer.save(step, state, extra)
            logger.flush()  # starts the clock anew: the next step's time does not have the saving in it

        # ---- Steps start ... config.steps, of which the last only evaluates and saves
        evaluated_step, core_step, chat_step = (
            extra.get(f"{what}_step") for what in ("evaluated", "core", "chat")
        )
        scorer = prefix_scoring.Scorer(setup, tokenizer.bos_id)
        skipped_in_a_row = 0
        try:
            for step in itertools.count(start):
                last = step >= config.steps
                preemption.check(step)
                if step != evaluated_step:
                    if config.eval_interval and (last or due(step, config.eval_interval)):
                        logger.flush()  # so that no step's time has the evaluation in it
                        if config.dataset_type == "rollouts":
                            results = batches.evaluate()
                        else:
                            if held_out is None:
                                with preemption.at_once():
                                    held_out = read_held_out(setup, tokenizer)
                            results = bpb.evaluate_bpb(
                                lambda batch, params=state.params: programs.evaluate(
                                    params, put_global(batch, rows_sharding)
                                ),
                                preemption.checked(held_out),
                            )
                        logger.event(step, "validation", results)
                    if config.sample_interval and (
                        last or (step and due(step, config.sample_interval))
                    ):
                        texts = samples.sample(
                            partial(programs.greedy, state.params), tokenizer, config.sample_tokens
                        )
                        logger.event(step, "samples", texts)
                    evaluated_step = step
                if (
                    step != core_step
                    and config.core_interval
                    and (last or (step and due(step, config.core_interval)))
                ):
                    score, rows = evaluate_tasks(
                        config,
                        core_tasks,
                        tokenizer,
                        scorer,
                        state.params,
                        Results(directory, step, logger.state()["run_id"]),
                        say=logger.message,
                        progress=lambda done, total: preemption.check(),
                    )
                    centered = {label: values["centered"] for label, values in rows.items()}
                    logger.event(step, "core", {"core": score, **centered})
                    core_step = step
                if (
                    step != chat_step
                    and config.chat_interval
                    and (last or (step and due(step, config.chat_interval)))
                ):
                    found = chat.evaluate_exams(
                        config,
                        exams,
                        tokenizer,
                        scorer.bind(state.params),
                        partial(chat.make_engine, config, setup.mesh, state.params, tokenizer),
                        Results(directory, step, logger.state()["run_id"]),
                        dtype=setup.numerics.dtype,
                        say=logger.message,
                        on_step=preemption.check,
                    )
                    accuracies = {name: values["accuracy"] for name, values in found.items()}
                    logger.event(step, "chat", {**chat.summarize(found), **accuracies})
                    chat_step = step

                if (
                    config.enable_checkpointing
                    and step != start
                    and (last or checkpointer.should_save(step))
                ):
                    save(step)
                if last:
                    break

                with preemption.at_once():  # a shard may be long in coming
                    batches.fill()
                batch = next(batches)
                state, metrics = programs.train(state, batch)
                if step == start:
                    runtime.freeze_gc()

                # Metrics arrive one step late, so that the host never waits for the step that is under way.
                arrived = logger.step(step, metrics, batches.position())
                if arrived:
                    skipped_in_a_row = skipped_in_a_row + 1 if arrived["skipped"] else 0
                if skipped_in_a_row >= config.max_nonfinite_steps:
                    raise ValueError(
                        f"loss or gradient was not finite in {skipped_in_a_row} steps in a row, up to step {step - 1}; "
                        f"their updates were skipped. Lower the learning rates or look at the data, and start again "
                        f"from the checkpoints in {directory}"
                    )
        except runtime.Preempted:
            # Raised only between steps or between batches of an evaluation, where the state is whole.
            if config.enable_checkpointing:
                save(step)
                checkpointer.wait()
                logger.message(f"stopped at step {step}, saved; the same command goes on from here")
            return runtime.EXIT_PREEMPTED
        checkpointer.wait()
    return 0


def read_held_out(setup: Setup, tokenizer: Tokenizer) -> bpb.PackedRows:
    """The validation batches: config.eval_tokens, rounded down to whole batches, at least one."""
    config, plan = setup.config, setup.plan
    count = max(1, config.eval_tokens // config.global_batch_tokens)
    with open_loader(config, plan, tokenizer, "validation") as batches:
        return bpb.PackedRows(batches, count, config.vocab_size)


def make_exams(config: FrozenConfigDict, tokenizer: Tokenizer) -> list[chat.Exam]:
    """What chat_tasks ask at intervals."""
    limits = {
        "categorical": config.chat_interval_categorical,
        "generative": config.chat_interval_generative,
    }
    return [chat.make_exam(config, name, tokenizer, limits) for name in config.chat_tasks]


def reference_scorer(setup: Setup, tokenizer: Tokenizer) -> Callable[[dict], jax.Array] | None:
    """What rl_kl compares with: the losses of a batch by load_from's model; None where it is off."""
    config = setup.config
    if not config.rl_kl:
        return None
    if config.load_from is None:
        raise ValueError("rl_kl needs load_from, from whose model it measures; or set rl_kl=0")
    with Checkpointer(
        config,
        start_directory(config),
        tokenizer_fingerprint=tokenizer.fingerprint(),
        writer=False,
    ) as source:
        params, _ = source.restore_params_only(setup.abstract.params)
    rows = sharding.batch_sharding(setup.mesh, config.logical_axis_rules)
    return partial(jax.jit(partial(score_step, setup=setup), out_shardings=rows), params)


def flops_per_token(config: FrozenConfigDict) -> int:
    """Training FLOPs of a token, forward and backward."""
    return scaling.flops_per_token(scaling.shape_of(config), pyconfig.windows_of(config))


def with_horizon(config: FrozenConfigDict) -> FrozenConfigDict:
    """The config with the steps of chat_epochs, where a later stage says no steps itself."""
    if not pyconfig.horizon_is_open(config):
        return config
    if config.dataset_type == "rollouts":
        steps = rollouts.steps_of_passes(config)
    else:
        steps = conversations.steps_of_passes(config, load_tokenizer(config))
    return pyconfig.replace(config, "chat_epochs", steps=steps)


def main(config: FrozenConfigDict) -> int:
    """Check, show the plan, train."""
    runtime.initialize(config)
    config = with_horizon(with_start(config))
    setup = set_up(config)
    if jax.process_index() == 0:
        print_plan(setup)
    check_memory(setup)
    if config.dry_run:
        return 0
    with runtime.Preemption() as preemption, jax.set_mesh(setup.mesh):
        return train(setup, preemption)


if __name__ == "__main__":
    sys.exit(pyconfig.launch(main))

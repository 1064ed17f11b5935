"""A training run before any array exists: RunSetup, batch plan, memory estimate, start-up table."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from MaxNano import pyconfig, scaling
from MaxNano.console import print_table
from MaxNano.distributed import hardware, sharding
from MaxNano.models import losses
from MaxNano.models.setup import ModelSetup, set_up_model
from MaxNano.models.transformer import kept_residuals, residual_widths
from MaxNano.optimizers import groups
from MaxNano.storage.files import run_directory
from MaxNano.training.state import TrainState, abstract_state

LARGEST_MICRO_BATCH = 32  # rows a device takes at once if per_device_batch_size leaves it open
LARGEST_REPLICATED = 0.02  # largest share of the parameters' bytes that every device may hold whole


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


@dataclass(frozen=True)
class RunSetup(ModelSetup):
    """A training run: the model on its mesh, the optimizer, the abstract state and the batch plan."""

    optimizer: optax.GradientTransformationExtraArgs
    abstract: TrainState
    plan: BatchPlan


def set_up(config: FrozenConfigDict, devices: Sequence[jax.Device] | None = None) -> RunSetup:
    """The set-up of a run. Raises ValueError if batch, layout and devices do not fit together."""
    setup = set_up_model(config, devices)
    optimizer = groups.make_optimizer(config, dtype=setup.numerics.dtype)
    abstract = abstract_state(config, setup.model, optimizer, setup.mesh)
    plan = plan_batch(config, setup.data_parallel_size)
    check_sharding(config, setup.mesh, abstract)
    return RunSetup(**vars(setup), optimizer=optimizer, abstract=abstract, plan=plan)


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


def needed_bytes(setup: RunSetup) -> dict[str, int]:
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
    widths = residual_widths(config)
    kept = kept_residuals(config)
    width = config.emb_dim + sum(widths[name] for name in kept or ())
    if kept is None:  # besides the named ones: what the norms and the activation read
        width = 3 * config.emb_dim + sum(widths.values()) + widths["mlp_hidden"]
    chunk = losses.vocab_chunk(config.vocab_size, config.vocab_chunk_size) or config.vocab_size
    return {
        "parameters": on_device(setup.abstract.params),
        "optimizer state": on_device(setup.abstract.opt_state),
        "working copy": gathered(size),
        "gradients": gathered(size if plan.micro_steps == 1 else 4),
        "activations": tokens * config.num_decoder_layers * width * size + 2 * 4 * tokens * chunk,
    }


def check_memory(setup: RunSetup) -> None:
    """Refuse a run that cannot fit, before anything is allocated."""
    limit = hardware.memory_limit_bytes()
    needed = needed_bytes(setup)
    total = sum(needed.values())
    if limit is not None and total > limit:
        parts = ", ".join(f"{kind} {size / 1e9:.1f}" for kind, size in needed.items())
        raise ValueError(
            f"{setup.config.model} needs at least {total / 1e9:.1f} GB on each of {setup.mesh.size} devices ({parts}) "
            f"and {limit / 1e9:.1f} GB are there: take a smaller model, a smaller per_device_batch_size, "
            "remat_policy=full, more devices with ici_fsdp_parallelism, or on a CPU num_cpu_devices=1"
        )


def flops_per_token(config: FrozenConfigDict) -> int:
    """Training FLOPs of a token, forward and backward."""
    return scaling.flops_per_token(scaling.shape_of(config), pyconfig.windows_of(config))


def print_plan(setup: RunSetup) -> None:
    """The start-up table: what differs from base.yml, what will be trained, and how."""
    config, plan = setup.config, setup.plan
    shape = scaling.shape_of(config)
    flops = flops_per_token(config)
    tokens = config.steps * config.global_batch_tokens
    print_table("config", ("key", "value", "from"), pyconfig.describe(config))
    parameter_groups = groups.parameter_groups(config)
    counts = groups.count_parameters(setup.model.shapes, parameter_groups)
    rows = [
        (
            group.name,
            f"{counts[group.name]:,}",
            f"{group.learning_rate:.6g}",
            ", ".join(f"{beta:g}" for beta in group.betas),
            f"{group.weight_decay:.6g}",
        )
        for group in parameter_groups
        if group.name in counts
    ]
    total = f"{sum(counts.values()):,}"
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

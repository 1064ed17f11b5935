"""A training run before any array exists: RunSetup, batch plan, memory estimate, start-up table."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from MaxNano import pyconfig, scaling
from MaxNano.console import print_table
from MaxNano.data import held_out, summary
from MaxNano.data.sources import SOURCES
from MaxNano.distributed import hardware, sharding
from MaxNano.models.kernels import polar
from MaxNano.models.setup import ModelSetup, set_up_model
from MaxNano.models.transformer import STACKED, kept_residuals, residual_widths
from MaxNano.optimizers import groups
from MaxNano.optimizers.muon import Kernel
from MaxNano.stage_configs import stage_config
from MaxNano.storage.files import run_directory
from MaxNano.tokenization.tokenizer import load_tokenizer
from MaxNano.training.stages import Stage, stage_of
from MaxNano.training.state import TrainState, abstract_state

LARGEST_MICRO_BATCH = 32  # rows per device and micro-batch if per_device_batch_size is null
LARGEST_REPLICATED = 0.02  # share of the parameters' bytes that may be replicated on every device


class BatchPlan(NamedTuple):
    """How the rows of a global batch are split over devices and micro-batches."""

    data_parallel_size: int
    accumulation_steps: int  # micro-batches per step on each device
    micro_rows: int  # rows of a micro-batch on each device

    @property
    def rows(self) -> int:
        """Rows of the global batch."""
        return self.data_parallel_size * self.accumulation_steps * self.micro_rows

    def split(self, x: jax.Array) -> jax.Array:
        """A device's rows (accumulation_steps x micro_rows, L) -> (accumulation_steps, micro_rows,
        L).
        """
        return x.reshape(self.accumulation_steps, self.micro_rows, x.shape[1])


@dataclass(frozen=True)
class RunSetup(ModelSetup):
    """A training run: the model on its mesh, the stage, the optimizer, the abstract state and the
    batch plan.
    """

    stage: Stage
    optimizer: optax.GradientTransformationExtraArgs
    abstract: TrainState
    plan: BatchPlan


def set_up(config: FrozenConfigDict, devices: Sequence[jax.Device] | None = None) -> RunSetup:
    """The set-up of a run. Raises ValueError if batch, layout and devices do not fit together."""
    setup = set_up_model(config, devices)
    numerics, kernel = setup.numerics, None
    if numerics.products == "pallas":
        iterate = partial(polar.iterate, interpret=numerics.backend != "tpu")
        kernel = Kernel(polar.fits, iterate)
    optimizer = groups.make_optimizer(config, dtype=numerics.dtype, kernel=kernel)
    abstract = abstract_state(config, setup.model, optimizer, setup.mesh)
    plan = plan_batch(config, setup.data_parallel_size)
    check_sharding(config, setup.mesh, abstract)
    return RunSetup(
        **vars(setup), stage=stage_of(config), optimizer=optimizer, abstract=abstract, plan=plan
    )


def check_sharding(config: FrozenConfigDict, mesh: Mesh, abstract: TrainState) -> None:
    """Raise ValueError if more than LARGEST_REPLICATED of the parameters are replicated on several
    devices.

    Rules that shard no axis of parameters ask for replication.
    """
    rules = {rule[0]: rule[1:] for rule in config.logical_axis_rules}
    asked = not any(
        rules.get(axis) for axis in ("layers", "vocab", "embed", "heads", "kv_heads", "mlp")
    )
    share = sharding.replicated_share(abstract.params)
    if mesh.size > 1 and share > LARGEST_REPLICATED and not asked:
        raise ValueError(
            f"{share:.0%} of the parameters would be replicated on each of {mesh.size} devices: choose "
            f"ici_*_parallelism that divide num_decoder_layers={config.num_decoder_layers} or "
            f"emb_dim={config.emb_dim}, or remove the "
            "mesh axes from logical_axis_rules"
        )


def plan_batch(config: FrozenConfigDict, data_parallel_size: int) -> BatchPlan:
    """Micro-batch size and gradient accumulation steps for a number of data-parallel devices."""
    length = pyconfig.row_length(config)
    rows = config.global_batch_tokens // length
    if rows % data_parallel_size:
        raise ValueError(
            f"global_batch_tokens={config.global_batch_tokens} is {rows} rows of {length} tokens, which "
            f"{data_parallel_size} devices cannot share equally: make it a multiple of {data_parallel_size * length}"
        )
    device_rows = rows // data_parallel_size
    micro_rows = config.per_device_batch_size or scaling.largest_divisor(
        device_rows, LARGEST_MICRO_BATCH
    )
    if device_rows % micro_rows:
        raise ValueError(
            f"per_device_batch_size={micro_rows} does not divide the {device_rows} rows on each of "
            f"{data_parallel_size} devices: choose a divisor of {device_rows}, or leave it null"
        )
    return BatchPlan(data_parallel_size, device_rows // micro_rows, micro_rows)


def needed_bytes(setup: RunSetup) -> dict[str, int]:
    """Estimated bytes on the fullest device by kind, without most of the compiler's temporaries."""
    config, plan = setup.config, setup.plan

    def on_device(tree):
        return sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )

    def elements(count):
        # Axes that are not data parallel keep their shards.
        shards = setup.mesh.size // plan.data_parallel_size
        later = setup.gather_specs()[1]
        counts = jax.tree_util.tree_map_with_path(count, setup.abstract.params, later)
        return sum(jax.tree.leaves(counts)) // shards

    def held_whole(path, leaf, later):
        # With FSDP one layer at a time.
        stacked = any(later) and path[0].key in STACKED
        return math.prod(leaf.shape[1:] if stacked else leaf.shape)

    def kept_shards(path, leaf, later):
        del path
        return math.prod(leaf.shape) // sharding.number_of_shards(setup.mesh, later)

    tokens = plan.micro_rows * pyconfig.row_length(config)
    size = jnp.dtype(setup.numerics.dtype).itemsize
    widths = residual_widths(config)
    in_kernels = setup.numerics.products == "pallas"
    if in_kernels:
        widths["mlp_hidden"] = 0

    def kept_width(index):
        kept = kept_residuals(config, setup.gathers_by_layer, index)
        if kept is not None:
            return config.emb_dim + sum(widths[name] for name in kept)
        if in_kernels:
            return config.emb_dim + sum(widths.values())
        # also the inputs of norms and activation
        return 3 * config.emb_dim + sum(widths.values()) + widths["mlp_hidden"]

    width = sum(kept_width(index) for index in range(config.num_decoder_layers))
    # In a chunk, float32 scores and their gradient in the compute dtype.
    scores = (4 + size) * setup.vocab_chunk or size * config.vocab_size
    return {
        "parameters": on_device(setup.abstract.params),
        "optimizer state": on_device(setup.abstract.opt_state),
        "working copy": elements(held_whole) * size,
        "gradients": elements(kept_shards) * (size if plan.accumulation_steps == 1 else 4),
        "activations": tokens * (width * size + scores),
    }


def check_memory(setup: RunSetup) -> None:
    """Raise ValueError if the run cannot fit in memory, before anything is allocated."""
    limit = hardware.memory_limit_bytes()
    needed = needed_bytes(setup)
    total = sum(needed.values())
    if limit is not None and total > limit:
        parts = ", ".join(f"{kind} {size / 1e9:.1f}" for kind, size in needed.items())
        raise ValueError(
            f"{setup.config.model} needs about {total / 1e9:.1f} GB on each of {setup.mesh.size} devices ({parts}) "
            f"of {limit / 1e9:.1f} GB: choose a smaller model, a smaller per_device_batch_size, "
            "remat_policy=full, more devices with ici_fsdp_parallelism, or on a CPU num_cpu_devices=1"
        )


def flops_per_token(config: FrozenConfigDict) -> int:
    """Training FLOPs per token, forward and backward."""
    return scaling.flops_per_token(scaling.shape_of(config), pyconfig.windows_of(config))


def print_plan(setup: RunSetup) -> None:
    """Print the start-up tables: changed config keys, parameter groups, and the plan of the run."""
    config = setup.config
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
    print_table("run", ("what", "value"), [*describe_plan(setup).items(), *_describe_text(config)])


def _describe_text(config: FrozenConfigDict) -> Iterator[tuple[str, str]]:
    """Rows about the data of a run: its files, and at its start how much of them validate, and what
    packing will discard.
    """
    files = summary.describe_files(config) if config.dataset_type in SOURCES else {}
    yield from files.items()
    # A run that is resumed has the share in its step line.
    is_read = "validation files" in files or config.dataset_type == "chat"
    if not is_read or (run_directory(config) / "checkpoints").exists():
        return
    try:
        tokenizer = load_tokenizer(config)
    except ValueError:
        yield "discarded tokens", "unknown before the tokenizer is trained"
        return
    validation = held_out.describe(config, tokenizer) if config.eval_interval else None
    if validation:
        yield "validation tokens", validation
    if files:
        yield "discarded tokens", summary.estimate_discarded(config, tokenizer)


def describe_plan(setup: RunSetup) -> dict[str, str]:
    """Devices, numerics, FLOPs, batch, horizon, memory and data of a run, in words."""
    config, plan = setup.config, setup.plan
    flops = flops_per_token(config)
    tokens = config.steps * config.global_batch_tokens
    scaling_parameters = scaling.parameter_counts(scaling.shape_of(config)).scaling
    device = setup.mesh.devices.flat[0].device_kind
    chip = hardware.chip(setup.mesh.devices.flat[0])
    layout = " x ".join(f"{axis} {size}" for axis, size in setup.mesh.shape.items())
    warm_up = 0 < config.steps <= config.warmup_steps
    quantized = "" if config.quantization == "none" else f", layer matmuls {config.quantization}"
    memory = ", ".join(f"{kind} {size / 1e9:.2f}" for kind, size in needed_bytes(setup).items())
    recomputed = "" if config.remat_layers is None else f" in {config.remat_layers} layers"
    return {
        "devices": f"{setup.mesh.size} x {device}, {layout}",
        "numerics": f"{setup.numerics.dtype}, embedding tables {setup.numerics.embedding_dtype}{quantized}",
        "attention": setup.numerics.attention,
        "layer products": setup.numerics.products,
        "FLOPs": f"{flops:,} per token ({scaling.FLOP_COUNT}), {flops * tokens:.4g} in total",
        "MFU": f"these FLOPs of {chip.peak_flops / 1e12:,.4g} TFLOP/s per device, dense bfloat16"
        if chip
        else f"unknown, TFLOP/s are shown: no peak of {device} in MaxNano/distributed/hardware.py",
        "batch": f"{config.global_batch_tokens:,} tokens = {plan.data_parallel_size} devices x "
        f"{plan.accumulation_steps} micro-batches x {plan.micro_rows} rows x {pyconfig.row_length(config)}",
        "horizon": f"{config.steps:,} steps, {tokens:,} tokens, "
        f"{tokens / scaling_parameters:.2f} per scaling parameter"
        + f"; all are warm-up of the learning rates: warmup_steps={config.warmup_steps}"
        * warm_up,
        "memory": f"about {memory} GB per device (estimate), remat_policy={config.remat_policy}{recomputed}",
        "data": stage_config(config).describe_data(config),
        "run": str(run_directory(config)),
    }

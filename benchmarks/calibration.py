"""Compares the compiler's estimates with what was measured on a TPU v6e, program by program.

    python benchmarks/calibration.py configs/base.yml

Every row is a small program whose time on a v6e is public. It is compiled for the chip that was
measured, by the tool that train_compile.py uses, and costed by the same rules. Splash is costed by
the bundles of its final schedule, and is JAX's: its successor in tokamax was measured. Nothing is
run. The factors in MaxNano/compile/calibration.py follow from the table. A whole step that was
measured is in benchmarks/straightforward.py. Prints two tables and a JSON line.

Sources: TPU_RECIPES github.com/AI-Hypercomputer/tpu-recipes@c8cfe2f (microbenchmarks/README.md,
microbenchmarks/trillium/collectives/README.md: its psum is that of accelerator-microbenchmarks,
branch trillium-collectives); TOKAMAX github.com/openxla/tokamax@783ea95
(tokamax/data/autotuning/tpu_v6_lite: medians of five device times).
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from MaxNano import pyconfig

    pyconfig.check_command_line()

import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import FrozenConfigDict

from benchmarks import common
from benchmarks.attention import dumped_schedules
from MaxNano import pyconfig
from MaxNano.compile import calibration, topologies
from MaxNano.compile import report as compile_report
from MaxNano.distributed import hardware

TPU_RECIPES = "tpu-recipes@c8cfe2f"
TOKAMAX = "tokamax@783ea95"
OTHER = ("activation", "weight", "table", "copy", "other")
VMEM = {"xla_tpu_scoped_vmem_limit_kib": "65536"}
SEQUENCE_MINOR = splash_attention.QKVLayout.SEQ_MINOR
HEAD_DIM_MINOR = splash_attention.QKVLayout.HEAD_DIM_MINOR


class Program(NamedTuple):
    """A program that was measured."""

    name: str
    kind: str  # the class of calibration.FACTORS that it tells about
    milliseconds: float
    source: str
    function: Callable
    shapes: tuple[tuple[tuple[int, ...], str], ...]
    topology: str = "v6e-1"
    options: dict[str, str] = {}
    splash: Callable | None = None  # the Splash kernel inside


# ---- The programs -------------------------------------------------------------------------------


def product(a, b):
    """The product of two matrices."""
    return a @ b


def copy(a):
    """A copy in the chip's main memory."""
    return a.copy()


def cross_entropy(x, labels, w):
    """Mean loss of a linear layer with softmax, as tokamax's XLA implementation has it."""
    logits = x @ w
    hot = jax.nn.one_hot(labels, num_classes=w.shape[1], dtype=x.dtype)
    losses = jnp.sum(-hot * jax.nn.log_softmax(logits, axis=-1), axis=-1, dtype=jnp.float32)
    return jnp.mean(losses, dtype=jnp.float32), jax.nn.logsumexp(logits, axis=-1)


def plain_attention(q, k, v):
    """Full attention with all float32 scores; (B, T, N, H) each."""
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=jnp.float32)
    scores = scores * q.shape[-1] ** -0.5
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.einsum("BNTS,BSNH->BTNH", weights, v, preferred_element_type=jnp.float32).astype(
        q.dtype
    )


def make_splash(length: int, blocks: tuple[int, int, int], q_layout):
    """JAX's causal Splash kernel for queries, keys and values (N, L, H)."""
    q, kv, compute = blocks
    sizes = splash_attention.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_kv_compute=compute,
        q_layout=q_layout,
        k_layout=HEAD_DIM_MINOR,
        v_layout=HEAD_DIM_MINOR,
    )
    masks = splash_attention.MultiHeadMask([splash_attention.CausalMask((length, length))])
    with jax.ensure_compile_time_eval():
        kernel = splash_attention.make_splash_mha(
            masks, block_sizes=sizes, head_shards=1, q_seq_shards=1
        )
        return jax.tree.map(np.asarray, kernel)


def attend(kernel, q, k, v):
    """Splash between the transposes that (B, T, N, H) needs."""
    q = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
    return jax.vmap(kernel)(*(x.swapaxes(1, 2) for x in (q, k, v))).swapaxes(1, 2)


def splash(rows: int, length: int, heads: int, head_dim: int, blocks, q_layout, milliseconds):
    """A record of Splash's forward pass, causal, in bfloat16."""
    kernel = make_splash(length, blocks, q_layout)
    shape = ((rows, length, heads, head_dim), "bfloat16")
    name = f"Splash {rows} x {length:,}, {heads} heads of {head_dim}, {'/'.join(map(str, blocks))}"
    return Program(
        name, "pallas", milliseconds, TOKAMAX, partial(attend, kernel), (shape,) * 3, splash=kernel
    )


def linear_loss(tokens: int, width: int, vocab: int, milliseconds: float) -> Program:
    """A record of `cross_entropy`, forward."""
    shapes = (((tokens, width), "bfloat16"), ((tokens,), "int32"), ((width, vocab), "bfloat16"))
    name = f"linear + cross-entropy {tokens:,} x {width:,} x {vocab:,}"
    return Program(name, "activation", milliseconds, TOKAMAX, cross_entropy, shapes)


def plain(rows: int, length: int, milliseconds: float) -> Program:
    """A record of `plain_attention`, forward, with 16 heads of 128."""
    shape = ((rows, length, 16, 128), "bfloat16")
    name = f"plain attention {rows} x {length:,}, 16 heads of 128"
    return Program(name, "activation", milliseconds, TOKAMAX, plain_attention, (shape,) * 3)


def programs() -> list[Program]:
    """All programs, in the order of the table."""
    square, flat = ((8192, 8192), "bfloat16"), ((16777216,), "bfloat16")
    return [
        Program(
            "product 8,192^3", "matmul", 1.328756, TPU_RECIPES, product, (square,) * 2, options=VMEM
        ),
        linear_loss(1024, 4096, 151936, 2.258),
        linear_loss(4096, 4096, 151936, 9.617),
        linear_loss(8192, 7168, 128256, 27.179),
        Program("copy 33.6 MB", "activation", 0.049359, TPU_RECIPES, copy, (flat,)),
        plain(32, 512, 1.423),
        plain(8, 2048, 4.694),
        plain(1, 16384, 46.304),
        splash(32, 512, 16, 128, (512, 512, 512), HEAD_DIM_MINOR, 0.794),
        splash(8, 2048, 16, 128, (1024, 1024, 512), SEQUENCE_MINOR, 1.147),
        splash(4, 4096, 16, 128, (1024, 1024, 512), SEQUENCE_MINOR, 1.577),
        splash(1, 16384, 16, 128, (2048, 2048, 512), SEQUENCE_MINOR, 3.981),
        splash(8, 2048, 8, 256, (1024, 1024, 512), SEQUENCE_MINOR, 0.812),
        splash(1, 16384, 8, 256, (2048, 2048, 512), SEQUENCE_MINOR, 2.334),
        # 235.76 GB/s of 2 x 255 / 256 x 606 MB.
        Program(
            "all-reduce 606 MB, 256 chips",
            "collective",
            5.1214,
            TPU_RECIPES,
            partial(jax.lax.psum, axis_name="chips"),
            (((17408, 17408), "bfloat16"),),
            topology="v6e-256",
        ),
    ]


# ---- Estimates ----------------------------------------------------------------------------------


def lower(program: Program, devices) -> tuple[jax.stages.Lowered, Mesh]:
    """The program for the chips that were measured, with whole arrays on each, and their mesh."""
    mesh = Mesh(np.asarray(devices), ("chips",))
    place = NamedSharding(mesh, PartitionSpec())
    arguments = [jax.ShapeDtypeStruct(*shape, sharding=place) for shape in program.shapes]
    function = program.function
    if len(devices) > 1:
        function = jax.shard_map(
            function, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec()
        )
    return jax.jit(function, compiler_options=program.options).lower(*arguments), mesh


def bundle_cycles(program: Program, folder: Path) -> float:
    """Cycles of the Splash kernel by the bundles of its final schedule, without waits for memory."""
    (rows, length, heads, _), _ = program.shapes[0]
    schedule = dumped_schedules(folder)["fwd"]
    visits = program.splash.fwd_mask_info.block_mask
    blocks = length // program.splash.kwargs["block_sizes"].block_q
    cycles = (
        visits.size * schedule.step
        + int((visits > 0).sum()) * schedule.tile
        + blocks * (schedule.first + schedule.last)
    )
    return float(rows * heads * cycles)


def estimate(program: Program, folder: Path) -> common.Row:
    """The row of a program: milliseconds by the rules, and for a kernel by its bundles."""
    devices = topologies.slice_devices(program.topology)
    lowered, mesh = lower(program, devices)
    chip = hardware.chip(devices[0])
    report = compile_report.analyze(lowered.compile(), chip, mesh=mesh)
    parts = {k: 1e3 * n / chip.clock_hz for k, n in report.cycles_by_class.items() if n}
    if program.splash is not None:
        parts["pallas"] = 1e3 * bundle_cycles(program, folder) / chip.clock_hz
    total = sum(parts.values())
    return {
        "program": program.name,
        "class": program.kind,
        "estimate ms": total,
        "measured ms": program.milliseconds,
        "ratio": program.milliseconds / total,
        "of its class": class_factor(program.kind, parts, program.milliseconds),
        "source": program.source,
        "parts": ", ".join(f"{kind} {part:.3f}" for kind, part in parts.items()),
    }


def class_factor(kind: str, parts: dict[str, float], measured: float) -> float:
    """Measured by estimated time of a class, if the classes before it have their factors.

    What a program of XLA's needs beside products, and what surrounds a kernel, is counted with
    calibration.FACTORS. parts: the estimates by class.
    """
    known = {"activation": ("matmul",), "pallas": OTHER}.get(kind, ())
    rest = measured - sum(calibration.FACTORS[k].value * parts.get(k, 0.0) for k in known)
    return rest / sum(part for k, part in parts.items() if k not in known)


def sum_up(rows: list[common.Row]) -> list[common.Row]:
    """Median, lowest and highest factor of each class that was measured."""
    factors = defaultdict(list)
    for row in rows:
        factors[row["class"]].append(row["of its class"])
    return [
        {
            "class": kind,
            "programs": len(values),
            "median": statistics.median(values),
            "lowest": min(values),
            "highest": max(values),
        }
        for kind, values in factors.items()
    ]


def main(config: FrozenConfigDict) -> None:
    """Estimate every program; print the table."""
    del config
    jax.config.update("jax_enable_compilation_cache", False)  # a kept program writes no schedule
    rows = []
    with tempfile.TemporaryDirectory() as name:
        common.dump_bundles(name)
        for program in programs():
            rows.append(estimate(program, Path(name)))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            for path in Path(name).iterdir():
                path.unlink()
    print("ESTIMATED for TPU v6e and MEASURED there, milliseconds")
    common.show(rows, digits=3)
    common.show(sum_up(rows), digits=2)
    print(json.dumps(rows))


if __name__ == "__main__":
    sys.exit(pyconfig.launch(main))

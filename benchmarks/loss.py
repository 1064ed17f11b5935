"""Head and loss alone, forward and backward, by how many vocabulary rows or tokens are scored at a
time.

    .venv/bin/python benchmarks/loss.py configs/base.yml model=d24

Takes per_device_batch_size rows (null: 32). Measures median times on an accelerator. Without one it
compiles for a chip of compile_topology and ESTIMATES cycles and memory, without running anything.
Prints a table and a JSON line.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from MaxNano import pyconfig

    pyconfig.check_command_line()

import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from ml_collections import FrozenConfigDict

from benchmarks import common
from MaxNano import pyconfig, scaling
from MaxNano.compile import report as compile_report
from MaxNano.compile import topologies
from MaxNano.distributed import hardware
from MaxNano.models import losses

ROWS = 32
REPEATS = 10
# Vocabulary rows at a time; 0: all, with their gradients kept but for a factor of each token.
CHUNKS = (1024, 2048, 4096, 8192, 16384, 0)
# Parts of the tokens, each scored against the whole vocabulary, and again in the backward pass.
TOKEN_PARTS = (8, 32)


def plain(config: FrozenConfigDict, hidden, head, targets) -> jax.Array:
    """The straightforward loss: whole float32 logits, differentiated by JAX."""
    logits = jnp.einsum(
        "BLD,VD->BLV", hidden, head[: config.vocab_size], preferred_element_type=jnp.float32
    )
    likelihoods = jax.nn.log_softmax(losses.soft_cap(logits, config.logits_soft_cap))
    return -jnp.sum(jnp.take_along_axis(likelihoods, targets[..., None], axis=-1))


def by_vocabulary(config: FrozenConfigDict, chunk: int, hidden, head, targets) -> jax.Array:
    """MaxNano's loss with vocab_chunk_size=chunk."""
    return jnp.sum(
        losses.token_losses(hidden, head, targets, config.vocab_size, config.logits_soft_cap, chunk)
    )


def by_tokens(config: FrozenConfigDict, parts: int, hidden, head, targets) -> jax.Array:
    """The loss computed for one part of the rows after another."""

    @jax.checkpoint
    def part(hidden, targets):
        return plain(config, hidden, head, targets)

    def split(x):
        return x.reshape(parts, -1, *x.shape[1:])

    return jnp.sum(jax.lax.map(lambda xs: part(*xs), (split(hidden), split(targets))))


def variants(config: FrozenConfigDict, rows: int, backend: str) -> dict[str, Callable]:
    """Functions of (hidden, head, targets), by name."""
    chosen = losses.vocab_chunk(
        config.vocab_size, config.logits_soft_cap, config.vocab_chunk_size, backend
    )
    chunks = [chunk for chunk in CHUNKS if chunk < config.vocab_size]
    named = {
        (f"vocabulary by {chunk}" if chunk else "whole")
        + (" (the config's)" if chunk == chosen else ""): partial(by_vocabulary, config, chunk)
        for chunk in (chunks if chosen in chunks else [chosen, *chunks])
    }
    for parts in TOKEN_PARTS:
        if rows % parts == 0:
            named[f"tokens in {parts} parts"] = partial(by_tokens, config, parts)
    return named | {"plain": partial(plain, config)}


def shapes(
    config: FrozenConfigDict, rows: int, dtype: str, place=None
) -> list[jax.ShapeDtypeStruct]:
    """The shapes of hidden states, head and targets; the head is in the compute dtype, as in a
    step.
    """
    vocab = scaling.round_up(config.vocab_size, config.vocab_multiple)
    length = config.max_target_length
    return [
        jax.ShapeDtypeStruct(shape, kind, sharding=place)
        for shape, kind in (
            ((rows, length, config.emb_dim), dtype),
            ((vocab, config.emb_dim), dtype),
            ((rows, length), jnp.int32),
        )
    ]


def matmul_flops(config: FrozenConfigDict, rows: int) -> int:
    """FLOPs of the three products that every variant needs."""
    return 6 * rows * config.max_target_length * config.emb_dim * config.vocab_size


def measure(config: FrozenConfigDict, program: Callable, rows: int) -> common.Row:
    """Median and spread of milliseconds, and the rate of the needed FLOPs."""
    backend = jax.default_backend()
    keys = jax.random.split(jax.random.key(config.seed), 3)
    hidden, head, targets = shapes(config, rows, hardware.compute_dtype(config, backend))
    arrays = [
        *(
            jax.random.normal(key, x.shape, x.dtype)
            for key, x in zip(keys, (hidden, head), strict=False)
        ),
        jax.random.randint(keys[2], targets.shape, 0, config.vocab_size),
    ]
    program = jax.jit(program, compiler_options=hardware.compiler_options(config, backend))
    try:
        jax.block_until_ready(program(*arrays))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"failure": "does not fit"}
    seconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        jax.block_until_ready(program(*arrays))
        seconds.append(time.perf_counter() - begin)
    median = statistics.median(seconds)
    return {
        "ms": median * 1e3,
        "best ms": min(seconds) * 1e3,
        "worst ms": max(seconds) * 1e3,
        "TFLOP/s": matmul_flops(config, rows) / median / 1e12,
    }


def estimate(config: FrozenConfigDict, program: Callable, rows: int, device) -> common.Row:
    """Million cycles by class, and GiB, on a chip that need not be present."""
    arguments = shapes(
        config, rows, hardware.compute_dtype(config, "tpu"), SingleDeviceSharding(device)
    )
    program = jax.jit(program, compiler_options=hardware.compiler_options(config, "tpu"))
    started = time.monotonic()
    try:
        compiled = program.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"failure": "does not fit"}
    chip = hardware.chip(device)
    work = compile_report.ProgramWork(
        matmul_flops(config, rows), rows * config.max_target_length, None
    )
    report = compile_report.analyze(
        compiled,
        chip,
        vocab_size=config.vocab_size,
        work=work,
        compile_seconds=time.monotonic() - started,
    )
    row = common.costs(report)
    row["of peak"] = f"{report.mfu:.1%}"
    return row


def main(config: FrozenConfigDict) -> None:
    """Measure or estimate every variant."""
    rows = config.per_device_batch_size or ROWS
    is_absent = jax.default_backend() == "cpu"
    programs = {
        name: jax.value_and_grad(loss, argnums=(0, 1))
        for name, loss in variants(
            config, rows, "tpu" if is_absent else jax.default_backend()
        ).items()
    }
    if is_absent:
        jax.config.update("jax_enable_compilation_cache", False)
        device = topologies.slice_devices(config.compile_topology)[0]
        where, unit = f"ESTIMATED for {device.device_kind}, not measured", "; M cycles"
        cost = partial(estimate, device=device)
    else:
        where, unit = f"MEASURED on {jax.devices()[0].device_kind}", ""
        cost = measure
    results = []
    for name, program in programs.items():
        results.append({"loss": name, **cost(config, program, rows)})
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    print(
        f"{where}: {rows * config.max_target_length:,} tokens of {config.emb_dim}, vocabulary {config.vocab_size:,}, "
        f"forward and backward{unit}"
    )
    common.show(results)
    print(json.dumps({"where": where, "rows": results}))


if __name__ == "__main__":
    sys.exit(pyconfig.launch(main))

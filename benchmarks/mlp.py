"""A layer's MLP, forward: one Pallas kernel for norm, both products and the residual, and XLA's program.

    .venv/bin/python benchmarks/mlp.py configs/base.yml model=d24

Takes per_device_batch_size rows (null: 32). Nothing is run: both are compiled for one TPU v6e chip, and
cycles are ESTIMATED, the kernel's by the compiler's schedule, in which a bundle takes a cycle. The
kernel is no part of the model. Prints a table and a JSON line.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from MaxNano import pyconfig

    pyconfig.check_command_line()

import json
import tempfile
import time
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding
from ml_collections import FrozenConfigDict

from benchmarks import common
from benchmarks.attention import read_schedule
from MaxNano import pyconfig, scaling
from MaxNano.compile import calibration, costs, hlo, topologies
from MaxNano.distributed import hardware
from MaxNano.models import layers

NAME = "mlp_forward"
ROWS = 32
TOKENS = (256, 512)  # of a tile
COLUMNS = 1536  # of the hidden layer at a time, where the width has as many
VMEM_LIMIT_BYTES = 110 * 2**20


def plain(config: FrozenConfigDict, x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """The second half of transformer.block: x (T, D), up (D, F), down (F, D) -> (T, D)."""
    h = layers.rms_norm(x, config.norm_epsilon)
    return x + layers.mlp({"wi": up, "wo": down}, h, jnp.matmul)


def fused(
    config: FrozenConfigDict,
    tokens: int,
    x: jax.Array,
    up: jax.Array,
    down: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """As `plain`, `tokens` at a time, with both matrices in VMEM; T must be a multiple."""
    (total, width), hidden = x.shape, up.shape[1]
    whole = [pl.BlockSpec(w.shape, lambda i: (0, 0)) for w in (up, down)]
    tile = pl.BlockSpec((tokens, width), lambda i: (i, 0))

    def kernel(x_ref, up_ref, down_ref, out_ref, sums):
        x = x_ref[...]
        normalized = layers.rms_norm(x, config.norm_epsilon)
        sums[...] = x.astype(jnp.float32)
        for start in range(0, hidden, COLUMNS):
            span = pl.ds(start, min(COLUMNS, hidden - start))
            h = jnp.dot(normalized, up_ref[:, span], preferred_element_type=jnp.float32)
            h = jnp.square(jax.nn.relu(h)).astype(x.dtype)
            sums[...] += jnp.dot(h, down_ref[span], preferred_element_type=jnp.float32)
        out_ref[...] = sums[...].astype(out_ref.dtype)

    return pl.pallas_call(
        kernel,
        grid=(total // tokens,),
        in_specs=[tile, *whole],
        out_specs=tile,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[pltpu.VMEM((tokens, width), jnp.float32)],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM_LIMIT_BYTES),
        interpret=interpret,
        name=NAME,
    )(x, up, down)


def main(config: FrozenConfigDict) -> None:
    jax.config.update("jax_enable_compilation_cache", False)  # a kept program writes no schedule
    chip, length, width = hardware.CHIPS["TPU v6e"], config.max_target_length, config.emb_dim
    total = (config.per_device_batch_size or ROWS) * length
    hidden = scaling.axis_sizes(scaling.shape_of(config))["mlp"]
    ideal = 4 * total * width * hidden / chip.peak_flops * chip.clock_hz
    rows = []
    with tempfile.TemporaryDirectory() as name:
        common.dump_bundles(name)
        device = topologies.slice_devices("v6e-1", 1)[0]
        sharding = SingleDeviceSharding(device)
        arrays = [
            jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)
            for shape in ((total, width), (width, hidden), (hidden, width))
        ]
        # Title, function, compiler options, and tiles of the kernel or None.
        programs = [("XLA", partial(plain, config), hardware.compiler_options(config, "tpu"), None)]
        programs += [
            (f"kernel, {n} tokens a tile", partial(fused, config, n), None, total // n)
            for n in TOKENS
        ]
        for title, function, options, tiles in programs:
            started = time.monotonic()
            compiled = jax.jit(function, compiler_options=options).lower(*arrays).compile()
            seconds = time.monotonic() - started
            if tiles is None:
                walk = costs.walk(hlo.parse(compiled.as_text()), chip, vocab_size=config.vocab_size)
                by_class = walk.by_class()
            else:
                [path] = Path(name).glob(f"*{NAME}*-final_bundles.txt")
                by_class = {"pallas": tiles * sum(read_schedule(path.read_text()))}
            for path in Path(name).iterdir():
                path.unlink()
            cycles = sum(by_class.values())
            calibrated = calibration.calibrate(by_class, chip).times(1e-6)
            rows.append(
                {
                    "program": title,
                    "M cycles": round(cycles / 1e6, 2),
                    "calibrated": calibrated.text(".2f"),
                    "of peak": f"{ideal / cycles:.1%}",
                    "compiled s": round(seconds),
                }
            )
    print(f"ESTIMATED for TPU v6e, not measured: {total:,} tokens, {width} x {hidden}, bfloat16")
    common.show(rows)
    print(json.dumps(rows))


if __name__ == "__main__":
    sys.exit(pyconfig.launch(main))

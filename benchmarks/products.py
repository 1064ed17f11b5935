"""A layer's matrix products: the Pallas kernels of kernels/products.py, and XLA's program.

    .venv/bin/python benchmarks/products.py configs/base.yml model=d24

Takes per_device_batch_size rows (null: 32). Nothing is run: all is compiled for one TPU v6e chip, and
cycles are ESTIMATED, a kernel's by the compiler's schedule, in which a bundle takes a cycle and no
wait for memory is known. Prints a table and a JSON line.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from MaxNano import pyconfig

    pyconfig.check_command_line()

import json
import math
import re
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from ml_collections import FrozenConfigDict

from benchmarks import common
from MaxNano import pyconfig, scaling
from MaxNano.compile import calibration, costs, hlo, topologies
from MaxNano.distributed import hardware
from MaxNano.models import layers, products
from MaxNano.models.kernels import products as kernels

ROWS = 32


def loops(text: str) -> tuple[list[int], int]:
    """From a kernel's bundles: those of each loop over rows or columns, in order, and those of a
    tile beside them.
    """
    bundles = re.findall(r"^ *(?:0x)?([0-9a-f]+) +(?:[A-Z]{2})?: (.*)$", text, re.MULTILINE)
    starts = {
        n: int(at, 16) for at, line in bundles for n in re.findall(r"Start region (\d+)", line)
    }
    spans = [
        int(at, 16) - starts[n]
        for at, line in bundles
        for n in re.findall(r"sbr\.rel .*target = \$region(\d+)", line)
        if starts.get(n, math.inf) < int(at, 16)
    ]
    *inner, tile = spans  # the loop over tiles ends last
    return inner, tile - sum(inner)


def trips(name: str, tile: int, matrices: list) -> tuple[list[int], list[int]]:
    """The trips of a kernel's loops before the first tile, and of those in each tile of `tile`
    tokens.
    """

    def count(total, size):
        return total // math.gcd(total, size)

    rows = count(tile, kernels.ROWS)
    # The matrix whose columns, or for the backward pass of a residual's product rows, are looped over.
    axis = 0 if name == "add_product_backward" else 1
    columns = count(matrices[0].shape[axis], kernels.SIZES[name].columns)
    inside = {
        "project_backward": [rows, columns, rows],
        "mlp_backward": [rows, columns, rows],
        "add_product_forward": [columns],
        "add_product_backward": [columns],
    }.get(name, [rows, columns])
    zeros = [count(w.shape[0], kernels.LANES) for w in matrices] if "backward" in name else []
    return zeros, inside


def cycles(text: str, name: str, tokens: int, tile: int, matrices: list) -> float:
    """Cycles of a kernel with these bundles."""
    inner, rest = loops(text)
    # A loop of one trip is none.
    once, inside = ([n for n in counts if n > 1] for counts in trips(name, tile, matrices))
    assert len(inner) == len(once) + len(inside), (name, inner, once, inside)
    sizes = [n * size for n, size in zip((*once, *inside), inner, strict=True)]
    return tokens // tile * (sum(sizes[len(once) :]) + rest) + sum(sizes[: len(once)])


def programs(config: FrozenConfigDict, tokens: int) -> dict[str, tuple[Callable, list]]:
    """Of each kernel: a function that calls it alone, and its arguments' shapes."""
    sizes = scaling.axis_sizes(scaling.shape_of(config))
    width, hidden, heads = config.emb_dim, sizes["mlp"], sizes["heads"]
    qkv = heads + 2 * sizes["kv_heads"]
    x, y = (tokens, width), (tokens, heads)
    project, out, wi, wo = (width, qkv), (heads, width), (width, hidden), (hidden, width)
    scales = jax.ShapeDtypeStruct((2,), jnp.float32)
    numbers = kernels.Numbers(config.norm_epsilon)
    return {
        "project_forward": (
            lambda *a: kernels._project_forward(*a, False, numbers)[0],
            [x, x, scales, project],
        ),
        "project_backward": (
            lambda *a: kernels._project_backward(False, numbers, a[:4], a[4:]),
            [x, x, scales, project, x, (tokens, qkv)],
        ),
        "add_product_forward": (
            lambda *a: kernels._add_product_forward(*a, numbers)[0],
            [x, y, out],
        ),
        "add_product_backward": (
            lambda *a: kernels._add_product_backward(numbers, a[:2], a[2]),
            [y, out, x],
        ),
        "mlp_forward": (
            lambda x, wi, wo: kernels._mlp_forward(x, (wi,), wo, numbers)[0],
            [x, wi, wo],
        ),
        "mlp_backward": (
            lambda x, wi, wo, g: kernels._mlp_backward(numbers, (x, (wi,), wo), g),
            [x, wi, wo, x],
        ),
    }


def matrices_of(shapes: list) -> list:
    """Those of a kernel's arguments that are matrices and not tokens."""
    largest = max(shape[0] for shape in shapes if isinstance(shape, tuple))
    return [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        for shape in shapes
        if isinstance(shape, tuple) and shape[0] != largest
    ]


def layer(config: FrozenConfigDict) -> Callable[..., Any]:
    """What the kernels compute for a layer, in XLA's program: forward, and backward with the
    projection and the residual after attention computed again. The projection stands for attention.
    """
    chosen = products.plain(config, place=layers.row_major)
    heads = scaling.axis_sizes(scaling.shape_of(config))["heads"]

    def run(x, x0, scales, project, out, wi, wo):
        x, product, _ = chosen.project(x, x0, (scales[0], scales[1]), project, 0)
        x = chosen.add_product(x, product[:, :heads], out)
        return chosen.mlp(x, {"wi": wi, "wo": wo})

    def both(cotangent, *arrays):
        kept = jax.checkpoint(run, policy=jax.checkpoint_policies.nothing_saveable)
        result, pull = jax.vjp(kept, *arrays)
        return result, pull(cotangent)

    return both


def main(config: FrozenConfigDict) -> None:
    jax.config.update("jax_enable_compilation_cache", False)  # a kept program writes no schedule
    chip = hardware.CHIPS["TPU v6e"]
    tokens = (config.per_device_batch_size or ROWS) * config.max_target_length

    def compiled(sharding, function, shapes, options=None):
        def array(x):
            shape, dtype = (x, jnp.bfloat16) if isinstance(x, tuple) else (x.shape, x.dtype)
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        started = time.monotonic()
        lowered = jax.jit(function, compiler_options=options).lower(*map(array, shapes))
        return lowered.compile(), time.monotonic() - started

    table = []

    def add(title, by_class, flops, seconds):
        counted = sum(by_class.values())
        ideal = flops / chip.peak_flops * chip.clock_hz
        table.append(
            {
                "program": title,
                "M cycles": round(counted / 1e6, 2),
                "calibrated": calibration.calibrate(by_class, chip).times(1e-6).text(".2f"),
                "of peak": f"{ideal / counted:.1%}",
                "compiled s": round(seconds, 1),
            }
        )
        return counted

    listed = programs(config, tokens)
    if kernels.mlp_parts(matrices_of(listed["mlp_backward"][1]), backward=True) > 1:
        raise ValueError(
            f"the MLP of emb_dim={config.emb_dim} is split over several kernel calls, and this script "
            "costs a single one: choose a narrower model"
        )
    total, flops = 0.0, 0.0
    with tempfile.TemporaryDirectory() as name:
        common.dump_bundles(name)
        sharding = SingleDeviceSharding(topologies.slice_devices("v6e-1", 1)[0])
        for kernel, (function, shapes) in listed.items():
            program, seconds = compiled(sharding, function, shapes)
            [path] = Path(name).glob(f"*{kernel}*-final_bundles.txt")
            matrices = matrices_of(shapes)
            tile = math.gcd(tokens, kernels.tile_tokens(kernel, matrices))
            taken = cycles(path.read_text(), kernel, tokens, tile, matrices)
            for path in Path(name).iterdir():
                path.unlink()
            # What a layer's step runs twice: the backward pass computes it again.
            times = 2 if kernel in ("project_forward", "add_product_forward") else 1
            [stated] = re.findall(r'"flops":"?(\d+)', program.as_text())[:1]
            add(kernel, {"pallas": taken}, float(stated), seconds)
            total, flops = total + times * taken, flops + times * float(stated)
        add("kernels of a layer's step", {"pallas": total}, flops, 0)
        x, _, scales, project = listed["project_forward"][1]
        out, (_, wi, wo) = listed["add_product_forward"][1][2], listed["mlp_forward"][1]
        program, seconds = compiled(
            sharding,
            layer(config),
            [x, x, x, scales, project, out, wi, wo],
            hardware.compiler_options(config, "tpu"),
        )
        walk = costs.walk(hlo.parse(program.as_text()), chip, vocab_size=config.vocab_size)
        add("XLA, the same", walk.by_class(), flops, seconds)
    print(f"ESTIMATED for TPU v6e, not measured: {tokens:,} tokens, emb_dim {config.emb_dim}")
    common.show(table)
    print(json.dumps(table))


if __name__ == "__main__":
    sys.exit(pyconfig.launch(main))

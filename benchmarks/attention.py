"""The model's attention (rotary embedding, QK norm, scores) alone: kernels x windows x block sizes.

    .venv/bin/python benchmarks/attention.py configs/base.yml model=d24

Measures the kernels that run on this backend, forward and forward + backward. Without an
accelerator it also compiles the TPU kernels and ESTIMATES them: the compiler's final schedule gives
the cycles of each part of a kernel, the mask gives how often each part runs, and the compiler's own
estimates give the operations around the kernels. No estimate includes waiting for memory. Prints a
table and a JSON line.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from MaxNano import pyconfig

    pyconfig.check_command_line()

import functools
import json
import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from ml_collections import FrozenConfigDict

from benchmarks import common
from MaxNano import pyconfig
from MaxNano.compile import calibration
from MaxNano.distributed import hardware
from MaxNano.models import attention, layers

TOPOLOGY, KIND = "v6e:2x4", "TPU v6e"  # for estimates
REPEATS = 5
BLOCKS = (  # forward and backward, each (q, kv, kv computed at a time)
    ((256, 256, 256), (256, 256, 256)),
    ((512, 512, 512), (512, 512, 512)),
    ((512, 1024, 512), (512, 1024, 512)),
    ((1024, 512, 512), (1024, 512, 512)),
    ((1024, 1024, 512), (1024, 1024, 512)),
    ((1024, 1024, 1024), (512, 2048, 512)),
    ((2048, 1024, 512), (256, 2048, 512)),
    ((2048, 2048, 512), (1024, 2048, 512)),
)
FLASH_BLOCKS = (128, 256, 512)

Row = dict[str, Any]


# ---- What a window needs ------------------------------------------------------------------------


def useful_scores(length: int, window: int) -> int:
    """Number of unmasked scores of one head of one row."""
    return sum(min(t, window) + 1 for t in range(length))


def flops(config: FrozenConfigDict, rows: int, window: int, *, backward: bool) -> int:
    """FLOPs of the matrix products that every kernel needs: two forward, five backward."""
    scores = rows * config.num_query_heads * useful_scores(config.max_target_length, window)
    return 2 * config.head_dim * scores * (7 if backward else 2)


def variants(
    config: FrozenConfigDict, kernel: str, backend: str
) -> Iterator[tuple[str, attention.KernelSettings]]:
    """(name, settings) to try for a kernel."""
    settings = attention.KernelSettings.from_config(config, backend)
    if kernel == "flash":
        for block in FLASH_BLOCKS:
            yield str(block), settings._replace(flash_block=block)
    elif kernel == "splash":
        seen = set()
        for forward, backward in BLOCKS:
            named = settings._replace(
                splash_long_forward=forward, splash_long_backward=backward, splash_short_window=0
            )
            sizes = attention.splash_blocks(config.max_target_length, 1, named)
            if sizes not in seen:
                seen.add(sizes)
                yield " ".join("/".join(map(str, part)) for part in (forward, backward)), named
    else:
        yield str(settings.chunk) if kernel == "chunked" else "", settings


def functions(
    config: FrozenConfigDict, kernel: str, window: int, settings: attention.KernelSettings
):
    """Two functions: qkv -> output; (qkv, the output's gradient) -> output and qkv's gradient."""
    attend = functools.partial(
        attention.attend,
        tables=layers.rotary_tables(config.max_target_length, config.head_dim, config.rope_theta),
        heads=attention.Heads.from_config(config),
        window=window,
        kernel=kernel,
        settings=settings,
        rules=config.logical_axis_rules,
    )

    def both(qkv, gradient):
        out, pull = jax.vjp(attend, qkv)
        return out, *pull(gradient)

    return attend, both


def shapes(
    config: FrozenConfigDict, rows: int, dtype: str, sharding=None
) -> list[jax.ShapeDtypeStruct]:
    """The shapes of fused queries, keys and values, and of the output's gradient."""
    heads, kv_heads = config.num_query_heads, config.num_kv_heads
    return [
        jax.ShapeDtypeStruct(
            (rows, config.max_target_length, n * config.head_dim), dtype, sharding=sharding
        )
        for n in (heads + 2 * kv_heads, heads)
    ]


# ---- Measured -----------------------------------------------------------------------------------


def measure(
    config: FrozenConfigDict,
    kernel: str,
    window: int,
    settings: attention.KernelSettings,
    rows: int,
) -> Row:
    """Median milliseconds of forward and of forward + backward, with the rate of the useful FLOPs."""
    keys = jax.random.split(jax.random.key(config.seed))
    arrays = [
        jax.random.normal(key, shape.shape, shape.dtype)
        for key, shape in zip(
            keys,
            shapes(config, rows, hardware.compute_dtype(config, jax.default_backend())),
            strict=True,
        )
    ]
    result: Row = {}
    for name, function, inputs in zip(
        ("forward", "both"),
        functions(config, kernel, window, settings),
        (arrays[:1], arrays),
        strict=True,
    ):
        program = jax.jit(function)
        jax.block_until_ready(program(*inputs))
        seconds = []
        for _ in range(REPEATS):
            begin = time.perf_counter()
            jax.block_until_ready(program(*inputs))
            seconds.append(time.perf_counter() - begin)
        median = statistics.median(seconds)
        rate = flops(config, rows, window, backward=name == "both") / median
        result |= {f"{name} ms": round(median * 1e3, 3), f"{name} GFLOP/s": round(rate / 1e9, 1)}
    return result


# ---- Estimated ----------------------------------------------------------------------------------


class Schedule(NamedTuple):
    """Cycles of a kernel's parts in the compiler's final schedule."""

    step: int  # of each grid step
    first: int  # where an accumulator starts
    tile: int  # where a block is visited
    last: int  # where an accumulator is written


def read_schedule(text: str) -> Schedule:
    """The parts of a kernel's outermost loop: its conditional regions in the order of Splash's
    source.

    A bundle takes a cycle. A conditional region reaches from its branch to the bundle that ends the
    region the branch jumps to; what contains other regions is the pipeline's own bookkeeping and
    belongs to the step.
    """
    bundles = re.findall(r"^ *(?:0x)?([0-9a-f]+) +(?:[A-Z]{2})?: (.*)$", text, re.MULTILINE)
    ends = {
        n: int(at, 16)
        for at, line in bundles
        for n in re.findall(r"Start/End empty region (\d+)", line)
    }
    starts = {
        n: int(at, 16) for at, line in bundles for n in re.findall(r"Start region (\d+)", line)
    }
    branches = [
        (int(at, 16), n)
        for at, line in bundles
        for n in re.findall(r"sbr\.rel .*target = \$region(\d+)", line)
    ]
    back, loop = max((at, n) for at, n in branches if n in starts and starts[n] < at)
    spans = [(at, ends[n]) for at, n in branches if n in ends and starts[loop] < at < back]
    leaves = [s for s in spans if not any(s != o and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    lengths = [stop - start for start, stop in leaves]
    where = lengths.index(max(lengths))  # the tile; a grid of one block has no other parts
    first, tile, last = sum(lengths[:where]), lengths[where], sum(lengths[where + 1 :])
    return Schedule(back - starts[loop] - first - tile - last, first, tile, last)


def dumped_schedules(folder: Path) -> dict[str, Schedule]:
    """By the kernels' names (splash: fwd, dkv, dq; flash: forward, backward); empties the folder."""
    texts = {path.name: path.read_text() for path in folder.iterdir()}
    for path in folder.iterdir():
        path.unlink()
    pattern = re.compile(
        r"(?:splash_mha|flash)_(fwd|dkv|dq|forward|backward)_.*-\d+-final_bundles\.txt$"
    )
    matches = ((pattern.search(name), text) for name, text in texts.items())
    return {match[1]: read_schedule(text) for match, text in matches if match}


def splash_cycles(
    length: int, window: int, settings: attention.KernelSettings, parts: dict[str, Schedule]
) -> tuple[int, int]:
    """Cycles of one head of one row, forward and backward."""
    blocks = attention.splash_blocks(length, window, settings)
    kernel = attention.splash_kernel(length, min(window, length - 1), settings)
    tables = {"fwd": kernel.fwd_mask_info, "dkv": kernel.dkv_mask_info, "dq": kernel.dq_mask_info}
    lengths = {"fwd": blocks.block_q, "dkv": blocks.block_kv_dkv, "dq": blocks.block_q_dq}
    cycles = dict.fromkeys(tables, 0)
    for part, schedule in parts.items():
        visits = tables[part].block_mask
        cycles[part] = (
            visits.size * schedule.step
            + int((visits > 0).sum()) * schedule.tile
            + length // lengths[part] * (schedule.first + schedule.last)
        )
    return cycles["fwd"], cycles["dkv"] + cycles["dq"]


def splash_scores(
    length: int, window: int, settings: attention.KernelSettings
) -> tuple[float, float]:
    """Computed scores per unmasked score, forward and backward."""
    blocks = attention.splash_blocks(length, window, settings)
    kernel = attention.splash_kernel(length, min(window, length - 1), settings)
    pairs = (
        (kernel.fwd_mask_info, blocks.block_q * blocks.block_kv),
        (kernel.dkv_mask_info, blocks.block_q_dkv * blocks.block_kv_dkv),
    )
    useful = useful_scores(length, window)
    return tuple(int((info.block_mask > 0).sum()) * tile / useful for info, tile in pairs)


def estimate(
    config: FrozenConfigDict,
    kernel: str,
    window: int,
    settings: attention.KernelSettings,
    device: jax.Device,
    folder: Path,
) -> Row:
    """Cycles of one row on a TPU by its compiler's schedule; for splash, also what its blocks
    waste.
    """
    rows, heads, length = 2, config.num_query_heads, config.max_target_length
    chip = hardware.CHIPS[KIND]
    result: Row = {}
    partials = 0
    if kernel == "splash":
        scores = splash_scores(length, window, settings)
        result |= dict(
            zip(("forward scores", "backward scores"), (round(x, 2) for x in scores), strict=True)
        )
        ways = length // attention.splash_blocks(length, window, settings).block_kv_dkv
        if settings.splash_fused_backward and ways > 1:
            partials = ways * heads * length * config.head_dim * 2
        result["dq partials MiB"] = partials / 2**20
    _, both = functions(config, kernel, window, settings)
    arguments = shapes(config, rows, "bfloat16", SingleDeviceSharding(device))
    try:
        program = jax.jit(both).lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return result | {"fits VMEM": "no"}
    # The compiler's estimate for the sum over dq's partials is ten times that of its own schedule.
    text = "\n".join(line for line in program.as_text().splitlines() if " reduce(" not in line)
    around = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text))) // rows
    around += (
        round(partials * (1 + 1 / ways) / chip.memory_bandwidth * chip.clock_hz) if partials else 0
    )
    parts = dumped_schedules(folder)
    if kernel == "splash":
        forward, backward = splash_cycles(length, window, settings, parts)
    else:
        forward, backward = (sum(parts[name]) for name in ("forward", "backward"))
    kernels = heads * (forward + backward)
    total = kernels + around
    calibrated = calibration.calibrate({"pallas": kernels, "activation": around}, chip)
    ideal = flops(config, 1, window, backward=True) / chip.peak_flops * chip.clock_hz
    return result | {
        "fits VMEM": "yes",
        "forward cycles": heads * forward,
        "backward cycles": heads * backward,
        "around cycles": around,
        "total cycles": total,
        "calibrated": calibrated.text(",.0f"),
        "of peak": f"{ideal / total:.1%}",
    }


# ---- The program --------------------------------------------------------------------------------


def main(config: FrozenConfigDict) -> None:
    jax.config.update(
        "jax_enable_compilation_cache", False
    )  # a kept program would write no schedule
    backend, length = jax.default_backend(), config.max_target_length
    windows = sorted(set(pyconfig.windows_of(config)))
    rows = 1 if backend == "cpu" else 4
    measured = [
        {"window": window, "kernel": kernel, "blocks": name}
        | measure(config, kernel, window, settings, rows)
        for window in windows
        for kernel, row in attention.KERNELS.items()
        if backend in row.backends
        for name, settings in variants(config, kernel, backend)
    ]
    heads = f"{config.num_query_heads} heads of {config.head_dim}, {length} positions"
    device = jax.devices()[0].device_kind
    print(
        f"MEASURED on {device}: {rows} rows, {heads}, {hardware.compute_dtype(config, jax.default_backend())}"
    )
    common.show(measured)
    report = {"device": device, "measured": measured}
    if backend == "cpu":
        with tempfile.TemporaryDirectory() as name:
            common.dump_bundles(name)
            target = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices[0]
            report["estimated"] = [
                {"window": window, "kernel": kernel, "blocks": blocks}
                | estimate(config, kernel, window, settings, target, Path(name))
                for window in windows
                for kernel in ("splash", "flash")
                for blocks, settings in variants(config, kernel, "tpu")
            ]
        print(
            f"\nESTIMATED for {KIND} from the compiler's schedule, not measured: one row, {heads}, bfloat16"
        )
        print("scores: computed per unmasked score; of peak: useful FLOPs of forward + backward")
        common.show(report["estimated"])
    print(json.dumps(report))


if __name__ == "__main__":
    sys.exit(pyconfig.launch(main))

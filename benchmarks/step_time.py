"""Measures the train step alone, on random tokens, without data loading and logging.

    .venv/bin/python benchmarks/step_time.py configs/base.yml model=d24
    .venv/bin/python benchmarks/step_time.py configs/base.yml model=d4 max_target_length=512 vocab_size=4096 \
        global_batch_tokens=8192

Prints median and quartiles of the steps, tokens/s, memory and, for a known chip, MFU; and a JSON
line. If the machine only has a CPU and the step is too large for it, prints train_compile.py's
estimate for compile_topology instead. With a nanochat checkout in NANOCHAT, and a Python that has
its packages in NANOCHAT_PYTHON, nanochat's compiled model and optimizer run the same steps in
alternation, and the ratio of the medians is printed. Settings that tune.py found are used as in
train.py: tuned=off measures the defaults.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from MaxNano import pyconfig

    pyconfig.check_command_line()

import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from benchmarks import common
from MaxNano import pyconfig, train_compile
from MaxNano.data.loader import put_global, to_batch
from MaxNano.distributed import hardware, runtime, sharding
from MaxNano.training import state as train_state
from MaxNano.training.memory_plan import compile_train, fit_memory
from MaxNano.training.setup import BatchPlan, RunSetup, check_memory, flops_per_token, set_up
from MaxNano.training.step import build_programs
from MaxNano.tuning.tuned_file import with_tuned

TURNS = 6
STEPS_PER_TURN = 4
LARGEST_CPU_STEP = 1e14  # FLOPs; minutes per step on a few cores


def prepare(setup: RunSetup, program: jax.stages.Compiled) -> Callable[[], float]:
    """A function that runs one step and returns its seconds. Call it inside the mesh."""
    config = setup.config
    rng = np.random.default_rng(config.seed)
    shape = (setup.plan.rows, config.max_target_length + 1)
    batch = to_batch(rng.integers(0, config.vocab_size, shape, dtype=np.int32))
    batch = put_global(batch, sharding.batch_sharding(setup.mesh, config.logical_axis_rules))
    programs = build_programs(setup, program, np.ones(config.vocab_size, np.int32))
    state = train_state.initialize(config, setup.numerics, setup.optimizer, setup.abstract)

    def step() -> float:
        nonlocal state
        begin = time.perf_counter()
        state, metrics = programs.train(state, batch)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - begin

    return step


@contextlib.contextmanager
def start_nanochat(
    config: FrozenConfigDict, plan: BatchPlan
) -> Iterator[Callable[[int], list[float]] | None]:
    """Yields a function that runs nanochat's steps and returns their seconds; None without
    NANOCHAT.
    """
    if not os.environ.get("NANOCHAT"):
        yield None
        return
    task = {
        "rows": plan.rows // plan.accumulation_steps,
        "micro_batches": plan.accumulation_steps,
        "model": common.nanochat_model(config),
    }
    with common.start_nanochat("nanochat_step_time.py", task) as ask:
        yield ask


def is_too_large(config: FrozenConfigDict) -> bool:
    """Whether the machine only has a CPU, on which a step would take minutes."""
    flops = flops_per_token(config) * config.global_batch_tokens
    return (
        jax.default_backend() == "cpu"
        and not os.environ.get("NANOCHAT")
        and flops > LARGEST_CPU_STEP
    )


def peak_gib() -> float | None:
    """Peak GiB in use on a device of this process; None if the backend does not report it."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [entry["peak_bytes_in_use"] for entry in stats if "peak_bytes_in_use" in entry]
    return max(peaks) / common.GIB if peaks else None


def needed_gib(program: jax.stages.Compiled) -> float | None:
    """GiB per device that a program needs; None if it comes from the cache without that number."""
    return program.memory_analysis().peak_memory_in_bytes / common.GIB or None


def statistics_of(seconds: list[float], config: FrozenConfigDict, peak: float | None) -> common.Row:
    """Median and quartiles of the steps, and the throughput of the median."""
    median = statistics.median(seconds)
    rate = config.global_batch_tokens / median
    flops = rate * flops_per_token(config)
    quarter, _, three_quarters = statistics.quantiles(seconds)
    row = {
        "median s": median,
        "best s": min(seconds),
        "quarter s": quarter,
        "three quarters s": three_quarters,
        "worst s": max(seconds),
        "tokens/s": round(rate),
        "TFLOP/s": flops / 1e12,
    }
    return row | ({"MFU": flops / peak} if peak else {})


def show_results(
    setup: RunSetup, program: jax.stages.Compiled, ours: list[float], theirs: list[float]
) -> None:
    """Print a table and a JSON line. ours, theirs: seconds of steps; theirs may be empty."""
    config, mesh = setup.config, setup.mesh
    peak = hardware.peak_flops(list(mesh.devices.flat))
    rows = [
        {
            "step": "MaxNano",
            **statistics_of(ours, config, peak),
            "GiB": needed_gib(program),
            "GiB in use": peak_gib(),
        }
    ]
    if theirs:
        rows.append({"step": "nanochat", **statistics_of(theirs, config, peak)})
        rows[1]["times"] = rows[1]["median s"] / rows[0]["median s"]
    common.show(rows, digits=4)
    device = mesh.devices.flat[0].device_kind
    report = {"model": config.model, "device": device, "devices": mesh.size, "rows": rows}
    print(json.dumps(report), flush=True)


def main(config: FrozenConfigDict) -> int | None:
    """Run TURNS turns of STEPS_PER_TURN steps each."""
    runtime.initialize(config)
    config = with_tuned(config)
    if is_too_large(config):
        print(
            f"ESTIMATED for {config.compile_topology}, not measured: this machine has no accelerator",
            flush=True,
        )
        return train_compile.main(config)
    setup = fit_memory(set_up(config))
    check_memory(setup)
    setup, program = compile_train(setup)
    with jax.set_mesh(setup.mesh):
        step = prepare(setup, program)
        first = step()
        print(f"on {setup.mesh.size} devices, {setup.plan}; first step {first:.3f} s", flush=True)
        ours, theirs = [], []
        if os.environ.get("NANOCHAT"):  # a result, should nanochat fail or take too long
            show_results(setup, program, [step() for _ in range(STEPS_PER_TURN)], [])
        with start_nanochat(config, setup.plan) as nanochat:
            for _ in range(TURNS):
                ours += [step() for _ in range(STEPS_PER_TURN)]
                theirs += nanochat(STEPS_PER_TURN) if nanochat else []
    show_results(setup, program, ours, theirs)
    return None


if __name__ == "__main__":
    sys.exit(pyconfig.launch(main))

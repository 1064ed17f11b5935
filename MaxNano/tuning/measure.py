"""What a process of children.py does: it knows the devices, checks kernels, or times train steps.

Each task is a function of TASKS. It answers with JSON-able dicts, the first as soon as there is
something to say.
"""

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from MaxNano import console, pyconfig
from MaxNano.compile import profile
from MaxNano.config_schema import format_value
from MaxNano.distributed import hardware, runtime
from MaxNano.distributed.sharding import FSDP_AXIS
from MaxNano.models import attention
from MaxNano.tokenization.tokenizer import load_tokenizer
from MaxNano.training import checkpoint_identity
from MaxNano.training import state as train_state
from MaxNano.training.context import RunContext
from MaxNano.training.memory_plan import compile_train, fit_memory, is_out_of_memory
from MaxNano.training.setup import RunSetup, check_memory, flops_per_token, set_up
from MaxNano.training.step import abstract_batch, build_programs
from MaxNano.tuning import children, kernels
from MaxNano.tuning.candidates import Facts

CHECKED_STEPS = 3  # whose losses are compared with the defaults'
LEAST_DATA_STEPS = 12  # the batches that are prepared ahead hide a slow reader
TRACED_STEPS = 2

Answer = Callable[[Mapping[str, Any]], None]


def config_of_task(task: Mapping[str, Any]) -> FrozenConfigDict:
    """The config of a measurement: that of the command line with a task's overrides."""
    overrides = task.get("overrides", {})
    words = [f"{key}={format_value(_as_tuple(value))}" for key, value in overrides.items()]
    return pyconfig.initialize([*task["argv"], *words])


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


# ---- Tasks --------------------------------------------------------------------------------------


def probe(task: Mapping[str, Any], answer: Answer) -> None:
    """The Facts of this machine and this config."""
    config = config_of_task(task)
    setup = fit_memory(set_up(config))  # as train.py
    device = setup.mesh.devices.flat[0]
    identity = checkpoint_identity.describe(config, "")
    plan, numerics = setup.plan, setup.numerics
    facts = Facts(
        backend=numerics.backend,
        device=device.device_kind,
        devices=jax.device_count(),
        cores=os.cpu_count() or 1,
        dtype=numerics.dtype,
        kernels=[
            name
            for name, row in attention.KERNELS.items()
            if numerics.backend in row.backends
            and not row.problem(device, numerics.dtype, config.head_dim)
        ],
        resolved={
            "attention": numerics.attention,
            "embedding_gradient": numerics.embedding_gradient,
            "layer_products": numerics.products,
            "scan_layers": setup.scans_layers,
            "vocab_chunk_size": setup.vocab_chunk,
            "per_device_batch_size": plan.micro_rows,
            "remat_policy": setup.config.remat_policy,
            "ici_fsdp_parallelism": setup.mesh.shape.get(FSDP_AXIS, 1),
            "data_workers": hardware.data_workers(
                config, numerics.backend, jax.local_device_count()
            ),
        },
        device_rows=plan.accumulation_steps * plan.micro_rows,
        micro_rows=plan.micro_rows,
        data_parallel_size=plan.data_parallel_size,
        flops_per_token=flops_per_token(config),
        peak_flops=hardware.peak_flops(list(setup.mesh.devices.flat)),
        versions=identity["versions"],
    )
    answer({"facts": facts._asdict()})


def check_kernels(task: Mapping[str, Any], answer: Answer) -> None:
    """Errors and times of attention kernels, embedding gradients and layer products, an answer each.

    The answer {"started": index} comes before a check, so that a crash has a name.
    """
    for index in task["indices"]:
        answer({"started": index})
        try:
            config = config_of_task({**task, "overrides": task["choices"][index]})
            result = kernels.check(config)
        except Exception as error:  # noqa: BLE001 (whatever a kernel raises, it is struck off)
            result = {"failure": console.type_and_text(error)}
        answer({"checked": index, "result": result})
        jax.clear_caches()


def time_steps(task: Mapping[str, Any], answer: Answer) -> None:
    """Losses of the first steps, then the seconds of task["steps"] steps or more.

    with_data: the batches of the run's text; else the same random tokens again and again. trace:
    also the most expensive operations.
    """
    config = config_of_task(task)
    setup = fit_memory(set_up(config))  # as train.py
    check_memory(setup)
    batches = _text_batches(setup) if task["with_data"] else random_batches(setup)
    setup, program = compile_train(setup)
    with jax.set_mesh(setup.mesh):
        programs = build_programs(setup, program, np.ones(config.vocab_size, np.int32))
        state = train_state.initialize(config, setup.numerics, setup.optimizer, setup.abstract)

        def step() -> dict[str, jax.Array]:
            nonlocal state
            state, metrics = programs.train(state, next(batches))
            jax.block_until_ready((state, metrics))
            return metrics

        checked = [step() for _ in range(CHECKED_STEPS)]
        answer({name: [float(row[name]) for row in checked] for name in ("loss", "grad_norm")})
        if task["with_data"]:
            seconds = statistics.mean(kernels.timed(step, max(task["steps"], LEAST_DATA_STEPS)))
        else:
            seconds = statistics.median(kernels.timed(step, task["steps"]))
        answer({"seconds": seconds, "micro_rows": setup.plan.micro_rows, "gib": _gib(program)})
        if task.get("trace"):
            answer({"operations": trace(step, program)})


def trace(step: Callable[[], Any], program: jax.stages.Compiled) -> str:
    """The most expensive operations of a step, as a table; why there is none, if that fails."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    try:
        with tempfile.TemporaryDirectory() as scratch:
            with jax.profiler.trace(scratch, profiler_options=options):
                for _ in range(TRACED_STEPS):
                    step()
            (path,) = Path(scratch).rglob("*.xplane.pb")
            spent = profile.operations(
                path.read_bytes(),
                program.as_text(),
                steps=TRACED_STEPS,
                devices=jax.local_device_count(),
            )
    except Exception as error:  # noqa: BLE001 (the measurement is complete without it)
        return f"No trace: {console.type_and_text(error)}"
    return profile.table(spent[: profile.SHOWN])


def _gib(program: jax.stages.Compiled) -> float | None:
    """GiB on a device: the peak in use if the backend reports it, else what the program needs."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [entry["peak_bytes_in_use"] for entry in stats if "peak_bytes_in_use" in entry]
    return (max(peaks, default=0) or program.memory_analysis().peak_memory_in_bytes) / 2**30 or None


# ---- Batches ------------------------------------------------------------------------------------


def random_batches(setup: RunSetup) -> Iterator[dict[str, jax.Array]]:
    """One batch of random tokens, endlessly: loss falls, which shows that gradients are right."""
    rng = np.random.default_rng(setup.config.seed)
    specs, _ = abstract_batch(setup)
    batch = {}
    for name, like in specs.items():
        values = np.ones(like.shape, like.dtype)
        if jnp.issubdtype(like.dtype, jnp.integer):
            values = rng.integers(0, setup.config.vocab_size, like.shape, like.dtype)
        batch[name] = jax.device_put(values, like.sharding)
    while True:
        yield batch


def _text_batches(setup: RunSetup) -> Iterator[dict[str, jax.Array]]:
    run = RunContext(setup, load_tokenizer(setup.config), is_training=True)
    return setup.stage.open_batches(run, None)


# ---- The process --------------------------------------------------------------------------------

TASKS = {"probe": probe, "kernels": check_kernels, "steps": time_steps}


def main() -> int:
    """Do the task on stdin; returns the exit status."""
    task = json.loads(sys.stdin.readline())
    children.end_with_parent()
    with open(task["answers"], "a", encoding="utf-8") as file:

        def answer(values: Mapping[str, Any]) -> None:
            file.write(json.dumps(values) + "\n")
            file.flush()

        try:
            runtime.initialize(config_of_task(task))
            if jax.process_count() > 1:
                raise ValueError("tune.py measures the devices of one process, not of several")
            TASKS[task["task"]](task, answer)
        except jax.errors.JaxRuntimeError as error:
            is_full = is_out_of_memory(error)
            answer({"failure": "out of memory" if is_full else console.type_and_text(error)})
            console.exit_now(children.FATAL_STATUS)
        except (ValueError, OSError) as error:
            answer({"failure": console.one_line(error, 300)})
            console.exit_now(children.FATAL_STATUS)
    console.exit_now(0)


if __name__ == "__main__":
    sys.exit(main())

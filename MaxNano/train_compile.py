"""Compiles the programs of train.py and of the engine for a TPU slice that is not there, and says what they will take.

    python MaxNano/train_compile.py configs/base.yml model=d24 compile_topology=v6e-8
    python MaxNano/train_compile.py configs/base.yml model=d24 compile_programs=[prefill,decode] decode_slots=128
    python MaxNano/train_compile.py configs/base.yml model=d24 stage=sft      the step of a later stage; loads nothing

The machine needs no accelerator: libtpu compiles on a CPU for a slice that it knows by name.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    if not __package__:  # run as a script: MaxNano/ itself must not be where modules are looked for
        sys.path[0] = str(Path(__file__).resolve().parents[1])
    from MaxNano import pyconfig

    pyconfig.check_command_line()  # a typo is told now, not when JAX has been imported
    os.environ["JAX_PLATFORMS"] = "cpu"  # an accelerator of this machine is left alone
    os.environ["TPU_SKIP_MDS_QUERY"] = (
        "1"  # JAX asks for a TPU's place in a cloud when it is imported
    )

import importlib.metadata
import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.experimental import topologies
from ml_collections import FrozenConfigDict

from MaxNano import pyconfig
from MaxNano.compile.costs import ASSUMPTIONS, Report, Work, analyze
from MaxNano.console import print_table
from MaxNano.distributed import hardware
from MaxNano.inference import programs as engine_programs
from MaxNano.storage import files
from MaxNano.training.setup import RunSetup, flops_per_token, run_directory, set_up
from MaxNano.training.step import compile_train, lower_evaluate, lower_train

# ---- Slices ----------------------------------------------------------------------------------------------------------


# libtpu looks for no TPU in this machine's surroundings, shares the machine with other processes, and is silent.
LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v6e-8",  # any that it knows; the slice is given by its topology
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


class Generation(NamedTuple):
    """How Cloud TPU names and builds the slices of a generation."""

    axes: int  # of the network between chips
    cores: int  # TensorCores a chip, which the names count
    largest: int  # chips of a slice


GENERATIONS = {
    "v4": Generation(axes=3, cores=2, largest=2048),
    "v5p": Generation(axes=3, cores=2, largest=4096),
    "v5e": Generation(axes=2, cores=1, largest=256),
    "v6e": Generation(axes=2, cores=1, largest=256),
}


def slice_shape(name: str) -> tuple[str, tuple[int, ...]]:
    """(generation, chips along each axis) of a slice as Cloud TPU names it.

    Raises ValueError for a name that none has.
    Source: https://cloud.google.com/tpu/docs/v6e and its neighbors for the other generations.
    """
    kind, _, size = name.partition("-")
    generation = GENERATIONS.get(kind)
    if generation and size.isdecimal():
        chips, rest = divmod(int(size), generation.cores)
        doublings = chips.bit_length() - 1
        smallest = (1, 4) if generation.axes == 2 else (4,)
        known = chips in smallest or 8 <= chips <= generation.largest
        if not rest and chips == 2**doublings and known:
            if generation.axes == 3 and chips == 4:
                return kind, (2, 2, 1)
            return kind, tuple(
                2 ** ((doublings + axis) // generation.axes) for axis in range(generation.axes)
            )
    raise ValueError(
        f"compile_topology={name} is no TPU slice: take a generation of {', '.join(GENERATIONS)} and a power of two, "
        "such as v6e-8, v5e-16, v5p-8 or v4-32 (names of v4 and v5p count two cores a chip, from 8 on)"
    )


def slice_devices(name: str, num_slices: int = 1) -> list[Any]:
    """The devices of `num_slices` slices, to be put in a mesh and compiled for.

    Sets libtpu's environment, which it reads when the first slice is asked for. JAX itself must have been told to use
    another backend, by JAX_PLATFORMS=cpu, where this machine has no TPU.
    Raises ValueError where there is no such slice, or no libtpu on this machine.
    """
    kind, shape = slice_shape(name)
    for variable, value in LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    if kind in ("v5e", "v6e"):
        host = shape if math.prod(shape) <= 8 else (2, 2)
    else:
        host = (2, 2, 1)
    options = {"chips_per_host_bounds": (*host, *(1 for _ in range(3 - len(host))))}
    if GENERATIONS[kind].cores > 1:
        options["chip_config_name"] = "megacore"  # a chip's two cores as one device
    if num_slices > 1:
        options["num_slices"] = num_slices
    topology = f"{kind}:{'x'.join(map(str, shape))}"
    try:
        return list(
            topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
        )
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"no topology {topology} on this machine ({reason}): install libtpu with pip install 'jax[tpu]'"
        ) from error


# ---- Programs --------------------------------------------------------------------------------------------------------


class Program(NamedTuple):
    """A program that can be compiled."""

    lower: Callable[[RunSetup], jax.stages.Lowered]
    work: Callable[[RunSetup], Work]
    batch: str  # the key that says how much memory it takes


def _train_work(setup: RunSetup, share: float = 1, steps: int | None = None) -> Work:
    """Of a training step, or of a share of its FLOPs; of all `steps` where they are known without the data."""
    tokens = setup.config.global_batch_tokens
    if pyconfig.horizon_is_open(setup.config):
        steps = None
    return Work(flops_per_token(setup.config) * tokens * share, tokens, steps)


def _prefill_work(setup: RunSetup) -> Work:
    programs = engine_programs.report_programs(setup)
    tokens = programs.prefill_size * programs.buckets[-1]
    return Work(flops_per_token(setup.config) / 3 * tokens, tokens, None)


def _decode_work(setup: RunSetup) -> Work:
    programs = engine_programs.report_programs(setup)
    size, flops = engine_programs.decode_costs(programs, programs.plan.max_length)
    return Work(
        flops * programs.steps, programs.slots * programs.steps, None, size * programs.steps
    )


PROGRAMS = {
    "train": Program(
        lower_train,
        lambda setup: _train_work(setup, steps=setup.config.steps),
        "per_device_batch_size",
    ),
    # Forward is a third of a training step.
    "evaluate": Program(
        lower_evaluate, lambda setup: _train_work(setup, 1 / 3), "per_device_batch_size"
    ),
    "prefill": Program(
        lambda setup: engine_programs.lower_prefill(engine_programs.report_programs(setup)),
        _prefill_work,
        "decode_slots",
    ),
    "decode": Program(
        lambda setup: engine_programs.lower_decode(engine_programs.report_programs(setup)),
        _decode_work,
        "decode_slots",
    ),
}


class OutOfMemory(ValueError):
    """A program does not fit in the memory of a chip."""


def compile_program(setup: RunSetup, program: str) -> tuple[RunSetup, Report]:
    """Compile one of PROGRAMS and read what it costs; with the set-up that it was compiled for.

    The train step takes the rows that train.py would take: fewer than the set-up says where those do not fit and
    per_device_batch_size leaves it open. Raises OutOfMemory where the program does not fit.
    """
    config = setup.config
    started = time.monotonic()
    if program == "train" and config.per_device_batch_size is None:
        setup, compiled = compile_train(setup)
    else:
        compiled = _compile(setup, program)
    report = analyze(
        compiled,
        hardware.chip(setup.mesh.devices.flat[0]),
        mesh=setup.mesh,
        vocab_size=config.vocab_size,
        work=PROGRAMS[program].work(setup),
        compile_seconds=time.monotonic() - started,
    )
    return setup, report


def _compile(setup: RunSetup, program: str) -> jax.stages.Compiled:
    try:
        return PROGRAMS[program].lower(setup).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        if (
            "hbm" not in reason.lower()
        ):  # a kernel that needs too much of the memory beside the core
            raise ValueError(f"the compiler refuses the {program} program: {reason}") from error
        need = re.search(
            r"\(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)|Used ([\d.]+\w) of ([\d.]+\w)",
            reason,
        )
        sizes = f" ({' of '.join(filter(None, need.groups()))})" if need else ""
        batch = PROGRAMS[program].batch
        value = setup.plan.micro_rows if batch == "per_device_batch_size" else setup.config[batch]
        raise OutOfMemory(
            f"the {program} program of {setup.config.model} does not fit in a chip of {setup.config.compile_topology}"
            f"{sizes} with {batch}={value}"
        ) from error


def largest_batch(setup: RunSetup, program: str) -> int | None:
    """The largest per_device_batch_size below the set-up's with which a program fits; None where none does.

    Each trial is a compilation; they halve the candidates.
    """
    plan = setup.plan
    share = plan.micro_steps * plan.micro_rows
    candidates = [rows for rows in range(1, plan.micro_rows) if share % rows == 0]
    best = None
    while candidates:
        middle = len(candidates) // 2
        rows = candidates[middle]
        try:
            _compile(
                replace(setup, plan=plan._replace(micro_steps=share // rows, micro_rows=rows)),
                program,
            )
        except OutOfMemory:
            candidates = candidates[:middle]
        else:
            best, candidates = rows, candidates[middle + 1 :]
    return best


# ---- The report ------------------------------------------------------------------------------------------------------


def report_path(config: FrozenConfigDict) -> epath.Path:
    """Where the JSON goes."""
    if config.compile_report:
        return epath.Path(config.compile_report).expanduser()
    return run_directory(config) / "compile_report.json"


def to_json(setup: RunSetup, reports: dict[str, Report]) -> dict[str, Any]:
    """What is written: the reports by program, and what they are of."""
    config, plan = setup.config, setup.plan
    return {
        "model": config.model,
        "topology": config.compile_topology,
        "num_slices": config.compile_num_slices,
        "mesh": dict(setup.mesh.shape),
        "rows_a_device": plan.micro_rows,
        "micro_steps": plan.micro_steps,
        "config": {key: value for key, value, _ in pyconfig.describe(config)},
        "versions": {
            name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")
        },
        "programs": {program: report.to_json() for program, report in reports.items()},
    }


def write(path: epath.Path, values: dict[str, Any]) -> None:
    """Write JSON, whole or not at all."""
    files.write_whole(path, json.dumps(values, indent=1, default=str) + "\n")


def main(config: FrozenConfigDict) -> int:
    """Compile, print, write."""
    jax.config.update(
        "jax_enable_compilation_cache", False
    )  # a program from the cache says no compile time
    setup = set_up(config, slice_devices(config.compile_topology, config.compile_num_slices))
    reports = {}
    for program in config.compile_programs:
        try:
            setup, reports[program] = compile_program(setup, program)
        except OutOfMemory as error:
            if PROGRAMS[program].batch != "per_device_batch_size":
                raise ValueError(
                    f"{error}: take fewer, a shorter decode_max_length or a larger slice"
                ) from error
            print(f"{error}; looking for a batch that fits", file=sys.stderr, flush=True)
            rows = largest_batch(setup, program)
            if rows is None:
                remedy = "and with no smaller one: take remat_policy=full, a larger slice or a smaller model"
            else:
                remedy = f"set per_device_batch_size={rows}, the largest that fits"
            raise ValueError(f"{error}: {remedy}") from error
        for title, header, rows in reports[program].tables():
            print_table(f"{program}: {title}", header, rows)
    print_table(
        "assumptions", ("what the compiler does not cost",), [(line,) for line in ASSUMPTIONS]
    )
    path = report_path(config)
    write(path, to_json(setup, reports))
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(pyconfig.launch(main))

"""Compiles the programs of training and of the engine for a TPU slice or GPUs and reports their cost.

    .venv/bin/python MaxNano/train_compile.py configs/base.yml model=d24 compile_topology=v6e-8
    .venv/bin/python MaxNano/train_compile.py configs/base.yml model=d24 compile_programs=[decode] decode_slots=128
    .venv/bin/python MaxNano/train_compile.py configs/base.yml model=d24 stage=sft      the train step of another stage
    .venv/bin/python MaxNano/train_compile.py configs/base.yml model=d12 compile_topology=h100-1

The machine needs no accelerator: libtpu and JAX's plugin for CUDA (extra gpu) compile on a CPU for
devices that are given by name.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    if not __package__:  # run as a script: MaxNano/ itself must not be on the module search path
        sys.path[0] = str(Path(__file__).resolve().parents[1])
    from MaxNano import pyconfig

    pyconfig.check_command_line()  # reports a typo before JAX is imported
    os.environ["JAX_PLATFORMS"] = "cpu"  # leaves an accelerator of this machine alone
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # or JAX asks for TPU metadata of a cloud at import

import importlib.metadata
import json
import re
from typing import Any

import jax
from etils import epath
from ml_collections import FrozenConfigDict

from MaxNano import pyconfig
from MaxNano.compile.gpu_report import GpuReport
from MaxNano.compile.programs import PROGRAMS, OutOfMemory, compile_program, largest_micro_batch
from MaxNano.compile.report import CostReport
from MaxNano.compile.topologies import topology_devices
from MaxNano.console import print_table
from MaxNano.distributed import gpus
from MaxNano.storage import files
from MaxNano.training.memory_plan import describe_memory_plan, fit_memory
from MaxNano.training.setup import RunSetup, set_up


def report_path(config: FrozenConfigDict) -> epath.Path:
    """The file of the JSON report: compile_report, or compile_report.json in the run's folder."""
    if config.compile_report:
        return epath.Path(config.compile_report).expanduser()
    return files.run_directory(config) / "compile_report.json"


def to_json(setup: RunSetup, reports: dict[str, CostReport | GpuReport]) -> dict[str, Any]:
    """The reports by program, and the set-up and versions that they are for."""
    config, plan = setup.config, setup.plan
    versions = {
        name: importlib.metadata.version(name)
        for name in compiler_packages(config.compile_topology)
    }
    return {
        "model": config.model,
        "topology": config.compile_topology,
        "num_slices": config.compile_num_slices,
        "mesh": dict(setup.mesh.shape),
        "micro_batch_rows": plan.micro_rows,
        "accumulation_steps": plan.accumulation_steps,
        "config": {key: value for key, value, _ in pyconfig.describe(config)},
        "versions": versions,
        "programs": {program: report.to_json() for program, report in reports.items()},
    }


def compiler_packages(topology: str) -> list[str]:
    """The installed packages that decide what is compiled for a topology."""
    if topology not in gpus.topology_names():
        return ["jax", "jaxlib", "libtpu"]
    wanted = re.compile(r"jax(lib)?|jax-cuda\d+-p.*|nvidia-(cudnn|cublas|cuda-nvcc)(-cu\d+)?")
    names = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    return sorted(name for name in names if name and wanted.fullmatch(name))


def remedy_for(setup: RunSetup, program: str) -> str:
    """What to change if a program does not fit; looks for a micro-batch size that does."""
    if PROGRAMS[program].batch_key != "per_device_batch_size":
        return "choose a smaller one, a shorter decode_max_length or larger chips"
    rows = largest_micro_batch(setup, program)
    if rows is None:
        return "and with no smaller one: choose remat_policy=full, more or larger chips or a smaller model"
    return f"set per_device_batch_size={rows}, the largest that fits"


def main(config: FrozenConfigDict) -> int:
    """Compile, print, write."""
    # The compile time of a cached program would be wrong.
    jax.config.update("jax_enable_compilation_cache", False)
    path = report_path(config)
    files.check_writable(path.parent, "set compile_report to another path")
    devices = topology_devices(config.compile_topology, config.compile_num_slices)
    setup = set_up(config, devices)
    if "train" in config.compile_programs and (less := fit_memory(setup)) is not setup:
        setup = less
        print(f"Compiling for {describe_memory_plan(setup)}", flush=True)
    reports = {}
    for program in config.compile_programs:
        try:
            setup, reports[program] = compile_program(setup, program)
        except OutOfMemory as error:
            print(f"{error}; looking for a batch that fits", file=sys.stderr, flush=True)
            raise ValueError(f"{error}: {remedy_for(setup, program)}") from error
        for title, header, rows in reports[program].tables():
            print_table(f"{program}: {title}", header, rows)
    assumptions = {line: None for report in reports.values() for line in report.assumptions}
    header = ("what the estimates assume",)
    print_table("assumptions", header, [(line,) for line in assumptions])
    text = json.dumps(to_json(setup, reports), indent=1, default=str)
    files.write_whole(path, text + "\n")
    print(f"Wrote the report to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(pyconfig.launch(main))

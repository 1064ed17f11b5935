"""PROGRAMS: what train_compile.py can compile, the train step and the programs of the engine."""

import contextlib
import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax

from MaxNano import pyconfig
from MaxNano.compile import gpu_report
from MaxNano.compile.gpu_report import GpuReport
from MaxNano.compile.report import CostReport, ProgramWork, analyze
from MaxNano.compile.topologies import cuda_without_gpu
from MaxNano.distributed import gpus, hardware
from MaxNano.inference import programs as engine_programs
from MaxNano.training.memory_plan import (
    compile_train,
    describe_memory_plan,
    is_out_of_memory,
    keeps_more,
    replaces_null,
    smaller,
    step_limit_bytes,
    with_micro_rows,
)
from MaxNano.training.setup import RunSetup, flops_per_token
from MaxNano.training.step import lower_evaluate, lower_train


class Program(NamedTuple):
    """A program that can be compiled."""

    lower: Callable[[RunSetup], jax.stages.Lowered]
    work: Callable[[RunSetup], ProgramWork]
    batch_key: str  # the config key that decides how much memory it needs


class OutOfMemory(ValueError):
    """A program does not fit in the memory of a chip."""


def compile_program(setup: RunSetup, program: str) -> tuple[RunSetup, CostReport | GpuReport]:
    """Compile one of PROGRAMS; returns the set-up that it was compiled for, and its report.

    As in train.py, the train step is compiled with a smaller memory plan if it does not fit and the
    config leaves one open. Raises OutOfMemory if the program does not fit.
    """
    if _is_for_gpu(setup):
        return _compile_for_gpu(setup, program)
    config = setup.config
    started = time.monotonic()
    if program == "train" and (config.per_device_batch_size is None or keeps_more(config)):
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


def _compile_for_gpu(setup: RunSetup, program: str) -> tuple[RunSetup, GpuReport]:
    """As compile_program; the report of the train step has the largest micro-batch that fits."""
    rows = None
    while True:
        started = time.monotonic()
        try:
            compiled = _compile(setup, program)
            break
        except OutOfMemory as error:
            is_open = setup.config.per_device_batch_size is None or replaces_null(setup.config)
            less = smaller(setup) if program == "train" and is_open else None
            if less is None:
                raise
            print(f"{error}; compiling for {describe_memory_plan(less)}", flush=True)
            # Fewer rows of the same step are the largest micro-batch, if they fit.
            rows = less.plan.micro_rows if less.config == setup.config else None
            setup = less
    report = gpu_report.analyze(
        compiled,
        setup.mesh,
        work=PROGRAMS[program].work(setup),
        compile_seconds=time.monotonic() - started,
    )
    if program == "train":
        rows = rows or largest_micro_batch(setup, program, larger=True) or setup.plan.micro_rows
        report = replace(report, largest_micro_batch=rows)
    return setup, report


def largest_micro_batch(setup: RunSetup, program: str, *, larger: bool = False) -> int | None:
    """The largest per_device_batch_size below the set-up's that fits, by bisection; None if none
    fits. larger: above the set-up's instead.
    """
    plan = setup.plan
    device_rows = plan.accumulation_steps * plan.micro_rows
    sizes = range(plan.micro_rows + 1, device_rows + 1) if larger else range(1, plan.micro_rows)
    candidates = [rows for rows in sizes if device_rows % rows == 0]
    best = None
    while candidates:
        middle = len(candidates) // 2
        rows = candidates[middle]
        try:
            _compile(replace(setup, plan=with_micro_rows(plan, rows)), program)
        except OutOfMemory:
            candidates = candidates[:middle]
        else:
            best, candidates = rows, candidates[middle + 1 :]
    return best


def _is_for_gpu(setup: RunSetup) -> bool:
    return setup.mesh.devices.flat[0].platform == "gpu"


def _compile(setup: RunSetup, program: str) -> jax.stages.Compiled:
    for_gpu = _is_for_gpu(setup)
    try:
        with cuda_without_gpu() if for_gpu else contextlib.nullcontext():
            compiled = PROGRAMS[program].lower(setup).compile()
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error) and not for_gpu:
            raise
        reason = str(error).splitlines()[0]
        # On a TPU, a kernel that needs too much vector memory.
        if for_gpu or "hbm" not in reason.lower():
            raise ValueError(f"the compiler refuses the {program} program: {reason}") from error
        need = re.search(
            r"\(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)|Used ([\d.]+\w) of ([\d.]+\w)",
            reason,
        )
        sizes = filter(None, need.groups()) if need else ()
        raise _out_of_memory(setup, program, *sizes) from error
    if for_gpu:  # whose compiler does not compare with the memory
        gpu = gpus.gpu_of(setup.mesh.devices.flat[0].device_kind)
        memory = gpu_report.memory_of(compiled, gpu)
        limit = step_limit_bytes(setup, memory.limit) if program == "train" else memory.limit
        if memory.total > limit:
            sizes = (f"{size / 2**30:.1f} GiB" for size in (memory.total, limit))
            raise _out_of_memory(setup, program, *sizes)
    return compiled


def _out_of_memory(setup: RunSetup, program: str, *sizes: str) -> OutOfMemory:
    """sizes: bytes needed and available, as text, if they are known."""
    need = f" ({' of '.join(sizes)})" if sizes else ""
    key = PROGRAMS[program].batch_key
    value = setup.plan.micro_rows if key == "per_device_batch_size" else setup.config[key]
    return OutOfMemory(
        f"the {program} program of {setup.config.model} does not fit in a chip of {setup.config.compile_topology}"
        f"{need} with {key}={value}"
    )


# ---- The programs -------------------------------------------------------------------------------


def _train_work(setup: RunSetup) -> ProgramWork:
    """A step of the run; the number of steps is unknown if only the data decide it."""
    config, tokens = setup.config, setup.config.global_batch_tokens
    steps = None if pyconfig.horizon_is_open(config) else config.steps
    return ProgramWork(flops_per_token(config) * tokens, tokens, steps)


def _evaluate_work(setup: RunSetup) -> ProgramWork:
    """The forward pass, a third of a train step's FLOPs."""
    work = _train_work(setup)
    return work._replace(model_flops=work.model_flops / 3, steps=None)


def _prefill_work(setup: RunSetup) -> ProgramWork:
    programs = engine_programs.report_programs(setup)
    tokens = programs.prefill_size * programs.buckets[-1]
    return ProgramWork(flops_per_token(setup.config) / 3 * tokens, tokens, None)


def _decode_work(setup: RunSetup) -> ProgramWork:
    programs = engine_programs.report_programs(setup)
    size, flops = engine_programs.decode_costs(programs, programs.plan.max_length)
    steps = programs.steps
    return ProgramWork(flops * steps, programs.slots * steps, None, size * steps)


def _lower_prefill(setup: RunSetup) -> jax.stages.Lowered:
    return engine_programs.lower_prefill(engine_programs.report_programs(setup))


def _lower_decode(setup: RunSetup) -> jax.stages.Lowered:
    return engine_programs.lower_decode(engine_programs.report_programs(setup))


PROGRAMS: dict[str, Program] = {
    "train": Program(lower_train, _train_work, "per_device_batch_size"),
    "evaluate": Program(lower_evaluate, _evaluate_work, "per_device_batch_size"),
    "prefill": Program(_lower_prefill, _prefill_work, "decode_slots"),
    "decode": Program(_lower_decode, _decode_work, "decode_slots"),
}

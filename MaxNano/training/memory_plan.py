"""Chooses how a step fits in memory: ZeRO or FSDP, rows per device, rematerialization, loss chunks."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
from ml_collections import FrozenConfigDict

from MaxNano import pyconfig
from MaxNano.distributed import gpus, hardware, runtime
from MaxNano.scaling import largest_divisor
from MaxNano.training.context import RunContext
from MaxNano.training.setup import BatchPlan, RunSetup, needed_bytes, set_up
from MaxNano.training.step import build_programs, lower_train

MEMORY_PLAN = "the memory plan"  # the origin of values that `smaller` sets
SMALL_VOCAB_CHUNK = 2048
# Columns of a matrix on each device with FSDP: fewer fill no register of a TPU, and XLA then sums
# whole gradients instead of reduce-scattering them.
LEAST_WIDTH = 128
# Parts of a parameter with FSDP, if their state then takes at most half of a device's memory. More
# parts send more, and over all chips of a v6e-16 XLA sums whole gradients: benchmarks/tpu.md.
MOST_PARTS = 8
# Rows per device for which a GPU keeps all activations rather than those of remat_names. By the
# roofline d24 gains 15 % with 8 on an H100; sums of gradients in float32 take more of it with fewer.
LEAST_ROWS = 8
REMAT_STEPS = 8  # from no layer that recomputes to all of them
# Share of a GPU's memory that a step takes at most if the plan chooses its rows, and of a TPU's if it
# chooses the layers that recompute: temporaries are one block, and batches, evaluations and gaps
# between allocations need some too.
LARGEST_SHARE = 0.95


def compile_train(setup: RunSetup) -> tuple[RunSetup, jax.stages.Compiled]:
    """The compiled train step, and the set-up with the micro-batch size that it was compiled for.

    If the step does not fit in memory, smaller memory plans are tried. Raises ValueError if none
    fits.
    """
    while True:
        reason = None
        try:
            compiled = lower_train(setup).compile()
            if not _exceeds_memory(setup, compiled):
                return setup, compiled
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = error
        rows, setup = setup.plan.micro_rows, smaller(setup)
        if setup is None:
            raise ValueError(
                f"a step with {rows} rows per device does not fit in memory: choose a smaller "
                "per_device_batch_size, remat_policy=full, more devices or a smaller model"
            ) from reason
        print(f"{rows} rows per device do not fit in memory", flush=True)
        print(f"Compiling for {describe_memory_plan(setup)}", flush=True)


def smaller(setup: RunSetup) -> RunSetup | None:
    """The set-up with the next smaller memory plan; None if the config leaves none open.

    First more remat_layers, where fit_memory chose them; then fewer rows per device with more
    gradient accumulation, and again as few remat_layers as possible; then rematerialization, then
    smaller chunks of the vocabulary in the loss: the same losses up to rounding. With FSDP
    rematerialization comes first: every micro-batch gathers all parameters. In place of
    remat_policy=null, none becomes names before there are fewer than LEAST_ROWS. What a file or the
    command line sets stays.
    """
    config, plan = setup.config, setup.plan

    def is_open(key: str) -> bool:
        return config.origin[key] in ("base", MEMORY_PLAN)

    recomputes_more = is_open("remat_policy") and config.remat_policy in ("none", "minimal")
    least_rows = LEAST_ROWS if replaces_null(config) else 1
    if keeps_more(config):
        return replace(_with_values(setup, remat_layers=_more_layers(config)), plan=plan)
    has_fewer_rows = config.per_device_batch_size is None and plan.micro_rows > least_rows
    if has_fewer_rows and not (recomputes_more and setup.gathers_by_layer):
        fewer = with_micro_rows(plan, plan.micro_rows - 1)
        if fewer.micro_rows >= least_rows:
            if config.origin["remat_layers"] == MEMORY_PLAN:
                setup = _with_values(setup, remat_layers=0)
            return replace(setup, plan=fewer)
    if replaces_null(config):  # with the most rows again
        return _with_values(setup, remat_policy="names")
    chunk = setup.vocab_chunk or config.vocab_size
    if recomputes_more:
        values = {"remat_policy": "minimal" if config.remat_policy == "none" else "full"}
    elif is_open("vocab_chunk_size") and chunk > SMALL_VOCAB_CHUNK:
        values = {"vocab_chunk_size": SMALL_VOCAB_CHUNK}
    else:
        return None
    return replace(_with_values(setup, **values), plan=plan)


def replaces_null(config: FrozenConfigDict) -> bool:
    """Whether fit_memory chose remat_policy=none where the config has null."""
    return config.remat_policy == "none" and config.origin["remat_policy"] == MEMORY_PLAN


def keeps_more(config: FrozenConfigDict) -> bool:
    """Whether fit_memory chose layers that recompute nothing, and some are left."""
    is_plans = config.origin["remat_layers"] == MEMORY_PLAN
    return is_plans and config.remat_layers < config.num_decoder_layers


def _more_layers(config: FrozenConfigDict) -> int:
    """The next larger remat_layers."""
    layers = config.remat_layers + math.ceil(config.num_decoder_layers / REMAT_STEPS)
    return min(layers, config.num_decoder_layers)


def _with_values(setup: RunSetup, **values: Any) -> RunSetup:
    """The set-up on the same devices with values of the memory plan, and the most rows."""
    config = pyconfig.replace(setup.config, MEMORY_PLAN, **values)
    return set_up(config, list(setup.mesh.devices.flat))


def _choose_sharding(setup: RunSetup, limit: int | None) -> RunSetup:
    """The set-up with FSDP instead of data parallelism (ZeRO), if the layout is open and `limit`
    bytes per device ask for it.

    ZeRO sends less: it gathers the parameters once per step, FSDP twice per micro-batch. But it
    holds them and their gradients whole on each device. If parameters, optimizer state, working
    copy and gradients are more than half of a device's memory, micro-batches become small.
    """
    config = setup.config
    if limit is None or config.ici_fsdp_parallelism or config.ici_data_parallelism:
        return setup

    def leaves_half(setup: RunSetup) -> bool:
        needed = needed_bytes(setup)
        return 2 * (sum(needed.values()) - needed["activations"]) <= limit

    devices = setup.mesh.shape.get("data", 1) // config.dcn_data_parallelism
    widest = max(1, config.emb_dim // LEAST_WIDTH)
    chosen = setup
    for most in sorted({min(MOST_PARTS, widest), widest}):
        if leaves_half(chosen):
            break
        size = largest_divisor(math.gcd(devices, config.emb_dim), most)
        sharded = _with_values(setup, ici_fsdp_parallelism=size) if size > 1 else setup
        if sharded.gathers_by_layer:
            chosen = sharded
    return chosen


def fit_memory(setup: RunSetup) -> RunSetup:
    """The set-up with the largest memory plan whose estimate fits in a device's memory.

    remat_policy=null becomes names; on a GPU of known memory it is none first, and on a TPU whose
    layers are unrolled as few layers as possible recompute. The estimate is rough: after it,
    compile_train and take_first_step may choose a smaller plan. If nothing fits, the smallest plan.
    Raises ValueError if remat_layers is set for layers that run in a loop.
    """
    limit = _memory_limit(setup)
    is_open = setup.config.remat_policy is None
    if is_open:
        is_gpu = setup.numerics.backend == "gpu"
        setup = _with_values(setup, remat_policy="none" if is_gpu and limit else "names")
    setup = _choose_sharding(setup, limit)
    if setup.config.remat_layers is not None and setup.scans_layers:
        raise ValueError(
            f"remat_layers={setup.config.remat_layers} needs unrolled layers: set "
            "scan_layers=false or leave remat_layers null"
        )
    is_tpu, is_open = setup.numerics.backend == "tpu", is_open and setup.config.remat_layers is None
    if limit and is_tpu and is_open and not setup.scans_layers:
        setup = _with_values(setup, remat_layers=0)
    while limit and _exceeds(setup, limit) and (less := smaller(setup)):
        setup = less
    return setup


def _exceeds(setup: RunSetup, limit: int) -> bool:
    """Whether the estimate for a set-up is more than it may take of `limit` bytes."""
    share = LARGEST_SHARE if keeps_more(setup.config) else 1
    return sum(needed_bytes(setup).values()) > share * limit


def _memory_limit(setup: RunSetup) -> int | None:
    """Bytes that a program may use on the set-up's devices; None: unknown, or a CPU, whose memory
    others use too.
    """
    if setup.numerics.backend == "cpu":
        return None
    device = setup.mesh.devices.flat[0]
    if device in jax.devices():
        return _shared_memory_limit()
    # Of a topology that is not there.
    if gpu := gpus.gpu_of(device.device_kind):
        return gpus.program_memory_bytes(gpu)
    chip = hardware.chip(device)
    return chip and chip.program_memory_bytes


def _shared_memory_limit() -> int | None:
    """Bytes that a device has in every process, so that all choose the same plan; None: unknown."""
    limits = runtime.gather_json(hardware.memory_limit_bytes())
    return None if None in limits else min(limits)


def describe_memory_plan(setup: RunSetup) -> str:
    """The rows per device, and what `smaller` has changed besides."""
    config = setup.config
    keys = [key for key in pyconfig.keys_of(config) if config.origin[key] == MEMORY_PLAN]
    return ", ".join(
        [f"{setup.plan.micro_rows} rows per device", *(f"{key}={config[key]}" for key in keys)]
    )


def is_out_of_memory(error: jax.errors.JaxRuntimeError) -> bool:
    """Whether a compiler or a device ran out of memory."""
    return "RESOURCE_EXHAUSTED" in str(error)


def step_limit_bytes(setup: RunSetup, limit_bytes: int) -> int:
    """Bytes that a train step may take of what JAX takes of a GPU's memory."""
    is_open = setup.config.per_device_batch_size is None
    return int(LARGEST_SHARE * limit_bytes) if is_open else limit_bytes


def _exceeds_memory(setup: RunSetup, compiled: jax.stages.Compiled) -> bool:
    """Whether the step needs more than this GPU has; a TPU's compiler refuses such a program."""
    if setup.numerics.backend != "gpu" or setup.mesh.devices.flat[0] not in jax.devices():
        return False
    limit, stats = _shared_memory_limit(), compiled.memory_analysis()
    if None in (limit, stats):
        return False
    return stats.peak_memory_in_bytes > step_limit_bytes(setup, limit)


@contextlib.contextmanager
def explain_out_of_memory(setup_now: Callable[[], RunSetup]) -> Iterator[None]:
    """Turn a device's lack of memory into a ValueError that names the setting to change.

    setup_now: returns the set-up that is used when the memory runs out.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        setup = setup_now()
        plan = setup.plan
        remedy = "choose a smaller model, or more devices with ici_fsdp_parallelism"
        if keeps_more(setup.config):
            layers = _more_layers(setup.config)
            remedy = f"set remat_layers={layers}, with the same losses up to rounding"
        elif plan.micro_rows > 1:
            rows = with_micro_rows(plan, plan.micro_rows - 1).micro_rows
            remedy = f"set per_device_batch_size={rows}, with the same losses up to rounding"
        elif setup.config.remat_policy != "full":
            remedy = "set remat_policy=full, with the same losses up to rounding"
        raise ValueError(
            f"a device ran out of memory with {describe_memory_plan(setup)}: {remedy}; the same "
            "command resumes from the newest checkpoint"
        ) from error


def with_micro_rows(plan: BatchPlan, limit: int) -> BatchPlan:
    """The plan with micro-batches of at most `limit` rows."""
    device_rows = plan.accumulation_steps * plan.micro_rows
    rows = largest_divisor(device_rows, limit)
    return plan._replace(accumulation_steps=device_rows // rows, micro_rows=rows)


def take_first_step(
    run: RunContext, batch: dict[str, jax.Array], restart: Callable[[], Any]
) -> tuple[dict[str, jax.Array], jax.stages.Compiled | None]:
    """The first step of a process; returns its metrics, and the program if it was compiled again.

    If the devices run out of memory, the step is repeated with the next smaller memory plan.
    restart: sets run.state anew, after a failed step has consumed it. Several processes may not
    fail together, so there the error is raised.
    """
    compiled = None
    while True:
        try:
            state, metrics = jax.block_until_ready(run.programs.train(run.state, batch))
            run.state = state
            return metrics, compiled
        except jax.errors.JaxRuntimeError as error:
            less = smaller(run.setup) if is_out_of_memory(error) else None
            if less is None or jax.process_count() > 1:
                raise
        run.say(f"Out of memory with {describe_memory_plan(run.setup)}")
        run.say(f"Compiling for {describe_memory_plan(less)}")
        run.setup, compiled = compile_train(less)
        run.programs = build_programs(run.setup, compiled, run.tokenizer.token_bytes())
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(run.state)):
            restart()

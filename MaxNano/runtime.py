"""The machine under a run: devices, compilation cache, chip table, memory, preemption.

`initialize(config)` comes before anything that starts a JAX backend.
"""

import gc
import json
import math
import os
import signal
import sys
import types
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import FrozenConfigDict

Item = TypeVar("Item")

EXIT_PREEMPTED = 75  # saved and asked to stop: start the same command again (EX_TEMPFAIL)


# ---- Start ---------------------------------------------------------------------------------------


def initialize(config: FrozenConfigDict) -> None:
    """Joins the other processes of a multi-host run, makes virtual CPU devices, turns on the cache.

    A warning on stderr where the cache cannot be used; the run goes on without it.
    """
    if _is_multi_process() and not jax.distributed.is_initialized():
        # JAX finds these itself on SLURM and on TPU pods; elsewhere it reads only the address.
        jax.distributed.initialize(
            num_processes=_int_from_environment("JAX_NUM_PROCESSES"),
            process_id=_int_from_environment("JAX_PROCESS_ID"),
        )
    _make_cpu_devices(config)
    _start_compilation_cache(config.jax_cache_dir)


def compute_dtype(config: FrozenConfigDict) -> str:
    """Name of the dtype of activations and matrix products on this backend."""
    return config.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")


def embedding_dtype(config: FrozenConfigDict) -> str:
    """Name of the dtype in which the embedding tables and their Adam moments are kept."""
    return config.embedding_dtype or compute_dtype(config)


def gather_json(value: Any) -> list[Any]:
    """The JSON-able values that all processes hand in, in the order of their index, to each."""
    if jax.process_count() == 1:
        return [value]
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([content.size])).ravel()
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: content.size] = content
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def freeze_gc() -> None:
    """Takes all present objects out of garbage collection; call after the first step.

    What set-up and compilation leave behind stays for good, and walking it at every full
    collection stalls the loop. Source: nanochat/scripts/base_train.py@92d63d4.
    """
    gc.collect()
    gc.freeze()


def _is_multi_process() -> bool:
    """Whether the environment says that this process is one of several."""
    env = os.environ
    return (
        "JAX_COORDINATOR_ADDRESS" in env
        or (_int_from_environment("SLURM_NTASKS") or 1) > 1
        or "," in env.get("TPU_WORKER_HOSTNAMES", "")  # a Cloud TPU pod slice
    )


def _int_from_environment(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isdigit():
        raise ValueError(f"the environment variable {name} must be a number, not {text!r}")
    return int(text)


def _make_cpu_devices(config: FrozenConfigDict) -> None:
    """Sets the number of devices of the CPU backend; other backends do not look at it."""
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    count = config.num_cpu_devices or cpu_devices(
        cores=cores,
        rows=config.global_batch_tokens // config.max_target_length,
        parallelism=[config[f"ici_{axis}_parallelism"] for axis in config.mesh_axes],
    )
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        pass  # the backend already runs, with the devices that it got then


def cpu_devices(*, cores: int, rows: int, parallelism: Sequence[int | None]) -> int:
    """Number of virtual CPU devices: about one a core, and never more than share a step's rows.

    parallelism: sizes of the mesh axes, None for the axis that takes what is left, which then gets
    the largest power of two that `cores` and `rows` allow.
    """
    fixed = math.prod(size or 1 for size in parallelism)
    if None not in parallelism:
        return fixed
    left = 1
    while fixed * left * 2 <= cores and rows % (fixed * left * 2) == 0:
        left *= 2
    return fixed * left


def _start_compilation_cache(directory: str) -> None:
    if not directory:
        return
    path = epath.Path(directory).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        if "://" not in directory and not os.access(path, os.W_OK):
            raise PermissionError(f"{path} is not writable")
    except OSError as error:
        print(
            f"warning: no compilation cache, programs are compiled anew each time: {error}",
            file=sys.stderr,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    # A run compiles dozens of small programs besides the train step; together they take seconds.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


# ---- Chips ---------------------------------------------------------------------------------------


class Chip(NamedTuple):
    """One JAX device as the makers' data sheets state it."""

    peak_flops: float  # bfloat16 FLOP/s, dense
    memory_bytes: float
    memory_bandwidth: float  # bytes/s


# By jax.Device.device_kind.
# Sources: TPU https://cloud.google.com/tpu/docs/system-architecture-tpu-vm and the pages of each
# version there (a v4 or v5p chip is one device, a TPU7x chip two); NVIDIA's data sheets, figures
# without sparsity: https://www.nvidia.com/en-us/data-center/{a100,h100,h200,dgx-b200}.
CHIPS = {
    "TPU v4": Chip(275e12, 32 * 2**30, 1.228e12),
    "TPU v5 lite": Chip(197e12, 16 * 2**30, 0.819e12),
    "TPU v5": Chip(459e12, 95 * 2**30, 2.765e12),
    "TPU v5p": Chip(459e12, 95 * 2**30, 2.765e12),
    "TPU v6 lite": Chip(918e12, 32 * 2**30, 1.64e12),
    "TPU v6e": Chip(918e12, 32 * 2**30, 1.64e12),
    "TPU7x": Chip(2307e12 / 2, 192 * 2**30 / 2, 7.38e12 / 2),
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 40e9, 1.555e12),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80e9, 2.039e12),
    "NVIDIA A100 80GB PCIe": Chip(312e12, 80e9, 1.935e12),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80e9, 3.35e12),
    "NVIDIA H100 NVL": Chip(835e12, 94e9, 3.9e12),
    "NVIDIA H100 PCIe": Chip(756e12, 80e9, 2.0e12),
    "NVIDIA H200": Chip(989e12, 141e9, 4.8e12),
    "NVIDIA H200 NVL": Chip(835e12, 141e9, 4.8e12),
    "NVIDIA B200": Chip(2250e12, 180e9, 8.0e12),
}


def chip(device: jax.Device) -> Chip | None:
    """The device's row of CHIPS, None if it has none (a CPU, or a chip to be added there)."""
    return CHIPS.get(device.device_kind)


def peak_flops(devices: Sequence[jax.Device]) -> float | None:
    """bfloat16 FLOP/s of all devices together, None if the table lacks one of them."""
    chips = [chip(device) for device in devices]
    return None if None in chips else sum(c.peak_flops for c in chips)


# ---- Memory --------------------------------------------------------------------------------------


def memory_limit_bytes() -> int | None:
    """Bytes that one device of this process may use, None if unknown.

    A CPU device's is its share of what the host, or the container around this process, has to give.
    """
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        host = host_memory_bytes()
        return None if host is None else host // len(devices)
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    known = chip(devices[0])
    return int(known.memory_bytes) if known else None


def host_memory_bytes(root: Path = Path("/")) -> int | None:
    """Bytes of memory available on the host: what is free or can be freed, within the cgroup.

    root: where /proc and /sys are. None where the system has neither (not Linux).
    """
    limits = []
    for name in ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = _read(root / name)
        if text.isdigit():  # "max" is no limit
            limits.append(int(text))
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            limits.append(1024 * int(line.split()[1]))
    return min(limits, default=None)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


# ---- Preemption ----------------------------------------------------------------------------------


class Preempted(Exception):
    """The run is asked to save and leave with EXIT_PREEMPTED."""


class Preemption:
    """Notes SIGTERM and Ctrl-C, and raises Preempted where the loop says that it may be left.

        with Preemption() as preemption:
            for step in ...:
                preemption.check(step)
                ...
                for batch in preemption.checked(held_out): ...

    A second Ctrl-C ends the process at once. In a run of several processes JAX's own notice of
    SIGTERM is used, which makes all of them stop at the same step.
    """

    def __init__(self) -> None:
        self._noted = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        if not jax.distributed.is_initialized():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self, step: int | None = None) -> None:
        """Raises Preempted where the run is to be left; cheap.

        step: the train step at a step boundary, the same sequence in every process; None elsewhere,
        where several processes cannot agree and the next boundary decides.
        """
        if jax.distributed.is_initialized():
            requested = step is not None and multihost_utils.reached_preemption_sync_point(step)
        else:
            requested = self._noted
        if requested:
            raise Preempted

    def checked(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, with a check before each."""
        for item in items:
            self.check()
            yield item

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        if not self._noted:
            # Not print(): the signal may have come in the middle of one.
            os.write(2, b"\nstopping after this step to save a checkpoint; Ctrl-C stops at once\n")
        self._noted = True
        # The system's own handler, which needs no Python to run: the process may be inside a long
        # compilation.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

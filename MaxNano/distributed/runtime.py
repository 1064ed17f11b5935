"""The machine under a run: devices, compilation cache, chip table, memory, preemption.

`initialize(config)` comes before anything that starts a JAX backend.
"""

import contextlib
import errno
import gc
import json
import math
import os
import platform
import re
import signal
import socket
import threading
import types
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import FrozenConfigDict

from MaxNano import console
from MaxNano.distributed import compile_cache
from MaxNano.storage import files

Item = TypeVar("Item")

START_TIMEOUT_SECONDS = 300  # within which all processes of a run must have been started
DEVICE_TIMEOUT_SECONDS = 300  # within which JAX must have found the devices
SHUTDOWN_TIMEOUT_SECONDS = 60  # for which a process that fails waits for the others, then ends all
FEW_ROWS = 8  # rows of a matrix product on a CPU for which tile_small_products is made
LOCAL_CACHE = "~/.cache/maxnano/jax"  # folder of compiled programs of runs on a disk
REMOTE_CACHE = ".jax_cache"  # of runs in an object store, beside them
EXIT_PREEMPTED = 75  # saved and asked to stop: start the same command again (EX_TEMPFAIL)


# ---- Start ---------------------------------------------------------------------------------------


def initialize(config: FrozenConfigDict) -> None:
    """Joins the other processes of a multi-host run, makes virtual CPU devices, turns on the cache.

    A run over several hosts is the same command on each of them, started within
    START_TIMEOUT_SECONDS of the first. On Cloud TPU, single slice or several, and under SLURM
    (`srun`; on GPUs one task a GPU) the processes find each other:

        gcloud compute tpus tpu-vm ssh NAME --worker=all \\
            --command="cd maxnano && .venv/bin/python MaxNano/train.py configs/base.yml model=d24"

    Elsewhere the environment says who they are, with JAX_PROCESS_ID counting the hosts from 0, or
    the keys coordinator_address, num_processes and process_id do, which come first:

        JAX_COORDINATOR_ADDRESS=10.0.0.1:8476 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=0 python MaxNano/...

    All hosts read the same data and tokenizer, from wherever dataset_path and tokenizer_path lead,
    and base_output_directory is one folder that all of them see. Several slices, or GPU hosts
    without a common fast network, want a dcn_*_parallelism key: see sharding.make_mesh.

    Raises ValueError where the environment contradicts itself or the devices cannot be used.
    Processes that do not find each other, or no devices, end with status 2 and a line on stderr:
    the call that waits for them cannot be left otherwise. A warning on
    stderr where the cache cannot be used; the run goes on without it.
    """
    place = _place(config)
    if place and not jax.distributed.is_initialized():
        _join_processes(place)
    tile_small_products()
    _make_cpu_devices(config, processes=place.processes if place else 1)
    _start_compilation_cache(cache_folder(config))
    find_devices()
    if place and jax.default_backend() == "cpu":
        _connect_cpu_devices()


def find_devices() -> list[jax.Device]:
    """jax.devices(), with a time limit: on a TPU it waits without one for the other hosts of the slice.

    The process ends with status 2 and a line on stderr after DEVICE_TIMEOUT_SECONDS. Raises
    ValueError where JAX cannot use the devices, for instance because another process holds the TPU.
    """
    advice = (
        "check that no other process on this host uses the TPU (sudo lsof -w /dev/accel* /dev/vfio/*), and on a "
        "slice of several hosts that this command was started on each of them"
    )
    timed_out = (
        f"error: timed out after {DEVICE_TIMEOUT_SECONDS} s waiting for the devices: {advice}"
    )
    with _time_limit(DEVICE_TIMEOUT_SECONDS, timed_out):
        try:
            return jax.devices()
        except RuntimeError as error:
            reason = console.one_line(error)
            raise ValueError(
                f"JAX cannot use the devices of this machine ({reason}): {advice}"
            ) from error


@contextlib.contextmanager
def _time_limit(seconds: float, line: str) -> Iterator[None]:
    """Ends the process with status 2 and `line` on stderr if the block takes longer.

    For calls into C++ that neither return nor let a Python signal handler run.
    """

    def give_up():
        os.write(2, f"{line}\n".encode())
        os._exit(2)

    watchdog = threading.Timer(seconds, give_up)
    watchdog.daemon = True
    watchdog.start()
    try:
        yield
    finally:
        watchdog.cancel()


def compiler_options(config: FrozenConfigDict, backend: str) -> dict[str, bool | int | str]:
    """The flags of the groups that xla_flags names, for jax.jit(..., compiler_options=...).

    backend: tpu, gpu or cpu; the groups of other backends are left out.
    """
    groups = {name: (of, flags) for name, of, *flags in config.xla_flag_groups}
    options: dict[str, bool | int | str] = {}
    for name in config.xla_flags:
        of, flags = groups[name]
        if of == backend:
            options |= dict(map(_parse_flag, flags))
    return options


def _parse_flag(flag: str) -> tuple[str, bool | int | str]:
    """`name=value` -> the name, and the value in the type that XLA wants it in."""
    name, _, text = flag.partition("=")
    if text in ("true", "false"):
        return name, text == "true"
    return name, int(text) if re.fullmatch(r"-?\d+", text) else text


def compute_dtype(config: FrozenConfigDict, backend: str) -> str:
    """Name of the dtype of activations and matrix products on a backend (cpu, gpu, tpu)."""
    return config.dtype or ("float32" if backend == "cpu" else "bfloat16")


def embedding_dtype(config: FrozenConfigDict, backend: str) -> str:
    """Name of the dtype in which the embedding tables and their Adam moments are kept on a backend."""
    return config.embedding_dtype or compute_dtype(config, backend)


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


def first_problem(problem: str | None) -> str | None:
    """The problem of the first process that has one, for each process; None where none has.

    So that what fails in one process is not waited for by the others: all of them call this.
    """
    return next((found for found in gather_json(problem) if found is not None), None)


def freeze_gc() -> None:
    """Takes all present objects out of garbage collection; call after the first step.

    What set-up and compilation leave behind stays for good, and walking it at every full
    collection stalls the loop. Source: nanochat/scripts/base_train.py@92d63d4.
    """
    gc.collect()
    gc.freeze()


# ---- Several processes ---------------------------------------------------------------------------


class _Place(NamedTuple):
    """A process among those of its run; None where JAX finds it out from the cluster."""

    coordinator_address: str | None
    num_processes: int | None
    process_id: int | None

    @property
    def processes(self) -> int:
        """Number of processes as far as this module needs it: where virtual CPU devices are made."""
        return self.num_processes or _int_from_environment("SLURM_NTASKS") or 1


def _place(config: FrozenConfigDict) -> _Place | None:
    """What config, or else the environment, says of this process; None where it is alone."""
    place = _Place(config.coordinator_address, config.num_processes, config.process_id)
    if place.coordinator_address is None:
        place = _Place(
            os.environ.get("JAX_COORDINATOR_ADDRESS"),
            _int_from_environment("JAX_NUM_PROCESSES"),
            _int_from_environment("JAX_PROCESS_ID"),
        )
        if place.coordinator_address is None:
            return _Place(None, None, None) if _is_in_cluster() else None
        if None in place:
            if _is_in_cluster():
                return place
            raise ValueError(
                "JAX_COORDINATOR_ADDRESS is set: set JAX_NUM_PROCESSES and JAX_PROCESS_ID too"
            )
    if not re.fullmatch(r"\S+:\d+", place.coordinator_address):
        raise ValueError(
            f"coordinator address {place.coordinator_address!r} must be host:port, such as 10.0.0.1:8476"
        )
    if place.process_id >= place.num_processes:
        raise ValueError(
            f"JAX_PROCESS_ID={place.process_id} is none of the {place.num_processes} processes: "
            f"they are 0 to {place.num_processes - 1}"
        )
    return place if place.num_processes > 1 else None


def _is_in_cluster() -> bool:
    """Whether a cluster that JAX can ask runs this process as one of several."""
    env = os.environ
    if "SLURM_STEP_NODELIST" in env and (_int_from_environment("SLURM_NTASKS") or 1) > 1:
        return True
    if "tpu" not in (jax.config.jax_platforms or ""):  # JAX sets it where it finds TPU chips
        return False
    # GKE tells its containers; a TPU VM has to ask.
    hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
    if hosts is None:
        hosts = _tpu_metadata("worker-network-endpoints")
    multislice = "MEGASCALE_COORDINATOR_ADDRESS"
    return "," in hosts or multislice in env or multislice in _tpu_metadata("tpu-env")


def _tpu_metadata(attribute: str) -> str:
    """What Google's metadata server tells a TPU VM about itself; empty where there is none."""
    if "TPU_SKIP_MDS_QUERY" in os.environ:
        return ""
    host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/attributes/{attribute}",
        headers={"Metadata-Flavor": "Google"},
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=5) as answer:
            return answer.read().decode()
    except OSError:
        return ""


def _join_processes(place: _Place) -> None:
    """Waits until all processes of the run are there."""
    known = place.process_id is not None
    who = f"process {place.process_id} of {place.num_processes}" if known else "this process"
    where = place.coordinator_address or "of this cluster"
    if place.process_id == 0:
        _check_port_is_free(place.coordinator_address)

    # JAX does not raise when its own time is up: it aborts the process with a stack trace.
    timed_out = (
        f"error: {who} timed out after {START_TIMEOUT_SECONDS} s waiting for the others at "
        f"coordinator {where}: check that all of them were started with that address and number, that "
        "it is the host of process 0, and that no firewall is between"
    )
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        with _time_limit(START_TIMEOUT_SECONDS, timed_out):
            jax.distributed.initialize(
                **place._asdict(),
                cluster_detection_method="deactivate" if known else None,
                initialization_timeout=2 * START_TIMEOUT_SECONDS,
                shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_SECONDS,
            )
    except (ValueError, RuntimeError) as error:
        reason = console.one_line(error)
        raise ValueError(
            f"cannot join the other processes of this cluster ({reason}): set coordinator_address, "
            "num_processes and process_id"
        ) from error


def _connect_cpu_devices() -> None:
    """Opens the connections that collectives need, now that all processes are here.

    Gloo waits 30 s for that, and later one process may compile that much longer than another.
    """
    mesh = jax.make_mesh((jax.device_count(),), ("device",))
    cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("device"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    ones = jax.make_array_from_callback((mesh.size,), cut, lambda part: np.ones(mesh.size)[part])
    jax.jit(jax.numpy.sum, out_shardings=whole)(ones).block_until_ready()
    gather_json(None)  # its connections are between processes


def _check_port_is_free(address: str) -> None:
    """ValueError if another process listens on the coordinator's port: JAX would crash."""
    port = int(address.rsplit(":", 1)[1])
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(
                f"port {port} of coordinator address {address} is taken: choose another, or end "
                "the run that still holds it"
            ) from None


def _int_from_environment(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isdigit():
        raise ValueError(f"the environment variable {name} must be a number, not {text!r}")
    return int(text)


# ---- CPU devices and cache -----------------------------------------------------------------------


def tile_small_products() -> None:
    """Lets XLA's own matrix product, which programs with xla_cpu_multi_thread_eigen=False get, suit FEW_ROWS rows.

    It goes by the environment, before JAX starts a backend: XLA takes this for a whole process only. Tiles are rows,
    depth and vectors of columns; two vectors of AVX2 are a line of the cache. Only x86 was measured; elsewhere, and
    where XLA_FLAGS already says something of the kind, all stays as it is.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if platform.machine() in ("x86_64", "AMD64") and "xla_backend_extra_options" not in flags:
        tiles = f"xla_llvm_ir_gemm_tile_size={FEW_ROWS}:5:2*vectwidth"
        own = f"--xla_backend_extra_options=xla_force_enable_experimental_llvm_ir_gemm,{tiles}"
        os.environ["XLA_FLAGS"] = f"{flags} {own}".strip()


def _make_cpu_devices(config: FrozenConfigDict, processes: int) -> None:
    """Sets the number of CPU devices of this process; other backends do not look at it."""
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    slices = math.prod(config[f"dcn_{axis}_parallelism"] for axis in config.mesh_axes)
    of_all = cpu_devices(
        cores=cores * processes,
        rows=config.global_batch_tokens // config.max_target_length,
        parallelism=[slices, *(config[f"ici_{axis}_parallelism"] for axis in config.mesh_axes)],
    )
    try:
        jax.config.update(
            "jax_num_cpu_devices", config.num_cpu_devices or max(1, of_all // processes)
        )
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


def cache_folder(config: FrozenConfigDict) -> str:
    """Where compiled programs are kept, empty for nowhere."""
    if config.jax_cache_dir is not None:
        return config.jax_cache_dir
    runs = config.base_output_directory
    return f"{runs.rstrip('/')}/{REMOTE_CACHE}" if files.is_remote(runs) else LOCAL_CACHE


def _start_compilation_cache(directory: str) -> None:
    if not directory:
        return
    if files.is_remote(directory):
        compile_cache.start(directory)
    else:
        path = Path(directory).expanduser()
        try:
            path.mkdir(parents=True, exist_ok=True)
            if not os.access(path, os.W_OK):
                raise PermissionError(f"{path} is not writable")
        except OSError as error:
            console.warn(f"no compilation cache, programs are compiled anew each time: {error}")
            return
        jax.config.update("jax_compilation_cache_dir", str(path))
    # A run compiles dozens of small programs besides the train step; together they take seconds.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    # A Pallas kernel for TPUs has the names of its source files in the cache key: without the folders that differ
    # from machine to machine.
    jax.config.update("jax_hlo_source_file_canonicalization_regex", r"^.*/(?=[^/]+/[^/]+$)")


# ---- Chips ---------------------------------------------------------------------------------------


class Chip(NamedTuple):
    """One JAX device as the makers' data sheets state it."""

    peak_flops: float  # bfloat16 FLOP/s, dense
    memory_bytes: float
    memory_bandwidth: float  # bytes/s
    clock_hz: float | None = None
    program_memory_bytes: int | None = None  # of memory_bytes, what the compiler lets a program use
    ici_link_bandwidth: float | None = (
        None  # bytes/s of one link between chips of a slice, one direction
    )
    dcn_bandwidth: float | None = None  # bytes/s of one chip to other slices, one direction
    spot_price: float | None = None  # USD a chip-hour


def _gib(count: float) -> int:
    return int(count * 2**30)


# By jax.Device.device_kind.
# Sources: TPU https://cloud.google.com/tpu/docs/system-architecture-tpu-vm and the pages of each
# version there (a v4 or v5p chip is one device, a TPU7x chip two); clock and networks
# https://jax-ml.github.io/scaling-book/tpus and the peak over the matrix units' FLOPs a cycle; what a
# program may use: libtpu's message for one that is too large; spot price: us-central1, June 2026.
# NVIDIA's data sheets, figures without sparsity:
# https://www.nvidia.com/en-us/data-center/{a100,h100,h200,dgx-b200}.
CHIPS = {
    "TPU v4": Chip(275e12, 32 * 2**30, 1.228e12, 1.05e9, _gib(30.75), 45e9, 6.25e9),
    "TPU v5 lite": Chip(197e12, 16 * 2**30, 0.819e12, 1.5e9, _gib(15.75), 45e9, 3.125e9),
    "TPU v5": Chip(459e12, 95 * 2**30, 2.765e12, 1.75e9, _gib(95.74), 90e9, 6.25e9),
    "TPU v5p": Chip(459e12, 95 * 2**30, 2.765e12, 1.75e9, _gib(95.74), 90e9, 6.25e9),
    "TPU v6 lite": Chip(918e12, 32 * 2**30, 1.64e12, 1.75e9, _gib(31.25), 90e9, 12.5e9, 0.540137),
    "TPU v6e": Chip(918e12, 32 * 2**30, 1.64e12, 1.75e9, _gib(31.25), 90e9, 12.5e9, 0.540137),
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
                with preemption.at_once():
                    ...  # what may wait for long, and may be left anywhere

    A second Ctrl-C ends the process at once. In a run of several processes JAX's own notice of
    SIGTERM is used, which makes all of them stop at the same step.
    """

    def __init__(self) -> None:
        self._noted = self._at_once = False
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

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, Preempted is raised where the process stands, and not at the next check.

        In a run of several processes it does nothing: one of them cannot leave alone.
        """
        self._at_once = True
        try:
            if self._noted:
                raise Preempted
            yield
        finally:
            self._at_once = False

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        if not self._noted:
            # Not print(): the signal may have come in the middle of one.
            os.write(2, b"\nstopping after this step to save a checkpoint; Ctrl-C stops at once\n")
        self._noted = True
        # The system's own handler, which needs no Python to run: the process may be inside a long
        # compilation.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self._at_once:
            raise Preempted

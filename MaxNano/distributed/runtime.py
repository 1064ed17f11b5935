"""Start-up of a program: several processes, virtual CPU devices, the compilation cache.

Call `initialize(config)` before anything that starts a JAX backend.
"""

import collections
import contextlib
import errno
import gc
import json
import math
import os
import platform
import re
import socket
import threading
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import FrozenConfigDict

from MaxNano import console
from MaxNano.distributed import compile_cache, mesh
from MaxNano.storage import files

START_TIMEOUT_SECONDS = 300  # until all processes of a run must have started
DEVICE_TIMEOUT_SECONDS = 300  # until JAX must have found the devices
SHUTDOWN_TIMEOUT_SECONDS = 60  # how long a failing process waits for the others
FEW_ROWS = 8  # number of rows that tile_small_products optimizes for
IN_FLIGHT = 8  # programs that may wait on the devices before the host waits for one
LOCAL_CACHE = "~/.cache/maxnano/jax"  # compilation cache of runs on a disk
REMOTE_CACHE = ".jax_cache"  # compilation cache of runs in an object store, next to them

Result = TypeVar("Result")


def initialize(config: FrozenConfigDict) -> None:
    """Joins the processes of a multi-host run, creates virtual CPU devices, sets up the cache.

    For a run on several hosts, start the same command on each host within START_TIMEOUT_SECONDS.
    On Cloud TPU (one slice or several) and under SLURM (`srun`; one task per GPU) the processes
    find each other:

        gcloud compute tpus tpu-vm ssh NAME --worker=all \\
            --command="cd maxnano && .venv/bin/python MaxNano/train.py configs/base.yml model=d24"

    Elsewhere, set three environment variables, with JAX_PROCESS_ID counting from 0; the keys
    coordinator_address, num_processes and process_id override them:

        JAX_COORDINATOR_ADDRESS=10.0.0.1:8476 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=0 .venv/bin/python MaxNano/...

    All hosts read the same data and tokenizer, and base_output_directory is a folder that all of
    them share. Several slices, or GPU hosts without a fast network between them, need a
    dcn_*_parallelism key: see mesh.make_mesh.

    Raises ValueError if the environment is contradictory or the devices cannot be used. If
    processes or devices are not found in time, the process exits with status 2 and one line on
    stderr, because JAX's own wait cannot be interrupted. If the cache cannot be used, the run
    continues without it, after a warning.
    """
    process = _find_process(config)
    if process and not jax.distributed.is_initialized():
        _join_processes(process)
    tile_small_products()
    _make_cpu_devices(config, processes=process.processes if process else 1)
    _start_compilation_cache(cache_folder(config))
    find_devices()
    if process and jax.default_backend() == "cpu":
        _connect_cpu_devices()


def find_devices() -> list[jax.Device]:
    """jax.devices() with a time limit: on a TPU slice it waits for the other hosts without one.

    The process exits with status 2 and a line on stderr after DEVICE_TIMEOUT_SECONDS. Raises
    ValueError if JAX cannot use the devices, such as a TPU that another process holds.
    """
    advice = (
        "check that no other process on this host uses the TPU (sudo lsof -w /dev/accel* "
        "/dev/vfio/*), and on a slice of several hosts that this command was started on each of "
        "them"
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
    """Exits the process with status 2 and `line` on stderr if the block takes longer.

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


def freeze_gc() -> None:
    """Excludes all existing objects from garbage collection; call after the first step.

    Objects from set-up and compilation live until the end, and scanning them at every full
    collection stalls the training loop. Source: nanochat/scripts/base_train.py@92d63d4.
    """
    gc.collect()
    gc.freeze()


def limit_in_flight(results: Iterable[Result], most: int = IN_FLIGHT) -> Iterator[Result]:
    """Yields the results, trees of arrays, of programs that `results` starts one after the other.

    A result is yielded when it is ready; up to `most` later programs have been started by then.
    Any loop that starts programs without reading their results needs this: virtual CPU devices of
    one process wait for each other forever once 32 programs with collectives are queued, and XLA
    aborts the process after 40 s.
    """
    waiting: collections.deque[Result] = collections.deque()
    for result in results:
        waiting.append(result)
        if len(waiting) > most:
            yield jax.block_until_ready(waiting.popleft())
    while waiting:
        yield jax.block_until_ready(waiting.popleft())


# ---- Several processes --------------------------------------------------------------------------


def gather_json(value: Any) -> list[Any]:
    """The JSON-able values of all processes, in order of process index, in every process."""
    if jax.process_count() == 1:
        return [value]
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([content.size])).ravel()
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: content.size] = content
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def first_problem(problem: str | None) -> str | None:
    """The problem of the first process that has one, in every process; None if no process has one.

    All processes call this, so that the others do not wait for a process that failed.
    """
    return next((other for other in gather_json(problem) if other is not None), None)


class SharedError(ValueError):
    """An error of one process that all processes raise, at the same point."""


def raise_together(error: Exception | None) -> None:
    """Raise an error of this or another process in all of them, SharedError if there are several.

    All processes call this, with None if they have no error.
    """
    if jax.process_count() == 1:
        if error is not None:
            raise error
        return
    problem = error and f"process {jax.process_index()}: {console.one_line(error)}"
    if (problem := first_problem(problem)) is not None:
        raise SharedError(problem) from error


class _Process(NamedTuple):
    """Address and index of this process; None for what JAX finds out from the cluster."""

    coordinator_address: str | None
    num_processes: int | None
    process_id: int | None

    @property
    def processes(self) -> int:
        """Number of processes that share the cores of CPU devices."""
        return self.num_processes or _int_from_environment("SLURM_NTASKS") or 1


def _find_process(config: FrozenConfigDict) -> _Process | None:
    """This process by the config or else the environment; None if it is the only one."""
    process = _Process(config.coordinator_address, config.num_processes, config.process_id)
    if process.coordinator_address is None:
        process = _Process(
            os.environ.get("JAX_COORDINATOR_ADDRESS"),
            _int_from_environment("JAX_NUM_PROCESSES"),
            _int_from_environment("JAX_PROCESS_ID"),
        )
        if process.coordinator_address is None:
            return _Process(None, None, None) if _is_in_cluster() else None
        if None in process:
            if _is_in_cluster():
                return process
            raise ValueError(
                "JAX_COORDINATOR_ADDRESS is set: set JAX_NUM_PROCESSES and JAX_PROCESS_ID too"
            )
    if not re.fullmatch(r"\S+:\d+", process.coordinator_address):
        raise ValueError(
            f"coordinator address {process.coordinator_address!r} must be host:port, such as "
            "10.0.0.1:8476"
        )
    if process.process_id >= process.num_processes:
        raise ValueError(
            f"JAX_PROCESS_ID={process.process_id} is out of range: the {process.num_processes} "
            f"processes are numbered 0 to {process.num_processes - 1}"
        )
    return process if process.num_processes > 1 else None


def _is_in_cluster() -> bool:
    """Whether this is one of several processes in a cluster that JAX can query."""
    env = os.environ
    if "SLURM_STEP_NODELIST" in env and (_int_from_environment("SLURM_NTASKS") or 1) > 1:
        return True
    if "tpu" not in (jax.config.jax_platforms or ""):  # JAX adds it when it finds TPU chips
        return False
    # GKE sets environment variables; a TPU VM has to query the metadata server.
    hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
    if hosts is None:
        hosts = _tpu_metadata("worker-network-endpoints")
    multislice = "MEGASCALE_COORDINATOR_ADDRESS"
    return "," in hosts or multislice in env or multislice in _tpu_metadata("tpu-env")


def _tpu_metadata(attribute: str) -> str:
    """An attribute of this TPU VM from Google's metadata server; empty if there is no server."""
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


def _join_processes(process: _Process) -> None:
    """Waits until all processes of the run have started."""
    known = process.process_id is not None
    name = f"process {process.process_id} of {process.num_processes}" if known else "this process"
    where = process.coordinator_address or "of this cluster"
    if process.process_id == 0:
        _check_port_is_free(process.coordinator_address)

    # JAX does not raise when its own timeout expires: it aborts the process with a stack trace.
    timed_out = (
        f"error: {name} timed out after {START_TIMEOUT_SECONDS} s waiting for the others at "
        f"coordinator {where}: check that all of them were started with that address and number, "
        "that it is the host of process 0, and that no firewall blocks the port"
    )
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        with _time_limit(START_TIMEOUT_SECONDS, timed_out):
            jax.distributed.initialize(
                **process._asdict(),
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
    """Opens Gloo's connections now, while all processes are at the same point.

    Gloo waits 30 s for a connection, and later one process may compile that much longer than
    another.
    """
    line = jax.make_mesh((jax.device_count(),), ("device",))
    sharded = jax.sharding.NamedSharding(line, jax.sharding.PartitionSpec("device"))
    replicated = jax.sharding.NamedSharding(line, jax.sharding.PartitionSpec())
    ones = jax.make_array_from_callback(
        (line.size,), sharded, lambda index: np.ones(line.size)[index]
    )
    jax.jit(jax.numpy.sum, out_shardings=replicated)(ones).block_until_ready()
    gather_json(None)  # its connections are between processes, not devices


def _check_port_is_free(address: str) -> None:
    """Raises ValueError if another process listens on the coordinator's port: JAX would crash."""
    port = int(address.rsplit(":", 1)[1])
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(
                f"port {port} of coordinator address {address} is taken: choose another port, or "
                "end the run that holds it"
            ) from None


def _int_from_environment(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isdigit():
        raise ValueError(f"the environment variable {name} must be a number, not {text!r}")
    return int(text)


# ---- CPU devices --------------------------------------------------------------------------------


def tile_small_products() -> None:
    """Tunes XLA's CPU matrix product for FEW_ROWS rows; call before JAX starts a backend.

    Applies to programs compiled with xla_cpu_multi_thread_eigen=False. XLA reads the setting from
    the environment once per process. A tile is rows x depth x vectors of columns; two AVX2 vectors
    fill a cache line. Only x86 was measured: on other machines, or if XLA_FLAGS already has
    xla_backend_extra_options, nothing changes.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if platform.machine() in ("x86_64", "AMD64") and "xla_backend_extra_options" not in flags:
        tiles = f"xla_llvm_ir_gemm_tile_size={FEW_ROWS}:5:2*vectwidth"
        options = f"--xla_backend_extra_options=xla_force_enable_experimental_llvm_ir_gemm,{tiles}"
        os.environ["XLA_FLAGS"] = f"{flags} {options}".strip()


def _make_cpu_devices(config: FrozenConfigDict, processes: int) -> None:
    """Sets the number of CPU devices of this process; other backends ignore it."""
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    slices = math.prod(config[f"dcn_{axis}_parallelism"] for axis in config.mesh_axes)
    total = cpu_devices(
        cores=cores * processes,
        rows=config.global_batch_tokens // config.max_target_length,
        parallelism=[slices, *mesh.sizes_in_slice(config)],
    )
    try:
        jax.config.update(
            "jax_num_cpu_devices", config.num_cpu_devices or max(1, total // processes)
        )
    except RuntimeError:
        pass  # the backend already runs with the devices of an earlier call


def cpu_devices(*, cores: int, rows: int, parallelism: Sequence[int | None]) -> int:
    """Number of virtual CPU devices: about one per core, dividing the batch of `rows` sequences.

    parallelism: sizes of the mesh axes; an axis with None takes the remaining devices, the largest
    power of two that `cores` and `rows` allow.
    """
    fixed = math.prod(size or 1 for size in parallelism)
    if None not in parallelism:
        return fixed
    left = 1
    while fixed * left * 2 <= cores and rows % (fixed * left * 2) == 0:
        left *= 2
    return fixed * left


# ---- Compilation cache --------------------------------------------------------------------------


def cache_folder(config: FrozenConfigDict) -> str:
    """The folder of the compilation cache, empty for none."""
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
        try:
            path = Path(directory).expanduser()
            path.mkdir(parents=True, exist_ok=True)
            if not os.access(path, os.W_OK):
                raise PermissionError(f"{path} is not writable")
        except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
            console.warn(f"no compilation cache, every program is compiled again: {error}")
            return
        jax.config.update("jax_compilation_cache_dir", str(path))
    # A run compiles dozens of small programs besides the train step; together they take seconds.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    # The cache key of a Pallas TPU kernel contains the names of its source files: drop the folders,
    # which differ between machines.
    jax.config.update("jax_hlo_source_file_canonicalization_regex", r"^.*/(?=[^/]+/[^/]+$)")

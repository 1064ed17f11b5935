"""The machine is read rightly: devices, cache, chips, memory; and signals end a run in order."""

import gc
import os
import random
import re
import signal
import socket
import subprocess
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import jax
import programs
import pytest
from ports import free_port

from MaxNano import pyconfig
from MaxNano.distributed import hardware, preemption, runtime
from MaxNano.distributed.preemption import Halted, HaltNotice, Preemption

ROOT = Path(__file__).resolve().parents[1]


def run_python(code: str, **env: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return programs.run("-c", textwrap.dedent(code), env={**clean, "JAX_PLATFORMS": "cpu", **env})


@pytest.mark.parametrize(
    "cores,rows,parallelism,expected",
    [
        (2, 16, [None, 1, 1], 2),
        (2, 15, [None, 1, 1], 1),
        (7, 16, [None, 1, 1], 4),
        (64, 12, [None, 1, 1], 4),
        (1, 16, [None, 1, 1], 1),
        (2, 16, [None, 4, 1], 4),
        (16, 16, [None, 2, 2], 16),
        (16, 24, [None, 2, 2], 8),
        (2, 16, [2, 2, 1], 4),
        (6, 18, [None, 3, 1], 6),
    ],
)
def test_cpu_devices_share_the_rows_of_a_step(cores, rows, parallelism, expected):
    assert runtime.cpu_devices(cores=cores, rows=rows, parallelism=parallelism) == expected


def test_initialize_makes_devices_and_keeps_compiled_programs(tmp_path):
    code = f"""
        from MaxNano import pyconfig
        from MaxNano.distributed import hardware, runtime
        words = ["num_cpu_devices=3", "jax_cache_dir={tmp_path}/a/b"]
        config = pyconfig.initialize(["configs/base.yml", *words])
        runtime.initialize(config)
        import jax
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        assert jax.device_count() == 3
        jax.jit(lambda x: x @ x)(jax.numpy.ones((3, 3)))
        runtime.initialize(config)  # a second run in one process
        assert hardware.compute_dtype(config, "cpu") == hardware.embedding_dtype(config, "cpu") == "float32"
        assert hardware.peak_flops(jax.devices()) is None
        assert 0 < hardware.memory_limit_bytes() <= hardware.host_memory_bytes() // 3 * 2
    """
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert any((tmp_path / "a/b").iterdir())


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", "", r"--xla_backend_extra_options=\S*tile_size=8:5:2\*vectwidth"),
        ("x86_64", "--xla_a=1", r"--xla_a=1 --xla_backend_extra_options=\S+"),
        ("x86_64", "--xla_backend_extra_options=b", "--xla_backend_extra_options=b"),
        ("aarch64", "--xla_a=1", "--xla_a=1"),
    ],
)
def test_small_products_are_tiled_where_that_was_measured(monkeypatch, machine, flags, expected):
    monkeypatch.setattr(runtime.platform, "machine", lambda: machine)
    monkeypatch.setenv("XLA_FLAGS", flags)
    runtime.tile_small_products()
    assert re.fullmatch(expected, os.environ["XLA_FLAGS"])
    runtime.tile_small_products()
    assert re.fullmatch(expected, os.environ["XLA_FLAGS"])


def test_forced_devices_stay_and_an_unusable_cache_is_one_warning(tmp_path):
    (tmp_path / "file").write_text("")
    code = f"""
        from MaxNano import pyconfig
        from MaxNano.distributed import runtime
        words = ["configs/base.yml", "jax_cache_dir={tmp_path}/file/x"]
        runtime.initialize(pyconfig.initialize(words))
        import jax
        print(jax.device_count(), jax.config.jax_compilation_cache_dir)
    """
    done = run_python(code, XLA_FLAGS="--xla_force_host_platform_device_count=5")
    assert done.stdout.split() == ["5", "None"], done.stderr
    warnings = [line for line in done.stderr.splitlines() if "compilation cache" in line]
    assert len(warnings) == 1 and warnings[0].startswith("warning:")
    assert "Traceback" not in done.stderr


def config_of(*words):
    return pyconfig.initialize([str(pyconfig.BASE), *words])


# ---- Several processes --------------------------------------------------------------------------

BY_KEYS = ("coordinator_address=10.0.0.1:8476", "num_processes=4", "process_id=2")
BY_ENVIRONMENT = {
    "JAX_COORDINATOR_ADDRESS": "10.0.0.2:99",
    "JAX_NUM_PROCESSES": "3",
    "JAX_PROCESS_ID": "1",
}
SLURM = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2"}
CLUSTER = (None, None, None)


@pytest.fixture
def environment(monkeypatch):
    """Sets variables and leaves no other that tells of a cluster; platforms: as JAX sees them."""
    before = jax.config.jax_platforms

    def change(variables, platforms=None):
        for name in list(os.environ):
            if name.startswith(("JAX_", "SLURM_", "TPU_", "MEGASCALE_", "GCE_")):
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        jax.config.update("jax_platforms", platforms)

    yield change
    jax.config.update("jax_platforms", before)


@pytest.mark.parametrize(
    "variables,words,platforms,expected",
    [
        ({}, (), None, None),
        ({}, BY_KEYS, None, ("10.0.0.1:8476", 4, 2)),
        (BY_ENVIRONMENT, (), None, ("10.0.0.2:99", 3, 1)),
        (BY_ENVIRONMENT, BY_KEYS, None, ("10.0.0.1:8476", 4, 2)),
        ({**BY_ENVIRONMENT, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, (), None, None),
        (SLURM, (), None, CLUSTER),
        ({"SLURM_NTASKS": "2"}, (), None, None),  # the batch script itself, not a step
        ({**SLURM, "SLURM_NTASKS": "1"}, (), None, None),
        ({**SLURM, "JAX_COORDINATOR_ADDRESS": "n1:9"}, (), None, ("n1:9", None, None)),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, (), "tpu,cpu", CLUSTER),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, (), "cpu", None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, (), None, None),
        ({"TPU_WORKER_HOSTNAMES": "a", "TPU_SKIP_MDS_QUERY": "1"}, (), "tpu,cpu", None),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "a", "TPU_SKIP_MDS_QUERY": "1"}, (), "tpu", CLUSTER),
    ],
)
def test_who_a_process_is(environment, variables, words, platforms, expected):
    environment(variables, platforms)
    assert runtime._find_process(config_of(*words)) == expected


@pytest.mark.parametrize(
    "variables,problem",
    [
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES must be a number"),
        (
            {"JAX_PROCESS_ID": "3"},
            "JAX_PROCESS_ID=3 is out of range: the 3 processes are numbered 0 to 2",
        ),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.2"}, "must be host:port"),
    ],
)
def test_an_environment_that_contradicts_itself_is_told(environment, variables, problem):
    environment({**BY_ENVIRONMENT, **variables})
    with pytest.raises(ValueError, match=problem):
        runtime._find_process(config_of())


def test_an_address_alone_is_not_enough(environment):
    environment({"JAX_COORDINATOR_ADDRESS": "10.0.0.2:99"})
    with pytest.raises(ValueError, match="set JAX_NUM_PROCESSES and JAX_PROCESS_ID too"):
        runtime._find_process(config_of())


@pytest.mark.parametrize(
    "attributes,expected",
    [
        ({"worker-network-endpoints": "10.0.0.1", "tpu-env": "ACCELERATOR_TYPE: 'v6e-8'"}, None),
        ({"worker-network-endpoints": "a:1:10.0.0.1,a:2:10.0.0.2", "tpu-env": ""}, CLUSTER),
        (
            {
                "worker-network-endpoints": "10.0.0.1",
                "tpu-env": "MEGASCALE_COORDINATOR_ADDRESS: 'x'",
            },
            CLUSTER,
        ),
        ({}, None),
    ],
)
def test_a_tpu_machine_is_asked_for_its_neighbors(environment, attributes, expected):
    class Metadata(BaseHTTPRequestHandler):
        def do_GET(self):
            prefix, _, name = self.path.rpartition("/")
            right = prefix == "/computeMetadata/v1/instance/attributes"
            known = name in attributes and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if right and known else 404)
            self.end_headers()
            self.wfile.write(attributes.get(name, "").encode())

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment({"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}, "tpu,cpu")
        assert runtime._find_process(config_of()) == expected
        server.shutdown()


@pytest.mark.parametrize("index", [0, 1])
def test_processes_that_do_not_find_each_other_say_what_to_check(index):
    port = free_port()
    code = f"""
        from MaxNano import pyconfig
        from MaxNano.distributed import runtime
        runtime.START_TIMEOUT_SECONDS = 1
        words = ["coordinator_address=127.0.0.1:{port}", "num_processes=2", "process_id={index}"]
        runtime.initialize(pyconfig.initialize(["configs/base.yml", *words]))
    """
    done = run_python(code)
    assert done.returncode == 2
    assert f"error: process {index} of 2 timed out after 1 s waiting for the others" in done.stderr
    assert f"coordinator 127.0.0.1:{port}: check that" in done.stderr
    assert "Traceback" not in done.stderr and "stack trace" not in done.stderr


def test_devices_that_never_come_are_not_waited_for_without_end():
    """A slice of which one host was not started, or a TPU that another process holds."""
    code = """
        import time
        import jax
        from MaxNano import pyconfig
        from MaxNano.distributed import hardware, runtime
        runtime.DEVICE_TIMEOUT_SECONDS = 0.5
        jax.devices = lambda: time.sleep(60)
        runtime.initialize(pyconfig.initialize(["configs/base.yml", "jax_cache_dir="]))
    """
    done = run_python(code)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: timed out after 0.5 s waiting for the devices: check that no other process"
    )
    assert len(done.stderr.splitlines()) == 1


def test_devices_that_cannot_be_used_are_told_with_the_reason(monkeypatch):
    def devices():
        raise RuntimeError(
            "Unable to initialize backend 'tpu': ABORTED: The TPU is already in use by\nprocess 12"
        )

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(
        ValueError, match=r"The TPU is already in use by process 12\): check that no other process"
    ):
        runtime.find_devices()


def test_a_taken_port_is_told():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"coordinator address {address} is taken"):
            runtime._join_processes(runtime._Process(address, 2, 0))
    assert not jax.distributed.is_initialized()


# ---- Compiler flags -----------------------------------------------------------------------------


def test_flags_of_the_named_groups_and_the_backend():
    groups = (
        "[[a,tpu,xla_x=12,xla_y=true],[b,gpu,xla_x=false],[c,tpu,xla_z=ENABLED],[d,tpu,xla_w=-1]]"
    )
    config = config_of(f"xla_flag_groups={groups}", "xla_flags=[a,b,c]")
    assert hardware.compiler_options(config, "tpu") == {
        "xla_x": 12,
        "xla_y": True,
        "xla_z": "ENABLED",
    }
    assert hardware.compiler_options(config, "gpu") == {"xla_x": False}
    assert hardware.compiler_options(config, "cpu") == {}


def test_flags_for_gpus_are_flags_of_xla():
    """XLA has one table of flags for CPU and GPU, and refuses to compile with one that is not in
    it.
    """
    config = config_of()
    names = [name for name, backend, *_ in config.xla_flag_groups if backend == "gpu"]
    assert "deterministic" in names
    for name in names:
        chosen = pyconfig.replace(config, "test", xla_flags=(name,))
        options = hardware.compiler_options(chosen, "gpu")
        assert options
        jax.jit(lambda x: x + 1, compiler_options=options)(1.0)
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_deterministic_opps"):
        jax.jit(lambda x: x + 2, compiler_options={"xla_gpu_deterministic_opps": True})(1.0)


COMPILE_FOR_TPU = """
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from MaxNano import pyconfig
    from MaxNano.distributed import hardware, runtime

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x4").devices
    mesh, cut = Mesh(devices, "d"), PartitionSpec("d")

    def local(x, w):
        w = jax.lax.all_gather(w, "d", tiled=True)
        return jax.lax.psum_scatter(jax.nn.relu(x @ w).T @ x, "d", tiled=True)

    def compile_with(options):
        function = jax.shard_map(local, mesh=mesh, in_specs=cut, out_specs=cut)
        x, w = (
            jax.ShapeDtypeStruct((rows, 256), jnp.bfloat16, sharding=NamedSharding(mesh, cut))
            for rows in (2048, 256)
        )
        jax.jit(function, compiler_options=options).lower(x, w).compile()

    config = pyconfig.initialize(["configs/base.yml"])
    names = [name for name, backend, *_ in config.xla_flag_groups if backend == "tpu"]
    for name in names:
        one = pyconfig.replace(config, "test", xla_flags=(name,))
        compile_with(hardware.compiler_options(one, "tpu"))
    print(*names)
    try:
        compile_with({"xla_tpu_no_such_flag": True})
    except jax.errors.JaxRuntimeError as error:
        print(error)
"""


@pytest.mark.tpu_compile
def test_the_tpu_compiler_takes_every_flag_group():
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = run_python(COMPILE_FOR_TPU, **quiet)
    assert done.returncode == 0, done.stderr
    names, refusal = done.stdout.splitlines()
    assert "vmem" in names.split()
    assert "No such compile option: 'xla_tpu_no_such_flag'" in refusal


# ---- Numbers and memory -------------------------------------------------------------------------


def test_dtypes_follow_the_config():
    assert hardware.compute_dtype(config_of(), "tpu") == "bfloat16"
    assert hardware.embedding_dtype(config_of(), "tpu") == "bfloat16"
    assert hardware.embedding_dtype(config_of("dtype=float32"), "tpu") == "float32"
    config = config_of("embedding_dtype=float32")
    assert hardware.compute_dtype(config, "tpu") == "bfloat16"
    assert hardware.embedding_dtype(config, "tpu") == "float32"


@pytest.mark.parametrize(
    "kind,tflops",
    [
        ("TPU v6 lite", 918),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v4", 275),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla T4", 65),
        ("NVIDIA A10G", 70),  # not the A10's 125
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 503.8),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 480),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("TPU v4 lite", None),
        ("cpu", None),
    ],
)
def test_peak_flops_by_device_kind(kind, tflops):
    peak = hardware.peak_flops([SimpleNamespace(device_kind=kind)] * 2)
    assert peak == (tflops and 2 * tflops * 1e12)


def test_every_chip_has_plausible_figures():
    """Units, and no figure with sparsity: no chip computes over 700 FLOPs per byte of its memory."""
    for kind, chip in hardware.CHIPS.items():
        assert 15e9 < chip.memory_bytes < 200e9, kind
        assert 30 < chip.peak_flops / chip.memory_bandwidth < 700, kind
        assert chip.price is None or 0.1 < chip.price < 20, kind


@pytest.mark.parametrize(
    "card",
    "3090 4090 5090 A6000 L40S [PRO]6000 GB10 A10G L4 T4 V100 MI300X A100 H100 H200 B200".split(),
)
def test_the_cards_that_people_have_are_known(card):
    name = card.replace("[PRO]", "PRO ")
    assert any(re.search(rf"\b{name}\b", kind) for kind in hardware.CHIPS)


def test_accelerators_leave_tokenizing_to_other_processes(monkeypatch):
    """data_workers=null: a thread on a CPU, elsewhere one process per device, if the cores allow."""
    monkeypatch.setattr(hardware.os, "cpu_count", lambda: 16)
    config = config_of()
    assert hardware.data_workers(config, "cpu", 2) == 0
    assert hardware.data_workers(config, "gpu", 1) == 1
    assert hardware.data_workers(config, "tpu", 8) == 4
    monkeypatch.setattr(hardware.os, "cpu_count", lambda: 2)
    assert hardware.data_workers(config, "gpu", 1) == 1
    for backend in ("cpu", "gpu"):
        assert hardware.data_workers(config_of("data_workers=3"), backend, 8) == 3
        assert hardware.data_workers(config_of("data_workers=0"), backend, 8) == 0


def test_host_memory_is_the_smaller_of_machine_and_container(tmp_path):
    assert hardware.host_memory_bytes(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    assert hardware.host_memory_bytes(tmp_path) == 4_096_000
    cgroup = tmp_path / "sys/fs/cgroup"
    cgroup.mkdir(parents=True)
    (cgroup / "memory.max").write_text("max\n")
    assert hardware.host_memory_bytes(tmp_path) == 4_096_000
    (cgroup / "memory.max").write_text("1000000\n")
    assert hardware.host_memory_bytes(tmp_path) == 1_000_000


def test_one_process_gathers_its_own_value():
    assert runtime.gather_json({"a": [1, None]}) == [{"a": [1, None]}]


def test_freeze_gc():
    gc.unfreeze()  # conftest.py has frozen what there is
    runtime.freeze_gc()
    assert gc.get_freeze_count() > 1000


PREEMPTED = """
    import sys, time
    from MaxNano.distributed.preemption import EXIT_PREEMPTED, Preempted, Preemption
    with Preemption() as preemption:
        preemption.check(0)
        print("ready", flush=True)
        if "stuck" in sys.argv:
            time.sleep(0.5), print("again", flush=True), time.sleep(30)
        try:
            for step in range(10**6):
                time.sleep(0.01)
                if "evaluating" in sys.argv:
                    for _ in preemption.checked(range(10**6)):
                        time.sleep(0.01)
                preemption.check(step)
        except Preempted:
            sys.exit(EXIT_PREEMPTED)
"""


def start(*args):
    process = programs.start("-c", textwrap.dedent(PREEMPTED), *args)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    "number,phase",
    [
        (signal.SIGTERM, "training"),
        (signal.SIGINT, "evaluating"),
        (signal.SIGHUP, "training"),
        (signal.SIGUSR1, "training"),
        (signal.SIGUSR2, "evaluating"),
    ],
)
def test_a_signal_ends_the_loop_with_code_75(number, phase):
    process = start(phase)
    process.send_signal(number)
    _, stderr = process.communicate()
    assert process.returncode == 75
    assert len(stderr.split("Stopping after this step")) == 2


def test_the_second_interrupt_kills_at_once():
    process = start("stuck")
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "again\n"
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == -signal.SIGINT


def test_handlers_are_given_back():
    before = [signal.getsignal(number) for number in preemption.SIGNALS]
    with Preemption():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in preemption.SIGNALS] == before


def test_under_nohup_a_closing_terminal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Preemption():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_of_several_processes_each_passes_its_signal_on_as_the_one_that_jax_sees(monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("SIGTERM"))  # stands for JAX's
    try:
        with Preemption():
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == ["SIGTERM"] * 2


# ---- Several processes, in threads --------------------------------------------------------------


class Coordinator:
    """The key-value store of jax.distributed, and a train step as a collective operation."""

    def __init__(self, count):
        self.values, self.count = {}, count
        self.changed = threading.Condition()
        self.started = [-1] * count  # the latest step of each process
        self.meeting = threading.Barrier(count)

    def key_value_set(self, key, value):
        with self.changed:
            if key in self.values:
                raise RuntimeError("ALREADY_EXISTS")
            self.values[key] = value

    def key_value_try_get(self, key):
        with self.changed:
            if key not in self.values:
                raise RuntimeError("NOT_FOUND")
            return self.values[key]

    def wait_at_barrier(self, key, timeout_in_ms):
        try:
            self.meeting.wait(timeout_in_ms / 1000)
        except threading.BrokenBarrierError:
            raise RuntimeError("DEADLINE_EXCEEDED") from None

    def start(self, process, step):
        with self.changed:
            self.started[process] = step
            self.changed.notify_all()

    def read_metrics(self, step):
        with self.changed:
            assert self.changed.wait_for(lambda: min(self.started) >= step, timeout=60), "deadlock"


STEPS = 12


def train_in_threads(monkeypatch, missing, seed=0, lookahead=preemption.LOOKAHEAD_BATCHES):
    """What ends each process's loop, (step, error); `missing`: the first batch that it cannot make."""
    coordinator, here = Coordinator(len(missing)), threading.local()
    together, gathered = threading.Barrier(len(missing)), {}

    def gather(value):
        gathered[here.process] = value
        together.wait(60)
        return [list(gathered[process]) for process in range(len(missing))]

    monkeypatch.setattr(preemption, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(runtime, "gather_json", gather)
    monkeypatch.setattr(jax, "process_index", lambda: here.process)

    def train(process):
        here.process, pause = process, random.Random(f"{seed} {process}")
        error = ValueError(f"damaged {process}")
        notice, made = HaltNotice(coordinator), 0
        try:
            for step in range(STEPS):
                time.sleep(pause.choice([0, 0, 0.002]))
                notice.check(step)
                last = missing[process]
                made = min(step + lookahead + 1, last)
                if made < step + lookahead + 1 and last < STEPS:
                    notice.check_batches(step, made - step, error)
                else:
                    notice.check_batches(step, None, None)
                assert step < last, "trained on a missing batch"
                coordinator.start(process, step)
                coordinator.read_metrics(step - 1)
            return STEPS, None
        except (Halted, ValueError) as stop:
            return step, stop
        finally:
            notice.close()

    with ThreadPoolExecutor(len(missing)) as pool:
        return list(pool.map(train, range(len(missing))))


@pytest.mark.parametrize(
    "missing",
    [
        (STEPS, 7),
        (7, STEPS, STEPS),
        (7, 7),
        (8, 7, STEPS),
        (6, 7),
        (STEPS, 3),
        (STEPS, 4, 5),
        (STEPS, 2),
        (1, 0),
        (STEPS - 1, STEPS),
    ],
)
def test_processes_stop_together_before_the_first_missing_batch(monkeypatch, missing):
    for seed in range(3):
        ends = train_in_threads(monkeypatch, missing, seed)
        (step,) = {step for step, _ in ends}
        assert min(missing) - 1 <= step <= min(missing)
        for process, (_, stop) in enumerate(ends):
            assert isinstance(stop, Halted)
            if missing[process] == STEPS:
                assert re.fullmatch(r"process \d+: damaged \d+", str(stop.error))
            elif missing[process] == min(missing):
                assert str(stop.error) == f"damaged {process}"


def test_data_that_no_step_needs_stop_nobody(monkeypatch):
    assert train_in_threads(monkeypatch, (STEPS, STEPS)) == [(STEPS, None)] * 2


def test_a_process_that_gets_no_answer_ends_with_its_error(monkeypatch):
    """The others are dead, or hang: it must not wait for them for ever."""
    monkeypatch.setattr(preemption, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(preemption, "AGREE_SECONDS", 0.05)
    monkeypatch.setattr(runtime, "gather_json", lambda value: [value])
    notice, error = HaltNotice(Coordinator(2)), ValueError("damaged")
    notice.check_batches(0, None, None)
    with pytest.raises(ValueError, match="damaged"):
        notice.check_batches(1, 3, error)
    notice.close()


def test_an_error_of_one_process_is_raised_in_all(monkeypatch):
    with pytest.raises(OSError, match="gone"):
        runtime.raise_together(OSError("gone"))
    runtime.raise_together(None)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(runtime, "gather_json", lambda value: [value, "process 1: gone"])
    with pytest.raises(runtime.SharedError, match="process 1: gone"):
        runtime.raise_together(None)
    with pytest.raises(runtime.SharedError, match="process 0: here"):
        runtime.raise_together(OSError("here"))


@pytest.mark.slow
def test_virtual_devices_do_not_wait_for_each_other_forever():
    """Without the limit, each of three runs of this ended in XLA's abort after 40 s (jax 0.10.2)."""
    result = run_python(
        """
        import jax, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec
        from MaxNano.distributed import runtime

        mesh = jax.make_mesh((2,), ("device",))
        split = NamedSharding(mesh, PartitionSpec("device"))
        whole = NamedSharding(mesh, PartitionSpec())

        @jax.jit
        def program(weights, rows):
            for _ in range(3):
                rows = jax.numpy.tanh(rows @ jax.lax.with_sharding_constraint(weights, whole))
            return jax.lax.with_sharding_constraint(rows.sum(), whole)

        weights = jax.device_put(np.ones((256, 256), np.float32), split)
        rows = np.ones((64, 256), np.float32)
        started = (program(weights, jax.device_put(rows, split)) for _ in range(25_600))
        print(sum(1 for _ in runtime.limit_in_flight(started)))
        """,
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
    )
    assert result.stdout.split()[-1:] == ["25600"], result.stderr[-500:]

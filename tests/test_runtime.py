"""The machine is read rightly: devices, cache, chips, memory; and signals end a run in order."""

import gc
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from MaxNano import pyconfig, runtime

ROOT = Path(__file__).resolve().parents[1]


def run_python(code: str, **env: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env={**clean, "JAX_PLATFORMS": "cpu", **env},
        capture_output=True,
        text=True,
        check=False,
    )


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
        from MaxNano import pyconfig, runtime
        words = ["num_cpu_devices=3", "jax_cache_dir={tmp_path}/a/b"]
        config = pyconfig.initialize(["configs/base.yml", *words])
        runtime.initialize(config)
        import jax
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        assert jax.device_count() == 3
        jax.jit(lambda x: x @ x)(jax.numpy.ones((3, 3)))
        runtime.initialize(config)  # a second run in one process
        assert runtime.compute_dtype(config) == runtime.embedding_dtype(config) == "float32"
        assert runtime.peak_flops(jax.devices()) is None
        assert 0 < runtime.memory_limit_bytes() <= runtime.host_memory_bytes() // 3 * 2
    """
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert any((tmp_path / "a/b").iterdir())


def test_forced_devices_stay_and_an_unusable_cache_is_one_warning(tmp_path):
    (tmp_path / "file").write_text("")
    code = f"""
        from MaxNano import pyconfig, runtime
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


def test_dtypes_follow_the_config(monkeypatch):
    base = [str(pyconfig.BASE)]
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert runtime.compute_dtype(pyconfig.initialize(base)) == "bfloat16"
    assert runtime.embedding_dtype(pyconfig.initialize(base)) == "bfloat16"
    config = pyconfig.initialize([*base, "dtype=float32"])
    assert runtime.embedding_dtype(config) == "float32"
    config = pyconfig.initialize([*base, "embedding_dtype=float32"])
    assert runtime.compute_dtype(config) == "bfloat16"
    assert runtime.embedding_dtype(config) == "float32"


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
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("TPU v4 lite", None),
        ("cpu", None),
    ],
)
def test_peak_flops_by_device_kind(kind, tflops):
    peak = runtime.peak_flops([SimpleNamespace(device_kind=kind)] * 2)
    assert peak == (tflops and 2 * tflops * 1e12)


def test_host_memory_is_the_smaller_of_machine_and_container(tmp_path):
    assert runtime.host_memory_bytes(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    assert runtime.host_memory_bytes(tmp_path) == 4_096_000
    cgroup = tmp_path / "sys/fs/cgroup"
    cgroup.mkdir(parents=True)
    (cgroup / "memory.max").write_text("max\n")
    assert runtime.host_memory_bytes(tmp_path) == 4_096_000
    (cgroup / "memory.max").write_text("1000000\n")
    assert runtime.host_memory_bytes(tmp_path) == 1_000_000


def test_one_process_gathers_its_own_value():
    assert runtime.gather_json({"a": [1, None]}) == [{"a": [1, None]}]


def test_freeze_gc():
    try:
        runtime.freeze_gc()
        assert gc.get_freeze_count() > 1000
    finally:
        gc.unfreeze()


PREEMPTED = """
    import sys, time
    from MaxNano import runtime
    with runtime.Preemption() as preemption:
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
        except runtime.Preempted:
            sys.exit(runtime.EXIT_PREEMPTED)
"""


def start(*args):
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PREEMPTED), *args],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    "number,phase", [(signal.SIGTERM, "training"), (signal.SIGINT, "evaluating")]
)
def test_a_signal_ends_the_loop_with_code_75(number, phase):
    process = start(phase)
    process.send_signal(number)
    _, stderr = process.communicate()
    assert process.returncode == 75
    assert len(stderr.split("stopping after this step")) == 2


def test_the_second_interrupt_kills_at_once():
    process = start("stuck")
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "again\n"
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == -signal.SIGINT


def test_handlers_are_given_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with runtime.Preemption():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before

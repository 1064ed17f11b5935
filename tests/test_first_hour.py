"""first_hour: budget, results as it goes, parts that fail, missing packages, and (long) a real run."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "end_to_end"))

import first_hour  # noqa: E402
from first_hour import Failed, Hour, Part  # noqa: E402


def results_of(hour):
    return json.loads((hour.output / "results.jsonl").read_text())


def test_parts_that_fail_stop_nothing_and_each_result_is_written_at_once(tmp_path):
    hour = Hour(tmp_path / "out", 1000.0)
    seen = []

    def looks(hour, seconds):
        seen.append(list(results_of(hour)["parts"]))
        return {"tokens": 5}

    def fails(hour, seconds):
        raise Failed("no such package")

    def breaks(hour, seconds):
        return {}["missing"]

    parts = {
        name: Part(function, 1, 10)
        for name, function in {"a": fails, "b": looks, "c": breaks, "d": looks}.items()
    }
    first_hour.run_parts(hour, list(parts), parts)
    assert seen == [["a"], ["a", "b", "c"]]
    rows = results_of(hour)["parts"]
    assert rows["a"]["failure"] == "no such package"
    assert rows["b"]["result"] == rows["d"]["result"] == {"tokens": 5}
    assert "KeyError" in rows["c"]["failure"]
    table = (hour.output / "results.md").read_text()
    assert '| {"tokens": 5} |' in table and "| no such package |" in table


def test_what_does_not_fit_in_the_budget_is_left_out(tmp_path):
    hour = Hour(tmp_path, 100.0)
    asked = []

    def run(hour, seconds):
        asked.append(seconds)
        return {}

    parts = {"long": Part(run, 200, 300), "short": Part(run, 10, 20), "rest": Part(run, 10, 3600)}
    parts["half"] = Part(run, 10, 3600, share=0.5)
    parts["least"] = Part(run, 70, 3600, share=0.5)
    first_hour.run_parts(hour, list(parts), parts)
    assert "left out: " in results_of(hour)["parts"]["long"]["failure"]
    assert asked[0] == 20 and 90 < asked[1] <= 100 and 45 < asked[2] <= 50
    assert asked[3] == 70


def test_a_part_is_ended_with_all_that_it_started_and_its_output_is_kept(tmp_path):
    hour = Hour(tmp_path, 100.0)
    program = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print('child', child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    with pytest.raises(Failed, match="timed out after 6 s"):
        hour.python("sleepy", 6.0, "-c", program)
    child = int((tmp_path / "sleepy.log").read_text().split()[1])
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child still runs")
    with pytest.raises(Failed, match="exit status 3: what is wrong"):
        hour.python("wrong", 30.0, "-c", "import sys; print('what is wrong'); sys.exit(3)")


def test_tests_that_were_ended_early_count():
    log = (
        "tests/test_a.py::test_x PASSED [ 30%]\ntests/test_a.py::test_y[1-a b] FAILED [ 60%]\n"
        "tests/test_a.py::test_z SKIPPED (no) [ 80%]\ntests/test_a.py::test_w "
    )
    assert first_hour.count_tests(log, "timed out after 5 s") == {
        "passed": 1,
        "failed": ["tests/test_a.py::test_y[1-a b]"],
        "failure": "timed out after 5 s",
    }
    with pytest.raises(Failed, match="exit status 4"):
        first_hour.count_tests("no module named x", "exit status 4")


def test_the_result_is_the_last_line_of_json():
    text = '{"a": 1}\nwords\n{"a": 2}\n[3]\n{broken\nend'
    assert first_hour.last_json(text) == {"a": 2}
    with pytest.raises(Failed, match="no result"):
        first_hour.last_json("words\n")


def printing(text, then=""):
    """A program that prints, then does something."""
    return "-c", f"print({text!r}, flush=True)\n{then}"


def test_a_benchmark_that_ends_early_leaves_its_last_result(tmp_path):
    hour = Hour(tmp_path, 100.0)
    lines = '{"rows": [1]}\n{"rows": [1, 2]}\n[1.5, 2.5]'
    assert first_hour.measure(hour, "whole", 60.0, *printing(lines)) == {"rows": [1, 2]}
    broken = first_hour.measure(hour, "broken", 60.0, *printing(lines, "raise ValueError('full')"))
    assert broken["rows"] == [1, 2] and "exit status 1: ValueError: full" in broken["failure"]
    with pytest.raises(Failed, match="exit status 1: ValueError: none"):
        first_hour.measure(hour, "empty", 60.0, *printing("words", "raise ValueError('none')"))


def test_a_search_leaves_its_row_or_what_it_measured(tmp_path, monkeypatch):
    hour = Hour(tmp_path, 100.0)
    asked = []

    def search(name, seconds, *words):
        asked.append(words)
        (tmp_path / "tune").mkdir(exist_ok=True)
        (tmp_path / "tune/cpu-1-d2.csv").write_text('tokens/s,settings\n5,"a=1 b=(2, 3)"\n')

    def fails(name, seconds, *words):
        (tmp_path / "tune.log").write_text(text)
        raise Failed("timed out after 90 s")

    monkeypatch.setattr(hour, "python", search)
    assert first_hour.tune(hour, 180.0) == {"tokens/s": "5", "settings": "a=1 b=(2, 3)"}
    assert "tune_minutes=2.0" in asked[0] and f"base_output_directory={tmp_path}" in asked[0]
    monkeypatch.setattr(hour, "python", fails)
    text = "Tuning\nthe defaults: 5.0 ms per step, 7 tokens/s\nkernel"
    assert first_hour.tune(hour, 90.0) == {
        "failure": "timed out after 90 s",
        "measured": ["the defaults: 5.0 ms per step, 7 tokens/s"],
    }
    text = "Tuning"
    with pytest.raises(Failed, match="timed out"):
        first_hour.tune(hour, 90.0)


STAND_IN = """
import pickle, sys
sys.path[:0] = [f"{sys.argv[1]}/{name}" for name in ("ml_collections", "filelock")]
import filelock, ml_collections
assert ml_collections.__file__.startswith(sys.argv[1])
assert filelock.__file__.startswith(sys.argv[1])
from etils import epath
from MaxNano.storage.checkpoints import CheckpointError
from MaxNano.storage.run_lock import RunLock
run = epath.Path(sys.argv[2])
first, second = RunLock(run), RunLock(run)
first.acquire()
try:
    second.acquire()
except CheckpointError as error:
    assert "another process is writing" in str(error)
else:
    sys.exit("two owners")
first.release()
second.acquire()
second.release()
from MaxNano import pyconfig
config = pyconfig.initialize(["configs/base.yml", "model=d12", "trackers=[wandb]"])
assert config.emb_dim == 768 and config["trackers"] == ("wandb",) and "emb_dim" in config
assert config.origin["trackers"] == pyconfig.COMMAND_LINE and not hasattr(config, "nothing")
other = pyconfig.replace(config, "test", emb_dim=5)
assert other.emb_dim == 5 and other != config and hash(other) != hash(config)
assert pickle.loads(pickle.dumps(config)) == config
try:
    config.emb_dim = 1
except AttributeError:
    print("frozen")
"""


def test_the_stand_ins_hold_a_config_and_lock_a_run(tmp_path):
    folder = str(ROOT / "end_to_end/offline")
    done = subprocess.run(
        [sys.executable, "-c", STAND_IN, folder, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "frozen\n", done.stderr


def test_each_missing_package_has_a_stand_in_and_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(first_hour, "is_installed", lambda name: name != "filelock")
    paths = Hour(tmp_path, 1.0).environment["PYTHONPATH"].split(os.pathsep)
    offline = [path for path in paths if "offline" in path]
    assert offline == [str(ROOT / "end_to_end/offline/filelock")]
    for name in first_hour.STAND_INS:
        assert (ROOT / f"end_to_end/offline/{name}/{name}.py").exists()


def test_the_script_names_its_parts():
    done = subprocess.run(
        ["bash", ROOT / "end_to_end/first_hour.sh", "--dry-run"],
        env={**os.environ, "MAXNANO_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == list(first_hour.PARTS)


BLOCKER = """
import sys
ABSENT = {absent!r}
class Blocker:
    def find_spec(self, name, path=None, target=None):
        package = name.partition(".")[0]
        if package in ABSENT and not any(p.endswith(f"/offline/{{package}}") for p in sys.path):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
"""


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "absent",
    [
        (),
        ("grain", "rustbpe", "tensorflow_datasets", "tensorboardX", "ml_collections", "filelock"),
    ],
)
def test_a_real_run_on_the_cpu(tmp_path, absent):
    """Every part that a CPU has gives a result, also without packages that it does not need."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKER.format(absent=set(absent)))
    done = subprocess.run(
        ["bash", ROOT / "end_to_end/first_hour.sh"],
        env={
            **{k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
            "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}",
            "MAXNANO_PYTHON": sys.executable,
            "JAX_PLATFORMS": "cpu",
            "MINUTES": "12",
            "OUTPUT": str(tmp_path / "out"),
            "PARTS": "device tests step_small train decode core",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    parts = json.loads((tmp_path / "out/results.jsonl").read_text())["parts"]
    assert "no accelerator" in parts.pop("tests")["failure"]
    failures = {name: row["failure"] for name, row in parts.items() if "failure" in row}
    assert not failures, failures
    first, last = parts["train"]["result"]["loss"]
    assert parts["train"]["result"]["steps"] == 200 and last < 0.8 * first
    assert parts["step_small"]["result"]["rows"] and parts["decode"]["result"]["rows"]

"""The task files of end_to_end/cloud: in themselves, run on the CPU, and by SkyPilot's and xpk's
own rules.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import test_end_to_end as scripts
import yaml
from ports import free_port

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "end_to_end/cloud").glob("*.yaml"))
# The fields used, of https://docs.skypilot.co/en/latest/reference/yaml-spec.html
FIELDS = {"name", "workdir", "num_nodes", "resources", "envs", "setup", "run"}
RESOURCES = {
    "infra",
    "any_of",
    "accelerators",
    "accelerator_args",
    "cpus",
    "memory",
    "disk_size",
    "use_spot",
}
RESOURCES.add("job_recovery")

place, settings = scripts.place, scripts.settings  # fixtures

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the scripts are for bash")


def read(name):
    return yaml.safe_load((ROOT / f"end_to_end/cloud/{name}.yaml").read_text())


def script_of(task):
    (script,) = re.findall(r"^exec bash (\S+)$", task["run"], re.MULTILINE)
    return ROOT / script


def knobs_of(script):
    """{knob: default} where nothing is set."""
    environment = {"PATH": os.environ["PATH"], "HOME": "/nowhere"}
    said = subprocess.run(
        ["bash", script, "--help"], env=environment, capture_output=True, text=True, check=True
    )
    return dict(re.findall(r"^  ([A-Z_]+)=(.*?)(?:  |$| [a-z])", said.stdout, re.MULTILINE))


def test_there_are_four_files_and_each_says_how_it_is_started():
    assert [path.stem for path in FILES] == ["cpu", "h100", "v6e-16", "v6e-8"]
    for path in FILES:
        assert (
            f"#   sky jobs launch end_to_end/cloud/{path.name} --env BUCKET=gs://"
            in path.read_text()
        )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_task_names_what_is_there(path):
    task = read(path.stem)
    assert set(task) <= FIELDS and set(task["resources"]) <= RESOURCES
    assert task["workdir"] == "." and task["resources"]["use_spot"] is True
    assert 75 in task["resources"]["job_recovery"]["recover_on_exit_codes"]

    script = script_of(task)
    knobs = knobs_of(script)
    exported = set(re.findall(r"([A-Z_]+)=\"\$BUCKET", task["run"]))
    assert exported == {"OUTPUT", "TOKENIZER_PATH"}, (
        "nothing may lie on a disk that goes with the machine"
    )
    assert set(task["envs"]) - {"BUCKET"} <= set(knobs) - exported
    assert task["envs"]["BUCKET"] is None, "sky asks for it"

    device = re.search(r"DEVICE=(\w+) ", task["setup"]).group(1)
    assert knobs["DEVICE"] == device
    accelerators = task["resources"].get("accelerators", "")
    if accelerators:
        assert str(task["envs"]["CHIPS"]) == re.search(r"\d+$", accelerators).group()


def start(task, settings, **more):
    """The task's run part as SkyPilot starts it: a script in the work directory, a group of
    processes of its own.
    """
    words = {key: str(value) for key, value in task["envs"].items() if value is not None}
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return subprocess.Popen(
            ["bash", "-c", task["run"]],
            env={**settings, **words, **more},
            cwd=ROOT,
            text=True,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_the_cpu_task_stops_with_75_and_the_next_machine_resumes(settings, place):
    """What a preemption takes: nothing lies outside the bucket, which is a folder here."""
    task = read("cpu")
    steps = scripts.STEPS
    more = {
        "BUCKET": f"{place}/bucket",
        "NUM_ITERATIONS": str(steps),
        "STAGES": "setup tokenizer training result",
    }
    folder = place / "bucket/runs/cpu_smoke"
    first = start(task, settings, **more)
    scripts.wait_for_step(folder, 5, first)
    os.killpg(first.pid, signal.SIGTERM)  # as `sky` and the init of a machine that shuts down do
    out, _ = first.communicate(timeout=250)
    assert first.returncode == 75, out
    assert len(scripts.steps_of(folder)) < steps

    second = start(task, settings, **more)
    out, _ = second.communicate(timeout=250)
    assert second.returncode == 0, out
    assert re.search(r"Resuming .+ from step", out) and "Training a tokenizer" not in out
    assert scripts.steps_of(folder) == list(range(steps))


def start_slice(task, settings, **more):
    """The task on both hosts of a slice of two, here two processes of JAX on the CPU; the second
    one first.
    """
    more |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    second = start(task, settings, JAX_PROCESS_ID="1", SKYPILOT_NODE_RANK="1", **more)
    line = ""
    while "training" not in line and "waiting for the tokenizer" not in line:
        line = second.stdout.readline()
        assert line, "it came to an end"
    return [start(task, settings, JAX_PROCESS_ID="0", SKYPILOT_NODE_RANK="0", **more), second]


@pytest.mark.slow
def test_a_slice_trains_one_run_stops_as_one_and_resumes(settings, place):
    """One host trains the tokenizer, the other waits for it; told to stop, both end with 75."""
    task = read("v6e-16")
    steps = 60
    task["envs"] |= {"DATASET_PATH": settings["DATASET_PATH"], "NUM_ITERATIONS": steps}
    more = {"BUCKET": f"{place}/slice", "RESTART_SECONDS": "1"}
    folder = place / f"slice/runs/d1_{steps}steps"
    hosts = start_slice(task, settings, **more)
    scripts.wait_for_step(folder, 5, hosts[0])
    for host in hosts:
        os.killpg(host.pid, signal.SIGTERM)
    said = [host.communicate(timeout=250)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [75, 75], said
    assert ["Training a tokenizer" in out for out in said] == [True, False]

    hosts = start_slice(task, settings, **more)
    said = [host.communicate(timeout=250)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], said
    resumed = [bool(re.search(r"Resuming .+ from step", out)) for out in said]
    assert resumed == [True, False], said  # the first host speaks for all
    assert scripts.steps_of(folder) == list(range(steps))


@pytest.mark.parametrize(
    ("environment", "host"),
    [
        ({}, "0"),
        ({"SKYPILOT_NODE_RANK": "3", "TPU_WORKER_ID": "0"}, "3"),
        ({"TPU_WORKER_ID": "0"}, "0"),
        ({"MEGASCALE_SLICE_ID": "1", "TPU_WORKER_ID": "0"}, "1"),
    ],
)
def test_one_host_of_all_slices_is_the_first(environment, host):
    command = ["bash", ROOT / "end_to_end/tpu/d24_speedrun.sh", "--help"]
    environment = {"PATH": os.environ["PATH"], "HOME": "/nowhere", **environment}
    said = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert f"  HOST_INDEX={host} " in said


# ---- What the engines themselves make of it, where they are installed


def program_of(variable, module):
    named = os.environ.get(variable)
    if not named:
        pytest.skip(f"needs {module} in the Python that {variable} names")
    return named


def test_skypilot_loads_the_files_finds_machines_and_starts_again(tmp_path):
    python = program_of("SKYPILOT_PYTHON", "skypilot[gcp]")
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
    }
    said = subprocess.run(
        [python, ROOT / "tests/with_skypilot.py", *FILES],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    answers = json.loads(said.stdout)
    assert {name: each["machine"] for name, each in answers.items()} == {
        "cpu": "n2-standard-4",
        "h100": "a3-highgpu-1g",
        "v6e-8": "TPU-VM",
        "v6e-16": "TPU-VM",
    }
    for name, each in answers.items():
        assert each["spot"] and each["name"] == f"maxnano-{name}"
        assert each["restarts"] == [True, True, True, True, True, False]
    # The cheapest of the regions that the file allows; one row is cheaper, far from the bucket.
    assert answers["v6e-8"]["regions"] == ["us-central1", "us-east1", "us-east5"]
    assert (answers["v6e-8"]["region"], answers["v6e-8"]["price"]) == ("us-east1", 4.0)
    assert answers["v6e-16"]["accelerators"] == {"tpu-v6e-16": 1}


def xpk_command():
    """The words of the command in README.md that starts pods."""
    text = (ROOT / "end_to_end/cloud/README.md").read_text()
    (command,) = re.findall(r"^xpk workload create (?:.*\\\n)*.*$", text, re.MULTILINE)
    return shlex.split(command.replace("\\\n", " "))


def test_the_xpk_command_names_what_is_there():
    (job,) = [
        word.removeprefix("--command=") for word in xpk_command() if word.startswith("--command=")
    ]
    *words, bash, script = shlex.split(job)
    assert bash == "bash" and {word.split("=")[0] for word in words} <= set(knobs_of(ROOT / script))


def test_xpk_makes_a_jobset_that_starts_again(tmp_path):
    python = program_of("XPK_PYTHON", "xpk")
    words = [
        word
        for word in xpk_command()[1:]
        if not word.startswith(("--base-docker-image", "--script-dir"))
    ]
    said = subprocess.run(
        [
            Path(python).parent / "xpk",
            *words,
            "--dry-run",
            "--quiet",
            "--skip-validation",
            "--docker-image=image",
            "--output-manifest-file=jobset.yaml",
        ],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert said.returncode == 0, said.stdout + said.stderr
    jobset = yaml.safe_load((tmp_path / "jobset.yaml").read_text())["spec"]
    job = jobset["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert jobset["failurePolicy"]["maxRestarts"] == 50 and job["parallelism"] == 4
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["operator"] == "NotIn"
    assert {75, 143} <= set(rule["onExitCodes"]["values"]) and not {1, 2} & set(
        rule["onExitCodes"]["values"]
    )
    assert pod["terminationGracePeriodSeconds"] == 120
    assert "end_to_end/tpu/d24_speedrun.sh" in pod["containers"][0]["command"][-1]

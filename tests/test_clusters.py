"""The templates of end_to_end/clusters: the SLURM script with a stand-in srun, the JobSet by its API."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import test_cloud
import test_multihost as multihost
import yaml

from MaxNano.compile import topologies

ROOT = Path(__file__).parents[1]
SLURM = ROOT / "end_to_end/clusters/slurm.sbatch"
JOBSET = yaml.safe_load((ROOT / "end_to_end/clusters/jobset.yaml").read_text())
# Options of sbatch with a value, of https://slurm.schedmd.com/sbatch.html
OPTIONS = "job-name nodes ntasks-per-node gpus-per-node cpus-per-task time signal open-mode output"

place, one = multihost.place, multihost.one  # fixtures
leave_none_behind = multihost.leave_none_behind

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the scripts are for bash")


# ---- SLURM --------------------------------------------------------------------------------------


def start_job(folder, python, *words, job=4711):
    """The batch script as slurmd starts it; `python` is the text of a stand-in interpreter."""
    interpreter = folder / "python"
    interpreter.write_text(f"#!/bin/bash\n{python}\n")
    interpreter.chmod(0o755)
    spool = shutil.copy(SLURM, folder / "slurm_script")  # slurmd runs a copy
    env = multihost.clean(
        PATH=f"{ROOT}/tests/fake_slurm:{os.environ['PATH']}",
        FAKE_SLURM=str(folder),
        SLURM_SUBMIT_DIR=str(ROOT),
        SLURM_JOB_ID=str(job),
        MAXNANO_PYTHON=str(interpreter),
    )
    process = subprocess.Popen(
        ["bash", spool, *words],
        cwd=folder,
        env=env,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    multihost.STARTED.append(process)
    return process


def requeued(folder):
    return (folder / "scontrol").read_text() if (folder / "scontrol").exists() else ""


def test_sbatch_knows_the_options_of_the_script():
    lines = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", SLURM.read_text(), re.MULTILINE)
    assert len(lines) == SLURM.read_text().count("#SBATCH")
    values = dict(lines)
    assert values.pop("requeue") == "" and set(values) <= set(OPTIONS.split())
    assert values["ntasks-per-node"] == values["gpus-per-node"], "one process per GPU"
    assert re.fullmatch(r"USR1@\d+", values["signal"]), "to the steps, not to the batch script"


@pytest.mark.parametrize(
    "statuses,status", [((0, 0), 0), ((75, 75), 75), ((0, 2), 2), ((1, 75), 75)]
)
def test_only_a_job_that_saved_is_queued_again(tmp_path, statuses, status):
    show = (
        'echo "$SLURM_PROCID of $SLURM_NTASKS at $SLURM_STEP_NODELIST, job $SLURM_JOB_ID: $PWD $*"'
    )
    codes = f"codes=({statuses[0]} {statuses[1]}); exit ${{codes[$SLURM_PROCID]}}"
    job = start_job(tmp_path, f"{show}\n{codes}", "model=d24", "run_name=a b")
    out, err = job.communicate()
    assert job.returncode == status, err
    words = f"{ROOT} MaxNano/train.py configs/base.yml model=d24 run_name=a b"
    assert sorted(out.splitlines()) == [
        f"{task} of 2 at localhost, job 4711: {words}" for task in (0, 1)
    ]
    assert requeued(tmp_path) == ("requeue 4711\n" if status == 75 else "")


def free_job():
    """A job number whose coordinator port, which JAX derives from it, is free."""
    for job in range(os.getpid() % 4096, 10_000):
        try:
            socket.create_server(("", 65536 - 4096 + job % 4096)).close()
        except OSError:
            continue
        return job


@pytest.mark.slow
def test_two_tasks_join_save_at_the_signal_and_resume(place, one, tmp_path):
    words = multihost.words_of(place, "slurm", "checkpoint_interval_steps=0", *multihost.TWO)[1:]
    slow = f'exec {sys.executable} {ROOT}/tests/slow_train.py 1 "${{@:2}}"'
    job = start_job(tmp_path, slow, *words, job=free_job())
    multihost.wait_for_step(place, "slurm", 1, [job])
    for task in ("task0", "task1"):  # as --signal=USR1@120 does
        os.kill(int((tmp_path / task).read_text()), signal.SIGUSR1)
    out, err = job.communicate()
    assert job.returncode == 75, out + err
    assert "4 x cpu, data 4" in out and requeued(tmp_path).startswith("requeue ")
    (step,) = multihost.steps_saved(place, "slurm")

    job = start_job(tmp_path, f'exec {sys.executable} "$@"', *words, job=free_job())
    out, err = job.communicate()
    assert job.returncode == 0, out + err
    assert f"from step {step}" in out
    multihost.assert_same_losses(place, "slurm")


# ---- JobSet -------------------------------------------------------------------------------------

# The fields used, of https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2 and
# https://kubernetes.io/docs/reference/kubernetes-api/workload-resources: None is any value.
POD = {
    "restartPolicy": str,
    "terminationGracePeriodSeconds": int,
    "serviceAccountName": str,
    "nodeSelector": None,
    "containers": [
        {
            "name": str,
            "image": str,
            "command": [str],
            "env": [{"name": str, "value": str}],
            "resources": {"limits": None},
            "ports": [{"containerPort": int}],
        }
    ],
}
JOB = {
    "parallelism": int,
    "completions": int,
    "completionMode": str,
    "backoffLimit": int,
    "podFailurePolicy": {
        "rules": [
            {
                "action": str,
                "onExitCodes": {"containerName": str, "operator": str, "values": [int]},
            }
        ]
    },
    "template": {"spec": POD},
}
FIELDS = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str, "annotations": None},
    "spec": {
        "failurePolicy": {
            "maxRestarts": int,
            "rules": [{"name": str, "action": str, "onJobFailureReasons": [str]}],
        },
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
    },
}


def differences(value, fields, path="JobSet"):
    """Where a value has other fields or types than `fields`."""
    if isinstance(fields, dict):
        for name, part in value.items():
            if name not in fields:
                yield f"{path}.{name} is unknown"
            else:
                yield from differences(part, fields[name], f"{path}.{name}")
    elif isinstance(fields, list):
        for index, part in enumerate(value):
            yield from differences(part, fields[0], f"{path}[{index}]")
    elif fields is not None and type(value) is not fields:
        yield f"{path} is {value!r}"


def parts_of_jobset():
    (slices,) = JOBSET["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    return slices, job, pod, container


def test_the_jobset_has_known_fields():
    assert list(differences(JOBSET, FIELDS)) == []
    assert list(differences({"kind": 1, "sepc": {}}, FIELDS)) == [
        "JobSet.kind is 1",
        "JobSet.sepc is unknown",
    ]
    assert (JOBSET["apiVersion"], JOBSET["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")


def test_the_jobset_is_a_whole_slice():
    slices, job, pod, container = parts_of_jobset()
    env = {row["name"]: row["value"] for row in container["env"]}
    chips = int(env["CHIPS"])
    _, shape = topologies.slice_shape(f"v6e-{chips // slices['replicas']}")
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "x".join(map(str, shape))
    hosts, limits = chips // slices["replicas"] // 4, container["resources"]["limits"]
    assert job["parallelism"] == job["completions"] == hosts and limits == {"google.com/tpu": "4"}
    assert job["backoffLimit"] == 0, "the JobSet restarts all pods together"


def test_the_jobset_runs_a_script_and_ends_at_mistakes():
    _, job, pod, container = parts_of_jobset()
    bash, script = container["command"]
    env = {row["name"]: row["value"] for row in container["env"]}
    assert bash == "bash" and set(env) <= set(test_cloud.knobs_of(ROOT / script))
    assert env["OUTPUT"].startswith("gs://") and env["TOKENIZER_PATH"].startswith("gs://")
    assert env["STAGES"] == test_cloud.read("v6e-16")["envs"]["STAGES"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [1, 2]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    (mistakes,) = JOBSET["spec"]["failurePolicy"]["rules"]
    assert mistakes["action"] == "FailJobSet"
    assert mistakes["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert pod["restartPolicy"] == "Never", "podFailurePolicy needs it"


def violations(value, schema, path="JobSet"):
    """Where a value violates a schema of a custom resource, which knows no other fields."""
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
    if schema.get("x-kubernetes-int-or-string"):
        kinds = {None: (int, str)}
    if not isinstance(value, kinds.get(schema.get("type"), object)):
        yield f"{path} is {value!r}"
    elif isinstance(value, dict) and path != "JobSet.metadata":
        fields, other = schema.get("properties", {}), schema.get("additionalProperties")
        for name in schema.get("required", []):
            if name not in value:
                yield f"{path}.{name} is missing"
        for name, part in value.items():
            if name in fields or other:
                yield from violations(part, fields.get(name, other), f"{path}.{name}")
            else:
                yield f"{path}.{name} is unknown"
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from violations(part, schema["items"], f"{path}[{index}]")
    if value not in schema.get("enum", [value]):
        yield f"{path} is {value!r}"


def test_the_api_takes_the_jobset():
    """JOBSET_CRD: config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml of kubernetes-sigs/jobset."""
    path = Path(test_cloud.program_of("JOBSET_CRD", "the definition of the JobSet API"))
    versions = yaml.safe_load(path.read_text())["spec"]["versions"]
    (schema,) = [
        version["schema"]["openAPIV3Schema"]
        for version in versions
        if version["name"] == "v1alpha2"
    ]
    assert list(violations(JOBSET, schema)) == []
    wrong = {
        "apiVersion": "a",
        "kind": "b",
        "spec": {"failurePolicy": {"maxRestarts": "x", "rule": 1}},
    }
    assert list(violations(wrong, schema)) == [
        "JobSet.spec.failurePolicy.maxRestarts is 'x'",
        "JobSet.spec.failurePolicy.rule is unknown",
    ]

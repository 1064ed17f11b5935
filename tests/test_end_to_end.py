"""The scripts of end_to_end, run for real: on the CPU, a tiny model, a stand-in gcloud."""

import contextlib
import csv
import functools
import hashlib
import http.server
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import object_store
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from ports import free_port

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "end_to_end"
WORDS = "the quick brown fox jumps over a lazy dog while seven wizards mix strange and bright potions".split()
STEPS = 300  # long enough to be stopped in the middle; the same for all that are, so that the step is compiled once
EXTRA = (
    "emb_dim=32 head_dim=16 num_query_heads=2 vocab_size=300 max_target_length=32 short_window_multiple=16"
    " global_batch_tokens=256 data_readers=2 packing_buffer_documents=20 num_cpu_devices=1 eval_tokens=1024"
    " eval_interval=0 sample_interval=0 tensorboard=false warmup_steps=2 checkpoint_interval_steps=75 embedding_lr=30"
    " log_interval=50 muon_iterations=1"
)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the scripts are for bash")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with documents, where all runs go."""
    folder = tmp_path_factory.mktemp("end to end")  # a blank in the path, as users have it
    (folder / "text").mkdir()
    for shard in range(3):
        texts = [
            " ".join(WORDS[(i * j + shard) % len(WORDS)] for j in range(3 + i % 60))
            for i in range(300)
        ]
        pq.write_table(
            pa.table({"text": texts}), folder / "text" / f"{shard}.parquet", row_group_size=50
        )
    return folder


@pytest.fixture(scope="module")
def settings(place):
    """The environment of a script."""
    kept = {
        key: value for key, value in os.environ.items() if key in ("PATH", "HOME", "TMPDIR", "LANG")
    }
    return {
        **kept,
        "PATH": f"{ROOT}/tests/fake_gcloud:{Path(sys.executable).parent}:{kept['PATH']}",
        **{name: os.environ[name] for name in ("XLA_FLAGS", "JAX_TRACEBACK_IN_LOCATIONS_LIMIT")},
        "DEVICE": "cpu",
        "CHIPS": "1",
        "MODEL": "d1",
        "NUM_ITERATIONS": str(STEPS),
        "DATASET_PATH": f"{place}/text",
        "TOKENIZER_PATH": f"{place}/tokenizer",
        "OUTPUT": f"{place}/runs",
        "EXTRA": f"{EXTRA} jax_cache_dir={os.environ['MAXNANO_TEST_CACHE']}",
        "CORE_BUNDLE": str(ROOT / "tests/golden/core_small.zip"),
        "MIN_DISK_GB": "0",
        "RESTART_SECONDS": "0",
        "MAXNANO_PYTHON": sys.executable,
    }


def start(script, settings, *arguments, **more):
    # Tests that run in the background ignore Ctrl-C, and bash cannot change what it inherits.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return subprocess.Popen(
            ["bash", str(SCRIPTS / script), *arguments],
            env={**settings, **more},
            cwd="/",
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)


def power_off(process):
    """Kills a script with everything that it started here, so that no late connection follows.

    `timeout` has a process group of its own, so the whole session is killed, and twice: a process
    may start another one meanwhile.
    """
    for _ in range(2):
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(int(folder.name)) == process.pid:
                    os.kill(int(folder.name), signal.SIGKILL)
    process.communicate()


def run(script, settings, *arguments, status=0, **more):
    """What the script prints on both streams."""
    process = start(script, settings, *arguments, **more)
    out, _ = process.communicate(timeout=800)
    assert process.returncode == status, out
    return out


def steps_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if "event" not in row]


# ---- The scripts as such


@pytest.mark.slow
def test_shellcheck_finds_nothing():
    shellcheck = shutil.which(
        "shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    assert shellcheck, "shellcheck is missing: EXTRAS=dev bash setup.sh installs it"
    found = [ROOT / "setup.sh", ROOT / "tests/run.sh", ROOT / ".ci/run", *SCRIPTS.glob("**/*.sh")]
    found += [*SCRIPTS.glob("**/*.sbatch"), *(ROOT / "tests/fake_slurm").iterdir()]
    assert len(found) > 10
    run = subprocess.run(
        [shellcheck, "-x", *found], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*/*.sh")), ids=lambda path: path.name)
def test_help_lists_every_knob_that_is_read(script):
    text = script.read_text()
    if "parse_arguments" not in text or script.name == "cloud.sh":
        return  # no knobs of its own
    listed = subprocess.run(
        ["bash", script, "--help"], cwd="/", capture_output=True, text=True, check=True
    ).stdout
    for library in re.findall(r"^source (\S+)", text, re.MULTILINE):
        text += (ROOT / library).read_text()
    names = set(
        subprocess.run(
            ["bash", script, "--knobs"], capture_output=True, text=True, check=True
        ).stdout.split()
    )
    assert {name for name in names if not re.search(rf"^  {name}=", listed, re.MULTILINE)} == set()
    uses = set(re.findall(r"\$\{?([A-Z][A-Z_]+)", script.read_text()))
    assert uses - names <= {"BASH_SOURCE", "SECONDS", "HOME", "PATH", "PWD", "TMPDIR"}


def test_a_wrong_argument_is_one_line(settings):
    out = run("tpu/d24_speedrun.sh", settings, "--dryrun", status=2)
    assert out.splitlines() == ["d24_speedrun.sh: unknown argument --dryrun: see --help"]


# ---- Preflight


@pytest.mark.slow
def test_the_preflight_says_what_is_missing_and_trains_nothing(settings, place):
    out = run("tpu/d24_speedrun.sh", settings, "--dry-run", OUTPUT=f"{place}/dry")
    assert re.findall(r"^(ok|FAIL) +(\w+)", out, re.MULTILINE) == [
        ("ok", name)
        for name in (
            "disk",
            "python",
            "devices",
            "data",
            "tokenizer",
            "core",
            "chat",
            "output",
            "run",
        )
    ]
    assert re.search(rf"horizon +{STEPS} steps", out), "train.py's plan"
    assert out.splitlines()[-1] == "ready; nothing was trained"
    assert not (place / "dry").exists() and not (place / "tokenizer").exists()

    more = {
        "CHIPS": "8",
        "DATASET_PATH": f"{place}/nothing",
        "MIN_DISK_GB": "1000000000",
        "CHAT_DATA": f"{place}/nothing",
    }
    out = run(
        "tpu/d24_speedrun.sh",
        settings,
        "--dry-run",
        status=2,
        EXTRA=f"{settings['EXTRA']} dtyp=1",
        **more,
    )
    assert re.findall(r"^FAIL +(\w+)", out, re.MULTILINE) == [
        "disk",
        "devices",
        "data",
        "tokenizer",
        "core",
        "chat",
        "run",
    ]
    assert "JAX finds 1 cpu, but CHIPS=8" in out


def test_without_data_one_line_says_what_is_needed(settings, place):
    out = run("tpu/d24_speedrun.sh", settings, status=2, DATASET_PATH=f"{place}/nothing")
    assert "put at least two parquet shards" in out.splitlines()[-1]
    assert f"DATASET_PATH={place}/nothing" in out.splitlines()[-1]


def test_another_device_than_asked_for_is_refused(settings):
    """A machine whose driver is broken must not train on its CPU."""
    out = run("gpu/d12_speedrun.sh", settings, status=1, DEVICE="gpu", JAX_PLATFORMS="cpu")
    assert "JAX finds 1 cpu and no gpu" in out.splitlines()[-1]


# ---- Training


def children(pid):
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for_step(folder, step, process):
    path = folder / "metrics.jsonl"
    for _ in range(10000):
        if process.poll() is not None:
            break
        if path.exists() and f'{{"step": {step},' in path.read_text():
            return
        time.sleep(0.01)
    raise AssertionError(f"never saw step {step}: {process.communicate()}")


@pytest.mark.slow
def test_speedrun_starts_a_preempted_training_again_by_itself_and_skips_what_is_done(
    settings, place
):
    folder = place / f"runs/d1_{STEPS}steps"
    settings = {**settings, "STAGES": "setup data tokenizer training result"}
    process = start("gpu/d12_speedrun.sh", settings)
    wait_for_step(folder, 5, process)
    (trainer,) = children(process.pid)
    os.kill(trainer, signal.SIGTERM)
    out, _ = process.communicate(timeout=250)
    assert process.returncode == 0, out
    assert "preempted after saving; restarting" in out and re.search(r"Resuming .+ from step", out)
    assert steps_of(folder) == list(range(STEPS))
    assert re.search(rf"^steps +{STEPS} of {STEPS}", out, re.MULTILINE)

    again = run("gpu/d12_speedrun.sh", settings, PRICE_PER_CHIP_HOUR="0.5")
    assert "is finished" in again and "wrote" not in again, (
        "neither tokenizer nor training once more"
    )
    assert re.search(r"^price +1 chips x \d+\.\d\d h x 0.5 USD = ", again, re.MULTILINE)

    # With another value, other text or another tokenizer the results are refused.
    out = run("gpu/d12_speedrun.sh", settings, status=2, EXTRA=f"{settings['EXTRA']} matrix_lr=0.5")
    assert "matrix_lr=0.5 instead of 0.02" in out.splitlines()[-1] and "tokens" not in out
    other = place / "other text"
    shutil.copytree(place / "text", other)
    (other / "0.parquet").write_bytes((place / "text/1.parquet").read_bytes())
    out = run("gpu/d12_speedrun.sh", settings, status=2, DATASET_PATH=str(other))
    assert "was trained on other text" in out.splitlines()[-1], out
    assert "0.parquet has changed" in out.splitlines()[-1], out


class Hub(http.server.SimpleHTTPRequestHandler):
    """A hub whose data set `us/text` is the folder text; and whatever else is there, by its path."""

    def end_headers(self):
        self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("ETag", '"1"')
        super().end_headers()

    def do_HEAD(self):  # noqa: N802
        self.path = self.path.replace("/datasets/us/text/resolve/main/", "/text/")
        super().do_HEAD()

    def do_GET(self):  # noqa: N802
        if self.path.startswith("/api/datasets/us/text/tree/main"):
            files = sorted(Path(self.directory, "text").iterdir())
            listed = [
                {
                    "type": "file",
                    "path": path.name,
                    "size": path.stat().st_size,
                    "oid": "0" * 40,
                    "lfs": {
                        "oid": hashlib.sha256(path.read_bytes()).hexdigest(),
                        "size": path.stat().st_size,
                        "pointerSize": 130,
                    },
                }
                for path in files
            ]
            content = json.dumps(listed).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        else:
            self.path = self.path.replace("/datasets/us/text/resolve/main/", "/text/")
            super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(place, tmp_path):
    """The address of a hub with the documents of `place` and a CORE bundle of two tasks."""
    shutil.copytree(place / "text", tmp_path / "text")
    full = zipfile.ZipFile(ROOT / "tests/golden/core_small.zip")
    with full, zipfile.ZipFile(tmp_path / "core.zip", "w") as few:
        for name in full.namelist():
            content = full.read(name)
            if name.endswith("core.yaml"):
                tasks = [
                    t
                    for t in yaml.safe_load(content)["icl_tasks"]
                    if t["label"] in ("copa", "winograd")
                ]
                content = yaml.safe_dump({"icl_tasks": tasks})
            few.writestr(name, content)
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Hub, directory=str(tmp_path))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


RL_WORDS = (
    "steps=2 eval_interval=2 rl_task=SimpleSpelling/train rl_problems=2 rl_samples=2 rl_row_tokens=32 max_new_tokens=4"
    " rl_eval_task=SimpleSpelling/test rl_eval_problems=2 rl_eval_samples=1"
)


def tuning_words(folder):
    """For four steps of fine-tuning on conversations that are put into `folder`, and two problems
    of a chat task.
    """
    said = [
        [{"role": "user", "content": a}, {"role": "assistant", "content": b}]
        for a in WORDS
        for b in WORDS[:4]
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps(messages) + "\n" for messages in said))
    return (
        f"chat_train_mixture=[[json:{folder}/chat.jsonl,1]] chat_validation_mixture=[[json:{folder}/chat.jsonl,1]]"
        " chat_interval=0 eval_interval=4 eval_tokens=256 chat_tasks=[SimpleSpelling/test] chat_max_per_task=2 steps=4"
        " max_new_tokens=4 chat_slots=2"
    )


def from_hub(settings, hub, folder):
    """What makes a script download its text and CORE's bundle from the hub into `folder`, and
    fine-tune on conversations there.
    """
    core = f"core_bundle_url={hub}/core.zip core_max_per_task=2 sample_tokens=2"
    return {
        "DATASET_PATH": "",
        "DATASET_NAME": "us/text",
        "DOWNLOAD_SHARDS": "2",
        "DOWNLOAD_PATH": f"{folder}/downloads",
        "CORE_BUNDLE": "",
        "TOKENIZER_PATH": f"{folder}/another tokenizer",
        "CHAT_DATA": str(folder),
        "SFT_EXTRA": tuning_words(folder),
        "EXTRA": f"{settings['EXTRA']} hub_url={hub} {core}",
    }


@pytest.mark.slow
@pytest.mark.parametrize("is_repeated", [False, pytest.param(True, marks=pytest.mark.long)])
def test_speedrun_downloads_its_text_and_goes_all_the_way(
    settings, place, hub, tmp_path, is_repeated
):
    """The whole of d24_speedrun.sh; started again it asks the hub for nothing and does nothing
    twice.
    """
    run_name, base_steps = f"downloaded{is_repeated:d}", 40  # nothing stops it
    more = from_hub(settings, hub, tmp_path) | {
        "RUN_NAME": run_name,
        "NUM_ITERATIONS": str(base_steps),
        "RL": "1",
        "RL_EXTRA": RL_WORDS,
    }
    extra = more.pop("EXTRA")
    out = run("tpu/d24_speedrun.sh", {**settings, **more}, EXTRA=extra)
    assert re.findall(r"^==== \d+/10 (\w+)", out, re.MULTILINE) == [
        "setup",
        "data",
        "tokenizer",
        "training",
        "evaluation",
        "sft",
        "chat",
        "rl",
        "report",
        "result",
    ]
    assert "3 of 3 files" in out
    found = json.loads((place / f"runs/{run_name}/evals/step_{base_steps:06}.json").read_text())[
        "evals"
    ]
    assert {"bpb train", "bpb validation", "core", "core copa", "core winograd", "samples"} == set(
        found
    )
    assert f"CORE           {found['core']['values']['core']:.4f}" in out.splitlines()
    for stage, start in (
        ("sft", f"{base_steps} of {place}/runs/{run_name}"),
        ("rl", f"4 of {place}/runs/{run_name}_sft"),
    ):
        assert f"Starting from step {start}\n" in out
        folder = place / f"runs/{run_name}_{stage}"
        steps = steps_of(folder)
        assert (
            steps == list(range(len(steps)))
            and (folder / f"checkpoints/{len(steps)}/MANIFEST.json").exists()
        )
        asked = json.loads((folder / f"evals/step_{len(steps):06}.json").read_text())["evals"]
        assert asked["chat SimpleSpelling/test"]["values"]["problems"] == 2
    assert "2 answers to each of 2 problems of SimpleSpelling/train" in out
    assert f"Wrote {place}/runs/{run_name}_rl/report.html" in out
    if not is_repeated:
        return

    # The last line is a command that chats with the last run, by its name alone.
    assert (
        out.splitlines()[-2] == "Chat with it:"
        and " run_name=downloaded_rl " in out.splitlines()[-1]
    )
    chat = f'{out.splitlines()[-1]} prompt="the quick" max_new_tokens=4 temperature=0'
    said = subprocess.run(
        ["bash", "-c", chat], env=settings, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert said.returncode == 0 and said.stdout.strip(), said.stderr

    extra = extra.replace(f"hub_url={hub}", "hub_url=http://127.0.0.1:9")
    more |= {"EXTRA": extra, "STAGES": "data evaluation sft rl", "EVALS": "core"}
    again = run("tpu/d24_speedrun.sh", {**settings, **more})
    assert (
        "2 of 2 CORE tasks are already done" in again
        and "SimpleSpelling/test is already done" in again
    )
    assert again.count("is finished") == 2 and "loss" not in again

    shutil.rmtree(place / f"runs/{run_name}_rl")
    out = run("tpu/d24_speedrun.sh", {**settings, **more}, STAGES="report")
    assert f"Wrote {place}/runs/{run_name}_sft/report.html" in out, "of the last run that there is"


@pytest.mark.slow
def test_smoke_then_resume_after_preemption(settings, place):
    """The second script compares with the first one's run, which nothing interrupted."""
    out = run("tpu/d12_smoke.sh", settings, RUN_NAME="whole")
    assert f"sound: {STEPS} steps" in out
    out = run(
        "tpu/resume_after_preemption.sh",
        settings,
        UNBROKEN="whole",
        STOP_AT_STEP="6",
        GRACE_SECONDS="200",
    )
    assert "stopped with status 75" in out
    assert "every loss equals that of whole bit for bit" in out

    # What it would say of a run that began anew, or that lost a step.
    metrics = place / "runs/d12_preempted/metrics.jsonl"
    rows = metrics.read_text().splitlines(keepends=True)
    words = [
        "configs/base.yml",
        "model=d1",
        f"steps={STEPS}",
        *EXTRA.split(),
        f"base_output_directory={place}/runs",
    ]
    command = [
        sys.executable,
        "end_to_end/results.py",
        "resumed",
        f"--before={metrics.parent}/metrics_before.jsonl",
    ]
    for lines, reason in ((rows[:3] + rows[4:], "have changed"), (rows[:-2] + rows[-1:], "once")):
        metrics.write_text("".join(lines))
        check = [*command, *words, "run_name=d12_preempted"]
        result = subprocess.run(check, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 1 and reason in result.stderr


@pytest.mark.slow
def test_miniseries_ends_with_a_table(settings, place):
    more = {"DEPTHS": "1 2", "RATIO": "0.2", "NUM_ITERATIONS": ""}
    out = run("tpu/miniseries.sh", settings, **more)
    assert "results of " in out[out.rindex("====") :]
    with (place / "runs/miniseries/results.csv").open() as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert {name: row["layers"] for name, row in rows.items()} == {"d1": "1", "d2": "2"}
    for row in rows.values():
        assert float(row["tokens"]) / float(row["scaling"]) == pytest.approx(0.2, rel=0.05)
        assert float(row["usd"]) > 0 and float(row["flops"]) > 0 and float(row["loss"]) < 6


# ---- Renting


class Cloud:
    """A stand-in Google Cloud for one test."""

    def __init__(self, folder, settings, store=None):
        """store: an object_store.Store that gs:// is; without one it is the folder `buckets`, which
        is faster.
        """
        self.folder = folder
        self.settings = {**settings, "FAKE_GCLOUD": str(folder), "BUCKET": "gs://ours"}
        if store:
            self.settings |= store.env
            for file in Path(settings["DATASET_PATH"]).iterdir():
                store.put(f"text/{file.name}", file.read_bytes())
        else:
            shutil.copytree(settings["DATASET_PATH"], folder / "buckets/ours/text")
        self.settings["DATASET_PATH"] = "gs://anonymous@ours/text" if store else "gs://ours/text"
        self.settings |= {"POLL_SECONDS": "0.1", "ZONE_WAIT_SECONDS": "1000", "SAVE_SECONDS": "60"}
        self.settings["STAGES"] = "setup data tokenizer training result"
        for name in ("OUTPUT", "TOKENIZER_PATH"):  # launch.sh puts them into the bucket
            del self.settings[name]

    def play(self, zones, location="US-EAST5", **more):
        (self.folder / "scenario.json").write_text(
            json.dumps({"buckets": {"ours": location}, "zones": zones, **more})
        )
        self.settings["ZONES"] = " ".join(zones)

    def calls(self, command):
        text = (self.folder / "calls.jsonl").read_text()
        lines = text[: text.rindex("\n") + 1].splitlines()  # the last one may be half written
        return [call for call in map(json.loads, lines) if call["command"].endswith(command)]

    def left(self):
        """Machines and requests that still cost money."""
        world = self.folder / "world.json"
        return list(json.loads(world.read_text())["machines"]) if world.exists() else []

    def launch(self, *arguments, status=0, **more):
        return run("tpu/launch.sh", self.settings, *arguments, status=status, **more)

    def gcloud(self, *words):
        """What the stand-in does, for another one than launch.sh."""
        environment = {"PATH": self.settings["PATH"], "FAKE_GCLOUD": str(self.folder)}
        command = [ROOT / "tests/fake_gcloud/gcloud", *words, "--quiet"]
        return subprocess.run(
            command, env=environment, check=True, capture_output=True, text=True
        ).stdout

    def rent(self, name, zone):
        create = ("compute", "tpus", "queued-resources", "create", name, f"--zone={zone}")
        self.gcloud(
            *create, "--node-id=x", "--accelerator-type=v6e-8", "--runtime-version=v2-alpha-tpuv6e"
        )

    def python(self, text):
        """An interpreter for the machine that does something else than to train."""
        path = self.folder / "python"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        self.settings |= {"MAXNANO_PYTHON": str(path), "STAGES": "setup training"}


def switch_off(folder):
    """Ends the machines that a test has left running."""
    for pid in folder.glob("machines/*/*/*/pid"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(pid.read_text()), signal.SIGKILL)


@pytest.fixture
def cloud(tmp_path, settings):
    yield Cloud(tmp_path, settings)
    switch_off(tmp_path)


@pytest.fixture
def cloud_with_bucket(tmp_path, settings):
    """The cloud, and the object store that its gs:// is."""
    with object_store.serve() as store:
        yield Cloud(tmp_path, settings, store), store
        switch_off(tmp_path)


@pytest.fixture
def quick(cloud):
    """A cloud whose machines have next to nothing to do."""
    cloud.settings["STAGES"] = "setup"
    return cloud


ACTIVE = {"states": ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]}
ON_ITS_WAY = {"states": ["PROVISIONING", "ACTIVE"]}
FULL = {"states": ["WAITING_FOR_RESOURCES"]}
CROWDED = {"refuse": "There is no more capacity in the zone"}


@pytest.mark.slow
def test_launch_trains_on_through_a_preemption_and_leaves_nothing(cloud):
    """The first zone is full, the second one's machine is preempted, the third one's ends the run."""
    cloud.play(
        {
            "us-east5-a": [FULL],
            "us-east5-b": [{**ON_ITS_WAY, "preempt": {"step": 75, "after": 0}}, CROWDED],
            "us-east5-c": [ON_ITS_WAY],
        }
    )
    stages = "setup data tokenizer training result"  # the others have a test of their own
    out = cloud.launch(ZONE_WAIT_SECONDS="0", POLL_SECONDS="2", STAGES=stages)
    run_folder = cloud.folder / f"buckets/ours/maxnano-d24/runs/d1_{STEPS}steps"
    assert steps_of(run_folder) == list(range(STEPS))
    assert (run_folder / f"checkpoints/{STEPS}/MANIFEST.json").exists()
    assert "no machine after 0 s" in out and "the machine is lost" in out
    assert re.search(r"Resuming .+ from step", out), (
        "the second machine took up the first one's checkpoint"
    )
    assert f"steps          {STEPS} of {STEPS}" in out, "the machine's own words are seen here"
    assert re.search(r"machines: 2, 1 chips x 0\.\d\d h x 0\.540137 USD = 0\.\d\d USD", out)

    assert cloud.left() == []
    create = cloud.calls("create")[0]
    assert create["given"] == ["maxnano-d24"]
    flags = create["flags"]
    assert (flags["zone"], flags["accelerator-type"], flags["node-id"]) == (
        "us-east5-a",
        "v6e-8",
        "maxnano-d24",
    )
    assert "spot" in flags and "valid-until-duration" in flags, (
        "a request that nobody waits for any more expires"
    )
    every = cloud.calls("")
    logs = [call["command"] == "storage cp" and call["given"][0].endswith("/log") for call in every]
    copied = max(i for i, is_log in enumerate(logs) if is_log)
    deleted = max(i for i, call in enumerate(every) if call["command"].endswith("delete"))
    assert copied < deleted, "what is on the machine is copied out before it is deleted"
    (log,) = (cloud.folder / "buckets/ours/maxnano-d24/logs").iterdir()
    assert "==== done" in log.read_text()


def losses_of(metrics):
    rows = [json.loads(line) for line in metrics.splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "event" not in row]


@pytest.mark.long
@pytest.mark.parametrize("preemptions", [2, 5])
def test_preemptions_at_random_leave_the_losses_of_an_unbroken_run(
    cloud_with_bucket, place, settings, preemptions
):
    """The first machine dies in set-up, the others in training; of one or two the request stays
    ACTIVE.

    Through launch.sh, d24_speedrun.sh and gcsfs into a loopback object store. MAXNANO_SEED repeats
    a failure. Five preemptions take minutes and run with -m long.
    """
    cloud, store = cloud_with_bucket
    seed = int(os.environ.get("MAXNANO_SEED") or time.time())
    draw = random.Random(seed)
    steps = [None, *sorted(draw.sample(range(30, 211, 30), preemptions - 1))]
    vanish = draw.sample([True, True, False, False, False], preemptions)
    moments = [
        {"preempt": {"step": step, "after": 0.3 * draw.random(), "vanish": gone}}
        for step, gone in zip(steps, vanish, strict=True)
    ]
    print(f"MAXNANO_SEED={seed}", moments)
    more = {
        "EXTRA": settings["EXTRA"].replace(
            "checkpoint_interval_steps=75", "checkpoint_interval_steps=30"
        )
    }
    run(
        "tpu/d24_speedrun.sh",
        {**settings, **more},
        STAGES="tokenizer training",
        RUN_NAME="unbroken",
    )

    cloud.play({"us-east5-a": [*({**ON_ITS_WAY, **moment} for moment in moments), ON_ITS_WAY]})
    for file in (place / "tokenizer").iterdir():
        store.put(f"maxnano-d24/tokenizer/{file.name}", file.read_bytes())
    out = cloud.launch(**more, STAGES="training", POLL_SECONDS="0.3")
    assert out.count("the machine is lost") == preemptions
    assert f"machines: {preemptions + 1}," in out
    found = losses_of(store.objects()[f"maxnano-d24/runs/d1_{STEPS}steps/metrics.jsonl"].decode())
    assert [step for step, _ in found] == list(range(STEPS))
    assert found == losses_of((place / "runs/unbroken/metrics.jsonl").read_text())
    assert len(re.findall(r"Resuming .+ from step", out)) >= (preemptions + 1) // 2, (
        "preempted in the middle"
    )
    assert cloud.left() == [] and not list(cloud.folder.glob("machines/*/*"))


@pytest.mark.parametrize(
    ("location", "asked"),
    [
        ("US-EAST5", ["us-east5-b"]),
        ("US", ["us-east5-b", "us-central1-b"]),
        ("NAM4", ["us-central1-b"]),
        ("EUROPE-WEST4", ["europe-west4-a"]),
        ("EU", ["europe-west4-a"]),
        ("ASIA-NORTHEAST1", []),
    ],
)
def test_only_zones_near_the_bucket_are_asked(quick, location, asked):
    quick.play(
        {zone: [ACTIVE] for zone in ("europe-west4-a", "us-east5-b", "us-central1-b")}, location
    )
    out = quick.launch("--dry-run", status=0 if asked else 2)
    if asked:
        assert f"zones {' '.join(asked)}\n" in out
        assert "8 chips x 1.00 h x 0.540137 USD = 4.32 USD per hour" in quick.launch(
            "--dry-run", CHIPS="8"
        )
    else:
        (line,) = out.splitlines()
        assert "ASIA-NORTHEAST1" in line and "ALLOW_OTHER_REGION" in line
    assert quick.calls("create") == []


def test_bucket_and_text_are_needed_and_must_be_there(quick):
    quick.play({"us-east5-a": [ACTIVE]})
    assert "BUCKET is required" in quick.launch(status=2, BUCKET="")
    assert "is not accessible" in quick.launch(status=2, BUCKET="theirs").splitlines()[-1]
    assert "DATASET_PATH is required" in quick.launch(status=2, DATASET_PATH="").splitlines()[-1]
    assert (
        "cannot be listed" in quick.launch(status=2, DATASET_PATH="gs://ours/tex").splitlines()[-1]
    )
    assert quick.calls("create") == []


QUOTA = (
    "HttpError 429: Quota limit 'TPUV6EPreemptiblePerProjectPerZoneForTPUAPI' has been exceeded. "
    "Limit: {} in zone {}."
)
INTERNAL = {
    "states": ["PROVISIONING", "SUSPENDING", "FAILED"],
    "reason": "an internal error has occurred",
}


def test_without_quota_it_stops_at_once_and_says_which_and_where_to_ask(quick):
    """Refused at once in one zone, FAILED with the same text in the other: neither is a matter of
    waiting.
    """
    quick.play(
        {
            "us-east5-a": [
                {
                    "refuse": f"RESOURCE_EXHAUSTED: {QUOTA.format(0, 'us-east5-a')}\n- '@type': rpc.Help"
                }
            ],
            "us-east5-b": [
                {"states": ["ACCEPTED", "FAILED"], "reason": QUOTA.format(0, "us-east5-b")}
            ],
        }
    )
    out = quick.launch(status=2)
    assert (
        "us-east5-a refuses: ERROR: (gcloud) RESOURCE_EXHAUSTED: HttpError 429: Quota limit" in out
    )
    assert "- '@type': rpc.Help\n" in out, "the whole of gcloud's error"
    assert f"us-east5-b: FAILED: {QUOTA.format(0, 'us-east5-b')}\n" in out
    last = out.splitlines()[-1]
    assert last.startswith(
        "launch.sh: no zone accepts the request for v6e-8 spot: us-east5-a: ERROR"
    )
    assert "us-east5-b: HttpError 429" in last
    assert (
        "ask for more of TPUV6EPreemptiblePerProjectPerZoneForTPUAPI (Cloud TPU API) at https://"
        in last
    )
    assert [call["flags"]["zone"] for call in quick.calls("create")] == ["us-east5-a", "us-east5-b"]
    assert quick.left() == []


def test_a_zone_without_quota_is_left_out_and_another_one_waited_for(quick):
    """The second zone: quota used up by others, then full, then trouble inside the service, then a
    machine.
    """
    plays = [{"refuse": QUOTA.format(8, "us-east5-b")}, CROWDED, INTERNAL, ACTIVE]
    quick.play({"us-east5-a": [{"refuse": QUOTA.format("0,8", "us-east5-a")}], "us-east5-b": plays})
    out = quick.launch()
    assert (
        "us-east5-a is skipped from now on" in out
        and "us-east5-b: FAILED: an internal error has occurred" in out
    )
    assert [call["flags"]["zone"][-1] for call in quick.calls("create")] == [
        "a",
        "b",
        "b",
        "b",
        "b",
    ]
    assert quick.left() == []


def test_a_quota_that_stays_used_up_is_not_waited_for_without_end(quick):
    quick.play({"us-east5-b": [{"refuse": QUOTA.format(8, "us-east5-b")}]})
    out = quick.launch(status=2, POLL_SECONDS="0.01")
    assert len(quick.calls("create")) == 10
    assert (
        "Limit: 8 in zone us-east5-b" in out.splitlines()[-1]
        and "ask for more of TPUV6E" in out.splitlines()[-1]
    )


def test_refused_everywhere_it_stops_at_once_and_full_everywhere_it_stops_in_time(quick):
    denied = {"refuse": "PERMISSION_DENIED: Permission 'tpu.queuedResources.create' denied"}
    quick.play({"us-east5-a": [denied], "us-east5-b": [denied]})
    out = quick.launch(status=2).splitlines()[-1]
    reason = f"ERROR: (gcloud) {denied['refuse']}"
    assert out.endswith(
        f"no zone accepts the request for v6e-8 spot: us-east5-a: {reason} | us-east5-b: {reason}"
    )

    quick.play({"us-east5-a": [CROWDED], "us-east5-b": [FULL]})
    out = quick.launch(status=2, MAX_HOURS="0.001")
    assert "MAX_HOURS=0.001 are over" in out
    assert quick.left() == []


@pytest.mark.parametrize("last", ["FAILED", "SUSPENDED", "DELETING"])
def test_a_machine_that_never_comes_about_is_given_up(quick, last):
    quick.play(
        {"us-east5-a": [{"states": ["CREATING", last], "reason": "the interval is over"}, ACTIVE]}
    )
    if last == "DELETING":  # by somebody else; then it is gone
        quick.play(
            {"us-east5-a": [{"states": ["CREATING", "DELETING", "DELETING", "NONE"]}, ACTIVE]}
        )
    out = quick.launch()
    why = {"FAILED": ": the interval is over", "SUSPENDED": ": by the SERVICE", "DELETING": ""}[
        last
    ]
    assert f"us-east5-a: {last}{why}\n" in out and "machines: 1," in out
    assert quick.left() == []


def test_every_host_of_a_slice_is_set_up_started_and_asked_to_save(quick):
    quick.play({"us-east5-a": [{**ON_ITS_WAY, "hosts": 4}]})
    seen = f"{quick.folder}/seen"
    quick.python(
        'case "$*" in *results.py*) echo new; exit;; esac; '
        f'echo "$HOST_INDEX in $HOME" >>{shlex.quote(seen)}; echo training'
    )
    out = quick.launch(ACCELERATOR="v6e-16")
    homes = [f"{quick.folder}/machines/us-east5-a/maxnano-d24/"]
    homes = [homes[0].rstrip("/"), *(f"{homes[0]}worker{index}" for index in (1, 2, 3))]
    lines = sorted(Path(seen).read_text().splitlines())
    assert lines == [f"{index} in {home}" for index, home in enumerate(homes)]
    assert out.count("==== done") == 1, "the log of the first host"
    assert "machines: 1, 16 chips x" in out and quick.left() == []
    assert {call["flags"]["accelerator-type"] for call in quick.calls("create")} == {"v6e-16"}
    assert all(call["flags"]["worker"] == "all" for call in quick.calls("scp"))
    logs = {path.stem[-1] for path in (quick.folder / "buckets/ours/maxnano-d24/logs").iterdir()}
    assert logs == set("0123")

    out = quick.launch("--dry-run", ACCELERATOR="v6e-64")
    assert "64 chips x 1.00 h" in out and " CHIPS=64 " in out
    environment = {**quick.settings, "STAGES": ""}
    del environment["STAGES"]
    out = run("tpu/launch.sh", environment, "--dry-run", ACCELERATOR="v6e-64")
    assert "STAGES=setup\\ data\\ tokenizer\\ training " in out, "the others are for one host"
    assert "must be a type and a number" in quick.launch(status=2, ACCELERATOR="v6e")


@pytest.mark.long
def test_a_slice_of_two_hosts_trains_one_run_through_a_preemption(cloud):
    machine = {**ON_ITS_WAY, "hosts": 2, "port": free_port()}
    preempted = {**machine, "preempt": {"step": 75, "after": 0}}
    cloud.play({"us-east5-a": [preempted, machine]})
    extra = f"{cloud.settings['EXTRA']} dcn_data_parallelism=2"
    stages = "setup data tokenizer training"
    out = cloud.launch(ACCELERATOR="v6e-16", STAGES=stages, EXTRA=extra, POLL_SECONDS="0.5")
    run_folder = cloud.folder / f"buckets/ours/maxnano-d24/runs/d1_{STEPS}steps"
    assert steps_of(run_folder) == list(range(STEPS))
    assert "2 x cpu, data 2" in out and "the machine is lost" in out
    assert re.search(r"Resuming .+ from step", out) and "machines: 2," in out
    assert cloud.left() == []


def test_zones_that_cannot_be_seen_are_named_and_passed_over(quick):
    quick.play({"us-east5-a": [ACTIVE], "us-east5-b": [ACTIVE]}, closed=["us-east5-a"])
    out = quick.launch()
    closed = "ERROR: (gcloud) PERMISSION_DENIED: Location us-east5-a is not found or access is unauthorized."
    assert f"us-east5-a is skipped, because it is not accessible: {closed}\n" in out
    assert [call["flags"]["zone"] for call in quick.calls("create")] == ["us-east5-b"]
    assert quick.left() == []

    out = quick.launch(status=2, ZONES="us-east5-a")
    assert out.splitlines()[-1].endswith(f"for v6e-8 spot: us-east5-a: {closed}")


def test_teardown_deletes_what_it_can_and_names_the_zones_it_cannot_see(quick):
    zones = {"us-east5-a": [ACTIVE], "us-east5-b": [ACTIVE], "us-east5-c": [ACTIVE]}
    quick.play(zones)
    for zone in zones:
        quick.rent("maxnano-d24", zone)
    quick.play(zones, closed=["us-east5-b"])
    assert "UNKNOWN" in run("tpu/teardown.sh", quick.settings, "--dry-run", status=1)
    out = run("tpu/teardown.sh", quick.settings, status=1, YES="1")
    assert (
        out.count(
            "us-east5-b cannot be listed: ERROR: (gcloud) PERMISSION_DENIED: Location us-east5-b"
        )
        == 1
    )
    assert out.splitlines()[-1] == "UNKNOWN: these zones cannot be listed: us-east5-b"
    assert quick.left() == ["us-east5-b/maxnano-d24"]
    assert "UNKNOWN" in run("tpu/teardown.sh", quick.settings, status=1, YES="1"), (
        "nothing there, but not known"
    )


@pytest.mark.parametrize("right", ["write", "read"])
def test_a_machine_that_may_not_use_the_bucket_is_told_before_it_works(quick, right):
    quick.play({"us-east5-a": [ACTIVE]}, may_not=[right])
    out = quick.launch(status=2)
    place = {"write": "gs://ours/maxnano-d24", "read": "gs://ours/text"}[right]
    (line,) = [line for line in out.splitlines() if line.startswith("launch.sh: ")]
    assert (
        f"service account 123-compute@developer.gserviceaccount.com may not {right} {place} (ERROR"
        in line
    )
    assert line.endswith(
        "gcloud storage buckets add-iam-policy-binding gs://ours"
        " --member=serviceAccount:123-compute@developer.gserviceaccount.com --role=roles/storage.objectAdmin"
    )
    assert "copying MaxNano" not in out
    assert quick.left() == []


def test_a_service_account_and_a_machine_without_an_address(quick):
    quick.play({"us-east5-a": [ACTIVE]}, may_not=["delete"])
    more = {"INTERNAL_IP": "1", "NETWORK": "inner", "SUBNETWORK": "part"}
    out = quick.launch(SERVICE_ACCOUNT="ours@p.iam.gserviceaccount.com", **more)
    flags = quick.calls("create")[0]["flags"]
    assert flags["service-account"] == "ours@p.iam.gserviceaccount.com" and "internal-ips" in flags
    assert (flags["network"], flags["subnetwork"]) == ("inner", "part")
    assert flags["scopes"].endswith("/cloud-platform")
    reached = [call for call in quick.calls("") if call["command"].endswith(("ssh", "scp"))]
    for call in reached:
        assert (
            call["command"].startswith("compute tpus queued-resources")
            and "tunnel-through-iap" in call["flags"]
        )
        options = call["flags"]["ssh-flag" if call["command"].endswith("ssh") else "scp-flag"]
        assert (
            "-oBatchMode=yes" in options
            and "-oConnectTimeout=" in options
            and "-oServerAliveInterval=" in options
        )
    assert {call["command"][-3:] for call in reached} == {"ssh", "scp"}
    assert (
        "warning: without this computer the machine can only shut down" in out
        and "roles/tpu.admin" in out
    )
    assert quick.left() == []


@pytest.mark.slow
def test_connections_that_hang_or_are_slow_are_failed_looks(quick):
    quick.play({"us-east5-a": [{**ACTIVE, "hang": 1, "slow": 0.2}]})
    out = quick.launch(CALL_SECONDS="5")
    assert "the machine does not answer (1 of 10)" in out and "==== done" in out
    assert "machines: 1," in out and quick.left() == []


@pytest.mark.slow
def test_a_machine_that_never_answers_is_replaced(quick):
    quick.play({"us-east5-a": [{**ACTIVE, "deaf": True}, ACTIVE]})
    out = quick.launch()
    assert (
        "the machine does not answer (10 of 10): ERROR: (gcloud) [255] ssh: connect to maxnano-d24"
        in out
    )
    assert "the machine is lost" in out
    assert "machines: 2," in out and "==== done" in out and quick.left() == []


@pytest.mark.slow
def test_a_machine_that_vanishes_is_replaced_though_its_request_says_active(quick):
    vanish = {"preempt": {"step": None, "after": 0, "vanish": True}}
    quick.play({"us-east5-a": [{**ACTIVE, **vanish}, ACTIVE]})
    quick.python(
        """grep -q '"created": {"us-east5-a": 2' $FAKE_GCLOUD/world.json || exec sleep 1000; echo new"""
    )
    out = quick.launch()
    assert "the machine is lost" in out and "machines: 2," in out
    assert "(2 of 10)" not in out, "gcloud's words are enough; one look may have been under way"
    assert quick.left() == []


@pytest.mark.slow
def test_what_cannot_run_is_not_run_twice_and_what_crashes_is(quick):
    quick.play({"us-east5-a": [ACTIVE]})
    out = quick.launch(status=2, STAGES="setup trainign")
    assert "STAGES has 'trainign', which is not a stage" in out and "exited with status 2" in out
    assert quick.left() == []

    quick.python("exit 7")
    out = quick.launch(status=2, MAX_CRASHES="2")
    assert out.count("ended with status 7; restarting it") == 2
    assert "ended with status 7, crash 3: giving up" in out
    assert quick.left() == []


# Trains until it is asked to stop, or told so by a file.
TRAINER = """case "$*" in *results.py*) echo new; exit;; esac
trap 'echo saving; exit 75' TERM
echo training
until [ -e $FAKE_GCLOUD/finish ]; do sleep 0.05; done"""


@pytest.fixture
def training(cloud):
    """A cloud in which launch.sh can be watched while its machine trains: the two, and what it
    looks like.
    """
    cloud.python(TRAINER)
    return cloud


def wait_until(condition, process=None, seconds=100):
    for _ in range(seconds * 20):
        if condition():
            return
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("waited for that without end")


def training_began(cloud, process):
    logs = cloud.folder.glob
    wait_until(
        lambda: any("training" in log.read_text() for log in logs("machines/*/*/MaxNano/log")),
        process,
    )
    (watched,) = cloud.folder.glob("machines/*/*/watch")
    return watched


def last_words(cloud):
    return (cloud.folder / "buckets/ours/maxnano-d24/ended").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_it_saves_and_leaves_nothing_running(training, number):
    training.play({"us-east5-a": [ACTIVE]})
    process = start("tpu/launch.sh", training.settings)
    training_began(training, process)
    process.send_signal(number)
    out, _ = process.communicate(timeout=250)
    assert process.returncode == 128 + number, out
    assert training.left() == []
    assert "machines: 1," in out
    (log,) = (training.folder / "buckets/ours/maxnano-d24/logs").iterdir()
    assert "saving" in log.read_text()


def test_after_its_hours_the_machine_saves_and_deletes_itself(training):
    """This computer is gone, and a look has told the machine how long it may be."""
    training.play({"us-east5-a": [ACTIVE]})
    process = start("tpu/launch.sh", training.settings, MAX_HOURS="3")
    watched = training_began(training, process)
    wait_until((watched / "until").exists)
    power_off(process)
    assert 3 * 3600 - 280 < int((watched / "until").read_text()) - time.time() < 3 * 3600 + 61
    time.sleep(1)
    assert training.left() == ["us-east5-a/maxnano-d24"]
    (watched / "until").write_text(str(int(time.time())))
    wait_until(lambda: training.left() == [])
    assert last_words(training) == "75 the time limit is over\n"
    (log,) = (training.folder / "buckets/ours/maxnano-d24/logs").iterdir()
    assert "saving" in log.read_text()
    (call,) = training.calls("delete")
    assert call["machine"] == "us-east5-a/maxnano-d24" and "force" in call["flags"]


def test_a_machine_that_trains_on_alone_ends_when_its_job_has(training):
    """Nobody looks for longer than IDLE_SECONDS: the job is left alone, and afterwards the machine
    is not.
    """
    training.play({"us-east5-a": [ACTIVE]})
    process = start("tpu/launch.sh", training.settings, IDLE_SECONDS="600")
    watched = training_began(training, process)
    process.send_signal(signal.SIGSTOP)  # as where this computer sleeps

    def is_gone():
        with contextlib.suppress(FileNotFoundError):
            os.utime(watched / "looked", (0, 0))
        return training.left() == []

    for _ in range(20):
        assert not is_gone(), last_words(training)
        time.sleep(0.1)
    (training.folder / "finish").touch()
    wait_until(is_gone)
    assert last_words(training) == "0 no job runs, and launch.sh has not checked for 600 s\n"

    process.send_signal(signal.SIGCONT)
    out, _ = process.communicate(timeout=250)
    assert process.returncode == 0, out
    assert "the machine deleted itself: no job runs" in out and "machines: 1," in out
    assert len(training.calls("create")) == 1, "what is done is not done once more"


@pytest.mark.slow
def test_killed_launch_finds_its_machine_again(training):
    training.play({"us-east5-a": [ACTIVE]})
    process = start("tpu/launch.sh", training.settings)
    training_began(training, process)
    power_off(process)
    process = start("tpu/launch.sh", training.settings)
    wait_until(lambda: len(training.calls("ssh")) > 6, process)
    (training.folder / "finish").touch()
    out, _ = process.communicate(timeout=250)
    assert process.returncode == 0, out
    assert "maxnano-d24 already exists in us-east5-a" in out and "copying MaxNano" not in out
    assert "training\n" in out, "the log from its beginning"
    assert len(training.calls("create")) == 1 and training.left() == []


def test_a_machine_that_comes_when_nobody_waits_any_more_deletes_itself(quick):
    quick.play({"us-east5-a": [{"states": ["WAITING_FOR_RESOURCES"] * 40 + ["ACTIVE"]}]})
    process = start("tpu/launch.sh", quick.settings, IDLE_SECONDS="1")
    wait_until(lambda: quick.left(), process)
    power_off(process)
    for _ in range(42):
        if quick.left():
            quick.gcloud(
                "compute",
                "tpus",
                "queued-resources",
                "describe",
                "maxnano-d24",
                "--zone=us-east5-a",
            )
    wait_until(lambda: quick.left() == [])
    assert last_words(quick) == "none no job runs, and launch.sh has not checked for 1 s\n"


def test_a_machine_that_may_not_delete_itself_shuts_down(training):
    """Where startup scripts are forbidden, too: then launch.sh starts the watchdog."""
    training.play({"us-east5-a": [{**ACTIVE, "startup": False}]}, may_not=["delete"])
    process = start("tpu/launch.sh", training.settings)
    watched = training_began(training, process)
    power_off(process)
    wait_until((watched / "lock").exists)
    (watched / "until").write_text("0")
    world = training.folder / "world.json"
    wait_until(lambda: '"off": true' in world.read_text())
    assert training.left() == ["us-east5-a/maxnano-d24"]
    assert "75 the time limit is over" in last_words(training)


@pytest.mark.slow
def test_without_a_network_it_waits_and_the_machine_trains_on(training):
    training.play({"us-east5-a": [ACTIVE]})
    process = start("tpu/launch.sh", training.settings)
    training_began(training, process)
    training.play({"us-east5-a": [ACTIVE]}, offline=True)
    calls = training.folder / "calls.jsonl"
    before = len(calls.read_text().splitlines())
    wait_until(lambda: len(calls.read_text().splitlines()) > before + 6, process)
    (training.folder / "finish").touch()
    training.play({"us-east5-a": [ACTIVE]})
    out, _ = process.communicate(timeout=250)
    assert process.returncode == 0, out
    assert (
        out.count("gcloud cannot reach the machine, retrying: ERROR: (gcloud) There was a problem")
        == 1
    )
    assert "machines: 1," in out and training.left() == []


def test_kept_a_machine_is_found_again(quick):
    quick.play({"us-east5-a": [FULL], "us-east5-b": [ON_ITS_WAY]})
    out = quick.launch(KEEP="1", ZONE_WAIT_SECONDS="0")
    assert "in us-east5-b costs money until you run" in out
    assert quick.left() == ["us-east5-b/maxnano-d24"]
    created = len(quick.calls("create"))
    out = quick.launch()
    assert "maxnano-d24 already exists in us-east5-b" in out and "==== done" in out
    assert len(quick.calls("create")) == created
    assert quick.left() == []


def test_what_cannot_be_deleted_is_said_aloud(quick):
    quick.play({"us-east5-a": [ACTIVE]}, undeletable=["us-east5-a"])
    out = quick.launch(status=1)
    assert "STILL EXIST AND COST MONEY" in out
    assert (
        "gcloud compute tpus queued-resources delete maxnano-d24 --zone=us-east5-a --force" in out
    )


def test_teardown_deletes_all_of_its_name_and_nothing_else(quick):
    quick.play({"us-east5-a": [{"states": ["ACTIVE"]}], "us-east5-b": [{"states": ["ACTIVE"]}]})
    for name in ("maxnano-d24", "maxnano-two", "other"):
        for zone in ("us-east5-a", "us-east5-b"):
            quick.rent(name, zone)
    ours = sorted(place for place in quick.left() if "maxnano" in place)
    assert len(ours) == 4

    listed = run("tpu/teardown.sh", quick.settings, "--dry-run")
    for place in ours:
        zone, name = place.split("/")
        assert f"request {name} {zone} ACTIVE" in listed
    assert "other" not in listed
    assert "set YES=1" in run("tpu/teardown.sh", quick.settings, status=2)
    assert len(quick.left()) == 6, "nothing was deleted so far"

    out = run("tpu/teardown.sh", quick.settings, YES="1")
    assert out.splitlines()[-1].startswith("all deleted")
    assert sorted(quick.left()) == ["us-east5-a/other", "us-east5-b/other"]
    assert "no resource named maxnano*" in run("tpu/teardown.sh", quick.settings, YES="1")

    quick.play({"us-east5-a": [ACTIVE], "us-east5-b": [ACTIVE]}, undeletable=["us-east5-b"])
    out = run("tpu/teardown.sh", quick.settings, status=1, YES="1", TPU_NAME="other")
    assert "STILL EXIST" in out and quick.left() == ["us-east5-b/other"]

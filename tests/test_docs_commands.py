"""Every command of the pages that starts one of MaxNano's programs runs, with a tiny model and text.

Some minutes, so -m slow. Added words make model, text and time small, and give a new run a name
that no other command uses; CORE alone is downloaded, since chat's data come from many hubs.
tests/test_docs.py parses the other commands too.
"""

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pages
import programs
import pyarrow.parquet as pq
import pytest
from pages import ROOT
from ports import free_port
from test_compile_gpu import HAS_CUDA
from test_end_to_end import RL_WORDS, hub, place, tuning_words  # noqa: F401
from test_train_compile import LEAST_EFFORT
from test_train_compile import TINY as COMPILED

from MaxNano.tokenization.bpe import train_bpe

pytestmark = pytest.mark.slow

MODEL = """num_decoder_layers=2 emb_dim=32 head_dim=16 num_query_heads=2 max_target_length=64
    vocab_size=300""".split()
STEPS = """global_batch_tokens=512 num_cpu_devices=1 data_readers=1 steps=4 eval_tokens=512
    tensorboard=false packing_buffer_documents=20 muon_iterations=1 sample_tokens=2""".split()
TEXT = ["dataset_type=parquet", "dataset_path=data/text", "tokenizer_path=data/tokenizer"]
ANSWER = ["max_new_tokens=4", "decode_slots=1", "num_cpu_devices=1"]
# Runs that the commands start from.
BASE_RUNS = "d4_quickstart notes v8192 my_run imported d4_a".split()
TUNED_RUNS = "d4_quickstart_sft nano_sft my_sft d24_rl".split()
NUMBERS = itertools.count()


def program_commands():
    """The commands with .venv/bin/python and a file of MaxNano/."""
    return [
        command
        for command in pages.commands()
        if command.words[:1] == [".venv/bin/python"] and command.words[1].startswith("MaxNano/")
    ]


def requests():
    """The commands that ask a server that runs here."""
    return [command for command in pages.commands() if command.words[:1] == ["curl"]]


def title(command):
    return f"{command.where} {' '.join(command.words[1:])[:60]}"


def start(folder, words, root=ROOT, **environment):
    environment = {**os.environ, **environment}
    return programs.start(root / words[0], *words[1:], cwd=folder, env=environment)


def run(folder, words, statuses=(0,), **options):
    process = start(folder, words, **options)
    out, err = process.communicate(timeout=600)
    assert process.returncode in statuses, out + err
    return out


@pytest.fixture(scope="module")
def home(place, tmp_path_factory):  # noqa: F811
    """A folder as a user's: text, tokenizer, conversations, and runs by the names of the pages."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "configs").symlink_to(ROOT / "configs")
    shutil.copytree(place / "text", folder / "data/text")
    texts = pq.read_table(folder / "data/text")["text"].to_pylist()
    train_bpe(texts, 300).save(folder / "data/tokenizer")
    first = ["MaxNano/train.py", "configs/base.yml", "model=d24"]
    run(folder, [*first, *MODEL, *STEPS, *TEXT])
    words = [*TEXT, *MODEL, *STEPS, *tuning_words(folder).split()]
    run(folder, [*first, "stage=sft", "load_from=d24", *words])
    for original, copies in (("d24", BASE_RUNS), ("d24_sft", TUNED_RUNS)):
        for copy in copies:
            shutil.copytree(folder / "runs" / original, folder / "runs" / copy)
    for seed, name in enumerate(("d4_b", "d4_c")):
        run(folder, [*first, *MODEL, *STEPS, *TEXT, f"run_name={name}", f"seed={seed}"])
    convert = ["MaxNano/convert.py", "configs/base.yml"]
    run(folder, [*convert, "run_name=d24", "to_nanochat=model_000004.safetensors"])
    run(folder, [*convert, "run_name=d24_sft", "to_huggingface=huggingface"])
    return folder


def words_of_training(folder, words):
    """For train.py, compare.py --arm and tune.py: the tiny model, and the data of its stage."""
    added = [*MODEL, *STEPS, *TEXT]
    if "stage=sft" in words:
        added += tuning_words(folder).split()
    if "stage=rl" in words:
        added += RL_WORDS.split()
    if any(word.startswith("profile_steps=") for word in words):
        added += ["steps=12", "profile_steps=[10,11]"]
    return [*added, f"run_name=run_{next(NUMBERS)}"]


def added_words(command, folder, address):
    """What makes a command small."""
    program, words = Path(command.words[1]).stem, command.words[2:]
    if any(word.startswith("--help") or word == "dry_run=true" for word in words):
        return []
    if program == "train":
        return words_of_training(folder, words)
    if program == "compare":
        return [*words_of_training(folder, words), "--seeds", "1"] if "--arm" in words else []
    if program == "tune":
        return [*words_of_training(folder, words), "tune_minutes=0.5"]
    if program == "train_tokenizer":
        return [*TEXT[:2], "vocab_size=300", f"tokenizer_path=data/tokenizer_{next(NUMBERS)}"]
    if program == "download":
        if any(word.startswith("download=") for word in words):  # chat's are many hubs' files
            core = [f"core_bundle_url={address}/core.zip", "core_bundle=data/core.zip"]
            return ["download=[core]", *core]
        hub_words = [f"hub_url={address}", "dataset_name=us/text", "download_shards=2"]
        return [*hub_words, f"download_path=data/{next(NUMBERS)}"]
    if program == "chat":
        return [*ANSWER, *([] if any("prompt=" in word for word in words) else ["prompt=One"])]
    if program == "serve":
        return [*ANSWER[1:], f"serve_port={free_port()}"]
    if program == "evaluate":
        added = ["num_cpu_devices=1", "eval_tokens=512", "sample_tokens=2"]
        if "core" in " ".join(words):
            added += [f"core_bundle={ROOT}/tests/golden/core_small.zip", "core_max_per_task=1"]
        if "chat" in " ".join(words):
            added += ["chat_tasks=[SimpleSpelling/test]", "chat_max_per_task=2", *ANSWER[:1]]
        return added
    if program == "convert" and any(word.startswith("from_") for word in words):
        sources = ("from_nanochat=model_000004.safetensors", "from_huggingface=huggingface")
        source = sources["from_huggingface" in " ".join(words)]
        return [source, f"run_name=run_{next(NUMBERS)}"]
    if program == "train_compile":
        return [*COMPILED, "num_decoder_layers=1", "muon_iterations=1"]
    return []


@contextlib.contextmanager
def serving(folder, words):
    """A server that has loaded its models; then it is asked to stop, and ends with 0."""
    process = start(folder, words)
    assert any(line.startswith("Serving ") for line in process.stdout), process.stderr.read()
    yield
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err


@pytest.mark.timeout(900)
@pytest.mark.parametrize("command", program_commands(), ids=title)
def test_the_command_runs(command, home, hub):  # noqa: F811
    program, words = Path(command.words[1]).stem, command.words[1:]
    if any(word.startswith(("compile_topology=h100", "compile_topology=rtx")) for word in words):
        if not HAS_CUDA:
            pytest.skip("JAX's plugin for CUDA is missing (extra gpu)")
    added = added_words(command, home, hub)
    if program == "serve":
        with serving(home, [*words, *added]):
            return
    own = LEAST_EFFORT if program == "train_compile" else {}
    if program == "tune":  # it writes into configs/tuned of its tree, which a new Python imports
        own = {"root": home / "tree", "PYTHONHASHSEED": "1"}
        for name in ("MaxNano", "configs"):
            shutil.copytree(ROOT / name, home / "tree" / name)
    # A dry run of a model that is too large for this machine says so and ends with 2.
    statuses = (0, 2) if "dry_run=true" in words else (0,)
    out = run(home, [*words, *added], statuses, **own)
    assert out.strip()
    if program == "tune":
        assert [path.suffix for path in (home / "tree/configs/tuned").iterdir()] == [".yml"]


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_a_server_answers_the_requests_of_the_pages(home):
    port, address = free_port(), "http://127.0.0.1:8000/"
    assert len(requests()) >= 5 and all(any(address in w for w in r.words) for r in requests())
    words = ["configs/base.yml", "run_name=d4_quickstart_sft", f"serve_port={port}", *ANSWER[1:]]
    with serving(home, ["MaxNano/serve.py", *words]):
        for command in requests():
            asked = [word.replace(":8000/", f":{port}/") for word in command.words]
            done = subprocess.run(
                [*asked, "--silent", "--show-error", "--fail-with-body"],
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0 and json.loads(done.stdout), (command, done)

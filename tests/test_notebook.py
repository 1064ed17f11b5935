"""The notebook of docs/notebooks: stripped, with commands that exist; and run whole, on a tiny model.

The latter needs nbclient: `bash tests/run_notebook.sh`.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest

from MaxNano import config_schema, pyconfig
from MaxNano.__main__ import with_config

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs/notebooks/maxnano_colab.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
SENTENCE = "The dog ran to the house, and the cat sat on the mat near the door. "
SETTINGS = {
    "DATA": "dataset_type=text dataset_path=text data_readers=1",
    "CONVERSATIONS": "chat_train_mixture=[[json:chats.jsonl,1]]"
    " chat_validation_mixture=[[json:chats.jsonl,1]]",
    "MODEL": "model=d2 emb_dim=32 head_dim=16 max_target_length=64 vocab_size=270 steps=4"
    " global_batch_tokens=256 eval_tokens=512 sample_tokens=4",
    "RUN": "tiny",
    "QUESTIONS": ["Hello!", "Where is the cat?"],
}


def write_data(folder):
    """What SETTINGS name, and the setup.sh by which the notebook knows that it is in a checkout."""
    (folder / "text").mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / "text" / name).write_text(SENTENCE * 60)
    chat = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "The cat."}]
    (folder / "chats.jsonl").write_text((json.dumps(chat) + "\n") * 40)
    (folder / "setup.sh").touch()


def test_outputs_are_stripped():
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CODE)
    ids = [cell["id"] for cell in CELLS]
    assert len(set(ids)) == len(ids)
    assert sum("parameters" in cell["metadata"].get("tags", []) for cell in CELLS) == 1
    assert NOTEBOOK.stat().st_size < 30_000


def run_cells(monkeypatch, device, **settings):
    """The words of the notebook's maxnano(...) calls on a device; the calls are not run.

    device: "platform count kind" as JAX says. A run's config and its report are written.
    """
    calls = []
    html = types.SimpleNamespace(HTML=str, display=lambda value: None)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(display=html))
    monkeypatch.setitem(sys.modules, "IPython.display", html)
    answer = subprocess.CompletedProcess([], 0, f"a line of a plugin\n{device}\n", "")
    monkeypatch.setattr(subprocess, "run", lambda *words, **options: answer)

    def show(command, lines=()):
        if command[:2] == ["bash", "setup.sh"]:
            return
        assert command[1:4] == ["-u", "-m", "MaxNano"], command
        program, *words = command[4:]
        config = pyconfig.initialize(with_config(words))
        calls.append((program, words, config, list(lines)))
        folder = Path(config.base_output_directory, config.run_name)
        folder.mkdir(parents=True, exist_ok=True)
        if program == "train" and not config.dry_run:
            pyconfig.save(config, folder / "config.yml")
        if program == "report":
            (folder / "report.html").write_text("<p>")

    namespace = {}
    for cell in CODE:
        exec("".join(cell["source"]), namespace)
        if "parameters" in cell["metadata"].get("tags", []):
            namespace |= settings
        if "show" in namespace:
            namespace["show"] = show
    return calls


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "device,model,dtype",
    [
        ("tpu 1 TPU v5 lite", "d8", None),
        ("tpu 1 TPU v6 lite", "d8", None),
        ("gpu 1 Tesla T4", "d6", "float32"),
        ("gpu 1 NVIDIA L4", "d8", None),
        ("cpu 1 cpu", "d4", None),
    ],
)
def test_every_command_parses_on_every_device(folder, monkeypatch, device, model, dtype):
    calls = run_cells(monkeypatch, device)
    programs = [program for program, *_ in calls]
    order = "download train_tokenizer train train report chat chat train report chat".split()
    assert programs == order
    keys = config_schema.base_keys()
    for program, words, config, _ in calls:
        assert config.base_output_directory == "runs"
        names = {word.partition("=")[0] for word in words if "=" in word}
        strange = {name for name in names if program not in keys[name].programs}
        strange -= {"download_shards"}  # DATA has it for download, the others ignore it
        assert not strange, f"{program} does not read {strange}"
    trained = [config for program, _, config, _ in calls if program == "train"]
    assert [config.dry_run for config in trained] == [True, False, False]
    assert [config.model for config in trained] == [model] * 3
    assert [config.dtype for config in trained] == [dtype] * 3
    assert trained[2].stage == "sft" and trained[2].load_from == "colab"
    assert (
        trained[2].run_name == "colab_sft"
        and trained[2].tokenizer_path == calls[1][2].tokenizer_path
    )
    assert trained[2].origin["steps"] == "derived", "not the steps of pretraining"
    assert calls[-1][3][0] == "Hello! Who are you?"


def test_the_settings_reach_the_commands(folder, monkeypatch):
    calls = run_cells(monkeypatch, "cpu 1 cpu", OUTPUT="my drive", PYTHON="python", **SETTINGS)
    assert [program for program, *_ in calls][:2] == ["train_tokenizer", "train"]
    for _, _, config, _ in calls[1:]:
        assert config.base_output_directory == "my drive"
        assert config.run_name in ("tiny", "tiny_sft")
    assert calls[0][2].vocab_size == calls[-3][2].vocab_size == 270
    assert calls[-1][3] == SETTINGS["QUESTIONS"]


@pytest.mark.parametrize("source", ["repository", "archive", "nothing"])
def test_maxnano_is_cloned_or_unpacked(tmp_path, monkeypatch, source):
    """By the cell of the set-up, outside of a checkout."""
    folder = tmp_path / "a/b"  # a checkout two levels up would be taken
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    html = types.SimpleNamespace(HTML=str, display=print)
    monkeypatch.setitem(sys.modules, "IPython.display", html)
    sources = ["".join(cell["source"]) for cell in CODE]
    [cell] = [source for source in sources if '"git", "clone"' in source]
    commands = []
    names = {"REPOSITORY": "", "PYTHON": "python"}
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: record(commands, command))
    if source == "repository":
        names["REPOSITORY"] = "https://git.example/MaxNano"
    if source == "archive":
        with zipfile.ZipFile("MaxNano.zip", "w") as archive:
            archive.writestr("MaxNano/setup.sh", "")
    if source == "nothing":
        with pytest.raises(FileNotFoundError, match=r"REPOSITORY.*MaxNano\.zip"):
            exec(cell, names)
        return
    exec(cell, names)
    assert Path.cwd() == folder / "MaxNano"
    cloned = [["git", "clone", "--depth=1", names["REPOSITORY"], "MaxNano"]]
    assert commands == (cloned if source == "repository" else [])


def record(commands, command):
    """A process that ends well; git clone leaves a folder."""
    commands.append(command)
    Path(command[-1]).mkdir()
    process = types.SimpleNamespace(stdin=io.StringIO(), stdout=[], returncode=0)
    return contextlib.nullcontext(process)


@pytest.mark.skipif("NOTEBOOK_PYTHON" not in os.environ, reason="bash tests/run_notebook.sh")
def test_the_notebook_runs(tmp_path):
    """All cells, with a tiny model on the CPU, in a kernel: trains, fine-tunes, reports, answers."""
    write_data(tmp_path)
    settings = SETTINGS | {"PYTHON": sys.executable}
    code = "\n".join(f"{name} = {value!r}" for name, value in settings.items())
    result = subprocess.run(
        [os.environ["NOTEBOOK_PYTHON"], ROOT / "tests/with_notebook.py", NOTEBOOK, code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=850,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert result.stdout.count("Validation at step 4:") >= 1
    assert result.stdout.count("<iframe srcdoc=") == 2
    for run in ("tiny", "tiny_sft"):
        assert f"Wrote runs/{run}/report.html" in result.stdout
        assert list((tmp_path / "runs" / run / "checkpoints").iterdir())

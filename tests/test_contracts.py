"""Architecture rules: imports point down, host code starts without JAX, entry points start from
anywhere.
"""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "MaxNano"
ENTRY_POINTS = sorted(
    path.stem
    for path in PACKAGE.glob("*.py")
    if '__name__ == "__main__"' in path.read_text() and path.name != "__main__.py"
)


def run_python(*arguments, cwd=ROOT):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def test_import_contracts():
    result = run_python(
        "-c", "from importlinter import cli; cli.lint_imports_command()", "--no-cache"
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    "modules",
    [
        ["pyconfig", "scaling"],
        [
            "tokenization.tokenizer",
            "train_tokenizer",
            "data.packing",
            "data.sources",
            "data.workers",
            "data.conversations",
        ],
        [
            "data.download",
            "data.hub",
            "tasks",
            "tools.calculator",
            "tools.sandbox",
            "inference.dialogue",
        ],
        ["chat", "serving.terminal", "serving.reply_view", "training.run_config"],
    ],
    ids=["configuration", "host", "tasks and tools", "the chat until its prompt"],
)
def test_starts_without_jax(modules):
    """What the libraries bring in counts too, which the contracts do not see."""
    names = ", ".join(f"MaxNano.{module}" for module in modules)
    code = f"import sys, {names}; print(sorted({{'jax', 'flax', 'optax'}} & set(sys.modules)))"
    result = run_python("-c", code)
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_no_module_hides_a_library():
    """A script's folder is searched first, before ours replaces it."""
    ours = {path.stem for path in PACKAGE.iterdir() if path.suffix in ("", ".py")}
    others = set(importlib.metadata.packages_distributions()) - {"MaxNano"}
    assert not (ours - {"__init__", "__pycache__"}) & (others | sys.stdlib_module_names)


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_runs_as_a_script_from_another_folder(name, tmp_path):
    result = run_python(PACKAGE / f"{name}.py", "--help", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: python ") and "--help=all shows all" in result.stdout


@pytest.mark.parametrize("cwd", ["root", "elsewhere"])
def test_runs_as_a_module(cwd, tmp_path):
    """From elsewhere by the editable install."""
    result = run_python(
        "-m", "MaxNano.train_tokenizer", "--help", cwd=ROOT if cwd == "root" else tmp_path
    )
    assert result.returncode == 0, result.stderr


def test_there_are_entry_points():
    assert {"train", "train_tokenizer", "convert"} <= set(ENTRY_POINTS)


@pytest.mark.parametrize("name", [*ENTRY_POINTS, "data/download"])
def test_a_python_without_the_packages_says_what_to_run(name):
    """One line instead of a traceback. -S leaves out the installed packages."""
    result = run_python("-S", PACKAGE / f"{name}.py", "configs/base.yml")
    assert result.returncode == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert re.fullmatch(
        rf"error: \S+ does not have the package \w+; run .*\.venv/bin/python MaxNano/{name}\.py",
        line,
    )


def test_a_missing_package_started_as_a_module():
    result = run_python("-S", "-m", "MaxNano.train")
    assert result.returncode == 2 and "MaxNano/train.py" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_an_import_as_a_library_raises():
    result = run_python("-S", "-c", "import MaxNano.pyconfig")
    assert result.returncode == 1 and result.stderr.startswith("Traceback")

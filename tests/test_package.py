"""What users install: the wheel, the sdist, the command `maxnano`, and the files of a release."""

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from MaxNano import __main__ as command
from MaxNano import config_schema, pyconfig

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSION = PYPROJECT["project"]["version"]
BUILD = "from setuptools import build_meta as b; b.build_wheel('dist'); b.build_sdist('dist')"
TEXT = "A sentence of words. Another one, with other words in it.\n"


def files_below(folder):
    """The files of a folder, as a checkout has them, relative to the root."""
    return {
        str(path.relative_to(ROOT))
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc" and not path.name.startswith(".")
    }


def run(*arguments, cwd, **environment):
    """Runs python, in an environment without settings of this process."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with a wheel and an sdist, built from a copy of the tree."""
    pytest.importorskip("setuptools", "77", reason="EXTRAS=dev bash setup.sh installs it")
    copy = tmp_path_factory.mktemp("tree") / "maxnano"
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info", "golden", "tuned")
    for name in ("MaxNano", "configs", "benchmarks", "docs", "end_to_end", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=unwanted)
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, copy)
    (copy / "configs/tuned").mkdir()
    (copy / "configs/tuned/cpu-1-d4.yml").write_text("remat_policy: full\n")
    result = run("-c", BUILD, cwd=copy, PYTHONPATH=os.environ.get("PYTHONPATH", ""))
    assert result.returncode == 0, result.stderr
    return copy / "dist"


@pytest.fixture(scope="module")
def installed(built):
    """A folder with the wheel's content, as in site-packages."""
    with zipfile.ZipFile(built / f"maxnano-{VERSION}-py3-none-any.whl") as wheel:
        wheel.extractall(built / "site")
    return built / "site"


# ---- Wheel and sdist ----------------------------------------------------------------------------


def test_the_wheel_has_code_pages_templates_and_configs(installed):
    names = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    configs = {f"MaxNano/{name}" for name in files_below("configs") if "/tuned/" not in name}
    code = {name for name in names if not name.startswith(f"maxnano-{VERSION}.dist-info/")}
    assert code == files_below("MaxNano") | configs
    assert {"MaxNano/configs/base.yml", "MaxNano/serving/static/index.html"} <= code
    entry = (installed / f"maxnano-{VERSION}.dist-info/entry_points.txt").read_text()
    assert entry.split("\n")[:2] == ["[console_scripts]", "maxnano = MaxNano.__main__:main"]


def test_the_sdist_can_be_set_up_and_tested(built):
    with tarfile.open(built / f"maxnano-{VERSION}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("MaxNano", "benchmarks", "docs", "end_to_end", "tests", "configs")
    wanted = set().union(*map(files_below, folders))
    wanted = {name for name in wanted if "/golden/" not in name and "/tuned/" not in name}
    assert wanted <= names
    assert {"setup.sh", "setup.py", "constraints.txt", "pyproject.toml", "CHANGELOG.md"} <= names
    assert not [name for name in names if "/tuned/" in name or name.endswith(".pyc")]


def test_an_installed_package_finds_its_configs(installed, tmp_path):
    """Outside a checkout, with no config named: the tokenizer is trained, and nothing is missing."""
    (tmp_path / "text").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "text" / name).write_text(TEXT * 50)
    words = "dataset_type=text dataset_path=text vocab_size=280 tokenizer_path=tokenizer"
    outside = {"cwd": tmp_path, "PYTHONPATH": str(installed)}
    result = run("-P", "-m", "MaxNano", "train-tokenizer", *words.split(), **outside)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text", "tokenizer"]
    code = f"""
from MaxNano import pyconfig, config_schema
from MaxNano.tuning import tuned_file
config = pyconfig.initialize([str(config_schema.BASE), "model=d24_speedrun", "stage=sft"])
assert config_schema.BASE.is_relative_to({str(installed)!r}), config_schema.BASE
print(config.run_name, tuned_file.FOLDER)
"""
    result = run("-P", "-c", code, **outside, JAX_PLATFORMS="cpu")
    assert result.stdout == "d24_speedrun_sft configs/tuned\n", result.stderr


@pytest.mark.long
def test_pip_installs_a_command_that_trains_and_chats(built, tmp_path):
    """In a fresh environment, with the pinned versions of the packages from the index."""
    run("-m", "venv", tmp_path / "venv", cwd=tmp_path)
    pins = re.sub(r"\s*\\\n\s*--hash=\S+", "", (ROOT / "constraints.txt").read_text())
    (tmp_path / "pins.txt").write_text(pins)
    python, maxnano = tmp_path / "venv/bin/python", tmp_path / "venv/bin/maxnano"

    def check(*words):
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        result = subprocess.run(
            list(map(str, words)), cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    wheel = next(built.glob("*.whl"))
    check(python, "-m", "pip", "install", "-q", "-c", "pins.txt", f"{wheel}[serve]")
    (tmp_path / "text").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "text" / name).write_text(TEXT * 200)
    data = "dataset_type=text dataset_path=text vocab_size=280 tokenizer_path=tokenizer".split()
    tiny = "model=d2 emb_dim=32 head_dim=16 max_target_length=32 global_batch_tokens=256".split()
    assert check(maxnano, "--version") == f"maxnano {VERSION}\n"
    check(maxnano, "train-tokenizer", *data)
    names = "run_name=tiny steps=4 eval_tokens=256 data_readers=1".split()
    assert "Validation at step 4" in check(maxnano, "train", *data, *tiny, *names)
    chat = check(maxnano, "chat", "run_name=tiny", "prompt=A sentence", "max_new_tokens=4")
    assert chat.strip()
    assert "Wrote runs/tiny/report.html" in check(maxnano, "report", "run_name=tiny")
    assert (tmp_path / "runs/tiny/report.html").exists()
    assert "serve_port" in check(maxnano, "serve", "--help")


# ---- The command maxnano ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words,config",
    [
        ([], None),
        (["model=d4"], None),
        (["--help"], None),
        (["core_bundle=my.yml"], None),
        (["my.yml", "steps=3"], "my.yml"),
        (["gs://bucket/runs/a/config.yml"], "gs://bucket/runs/a/config.yml"),
    ],
)
def test_the_first_argument_is_a_config_or_base_yml_is(words, config):
    expected = words if config else [str(config_schema.BASE), *words]
    assert command.with_config(words) == expected


def test_every_program_has_a_line_and_a_module(capsys):
    assert command.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for program, what in config_schema.PROGRAMS.items():
        assert [line for line in lines if re.fullmatch(rf"  {program} +{re.escape(what)}", line)]
        path = ROOT / (config_schema.module_of(program).replace(".", "/") + ".py")
        assert '__name__ == "__main__"' in path.read_text()
    assert max(map(len, lines)) <= 100


def test_a_word_that_is_no_program_is_one_line(capsys):
    assert command.main(["trian", "model=d4"]) == 2
    assert capsys.readouterr().err == "error: no program trian; did you mean train?\n"
    assert command.main(["xyz"]) == 2
    assert capsys.readouterr().err.startswith("error: no program xyz; there are: train, ")


def test_the_version_is_printed(capsys):
    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out == f"maxnano {importlib.metadata.version('maxnano')}\n"


@pytest.mark.parametrize("start", [["-m", "MaxNano"], [ROOT / "MaxNano"]], ids=["-m", "folder"])
def test_a_program_runs_by_name_from_another_folder(start, tmp_path):
    """With its own help, and a mistake in one line and status 2."""
    words = {"cwd": tmp_path, "PYTHONPATH": str(ROOT)}
    result = run(*start, "train-tokenizer", "--help", **words)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: maxnano train_tokenizer [CONFIG.yml] [key=value ...]\n")
    result = run(*start, "chat", "modle=d4", **words)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: command line: unknown key modle; did you mean model?\n"


# ---- The files of a release ---------------------------------------------------------------------


def test_the_version_is_the_same_everywhere():
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert VERSION == first == citation["version"]


def test_the_citation_has_what_the_format_requires():
    """Source: https://citation-file-format.github.io, version 1.2.0."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["message"] and citation["title"] == "MaxNano"
    assert citation["license"] == PYPROJECT["project"]["license"]
    assert all(author["name"] for author in citation["authors"])


def test_issue_forms_are_ones():
    """Source: https://docs.github.com, syntax of issue forms."""
    forms = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
    assert [form.stem for form in forms] == ["bug", "config", "feature", "result"]
    for form in forms:
        value = yaml.safe_load(form.read_text())
        if form.stem == "config":
            assert value["blank_issues_enabled"] is True
            continue
        assert value["name"] and value["description"]
        fields = [item for item in value["body"] if item["type"] != "markdown"]
        ids = [item["id"] for item in fields]
        assert len(set(ids)) == len(ids) > 0
        for item in value["body"]:
            assert item["type"] in ("markdown", "input", "textarea", "dropdown", "checkboxes")
            assert item["attributes"].get("label" if item in fields else "value")


def test_hooks_are_local_and_are_those_of_ci():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repo["repo"] for repo in hooks["repos"]] == ["local"], "nothing is downloaded"
    entries = [hook["entry"] for repo in hooks["repos"] for hook in repo["hooks"]]
    assert all(hook["language"] == "system" for repo in hooks["repos"] for hook in repo["hooks"])
    checks = (ROOT / ".ci/run").read_text()
    for entry in entries:
        program = shlex.split(entry)
        assert " ".join(program[:4]) in checks, f"{entry} is not a check of .ci/run"


def test_contributing_names_what_exists():
    """Files in `code` exist; commands have keys that exist."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = re.findall(r"`((?:MaxNano|tests|configs|docs|\.ci)/[\w./-]+)`", text)
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []
    commands = re.findall(r"^\S*python MaxNano/\S+ (.*?)(?:  +#.*)?$", text, re.MULTILINE)
    for words in commands:
        config, *words = shlex.split(words)
        pyconfig.initialize([str(ROOT / config), *words])

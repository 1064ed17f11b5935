"""Set-up: what is pinned, how much it is, and how setup.sh says no."""

import importlib.metadata
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CORE = PYPROJECT["project"]["dependencies"]
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
SCRIPTS = ["setup.sh", "tests/run.sh", ".ci/run", "end_to_end/cpu/quickstart.sh"]
TOOLS = "bash dirname cat cksum sort paste sed tr grep df awk rm tail".split()


def read_pins():
    """{name: [(requirement, hashes)]} of constraints.txt."""
    pins = {}
    text = (ROOT / "constraints.txt").read_text().replace("\\\n", " ")
    for line in text.splitlines():
        if line and not line.startswith("#"):
            head, *hashes = line.split("--hash=")
            requirement = Requirement(head)
            pins.setdefault(canonicalize_name(requirement.name), []).append(
                (requirement, [value.strip() for value in hashes])
            )
    return pins


PINS = read_pins()


def closure(requirements):
    """Names of all that an install of the requirements brings to this machine."""
    found = {}
    todo = [(Requirement(text), "") for text in requirements]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for wanted in ["", *requirement.extras]:
            if wanted not in found.setdefault(name, set()):
                found[name].add(wanted)
                needs = importlib.metadata.requires(name) or []
                todo += [(Requirement(text), wanted) for text in needs]
    return set(found)


def test_a_core_install_is_at_most_65_packages():
    assert len(closure(CORE)) <= 65


def test_the_ten_packages_are_in_the_core_and_used():
    ten = {
        "jax": "jax",
        "flax": "flax",
        "optax": "optax",
        "orbax-checkpoint": "orbax",
        "tensorflow-datasets": "tensorflow_datasets",
        "sentencepiece": "sentencepiece",
        "tiktoken": "tiktoken",
        "absl-py": "absl",
        "ml-collections": "ml_collections",
        "pytest": "pytest",
    }
    assert set(ten) <= {canonicalize_name(Requirement(text).name) for text in CORE}
    source = "\n".join(path.read_text() for path in (ROOT / "MaxNano").rglob("*.py"))
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    for package, module in ten.items():
        text = tests if package == "pytest" else source
        # tokenizer.py imports the foreign formats' libraries by name, when they are asked for.
        pattern = rf'^\s*(import|from) {module}\b|_import\("{module}"\)'
        assert re.search(pattern, text, re.MULTILINE), f"{package} is not used"


def test_every_requirement_is_pinned_within_its_range():
    groups = [CORE, *EXTRAS.values(), *PYPROJECT["dependency-groups"].values()]
    groups.append(PYPROJECT["build-system"]["requires"])
    for text in sum(groups, []):
        wanted = Requirement(text)
        for pin, _ in PINS[canonicalize_name(wanted.name)]:
            (version,) = pin.specifier
            assert version.operator == "==" and wanted.specifier.contains(version.version), text


def test_all_that_is_installed_is_pinned():
    missing = closure([*CORE, *EXTRAS["dev"], *EXTRAS["export"]]) - set(PINS)
    assert not missing, "make constraints.txt again, as its first lines say"


def test_pins_have_hashes_and_no_address():
    for pins in PINS.values():
        for requirement, hashes in pins:
            assert requirement.url is None
            assert hashes and all(re.fullmatch("sha256:[0-9a-f]{64}", value) for value in hashes)
    assert "://" not in (ROOT / "constraints.txt").read_text()


def test_extras_are_the_six():
    assert set(EXTRAS) == {"tpu", "gpu", "serve", "track", "export", "dev"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", ROOT / script], check=True)


@pytest.fixture
def machine(tmp_path):
    """Runs setup.sh in a copy, on a machine that has a few tools and the given interpreters."""
    for name in ("setup.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in TOOLS:
        (tools / name).symlink_to(shutil.which(name))

    def run(interpreters=(), **environment):
        for name, script in dict(interpreters).items():
            (tools / name).write_text(f"#!{shutil.which('sh')}\n{script}\n")
            (tools / name).chmod(0o755)
        environment = {"PATH": str(tools), "HOME": str(tmp_path / "home"), **environment}
        return subprocess.run(
            ["bash", tmp_path / "setup.sh"],
            env=environment,
            cwd="/",
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


SHIM = 'echo "python: command not found" >&2; exit 127'
TOO_OLD = "exit 1"  # what the question for the version ends with


@pytest.mark.parametrize(
    "interpreters", [{}, {"python3.12": SHIM, "python3": SHIM}, {"python3": TOO_OLD}]
)
def test_without_python_one_line_says_so(machine, interpreters):
    result = machine(interpreters, DEVICE="cpu")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert "no Python 3.11, 3.12 or 3.13" in line


def test_a_shim_that_fails_is_passed_over(machine, tmp_path):
    """The next interpreter is taken: this one runs, and cannot make an environment."""
    works = f'case "$*" in *--clear*) exit 1 ;; esac; echo "$0" >>{tmp_path}/asked'
    result = machine({"python3.11": SHIM, "python3.12": TOO_OLD, "python3.13": works}, DEVICE="cpu")
    assert result.returncode == 1
    assert (tmp_path / "asked").read_text().splitlines() == [str(tmp_path / "bin/python3.13")] * 2
    (line,) = result.stderr.splitlines()
    assert "bin/python3.13 cannot make an environment" in line


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"DEVICE": "npu"}, "auto, cpu, tpu or gpu"),
        ({"DEVICE": "cpu", "EXTRAS": "dev,sevre"}, "'sevre'"),
        ({"DEVICE": "cpu", "EXTRAS": "gpu"}, "DEVICE"),
    ],
)
def test_a_wrong_wish_is_one_line(machine, environment, words):
    result = machine(**environment)
    assert result.returncode == 1 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert words in line

"""Set-up: what is pinned, how much it is, and how setup.sh says no."""

import hashlib
import importlib.metadata
import itertools
import platform
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CORE = PYPROJECT["project"]["dependencies"]
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
SCRIPTS = ["setup.sh", "tests/run.sh", ".ci/run", "end_to_end/cpu/quickstart.sh"]
TOOLS = "bash sh dirname cat cksum sort paste sed tr grep df awk rm tail".split()
TOOLS += "mkdir chmod mv cut uname sha256sum head env".split()


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


def test_a_core_install_is_at_most_77_packages():
    """65, 8 for huggingface_hub (httpx2 with its four parts, hf-xet, click), 2 for jinja2 and 2 for
    prompt-toolkit (wcwidth).
    """
    assert len(closure(CORE)) <= 77


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
    for text, python in itertools.product(sum(groups, []), ("3.11", "3.12", "3.13")):
        wanted = Requirement(text)
        environment = {"python_version": python, "python_full_version": f"{python}.9"}
        if wanted.marker and not wanted.marker.evaluate(environment):
            continue
        versions = pinned_versions(canonicalize_name(wanted.name), python)
        assert versions, text
        for version in versions:
            assert version.startswith("==") and wanted.specifier.contains(version[2:]), text


def test_all_that_is_installed_is_pinned():
    missing = closure([*CORE, *EXTRAS["dev"], *EXTRAS["export"]]) - set(PINS)
    assert not missing, "make constraints.txt again, as its first lines say"


def test_pins_have_hashes_and_no_address():
    for pins in PINS.values():
        for requirement, hashes in pins:
            assert requirement.url is None
            assert hashes and all(re.fullmatch("sha256:[0-9a-f]{64}", value) for value in hashes)
    assert "://" not in (ROOT / "constraints.txt").read_text()


def test_extras_are_the_eight():
    assert set(EXTRAS) == {"tpu", "gpu", "gpu12", "serve", "track", "export", "docs", "dev"}


def pinned_versions(name, python):
    """The versions of a package that are pinned for a Python version."""
    environment = {"python_version": python, "python_full_version": f"{python}.9"}
    return [
        str(pin.specifier)
        for pin, _ in PINS[name]
        if not pin.marker or pin.marker.evaluate(environment)
    ]


@pytest.mark.parametrize(
    "python,jax,flax,libtpu",
    [
        ("3.11", "==0.10.2", "==0.12.8", "==0.0.42.1"),
        ("3.12", "==0.12.0.1", "==0.12.12", "==0.0.50.1"),
        ("3.13", "==0.12.0.1", "==0.12.12", "==0.0.50.1"),
    ],
)
def test_each_python_has_its_jax(python, jax, flax, libtpu):
    assert pinned_versions("jax", python) == [jax] == pinned_versions("jaxlib", python)
    assert pinned_versions("jax-cuda12-plugin", python) == [jax]
    assert pinned_versions("jax-cuda13-plugin", python) == [jax]
    assert pinned_versions("flax", python) == [flax]
    assert pinned_versions("libtpu", python) == [libtpu]


def gpu_extra(tmp_path, output):
    """What setup.sh chooses where nvidia-smi prints `output`."""
    source = (ROOT / "setup.sh").read_text()
    (function,) = re.findall(r"(?ms)^gpu_extra\(\) \{.*?^\}", source)
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\n" if output else "#!/bin/sh\nexit 9\n")
    tool.chmod(0o755)
    command = ["bash", "-c", f"{function}\ngpu_extra"]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize(
    "output,extra",
    [
        ("580.159.04, 9.0", "gpu"),
        ("595.71.05, 12.0\n595.71.05, 12.0", "gpu"),
        ("580.65.06, 7.5", "gpu"),
        ("575.57.08, 8.9", "gpu12"),
        ("580.159.04, 7.0", "gpu12"),
        ("580.159.04, 9.0\n580.159.04, 6.1", "gpu12"),
        ("", "gpu"),
    ],
)
def test_cuda_13_where_driver_and_cards_take_it(tmp_path, output, extra):
    assert gpu_extra(tmp_path, output) == extra


@pytest.mark.parametrize("device,first", [("cpu", "python3.11"), ("tpu", "python3.13")])
def test_an_accelerator_gets_the_newer_python(machine, tmp_path, device, first):
    works = f'case "$*" in *--clear*) exit 1 ;; esac; echo "$0" >>{tmp_path}/asked'
    pythons = dict.fromkeys(("python3.11", "python3.12", "python3.13"), works)
    machine(pythons, DEVICE=device)
    assert (tmp_path / "asked").read_text().splitlines()[0] == str(tmp_path / f"bin/{first}")


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
            timeout=200,
            check=False,
        )

    return run


SHIM = 'echo "python: command not found" >&2; exit 127'
TOO_OLD = "exit 1"  # what the question for the version ends with
NO_VENV = 'case "$*" in *ensurepip*) exit 1 ;; esac'  # Debian without python3-venv


@pytest.mark.parametrize(
    "interpreters", [{}, {"python3.12": SHIM, "python3": SHIM}, {"python3": TOO_OLD}]
)
def test_without_python_one_line_says_so(machine, interpreters):
    result = machine(interpreters, DEVICE="cpu")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert "no Python 3.11, 3.12 or 3.13" in line
    assert "found neither pip nor curl nor wget" in line
    assert re.search(r"; (run: sudo \S+ \S*install|install Python 3.12)", line)


def test_a_release_candidate_is_no_release(tmp_path):
    """Ubuntu 22.04's package python3.11 is 3.11.0rc1."""
    source = (ROOT / "setup.sh").read_text()
    (question,) = re.findall(r"\"\$1\" -c '(import sys; v = .*)' >", source)
    for version, fits in [
        ((3, 11, 0, "candidate", 1), False),
        ((3, 11, 0, "final", 0), True),
        ((3, 13, 9, "final", 0), True),
        ((3, 10, 12, "final", 0), False),
        ((3, 14, 0, "final", 0), False),
    ]:
        asked = question.replace("sys.version_info", repr(version))
        status = subprocess.run([sys.executable, "-c", asked], check=False).returncode
        assert (status == 0) == fits, version


# A uv that says what it was asked and then makes an environment as bare as the real one's, or says
# that it cannot.
UV = """#!{sh}
echo "$@" >>{log}
case "$1 $*" in
  *--managed-python*) {download} ;;
  "venv "*)
    for last; do :; done
    mkdir -p $last/bin
    printf '#!{sh}\\nexit 0\\n' >$last/bin/python
    chmod +x $last/bin/python ;;
  *) exit 3 ;;
esac
"""


@pytest.fixture
def index(tmp_path, machine):
    """index(download=STATEMENT): puts a uv on a package index that only a stand-in curl reaches."""
    bin, log = tmp_path / "bin", tmp_path / "asked"

    def make(download="exit 2", unzip=True):
        sh = shutil.which("sh")
        version = str(PINS["uv"][0][0].specifier).removeprefix("==")
        name = f"uv-{version}-py3-none-manylinux_2_17_{platform.machine()}.manylinux2014_{platform.machine()}.whl"
        (tmp_path / "index").mkdir()
        wheel = tmp_path / "index" / name
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(
                f"uv-{version}.data/scripts/uv", UV.format(sh=sh, log=log, download=download)
            )
            archive.writestr(f"uv-{version}.dist-info/METADATA", "Name: uv\n")
        (tmp_path / "index/uv.html").write_text(
            f'<a href="../../packages/ab/uv-{version}-py3-none-win32.whl#sha256=00">uv</a>\n'
            f'<a href="../../packages/cd/{name}#sha256=00">uv</a>\n'
        )
        # curl -o FILE ADDRESS: the page of uv, or the file that it names.
        (bin / "curl").write_text(f"""#!{sh}
for last; do :; done
while [ "$1" != -o ]; do shift; done
echo "curl $last" >>{log}
case $last in
  http://index.test/simple/uv/) cat {tmp_path}/index/uv.html >"$2" ;;
  http://index.test/simple/uv/../../packages/cd/*) cat {tmp_path}/index/*.whl >"$2" ;;
  *) exit 22 ;;
esac
""")
        (bin / "curl").chmod(0o755)
        if unzip:  # by Python's own module, under the name of the tool
            (bin / "unzip").write_text(f'#!{sh}\nexec {sys.executable} -m zipfile -e "$2" .\n')
            (bin / "unzip").chmod(0o755)
        return hashlib.sha256(wheel.read_bytes()).hexdigest()

    def pin(digest):
        path = tmp_path / "constraints.txt"
        path.write_text(
            re.sub(
                r"(?m)^(uv==\S+) .*\n( +--hash.*\n)+",
                rf"\1 \\\n    --hash=sha256:{digest}\n",
                path.read_text(),
            )
        )

    def asked():
        return log.read_text().splitlines() if log.exists() else []

    make.pin, make.asked = pin, asked
    return make


PYPI = {"DEVICE": "cpu", "PIP_INDEX_URL": "http://index.test/simple"}
linux = pytest.mark.skipif(sys.platform != "linux", reason="the wheel is chosen for Linux")


@linux
@pytest.mark.parametrize(
    "interpreters", [{}, {"python3": TOO_OLD}, {"python3.11": TOO_OLD, "python3": SHIM}]
)
def test_where_no_python_fits_the_pinned_uv_is_asked_for_one(machine, index, interpreters):
    index.pin(index())
    result = machine(interpreters, **PYPI)
    assert result.returncode == 1
    assert result.stdout == "No Python 3.11, 3.12 or 3.13 on this machine: uv downloads one.\n"
    (line,) = result.stderr.splitlines()
    assert "uv could not download one" in line and "UV_PYTHON_INSTALL_MIRROR" in line
    page, wheel, venv = index.asked()
    assert wheel.startswith(page) and wheel.endswith(".whl")
    assert venv == "venv --allow-existing --managed-python --python cpython@3.12 .venv"


@linux
def test_a_python_without_venv_is_used_by_uv(machine, index, tmp_path):
    index.pin(index())
    result = machine({"python3.11": NO_VENV, "python3": TOO_OLD}, **PYPI)
    assert result.returncode == 1, "this uv does not install"
    assert index.asked()[2] == f"venv --allow-existing --python {tmp_path}/bin/python3.11 .venv"
    assert index.asked()[3].startswith(
        "pip install --python .venv/bin/python --no-deps --require-hashes -r"
    )
    assert "uv downloads one" not in result.stdout


@linux
def test_a_uv_of_another_hash_is_not_run(machine, index):
    index()
    result = machine(**PYPI)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert "the hash of uv differs" in line
    assert len(index.asked()) == 2, "the page and the wheel, and nothing run"


@linux
def test_a_uv_that_is_there_is_taken(machine, index, tmp_path):
    index()
    home = tmp_path / "home/.local/bin"
    home.mkdir(parents=True)
    (home / "uv").write_text(
        UV.format(sh=shutil.which("sh"), log=tmp_path / "asked", download="exit 2")
    )
    (home / "uv").chmod(0o755)
    machine(**PYPI)
    assert index.asked() == ["venv --allow-existing --managed-python --python cpython@3.12 .venv"]


@linux
def test_without_a_tool_to_unpack_one_line_says_so(machine, index):
    index.pin(index(unzip=False))
    result = machine(**PYPI)
    (line,) = result.stderr.splitlines()
    assert "found neither python3 nor unzip" in line


def test_a_shim_that_fails_is_passed_over(machine, tmp_path):
    """The next interpreter is taken: this one runs, and cannot make an environment."""
    works = f'case "$*" in *--clear*) exit 1 ;; esac; echo "$0" >>{tmp_path}/asked'
    result = machine({"python3.11": SHIM, "python3.12": TOO_OLD, "python3.13": works}, DEVICE="cpu")
    assert result.returncode == 1
    assert (tmp_path / "asked").read_text().splitlines() == [str(tmp_path / "bin/python3.13")] * 2
    (line,) = result.stderr.splitlines()
    assert "bin/python3.13 cannot create an environment" in line


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

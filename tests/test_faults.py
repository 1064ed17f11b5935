"""Nothing is lost: output that goes away, full disks, owners without a name, errors of looking."""

import contextlib
import errno
import gc
import grp
import json
import logging
import os
import pwd
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from test_checkpointing import abstract, assert_same, make_config, make_state
from test_metrics import make_config as metrics_config
from test_metrics import rows_of, run, start, wait_until

from MaxNano import convert, evaluate, pyconfig, train_compile
from MaxNano.evals.results import Results
from MaxNano.storage import checkpoints, files, growing_file
from MaxNano.storage.checkpoints import CheckpointError
from MaxNano.training.checkpointing import Checkpointer

ROOT = Path(__file__).resolve().parents[1]


# ---- Output -------------------------------------------------------------------------------------

PRINTS = """
    import logging, sys
    from MaxNano import console
    console.keep_output()
    logging.warning("logged")
    for _ in range(3000):
        print("naïve 北京", flush=True)
        print("to stderr: 北京", file=sys.stderr)
    console.print_table("표", ("열",), [("칸",)])
    assert sys.stdout.fileno() >= 0 and not sys.stdout.isatty()
    open(sys.argv[1], "w").write("done")
"""
ASCII = {"PYTHONIOENCODING": "ascii"}


@pytest.mark.parametrize("python", [[], ["-u"]])
@pytest.mark.parametrize("output", ["head", "full", "closed", "ascii"])
def test_a_program_goes_on_without_the_lines_that_its_output_does_not_take(
    tmp_path, output, python
):
    redirect = {"head": "2>&1 | head -n 1", "full": "> /dev/full 2>&1", "closed": ">&- 2>&-"}
    words = [sys.executable, *python, "-c", textwrap.dedent(PRINTS), str(tmp_path / "done")]
    command = 'set -o pipefail; "$@" ' + redirect.get(output, "2>&1")
    done = subprocess.run(
        ["bash", "-c", command, "bash", *words],
        cwd=ROOT,
        env={**os.environ, **(ASCII if output == "ascii" else {})},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "done").read_text() == "done"
    assert "Error" not in done.stdout and "Exception" not in done.stdout
    if output == "ascii":
        assert done.stdout.count("na?ve ??\n") == 3000


# ---- Ctrl-C -------------------------------------------------------------------------------------

INTERRUPTED = """
    import os, signal, sys, time
    signal.signal(signal.SIGINT, {handler})
    import MaxNano
    def interrupt(config=None):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        print("alive", flush=True)
    {code}
"""


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("interrupt()", 130),  # while the program imports: it was a traceback, or a crash of C code
        ("from MaxNano import pyconfig; pyconfig.check_command_line(); interrupt()", 130),
        ("from MaxNano import pyconfig; sys.exit(pyconfig.launch(interrupt))", 130),
        ("MaxNano.raise_on_interrupt(); interrupt()", -2),
    ],
)
def test_an_interrupt_is_one_line(code, status):
    code = textwrap.dedent(INTERRUPTED).format(handler="signal.default_int_handler", code=code)
    words = [str(pyconfig.BASE), "model=d2"]
    program = str(ROOT / "MaxNano/train.py")  # makes it a program; -c is what runs
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv.pop(1)\n{code}", program, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stderr
    assert "alive" not in done.stdout
    assert (done.stderr == "Interrupted\n") == (status == 130)


def test_an_interrupt_that_the_parent_ignores_is_ignored():
    """As of a program that nohup or a script's & started."""
    code = textwrap.dedent(INTERRUPTED).format(handler="signal.SIG_IGN", code="interrupt()")
    done = subprocess.run(
        [sys.executable, "-c", code, "MaxNano"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "alive\n", "")


@pytest.mark.parametrize("number", sorted(files.DISK_ERRORS))
def test_an_error_of_the_disk_is_one_line_that_names_the_file(tmp_path, number, capsys):
    def write(config):
        files.write_whole(FullFile(tmp_path / "config.yml", number), "text")

    assert pyconfig.launch(write, ["configs/base.yml"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    assert str(tmp_path / "config.yml") in line
    assert line.strip().endswith(files.DISK_ERRORS[number])

    def replace(config):
        with files.replace_folder(tmp_path / "out", last="config.json"):
            fail(number)

    assert pyconfig.launch(replace, ["configs/base.yml"]) == 2
    assert f"'{tmp_path}/out'" in capsys.readouterr().err and not (tmp_path / "out").exists()
    with pytest.raises(OSError, match="something else"):
        pyconfig.launch(lambda config: fail(errno.ECHILD, "something else"), ["configs/base.yml"])


def fail(number, text="", *_):
    raise OSError(number, text or os.strerror(number))


class FullFile(type(Path())):
    """A path whose writes fail as a full disk's do, without the file's name."""

    def __new__(cls, path, number):
        new = super().__new__(cls, path)
        new.number = number
        return new

    def __init__(self, path, number):
        if sys.version_info >= (3, 12):  # before, __new__ has done all
            super().__init__(path)

    @property
    def parent(self):
        return Path(self).parent

    def with_name(self, name):
        return FullFile(Path(self).with_name(name), self.number)

    def write_bytes(self, content):
        fail(self.number)


# ---- Programs that work for minutes -------------------------------------------------------------


def test_a_folder_that_takes_no_file_is_told_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    nowhere = tmp_path / "file" / "folder"  # below a file: nobody, not even root, can write there
    forbidden = lambda *_, **__: pytest.fail("worked before it looked")  # noqa: E731
    monkeypatch.setattr(convert, "_read_run", forbidden)
    monkeypatch.setattr(convert, "_nanochat_source", forbidden)
    monkeypatch.setattr(train_compile, "set_up", forbidden)

    def config(*words):
        return pyconfig.initialize(["configs/base.yml", *words])

    calls = {
        "to_nanochat": lambda: convert.export_nanochat(
            config(f"to_nanochat={nowhere}/model_000001.safetensors"), []
        ),
        "to_huggingface": lambda: convert.export_huggingface(
            config(f"to_huggingface={nowhere}/model"), []
        ),
        "from_nanochat": lambda: convert.import_run(
            config("from_nanochat=x.pt", f"base_output_directory={nowhere}"), []
        ),
        "evaluate": lambda: evaluate.check_output(nowhere),
        "train_compile": lambda: train_compile.main(config(f"compile_report={nowhere}/x.json")),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match=f"^cannot write to {nowhere}.*; .*") as caught:
            call()
        assert "\n" not in str(caught.value)
    files.check_writable(tmp_path / "new", "")
    assert list((tmp_path / "new").iterdir()) == []


def test_results_that_cannot_be_written_stop_an_evaluation_but_no_training(tmp_path, capsys):
    (tmp_path / "evals").touch()
    in_training = Results(tmp_path, 1, is_training=True)
    in_training.put("core", {}, {"core": 0.5})
    assert in_training.get("core", {}) == {"core": 0.5}
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ") and "cannot be written" in warning
    with pytest.raises(OSError):
        Results(tmp_path, 1).put("core", {}, {"core": 0.5})


# ---- Checkpoints that cannot be looked at -------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A run with intact checkpoints 1 and 2."""
    with Checkpointer(make_config(), tmp_path / "run") as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, make_state(step), {})
    return tmp_path / "run"


def test_owners_without_a_name_damage_nothing(saved, monkeypatch, capfd):
    def no_name(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    if os.geteuid() == 0:
        for path in (saved, *saved.rglob("*")):
            os.chown(path, 12345, 12345)
    monkeypatch.setattr(pwd, "getpwuid", no_name)
    monkeypatch.setattr(grp, "getgrgid", no_name)
    with Checkpointer(make_config(), saved) as checkpointer:
        assert_same(checkpointer.restore(abstract(make_state(0)))[0], make_state(2))
        assert_same(checkpointer.restore_params_only()[0], make_state(2).params)
        checkpointer.save(3, make_state(3), {})
        checkpointer.wait()
        assert_same(checkpointer.restore(abstract(make_state(0)))[0], make_state(3))
    assert names_in(saved) == ["2", "3"] and capfd.readouterr().err == ""


def names_in(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
@pytest.mark.parametrize("call", ["stat", "scandir", "open"])
def test_an_error_of_looking_renames_nothing_and_starts_nothing_from_scratch(
    saved, monkeypatch, number, call
):
    """Seen as the newest checkpoint's; the one before must not be taken instead."""
    newest = str(saved / "checkpoints" / "2")

    def broken(function):
        def look(path, *arguments, **options):
            if newest in str(path):
                fail(number)
            return function(path, *arguments, **options)

        return look

    with monkeypatch.context() as patch:
        if call == "open":
            patch.setattr(checkpoints.files, "sha256", broken(files.sha256))
        else:
            patch.setattr(os, call, broken(getattr(os, call)))
        with pytest.raises(CheckpointError, match="cannot (be )?read") as caught:
            with Checkpointer(make_config(), saved) as checkpointer:
                checkpointer.latest_step()
                checkpointer.restore(abstract(make_state(0)))
        assert "\n" not in str(caught.value) and os.strerror(number) in str(caught.value)
    assert names_in(saved) == ["1", "2"]
    with Checkpointer(make_config(), saved) as checkpointer:
        assert_same(checkpointer.restore(abstract(make_state(0)))[0], make_state(2))


# ---- Full disks ---------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder, size="2m"):
    """A file system of a few megabytes, in memory."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if os.geteuid() or subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk):
    with contextlib.suppress(OSError), (disk / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_on_a_full_disk_a_run_goes_on_and_writes_again_when_there_is_room(
    tmp_path, monkeypatch, caplog, capfd
):
    monkeypatch.setattr(growing_file, "RETRY_SECONDS", 0.01)
    with small_disk(tmp_path / "disk") as disk:
        directory = disk / "run"
        logger = start(metrics_config("tensorboard=true"), directory)
        results = Results(directory, 1, is_training=True)
        with Checkpointer(make_config(), directory) as checkpointer:
            checkpointer.save(1, make_state(1), logger.state())
            checkpointer.wait()
            run(logger, range(10))
            fill(disk)
            results.put("core", {}, {"core": 0.5})
            for step in (2, 3):
                run(logger, range(10 * step, 10 * step + 10))
                checkpointer.save(step, make_state(step), logger.state())
                checkpointer._saver.join()
                checkpointer.check()
            assert checkpointer.latest_step() == 1
            assert_same(checkpointer.restore(abstract(make_state(0)))[0], make_state(1))
            (disk / "ballast").unlink()
            results.put("core", {}, {"core": 0.5})
            checkpointer.save(4, make_state(4), json.loads(json.dumps(logger.state())))
            checkpointer.wait()
            assert_same(checkpointer.restore(abstract(make_state(0)))[0], make_state(4))
        wait_until(lambda: logger.state()["rows"] == 30)
        logger.close()
        assert [row["step"] for row in rows_of(directory)] == [*range(10), *range(20, 40)]
        assert Results(directory, 1).get("core", {}) == {"core": 0.5}
    gc.collect()  # asyncio tells of errors that nobody read when their tasks are deleted
    err = capfd.readouterr().err
    assert err.count("could not be written") == 2 and "Traceback" not in err
    assert "No space left" in err


def test_asyncio_tells_no_second_time_of_a_save_that_failed(saved, caplog):
    """At exit it printed a traceback for every array but the one whose error was reported."""
    lines = [
        f"Task exception was never retrieved\nfuture: <Task coro=<write() at {path}/checkpoint.py:1>>"
        for path in ("/lib/orbax", "/lib/server")
    ]
    with Checkpointer(make_config(), saved):
        for line in lines:
            logging.getLogger("asyncio").error(line)
    assert [record.getMessage() for record in caplog.records] == lines[1:]

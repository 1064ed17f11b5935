"""Runs one measurement in a process of its own, so that running out of memory, a crash or a hang of
a program ends that process and not the search.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from MaxNano import console

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = (sys.executable, "-m", "MaxNano.tuning.measure")
FATAL_STATUS = 2  # of a task that cannot be done, with a line {"failure": ...}


class Report(NamedTuple):
    """What a process reported before it ended."""

    answers: list[dict[str, Any]]
    failure: str  # why it ended early, "" if it did not

    @property
    def answer(self) -> dict[str, Any]:
        """All answers as one."""
        return {key: value for answer in self.answers for key, value in answer.items()}


def run(task: Mapping[str, Any], limit_seconds: float, program: Sequence[str] = PROGRAM) -> Report:
    """Do a task in a process that is killed after limit_seconds, or if this process ends.

    The process reads the task as a line of JSON from stdin, which stays open, and appends a line of
    JSON per answer to the file task["answers"].
    """
    with tempfile.TemporaryDirectory(prefix="maxnano-tune-") as scratch:
        answers, log = Path(scratch, "answers"), Path(scratch, "log")
        answers.touch()
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with log.open("wb") as output:
            process = subprocess.Popen(
                program,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": paths},
                start_new_session=True,  # Ctrl-C is for this process alone
            )
        is_late = False
        try:
            try:
                process.stdin.write(json.dumps({**task, "answers": str(answers)}).encode() + b"\n")
                process.stdin.flush()
            except OSError:
                pass  # it ended at once; its log says why
            process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            is_late = True
        finally:
            _kill(process)
        lines = _read_lines(answers)
        if is_late:
            return Report(lines, f"timed out after {limit_seconds:.0f} s")
        return Report(lines, _failure(process.returncode, lines, log))


def _kill(process: subprocess.Popen) -> None:
    """End a process and what it started, and wait for it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    try:
        process.stdin.close()
    except OSError:
        pass


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON lines; a process may have been killed in the last one."""
    lines = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def _failure(status: int, lines: Sequence[Mapping[str, Any]], log: Path) -> str:
    said = next((line["failure"] for line in lines if "failure" in line), "")
    if said or status == 0:
        return said
    text = log.read_text(errors="replace")
    if "RESOURCE_EXHAUSTED" in text or status == -signal.SIGKILL:
        return "out of memory"
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "no output")
    ending = f"signal {-status}" if status < 0 else f"status {status}"
    return f"ended with {ending}: {console.one_line(last, 200)}"


def end_with_parent() -> None:
    """In the process: end when the search is gone, which closes stdin."""

    def wait() -> None:
        sys.stdin.read()
        os._exit(FATAL_STATUS)

    threading.Thread(target=wait, daemon=True).start()

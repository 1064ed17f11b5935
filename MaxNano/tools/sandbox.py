"""Runs untrusted Python, and grades it by a test that it cannot tamper with.

It uses the first of two mechanisms that works on this machine:
- bubblewrap (the program `bwrap`): separate namespaces for processes, network and mounts, in which
  only the interpreter and the system's libraries are visible, read-only;
- landlock: only the same files can be opened, but the existence of others can be observed.
In both, confine.py limits memory, time and open files, and a seccomp filter allows only system
calls that cannot start or signal a process, open a socket or change a file. If neither works,
nothing is run and SandboxError explains why.
Source: nanochat/execution.py@92d63d4 for the limits; nanochat does not isolate the program.
"""

import contextlib
import functools
import io
import json
import math
import os
import secrets
import selectors
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from MaxNano.tools import confine

MECHANISMS = ("bubblewrap", "landlock")
OUTPUT_BYTES = 1 << 16  # limit for stdout and for stderr; a program that writes more is killed
OPEN_FILES = 64
START_SECONDS = 60.0  # a sandbox that takes longer to start counts as broken
GUEST = Path(confine.__file__).read_text() + "\nmain()\n"


class SandboxError(ValueError):
    """No sandbox works on this machine and nothing was run; the message is one line."""


@dataclass(frozen=True)
class SandboxLimits:
    """Resources of a program; its time begins when the interpreter has started."""

    seconds: float
    memory_mb: int  # address space of each interpreter


@dataclass(frozen=True)
class SandboxResult:
    """How a program ended. Only `passed` is a verdict.

    status: `passed`, the test ran to its end (check_program only); `finished`, exit code 0, which a
    program can always produce (run_python only); `failed`; `timeout`; `flood`, too much output.
    stdout, stderr: at most OUTPUT_BYTES each; invalid UTF-8 is replaced.
    error: one line, empty if there was no error.
    """

    status: str
    stdout: str
    stderr: str
    error: str

    @property
    def passed(self) -> bool:
        """Whether the test ran to its end."""
        return self.status == "passed"


def run_python(
    source: str, *, stdin: str = "", limits: SandboxLimits, mechanism: str | None = None
) -> SandboxResult:
    """Run source as a main module in a sandbox (`mechanism`, or the first that works).

    Raises SandboxError if no sandbox works.
    """
    guest = _Guest(mechanism or working_mechanism(), limits, stdin, role="program", source=source)
    outcome = _drive([guest], limits.seconds)
    if outcome == "ended":
        outcome = "finished" if guest.process.returncode == 0 else "failed"
    error = "" if outcome == "finished" else _explain(outcome, guest, limits)
    return SandboxResult(outcome, guest.text("stdout"), guest.text("stderr"), error)


def check_program(
    program: str,
    test: str,
    entry_point: str,
    *,
    limits: SandboxLimits,
    mechanism: str | None = None,
) -> SandboxResult:
    """Run the test's `check(candidate)` on the program's function `entry_point`.

    test: trusted source that defines check and everything it uses (for HumanEval: prompt and test,
    because some tests call other functions of the prompt).

    Program and test run in two sandboxes at the same time. Calls of the candidate are messages of
    plain values to the program. Only the test's process knows the nonce that means a pass, so the
    program's exit code and output decide nothing: it can only answer calls. Arguments that the
    program changes in place do not change in the test. Raises SandboxError if no sandbox works.
    """
    mechanism = mechanism or working_mechanism()
    nonce = secrets.token_hex(16)
    with contextlib.ExitStack() as ours:  # pipe ends that the guests inherit
        calls, answers = _pipe(ours), _pipe(ours)
        start = functools.partial(_Guest, mechanism, limits, "", entry_point=entry_point)
        guest = start(role="program", source=program, pipes=(calls[0], answers[1]))
        try:
            judge = start(role="judge", source=test, nonce=nonce, pipes=(answers[0], calls[1]))
        except BaseException:
            guest.end()
            raise
    outcome = _drive([judge, guest], limits.seconds)
    if outcome == "ended":
        verdict = confine.READY + nonce.encode()
        outcome = "passed" if judge.said["status"] == verdict else "failed"
    error = "" if outcome == "passed" else _explain(outcome, judge, limits)
    if error.startswith("EOFError"):  # the program ended early; its stderr may explain it
        error = _last_line(guest.text("stderr")) or error
    return SandboxResult(
        outcome, guest.text("stdout"), guest.text("stderr") + judge.text("stderr"), error
    )


def working_mechanism() -> str:
    """The first mechanism that works on this machine. Raises SandboxError if none does."""
    faults = {}
    for mechanism in MECHANISMS:
        if not (fault := mechanism_fault(mechanism)):
            return mechanism
        faults[mechanism] = fault
    reasons = "; ".join(f"{mechanism}: {fault}" for mechanism, fault in faults.items())
    raise SandboxError(
        f"no sandbox works on this machine, so no Python is run ({reasons}); install "
        "bubblewrap, or use a kernel with Landlock"
    )


@functools.cache
def mechanism_fault(mechanism: str) -> str:
    """Why a mechanism does not work on this machine, in one line; empty if it works.

    It works if a program that tries to fork, to open a socket and to read a file fails at each.
    """
    if not sys.platform.startswith("linux"):
        return "needs Linux"
    if mechanism == "bubblewrap" and not shutil.which("bwrap"):
        return "bwrap is not installed"
    attempts = (
        "import os, socket\n"
        "for attempt in (os.fork, socket.socket, lambda: open('/etc/passwd')):\n"
        "    try: attempt()\n"
        "    except OSError: continue\n"
        "    raise SystemExit('does not confine')\n"
    )
    try:
        return run_python(attempts, limits=SandboxLimits(10.0, 256), mechanism=mechanism).error
    except (SandboxError, OSError) as error:
        return str(error)


class _Guest:
    """A running sandboxed interpreter, and its output so far."""

    def __init__(
        self,
        mechanism: str,
        limits: SandboxLimits,
        stdin: str,
        *,
        role: str,
        source: str,
        entry_point: str = "",
        nonce: str = "",
        pipes: tuple[int, ...] = (),
    ):
        rights = {
            "readable": _readable() if mechanism == "landlock" else None,
            "memory_bytes": limits.memory_mb << 20,
            "cpu_seconds": math.ceil(limits.seconds) + 1,
            "open_files": OPEN_FILES,
        }
        job = {"role": role, "source": source, "entry_point": entry_point, "nonce": nonce}
        job |= {"limits": rights, "pipes": pipes}
        with contextlib.ExitStack() as ours:
            task = _memory_file(json.dumps(job).encode(), ours)
            given = _memory_file(stdin.encode(errors="replace"), ours)
            report, status = os.pipe()
            ours.callback(os.close, status)
            try:
                self.process = subprocess.Popen(
                    [*_command(mechanism), str(task), str(status)],
                    bufsize=0,
                    stdin=given,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    pass_fds=(task, status, *pipes),
                    env={},
                    cwd="/",
                    start_new_session=True,
                )
            except BaseException:
                os.close(report)
                raise
        self.said = {"stdout": b"", "stderr": b"", "status": b""}
        self.pipes = {self.process.stdout: "stdout", self.process.stderr: "stderr"}
        self.pipes[os.fdopen(report, "rb", buffering=0)] = "status"

    @property
    def ready(self) -> bool:
        return self.said["status"].startswith(confine.READY)

    def read(self, pipe: io.FileIO) -> bool:
        """Read from a pipe, or close it at its end. Returns False if the output is too long."""
        data = os.read(pipe.fileno(), OUTPUT_BYTES)
        name = self.pipes[pipe]
        self.said[name] = (self.said[name] + data)[: OUTPUT_BYTES + 1]
        if not data:
            del self.pipes[pipe]
            pipe.close()
        return len(self.said[name]) <= OUTPUT_BYTES

    def end(self) -> None:
        """Kill the process, wait for its end and drain its pipes."""
        self.process.kill()
        self.process.wait()
        for pipe in list(self.pipes):
            while pipe in self.pipes:
                self.read(pipe)

    def text(self, name: str) -> str:
        return self.said[name][:OUTPUT_BYTES].decode(errors="replace")


def _drive(guests: list[_Guest], seconds: float) -> str:
    """Read from all guests until the first has ended, then end all of them.

    Returns `ended`, `timeout` or `flood`. Raises SandboxError if a guest did not start its task.
    """
    try:
        with selectors.DefaultSelector() as selector:
            for guest in guests:
                for pipe in guest.pipes:
                    selector.register(pipe, selectors.EVENT_READ, guest)
            outcome = _read_on(selector, guests, seconds)
    finally:
        for guest in guests:
            guest.end()
    if outcome == "broken":
        guest = next(guest for guest in guests if not guest.ready)
        raise SandboxError(_last_line(guest.text("stderr")) or "the sandbox does not start")
    return outcome


def _read_on(selector: selectors.BaseSelector, guests: list[_Guest], seconds: float) -> str:
    """As _drive, or `broken` if a guest did not start its task; guests may still run."""
    started, deadline = False, time.monotonic() + START_SECONDS
    while guests[0].pipes:
        if not started and all(guest.ready for guest in guests):
            started, deadline = True, time.monotonic() + seconds
        left = deadline - time.monotonic()
        if left <= 0:
            return "timeout" if started else "broken"
        for key, _ in selector.select(left):
            guest, name = key.data, key.data.pipes[key.fileobj]
            if not guest.read(key.fileobj):
                return "flood"
            if key.fileobj.closed:
                selector.unregister(key.fileobj)
                if name == "status" and not guest.ready:
                    return "broken"
    try:
        guests[0].process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:  # it closed its pipes and still runs
        return "timeout"
    return "ended"


def _explain(outcome: str, guest: _Guest, limits: SandboxLimits) -> str:
    """Why a guest did not succeed, in one line."""
    if outcome == "timeout":
        return f"timed out after {limits.seconds:g} s"
    if outcome == "flood":
        return f"more than {OUTPUT_BYTES} bytes of output"
    ended = f"ended with exit code {guest.process.returncode}"
    return _last_line(guest.text("stderr")) or ended


def _command(mechanism: str) -> list[str]:
    """The command that runs confine.py under a mechanism; two file descriptors are to be appended.

    The interpreter has no environment, no site-packages and no user folder.
    """
    python = [os.path.realpath(sys.executable), "-I", "-S", "-B", "-X", "utf8", "-c", GUEST]
    if mechanism == "landlock":
        return python
    mounts = [word for path in _readable() for word in ("--ro-bind", path, path)]
    for device in ("/dev/null", "/dev/zero", "/dev/urandom"):
        mounts += ["--dev-bind", device, device]
    alone = ["--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    bwrap = shutil.which("bwrap") or "bwrap"
    return [bwrap, *alone, *mounts, "--remount-ro", "/", "--chdir", "/", "--", *python]


@functools.cache
def _readable() -> tuple[str, ...]:
    """Paths that an interpreter needs: itself, its library, the system's libraries."""
    prefixes = (sys.base_prefix, "/usr", "/")
    folders = [os.path.join(prefix, lib) for prefix in prefixes for lib in ("lib", "lib64")]
    return (os.path.realpath(sys.executable), *dict.fromkeys(filter(os.path.isdir, folders)))


def _memory_file(data: bytes, ours: contextlib.ExitStack) -> int:
    """A descriptor of an in-memory file with `data`; closed with `ours`."""
    descriptor = os.memfd_create("maxnano")
    ours.callback(os.close, descriptor)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(data)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _pipe(ours: contextlib.ExitStack) -> tuple[int, int]:
    """A pipe's read end and write end, both closed with `ours`."""
    ends = os.pipe()
    for end in ends:
        ours.callback(os.close, end)
    return ends


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]

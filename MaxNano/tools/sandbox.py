"""Runs Python that nobody trusts, and judges it by a test that it cannot reach.

Two mechanisms, of which the first that works on this machine is taken:
- bubblewrap (the program `bwrap`): namespaces of its own for processes, network and mounts, in
  which only the interpreter and the system's libraries can be seen, read-only;
- landlock: the same files and no others can be opened, though whether others exist can be asked.
In both, MaxNano/tools/confine.py then bounds memory, time and open files and leaves the process, by
seccomp, only system calls that cannot start or signal a process, open a socket or change a file.
Where neither works nothing is run: SandboxError says why.
Source: nanochat/execution.py@92d63d4 for the limits; its sandbox is none and is not followed.
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
OUTPUT_BYTES = 1 << 16  # of standard output and of standard error; who writes more is killed
OPEN_FILES = 64
START_SECONDS = 60.0  # a sandbox that has not started by then is broken, not slow
GUEST = Path(confine.__file__).read_text() + "\nmain()\n"


class SandboxError(ValueError):
    """No sandbox works here, so nothing was run; one line that says why."""


@dataclass(frozen=True)
class Limits:
    """What a program may use; the clock starts when its interpreter stands."""

    seconds: float
    memory_mb: int  # address space of each interpreter, what it takes for itself included


@dataclass(frozen=True)
class Result:
    """How a program ended. Only `passed` is a verdict.

    status: `passed`: the test ran to its end (check_program only). `finished`: exit code 0, which a
    program can always arrange (run_python only). `failed`; `timeout`; `flood`: too much output.
    stdout, stderr: what was written, at most OUTPUT_BYTES each; undecodable bytes are replaced.
    error: one line on what went wrong, empty where nothing did.
    """

    status: str
    stdout: str
    stderr: str
    error: str

    @property
    def passed(self) -> bool:
        """The test's verdict."""
        return self.status == "passed"


def run_python(
    source: str, *, stdin: str = "", limits: Limits, mechanism: str | None = None
) -> Result:
    """Runs source as a main module, in a sandbox (`mechanism`, or the first that works).

    Raises SandboxError where no sandbox works.
    """
    guest = _Guest(mechanism or working_mechanism(), limits, stdin, role="program", source=source)
    outcome = _drive([guest], limits.seconds)
    if outcome == "ended":
        outcome = "finished" if guest.process.returncode == 0 else "failed"
    error = "" if outcome == "finished" else _explain(outcome, guest, limits)
    return Result(outcome, guest.text("stdout"), guest.text("stderr"), error)


def check_program(
    program: str, test: str, entry_point: str, *, limits: Limits, mechanism: str | None = None
) -> Result:
    """Whether the program's function `entry_point` satisfies the test's `check(candidate)`.

    test: trusted source; it defines check and whatever check uses (for HumanEval: prompt and test,
    because some tests call other functions that the prompt defines).

    Program and test run at the same time in two sandboxes. The test's calls of the candidate go to
    the program as messages of plain values, and it is the test's process that holds the nonce which
    makes a pass. So whatever the program does to its own interpreter, exit code or output decides
    nothing: it can only answer calls. Arguments that it changes in place stay as they were.
    Raises SandboxError where no sandbox works.
    """
    mechanism = mechanism or working_mechanism()
    nonce = secrets.token_hex(16)
    with contextlib.ExitStack() as ours:  # the ends that the guests inherit
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
    if error.startswith("EOFError"):  # nobody to call; the program may have said why
        error = _last_line(guest.text("stderr")) or error
    return Result(outcome, guest.text("stdout"), guest.text("stderr") + judge.text("stderr"), error)


def working_mechanism() -> str:
    """The first mechanism that works on this machine; SandboxError where none does."""
    faults = {}
    for mechanism in MECHANISMS:
        if not (fault := mechanism_fault(mechanism)):
            return mechanism
        faults[mechanism] = fault
    reasons = "; ".join(f"{mechanism}: {fault}" for mechanism, fault in faults.items())
    raise SandboxError(
        f"no sandbox works on this machine, so no Python is run in it ({reasons}); install "
        "bubblewrap, or use a kernel with Landlock"
    )


@functools.cache
def mechanism_fault(mechanism: str) -> str:
    """Why a mechanism cannot be used here, in one line; empty where it confines a program that tries to get out."""
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
        return run_python(attempts, limits=Limits(10.0, 256), mechanism=mechanism).error
    except (SandboxError, OSError) as error:
        return str(error)


class _Guest:
    """A sandboxed interpreter at work, and what it has said so far."""

    def __init__(
        self,
        mechanism: str,
        limits: Limits,
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
        """Takes what waits in a pipe, or closes it at its end; False where it holds more than it may."""
        data = os.read(pipe.fileno(), OUTPUT_BYTES)
        name = self.pipes[pipe]
        self.said[name] = (self.said[name] + data)[: OUTPUT_BYTES + 1]
        if not data:
            del self.pipes[pipe]
            pipe.close()
        return len(self.said[name]) <= OUTPUT_BYTES

    def end(self) -> None:
        """Kills what still runs and waits until all of it is gone: then nobody holds a pipe's other end."""
        self.process.kill()
        self.process.wait()
        for pipe in list(self.pipes):
            while pipe in self.pipes:
                self.read(pipe)

    def text(self, name: str) -> str:
        return self.said[name][:OUTPUT_BYTES].decode(errors="replace")


def _drive(guests: list[_Guest], seconds: float) -> str:
    """Reads from all guests until the first has ended: `ended`, `timeout` or `flood`; then none is left.

    Raises SandboxError where a guest did not get to its task.
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
    """As _drive, and `broken` where a guest did not get to its task; guests may be left at work."""
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
    except subprocess.TimeoutExpired:  # it closed its pipes and goes on
        return "timeout"
    return "ended"


def _explain(outcome: str, guest: _Guest, limits: Limits) -> str:
    """One line on why a guest did not do what it should."""
    if outcome == "timeout":
        return f"not done after {limits.seconds:g} s"
    if outcome == "flood":
        return f"more than {OUTPUT_BYTES} bytes of output"
    ended = f"ended with exit code {guest.process.returncode}"
    return _last_line(guest.text("stderr")) or ended


def _command(mechanism: str) -> list[str]:
    """The command that runs confine.py under a mechanism; it awaits two file descriptors as arguments.

    The interpreter sees no environment, no site-packages and no user's folder.
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
    """What an interpreter needs to see: itself, its library, the system's libraries."""
    prefixes = (sys.base_prefix, "/usr", "/")
    folders = [os.path.join(prefix, lib) for prefix in prefixes for lib in ("lib", "lib64")]
    return (os.path.realpath(sys.executable), *dict.fromkeys(filter(os.path.isdir, folders)))


def _memory_file(data: bytes, ours: contextlib.ExitStack) -> int:
    """A file that lives in memory only, to be read from its start; closed with `ours`."""
    descriptor = os.memfd_create("maxnano")
    ours.callback(os.close, descriptor)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(data)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _pipe(ours: contextlib.ExitStack) -> tuple[int, int]:
    """A pipe's reading and writing end, both closed with `ours`."""
    ends = os.pipe()
    for end in ends:
        ours.callback(os.close, end)
    return ends


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]

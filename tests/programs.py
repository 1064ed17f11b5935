"""Starts MaxNano's programs in processes of their own, without importing everything again.

An import of JAX and the package takes longer than most programs of the tests. On Linux a server
imports them once per test process, before any backend exists, and forks for each program: the child
runs the same file, or the same code of -c, as `__main__`, with arguments, folder, environment and
pipes of its own. It has pid and exit status as from subprocess. Elsewhere, and with an environment
that imports would read, the program is started as usual. Children of one server have the same hash
seed: what must not depend on it is tested with programs that start as usual (test_end_to_end.py).
"""

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib.machinery
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMPORTED = "train evaluate chat report convert train_tokenizer data.download".split()
# Variables that modules read when they are imported.
READ_BY_IMPORTS = ("JAX_", "PYTHON", "FSSPEC_", "MAXNANO_", "OMP_", "OPENBLAS_")
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
MESSAGE_BYTES = 12  # a pid or an exit status
ENVIRONMENT = dict(os.environ)  # of the server, as no test has changed it


# ---- For tests ----------------------------------------------------------------------------------


def start(*command, cwd=ROOT, env=None, stderr=subprocess.PIPE):
    """Starts python with the words of `command`: a file or -c and code, and its arguments.

    cwd: a folder. env: the whole environment, by default that of this process. stderr:
    subprocess.PIPE or STDOUT. Returns a Popen, or a Program, with stdout and stderr as text.
    """
    command = [str(word) for word in command]
    env = dict(os.environ if env is None else env)
    if sys.platform == "linux" and read_by_imports(env) == read_by_imports(ENVIRONMENT):
        return Program(command, str(cwd), env, stderr)
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def run(*command, timeout=300, **options):
    """start() to the end: a CompletedProcess with what it wrote."""
    process = start(*command, **options)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def finish(process, status=0, timeout=300):
    """(what it wrote to stdout, to stderr), after its end, which must be with `status`."""
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == status, out + err
    return out, err


def rows_of(run):
    """The rows of metrics.jsonl in the folder of a run."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def read_by_imports(env):
    return {
        name: value
        for name, value in env.items()
        if name.startswith(READ_BY_IMPORTS) and name != "PYTHONPATH"
    }


class Program:
    """A program that the server has forked; what the tests use of subprocess.Popen."""

    def __init__(self, command, cwd, env, stderr):
        self.args, self.returncode = command, None
        self._connection, connection_end = socket.socketpair()
        out, out_end = os.pipe()
        err, err_end = os.pipe() if stderr == subprocess.PIPE else (None, os.dup(out_end))
        self.stdout = open(out)  # noqa: SIM115 (as in Popen, closed by who reads it)
        self.stderr = open(err) if err is not None else None  # noqa: SIM115
        ends = [connection_end.detach(), out_end, err_end]
        socket.send_fds(server(), [b"."], ends)
        for end in ends:
            os.close(end)
        request = {"command": command, "cwd": cwd, "env": env}
        self._connection.sendall(json.dumps(request).encode() + b"\n")
        self.pid = self._receive()

    def _receive(self):
        message = self._connection.recv(MESSAGE_BYTES, socket.MSG_WAITALL)
        if len(message) < MESSAGE_BYTES:
            raise RuntimeError("the server of tests/programs.py has ended")
        return int(message)

    def wait(self, timeout=None):
        """The exit status, negative for a signal; raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = self._receive()
            self._connection.close()
        return self.returncode

    def poll(self):
        """The exit status, None while it runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number):
        """Sends a signal unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # since then
                os.kill(self.pid, number)

    def kill(self):
        """Ends it at once."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=None):
        """(what it wrote to stdout, to stderr), after its end."""
        end = None if timeout is None else time.monotonic() + timeout
        pipes = [pipe for pipe in (self.stdout, self.stderr) if pipe and not pipe.closed]
        written = {}

        def read(pipe):
            with pipe:
                written[pipe] = pipe.read()

        def left():
            return None if end is None else max(0, end - time.monotonic())

        threads = [threading.Thread(target=read, args=(pipe,), daemon=True) for pipe in pipes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(left())
            if thread.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout)
        self.wait(left())
        return written.get(self.stdout), written.get(self.stderr)


@functools.cache
def server():
    """A connection to the server of this process, which ends when it is closed."""
    connection, other = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, __file__, str(other.fileno())],
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        pass_fds=[other.fileno()],
    )
    other.close()
    atexit.register(process.wait)
    atexit.register(connection.close)  # before that
    return connection


# ---- The server ---------------------------------------------------------------------------------


def serve(requests):
    """Forks for each request; returns the request in the process that is to run it."""
    server = os.getpid()
    while True:
        message, fds, _, _ = socket.recv_fds(requests, 1, 3)
        if not message:
            sys.exit()
        if os.fork() == 0:
            requests.close()
            return supervise(server, *fds)
        for fd in fds:
            os.close(fd)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def supervise(server, connection, out, err):
    """Forks the program and reports its pid and its exit status; returns in the program alone."""
    end_with(server)
    connection = socket.socket(fileno=connection)
    with connection.makefile() as lines:
        request = json.loads(lines.readline())
    supervisor, pid = os.getpid(), os.fork()
    if pid == 0:
        connection.close()
        end_with(supervisor)
        os.dup2(out, 1), os.dup2(err, 2)
        os.close(out), os.close(err)
        return request
    os.close(out), os.close(err)
    connection.sendall(b"%*d" % (MESSAGE_BYTES, pid))
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):  # nobody waits for it
        connection.sendall(b"%*d" % (MESSAGE_BYTES, status))
    os._exit(0)


def end_with(parent):
    """This process is killed when its parent ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def become(command, cwd, env):
    """Runs the program as python does."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[1:1] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    spec = importlib.machinery.PathFinder.find_spec("MaxNano", sys.path[1:])
    if spec and spec.origin != MaxNano.__file__:
        for name in [name for name in sys.modules if name.split(".")[0] == "MaxNano"]:
            del sys.modules[name]  # a copy of the package is imported anew
    if command[0] == "-c":
        sys.argv = ["-c", *command[2:]]
        sys.path[0] = ""
        sys.modules["__main__"] = module = types.ModuleType("__main__")
        exec(compile(command[1], "<string>", "exec"), module.__dict__)
    else:
        sys.argv = command
        sys.path[0] = str(Path(command[0]).resolve().parent)
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests
    sys.modules["programs"] = sys.modules["__main__"]  # for code of -c that imports test modules
    sys.path[0] = str(ROOT)
    MaxNano = importlib.import_module("MaxNano")
    for name in IMPORTED:
        importlib.import_module(f"MaxNano.{name}")
    assert threading.active_count() == 1, threading.enumerate()
    gc.set_threshold(*MaxNano.GC_THRESHOLDS)  # as programs do
    gc.collect()
    gc.freeze()  # collections of the children copy no pages
    become(**serve(socket.socket(fileno=int(sys.argv[1]))))

"""The sandbox: nothing gets out of it, nothing survives in it, and no program passes but by being
right.
"""

import contextlib
import os
import re
import socket
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from MaxNano.tools import confine, sandbox
from MaxNano.tools.sandbox import SandboxLimits, check_program, run_python

LIMITS = SandboxLimits(seconds=20.0, memory_mb=256)
SHORT = SandboxLimits(seconds=0.5, memory_mb=256)
MARKER = (
    f"maxnano-sandbox-test-{uuid.uuid4()}"  # in the command line of every process of every sandbox
)


@pytest.fixture(scope="module", params=sandbox.MECHANISMS)
def mechanism(request):
    if fault := sandbox.mechanism_fault(request.param):
        pytest.skip(f"{request.param} cannot be used on this machine: {fault}")
    return request.param


@pytest.fixture(autouse=True, scope="module")
def marked():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "GUEST", f"{sandbox.GUEST}\n# {MARKER}\n")
        yield


def at_once(run, cases):
    """A program's sandbox mostly waits for the kernel, so several are at work at the same time."""
    with nothing_remains(), ThreadPoolExecutor(6) as pool:
        return dict(zip(cases, pool.map(run, cases), strict=True))


def survivors():
    """Processes of any of this module's sandboxes."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if MARKER.encode() in (folder / "cmdline").read_bytes():
                found.append(folder.name)
    return found


def memory_mb(field):
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


@contextlib.contextmanager
def nothing_remains():
    """No process is left of what runs inside, and this process never grew by more than 64 MB."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = memory_mb("VmRSS")
    yield
    assert survivors() == []
    assert memory_mb("VmHWM") - before <= 64


# ---- Escapes ------------------------------------------------------------------------------------
# Each tries to do something to the world outside and raises where it is not let. VICTIM is a
# process of the same user, SECRET and FOLDER a file and a folder of the host, PORT a listening
# socket.
C = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def ok(result):
    if result < 0: raise OSError(ctypes.get_errno())
"""
HARMLESS = {  # plain Python, outside, gets through with every one of these: so it is the sandbox that holds
    "read a system file": "open('/etc/passwd').read()",
    "read a user's file": "open(SECRET).read()",
    "read by descriptor": "import os; os.read(os.open(SECRET, os.O_RDONLY), 9)",
    "list a user's folder": "import os; os.listdir(FOLDER)",
    "list the root": "import os; assert 'etc' in os.listdir('/')",
    "read its start-up environment": "open('/proc/self/environ').read()",
    "read another's environment": "open(f'/proc/{VICTIM}/environ').read()",
    "read another's memory map": "open(f'/proc/{VICTIM}/maps').read()",
    "write a user's file": "open(FOLDER + '/written', 'w').write('x')",
    "append to a user's file": "open(SECRET, 'a').write('')",
    "write a temporary file": "import tempfile; tempfile.NamedTemporaryFile()",
    "write shared memory": "p = '/dev/shm/' + NAME; open(p, 'w').write('x'); import os; os.unlink(p)",
    "make a folder": "import os; os.mkdir(FOLDER + '/made'); os.rmdir(FOLDER + '/made')",
    "make a symbolic link": "import os; os.symlink(SECRET, FOLDER + '/link'); os.unlink(FOLDER + '/link')",
    "make a hard link": "import os; os.link(SECRET, FOLDER + '/hard'); os.unlink(FOLDER + '/hard')",
    "make a named pipe": "import os; os.mkfifo(FOLDER + '/fifo'); os.unlink(FOLDER + '/fifo')",
    "change a mode": "import os; os.chmod(SECRET, 0o600)",
    "set a file's times": "import os; os.utime(SECRET)",
    "rename a file": "import os; os.rename(SECRET, SECRET + '2'); os.rename(SECRET + '2', SECRET)",
    "memory outside the limit": "import os; os.memfd_create('x')",
    "run a shell": "import os; assert os.system('true') == 0\n",
    "run a shell from C": C + "assert libc.system(b'true') == 0\n",
    "start a program": "import subprocess; subprocess.run(['/bin/true'], check=True)",
    "spawn a program": "import os; os.waitpid(os.posix_spawn('/bin/true', ['true'], {}), 0)",
    "become another program": "import os; os.execv('/bin/true', ['true'])",
    "fork": "import os; os.fork() or os._exit(0)",
    "fork by reloaded module": "import importlib, os; importlib.reload(os).fork() or os._exit(0)",
    "fork from C": C + "r = libc.fork(); ok(r); r or libc._exit(0)",
    "start a worker process": "import multiprocessing as m; m.get_context('fork').Process(target=int).start()",
    "signal another process": "import os; os.kill(VICTIM, 0)",
    "own another's signals": "import os, fcntl; fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, VICTIM)",
    "handle on another process": "import os; os.pidfd_open(VICTIM)",
    "limits of another process": "import resource; resource.prlimit(VICTIM, resource.RLIMIT_CPU)",
    "priority of another process": "import os; os.setpriority(os.PRIO_PROCESS, VICTIM, 19)",
    "connect": "import socket; socket.create_connection(('127.0.0.1', PORT))",
    "listen": "import socket; socket.create_server(('127.0.0.1', 0))",
    "datagram": "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))",
    "local socket": "import socket; socket.socket(socket.AF_UNIX).bind(chr(0) + NAME)",
    "talk to the kernel": "import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
}
NAMES = {
    "clone": (56, 220),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "io_uring_setup": (425, 425),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "keyctl": (250, 219),
    "userfaultfd": (323, 282),
    "clone3": (435, 435),
    "add_key": (248, 217),
    "mq_open": (180, 180),
    "shmget": (29, 194),
}
COLUMN = confine.ARCHITECTURES.get(os.uname().machine, (0,))[0]
SYSCALL = {name: numbers[COLUMN] for name, numbers in NAMES.items()}
DANGEROUS = {  # tried inside only
    "kill another process": "import os, signal; os.kill(VICTIM, signal.SIGKILL)",
    "kill by owned pipe": C
    + "import fcntl, os; r, w = os.pipe(); libc.fcntl(r, 10, 9); ok(libc.fcntl(r, 8, VICTIM))\n"
    + "libc.fcntl(r, 4, 0o20000); os.write(w, b'x')",
    "kill every process": "import os, signal; os.kill(-1, signal.SIGKILL)",
    "trace another process": C + f"ok(libc.syscall({SYSCALL['ptrace']}, 16, VICTIM, 0, 0))",
    "read another's memory": C
    + f"ok(libc.syscall({SYSCALL['process_vm_readv']}, VICTIM, 0, 0, 0, 0, 0))",
    "write another's memory": "open(f'/proc/{VICTIM}/mem', 'r+b')",
    "new namespaces": C + "ok(libc.unshare(0x10000000))",
    "new namespaces by clone": C + f"ok(libc.syscall({SYSCALL['clone']}, 0x10000011, 0, 0, 0, 0))",
    "new process by clone3": C
    + f"a = (ctypes.c_uint64 * 8)(); a[4] = 17\nok(libc.syscall({SYSCALL['clone3']}, a, 64))",
    "another's namespaces": "import os; libc = os.open(f'/proc/{VICTIM}/ns/net', os.O_RDONLY)",
    "mount": C + "ok(libc.mount(b'none', b'/tmp', b'tmpfs', 0, 0))",
    "change the root": "import os; os.chroot('/usr')",
    "become another user": "import os; os.setuid(12345)",
    "make a device": "import os, stat; os.mknod('/dev/maxnano', 0o600 | stat.S_IFBLK, os.makedev(254, 0))",
    "change the library": "import os; open(os.__file__, 'a')",
    "truncate a file": "import os; os.truncate(SECRET, 0)",
    "delete a file": "import os; os.unlink(SECRET)",
    "open the kernel's memory": "open('/dev/mem', 'rb')",
    "io_uring": C + f"ok(libc.syscall({SYSCALL['io_uring_setup']}, 1, (ctypes.c_char * 120)()))",
    "load a kernel program": C
    + f"ok(libc.syscall({SYSCALL['bpf']}, 0, (ctypes.c_char * 120)(), 120))",
    "kernel keys": C + f"ok(libc.syscall({SYSCALL['keyctl']}, 0, -3, 0))",
    "catch page faults": C + f"ok(libc.syscall({SYSCALL['userfaultfd']}, 1))",
    "shared memory of old": C + f"ok(libc.syscall({SYSCALL['shmget']}, 0, 4096, 0o600))",
    "the machine's service account": "import socket; socket.create_connection(('169.254.169.254', 80), 5)",
    "resolve a name": "import socket; socket.getaddrinfo('localhost.localdomain', 80)",
    "lift a limit": "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))",
    "an inherited descriptor": "import os\nfor fd in range(3, 1024):\n"
    "    try: os.fstat(fd)\n    except OSError: continue\n    break\nelse: raise OSError('none')\n",
}
ESCAPES = HARMLESS | DANGEROUS
ATTEMPT = """
VICTIM, SECRET, FOLDER, PORT, NAME = {values}
try:
{source}
except (OSError, AssertionError, ValueError) as error:
    print("held", type(error).__name__)
else:
    print("OUT")
"""
VICTIM = "import time; print(flush=True); time.sleep(600)"


@pytest.fixture
def world(tmp_path):
    """What an escape would reach."""
    secret = tmp_path / "secret"
    secret.write_text("secret")
    victim = subprocess.Popen([sys.executable, "-I", "-S", "-c", VICTIM], stdout=subprocess.PIPE)
    victim.stdout.readline()
    with victim, socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        values = (victim.pid, str(secret), str(tmp_path), port, uuid.uuid4().hex)
        yield values, secret, victim, server
        victim.kill()


def attempt(name, values):
    return ATTEMPT.format(values=values, source=textwrap.indent(ESCAPES[name], "    "))


def test_forty_escapes_are_tried():
    assert len(ESCAPES) >= 40


def test_outside_the_attempts_succeed(world):
    values = world[0]
    for name in HARMLESS:
        source = attempt(name, values)
        done = subprocess.run([sys.executable, "-I", "-S", "-c", source], capture_output=True)
        assert done.returncode == 0 and b"held" not in done.stdout, (name, done)


def test_no_escape(mechanism, world, subtests):
    values, secret, victim, server = world
    server.settimeout(0)
    results = at_once(
        lambda name: run_python(attempt(name, values), limits=LIMITS, mechanism=mechanism), ESCAPES
    )
    for name, result in results.items():
        with subtests.test(name):
            assert result.stdout.startswith("held") and "OUT" not in result.stdout, result
    assert victim.poll() is None
    assert secret.read_text() == "secret" and os.listdir(secret.parent) == ["secret"]
    with pytest.raises(BlockingIOError):
        server.accept()


# ---- Exhaustion ---------------------------------------------------------------------------------
EXHAUSTING = {  # source, the statuses it may end with
    "one large object": ("bytearray(1 << 34)", {"failed"}),
    "many small objects": ("a = []\nwhile True: a.append(bytearray(1 << 20))", {"failed"}),
    "a large integer": ("1 << (1 << 40)", {"failed"}),
    "fork bomb": ("import os\nwhile True: os.fork()", {"failed"}),
    "thread bomb": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()",
        {"failed", "timeout"},
    ),
    "descriptors": ("import os\nwhile True: os.pipe()", {"failed"}),
    "the disk": ("f = open('/tmp/x', 'wb')\nwhile True: f.write(bytes(1 << 20))", {"failed"}),
    "output": ("while True: print('x' * 10000)", {"flood"}),
    "errors": ("import sys\nwhile True: sys.stderr.write('x' * 10000)", {"flood"}),
    "output of no encoding": (
        "import sys; sys.stdout.buffer.write(bytes(range(256)))",
        {"finished"},
    ),
    "an endless loop": ("while True: pass", {"timeout"}),
    "sleep": ("import time; time.sleep(600)", {"timeout"}),
    "deaf to signals": (
        "import signal\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except OSError: pass\nwhile True: pass",
        {"timeout"},
    ),
    "silent": ("import os, time\nfor fd in range(3): os.close(fd)\ntime.sleep(600)", {"timeout"}),
    "a crash": ("import ctypes; ctypes.string_at(0)", {"failed"}),
    "deep recursion": (
        "import sys; sys.setrecursionlimit(1 << 30)\n(f := lambda: f())()",
        {"failed", "timeout"},
    ),
    "a deep source": ("(" * 100_000, {"failed", "flood"}),
    "a null character": ("\0", {"failed"}),
}


def test_no_exhaustion(mechanism, subtests):
    def run(name):
        source, statuses = EXHAUSTING[name]
        limits = SHORT if "timeout" in statuses else LIMITS
        return run_python(source, limits=limits, mechanism=mechanism)

    for name, result in at_once(run, EXHAUSTING).items():
        with subtests.test(name):
            assert result.status in EXHAUSTING[name][1], result
            assert len(result.stdout) + len(result.stderr) <= 2 * sandbox.OUTPUT_BYTES
            assert "\n" not in result.error
            assert bool(result.error) == (result.status != "finished")


def test_dies_with_its_parent(mechanism, tmp_path):
    """A trainer that is killed leaves no program behind."""
    source = (
        f"import sys; sys.path.insert(0, {str(Path(sandbox.__file__).parents[1])!r})\n"
        f"from MaxNano.tools import sandbox\nsandbox.GUEST += '\\n# {MARKER}'\nprint(flush=True)\n"
        f"sandbox.run_python('import time; time.sleep(600)', mechanism={mechanism!r},\n"
        f"    limits=sandbox.SandboxLimits(600.0, 256))\n"
    )
    with subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE) as parent:
        parent.stdout.readline()
        while (
            len(survivors()) < 2
        ):  # the parent itself, which carries the marker too, and its sandbox
            assert parent.poll() is None
            time.sleep(0.05)
        time.sleep(0.5)
        parent.kill()
    end = time.monotonic() + 30
    while survivors() and time.monotonic() < end:
        time.sleep(0.05)
    assert survivors() == []


# ---- What is allowed ----------------------------------------------------------------------------
def test_programs_run(mechanism):
    source = """
        import asyncio, collections, dataclasses, datetime, decimal, hashlib, math, random, re, sys, threading
        @dataclasses.dataclass
        class Point:
            x: int
        async def later():
            await asyncio.sleep(0)
            return "later"
        thread = threading.Thread(target=print, args=("thread",)); thread.start(); thread.join()
        print(__name__, sys.stdin.read(), asyncio.run(later()), Point(math.isqrt(9)), "größer")
    """
    result = run_python(textwrap.dedent(source), stdin="given", limits=LIMITS, mechanism=mechanism)
    assert result.stdout == "thread\n__main__ given later Point(x=3) größer\n", result
    assert result.status == "finished" and result.error == ""


def test_errors_are_told_in_one_line(mechanism):
    result = run_python("print('before')\n1 / 0", limits=LIMITS, mechanism=mechanism)
    assert (result.status, result.stdout) == ("failed", "before\n")
    assert result.error == "ZeroDivisionError: division by zero"
    assert result.stderr.splitlines()[1] == '  File "program.py", line 2, in <module>'


def test_off_the_main_thread(mechanism):
    """And several at once, each with its own output."""
    results = {}

    def work(n):
        results[n] = run_python(f"print({n})", limits=LIMITS, mechanism=mechanism).stdout

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: f"{n}\n" for n in range(4)}


# ---- Verdicts -----------------------------------------------------------------------------------
TEST = """
import math
def check(candidate):
    assert candidate(2, 3) == 5
    assert candidate(-1, 1) == 0
    assert abs(candidate(0.5, 0.25) - 0.75) < 1e-6
    assert math.isclose(candidate(1.5, 1.25), 2.75)
"""
RIGHT = "def add(a, b): return a + b"
WRONG = "\ndef add(a, b): return None\n"
FAKES = {
    "exit": "import sys; sys.exit(0)",
    "exit at once": "import os; os._exit(0)",
    "exit when called": "def add(a, b): raise SystemExit(0)",
    "exit at exit": "import atexit, os; atexit.register(os._exit, 0)" + WRONG,
    "exit on error": "import os, sys; sys.excepthook = lambda *a: os._exit(0)" + WRONG,
    "exit by thread": "import os, threading, time\ndef add(a, b):\n"
    "    threading.Thread(target=os._exit, args=(0,)).start(); time.sleep(99)",
    "exit by timer": "import os, signal, time\nsignal.signal(signal.SIGALRM, lambda *a: os._exit(0))\n"
    "def add(a, b): signal.setitimer(signal.ITIMER_REAL, 0.01); time.sleep(99)",
    "equal to everything": "class E(float):\n    __eq__ = lambda s, o: True\n    __sub__ = lambda s, o: 0.0\n"
    "    __rsub__ = __sub__\ndef add(a, b): return E('inf') if type(a) is float else E()\n"
    "import math; math.isclose = lambda a, b: True",
    "other builtins and modules": "import builtins, math\nbuiltins.abs = lambda x: 0\n"
    "math.isclose = lambda *a: True\ndef add(a, b): return a + b if type(a) is int else 0",
    "answers read off the caller's frame": "import sys\ndef add(a, b):\n"
    "    c = list(sys._getframe(1).f_code.co_consts); return c[c.index(b) + 1]",
    "answers read off all objects": "import gc\ndef add(a, b):\n"
    "    f = [o for o in gc.get_objects() if getattr(o, '__name__', '') == 'check'][0]\n"
    "    c = list(f.__code__.co_consts); return c[c.index(b) + 1]",
    "asserts jumped over in the caller's frame": "import sys\ndef add(a, b):\n    def jump(frame, event, arg):\n"
    "        frame.f_lineno = frame.f_code.co_firstlineno + 4; frame.f_trace = None\n"
    "    if a == 2: sys.settrace(lambda *x: None); sys._getframe(1).f_trace = jump\n"
    "    return 5 if a == 2 else 2.75 if a == 1.5 else None",
    "the verdict written to every descriptor": "import os\nfor fd in range(256):\n    try:\n"
    "        if not os.get_inheritable(fd) or fd != 2: os.write(fd, b'ready\\n' + b'0' * 32)\n"
    "    except OSError: pass\nos._exit(0)",
    "the verdict printed": "print('ready', '0' * 32, 'passed'); raise SystemExit(0)",
    "a fork that exits": "import os\nif os.fork(): os._exit(0)" + WRONG,
    "check replaced": "import threading, time\ndef swap():\n    import __main__\n    while True:\n"
    "        __main__.check = lambda c: None\nthreading.Thread(target=swap, daemon=True).start()"
    + WRONG,
}
LUCK = {"check replaced"}  # a race, which plain Python sometimes wins
HANGS = {"asserts jumped over in the caller's frame"}  # its caller is the loop that answers calls


def test_twelve_fakes_are_tried():
    assert len(FAKES) >= 12


def test_outside_the_fakes_pass(tmp_path):
    """By exit code, test appended to program, as is the custom."""
    for name, fake in FAKES.items():
        (tmp_path / "program.py").write_text(f"{fake}\n{TEST}\ncheck(add)")
        command = [sys.executable, "-I", "-S", "program.py"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60)
        assert done.returncode == 0 or name in LUCK, (name, done.stderr.decode())


def test_no_fake_passes(mechanism, subtests):
    def check(name):
        limits = SHORT if name in HANGS else LIMITS
        return check_program(FAKES[name], TEST, "add", limits=limits, mechanism=mechanism)

    for name, result in at_once(check, FAKES).items():
        with subtests.test(name):
            assert result.status == ("timeout" if name in HANGS else "failed"), result
            assert result.error and not result.passed


def test_right_programs_pass(mechanism):
    result = check_program(
        RIGHT + "\nprint('hello')", TEST, "add", limits=LIMITS, mechanism=mechanism
    )
    assert result == sandbox.SandboxResult("passed", "hello\n", "", "") and result.passed


@pytest.mark.parametrize(
    "program, error",
    [
        ("def add(a, b): return a - b", "AssertionError"),
        (
            "def add(a, b):",
            "IndentationError: expected an indented block after function definition on line 1",
        ),
        ("def sub(a, b): return a + b", "NameError: the program does not define add"),
        ("def add(a, b): return 1 / 0", "ZeroDivisionError: division by zero"),
        (
            "def add(a, b): return iter([a])",
            "TypeError: a list_iterator cannot be passed between test and program",
        ),
        ("def add(a, b): print('x' * 1000000)", "more than 65536 bytes of output"),
        ("def add(a, b):\n    while True: pass", "timed out after 1 s"),
    ],
)
def test_wrong_programs_are_told_why(mechanism, program, error):
    limits = SandboxLimits(1.0, 256) if "while" in program else LIMITS
    result = check_program(program, TEST, "add", limits=limits, mechanism=mechanism)
    assert not result.passed and result.error == error, result


def test_helpers_of_the_test_are_the_tests_own(mechanism):
    """As in HumanEval, where some tests call functions that the prompt defines, or the candidate by
    its name.
    """
    prompt = "def twice(x): return 2 * x\n\ndef half(x):\n    '''Half of x.'''\n"
    test = prompt + "\ndef check(f):\n    assert twice(f(6)) == 6\n    assert half(4) == 2\n"
    honest = prompt + "    return x // 2"
    fake = "class E:\n    __eq__ = lambda s, o: True\ntwice = lambda x: E()\nhalf = lambda x: 9"
    assert check_program(honest, test, "half", limits=LIMITS, mechanism=mechanism).passed
    assert not check_program(fake, test, "half", limits=LIMITS, mechanism=mechanism).passed


def test_forged_messages_do_not_pass(mechanism):
    """The pipe to the judge belongs to the program: whatever it says there is an answer, never a
    verdict.
    """
    fake = (
        "import os, struct\n"
        "for body in (b'[\"value\", 5', b'[' * 100000, b'{}', b'[\"raise\", \"SystemExit\", \"0\"]',\n"
        '             b\'["value", ["tuple", 5]]\', b\'["value", 5]\'):\n'
        "    for fd in range(3, 64):\n"
        "        try: os.write(fd, struct.pack('I', len(body)) + body)\n"
        "        except OSError: pass\n"
        "os._exit(0)\n"
    )
    result = check_program(fake, TEST, "add", limits=LIMITS, mechanism=mechanism)
    assert result.status == "failed", result


keys = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
)
keys |= st.tuples(keys, keys) | st.frozensets(keys, max_size=3)
values = st.recursive(
    keys,
    lambda v: (
        st.lists(v, max_size=3) | st.dictionaries(keys, v, max_size=3) | st.sets(keys, max_size=3)
    ),
    max_leaves=8,
)


def shape(value):
    """Types and values at every depth; a set's in an order."""
    if isinstance(value, dict):
        return dict, [(shape(k), shape(v)) for k, v in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [shape(item) for item in value]
    if isinstance(value, set | frozenset):
        return type(value), sorted(map(repr, map(shape, value)))
    return type(value), repr(value)


@given(values)
def test_plain_values_cross_unchanged(value):
    read, write = os.pipe()
    with open(read, "rb") as receiving:
        with open(write, "wb") as sending:
            confine.send(sending, confine.to_plain(value))
        crossed = confine.from_plain(confine.receive(receiving))
    assert shape(crossed) == shape(value)


# ---- Refusal ------------------------------------------------------------------------------------
@pytest.fixture
def afresh():
    """The faults of mechanisms are found again, in this test and after it."""
    sandbox.mechanism_fault.cache_clear()
    yield
    sandbox.mechanism_fault.cache_clear()


def test_refuses_where_nothing_works(monkeypatch, afresh):
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    monkeypatch.setattr(
        sandbox, "GUEST", sandbox.GUEST.replace('"x86_64"', '"vax"').replace('"aarch64"', '"alpha"')
    )
    for run in (
        lambda: run_python("print()", limits=LIMITS),
        lambda: check_program(RIGHT, TEST, "add", limits=LIMITS),
    ):
        with pytest.raises(sandbox.SandboxError) as refusal:
            run()
        assert "\n" not in str(refusal.value)
        assert "bwrap is not installed" in str(refusal.value)


@pytest.mark.parametrize(
    "step", ["libc.prctl, 38", "libc.capset", "libc.prctl, 22", "resource.setrlimit("]
)
def test_runs_nothing_where_a_step_fails(mechanism, monkeypatch, step):
    """One protection that the kernel refuses is enough."""
    assert step in sandbox.GUEST
    broken = sandbox.GUEST.replace(step, f"broken_{step}" if step[-1] == "(" else f"broken, {step}")
    monkeypatch.setattr(sandbox, "GUEST", broken)
    with pytest.raises(sandbox.SandboxError, match="broken"):
        run_python("print('ran')", limits=LIMITS, mechanism=mechanism)


def test_a_mechanism_that_does_not_confine_is_not_taken(mechanism, monkeypatch, afresh):
    open_doors = "\ndef confine(**limits): pass\nmain()\n"
    monkeypatch.setattr(sandbox, "GUEST", sandbox.GUEST.replace("\nmain()\n", open_doors))
    assert sandbox.mechanism_fault(mechanism) == "does not confine"


def test_both_architectures_have_a_filter():
    for machine in confine.ARCHITECTURES:
        assert len(confine.system_call_filter(machine)) % 8 == 0
    with pytest.raises(OSError, match="vax"):
        confine.system_call_filter("vax")

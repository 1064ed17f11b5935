"""The first program inside a sandbox: drops its privileges, then runs Python source or a test of
it.

sandbox.py passes the text of this file and a call of main to a new interpreter, so it uses only the
standard library. There are two roles. A *program* is untrusted source; with an entry point it then
answers calls of that function. A *judge* runs a trusted test; its calls of the function go through
a pipe to a program in another sandbox, and it reports its nonce only if the test runs to the end.

A confined process cannot start or signal another process, open a socket or write a file; its memory
and CPU time are limited.
"""

import builtins
import ctypes
import io
import json
import os
import resource
import signal
import struct
import sys
import types
from collections.abc import Callable

READY = b"ready\n"
MAX_FRAME = 1 << 24  # bytes of one message between judge and program
ENDED = "the program ended before it answered"

# ---- Allowed system calls -----------------------------------------------------------------------
# name: number on (x86_64, aarch64); None if the architecture does not have the call. All others are
# refused: fork, exec, kill, ptrace, network sockets, and calls that change a file or a namespace.
# fmt: off
SYSCALLS = {  # socketpair, sendto and recvfrom: asyncio wakes its loop through a socket pair
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
    "pwrite64": (18, 68), "close": (3, 57), "lseek": (8, 62), "dup": (32, 23), "dup2": (33, None),
    "dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59), "open": (2, None),
    "openat": (257, 56), "stat": (4, None), "fstat": (5, 80), "lstat": (6, None),
    "newfstatat": (262, 79), "statx": (332, 291), "access": (21, None), "faccessat": (269, 48),
    "faccessat2": (439, 439), "readlink": (89, None), "readlinkat": (267, 78),
    "getdents64": (217, 61), "getcwd": (79, 17), "poll": (7, None), "ppoll": (271, 73),
    "select": (23, None), "pselect6": (270, 72), "epoll_create1": (291, 20), "epoll_ctl": (233, 21),
    "epoll_wait": (232, None), "epoll_pwait": (281, 22), "eventfd2": (290, 19),
    "socketpair": (53, 199), "sendto": (44, 206), "recvfrom": (45, 207), "mmap": (9, 222),
    "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "mremap": (25, 216),
    "madvise": (28, 233), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "sigaltstack": (131, 132), "alarm": (37, None),
    "getitimer": (36, 102), "setitimer": (38, 103), "restart_syscall": (219, 128),
    "futex": (202, 98), "set_robust_list": (273, 99), "rseq": (334, 293), "sched_yield": (24, 124),
    "exit": (60, 93), "exit_group": (231, 94), "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153), "getrusage": (98, 165),
    "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174),
    "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "uname": (63, 160),
    "sysinfo": (99, 179), "sched_getaffinity": (204, 123), "getrandom": (318, 278),
}
# fmt: on
# A filter cannot read the flags of clone3, which are in memory; glibc falls back to clone.
CLONE3, CLONE = (435, 435), (56, 220)
CLONE_THREAD = 0x10000  # clone with this flag starts a thread, without it a process
# Calls that are allowed only with these second arguments, and the error for other arguments.
COMMANDS = {
    # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC. F_SETOWN with F_SETSIG could
    # send any signal to any process of the same user.
    "fcntl": ((72, 25), (0, 1, 2, 3, 4, 1030), 1),  # EPERM
    "ioctl": ((16, 29), (0x5421, 0x5450, 0x5451), 25),  # FIONBIO, FIONCLEX, FIOCLEX; ENOTTY
}
# (column of the tables above, AUDIT_ARCH_*)
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

LOAD, EQUAL, ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06  # BPF opcodes
KILL, ALLOW, ERRNO, EPERM, ENOSYS = 0x80000000, 0x7FFF0000, 0x00050000, 1, 38


def system_call_filter(machine: str) -> bytes:
    """The seccomp program for a machine (`x86_64` or `aarch64`).

    A call with another architecture's numbers kills the process. Raises OSError for other machines.
    """
    if machine not in ARCHITECTURES:
        known = " and ".join(ARCHITECTURES)
        raise OSError(f"system calls are known for {known}, not for {machine}")
    column, architecture = ARCHITECTURES[machine]
    program = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    for numbers in SYSCALLS.values():
        if numbers[column] is not None:
            program += [(EQUAL, 0, 1, numbers[column]), (RETURN, 0, 0, ALLOW)]
    program += [(EQUAL, 0, 1, CLONE3[column]), (RETURN, 0, 0, ERRNO | ENOSYS)]
    program += [(EQUAL, 0, 4, CLONE[column]), (LOAD, 0, 0, 16), (ANY_BIT, 0, 1, CLONE_THREAD)]
    program += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, ERRNO | EPERM)]
    for numbers, commands, error in COMMANDS.values():
        program += [(EQUAL, 0, 2 * len(commands) + 2, numbers[column]), (LOAD, 0, 0, 24)]
        for command in commands:
            program += [(EQUAL, 0, 1, command), (RETURN, 0, 0, ALLOW)]
        program.append((RETURN, 0, 0, ERRNO | error))
    program.append((RETURN, 0, 0, ERRNO | EPERM))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


# ---- Dropping privileges ------------------------------------------------------------------------


def confine(
    readable: list[str] | None, memory_bytes: int, cpu_seconds: int, open_files: int
) -> None:
    """Drop the privileges of this process. Raises OSError if the kernel refuses.

    readable: files and folders that may be read, by Landlock; None if mounts hide the others.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    _call(libc.prctl, 1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: dies with its parent
    _call(libc.prctl, 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    if readable is not None:
        _landlock(libc, readable)
    for kind, limit in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, open_files),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))
    this_process = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0))  # version 3
    nothing = ctypes.create_string_buffer(24)
    _call(libc.capset, this_process, nothing)  # also for root
    code = system_call_filter(os.uname().machine if sys.maxsize > 2**32 else "32 bits")
    instructions = ctypes.create_string_buffer(code)
    program = struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(instructions))
    _call(libc.prctl, 22, 2, ctypes.create_string_buffer(program), 0, 0)  # PR_SET_SECCOMP, filter


def _call(function: Callable, *arguments: object) -> int:
    """Call a C function; ints are passed as unsigned long. Raises OSError if it returns -1."""
    arguments = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments]
    result = function(*arguments)
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _landlock(libc: ctypes.CDLL, readable: list[str]) -> None:
    """Deny all file access of Landlock's first version except reading these paths."""
    everything = (1 << 13) - 1
    write_file, read_file, read_dir = 2, 4, 8
    rights = dict.fromkeys(readable, read_file) | {"/dev/null": read_file | write_file}
    rights |= {"/dev/urandom": read_file, "/dev/zero": read_file}
    handled = ctypes.create_string_buffer(struct.pack("Q", everything))
    ruleset = _call(libc.syscall, 444, handled, 8, 0)
    for path, allowed in rights.items():
        if os.path.isdir(path):
            allowed |= read_dir
        file = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = ctypes.create_string_buffer(struct.pack("=Qi", allowed, file))
        _call(libc.syscall, 445, ruleset, 1, rule, 0)  # LANDLOCK_RULE_PATH_BENEATH
        os.close(file)
    _call(libc.syscall, 446, ruleset, 0)
    os.close(ruleset)


# ---- Values between judge and program -----------------------------------------------------------
# Only plain values cross: an object of the program, such as one that equals everything, cannot
# reach the test.
CONTAINERS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


def to_plain(value: object) -> object:
    """JSON for None, bool, int, float, str, bytes and lists, tuples, sets and dicts of them.

    An instance of a subclass becomes its base type. Raises TypeError for other values.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, bytes):
        return ["bytes", value.hex()]
    if isinstance(value, dict):
        return ["dict", [[to_plain(k), to_plain(v)] for k, v in value.items()]]
    for kind, container in CONTAINERS.items():
        if isinstance(value, container):
            return [kind, [to_plain(item) for item in value]]
    raise TypeError(f"a {type(value).__name__} cannot be passed between test and program")


def from_plain(value: object) -> object:
    """The inverse of to_plain. Raises some exception for values that to_plain never returns."""
    if not isinstance(value, list):
        return value
    kind, body = value
    if kind == "bytes":
        return bytes.fromhex(body)
    if kind == "dict":
        return {from_plain(k): from_plain(v) for k, v in body}
    return CONTAINERS[kind](from_plain(item) for item in body)


def send(pipe: io.BufferedWriter, message: object) -> None:
    """Write a JSON message after its length. Raises EOFError if the other side has ended."""
    body = json.dumps(message).encode()
    if pipe.closed:
        raise EOFError(ENDED)
    try:
        pipe.write(struct.pack("I", len(body)) + body)
        pipe.flush()
    except BrokenPipeError:
        try:
            pipe.close()  # otherwise Python 3.13 reports at exit what could not be written
        except BrokenPipeError:
            pass
        raise EOFError(ENDED) from None


def receive(pipe: io.BufferedReader) -> object:
    """Read the next message.

    Raises EOFError if the other side has ended, ValueError if it is too long or not JSON.
    """
    head = pipe.read(4)
    length = struct.unpack("I", head)[0] if len(head) == 4 else 0
    if length > MAX_FRAME:
        raise ValueError(f"a message of {length} bytes, more than {MAX_FRAME}")
    body = pipe.read(length)
    if not length or len(body) < length:
        raise EOFError(ENDED)
    return json.loads(body)


# ---- The two roles ------------------------------------------------------------------------------


def run(source: str, filename: str) -> dict[str, object]:
    """Run source as the main module and return its names; exit with a traceback if it raises."""
    main_module = types.ModuleType("__main__")
    main_module.__builtins__ = builtins
    sys.modules["__main__"] = main_module
    sys.argv = [filename]
    try:
        exec(compile(source, filename, "exec", dont_inherit=True), main_module.__dict__)
    except Exception as error:
        fail(error)
    return main_module.__dict__


def fail(error: BaseException) -> None:
    """Exit with a traceback without the frames of this file."""
    trace, here = error.__traceback__, fail.__code__.co_filename
    while trace and trace.tb_frame.f_code.co_filename == here:
        trace = trace.tb_next
    sys.excepthook(type(error), error.with_traceback(trace), trace)
    sys.exit(1)


def answer_calls(function: Callable, calls: io.BufferedReader, answers: io.BufferedWriter) -> None:
    """The program's side: call the function for each message until the judge has ended."""
    while True:
        try:
            arguments, keywords = map(from_plain, receive(calls))
        except EOFError:
            return
        try:
            answer = ["value", to_plain(function(*arguments, **keywords))]
        except BaseException as error:  # SystemExit included
            answer = ["raise", type(error).__name__, str(error)]
        send(answers, answer)


def judge(
    test: str, entry_point: str, calls: io.BufferedWriter, answers: io.BufferedReader
) -> None:
    """Run the test's `check`, whose calls of the function are messages; exit if the test fails."""

    def candidate(*arguments, **keywords):
        send(calls, [to_plain(arguments), to_plain(keywords)])
        kind, *body = receive(answers)
        if kind == "value":
            return from_plain(*body)
        name, text = body
        error = getattr(builtins, name, None)
        is_exception = isinstance(error, type) and issubclass(error, Exception)
        raise error(text) if is_exception else RuntimeError(f"{name}: {text}")

    names = run(test, "test.py")
    names[entry_point] = candidate  # a test may call the function by name
    try:
        names["check"](candidate)
    except BaseException as error:
        fail(error)


def main() -> None:
    """Read the job from a file descriptor and report to another one; argv has both numbers."""
    job_fd, status = map(int, sys.argv[1:])
    with open(job_fd, "rb") as file:
        job = json.loads(file.read())
    confine(**job["limits"])
    sys.set_int_max_str_digits(0)
    pipes = [os.fdopen(fd, mode) for fd, mode in zip(job["pipes"], ("rb", "wb"), strict=False)]
    os.write(status, READY)
    if job["role"] == "judge":
        judge(job["source"], job["entry_point"], pipes[1], pipes[0])
        os.write(status, job["nonce"].encode())
        return
    os.close(status)
    names = run(job["source"], "program.py")
    if pipes:
        if job["entry_point"] not in names:
            fail(NameError(f"the program does not define {job['entry_point']}"))
        answer_calls(names[job["entry_point"]], *pipes)

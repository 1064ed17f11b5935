"""MaxNano: train your own small ChatGPT in JAX; one config, one train.py."""

import gc
import os
import signal
import sys

# What imports and JAX's traces create stays alive. With Python's thresholds (700, 10, 10) it is scanned
# so often that a start takes half a second longer.
GC_THRESHOLDS = (50_000, 20, 50)


def _explain_missing_package(kind, error, trace):
    """The excepthook of a program: one line and status 2 if this Python does not have a package."""
    package = (getattr(error, "name", None) or "MaxNano").partition(".")[0]
    if not issubclass(kind, ModuleNotFoundError) or package == "MaxNano":
        return sys.__excepthook__(kind, error, trace)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    program = os.path.relpath(os.path.abspath(sys.argv[0]), root)
    right = os.path.join(root, ".venv", "bin", "python")
    remedy = "run bash setup.sh, which installs it, and then .venv/bin/python " + program
    if os.path.exists(right) and not os.path.samefile(
        os.path.dirname(sys.executable), os.path.dirname(right)
    ):
        remedy = "run " + right + " " + program
    print(
        "error: " + sys.executable + " does not have the package " + package + "; " + remedy,
        file=sys.stderr,
    )
    sys.stderr.flush()
    os._exit(2)  # an exception that ends a program has status 1


def end_on_interrupt():
    """Until raise_on_interrupt, Ctrl-C ends the process with one line and status 130.

    For imports, in which a KeyboardInterrupt is a traceback, and in an extension module a crash.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored or taken
        signal.signal(signal.SIGINT, _end)


def raise_on_interrupt():
    """Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number, frame):
    os.write(2, b"Interrupted\n")
    os._exit(130)


def _is_program():
    """Whether a program of this package was started, by its file or with -m."""
    started = getattr(sys, "orig_argv", sys.argv)
    folder = os.path.dirname(os.path.abspath(__file__)) + os.sep
    return any(
        word.split(".")[0] == "MaxNano" or os.path.abspath(word).startswith(folder)
        for word in started[1:]
    )


if _is_program():  # what imports the package as a library keeps its own settings
    sys.excepthook = _explain_missing_package
    gc.set_threshold(*GC_THRESHOLDS)
    end_on_interrupt()

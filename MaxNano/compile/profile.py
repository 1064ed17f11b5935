"""Traces train steps with jax.profiler, and lists the most expensive operations of the trace.

jax.profiler.ProfileData reads the trace. Scope and source line of an operation are in the text of
the compiled program.
"""

import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
from absl import logging
from etils import epath

from MaxNano import console
from MaxNano.compile import hlo
from MaxNano.storage import files
from MaxNano.training.context import RunContext
from MaxNano.training.metrics import MetricLogger

SHOWN = 10  # operations in the table
# They contain other operations, which have events of their own.
CONTAINERS = frozenset(("while", "conditional", "call", "async-start", "async-done"))
# Parts of an op_name that say how JAX compiled a function, and not where in the model it is.
MACHINERY = frozenset(
    "shard_map while body cond scan closed_call checkpoint remat rematted_computation pjit".split()
)


class Operation(NamedTuple):
    """An operation of a step: means over the traced steps, per device."""

    name: str
    seconds: float  # per step
    calls: float  # per step
    share: float  # of the time of all operations
    scope: str  # such as "layer/attention dot_general"; "" if unknown
    source: str  # file.py:line, "" if unknown


# ---- Reading a trace ----------------------------------------------------------------------------


def operations(trace: bytes, program: str, *, steps: int, devices: int) -> list[Operation]:
    """The operations of a program, most expensive first.

    trace: the content of an .xplane.pb file with `steps` steps of `devices` devices; program: the
    text of the compiled program. Raises ValueError if the trace has no operation of it.
    """
    try:
        module = hlo.parse(program)
    except (ValueError, LookupError, TypeError):  # then there are no scopes and no source lines
        module = hlo.Module({}, "", {})
    known = {
        name: instruction
        for computation in module.computations.values()
        for name, instruction in computation.instructions.items()
    }
    seconds: dict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    header = re.match(r"HloModule ([\w.\-]+)", program)
    for name, duration in _events(trace, header[1] if header else "", known):
        opcode = known[name].opcode if name in known else name.partition(".")[0]
        if opcode not in CONTAINERS:
            seconds[name] += duration
            calls[name] += 1
    if not seconds:
        raise ValueError("the trace has no operation of the train step")
    total, turns = sum(seconds.values()), steps * devices
    return [
        Operation(
            name,
            spent / turns,
            calls[name] / turns,
            spent / total,
            *_known_origin(module, known, name),
        )
        for name, spent in sorted(seconds.items(), key=lambda item: -item[1])
    ]


def _events(
    trace: bytes, module_name: str, known: Mapping[str, Any]
) -> Iterator[tuple[str, float]]:
    """(name of an HLO operation, seconds) of each event of a module.

    CPUs and GPUs name operation and module in the statistics of an event; a kernel of a GPU that
    does not has the operation's name without dots, or its library's. On a TPU the event's name is
    the text of the instruction, on the line "XLA Ops".
    """
    kernels = {re.sub(r"\W", "_", name): name for name in known}
    for plane in jax.profiler.ProfileData.from_serialized_xspace(trace).planes:
        is_tpu, is_gpu = (plane.name.startswith(f"/device:{kind}") for kind in ("TPU", "GPU"))
        for line in plane.lines:
            if (is_tpu and line.name != "XLA Ops") or (is_gpu and "Stream" not in line.name):
                continue
            for event in line.events:
                stats = dict(event.stats)
                text = re.match(r"%?([\w.\-]+) = ", event.name)
                name = stats.get("hlo_op") or (text[1] if text else None)
                if is_gpu and not name:
                    name = kernels.get(event.name, event.name)
                if name and stats.get("hlo_module", module_name) == module_name:
                    yield name, 1e-9 * event.duration_ns


def _known_origin(
    module: hlo.Module, known: Mapping[str, hlo.Instruction], name: str
) -> tuple[str, str]:
    return origin(module, known[name]) if name in known else ("", "")


def origin(module: hlo.Module, instruction: hlo.Instruction) -> tuple[str, str]:
    """(scope, source line) of an operation, or of the last part of its fusion that has one."""
    body = module.body(instruction)
    paths = (scope_of(part.op_name) for part in (instruction, *reversed(body)))
    return next(filter(None, paths), ""), hlo.source_of(module, instruction, body)


def scope_of(op_name: str) -> str:
    """The named scopes and the primitive of an op_name, in the words of the model.

    "jit(train_step)/transpose(jvp(layer))/while/body/mlp/dot_general" is "layer/mlp dot_general,
    backward".
    """
    parts = []
    for part in op_name.partition(";")[0].split("/"):
        while match := re.fullmatch(r"(?:jvp|transpose|vmap|checkpoint|remat)\((.*)\)", part):
            part = match[1]
        if part and part not in MACHINERY and not re.fullmatch(r"p?jit\(.*\)", part):
            parts.append(part)
    if not parts:
        return ""
    backward = ", backward" if "transpose(" in op_name else ""
    return " ".join(filter(None, ("/".join(parts[:-1]), parts[-1]))) + backward


def table(shown: Sequence[Operation]) -> str:
    """The operations as a table of text."""
    rows = [
        (
            f"{1e3 * operation.seconds:.3f}",
            f"{100 * operation.share:.1f} %",
            f"{operation.calls:g}",
            operation.scope,
            operation.source,
            operation.name,
        )
        for operation in shown
    ]
    header = ("ms per step", "share", "calls", "scope and primitive", "source", "operation")
    return console.format_table("most expensive operations", header, rows)


# ---- Tracing a run ------------------------------------------------------------------------------


class StepProfiler:
    """Traces the steps of config.profile_steps on the first process, and prints what they cost.

    The trace is in tensorboard/ of the run's folder. An error ends the profile, not the run.
    compiled: the train step.
    """

    def __init__(self, run: RunContext, compiled: jax.stages.Compiled, logger: MetricLogger):
        wanted = run.config.profile_steps if jax.process_index() == 0 else ()
        self._wanted = range(*wanted) if wanted else range(0)
        self._run, self._compiled, self._logger = run, compiled, logger
        self._first: int | None = None  # step of the trace that is being taken

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._first is not None:
            self._attempt(jax.profiler.stop_trace)

    def start(self, step: int) -> None:
        """Start the trace if `step`, about to be dispatched, is one to be traced."""
        if self._first is None and step in self._wanted:
            self._logger.flush()  # waits for the steps before
            self._first = step
            self._attempt(self._start)
            self._logger.flush()  # the time of a step does not include the profiler's

    def stop(self, step: int) -> None:
        """End the trace if the steps before `step` are all that are to be traced; print a table."""
        if self._first is not None and step not in self._wanted:
            self._logger.flush()
            self._attempt(lambda: self._finish(step - self._first))
            self._wanted, self._first = range(0), None
            self._logger.flush()

    def _start(self) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # it would slow down the host
        self._folder = tempfile.TemporaryDirectory()
        jax.profiler.start_trace(self._folder.name, profiler_options=options)

    def _finish(self, steps: int) -> None:
        jax.profiler.stop_trace()
        folder, devices = self._run.directory / "tensorboard", self._run.setup.mesh.local_devices
        with self._folder as scratch:
            paths = [Path(scratch, name) for name in files.sizes(epath.Path(scratch))]
            for path in paths:
                files.write_whole(folder / path.relative_to(scratch), path.read_bytes())
            (trace,) = (path.read_bytes() for path in paths if path.name.endswith(".xplane.pb"))
        spent = operations(trace, self._compiled.as_text(), steps=steps, devices=len(devices))
        for line in table(spent[:SHOWN]).splitlines():
            self._logger.message(line)
        self._logger.message(f"Saved the trace of {steps} steps in {folder}")

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 (the run continues without a profile)
            logging.warning("No profile: %s", console.type_and_text(error))
            self._wanted, self._first = range(0), None

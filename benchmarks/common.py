"""Shared by the benchmarks: the cost of a step compiled for a TPU slice, and results stored in a
file.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath
from ml_collections import FrozenConfigDict

from MaxNano import console
from MaxNano.compile import programs as compile_programs
from MaxNano.compile import report as compile_report
from MaxNano.compile import topologies
from MaxNano.training.memory_plan import fit_memory
from MaxNano.training.setup import set_up

Row = dict[str, Any]

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30


def chips_of(config: FrozenConfigDict) -> int:
    """Chips of compile_topology and compile_num_slices."""
    return math.prod(topologies.slice_shape(config.compile_topology)[1]) * config.compile_num_slices


def compile_step(config: FrozenConfigDict) -> Row:
    """The train step of a config compiled for compile_topology; `failure` says why it cannot be
    compiled.

    Cycles in millions and GiB, a chip.
    """
    row: Row = {}
    try:
        setup = set_up(
            config, topologies.slice_devices(config.compile_topology, config.compile_num_slices)
        )
        setup, report = compile_programs.compile_program(fit_memory(setup), "train")
    except ValueError as error:  # out of memory, or an unsupported layout or kernel
        return {"failure": console.one_line(error)}
    finally:
        jax.clear_caches()  # one process compiles many steps
    row |= {"rows": setup.plan.micro_rows, "micro-steps": setup.plan.accumulation_steps}
    return row | costs(report)


def costs(report: compile_report.CostReport) -> Row:
    """Sums up a report: cycles by class in millions and memory in GiB, per chip."""
    row: Row = {"all": report.cycles / 1e6}
    row |= {kind: cycles / 1e6 for kind, cycles in report.cycles_by_class.items()}
    if report.calibrated_cycles:
        row["calibrated"] = report.calibrated_cycles.times(1e-6).text(",.0f")
    return row | {"GiB": report.memory.total / GIB, "compiled s": report.compile_seconds}


def nanochat_model(config: FrozenConfigDict) -> Row:
    """Returns the architecture as keyword arguments of nanochat's GPTConfig."""
    return {
        "sequence_len": config.max_target_length,
        "vocab_size": config.vocab_size,
        "n_layer": config.num_decoder_layers,
        "n_head": config.num_query_heads,
        "n_kv_head": config.num_kv_heads,
        "n_embd": config.emb_dim,
        "window_pattern": config.window_pattern,
    }


def nanochat_environment(checkout: str) -> dict[str, str]:
    """Returns the environment in which Python imports nanochat from a checkout."""
    paths = os.pathsep.join([checkout, os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths}


def dump_bundles(folder: str) -> None:
    """Makes libtpu write the final bundles of each program to a folder; call before it is loaded."""
    flags = (
        "dump_to=" + folder,
        "dump_llo_text=true",
        "dump_llo_pass_label_regex=.*final_bundles",
    )
    os.environ["LIBTPU_INIT_ARGS"] = " ".join(f"--xla_jf_{flag}" for flag in flags)


@contextlib.contextmanager
def start_nanochat(program: str, task: Row) -> Iterator[Callable[[Any], Any]]:
    """Yields a function that sends a JSON value to a program beside this file, which runs in
    NANOCHAT_PYTHON with the checkout NANOCHAT, and returns its answer.

    task: what the program is started with; its answer is printed. Raises ValueError if it fails.
    """
    with subprocess.Popen(
        [os.environ.get("NANOCHAT_PYTHON", sys.executable), str(ROOT / "benchmarks" / program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=nanochat_environment(os.environ["NANOCHAT"]),
    ) as process:

        def ask(value: Any) -> Any:
            process.stdin.write(json.dumps(value) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            while answer and answer[0] not in '["':
                answer = process.stdout.readline()  # skips nanochat's log lines
            if not answer:
                raise ValueError("nanochat failed; see its error above")
            return json.loads(answer)

        print("nanochat:", ask(task), flush=True)
        yield ask
        process.stdin.close()


class Kept:
    """Results in a file of JSON lines, so that an interrupted benchmark resumes after the last row.

    A row belongs to a task (JSON-able), the program's source and the compiler: where one of these
    differs, it is measured anew.
    """

    def __init__(self, path: epath.PathLike):
        self.path = epath.Path(path).expanduser()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = self.path.read_text() if self.path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # an interrupted program left an incomplete line
            self.path.write_text(whole)
        self.rows = {row["key"]: row for row in map(json.loads, whole.splitlines())}

    def key(self, task: Any) -> str:
        """Returns the key under which a row is stored."""
        versions = [importlib.metadata.version(name) for name in ("jax", "libtpu")]
        content = json.dumps([task, versions, source_hash()])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def find(self, task: Any) -> Row | None:
        """Returns the row of a task, or None if it must be measured."""
        return self.rows.get(self.key(task))

    def add(self, task: Any, row: Row) -> Row:
        """Stores a row and returns it."""
        row = {"key": self.key(task), **row}
        self.rows[row["key"]] = row
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return row


def source_hash() -> str:
    """Returns a hash of all Python files of the package."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "MaxNano").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def show(rows: Sequence[Row], columns: Sequence[str] | None = None, digits: int = 1) -> None:
    """Prints rows as a table of the non-empty columns; floats have `digits` decimals."""
    columns = columns or list(dict.fromkeys(column for row in rows for column in row))
    columns = [
        column for column in columns if any(row.get(column) not in (None, "") for row in rows)
    ]
    cells = [columns, *([_cell(row.get(column), digits) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        first, *others = zip(line, widths, strict=True)
        print(
            "  ".join(
                [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
            ).rstrip()
        )


def _cell(value: Any, digits: int) -> str:
    if value is None:
        return ""
    return f"{value:,.{digits}f}" if isinstance(value, float) else str(value)

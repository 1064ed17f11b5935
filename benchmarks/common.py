"""What the benchmarks share: a step compiled for a TPU slice as a row of a table, and rows kept in a file."""

import hashlib
import importlib.metadata
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath
from ml_collections import FrozenConfigDict

from MaxNano.compile import programs as compile_programs
from MaxNano.compile import report as compile_report
from MaxNano.compile import topologies
from MaxNano.training.setup import set_up

Row = dict[str, Any]

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30


def chips_of(config: FrozenConfigDict) -> int:
    """Chips of compile_topology and compile_num_slices."""
    return math.prod(topologies.slice_shape(config.compile_topology)[1]) * config.compile_num_slices


def compile_step(config: FrozenConfigDict) -> Row:
    """The train step of a config compiled for compile_topology; where it does not fit, `failure` says why.

    Cycles in millions and GiB, a chip.
    """
    row: Row = {}
    try:
        setup = set_up(
            config, topologies.slice_devices(config.compile_topology, config.compile_num_slices)
        )
        setup, report = compile_programs.compile_program(setup, "train")
    except ValueError as error:  # out of memory, or a layout or kernel that is refused
        return {"failure": " ".join(str(error).split())}
    finally:
        jax.clear_caches()  # a session compiles many steps
    row |= {"rows": setup.plan.micro_rows, "micro-steps": setup.plan.accumulation_steps}
    return row | costs(report)


def costs(report: compile_report.Report) -> Row:
    """A report's sums: cycles by class in millions, memory in GiB, a chip."""
    row: Row = {"all": report.cycles / 1e6}
    row |= {kind: cycles / 1e6 for kind, cycles in report.cycles_by_class.items()}
    return row | {"GiB": report.memory.total / GIB, "compiled s": report.compile_seconds}


def nanochat_model(config: FrozenConfigDict) -> Row:
    """The same architecture as the keyword arguments of nanochat's GPTConfig."""
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
    """The environment in which a Python imports nanochat from a checkout."""
    paths = os.pathsep.join([checkout, os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths}


class Kept:
    """Rows in a file of JSON lines, so that a benchmark that was stopped goes on behind the last of them.

    A row belongs to a task (JSON-able), the program's source and the compiler: where one of these differs, it is
    measured anew.
    """

    def __init__(self, path: epath.PathLike):
        self.path = epath.Path(path).expanduser()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = self.path.read_text() if self.path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # a stopped program left a line unfinished
            self.path.write_text(whole)
        self.rows = {row["key"]: row for row in map(json.loads, whole.splitlines())}

    def key(self, task: Any) -> str:
        """What a row is kept under."""
        versions = [importlib.metadata.version(name) for name in ("jax", "libtpu")]
        content = json.dumps([task, versions, source_hash()])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def find(self, task: Any) -> Row | None:
        """The row of a task; None where it is to be measured."""
        return self.rows.get(self.key(task))

    def add(self, task: Any, row: Row) -> Row:
        """Keep a row; returns it."""
        row = {"key": self.key(task), **row}
        self.rows[row["key"]] = row
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return row


def source_hash() -> str:
    """Of all Python of the package."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "MaxNano").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def show(rows: Sequence[Row], columns: Sequence[str] | None = None, digits: int = 1) -> None:
    """Print rows as a table of the columns in which one of them has something; floats with `digits` decimals."""
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

"""Estimates the train step on slices of several hosts: memory, collectives by mesh axis, step time.

    .venv/bin/python benchmarks/pods.py configs/base.yml model=d24 compile_report=pods.jsonl

For each of SLICES, once with the tokens per chip of compile_topology and once with its batch. All
numbers are ESTIMATES. Compiling each whole step would take hours, so a step is composed of two
programs:

- the step of the command line, compiled for compile_topology, gives the computation per chip. Work
  on tokens scales with the tokens per chip; other work on weights and tables happens once per
  micro-batch; the update, with its all-gathers and reductions, happens once per step;
- the same model at full depth and width on rows of SHORT tokens, with one Muon iteration and one
  kind of window, compiled for the larger slice, gives the state's memory and the collectives over
  weights and gradients, whose size does not depend on the rows. Collectives over activations (axis
  tensor) scale with tokens. No overlap with computation is assumed.

Rows are kept in compile_report as JSON lines (null: pods.jsonl in the run's folder) and are not
compiled again. Prints a table and a JSON line.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from MaxNano import pyconfig

    pyconfig.check_command_line()

import json
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import jax
from ml_collections import FrozenConfigDict

from benchmarks import common
from MaxNano import pyconfig
from MaxNano.compile import calibration, costs, hlo, topologies
from MaxNano.distributed import hardware
from MaxNano.storage.files import run_directory
from MaxNano.training.memory_plan import compile_train, fit_memory
from MaxNano.training.setup import flops_per_token, set_up
from MaxNano.training.step import lower_train

SLICES = (("v6e-16", 1), ("v6e-64", 1), ("v6e-256", 1), ("v6e-256", 2))
SHORT = 256  # tokens of a row in programs that only count weights and collectives
# Makes that program quick to compile without changing its state and collectives.
QUICK = ("xla_flags=[]", "muon_iterations=1", "window_pattern=L")
# The speed of the generated code does not matter. 9 is O0 of https://openxla.org/xla/effort_levels:
# jax 0.10 takes the number only.
LEAST_EFFORT = {"optimization_level": 9}
# The state is sharded over eight neighbors and replicated over the rest: Muon then needs no
# communication for any number of chips (24 and 32 layers divide by 8), gathers use few links, and
# no weights are sent between slices. fsdp shards whole layers here: a step gathers them once.
FSDP = 8
RULES = (
    "logical_axis_rules=[[layers,fsdp],[vocab,fsdp,tensor],[heads,tensor],[kv_heads,tensor],[mlp,tensor],"
    "[activation_batch,data,fsdp],[activation_heads,tensor]]"
)
# The named scopes of train_step that run once per step.
PER_STEP = ("gather", "reduce", "optimizer")


class Layout(NamedTuple):
    """The mesh of one or several slices."""

    data: int  # within a slice
    fsdp: int
    tensor: int
    slices: int

    @classmethod
    def choose(cls, chips: int, slices: int, rows: int, tensor: int) -> "Layout":
        """The layout for `rows` per step and at least `tensor` chips per row; more if chips
        outnumber rows.
        """
        tensor = max(tensor, chips // math.gcd(chips, rows))
        fsdp = math.gcd(FSDP, chips // slices // tensor)
        return cls(chips // slices // tensor // fsdp, fsdp, tensor, slices)

    def words(self) -> list[str]:
        """The layout as words of a command line."""
        return [
            f"ici_data_parallelism={self.data}",
            f"ici_fsdp_parallelism={self.fsdp}",
            f"ici_tensor_parallelism={self.tensor}",
            f"dcn_data_parallelism={self.slices}",
            "dcn_fsdp_parallelism=1",
            "dcn_tensor_parallelism=1",
            RULES,
        ]

    def __str__(self) -> str:
        sizes = (
            f"data {self.data}",
            f"fsdp {self.fsdp}",
            f"tensor {self.tensor}",
            f"dcn data {self.slices}",
        )
        return " x ".join(size for size in sizes if not size.endswith(" 1"))


# ---- The two kinds of programs ------------------------------------------------------------------


def whole_step(config: FrozenConfigDict) -> common.Row:
    """Computation of a chip of compile_topology: cycles per step, micro-batch and token, and GiB
    besides the state.
    """
    setup = set_up(
        config, topologies.slice_devices(config.compile_topology, config.compile_num_slices)
    )
    started = time.monotonic()
    setup, compiled = compile_train(fit_memory(setup))
    seconds = time.monotonic() - started
    chip = hardware.chip(setup.mesh.devices.flat[0])
    walk = costs.walk(
        hlo.parse(compiled.as_text()), chip, mesh=setup.mesh, vocab_size=config.vocab_size
    )
    cycles, by_class = defaultdict(float), defaultdict(float)
    for operation in walk.operations:
        cycles[unit_of(operation)] += operation.total
        by_class[operation.kind] += operation.total
    calibrated = calibration.calibrate(by_class, chip)
    stats = compiled.memory_analysis()
    return {
        "step cycles": cycles["step"],
        "micro-batch cycles": cycles["micro-batch"] / setup.plan.accumulation_steps,
        "token cycles": cycles["token"] / (config.global_batch_tokens / setup.mesh.size),
        "rows": setup.plan.micro_rows,
        "tensor": config.ici_tensor_parallelism,
        "calibration": calibrated and calibrated.times(1 / sum(by_class.values())),
        "working GiB": (stats.peak_memory_in_bytes - stats.argument_size_in_bytes) / common.GIB,
        "compiled s": seconds,
    }


def unit_of(operation: costs.Operation) -> str:
    """What an operation's work is proportional to: steps, micro-batches or tokens."""
    scopes = operation.op_name.split("/")
    if any(scope in scopes for scope in PER_STEP):
        return "step"
    return "micro-batch" if operation.kind in ("weight", "table") else "token"


def short_step(words: Sequence[str], topology: str, layout: Layout) -> common.Row:
    """State in GiB and seconds of collectives by axes and network, for a step with one short row
    per chip.
    """
    data_parallel_size = layout.data * layout.fsdp * layout.slices
    config = pyconfig.initialize(
        [
            *words,
            *QUICK,
            *layout.words(),
            f"compile_topology={topology}",
            f"compile_num_slices={layout.slices}",
            f"max_target_length={SHORT}",
            f"global_batch_tokens={SHORT * data_parallel_size}",
            "per_device_batch_size=1",
        ]
    )
    setup = set_up(config, topologies.slice_devices(topology, layout.slices))
    started = time.monotonic()
    try:
        compiled = lower_train(setup).compile(LEAST_EFFORT)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"failure": "does not fit"}
    seconds = time.monotonic() - started
    chip = hardware.chip(setup.mesh.devices.flat[0])
    walk = costs.walk(
        hlo.parse(compiled.as_text()), chip, mesh=setup.mesh, vocab_size=config.vocab_size
    )
    times, sizes, count = defaultdict(float), defaultdict(float), 0
    for collective in walk.collectives:
        name = f"{'+'.join(collective.axes)} {collective.network}"
        times[name] += collective.cycles * collective.count / chip.clock_hz
        sizes[name] += collective.bytes * collective.count / 1e9
        count += collective.count
    return {
        "state GiB": compiled.memory_analysis().argument_size_in_bytes / common.GIB,
        "seconds": dict(times),
        "GB": dict(sizes),
        "collectives": count,
        "compiled s": seconds,
    }


# ---- The estimate -------------------------------------------------------------------------------


def estimate(
    config: FrozenConfigDict, whole: common.Row, short: common.Row, layout: Layout, tokens: int
) -> common.Row:
    """A row of the table, for steps of `tokens` tokens."""
    row: common.Row = {"layout": str(layout), "tokens per step": tokens}
    if "failure" in short:
        return row | {"failure": short["failure"]}
    chip = hardware.CHIPS["TPU v6e"]
    chips = layout.data * layout.fsdp * layout.tensor * layout.slices
    chip_tokens = tokens / chips
    micro_batches = max(
        1.0, chip_tokens * whole["tensor"] / (whole["rows"] * config.max_target_length)
    )
    rows_ms = chip_tokens * whole["token cycles"] / chip.clock_hz * 1e3
    weights_ms = (
        (whole["step cycles"] + micro_batches * whole["micro-batch cycles"]) / chip.clock_hz * 1e3
    )
    ici = dcn = 0.0
    for name, seconds in short["seconds"].items():
        scale = chip_tokens * layout.tensor / SHORT if "tensor" in name else 1.0
        if name.endswith("dcn"):
            dcn += seconds * scale * 1e3
        else:
            ici += seconds * scale * 1e3
    step = rows_ms + weights_ms + ici + dcn
    flops = flops_per_token(config) * tokens
    if whole["calibration"]:
        network = calibration.COLLECTIVES
        step_range = calibration.Range(
            *(
                factor * (rows_ms + weights_ms) + part * (ici + dcn)
                for factor, part in zip(whole["calibration"], network, strict=False)
            )
        )
        row["calibrated ms"] = step_range.text(",.0f")
        rate = step_range.inverse()
        row["calibrated M tokens/s"] = rate.times(tokens / 1e3).text(",.2f")
        peak = chips * chip.peak_flops / 1e3  # FLOPs per millisecond
        row["calibrated MFU"] = rate.times(flops / peak).text(".1%")
    return row | {
        "state GiB": round(short["state GiB"], 2),
        "at most GiB": round(short["state GiB"] + whole["working GiB"], 1),
        "tokens ms": rows_ms,
        "weights ms": weights_ms,
        "ICI ms": ici,
        "DCN ms": dcn,
        "step ms": step,
        "M tokens/s": tokens / step / 1e3,
        "MFU": f"{flops / (chips * chip.peak_flops * step / 1e3):.1%}",
        "GB by axis": ", ".join(f"{name} {size:.2f}" for name, size in short["GB"].items()),
    }


def main(config: FrozenConfigDict) -> None:
    """Compile the missing rows; print the table."""
    jax.config.update("jax_enable_compilation_cache", False)
    kept = common.Kept(config.compile_report or run_directory(config) / "pods.jsonl")
    words = [word for word in sys.argv[1:] if not word.startswith("compile_report=")]
    task = ["whole", *words]
    whole = kept.find(task) or kept.add(task, whole_step(config))
    rows = []
    for topology, slices in SLICES:
        chips = math.prod(topologies.slice_shape(topology)[1]) * slices
        batch = config.global_batch_tokens
        for fixed, tokens in (
            ("tokens per chip", batch // common.chips_of(config) * chips),
            ("batch", batch),
        ):
            layout = Layout.choose(
                chips, slices, tokens // config.max_target_length, config.ici_tensor_parallelism
            )
            task = ["short", topology, list(layout), *words]
            short = kept.find(task) or kept.add(task, short_step(words, topology, layout))
            name = f"{slices} x {topology}" if slices > 1 else topology
            rows.append(
                {"slice": name, "fixed": fixed, **estimate(config, whole, short, layout, tokens)}
            )
            print(
                f"{name}, fixed {fixed}: {rows[-1].get('step ms', 'does not fit')}",
                file=sys.stderr,
                flush=True,
            )
    print(
        f"ESTIMATED for {config.model}, not measured: computation scaled from {config.compile_topology}, collectives "
        f"compiled with rows of {SHORT} tokens; at most {whole['rows']} rows per chip and micro-batch"
    )
    common.show(rows)
    print(json.dumps({"model": config.model, "whole": whole, "rows": rows}))


if __name__ == "__main__":
    sys.exit(pyconfig.launch(main))

"""The report of a compiled TPU program: memory, cycles, collectives, expensive operations."""

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from MaxNano.compile import calibration, hlo
from MaxNano.compile.collectives import Collective
from MaxNano.compile.costs import ASSUMPTIONS, Operation, walk
from MaxNano.distributed import hardware


class ProgramMemory(NamedTuple):
    """Bytes per chip."""

    arguments: int
    outputs: int
    aliased: int  # outputs that reuse the memory of arguments
    temporaries: int  # in the chip's main memory, with the padding of their layout
    code: int
    limit: int | None

    @property
    def total(self) -> int:
        """Bytes that the program needs."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


class ProgramWork(NamedTuple):
    """The useful work of a step over all chips, and the number of steps of the run, None if
    unknown.
    """

    model_flops: float
    tokens: int
    steps: int | None
    # Bytes that each chip must read per step, for programs that the memory may limit.
    bytes: float | None = None


@dataclasses.dataclass(frozen=True)
class CostReport:
    """The cost of one step of a program, per chip unless said otherwise; None if unknown."""

    chips: int
    memory: ProgramMemory
    compile_seconds: float | None
    model_flops: float | None
    matmul_flops: float
    pallas_flops: float
    cycles: float
    cycles_by_class: dict[str, float]
    cycles_by_basis: dict[str, float]
    cycles_by_source: dict[str, float]
    collectives: tuple[Collective, ...]
    copied_bytes: int
    copied_cycles: float
    most_expensive: tuple[Operation, ...]
    step_seconds: float
    mfu: float | None
    bandwidth_utilization: float | None  # for the bytes that a chip must read
    tokens_per_second: float | None  # over all chips
    run_seconds: float | None
    run_price: float | None  # USD
    # Cycles as measurements on the chip correct them; None where nothing was measured. All other
    # fields are as the compiler and the rules have them.
    calibrated_cycles: calibration.Range | None = None
    assumptions: tuple[str, ...] = ASSUMPTIONS

    def calibrated(self, name: str) -> calibration.Range | None:
        """The range of an estimate, one of ESTIMATES, as measurements correct it; None if unknown."""
        value = getattr(self, name)
        if value is None or self.calibrated_cycles is None:
            return None
        ratio = self.calibrated_cycles.times(1 / self.cycles)
        return (ratio.inverse() if ESTIMATES[name].is_rate else ratio).times(value)

    def to_json(self) -> dict[str, Any]:
        """The fields and the ranges of ESTIMATES as values for json.dumps."""
        values = dataclasses.asdict(self)
        values["memory"] = {**self.memory._asdict(), "total": self.memory.total}
        ranges = {"calibrated_cycles": self.calibrated_cycles}
        ranges |= {estimate.key: self.calibrated(name) for name, estimate in ESTIMATES.items()}
        values |= {key: part and part._asdict() for key, part in ranges.items()}
        values["collectives"] = [collective._asdict() for collective in self.collectives]
        values["most_expensive"] = [
            {**operation._asdict(), "total": operation.total} for operation in self.most_expensive
        ]
        return values

    def tables(self) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
        """(title, header, rows) of each table, as text."""
        columns = "kind, MB, count, group, axes, network, overlaps, M cycles, exposed, source"
        operation = "M cycles, cycles, count, class, basis, result, source, name"
        sources = [(source or "?", _mega(n)) for source, n in self.cycles_by_source.items()]
        return [
            ("memory", ("kind", "GiB"), self._memory_rows()),
            ("cycles", ("class", "M cycles", "share"), self._cycle_rows()),
            ("collectives", tuple(columns.split(", ")), self._collective_rows()),
            ("most expensive operations", tuple(operation.split(", ")), self._operation_rows()),
            ("source lines", ("source", "M cycles"), sources),
            ("step", ("what", "value"), self._step_rows()),
        ]

    def _memory_rows(self) -> list[tuple[str, ...]]:
        parts = self.memory._asdict().items()
        rows = [(kind, gib(size)) for kind, size in parts if kind != "limit" and size]
        return [*rows, ("total", gib(self.memory.total)), ("limit", gib(self.memory.limit))]

    def _cycle_rows(self) -> list[tuple[str, ...]]:
        parts = [
            *self.cycles_by_class.items(),
            *((f"by {name}", n) for name, n in self.cycles_by_basis.items()),
        ]
        return [
            *((part, _mega(n), f"{n / self.cycles:.1%}") for part, n in parts if n),
            ("all", _mega(self.cycles), ""),
            *self._calibrated_rows(),
            (
                "asynchronous copies",
                _mega(self.copied_cycles),
                f"{self.copied_bytes / 1e9:,.2f} GB",
            ),
        ]

    def _calibrated_rows(self) -> list[tuple[str, ...]]:
        cycles = self.calibrated_cycles
        return [("calibrated", cycles.times(1e-6).text(",.1f"), "")] if cycles else []

    def _collective_rows(self) -> list[tuple[str, ...]]:
        return [
            (
                c.kind,
                _mega(c.bytes),
                str(c.count),
                str(c.group_size),
                " ".join(c.axes),
                c.network,
                "yes" if c.overlapped else "no",
                _mega(c.cycles * c.count),
                _mega(c.exposed_cycles * c.count),
                c.source,
            )
            for c in self.collectives
        ]

    def _operation_rows(self) -> list[tuple[str, ...]]:
        return [
            (
                _mega(o.total),
                f"{o.cycles:,.0f}",
                str(o.count),
                o.kind,
                o.basis,
                o.shape,
                o.source,
                o.name,
            )
            for o in self.most_expensive
        ]

    def _step_rows(self) -> list[tuple[str, str]]:
        matmul = f"{self.matmul_flops:.4g} and {self.pallas_flops:.4g} in Pallas calls"
        rows = [
            ("chips", str(self.chips)),
            ("model FLOPs per chip", or_unknown(self.model_flops, ".4g")),
            ("HLO matmul FLOPs per chip", matmul),
        ]
        for name, (label, form, unit, scale, _, _) in ESTIMATES.items():
            value, part = getattr(self, name), self.calibrated(name)
            if value is not None or name != "bandwidth_utilization":
                text = or_unknown(value and scale * value, form, unit)
                rows.append((f"estimated {label}", text))
            if part:
                rows.append((f"calibrated {label}", part.times(scale).text(form, unit)))
        return [*rows, ("compiled in", or_unknown(self.compile_seconds, ".0f", " s"))]


class Estimate(NamedTuple):
    """How a report prints an estimate that follows from the cycles."""

    label: str
    form: str
    unit: str
    scale: float  # of the printed unit
    key: str  # of its calibrated range in to_json
    is_rate: bool = False  # falls as the cycles rise


# By the field of CostReport.
ESTIMATES = {
    "step_seconds": Estimate("step", ".4g", " s", 1, "calibrated_seconds"),
    "mfu": Estimate("MFU", ".1%", "", 1, "calibrated_mfu", True),
    "bandwidth_utilization": Estimate(
        "bandwidth utilization", ".1%", "", 1, "calibrated_bandwidth_utilization", True
    ),
    "tokens_per_second": Estimate("tokens/s", ",.0f", "", 1, "calibrated_tokens_per_second", True),
    "run_seconds": Estimate("run", ",.1f", " min", 1 / 60, "calibrated_run_seconds"),
    "run_price": Estimate("price", ",.2f", " USD", 1, "calibrated_run_price"),
}


def analyze(
    compiled: jax.stages.Compiled,
    chip: hardware.Chip,
    *,
    mesh: Mesh | None = None,
    vocab_size: int | None = None,
    work: ProgramWork | None = None,
    compile_seconds: float | None = None,
    top: int = 10,
) -> CostReport:
    """The report of a compiled function on `chip`, with the `top` most expensive operations and
    source lines.

    mesh and vocab_size as in costs.walk. Raises hlo.HloError if the program cannot be read.
    """
    result = walk(hlo.parse(compiled.as_text()), chip, mesh=mesh, vocab_size=vocab_size)
    chips = mesh.size if mesh else 1
    seconds = result.cycles / chip.clock_hz
    run_seconds = seconds * work.steps if work and work.steps is not None else None
    is_priced = run_seconds is not None and chip.price is not None
    read = work.bytes if work else None
    by_basis, by_source = Counter(), Counter()
    for operation in result.operations:
        by_basis[operation.basis] += operation.total
        by_source[operation.source] += operation.total
    by_class = result.by_class()
    by_basis["bytes"] += by_class["collective"]
    calibrated = calibration.calibrate(by_class, chip)
    return CostReport(
        chips=chips,
        memory=_memory_of(compiled, chip),
        compile_seconds=compile_seconds,
        model_flops=work and work.model_flops / chips,
        matmul_flops=result.matmul_flops,
        pallas_flops=result.pallas_flops,
        cycles=result.cycles,
        cycles_by_class=by_class,
        cycles_by_basis=dict(by_basis.most_common()),
        cycles_by_source=dict(by_source.most_common(top)),
        collectives=merge_collectives(result.collectives),
        copied_bytes=sum(copy.bytes * copy.count for copy in result.copies),
        copied_cycles=sum(copy.cycles * copy.count for copy in result.copies),
        most_expensive=tuple(sorted(result.operations, key=lambda o: -o.total)[:top]),
        step_seconds=seconds,
        mfu=work and work.model_flops / (chips * chip.peak_flops * seconds),
        bandwidth_utilization=None if read is None else read / (chip.memory_bandwidth * seconds),
        tokens_per_second=work and work.tokens / seconds,
        run_seconds=run_seconds,
        run_price=run_seconds / 3600 * chips * chip.price if is_priced else None,
        assumptions=(*ASSUMPTIONS, calibration.ASSUMPTION) if calibrated else ASSUMPTIONS,
        calibrated_cycles=calibrated,
    )


def _memory_of(compiled: jax.stages.Compiled, chip: hardware.Chip) -> ProgramMemory:
    stats = compiled.memory_analysis()
    live = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return ProgramMemory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        # temp_size_in_bytes includes other memories and counts loops twice: 9 GiB too much for d24.
        temporaries=stats.peak_memory_in_bytes - live,
        code=stats.generated_code_size_in_bytes,
        limit=chip.program_memory_bytes,
    )


def merge_collectives(collectives: Iterable[Collective]) -> tuple[Collective, ...]:
    """Collectives that differ only in their count, as one."""
    counts = Counter()
    for collective in collectives:
        counts[collective._replace(count=0)] += collective.count
    return tuple(collective._replace(count=count) for collective, count in counts.items())


def _mega(number: float) -> str:
    return f"{number / 1e6:,.2f}"


def gib(size: int | None) -> str:
    """Bytes as text in GiB."""
    return "unknown" if size is None else f"{size / 2**30:,.3f}"


def or_unknown(value: float | None, form: str, unit: str = "") -> str:
    """A value as text with its unit, or "unknown"."""
    return "unknown" if value is None else f"{value:{form}}{unit}"

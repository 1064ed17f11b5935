"""The report of a compiled GPU program: memory, kernels by kind, the roofline, expensive kernels."""

import dataclasses
from collections import Counter
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from MaxNano.compile import hlo, roofline
from MaxNano.compile.collectives import Collective
from MaxNano.compile.costs import Walk
from MaxNano.compile.report import ProgramMemory, ProgramWork, gib, merge_collectives, or_unknown
from MaxNano.distributed import gpus, hardware


class KindCost(NamedTuple):
    """What the kernels of a kind cost per step on one GPU."""

    kernels: int
    seconds: float
    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class GpuReport:
    """The cost of one step of a program, per GPU unless said otherwise; None if unknown.

    All times are estimates by the roofline, not measurements.
    """

    device: str
    chips: int
    memory: ProgramMemory
    card_bytes: int
    compile_seconds: float | None
    model_flops: float | None
    matmul_flops: float  # of all products, attention's included
    attention_flops: float
    kinds: dict[str, KindCost]
    seconds_by_source: dict[str, float]
    collectives: tuple[Collective, ...]
    kernels: tuple[roofline.Kernel, ...]  # most expensive first
    step_seconds: float
    mfu: float | None
    tokens_per_second: float | None  # over all GPUs
    largest_micro_batch: int | None = None  # rows of the largest micro-batch that fits
    assumptions: tuple[str, ...] = roofline.ASSUMPTIONS

    def to_json(self) -> dict[str, Any]:
        """The fields as values for json.dumps; seconds are those of the roofline."""
        values = dataclasses.asdict(self)
        values["memory"] = {**self.memory._asdict(), "total": self.memory.total}
        values["kinds"] = {kind: cost._asdict() for kind, cost in self.kinds.items()}
        values["collectives"] = [
            _in_seconds(collective._asdict()) for collective in self.collectives
        ]
        values["kernels"] = [
            {**_in_seconds(kernel._asdict()), "total": kernel.total} for kernel in self.kernels
        ]
        return values

    def tables(self, top: int = 10) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
        """(title, header, rows) of each table, as text; `top` rows of kernels and source lines."""
        kinds = ("kind", "kernels", "ms", "share", "GB", "TFLOP")
        columns = "kind, MB, count, group, axes, overlaps, ms, exposed ms, source"
        kernel = "ms, count, kind, MB, GFLOP, bound by, result, source, scope, name"
        sources = [
            (source or "?", _ms(seconds)) for source, seconds in self.seconds_by_source.items()
        ]
        tables = [
            ("memory", ("kind", "GiB"), self._memory_rows()),
            ("roofline by kind of kernel (estimate)", kinds, self._kind_rows()),
            ("collectives (estimate)", tuple(columns.split(", ")), self._collective_rows()),
            (
                "most expensive kernels (estimate)",
                tuple(kernel.split(", ")),
                [self._kernel_row(k) for k in self.kernels[:top]],
            ),
            ("source lines (estimate)", ("source", "ms"), sources[:top]),
            ("step", ("what", "value"), self._step_rows()),
        ]
        return [table for table in tables if table[2]]

    def _memory_rows(self) -> list[tuple[str, ...]]:
        parts = self.memory._asdict().items()
        rows = [(kind, gib(size)) for kind, size in parts if kind != "limit" and size]
        return [
            *rows,
            ("total", gib(self.memory.total)),
            ("limit, JAX's share of the card", gib(self.memory.limit)),
            ("card", gib(self.card_bytes)),
        ]

    def _kind_rows(self) -> list[tuple[str, ...]]:
        rows = [
            (
                kind,
                f"{cost.kernels:,}",
                _ms(cost.seconds),
                f"{cost.seconds / self.step_seconds:.1%}",
                f"{cost.bytes / 1e9:,.2f}",
                f"{cost.flops / 1e12:,.3f}",
            )
            for kind, cost in self.kinds.items()
        ]
        sums = [sum(column) for column in zip(*self.kinds.values(), strict=True)]
        total = (f"{sums[0]:,}", _ms(self.step_seconds), "", f"{sums[3] / 1e9:,.2f}")
        return [*rows, ("all", *total, f"{sums[2] / 1e12:,.3f}")]

    def _collective_rows(self) -> list[tuple[str, ...]]:
        return [
            (
                c.kind,
                f"{c.bytes / 1e6:,.2f}",
                str(c.count),
                str(c.group_size),
                " ".join(c.axes),
                "yes" if c.overlapped else "no",
                _ms(c.cycles * c.count),
                _ms(c.exposed_cycles * c.count),
                c.source,
            )
            for c in self.collectives
        ]

    def _kernel_row(self, kernel: roofline.Kernel) -> tuple[str, ...]:
        bandwidth = hardware.CHIPS[self.device].memory_bandwidth
        by_bytes = kernel.bytes / bandwidth >= kernel.cycles
        return (
            _ms(kernel.total),
            str(kernel.count),
            kernel.kind,
            f"{kernel.bytes / 1e6:,.1f}",
            f"{kernel.flops / 1e9:,.1f}",
            "bytes" if by_bytes else "FLOPs",
            kernel.shape,
            kernel.source,
            kernel.scope,
            kernel.name,
        )

    def _step_rows(self) -> list[tuple[str, str]]:
        rows = self.largest_micro_batch
        largest = [("largest per_device_batch_size that fits", str(rows))] if rows else []
        return [
            ("GPUs", f"{self.chips} x {self.device}"),
            ("model FLOPs per GPU", or_unknown(self.model_flops, ".4g")),
            (
                "HLO matmul FLOPs per GPU",
                f"{self.matmul_flops:.4g}, {self.attention_flops:.4g} of them attention",
            ),
            ("roofline of the step", f"{self.step_seconds:.4g} s (estimate)"),
            ("MFU by the roofline", or_unknown(self.mfu, ".1%", " (estimate)")),
            ("tokens/s by the roofline", or_unknown(self.tokens_per_second, ",.0f", " (estimate)")),
            *largest,
            ("compiled in", or_unknown(self.compile_seconds, ".0f", " s")),
        ]


def analyze(
    compiled: jax.stages.Compiled,
    mesh: Mesh,
    *,
    work: ProgramWork | None = None,
    compile_seconds: float | None = None,
) -> GpuReport:
    """The report of a function compiled for the GPUs of `mesh`.

    Raises hlo.HloError if the program cannot be read.
    """
    device = mesh.devices.flat[0].device_kind
    chip, gpu = hardware.CHIPS[device], gpus.gpu_of(device)
    result = roofline.walk(hlo.parse(compiled.as_text()), chip, mesh=mesh)
    seconds = result.cycles
    by_source = Counter()
    for kernel in result.operations:
        by_source[kernel.source] += kernel.total
    return GpuReport(
        device=device,
        chips=mesh.size,
        memory=memory_of(compiled, gpu),
        card_bytes=gpu.memory_bytes,
        compile_seconds=compile_seconds,
        model_flops=work and work.model_flops / mesh.size,
        matmul_flops=sum(kernel.flops * kernel.count for kernel in result.operations),
        attention_flops=result.pallas_flops,
        kinds=_kinds(result),
        seconds_by_source=dict(by_source.most_common()),
        collectives=merge_collectives(result.collectives),
        kernels=tuple(sorted(result.operations, key=lambda k: -k.total)),
        step_seconds=seconds,
        mfu=work and work.model_flops / (mesh.size * chip.peak_flops * seconds),
        tokens_per_second=work and work.tokens / seconds,
    )


def memory_of(compiled: jax.stages.Compiled, gpu: gpus.Gpu) -> ProgramMemory:
    """The memory of a program; its temporaries are a single allocation on a GPU."""
    stats = compiled.memory_analysis()
    return ProgramMemory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
        limit=gpus.program_memory_bytes(gpu),
    )


def _kinds(result: Walk) -> dict[str, KindCost]:
    """The cost of each kind of kernel that a program has, in the order of roofline.KINDS."""
    costs = {}
    for kind in roofline.KINDS:
        kernels = [k for k in result.operations if k.kind == kind]
        if kernels:
            costs[kind] = KindCost(
                sum(k.count for k in kernels),
                sum(k.total for k in kernels),
                sum(k.flops * k.count for k in kernels),
                sum(k.bytes * k.count for k in kernels),
            )
    collectives = result.collectives
    if collectives:
        costs["collective"] = KindCost(
            sum(c.count for c in collectives),
            sum(c.exposed_cycles * c.count for c in collectives),
            0.0,
            sum(c.bytes * c.count for c in collectives),
        )
    return costs


def _in_seconds(values: dict[str, Any]) -> dict[str, Any]:
    """Fields of a walk whose clock is 1 Hz: its cycles are seconds."""
    return {name.replace("cycles", "seconds"): value for name, value in values.items()}


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.3f}"

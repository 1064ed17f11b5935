"""What a compiled TPU program will cost, read from its schedule without running it.

The compiler writes an estimate of cycles beside most operations. `walk` adds these up over the program, loops times
their trips, and costs by bytes and FLOPs what the compiler leaves open: Pallas calls, gathers and scatters,
collectives. The sum is an instrument and not a clock: ratios between programs of one compiler mean something, seconds
do not until somebody has run one on a chip.
"""

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from MaxNano.compile import hlo
from MaxNano.distributed import hardware

# ---- What the compiler does not cost: assumptions --------------------------------------------------------------------

UNKNOWN_CYCLES = 2**62  # the compiler writes numbers near 2^63 beside what it does not cost

# The share of the peak that a Pallas call's FLOPs reach. Attention with a head_dim of 128 has an axis of 128 in each
# of its products, contracted or resulting, which fills half of a matrix unit of 256 x 256. (The compiler itself gives
# 4096 x 4096 x 128 nearly the cycles of 4096 x 4096 x 256.) Softmax, which runs beside the products, is not in it.
PALLAS_FLOPS_SHARE = 0.5

# The share of the memory's bandwidth at which rows are picked by index: in the tiled layout a bfloat16 row lies in
# pieces of 256 bytes, each in a granule of 512 shared with its neighbor, and rows are fetched one after the other.
ROW_BANDWIDTH_SHARE = 0.25

# Over the chips of a slice collectives run as a ring in both directions, so a chip sends on two links at once.
RING_LINKS = 2

ASSUMPTIONS = (
    f"Pallas calls: the larger of their FLOPs at {PALLAS_FLOPS_SHARE:g} of the peak (head_dim 128 fills half of a "
    "256 x 256 matrix unit) and their bytes at the memory's bandwidth; FLOPs as the kernel states them, Splash's from "
    "whole tiles of its grid",
    f"gathers and scatters: bytes of the rows, read and written, at {ROW_BANDWIDTH_SHARE:g} of the memory's bandwidth",
    f"collectives: a ring over {RING_LINKS} links a chip (between slices: over the data-center network); only what no "
    "operation between start and end hides is counted",
    "operations that neither the compiler nor these rules cost: bytes at the memory's bandwidth",
    "copies that run beside the computation are listed and not counted",
)

# ---- Values ----------------------------------------------------------------------------------------------------------

CLASSES = (
    "matmul",
    "activation",
    "weight",
    "table",
    "copy",
    "pallas",
    "gather/scatter",
    "collective",
    "other",
)
COLLECTIVES = frozenset(
    "all-gather all-reduce reduce-scatter all-to-all ragged-all-to-all collective-permute collective-broadcast".split()
)
FREE = frozenset(
    "parameter constant get-tuple-element tuple bitcast after-all partition-id replica-id opt-barrier "
    "optimization-barrier add-dependency iota send send-done".split()
)
FREE_CALLS = frozenset(
    "AllocateBuffer ConcatBitcast SliceBitcast AssumeGatherIndicesInBound".split()
)
MOVES = FREE | frozenset(
    "copy transpose reshape slice dynamic-slice dynamic-update-slice pad concatenate custom-call".split()
)


class Operation(NamedTuple):
    """An operation on the critical path, run `count` times a step for `cycles` each."""

    name: str
    kind: str  # one of CLASSES
    cycles: float
    count: int
    basis: str  # compiler, bytes or flops
    shape: str
    source: str
    op_name: str

    @property
    def total(self) -> float:
        """Cycles a step."""
        return self.cycles * self.count


class Collective(NamedTuple):
    """A collective, run `count` times a step, each moving an array of `bytes` (its larger side) among a group.

    exposed_cycles: what of its cycles is not hidden behind operations scheduled between its start and its end.
    """

    kind: str
    bytes: int
    count: int
    group_size: int
    axes: tuple[str, ...]  # of the mesh; empty where none was given
    network: str  # ici, or dcn between slices
    overlapped: bool  # whether start and end are apart
    cycles: float
    exposed_cycles: float
    source: str


class Copy(NamedTuple):
    """A copy beside the computation, `count` times a step; exposed_cycles: late by this if memory served no other."""

    bytes: int
    count: int
    cycles: float
    exposed_cycles: float


class Walk(NamedTuple):
    """What a step runs, in the order of the schedule; a loop's body stands once, with the count of its trips."""

    operations: tuple[Operation, ...]
    collectives: tuple[Collective, ...]
    copies: tuple[Copy, ...]
    matmul_flops: float  # of dot and convolution instructions
    pallas_flops: float

    @property
    def cycles(self) -> float:
        """Cycles a step: every operation, and what of the collectives is exposed."""
        return sum(self.by_class().values())

    def by_class(self) -> dict[str, float]:
        """Cycles a step of each of CLASSES."""
        total = dict.fromkeys(CLASSES, 0.0)
        for operation in self.operations:
            total[operation.kind] += operation.total
        total["collective"] += sum(c.exposed_cycles * c.count for c in self.collectives)
        return total

    def times(self, count: int) -> "Walk":
        """All of it `count` times."""
        groups = (self.operations, self.collectives, self.copies)
        many = (
            tuple(item._replace(count=item.count * count) for item in group) for group in groups
        )
        return Walk(*many, self.matmul_flops * count, self.pallas_flops * count)


# ---- The walk --------------------------------------------------------------------------------------------------------

AttentionFlops = Callable[[hlo.Instruction], float | None]


def walk(
    module: hlo.Module,
    chip: hardware.Chip,
    *,
    mesh: Mesh | None = None,
    vocab_size: int | None = None,
    attention_flops: AttentionFlops | None = None,
) -> Walk:
    """Cost a program on `chip`.

    mesh: gives collectives the names of its axes. vocab_size: tells tables from the other weights.
    attention_flops: FLOPs of a Pallas call, before the kernel's own statement; None for one it does not know.
    Raises hlo.HloError where a loop's trips cannot be found.
    """
    return _Walker(module, chip, mesh, vocab_size, attention_flops).walk(module.entry)


class _Walker:
    """Costs the computations of one program, each once, the inner ones first."""

    def __init__(self, module, chip, mesh, vocab_size, attention_flops):
        self.module, self.chip, self.mesh = module, chip, mesh
        self.attention_flops = attention_flops
        self.weights, self.tables = _parameter_matrices(module, vocab_size or math.inf)
        self.walks: dict[str, Walk] = {}

    def walk(self, name: str) -> Walk:
        if name not in self.walks:
            self.walks[name] = _Timeline(self, self.module.computations[name]).walk()
        return self.walks[name]

    def inner(self, instruction: hlo.Instruction) -> Walk | None:
        """What a loop, a branch or a call runs; None for another instruction."""
        match instruction.opcode:
            case "while":
                trips = hlo.trip_count(self.module, instruction)
                condition = self.walk(instruction.attribute("condition")).times(trips)
                body = self.walk(instruction.attribute("body")).times(trips)
                return body._replace(operations=condition.operations + body.operations)
            case "conditional":
                return max(
                    (self.walk(name) for name in hlo.branches(instruction)),
                    key=lambda walk: walk.cycles,
                )
            case "call":
                return self.walk(instruction.attribute("to_apply"))
        return None

    def cycles(self, size: float, bandwidth: float) -> float:
        return size / bandwidth * self.chip.clock_hz

    def source(self, instruction: hlo.Instruction, body: Sequence[hlo.Instruction]) -> str:
        """The line of an instruction; of a fusion that the compiler made without saying from what, that of its end."""
        lines = (hlo.source_line(self.module, i) for i in (instruction, *reversed(body)))
        return next(filter(None, lines), "")

    # -- on the core

    def operation(
        self, computation: hlo.Computation, instruction: hlo.Instruction
    ) -> tuple[Operation, float]:
        """The costed operation, and its FLOPs if it is a Pallas call."""
        body = self.module.body(instruction)
        kind = self._kind(instruction, body)
        cycles, basis, flops = _estimated_cycles(instruction), "compiler", 0.0
        if kind == "pallas":
            cycles, basis, flops = self._pallas(computation, instruction)
        elif cycles is None:
            size, bandwidth = _hbm_bytes(computation, instruction), self.chip.memory_bandwidth
            if kind == "gather/scatter":
                size, bandwidth = _row_bytes(body), bandwidth * ROW_BANDWIDTH_SHARE
            cycles, basis = self.cycles(size, bandwidth), "bytes"
        shape = " ".join(f"{a.dtype}[{','.join(map(str, a.dims))}]" for a in instruction.result[:2])
        source = self.source(instruction, body)
        return Operation(
            instruction.name, kind, cycles, 1, basis, shape, source, instruction.op_name
        ), flops

    def _kind(self, instruction: hlo.Instruction, body: Sequence[hlo.Instruction]) -> str:
        opcodes = {
            i.opcode for i in body if any(a.dims for a in i.result)
        }  # index arithmetic is none of the work
        if instruction.attribute("custom_call_target") == "tpu_custom_call":
            return "pallas"
        if opcodes & {"gather", "scatter"}:
            return "gather/scatter"
        if opcodes & {"convolution", "dot"}:
            return "matmul"
        if instruction.opcode in ("custom-call", "sort") or not instruction.result:
            return "other"
        largest = max(instruction.result, key=lambda array: array.bytes)
        if _holds(largest, self.tables):
            return "table"
        if _holds(largest, self.weights):
            return "weight"
        return "copy" if opcodes <= MOVES else "activation"

    def _pallas(
        self, computation: hlo.Computation, instruction: hlo.Instruction
    ) -> tuple[float, str, float]:
        """(cycles, basis, FLOPs) of a Pallas call."""
        stated = re.search(
            r'"cost_estimate":\{"flops":"(\d+)"[^}]*"bytes_accessed":"(\d+)"',
            instruction.attributes,
        )
        moved = int(stated[2]) if stated else _hbm_bytes(computation, instruction)
        flops = self.attention_flops(instruction) if self.attention_flops else None
        if flops is None:
            flops = int(stated[1]) if stated else splash_flops(computation, instruction) or 0.0
        by_flops = self.cycles(flops, PALLAS_FLOPS_SHARE * self.chip.peak_flops)
        by_bytes = self.cycles(moved, self.chip.memory_bandwidth)
        return max(by_flops, by_bytes), "flops" if by_flops > by_bytes else "bytes", flops

    # -- beside it

    def collective(
        self, computation: hlo.Computation, instruction: hlo.Instruction
    ) -> Collective | None:
        """The collective that an instruction runs or starts, all of it exposed; None for another instruction."""
        if instruction.opcode == "recv" and "xla_megascale_runtime" in instruction.attributes:
            return self._between_slices(instruction)
        body = self.module.body(instruction)
        if any(i.opcode in ("convolution", "dot") for i in body):
            return None  # a matrix product beside which a collective that started before goes on
        inner = next((i for i in body if i.opcode.removesuffix("-start") in COLLECTIVES), None)
        if inner is None or _is_end(instruction, body):
            return None
        kind = inner.opcode.removesuffix("-start")
        if kind == "all-reduce" and any(i.opcode == "dynamic-slice" for i in body):
            kind = "reduce-scatter"  # of the sum each chip keeps its part
        read = sum(array.bytes for array in computation.operands(instruction))
        written = sum(array.bytes for array in instruction.result)
        overlapped = _is_start(instruction, body)
        size = max(
            read, written - read if overlapped else written
        )  # a start gives back what it reads
        group = hlo.replica_groups(inner)[0] or list(range(self.mesh.size if self.mesh else 1))
        if len(group) == 1 and self.mesh and self.mesh.size > 1:
            return None  # over an axis of one chip, left there by a compiler in haste
        axes, network = _axes_of(group, self.mesh)
        links = 1 if kind == "collective-permute" else RING_LINKS
        ici, dcn = self.chip.ici_link_bandwidth * links, self.chip.dcn_bandwidth
        cycles = self.cycles(_share(kind, len(group)) * size, dcn if network == "dcn" else ici)
        source = self.source(instruction, body)
        return Collective(
            kind, size, 1, len(group), axes, network, overlapped, cycles, cycles, source
        )

    def _between_slices(self, instruction: hlo.Instruction) -> Collective:
        """A collective between slices, which the compiler hands to the host: its receiving half stands for both."""
        kind = instruction.attribute("_xla_megascale_transfer_type").lower().replace("_", "-")
        slices = re.search(r'_xla_megascale_target="\{([\d,:]+)\}', instruction.attributes)
        count = sum(_span(part) for part in slices[1].split(",")) if slices else 2
        size = instruction.result[0].bytes
        cycles = self.cycles(_share(kind, count) * size, self.chip.dcn_bandwidth)
        source = self.source(instruction, [])
        return Collective(
            kind, size, 1, count, _slice_axes(self.mesh), "dcn", True, cycles, cycles, source
        )

    def copy(self, instruction: hlo.Instruction) -> Copy:
        """A copy that an instruction starts: it gives back source and destination, of which the smaller is moved."""
        sizes = sorted(array.bytes for array in instruction.result)
        size = (
            sizes[-3 if instruction.opcode == "dynamic-update-slice-start" else -2]
            if len(sizes) > 1
            else sizes[0]
        )
        cycles = self.cycles(size, self.chip.memory_bandwidth)
        return Copy(size, 1, cycles, cycles)


class _Timeline:
    """Lays a computation's operations one after the other, and what runs beside them from its start to its end.

    A network serves one collective after the other, and the memory one copy.
    """

    def __init__(self, walker: _Walker, computation: hlo.Computation):
        self.walker, self.computation = walker, computation
        self.now = 0.0
        self.busy_until = {"ici": 0.0, "dcn": 0.0, "copy": 0.0}
        self.started: dict[str, tuple[float, Collective | Copy]] = {}
        self.operations: list[Operation] = []
        self.collectives: list[Collective] = []
        self.copies: list[Copy] = []
        self.matmul_flops = float(hlo.matmul_flops(walker.module, computation))
        self.pallas_flops = 0.0

    def walk(self) -> Walk:
        for instruction in self.computation.instructions.values():
            inner = self.walker.inner(instruction)
            if inner:
                self._add_inner(inner)
            else:
                self._add(instruction)
        for name in list(self.started):  # ends in the loop's next trip
            self._end(name)
        parts = (tuple(self.operations), tuple(self.collectives), tuple(self.copies))
        return Walk(*parts, self.matmul_flops, self.pallas_flops)

    def _add_inner(self, inner: Walk) -> None:
        self.operations += inner.operations
        self.collectives += inner.collectives
        self.copies += inner.copies
        self.matmul_flops += inner.matmul_flops
        self.pallas_flops += inner.pallas_flops
        self.now += inner.cycles

    def _add(self, instruction: hlo.Instruction) -> None:
        if instruction.opcode in FREE or instruction.attribute("custom_call_target") in FREE_CALLS:
            return
        body = self.walker.module.body(instruction)
        if collective := self.walker.collective(self.computation, instruction):
            if collective.overlapped:
                self._start(instruction.name, collective, collective.network)
            else:
                self.collectives.append(collective)
                self.now += collective.cycles
        elif _is_end(instruction, body):
            self._end(self._origin(instruction))
        elif _is_start(instruction, body):
            self._start(instruction.name, self.walker.copy(instruction), "copy")
        elif instruction.opcode != "async-update":
            operation, flops = self.walker.operation(self.computation, instruction)
            self.operations.append(operation)
            self.pallas_flops += flops
            self.now += operation.cycles

    def _start(self, name: str, transfer: Collective | Copy, network: str) -> None:
        end = max(self.now, self.busy_until[network]) + transfer.cycles
        self.busy_until[network] = end
        self.started[name] = (end, transfer)

    def _end(self, name: str | None) -> None:
        if name not in self.started:  # started before the loop, which counted it there
            return
        end, transfer = self.started.pop(name)
        transfer = transfer._replace(exposed_cycles=min(transfer.cycles, max(0.0, end - self.now)))
        if isinstance(transfer, Collective):
            self.collectives.append(transfer)
            self.now += transfer.exposed_cycles
        else:
            self.copies.append(transfer)

    def _origin(self, instruction: hlo.Instruction) -> str | None:
        """The start that an end belongs to, through the tuples and fusions that its handle goes through."""
        waiting, seen = list(instruction.operands), set()
        while waiting:
            name = waiting.pop()
            if name in self.started:
                return name
            if name not in seen and name in self.computation.instructions:
                seen.add(name)
                before = self.computation.instructions[name]
                handles = before.opcode in ("get-tuple-element", "tuple", "async-update", "bitcast")
                waiting += (
                    before.operands if handles or _is_step(self.walker.module.body(before)) else ()
                )
        return None


def _is_start(instruction: hlo.Instruction, body: Sequence[hlo.Instruction]) -> bool:
    ours = instruction.opcode == "recv" or instruction.opcode.endswith("-start")
    return ours or any(i.attribute("custom_call_target") == "AsyncCollectiveStart" for i in body)


def _is_end(instruction: hlo.Instruction, body: Sequence[hlo.Instruction]) -> bool:
    ours = instruction.opcode.endswith("-done")
    return ours or any(i.attribute("custom_call_target") == "AsyncCollectiveDone" for i in body)


def _is_step(body: Sequence[hlo.Instruction]) -> bool:
    """Whether a fusion moves a collective on that started before."""
    return len(body) > 1 and any(i.opcode in COLLECTIVES for i in body)


def _estimated_cycles(instruction: hlo.Instruction) -> float | None:
    """The compiler's own estimate; None where it has none."""
    found = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
    return float(found[1]) if found and int(found[1]) < UNKNOWN_CYCLES else None


def _hbm_bytes(computation: hlo.Computation, instruction: hlo.Instruction) -> int:
    """Bytes of operands and results that lie in the chip's main memory."""
    arrays = itertools.chain(instruction.result, computation.operands(instruction))
    return sum(array.bytes for array in arrays if array.space == hlo.HBM)


def _row_bytes(body: Sequence[hlo.Instruction]) -> int:
    """Bytes that gathers and scatters move: rows read and written; a scatter also reads what it adds to."""
    arrays = {i.name: i.result for i in body}
    gathered = sum(2 * i.result[0].bytes for i in body if i.opcode == "gather")
    updates = (arrays[i.operands[-1]][0] for i in body if i.opcode == "scatter")
    return gathered + sum(3 * update.bytes for update in updates)


def _share(kind: str, count: int) -> float:
    """How much of its array a chip sends in a collective among `count`."""
    if kind in ("collective-permute", "collective-broadcast", "one-to-one"):
        return 1.0
    return (2 if kind == "all-reduce" else 1) * (count - 1) / count


def _span(text: str) -> int:
    """Slices in `3`, or in `0:3`, the last one included."""
    first, _, last = text.partition(":")
    return int(last or first) - int(first) + 1


def _parameter_matrices(module: hlo.Module, vocab_size: float) -> tuple[set, set]:
    """The last axes of the program's parameters, as a chip holds them and as a whole: (of layers, of tables)."""
    parameters = [
        i
        for i in module.computations[module.entry].instructions.values()
        if i.opcode == "parameter"
    ]
    parameters = [i for i in parameters if len(i.result) == 1]
    # Tokens, and what is as large as they are: a batch.
    data = {i.result[0].dims for i in parameters if i.result[0].dtype[0] in "su"}
    weights, tables = set(), set()
    for instruction in parameters:
        dims = instruction.result[0].dims
        if dims in data:
            continue
        cut = re.search(r"sharding=\{devices=\[([\d,]+)\]", instruction.attributes)
        ways = [int(n) for n in cut[1].split(",")] if cut else [1] * len(dims)
        whole = tuple(size * n for size, n in zip(dims, ways, strict=False))
        for shape in (dims, whole):
            matrix = tuple(size for size in (shape[1:] if len(shape) > 2 else shape) if size > 1)
            if len(matrix) > 1:
                (tables if max(whole) >= vocab_size else weights).add(matrix)
    return weights, tables


def _holds(array: hlo.Array, matrices: Iterable[Sequence[int]]) -> bool:
    """Whether an array has the axes of one of the matrices, beside others."""
    axes = Counter(array.dims)
    return array.dtype[0] not in "su" and any(Counter(matrix) <= axes for matrix in matrices)


def _axes_of(group: Sequence[int], mesh: Mesh | None) -> tuple[tuple[str, ...], str]:
    """The mesh axes along which a group lies, and the network between its chips."""
    if mesh is None:
        return (), "ici"
    devices = mesh.devices.ravel()
    places = [_place(member, mesh) for member in group]
    along = [len(set(row)) > 1 for row in zip(*places, strict=True)]
    axes = tuple(itertools.compress(mesh.axis_names, along))
    return axes, "dcn" if len({_slice(devices[member]) for member in group}) > 1 else "ici"


def _slice(device: jax.Device) -> int:
    return getattr(device, "slice_index", None) or 0


def _place(member: int, mesh: Mesh) -> list[int]:
    place = []
    for size in reversed(mesh.devices.shape):
        member, at = divmod(member, size)
        place.insert(0, at)
    return place


def _slice_axes(mesh: Mesh | None) -> tuple[str, ...]:
    """The mesh axes along which one comes to another slice."""
    if mesh is None:
        return ()
    lines = (
        np.moveaxis(mesh.devices, axis, 0).reshape(size, -1)[:, 0]
        for axis, size in enumerate(mesh.devices.shape)
    )
    along = (len({_slice(device) for device in line}) > 1 for line in lines)
    return tuple(itertools.compress(mesh.axis_names, along))


# ---- Splash attention ------------------------------------------------------------------------------------------------

SPLASH_PRODUCTS = {
    "fwd": 2,  # scores; output
    "dq": 3,  # scores, their gradient; dq
    "dkv": 4,  # scores, their gradient; dk, dv
    "fused dkv": 5,  # and dq
}


def splash_flops(computation: hlo.Computation, instruction: hlo.Instruction) -> float | None:
    """FLOPs of a Splash call, None for another kernel: the tiles of its grid, each whole.

    The grid is as wide as the row of blocks that sees most and the program does not say which tiles a shorter row
    leaves out, so this counts from above.
    """
    found = re.search(r"splash_m[hq]a_(fwd|dq|dkv)", instruction.op_name)
    if not found:
        return None
    kernel = found[1]
    blocks = dict(re.findall(r'\\"(\w+)\\": (\w+)', instruction.attributes))
    arrays = computation.operands(instruction)
    query, key = [array for array in arrays if array.dtype in ("bf16", "f32")][:2]
    tables = [array.dims for array in arrays if array.dtype[0] == "s" and len(array.dims) == 3]
    suffix = {"fwd": "", "dq": "_dq", "dkv": "_dkv"}[kernel]
    if (
        kernel == "dkv"
        and sum(array.elements >= query.elements for array in instruction.result) > 2
    ):
        kernel = "fused dkv"  # its third large result is dq
    tile = int(blocks[f"block_q{suffix}"]) * int(blocks[f"block_kv{suffix}"])
    tiles = math.prod(tables[0][-2:]) if tables else query.dims[-2] * key.dims[-2] / tile
    heads, head_dim = math.prod(query.dims[:-2]), query.dims[-1]
    return 2.0 * SPLASH_PRODUCTS[kernel] * head_dim * tile * tiles * heads


# ---- The report ------------------------------------------------------------------------------------------------------


class Memory(NamedTuple):
    """Bytes on a chip."""

    arguments: int
    outputs: int
    aliased: int  # outputs that take the place of arguments
    temporaries: int  # in the chip's main memory, as laid out there
    code: int
    limit: int | None

    @property
    def total(self) -> int:
        """What the program needs."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


class Work(NamedTuple):
    """What a program is for: the model's FLOPs and the tokens of a step, over all chips, and the steps of the run."""

    model_flops: float
    tokens: int
    steps: int | None
    bytes: float | None = (
        None  # that a chip has to read in a step, where memory and not FLOPs may be the limit
    )


@dataclasses.dataclass(frozen=True)
class Report:
    """What one step of a program takes, a chip where nothing else is said. Null where it is not known."""

    chips: int
    memory: Memory
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
    dearest: tuple[Operation, ...]
    step_seconds: float
    mfu: float | None
    bandwidth_utilization: float | None  # of the bytes that a chip has to read
    tokens_per_second: float | None  # of all chips
    run_seconds: float | None
    run_price: float | None  # USD
    assumptions: tuple[str, ...] = ASSUMPTIONS

    def to_json(self) -> dict[str, Any]:
        """The same as values that json can write."""
        values = dataclasses.asdict(self)
        values["memory"] = {**self.memory._asdict(), "total": self.memory.total}
        values["collectives"] = [collective._asdict() for collective in self.collectives]
        values["dearest"] = [
            {**operation._asdict(), "total": operation.total} for operation in self.dearest
        ]
        return values

    def tables(self) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
        """(title, header, rows) of each table, as text."""
        memory = [
            (kind, _gib(size))
            for kind, size in self.memory._asdict().items()
            if kind != "limit" and size
        ]
        memory += [("total", _gib(self.memory.total)), ("limit", _gib(self.memory.limit))]
        parts = [
            *self.cycles_by_class.items(),
            *((f"by {name}", n) for name, n in self.cycles_by_basis.items()),
        ]
        cycles = [(part, f"{n / 1e6:,.2f}", f"{n / self.cycles:.1%}") for part, n in parts if n]
        cycles.append(("all", f"{self.cycles / 1e6:,.2f}", ""))
        cycles.append(
            (
                "copies beside it",
                f"{self.copied_cycles / 1e6:,.2f}",
                f"{self.copied_bytes / 1e9:,.2f} GB",
            )
        )
        collectives = [
            (
                c.kind,
                f"{c.bytes / 1e6:,.2f}",
                str(c.count),
                str(c.group_size),
                " ".join(c.axes),
                c.network,
                "yes" if c.overlapped else "no",
                f"{c.cycles * c.count / 1e6:,.2f}",
                f"{c.exposed_cycles * c.count / 1e6:,.2f}",
                c.source,
            )
            for c in self.collectives
        ]
        dearest = [
            (
                f"{o.total / 1e6:,.2f}",
                f"{o.cycles:,.0f}",
                str(o.count),
                o.kind,
                o.basis,
                o.shape,
                o.source,
                o.name,
            )
            for o in self.dearest
        ]
        sources = [
            (source or "?", f"{value / 1e6:,.2f}")
            for source, value in self.cycles_by_source.items()
        ]
        bandwidth = self.bandwidth_utilization
        step = [
            ("chips", str(self.chips)),
            ("model FLOPs a chip", _or_unknown(self.model_flops, ".4g")),
            (
                "HLO matmul FLOPs a chip",
                f"{self.matmul_flops:.4g} and {self.pallas_flops:.4g} in Pallas calls",
            ),
            ("estimated step", f"{self.step_seconds:.4g} s"),
            ("estimated MFU", _or_unknown(self.mfu, ".1%")),
            *(
                [("estimated bandwidth utilization", f"{bandwidth:.1%}")]
                if bandwidth is not None
                else []
            ),
            ("estimated tokens/s", _or_unknown(self.tokens_per_second, ",.0f")),
            (
                "estimated run",
                _or_unknown(self.run_seconds and self.run_seconds / 60, ",.1f", " min"),
            ),
            ("estimated price", _or_unknown(self.run_price, ",.2f", " USD")),
            ("compiled in", _or_unknown(self.compile_seconds, ".0f", " s")),
        ]
        columns = "kind, MB, count, group, axes, network, overlaps, M cycles, exposed, source"
        operation = "M cycles, cycles, count, class, basis, result, source, name"
        return [
            ("memory", ("kind", "GiB"), memory),
            ("cycles", ("class", "M cycles", "share"), cycles),
            ("collectives", tuple(columns.split(", ")), collectives),
            ("dearest operations", tuple(operation.split(", ")), dearest),
            ("source lines", ("source", "M cycles"), sources),
            ("step", ("what", "value"), step),
        ]


def analyze(
    compiled: Any,
    chip: hardware.Chip,
    *,
    mesh: Mesh | None = None,
    vocab_size: int | None = None,
    work: Work | None = None,
    compile_seconds: float | None = None,
    attention_flops: AttentionFlops | None = None,
    top: int = 10,
) -> Report:
    """The report of a compiled function (`jax.stages.Compiled`) on `chip`, with the `top` dearest operations.

    See `walk` for the other arguments. Raises hlo.HloError where the program cannot be read.
    """
    result = walk(
        hlo.parse(compiled.as_text()),
        chip,
        mesh=mesh,
        vocab_size=vocab_size,
        attention_flops=attention_flops,
    )
    stats = compiled.memory_analysis()
    memory = Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        # temp_size_in_bytes counts other memories and more of loops: 9 GiB above what the compiler lays out for d24.
        temporaries=stats.peak_memory_in_bytes
        - (stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes),
        code=stats.generated_code_size_in_bytes,
        limit=chip.program_memory_bytes,
    )
    return _report(result, memory, chip, mesh.size if mesh else 1, work, compile_seconds, top)


def _report(result, memory, chip, chips, work, compile_seconds, top) -> Report:
    by_basis, by_source = Counter(), Counter()
    for operation in result.operations:
        by_basis[operation.basis] += operation.total
        by_source[operation.source] += operation.total
    by_basis["bytes"] += result.by_class()["collective"]
    seconds = result.cycles / chip.clock_hz
    run_seconds = seconds * work.steps if work and work.steps is not None else None
    read = work.bytes if work else None
    priced = run_seconds is not None and chip.spot_price is not None
    return Report(
        chips=chips,
        memory=memory,
        compile_seconds=compile_seconds,
        model_flops=work and work.model_flops / chips,
        matmul_flops=result.matmul_flops,
        pallas_flops=result.pallas_flops,
        cycles=result.cycles,
        cycles_by_class=result.by_class(),
        cycles_by_basis=dict(by_basis.most_common()),
        cycles_by_source=dict(by_source.most_common(top)),
        collectives=_merged(result.collectives),
        copied_bytes=sum(copy.bytes * copy.count for copy in result.copies),
        copied_cycles=sum(copy.cycles * copy.count for copy in result.copies),
        dearest=tuple(sorted(result.operations, key=lambda o: -o.total)[:top]),
        step_seconds=seconds,
        mfu=work and work.model_flops / (chips * chip.peak_flops * seconds),
        bandwidth_utilization=None if read is None else read / (chip.memory_bandwidth * seconds),
        tokens_per_second=work and work.tokens / seconds,
        run_seconds=run_seconds,
        run_price=run_seconds / 3600 * chips * chip.spot_price if priced else None,
    )


def _merged(collectives: Iterable[Collective]) -> tuple[Collective, ...]:
    """Collectives that differ in nothing but their count, as one."""
    counts = Counter()
    for collective in collectives:
        counts[collective._replace(count=0)] += collective.count
    return tuple(collective._replace(count=count) for collective, count in counts.items())


def summarize(
    text: str, device_kind: str = "TPU v6 lite", top: int = 20, vocab_size: int | None = None
) -> str:
    """A program's text as lines to print: cycles by class, collectives, the dearest operations and source lines."""
    chip = hardware.CHIPS[device_kind]
    result = walk(hlo.parse(text), chip, vocab_size=vocab_size)
    report = _report(result, Memory(0, 0, 0, 0, 0, None), chip, 1, None, None, top)
    lines = []
    for title, header, rows in report.tables()[1:-1]:
        lines.append(f"-- {title}")
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        for row in (header, *rows):
            lines.append(
                "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            )
    return "\n".join(lines)


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:,.3f}"


def _or_unknown(value: float | None, form: str, unit: str = "") -> str:
    return "unknown" if value is None else f"{value:{form}}{unit}"

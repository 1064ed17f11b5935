"""Estimates the cycles of a compiled TPU program from its schedule, without running it.

The compiler writes an estimate of cycles beside most operations. `walk` sums them over the program,
with loops times their trip counts, and costs by bytes and FLOPs what the compiler does not: Pallas
calls, gathers and scatters, collectives. The sum is not a clock: ratios between programs of one
compiler are meaningful, seconds are not before somebody has measured one on a chip.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jax.sharding import Mesh

from MaxNano.compile import hlo
from MaxNano.compile.collectives import (
    RING_LINKS,
    Collective,
    CollectiveReader,
    is_end,
    is_start,
    is_step,
    is_update,
)
from MaxNano.distributed import hardware

# ---- Assumptions about what the compiler does not cost ------------------------------------------

# The compiler writes numbers near 2^63 beside operations that it does not cost.
UNKNOWN_CYCLES = 2**62

# The share of the peak FLOP/s that a Pallas call reaches. With a head_dim of 128, each product of
# attention has an axis of 128, which fills half of a 256 x 256 matrix unit. (The compiler gives
# 4096 x 4096 x 128 nearly the cycles of 4096 x 4096 x 256.) Softmax overlaps with the products and
# is not included.
PALLAS_FLOPS_SHARE = 0.5

# That of kernels/products.py and kernels/polar.py, by name: as the bundles of d24's kernels say, which
# benchmarks/products.py prints. Polar Express, 0.90 by its bundles, also waits for each matrix.
KERNEL_FLOPS_SHARES = {
    "project_forward": 0.80,
    "project_backward": 0.75,
    "add_product_forward": 0.94,
    "add_product_backward": 0.97,
    "mlp_forward": 0.92,
    "mlp_backward": 0.87,
    "polar_express": 0.83,
}

# The share of the memory bandwidth that a gather of rows reaches: in the tiled layout a bfloat16
# row consists of pieces of 256 bytes, each in a granule of 512 bytes shared with its neighbor, and
# rows are fetched sequentially.
ROW_BANDWIDTH_SHARE = 0.25

ASSUMPTIONS = (
    f"Pallas calls: the larger of their FLOPs at {PALLAS_FLOPS_SHARE:g} of the peak (head_dim 128 fills half of a "
    "256 x 256 matrix unit), of products at 0.75 to 0.97 as their bundles say, and their bytes at the memory "
    "bandwidth; FLOPs as the kernel states them, Splash's from whole tiles of its grid",
    f"gathers and scatters: bytes of the rows, read and written, at {ROW_BANDWIDTH_SHARE:g} of the memory bandwidth; "
    "on the SparseCores too, where only what no operation between start and end hides counts",
    f"collectives: a ring over {RING_LINKS} links per chip (between slices: the data-center network); only what no "
    "operation between start and end hides counts",
    "operations that neither the compiler nor these rules cost: bytes at the memory bandwidth",
    "asynchronous copies are listed and do not count",
)

# ---- Values -------------------------------------------------------------------------------------

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
    """An operation on the critical path that runs `count` times per step for `cycles` each."""

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
        """Cycles per step."""
        return self.cycles * self.count


class Copy(NamedTuple):
    """An asynchronous copy, `count` times per step; exposed_cycles: its delay if copies alone used
    the memory.
    """

    bytes: int
    count: int
    cycles: float
    exposed_cycles: float


class Walk(NamedTuple):
    """The operations of a step in the order of the schedule; a loop body appears once, with its
    trip count.
    """

    operations: tuple[Operation, ...]
    collectives: tuple[Collective, ...]
    copies: tuple[Copy, ...]
    matmul_flops: float  # of dot and convolution instructions
    pallas_flops: float

    @property
    def cycles(self) -> float:
        """Cycles per step: all operations, and the exposed part of the collectives."""
        return sum(self.by_class().values())

    def by_class(self) -> dict[str, float]:
        """Cycles per step of each of CLASSES, or of the kinds of a GPU's kernels."""
        total = dict.fromkeys(CLASSES, 0.0)
        for operation in self.operations:
            total[operation.kind] = total.get(operation.kind, 0.0) + operation.total
        total["collective"] += sum(c.exposed_cycles * c.count for c in self.collectives)
        return total

    def times(self, count: int) -> "Walk":
        """The walk repeated `count` times."""
        groups = (self.operations, self.collectives, self.copies)
        repeated = (
            tuple(item._replace(count=item.count * count) for item in group) for group in groups
        )
        return Walk(*repeated, self.matmul_flops * count, self.pallas_flops * count)


# ---- The walk -----------------------------------------------------------------------------------


def walk(
    module: hlo.Module,
    chip: hardware.Chip,
    *,
    mesh: Mesh | None = None,
    vocab_size: int | None = None,
) -> Walk:
    """Cost a program on `chip`.

    mesh: names the axes of collectives. vocab_size: distinguishes tables from other weights.
    Raises hlo.HloError if the trip count of a loop cannot be read.
    """
    return Walker(module, chip, mesh, vocab_size).walk(module.entry)


class Walker:
    """Costs each computation of one program once, inner ones first."""

    def __init__(
        self,
        module: hlo.Module,
        chip: hardware.Chip,
        mesh: Mesh | None,
        vocab_size: int | None = None,
    ):
        self.module, self.chip = module, chip
        self.collectives = CollectiveReader(module, chip, mesh)
        self.weights, self.tables = _parameter_matrices(module, vocab_size or math.inf)
        self.walks: dict[str, Walk] = {}

    def walk(self, name: str) -> Walk:
        """The walk of the computation `name`."""
        if name not in self.walks:
            self.walks[name] = _Timeline(self, self.module.computations[name]).walk()
        return self.walks[name]

    def inner(self, instruction: hlo.Instruction) -> Walk | None:
        """What a loop, a conditional or a call runs; None for another instruction."""
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
        """Cycles of `size` bytes, or FLOPs, at a bandwidth per second."""
        return size / bandwidth * self.chip.clock_hz

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
        # A start returns handles: what it computes is the result of its body's last instruction.
        result = body[-1].result if instruction.opcode == "call-start" else instruction.result
        shape = " ".join(f"{a.dtype}[{','.join(map(str, a.dims))}]" for a in result[:2])
        source = hlo.source_of(self.module, instruction, body)
        return Operation(
            instruction.name, kind, cycles, 1, basis, shape, source, instruction.op_name
        ), flops

    def _kind(self, instruction: hlo.Instruction, body: Sequence[hlo.Instruction]) -> str:
        # Scalars are index arithmetic, not work.
        opcodes = {i.opcode for i in body if any(a.dims for a in i.result)}
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
        flops = int(stated[1]) if stated else splash_flops(computation, instruction) or 0.0
        names = set(instruction.op_name.split("/")) & KERNEL_FLOPS_SHARES.keys()
        share = KERNEL_FLOPS_SHARES[names.pop()] if names else PALLAS_FLOPS_SHARE
        by_flops = self.cycles(flops, share * self.chip.peak_flops)
        by_bytes = self.cycles(moved, self.chip.memory_bandwidth)
        return max(by_flops, by_bytes), "flops" if by_flops > by_bytes else "bytes", flops

    def copy(self, instruction: hlo.Instruction) -> Copy:
        """The copy that an instruction starts; of its results, source and destination, the smaller
        one is moved.
        """
        sizes = sorted(array.bytes for array in instruction.result)
        size = (
            sizes[-3 if instruction.opcode == "dynamic-update-slice-start" else -2]
            if len(sizes) > 1
            else sizes[0]
        )
        cycles = self.cycles(size, self.chip.memory_bandwidth)
        return Copy(size, 1, cycles, cycles)


class _Timeline:
    """Puts a computation's operations on a line of time, and asynchronous transfers from their
    start to their end.

    A network runs one collective at a time, the memory one copy, and the SparseCores one gather or
    scatter.
    """

    def __init__(self, walker: Walker, computation: hlo.Computation):
        self.walker, self.computation = walker, computation
        self.now = 0.0
        self.busy_until = {"ici": 0.0, "dcn": 0.0, "copy": 0.0, "sparsecore": 0.0}
        self.started: dict[str, tuple[float, Collective | Copy | Operation]] = {}
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
        for name in list(self.started):  # they end in the loop's next trip
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
        if collective := self.walker.collectives.read(self.computation, instruction):
            if collective.overlapped:
                self._start(instruction.name, collective, collective.network)
            else:
                self.collectives.append(collective)
                self.now += collective.cycles
        elif is_end(instruction, body):
            self._end(self._origin(instruction))
        elif is_start(instruction, body):
            operation, _ = self.walker.operation(self.computation, instruction)
            if operation.kind == "gather/scatter":
                self._start(instruction.name, operation, "sparsecore")
            else:
                self._start(instruction.name, self.walker.copy(instruction), "copy")
        elif not is_update(instruction):
            operation, flops = self.walker.operation(self.computation, instruction)
            self.operations.append(operation)
            self.pallas_flops += flops
            self.now += operation.cycles

    def _start(self, name: str, transfer: Collective | Copy | Operation, network: str) -> None:
        end = max(self.now, self.busy_until[network]) + transfer.cycles
        self.busy_until[network] = end
        self.started[name] = (end, transfer)

    def _end(self, name: str | None) -> None:
        if name not in self.started:  # it started before the loop and was counted there
            return
        end, transfer = self.started.pop(name)
        exposed = min(transfer.cycles, max(0.0, end - self.now))
        if isinstance(transfer, Copy):
            self.copies.append(transfer._replace(exposed_cycles=exposed))
            return
        self.now += exposed
        if isinstance(transfer, Collective):
            self.collectives.append(transfer._replace(exposed_cycles=exposed))
        else:
            self.operations.append(transfer._replace(cycles=exposed))

    def _origin(self, instruction: hlo.Instruction) -> str | None:
        """The name of the start that an end belongs to, found through the tuples and fusions that
        pass its handle.
        """
        waiting, seen = list(instruction.operands), set()
        while waiting:
            name = waiting.pop()
            if name in self.started:
                return name
            if name not in seen and name in self.computation.instructions:
                seen.add(name)
                before = self.computation.instructions[name]
                handles = is_update(before) or before.opcode in (
                    "get-tuple-element",
                    "tuple",
                    "bitcast",
                )
                waiting += (
                    before.operands if handles or is_step(self.walker.module.body(before)) else ()
                )
        return None


def _estimated_cycles(instruction: hlo.Instruction) -> float | None:
    """The compiler's estimate; None if it has none."""
    match = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
    return float(match[1]) if match and int(match[1]) < UNKNOWN_CYCLES else None


def _hbm_bytes(computation: hlo.Computation, instruction: hlo.Instruction) -> int:
    """Bytes of the operands and results in the chip's main memory."""
    arrays = itertools.chain(instruction.result, computation.operands(instruction))
    return sum(array.bytes for array in arrays if array.space == hlo.HBM)


def _row_bytes(body: Sequence[hlo.Instruction]) -> int:
    """Bytes of the rows that gathers and scatters read and write; a scatter also reads its
    destination.
    """
    arrays = {i.name: i.result for i in body}
    gathered = sum(2 * i.result[0].bytes for i in body if i.opcode == "gather")
    updates = (arrays[i.operands[-1]][0] for i in body if i.opcode == "scatter")
    return gathered + sum(3 * update.bytes for update in updates)


def _parameter_matrices(module: hlo.Module, vocab_size: float) -> tuple[set, set]:
    """The shapes of the program's parameter matrices, sharded and whole: (of layers, of tables)."""
    parameters = [
        i
        for i in module.computations[module.entry].instructions.values()
        if i.opcode == "parameter"
    ]
    parameters = [i for i in parameters if len(i.result) == 1]
    # Parameters as large as the tokens belong to the batch.
    data = {i.result[0].dims for i in parameters if i.result[0].dtype[0] in "su"}
    weights, tables = set(), set()
    for instruction in parameters:
        dims = instruction.result[0].dims
        if dims in data:
            continue
        cut = re.search(r"sharding=\{devices=\[([\d,]+)\]", instruction.attributes)
        shards = [int(n) for n in cut[1].split(",")] if cut else [1] * len(dims)
        whole = tuple(size * n for size, n in zip(dims, shards, strict=False))
        for shape in (dims, whole):
            matrix = tuple(size for size in (shape[1:] if len(shape) > 2 else shape) if size > 1)
            if len(matrix) > 1:
                (tables if max(whole) >= vocab_size else weights).add(matrix)
    return weights, tables


def _holds(array: hlo.Array, matrices: Iterable[Sequence[int]]) -> bool:
    """Whether an array's axes include those of one of the matrices."""
    axes = Counter(array.dims)
    return array.dtype[0] not in "su" and any(Counter(matrix) <= axes for matrix in matrices)


# ---- Splash attention ---------------------------------------------------------------------------

SPLASH_PRODUCTS = {
    "fwd": 2,  # scores; output
    "dq": 3,  # scores, their gradient; dq
    "dkv": 4,  # scores, their gradient; dk, dv
    "fused dkv": 5,  # and dq
}


def splash_flops(computation: hlo.Computation, instruction: hlo.Instruction) -> float | None:
    """FLOPs of a Splash call: all tiles of its grid; None for another kernel.

    An upper bound: the grid is as wide as the longest row of blocks, and the program does not say
    which tiles the shorter rows skip.
    """
    match = re.search(r"splash_m[hq]a_(fwd|dq|dkv)", instruction.op_name)
    if not match:
        return None
    kernel = match[1]
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

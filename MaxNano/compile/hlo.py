"""Parses the text of a compiled program: its schedule, trip counts, FLOPs and source lines."""

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

ITEM_BITS = {
    "pred": 8,
    "token": 0,
    "opaque": 0,
    "s2": 2,
    "u2": 2,
    "s4": 4,
    "u4": 4,
    "s8": 8,
    "u8": 8,
    "s16": 16,
    "u16": 16,
    "s32": 32,
    "u32": 32,
    "s64": 64,
    "u64": 64,
    "f8e4m3fn": 8,
    "f8e5m2": 8,
    "f16": 16,
    "bf16": 16,
    "f32": 32,
    "f64": 64,
    "c64": 64,
    "c128": 128,
}
HBM = 0  # the memory space of an array whose layout names none; 1 is vector memory


class HloError(ValueError):
    """The text cannot be parsed, or a number that a count needs is missing."""


class Array(NamedTuple):
    """An array type: element type, dimensions and memory space."""

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Size without the padding of the layout."""
        return -(-self.elements * ITEM_BITS[self.dtype] // 8)


class Instruction(NamedTuple):
    """One operation of a computation."""

    name: str
    opcode: str
    result: tuple[Array, ...]  # the array, or the leaves of a tuple
    operands: tuple[str, ...]  # names
    literal: str  # the text in the parentheses
    attributes: str  # the text after them: attributes, metadata, backend config
    is_root: bool

    def attribute(self, name: str) -> str | None:
        """The value of `name=` without a leading % and quotes; None if there is none."""
        match = re.search(rf'\b{name}="?%?([^,\s"]+)', self.attributes)
        return match and match[1]

    @property
    def op_name(self) -> str:
        """The path of named scopes and JAX primitives that the operation was compiled from."""
        match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return match[1] if match else ""


class Computation(NamedTuple):
    """A computation's instructions by name, in the order of their schedule."""

    name: str
    instructions: dict[str, Instruction]

    def operands(self, instruction: Instruction) -> list[Array]:
        """The arrays that an instruction of this computation reads."""
        return [array for name in instruction.operands for array in self.instructions[name].result]


class Frame(NamedTuple):
    """A line of Python source, and the number of the frame that called it (None: outermost)."""

    file: str
    line: int
    parent: int | None


class Module(NamedTuple):
    """A program."""

    computations: dict[str, Computation]
    entry: str
    frames: dict[int, Frame]

    def called(self, instruction: Instruction, role: str = "calls") -> Computation | None:
        """The computation that an instruction names as its `role`."""
        return self.computations.get(instruction.attribute(role) or "")

    def body(self, instruction: Instruction) -> list[Instruction]:
        """The instructions that run as one kernel: those of a fusion with its inner fusions, or the
        instruction itself.

        A computation that starts on another core runs as one kernel too.
        """
        return list(self._parts(instruction))

    def _parts(self, instruction: Instruction) -> Iterator[Instruction]:
        role = "to_apply" if instruction.opcode == "call-start" else "calls"
        called = self.called(instruction, role)
        if called is None:
            yield instruction
        else:
            for inner in called.instructions.values():
                yield from self._parts(inner)


# ---- Parsing ------------------------------------------------------------------------------------

_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_INSTRUCTION = re.compile(r"^  (ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
# A computation on another core has its thread after the brace.
_COMPUTATION_END = re.compile(r'\}(, execution_thread="\w+")?')
_PARENTHESIS = re.compile(r"[()]")
_FRAME_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")


def parse(text: str) -> Module:
    """Parse the text of `compiled.as_text()`. Raises HloError if it is no program."""
    computations: dict[str, Computation] = {}
    tables: dict[str, dict[int, str]] = {name: {} for name in _FRAME_TABLES}
    entry = table = current = None
    lines: list[str] = []  # of one instruction, whose attributes may contain line breaks

    def close_instruction():
        if lines:
            instruction = _instruction("\n".join(lines))
            current.instructions[instruction.name] = instruction
            lines.clear()

    for line in text.splitlines():
        if current is not None:
            if _COMPUTATION_END.fullmatch(line):
                close_instruction()
                current = None
            else:
                if _INSTRUCTION.match(line):
                    close_instruction()
                lines.append(line)
        elif line in tables:
            table = tables[line]
        elif header := _COMPUTATION.match(line):
            current = computations[header[2]] = Computation(header[2], {})
            entry = header[2] if header[1] else entry
        elif table is not None and line[:1].isdigit():
            number, _, row = line.partition(" ")
            table[int(number)] = row
    if entry is None:
        raise HloError("this is not the text of a compiled program: it has no ENTRY computation")
    return Module(computations, entry, _frames(tables))


def _instruction(line: str) -> Instruction:
    start = _INSTRUCTION.match(line)
    at = start.end()
    type_end = _closing(line, at) + 1 if line[at] == "(" else line.index(" ", at)
    opening = line.index("(", type_end)
    closing = _closing(line, opening)
    literal = line[opening + 1 : closing]
    return Instruction(
        name=start[2],
        opcode=line[type_end:opening].strip(),
        result=_arrays(line[at:type_end]),
        operands=tuple(re.findall(r"%([\w.\-]+)", literal)),
        literal=literal,
        attributes=line[closing + 1 :],
        is_root=bool(start[1]),
    )


def _closing(text: str, opening: int) -> int:
    """Index of the parenthesis that closes the one at `opening`."""
    depth = 0
    for match in _PARENTHESIS.finditer(text, opening):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    raise HloError(f"a parenthesis is not closed in {text[:100]!r}")


def _arrays(text: str) -> tuple[Array, ...]:
    arrays = []
    for dtype, dims, layout in _ARRAY.findall(text):
        if dtype not in ITEM_BITS:
            raise HloError(f"unknown element type {dtype!r}: add it to ITEM_BITS in hlo.py")
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(size.removeprefix("<=")) for size in dims.split(",") if size)
        arrays.append(Array(dtype, sizes, int(space[1]) if space else HBM))
    return tuple(arrays)


# ---- Source lines -------------------------------------------------------------------------------


def _frames(tables: dict[str, dict[int, str]]) -> dict[int, Frame]:
    def field(row, name):
        return int(re.search(rf"\b{name}=(\d+)", row)[1])

    frames = {}
    for number, row in tables["StackFrames"].items():
        location = tables["FileLocations"][field(row, "file_location_id")]
        file = tables["FileNames"][field(location, "file_name_id")].strip('"')
        # The table counts callers from 1, and 1 means none.
        caller = field(row, "parent_frame_id") - 1
        frames[number] = Frame(file, field(location, "line"), caller or None)
    return frames


def source_line(module: Module, instruction: Instruction, package: str = "MaxNano") -> str:
    """`file.py:line` of the innermost frame in a folder `package`, else outside libraries, else of
    all; or ''.
    """
    match = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
    number = int(match[1]) if match else None
    chain = []
    while number in module.frames:
        chain.append(module.frames[number])
        number = module.frames[number].parent
    if not chain:
        return ""
    ours = (frame for frame in chain if f"/{package}/" in frame.file)
    others = (frame for frame in chain if "/site-packages/" not in frame.file)
    frame = next(itertools.chain(ours, others, chain))
    return f"{frame.file.rpartition('/')[2]}:{frame.line}"


# ---- Loops --------------------------------------------------------------------------------------


def trip_count(module: Module, loop: Instruction) -> int:
    """Trip count of a `while`: the compiler's note, else the constant with which its condition
    compares the counter.

    Raises HloError if both are missing, because a loop counted once would make a step look many
    times faster.
    """
    known = re.search(r'"?known_trip_count"?[:=]\s*\{"?n"?[:=]\s*"?(\d+)', loop.attributes)
    if known:
        return int(known[1])
    condition = module.called(loop, "condition")
    inside = [part for i in condition.instructions.values() for part in module.body(i)]
    limits = [
        int(i.literal) for i in inside if i.opcode == "constant" and re.fullmatch(r"\d+", i.literal)
    ]
    compares = [i.attribute("direction") for i in inside if i.opcode == "compare"]
    if len(limits) != 1 or compares not in (["LT"], ["LE"], ["GT"]):
        raise HloError(
            f"the trip count of the loop {loop.name} ({loop.op_name or 'of unknown origin'}) is not in the program: "
            f"neither known_trip_count nor a counter below one constant in {condition.name}; "
            "give the loop a fixed number of trips"
        )
    return limits[0] + (compares == ["LE"])


def branches(conditional: Instruction) -> list[str]:
    """Names of the computations among which a `conditional` chooses."""
    named = re.search(r"branch_computations=\{([^}]*)\}", conditional.attributes)
    if named:
        return re.findall(r"[\w.\-]+", named[1])
    return [conditional.attribute(f"{truth}_computation") for truth in ("true", "false")]


# ---- FLOPs --------------------------------------------------------------------------------------


def matmul_flops(module: Module, computation: Computation) -> int:
    """FLOPs of the dot and convolution instructions of a computation and its fusions, without its
    loops.
    """
    instructions = computation.instructions.values()
    return sum(flops for i in instructions for flops, _ in products(module, computation, i))


def products(
    module: Module, computation: Computation, instruction: Instruction
) -> Iterator[tuple[int, str]]:
    """(FLOPs, dtype of the left operand) of each dot and convolution of an instruction, which may
    be a fusion.
    """
    if instruction.opcode == "dot":
        lhs = computation.operands(instruction)[0]
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)[1]
        depth = math.prod(lhs.dims[int(axis)] for axis in contracted.split(",") if axis)
        yield 2 * instruction.result[0].elements * depth, lhs.dtype
    elif instruction.opcode == "convolution":
        operands = computation.operands(instruction)
        yield _convolution_flops(instruction, *operands), operands[0].dtype
    elif instruction.opcode == "fusion":
        called = module.called(instruction)
        for inner in called.instructions.values():
            yield from products(module, called, inner)


def _convolution_flops(instruction: Instruction, lhs: Array, rhs: Array) -> int:
    """Two FLOPs per product of two elements; products with padding or dilation holes do not count.

    The compiler writes matrix products as convolutions, some with windows that extend far into the
    padding.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes).groups()
    dims = (lhs.dims, rhs.dims, instruction.result[0].dims)
    size, kernel, output = (
        dict(zip(*pair, strict=True)) for pair in zip(labels, dims, strict=True)
    )
    axes = sorted(label for label in output if label.isdigit())
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(item.split("=") for item in window[1].split()) if window else {}

    def of_axes(name, default):
        return fields[name].split("x") if name in fields else [default] * len(axes)

    steps, pads = of_axes("stride", "1"), of_axes("pad", "0_0")
    holes, kernel_holes = of_axes("lhs_dilate", "1"), of_axes("rhs_dilate", "1")
    products = 1
    for axis, step, pad, hole, kernel_hole in zip(
        axes, steps, pads, holes, kernel_holes, strict=True
    ):
        reach = (size[axis] - 1) * int(hole) + 1
        first = -int(pad.split("_")[0])
        products *= sum(
            0 <= (at := first + o * int(step) + k * int(kernel_hole)) < reach
            and at % int(hole) == 0
            for o, k in itertools.product(range(output[axis]), range(kernel[axis]))
        )
    batch = size["b"] // int(instruction.attribute("batch_group_count") or 1)
    return 2 * batch * kernel["o"] * kernel["i"] * products


# ---- Collectives --------------------------------------------------------------------------------


MESH_GROUPS = (
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[(?P<shape>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?\))?"
    r" \{(?P<along>[^}]*)\}"
)


def replica_groups(instruction: Instruction) -> list[list[int]]:
    """The groups of partitions of a collective; for a permute, the cycle of its first partition.

    Raises HloError for an unknown notation.
    """
    text = instruction.attributes
    if match := re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", text):
        return [
            [int(n) for n in group.split(",") if n]
            for group in re.findall(r"\{([\d,]*)\}", match[1])
        ]
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, base = (_ints(match[i]) for i in (1, 2))
        order = _ints(match[3]) if match[3] else list(range(len(base)))
        ids = _transposed(base, order)
        return [ids[i : i + shape[-1]] for i in range(0, len(ids), shape[-1])]
    if match := re.search(MESH_GROUPS, text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        along = re.findall(r"'(\w+)'", match["along"])
        if all(axis in sizes for axis in along) and ":" not in match["along"]:
            names = list(sizes)
            order = [names.index(n) for n in names if n not in along] + [
                names.index(n) for n in along
            ]
            ids, count = (
                _transposed(list(sizes.values()), order),
                math.prod(sizes[axis] for axis in along),
            )
            if match["shape"]:  # the mesh permutes the partitions
                shape = _ints(match["shape"])
                permuted = _transposed(
                    shape, _ints(match["order"]) if match["order"] else list(range(len(shape)))
                )
                ids = [permuted[i] for i in ids]
            return [ids[i : i + count] for i in range(0, len(ids), count)]
    if match := re.search(r"source_target_pairs=\{(\{[\d,{} ]*\})\}", text):
        target = {int(a): int(b) for a, b in re.findall(r"\{(\d+),(\d+)\}", match[1])}
        cycle = [next(iter(target))]
        while (following := target.get(cycle[-1])) is not None and following not in cycle:
            cycle.append(following)
        return [cycle]
    raise HloError(
        f"the groups of the collective {instruction.name} have a notation that hlo.py does not know"
    )


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _transposed(shape: list[int], order: list[int]) -> list[int]:
    """np.arange(n).reshape(shape).transpose(order).ravel() as a list."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    ranges = [range(0, shape[axis] * strides[axis], strides[axis]) for axis in order]
    return [sum(offsets) for offsets in itertools.product(*ranges)]


def source_of(module: Module, instruction: Instruction, body: Sequence[Instruction]) -> str:
    """The source line of an instruction, or of the last instruction of its fused body that has one;
    "" if none has.
    """
    lines = (source_line(module, i) for i in (instruction, *reversed(body)))
    return next(filter(None, lines), "")

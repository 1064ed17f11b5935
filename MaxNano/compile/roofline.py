"""Estimates the time of a compiled GPU program by the roofline of each kernel, without running it.

A kernel gets the larger of two times: of its matrix products at the peak FLOP/s, and of its bytes
at the memory bandwidth. The sum compares programs; it is not a clock.
"""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from jax.sharding import Mesh

from MaxNano.compile import hlo
from MaxNano.compile.collectives import RING_LINKS
from MaxNano.compile.costs import MOVES, Walk, Walker
from MaxNano.compile.profile import origin
from MaxNano.distributed import gpus, hardware

ASSUMPTIONS = (
    "a roofline: the larger of FLOPs of matrix products at the chip's peak and bytes at its memory bandwidth, for each "
    "kernel; kernels reach less than either",
    "each kernel reads and writes its arrays once in the GPU's memory: the L2 cache keeps nothing between kernels, so "
    "that loops over small arrays look slower than they are",
    "FLOPs of float32 products at half, of 8-bit products at twice the peak of bfloat16; all others cost nothing",
    "cuDNN's attention: FLOPs of the scores that mask and window leave, 2 products forward and 5 backward",
    "starting a kernel costs nothing: a step of many short kernels takes longer",
    "compiled without a GPU there is no autotuning: on the GPU XLA chooses between Triton and cuBLAS by measuring",
    "collectives: a ring over NVLink; only what no kernel between start and end hides counts",
)

KINDS = (
    "cuDNN",
    "cuBLAS GEMM",
    "Triton GEMM",
    "fusion",
    "reduction",
    "gather/scatter",
    "copy",
    "collective",
    "other",
)

# The peak of a product by the bits of its operands, relative to bfloat16's.
_RATES = {8: 2.0, 16: 1.0, 32: 0.5, 64: 1 / 16}
_FMHA_PRODUCTS = {"__cudnn$fmhaSoftmax": 2, "__cudnn$fmhaSoftmaxBackward": 5}
_SLICES = frozenset(("slice", "dynamic-slice", "gather"))


class Kernel(NamedTuple):
    """A kernel that runs `count` times per step; FLOPs, bytes and seconds are of each time."""

    name: str
    kind: str  # one of KINDS
    cycles: float  # seconds: the clock of the walk is 1 Hz
    count: int
    flops: float  # of matrix products
    bytes: int  # read and written
    shape: str
    source: str
    scope: str

    @property
    def total(self) -> float:
        """Seconds per step."""
        return self.cycles * self.count


def walk(module: hlo.Module, chip: hardware.Chip, *, mesh: Mesh | None = None) -> Walk:
    """The kernels of a program as operations, with seconds instead of cycles; FLOPs of attention as
    those of Pallas calls.

    Raises hlo.HloError if the trip count of a loop cannot be read.
    """
    gpu = gpus.gpu_of(mesh.devices.flat[0].device_kind) if mesh else None
    # A program of one GPU has no collectives.
    links = (gpu and gpu.link_bandwidth) or math.inf
    chip = chip._replace(clock_hz=1.0, ici_link_bandwidth=links / RING_LINKS)
    return GpuWalker(module, chip, mesh).walk(module.entry)


class GpuWalker(Walker):
    """Costs the kernels of a GPU program."""

    def operation(
        self, computation: hlo.Computation, instruction: hlo.Instruction
    ) -> tuple[Kernel, float]:
        """The kernel, and its FLOPs if it is attention."""
        target = instruction.attribute("custom_call_target") or ""
        attention = fmha_flops(computation, instruction) if target in _FMHA_PRODUCTS else 0.0
        if target.startswith("__cublas"):
            products = [cublas_product(computation, instruction)]
        else:
            products = list(hlo.products(self.module, computation, instruction))
        if attention:
            products = [(attention, computation.operands(instruction)[0].dtype)]
        size = traffic(self.module, computation, instruction)
        by_flops = sum(
            flops / (_RATES[hlo.ITEM_BITS[dtype]] * self.chip.peak_flops)
            for flops, dtype in products
        )
        scope, source = origin(self.module, instruction)
        kernel = Kernel(
            instruction.name,
            kind_of(instruction, self.module.body(instruction)),
            max(by_flops, self.cycles(size, self.chip.memory_bandwidth)),
            1,
            sum(flops for flops, _ in products),
            size,
            " ".join(f"{a.dtype}[{','.join(map(str, a.dims))}]" for a in instruction.result[:2]),
            source,
            scope,
        )
        return kernel, attention


def kind_of(instruction: hlo.Instruction, body: Sequence[hlo.Instruction]) -> str:
    """The kind of a kernel, one of KINDS; body: the instructions that it runs."""
    target = instruction.attribute("custom_call_target") or ""
    backend = re.search(r'"fusion_backend_config":\{"kind":"([^"]*)"', instruction.attributes)
    opcodes = {i.opcode for i in body if any(a.dims for a in i.result)}
    if "__cudnn" in target or (backend and "__cudnn" in backend[1]):
        return "cuDNN"
    if "__cublas" in target:
        return "cuBLAS GEMM"
    if opcodes & {"dot", "convolution"}:
        return "Triton GEMM"
    if opcodes & {"gather", "scatter"}:
        return "gather/scatter"
    if instruction.opcode in ("custom-call", "sort"):
        return "other"
    if opcodes & {"reduce", "reduce-window"}:
        return "reduction"
    return "copy" if opcodes <= MOVES else "fusion"


# ---- FLOPs --------------------------------------------------------------------------------------


def fmha_flops(computation: hlo.Computation, instruction: hlo.Instruction) -> float:
    """FLOPs of cuDNN's fused attention, for the scores that causality and the window leave."""
    text = instruction.attributes
    dims = re.search(r'"intermediate_tensor_shape".*?"dimensions": ?\[([^\]]*)\]', text, re.S)
    batch, heads, queries, keys = (int(n) for n in re.findall(r"\d+", dims[1]))
    head_dim = computation.operands(instruction)[0].elements // (batch * heads * queries)
    window = re.search(r'"sliding_window_length": ?"?(\d+)', text)
    seen = (window and int(window[1])) or keys
    causal = "CAUSAL" in text
    scores = sum(min(t + 1 if causal else keys, seen) for t in range(queries))
    products = _FMHA_PRODUCTS[instruction.attribute("custom_call_target")]
    return 2.0 * products * batch * heads * scores * head_dim


def cublas_product(computation: hlo.Computation, instruction: hlo.Instruction) -> tuple[float, str]:
    """(FLOPs, operand dtype) of a matrix product that cuBLAS computes."""
    lhs = computation.operands(instruction)[0]
    axes = re.search(r'"lhs_contracting_dimensions": ?\[([^\]]*)\]', instruction.attributes)
    depth = math.prod(lhs.dims[int(axis)] for axis in re.findall(r"\d+", axes[1]))
    return 2.0 * instruction.result[0].elements * depth, lhs.dtype


# ---- Bytes --------------------------------------------------------------------------------------


def traffic(module: hlo.Module, computation: hlo.Computation, instruction: hlo.Instruction) -> int:
    """Bytes that a kernel reads and writes: of an array that it slices, only the slices, and of one
    that it updates in place, only the update.
    """
    body = module.called(instruction) if instruction.opcode == "fusion" else None
    if body is None:
        # An instruction alone is the root of a body whose parameters are its operands.
        names = {name: computation.instructions[name] for name in instruction.operands}
        body = hlo.Computation("", {**names, instruction.name: instruction._replace(is_root=True)})
        parameters = set(names)
    else:
        parameters = {i.name for i in body.instructions.values() if i.opcode == "parameter"}
    reader = _Reader(body, parameters)
    root = next(i for i in body.instructions.values() if i.is_root)
    return sum(map(reader.bytes, parameters)) + _written_bytes(body, root)


class _Reader:
    """Counts what a kernel reads of its parameters: it computes only elements that it needs."""

    def __init__(self, body: hlo.Computation, parameters: set[str]):
        self.body = body
        self.users = defaultdict(list)
        for user in body.instructions.values():
            if user.name not in parameters:
                for name in dict.fromkeys(user.operands):
                    self.users[name].append(user)
        self.needed: dict[str, int] = {}

    def bytes(self, name: str) -> int:
        """Bytes that are read of the array `name`."""
        arrays = self.body.instructions[name].result
        whole = sum(array.bytes for array in arrays)
        elements = sum(array.elements for array in arrays)
        return whole * self.elements(name) // elements if elements else 0

    def elements(self, name: str) -> int:
        """Elements of the array `name` that are needed."""
        if name not in self.needed:
            instruction = self.body.instructions[name]
            whole = sum(array.elements for array in instruction.result)
            parts = [self._used(instruction, user, whole) for user in self.users[name]]
            self.needed[name] = min(whole, sum(parts)) if not instruction.is_root else whole
        return self.needed[name]

    def _used(self, instruction: hlo.Instruction, user: hlo.Instruction, whole: int) -> int:
        is_first = user.operands[0] == instruction.name
        if is_first and user.opcode in ("dynamic-update-slice", "scatter"):
            return 0
        is_sliced = is_first and user.opcode in _SLICES
        is_elementwise = sum(a.elements for a in user.result) == whole and user.opcode != "dot"
        return self.elements(user.name) if is_sliced or is_elementwise else whole


def _written_bytes(body: hlo.Computation, root: hlo.Instruction) -> int:
    """Bytes that a body writes for its root; a scatter also reads what it adds to."""
    parts = body.instructions
    if root.opcode in ("tuple", "bitcast"):
        return sum(_written_bytes(body, parts[name]) for name in root.operands if name in parts)
    if root.opcode == "dynamic-update-slice" and root.operands[1] in parts:
        return parts[root.operands[1]].result[0].bytes
    if root.opcode == "scatter" and root.operands[-1] in parts:
        return 2 * parts[root.operands[-1]].result[0].bytes
    return sum(array.bytes for array in root.result)

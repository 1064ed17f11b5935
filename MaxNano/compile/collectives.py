"""The collectives of a compiled TPU program: their bytes, groups, networks and cycles."""

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from MaxNano.compile import hlo
from MaxNano.distributed import hardware

# Collectives over the chips of a slice run as a bidirectional ring: each chip sends on two links.
RING_LINKS = 2

COLLECTIVES = frozenset(
    "all-gather all-reduce reduce-scatter all-to-all ragged-all-to-all collective-permute collective-broadcast".split()
)


class Collective(NamedTuple):
    """A collective that runs `count` times per step and moves an array of `bytes`, its larger side.

    exposed_cycles: the part of its cycles that no operation between its start and its end hides.
    """

    kind: str
    bytes: int
    count: int
    group_size: int
    axes: tuple[str, ...]  # mesh axes; empty if no mesh is given
    network: str  # ici, or dcn between slices
    overlapped: bool  # whether start and end are separate instructions
    cycles: float
    exposed_cycles: float
    source: str


class CollectiveReader:
    """Reads the collectives of one program; costs are for `chip`."""

    def __init__(self, module: hlo.Module, chip: hardware.Chip, mesh: Mesh | None):
        self._module, self._chip, self._mesh = module, chip, mesh

    def read(self, computation: hlo.Computation, instruction: hlo.Instruction) -> Collective | None:
        """The collective that an instruction runs or starts, wholly exposed; None for another
        instruction.
        """
        if instruction.opcode == "recv" and "xla_megascale_runtime" in instruction.attributes:
            return self._between_slices(instruction)
        body = self._module.body(instruction)
        if any(i.opcode in ("convolution", "dot") for i in body):
            return None  # a matrix product that overlaps with a collective which started before
        inner = next((i for i in body if i.opcode.removesuffix("-start") in COLLECTIVES), None)
        if inner is None or is_end(instruction, body):
            return None
        kind = inner.opcode.removesuffix("-start")
        if kind == "all-reduce" and any(i.opcode == "dynamic-slice" for i in body):
            kind = "reduce-scatter"  # each chip keeps its shard of the sum
        group = hlo.replica_groups(inner)[0] or list(range(self._mesh.size if self._mesh else 1))
        overlapped = is_start(instruction, body)
        if instruction.opcode == "call-start":  # a later call-update may pass the operands
            share = len(group) if inner.opcode == "reduce-scatter" else 1
            size = share * sum(array.bytes for array in inner.result)
        else:
            read = sum(array.bytes for array in computation.operands(instruction))
            written = sum(array.bytes for array in instruction.result)
            # Other starts also return their operands.
            size = max(read, written - read if overlapped else written)
        if len(group) == 1 and self._mesh and self._mesh.size > 1:
            return None  # over an axis of size 1, which a fast compilation leaves in the program
        axes, network = _axes_of(group, self._mesh)
        links = 1 if kind == "collective-permute" else RING_LINKS
        ici, dcn = self._chip.ici_link_bandwidth * links, self._chip.dcn_bandwidth
        cycles = self._cycles(
            _sent_share(kind, len(group)) * size, dcn if network == "dcn" else ici
        )
        source = hlo.source_of(self._module, instruction, body)
        return Collective(
            kind, size, 1, len(group), axes, network, overlapped, cycles, cycles, source
        )

    def _between_slices(self, instruction: hlo.Instruction) -> Collective:
        """A collective between slices, which the host runs: its receiving half stands for both
        halves.
        """
        kind = instruction.attribute("_xla_megascale_transfer_type").lower().replace("_", "-")
        slices = re.search(r'_xla_megascale_target="\{([\d,:]+)\}', instruction.attributes)
        count = sum(_span(part) for part in slices[1].split(",")) if slices else 2
        size = instruction.result[0].bytes
        cycles = self._cycles(_sent_share(kind, count) * size, self._chip.dcn_bandwidth)
        axes = _slice_axes(self._mesh)
        source = hlo.source_of(self._module, instruction, [])
        return Collective(kind, size, 1, count, axes, "dcn", True, cycles, cycles, source)

    def _cycles(self, size: float, bandwidth: float) -> float:
        return size / bandwidth * self._chip.clock_hz


def is_start(instruction: hlo.Instruction, body: Sequence[hlo.Instruction]) -> bool:
    """Whether an instruction starts a collective or a copy that another one ends."""
    starts = instruction.opcode == "recv" or instruction.opcode.endswith("-start")
    return starts or any(i.attribute("custom_call_target") == "AsyncCollectiveStart" for i in body)


def is_end(instruction: hlo.Instruction, body: Sequence[hlo.Instruction]) -> bool:
    """Whether an instruction ends what another one started."""
    ends = instruction.opcode.endswith("-done")
    return ends or any(i.attribute("custom_call_target") == "AsyncCollectiveDone" for i in body)


def is_update(instruction: hlo.Instruction) -> bool:
    """Whether an instruction only passes the handle of what another one started, such as
    call-update.
    """
    return instruction.opcode.endswith("-update")


def is_step(body: Sequence[hlo.Instruction]) -> bool:
    """Whether a fusion advances a collective that started before."""
    return len(body) > 1 and any(i.opcode in COLLECTIVES for i in body)


def _sent_share(kind: str, count: int) -> float:
    """The share of its array that a chip sends in a collective among `count` chips."""
    if kind in ("collective-permute", "collective-broadcast", "one-to-one"):
        return 1.0
    return (2 if kind == "all-reduce" else 1) * (count - 1) / count


def _span(text: str) -> int:
    """Number of slices in `3`, or in `0:3`, which includes 3."""
    first, _, last = text.partition(":")
    return int(last or first) - int(first) + 1


# ---- Mesh axes ----------------------------------------------------------------------------------


def _axes_of(group: Sequence[int], mesh: Mesh | None) -> tuple[tuple[str, ...], str]:
    """The mesh axes that a group spans, and the network between its chips."""
    if mesh is None:
        return (), "ici"
    devices = mesh.devices.ravel()
    indices = [_mesh_index(member, mesh) for member in group]
    along = [len(set(row)) > 1 for row in zip(*indices, strict=True)]
    axes = tuple(itertools.compress(mesh.axis_names, along))
    return axes, "dcn" if len({_slice_of(devices[member]) for member in group}) > 1 else "ici"


def _slice_of(device: jax.Device) -> int:
    return getattr(device, "slice_index", None) or 0


def _mesh_index(member: int, mesh: Mesh) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(member, mesh.devices.shape))


def _slice_axes(mesh: Mesh | None) -> tuple[str, ...]:
    """The mesh axes along which the slice changes."""
    if mesh is None:
        return ()
    lines = (
        np.moveaxis(mesh.devices, axis, 0).reshape(size, -1)[:, 0]
        for axis, size in enumerate(mesh.devices.shape)
    )
    along = (len({_slice_of(device) for device in line}) > 1 for line in lines)
    return tuple(itertools.compress(mesh.axis_names, along))

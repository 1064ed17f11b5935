"""Sharding rules: logical axis names of arrays -> axes of the device mesh.

Each array names its axes where it is declared, such as ("vocab", "embed"); `logical_axis_rules` in
base.yml says which mesh axes shard which logical axis. Another layout needs no change in Python.

Over FSDP_AXIS parameters stay sharded during a step, and each layer gathers its own. Over the other
data-parallel axes, or if FSDP_AXIS shards the stack of layers, a step gathers them once (ZeRO).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

Axes = tuple[str | None, ...]
Rules = Sequence[Sequence[str]]

BATCH_AXES: Axes = ("activation_batch", "activation_length")
FSDP_AXIS = "fsdp"
LARGEST_SHARE = 8  # layers of one owner, where others compute the same


def partition_spec(axes: Axes, rules: Rules, mesh_axes: Sequence[str]) -> PartitionSpec:
    """The PartitionSpec of logical axes. A mesh axis goes to the first dimension that asks for it."""
    table = {rule[0]: rule[1:] for rule in rules}
    used: set[str] = set()
    parts = []
    for axis in axes:
        names = [name for name in table.get(axis, ()) if name in mesh_axes and name not in used]
        used.update(names)
        parts.append(_part(names))
    return PartitionSpec(*parts)


def named_sharding(
    mesh: Mesh,
    shape: Sequence[int],
    axes: Axes,
    rules: Rules,
    mesh_axes: Sequence[str] | None = None,
) -> NamedSharding:
    """Sharding of an array of `shape` by those mesh axes of each rule that divide its size.

    mesh_axes: the mesh axes to use, all if None. A dimension takes the first axes of its rule that
    together divide it; later dimensions can take the axes that are left.
    """
    table = {rule[0]: rule[1:] for rule in rules}
    left = list(mesh.axis_names if mesh_axes is None else mesh_axes)
    parts = []
    for size, axis in zip(shape, axes, strict=True):
        names: tuple[str, ...] = ()
        for name in table.get(axis, ()):
            if name in left and mesh.shape[name] > 1 and size % _size(mesh, (*names, name)) == 0:
                names = (*names, name)
        left = [name for name in left if name not in names]
        parts.append(_part(names))
    return NamedSharding(mesh, PartitionSpec(*parts))


def batch_sharding(mesh: Mesh, rules: Rules) -> NamedSharding:
    """Sharding of a batch array (batch, length)."""
    return NamedSharding(mesh, partition_spec(BATCH_AXES, rules, mesh.axis_names))


def batch_axes(mesh: Mesh, rules: Rules) -> tuple[str, ...]:
    """The data-parallel mesh axes: those that shard the batch."""
    return axes_of(partition_spec(BATCH_AXES, rules, mesh.axis_names)[0])


def data_parallel_size(mesh: Mesh, rules: Rules) -> int:
    """Number of shards of the batch."""
    return _size(mesh, batch_axes(mesh, rules))


def gathers_by_layer(rules: Rules) -> bool:
    """Whether parameters stay sharded over FSDP_AXIS until their layer runs.

    An axis that shards the stack of layers has whole layers on each device, and is gathered once
    per step.
    """
    return not any(FSDP_AXIS in axes for name, *axes in rules if name == "layers")


def constrain(x: jax.Array, axes: Axes, rules: Rules) -> jax.Array:
    """Constrains the sharding of `x` on the mesh axes that the compiler manages."""
    mesh, managed = _managed()
    if not managed:
        return x
    sharding = named_sharding(mesh, x.shape, axes, rules, managed)
    return jax.lax.with_sharding_constraint(x, sharding.spec)


def over_owners(
    function: Callable[[jax.Array], jax.Array], x: jax.Array, rules: Rules
) -> jax.Array | None:
    """`function` of each device's part of a stack of matrices (layers, ...), in a program that the
    compiler manages: by `owners`, else by the rule of `layers`. None if they do not divide it.
    """
    mesh, managed = _managed()
    if not managed:
        return function(x)
    spec = owners(rules, len(x))
    if spec is None:
        axes = ("layers", *(None,) * (x.ndim - 1))
        spec = named_sharding(mesh, x.shape, axes, rules, managed).spec
    if len(x) % _size(mesh, axes_of(spec[0] if spec else None)):
        return None
    local = jax.shard_map(
        function, in_specs=spec, out_specs=spec, axis_names=set(mesh.axis_names), check_vma=False
    )
    return local(x)


def owners(rules: Rules, layers: int) -> PartitionSpec | None:
    """With FSDP on mesh axes that the compiler manages: how a stack of `layers` matrices (layers,
    ...) is sharded if each is whole on one device or more. None without FSDP.

    Over all axes that shard layers or `embed`, whether or not they divide the layers. If that would
    be more owners than layers, XLA sends whole stacks back from them: then over the axes with the
    most devices that are not more, if none owns more than LARGEST_SHARE layers, and the devices
    along the others compute the same.
    """
    mesh, managed = _managed()
    if FSDP_AXIS not in managed or not gathers_by_layer(rules):
        return None
    table = {rule[0]: rule[1:] for rule in rules}
    named = dict.fromkeys((*table.get("layers", ()), *table.get("embed", ())))
    axes = tuple(axis for axis in named if axis in managed)

    def devices(chosen: Sequence[str]) -> int:
        return math.prod(mesh.shape[axis] for axis in chosen)

    subsets = (c for n in range(len(axes) + 1) for c in itertools.combinations(axes, n))
    most = max((c for c in subsets if devices(c) <= layers), key=devices)
    return PartitionSpec(_part(most if layers <= LARGEST_SHARE * devices(most) else axes))


def _managed() -> tuple[AbstractMesh, list[str]]:
    """The mesh in use, and its axes that the compiler manages."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return mesh, [n for n, kind in kinds if kind == AxisType.Auto and mesh.shape[n] > 1]


# ---- Inside shard_map: gather sharded parameters, reduce-scatter their gradients ----------------


def manual_spec(spec: PartitionSpec, axes: Sequence[str]) -> PartitionSpec:
    """The part of a PartitionSpec that uses `axes`."""
    return PartitionSpec(*(tuple(n for n in axes_of(part) if n in axes) or None for part in spec))


def split_spec(spec: PartitionSpec, axis: str | None) -> tuple[PartitionSpec, PartitionSpec]:
    """`spec` as what to gather first and what to gather last: `axis`, and axes before it in its
    dimension, since the innermost axes of a dimension are gathered first.
    """
    first, last = [], []
    for names in map(axes_of, spec):
        count = names.index(axis) + 1 if axis in names else 0
        first.append(names[count:] or None)
        last.append(names[:count] or None)
    return PartitionSpec(*first), PartitionSpec(*last)


def gather(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Inside shard_map: the full array whose shards `spec` describes."""
    for dimension, part in enumerate(spec):
        if axes_of(part):
            x = jax.lax.all_gather(x, axes_of(part), axis=dimension, tiled=True)
    return x


def reduce(x: jax.Array, spec: PartitionSpec, axes: Sequence[str]) -> jax.Array:
    """Inside shard_map: the sum of `x` over mesh `axes`; each device keeps its shard by `spec`."""
    left = list(axes)
    for dimension, part in enumerate(spec):
        if axes_of(part):
            x = jax.lax.psum_scatter(x, axes_of(part), scatter_dimension=dimension, tiled=True)
            left = [axis for axis in left if axis not in axes_of(part)]
    return sum_over(x, left)


def sum_over(tree, axes: Sequence[str]):
    """Inside shard_map: the sum of each array over mesh `axes`, without those of one device: XLA
    refuses a sum over them alone if the compiler manages the other axes.
    """
    axes = tuple(axis for axis in axes if jax.lax.axis_size(axis) > 1)
    return jax.lax.psum(tree, axes) if axes else tree


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather_in_pass(x: jax.Array, spec: PartitionSpec, dtype: DTypeLike) -> jax.Array:
    """Inside shard_map: the full array in `dtype`, gathered in the forward or the backward pass.

    Its gradient is summed over the devices in x's dtype, and each keeps its shard.
    """
    return gather(x.astype(dtype), spec)


def _gather_forward(x, spec, dtype):
    # The backward pass needs only x's dtype; an empty slice carries it.
    return gather_in_pass(x, spec, dtype), x[:0]


def _gather_backward(spec, dtype, like, cotangent):
    del dtype
    return (reduce(cotangent.astype(like.dtype), spec, ()),)


gather_in_pass.defvjp(_gather_forward, _gather_backward)


def number_of_shards(mesh: Mesh, spec: PartitionSpec) -> int:
    """Number of different shards of an array."""
    return math.prod(_size(mesh, part) for part in spec)


def replicated_share(tree) -> float:
    """Fraction of the bytes of a tree of abstract arrays that every device holds in full."""
    replicated = total = 0
    for leaf in jax.tree.leaves(tree):
        size = leaf.size * leaf.dtype.itemsize
        total += size
        replicated += size if leaf.sharding.is_fully_replicated else 0
    return replicated / max(total, 1)


def axes_of(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """One entry of a PartitionSpec as a tuple of mesh axes."""
    return (part,) if isinstance(part, str) else tuple(part or ())


def _part(names: Sequence[str]) -> str | tuple[str, ...] | None:
    """Mesh axes as one entry of a PartitionSpec."""
    return tuple(names) if len(names) > 1 else (names[0] if names else None)


def _size(mesh: Mesh, part: str | tuple[str, ...] | None) -> int:
    """Number of shards along mesh axes."""
    return math.prod(mesh.shape[name] for name in axes_of(part))

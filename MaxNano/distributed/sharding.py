"""Layout over devices: the mesh, and the rules that turn logical axis names into shardings.

Arrays name their axes where they are born (`("vocab", "embed")`); `logical_axis_rules` in base.yml says
which mesh axes cut which logical axis. Changing the layout therefore touches no Python.
"""

import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import FrozenConfigDict

Axes = tuple[str | None, ...]
Rules = Sequence[Sequence[str]]

BATCH_AXES: Axes = ("activation_batch", "activation_length")


def make_mesh(config: FrozenConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The device mesh with the axes `config.mesh_axes`, each ici_<axis>_parallelism x dcn_<axis>_parallelism long.

    The dcn part counts slices, which only a slow network joins, or processes where devices tell no slice; it is the
    outer one of its axis. Within a slice the order suits the links between the chips, and
    `ici_data_parallelism=null` takes the devices that the other axes leave of a slice.
    devices: all of this run if None; those of jax.experimental.topologies need no backend.
    Raises ValueError where the sizes do not fit the devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    axes = tuple(config.mesh_axes)
    dcn = tuple(config[f"dcn_{axis}_parallelism"] for axis in axes)
    slices, by = math.prod(dcn), "slice_index"
    found = {getattr(device, by, None) for device in devices}
    if len(found) == 1 and slices > 1:
        by = "process_index"
        found = {device.process_index for device in devices}
    # Hosts with GPUs may be one flat mesh; no TPU link leads from a slice to another.
    if len(found) != slices and (slices > 1 or devices[0].platform == "tpu"):
        kind = "slices" if by == "slice_index" else "processes"
        raise ValueError(
            f"the layout {_in_words('dcn_', axes, dcn)} does not fit {len(found)} {kind}: change the "
            "dcn_*_parallelism keys so that they multiply to that number"
        )
    ici = [config[f"ici_{axis}_parallelism"] for axis in axes]
    own = len(devices) // slices
    fixed = math.prod(size for size in ici if size)
    ici = tuple(size or own // fixed for size in ici)
    if math.prod(ici) * slices != len(devices):
        of_slice = f" of each of {slices} slices" if slices > 1 else ""
        raise ValueError(
            f"the layout {_in_words('', axes, ici)} does not fit {own} devices{of_slice}: "
            "change the ici_*_parallelism keys so that they multiply to that number"
        )
    if slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(
            ici,
            dcn,
            devices,
            process_is_granule=by == "process_index",
            allow_split_physical_axes=True,
        )
    else:
        grid = mesh_utils.create_device_mesh(ici, devices, allow_split_physical_axes=True)
    return Mesh(grid, axes, axis_types=(AxisType.Auto,) * len(axes))


def _in_words(prefix: str, axes: Sequence[str], sizes: Sequence[int]) -> str:
    return " x ".join(f"{prefix}{axis} {size}" for axis, size in zip(axes, sizes, strict=True))


def partition_spec(axes: Axes, rules: Rules, mesh_axes: Sequence[str]) -> PartitionSpec:
    """Logical axes -> PartitionSpec: the mesh axes of each rule, every mesh axis used once, the first taking it."""
    table = {rule[0]: rule[1:] for rule in rules}
    taken: set[str] = set()
    parts = []
    for axis in axes:
        wanted = [m for m in table.get(axis, ()) if m in mesh_axes and m not in taken]
        taken.update(wanted)
        parts.append(tuple(wanted) if len(wanted) > 1 else (wanted[0] if wanted else None))
    return PartitionSpec(*parts)


def named_sharding(
    mesh: Mesh,
    shape: Sequence[int],
    axes: Axes,
    rules: Rules,
    mesh_axes: Sequence[str] | None = None,
) -> NamedSharding:
    """Sharding of an array of `shape`, with the mesh axes (`mesh_axes`, or all) of each rule that divide it.

    An axis takes the first ones of its rule that divide it together; what it leaves, the next axis can take.
    """
    table = {rule[0]: rule[1:] for rule in rules}
    left = list(mesh.axis_names if mesh_axes is None else mesh_axes)
    parts = []
    for size, axis in zip(shape, axes, strict=True):
        names: tuple[str, ...] = ()
        for name in table.get(axis, ()):
            if name in left and mesh.shape[name] > 1 and size % _ways(mesh, (*names, name)) == 0:
                names = (*names, name)
        left = [name for name in left if name not in names]
        parts.append(names if len(names) > 1 else (names[0] if names else None))
    return NamedSharding(mesh, PartitionSpec(*parts))


def batch_sharding(mesh: Mesh, rules: Rules) -> NamedSharding:
    """Sharding of a batch array (rows, length)."""
    return NamedSharding(mesh, partition_spec(BATCH_AXES, rules, mesh.axis_names))


def batch_axes(mesh: Mesh, rules: Rules) -> tuple[str, ...]:
    """The mesh axes that cut the rows of a batch."""
    return _names(batch_sharding(mesh, rules).spec[0])


def batch_ways(mesh: Mesh, rules: Rules) -> int:
    """Number of parts into which the rows of a batch are cut."""
    return _ways(mesh, batch_axes(mesh, rules))


def constrain(x: jax.Array, axes: Axes, rules: Rules) -> jax.Array:
    """Tell the compiler how an array lies over those axes of the ambient mesh that it manages."""
    mesh = jax.sharding.get_abstract_mesh()
    managed = [
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Auto and mesh.shape[name] > 1
    ]
    if not managed:
        return x
    sharding = named_sharding(mesh, x.shape, axes, rules, managed)
    return jax.lax.with_sharding_constraint(x, sharding.spec)


# ---- Parameters: kept cut up, gathered for a step, their gradients added up and cut again ---------------------------


def manual_spec(spec: PartitionSpec, axes: Sequence[str]) -> PartitionSpec:
    """The part of a spec that speaks of `axes`."""
    return PartitionSpec(*(tuple(n for n in _names(part) if n in axes) or None for part in spec))


def gather(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Inside shard_map: the whole of an array that `spec` cuts."""
    for dimension, part in enumerate(spec):
        if _names(part):
            x = jax.lax.all_gather(x, _names(part), axis=dimension, tiled=True)
    return x


def reduce(x: jax.Array, spec: PartitionSpec, axes: Sequence[str]) -> jax.Array:
    """Inside shard_map: the sum of `x` over `axes`, of which each device keeps its part by `spec`."""
    left = list(axes)
    for dimension, part in enumerate(spec):
        if _names(part):
            x = jax.lax.psum_scatter(x, _names(part), scatter_dimension=dimension, tiled=True)
            left = [axis for axis in left if axis not in _names(part)]
    return jax.lax.psum(x, tuple(left)) if left else x


def replicated_share(tree) -> float:
    """Share of the bytes of a tree of abstract arrays that lies whole on every device."""
    whole = total = 0
    for leaf in jax.tree.leaves(tree):
        size = leaf.size * leaf.dtype.itemsize
        total += size
        whole += size if leaf.sharding.is_fully_replicated else 0
    return whole / max(total, 1)


def _names(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (part,) if isinstance(part, str) else tuple(part or ())


def _ways(mesh: Mesh, part: str | tuple[str, ...] | None) -> int:
    return math.prod(mesh.shape[name] for name in _names(part))

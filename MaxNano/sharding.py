"""Layout over devices: the mesh, and the rules that turn logical axis names into shardings.

Arrays name their axes where they are born (`("vocab", "embed")`); `logical_axis_rules` in base.yml says
which mesh axes cut which logical axis. Changing the layout therefore touches no Python.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import FrozenConfigDict

Axes = tuple[str | None, ...]
Rules = Sequence[Sequence[str]]

BATCH_AXES: Axes = ("activation_batch", "activation_length")


def make_mesh(config: FrozenConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The device mesh with the axes `config.mesh_axes`, sized by the `ici_*_parallelism` keys.

    `ici_data_parallelism=null` takes the devices that the other axes leave.
    Raises ValueError where the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {axis: config[f"ici_{axis}_parallelism"] for axis in config.mesh_axes}
    fixed = math.prod(size for size in sizes.values() if size)
    shape = tuple(size or len(devices) // fixed for size in sizes.values())
    if math.prod(shape) != len(devices):
        wanted = " x ".join(f"{axis} {size}" for axis, size in zip(sizes, shape, strict=True))
        raise ValueError(
            f"the layout {wanted} does not fit {len(devices)} devices: "
            "change the ici_*_parallelism keys so that they multiply to that number"
        )
    grid = np.asarray(devices).reshape(shape)
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(shape))


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


def named_sharding(mesh: Mesh, shape: Sequence[int], axes: Axes, rules: Rules) -> NamedSharding:
    """Sharding of an array of `shape`; of a rule's mesh axes, an axis takes the first ones that divide it."""

    def dividing(size, part):
        names = (part,) if isinstance(part, str) else part or ()
        while names and size % _ways(mesh, names):
            names = names[:-1]
        return names if len(names) > 1 else (names[0] if names else None)

    spec = partition_spec(axes, rules, mesh.axis_names)
    parts = (dividing(size, part) for size, part in zip(shape, spec, strict=True))
    return NamedSharding(mesh, PartitionSpec(*parts))


def batch_sharding(mesh: Mesh, rules: Rules) -> NamedSharding:
    """Sharding of a batch array (rows, length)."""
    return NamedSharding(mesh, partition_spec(BATCH_AXES, rules, mesh.axis_names))


def batch_ways(mesh: Mesh, rules: Rules) -> int:
    """Number of parts into which the rows of a batch are cut."""
    return _ways(mesh, batch_sharding(mesh, rules).spec[0])


def constrain(x: jax.Array, axes: Axes, rules: Rules) -> jax.Array:
    """Tell the compiler how an activation lies over the ambient mesh; without one, return it as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, rules, mesh.axis_names))


def _ways(mesh: Mesh, part: str | tuple[str, ...] | None) -> int:
    names = (part,) if isinstance(part, str) else part or ()
    return math.prod(mesh.shape[name] for name in names)

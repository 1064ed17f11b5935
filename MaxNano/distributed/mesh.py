"""The device mesh: which device takes which place along the axes of config.mesh_axes."""

import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh
from ml_collections import FrozenConfigDict

from MaxNano.distributed.sharding import FSDP_AXIS


def sizes_in_slice(config: FrozenConfigDict) -> tuple[int | None, ...]:
    """Size of each of config.mesh_axes within a slice; None: the devices that the others leave.

    `ici_fsdp_parallelism=null` is 1 until the memory plan chooses FSDP.
    """
    sizes = {axis: config[f"ici_{axis}_parallelism"] for axis in config.mesh_axes}
    return tuple(size or (1 if axis == FSDP_AXIS else None) for axis, size in sizes.items())


def make_mesh(config: FrozenConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh with axes config.mesh_axes of size ici_<axis>_parallelism x dcn_<axis>_parallelism.

    The dcn factor counts slices, or processes if the devices report no slice; it is the outer,
    slower part of its axis. Within a slice, devices are ordered for the chip-to-chip links.
    `ici_data_parallelism=null` takes the devices that the other axes leave.
    devices: all devices of the run if None; jax.experimental.topologies also works.
    Raises ValueError if the sizes do not fit the devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    axes = tuple(config.mesh_axes)
    dcn = tuple(config[f"dcn_{axis}_parallelism"] for axis in axes)
    num_slices = math.prod(dcn)
    by_process = _check_slices(devices, axes, dcn)

    ici = sizes_in_slice(config)
    devices_per_slice = len(devices) // num_slices
    fixed = math.prod(size for size in ici if size)
    ici = tuple(size or devices_per_slice // fixed for size in ici)
    if math.prod(ici) * num_slices != len(devices):
        each = f" of each of {num_slices} slices" if num_slices > 1 else ""
        raise ValueError(
            f"the layout {_format_sizes('', axes, ici)} does not fit {devices_per_slice} devices"
            f"{each}: change the ici_*_parallelism keys so that their product is that number"
        )
    if num_slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(
            ici, dcn, devices, process_is_granule=by_process, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh(ici, devices, allow_split_physical_axes=True)
    return Mesh(grid, axes, axis_types=(AxisType.Auto,) * len(axes))


def _check_slices(devices: Sequence[jax.Device], axes: Sequence[str], dcn: Sequence[int]) -> bool:
    """Whether processes count as slices. Raises ValueError if dcn does not fit their number."""
    num_slices = math.prod(dcn)
    by_process = False
    groups = {getattr(device, "slice_index", None) for device in devices}
    if len(groups) == 1 and num_slices > 1:
        by_process = True
        groups = {device.process_index for device in devices}
    # GPU hosts may form one flat mesh; TPU slices have no links between them.
    if len(groups) != num_slices and (num_slices > 1 or devices[0].platform == "tpu"):
        kind = "processes" if by_process else "slices"
        raise ValueError(
            f"the layout {_format_sizes('dcn_', axes, dcn)} does not fit {len(groups)} {kind}: "
            "change the dcn_*_parallelism keys so that their product is that number"
        )
    return by_process


def _format_sizes(prefix: str, axes: Sequence[str], sizes: Sequence[int]) -> str:
    return " x ".join(f"{prefix}{axis} {size}" for axis, size in zip(axes, sizes, strict=True))

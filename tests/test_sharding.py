"""The rules decide where arrays lie; a layout that the devices do not have is refused."""

from types import SimpleNamespace

import jax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from MaxNano import pyconfig
from MaxNano.distributed import mesh as mesh_module
from MaxNano.distributed import sharding
from MaxNano.distributed.mesh import make_mesh

RULES = (("layers", "fsdp"), ("heads", "tensor"), ("embed",), ("activation_batch", "data", "fsdp"))


def mesh_of(**sizes):
    return AbstractMesh(tuple(sizes.values()), tuple(sizes))


@pytest.mark.parametrize(
    "axes, expected",
    [
        (("layers", "embed", "heads"), ("fsdp", None, "tensor")),
        (("activation_batch", "activation_length"), (("data", "fsdp"), None)),
        (("layers", "layers"), ("fsdp", None)),  # a mesh axis cuts an array once
        ((None, "unknown"), (None, None)),
        ((), ()),
    ],
)
def test_rules_name_the_mesh_axes(axes, expected):
    spec = sharding.partition_spec(axes, RULES, ("data", "fsdp", "tensor"))
    assert spec == PartitionSpec(*expected)


def test_an_axis_takes_only_mesh_axes_that_divide_it():
    mesh = mesh_of(data=2, fsdp=4, tensor=3)
    rules = (("vocab", "data", "fsdp"), ("heads", "tensor"))

    def spec(*shape):
        return sharding.named_sharding(mesh, shape, ("vocab", "heads"), rules).spec

    assert spec(64, 6) == PartitionSpec(("data", "fsdp"), "tensor")
    assert spec(6, 6) == PartitionSpec("data", "tensor")
    assert spec(7, 4) == PartitionSpec(None, None)


@pytest.mark.parametrize(
    "spec, first, last",
    [
        ((None, ("fsdp", "data"), "data"), (None, ("data",), ("data",)), (None, ("fsdp",), None)),
        # Gathered first, the outer axis would leave rows in another order.
        ((("data", "fsdp"), None), (None, None), (("data", "fsdp"), None)),
        (("data", ("tensor", "fsdp", "data")), (("data",), ("data",)), (None, ("tensor", "fsdp"))),
        ((), (), ()),
    ],
)
def test_what_is_gathered_by_layer_are_outer_axes(spec, first, last):
    split = sharding.split_spec(PartitionSpec(*spec), "fsdp")
    assert split == (PartitionSpec(*first), PartitionSpec(*last))
    assert sharding.split_spec(PartitionSpec(*first), None)[0] == PartitionSpec(*first)


def test_the_rule_of_layers_chooses_the_kind_of_sharding():
    assert sharding.gathers_by_layer(pyconfig.initialize([str(pyconfig.BASE)]).logical_axis_rules)
    assert sharding.gathers_by_layer([("activation_batch", "data", "fsdp")])
    assert not sharding.gathers_by_layer(RULES)


@pytest.mark.parametrize(
    "data, fsdp, layers, axes",
    [
        (8, 8, 64, ("data", "fsdp")),
        (2, 16, 32, ("data", "fsdp")),
        (2, 8, 24, ("data", "fsdp")),  # 16 owners of 24 layers
        (8, 8, 32, "data"),  # they have whole layers already
        (32, 8, 48, "data"),
        (1, 16, 12, "fsdp"),  # otherwise each device would own twelve
        (64, 2, 24, ("data", "fsdp")),
        (8, 1, 24, None),
    ],
)
def test_owners_outnumber_the_layers_only_where_each_would_have_many(data, fsdp, layers, axes):
    rules = pyconfig.initialize([str(pyconfig.BASE)]).logical_axis_rules
    auto = (jax.sharding.AxisType.Auto,) * 3  # as make_mesh has them
    mesh = jax.sharding.AbstractMesh((data, fsdp, 1), ("data", "fsdp", "tensor"), axis_types=auto)
    with jax.sharding.use_abstract_mesh(mesh):
        expected = None if axes is None else PartitionSpec(axes)
        assert sharding.owners(rules, layers) == expected


def device(index, *, process=0, platform="cpu", **more):
    return SimpleNamespace(
        id=index, process_index=process, platform=platform, device_kind=platform, **more
    )


CPUS = [device(i) for i in range(8)]
PROCESSES = [device(i, process=i // 4) for i in range(8)]
SLICES = [device(i, process=i // 2, slice_index=i // 4) for i in range(8)]
TPU_SLICES = [device(i, process=i, platform="tpu", slice_index=i) for i in range(2)]


def grid_of(devices, *words):
    """Axis sizes and device numbers of the mesh that these words give."""
    config = pyconfig.initialize([str(pyconfig.BASE), *words])
    mesh = make_mesh(config, devices)
    return tuple(mesh.shape.values()), [d.id for d in mesh.devices.flat]


IN_ORDER = list(range(8))


@pytest.mark.parametrize(
    "devices, words, shape, order",
    [
        (CPUS[:1], [], (1, 1, 1), [0]),
        (CPUS, [], (8, 1, 1), IN_ORDER),  # FSDP is chosen later, by the memory plan
        (CPUS, ["ici_fsdp_parallelism=null", "ici_tensor_parallelism=4"], (2, 1, 4), IN_ORDER),
        (CPUS, ["ici_fsdp_parallelism=2", "ici_tensor_parallelism=2"], (2, 2, 2), IN_ORDER),
        (PROCESSES, [], (8, 1, 1), IN_ORDER),
        (PROCESSES, ["dcn_data_parallelism=2"], (8, 1, 1), IN_ORDER),
        (PROCESSES, ["dcn_data_parallelism=2", "ici_tensor_parallelism=4"], (2, 1, 4), IN_ORDER),
        (PROCESSES, ["dcn_fsdp_parallelism=2"], (4, 2, 1), [0, 4, 1, 5, 2, 6, 3, 7]),
        (PROCESSES[::-1], ["dcn_data_parallelism=2"], (8, 1, 1), [3, 2, 1, 0, 7, 6, 5, 4]),
        (SLICES, ["dcn_data_parallelism=2"], (8, 1, 1), IN_ORDER),
        (
            SLICES,
            ["dcn_data_parallelism=2", "ici_data_parallelism=2", "ici_fsdp_parallelism=2"],
            (4, 2, 1),
            IN_ORDER,
        ),
    ],
)
def test_a_mesh_has_slices_outside_and_their_devices_inside(
    monkeypatch, devices, words, shape, order
):
    monkeypatch.setattr(mesh_module, "Mesh", lambda grid, axes, axis_types: FakeMesh(grid, axes))
    assert grid_of(devices, *words) == (shape, order)


class FakeMesh:
    """jax's takes no stand-ins for devices."""

    def __init__(self, grid, axes):
        self.devices, self.shape = grid, dict(zip(axes, grid.shape, strict=True))


@pytest.mark.parametrize(
    "devices, words, problem",
    [
        (CPUS[:1], ["ici_data_parallelism=2"], "data 2 x fsdp 1 x tensor 1 does not fit 1 devices"),
        (CPUS[:1], ["ici_fsdp_parallelism=2"], "does not fit 1 devices"),
        (CPUS, ["ici_tensor_parallelism=3"], "data 2 x fsdp 1 x tensor 3 does not fit 8 devices"),
        (
            CPUS,
            ["dcn_data_parallelism=2"],
            "dcn_data 2 x dcn_fsdp 1 x dcn_tensor 1 does not fit 1 processes",
        ),
        (PROCESSES, ["dcn_data_parallelism=4"], "does not fit 2 processes: change the dcn_"),
        (SLICES, ["dcn_data_parallelism=4"], "does not fit 2 slices: change the dcn_"),
        (TPU_SLICES, [], "does not fit 2 slices: change the dcn_"),
        (
            PROCESSES,
            ["dcn_data_parallelism=2", "ici_fsdp_parallelism=8"],
            "does not fit 4 devices of each of 2 slices: change the ici_",
        ),
        (PROCESSES[1:], ["dcn_data_parallelism=2"], "does not fit"),
    ],
)
def test_a_layout_that_does_not_fit_the_devices_is_refused(devices, words, problem):
    with pytest.raises(ValueError, match=problem):
        grid_of(devices, *words)


def test_a_constraint_outside_a_mesh_does_nothing():
    x = jax.numpy.ones((2, 3))
    assert sharding.constrain(x, ("activation_batch", None), RULES) is x

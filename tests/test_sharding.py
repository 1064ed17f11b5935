"""The rules decide where arrays lie; a layout that the devices do not have is refused."""

import jax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from MaxNano import sharding

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


class Layout(dict):
    mesh_axes = ("data", "fsdp", "tensor")


def keys_of(data, fsdp, tensor):
    return Layout(ici_data_parallelism=data, ici_fsdp_parallelism=fsdp, ici_tensor_parallelism=tensor)


def test_null_takes_the_devices_that_are_left():
    mesh = sharding.make_mesh(keys_of(None, 1, 1), jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize("sizes", [(2, 1, 1), (None, 2, 1), (1, 1, 3)])
def test_a_layout_that_does_not_fit_the_devices_is_refused(sizes):
    with pytest.raises(ValueError, match="does not fit 1 devices"):
        sharding.make_mesh(keys_of(*sizes), jax.devices()[:1])


def test_a_constraint_outside_a_mesh_does_nothing():
    x = jax.numpy.ones((2, 3))
    assert sharding.constrain(x, ("activation_batch", None), RULES) is x

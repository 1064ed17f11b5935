"""A model before any array exists: config, mesh, numerics, architecture, shardings.

Training, inference and evaluation all start from a ModelSetup.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import FrozenConfigDict

from MaxNano.distributed import hardware, sharding
from MaxNano.distributed.mesh import make_mesh
from MaxNano.models import attention, embedding, losses, products, quantization, transformer
from MaxNano.models.transformer import Numerics, Transformer


@dataclass(frozen=True)
class Architecture:
    """The model without its arrays: graph, parameter shapes and logical axes, both as nested dicts."""

    graph: nnx.GraphDef
    shapes: dict[str, Any]
    axes: dict[str, Any] = field(repr=False)

    def bind(self, params: dict[str, Any]) -> Transformer:
        """The callable model around a tree of arrays."""
        return nnx.merge(self.graph, nnx.State(params))


def architecture(config: FrozenConfigDict, numerics: Numerics) -> Architecture:
    """The model's structure, without allocating any array."""
    model = nnx.eval_shape(lambda: Transformer(config, numerics, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    # PartitionSpec is a leaf to jax.tree, which a tuple of names is not.
    axes = jax.tree.map(
        lambda variable: PartitionSpec(*variable.get_metadata("logical_axes")),
        state,
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )
    return Architecture(graph, nnx.to_pure_dict(state), nnx.to_pure_dict(axes))


def numerics_of(config: FrozenConfigDict, mesh: Mesh) -> Numerics:
    """The dtypes and kernels for the devices of a mesh."""
    device = mesh.devices.flat[0]
    backend = device.platform
    dtype = hardware.compute_dtype(config, backend)
    return Numerics(
        dtype=dtype,
        embedding_dtype=hardware.embedding_dtype(config, backend),
        attention=attention.resolve(
            config.attention, device, dtype=dtype, head_dim=config.head_dim
        ),
        embedding_gradient=embedding.resolve(config.embedding_gradient, mesh),
        backend=backend,
        products=products.resolve(config, mesh, dtype),
    )


def abstract_params(config: FrozenConfigDict, model: Architecture, mesh: Mesh) -> dict[str, Any]:
    """The parameters as abstract arrays with shardings: the target of a restore."""

    def place(leaf, axes):
        placed = sharding.named_sharding(mesh, leaf.shape, tuple(axes), config.logical_axis_rules)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)

    return jax.tree.map(place, model.shapes, model.axes)


@dataclass(frozen=True)
class ModelSetup:
    """A model on a mesh, before any array exists. `params` are abstract arrays with shardings."""

    config: FrozenConfigDict
    mesh: Mesh
    numerics: Numerics
    model: Architecture
    params: dict[str, Any]

    @property
    def batch_axes(self) -> tuple[str, ...]:
        """The data-parallel mesh axes: along them every device computes its own part of the batch."""
        return sharding.batch_axes(self.mesh, self.config.logical_axis_rules)

    @property
    def data_parallel_size(self) -> int:
        """Number of parts into which the batch is split."""
        return sharding.data_parallel_size(self.mesh, self.config.logical_axis_rules)

    @property
    def batch_spec(self) -> PartitionSpec:
        """PartitionSpec of arrays whose first axis is the batch."""
        return PartitionSpec(self.batch_axes)

    @property
    def replicated(self) -> NamedSharding:
        """Sharding of an array that every device holds whole, so that each host can read it."""
        return NamedSharding(self.mesh, PartitionSpec())

    def manual_specs(self, tree: Any) -> Any:
        """The data-parallel part of the shardings of a tree of abstract arrays, as PartitionSpecs."""
        return jax.tree.map(
            lambda leaf: sharding.manual_spec(leaf.sharding.spec, self.batch_axes), tree
        )

    @property
    def vocab_chunk(self) -> int:
        """Vocabulary rows that the loss scores at a time, 0 for all."""
        config, backend = self.config, self.numerics.backend
        return losses.vocab_chunk(
            config.vocab_size, config.logits_soft_cap, config.vocab_chunk_size, backend
        )

    @property
    def scans_layers(self) -> bool:
        """Whether a train step loops over equal groups of layers."""
        numerics = self.numerics
        return transformer.scans_layers(
            self.config, numerics.backend, numerics.products, by_layer=self.gathers_by_layer
        )

    @property
    def gathers_by_layer(self) -> bool:
        """FSDP: whether parameters stay sharded over an axis until their layer runs."""
        axis = sharding.FSDP_AXIS
        is_used = axis in self.batch_axes and self.mesh.shape[axis] > 1
        return is_used and sharding.gathers_by_layer(self.config.logical_axis_rules)

    def gather_specs(self) -> tuple[Any, Any]:
        """Data-parallel PartitionSpecs of the parameters: of the axes that a step gathers once, and
        of those that it gathers layer by layer.
        """
        stored = self.manual_specs(self.params)
        axis = sharding.FSDP_AXIS if self.gathers_by_layer else None
        once = jax.tree.map(lambda spec: sharding.split_spec(spec, axis)[0], stored)
        by_layer = jax.tree.map(lambda spec: sharding.split_spec(spec, axis)[1], stored)
        return once, by_layer

    def over_devices(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """shard_map of `function` over the data-parallel axes; the compiler manages the other axes."""
        # An axis of size 1 needs no management; kernels that know only one device then run too.
        single = {axis for axis, size in self.mesh.shape.items() if size == 1}
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names=single.union(self.batch_axes),
            check_vma=False,
        )


def set_up_model(
    config: FrozenConfigDict, devices: Sequence[jax.Device] | None = None, mesh: Mesh | None = None
) -> ModelSetup:
    """The model's set-up on `mesh`, or on the config's mesh over `devices` (all devices if None).

    Raises ValueError if layout, quantization and devices do not fit together.
    """
    mesh = make_mesh(config, devices) if mesh is None else mesh
    quantization.check(config.quantization, mesh.devices.flat)
    numerics = numerics_of(config, mesh)
    model = architecture(config, numerics)
    return ModelSetup(config, mesh, numerics, model, abstract_params(config, model, mesh))

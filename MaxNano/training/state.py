"""The training state: its arrays, abstract shapes, shardings, and sharded initialization."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import FrozenConfigDict

from MaxNano.distributed.sharding import named_sharding
from MaxNano.models.setup import Architecture
from MaxNano.models.transformer import Numerics, Transformer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything a step changes. `step` (int32 scalar) counts updates, the skipped ones included."""

    step: jax.Array
    params: dict[str, Any]
    opt_state: Any


def abstract_state(
    config: FrozenConfigDict,
    model: Architecture,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> TrainState:
    """TrainState of ShapeDtypeStructs with shardings: the target of initialization and of restore.

    The path of an optimizer leaf ends with its parameter's path; it gets that sharding; any
    other leaf is replicated. A factored
    moment has size 1 on its reduced axes, and an axis of size 1 is never sharded.
    """
    axes = {_names(path): spec for path, spec in jax.tree_util.tree_leaves_with_path(model.axes)}

    def with_sharding(path, leaf):
        names = _names(path)
        spec = next((axes[names[i:]] for i in range(len(names)) if names[i:] in axes), None)
        if spec is None or len(spec) != leaf.ndim:
            sharding = NamedSharding(mesh, PartitionSpec())
        else:
            sharding = named_sharding(mesh, leaf.shape, tuple(spec), config.logical_axis_rules)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    state = TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32),
        params=model.shapes,
        opt_state=jax.eval_shape(optimizer.init, model.shapes),
    )
    return jax.tree_util.tree_map_with_path(with_sharding, state)


def initialize(
    config: FrozenConfigDict,
    numerics: Numerics,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
) -> TrainState:
    """A new state by sharded initialization; the same values on every mesh."""

    def init():
        model = Transformer(config, numerics, rngs=nnx.Rngs(config.seed))
        params = nnx.to_pure_dict(nnx.split(model)[1])
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(init, out_shardings=shardings)()


def _names(path) -> tuple[str, ...]:
    """The dictionary keys on a tree path."""
    return tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))

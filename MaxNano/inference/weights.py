"""Weights for inference: the parameters cast to the compute dtype, with query, key and value fused.

A tree of weights has the names of the parameters, except that query, key and value become `qkv`
(transformer.fuse_layers).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from MaxNano import scaling
from MaxNano.distributed import sharding
from MaxNano.models.transformer import fuse_layers

Weights = dict[str, Any]

# Logical axes of the last dimensions of each array, by name. Leading dimensions stack layers.
_AXES = {
    "token_embed": ("vocab", "embed"),
    "lm_head": ("vocab", "embed"),
    "head": ("embed", "vocab"),
    "value_embeds": (None, "vocab", "kv_heads"),
    "gate": (None, "kv_heads"),
    "value_gate": (None, "kv_heads"),
    "qkv": ("embed", "kv_heads"),
}


def prepare(config: FrozenConfigDict, params: dict[str, Any], dtype: str) -> Weights:
    """The weights of a parameter tree, layers stacked as in the parameters; vectors keep their
    dtype.
    """
    cast = {
        name: x.astype(dtype) if x.ndim > 1 else x for name, x in params.items() if name != "layers"
    }
    return cast | {"layers": fuse_layers(config, params["layers"], jnp.dtype(dtype))}


def shardings(config: FrozenConfigDict, mesh: Mesh, weights: Weights) -> Weights:
    """Shardings of weights, given as arrays or shapes.

    Each device holds them whole along the data-parallel axes; the rules shard them along the
    others.
    """
    rules = config.logical_axis_rules
    others = [axis for axis in mesh.axis_names if axis not in sharding.batch_axes(mesh, rules)]

    def place(path, leaf):
        *_, part, name = (None, *(getattr(entry, "key", None) for entry in path))
        axes = scaling.BLOCK.get(part, _AXES).get(name) or _AXES.get(name, ())
        axes = (None,) * (leaf.ndim - len(axes)) + axes
        return sharding.named_sharding(mesh, leaf.shape, axes, rules, others)

    return jax.tree_util.tree_map_with_path(place, weights)

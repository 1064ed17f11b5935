"""Parts of the model: parameters, initializers, norms, residual mix, rotary embedding, MLP, and what
FSDP gathers.

Legend: L length, T tokens, D embed, N heads, H head_dim.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec

from MaxNano import scaling
from MaxNano.distributed.sharding import Axes, gather_in_pass

Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]


def parameter(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: Axes, init: Initializer, dtype=jnp.float32
) -> nnx.Param:
    """Declare a parameter: shape, logical axes, initial value and storage dtype in one expression."""
    assert len(shape) == len(axes), (shape, axes)
    return nnx.Param(init(rngs.params(), shape, dtype), logical_axes=axes)


def uniform(low: float, high: float) -> Initializer:
    """Initializer: uniform in [low, high), drawn in float32."""

    def init(key, shape, dtype):
        return jax.random.uniform(key, shape, jnp.float32, low, high).astype(dtype)

    return init


def normal(std: float) -> Initializer:
    """Initializer: normal with mean 0, drawn in float32."""

    def init(key, shape, dtype):
        return (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

    return init


def linspace(first: float, last: float) -> Initializer:
    """Initializer: from `first` at index 0 to `last` at the end, in equal steps."""

    def init(key, shape, dtype):
        del key
        return jnp.asarray(np.linspace(first, last, *shape), dtype)

    return init


def constant(value: float) -> Initializer:
    """Initializer: one value everywhere."""

    def init(key, shape, dtype):
        del key
        return jnp.full(shape, value, dtype)

    return init


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def rms_norm(x: jax.Array, epsilon: float) -> jax.Array:
    """x / sqrt(mean(x^2) + epsilon) over the last axis, without a learned scale; float32 inside,
    x's dtype out.
    """
    return _rms_norm_forward(x, epsilon)[0]


def _rms_norm_forward(x, epsilon):
    # A division and not a product with a reciprocal square root: that is off by a few ulps in the
    # same direction at every position on some backends, which changes the gradients of the scalars.
    x32 = x.astype(jnp.float32)
    rms = jnp.sqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + epsilon)
    return (x32 / rms).astype(x.dtype), (x, rms)


def _rms_norm_backward(epsilon, residuals, cotangent):
    # A custom backward pass: it saves only x and one number per row, and removes the component of
    # the gradient along y.
    x, rms = residuals
    y = x.astype(jnp.float32) / rms
    grad = cotangent.astype(jnp.float32)
    along = jnp.mean(grad * y, axis=-1, keepdims=True)
    return (((grad - y * along) / rms).astype(x.dtype),)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


@jax.custom_vjp
def mix(x: jax.Array, scale: jax.Array, other: jax.Array, share: jax.Array) -> jax.Array:
    """scale x + share other in float32, in x's dtype; x and other (..., T, D), scale and share ()."""
    mixed = scale * x.astype(jnp.float32) + share * other.astype(jnp.float32)
    return mixed.astype(x.dtype)


def _mix_forward(x, scale, other, share):
    return mix(x, scale, other, share), (x, scale, other, share)


def _mix_backward(residuals, cotangent):
    # The gradients of the scalars sum millions of products of both signs. Dot products are summed
    # in blocks, which keeps digits that one long running sum in float32 loses.
    x, scale, other, share = residuals

    def dot(a, b):
        rows = jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32), axis=-1)
        return jnp.sum(jax.lax.optimization_barrier(rows))

    grad = cotangent.astype(jnp.float32)
    return (
        (scale * grad).astype(x.dtype),
        dot(cotangent, x),
        (share * grad).astype(other.dtype),
        dot(cotangent, other),
    )


mix.defvjp(_mix_forward, _mix_backward)


@jax.custom_vjp
def row_major(x: jax.Array) -> jax.Array:
    """`x`, and in the backward pass its gradient, with the last axis innermost in memory.

    Otherwise the TPU compiler stores the residual stream (T, D) with tokens along lanes, which
    suits the norms and makes every matrix product between them several times as expensive.
    """
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


row_major.defvjp(lambda x: (row_major(x), None), lambda _, grad: (row_major(grad),))


def rotary(positions: np.ndarray | jax.Array, head_dim: int, theta: float):
    """Cosines and sines (..., head_dim / 2) of positions (...) x theta^(-2j / head_dim), float32.

    Positions and angles stay in float32: bfloat16 cannot tell 256 from 257.
    """
    numpy = np if isinstance(positions, np.ndarray) else jnp
    frequency = theta ** (-np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    angle = positions[..., None].astype(np.float32) * frequency.astype(np.float32)
    return numpy.cos(angle), numpy.sin(angle)


def rotary_tables(length: int, head_dim: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """The tables of `rotary` for positions 0 ... length - 1, each (length, head_dim / 2)."""
    return rotary(np.arange(length), head_dim, theta)


def apply_rotary(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate x (..., L, N, H) by minus the position's angle, in float32; tables (..., L, H / 2).

    The two halves of H form the pairs, not neighboring channels.
    Source: nanochat/gpt.py@92d63d4, apply_rotary_emb; the sign is kept for its checkpoints.
    """
    cos, sin = (table[..., None, :] for table in tables)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos + b * sin, b * cos - a * sin], axis=-1).astype(x.dtype)


def mlp(
    weights: dict[str, jax.Array],
    x: jax.Array,
    matmul: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """x (..., T, D) through the matrices that read it, `activation`, and wo: (..., T, D)."""
    hidden = [matmul(x, weights[name]) for name in mlp_reads()]
    return matmul(activation(*hidden), weights["wo"])


def mlp_reads() -> tuple[str, ...]:
    """The MLP's matrices that read the residual stream, in the order of scaling.BLOCK."""
    return tuple(name for name, axes in scaling.BLOCK["mlp"].items() if axes[0] == "embed")


def activation(hidden: jax.Array) -> jax.Array:
    """The MLP's hidden layer (..., F) from the product of each of `mlp_reads` (..., F).

    Element by element: kernels/products.py computes it, and its gradient, for some columns of F at
    a time.
    """
    return jnp.square(jax.nn.relu(hidden))


def gather_layer(layer: dict[str, Any], specs: dict[str, Any], dtype) -> dict[str, Any]:
    """Inside shard_map: the layer with whole matrices and a whole table of value embeddings, cast.

    specs: how the parameters that are stacked over layers are still sharded, as PartitionSpecs.
    """

    def whole(x, spec):
        spec = PartitionSpec(*spec[1:])
        return gather_in_pass(x, spec, dtype) if any(spec) else x

    layer = layer | {
        name: jax.tree.map(whole, layer[name], specs["layers"][name]) for name in scaling.BLOCK
    }
    if "value" in layer:
        value = layer["value"]
        layer["value"] = value | {
            "gate": whole(value["gate"], specs["value_gate"]),
            "table": whole(value["table"], specs["value_embeds"]),
        }
    return layer

"""The small parts of the model: parameters with their axes, norm, rotary embedding, MLP.

Legend: B batch, L length, T tokens, D embed, N heads, H head_dim, F mlp. Stacked parameters carry the layers on axis 0;
a layer sees its own slice, so the shapes in `__call__` are without that axis.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from MaxNano.distributed.sharding import Axes
from MaxNano.models.quantization import matmul

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
    """x / sqrt(mean(x^2) + epsilon) over the last axis, without a learned scale; float32 inside, x's dtype out."""
    return _rms_norm_forward(x, epsilon)[0]


def _rms_norm_forward(x, epsilon):
    # Divided, not multiplied by a reciprocal square root: on some backends that is off by several units in the
    # last place for all positions alike, which the gradients of the model's scalars feel.
    x32 = x.astype(jnp.float32)
    rms = jnp.sqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + epsilon)
    return (x32 / rms).astype(x.dtype), (x, rms)


def _rms_norm_backward(epsilon, residuals, cotangent):
    # Written out so that only x and one number a row are kept. The part of the gradient along y is projected out.
    x, rms = residuals
    y = x.astype(jnp.float32) / rms
    grad = cotangent.astype(jnp.float32)
    along = jnp.mean(grad * y, axis=-1, keepdims=True)
    return (((grad - y * along) / rms).astype(x.dtype),)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


@jax.custom_vjp
def row_major(x: jax.Array) -> jax.Array:
    """`x`, and in the backward pass its gradient, with the last axis innermost in memory.

    Left to itself, the TPU compiler stores the residual stream (T, D) token by token across lanes, which suits the
    norms and makes every matrix product around them several times dearer.
    """
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


row_major.defvjp(lambda x: (row_major(x), None), lambda _, grad: (row_major(grad),))


def rotary_tables(length: int, head_dim: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """(length, head_dim / 2) cosines and sines of position x theta^(-2j / head_dim), float32.

    Positions and angles stay in float32: bfloat16 cannot tell 256 from 257.
    """
    frequency = theta ** (-np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    angle = np.outer(np.arange(length, dtype=np.float32), frequency.astype(np.float32))
    return np.cos(angle), np.sin(angle)


def apply_rotary(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate x (B, L, N, H), halves (not pairs) of H together, by minus the position's angle, in float32.

    Source: nanochat/gpt.py@92d63d4, apply_rotary_emb; the sign is kept for its checkpoints.
    """
    cos, sin = (t[None, :, None, :] for t in tables)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos + b * sin, b * cos - a * sin], axis=-1).astype(x.dtype)


class Mlp(nnx.Module):
    """wo(relu(wi x)^2) for a stack of layers; x (T, D) -> (T, D)."""

    def __init__(self, config, layers: int, *, rngs: nnx.Rngs):
        embed, mlp = config.emb_dim, config.mlp_dim
        bound = config.mlp_init_scale * (3 / embed) ** 0.5
        self.quantization = config.quantization
        self.wi = parameter(
            rngs, (layers, embed, mlp), ("layers", "embed", "mlp"), uniform(-bound, bound)
        )
        self.wo = parameter(rngs, (layers, mlp, embed), ("layers", "mlp", "embed"), constant(0.0))

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = matmul(x, self.wi[...].astype(x.dtype), self.quantization)
        hidden = checkpoint_name(hidden, "mlp_hidden")
        hidden = jnp.square(jax.nn.relu(hidden))
        return matmul(hidden, self.wo[...].astype(x.dtype), self.quantization)

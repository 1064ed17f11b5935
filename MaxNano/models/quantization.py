"""Quantized training: matrix products in 8 bits, with dynamic scales.

Both operands are divided by a scale, rounded to 8 bits and multiplied. The sums, in 32 bits, are
multiplied by the scales. The gradient is a straight-through estimate.

int8, for TPUs, which multiply it twice as fast as bfloat16: one scale per row and per column, so
that one token with large values does not reduce the precision of the others. The gradient of the activations is
quantized too; that of the weights, which sums over all tokens, is not. fp8, for NVIDIA GPUs: one
scale per operand; activations and weights in e4m3, gradients in e5m2; all three products in 8 bits.

Legend: T tokens, D inputs, F outputs. Source: AQT (https://github.com/google/aqt) as in MaxText's
int8 with quantization_local_shard_count=0, without its stochastic rounding of gradients; FP8
Formats for Deep Learning, https://arxiv.org/abs/2209.05433.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from MaxNano.distributed import gpus

INT8_MAX = 127.0  # -128 is left out: the range is symmetric
FP8_COMPUTE_CAPABILITY = 8.9  # of the first NVIDIA GPUs that multiply fp8


def check(kind: str, devices: Sequence[jax.Device]) -> None:
    """Raises ValueError if the devices do not support the kind; a CPU runs all kinds, for tests."""
    device = devices[0]
    if kind != "fp8" or device.platform == "cpu":
        return
    if device.platform != "gpu":
        raise ValueError(
            f"quantization=fp8 is for NVIDIA GPUs, this is {device.platform}: choose int8"
        )
    if float(gpus.compute_capability(device)) < FP8_COMPUTE_CAPABILITY:
        raise ValueError(
            f"quantization=fp8 needs compute capability 8.9 or newer (Ada, Hopper), "
            f"this is {device.device_kind}: choose int8"
        )


def matmul(x: jax.Array, w: jax.Array, kind: str) -> jax.Array:
    """x (T, D) times w (D, F) -> (T, F) in x's dtype; kind: none, int8 or fp8."""
    products = {"none": jnp.matmul, "int8": _int8_matmul, "fp8": _fp8_matmul}
    return products[kind](x, w)


def _scale(x: jax.Array, largest: float, axis: int | None) -> jax.Array:
    """The divisor that makes the largest magnitude of x, along `axis` or overall, `largest`;
    float32.
    """
    top = jnp.max(jnp.abs(x), axis=axis, keepdims=True).astype(jnp.float32)
    return jnp.where(top > 0, top / largest, 1.0)


def _dot(x: jax.Array, w: jax.Array, x_axis: int, w_axis: int, dtype) -> jax.Array:
    """The product of two matrices over an axis of each, summed in `dtype`."""
    return jax.lax.dot_general(
        x, w, (((x_axis,), (w_axis,)), ((), ())), preferred_element_type=dtype
    )


# ---- int8 ---------------------------------------------------------------------------------------


def _int8(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """(x in int8, scales), with one scale per line along `axis`."""
    scale = _scale(x, INT8_MAX, axis)
    return jnp.round(x.astype(jnp.float32) / scale).astype(jnp.int8), scale


def _int8_dot(x: jax.Array, w: jax.Array, w_axis: int) -> jax.Array:
    """x (T, n) times w over its axis of n, in x's dtype."""
    (x8, x_scale), (w8, w_scale) = _int8(x, 1), _int8(w, w_axis)
    out = _dot(x8, w8, 1, w_axis, jnp.int32).astype(jnp.float32)
    return (out * x_scale * w_scale.reshape(1, -1)).astype(x.dtype)


@jax.custom_vjp
def _int8_matmul(x, w):
    return _int8_dot(x, w, 0)


def _int8_forward(x, w):
    return _int8_dot(x, w, 0), (x, w)


def _int8_backward(residuals, grad):
    x, w = residuals
    return _int8_dot(grad, w, 1), _dot(x, grad, 0, 0, w.dtype)


_int8_matmul.defvjp(_int8_forward, _int8_backward)


# ---- fp8 ----------------------------------------------------------------------------------------


def _fp8(x: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """(x in an 8-bit float, its scale)."""
    largest = float(jnp.finfo(dtype).max)
    scale = _scale(x, largest, None)
    # Rounding could take the largest number out of range, where e4m3 has only NaN.
    return jnp.clip(x.astype(jnp.float32) / scale, -largest, largest).astype(dtype), scale


def _fp8_dot(x, w, x_axis: int, w_axis: int, dtype) -> jax.Array:
    """The product of two pairs (operand, scale) over an axis of each."""
    (x8, x_scale), (w8, w_scale) = x, w
    return (_dot(x8, w8, x_axis, w_axis, jnp.float32) * (x_scale * w_scale)).astype(dtype)


@jax.custom_vjp
def _fp8_matmul(x, w):
    return _fp8_forward(x, w)[0]


def _fp8_forward(x, w):
    x8, w8 = _fp8(x, jnp.float8_e4m3fn), _fp8(w, jnp.float8_e4m3fn)
    # The backward pass keeps only 8 bits; the empty array carries the weights' dtype.
    return _fp8_dot(x8, w8, 1, 0, x.dtype), (x8, w8, jnp.zeros(0, w.dtype))


def _fp8_backward(residuals, grad):
    x8, w8, like_w = residuals
    grad8 = _fp8(grad, jnp.float8_e5m2)
    return _fp8_dot(grad8, w8, 1, 1, grad.dtype), _fp8_dot(x8, grad8, 0, 0, like_w.dtype)


_fp8_matmul.defvjp(_fp8_forward, _fp8_backward)

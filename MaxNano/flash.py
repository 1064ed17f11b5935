"""Attention in one Pallas kernel for TPU: rotary embedding, QK norm, causal window and softmax of whole heads.

The kernel reads queries, keys and values where the projections leave them, (B, L, heads x H), so no head is ever
transposed in memory, and it keeps a whole head in VMEM, so keys are prepared once and no partial gradients are summed
outside. Because queries and keys are normalised, scores have a known bound, which stands in for the running maximum.

Legend: B batch, L length, N heads, K kv_heads, G query heads a kv head, H head_dim.
Sources: https://arxiv.org/abs/2205.14135 (FlashAttention) for the softmax without an L x L array and its gradient.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LARGEST_BOUND = 40.0  # exp(-2 x bound) must be far from the smallest float32
VMEM_LIMIT_BYTES = 100 * 2**20


class Head(NamedTuple):
    """What is static about a call."""

    window: int
    head_dim: int
    scale: float  # of normalised queries and keys, each
    epsilon: float
    block: int  # query rows at a time
    interpret: bool

    @property
    def log2_scale(self) -> float:
        """Factor on normalised queries so that their products with normalised keys are scores as powers of two."""
        return self.scale**2 / math.sqrt(self.head_dim) * math.log2(math.e)

    @property
    def bound(self) -> float:
        """The largest score possible, as a power of two."""
        return self.scale**2 * math.sqrt(self.head_dim) * math.log2(math.e)


def attention(q, k, v, tables, *, window, head_dim, scale, epsilon, block, interpret=False):
    """Rotary embedding, QK norm and causal attention in which position t sees keys t - window ... t.

    q (B, L, N x H); k, v (B, L, K x H), as projected; tables: cosines and sines (L, H / 2) float32 -> (B, L, N x H).
    `scale` multiplies normalised queries and keys, each; `block` query rows are scored at a time.
    Raises ValueError for shapes that the kernel cannot take.
    """
    length = q.shape[1]
    if head_dim % 128 or length % block or block % 128:
        raise ValueError(
            f"attention=flash needs head_dim a multiple of 128 and max_target_length a multiple of its block of {block}: "
            f"these are {head_dim} and {length}; choose attention=splash or attention=reference"
        )
    head = Head(min(window, length - 1), head_dim, scale, epsilon, block, interpret)
    if head.bound > LARGEST_BOUND * math.log2(math.e):
        raise ValueError(
            f"attention=flash bounds scores by qk_norm_scale^2 x sqrt(head_dim), which must be at most {LARGEST_BOUND}: "
            "choose attention=splash or attention=reference"
        )
    cos, sin = tables
    cos = jnp.concatenate([cos, cos], axis=-1)
    sin = jnp.concatenate([sin, -sin], axis=-1)
    return _attention(q, k, v, cos, sin, head)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(q, k, v, cos, sin, head):
    return _forward(q, k, v, cos, sin, head)[0]


def _forward(q, k, v, cos, sin, head):
    batch, length, width = q.shape
    heads, kv_heads = width // head.head_dim, k.shape[2] // head.head_dim
    group = heads // kv_heads
    of_query, of_key, table = _specs(length, head.head_dim, group)
    norms = pl.BlockSpec((1, 1, 1, length), lambda b, j, g: (b, j * group + g, 0, 0))
    out, lse = pl.pallas_call(
        partial(_forward_kernel, head=head),
        grid=(batch, kv_heads, group),
        in_specs=[of_query, of_key, of_key, table, table],
        out_specs=[of_query, norms],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((length, head.head_dim), q.dtype),
            pltpu.VMEM((length, 2 * head.head_dim), q.dtype),
        ],
        compiler_params=_parameters(),
        cost_estimate=_cost(q, k, head, products=2),
        interpret=head.interpret,
        name=f"flash_forward_w{head.window}",
    )(q, k, v, cos, sin)
    out, lse = (_keepable(x) for x in (out, lse))
    return out, (q, k, v, cos, sin, out, lse)


def _keepable(x):
    """`x`, under a name by which a remat policy can keep it.

    It is kept as integers: JAX rounds kept floats once more, which for the output of a kernel is a copy.
    """
    bits = jax.lax.bitcast_convert_type(x, {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
    return jax.lax.bitcast_convert_type(checkpoint_name(bits, "attention_out"), x.dtype)


def _backward(head, residuals, cotangent):
    q, k, v, cos, sin, out, lse = residuals
    batch, length, width = q.shape
    heads, kv_heads = width // head.head_dim, k.shape[2] // head.head_dim
    group = heads // kv_heads
    of_query, of_key, table = _specs(length, head.head_dim, group)
    norms = pl.BlockSpec((1, 1, 1, length), lambda b, j, g: (b, j * group + g, 0, 0))
    grads = pl.pallas_call(
        partial(_backward_kernel, head=head, group=group),
        grid=(batch, kv_heads, group),
        in_specs=[of_query, of_key, of_key, table, table, of_query, of_query, norms],
        out_specs=[of_query, of_key, of_key],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)],
        scratch_shapes=[
            pltpu.VMEM((length, head.head_dim), q.dtype),
            pltpu.VMEM((length, head.head_dim), jnp.float32),
            pltpu.VMEM((length, head.head_dim), jnp.float32),
        ],
        compiler_params=_parameters(),
        cost_estimate=_cost(q, k, head, products=5),
        interpret=head.interpret,
        name=f"flash_backward_w{head.window}",
    )(q, k, v, cos, sin, out, cotangent, lse)
    return (*grads, None, None)


_attention.defvjp(_forward, _backward)


# ---- Inside the kernels ---------------------------------------------------------------------------------------------


def _forward_kernel(q_ref, k_ref, v_ref, cos_ref, sin_ref, out_ref, lse_ref, keys, values, *, head):
    size, dtype = head.head_dim, keys.dtype

    @pl.when(pl.program_id(2) == 0)
    def _():
        keys[...] = _prepare(k_ref[0], cos_ref[...], sin_ref[...], head.epsilon)[0].astype(dtype)
        # Columns of ones beside the values: their product with the probabilities is the sum of those.
        values[:, :size] = v_ref[0]
        values[:, size:] = jnp.ones(values[:, size:].shape, dtype)

    for start in range(0, q_ref.shape[1], head.block):
        rows = pl.ds(start, head.block)
        q = _prepare(q_ref[0, rows], cos_ref[rows], sin_ref[rows], head.epsilon)[0]
        q = (q * head.log2_scale).astype(dtype)
        total = jnp.zeros((head.block, 2 * size), jnp.float32)
        for low, high, edge in _segments(start, head):
            scores = _dot(q, keys[low:high], ((1,), (1,)))
            weights = jnp.exp2(scores - head.bound)
            if edge:
                weights = jnp.where(_visible(start, low, scores.shape, 0, head), weights, 0)
            total += _dot(weights.astype(dtype), values[low:high], ((1,), (0,)))
        sums = total[:, size:]
        out_ref[0, rows] = (total[:, :size] / sums).astype(out_ref.dtype)
        lse_ref[0, 0, :, rows] = (jnp.log2(sums) + head.bound).T[:1]


def _backward_kernel(
    q_ref, k_ref, v_ref, cos_ref, sin_ref, out_ref, cotangent_ref, lse_ref,
    dq_ref, dk_ref, dv_ref, keys, grad_keys, grad_values, *, head, group,
):  # fmt: skip
    dtype = keys.dtype
    member = pl.program_id(2)

    @pl.when(member == 0)
    def _():
        keys[...] = _prepare(k_ref[0], cos_ref[...], sin_ref[...], head.epsilon)[0].astype(dtype)
        grad_keys[...] = jnp.zeros_like(grad_keys)
        grad_values[...] = jnp.zeros_like(grad_values)

    for start in range(0, q_ref.shape[1], head.block):
        rows = pl.ds(start, head.block)
        cos, sin = cos_ref[rows], sin_ref[rows]
        normed, rms = _prepare(q_ref[0, rows], cos, sin, head.epsilon)
        q = (normed * head.log2_scale).astype(dtype)
        cotangent = cotangent_ref[0, rows]
        along = jnp.sum(
            cotangent.astype(jnp.float32) * out_ref[0, rows].astype(jnp.float32), axis=-1, keepdims=True
        )
        # Keys stand in rows and queries in columns, so that a query's numbers are rows that broadcast.
        along = jnp.broadcast_to(along, normed.shape).T[:1]
        lse = lse_ref[0, 0, :, rows]
        dq = jnp.zeros(normed.shape, jnp.float32)
        for low, high, edge in _segments(start, head):
            scores = _dot(keys[low:high], q, ((1,), (1,)))
            weights = jnp.exp2(scores - lse)
            if edge:
                weights = jnp.where(_visible(start, low, scores.shape, 1, head), weights, 0)
            grad_values[low:high] += _dot(weights.astype(dtype), cotangent, ((1,), (0,)))
            grad = _dot(v_ref[0, low:high], cotangent, ((1,), (1,)))
            grad = (weights * (grad - along)).astype(dtype)
            grad_keys[low:high] += _dot(grad, q, ((1,), (0,)))
            dq += _dot(grad, keys[low:high], ((0,), (0,)))
        dq *= head.log2_scale * math.log(2)
        dq_ref[0, rows] = _prepare_gradient(dq, normed, rms, cos, sin).astype(dq_ref.dtype)

    @pl.when(member == group - 1)
    def _():
        cos, sin = cos_ref[...], sin_ref[...]
        normed, rms = _prepare(k_ref[0], cos, sin, head.epsilon)
        dk = grad_keys[...] * math.log(2)
        dk_ref[0] = _prepare_gradient(dk, normed, rms, cos, sin).astype(dk_ref.dtype)
        dv_ref[0] = grad_values[...].astype(dv_ref.dtype)


def _prepare(x, cos, sin, epsilon):
    """Rotated and normalised rows (L, H) in float32, and the root mean square (L, 1) of each."""
    x = x.astype(jnp.float32)
    x = x * cos + _swap_halves(x) * sin
    rms = jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)
    return x / rms, rms


def _prepare_gradient(grad, normed, rms, cos, sin):
    """Gradient of `_prepare`'s input from that of its output."""
    grad = (grad - normed * jnp.mean(grad * normed, axis=-1, keepdims=True)) / rms
    return grad * cos + _swap_halves(grad * sin)


def _swap_halves(x):
    return pltpu.roll(x, x.shape[-1] // 2, x.ndim - 1)


def _segments(start, head):
    """Spans of keys that queries start ... start + block - 1 see: (low, high, whether some pairs are masked)."""
    block = head.block
    low = max(0, start - head.window) // 128 * 128
    whole = max(0, start + block - 1 - head.window)  # from this key on, all queries see the key if not for causality
    whole = -(-whole // 128) * 128
    spans = []
    if low < min(whole, start):
        spans.append((low, min(whole, start), True))
    if whole < start:
        spans.append((whole, start, False))
    return [*spans, (start, start + block, True)]


def _visible(start, low, shape, query_axis, head):
    query = start + jax.lax.broadcasted_iota(jnp.int32, shape, query_axis)
    key = low + jax.lax.broadcasted_iota(jnp.int32, shape, 1 - query_axis)
    return (key <= query) & (key >= query - head.window)


def _dot(a, b, contracting):
    precision = "highest" if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (contracting, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


# ---- Around the kernels ---------------------------------------------------------------------------------------------


def _specs(length, head_dim, group):
    """Blocks of one query head, of one kv head, and of a rotary table, by (batch, kv head, member of its group)."""
    return (
        pl.BlockSpec((1, length, head_dim), lambda b, j, g: (b, 0, j * group + g)),
        pl.BlockSpec((1, length, head_dim), lambda b, j, g: (b, 0, j)),
        pl.BlockSpec((length, head_dim), lambda b, j, g: (0, 0)),
    )


def _parameters():
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT_BYTES
    )


def _cost(q, k, head, products):
    """FLOPs of the score tiles that are computed, masked ones included; bytes in and out; exponentials."""
    batch, length, width = q.shape
    pairs = sum(
        head.block * (high - low)
        for start in range(0, length, head.block)
        for low, high, _ in _segments(start, head)
    )
    heads = width // head.head_dim
    moved = {2: 2 * q.size + 2 * k.size, 5: 4 * q.size + 4 * k.size}[products]
    return pl.CostEstimate(
        flops=2 * products * batch * heads * pairs * head.head_dim,
        transcendentals=batch * heads * pairs,
        bytes_accessed=moved * q.dtype.itemsize,
    )

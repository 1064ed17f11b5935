"""Attention in one Pallas kernel for TPU: rotary embedding, QK norm, causal window and softmax of
whole heads.

The kernel reads queries, keys and values from the fused projection, one array (B, L, K x (G + 2) x
H): for each kv head its query heads, its keys and its values. It writes their gradients in the same
layout, so no head is ever transposed in HBM. A whole head stays in VMEM, so no partial gradients
are summed outside the kernel. Queries and keys are normalized, so scores are bounded and need no
running maximum.

Legend: B batch, L length, K kv_heads, G query heads per kv head, H head_dim. Sources:
https://arxiv.org/abs/2205.14135 (FlashAttention) for the softmax without an L x L array and its
gradient.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# Attention's output is kept as integers: JAX rounds floats that a remat policy keeps once more, which
# for a kernel's result is a copy. Kernels write and read them.
BITS = {2: jnp.uint16, 4: jnp.uint32}
LARGEST_BOUND = 40.0  # exp(2 x bound) must be far below the largest float32
VMEM_LIMIT_BYTES = 100 * 2**20

_LANES = 128
_SUBLANES = 16  # of a register of bfloat16
_FORWARD_LEAD, _BACKWARD_LEAD = 4, 2  # tiles; more only moves scores to VMEM and back


def as_bits(x: jax.Array) -> jax.Array:
    """Floats as integers of their size."""
    return jax.lax.bitcast_convert_type(x, BITS[x.dtype.itemsize])


def dot(a, b, contracting, interpret: bool):
    """In a kernel: the product of two arrays over the axes `contracting`, summed in float32."""
    if interpret:  # jaxlib 0.12 has not all products of bfloat16 on a CPU; these are exact
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    precision = "highest" if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (contracting, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


class Head(NamedTuple):
    """The static arguments of a call."""

    group: int  # query heads that share keys and values
    window: int
    head_dim: int
    scale: float  # of normalized queries and keys, each
    epsilon: float
    block: int  # queries, and keys, of a tile
    interpret: bool

    def shape_of(self, qkv) -> tuple[int, int, int, tuple[int, int, int]]:
        """(B, L, H, (B, K, G)): the last is the grid of a kernel, a query head at a time."""
        batch, length, width = qkv.shape
        kv_heads = width // (self.head_dim * (self.group + 2))
        return batch, length, self.head_dim, (batch, kv_heads, self.group)

    @property
    def log2_scale(self) -> float:
        """Factor on normalized queries so that their products with normalized keys are scores as
        powers of two.
        """
        return self.scale**2 / math.sqrt(self.head_dim) * math.log2(math.e)

    def dot(self, a, b, contracting):
        """The product of two arrays over the axes `contracting`, summed in float32."""
        return dot(a, b, contracting, self.interpret)

    def tiles(self, length: int) -> list[tuple[int, int]]:
        """(first query, first key) of each tile of scores that is computed, a block of queries
        after the other.
        """
        return [
            (start, low)
            for start in range(0, length, self.block)
            for low in range(
                max(0, start - self.window) // self.block * self.block, start + 1, self.block
            )
        ]


def attention(
    qkv,
    tables,
    *,
    group,
    window,
    head_dim,
    scale,
    epsilon,
    block,
    value_embed=None,
    interpret=False,
):
    """Rotary embedding, QK norm and causal attention in which position t sees keys t - window ...
    t.

    qkv (B, L, K x (G + 2) x H): for each kv head its `group` = G query heads, then keys, then
    values, as projected. tables: cosines and sines (L, H / 2) float32. value_embed: rows (B, L, K x
    H) and their gates (B, K, L) float32, whose product is added to the values; or None. Returns
    (B, L, K x G x H). `scale` multiplies normalized queries and keys, each. Scores are computed in
    tiles of `block` x `block`; best is the width of the matrix unit. Raises ValueError for shapes
    that the kernel cannot take.
    """
    length = qkv.shape[1]
    if head_dim % _LANES or length % block or block % _LANES:
        raise ValueError(
            "attention=flash needs head_dim a multiple of 128 and max_target_length a multiple of its block of "
            f"{block}: these are {head_dim} and {length}; choose attention=splash or attention=reference"
        )
    if scale**2 * math.sqrt(head_dim) > LARGEST_BOUND:
        raise ValueError(
            "attention=flash bounds scores by qk_norm_scale^2 x sqrt(head_dim), which must be at most "
            f"{LARGEST_BOUND}: choose attention=splash or attention=reference"
        )
    head = Head(group, min(window, length - 1), head_dim, scale, epsilon, block, interpret)
    embeds = ()
    if value_embed is not None:
        rows, gate = value_embed
        embeds = rows, gate[:, :, None]  # a gate a query lies along lanes, in a row of its own
    return _attention(qkv, embeds, *(t.T for t in tables), head)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(qkv, embeds, cos, sin, head):
    return _forward(qkv, embeds, cos, sin, head)[0]


def _forward(qkv, embeds, cos, sin, head):
    kept = _call_forward(qkv, embeds, cos, sin, head)
    out, lse = (checkpoint_name(x, "attention_out") for x in (kept[0], as_bits(kept[1])))
    lse = jax.lax.bitcast_convert_type(lse, jnp.float32)
    return jax.lax.bitcast_convert_type(out, qkv.dtype), (qkv, embeds, cos, sin, out, lse)


# Kernels are traced once for all layers of a kind.
@partial(jax.jit, static_argnums=4)
def _call_forward(qkv, embeds, cos, sin, head):
    batch, length, size, grid = head.shape_of(qkv)
    specs = _specs(length, head)
    return pl.pallas_call(
        partial(_forward_kernel, head=head),
        grid=grid,
        in_specs=[
            specs.query,
            specs.key,
            specs.value,
            specs.table,
            specs.table,
            *(specs.rows, specs.gate)[: len(embeds)],
        ],
        out_specs=[specs.out, specs.sums],
        out_shape=[
            jax.ShapeDtypeStruct(
                (batch, length, grid[1] * head.group * size), BITS[qkv.dtype.itemsize]
            ),
            jax.ShapeDtypeStruct((batch, grid[1] * head.group, 1, length), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((length, size), qkv.dtype),
            pltpu.VMEM((size, length), qkv.dtype),
        ],
        compiler_params=_parameters(),
        cost_estimate=_cost(qkv, head, products=2, arrays=4),
        interpret=head.interpret,
        name=f"flash_forward_w{head.window}",
    )(qkv, qkv, qkv, cos, sin, *embeds)


@partial(jax.jit, static_argnums=0)
def _backward(head, residuals, cotangent):
    qkv, embeds, cos, sin, out, lse = residuals
    _, length, size, grid = head.shape_of(qkv)
    specs = _specs(length, head)
    gradients = pl.pallas_call(
        partial(_backward_kernel, head=head, embeds=len(embeds)),
        grid=grid,
        in_specs=[
            specs.query,
            specs.key,
            specs.value,
            specs.table,
            specs.table,
            specs.out,
            specs.out,
            specs.sums,
            *(specs.rows, specs.gate)[: len(embeds)],
        ],
        out_specs=[specs.all, *(specs.rows, specs.gate)[: len(embeds)]],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (qkv, *embeds)],
        scratch_shapes=[
            pltpu.VMEM((length, size), qkv.dtype),
            pltpu.VMEM((size, length), qkv.dtype),
            pltpu.VMEM((length, size), qkv.dtype),
            pltpu.VMEM((size, length), jnp.float32),
            pltpu.VMEM((size, length), jnp.float32),
        ],
        compiler_params=_parameters(),
        cost_estimate=_cost(qkv, head, products=5, arrays=8),
        interpret=head.interpret,
        name=f"flash_backward_w{head.window}",
    )(qkv, qkv, qkv, cos, sin, out, cotangent, lse, *embeds)
    return gradients[0], tuple(gradients[1:]), None, None


_attention.defvjp(_forward, _backward)


# ---- Inside the kernels -------------------------------------------------------------------------
#
# Queries are columns: prepared queries are (H, queries) and scores are (keys, queries). A query's
# norm, sum and log-sum-exp are then rows, which broadcast for nothing; halves of a head swap
# without moving; and a product with H rows keeps the whole of a 256-wide matrix unit busy, which
# one with H = 128 columns does not. Everything is unrolled, so that the compiler can lay the work
# of several tiles side by side.


def _forward_kernel(q_ref, k_ref, v_ref, cos_ref, sin_ref, *refs, head):
    """One query head. Scratch: prepared keys (L, H), values (H, L)."""
    *embeds, out_ref, lse_ref, keys, values = refs
    length, size = keys.shape
    dtype, block = keys.dtype, head.block
    ones = jnp.ones((_SUBLANES, block), dtype)
    queries, totals = {}, {}

    def prepare(start):
        rows = pl.ds(start, block)
        tables = cos_ref[:, rows], sin_ref[:, rows]
        keys[rows] = _prepare(k_ref[0, rows].T, tables, head.epsilon)[0].astype(dtype).T
        values[:, rows] = _values(v_ref, embeds, rows)
        q, _ = _prepare(q_ref[0, rows].T, tables, head.epsilon, head.log2_scale)
        queries[start], totals[start] = q.astype(dtype), 0

    def score(start, low):
        return head.dot(keys[pl.ds(low, block)], queries[start], ((1,), (0,)))

    def weigh(start, low, scores):
        weights = _weights(scores, start, low, head).astype(dtype)
        # Rows of ones below the values: their product with the weights is the sum of those.
        v = jnp.concatenate([values[:, pl.ds(low, block)], ones])
        totals[start] += head.dot(v, weights, ((1,), (0,)))
        if low == start:
            rows = pl.ds(start, block)
            total, sums = totals[start][:size], totals[start][size : size + 1]
            out_ref[0, rows] = as_bits((total * (1 / sums)).astype(dtype).T)
            lse_ref[0, 0, :, rows] = jnp.log2(sums)

    _overlap(head, length, prepare, score, weigh, _FORWARD_LEAD)


def _backward_kernel(
    q_ref, k_ref, v_ref, cos_ref, sin_ref, out_ref, cotangent_ref, lse_ref, *refs, head, embeds
):
    """One query head.

    Scratch: prepared keys (L, H) and (H, L); values with their embeds (L, H); gradients of prepared
    keys and of values of all query heads so far, float32 (H, L). The gradients of a kv head stay in
    VMEM until its last query head is done.
    """
    *others, keys, keys_t, values, dk, dv = refs
    embeds, others = others[:embeds], others[embeds:]
    dqkv_ref, dembeds = others[0], others[1:]
    length, size = keys.shape
    dtype, block, group = keys.dtype, head.block, head.group
    member = pl.program_id(2)
    ones = jnp.ones((block, size), dtype)
    last_seen = {low: start for start, low in head.tiles(length)}  # by which block of queries
    # By the first row of a block. Raw: as projected, with 1 / root mean square of each.
    queries, columns, raw_queries, raw_keys, dqs = {}, {}, {}, {}, {}

    def tables(span):
        return cos_ref[:, span], sin_ref[:, span]

    def prepare(start):
        rows = pl.ds(start, block)
        raw = k_ref[0, rows].T
        k, inverse = _prepare(raw, tables(rows), head.epsilon)
        raw_keys[start] = raw, inverse
        keys_t[:, rows] = k.astype(dtype)
        keys[rows] = k.astype(dtype).T
        if embeds:
            values[rows] = _values(v_ref, embeds, rows).T
        raw = q_ref[0, rows].T
        q, inverse = _prepare(raw, tables(rows), head.epsilon, head.log2_scale)
        q, cotangent = q.astype(dtype), cotangent_ref[0, rows]
        along = head.dot(
            ones[:_SUBLANES],
            cotangent * jax.lax.bitcast_convert_type(out_ref[0, rows], dtype),
            ((1,), (1,)),
        )[:1]
        cotangent = cotangent.T
        raw_queries[start], dqs[start] = (raw, inverse), 0
        queries[start] = q, cotangent
        columns[start] = _less(q, lse_ref[0, 0, :, rows]), _less(cotangent, along)

    def score(start, low):
        # The other half of the matrix unit's depth subtracts a number from each column of the
        # product.
        span = pl.ds(low, block)
        v = values[span] if embeds else v_ref[0, span]
        rows = (jnp.concatenate([x, ones], 1) for x in (keys[span], v))
        return [head.dot(x, y, ((1,), (0,))) for x, y in zip(rows, columns[start], strict=True)]

    def write(index, span, columns):
        """Columns (H, block) as rows of part `index` of the kv head's dqkv."""
        dqkv_ref[0, span, index * size : (index + 1) * size] = columns.astype(dtype).T

    def differentiate(start, low, scored):
        scores, grads = scored
        q, cotangent = queries[start]
        span = pl.ds(low, block)
        weights = _weights(scores, start, low, head)
        grads = (weights * grads).astype(dtype)
        first = start == low and (group == 1 or member == 0)
        _accumulate(dv, span, head.dot(cotangent, weights.astype(dtype), ((1,), (1,))), first)
        _accumulate(dk, span, head.dot(q, grads, ((1,), (1,))), first)
        dqs[start] += head.dot(keys_t[:, span], grads, ((1,), (0,)))
        if start == low:
            dq = _prepare_gradient(
                dqs[start], *raw_queries[start], tables(span), head.log2_scale * math.log(2)
            )
            for index in range(group):
                if group > 1:
                    pl.when(member == index)(partial(write, index, span, dq))
                else:
                    write(0, span, dq)
        if start == last_seen[low]:
            grad = _prepare_gradient(dk[:, span], *raw_keys[low], tables(span), math.log(2))
            write(group, span, grad)
            grad = dv[:, span]
            write(group + 1, span, grad)
            _values_gradient(grad, embeds, dembeds, span)

    _overlap(head, length, prepare, score, differentiate, _BACKWARD_LEAD)


def _overlap(head, length, prepare, begin, finish, lead):
    """For each tile finish(start, low, begin(start, low)), begun `lead` tiles early; each block
    prepared a block early.

    The matrix units take up products in the program's order: only those that stand between a
    product and the use of its result keep them busy meanwhile.
    """
    tiles, blocks, begun = head.tiles(length), list(range(0, length, head.block)), []
    for n in range(len(tiles) + lead):
        if n < len(tiles):
            start, low = tiles[n]
            while blocks and blocks[0] <= start + head.block:
                prepare(blocks.pop(0))
            begun.append(begin(start, low))
        if n >= lead:
            finish(*tiles[n - lead], begun.pop(0))


def _values(v_ref, embeds, span):
    """Values (H, rows), with the gated rows of the value embeddings added where there are any."""
    values = v_ref[0, span].T
    if embeds:
        rows_ref, gate_ref = embeds
        rows = rows_ref[0, span].T.astype(jnp.float32)
        values = (values.astype(jnp.float32) + gate_ref[0, 0, :, span] * rows).astype(values.dtype)
    return values


def _values_gradient(grad, embeds, dembeds, span):
    """Writes the gradients of `_values`'s embeds from those of its values, float32 (H, rows)."""
    if embeds:
        (rows_ref, gate_ref), (drows_ref, dgate_ref) = embeds, dembeds
        drows_ref[0, span] = (gate_ref[0, 0, :, span] * grad).astype(drows_ref.dtype).T
        rows = rows_ref[0, span].T.astype(jnp.float32)
        dgate_ref[0, 0, :, span] = jnp.sum(rows * grad, axis=0, keepdims=True)


def _accumulate(total, span, part, first):
    """total[:, span] += part, or = part where `first`: True, False or a traced bool ()."""
    if first is False:
        total[:, span] += part
    elif first is True:
        total[:, span] = part
    else:
        total[:, span] = part + jnp.where(first, 0, total[:, span])


def _prepare(x, tables, epsilon, factor=1.0):
    """Columns x (H, L) rotated, normalized and times `factor`, in float32; and 1 / root mean square
    of each (1, L).
    """
    cos, sin = tables
    x = x.astype(jnp.float32)
    inverse = 1 / jnp.sqrt(jnp.mean(x * x, axis=0, keepdims=True) + epsilon)
    a, b = jnp.split(x, 2)
    rotated = jnp.concatenate([a * cos + b * sin, b * cos - a * sin])
    return rotated * (inverse * factor), inverse


def _prepare_gradient(grad, x, inverse, tables, factor):
    """Gradient of `_prepare`'s x from `factor` times that of its rotated and normalized columns."""
    cos, sin = tables
    a, b = jnp.split(grad, 2)
    grad = jnp.concatenate([a * cos - b * sin, b * cos + a * sin])
    x = x.astype(jnp.float32)
    along = jnp.mean(grad * x, axis=0, keepdims=True) * (inverse * inverse)
    return (grad - x * along) * (inverse * factor)


def _less(x, row):
    """x (H, L) over rows that sum to -row (1, L), (2 x H, L): [y, ones] times it is y times x, less
    `row`.

    Three terms in bfloat16 are as exact as float32.
    """
    rest = jnp.broadcast_to(-row, (_SUBLANES, row.shape[1]))
    index = jax.lax.broadcasted_iota(jnp.int32, rest.shape, 0)
    terms = jnp.zeros_like(rest)
    for n in range(3):
        term = rest.astype(x.dtype).astype(jnp.float32)
        terms = jnp.where(index == n, term, terms)
        rest -= term
    zeros = jnp.zeros((x.shape[0] - _SUBLANES, x.shape[1]), x.dtype)
    return jnp.concatenate([x, terms.astype(x.dtype), zeros])


def _weights(scores, start, low, head):
    """2 ^ scores (keys, queries) of the tile at (start, low), zero where a query does not see a
    key.
    """
    spans = range(0, head.block, _LANES)

    def part(key, query):
        weights = jnp.exp2(scores[key : key + _LANES, query : query + _LANES])
        return _masked(weights, start + query - low - key, head.window)

    return jnp.concatenate(
        [jnp.concatenate([part(key, query) for query in spans], 1) for key in spans], 0
    )


def _masked(weights, ahead, window):
    """Weights whose first query is `ahead` positions, a multiple of their size, ahead of the first
    key.
    """
    size = len(weights)
    if ahead < 0 or ahead - size >= window:
        return jnp.zeros_like(weights)
    key, query = (jax.lax.broadcasted_iota(jnp.int32, weights.shape, axis) for axis in (0, 1))
    distance = query - key
    if ahead == 0:
        weights = jnp.where(distance >= 0, weights, 0)
    if ahead + size - 1 > window:
        weights = jnp.where(distance <= window - ahead, weights, 0)
    return weights


# ---- Around the kernels -------------------------------------------------------------------------


class _Specs(NamedTuple):
    """The blocks that a kernel reads and writes, by (row, kv head, query head of the kv head)."""

    query: pl.BlockSpec
    key: pl.BlockSpec
    value: pl.BlockSpec
    all: pl.BlockSpec
    out: pl.BlockSpec
    sums: pl.BlockSpec
    table: pl.BlockSpec
    rows: pl.BlockSpec
    gate: pl.BlockSpec


def _specs(length, head):
    size, group = head.head_dim, head.group
    parts = group + 2

    def one(index):
        return pl.BlockSpec((1, length, size), index)

    return _Specs(
        query=one(lambda b, k, g: (b, 0, k * parts + g)),
        key=one(lambda b, k, g: (b, 0, k * parts + group)),
        value=one(lambda b, k, g: (b, 0, k * parts + group + 1)),
        all=pl.BlockSpec((1, length, parts * size), lambda b, k, g: (b, 0, k)),
        out=one(lambda b, k, g: (b, 0, k * group + g)),
        sums=pl.BlockSpec((1, 1, 1, length), lambda b, k, g: (b, k * group + g, 0, 0)),
        table=pl.BlockSpec((size // 2, length), lambda b, k, g: (0, 0)),
        rows=one(lambda b, k, g: (b, 0, k)),
        gate=pl.BlockSpec((1, 1, 1, length), lambda b, k, g: (b, k, 0, 0)),
    )


def _parameters():
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT_BYTES
    )


def _cost(qkv, head, products, arrays):
    """FLOPs and exponentials of all tiles that are computed, masked scores included; bytes of
    `arrays` like queries.
    """
    batch, length, size, grid = head.shape_of(qkv)
    scores = math.prod(grid) * len(head.tiles(length)) * head.block**2
    return pl.CostEstimate(
        flops=2 * products * scores * size,
        transcendentals=scores,
        bytes_accessed=arrays * math.prod(grid) * length * size * qkv.dtype.itemsize,
    )

"""The KV cache: keys and values of the tokens that each layer can still see, written and attended
to.

A sequence lives in one slot of the cache. A layer with window w sees w + 1 positions, so it keeps
that many per slot, as a ring buffer: position p is stored at index p mod (w + 1). The buffer is
split into blocks along its positions, so that a decode step reads only the blocks that are in use.

Legend: B slots, R prompts, L length, K kv_heads, G query heads per kv head, H head_dim, S positions
of a block.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from MaxNano.distributed import sharding
from MaxNano.models import attention

LayerCache = tuple[tuple[jax.Array, jax.Array], ...]
"""A layer's blocks of keys and values, each (B, K, S, H)."""
KVCache = tuple[LayerCache, ...]
"""The cache of every layer."""

_AXES = ("activation_batch", "activation_heads", None, None)


class CacheLayout(NamedTuple):
    """How the cache is split and read."""

    max_length: int  # tokens of the longest sequence
    block: int  # about how many positions are read at a time
    by_head: bool  # the keys and values of a single slot are written head by head
    query_rows: int  # the query heads of a kv head are padded to a multiple of this

    def size(self, window: int) -> int:
        """Positions that a layer with a window keeps per slot: all it can see, the newest included."""
        return min(window + 1, self.max_length)

    def spans(self, window: int) -> list[tuple[int, int]]:
        """(first, end) positions of each block of a layer with a window."""
        size = self.size(window)
        number = max(1, round(size / self.block))
        length = -(-size // number)
        return [(start, min(start + length, size)) for start in range(0, size, length)]


def cache_shapes(
    layout: CacheLayout,
    windows: Sequence[int],
    shape: tuple[int, int, int],
    dtype: str,
    mesh: Mesh,
    rules: sharding.Rules,
) -> KVCache:
    """The cache as abstract arrays with shardings; `shape`: slots, kv heads and head_dim."""
    slots, kv_heads, head_dim = shape

    def block(length):
        block_shape = (slots, kv_heads, length, head_dim)
        placed = sharding.named_sharding(mesh, block_shape, _AXES, rules)
        return (jax.ShapeDtypeStruct(block_shape, dtype, sharding=placed),) * 2

    return tuple(
        tuple(block(end - start) for start, end in layout.spans(window)) for window in windows
    )


# ---- Prefill ------------------------------------------------------------------------------------


def prompt_cache(
    layout: CacheLayout, k: jax.Array, v: jax.Array, window: int, lengths: jax.Array
) -> LayerCache:
    """The part of a layer's cache that prompts fill: blocks (R, K, up to S, H); the last may be empty.

    k, v (R, K, L, H): keys and values of prompts of `lengths` (R,), padded at the end.
    """
    size = layout.size(window)

    def split(x):
        x = _last_positions(x, lengths, size)
        starts = [min(start, x.shape[-2]) for start, _ in layout.spans(window)]
        return jnp.split(x, starts[1:], axis=-2)

    return tuple(zip(split(k), split(v), strict=True))


def _last_positions(x, lengths, size):
    """The last `size` positions of x (R, K, L, H) before `lengths` (R,), each at its index mod
    `size`.
    """
    if x.shape[2] <= size:
        return x
    last = lengths[:, None] - 1
    positions = last - (last - jnp.arange(size)) % size
    return jnp.take_along_axis(x, jnp.maximum(positions, 0)[:, None, :, None], axis=2)


def copy_to_slots(
    cache: KVCache, prompts: KVCache, rows: jax.Array, slots: jax.Array, count: jax.Array | int
) -> KVCache:
    """The cache after prompt rows[i] is written to slots[i], for i < count; rows, slots (B,)."""

    def copy(i, cache):
        def put(block, new):
            row = jax.lax.dynamic_slice_in_dim(new, rows[i], 1)
            return jax.lax.dynamic_update_slice(block, row, (slots[i], 0, 0, 0))

        return jax.tree.map(put, cache, prompts)

    return jax.lax.fori_loop(0, count, copy, cache)


# ---- Prefill after a prefix ---------------------------------------------------------------------


def attend_after(
    layout: CacheLayout,
    q: jax.Array,
    cache: LayerCache,
    new: tuple[jax.Array, jax.Array],
    window: int,
    start: jax.Array,
) -> jax.Array:
    """Attention of tokens over a slot's `start` () cached positions and over each other, as q.

    q (1, N, L, H) at positions start, start + 1, ...; new: their keys and values (1, K, L, H).
    """
    size, length = layout.size(window), q.shape[2]
    k, v = (jnp.concatenate([*parts], axis=2) for parts in zip(*cache, new, strict=True))
    queries = start + jnp.arange(length)
    keys = jnp.concatenate([_stored_positions(start, size), queries])
    distance = queries[:, None] - keys
    return attention.masked(q, k, v, (keys >= 0) & (distance >= 0) & (distance <= window))


def append(
    layout: CacheLayout,
    cache: LayerCache,
    new: tuple[jax.Array, jax.Array],
    window: int,
    start: jax.Array,
    count: jax.Array,
) -> LayerCache:
    """A slot's cache of `start` () positions with the first `count` () of the keys and values (1, K,
    L, H) that follow.
    """
    stored = _stored_positions(start + count, layout.size(window))
    blocks = []
    for (first, end), block in zip(layout.spans(window), cache, strict=True):
        index = stored[first:end] - start
        is_new = (index >= 0)[:, None]
        index = jnp.clip(index, 0, new[0].shape[2] - 1)
        blocks.append(
            tuple(
                jnp.where(is_new, jnp.take(made, index, axis=2), old)
                for made, old in zip(new, block, strict=True)
            )
        )
    return tuple(blocks)


def _stored_positions(count, size):
    """The position at each index (size,) after `count` positions are stored; negative: none."""
    last = count - 1
    return last - (last - jnp.arange(size)) % size


# ---- Decode -------------------------------------------------------------------------------------


def store(
    layout: CacheLayout,
    cache: LayerCache,
    new: tuple[jax.Array, jax.Array],
    window: int,
    positions: jax.Array,
) -> LayerCache:
    """A layer's cache with one token per slot: its key and value (B, K, H), at positions (B,)."""
    slots = jnp.arange(len(positions))
    index = positions % layout.size(window)
    blocks = []
    for (start, end), block in zip(layout.spans(window), cache, strict=True):
        local = jnp.clip(index, start, end - 1) - start
        if layout.by_head and len(positions) == 1:
            # A single update becomes a dynamic slice update, which the CPU's compiler fuses twice,
            # copying the whole buffer.
            where = (slots[:, None], jnp.arange(block[0].shape[1]), local[:, None])
        else:
            where = (slots, slice(None), local)
        rows = new
        if len(cache) > 1:
            # A token of another block writes back what is stored here: then nothing is copied.
            is_here = ((index >= start) & (index < end))[:, None, None]
            rows = [jnp.where(is_here, row, x[where]) for x, row in zip(block, new, strict=True)]
        blocks.append(
            tuple(
                x.at[where].set(row, unique_indices=True, mode="promise_in_bounds")
                for x, row in zip(block, rows, strict=True)
            )
        )
    return tuple(blocks)


def attend(
    layout: CacheLayout,
    q: jax.Array,
    cache: LayerCache,
    window: int,
    positions: jax.Array,
    reads_all: bool,
) -> jax.Array:
    """Attention of one query per slot, q (B, K, G, H) at positions (B,), over a layer's cache.

    Blocks after the longest sequence are skipped, unless `reads_all`. A block without visible
    positions leaves a slot's numbers unchanged bit for bit, so a slot's result does not depend on
    other slots.
    """
    seen = jnp.minimum(positions + 1, layout.size(window))[:, None, None, None]
    heads = q.shape[2]
    q = jnp.pad(q, ((0, 0), (0, 0), (0, -heads % layout.query_rows), (0, 0)))

    def part(block, start, highest=-jnp.inf):
        """The highest score so far, and the sums of weights and of weighted values of this block."""
        keys, values = block
        scores = jnp.einsum("BKGH,BKSH->BKGS", q, keys, preferred_element_type=jnp.float32)
        scores = scores * q.shape[-1] ** -0.5
        scores = jnp.where(start + jnp.arange(keys.shape[2]) < seen, scores, -jnp.inf)
        higher = jnp.maximum(highest, jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.exp(scores - higher)
        out = jnp.einsum(
            "BKGS,BKSH->BKGH",
            weights.astype(values.dtype),
            values,
            preferred_element_type=jnp.float32,
        )
        return higher, jnp.sum(weights, axis=-1, keepdims=True), out

    def add(carry, block, start):
        highest, total, out = carry
        higher, block_total, block_out = part(block, start, highest)
        fade = jnp.exp(highest - higher)
        return higher, total * fade + block_total, out * fade + block_out

    (_, *later_spans), (first, *later) = layout.spans(window), cache
    carry = part(first, 0)
    for (start, _), block in zip(later_spans, later, strict=True):
        if reads_all:
            carry = add(carry, block, start)
        else:
            is_used = jnp.max(seen) > start
            carry = jax.lax.cond(
                is_used, partial(add, start=start), lambda carry, _: carry, carry, block
            )
    _, total, out = carry
    return (out / total)[:, :, :heads].astype(q.dtype)

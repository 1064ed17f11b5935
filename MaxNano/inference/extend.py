"""Prefill after a prefix: a slot gets a copy of earlier keys and values, and tokens after them.

prefix_cache.py decides which; the copies are in a second, smaller KV cache, the store.

Legend: L length, C tokens of a chunk, K kv_heads, H head_dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from MaxNano.inference import decode, kv_cache
from MaxNano.inference.kv_cache import KVCache
from MaxNano.inference.weights import Weights
from MaxNano.models import attention, transformer
from MaxNano.models.layers import rms_norm, row_major
from MaxNano.models.transformer import Stack

CHUNK = 128  # tokens that are computed at a time after a prefix


class Work(NamedTuple):
    """What a shard does in one call, int32 (): nothing unless is_active."""

    is_active: jax.Array
    entry: jax.Array  # of the store
    slot: jax.Array
    start: jax.Array  # tokens of the prefix
    count: jax.Array  # tokens after it


def save(store: KVCache, cache: KVCache, work: jax.Array) -> KVCache:
    """The store with a slot's part of the cache at an entry; work (1, 5) is a Work."""
    work = Work(*work[0])
    return kv_cache.copy_to_slots(store, cache, work.slot[None], work.entry[None], work.is_active)


def extend(
    plan: decode.Plan,
    weights: Weights,
    cache: KVCache,
    store: KVCache,
    work: jax.Array,
    tokens: jax.Array,
) -> KVCache:
    """The cache with a prefix of the store in a slot, and after it the keys and values of tokens.

    work (1, 5) is a Work; tokens (1, C x n + 1): the token before the first, then work.count ones.
    """
    work, tokens = Work(*work[0]), tokens[0]
    size = min(CHUNK, plan.max_length)
    row = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, work.entry, 1), store)

    def chunk(carry):
        done, row = carry
        part = jax.lax.dynamic_slice_in_dim(tokens, done, size + 1)
        count = jnp.minimum(size, work.count - done)
        return done + size, _extend_by_chunk(plan, weights, row, part, work.start + done, count)

    count = work.count * work.is_active
    _, row = jax.lax.while_loop(lambda carry: carry[0] < count, chunk, (jnp.int32(0), row))
    return kv_cache.copy_to_slots(
        cache, row, jnp.zeros(1, jnp.int32), work.slot[None], work.is_active
    )


def _extend_by_chunk(plan, weights, row, tokens, start, count):
    """One slot's cache of `start` positions with the next `count` tokens; tokens (C + 1,): the
    token before them, then the tokens, padded.
    """
    length = len(tokens) - 1
    positions = start + jnp.arange(length)
    rotary = tuple(table[positions] for table in weights["rotary"])  # clamped for padding

    def attend(qkv, value_embed, kind, index):
        qkv, value_embed = transformer.split_rows(row_major(qkv), value_embed, length)
        q, k, v = attention.split_heads(qkv, rotary, value_embed, plan.heads)
        y = kv_cache.attend_after(plan.cache, q, row[index], (k, v), kind.window, start)
        made = kv_cache.append(plan.cache, row[index], (k, v), kind.window, start, count)
        return y.swapaxes(1, 2).reshape(length, -1), made

    def embed_previous(x):
        return rms_norm(weights["token_embed"][tokens[:-1]], plan.config.norm_epsilon)

    context = decode.make_context(plan, tokens[1:], positions, attend, embed_previous)
    stack = Stack(plan.kinds, decode.unrolled_layers(plan, weights))
    _, made = transformer.forward(plan.config, weights, stack, context)
    return made

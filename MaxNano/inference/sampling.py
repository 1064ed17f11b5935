"""Sampling tokens from logits: temperature, top-k, top-p, min-p, penalties, logit bias, masks,
log-probabilities.

A token depends only on the logits, settings and random number of its row, not on the rest of the
batch.

Legend: B rows, V vocab.
"""

import jax
import jax.numpy as jnp

LARGEST_LOGPROBS = 20  # most alternatives that can be reported per token
SMALLEST_TEMPERATURE = 1e-4  # float32 does not resolve smaller ones; 0 is greedy
MASK_BITS = 32  # tokens in a word of the mask of a grammar

_SPAN = 64  # tokens whose probabilities are summed before the cumulative sum
_BITS = 32


def penalize(logits: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    """Logits (B, V) with those of `seen` (B, V) tokens reduced by penalty (B,).

    A positive logit is divided by the penalty, a negative one multiplied. Source: Keskar et al.
    2019, CTRL (https://arxiv.org/abs/1909.05858), as in vLLM and transformers.
    """
    penalty = penalty[:, None]
    lower = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(seen, lower, logits)


def penalize_counts(
    logits: jax.Array, counts: jax.Array, frequency: jax.Array, presence: jax.Array
) -> jax.Array:
    """Logits (B, V) minus frequency (B,) per time that a token was sampled, counts (B, V), and
    minus presence (B,) if it was sampled at all. Source: OpenAI's API reference.
    """
    counts = counts.astype(logits.dtype)
    return logits - frequency[:, None] * counts - presence[:, None] * (counts > 0)


def count_tokens(tokens: jax.Array, size: int) -> jax.Array:
    """How often each of `size` token ids occurs in tokens (B, N): (B, size) int32; -1 is no token."""
    return add_at(jnp.zeros((len(tokens), size), jnp.int32), tokens, jnp.int32(1))


def add_at(x: jax.Array, tokens: jax.Array, values: jax.Array) -> jax.Array:
    """x (B, V) with values (B, N) or () added at tokens (B, N); -1 is no token."""
    rows = jnp.arange(len(x))[:, None]
    return x.at[rows, jnp.where(tokens < 0, x.shape[1], tokens)].add(values, mode="drop")


def permit(logits: jax.Array, allowed: jax.Array) -> jax.Array:
    """Logits (B, V), -inf for tokens that are not in `allowed` (B, W) int32: bit t % 32 of word
    t // 32 is token t. Tokens after the last word are not allowed.
    """
    tokens = jnp.arange(allowed.shape[1] * MASK_BITS)
    bits = (allowed[:, tokens // MASK_BITS] >> (tokens % MASK_BITS)) & 1
    size = logits.shape[1]
    bits = jnp.pad(bits, ((0, 0), (0, max(0, size - bits.shape[1]))))[:, :size]
    return jnp.where(bits == 1, logits, -jnp.inf)


def likeliest(logits: jax.Array) -> jax.Array:
    """The first token (B,) with the highest logit (B, V)."""
    # Two plain reductions, which compilers vectorize; they do not vectorize an argmax.
    tokens = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    highest = jnp.max(logits, axis=1, keepdims=True)
    return jnp.min(jnp.where(logits == highest, tokens, logits.shape[1] - 1), axis=1)


def scale(logits: jax.Array, temperature: jax.Array) -> jax.Array:
    """Logits (B, V) divided by temperature (B,) and shifted so that the highest of each row is 0."""
    scores = logits / jnp.maximum(temperature, SMALLEST_TEMPERATURE)[:, None]
    return scores - jnp.max(scores, axis=1, keepdims=True)


def lowest_kept(scores: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """The lowest score (B,) that top-k, and then top-p among the rest, keep; equal scores stay
    together.

    scores (B, V); top_k (B,), 0 keeps all; top_p (B,), 1 keeps all, else the fewest of the
    likeliest tokens whose probability is at least top_p. The bits of the score are bisected, which
    needs no sort and does not limit k.
    """
    order = _ordered_bits(scores)
    every = jnp.min(order, axis=1)
    size = scores.shape[1]
    wanted = jnp.where(top_k > 0, jnp.minimum(top_k, size), size)
    by_count = _largest(every, order, lambda t: jnp.sum(order >= t[:, None], axis=1) >= wanted)
    mass = jnp.where(order >= by_count[:, None], jnp.exp(scores), 0)
    enough = top_p * jnp.sum(mass, axis=1)
    by_mass = _largest(
        by_count,
        order,
        lambda t: jnp.sum(jnp.where(order >= t[:, None], mass, 0), axis=1) >= enough,
    )
    bits = jnp.where(top_p < 1, by_mass, by_count)
    return _float_of(jnp.where((top_k > 0) | (top_p < 1), bits, every))


def draw(scores: jax.Array, uniform: jax.Array) -> jax.Array:
    """Tokens (B,) with probability proportional to exp(scores) (B, V), from random numbers uniform
    (B,).

    The cumulative sum is inverted at `uniform`, in [0, 1 - 2^-23]: one random number per token, and
    two short cumulative sums instead of a long one.
    """
    rows, size = scores.shape
    mass = jnp.exp(jnp.pad(scores, ((0, 0), (0, -size % _SPAN)), constant_values=-jnp.inf))
    mass = mass.reshape(rows, -1, _SPAN)
    sums = jnp.sum(mass, axis=2)
    ends = jnp.cumsum(sums, axis=1)
    aim = uniform * ends[:, -1]
    span = _first(ends > aim[:, None], sums > 0)
    before = jnp.where(span > 0, _at(ends, jnp.maximum(span - 1, 0)), 0)
    within = jnp.take_along_axis(mass, span[:, None, None], axis=1)[:, 0]
    token = _first(jnp.cumsum(within, axis=1) > (aim - before)[:, None], within > 0)
    return span * _SPAN + token


def _first(passed, possible):
    """Index (B,) of the first possible entry (B, M) that is passed; the last possible one if
    rounding passes none.
    """
    index = jnp.arange(possible.shape[1], dtype=jnp.int32)
    last = jnp.max(jnp.where(possible, index, 0), axis=1)
    return jnp.min(jnp.where(passed & possible, index, last[:, None]), axis=1)


def log_probabilities(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Log-probability (B,) in nats of tokens (B,) under logits (B, V)."""
    return _at(logits, tokens) - jax.nn.logsumexp(logits, axis=1)


def alternatives(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The likeliest tokens after logits (B, V): log-probabilities and ids, each (B,
    LARGEST_LOGPROBS).
    """
    count = min(LARGEST_LOGPROBS, logits.shape[1])
    values, tokens = jax.lax.top_k(logits, count)
    padding = ((0, 0), (0, LARGEST_LOGPROBS - count))
    values = values - jax.nn.logsumexp(logits, axis=1)[:, None]
    values = jnp.pad(values, padding, constant_values=-jnp.inf)
    return values, jnp.pad(tokens.astype(jnp.int32), padding)


def _at(x, index):
    """x (B, M) at index (B,)."""
    return jnp.take_along_axis(x, index[:, None], axis=1)[:, 0]


def _ordered_bits(x):
    """float32 -> int32 in the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return bits ^ ((bits >> (_BITS - 1)) & 0x7FFFFFFF)


def _float_of(order):
    """The inverse of _ordered_bits."""
    bits = order ^ ((order >> (_BITS - 1)) & 0x7FFFFFFF)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _largest(low, order, holds):
    """The largest t (B,) for which holds(t), between `low`, which holds, and the highest of `order`
    (B, V).
    """

    def halve(_, ends):
        low, high = ends
        middle = (low | high) - ((low ^ high) >> 1)  # the mean, rounded up, without overflow
        kept = holds(middle)
        return jnp.where(kept, middle, low), jnp.where(kept, high, middle - 1)

    return jax.lax.fori_loop(0, _BITS, halve, (low, jnp.max(order, axis=1)))[0]

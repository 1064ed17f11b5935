"""Soft-capped cross-entropy straight from hidden states, chunked over the vocabulary.

Legend: B batch, L length, T tokens (B x L), D embed, V vocab.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

# By default a vocabulary of up to this size is scored at once, a larger one in chunks of this size.
LARGEST_CHUNK = 8192
# With a soft cap a TPU's compiler writes no float32 scores, so a larger vocabulary is scored at once.
LARGEST_WHOLE_ON_TPU = 32768


def soft_cap(logits: jax.Array, cap: float) -> jax.Array:
    """cap x tanh(logits / cap); a cap of 0 is off."""
    return cap * jnp.tanh(logits / cap) if cap else logits


@jax.named_scope("head")
def logits(hidden: jax.Array, rows: jax.Array, cap: float) -> jax.Array:
    """Soft-capped float32 logits (..., V) of hidden states (..., D) for head rows (V, D)."""
    rows = rows.astype(hidden.dtype)
    product = jnp.einsum("...D,VD->...V", hidden, rows, preferred_element_type=jnp.float32)
    return soft_cap(product, cap)


def vocab_chunk(vocab_size: int, cap: float, chunk: int | None, backend: str) -> int:
    """Vocabulary rows per chunk for a value of `vocab_chunk_size`, 0 for all at once, which null
    means for a small vocabulary.
    """
    if chunk is None:
        whole = LARGEST_WHOLE_ON_TPU if cap and backend == "tpu" else LARGEST_CHUNK
        return 0 if vocab_size <= whole else LARGEST_CHUNK
    return min(chunk, vocab_size)


def token_losses(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, vocab_size: int, cap: float, chunk: int
) -> jax.Array:
    """Negative log-likelihood of each target in nats, float32 (B, L), 0 where the target is -1.

    hidden (B, L, D); head (padded V, D); rows from `vocab_size` on are padding; targets (B, L)
    int32. `chunk` vocabulary rows are scored at a time, and again in the backward pass, so that no
    (B, L, V) array exists; 0 scores all at once and keeps the logits' gradients, without each
    token's factor, in the dtype of `hidden`.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    return _token_losses(flat, head, targets.reshape(-1), vocab_size, cap, chunk).reshape(
        targets.shape
    )


def clipped_policy_losses(
    losses: jax.Array, drawn: jax.Array, weights: jax.Array, clip: float
) -> jax.Array:
    """PPO's clipped surrogate loss of each token, with ratios clipped to 1 +- clip.

    losses: negative log-probabilities under the current policy; drawn: those under the policy that
    sampled the tokens, nan where unknown, which makes the ratio 1; weights: advantages. At a ratio
    of 1 the gradient is that of losses x weights. Source: https://arxiv.org/abs/1707.06347 (PPO).
    """
    ratio = jnp.exp(jnp.where(jnp.isnan(drawn), jax.lax.stop_gradient(losses), drawn) - losses)
    return -jnp.minimum(ratio * weights, jnp.clip(ratio, 1 - clip, 1 + clip) * weights)


def divergence(losses: jax.Array, reference: jax.Array) -> jax.Array:
    """An estimate of the KL divergence from a reference model at each sampled token, in nats, at
    least 0.

    losses, reference: the token's negative log-probabilities under the two models.
    Source: http://joschu.net/blog/kl-approx.html (its k3).
    """
    log_ratio = losses - reference
    return jnp.exp(log_ratio) - log_ratio - 1


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _token_losses(hidden, head, targets, vocab_size, cap, chunk):
    """token_losses for hidden (T, D) and targets (T,)."""
    return _forward(hidden, head, targets, vocab_size, cap, chunk)[0]


class _Sums(NamedTuple):
    """Running sums of every token (T,) over the vocabulary rows scored so far."""

    highest: jax.Array  # what scores are below: the soft cap, or the highest score so far
    total: jax.Array  # sum of exp(score - highest)
    at_target: jax.Array  # the target's score


def _forward(hidden, head, targets, vocab_size, cap, chunk):
    keeps = not 0 < chunk < vocab_size

    def add(sums, start, rows):
        scores = logits(hidden, rows, cap)
        highest, total = sums.highest, sums.total
        if not cap:
            highest = jnp.maximum(highest, jnp.max(scores, axis=-1))
            total *= jnp.exp(sums.highest - highest)
        exps = jnp.exp(scores - highest[:, None])
        at_target = jnp.sum(jnp.where(_is_target(targets, start, scores), scores, 0), axis=-1)
        total += jnp.sum(exps, axis=-1)
        kept = (exps * _slope(scores, cap)).astype(hidden.dtype) if keeps else None
        kept = jax.lax.optimization_barrier(kept)  # or the compiler keeps more: float32 scores
        return _Sums(highest, total, sums.at_target + at_target), kept

    zeros = jnp.zeros(targets.shape, jnp.float32)
    sums = _Sums(zeros + (cap or -jnp.inf), zeros, zeros)
    for starts, rows in _parts(head, vocab_size, chunk):
        sums, kept = _each(lambda sums, x: add(sums, *x), sums, (starts, rows))
    losses = jnp.where(targets >= 0, jnp.log(sums.total) + sums.highest - sums.at_target, 0)
    return losses, (hidden, head, targets, sums, kept)


def _slope(scores, cap):
    """The derivative of soft_cap, from its result."""
    return 1 - jnp.square(scores / cap) if cap else 1


def _is_target(targets, start, scores):
    """Whether a score (T, V') is that of its token's target; `start`: the id of the first."""
    return targets[:, None] - start == jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)


def _backward(vocab_size, cap, chunk, residuals, cotangent):
    hidden, head, targets, sums, kept = residuals
    scale = jnp.where(targets >= 0, cotangent, 0)
    share = scale / sums.total
    # From the float32 score, so that what is kept, less exact, may be near 1.
    target_share = jnp.exp(sums.at_target - sums.highest) / sums.total
    at_target = (target_share - 1) * _slope(sums.at_target, cap) * scale

    def add(grad_hidden, start, rows):
        rows, grad = rows.astype(hidden.dtype), kept
        if kept is None:
            scores = logits(hidden, rows, cap)
            grad = jnp.exp(scores - sums.highest[:, None]) * _slope(scores, cap)
        grad = grad.astype(jnp.float32) * share[:, None]
        grad = jnp.where(_is_target(targets, start, grad), at_target[:, None], grad)
        grad = grad.astype(hidden.dtype)
        with jax.named_scope("head"):
            grad_hidden += jnp.einsum("TV,VD->TD", grad, rows, preferred_element_type=jnp.float32)
            grad_rows = jnp.einsum("TV,TD->VD", grad, hidden, preferred_element_type=jnp.float32)
        return grad_hidden, grad_rows.astype(head.dtype)

    grad_hidden, grad_head = jnp.zeros(hidden.shape, jnp.float32), []
    for starts, rows in _parts(head, vocab_size, chunk):
        grad_hidden, grad_rows = _each(lambda total, x: add(total, *x), grad_hidden, (starts, rows))
        grad_head.append(grad_rows.reshape(-1, head.shape[1]))
    padding = jnp.zeros((head.shape[0] - vocab_size, head.shape[1]), head.dtype)
    return grad_hidden.astype(hidden.dtype), jnp.concatenate([*grad_head, padding]), None


def _parts(head, vocab_size, chunk):
    """(first ids (n,), rows of the head (n, V', D)) of all equal chunks; then of the rest, if any."""
    chunk = min(chunk or vocab_size, vocab_size)
    number, rest = divmod(vocab_size, chunk)
    whole = number * chunk
    parts = [(chunk * jnp.arange(number), head[:whole].reshape(number, chunk, -1))]
    if rest:
        parts.append((jnp.asarray([whole]), head[None, whole:vocab_size]))
    return parts


def _each(function, carry, arrays):
    """lax.scan over the leading axis, or a plain call if its size is 1."""
    if len(arrays[0]) > 1:
        return jax.lax.scan(function, carry, arrays)
    return function(carry, tuple(x[0] for x in arrays))


_token_losses.defvjp(_forward, _backward)

"""Soft-capped cross-entropy straight from hidden states, chunked over the vocabulary.

Legend: B batch, L length, T tokens (B x L), D embed, V vocab.
"""

from functools import partial

import jax
import jax.numpy as jnp

WHOLE_VOCAB = 8192  # the largest vocabulary, and the largest part of one, that is scored at once by default


def soft_cap(logits: jax.Array, cap: float) -> jax.Array:
    """cap x tanh(logits / cap); cap 0 leaves them alone."""
    return cap * jnp.tanh(logits / cap) if cap else logits


def vocab_chunk(vocab_size: int, chunk: int | None) -> int:
    """Vocabulary rows at a time that `vocab_chunk_size` means; null keeps a small vocabulary whole."""
    if chunk is None:
        return 0 if vocab_size <= WHOLE_VOCAB else WHOLE_VOCAB
    return min(chunk, vocab_size)


def token_losses(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, vocab_size: int, cap: float, chunk: int
) -> jax.Array:
    """Negative log-likelihood of each target in nats, float32 (B, L), 0 where the target is -1.

    hidden (B, L, D); head (padded V, D), of which the first `vocab_size` rows count; targets (B, L) int32.
    `chunk` vocabulary rows are scored at a time and scored again in the backward pass, so that no (B, L, V)
    array lives; 0 scores all at once and keeps the logits instead.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    return _token_losses(flat, head, targets.reshape(-1), vocab_size, cap, chunk).reshape(targets.shape)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _token_losses(hidden, head, targets, vocab_size, cap, chunk):
    """The same for hidden (T, D) and targets (T,)."""
    return _forward(hidden, head, targets, vocab_size, cap, chunk)[0]


def _spans(vocab_size: int, chunk: int) -> list[tuple[int, int]]:
    chunk = chunk or vocab_size
    return [(start, min(start + chunk, vocab_size)) for start in range(0, vocab_size, chunk)]


def _logits(hidden, rows, cap):
    """Capped float32 logits of some vocabulary rows (V', D): the product in hidden's dtype, summed in float32."""
    logits = jnp.einsum(
        "TD,VD->TV", hidden, rows.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
    return soft_cap(logits, cap)


def _forward(hidden, head, targets, vocab_size, cap, chunk):
    spans = _spans(vocab_size, chunk)
    highest = jnp.full(targets.shape, -jnp.inf)
    total = jnp.zeros(targets.shape)
    at_target = jnp.zeros(targets.shape)
    for start, stop in spans:
        logits = _logits(hidden, head[start:stop], cap)
        # A soft cap bounds the logits, so its value is a safe shift and no maximum need be found.
        if cap:
            total += jnp.sum(jnp.exp(logits - cap), axis=-1)
        else:
            raised = jnp.maximum(highest, jnp.max(logits, axis=-1))
            total *= jnp.exp(highest - raised)
            total += jnp.sum(jnp.exp(logits - raised[..., None]), axis=-1)
            highest = raised
        inside = (targets >= start) & (targets < stop)
        index = jnp.where(inside, targets - start, 0)
        picked = jnp.take_along_axis(logits, index[..., None], axis=-1)[..., 0]
        at_target += jnp.where(inside, picked, 0)
    log_total = jnp.log(total) + (cap if cap else highest)
    losses = jnp.where(targets >= 0, log_total - at_target, 0)
    kept = logits if len(spans) == 1 else None
    return losses, (hidden, head, targets, log_total, kept)


def _backward(vocab_size, cap, chunk, residuals, cotangent):
    hidden, head, targets, log_total, kept = residuals
    scale = jnp.where(targets >= 0, cotangent, 0)[..., None]
    grad_hidden = jnp.zeros(hidden.shape, jnp.float32)
    grad_rows = []
    for start, stop in _spans(vocab_size, chunk):
        rows = head[start:stop].astype(hidden.dtype)
        logits = _logits(hidden, rows, cap) if kept is None else kept
        hot = targets[..., None] - start == jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        grad = (jnp.exp(logits - log_total[..., None]) - hot) * scale
        if cap:
            grad *= 1 - jnp.square(logits / cap)
        grad = grad.astype(hidden.dtype)
        grad_hidden += jnp.einsum(
            "TV,VD->TD", grad, rows, preferred_element_type=jnp.float32
        )
        grad_rows.append(
            jnp.einsum("TV,TD->VD", grad, hidden, preferred_element_type=jnp.float32)
        )
    padding = jnp.zeros((head.shape[0] - vocab_size, head.shape[1]), jnp.float32)
    grad_head = jnp.concatenate([*grad_rows, padding]).astype(head.dtype)
    return grad_hidden.astype(hidden.dtype), grad_head, None


_token_losses.defvjp(_forward, _backward)

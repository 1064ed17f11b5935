"""The loss is soft-capped cross-entropy, however many vocabulary rows are scored at a time."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from MaxNano.models.losses import soft_cap, token_losses, vocab_chunk

VOCAB, PADDED = 50, 64


def problem():
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = 3 * jax.random.normal(keys[0], (2, 7, 16))
    head = 3 * jax.random.normal(keys[1], (PADDED, 16))
    targets = jax.random.randint(keys[2], (2, 7), 0, VOCAB).at[0, :3].set(-1)
    return hidden, head, targets


def plain(hidden, head, targets, cap):
    """The definition, differentiated by JAX."""
    logits = soft_cap(hidden @ head[:VOCAB].T, cap)
    log_probabilities = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_probabilities, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
    return jnp.where(targets >= 0, -picked, 0)


@pytest.mark.parametrize("cap", [15.0, 2.0, 0.0])
@pytest.mark.parametrize("chunk", [0, 50, 16, 7, 1000])
def test_equals_the_definition(cap, chunk):
    hidden, head, targets = problem()
    weights = jax.random.normal(jax.random.key(3), targets.shape)

    def total(function):
        def weighted(hidden, head):
            losses = function(hidden, head)
            return jnp.sum(losses * weights), losses

        # As programs are compiled: without optimization, tanh is less exact near the cap.
        options = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
        gradient = jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True)
        return jax.jit(gradient, compiler_options=options)(hidden, head)

    (_, losses), grads = total(lambda h, w: token_losses(h, w, targets, VOCAB, cap, chunk))
    (_, expected), expected_grads = total(lambda h, w: plain(h, w, targets, cap))
    np.testing.assert_allclose(losses, expected, atol=2e-5)
    for got, want in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    assert not np.any(grads[1][VOCAB:]), "padded rows learn nothing"
    assert not np.any(losses[0, :3]) and not np.any(grads[0][0, :3]), "ignored targets are ignored"


def gradient_in_bfloat16(chunk, scale):
    """Gradients of the mean loss whose hidden states and head are bfloat16, and the exact ones."""
    hidden, head, targets = problem()
    hidden, head = (scale * x.astype(jnp.bfloat16) for x in (hidden, head))

    def mean(hidden, head, function):
        return jnp.mean(function(hidden, head))

    def scored(hidden, head):
        return token_losses(hidden, head, targets, VOCAB, 15.0, chunk)

    gradient = jax.grad(mean, argnums=(0, 1))
    exact = gradient(
        *(x.astype(jnp.float32) for x in (hidden, head)), lambda h, w: plain(h, w, targets, 15.0)
    )
    return gradient(hidden, head, scored), exact


@pytest.mark.parametrize("chunk", [0, 16])
@pytest.mark.parametrize("scale", [0.3, 1])
def test_gradients_in_bfloat16_are_as_exact_as_bfloat16(chunk, scale):
    """Also of tokens whose target is nearly certain: scores of up to 15."""
    for got, exact in zip(*gradient_in_bfloat16(chunk, scale), strict=True):
        error = np.linalg.norm(got.astype(np.float32) - exact) / np.linalg.norm(exact)
        assert 0 < error < 2**-8, error


def test_a_certain_tokens_gradient_is_exact_in_bfloat16():
    """What is kept of a score is rounded; a target's gradient, share - 1, is not taken from it."""
    targets = jnp.arange(VOCAB)[None]
    head = jnp.eye(PADDED, dtype=jnp.bfloat16)
    hidden = 12 * head[None, :VOCAB]

    def total(hidden):
        return jnp.sum(token_losses(hidden, head, targets, VOCAB, 0.0, 0))

    certain = jax.grad(total)(hidden).astype(jnp.float32)
    others = (VOCAB - 1) / (VOCAB - 1 + np.exp(12))
    np.testing.assert_allclose(np.diagonal(certain[0]), -others, rtol=0.01)


def test_large_logits_without_a_cap_stay_finite():
    hidden, head, targets = problem()
    losses = token_losses(1e3 * hidden, head, targets, VOCAB, 0.0, 16)
    np.testing.assert_allclose(losses, plain(1e3 * hidden, head, targets, 0.0), rtol=1e-5)


def test_chunks_leave_no_array_of_the_whole_vocabulary():
    hidden, head, targets = problem()

    def total(hidden, head):
        return jnp.sum(token_losses(hidden, head, targets, VOCAB, 15.0, 10))

    text = jax.jit(jax.grad(total, argnums=(0, 1))).lower(hidden, head).as_text()
    assert "14x10x" in text and "14x50x" not in text


def test_the_whole_vocabulary_is_kept_in_the_compute_dtype():
    """One array as large as the logits, from which two products follow the first; a forward pass
    alone keeps none.
    """
    hidden, head, targets = problem()
    hidden, head = hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16)
    score = partial(token_losses, targets=targets, vocab_size=VOCAB, cap=15.0, chunk=0)
    _, pull = jax.eval_shape(lambda *x: jax.vjp(score, *x), hidden, head)
    kept = [x.dtype for x in jax.tree.leaves(pull) if x.shape == (targets.size, VOCAB)]
    assert kept == [jnp.bfloat16]
    gradient = jax.grad(lambda *x: score(*x).sum(), argnums=(0, 1))
    texts = [jax.jit(function).lower(hidden, head).as_text() for function in (score, gradient)]
    assert ["tensor<14x50xbf16>" in text for text in texts] == [False, True]
    assert [text.count("stablehlo.dot_general") for text in texts] == [1, 3]


@pytest.mark.parametrize(
    "vocab, cap, chunk, backend, expected",
    [
        (4096, 0.0, None, "cpu", 0),
        (32768, 15.0, None, "gpu", 8192),
        (32768, 15.0, None, "tpu", 0),
        (32768, 0.0, None, "tpu", 8192),  # float32 scores would be written
        (65536, 15.0, None, "tpu", 8192),
        (100, 15.0, 0, "cpu", 0),
        (100, 15.0, 64, "tpu", 64),
    ],
)
def test_null_keeps_a_small_vocabulary_whole(vocab, cap, chunk, backend, expected):
    assert vocab_chunk(vocab, cap, chunk, backend) == expected

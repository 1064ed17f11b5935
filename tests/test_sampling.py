"""Draws follow the distribution that temperature, top-k, top-p and min-p leave, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from MaxNano.inference import sampling

ROWS, SIZE = 4, 200


def kept_by_definition(row, top_k, top_p):
    """Top-k, then the fewest of the likeliest tokens with mass top_p, by sorting in float64."""
    order = np.argsort(-row.astype(np.float64), kind="stable")
    if top_k:
        order = order[:top_k]
    mass = np.exp(row[order].astype(np.float64))
    needed = np.cumsum(mass) / mass.sum() < top_p
    return set(order[: needed.sum() + 1].tolist())


lowest_kept = jax.jit(sampling.lowest_kept)
draw = jax.jit(sampling.draw)


FILTERS = st.tuples(st.integers(0, 250), st.floats(0.01, 1))


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.lists(FILTERS, min_size=ROWS, max_size=ROWS))
def test_top_k_and_top_p_keep_the_likeliest(seed, filters):
    scores = np.random.default_rng(seed).normal(0, 3, (ROWS, SIZE)).astype(np.float32)
    top_k, top_p = (np.array(column) for column in zip(*filters, strict=True))
    lowest = lowest_kept(scores, top_k.astype(np.int32), top_p.astype(np.float32))
    for row, low, k, p in zip(scores, np.asarray(lowest), top_k, top_p, strict=True):
        kept = set(np.flatnonzero(row >= low).tolist())
        wide, narrow = (kept_by_definition(row, min(k, SIZE), min(p + d, 1)) for d in (1e-5, -1e-5))
        assert narrow <= kept <= wide


def test_equal_scores_stay_together_and_no_filter_keeps_all():
    scores = np.zeros((ROWS, SIZE), np.float32)
    scores[:3, 7] = 1
    scores[3, 5:] = -np.inf
    lowest = lowest_kept(scores, np.array([2, 1, 0, 0], np.int32), np.ones(ROWS, np.float32))
    assert lowest.tolist() == [0, 1, 0, -np.inf]


def test_draws_follow_the_probabilities():
    """Each token's share is its probability, as the running sum over evenly spaced numbers gives
    it.
    """
    scores = np.random.default_rng(0).normal(0, 2, SIZE).astype(np.float32)
    scores[::3] = -np.inf
    count = 50_000
    uniform = (np.arange(count, dtype=np.float32) + 0.5) / count
    tokens = np.asarray(draw(np.tile(scores, (count, 1)), uniform))
    probability = np.exp(scores) / np.exp(scores).sum()
    np.testing.assert_allclose(
        np.bincount(tokens, minlength=SIZE) / count, probability, atol=2.5 / count
    )


@settings(max_examples=60)
@given(st.integers(0, 2**31), st.integers(1, SIZE), st.sampled_from([0.0, 0.5, 1 - 2**-23]))
def test_what_has_no_probability_is_never_drawn(seed, possible, uniform):
    rng = np.random.default_rng(seed)
    scores = np.full((ROWS, SIZE), -np.inf, np.float32)
    for row in scores:
        row[rng.choice(SIZE, possible, replace=False)] = rng.normal(0, 20, possible)
        row -= row.max()
    tokens = np.asarray(draw(scores, np.full(ROWS, uniform, np.float32)))
    assert np.isfinite(scores[np.arange(ROWS), tokens]).all()


def test_likeliest_is_the_first_of_the_highest():
    logits = np.random.default_rng(0).integers(0, 30, (50, SIZE)).astype(np.float32)
    np.testing.assert_array_equal(sampling.likeliest(jnp.asarray(logits)), logits.argmax(1))


def test_penalty_lowers_what_was_seen():
    logits = jnp.array([[2.0, -2.0, 2.0, -2.0]])
    seen = jnp.array([[True, True, False, False]])
    np.testing.assert_array_equal(
        sampling.penalize(logits, seen, jnp.array([2.0])), [[1.0, -4.0, 2.0, -2.0]]
    )


COUNTS = st.lists(st.integers(-1, SIZE - 1), max_size=30)


@settings(max_examples=40)
@given(COUNTS, st.floats(-2, 2, width=32), st.floats(-2, 2, width=32))
def test_frequency_and_presence_penalties_are_openais(tokens, frequency, presence):
    """logit[j] - count[j] x frequency - (count[j] > 0) x presence."""
    logits = np.random.default_rng(0).normal(0, 3, (1, SIZE)).astype(np.float32)
    padded = np.array([tokens + [-1] * (30 - len(tokens))], np.int32)
    counts = sampling.count_tokens(padded, SIZE)
    expected = [
        logit - tokens.count(j) * frequency - (j in tokens) * presence
        for j, logit in enumerate(logits[0])
    ]
    found = sampling.penalize_counts(
        jnp.asarray(logits), counts, jnp.array([frequency]), jnp.array([presence])
    )
    np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-5)


def test_a_bias_is_added_and_padding_adds_nothing():
    logits = jnp.zeros((2, 5))
    tokens = jnp.array([[4, 0, -1], [-1, -1, -1]])
    bias = jnp.array([[1.5, -100.0, 7.0], [3.0, 3.0, 3.0]])
    np.testing.assert_array_equal(
        sampling.add_at(logits, tokens, bias), [[-100, 0, 0, 0, 1.5], [0] * 5]
    )


@pytest.mark.parametrize("size", [5, 32, 33, 70])
def test_a_mask_permits_the_tokens_of_its_bits(size):
    wanted = np.random.default_rng(size).random((3, size)) < 0.5
    words = -(-size // sampling.MASK_BITS)
    bits = np.zeros((3, words * sampling.MASK_BITS), np.bool_)
    bits[:, :size] = wanted
    allowed = np.packbits(bits, axis=1, bitorder="little").view(np.int32)
    permitted = sampling.permit(jnp.ones((3, size)), jnp.asarray(allowed))
    np.testing.assert_array_equal(permitted, np.where(wanted, 1, -np.inf))
    longer = sampling.permit(jnp.ones((3, size + 40)), jnp.asarray(allowed))  # padded vocabulary
    assert (np.asarray(longer)[:, words * sampling.MASK_BITS :] == -np.inf).all()


@pytest.mark.parametrize("size", [7, SIZE])
def test_log_probabilities(size):
    logits = np.random.default_rng(1).normal(0, 2, (ROWS, size)).astype(np.float32)
    expected = np.asarray(jax.nn.log_softmax(logits))
    tokens = np.arange(ROWS)
    np.testing.assert_allclose(
        sampling.log_probabilities(jnp.asarray(logits), jnp.asarray(tokens)),
        expected[tokens, tokens],
        atol=1e-5,
    )
    values, ids = map(np.asarray, sampling.alternatives(jnp.asarray(logits)))
    assert values.shape == ids.shape == (ROWS, sampling.LARGEST_LOGPROBS)
    count = min(size, sampling.LARGEST_LOGPROBS)
    np.testing.assert_array_equal(ids[:, :count], np.argsort(-logits, axis=1)[:, :count])
    np.testing.assert_allclose(values[:, :count], -np.sort(-expected, axis=1)[:, :count], atol=1e-5)
    assert (values[:, count:] == -np.inf).all()

"""Rows of tables by token, and gradients that are the same sums by every method."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from MaxNano.models import embedding

DTYPES = (jnp.float32, jnp.bfloat16)
WIDTH = 128


@functools.partial(jax.jit, static_argnames=("size", "method"))
def gradient(rows, tokens, size, method):
    order = embedding.order(tokens, method)
    return embedding.table_gradient(rows, order, size, method, interpret=True)


def whole_rows(count, dtype):
    """Rows of small whole numbers: their sums are exact in float32, so every order of adding gives
    the same.
    """
    numbers = np.random.default_rng(1).integers(-8, 9, (count, WIDTH))
    return jnp.asarray(numbers, dtype)


def summed(rows, tokens, size, dtype):
    """The definition, in NumPy; rounded once."""
    total = np.zeros((size, rows.shape[1]))
    np.add.at(total, np.asarray(tokens).reshape(-1), np.asarray(rows, np.float64))
    return np.asarray(jnp.asarray(total, jnp.float32).astype(dtype), np.float32)


def zipf(count, size):
    return np.minimum(np.random.default_rng(2).zipf(1.3, count) - 1, size - 1).astype(np.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", embedding.METHODS)
def test_all_methods_sum_the_rows_of_each_token(method, dtype):
    """A few tokens that fill blocks of rows of their own, many that are rare, and most that are
    absent.
    """
    size, tokens = 544, zipf(1024, 544).reshape(4, 256)
    rows = whole_rows(tokens.size, dtype)
    got = gradient(rows, jnp.asarray(tokens), size, method)
    assert len(np.unique(tokens)) < size // 2
    np.testing.assert_array_equal(
        np.asarray(got, np.float32), summed(rows, tokens, size, got.dtype)
    )


@pytest.mark.parametrize(
    ("size", "count"),
    [
        (16, 24),  # one tile of the table
        (512, 512),  # full tiles and full blocks
        (272, 320),  # neither is a multiple of the largest
        (48, 7),  # fewer tokens than a register has rows
    ],
)
def test_the_kernel_takes_tables_and_batches_of_any_size(size, count):
    tokens = np.random.default_rng(3).integers(0, size, count, np.int32)
    rows = whole_rows(count, jnp.float32)
    got = gradient(rows, jnp.asarray(tokens), size, "sorted")
    np.testing.assert_array_equal(got, summed(rows, tokens, size, jnp.float32))


TOKENS = st.one_of(
    st.lists(st.integers(0, 271), min_size=320, max_size=320),  # any
    st.lists(st.sampled_from([0, 15, 16, 271]), min_size=320, max_size=320),  # edges of tiles
    st.tuples(st.integers(0, 271), st.integers(0, 271), st.integers(0, 320)).map(
        lambda x: (
            [x[0]] * x[2] + [x[1]] * (320 - x[2])
        )  # at most two tokens, however many blocks they fill
    ),
)


@hypothesis.settings(max_examples=25)
@hypothesis.given(TOKENS)
def test_the_kernel_sums_whatever_the_tokens_are(tokens):
    """17 tiles of the table and two blocks of rows, compiled once."""
    tokens = np.asarray(tokens, np.int32)
    rows = whole_rows(len(tokens), jnp.float32)
    got = gradient(rows, jnp.asarray(tokens), 272, "sorted")
    np.testing.assert_array_equal(got, summed(rows, tokens, 272, jnp.float32))


def test_bfloat16_rows_are_added_up_in_float32():
    """In bfloat16 256 + 1 is 256: a running sum would stop there."""
    tokens = jnp.full(512, 3, jnp.int32)
    rows = jnp.ones((512, WIDTH), jnp.bfloat16)
    for method in embedding.METHODS:
        assert np.all(np.asarray(gradient(rows, tokens, 16, method))[3] == 512), method


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", embedding.METHODS)
def test_lookup_within_a_scan_over_layers(method, dtype):
    """As the model calls it: forward reads the stack in place, gradients go to each layer's own
    table.
    """
    layers, size = 3, 48
    tokens = jnp.asarray(zipf(60, size).reshape(3, 20))
    tables = whole_rows(layers * size, dtype).reshape(layers, size, WIDTH)
    weights = whole_rows(layers * tokens.size, dtype).reshape(layers, tokens.size, WIDTH)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(tables):
        order = embedding.order(tokens, method)
        stack = jax.lax.stop_gradient(tables)

        def layer(total, inputs):
            own, index, weight = inputs
            rows = embedding.lookup(own, stack, index, order, method, True)
            return total + (rows * weight).astype(jnp.float32).sum(), rows

        return jax.lax.scan(layer, jnp.float32(0), (tables, jnp.arange(layers), weights))

    (_, rows), grads = run(tables)
    assert rows.dtype == grads.dtype == dtype
    np.testing.assert_array_equal(
        np.asarray(rows, np.float32), np.asarray(tables[:, tokens.reshape(-1)], np.float32)
    )
    for grad, weight in zip(grads, weights, strict=True):
        np.testing.assert_array_equal(
            np.asarray(grad, np.float32), summed(weight, tokens, size, dtype)
        )


@pytest.mark.parametrize("method", embedding.METHODS)
def test_order_keeps_the_tokens_and_sorts_only_where_asked(method):
    tokens = jnp.asarray([[5, 2], [9, 2]])
    order = embedding.order(tokens, method)
    np.testing.assert_array_equal(order.tokens, [5, 2, 9, 2])
    if method == "sorted":
        np.testing.assert_array_equal(order.ordered, [2, 2, 5, 9])
        np.testing.assert_array_equal(order.tokens[order.permutation], order.ordered)
    else:
        assert order.permutation is None and order.ordered is None


def test_auto_takes_a_method_that_runs_on_the_mesh():
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices("cpu")[:1])
    assert embedding.resolve("auto", mesh) == "scatter"
    assert embedding.resolve("one_hot", mesh) == "one_hot"

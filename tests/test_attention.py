"""Every attention kernel computes the definition: softmax over the last window + 1 keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from MaxNano.attention import KERNELS, attention, resolve


def by_definition(q, k, v, window):
    """Loops and float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    batch, length, heads, head_dim = q.shape
    group = heads // k.shape[2]
    for b, n, t in np.ndindex(batch, heads, length):
        seen = slice(max(0, t - window), t + 1)
        scores = k[b, seen, n // group] @ q[b, t, n] / head_dim**0.5
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights @ v[b, seen, n // group] / weights.sum()
    return out


def inputs(length, heads, kv_heads, head_dim=8):
    keys = jax.random.split(jax.random.key(length), 3)
    shapes = [(2, length, n, head_dim) for n in (heads, kv_heads, kv_heads)]
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("length, window", [(37, 37), (37, 8), (37, 0), (16, 3), (5, 100)])
def test_kernel_equals_definition(kernel, heads, kv_heads, length, window):
    q, k, v = inputs(length, heads, kv_heads)
    out = attention(q, k, v, window=window, kernel=kernel, chunk=8)
    np.testing.assert_allclose(out, by_definition(q, k, v, window), atol=1e-5)


@pytest.mark.parametrize("kernel", sorted(KERNELS.keys() - {"reference"}))
@pytest.mark.parametrize("window", [40, 8, 5])
def test_gradients_equal_reference(kernel, window):
    q, k, v = inputs(40, 4, 2)
    weight = jax.random.normal(jax.random.key(1), q.shape)

    def grads(name):
        def total(q, k, v):
            return jnp.sum(weight * attention(q, k, v, window=window, kernel=name, chunk=16))

        return jax.grad(total, argnums=(0, 1, 2))(q, k, v)

    for got, expected in zip(grads(kernel), grads("reference"), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_output_has_the_dtype_of_the_queries(kernel):
    q, k, v = (x.astype(jnp.bfloat16) for x in inputs(12, 2, 2))
    assert attention(q, k, v, window=4, kernel=kernel, chunk=4).dtype == jnp.bfloat16


def test_unknown_kernel_names_the_choices():
    q, k, v = inputs(4, 1, 1)
    with pytest.raises(ValueError, match="reference"):
        attention(q, k, v, window=1, kernel="nonsense", chunk=4)


def test_auto_picks_a_kernel_that_exists():
    assert all(resolve("auto", backend) in KERNELS for backend in ("cpu", "gpu", "tpu"))
    assert resolve("reference", "cpu") == "reference"

"""Products in 8 bits are near those in float, forward and backward, and are where they are said to
be.
"""

import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from MaxNano import pyconfig
from MaxNano.models import quantization
from MaxNano.models.setup import architecture
from MaxNano.models.transformer import Numerics

# Relative error in the Frobenius norm of output, activations' and weights' gradient, for normal
# numbers: rounding errors of both operands, 0.7 % each for int8 and 2.6 % (e4m3) or 5.2 % (e5m2)
# for fp8, add in squares.
BOUNDS = {"int8": (0.012, 0.012, 1e-6), "fp8": (0.04, 0.062, 0.062)}


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def error(found, expected):
    found, expected = (np.asarray(a, np.float64) for a in (found, expected))
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@functools.partial(jax.jit, static_argnums=0)
def all_three(kind, x, w, cotangent):
    """Output, gradient of x, gradient of w."""
    out, back = jax.vjp(lambda x, w: quantization.matmul(x, w, kind), x, w)
    return out, *back(cotangent)


@pytest.mark.parametrize("kind", BOUNDS)
def test_product_and_gradients_are_within_bounds(kind):
    operands = normal(0, 256, 512), 0.03 * normal(1, 512, 384), 1e-6 * normal(2, 256, 384)
    exact = all_three("none", *operands)
    for found, expected, bound in zip(all_three(kind, *operands), exact, BOUNDS[kind], strict=True):
        assert found.shape == expected.shape and found.dtype == expected.dtype
        assert bound / 3 < error(found, expected) < bound or error(found, expected) < bound == 1e-6


@pytest.mark.parametrize("kind", ["none", *BOUNDS])
def test_bfloat16_stays(kind):
    x, w, cotangent = (
        a.astype(jnp.bfloat16) for a in (normal(0, 32, 64), normal(1, 64, 16), normal(2, 32, 16))
    )
    for found in all_three(kind, x, w, cotangent):
        assert found.dtype == jnp.bfloat16
    reference = all_three("none", *(a.astype(np.float32) for a in (x, w, cotangent)))
    for found, expected in zip(all_three(kind, x, w, cotangent), reference, strict=True):
        assert error(found, expected) < 0.08


def test_int8_is_exact_for_what_8_bits_hold():
    numbers = np.random.default_rng(0).integers(-126, 127, size=(3, 64, 64)).astype(np.float32)
    numbers[:, :, 0] = numbers[:, 0, :] = 127  # so that every row's and every column's scale is 1
    x, w, cotangent = numbers
    for found, expected in zip(
        all_three("int8", x, w, cotangent), all_three("none", x, w, cotangent), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


def test_int8_an_outlier_costs_only_its_own_token():
    x, w = normal(0, 16, 64), normal(1, 64, 32)
    wild = x.copy()
    wild[3, 5] = 1e4
    found, calm = (
        np.asarray(all_three("int8", rows, w, np.zeros((16, 32), np.float32))[0])
        for rows in (wild, x)
    )
    np.testing.assert_array_equal(np.delete(found, 3, 0), np.delete(calm, 3, 0))


@pytest.mark.parametrize("kind", BOUNDS)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_no_number_is_too_small_or_too_large(kind, size):
    x, w, cotangent = (
        np.float32(size) * normal(0, 8, 16),
        normal(1, 16, 4),
        np.float32(size) * normal(2, 8, 4),
    )
    for found in all_three(kind, x, w, cotangent)[:2]:
        assert np.isfinite(found).all() and np.any(found) == (size > 0)


@functools.cache
def gradient_of_model(kind):
    """(loss, gradient, jaxpr) of a model of one layer with given parameters."""
    config = pyconfig.initialize(
        [
            str(pyconfig.BASE),
            "model=d1",
            "emb_dim=32",
            "head_dim=16",
            "vocab_size=64",
            "max_target_length=16",
            "global_batch_tokens=32",
            f"quantization={kind}",
        ]
    )
    model = architecture(config, Numerics("float32", "float32", "reference", "scatter", "cpu"))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: jnp.asarray(0.2 * rng.normal(size=s.shape), s.dtype), model.shapes
    )
    tokens = jnp.arange(32).reshape(2, 16)

    def loss(params):
        bound = model.bind(params)
        logits = bound.logits(bound(tokens))
        return -jnp.take_along_axis(
            jax.nn.log_softmax(logits), jnp.roll(tokens, -1, 1)[..., None], -1
        ).mean()

    traced = jax.jit(jax.value_and_grad(loss)).trace(params)
    return *traced.lower().compile({"xla_backend_optimization_level": 0})(params), str(traced.jaxpr)


@pytest.mark.parametrize("kind", ["none", *BOUNDS])
def test_the_layers_matrices_are_multiplied_in_8_bits(kind):
    """Four products a layer: queries with keys and values, output, both of the MLP; each with its
    gradients.
    """
    text = gradient_of_model(kind)[2]
    found = [
        len(re.findall(rf"new_dtype={dtype}\s", text))
        for dtype in ("int8", "float8_e4m3fn", "float8_e5m2")
    ]
    assert found == {"none": [0, 0, 0], "int8": [4 * 4, 0, 0], "fp8": [0, 4 * 2, 4]}[kind]
    assert text.count("preferred_element_type=int32") == (4 * 2 if kind == "int8" else 0)


@pytest.mark.parametrize("kind", BOUNDS)
def test_a_models_gradient_is_near_that_without(kind):
    expected_loss, expected, _ = gradient_of_model("none")
    loss, found, _ = gradient_of_model(kind)
    assert float(loss) == pytest.approx(float(expected_loss), rel=0.01) and loss != expected_loss
    for name in ("wi", "wo"):
        assert (
            error(found["layers"]["mlp"][name], expected["layers"]["mlp"][name])
            < {"int8": 0.08, "fp8": 0.25}[kind]
        )


def device(platform, **attributes):
    return SimpleNamespace(platform=platform, device_kind="Some chip", **attributes)


def test_devices_that_gain_nothing_are_refused():
    for kind in ("none", "int8", "fp8"):
        quantization.check(kind, [device("cpu")])
        quantization.check(kind, [device("gpu", compute_capability="9.0")])
    quantization.check("int8", [device("tpu")])
    with pytest.raises(ValueError, match="this is tpu: choose int8"):
        quantization.check("fp8", [device("tpu")])
    with pytest.raises(ValueError, match="this is Some chip: choose int8"):
        quantization.check("fp8", [device("gpu", compute_capability="8.0")])
    with pytest.raises(ValueError, match="quantization=int8 .*rollouts"):
        pyconfig.initialize([str(pyconfig.BASE), "stage=rl", "quantization=int8"])

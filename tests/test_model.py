"""The model computes nanochat's numbers, however its layers are run."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from MaxNano import pyconfig, scaling
from MaxNano.interop import nanochat
from MaxNano.models.losses import token_losses
from MaxNano.models.setup import architecture
from MaxNano.models.transformer import LayerKind, Numerics, repetition, scans_layers

ROOT = Path(__file__).parents[1]
FLOAT32 = Numerics("float32", "float32", "reference", "scatter", "cpu")


def make_config(*overrides):
    return pyconfig.initialize([str(ROOT / "configs/base.yml"), *overrides])


def golden_overrides(golden):
    """The config of the recorded model, from nanochat's own field names."""
    fields = json.loads(str(golden["config"]))
    heads = fields["n_head"]
    return [
        f"max_target_length={fields['sequence_len']}",
        f"vocab_size={fields['vocab_size']}",
        f"num_decoder_layers={fields['n_layer']}",
        f"emb_dim={fields['n_embd']}",
        f"num_query_heads={heads}",
        f"num_kv_heads={fields['n_kv_head']}",
        f"head_dim={fields['n_embd'] // heads}",
        f"window_pattern={fields['window_pattern']}",
    ]


@pytest.fixture(scope="module")
def golden():
    with np.load(ROOT / "tests/golden/nanochat_small.npz") as file:
        return dict(file)


def named(golden, prefix):
    return {
        key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)
    }


def loss_of(config, numerics, params, tokens, targets):
    model = architecture(config, numerics).bind(params)
    return token_losses(
        model(tokens), model.lm_head[...], targets, config.vocab_size, config.logits_soft_cap, 0
    )


VARIANTS = {
    "plain": ([], FLOAT32),
    "products in a TPU's kernels": ([], FLOAT32._replace(products="pallas")),
    "chunked": (["attention_chunk=96"], FLOAT32._replace(attention="chunked")),
    "full remat": (["remat_policy=full"], FLOAT32),
    "minimal remat": (["remat_policy=minimal"], FLOAT32),
    "remat of one layer": (["remat_policy=full", "remat_layers=1", "scan_layers=false"], FLOAT32),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_loss_and_gradients_are_nanochats(golden, variant):
    """Within 1e-5, gradients relative to the tensor's largest: tests/golden/README.md."""
    overrides, numerics = VARIANTS[variant]
    config = make_config(*golden_overrides(golden), *overrides)
    params = nanochat.to_params(named(golden, "init/"), config)
    tokens, targets = golden["idx"][0], golden["targets"][0]

    @jax.jit
    def compute(params):
        model = architecture(config, numerics).bind(params)
        logits = model.logits(model(tokens))

        def mean_loss(params):
            losses = loss_of(config, numerics, params, tokens, targets)
            return losses.sum() / (targets >= 0).sum(), losses

        (mean, losses), grads = jax.value_and_grad(mean_loss, has_aux=True)(params)
        return logits, mean, losses, grads

    logits, mean, losses, grads = compute(params)
    stride = int(golden["logits_stride"])
    np.testing.assert_allclose(logits[:, ::stride], golden["logits"], atol=1e-5)
    np.testing.assert_allclose(losses, golden["loss_none"], atol=1e-5)
    np.testing.assert_allclose(mean, golden["losses"][0], atol=1e-5)
    expected = named(golden, "grad0/")
    got = nanochat.from_params(jax.device_get(grads), config)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, atol=1e-5 * np.abs(value).max(), err_msg=name)


def small(*overrides):
    return make_config(
        "vocab_size=50",
        "max_target_length=64",
        "emb_dim=32",
        "head_dim=16",
        "num_query_heads=2",
        "short_window_multiple=16",
        *overrides,
    )


def random_params(model, seed=0):
    """Parameters of which none has a zero or neutral value."""
    rng = np.random.default_rng(seed)  # NumPy compiles nothing

    def draw(leaf):
        return jax.numpy.asarray(0.1 * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map(draw, model.shapes)


LAYOUTS = {
    "groups of 4": ["num_decoder_layers=8"],
    "a tail of 2": ["num_decoder_layers=10"],
    "groups of 2 and a tail": ["num_decoder_layers=5", "window_pattern=SL"],
    "an odd depth": ["num_decoder_layers=9"],
    "the middle in the tail": ["num_decoder_layers=5", "window_pattern=L"],
    "all long": ["num_decoder_layers=6", "window_pattern=L"],
    "all short but the last": ["num_decoder_layers=7", "window_pattern=S"],
    "grouped heads": ["num_decoder_layers=8", "num_query_heads=4", "head_dim=8", "num_kv_heads=2"],
    "nothing extra": [
        "num_decoder_layers=8",
        "smear_gate_channels=0",
        "use_backout=false",
        "value_embed_gate_channels=0",
        "logits_soft_cap=0",
    ],
}


# The others are behind -m long. test_nanochat_eras.py has models without the extras.
IN_SHORT = ("groups of 2 and a tail",)


@pytest.mark.parametrize("layers", ["null", 0, 3, 5])
def test_only_the_first_remat_layers_recompute(layers):
    words = ("num_decoder_layers=5", "remat_policy=full", "scan_layers=false")
    config = small(*words, f"remat_layers={layers}")
    params = random_params(architecture(config, FLOAT32))
    tokens = jax.numpy.zeros((1, 64), int)

    def total(params):
        return loss_of(config, FLOAT32, params, tokens, tokens).sum()

    recomputed = str(jax.make_jaxpr(total)(params)).count("prevent_cse=")
    assert recomputed == (5 if layers == "null" else layers)


def test_layers_are_unrolled_on_a_gpu_unless_the_config_says_otherwise():
    for value, expected in {
        "null": [True, False, True],
        "true": [True] * 3,
        "false": [False] * 3,
    }.items():
        config = small(f"scan_layers={value}")
        assert [scans_layers(config, backend) for backend in ("cpu", "gpu", "tpu")] == expected
        kernels = [scans_layers(config, "tpu", "pallas", by_layer=fsdp) for fsdp in (False, True)]
        assert kernels == [value == "true", value != "false"]
    jaxpr = {}
    for backend in ("cpu", "gpu"):
        model = architecture(small(*LAYOUTS["groups of 4"]), FLOAT32._replace(backend=backend))
        forward = jax.make_jaxpr(lambda params, tokens, model=model: model.bind(params)(tokens))
        jaxpr[backend] = str(forward(random_params(model), np.zeros((1, 64), np.int32)))
    assert "scan[" in jaxpr["cpu"] and "scan[" not in jaxpr["gpu"]


@pytest.mark.parametrize(
    "layout",
    [
        layout if layout in IN_SHORT else pytest.param(layout, marks=pytest.mark.long)
        for layout in LAYOUTS
    ],
)
def test_scanned_equals_unrolled(layout):
    """One parameter layout for both, and the same loss and gradients."""
    tokens = np.arange(2 * 64).reshape(2, 64) % 47
    targets = (tokens + 1) % 50
    results = []
    for scan in ("true", "false"):
        config = small(*LAYOUTS[layout], f"scan_layers={scan}")
        params = random_params(architecture(config, FLOAT32))

        def total(params, config=config):
            return loss_of(config, FLOAT32, params, tokens, targets).mean()

        results.append(jax.jit(jax.value_and_grad(total))(params))
    (loss, grads), (unrolled_loss, unrolled_grads) = results
    np.testing.assert_allclose(loss, unrolled_loss, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()),
        grads,
        unrolled_grads,
    )
    assert all(np.any(g) for g in jax.tree.leaves(grads)), "every parameter takes part"


@pytest.mark.parametrize(
    "windows, expected",
    [
        ("SSSLSSSL", (4, 2)),
        ("SSSLSL", (1, 3)),
        ("LLLL", (1, 4)),
        ("SSSSSSL", (1, 6)),
        ("SSLSSLSSL", (3, 3)),
    ],
)
def test_repetition_leaves_the_fewest_layers_to_compile(windows, expected):
    kinds = tuple(LayerKind(ord(letter), False) for letter in windows)
    period, groups = repetition(kinds)
    assert kinds[: period * groups] == kinds[:period] * groups
    assert (period, groups) == expected


def test_nothing_sees_the_future():
    config = small("num_decoder_layers=4")
    model = architecture(config, FLOAT32)
    params = random_params(model)
    tokens = np.arange(64)[None] % 50
    changed = tokens.copy()
    changed[:, 40:] = 7
    forward = jax.jit(lambda tokens: model.bind(params)(tokens))
    before, after = (forward(t) for t in (tokens, changed))
    np.testing.assert_array_equal(before[:, :40], after[:, :40])
    assert not np.allclose(before[:, 40:], after[:, 40:])


def test_bfloat16_tables_and_activations():
    config = small("num_decoder_layers=4")
    numerics = Numerics("bfloat16", "bfloat16", "reference", "scatter", "cpu")
    model = architecture(config, numerics)
    stored = {path: leaf.dtype for path, leaf in model.shapes.items() if hasattr(leaf, "dtype")}
    assert stored["token_embed"] == stored["value_embeds"] == jnp.bfloat16
    assert stored["lm_head"] == jnp.float32
    forward = jax.jit(lambda params, tokens: model.bind(params)(tokens))
    hidden = forward(random_params(model), np.zeros((1, 64), np.int32))
    assert hidden.dtype == jnp.bfloat16


def test_parameter_counts_are_those_of_the_scaling_laws():
    for depth in range(2, 35, 2):
        config = make_config(f"model=d{depth}", "steps=1", "global_batch_tokens=524288")
        shapes = jax.tree.leaves(architecture(config, FLOAT32).shapes)
        total = sum(int(np.prod(leaf.shape)) for leaf in shapes)
        assert total == scaling.parameter_counts(scaling.shape_of(config)).total

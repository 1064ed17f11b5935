"""The model computes nanochat's numbers, however its layers are run."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from MaxNano import convert, pyconfig
from MaxNano.losses import token_losses
from MaxNano.model import LayerKind, Numerics, repetition
from MaxNano.train_state import architecture

ROOT = Path(__file__).parents[1]
FLOAT32 = Numerics(dtype="float32", embedding_dtype="float32", attention="reference")


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
    return {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}


def loss_of(config, numerics, params, tokens, targets):
    model = architecture(config, numerics).bind(params)
    return token_losses(
        model(tokens), model.lm_head[...], targets, config.vocab_size, config.logits_soft_cap, 0
    )


VARIANTS = {
    "plain": ([], FLOAT32),
    "chunked": (["attention_chunk=96"], FLOAT32._replace(attention="chunked")),
    "full remat": (["remat_policy=full"], FLOAT32),
    "minimal remat": (["remat_policy=minimal"], FLOAT32),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_loss_and_gradients_are_nanochats(golden, variant):
    """Within 1e-5, gradients relative to the tensor's largest: tests/golden/README.md."""
    overrides, numerics = VARIANTS[variant]
    config = make_config(*golden_overrides(golden), *overrides)
    params = convert.nanochat_to_params(named(golden, "init/"), config)
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
    got = convert.params_to_nanochat(jax.device_get(grads), config)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, atol=1e-5 * np.abs(value).max(), err_msg=name)

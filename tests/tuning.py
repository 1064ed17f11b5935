"""nanochat's gradients in fine-tuning and in reinforcement learning, and the one train step that
has to have them.
"""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_nanochat_reference import hashed

from MaxNano import pyconfig
from MaxNano.interop import nanochat
from MaxNano.training import state as train_state
from MaxNano.training.setup import set_up
from MaxNano.training.step import jit_train

ROOT = Path(__file__).parents[1]
GOLDEN = json.loads((ROOT / "tests/golden/tuning_gradients.json").read_text())
PACKING = json.loads((ROOT / "tests/golden/tasks_packing.json").read_text())
LARGE = 2.0**20  # a gradient times this is hardly rounded when it is added to a parameter


def check_gradients(batch, expected, *words, complete=None):
    """Whether a batch's gradients, taken out of the train step, are `expected`; returns its loss.

    complete: (set-up, parameters, batch) -> the batch, with what else `words`, more of the config,
    want in it. expected: nanochat's name of a parameter -> the gradient's norm, and its product
    with a vector of hashed numbers.
    """
    fields = GOLDEN["config"]
    rows = len(batch["inputs"])
    config = pyconfig.initialize(
        [
            str(ROOT / "configs/base.yml"),
            f"max_target_length={fields['sequence_len']}",
            "num_cpu_devices=1",
            f"vocab_size={fields['vocab_size']}",
            f"num_decoder_layers={fields['n_layer']}",
            f"emb_dim={fields['n_embd']}",
            f"num_query_heads={fields['n_head']}",
            f"head_dim={fields['n_embd'] // fields['n_head']}",
            *(words or [f"global_batch_tokens={rows * fields['sequence_len']}"]),
        ]
    )
    setup = set_up(config, jax.devices()[:1])
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), setup.model.shapes)
    arrays = {}
    for index, (name, like) in enumerate(sorted(nanochat.from_params(zeros, config).items())):
        base = 1.0 if name == "resid_lambdas" else 0.0
        arrays[name] = (base + hashed(like.size, index)).reshape(like.shape).astype(np.float32)
    params = jax.tree.map(jnp.asarray, nanochat.to_params(arrays, config))

    optimizer = optax.GradientTransformationExtraArgs(
        lambda params: (),
        lambda grads, state, params, *, step: (jax.tree.map(lambda g: LARGE * g, grads), state),
    )
    abstract = train_state.abstract_state(config, setup.model, optimizer, setup.mesh)
    setup = replace(setup, optimizer=optimizer, abstract=abstract)
    if complete:
        batch = complete(setup, params, batch)
    state = train_state.TrainState(jnp.int32(0), jax.tree.map(jnp.copy, params), ())
    after, metrics = jit_train(setup)(state, batch, jnp.ones(config.vocab_size, jnp.int32))
    grads = jax.tree.map(lambda x, y: (np.float64(y) - np.float64(x)) / LARGE, params, after.params)
    got = nanochat.from_params(grads, config)
    assert got.keys() == expected.keys()
    for index, (name, (norm, product)) in enumerate(sorted(expected.items())):
        own = np.float64(got[name]).ravel()
        assert np.linalg.norm(own) == pytest.approx(norm, rel=1e-4), name
        assert own @ hashed(own.size, index + 100) == pytest.approx(product, abs=1e-4 * norm), name
    return float(metrics["loss"])

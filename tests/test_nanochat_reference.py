"""nanochat's figures on a second problem, whose weights are a formula: another width, vocabulary,
length and schedule.

Produced by running karpathy/nanochat at 92d63d4 in float32 on a CPU, and kept as printed there.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from MaxNano import pyconfig
from MaxNano.interop import nanochat
from MaxNano.models.losses import token_losses
from MaxNano.training import state as train_state
from MaxNano.training.setup import set_up
from MaxNano.training.step import build_programs, jit_train

ROOT = Path(__file__).parents[1]
KEYS = (
    "max_target_length=256",
    "vocab_size=50",
    "num_decoder_layers=4",
    "emb_dim=32",
    "num_query_heads=2",
    "head_dim=16",
    "global_batch_tokens=512",
    "unembedding_lr=0.004",
    "embedding_lr=0.2",
    "matrix_lr=0.02",
    "scalar_lr=0.5",
    "weight_decay=0.1",
    "learning_rate_scale=1",
    "weight_decay_scale=1",
    "weight_decay_schedule=constant",
    "warmup_steps=0",
    "warmdown_ratio=0",
    "muon_momentum_start=0.95",
    "muon_momentum=0.95",
    "muon_momentum_final=0.95",
    "steps=100",
    "num_cpu_devices=1",
)


def hashed(count, index):
    """`count` numbers in [-0.2, 0.2) for the parameter at `index` of the sorted names."""
    x = ((np.arange(count, dtype=np.uint64) + 1) * 2654435761 + 97 * index) % 2**32
    for shift, factor in ((16, 2246822519), (13, 3266489917)):
        x = ((x ^ (x >> np.uint64(shift))) * factor) % 2**32
    x ^= x >> np.uint64(16)
    return 0.2 * (2 * x.astype(np.float64) / 2**32 - 1)


@pytest.fixture(scope="module")
def problem():
    config = pyconfig.initialize([str(ROOT / "configs/base.yml"), *KEYS])
    setup = set_up(config, jax.devices()[:1])
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), setup.model.shapes)
    arrays = {}
    for index, (name, like) in enumerate(sorted(nanochat.from_params(zeros, config).items())):
        base = 1.0 if name == "resid_lambdas" else 0.0
        arrays[name] = (base + hashed(like.size, index)).reshape(like.shape).astype(np.float32)
    t, b = np.arange(201)[None], np.arange(2)[:, None]
    tokens = ((7 * t + 3 * b + t**2 // 5) % 50).astype(np.int32)
    batch = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones((2, 200), np.float32),
    }
    return config, setup, arrays, batch


def test_the_formula_fills_the_same_parameters(problem):
    _, _, arrays, _ = problem
    assert len(arrays) == 35
    first = {
        "backout_lambda": -0.14933349,
        "lm_head.weight": -0.10532321,
        "transformer.wte.weight": -0.15963104,
        "value_embeds.3.weight": 0.10811713,
    }
    for name, value in first.items():
        assert arrays[name].flat[0] == pytest.approx(value, abs=1e-7)


def test_logits_losses_and_gradients(problem):
    config, setup, arrays, batch = problem
    params = nanochat.to_params(arrays, config)

    @jax.jit
    def compute(params):
        bound = setup.model.bind(params)

        def losses(targets, params=params):
            bound = setup.model.bind(params)
            hidden = bound(batch["inputs"])
            return token_losses(hidden, bound.lm_head[...], targets, 50, config.logits_soft_cap, 0)

        grads = jax.grad(lambda params: losses(batch["targets"], params).mean())(params)
        ignored = jnp.asarray(batch["targets"]).at[:, :10].set(-1)
        return (
            bound.logits(bound(batch["inputs"])),
            losses(batch["targets"]),
            losses(ignored),
            grads,
        )

    logits, losses, without, grads = compute(params)
    np.testing.assert_allclose(
        logits[0, 0, :4], [0.50951815, 0.16663089, -0.17953292, 0.32251650], atol=1e-5
    )
    np.testing.assert_allclose(
        logits[1, 199, :4], [-0.99824131, 0.09638704, -0.69964713, -0.61625999], atol=1e-5
    )
    logits = np.asarray(logits, np.float64)
    assert logits.sum() == pytest.approx(-96.660810, abs=1e-2)  # 20,000 numbers
    assert np.abs(logits).sum() == pytest.approx(10062.8603, rel=1e-6)
    assert losses.mean() == pytest.approx(4.0567031, abs=1e-5)
    assert without.sum() == pytest.approx(1539.8459, rel=1e-6)
    assert without.sum() / 380 == pytest.approx(4.0522261, abs=1e-5)
    norms = {
        "lm_head.weight": 0.38373246,
        "transformer.wte.weight": 0.42768207,
        "resid_lambdas": 0.038652322,
        "x0_lambdas": 0.038071472,
        "backout_lambda": 0.0030522998,
        "smear_gate.weight": 0.0084266128,
        "smear_lambda": 0.013995935,
        "transformer.h.0.attn.c_q.weight": 0.059537630,
        "transformer.h.0.mlp.c_fc.weight": 0.24948118,
        "transformer.h.3.attn.c_proj.weight": 0.035523144,
        "transformer.h.1.attn.ve_gate.weight": 0.0014328240,
        "value_embeds.1.weight": 0.010636331,
    }
    got = nanochat.from_params(jax.device_get(grads), config)
    for name, norm in norms.items():
        assert np.linalg.norm(got[name]) == pytest.approx(norm, rel=1e-5), name


@pytest.mark.slow  # test_train_step.py compares all parameters after one and eight updates
def test_three_updates(problem):
    config, setup, arrays, batch = problem
    programs = build_programs(setup, jit_train(setup), np.ones(50, np.int32))
    fresh = train_state.initialize(config, setup.numerics, setup.optimizer, setup.abstract)
    params = jax.tree.map(jnp.asarray, nanochat.to_params(arrays, config))
    state = train_state.TrainState(fresh.step, params, fresh.opt_state)
    norms = {
        1: {
            "lm_head.weight": 5.0277112,
            "transformer.wte.weight": 39.6240699,
            "transformer.h.0.attn.c_q.weight": 3.7783615,
            "transformer.h.0.mlp.c_fc.weight": 7.3361798,
            "transformer.h.0.mlp.c_proj.weight": 7.4368415,
            "transformer.h.1.attn.ve_gate.weight": 0.5689467,
            "x0_lambdas": 1.0987412,
        },
        3: {
            "transformer.wte.weight": 79.4751836,
            "lm_head.weight": 5.2816827,
            "transformer.h.0.mlp.c_fc.weight": 7.3327359,
            "transformer.h.3.mlp.c_proj.weight": 7.4031793,
        },
    }
    for step, loss in enumerate((4.0567031, 3.3809195, 3.1106308, 2.8768191)):
        if step in norms:
            got = nanochat.from_params(jax.device_get(state.params), config)
            for name, norm in norms[step].items():
                assert np.linalg.norm(got[name]) == pytest.approx(norm, rel=1e-4), (step, name)
        state, metrics = programs.train(state, batch)
        assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-4)

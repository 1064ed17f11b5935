"""Decoding over the KV cache gives the full forward's logits, past window and context, whatever
other slots do.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from test_model import random_params

from MaxNano import pyconfig
from MaxNano.inference import decode
from MaxNano.models.setup import architecture
from MaxNano.models.transformer import Numerics

ROOT = Path(__file__).parents[1]
FLOAT32 = Numerics("float32", "float32", "chunked", "scatter", "cpu")
CONTEXT, LONGEST = 32, 88
TINY = (
    "vocab_size=50",
    f"max_target_length={CONTEXT}",
    "emb_dim=32",
    "head_dim=8",
    "num_query_heads=4",
    "steps=20",
    "short_window_multiple=8",
    "num_decoder_layers=2",
    "global_batch_tokens=256",
    "window_pattern=SL",
)
VARIANTS = {
    "short and long windows": ("num_decoder_layers=3",),
    "one loop of groups, and a tail": ("num_decoder_layers=5", "num_kv_heads=2"),
    "long windows of several blocks": (
        "window_pattern=L",
        "num_decoder_layers=2",
        "num_kv_heads=1",
    ),
    "plain": (
        "value_embed_gate_channels=0",
        "smear_gate_channels=0",
        "use_backout=false",
        "logits_soft_cap=0",
        "num_decoder_layers=2",
    ),
}


def make(*overrides):
    config = pyconfig.initialize([str(ROOT / "configs/base.yml"), *TINY, *overrides])
    plan = decode.make_plan(config, FLOAT32, LONGEST, scans="num_decoder_layers=5" in overrides)
    layout = plan.cache._replace(
        block=9,  # the short window takes one block, the long one several
        query_rows=8 if "window_pattern=L" in overrides else 1,
    )
    plan = plan._replace(cache=layout)
    params = random_params(architecture(config, FLOAT32))
    return config, plan, params, jax.jit(partial(decode.prepare, plan))(params)


def empty(plan, slots):
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"))
    return jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), decode.cache_shapes(plan, mesh, slots)
    )


def copies(*pairs):
    rows, slots = (np.array(column, np.int32) for column in zip(*pairs, strict=True))
    return decode.Copies(rows, slots, np.int32(len(pairs)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_token_has_the_full_forwards_logits(variant):
    check_every_token(*VARIANTS[variant])


def check_every_token(*overrides):
    """Three slots: two start from one prompt that is longer than a window, one from nothing."""
    config, plan, params, weights = make(*overrides)
    tokens = np.random.default_rng(1).integers(0, 50, (3, LONGEST)).astype(np.int32)
    tokens[1, :41] = tokens[0, :41]
    starts = np.array([40, 40, 0])

    prefill = jax.jit(partial(decode.prefill, plan))
    step = jax.jit(partial(decode.decode_step, plan))
    prompts = np.zeros((2, 64), np.int32)
    prompts[1, :40] = tokens[0, :40]
    cache = jax.tree.map(lambda x: x + 7, empty(plan, 3))  # left by another sequence
    cache, hidden = prefill(
        weights, cache, prompts, np.array([1, 40], np.int32), copies((1, 1), (1, 0))
    )

    @jax.jit
    def full(tokens):
        model = architecture(config, FLOAT32).bind(params)
        return model.logits(model(tokens))

    expected = np.asarray(full(tokens))
    got = np.asarray(decode.logits_of(plan, weights, hidden[1, :40]))[:, :50]
    np.testing.assert_allclose(got, expected[0, :40], atol=1e-4)
    everyone = np.arange(3)
    for i in range(LONGEST - 40):
        positions = starts + i
        logits, cache = step(
            weights, cache, tokens[everyone, positions], tokens[everyone, positions - 1], positions
        )
        np.testing.assert_allclose(
            np.asarray(logits)[:, :50], expected[everyone, positions], atol=1e-4
        )
        assert (np.asarray(logits)[:, 50:] == -np.inf).all()


@pytest.fixture(scope="module")
def small():
    _, plan, _, weights = make()
    return plan, weights, jax.jit(partial(decode.decode_step, plan))


def run(small, cache, slot, tokens, others):
    """Logits of `tokens` one after the other in a slot; `others` draws what happens in the other
    slots.
    """
    _, weights, step = small
    found = []
    for position, token in enumerate(tokens):
        fields = [others.integers(0, top, 3).astype(np.int32) for top in (50, 50, LONGEST)]
        for field, value in zip(fields, (token, tokens[position - 1], position), strict=True):
            field[slot] = value
        logits, cache = step(weights, cache, *fields)
        found.append(np.asarray(logits)[slot])
    return np.stack(found)


def test_others_do_not_change_a_bit(small):
    tokens = np.random.default_rng(2).integers(0, 50, 50)
    alone, crowded, elsewhere = (
        run(small, empty(small[0], 3), slot, tokens, np.random.default_rng(seed))
        for slot, seed in ((0, 3), (0, 4), (2, 5))
    )
    np.testing.assert_array_equal(alone, crowded)
    np.testing.assert_array_equal(alone, elsewhere)


def test_a_slot_that_waits_stays_as_it_is(small):
    """A token comes again, or comes early: at its own index of the cache, where no query sees it."""
    plan, weights, step = small
    tokens = np.random.default_rng(3).integers(0, 50, 60)
    expected = run(small, empty(plan, 3), 1, tokens, np.random.default_rng(0))
    cache = empty(plan, 3)
    for position in range(60):
        for _ in range(1 + position % 3):
            fields = (tokens[position], tokens[position - 1], position)
            logits, cache = step(weights, cache, *(np.full(3, field, np.int32) for field in fields))
        np.testing.assert_array_equal(np.asarray(logits)[1], expected[position])


def test_a_window_of_512_keeps_513_positions():
    config = pyconfig.initialize([str(ROOT / "configs/base.yml"), "model=d24"])
    plan = decode.make_plan(config, FLOAT32, 20_480)
    mesh = AbstractMesh((1, 1, 1), ("data", "fsdp", "tensor"))
    cache = decode.cache_shapes(plan, mesh, 4)
    positions = [sum(keys.shape[2] for keys, _ in layer) for layer in cache]
    assert positions == 6 * [513, 513, 513, 2049]
    assert {x.shape[:2] + x.shape[3:] for x in jax.tree.leaves(cache)} == {(4, 12, 128)}


def test_weights_are_cast_once():
    config, plan, params, _ = make()
    weights = jax.eval_shape(partial(decode.prepare, plan._replace(dtype="bfloat16")), params)
    wide = {
        jax.tree_util.keystr(path[:1])
        for path, x in jax.tree_util.tree_leaves_with_path(weights)
        if x.dtype != jnp.bfloat16 and x.ndim > 1
    }
    assert wide == {"['rotary']"}

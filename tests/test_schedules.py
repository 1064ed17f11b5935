"""The schedules follow nanochat's rules, at their corners too, for plain and traced steps."""

import math
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from MaxNano.optimizers import schedules

GOLDEN = Path(__file__).parent / "golden" / "nanochat_small.npz"


def test_golden_run():
    # The recorded run: 60 steps planned, 5 of warm-up, momentum rising over 12, of which 8 were
    # taken.
    golden = np.load(GOLDEN)
    steps = 60
    taken = range(len(golden["losses"]))
    lr = [schedules.lr_multiplier(step, steps, 5, 0.65, 0.05) for step in taken]
    momentum = [
        schedules.muon_momentum(step, steps, 12, 0.65, start=0.85, peak=0.97, final=0.9)
        for step in taken
    ]
    decay = [0.28 * schedules.weight_decay_multiplier(step, steps, "cosine") for step in taken]
    np.testing.assert_allclose(lr, golden["lr_multiplier"], rtol=1e-6)
    np.testing.assert_allclose(momentum, golden["muon_momentum"], rtol=1e-6)
    np.testing.assert_allclose(decay, golden["muon_weight_decay"], rtol=1e-6)


@pytest.mark.parametrize(
    "step, expected",
    [
        (0, 1 / 40),
        (38, 39 / 40),
        (39, 1),
        (40, 1),
        (5846, 1),  # 16704 - round(0.65 x 16704)
        (5847, 10857 / 10858 + 1 / 10858 * 0.05),
        (16703, 1 / 10858 + 10857 / 10858 * 0.05),
    ],
)
def test_learning_rate_of_a_long_run(step, expected):
    got = schedules.lr_multiplier(step, 16704, 40, 0.65, 0.05)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_warmdown_length_rounds_half_to_even():
    # round(0.5 x 5) is 2: steps 0 to 3 are flat. A length of 3 would already lower step 3.
    got = [schedules.lr_multiplier(step, 5, 0, 0.5, 0.0) for step in range(5)]
    np.testing.assert_allclose(got, [1, 1, 1, 1, 0.5])


def test_no_warmup_and_no_warmdown():
    for step in range(4):
        assert schedules.lr_multiplier(step, 4, 0, 0.0, 0.05) == 1
        momentum = schedules.muon_momentum(step, 4, 0, 0.0, start=0.85, peak=0.97, final=0.9)
        assert momentum == np.float32(0.97)


def test_warmup_longer_than_the_run():
    got = [schedules.lr_multiplier(step, 10, 40, 0.65, 0.05) for step in (0, 9)]
    np.testing.assert_allclose(got, [1 / 40, 10 / 40])


@pytest.mark.parametrize(
    "step, expected",
    [
        (0, 0.85),
        (100, 0.88),
        (399, 0.85 + 0.12 * 399 / 400),
        (400, 0.97),
        (5845, 0.97),
        (5846, 0.97),
        (5846 + 5429, 0.935),
        (16703, 0.9 + 0.07 / 10858),
    ],
)
def test_momentum_of_a_long_run(step, expected):
    got = schedules.muon_momentum(step, 16704, 400, 0.65, start=0.85, peak=0.97, final=0.9)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_momentum_warmup_wins_over_warmdown():
    momentum = partial(schedules.muon_momentum, start=0.85, peak=0.97, final=0.9)
    # 500 steps fall from step 175 on: step 399 still rises, step 400 jumps to where the fall has
    # come.
    np.testing.assert_allclose(momentum(399, 500, 400, 0.65), 0.85 + 0.12 * 399 / 400, rtol=1e-6)
    np.testing.assert_allclose(momentum(400, 500, 400, 0.65), 0.97 - 0.07 * 225 / 325, rtol=1e-6)


def test_momentum_without_warmdown():
    got = [
        schedules.muon_momentum(step, 1000, 300, 0.5, start=0.85, peak=0.95, final=0.95)
        for step in (0, 150, 300, 999)
    ]
    np.testing.assert_allclose(got, [0.85, 0.9, 0.95, 0.95], rtol=1e-6)


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25]),
        ("cosine", [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ],
)
def test_weight_decay(kind, expected):
    got = [schedules.weight_decay_multiplier(step, 4, kind) for step in range(4)]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_unknown_weight_decay_schedule():
    with pytest.raises(ValueError, match="'square'"):
        schedules.weight_decay_multiplier(0, 4, "square")


def test_traced_steps_give_the_same():
    def all_three(step):
        return (
            schedules.lr_multiplier(step, 60, 5, 0.65, 0.05),
            schedules.muon_momentum(step, 60, 12, 0.65, start=0.85, peak=0.97, final=0.9),
            schedules.weight_decay_multiplier(step, 60, "cosine"),
        )

    traced = jax.jit(jax.vmap(all_three))(np.arange(60))
    plain = zip(*[all_three(step) for step in range(60)], strict=True)
    for a, b in zip(traced, plain, strict=True):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, np.array(b), rtol=1e-6, atol=1e-6)

"""The learning rate schedule, and those of Muon's momentum and of weight decay, by step.

`step` counts updates from 0 and is a Python int or a traced array; the other arguments are plain
numbers, fixed when the train step is compiled. Results are float32 scalars.

Source: nanochat/scripts/base_train.py@92d63d4 (and @324e69c for the linear weight decay).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

Schedule = Callable[[ArrayLike], jax.Array]


def lr_multiplier(
    step: ArrayLike, steps: int, warmup_steps: int, warmdown_ratio: float, final_fraction: float
) -> jax.Array:
    """Multiplier of all learning rates: linear warm-up, constant 1, linear warm-down.

    The warm-up begins at 1 / warmup_steps. The warm-down begins after step `steps - warmdown` and
    would reach final_fraction at step `steps`, one after the last step.
    """
    warmdown = _warmdown_steps(steps, warmdown_ratio)
    left = (steps - step) / max(warmdown, 1)
    flat_or_falling = jnp.where(step <= steps - warmdown, 1.0, left + (1 - left) * final_fraction)
    return jnp.where(step < warmup_steps, (step + 1) / max(warmup_steps, 1), flat_or_falling)


def muon_momentum(
    step: ArrayLike,
    steps: int,
    warmup_steps: int,
    warmdown_ratio: float,
    start: float,
    peak: float,
    final: float,
) -> jax.Array:
    """Muon's momentum: `start` to `peak` over warmup_steps, then to `final` over the warm-down.

    If the two overlap, the warm-up wins, so that a short run jumps at its end. final = peak: no
    warm-down.
    """
    warmdown = _warmdown_steps(steps, warmdown_ratio)
    risen = step / max(warmup_steps, 1)
    fallen = (step - (steps - warmdown)) / max(warmdown, 1)
    flat_or_falling = jnp.where(fallen >= 0, peak * (1 - fallen) + final * fallen, peak)
    return jnp.where(step < warmup_steps, start * (1 - risen) + peak * risen, flat_or_falling)


def weight_decay_multiplier(step: ArrayLike, steps: int, kind: str) -> jax.Array:
    """Multiplier of Muon's weight decay. kind: constant, or linear or cosine to 0 at step `steps`.

    Raises ValueError for another kind.
    """
    done = jnp.asarray(step) / steps
    match kind:
        case "constant":
            return jnp.ones_like(done)
        case "linear":
            return 1 - done
        case "cosine":
            return 0.5 * (1 + jnp.cos(jnp.pi * done))
    raise ValueError(f"weight_decay_schedule is constant, linear or cosine, not {kind!r}")


def _warmdown_steps(steps: int, ratio: float) -> int:
    # Python's round() takes a half to the even neighbor, as nanochat's does.
    return round(ratio * steps)

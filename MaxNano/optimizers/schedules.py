"""Learning rate, Muon momentum and weight decay as functions of the step.

`step` counts updates from 0 and is a Python int or a traced array; everything else is a plain number that is
fixed when the train step is compiled. Results are float32 scalars.

Source: nanochat/scripts/base_train.py@92d63d4 (and @324e69c for the linear decay).
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def lr_multiplier(
    step: ArrayLike, steps: int, warmup_steps: int, warmdown_ratio: float, final_fraction: float
) -> jax.Array:
    """What every learning rate is multiplied by: up from 1/warmup_steps, 1, then down to final_fraction.

    The fall begins after step `steps - warmdown` and would meet final_fraction at step `steps`, one after the last.
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
    """Muon's momentum: `start` to `peak` over its own warm-up, then to `final` while the learning rates fall.

    Where the two overlap the warm-up wins, so that a short run jumps as it ends. final = peak: no warm-down.
    """
    warmdown = _warmdown_steps(steps, warmdown_ratio)
    risen = step / max(warmup_steps, 1)
    fallen = (step - (steps - warmdown)) / max(warmdown, 1)
    flat_or_falling = jnp.where(fallen >= 0, peak * (1 - fallen) + final * fallen, peak)
    return jnp.where(step < warmup_steps, start * (1 - risen) + peak * risen, flat_or_falling)


def weight_decay_multiplier(step: ArrayLike, steps: int, kind: str) -> jax.Array:
    """What Muon's weight decay is multiplied by; `kind` is constant, linear or cosine, the latter two end at 0."""
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
    # Python's round takes a half to the even neighbor, as nanochat's does.
    return round(ratio * steps)

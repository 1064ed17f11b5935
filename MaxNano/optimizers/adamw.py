"""AdamW as an optax transformation in float32, whatever dtype gradients and parameters have."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

Tree = Any


def adamw(
    betas: tuple[float, float], epsilon: float, weight_decay: float
) -> optax.GradientTransformationExtraArgs:
    """Adam with decoupled weight decay, before the learning rate; updates are float32.

    Source: https://arxiv.org/abs/1711.05101.
    """
    # In float32, 1 - beta in the moment and 1 - beta^k in its bias correction round to the same
    # value and cancel at k = 1.
    beta1, beta2 = map(np.float32, betas)
    return in_float32(
        optax.chain(
            optax.scale_by_adam(beta1, beta2, epsilon), optax.add_decayed_weights(weight_decay)
        )
    )


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Computes `inner` in float32 for gradients, state and parameters of any float dtype.

    The state keeps the dtypes of `inner.init` (moments have their parameter's dtype).
    """

    def widen(tree: Tree) -> Tree:
        return jax.tree.map(
            lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
        )

    def update(updates, state, params=None, **extra):
        del extra
        updates, new_state = inner.update(widen(updates), widen(state), widen(params))
        return updates, optax.tree.cast_like(new_state, state)

    return optax.GradientTransformationExtraArgs(inner.init, update)

"""Muon for the matrices and AdamW for everything else: optax transformations and the table of who gets which.

A matrix is stored (in, out), stacked on leading axes that are a batch here: each layer is a matrix of its own,
so a stack that is cut over devices by layer is updated without communication. nanochat's matrices are
(out, in): its rows are the last axis here.

Source: nanochat/optim.py and nanochat/gpt.py@92d63d4 (groups, order of operations).
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike
from ml_collections import FrozenConfigDict

from MaxNano.distributed.sharding import Rules, constrain
from MaxNano.optimizers import schedules

Schedule = Callable[[ArrayLike], jax.Array]
Tree = Any

# Group -> pattern of the whole path of its parameters. Every parameter must match exactly one.
GROUPS = {
    "lm_head": r"lm_head",
    "token_embed": r"token_embed",
    "value_embeds": r"value_embeds",
    "resid_lambdas": r"resid_lambdas",
    "x0_lambdas": r"x0_lambdas",
    "smear": r"smear_gate|smear_lambda|backout_lambda",
    "muon": r"layers/(attention|mlp)/\w+|value_gate",
}

# Width at which the base rates of tables and head were tuned.
TUNED_WIDTH = 768

# (a, b, c) of x -> a x + b x^3 + c x^5, one row an iteration: the minimax polynomials for 5 iterations, safety
# factor 2e-2, cushion 2. Source: https://arxiv.org/abs/2505.16932 (Polar Express).
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


class Settings(NamedTuple):
    """A group's rate before the schedule, its two decays, and its weight decay before the schedule.

    `betas` are AdamW's; for Muon, the momentum between warm-up and warm-down and the decay of the variance.
    """

    learning_rate: float
    betas: tuple[float, float]
    weight_decay: float


class GroupSummary(NamedTuple):
    """One row of the start-up table."""

    group: str
    parameters: int
    settings: Settings


def group_settings(config: FrozenConfigDict) -> dict[str, Settings]:
    """Settings of every group, with learning_rate_scale, weight_decay_scale and width applied."""
    scale = config.learning_rate_scale
    table_scale = scale * (config.emb_dim / TUNED_WIDTH) ** -0.5
    embedding = config.embedding_lr * table_scale
    scalar = config.scalar_lr * scale
    return {
        "lm_head": Settings(
            config.unembedding_lr * table_scale,
            tuple(config.lm_head_betas),
            config.lm_head_weight_decay,
        ),
        "token_embed": Settings(
            embedding, tuple(config.embedding_betas), config.embedding_weight_decay
        ),
        "value_embeds": Settings(
            embedding * config.value_embed_lr_factor,
            tuple(config.value_embed_betas),
            config.value_embed_weight_decay,
        ),
        "resid_lambdas": Settings(
            scalar * config.resid_lr_factor, tuple(config.resid_betas), config.resid_weight_decay
        ),
        "x0_lambdas": Settings(scalar, tuple(config.x0_betas), config.x0_weight_decay),
        "smear": Settings(config.smear_lr, tuple(config.smear_betas), config.smear_weight_decay),
        "muon": Settings(
            config.matrix_lr * scale,
            (config.muon_momentum, config.muon_beta2),
            config.weight_decay * config.weight_decay_scale,
        ),
    }


def group_summary(params: Tree, config: FrozenConfigDict) -> list[GroupSummary]:
    """The groups that have parameters, in the order of GROUPS; `params` may be abstract shapes."""
    counts = dict.fromkeys(GROUPS, 0)
    leaves = zip(jax.tree.leaves(label_params(params)), jax.tree.leaves(params), strict=True)
    for group, leaf in leaves:
        counts[group] += math.prod(leaf.shape)
    settings = group_settings(config)
    return [GroupSummary(name, count, settings[name]) for name, count in counts.items() if count]


def label_params(params: Tree) -> Tree:
    """The group of every parameter, in a tree like `params`.

    Raises ValueError that names a parameter which no group or more than one matches.
    """

    def label(path, _):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found = [group for group, pattern in GROUPS.items() if re.fullmatch(pattern, name)]
        if len(found) != 1:
            raise ValueError(
                f"parameter {name} matches {' and '.join(found) or 'no group'} in GROUPS of "
                "MaxNano/optimizers/groups.py: exactly one pattern must match it"
            )
        return found[0]

    return jax.tree_util.tree_map_with_path(label, params)


def make_optimizer(
    config: FrozenConfigDict, *, dtype: DTypeLike
) -> optax.GradientTransformationExtraArgs:
    """The optimizer that a config describes.

    `update(grads, state, params, *, step)` gives float32 updates u, so that `optax.apply_updates` rounds p + u
    once, to p's dtype. `step` counts updates from 0 and drives the schedules. `dtype` is the compute dtype, in
    which the Polar Express iterations run where config.muon_dtype is null.
    """

    def rate(step: ArrayLike) -> jax.Array:
        return schedules.lr_multiplier(
            step, config.steps, config.warmup_steps, config.warmdown_ratio, config.final_lr_fraction
        )

    def momentum(step: ArrayLike) -> jax.Array:
        return schedules.muon_momentum(
            step,
            config.steps,
            config.muon_momentum_warmup_steps,
            config.warmdown_ratio,
            config.muon_momentum_start,
            config.muon_momentum,
            config.muon_momentum_final,
        )

    def decay(step: ArrayLike) -> jax.Array:
        return schedules.weight_decay_multiplier(step, config.steps, config.weight_decay_schedule)

    settings = group_settings(config)
    matrices = settings.pop("muon")
    transforms = {
        group: optax.chain(
            adamw(own.betas, config.adam_epsilon, own.weight_decay),
            scale_by_step(lambda step, own=own: -own.learning_rate * rate(step)),
        )
        for group, own in settings.items()
    }
    transforms["muon"] = optax.chain(
        muon(
            momentum,
            weight_decay=lambda step: matrices.weight_decay * decay(step),
            beta2=config.muon_beta2,
            iterations=config.muon_iterations,
            norm_margin=config.muon_norm_margin,
            row_equilibration=config.muon_row_equilibration,
            renormalization=config.muon_renormalize,
            dtype=config.muon_dtype or dtype,
            rules=config.logical_axis_rules,
        ),
        scale_by_step(lambda step: -matrices.learning_rate * rate(step)),
    )
    return optax.partition(transforms, label_params)


# ---- AdamW ----------------------------------------------------------------------------------------------------------


def adamw(
    betas: tuple[float, float], epsilon: float, weight_decay: float
) -> optax.GradientTransformationExtraArgs:
    """Adam with decoupled weight decay of the old parameters: optax's own, in float32 whatever the storage.

    Source: https://arxiv.org/abs/1711.05101.
    """
    # As float32, 1 - beta in the moment and 1 - beta^k in its correction round alike and cancel at k = 1.
    beta1, beta2 = map(np.float32, betas)
    return in_float32(
        optax.chain(
            optax.scale_by_adam(beta1, beta2, epsilon), optax.add_decayed_weights(weight_decay)
        )
    )


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`inner` computed in float32 from gradients, state and parameters of any float dtype.

    The state keeps the dtypes that `inner.init` gave it (moments take their parameter's); updates stay float32.
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


def scale_by_step(schedule: Schedule) -> optax.GradientTransformationExtraArgs:
    """Multiply updates by `schedule(step)`, of the step given to `update` and not of a count of its own."""

    def update(updates, state, params=None, *, step, **extra):
        del params, extra
        factor = schedule(step)
        return jax.tree.map(lambda u: factor * u, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


# ---- Muon -----------------------------------------------------------------------------------------------------------


def muon(
    momentum: Schedule,
    *,
    weight_decay: Schedule,
    beta2: float,
    iterations: int,
    norm_margin: float,
    row_equilibration: bool,
    renormalization: bool,
    dtype: DTypeLike,
    rules: Rules,
) -> optax.GradientTransformationExtraArgs:
    """Direction of Muon for matrices (..., in, out), its cautious weight decay included, before the learning rate.

    beta2 0 leaves out NorMuon; `rules` say which devices take which matrices, each of them whole.
    From row equilibration to the iterations everything is held in `dtype`.
    Source: https://kellerjordan.github.io/posts/muon/ and, for each part, its own function.
    """
    whole = each_matrix(lambda x: constrain(x, ("layers", *(None,) * (x.ndim - 1)), rules))
    parts = [nesterov_momentum(momentum), each_matrix(lambda x: x.astype(dtype)), whole]
    if row_equilibration:
        parts.append(each_matrix(equilibrate_rows))
    parts.append(each_matrix(lambda x: polar_express(x, iterations, norm_margin)))
    parts.append(each_matrix(lambda x: x.astype(jnp.float32)))
    if renormalization:
        parts.append(each_matrix(renormalize))
    if beta2:
        parts.append(scale_by_neuron_variance(beta2))
    parts.append(add_cautious_weight_decay(weight_decay))
    parts.append(each_matrix(scale_by_shape))
    return optax.chain(*parts)


def each_matrix(function: Callable[[jax.Array], jax.Array]) -> optax.GradientTransformation:
    """The transformation that applies `function` to every stack of matrices."""
    return optax.stateless_with_tree_map(lambda update, _: function(update))


class MomentumState(NamedTuple):
    """Exponential average of the gradients."""

    momentum: Tree


def nesterov_momentum(schedule: Schedule) -> optax.GradientTransformationExtraArgs:
    """Average of the gradients with decay `schedule(step)`, looked at one gradient ahead; no bias correction."""

    def init(params):
        return MomentumState(optax.tree.zeros_like(params))

    def update(updates, state, params=None, *, step, **extra):
        del params, extra
        decay = schedule(step)

        def mix(gradient, average):
            return (1 - decay) * gradient + decay * average

        average = jax.tree.map(mix, updates, state.momentum)
        return jax.tree.map(mix, updates, average), MomentumState(average)

    return optax.GradientTransformationExtraArgs(init, update)


def equilibrate_rows(x: jax.Array) -> jax.Array:
    """Bring the weights into each output neuron to one norm, the whole keeping its own (MuonEq).

    Orthogonalization then starts from a better conditioned matrix. Source: https://arxiv.org/abs/2603.28254.
    """
    target = _norm(x) / math.sqrt(x.shape[-1])
    return (x * (target / jnp.maximum(_norm(x, axis=-2), 1e-6))).astype(x.dtype)


def polar_express(x: jax.Array, iterations: int, norm_margin: float) -> jax.Array:
    """Nearly the orthogonal factor of the polar decomposition: singular values go toward 1, vectors stay.

    The products take x's dtype, add up in float32, and are made of the Gram matrix of the shorter side.
    `norm_margin` keeps the largest singular value inside the polynomials' interval despite rounding.
    Source: https://arxiv.org/abs/2505.16932.
    """
    dtype = x.dtype
    # A TPU and a GPU would round float32 operands; what is asked for in float32 is done in it.
    precision = "highest" if dtype == jnp.float32 else None

    def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.matmul(a, b, precision=precision, preferred_element_type=jnp.float32)

    left = x.shape[-2] <= x.shape[-1]
    x = (x / (_norm(x) * norm_margin + 1e-6)).astype(dtype)

    def iterate(x, coefficients):
        a, b, c = coefficients
        gram = matmul(x, x.mT) if left else matmul(x.mT, x)
        low = gram.astype(dtype)
        polynomial = (b * gram + c * matmul(low, low)).astype(dtype)
        step = matmul(polynomial, x) if left else matmul(x, polynomial)
        return (a * x.astype(jnp.float32) + step).astype(dtype), None

    # A loop, so that the products are compiled once.
    return jax.lax.scan(iterate, x, jnp.asarray(POLAR_EXPRESS[:iterations], jnp.float32))[0]


def renormalize(x: jax.Array) -> jax.Array:
    """Bring each matrix to the Frobenius norm that an exactly semi-orthogonal one has (Muon+).

    Source: https://arxiv.org/abs/2602.21545.
    """
    target = math.sqrt(min(x.shape[-2:]))
    return x * (target / jnp.maximum(_norm(x), 1e-6))


class NeuronVarianceState(NamedTuple):
    """Second moment of the updates, of size 1 along the axis over which it is a mean."""

    second_moment: Tree


def scale_by_neuron_variance(beta2: float) -> optax.GradientTransformation:
    """Divide by a running root mean square per neuron, each matrix keeping its Frobenius norm (NorMuon).

    The neurons are the outputs of a matrix, or its inputs where it has more of those.
    Source: https://arxiv.org/abs/2510.05491.
    """

    def mean_square(x: jax.Array) -> jax.Array:
        axis = -2 if x.shape[-1] >= x.shape[-2] else -1
        return jnp.mean(jnp.square(x), axis=axis, keepdims=True)

    def init(params):
        return NeuronVarianceState(
            optax.tree.zeros_like(jax.eval_shape(lambda: jax.tree.map(mean_square, params)))
        )

    def rescale(x: jax.Array, square: jax.Array, moment: jax.Array) -> jax.Array:
        scale = jax.lax.rsqrt(jnp.maximum(moment, 1e-10))
        # Means over one axis stand for all elements: their number cancels in the ratio of the norms.
        before, after = _norm(jnp.sqrt(square)), _norm(jnp.sqrt(square) * scale)
        return x * (scale * (before / jnp.maximum(after, 1e-10)))

    def update(updates, state, params=None):
        del params
        squares = jax.tree.map(mean_square, updates)
        moments = optax.tree.update_moment(squares, state.second_moment, beta2, 1)
        return jax.tree.map(rescale, updates, squares, moments), NeuronVarianceState(moments)

    return optax.GradientTransformation(init, update)


def add_cautious_weight_decay(schedule: Schedule) -> optax.GradientTransformationExtraArgs:
    """Add `schedule(step)` times each weight that the update does not already push away from zero.

    An update of exactly zero lets its weight decay. Source: https://arxiv.org/abs/2510.12402.
    """

    def update(updates, state, params, *, step, **extra):
        del extra
        decay = schedule(step)
        decayed = jax.tree.map(
            lambda u, p: u + decay * jnp.where(u * p >= 0, p, 0), updates, params
        )
        return decayed, state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def scale_by_shape(x: jax.Array) -> jax.Array:
    """Larger updates for matrices with more outputs than inputs, by the root of that ratio."""
    fan_in, fan_out = x.shape[-2:]
    return x * math.sqrt(max(1, fan_out / fan_in))


def _norm(x: jax.Array, axis: int | tuple[int, int] = (-2, -1)) -> jax.Array:
    """Root of the sum of squares over `axis`, kept with size 1; in float32."""
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=axis, keepdims=True))

"""The parameter groups: which parameters each optimizer trains, with which hyperparameters.

Another group is one row in `parameter_groups`; another optimizer for a group is a row and a
`use_<name>` function.

Source: nanochat/gpt.py@92d63d4 (groups and hyperparameters).
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax.typing import ArrayLike, DTypeLike
from ml_collections import FrozenConfigDict

from MaxNano.optimizers import schedules
from MaxNano.optimizers.adamw import adamw
from MaxNano.optimizers.muon import Kernel, muon

Tree = Any

TUNED_WIDTH = 768  # emb_dim at which the learning rates of tables and head were tuned


class Compute(NamedTuple):
    """The dtype and the kernel of Muon's iterations."""

    dtype: DTypeLike
    kernel: Kernel | None = None


class ParameterGroup(NamedTuple):
    """Parameters that share an optimizer and its hyperparameters, after scaling.

    Schedules then vary the learning rate, and Muon's momentum and weight decay.
    """

    name: str
    pattern: str  # regular expression for the whole path of a parameter
    # The update before the learning rate.
    transform: Callable[["ParameterGroup", FrozenConfigDict, Compute], optax.GradientTransformation]
    learning_rate: float
    betas: tuple[float, float]  # AdamW's; for Muon: peak momentum and decay of the second moment
    weight_decay: float


def parameter_groups(config: FrozenConfigDict) -> tuple[ParameterGroup, ...]:
    """The groups. Every parameter must match the pattern of exactly one group."""
    scale = config.learning_rate_scale
    table_scale = scale * (config.emb_dim / TUNED_WIDTH) ** -0.5
    embedding_lr = config.embedding_lr * table_scale
    scalar_lr = config.scalar_lr * scale
    # fmt: off
    return (
        # name, pattern, transform, learning rate, betas, weight decay
        ParameterGroup("lm_head", r"lm_head", use_adamw, config.unembedding_lr * table_scale,
                       config.lm_head_betas, config.lm_head_weight_decay),
        ParameterGroup("token_embed", r"token_embed", use_adamw, embedding_lr,
                       config.embedding_betas, config.embedding_weight_decay),
        ParameterGroup("value_embeds", r"value_embeds", use_adamw,
                       embedding_lr * config.value_embed_lr_factor,
                       config.value_embed_betas, config.value_embed_weight_decay),
        ParameterGroup("resid_lambdas", r"resid_lambdas", use_adamw,
                       scalar_lr * config.resid_lr_factor,
                       config.resid_betas, config.resid_weight_decay),
        ParameterGroup("x0_lambdas", r"x0_lambdas", use_adamw, scalar_lr,
                       config.x0_betas, config.x0_weight_decay),
        ParameterGroup("smear", r"smear_gate|smear_lambda|backout_lambda", use_adamw,
                       config.smear_lr, config.smear_betas, config.smear_weight_decay),
        ParameterGroup("muon", r"layers/(attention|mlp)/\w+|value_gate", use_muon,
                       config.matrix_lr * scale, (config.muon_momentum, config.muon_beta2),
                       config.weight_decay * config.weight_decay_scale),
    )
    # fmt: on


def use_adamw(
    group: ParameterGroup, config: FrozenConfigDict, compute: Compute
) -> optax.GradientTransformationExtraArgs:
    """AdamW with the group's hyperparameters, in float32."""
    del compute
    return adamw(group.betas, config.adam_epsilon, group.weight_decay)


def use_muon(
    group: ParameterGroup, config: FrozenConfigDict, compute: Compute
) -> optax.GradientTransformationExtraArgs:
    """Muon with the group's hyperparameters; its iterations run in muon_dtype or compute.dtype."""
    peak_momentum, beta2 = group.betas

    def momentum(step: ArrayLike) -> jax.Array:
        return schedules.muon_momentum(
            step,
            config.steps,
            config.muon_momentum_warmup_steps,
            config.warmdown_ratio,
            config.muon_momentum_start,
            peak_momentum,
            config.muon_momentum_final,
        )

    def weight_decay(step: ArrayLike) -> jax.Array:
        return group.weight_decay * schedules.weight_decay_multiplier(
            step, config.steps, config.weight_decay_schedule
        )

    return muon(
        momentum,
        weight_decay=weight_decay,
        beta2=beta2,
        iterations=config.muon_iterations,
        norm_margin=config.muon_norm_margin,
        row_equilibration=config.muon_row_equilibration,
        renormalization=config.muon_renormalize,
        dtype=config.muon_dtype or compute.dtype,
        rules=config.logical_axis_rules,
        kernel=compute.kernel,
    )


def make_optimizer(
    config: FrozenConfigDict,
    *,
    dtype: DTypeLike,
    kernel: Kernel | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a config: each parameter group with its transform, rate and schedule.

    `update(grads, state, params, *, step)` returns float32 updates u, so that `optax.apply_updates`
    rounds p + u once, to p's dtype. step: number of updates so far; it drives the schedules.
    dtype: the compute dtype. kernel: of Muon.
    """

    def lr_multiplier(step: ArrayLike) -> jax.Array:
        return schedules.lr_multiplier(
            step, config.steps, config.warmup_steps, config.warmdown_ratio, config.final_lr_fraction
        )

    def scale_by_learning_rate(learning_rate: float) -> optax.GradientTransformationExtraArgs:
        return scale_by_step(lambda step: -learning_rate * lr_multiplier(step))

    groups = parameter_groups(config)
    transforms = {
        group.name: in_scope(
            group.name,
            optax.chain(
                group.transform(group, config, Compute(dtype, kernel)),
                scale_by_learning_rate(group.learning_rate),
            ),
        )
        for group in groups
    }
    return optax.partition(transforms, lambda params: label_params(params, groups))


def in_scope(
    name: str, transform: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """The transformation, whose operations a profile shows under `name`."""
    update = jax.named_scope(name)(transform.update)
    return optax.GradientTransformationExtraArgs(transform.init, update)


def scale_by_step(schedule: schedules.Schedule) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by `schedule(step)`, where `step` is an argument of `update`."""

    def update(updates, state, params=None, *, step, **extra):
        del params, extra
        factor = schedule(step)
        return jax.tree.map(lambda u: factor * u, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def label_params(params: Tree, groups: Sequence[ParameterGroup]) -> Tree:
    """The name of each parameter's group, in a tree like `params`.

    Raises ValueError that names a parameter which matches no group or several.
    """

    def label(path, _):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        matches = [group.name for group in groups if re.fullmatch(group.pattern, name)]
        if len(matches) != 1:
            raise ValueError(
                f"parameter {name} matches {' and '.join(matches) or 'no group'} in "
                "MaxNano/optimizers/groups.py: exactly one pattern must match it"
            )
        return matches[0]

    return jax.tree_util.tree_map_with_path(label, params)


def count_parameters(params: Tree, groups: Sequence[ParameterGroup]) -> dict[str, int]:
    """Number of parameters of each group, in the order of `groups`; empty groups are left out.

    params: arrays or abstract shapes.
    """
    counts = dict.fromkeys((group.name for group in groups), 0)
    labels = jax.tree.leaves(label_params(params, groups))
    for name, leaf in zip(labels, jax.tree.leaves(params), strict=True):
        counts[name] += math.prod(leaf.shape)
    return {name: count for name, count in counts.items() if count}

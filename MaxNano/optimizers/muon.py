"""Muon as an optax transformation: orthogonalized momentum for matrices.

A matrix has shape (in, out); leading axes are stacks of independent matrices, so layers that are
sharded over devices are updated without communication. nanochat's matrices are (out, in): its rows
are the last axis here.

Source: https://kellerjordan.github.io/posts/muon/ and nanochat/optim.py@92d63d4 (order of
operations); each function names its own source.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from MaxNano.distributed.sharding import Rules, constrain, over_owners, owners
from MaxNano.optimizers.schedules import Schedule

Tree = Any

# Coefficients (a, b, c) of x -> a x + b x^3 + c x^5, one row per iteration: the minimax polynomials
# for 5 iterations, safety factor 2e-2, cushion 2.
# Source: https://arxiv.org/abs/2505.16932 (Polar Express).
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


class Kernel(NamedTuple):
    """Polar Express iterations of the matrices of one device, as models/kernels/polar.py has them."""

    fits: Callable[[int, int, int], bool]  # whether it takes matrices (M, N) of some bytes a number
    iterate: Callable[..., jax.Array]


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
    kernel: Kernel | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon's update of matrices (..., in, out) with cautious weight decay, before the learning
    rate.

    beta2: decay of NorMuon's second moment, 0 for none. dtype: of everything from row equilibration
    to the Polar Express iterations. rules: they decide which devices compute which matrices; each
    matrix is computed on one device, or on several that compute the same.
    """

    def to_owners(x):
        spec = owners(rules, len(x))
        if spec is None:
            return constrain(x, ("layers", *(None,) * (x.ndim - 1)), rules)
        return jax.lax.with_sharding_constraint(x, spec)

    def orthogonalize(x):
        if kernel and x.ndim == 3 and kernel.fits(*x.shape[1:], x.dtype.itemsize):
            iterate = partial(kernel.iterate, coefficients=POLAR_EXPRESS[:iterations])
            done = over_owners(iterate, inside_interval(x, norm_margin), rules)
            if done is not None:
                return done
        return polar_express(x, iterations, norm_margin)

    def on_owners(x):
        # With FSDP the update travels back once all of it is computed.
        spec = owners(rules, len(x))
        return x if spec is None else jax.lax.with_sharding_constraint(x, spec)

    parts = [nesterov_momentum(momentum), each_matrix(lambda x: x.astype(dtype))]
    parts.append(each_matrix(to_owners))
    if row_equilibration:
        parts.append(each_matrix(equilibrate_rows))
    parts.append(each_matrix(orthogonalize))
    parts.append(each_matrix(lambda x: x.astype(jnp.float32)))
    if renormalization:
        parts.append(each_matrix(renormalize))
    if beta2:
        parts.append(scale_by_neuron_variance(beta2))
    parts.append(each_matrix(on_owners))
    parts.append(add_cautious_weight_decay(weight_decay))
    parts.append(each_matrix(scale_by_shape))
    return optax.chain(*parts)


def each_matrix(function: Callable[[jax.Array], jax.Array]) -> optax.GradientTransformation:
    """The transformation that applies `function` to every stack of matrices."""
    return optax.stateless_with_tree_map(lambda update, _: function(update))


class MomentumState(NamedTuple):
    """Exponential moving average of the gradients."""

    momentum: Tree


def nesterov_momentum(schedule: Schedule) -> optax.GradientTransformationExtraArgs:
    """Nesterov momentum: a moving average with decay `schedule(step)`, without bias correction."""

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
    """Scales the weights of each output neuron to one norm; the matrix keeps its norm (MuonEq).

    The matrix is then better conditioned for orthogonalization.
    Source: https://arxiv.org/abs/2603.28254.
    """
    target = _norm(x) / math.sqrt(x.shape[-1])
    return (x * (target / jnp.maximum(_norm(x, axis=-2), 1e-6))).astype(x.dtype)


def polar_express(x: jax.Array, iterations: int, norm_margin: float) -> jax.Array:
    """Approximates the orthogonal factor of the polar decomposition, in x's dtype.

    Singular values approach 1, singular vectors stay. The products accumulate in float32 and use
    the Gram matrix of the shorter side. `norm_margin` keeps the largest singular value inside the
    interval of the polynomials despite rounding.
    Source: https://arxiv.org/abs/2505.16932.
    """
    dtype = x.dtype
    # TPUs and GPUs round float32 operands by default; "highest" keeps float32.
    precision = "highest" if dtype == jnp.float32 else None

    def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.matmul(a, b, precision=precision, preferred_element_type=jnp.float32)

    left = x.shape[-2] <= x.shape[-1]
    x = inside_interval(x, norm_margin)

    def iterate(x, coefficients):
        a, b, c = coefficients
        gram = matmul(x, x.mT) if left else matmul(x.mT, x)
        low = gram.astype(dtype)
        polynomial = (b * gram + c * matmul(low, low)).astype(dtype)
        step = matmul(polynomial, x) if left else matmul(x, polynomial)
        return (a * x.astype(jnp.float32) + step).astype(dtype), None

    # A scan, so that the products are compiled once.
    return jax.lax.scan(iterate, x, jnp.asarray(POLAR_EXPRESS[:iterations], jnp.float32))[0]


def inside_interval(x: jax.Array, norm_margin: float) -> jax.Array:
    """Each matrix (..., in, out) divided by norm_margin times its Frobenius norm."""
    return (x / (_norm(x) * norm_margin + 1e-6)).astype(x.dtype)


def renormalize(x: jax.Array) -> jax.Array:
    """Scales each matrix to the Frobenius norm of a semi-orthogonal matrix (Muon+).

    Source: https://arxiv.org/abs/2602.21545.
    """
    target = math.sqrt(min(x.shape[-2:]))
    return x * (target / jnp.maximum(_norm(x), 1e-6))


class NeuronVarianceState(NamedTuple):
    """Second moment of the updates, with size 1 along the reduced axis."""

    second_moment: Tree


def scale_by_neuron_variance(beta2: float) -> optax.GradientTransformation:
    """Divides by the running root mean square of each neuron; keeps the Frobenius norm (NorMuon).

    Neurons are the outputs of a matrix, or the inputs if it has more inputs.
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
        # The norms of the means suffice: the number of elements per mean cancels in the ratio.
        before, after = _norm(jnp.sqrt(square)), _norm(jnp.sqrt(square) * scale)
        return x * (scale * (before / jnp.maximum(after, 1e-10)))

    def update(updates, state, params=None):
        del params
        squares = jax.tree.map(mean_square, updates)
        moments = optax.tree.update_moment(squares, state.second_moment, beta2, 1)
        return jax.tree.map(rescale, updates, squares, moments), NeuronVarianceState(moments)

    return optax.GradientTransformation(init, update)


def add_cautious_weight_decay(schedule: Schedule) -> optax.GradientTransformationExtraArgs:
    """Decays, by `schedule(step)`, the weights that the update does not push away from zero.

    A weight whose update is exactly zero decays. Source: https://arxiv.org/abs/2510.12402.
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
    """Scales matrices with more outputs than inputs by the square root of that ratio."""
    fan_in, fan_out = x.shape[-2:]
    return x * math.sqrt(max(1, fan_out / fan_in))


def _norm(x: jax.Array, axis: int | tuple[int, int] = (-2, -1)) -> jax.Array:
    """Euclidean norm over `axis` in float32, with keepdims."""
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=axis, keepdims=True))

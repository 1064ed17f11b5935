"""Muon's Polar Express iterations in one Pallas kernel for TPU: a matrix stays in VMEM for all of
them.

Legend: M rows, N columns, S the shorter side.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from MaxNano.models.kernels.flash import dot
from MaxNano.models.kernels.products import LANES, VMEM_LIMIT_BYTES, each

PART = 256  # rows or columns at a time
LARGEST_BYTES = 100 * 2**20

_NT = ((1,), (1,))


def fits(rows: int, columns: int, itemsize: int) -> bool:
    """Whether the kernel takes matrices (M, N) of a dtype of `itemsize` bytes."""
    shorter = min(rows, columns)
    needed = 2 * rows * columns * itemsize + shorter**2 * (4 + 2 * itemsize)
    return rows % LANES == columns % LANES == 0 and needed <= LARGEST_BYTES


def iterate(
    x: jax.Array, coefficients: Sequence[tuple[float, float, float]], *, interpret: bool
) -> jax.Array:
    """x -> a x + (b G + c G^2) x for each (a, b, c); G = x x^T of each of the matrices x (L, M, N).

    Where M > N, G = x^T x, and x stands left of the polynomial. Products of numbers in x's dtype are
    summed in float32; G, the polynomial and x are rounded to x's dtype after each.
    """
    count, rows, columns = x.shape
    is_wide, shorter = rows <= columns, min(rows, columns)

    def kernel(table_ref, x_ref, out_ref, gram, low, polynomial):
        out_ref[...] = x_ref[...]

        def part(span):
            return (0, slice(None), span) if is_wide else (0, span)

        def iteration(n, _):
            a, b, c = (table_ref[n, i] for i in range(3))
            gram[...] = jnp.zeros_like(gram)

            def add_to_gram(span):
                piece = out_ref[part(span)]
                piece = piece if is_wide else piece.T
                gram[...] += dot(piece, piece, _NT, interpret)

            def square(span):
                both = b * gram[:, span] + c * dot(low[...], low[:, span], ((1,), (0,)), interpret)
                polynomial[:, span] = both.astype(polynomial.dtype)

            def step(span):
                piece = out_ref[part(span)]
                factors = (polynomial[...], piece) if is_wide else (piece, polynomial[...])
                moved = dot(*factors, ((1,), (0,)), interpret)
                out_ref[part(span)] = (a * piece.astype(jnp.float32) + moved).astype(x.dtype)

            each(max(rows, columns), PART, add_to_gram)
            low[...] = gram[...].astype(low.dtype)
            each(shorter, PART, square)
            each(max(rows, columns), PART, step)

        jax.lax.fori_loop(0, len(coefficients), iteration, None)

    matrix = pl.BlockSpec(
        (1, rows, columns), lambda i: (i, 0, 0), pipeline_mode=pl.Buffered(buffer_count=1)
    )
    products = 2 * rows * columns * shorter * 2 + 2 * shorter**3
    return pl.pallas_call(
        kernel,
        grid=(count,),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), matrix],
        out_specs=matrix,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[
            pltpu.VMEM((shorter, shorter), jnp.float32),
            pltpu.VMEM((shorter, shorter), x.dtype),
            pltpu.VMEM((shorter, shorter), x.dtype),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_LIMIT_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=count * len(coefficients) * products,
            transcendentals=0,
            bytes_accessed=2 * math.prod(x.shape) * x.dtype.itemsize,
        ),
        interpret=interpret,
        name="polar_express",
    )(jnp.asarray(coefficients, jnp.float32), x)

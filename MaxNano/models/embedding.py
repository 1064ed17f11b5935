"""Rows of tables by token, and their gradient: the sum of the rows of each token.

A table's gradient is a scatter of as many rows as there are tokens. On a TPU the rows are put in the order of their
tokens and summed tile by tile by a Pallas kernel; one order serves all tables of a batch.

Legend: T tokens (flat), V vocab, W width of a row, E tables.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

METHODS = ("scatter", "sorted", "one_hot")

_LARGEST_TILE = 256  # table rows, and gradient rows, that the kernel takes at a time
_SUBLANES = 16


def resolve(method: str, mesh: jax.sharding.Mesh) -> str:
    """The gradient method that embedding_gradient=auto means on a mesh.

    Sorted needs tables that lie whole on each device while a step uses them.
    """
    if method != "auto":
        return method
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    return "sorted" if on_tpu and mesh.shape.get("tensor", 1) == 1 else "scatter"


class Order(NamedTuple):
    """The tokens of a batch, flat (T,), and where each stands among them when they are sorted."""

    tokens: jax.Array
    permutation: jax.Array | None
    ordered: jax.Array | None


def order(tokens: jax.Array, method: str) -> Order:
    """Prepare tokens of any shape for `lookup` with a gradient method: scatter, sorted or one_hot."""
    tokens = tokens.reshape(-1)
    if method != "sorted":
        return Order(tokens, None, None)
    positions = jnp.arange(tokens.size, dtype=jnp.int32)
    ordered, permutation = jax.lax.sort_key_val(tokens.astype(jnp.int32), positions)
    return Order(tokens, permutation, ordered)


def rows(tables: jax.Array, index: jax.Array | int, tokens: jax.Array) -> jax.Array:
    """Rows (..., W) of table `index` of `tables` (E, V, W) for tokens (...), read from the stack in place."""
    return tables.reshape(-1, tables.shape[2])[index * tables.shape[1] + tokens]


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def lookup(
    own: jax.Array, tables: jax.Array, index: jax.Array, tokens: Order, method: str, interpret: bool
) -> jax.Array:
    """Rows (T, W) of table `index` of `tables` (E, V, W).

    Gradients go to `own` (V, W), which must be that table and is never read: inside a loop over layers this lets the
    forward pass read the stack of tables in place and the backward pass write each gradient once.
    """
    return rows(tables, index, tokens.tokens)


def _lookup_forward(own, tables, index, tokens, method, interpret):
    # Of `own` only shape and dtype are needed; an empty slice carries them.
    return lookup(own, tables, index, tokens, method, interpret), (own[:, :0], tokens)


def _lookup_backward(method, interpret, residuals, cotangent):
    like, tokens = residuals
    gradient = table_gradient(cotangent, tokens, like.shape[0], method, interpret)
    return gradient.astype(like.dtype), None, None, None


lookup.defvjp(_lookup_forward, _lookup_backward)


def table_gradient(
    rows: jax.Array, tokens: Order, size: int, method: str, interpret: bool
) -> jax.Array:
    """Sum over the tokens of `rows` (T, W) for each of `size` tokens: (size, W), added up in float32."""
    if method == "scatter":
        zeros = jnp.zeros((size, rows.shape[1]), jnp.float32)
        return zeros.at[tokens.tokens].add(rows.astype(jnp.float32))
    if method == "one_hot":
        hot = tokens.tokens[:, None] == jnp.arange(size, dtype=tokens.tokens.dtype)
        return _dot(hot.astype(rows.dtype), rows, ((0,), (0,)))
    return _sorted_sum(rows[tokens.permutation], tokens.ordered, size, interpret)


def _sorted_sum(rows, ordered, size, interpret):
    """`rows` (T, W) in the order of their tokens `ordered` (T,) -> (size, W) in rows' dtype."""
    total, width = rows.shape
    if size % _SUBLANES:
        raise ValueError(
            f"embedding_gradient=sorted needs tables of a multiple of {_SUBLANES} rows, not {size}: "
            f"set vocab_multiple to a multiple of {_SUBLANES}, or embedding_gradient=scatter"
        )
    tile = max(n for n in range(_SUBLANES, _LARGEST_TILE + 1, _SUBLANES) if size % n == 0)
    taken = max(n for n in range(1, _LARGEST_TILE + 1) if total % n == 0)
    bounds = np.arange(0, size + 1, tile, dtype=np.int32)
    starts = jnp.searchsorted(ordered, bounds, method="sort").astype(jnp.int32)
    return pl.pallas_call(
        partial(_sum_kernel, tile=tile, taken=taken),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(size // tile,),
            in_specs=[
                pl.BlockSpec((total // taken, 1, taken), lambda v, starts: (0, 0, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec((tile, width), lambda v, starts: (v, 0)),
            scratch_shapes=[
                pltpu.VMEM((2, taken, width), rows.dtype),
                pltpu.VMEM((tile, width), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((size, width), rows.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=pl.CostEstimate(
            # Each tile of the table looks at its own rows, and at two blocks more where it begins and ends.
            flops=2 * (total + size // tile * taken) * tile * width,
            transcendentals=0,
            bytes_accessed=(total + size // tile * taken + size) * width * rows.dtype.itemsize,
        ),
        interpret=interpret,
        name="sorted_row_sum",
    )(starts, ordered.reshape(-1, 1, taken), rows)


def _sum_kernel(starts, ids, rows, out, buffer, total, arrived, *, tile, taken):
    """One tile of the table: every block of rows that has some of its tokens, two in flight."""
    own = pl.program_id(0)
    first = starts[own] // taken
    stop = (starts[own + 1] + taken - 1) // taken

    def fetch(block, slot):
        return pltpu.make_async_copy(
            rows.at[pl.ds(block * taken, taken)], buffer.at[slot], arrived.at[slot]
        )

    total[...] = jnp.zeros_like(total)

    @pl.when(first < stop)
    def _():
        fetch(first, 0).start()

    @pl.loop(first, stop)
    def _(block):
        slot = (block - first) % 2

        @pl.when(block + 1 < stop)
        def _():
            fetch(block + 1, 1 - slot).start()

        fetch(block, slot).wait()
        token = own * tile + jax.lax.broadcasted_iota(jnp.int32, (tile, taken), 0)
        hot = (token == ids[block]).astype(buffer.dtype)
        total[...] += _dot(hot, buffer[slot], ((1,), (0,)))

    out[...] = total[...].astype(out.dtype)


def _dot(a, b, contracting):
    precision = "highest" if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (contracting, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )

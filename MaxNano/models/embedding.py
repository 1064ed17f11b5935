"""Embedding lookup, and the gradient of the tables: the sum of the rows of each token.

The gradient of a table is a scatter of one row per token. By default on a TPU, without tensor
parallelism, the rows are sorted by token and a Pallas kernel sums them tile by tile. All tables of a
batch use the same sorted order.

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

_LARGEST_TILE = 256  # most table rows, and most gradient rows, of one tile of the kernel
_SUBLANES = 16


def resolve(method: str, mesh: jax.sharding.Mesh) -> str:
    """The gradient method to use on a mesh; embedding_gradient=auto picks one.

    The sorted method needs tables that each device holds whole during a step.
    """
    if method != "auto":
        return method
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    return "sorted" if on_tpu and mesh.shape.get("tensor", 1) == 1 else "scatter"


class Order(NamedTuple):
    """The tokens of a batch, flat (T,), and their sorted order if the gradient method needs it."""

    tokens: jax.Array
    permutation: jax.Array | None
    ordered: jax.Array | None


def order(tokens: jax.Array, method: str) -> Order:
    """The Order of tokens of any shape for a gradient method: scatter, sorted or one_hot."""
    tokens = tokens.reshape(-1)
    if method != "sorted":
        return Order(tokens, None, None)
    positions = jnp.arange(tokens.size, dtype=jnp.int32)
    # On a TPU a stable sort takes twice as long to compile.
    ordered, permutation = jax.lax.sort(
        (tokens.astype(jnp.int32), positions), num_keys=1, is_stable=False
    )
    return Order(tokens, permutation, ordered)


def rows(tables: jax.Array, index: jax.Array | int, tokens: jax.Array) -> jax.Array:
    """Rows (..., W) of table `index` of `tables` (E, V, W) for tokens (...), read from the stack in
    place.
    """
    return tables.reshape(-1, tables.shape[2])[index * tables.shape[1] + tokens]


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def lookup(
    table: jax.Array,
    tables: jax.Array,
    index: jax.Array,
    tokens: Order,
    method: str,
    interpret: bool,
) -> jax.Array:
    """Rows (T, W) of table `index` of `tables` (E, V, W).

    The gradient goes to `table` (V, W), which must be that table and is never read. In a scan over
    layers the forward pass then reads the stack of tables in place, and the backward pass writes
    each gradient once.
    """
    return rows(tables, index, tokens.tokens)


def _lookup_forward(table, tables, index, tokens, method, interpret):
    # The backward pass needs only the shape and dtype of `table`; an empty slice carries them.
    return lookup(table, tables, index, tokens, method, interpret), (table[:, :0], tokens)


def _lookup_backward(method, interpret, residuals, cotangent):
    like, tokens = residuals
    gradient = table_gradient(cotangent, tokens, like.shape[0], method, interpret)
    return gradient.astype(like.dtype), None, None, None


lookup.defvjp(_lookup_forward, _lookup_backward)


def table_gradient(
    rows: jax.Array, tokens: Order, size: int, method: str, interpret: bool
) -> jax.Array:
    """The sum of the `rows` (T, W) of each token: (size, W), summed in float32.

    "sorted" returns the dtype of the rows, the other methods float32.
    """
    if method == "scatter":
        zeros = jnp.zeros((size, rows.shape[1]), jnp.float32)
        return zeros.at[tokens.tokens].add(rows.astype(jnp.float32))
    if method == "one_hot":
        hot = tokens.tokens[:, None] == jnp.arange(size, dtype=tokens.tokens.dtype)
        return _dot(hot.astype(rows.dtype), rows, ((0,), (0,)))
    return _sorted_sum(rows[tokens.permutation], tokens.ordered, size, interpret)


def _sorted_sum(rows, ordered, size, interpret):
    """The sum of `rows` (T, W), sorted by their tokens `ordered` (T,) -> (size, W) in rows' dtype."""
    total, width = rows.shape
    if size % _SUBLANES:
        raise ValueError(
            f"embedding_gradient=sorted needs tables of a multiple of {_SUBLANES} rows, not {size}: "
            f"set vocab_multiple to a multiple of {_SUBLANES}, or embedding_gradient=scatter"
        )
    tile = max(n for n in range(_SUBLANES, _LARGEST_TILE + 1, _SUBLANES) if size % n == 0)
    taken = max(n for n in range(1, _LARGEST_TILE + 1) if total % n == 0)
    bounds = np.arange(0, size + 1, tile, dtype=np.int32)
    starts = jnp.searchsorted(ordered, bounds, method="compare_all").astype(jnp.int32)
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
            # Each tile of the table reads its rows, and parts of two more blocks at its ends.
            flops=2 * (total + size // tile * taken) * tile * width,
            transcendentals=0,
            bytes_accessed=(total + size // tile * taken + size) * width * rows.dtype.itemsize,
        ),
        interpret=interpret,
        name="sorted_row_sum",
    )(starts, ordered.reshape(-1, 1, taken), rows)


def _sum_kernel(starts, ids, rows, out, buffer, total, arrived, *, tile, taken):
    """One tile of the table: sums every block of rows that has some of its tokens, two in flight."""
    index = pl.program_id(0)
    first = starts[index] // taken
    stop = (starts[index + 1] + taken - 1) // taken

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
        token = index * tile + jax.lax.broadcasted_iota(jnp.int32, (tile, taken), 0)
        hot = (token == ids[block]).astype(buffer.dtype)
        total[...] += _dot(hot, buffer[slot], ((1,), (0,)))

    out[...] = total[...].astype(out.dtype)


def _dot(a, b, contracting):
    precision = "highest" if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (contracting, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )

"""A layer's matrix products in three Pallas kernels for TPU, each with what stands around them:
`project` (mix, norm, product), `add_product` (product, residual) and `mlp` (norm, two products,
residual).

Matrices stay in VMEM while the tokens pass in tiles. What stands before and after a product is
computed on a tile, so that no norm, mix, activation or residual passes through HBM by itself. The
backward kernels compute norms and the MLP's hidden layer again, and sum the gradients of matrices
in VMEM, in float32, over all tokens of a device.

Legend: T tokens, D embed, F columns.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from MaxNano.models import layers
from MaxNano.models.kernels.flash import as_bits, dot

LANES = 128
ROWS = 64  # of a tile at a time, beside products: their numbers fit into registers
VMEM_LIMIT_BYTES = 124 * 2**20
# Of it for matrices and the float32 sums of their gradients; and for these and tiles, beside what
# the compiler needs.
MATRIX_BYTES = 109 * 2**20
USABLE_BYTES = int(121.5 * 2**20)

DIRECTIONS = ("forward", "backward")

_NT = ((1,), (1,))


class Size(NamedTuple):
    """What a kernel takes at a time, where that divides what there is."""

    tokens: int
    columns: int


# More tokens use a matrix longer before the next one is loaded into the matrix unit, more columns
# leave fewer gaps between products and take longer to compile. benchmarks/products.py measures.
SIZES = {
    "project_forward": Size(1024, 512),
    "project_backward": Size(512, 512),
    "add_product_forward": Size(1024, 512),
    "add_product_backward": Size(1024, 512),
    "mlp_forward": Size(1024, 512),
    "mlp_backward": Size(256, 512),  # more tokens do not fit beside the matrices of d24
}


class Numbers(NamedTuple):
    """The static arguments of a call."""

    epsilon: float = 0.0
    interpret: bool = False

    def dot(self, a, b, contracting=((1,), (0,))):
        """The product of two matrices over the axes `contracting`, summed in float32."""
        return dot(a, b, contracting, self.interpret)

    def normalize(self, x):
        """x (T, D) float32 as layers.rms_norm has it, and 1 / root mean square of each row (T, 1)."""
        rms = jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return x / rms, 1 / rms


# ---- Mix, norm and product ----------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def project(
    x: jax.Array, x0: jax.Array, scales: jax.Array, w: jax.Array, first: bool, numbers: Numbers
) -> list[jax.Array]:
    """The mix scales[0] x + scales[1] x0 (T, D), and the product (T, F) of its norm and w (D, F).

    scales (2,) float32. If `first`, also the norm's first 128 channels (T, 128).
    """
    return _project_forward(x, x0, scales, w, first, numbers)[0]


@partial(jax.jit, static_argnums=(4, 5))
def _project_forward(x, x0, scales, w, first, numbers):
    call = _Call("project_forward", x, numbers, [w])

    def kernel(scales_ref, x_ref, x0_ref, w_ref, mixed_ref, out_ref, *others):
        *firsts, norm = others

        @call.rows
        def _(rows):
            mixed_ref[rows] = _mix(scales_ref, x_ref, x0_ref, rows)
            y, _ = numbers.normalize(mixed_ref[rows].astype(jnp.float32))
            norm[rows] = y.astype(norm.dtype)
            for ref in firsts:
                ref[rows] = norm[rows, :lanes]

        @call.columns(w.shape[1])
        def _(span):
            out_ref[:, span] = numbers.dot(norm[...], w_ref[:, span]).astype(out_ref.dtype)

    lanes = min(LANES, x.shape[1])
    widths = (x.shape[1], w.shape[1], *(lanes,) * first)
    out = call(
        kernel,
        [Scalars(scales), x, x0, Whole(w)],
        [jax.ShapeDtypeStruct((len(x), width), x.dtype) for width in widths],
        [call.tile(x.dtype)],
        flops=2 * len(x) * w.size,
    )
    return out, (x, x0, scales, w)


@partial(jax.jit, static_argnums=(0, 1))
def _project_backward(first, numbers, residuals, cotangents):
    x, x0, scales, w = residuals
    call = _Call("project_backward", x, numbers, [w])
    width = x.shape[1]

    def kernel(scales_ref, x_ref, x0_ref, w_ref, dmixed_ref, dout_ref, *others):
        dfirsts, (dx_ref, dx0_ref, sums_ref, dw_ref, *scratch) = others[:first], others[first:]
        mixed, inverse, norm, norm_t, dnorm = scratch
        _zero_before_first_tile(dw_ref)
        sums_ref[...] = jnp.zeros_like(sums_ref)

        @call.rows
        def _(rows):
            mixed[rows] = _mix(scales_ref, x_ref, x0_ref, rows)
            y, inverse[rows] = numbers.normalize(mixed[rows].astype(jnp.float32))
            norm[rows] = y.astype(norm.dtype)
            dnorm[rows] = jnp.zeros((rows.size, width), jnp.float32)
            for ref in dfirsts:
                dnorm[rows, : ref.shape[1]] = ref[rows].astype(jnp.float32)

        norm_t[...] = norm[...].T

        @call.columns(w.shape[1])
        def _(span):
            dnorm[...] += numbers.dot(dout_ref[:, span], w_ref[:, span], _NT)
            dw_ref[:, span] += numbers.dot(norm_t[...], dout_ref[:, span])

        @call.rows
        def _(rows):
            grad = _norm_gradient(mixed[rows], inverse[rows], dnorm[rows])
            grad += dmixed_ref[rows].astype(jnp.float32)
            dx_ref[rows] = (scales_ref[0] * grad).astype(dx_ref.dtype)
            dx0_ref[rows] = (scales_ref[1] * grad).astype(dx0_ref.dtype)
            for n, ref in enumerate((x_ref, x0_ref)):
                terms = (grad * ref[rows].astype(jnp.float32)).reshape(-1, 8, width)
                sums_ref[8 * n : 8 * n + 8] += jnp.sum(terms, axis=0)

    dx, dx0, sums, dw = call(
        kernel,
        [Scalars(scales), x, x0, Whole(w), *cotangents],
        [
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct(x.shape, x0.dtype),
            # Of each tile and scale 8 rows: the sums stay short, and so exact.
            jax.ShapeDtypeStruct((call.tiles * 16, width), jnp.float32),
            Whole(jax.ShapeDtypeStruct(w.shape, jnp.float32)),
        ],
        [
            call.tile(x.dtype),
            call.column,
            call.tile(x.dtype),
            call.tile(x.dtype, transposed=True),
            call.tile(jnp.float32),
        ],
        flops=4 * len(x) * w.size,
    )
    sums = jnp.sum(sums.reshape(-1, 2, 8, width), axis=(0, 2, 3))
    return dx, dx0, sums, dw.astype(w.dtype)


project.defvjp(_project_forward, _project_backward)


def _mix(scales_ref, x_ref, x0_ref, rows):
    x, x0 = (ref[rows].astype(jnp.float32) for ref in (x_ref, x0_ref))
    return (scales_ref[0] * x + scales_ref[1] * x0).astype(x_ref.dtype)


def _norm_gradient(x, inverse, grad):
    """The gradient of x (T, D), float32, from that of its norm; see Numbers.normalize."""
    x = x.astype(jnp.float32)
    along = jnp.mean(grad * x, axis=-1, keepdims=True) * (inverse * inverse)
    return (grad - x * along) * inverse


# ---- Product and residual -----------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def add_product(x: jax.Array, y: jax.Array, w: jax.Array, numbers: Numbers) -> jax.Array:
    """x (T, D) and the product of y (T, F) and w (F, D), added in float32."""
    return _add_product_forward(x, y, w, numbers)[0]


@partial(jax.jit, static_argnums=3)
def _add_product_forward(x, y, w, numbers):
    call = _Call("add_product_forward", x, numbers, [w])

    def kernel(x_ref, y_ref, w_ref, out_ref):
        @call.columns(w.shape[1])
        def _(span):
            product = numbers.dot(_floats(y_ref[...], y.dtype), w_ref[:, span])
            out_ref[:, span] = (x_ref[:, span].astype(jnp.float32) + product).astype(out_ref.dtype)

    [out] = call(
        kernel,
        [x, as_bits(y), Whole(w)],
        [jax.ShapeDtypeStruct(x.shape, x.dtype)],
        flops=2 * len(x) * w.size,
    )
    return out, (y, w)


@partial(jax.jit, static_argnums=0)
def _add_product_backward(numbers, residuals, cotangent):
    y, w = residuals
    call = _Call("add_product_backward", y, numbers, [w])

    def kernel(y_ref, dout_ref, w_ref, dy_ref, dw_ref):
        _zero_before_first_tile(dw_ref)

        @call.columns(w.shape[0])
        def _(span):
            dy_ref[:, span] = numbers.dot(dout_ref[...], w_ref[span], _NT).astype(dy_ref.dtype)
            dw_ref[span] += numbers.dot(_floats(y_ref[:, span], y.dtype).T, dout_ref[...])

    dy, dw = call(
        kernel,
        [as_bits(y), cotangent, Whole(w)],
        [
            jax.ShapeDtypeStruct(y.shape, y.dtype),
            Whole(jax.ShapeDtypeStruct(w.shape, jnp.float32)),
        ],
        flops=4 * len(y) * w.size,
    )
    return cotangent, dy, dw.astype(w.dtype)


add_product.defvjp(_add_product_forward, _add_product_backward)


def _floats(bits, dtype):
    """What `as_bits` made integers: the layout in which attention's output is kept."""
    return jax.lax.bitcast_convert_type(bits, dtype)


# ---- MLP ----------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def mlp(x: jax.Array, reads: tuple[jax.Array, ...], wo: jax.Array, numbers: Numbers) -> jax.Array:
    """x (T, D) and layers.mlp of its norm, added in float32; each of `reads` (D, F), wo (F, D).

    Some columns of F at a time, whose results are added: an MLP is the sum of narrower ones.
    """
    return _mlp_forward(x, reads, wo, numbers)[0]


@partial(jax.jit, static_argnums=3)
def _mlp_forward(x, reads, wo, numbers):
    hidden, parts = len(wo), mlp_parts([*reads, wo], backward=False)
    call = _Call("mlp_forward", x, numbers, [*reads, wo], parts)

    def kernel(x_ref, base_ref, *refs):
        *read_refs, wo_ref, out_ref, norm, sums = refs

        @call.rows
        def _(rows):
            y, _ = numbers.normalize(x_ref[rows].astype(jnp.float32))
            norm[rows] = y.astype(norm.dtype)
            sums[rows] = base_ref[rows].astype(jnp.float32)

        @call.columns(hidden // parts)
        def _(span):
            h = [numbers.dot(norm[...], ref[:, span]) for ref in read_refs]
            sums[...] += numbers.dot(layers.activation(*h).astype(norm.dtype), wo_ref[span])

        out_ref[...] = sums[...].astype(out_ref.dtype)

    out = x
    for part in range(parts):
        matrices = [*(Columns(w, part, parts) for w in reads), Rows(wo, part, parts)]
        [out] = call(
            kernel,
            [x, out, *matrices],
            [jax.ShapeDtypeStruct(x.shape, x.dtype)],
            [call.tile(x.dtype), call.tile(jnp.float32)],
            flops=2 * len(x) * wo.size * len(matrices) // parts,
        )
    return out, (x, reads, wo)


@partial(jax.jit, static_argnums=0)
def _mlp_backward(numbers, residuals, cotangent):
    x, reads, wo = residuals
    (hidden, width), count, parts = wo.shape, len(reads), mlp_parts([*reads, wo], backward=True)
    call = _Call("mlp_backward", x, numbers, [*reads, wo], parts)

    def kernel(x_ref, dout_ref, base_ref, *refs):
        (*read_refs, wo_ref), refs = refs[: count + 1], refs[count + 1 :]
        dx_ref, *dread_refs, dwo_ref, inverse, norm, norm_t, dnorm = refs
        _zero_before_first_tile(*dread_refs, dwo_ref)

        @call.rows
        def _(rows):
            y, inverse[rows] = numbers.normalize(x_ref[rows].astype(jnp.float32))
            norm[rows] = y.astype(norm.dtype)
            dnorm[rows] = jnp.zeros((rows.size, width), jnp.float32)

        norm_t[...] = norm[...].T

        @call.columns(hidden // parts)
        def _(span):
            h = [numbers.dot(norm[...], ref[:, span]) for ref in read_refs]
            active, pull = jax.vjp(layers.activation, *h)
            dh = pull(numbers.dot(dout_ref[...], wo_ref[span], _NT))
            for ref, dref, d in zip(read_refs, dread_refs, dh, strict=True):
                grad = d.astype(norm.dtype)
                dnorm[...] += numbers.dot(grad, ref[:, span], _NT)
                dref[:, span] += numbers.dot(norm_t[...], grad)
            dwo_ref[span] += numbers.dot(active.astype(norm.dtype).T, dout_ref[...])

        @call.rows
        def _(rows):
            dx = _norm_gradient(x_ref[rows], inverse[rows], dnorm[rows])
            dx_ref[rows] = (base_ref[rows].astype(jnp.float32) + dx).astype(dx_ref.dtype)

    dx, gradients = cotangent, []
    shapes = [(width, hidden // parts)] * count + [(hidden // parts, width)]
    for part in range(parts):
        matrices = [*(Columns(w, part, parts) for w in reads), Rows(wo, part, parts)]
        dx, *of_part = call(
            kernel,
            [x, cotangent, dx, *matrices],
            [
                jax.ShapeDtypeStruct(x.shape, x.dtype),
                *(Whole(jax.ShapeDtypeStruct(shape, jnp.float32)) for shape in shapes),
            ],
            [
                call.column,
                call.tile(x.dtype),
                call.tile(x.dtype, transposed=True),
                call.tile(jnp.float32),
            ],
            flops=2 * len(x) * wo.size * (3 * count + 2) // parts,
        )
        gradients.append([x.astype(wo.dtype) for x in of_part])
    *dreads, dwo = zip(*gradients, strict=True)
    return dx, tuple(jnp.concatenate(d, axis=1) for d in dreads), jnp.concatenate(dwo)


mlp.defvjp(_mlp_forward, _mlp_backward)


# ---- What fits into VMEM ------------------------------------------------------------------------


def matrix_bytes(name: str, matrices: Sequence[Any]) -> int:
    """Bytes of a kernel's matrices and, backward, of their gradients' sums."""
    sums = 4 if name.endswith("backward") else 0
    return sum(math.prod(w.shape) * (w.dtype.itemsize + sums) for w in matrices)


def mlp_parts(matrices: Sequence[Any], *, backward: bool) -> int:
    """Number of equal parts, a power of 2, into which an MLP's hidden layer is split to fit."""
    size = matrix_bytes("mlp_backward" if backward else "mlp_forward", matrices)
    return 2 ** max(0, math.ceil(math.log2(size / MATRIX_BYTES)))


def token_bytes(name: str, matrices: Sequence[Any]) -> int:
    """Bytes that a kernel takes for each token of a tile: two buffers of all that passes, and
    scratch memory.
    """
    width, columns = matrices[0].shape
    size = matrices[0].dtype.itemsize
    return {
        "project_forward": size * (7 * width + 2 * columns + 2 * LANES),
        "project_backward": size * (13 * width + 2 * columns + 2 * LANES) + 4 * (width + LANES),
        "add_product_forward": size * (2 * width + 4 * columns),
        "add_product_backward": size * (4 * width + 2 * columns),
        "mlp_forward": size * 7 * width + 4 * width,
        "mlp_backward": size * 10 * width + 4 * (width + LANES),
    }[name]


def tile_tokens(name: str, matrices: Sequence[Any], parts: int = 1) -> int:
    """Tokens of a tile, or 0 where none fits. matrices: arrays, or their shapes and dtypes."""
    left = USABLE_BYTES - matrix_bytes(name, matrices) // parts
    tokens = SIZES[name].tokens
    while tokens >= LANES and tokens * token_bytes(name, matrices) > left:
        tokens //= 2
    return tokens if tokens >= LANES else 0


def fits(projection: Any, out: Any, mlp: Sequence[Any]) -> bool:
    """Whether the kernels take a layer's matrices: of queries, keys and values, of attention's
    output, and of the MLP. Arrays, or their shapes and dtypes.
    """
    parts = {f"mlp_{way}": mlp_parts(mlp, backward=way == "backward") for way in DIRECTIONS}
    kernels = {
        f"{name}_{way}": [w]
        for way in DIRECTIONS
        for name, w in (("project", projection), ("add_product", out))
    }
    kernels |= dict.fromkeys(parts, mlp)
    whole = all(mlp[0].shape[1] % (LANES * n) == 0 for n in parts.values())
    return whole and all(tile_tokens(n, w, parts.get(n, 1)) for n, w in kernels.items())


# ---- Around the kernels -------------------------------------------------------------------------


class Whole(NamedTuple):
    """A matrix that stays in VMEM."""

    array: jax.Array | jax.ShapeDtypeStruct


class Columns(NamedTuple):
    """Part `part` of `parts` of a matrix's columns, which stays in VMEM."""

    array: jax.Array
    part: int
    parts: int


class Rows(NamedTuple):
    """Part `part` of `parts` of a matrix's rows, which stays in VMEM."""

    array: jax.Array
    part: int
    parts: int


class Scalars(NamedTuple):
    """Numbers that a kernel reads one by one."""

    array: jax.Array


class _Call:
    """A kernel's call over all tiles of tokens."""

    def __init__(
        self,
        name: str,
        x: jax.Array,
        numbers: Numbers,
        matrices: Sequence[jax.Array],
        parts: int = 1,
    ):
        """x (T, D): an array that passes in tiles; `tile` takes its width. matrices: what stays in
        VMEM, or `parts` times as much.
        """
        self.name, self.numbers, self.width = name, numbers, x.shape[1]
        self.tokens = math.gcd(len(x), tile_tokens(name, matrices, parts))
        self.tiles = len(x) // self.tokens

    def tile(self, dtype, *, transposed: bool = False):
        """Scratch memory for a tile (T, D)."""
        shape = (self.tokens, self.width)
        return pltpu.VMEM(shape[::-1] if transposed else shape, dtype)

    @property
    def column(self):
        """Scratch memory for a number of each token (T, 1)."""
        return pltpu.VMEM((self.tokens, 1), jnp.float32)

    def rows(self, body: Callable[[pl.Slice], None]) -> None:
        """Decorator: runs `body` for some rows of a tile after the other."""
        each(self.tokens, ROWS, body)

    def columns(self, columns: int) -> Callable[[Callable[[pl.Slice], None]], None]:
        """Decorator: runs a function for some of `columns` after the other."""
        return partial(each, columns, SIZES[self.name].columns)

    def __call__(self, kernel, inputs, outputs, scratch=(), *, flops):
        """Inputs and outputs without a class of their own pass in tiles."""
        arrays, shapes = (
            [x.array if isinstance(x, Whole | Columns | Rows | Scalars) else x for x in xs]
            for xs in (inputs, outputs)
        )
        moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in (*arrays, *shapes))
        return pl.pallas_call(
            kernel,
            grid=(self.tiles,),
            in_specs=[self._spec(x) for x in inputs],
            out_specs=[self._spec(x) for x in outputs],
            out_shape=shapes,
            scratch_shapes=scratch,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_LIMIT_BYTES
            ),
            cost_estimate=pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=moved),
            interpret=self.numbers.interpret,
            name=self.name,
        )(*arrays)

    def _spec(self, x) -> pl.BlockSpec:
        if isinstance(x, Scalars):
            return pl.BlockSpec(memory_space=pltpu.SMEM)
        shape, block = list(x.array.shape if isinstance(x, tuple) else x.shape), (0, 0)
        if not isinstance(x, tuple):
            return pl.BlockSpec((shape[0] // self.tiles, shape[1]), lambda i: (i, 0))
        if isinstance(x, Columns | Rows):
            axis = int(isinstance(x, Columns))
            shape[axis] //= x.parts
            block = (0, x.part) if axis else (x.part, 0)
        return pl.BlockSpec(tuple(shape), lambda i: block, pipeline_mode=pl.Buffered(1))


def each(total: int, size: int, body: Callable[[pl.Slice], None]) -> None:
    """In a kernel: runs `body` for a slice of `size`, where that divides `total`, after the other."""
    size = math.gcd(total, size)

    def step(i, _):
        body(pl.ds(i * size, size))

    jax.lax.fori_loop(0, total // size, step, None)


def _zero_before_first_tile(*refs):
    @pl.when(pl.program_id(0) == 0)
    def _():
        for ref in refs:

            def zero(rows, ref=ref):
                ref[rows] = jnp.zeros((rows.size, ref.shape[1]), ref.dtype)

            each(len(ref), LANES, zero)

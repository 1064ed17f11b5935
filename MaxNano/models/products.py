"""A layer's matrix products, each with the norm, mix or residual beside it: as JAX's operations, for
the compiler to fuse, or in kernels for TPU (kernels/products.py).

Legend: T tokens, D embed, F columns, C gate channels. `...` as in models/transformer.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from MaxNano import scaling
from MaxNano.distributed import sharding
from MaxNano.models import layers
from MaxNano.models.kernels import products as kernels

# Chips for which layer_products=auto takes the kernels: they have the VMEM, and the compiler's
# schedules say that the kernels are faster.
CHIPS = ("TPU v6 lite", "TPU v6e")


class Products(NamedTuple):
    """How a layer multiplies.

    project(x, x0, (scale, share), w, channels) -> the mix scale x + share x0 (..., T, D), the
        product of its norm and w (D, F), and the norm's first channels (..., T, C).
    add_product(x, y, w): x (..., T, D) and the product of y (..., T, F) and w (F, D).
    mlp(x, weights): x (..., T, D) and layers.mlp of its norm.
    """

    project: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
    add_product: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    mlp: Callable[[jax.Array, dict[str, jax.Array]], jax.Array]


def resolve(config: FrozenConfigDict, mesh: Mesh, dtype: str) -> str:
    """The layer_products to use on a mesh, xla or pallas; auto picks one.

    Raises ValueError if pallas is asked for and cannot be.
    """
    problem = _problem(config, mesh, dtype)
    if config.layer_products == "pallas" and problem:
        raise ValueError(f"layer_products=pallas needs {problem}: choose layer_products=auto")
    if config.layer_products == "auto":
        is_for_chip = mesh.devices.flat[0].device_kind in CHIPS
        return "pallas" if is_for_chip and not problem else "xla"
    return config.layer_products


def _problem(config: FrozenConfigDict, mesh: Mesh, dtype: str) -> str | None:
    """What the kernels need and do not have."""
    sizes = scaling.axis_sizes(scaling.shape_of(config))
    shapes = [
        tuple(sizes[axis] for axis in axes)
        for part in scaling.BLOCK.values()
        for axes in part.values()
    ]
    qkv = (config.emb_dim, sizes["heads"] + 2 * sizes["kv_heads"])
    platform = mesh.devices.flat[0].platform
    if platform == "gpu":
        return "a TPU"
    if platform == "tpu" and dtype != "bfloat16":  # products in float32 take more VMEM
        return "dtype=bfloat16"
    if config.quantization != "none":
        return "quantization=none"
    if sharding.data_parallel_size(mesh, config.logical_axis_rules) != mesh.size:
        return "data and fsdp as the only parallelism"
    if any(size % kernels.LANES for shape in shapes for size in shape):
        return f"emb_dim, mlp_dim and heads x head_dim that are multiples of {kernels.LANES}"
    writes = [name for name, axes in scaling.BLOCK["mlp"].items() if axes[1] == "embed"]
    if writes != ["wo"]:
        return "an MLP that only wo writes"
    if config.max_target_length % kernels.LANES:
        return f"max_target_length a multiple of {kernels.LANES}"
    if config.value_embed_gate_channels > kernels.LANES:
        return f"value_embed_gate_channels of at most {kernels.LANES}"
    names = (*layers.mlp_reads(), *writes)
    mlp = [tuple(sizes[axis] for axis in scaling.BLOCK["mlp"][name]) for name in names]
    projection, out, *mlp = (
        jax.ShapeDtypeStruct(shape, dtype)
        for shape in (qkv, (sizes["heads"], config.emb_dim), *mlp)
    )
    if not kernels.fits(projection, out, mlp):
        return f"matrices that fit into VMEM, not emb_dim={config.emb_dim}"
    return None


def by_name(
    name: str,
    config: FrozenConfigDict,
    backend: str,
    matmul: Callable[[jax.Array, jax.Array], jax.Array] = jnp.matmul,
    place: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> Products:
    """The products that `resolve` named; in kernels, `matmul` and `place` have no use."""
    if name == "pallas":
        return in_kernels(config, interpret=backend != "tpu")
    return plain(config, matmul, place)


def plain(
    config: FrozenConfigDict,
    matmul: Callable[[jax.Array, jax.Array], jax.Array] = jnp.matmul,
    place: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> Products:
    """Products as JAX has them.

    matmul(x, w): the product of x (..., T, D) and a matrix. place(x): the residual stream x (...,
    T, D), laid out over devices and in memory.
    """

    def project(x, x0, scales, w, channels):
        x = place(layers.mix(x, scales[0], x0, scales[1]))
        h = layers.rms_norm(x, config.norm_epsilon)
        return x, matmul(h, w), h[..., :channels]

    def add_product(x, y, w):
        return place(x + matmul(y, w))

    def mlp(x, weights):
        h = layers.rms_norm(x, config.norm_epsilon)

        def product(a, w):
            return checkpoint_name(matmul(a, w), "mlp_hidden") if a is h else matmul(a, w)

        return place(x + layers.mlp(weights, h, product))

    return Products(project, add_product, mlp)


def in_kernels(config: FrozenConfigDict, *, interpret: bool) -> Products:
    """Products in kernels, for x (T, D) of one device, T a multiple of 128."""
    numbers = kernels.Numbers(config.norm_epsilon, interpret)

    def project(x, x0, scales, w, channels):
        mixed, product, *first = kernels.project(x, x0, jnp.stack(scales), w, channels > 0, numbers)
        return mixed, product, first[0][:, :channels] if first else x[:, :0]

    def add_product(x, y, w):
        return kernels.add_product(x, y, w, numbers)

    def mlp(x, weights):
        reads = tuple(weights[name] for name in layers.mlp_reads())
        return kernels.mlp(x, reads, weights["wo"], numbers)

    return Products(project, add_product, mlp)

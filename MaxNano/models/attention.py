"""Attention: one table of kernels, KERNELS, and the functions that call them.

To add a kernel, write a function, list its name at `attention` in configs/base.yml (a Pallas kernel
is called through `_on_local_blocks`) and give it a row in KERNELS: the backends on which it runs, those
on which `attention=auto` picks it, the layout of queries, keys and values that it takes, and its
limits.

Legend: B batch, L length, T tokens, N heads, K kv_heads, G query heads per kv head, H head_dim.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import AxisType, PartitionSpec
from ml_collections import FrozenConfigDict

from MaxNano.distributed import gpus, sharding
from MaxNano.models.kernels import flash
from MaxNano.models.layers import apply_rotary, rms_norm

SPLASH_RESIDUALS = "attention_out"
"""Name under which a remat policy keeps splash's output and log-sum-exp, so that its forward runs once."""

_LANES = 128
_HEAD_AXES = ("activation_batch", "activation_heads", None, None)
_FLAT_AXES = ("activation_batch", None, "activation_heads")
_GATE_AXES = ("activation_batch", "activation_heads", None)


class KernelSettings(NamedTuple):
    """Tuning parameters of the kernels. Block sizes are (q, kv, kv computed at a time)."""

    chunk: int
    splash_long_forward: tuple[int, int, int]
    splash_long_backward: tuple[int, int, int]
    splash_short_window: int
    splash_short_forward: tuple[int, int, int]
    splash_short_backward: tuple[int, int, int]
    splash_fused_backward: bool
    flash_block: int
    interpret: bool  # run the TPU's Pallas kernels in interpret mode, on any other backend

    @classmethod
    def from_config(cls, config: FrozenConfigDict, backend: str | None = None) -> Self:
        """The settings of a config for a backend, the default one if None."""
        return cls(
            chunk=config.attention_chunk,
            splash_long_forward=tuple(config.splash_long_forward),
            splash_long_backward=tuple(config.splash_long_backward),
            splash_short_window=config.splash_short_window,
            splash_short_forward=tuple(config.splash_short_forward),
            splash_short_backward=tuple(config.splash_short_backward),
            splash_fused_backward=config.splash_fused_backward,
            flash_block=config.flash_block,
            interpret=(backend or jax.default_backend()) != "tpu",
        )


class Heads(NamedTuple):
    """How projected queries, keys and values split into heads, and how QK norm scales them."""

    kv_heads: int
    group: int  # query heads per kv head
    head_dim: int
    scale: float  # of normalized queries and keys, each
    epsilon: float

    @classmethod
    def from_config(cls, config: FrozenConfigDict) -> Self:
        """The heads of a model."""
        return cls(
            config.num_kv_heads,
            config.num_query_heads // config.num_kv_heads,
            config.head_dim,
            config.qk_norm_scale,
            config.norm_epsilon,
        )


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: int,
    kernel: str,
    settings: KernelSettings,
    rules: sharding.Rules,
) -> jax.Array:
    """Causal attention in which position t sees keys t - window ... t, window + 1 of them.

    q (B, N, L, H); k, v (B, K, L, H), N a multiple of K -> (B, N, L, H) in q's dtype. Scores are
    multiplied by 1 / sqrt(H); softmax is in float32. `rules` say how heads and batch are sharded
    over the ambient mesh, for kernels that the compiler cannot partition. A kernel that takes fused
    qkv is replaced by its `separate` kernel. Raises ValueError for an unknown kernel.
    """
    row = _row(kernel)
    if row.separate:
        row = KERNELS[row.separate]
    return row.run(q, k, v, window, settings, rules)


def attend(
    qkv: jax.Array,
    tables: tuple[jax.Array, jax.Array],
    *,
    heads: Heads,
    window: int,
    kernel: str,
    settings: KernelSettings,
    rules: sharding.Rules,
    value_embed: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """The model's attention over whole sequences: rotary embedding, QK norm, value embeddings,
    scores.

    qkv (B, L, K x (G + 2) x H), as projected: for each kv head its G query heads, its keys and its
    values. tables: cosines and sines (L, H / 2). value_embed: rows (B, L, K x H) and their gates
    (B, K, L) float32, whose product is added to the values. Returns (B, L, N x H).
    """
    if _row(kernel).separate:
        return KERNELS[kernel].run(qkv, tables, value_embed, heads, window, settings, rules)
    q, k, v = split_heads(qkv, tables, value_embed, heads)
    y = attention(q, k, v, window=window, kernel=kernel, settings=settings, rules=rules)
    y = checkpoint_name(y, "attention_out")
    return y.swapaxes(1, 2).reshape(*qkv.shape[:2], -1)


def split_heads(
    qkv: jax.Array,
    tables: tuple[jax.Array, jax.Array],
    value_embed: tuple[jax.Array, jax.Array] | None,
    heads: Heads,
    *,
    heads_first: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries (..., N, T, H) and keys (..., K, T, H), rotated and normalized, and values like keys.

    heads_first=False leaves tokens first, (..., T, N, H), as decoding wants them.

    qkv (..., T, K x (G + 2) x H) as projected; tables: cosines and sines (T, H / 2) or (..., T, H /
    2); value_embed: rows (..., T, K x H) and their gates (..., K, T) float32, or None.
    """
    group, size, lead = heads.group, heads.head_dim, qkv.shape[:-1]
    # Columns of a kv head, not an axis of G + 2: slices of one row each waste most of a register.
    parts = qkv.reshape(*lead, heads.kv_heads, (group + 2) * size)
    values = parts[..., (group + 1) * size :]

    def order(x):
        return x.swapaxes(-3, -2) if heads_first else x

    def prepare(x, tables):
        """Queries or keys, rotated and normalized."""
        return heads.scale * order(rms_norm(apply_rotary(x, tables), heads.epsilon))

    v = order(values)
    if value_embed is not None:
        rows, gate = value_embed
        rows = order(rows.reshape(values.shape))
        gate = gate if heads_first else gate.swapaxes(-1, -2)
        v = (v.astype(jnp.float32) + gate[..., None] * rows.astype(jnp.float32)).astype(v.dtype)

    if heads_first:
        q = prepare(parts[..., : group * size].reshape(*lead, -1, size), tables)
        return q, prepare(parts[..., group * size : (group + 1) * size], tables), v
    # For one token, a single norm of queries and keys is faster than two, and G + 2 as an axis
    # faster than columns.
    both = qkv.reshape(*lead, heads.kv_heads, group + 2, size)[..., : group + 1, :]
    both = prepare(both, tuple(table[..., None, :] for table in tables))
    return both[..., :group, :].reshape(*lead, -1, size), both[..., group, :], v


def resolve(kernel: str, device: jax.Device, *, dtype: str, head_dim: int) -> str:
    """The kernel to use on a device; attention=auto picks the first row of KERNELS that can run
    there.

    dtype: of the activations. Raises ValueError if the requested kernel cannot run.
    """
    backend = device.platform
    if kernel == "auto":
        able = (
            name
            for name, row in KERNELS.items()
            if backend in row.auto and not row.problem(device, dtype, head_dim)
        )
        return next(able)
    row = _row(kernel)
    problem = row.problem(device, dtype, head_dim)
    if not problem and backend not in (*row.backends, *row.interpreted):
        problem = f"is a {' and '.join(row.backends).upper()} kernel, but the backend is {backend}"
    if problem:
        raise ValueError(f"attention={kernel} {problem}: choose attention=auto")
    return kernel


def _row(kernel: str) -> "Kernel":
    if kernel not in KERNELS:
        choices = ", ".join(("auto", *KERNELS))
        raise ValueError(f"attention={kernel} is unknown: choose one of {choices}")
    return KERNELS[kernel]


def cudnn_problem(device: jax.Device, dtype: str, head_dim: int) -> str | None:
    """Why cuDNN's attention cannot run on a device, or None.

    Sources: https://docs.nvidia.com/deeplearning/cudnn (fused flash attention), and JAX's own
    checks in jax/_src/cudnn/fused_attention_stablehlo.py.
    """
    if device.platform != "gpu":
        return f"needs an NVIDIA GPU, but the backend is {device.platform}"
    if dtype not in ("bfloat16", "float16"):
        return f"supports bfloat16 and float16, not dtype={dtype}"
    # JAX names the capability of NVIDIA's GPUs "9.0", the architecture of AMD's "gfx942".
    capability = gpus.compute_capability(device)
    major, _, minor = capability.partition(".")
    if not (major.isdigit() and minor.isdigit()):
        return f"needs an NVIDIA GPU, but the device is a {device.device_kind}"
    if int(major) < 8:
        return f"needs compute capability 8.0 (Ampere) or newer, this {device.device_kind} has {capability}"
    most = 256 if int(major) >= 9 else 128
    if head_dim % 8 or head_dim > most:
        return f"takes a head_dim that is a multiple of 8 up to {most} here, not {head_dim}"
    return None


def reference(q, k, v, window, settings, rules):
    """Computes all scores at once, masked: the reference that tests compare other kernels with."""
    del settings, rules
    return _block(q, k, v, window, first_query=0, first_key=0)


def chunked(q, k, v, window, settings, rules):
    """Blocks of `chunk` queries, each with only the keys that it can see.

    This skips the scores that causality and the window mask, up to whole blocks.
    """
    del rules
    length = q.shape[2]
    blocks = []
    for start in range(0, length, settings.chunk):
        stop = min(start + settings.chunk, length)
        low = max(0, start - window)
        keys, values = k[:, :, low:stop], v[:, :, low:stop]
        blocks.append(
            _block(q[:, :, start:stop], keys, values, window, first_query=start, first_key=low)
        )
    return jnp.concatenate(blocks, axis=2)


def splash(q, k, v, window, settings, rules):
    """JAX's block-sparse flash kernel for TPU, forward and backward.

    Blocks outside the window are skipped. Lengths are padded at the end to whole tiles, where
    causality hides the padding from all real positions. The compiler cannot partition a Pallas
    kernel, so it runs on the local batch and heads of each device. Source:
    jax.experimental.pallas.ops.tpu.splash_attention.
    """
    length, head_dim = q.shape[2:]
    padding = ((0, 0), (0, 0), (0, -length % _LANES), (0, 0))
    q = (q.astype(jnp.float32) * head_dim**-0.5).astype(q.dtype)
    q, k, v = (jnp.pad(x, padding) for x in (q, k, v)) if length % _LANES else (q, k, v)
    kernel = splash_kernel(q.shape[2], min(window, q.shape[2] - 1), settings)
    axes = (_HEAD_AXES,) * 3
    out = _on_local_blocks(jax.vmap(kernel), (q, k, v), axes, _HEAD_AXES, rules, k.shape[1])
    return out[:, :, :length]


def cudnn(q, k, v, window, settings, rules):
    """cuDNN's fused kernel for NVIDIA GPUs, in 16-bit types."""
    del settings, rules
    length = q.shape[2]
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    local = (window, 0) if window < length - 1 else None
    out = jax.nn.dot_product_attention(
        q, k, v, is_causal=True, local_window_size=local, implementation="cudnn"
    )
    return out.swapaxes(1, 2)


def fused_flash(qkv, tables, value_embed, heads, window, settings, rules):
    """MaxNano's flash kernel, which splits, rotates and normalizes heads itself: see
    kernels/flash.py.
    """
    embeds = value_embed or ()

    def local(qkv, *others):
        return flash.attention(
            qkv,
            tables,
            group=heads.group,
            value_embed=others or None,
            window=window,
            head_dim=heads.head_dim,
            scale=heads.scale,
            epsilon=heads.epsilon,
            block=settings.flash_block,
            interpret=settings.interpret,
        )

    arrays = [(qkv, _FLAT_AXES), *zip(embeds, (_FLAT_AXES, _GATE_AXES), strict=False)]
    arrays, axes = zip(*arrays, strict=True)
    return _on_local_blocks(local, arrays, axes, _FLAT_AXES, rules, heads.kv_heads)


class Kernel(NamedTuple):
    """A row of KERNELS.

    run: (q, k, v, window, settings, rules) -> as `attention`. If `separate` names a kernel, `run`
    takes the fused projection, (qkv, tables, value_embed, heads, window, settings, rules) ->
    as `attend`, and the named kernel replaces it where queries, keys and values are separate, as in
    prefill.
    """

    run: Callable[..., jax.Array]
    backends: Sequence[str]  # on which it runs
    auto: Sequence[str] = ()  # on which attention=auto picks it; rows are in order of preference
    interpreted: Sequence[str] = ()  # on which it runs slowly, for tests
    separate: str = ""
    problem: Callable[[jax.Device, str, int], str | None] = lambda device, dtype, head_dim: None


EVERYWHERE = ("cpu", "gpu", "tpu")
# fmt: off
KERNELS: dict[str, Kernel] = {
    "flash": Kernel(fused_flash, ("tpu",), auto=("tpu",), interpreted=("cpu",), separate="splash"),
    "cudnn": Kernel(cudnn, ("gpu",), auto=("gpu",), problem=cudnn_problem),
    "chunked": Kernel(chunked, EVERYWHERE, auto=EVERYWHERE),
    "splash": Kernel(splash, ("tpu",), interpreted=("cpu",)),
    "reference": Kernel(reference, EVERYWHERE),
}
# fmt: on


def splash_blocks(
    length: int, window: int, settings: KernelSettings
) -> splash_attention.BlockSizes:
    """Block sizes for a window, each reduced to a multiple of 128 that divides the size it splits."""

    def fit(size, whole):
        return max(n for n in range(_LANES, min(size, whole) + 1, _LANES) if whole % n == 0)

    short = window <= settings.splash_short_window
    forward = settings.splash_short_forward if short else settings.splash_long_forward
    backward = settings.splash_short_backward if short else settings.splash_long_backward
    (q, kv), (q_dkv, kv_dkv) = (
        [fit(size, length) for size in part[:2]] for part in (forward, backward)
    )
    fused = settings.splash_fused_backward
    return splash_attention.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_kv_compute=fit(forward[2], kv),
        block_q_dkv=q_dkv,
        block_kv_dkv=kv_dkv,
        block_kv_dkv_compute=fit(backward[2], kv_dkv),
        block_q_dq=None if fused else q_dkv,
        block_kv_dq=None if fused else fit(backward[2], kv_dkv),
        use_fused_bwd_kernel=fused,
    )


@functools.lru_cache
def splash_kernel(length: int, window: int, settings: KernelSettings):
    """The kernel of one sequence, q (N, L, H), k and v (K, L, H), with one mask for all heads.

    Its tables are NumPy arrays, so that the cached kernel outlives the trace that created it.
    """
    shape = (length, length)
    if window >= length - 1:
        mask = splash_attention.CausalMask(shape)
    else:
        mask = splash_attention.LocalMask(shape, window_size=(window, 0), offset=0)
    with jax.ensure_compile_time_eval():
        kernel = splash_attention.make_splash_mha(
            splash_attention.MultiHeadMask([mask]),
            block_sizes=splash_blocks(length, window, settings),
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=SPLASH_RESIDUALS,
            interpret=settings.interpret,
        )
        return jax.tree.map(np.asarray, kernel)


def _on_local_blocks(kernel, arrays, logical_axes, out_axes, rules, kv_heads):
    """kernel(*arrays) on each device's batch and heads, over the axes of the ambient mesh not yet
    manual.

    logical_axes: of each array; out_axes: of the result. Heads are sharded if that divides the kv
    heads.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = [
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Auto
    ]
    if not axes:
        return kernel(*arrays)
    sizes = {"activation_batch": len(arrays[0]), "activation_heads": kv_heads}

    def dividing(part, size):
        names = (part,) if isinstance(part, str) else part or ()
        while size % math.prod(mesh.shape[name] for name in names):
            names = names[:-1]
        return names

    def spec(logical):
        parts = sharding.partition_spec(logical, rules, axes)
        return PartitionSpec(
            *(dividing(part, sizes.get(axis, 1)) for part, axis in zip(parts, logical, strict=True))
        )

    local = jax.shard_map(
        kernel,
        in_specs=tuple(map(spec, logical_axes)),
        out_specs=spec(out_axes),
        axis_names=set(axes),
        check_vma=False,
    )
    return local(*arrays)


def _block(q, k, v, window, *, first_query: int, first_key: int):
    """One masked softmax: queries from position first_query on, keys from position first_key on."""
    position = first_query + jnp.arange(q.shape[2])[:, None]
    key_position = first_key + jnp.arange(k.shape[2])[None, :]
    visible = (key_position <= position) & (key_position >= position - window)
    return masked(q, k, v, visible)


def masked(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> jax.Array:
    """Attention of queries (B, N, Q, H) to the `visible` (Q, S) of the keys (B, K, S, H), as q."""
    batch, heads, queries, head_dim = q.shape
    kv_heads = k.shape[1]
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, queries, head_dim)
    scores = jnp.einsum("BKGQH,BKSH->BKGQS", grouped, k, preferred_element_type=jnp.float32)
    scores = jnp.where(visible, scores * head_dim**-0.5, -jnp.inf)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("BKGQS,BKSH->BKGQH", probabilities, v)
    return out.reshape(q.shape)

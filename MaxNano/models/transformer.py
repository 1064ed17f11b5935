"""The Transformer, nanochat's architecture: the only definition of its forward pass.

Training, prefill, decoding and CORE's shared prefixes all run `forward`. What they do differently
is in its `Context`: which keys a query sees and where keys and values are kept (`attend`), how rows
of tables are read, and how matrices multiply. `Transformer` declares the parameters in Flax NNX and
runs `forward` for whole sequences, as training does.

Every parameter of a layer is stacked on a leading `layers` axis. The forward pass splits the layers
into equal groups (one period of the window pattern and of the value embeddings), scans over the
groups, and unrolls the layers that remain. Scanned or unrolled, checkpoints and numbers are the
same.

Legend: B batch, L length, T tokens, D embed, N heads, K kv_heads, G query heads per kv head,
H head_dim, V vocab, C gate channels. `...` is empty in training and decoding, whose tokens are one
axis: on a TPU this lets the compiler choose good layouts for every matrix product.
Source: nanochat/gpt.py@92d63d4.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from ml_collections import FrozenConfigDict

from MaxNano import pyconfig, scaling
from MaxNano.distributed.sharding import constrain
from MaxNano.models import attention, embedding, layers, losses, products, quantization
from MaxNano.models.kernels import products as product_kernels
from MaxNano.models.layers import (
    constant,
    linspace,
    mix,
    normal,
    parameter,
    rms_norm,
    rotary_tables,
    row_major,
    uniform,
)

Layer = dict[str, Any]
"""One layer's arrays: attention {qkv, out}, mlp, two lambdas, and value {gate, index} if any."""
ValueEmbed = tuple[jax.Array, jax.Array]
"""Rows of a table of value embeddings (..., T, K x H), and their gates (..., K, T) in float32."""
STACKED = ("layers", "value_embeds", "value_gate")
"""The parameters of two or more axes, or trees of them, whose first axis counts layers."""


# ---- Kinds of layers ----------------------------------------------------------------------------


class Numerics(NamedTuple):
    """The choices that depend on the backend: dtypes by name, kernels, and the backend itself."""

    dtype: str
    embedding_dtype: str
    attention: str
    embedding_gradient: str
    backend: str
    products: str = "xla"


class LayerKind(NamedTuple):
    """The static facts of a layer: its window in tokens, and whether it has a value embedding."""

    window: int
    has_value_embed: bool


def layer_kinds(config: FrozenConfigDict) -> tuple[LayerKind, ...]:
    """Window and value embedding of each layer, in order."""
    depth = config.num_decoder_layers
    valued = scaling.value_embed_layers(depth, config.value_embed_gate_channels)
    windows = pyconfig.windows_of(config)
    return tuple(LayerKind(window, i in valued) for i, window in enumerate(windows))


def scans_layers(
    config: FrozenConfigDict, backend: str, products: str = "xla", *, by_layer: bool = False
) -> bool:
    """Whether equal groups of layers are one compiled loop on a backend (cpu, gpu, tpu).

    by_layer: as in kept_residuals. In a loop, what kernels keep for the backward pass is copied
    into stacks and out of them; a program without one may gather the weights of many layers early.
    """
    if config.scan_layers is not None:
        return config.scan_layers
    return backend != "gpu" and (products == "xla" or by_layer)


def repetition(kinds: tuple[LayerKind, ...]) -> tuple[int, int]:
    """The (period, groups) of the scan over equal groups that compiles the fewest layers.

    The first period x groups layers repeat the first `period`; the layers that remain are unrolled.
    """

    def groups_of(period):
        groups = 1
        while kinds[groups * period : (groups + 1) * period] == kinds[:period]:
            groups += 1
        return groups

    def compiled(period):
        return period + len(kinds) - period * groups_of(period)

    best = min(range(1, len(kinds) + 1), key=compiled)
    return best, groups_of(best)


# ---- The forward pass ---------------------------------------------------------------------------


class Context(NamedTuple):
    """The differences between training, prefill, decoding and CORE.

    attend(qkv, value_embed, kind, index) -> (y (..., T, N x H), the state that the layer leaves,
        such as its KV cache). qkv (..., T, K x (G + 2) x H) is as projected; value_embed may be
        None; index is the layer's number, None inside the scan. It may return fewer tokens: then
        only the last ones continue.
    lookup(tables (E, V, W), index, table) -> rows (..., T, W) of table `index` for the tokens, in
        the compute dtype. `table` is where the gradient goes: see embedding.lookup.
    previous(x) -> the embeddings of the tokens before those of x (..., T, D).
    is_first: (..., T) whether a token has no token before it.
    place(x) -> the embeddings x (..., T, D), laid out over devices and in memory.
    wrap(run_layer, index) -> run_layer, with rematerialization for instance; index as in `attend`.
    products: how layers multiply.
    """

    attend: Callable[..., tuple[jax.Array, Any]]
    lookup: Callable[[jax.Array, Any, jax.Array | None], jax.Array]
    previous: Callable[[jax.Array], jax.Array]
    is_first: jax.Array
    products: products.Products
    place: Callable[[jax.Array], jax.Array] = lambda x: x
    wrap: Callable[[Callable, int | None], Callable] = lambda run_layer, index: run_layer


class Stack(NamedTuple):
    """A model's layers, as `run_layers` takes them: the first period x groups in a scan, then
    `tail`.

    scanned: a tree with a leading axis of groups; layers_of(one group's slice) gives its layers.
    """

    kinds: tuple[LayerKind, ...]
    tail: Sequence[Layer]
    period: int = 0
    groups: int = 0
    scanned: Any = ()
    layers_of: Callable[[Any], Sequence[Layer]] = list


def forward(
    config: FrozenConfigDict, weights: dict[str, Any], stack: Stack, context: Context
) -> tuple[jax.Array, tuple[Any, ...]]:
    """Normalized final hidden states (..., T, D), and the state that `attend` left for each layer.

    weights: token_embed (V, D), value_embeds (E, V, K x H) and the scalars of smear and backout,
    named as the parameters are.
    """
    with jax.named_scope("embed"):
        x = embed(config, weights, context)
    x, middle, states = run_layers(config, weights, stack, x, context)
    with jax.named_scope("final_norm"):
        if config.use_backout:
            x = mix(x, jnp.float32(1), _last(middle, x), -weights["backout_lambda"])
        return rms_norm(x, config.norm_epsilon), states


def head(
    config: FrozenConfigDict, hidden: jax.Array, lm_head: jax.Array, *, columns: bool = False
) -> jax.Array:
    """Soft-capped float32 logits (..., V) of hidden states (..., D).

    lm_head (V, D), or (D, V) if `columns`: the layout in which decoding stores it.
    """
    if columns:
        with jax.named_scope("head"):
            product = jnp.matmul(hidden, lm_head, preferred_element_type=jnp.float32)
            return losses.soft_cap(product, config.logits_soft_cap)
    return losses.logits(hidden, lm_head, config.logits_soft_cap)


def embed(config: FrozenConfigDict, weights: dict[str, Any], context: Context) -> jax.Array:
    """Normalized embeddings (..., T, D), each with a gated share of the previous token's (smear)."""
    table = weights["token_embed"]
    x = rms_norm(context.lookup(table[None], 0, table), config.norm_epsilon)
    if config.smear_gate_channels:
        channels = x[..., : config.smear_gate_channels]
        gate = jax.nn.sigmoid(channels @ weights["smear_gate"].astype(x.dtype))
        gate = jnp.where(context.is_first, 0, weights["smear_lambda"] * gate)
        x = x + gate[..., None].astype(x.dtype) * context.previous(x)
    return context.place(x)


def block(
    config: FrozenConfigDict,
    layer: Layer,
    x: jax.Array,
    x0: jax.Array,
    value_rows: jax.Array | None,
    attend: Callable[[jax.Array, ValueEmbed | None], tuple[jax.Array, Any]],
    context: Context,
) -> tuple[jax.Array, Any]:
    """One layer: x and the embeddings x0 (..., T, D) -> (x (..., T', D), the state of `attend`).

    value_rows: None, or value embeddings (..., T or more, K x H); the last T are used. `attend`
    may return fewer tokens: T'.
    """
    with jax.named_scope("attention"):
        scales, qkv = (layer["resid_lambda"], layer["x0_lambda"]), layer["attention"]["qkv"]
        value_embed, width = None, 0 if value_rows is None else config.value_embed_gate_channels
        x, qkv, channels = context.products.project(x, _last(x0, x), scales, qkv, width)
        if value_rows is not None:
            value_embed = _last(value_rows, x), value_gate(config, layer["value"]["gate"], channels)
        qkv = checkpoint_name(qkv, "qkv")
        with jax.named_scope("attend"):
            y, state = attend(_constrain(qkv, "activation_heads", config), value_embed)
        x = context.products.add_product(_last(x, y), y, layer["attention"]["out"])
        x = checkpoint_name(x, "attention_residual")
    with jax.named_scope("mlp"):
        return context.products.mlp(x, layer["mlp"]), state


def value_gate(config: FrozenConfigDict, gate: jax.Array, channels: jax.Array) -> jax.Array:
    """Gates (..., K, T) of the value embeddings, float32; gate (C, K), channels (..., T, C)."""
    gate = gate.astype(channels.dtype)
    # Tokens last: an array whose last axis is a few heads wastes most of a register.
    gates = jnp.einsum("...TC,CK->...KT", channels, gate).astype(jnp.float32)
    return config.value_embed_gate_range * jax.nn.sigmoid(gates)


def run_layers(
    config: FrozenConfigDict, weights: dict[str, Any], stack: Stack, x: jax.Array, context: Context
) -> tuple[jax.Array, jax.Array, tuple[Any, ...]]:
    """All layers: the last output, the output of layer num_decoder_layers // 2, and the layers'
    states.
    """
    x0, middle_layer = x, len(stack.kinds) // 2
    in_scan = stack.period * stack.groups

    @jax.named_scope("layer")
    def run_layer(x, layer, kind, index):
        rows = None
        if kind.has_value_embed:
            value = layer["value"]
            with jax.named_scope("value_embed"):
                rows = context.lookup(weights["value_embeds"], value["index"], value.get("table"))
        attend = partial(context.attend, kind=kind, index=index)
        return block(config, layer, x, x0, rows, attend, context)

    def step(carry, scanned):
        x, middle = carry
        group, weights_of_group = scanned
        run, states = context.wrap(run_layer, None), []
        for j, layer in enumerate(stack.layers_of(weights_of_group)):
            x, state = run(x, layer, stack.kinds[j], None)
            states.append(state)
            if middle_layer < in_scan and j == middle_layer % stack.period:
                middle = jnp.where(group == middle_layer // stack.period, x, middle)
        return (x, middle), tuple(states)

    middle, states = x, []
    if in_scan:
        scanned = (jnp.arange(stack.groups), stack.scanned)
        (x, middle), stacked = jax.lax.scan(step, (x, x), scanned)
        states = [
            jax.tree.map(lambda a, g=g: a[g], s) for g in range(stack.groups) for s in stacked
        ]
    for index, layer in enumerate(stack.tail, in_scan):
        x, state = context.wrap(run_layer, index)(x, layer, stack.kinds[index], index)
        states.append(state)
        if index == middle_layer:
            middle = x
    return x, middle, tuple(states)


def _constrain(x: jax.Array, last_axis: str, config: FrozenConfigDict) -> jax.Array:
    axes = ("activation_batch", *[None] * (x.ndim - 2), last_axis)
    return constrain(x, axes, config.logical_axis_rules)


def _last(x: jax.Array, like: jax.Array) -> jax.Array:
    """As many of the last tokens of x (..., T, D) as `like` has."""
    extra = x.shape[-2] - like.shape[-2]
    return x[..., extra:, :] if extra else x


# ---- Weights ------------------------------------------------------------------------------------


def fuse_layers(config: FrozenConfigDict, params: Layer, dtype) -> Layer:
    """The matrices of one layer or of a stack of layers, cast, with query, key and value as one
    `qkv`.

    qkv (..., D, K x (G + 2) x H): for each kv head its G query heads, its keys and its values.
    """
    cast = {part: {k: w.astype(dtype) for k, w in params[part].items()} for part in scaling.BLOCK}
    attend, heads = cast["attention"], config.num_kv_heads
    parts = [attend.pop(name) for name in ("query", "key", "value")]
    parts = [w.reshape(*w.shape[:-1], heads, w.shape[-1] // heads) for w in parts]
    qkv = jnp.concatenate(parts, axis=-1)
    # Row-major: otherwise its gradient takes the layout of the parts on a TPU, and activations are
    # transposed for it.
    attend["qkv"] = row_major(qkv.reshape(*qkv.shape[:-2], -1))
    return params | cast


def stack_layers(
    config: FrozenConfigDict, params: dict[str, Any], period: int, groups: int, tables: bool = False
) -> Stack:
    """The layers of a parameter tree; the first period x groups are scanned.

    tables: each layer carries its table of value embeddings, for its gradient.
    """
    kinds = layer_kinds(config)
    per_layer = params["layers"] | {
        "resid_lambda": params["resid_lambdas"],
        "x0_lambda": params["x0_lambdas"],
    }
    per_value: Layer = {}
    if "value_gate" in params:
        gate = params["value_gate"]
        per_value = {"gate": gate, "index": jnp.arange(len(gate))}
        per_value |= {"table": params["value_embeds"]} if tables else {}
    in_scan = period * groups
    values_in_scan = sum(kind.has_value_embed for kind in kinds[:in_scan])

    def grouped(tree, count):
        return jax.tree.map(lambda a: a[:count].reshape(groups, -1, *a.shape[1:]), tree)

    def rest(tree, count):
        return jax.tree.map(lambda a: a[count:], tree)

    tail = unstack(kinds[in_scan:], rest(per_layer, in_scan), rest(per_value, values_in_scan))
    if not in_scan:
        return Stack(kinds, tail)
    scanned = (
        grouped(per_layer, in_scan),
        grouped(per_value, values_in_scan) if values_in_scan else {},
    )
    return Stack(
        kinds, tail, period, groups, scanned, lambda group: unstack(kinds[:period], *group)
    )


def unstack(kinds: Sequence[LayerKind], per_layer: Layer, per_value: Layer) -> list[Layer]:
    """One tree per layer, from trees stacked over layers and over the layers with value embeddings."""
    unstacked, value_index = [], 0
    for j, kind in enumerate(kinds):
        layer = jax.tree.map(lambda a, j=j: a[j], per_layer)
        if kind.has_value_embed:
            layer["value"] = jax.tree.map(lambda a, e=value_index: a[e], per_value)
            value_index += 1
        unstacked.append(layer)
    return unstacked


class Layers(nnx.Module):
    """The block's matrices as scaling.BLOCK lists them, stacked over layers."""

    def __init__(self, config: FrozenConfigDict, *, rngs: nnx.Rngs):
        for part in scaling.BLOCK:
            setattr(self, part, Part(config, part, rngs=rngs))


class Part(nnx.Module):
    """The matrices of one part of the block: `attention` or `mlp`."""

    def __init__(self, config: FrozenConfigDict, part: str, *, rngs: nnx.Rngs):
        sizes = scaling.axis_sizes(scaling.shape_of(config))
        scale = config.mlp_init_scale if part == "mlp" else 1.0
        bound = scale * (3 / config.emb_dim) ** 0.5
        for name, axes in scaling.BLOCK[part].items():
            shape = (config.num_decoder_layers, *(sizes[axis] for axis in axes))
            # Matrices that write to the residual stream start at zero.
            init = constant(0.0) if axes[1] == "embed" else uniform(-bound, bound)
            setattr(self, name, parameter(rngs, shape, ("layers", *axes), init))


class Transformer(nnx.Module):
    """Token ids -> final hidden states (`__call__`) -> logits (`logits`)."""

    def __init__(self, config: FrozenConfigDict, numerics: Numerics, *, rngs: nnx.Rngs):
        depth, embed_dim = config.num_decoder_layers, config.emb_dim
        vocab = scaling.round_up(config.vocab_size, config.vocab_multiple)
        keys = config.num_kv_heads * config.head_dim
        table_dtype = jnp.dtype(numerics.embedding_dtype)
        bound = (3 / embed_dim) ** 0.5
        gate_init = uniform(0.0, config.gate_init_max)
        self.config = config
        self.numerics = numerics

        self.token_embed = parameter(
            rngs, (vocab, embed_dim), ("vocab", "embed"), normal(config.embed_init_std), table_dtype
        )
        self.layers = Layers(config, rngs=rngs)
        valued = sum(kind.has_value_embed for kind in layer_kinds(config))
        if valued:
            channels = config.value_embed_gate_channels
            self.value_embeds = parameter(
                rngs,
                (valued, vocab, keys),
                (None, "vocab", "kv_heads"),
                uniform(-bound, bound),
                table_dtype,
            )
            self.value_gate = parameter(
                rngs, (valued, channels, config.num_kv_heads), (None, None, "kv_heads"), gate_init
            )
        self.resid_lambdas = parameter(rngs, (depth,), (None,), linspace(*config.resid_lambda_init))
        self.x0_lambdas = parameter(rngs, (depth,), (None,), linspace(*config.x0_lambda_init))
        if config.smear_gate_channels:
            self.smear_gate = parameter(rngs, (config.smear_gate_channels,), (None,), gate_init)
            self.smear_lambda = parameter(rngs, (), (), constant(0.0))
        if config.use_backout:
            self.backout_lambda = parameter(rngs, (), (), constant(config.backout_lambda_init))
        self.lm_head = parameter(
            rngs, (vocab, embed_dim), ("vocab", "embed"), normal(config.head_init_std)
        )

    def __call__(self, tokens: jax.Array, specs: dict[str, Any] | None = None) -> jax.Array:
        """Token ids (B, L) -> normalized final hidden states (B, L, D) in the compute dtype.

        specs: with FSDP, inside shard_map: PartitionSpecs by which the parameters that are stacked
        over layers are sharded; each layer gathers its own.
        """
        config = self.config
        params = nnx.to_pure_dict(nnx.state(self, nnx.Param))
        period, groups = repetition(layer_kinds(config))
        numerics, by_layer = self.numerics, specs is not None
        if tokens.size % product_kernels.LANES:  # an evaluation's, of other lengths than training's
            numerics = numerics._replace(products="xla")
        scans = scans_layers(config, numerics.backend, numerics.products, by_layer=by_layer)
        if not scans or groups < 2:
            period = groups = 0
        stack = stack_layers(config, params, period, groups, tables=True)
        context = training_context(config, numerics, tokens, specs)
        hidden, _ = forward(config, params, stack, context)
        return hidden.reshape(*tokens.shape, -1)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states (..., D) -> soft-capped float32 logits (..., vocab_size)."""
        return head(self.config, hidden, self.lm_head[...][: self.config.vocab_size])


# ---- Whole sequences, with gradients ------------------------------------------------------------


def training_context(
    config: FrozenConfigDict,
    numerics: Numerics,
    tokens: jax.Array,
    specs: dict[str, Any] | None = None,
) -> Context:
    """The context of whole sequences, tokens (B, L); layers have all B x L tokens in one axis.

    specs: see Transformer.__call__.
    """
    length = tokens.shape[1]
    order = embedding.order(tokens, numerics.embedding_gradient)
    rotary = tuple(map(jnp.asarray, rotary_tables(length, config.head_dim, config.rope_theta)))
    settings = attention.KernelSettings.from_config(config, numerics.backend)

    def place(x):
        return row_major(_constrain(x, "activation_embed", config))

    name, matmul = numerics.products, partial(quantization.matmul, kind=config.quantization)

    def lookup(tables, index, table):
        method, interpret = numerics.embedding_gradient, numerics.backend != "tpu"
        if specs is not None:  # `tables` are shards
            tables, index = table[None], 0
        tables = jax.lax.stop_gradient(tables)
        rows = embedding.lookup(table, tables, index, order, method, interpret)
        return _constrain(rows, "activation_embed", config).astype(numerics.dtype)

    def attend(qkv, value_embed, kind, index):
        del index
        qkv, value_embed = split_rows(qkv, value_embed, length)
        y = attention.attend(
            qkv,
            rotary,
            heads=attention.Heads.from_config(config),
            value_embed=value_embed,
            window=kind.window,
            kernel=numerics.attention,
            settings=settings,
            rules=config.logical_axis_rules,
        )
        return y.reshape(-1, y.shape[2]), None

    def wrap(run_layer, index):
        def fused(x, layer, kind, index):
            if specs is not None:
                layer = layers.gather_layer(layer, specs, x.dtype)
            return run_layer(x, fuse_layers(config, layer, x.dtype), kind, index)

        kept = kept_residuals(config, specs is not None, index)
        return _rematerialize(fused, kept, index is None)

    return Context(
        attend=attend,
        lookup=lookup,
        previous=lambda x: jnp.roll(x, 1, axis=0),
        is_first=jnp.arange(tokens.size) % length == 0,
        products=products.by_name(name, config, numerics.backend, matmul, place),
        place=place,
        wrap=wrap,
    )


def split_rows(
    qkv: jax.Array, value_embed: ValueEmbed | None, length: int
) -> tuple[jax.Array, ValueEmbed | None]:
    """Projections (T, W) and value embeddings of flat tokens, with tokens as (B, L), L being
    `length`.
    """
    if value_embed is not None:
        rows, gate = value_embed
        gate = gate.reshape(len(gate), -1, length).swapaxes(0, 1)
        value_embed = rows.reshape(-1, length, rows.shape[1]), gate
    return qkv.reshape(-1, length, qkv.shape[1]), value_embed


def residual_widths(config: FrozenConfigDict) -> dict[str, int]:
    """Numbers per token of each result that a remat policy can keep, in the order of computation."""
    sizes = scaling.axis_sizes(scaling.shape_of(config))

    def read(part):
        """Columns of the matrices that read the residual stream."""
        return sum(sizes[axes[1]] for axes in scaling.BLOCK[part].values() if axes[0] == "embed")

    return {
        "qkv": read("attention"),
        "attention_out": sizes["heads"],
        "attention_residual": sizes["embed"],
        "mlp_hidden": read("mlp"),
    }


def kept_residuals(
    config: FrozenConfigDict, by_layer: bool, index: int | None = None
) -> tuple[str, ...] | None:
    """The names in residual_widths that the backward pass does not recompute; None: all it needs.

    remat_policy=null is names where no memory plan has replaced it.

    by_layer: weights are gathered layer by layer, and again in the backward pass. Keeping all would
    keep them too. index: the layer, None in the scan.
    """
    minimal = tuple(residual_widths(config))
    everything = minimal if by_layer else None
    if None not in (index, config.remat_layers) and index >= config.remat_layers:
        return everything
    kept = {"none": everything, "minimal": minimal, "full": (), "names": tuple(config.remat_names)}
    return kept[config.remat_policy or "names"]


def _rematerialize(run_layer, kept: tuple[str, ...] | None, scanned: bool):
    """`run_layer` whose backward pass recomputes all results but those named in `kept`.

    Outside a scan only a barrier keeps the compiler from merging the two computations; inside one
    it cannot merge them, and a barrier would only cost copies.
    """
    if kept is None:
        return run_layer
    policy = jax.checkpoint_policies.save_only_these_names(*kept)
    return jax.checkpoint(run_layer, policy=policy, static_argnums=(2, 3), prevent_cse=not scanned)

"""The Transformer: nanochat's architecture in Flax NNX, built from the config.

Every layer parameter is stacked on a leading `layers` axis, whatever the depth. The forward pass cuts the layers
into equal groups (one period of the window pattern and of the value embeddings), loops over the groups and then
runs the layers that are left; unrolled or looped, the checkpoint and the numbers are the same.

Between attention and attention, tokens stand in one axis: on a TPU that lets the compiler lay out every matrix
product well.

Legend: B batch, L length, T tokens (B x L), D embed, N heads, K kv_heads, H head_dim, V vocab.
Source: nanochat/gpt.py@92d63d4.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from ml_collections import FrozenConfigDict

from MaxNano import pyconfig, scaling
from MaxNano.distributed.sharding import constrain
from MaxNano.models import attention, embedding
from MaxNano.models.layers import (
    Mlp,
    constant,
    linspace,
    normal,
    parameter,
    rms_norm,
    rotary_tables,
    row_major,
    uniform,
)
from MaxNano.models.losses import soft_cap
from MaxNano.models.quantization import matmul

RESIDUAL_AXES = ("activation_batch", "activation_embed")
HEAD_AXES = ("activation_batch", "activation_heads")


class Numerics(NamedTuple):
    """What the backend decides and the config leaves open: dtypes by name, kernels, and the backend itself."""

    dtype: str
    embedding_dtype: str
    attention: str
    embedding_gradient: str
    backend: str


def scans_layers(config: FrozenConfigDict, backend: str) -> bool:
    """Whether equal groups of layers are one compiled loop on a backend (cpu, gpu, tpu)."""
    return backend != "gpu" if config.scan_layers is None else config.scan_layers


class LayerKind(NamedTuple):
    """What is static about a layer: its window in tokens, and whether it has a value embedding."""

    window: int
    has_value_embed: bool


def residual(x: jax.Array, config: FrozenConfigDict) -> jax.Array:
    """The residual stream (T, D) as it lies over devices and in memory."""
    return row_major(constrain(x, RESIDUAL_AXES, config.logical_axis_rules))


class Attention(nnx.Module):
    """Multi-head attention with rotary embedding, QK norm, a window and gated value embeddings."""

    def __init__(self, config: FrozenConfigDict, layers: int, *, rngs: nnx.Rngs):
        embed = config.emb_dim
        queries = config.num_query_heads * config.head_dim
        keys = config.num_kv_heads * config.head_dim
        init = uniform(-((3 / embed) ** 0.5), (3 / embed) ** 0.5)
        self.config = config
        self.query = parameter(rngs, (layers, embed, queries), ("layers", "embed", "heads"), init)
        self.key = parameter(rngs, (layers, embed, keys), ("layers", "embed", "kv_heads"), init)
        self.value = parameter(rngs, (layers, embed, keys), ("layers", "embed", "kv_heads"), init)
        self.out = parameter(
            rngs, (layers, queries, embed), ("layers", "heads", "embed"), constant(0.0)
        )

    def __call__(self, x, value_embed, rotary, window: int, kernel: str, settings) -> jax.Array:
        """x (T, D), already normalized -> (T, D).

        value_embed: rows (T, K x H) and their gates (K, T) float32, or None. rotary: cosines and sines (L, H / 2);
        T is a number of whole rows of L tokens.
        """
        config = self.config
        length = len(rotary[0])
        qkv = checkpoint_name(matmul(x, self.qkv_weight(x.dtype), config.quantization), "qkv")
        qkv = constrain(qkv, HEAD_AXES, config.logical_axis_rules)
        if value_embed is not None:
            rows, gate = value_embed
            gate = gate.reshape(len(gate), -1, length).swapaxes(0, 1)
            value_embed = rows.reshape(-1, length, rows.shape[1]), gate
        with jax.named_scope("attend"):
            y = attention.attend(
                qkv.reshape(-1, length, qkv.shape[1]),
                rotary,
                group=config.num_query_heads // config.num_kv_heads,
                value_embed=value_embed,
                window=window,
                kernel=kernel,
                settings=settings,
                head_dim=config.head_dim,
                scale=config.qk_norm_scale,
                epsilon=config.norm_epsilon,
                rules=config.logical_axis_rules,
            )
        return matmul(y.reshape(len(x), -1), self.out[...].astype(x.dtype), config.quantization)

    def qkv_weight(self, dtype) -> jax.Array:
        """The three projections as one (D, K x (G + 2) x H): for each kv head its query heads, its keys, its values."""
        heads = self.config.num_kv_heads
        parts = [
            weight[...].astype(dtype).reshape(-1, heads, weight.shape[-1] // heads)
            for weight in (self.query, self.key, self.value)
        ]
        # Row-major, or on a TPU its gradient takes the layout of the parts, and activations are transposed for it.
        return row_major(jnp.concatenate(parts, axis=-1).reshape(self.config.emb_dim, -1))


class Layers(nnx.Module):
    """The stacked parameters of `layers` blocks; sliced to one layer, it is that block."""

    def __init__(self, config: FrozenConfigDict, layers: int, *, rngs: nnx.Rngs):
        self.config = config
        self.attention = Attention(config, layers, rngs=rngs)
        self.mlp = Mlp(config, layers, rngs=rngs)

    def __call__(
        self, x, value_gate, value_rows, rotary, window: int, kernel: str, settings
    ) -> jax.Array:
        """One block: x (T, D) -> (T, D). value_rows (T, K x H) with value_gate (channels, K), or None."""
        config = self.config
        h = rms_norm(x, config.norm_epsilon)
        value_embed = None
        if value_rows is not None:
            channels = h[:, : config.value_embed_gate_channels]
            # Tokens last: an array whose last axis is a few heads wastes most of a register.
            gate = jnp.einsum("TC,CK->KT", channels, value_gate.astype(h.dtype)).astype(jnp.float32)
            gate = config.value_embed_gate_range * jax.nn.sigmoid(gate)
            value_embed = value_rows.astype(h.dtype), gate
        x = residual(x + self.attention(h, value_embed, rotary, window, kernel, settings), config)
        x = checkpoint_name(x, "attention_residual")
        return residual(x + self.mlp(rms_norm(x, config.norm_epsilon)), config)


class Transformer(nnx.Module):
    """Token ids -> final hidden states (`__call__`) -> logits (`logits`)."""

    def __init__(self, config: FrozenConfigDict, numerics: Numerics, *, rngs: nnx.Rngs):
        layers, embed = config.num_decoder_layers, config.emb_dim
        vocab = scaling.round_up(config.vocab_size, config.vocab_multiple)
        keys = config.num_kv_heads * config.head_dim
        table_dtype = jnp.dtype(numerics.embedding_dtype)
        bound = (3 / embed) ** 0.5
        gate_init = uniform(0.0, config.gate_init_max)
        self.config = config
        self.numerics = numerics
        self.kinds = nnx.static(layer_kinds(config))

        self.token_embed = parameter(
            rngs, (vocab, embed), ("vocab", "embed"), normal(config.embed_init_std), table_dtype
        )
        self.layers = Layers(config, layers, rngs=rngs)
        valued = sum(kind.has_value_embed for kind in self.kinds)
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
        self.resid_lambdas = parameter(
            rngs, (layers,), (None,), linspace(*config.resid_lambda_init)
        )
        self.x0_lambdas = parameter(rngs, (layers,), (None,), linspace(*config.x0_lambda_init))
        if config.smear_gate_channels:
            self.smear_gate = parameter(rngs, (config.smear_gate_channels,), (None,), gate_init)
            self.smear_lambda = parameter(rngs, (), (), constant(0.0))
        if config.use_backout:
            self.backout_lambda = parameter(rngs, (), (), constant(config.backout_lambda_init))
        self.lm_head = parameter(
            rngs, (vocab, embed), ("vocab", "embed"), normal(config.head_init_std)
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Token ids (B, L) -> normalized final hidden states (B, L, D) in the compute dtype."""
        config = self.config
        order = embedding.order(tokens, self.numerics.embedding_gradient)
        x = self._embed(order, tokens.shape[1])
        x, middle = self._run_layers(x, order, tokens.shape[1])
        if config.use_backout:
            x = _mix(x, jnp.float32(1), middle, -self.backout_lambda[...])
        return rms_norm(x, config.norm_epsilon).reshape(*tokens.shape, -1)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states (B, L, D) -> soft-capped float32 logits (B, L, vocab_size)."""
        head = self.lm_head[...][: self.config.vocab_size].astype(hidden.dtype)
        logits = jnp.einsum("BLD,VD->BLV", hidden, head).astype(jnp.float32)
        return soft_cap(logits, self.config.logits_soft_cap)

    def _lookup(self, own, tables, index, order):
        """Rows (T, width) of table `index`; its gradient goes to `own`: see embedding.lookup."""
        numerics = self.numerics
        rows = embedding.lookup(
            own,
            jax.lax.stop_gradient(tables),
            index,
            order,
            numerics.embedding_gradient,
            numerics.backend != "tpu",
        )
        return constrain(rows, RESIDUAL_AXES, self.config.logical_axis_rules)

    def _embed(self, order, length):
        """Normalized embeddings, each with a gated share of the previous token's (smear)."""
        config = self.config
        table = self.token_embed[...]
        x = self._lookup(table, table[None], 0, order).astype(self.numerics.dtype)
        x = rms_norm(x, config.norm_epsilon)
        if config.smear_gate_channels:
            gate = jax.nn.sigmoid(
                x[:, : config.smear_gate_channels] @ self.smear_gate[...].astype(x.dtype)
            )
            first = jnp.arange(len(x)) % length == 0  # a row's first token has no previous one
            gate = jnp.where(first, 0, self.smear_lambda[...] * gate)[:, None].astype(x.dtype)
            x = x + gate * jnp.roll(x, 1, axis=0)
        return residual(x, config)

    def _run_layers(self, x, order, length):
        """All blocks; returns the last output and the output of block num_decoder_layers // 2 (for backout)."""
        config = self.config
        rotary = tuple(map(jnp.asarray, rotary_tables(length, config.head_dim, config.rope_theta)))
        settings = attention.Settings.from_config(config, self.numerics.backend)
        graph, params = nnx.split(self.layers)
        per_layer = (params, self.resid_lambdas[...], self.x0_lambdas[...])
        valued = any(kind.has_value_embed for kind in self.kinds)
        tables = self.value_embeds[...] if valued else None
        per_value = (tables, self.value_gate[...], jnp.arange(len(tables))) if valued else ()
        x0 = x
        middle_layer = config.num_decoder_layers // 2

        def block(x, layer, value, kind):
            layer_params, resid, share = layer
            x = residual(_mix(x, resid, x0, share), config)
            gate = rows = None
            if kind.has_value_embed:
                own, gate, index = value
                rows = self._lookup(own, tables, index, order)
            return nnx.merge(graph, layer_params)(
                x, gate, rows, rotary, kind.window, self.numerics.attention, settings
            )

        def run(x, middle, kinds, layers, values, is_middle, looped):
            """The blocks of `kinds` on slices of the stacks; `is_middle(j)`: whether block j is the middle one."""
            run_block = _rematerialize(block, config, looped)
            value_index = 0
            for j, kind in enumerate(kinds):
                value = jax.tree.map(lambda a, e=value_index: a[e], values)
                value_index += kind.has_value_embed
                x = run_block(x, jax.tree.map(lambda a, j=j: a[j], layers), value, kind)
                keep = is_middle(j)
                if keep is not False:
                    middle = x if keep is True else jnp.where(keep, x, middle)
            return x, middle

        period, groups = repetition(self.kinds)
        if not scans_layers(config, self.numerics.backend) or groups < 2:
            groups = 0
        looped = period * groups
        middle = x
        if groups:
            kinds = self.kinds[:period]
            valued = sum(kind.has_value_embed for kind in kinds)

            def grouped(tree, size):
                return jax.tree.map(
                    lambda a: a[: groups * size].reshape(groups, size, *a.shape[1:]), tree
                )

            def step(carry, scanned):
                index, layers, values = scanned
                wanted, offset = divmod(middle_layer, period)
                in_loop = middle_layer < looped
                return run(
                    *carry,
                    kinds,
                    layers,
                    values,
                    lambda j: index == wanted if in_loop and j == offset else False,
                    looped=True,
                ), None

            scanned = (jnp.arange(groups), grouped(per_layer, period), grouped(per_value, valued))
            (x, middle), _ = jax.lax.scan(step, (x, middle), scanned)
        first_value = sum(kind.has_value_embed for kind in self.kinds[:looped])
        return run(
            x,
            middle,
            self.kinds[looped:],
            jax.tree.map(lambda a: a[looped:], per_layer),
            jax.tree.map(lambda a: a[first_value:], per_value),
            lambda j: looped + j == middle_layer,
            looped=False,
        )


def layer_kinds(config: FrozenConfigDict) -> tuple[LayerKind, ...]:
    """Window and value embedding of each layer, in order."""
    depth = config.num_decoder_layers
    valued = scaling.value_embed_layers(depth, config.value_embed_gate_channels)
    windows = pyconfig.windows_of(config)
    return tuple(LayerKind(window, i in valued) for i, window in enumerate(windows))


def repetition(kinds: tuple[LayerKind, ...]) -> tuple[int, int]:
    """(period, groups): the loop over equal groups of layers that leaves the fewest layers to compile one by one.

    The first period x groups layers repeat the first `period`; the rest, if any, are the tail.
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


@jax.custom_vjp
def _mix(x: jax.Array, scale: jax.Array, other: jax.Array, share: jax.Array) -> jax.Array:
    """scale x + share other in float32, in x's dtype; x and other (T, D), scale and share scalars."""
    mixed = scale * x.astype(jnp.float32) + share * other.astype(jnp.float32)
    return mixed.astype(x.dtype)


def _mix_forward(x, scale, other, share):
    return _mix(x, scale, other, share), (x, scale, other, share)


def _mix_backward(residuals, cotangent):
    # The scalars' gradients sum millions of products of both signs. As dot products they are summed in
    # blocks, which keeps the digits that one long running sum in float32 loses.
    x, scale, other, share = residuals

    def dot(a, b):
        rows = jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32), axis=-1)
        return jnp.sum(jax.lax.optimization_barrier(rows))

    grad = cotangent.astype(jnp.float32)
    return (
        (scale * grad).astype(x.dtype),
        dot(cotangent, x),
        (share * grad).astype(other.dtype),
        dot(cotangent, other),
    )


_mix.defvjp(_mix_forward, _mix_backward)


# The results that a remat policy can keep, in the order in which a block makes them.
RESIDUALS = ("qkv", "attention_out", "attention_residual", "mlp_hidden")


def kept_residuals(config: FrozenConfigDict) -> tuple[str, ...] | None:
    """Which of RESIDUALS the backward pass finds again; None: everything that it needs."""
    kept = {"none": None, "minimal": RESIDUALS, "full": (), "names": tuple(config.remat_names)}
    return kept[config.remat_policy]


def _rematerialize(block, config, looped: bool):
    """`block` with the config's remat policy: what is not kept is computed again in the backward pass.

    Outside a loop only a barrier keeps the compiler from finding the two computations equal; inside one it cannot,
    and a barrier would only cost copies.
    """
    kept = kept_residuals(config)
    if kept is None:
        return block
    policy = jax.checkpoint_policies.save_only_these_names(*kept)
    return jax.checkpoint(block, policy=policy, static_argnums=(3,), prevent_cse=not looped)

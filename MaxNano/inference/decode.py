"""The model at inference: prefill, and decoding token by token over a key-value cache.

Pure functions of weights, which are the parameters as a server wants them, and of a cache. A layer of window w sees
w + 1 positions, so its part of the cache is a ring of as many: position p lies at p mod (w + 1). A ring is cut into
blocks, so that a step reads no more of it than is in use. Rows of the cache are slots; a sequence lives in one slot.

Legend: B slots, R prompts, L length, T tokens, D embed, N heads, K kv_heads, G query heads a kv head, H head_dim,
V vocab, S positions of a ring.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from MaxNano.distributed import sharding
from MaxNano.inference import sampling
from MaxNano.models import attention
from MaxNano.models.layers import rms_norm, rotary_tables, row_major
from MaxNano.models.losses import soft_cap
from MaxNano.models.transformer import LayerKind, Numerics, layer_kinds, repetition, scans_layers

Weights = dict[str, Any]
Ring = tuple[tuple[jax.Array, jax.Array], ...]
"""A layer's blocks of keys and values, (B, K, S, H) each."""
Cache = tuple[Ring, ...]
"""A ring for each layer."""

SCORED = 256  # tokens of a prompt whose logits are computed at a time
STOP_IDS = 16  # token ids at which a slot can be told to stop


# ---- What is static --------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What is known about serving a model before any array exists."""

    config: FrozenConfigDict
    kinds: tuple[LayerKind, ...]
    period: int  # prefill goes over the first period x groups layers in a loop ...
    groups: int  # ... and the others are written out; decoding writes out all
    max_length: int  # tokens of the longest sequence
    dtype: str
    kernel: str
    settings: attention.Settings
    block: int  # positions of a ring, about, that are read at a time
    by_head: bool  # a lone slot's keys and values are stored head by head
    query_rows: int  # query heads of a kv head are padded to a multiple of this many
    is_full: bool = False  # loops go as far as they ever can: to be costed, not to be run

    @property
    def sizes(self) -> tuple[int, ...]:
        """Positions that each layer can see, the token's own included."""
        return tuple(min(kind.window + 1, self.max_length) for kind in self.kinds)


def make_plan(
    config: FrozenConfigDict, numerics: Numerics, max_length: int, looped: bool | None = None
) -> Plan:
    """The plan for sequences of at most `max_length` tokens, prompt and answer together.

    looped: whether prefill goes over equal groups of layers in a loop; None: with scan_layers on a TPU, whose compiler
    reads a layer of a stack in place, where others copy it.
    """
    kinds = layer_kinds(config)
    period, groups = repetition(kinds)
    if looped is None:
        looped = numerics.backend == "tpu" and scans_layers(config, numerics.backend)
    if not looped or groups < 2:
        period, groups = 0, 0
    # The flash kernel is bound to the training step.
    kernel = "splash" if numerics.attention == "flash" else numerics.attention
    settings = attention.Settings.from_config(config, numerics.backend)
    is_cpu = numerics.backend == "cpu"
    block = 128 if is_cpu else 512
    # A product of fewer rows than a TPU's register has goes to the vector unit, which takes several times the cycles.
    query_rows = 8 if numerics.backend == "tpu" else 1
    return Plan(
        config,
        kinds,
        period,
        groups,
        max_length,
        numerics.dtype,
        kernel,
        settings,
        block,
        is_cpu,
        query_rows,
    )


# ---- Weights and cache -----------------------------------------------------------------------------------------------


def prepare(plan: Plan, params: dict[str, Any]) -> Weights:
    """The weights of a parameter tree: in the compute dtype, layers apart, queries, keys and values as one matrix.

    A kv head's queries lie before its key and its value: (D, K (G + 2) H). Every matrix is (in, out), the head too:
    a CPU's products with few rows take more than twice as long with (out, in).
    """
    config, dtype = plan.config, jnp.dtype(plan.dtype)
    kv_heads, embed = config.num_kv_heads, config.emb_dim
    layers = params["layers"]

    def by_head(matrix):
        return matrix.reshape(len(matrix), embed, kv_heads, -1)

    own = layers["attention"]
    joined = jnp.concatenate([by_head(own[name]) for name in ("query", "key", "value")], axis=-1)
    stacked = {
        "qkv": joined.reshape(len(joined), embed, -1),
        "out": own["out"],
        "wi": layers["mlp"]["wi"],
        "wo": layers["mlp"]["wo"],
    }
    stacked = {name: matrix.astype(dtype) for name, matrix in stacked.items()}
    stacked |= {"resid": params["resid_lambdas"], "share": params["x0_lambdas"]}

    def layer(i):
        found = {name: x[i] for name, x in stacked.items()}
        if plan.kinds[i].has_value_embed:
            table = sum(kind.has_value_embed for kind in plan.kinds[:i])
            found |= {"gate": params["value_gate"][table].astype(dtype), "table": jnp.int32(table)}
        return found

    looped = plan.period * plan.groups
    weights = {
        # Tokens are looked up normalized.
        "embed": rms_norm(params["token_embed"].astype(dtype), config.norm_epsilon),
        "head": params["lm_head"].astype(dtype).T,
        "loop": tuple(
            jax.tree.map(lambda *x: jnp.stack(x), *map(layer, range(j, looped, plan.period)))
            for j in range(plan.period)
        ),
        "layers": tuple(map(layer, range(looped, len(plan.kinds)))),
        "rotary": tuple(
            map(jnp.asarray, rotary_tables(plan.max_length, config.head_dim, config.rope_theta))
        ),
    }
    if "value_embeds" in params:
        weights["tables"] = params["value_embeds"].astype(dtype)
    scalars = ("smear_gate", "smear_lambda", "backout_lambda")
    return weights | {name: params[name] for name in scalars if name in params}


_WEIGHT_AXES = {
    "embed": ("vocab", "embed"),
    "head": ("embed", "vocab"),
    "tables": (None, "vocab", "kv_heads"),
    "qkv": ("embed", "kv_heads"),
    "out": ("heads", "embed"),
    "wi": ("embed", "mlp"),
    "wo": ("mlp", "embed"),
    "gate": (None, "kv_heads"),
}
_RING_AXES = ("activation_batch", "activation_heads", None, None)


def weight_shardings(plan: Plan, mesh: Mesh, shapes: Weights) -> Weights:
    """How weights lie: whole on each device along the axes that cut the slots, cut by the rules along the others."""
    rules = plan.config.logical_axis_rules
    left = [axis for axis in mesh.axis_names if axis not in sharding.batch_axes(mesh, rules)]

    def place(path, leaf):
        axes = _WEIGHT_AXES.get(getattr(path[-1], "key", None), ())
        axes = (None,) * (leaf.ndim - len(axes)) + axes
        return sharding.named_sharding(mesh, leaf.shape, axes, rules, left)

    return jax.tree_util.tree_map_with_path(place, shapes)


def cache_shapes(plan: Plan, mesh: Mesh, slots: int) -> Cache:
    """The cache of `slots` slots as abstract arrays with shardings."""
    config = plan.config

    def ring(size):
        def block(length):
            shape = (slots, config.num_kv_heads, length, config.head_dim)
            placed = sharding.named_sharding(mesh, shape, _RING_AXES, config.logical_axis_rules)
            return (jax.ShapeDtypeStruct(shape, plan.dtype, sharding=placed),) * 2

        return tuple(block(end - start) for start, end in _spans(plan, size))

    return tuple(map(ring, plan.sizes))


def _spans(plan: Plan, size: int) -> list[tuple[int, int]]:
    """First place of each block of a ring, and the one behind its last."""
    number = max(1, round(size / plan.block))
    length = -(-size // number)
    return [(start, min(start + length, size)) for start in range(0, size, length)]


# ---- The model -------------------------------------------------------------------------------------------------------

Attend = Callable[[jax.Array, jax.Array, jax.Array, int, Ring | None], tuple[jax.Array, Ring]]
"""(q (T, K, G, H), k and v (T, K, H), window, ring) -> (T, K, G, H), and the ring anew."""


def forward(
    plan: Plan,
    weights: Weights,
    cache: Cache | None,
    tokens: jax.Array,
    previous: jax.Array,
    positions: jax.Array,
    attend: Attend,
) -> tuple[jax.Array, Cache]:
    """Final hidden states (T, D), and the cache as `attend` leaves it.

    tokens, the tokens before them and their positions are (T,); `attend` alone knows which tokens see each other.
    Without a cache, `attend` makes one of new rings, and equal groups of layers are a loop.
    """
    config = plan.config
    x = x0 = _embed(plan, weights, tokens, previous, positions)
    rotary = tuple(table[positions][:, None, None] for table in weights["rotary"])
    middle_layer, looped = len(plan.kinds) // 2, plan.period * plan.groups

    def block(x, layer, kind, ring):
        x = _mix(x, layer["resid"], x0, layer["share"])
        h = rms_norm(x, config.norm_epsilon)
        q, k, v = _project(plan, weights, layer, h, tokens, rotary, kind)
        y, ring = attend(q, k, v, kind.window, ring)
        x = x + y.reshape(len(x), -1) @ layer["out"]
        hidden = rms_norm(x, config.norm_epsilon) @ layer["wi"]
        return x + jnp.square(jax.nn.relu(hidden)) @ layer["wo"], ring

    def step(carry, scanned):
        x, middle = carry
        group, layers = scanned
        rings = []
        for j, layer in enumerate(layers):
            x, ring = block(x, layer, plan.kinds[j], None)
            rings.append(ring)
            if middle_layer < looped and j == middle_layer % plan.period:
                middle = jnp.where(group == middle_layer // plan.period, x, middle)
        return (x, middle), tuple(rings)

    middle, rings = x, []
    if looped and cache is None:
        (x, middle), stacked = jax.lax.scan(
            step, (x, x), (jnp.arange(plan.groups), weights["loop"])
        )
        rings += [
            jax.tree.map(lambda x, i=i: x[i], ring) for i in range(plan.groups) for ring in stacked
        ]
    for i in range(len(rings), len(plan.kinds)):
        x, ring = block(x, _layer(plan, weights, i), plan.kinds[i], cache and cache[i])
        rings.append(ring)
        if i == middle_layer:
            middle = x
    if config.use_backout:
        x = _mix(x, jnp.float32(1), middle, -weights["backout_lambda"])
    return rms_norm(x, config.norm_epsilon), tuple(rings)


def _layer(plan, weights, i):
    """The weights of a layer."""
    looped = plan.period * plan.groups
    if i >= looped:
        return weights["layers"][i - looped]
    return jax.tree.map(lambda x: x[i // plan.period], weights["loop"][i % plan.period])


def logits_of(plan: Plan, weights: Weights, hidden: jax.Array) -> jax.Array:
    """Hidden states (T, D) -> soft-capped float32 logits (T, padded V), -inf where no token stands."""
    config = plan.config
    logits = jnp.matmul(hidden, weights["head"], preferred_element_type=jnp.float32)
    logits = sharding.constrain(logits, (None, None), config.logical_axis_rules)
    logits = soft_cap(logits, config.logits_soft_cap)
    known = jnp.arange(logits.shape[1]) < config.vocab_size
    return logits if logits.shape[1] == config.vocab_size else jnp.where(known, logits, -jnp.inf)


def _mix(x, scale, other, share):
    """scale x + share other in float32, in x's dtype."""
    return (scale * x.astype(jnp.float32) + share * other.astype(jnp.float32)).astype(x.dtype)


def _embed(plan, weights, tokens, previous, positions):
    """Normalized embeddings, each with a gated share of the previous token's (smear)."""
    x = weights["embed"][tokens]
    channels = plan.config.smear_gate_channels
    if not channels:
        return x
    gate = jax.nn.sigmoid(x[:, :channels] @ weights["smear_gate"].astype(x.dtype))
    gate = jnp.where(positions == 0, 0, weights["smear_lambda"] * gate)[:, None].astype(x.dtype)
    return x + gate * weights["embed"][previous]


def _project(plan, weights, layer, h, tokens, rotary, kind):
    """Queries (T, K, G, H) and keys (T, K, H), rotated and normalized, and values (T, K, H)."""
    config = plan.config
    heads = row_major(h @ layer["qkv"]).reshape(len(h), config.num_kv_heads, -1, config.head_dim)
    v = heads[:, :, -1]
    if kind.has_value_embed:
        gate = jax.nn.sigmoid(h[:, : config.value_embed_gate_channels] @ layer["gate"])
        tables = weights["tables"]
        rows = tables.reshape(-1, tables.shape[2])[layer["table"] * tables.shape[1] + tokens]
        v = v + (config.value_embed_gate_range * gate)[..., None] * rows.reshape(v.shape)
    cos, sin = rotary
    a, b = jnp.split(heads[:, :, :-1].astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([a * cos + b * sin, b * cos - a * sin], axis=-1).astype(h.dtype)
    turned = config.qk_norm_scale * rms_norm(turned, config.norm_epsilon)
    return turned[:, :, :-1], turned[:, :, -1], v


# ---- Prefill ---------------------------------------------------------------------------------------------------------


class Copies(NamedTuple):
    """Which prompts become which slots: rows and slots (B,), of which the first `count` () count."""

    rows: jax.Array
    slots: jax.Array
    count: jax.Array


def prefill(
    plan: Plan,
    weights: Weights,
    cache: Cache,
    tokens: jax.Array,
    lengths: jax.Array,
    copies: Copies,
) -> tuple[Cache, jax.Array]:
    """The cache with prompts written to their slots, and the prompts' hidden states (R, L, D).

    tokens (R, L) are prompts, padded behind; lengths (R,). One prompt may become many slots.
    """
    rows, length = tokens.shape
    rules = plan.config.logical_axis_rules

    def attend(q, k, v, window, _):
        q = q.reshape(rows, length, -1, q.shape[-1]).swapaxes(1, 2)
        k, v = (x.reshape(rows, length, -1, x.shape[-1]).swapaxes(1, 2) for x in (k, v))
        y = attention.attention(
            q, k, v, window=window, kernel=plan.kernel, settings=plan.settings, rules=rules
        )
        size = min(window + 1, plan.max_length)
        left = zip(*(cut(_last(x, lengths, size), size) for x in (k, v)), strict=True)
        return y.swapaxes(1, 2), tuple(left)

    def cut(x, size):
        """(..., L, H) into the blocks of a ring, of which the last may be empty."""
        return jnp.split(
            x, [min(start, x.shape[-2]) for start, _ in _spans(plan, size)][1:], axis=-2
        )

    previous = jnp.roll(tokens, 1, axis=1)
    positions = jnp.tile(jnp.arange(length), rows)
    hidden, made = forward(
        plan, weights, None, tokens.reshape(-1), previous.reshape(-1), positions, attend
    )

    def copy(i, cache):
        def put(ring, new):
            row = jax.lax.dynamic_slice_in_dim(new, copies.rows[i], 1)
            return jax.lax.dynamic_update_slice(ring, row, (copies.slots[i], 0, 0, 0))

        return jax.tree.map(put, cache, made)

    count = len(copies.rows) if plan.is_full else copies.count
    cache = jax.lax.fori_loop(0, count, copy, cache)
    return cache, hidden.reshape(rows, length, -1)


def _last(x, lengths, size):
    """x (R, K, L, H) of prompts of `lengths` (R,) -> what they leave in a ring of `size`: (R, K, min(L, size), H)."""
    length = x.shape[2]
    if length <= size:
        return x
    # Place i holds the last position before the prompt's end that is i mod size.
    last = lengths[:, None] - 1
    found = last - (last - jnp.arange(size)) % size
    return jnp.take_along_axis(x, jnp.maximum(found, 0)[:, None, :, None], axis=2)


class TokenScores(NamedTuple):
    """Log-probabilities: of tokens (...), and those and ids of the likeliest ones (..., LARGEST_LOGPROBS)."""

    logprobs: jax.Array
    top_logprobs: jax.Array
    top_tokens: jax.Array


def score(
    plan: Plan, weights: Weights, hidden: jax.Array, targets: jax.Array, with_top: jax.Array
) -> TokenScores:
    """Log-probabilities of targets (R, L) after hidden states (R, L, D); the likeliest ones only if with_top ()."""

    def chunk(part):
        logits = logits_of(plan, weights, part[0])
        return TokenScores(sampling.log_probabilities(logits, part[1]), *_top(logits, with_top))

    count = targets.size
    size = min(SCORED, count)
    padding = -count % size
    flat = jnp.pad(hidden.reshape(count, -1), ((0, padding), (0, 0)))
    wanted = jnp.pad(targets.reshape(-1), (0, padding))
    scores = jax.lax.map(chunk, (flat.reshape(-1, size, flat.shape[1]), wanted.reshape(-1, size)))
    return jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[2:])[:count].reshape(*targets.shape, *x.shape[2:]), scores
    )


def _top(logits, wanted):
    """sampling.alternatives where they are wanted, else zeros."""
    shape = (len(logits), sampling.LARGEST_LOGPROBS)
    return jax.lax.cond(
        wanted,
        lambda: sampling.alternatives(logits),
        lambda: (jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.int32)),
    )


# ---- Decode ----------------------------------------------------------------------------------------------------------


def decode_step(
    plan: Plan,
    weights: Weights,
    cache: Cache,
    tokens: jax.Array,
    previous: jax.Array,
    positions: jax.Array,
) -> tuple[jax.Array, Cache]:
    """Logits (B, V) after one token a slot, and the cache with it; (B,) each.

    A token takes the place of one that it cannot see. A slot in which nothing happens may therefore repeat its last
    token, or one that is still to come, and stays as it is.
    """

    def attend(q, k, v, window, ring):
        size = min(window + 1, plan.max_length)
        ring = _store(plan, ring, (k, v), positions % size, size)
        return _attend_cached(plan, q, ring, positions, size), ring

    hidden, cache = forward(plan, weights, cache, tokens, previous, positions, attend)
    return logits_of(plan, weights, hidden), cache


def _store(plan, ring, new, place, size):
    """The ring with a token's key and value (B, K, H) at `place` (B,) of each slot."""
    slots = jnp.arange(len(place))
    blocks = []
    for (start, end), block in zip(_spans(plan, size), ring, strict=True):
        index = jnp.clip(place, start, end - 1) - start
        if plan.by_head and len(place) == 1:
            # One update alone becomes a dynamic slice's, which the CPU's compiler fuses twice, copying the whole ring.
            where = (slots[:, None], jnp.arange(block[0].shape[1]), index[:, None])
        else:
            where = (slots, slice(None), index)
        if len(ring) > 1:
            # A place in another block is answered by writing what is there: then nothing is ever copied.
            is_here = ((place >= start) & (place < end))[:, None, None]
            rows = [jnp.where(is_here, row, x[where]) for x, row in zip(block, new, strict=True)]
        else:
            rows = new
        pairs = zip(block, rows, strict=True)
        blocks.append(
            tuple(
                x.at[where].set(row, unique_indices=True, mode="promise_in_bounds")
                for x, row in pairs
            )
        )
    return tuple(blocks)


def _attend_cached(plan, q, ring, positions, size):
    """Each slot's query (B, K, G, H) against what its ring holds, block by block.

    A block that holds nothing of a slot leaves the slot's numbers as they are, to the bit, so how far others have
    come does not show.
    """
    seen = jnp.minimum(positions + 1, size)[:, None, None, None]
    heads = q.shape[2]
    q = jnp.pad(q, ((0, 0), (0, 0), (0, -heads % plan.query_rows), (0, 0)))

    def part(block, start, highest=-jnp.inf):
        """Highest score, or `highest`; sum of weights, which are e to a score less that; sum of weighted values."""
        keys, values = block
        scores = (
            jnp.einsum("BKGH,BKSH->BKGS", q, keys, preferred_element_type=jnp.float32)
            * q.shape[-1] ** -0.5
        )
        scores = jnp.where(start + jnp.arange(keys.shape[2]) < seen, scores, -jnp.inf)
        higher = jnp.maximum(highest, jnp.max(scores, axis=-1, keepdims=True))
        weight = jnp.exp(scores - higher)
        out = jnp.einsum(
            "BKGS,BKSH->BKGH",
            weight.astype(values.dtype),
            values,
            preferred_element_type=jnp.float32,
        )
        return higher, jnp.sum(weight, axis=-1, keepdims=True), out

    def add(carry, block, start):
        highest, total, out = carry
        higher, more_total, more = part(block, start, highest)
        fade = jnp.exp(highest - higher)
        return higher, total * fade + more_total, out * fade + more

    (_, *later_spans), (first, *later) = _spans(plan, size), ring
    carry = part(first, 0)
    for (start, _), block in zip(later_spans, later, strict=True):
        if plan.is_full:
            carry = add(carry, block, start)
        else:
            is_used = jnp.max(seen) > start
            carry = jax.lax.cond(
                is_used, partial(add, start=start), lambda carry, _: carry, carry, block
            )
    _, total, out = carry
    return (out / total)[:, :, :heads].astype(q.dtype)


class Control(NamedTuple):
    """What the host says of each slot before a round of steps; arrays (B,), int32 unless said otherwise.

    They are the columns of one array, since each array on its way to the devices costs the host a while.
    """

    token: jax.Array  # the newest one, not yet in the cache
    previous: jax.Array  # the one before it
    position: jax.Array  # of `token`
    left: jax.Array  # tokens that may still come; 0: nobody is here
    sample: jax.Array  # which of its request's samples this is
    seed: jax.Array  # (B, 2) uint32
    temperature: jax.Array  # float32; 0: the likeliest token
    top_k: jax.Array  # 0: off
    top_p: jax.Array  # float32; 1: off
    min_p: jax.Array  # float32; 0: off
    penalty: jax.Array  # float32; 1: off
    logprobs: jax.Array  # 0: none, 1: of the token, 2: and of the likeliest
    stop: jax.Array  # (B, STOP_IDS), -1 where there are fewer
    forced: jax.Array  # (B, steps) tokens to take instead of drawn ones, -1: draw

    @classmethod
    def of(cls, packed: np.ndarray | jax.Array) -> Self:
        """The columns of an array (B, CONTROL_COLUMNS + steps) int32; numpy's share its memory."""
        singles = [name for name in cls._fields if name not in ("seed", "stop", "forced")]
        columns = {name: packed[:, i] for i, name in enumerate(singles)}
        columns |= {
            name: columns[name].view(np.float32)
            for name in ("temperature", "top_p", "min_p", "penalty")
        }
        columns["seed"] = packed[:, len(singles) : len(singles) + 2].view(np.uint32)
        columns["stop"] = packed[:, len(singles) + 2 : CONTROL_COLUMNS]
        return cls(**columns, forced=packed[:, CONTROL_COLUMNS:])


CONTROL_COLUMNS = len(Control._fields) - 3 + 2 + STOP_IDS  # without those of `forced`


class Round(NamedTuple):
    """What a round of steps brought: tokens (steps, B), -1 where there came none, and their scores."""

    tokens: jax.Array
    scores: TokenScores


def decode_round(
    plan: Plan,
    weights: Weights,
    cache: Cache,
    control: Control,
    seen: jax.Array,
    is_eager: jax.Array,
) -> tuple[Cache, Round]:
    """Up to `steps` tokens (the width of control.forced) for each slot, in a loop on the device.

    The loop ends early when no slot is left, and, if is_eager (), when the first slot stops. A slot stops at a
    token of its own in `stop`, which is among its tokens, or when nothing is left to it.
    seen (B, padded V): the tokens that the repetition penalty is for.
    The token at position p of a sample is drawn with a random number made from seed, sample and p alone.
    """
    slots, steps = control.forced.shape
    sampled = control.temperature > 0
    filtered = (control.top_k > 0) | (control.top_p < 1)
    penalized = control.penalty != 1
    is_plain = ~jnp.any(sampled | penalized)  # the likeliest tokens as they are
    started = control.left > 0

    # All at once, before the loop: a slot that is active goes on by one position a step.
    uniforms = jax.lax.cond(
        jnp.any(sampled),
        partial(_uniforms, steps),
        lambda control: jnp.zeros((steps, slots)),
        control,
    )

    def draw(logits, uniform):
        scores = sampling.scale(logits, control.temperature)
        lowest = jax.lax.cond(
            jnp.any(filtered),
            lambda: sampling.lowest_kept(scores, control.top_k, control.top_p),
            lambda: jnp.full((slots,), -jnp.inf),
        )
        lowest = jnp.maximum(lowest, jnp.log(control.min_p))[:, None]
        return sampling.draw(jnp.where(scores >= lowest, scores, -jnp.inf), uniform)

    def choose(logits, uniform, tokens):
        adjusted = jax.lax.cond(
            jnp.any(penalized),
            lambda: sampling.penalize(
                logits, seen | _among(tokens, logits.shape[1]), control.penalty
            ),
            lambda: logits,
        )
        return jnp.where(sampled, draw(adjusted, uniform), sampling.likeliest(adjusted))

    def goes_on(carry):
        i, left = carry[0], carry[4]
        has_stopped = jnp.any(started & (left == 0))
        return (i < steps) & jnp.any(left > 0) & ~(is_eager & has_stopped)

    def step(carry):
        i, token, previous, position, left, cache, out = carry
        is_active = left > 0
        logits, cache = decode_step(plan, weights, cache, token, previous, position)
        drawn = jax.lax.cond(
            is_plain,
            sampling.likeliest,
            lambda logits: choose(logits, uniforms[i], out.tokens),
            logits,
        )
        forced = jax.lax.dynamic_index_in_dim(control.forced, i, axis=1, keepdims=False)
        new = jnp.where(forced >= 0, forced, drawn)
        logprobs = jax.lax.cond(
            jnp.any(control.logprobs > 0),
            lambda: sampling.log_probabilities(logits, new),
            lambda: jnp.zeros((slots,), jnp.float32),
        )
        scores = TokenScores(logprobs, *_top(logits, jnp.any(control.logprobs > 1)))
        brought = Round(jnp.where(is_active, new, -1), scores)
        out = jax.tree.map(
            lambda all_, x: jax.lax.dynamic_update_index_in_dim(all_, x, i, 0), out, brought
        )
        stops = (forced < 0) & jnp.any(control.stop == new[:, None], axis=1)
        return (
            i + 1,
            jnp.where(is_active, new, token),
            jnp.where(is_active, token, previous),
            position + is_active,
            jnp.where(stops, 0, left - is_active),
            cache,
            out,
        )

    def zeros(dtype, *shape):
        return jnp.zeros((steps, slots, *shape), dtype)

    top = sampling.LARGEST_LOGPROBS
    out = Round(
        zeros(jnp.int32) - 1,
        TokenScores(zeros(jnp.float32), zeros(jnp.float32, top), zeros(jnp.int32, top)),
    )
    start = (
        jnp.int32(0),
        control.token,
        control.previous,
        control.position,
        control.left,
        cache,
        out,
    )
    if plan.is_full:
        *_, cache, out = jax.lax.fori_loop(0, steps, lambda _, carry: step(carry), start)
    else:
        *_, cache, out = jax.lax.while_loop(goes_on, step, start)
    return cache, out


def _uniforms(steps, control):
    """The random numbers (steps, B) of the tokens behind each slot's newest one."""

    def of_slot(seed, sample, position):
        key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), sample)
        positions = position + 1 + jnp.arange(steps)
        return jax.vmap(lambda p: jax.random.uniform(jax.random.fold_in(key, p)))(positions)

    return jax.vmap(of_slot, out_axes=1)(control.seed, control.sample, control.position)


def _among(tokens, size):
    """Which of `size` tokens (B, size) are among tokens (steps, B); -1 is none."""
    where = jnp.arange(tokens.shape[1]), jnp.where(tokens < 0, size, tokens)
    return jnp.zeros((tokens.shape[1], size), jnp.bool_).at[where].set(True, mode="drop")

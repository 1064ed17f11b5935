"""The model at inference: prefill, and decoding token by token over a KV cache.

Pure functions of weights and of a cache. The model itself is models/transformer.py's `forward`;
here are the contexts in which it runs, and the loop of decode steps on the device.

Legend: B slots, R prompts, L length, T tokens, D embed, V vocab.
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
from MaxNano.inference import kv_cache, sampling
from MaxNano.inference import weights as inference_weights
from MaxNano.inference.kv_cache import CacheLayout, KVCache
from MaxNano.inference.weights import Weights
from MaxNano.models import attention, embedding, products, transformer
from MaxNano.models.layers import rms_norm, rotary_tables, row_major
from MaxNano.models.transformer import Context, LayerKind, Numerics, Stack

SCORED = 256  # tokens of a prompt whose logits are computed at a time
STOP_IDS = 16  # the largest number of token ids at which a slot stops
BIASED = 1024  # the largest number of tokens in a logit_bias


# ---- The plan -----------------------------------------------------------------------------------


class Plan(NamedTuple):
    """The static facts of serving a model: shapes, dtypes, kernel and cache layout."""

    config: FrozenConfigDict
    kinds: tuple[LayerKind, ...]
    period: int  # prefill scans the first period x groups layers
    groups: int  # and unrolls the others; decoding unrolls all
    dtype: str
    kernel: str
    settings: attention.KernelSettings
    heads: attention.Heads
    cache: CacheLayout
    is_full: bool = False  # loops run to their maximum length: only for cost estimates

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence."""
        return self.cache.max_length

    @property
    def sizes(self) -> tuple[int, ...]:
        """Positions that each layer can see, the token's own included."""
        return tuple(self.cache.size(kind.window) for kind in self.kinds)


def make_plan(
    config: FrozenConfigDict, numerics: Numerics, max_length: int, scans: bool | None = None
) -> Plan:
    """The plan for sequences of at most `max_length` tokens, prompt and completion together.

    scans: whether prefill scans equal groups of layers. None: as scan_layers on a TPU, whose
    compiler reads a layer of a stack in place; other compilers copy it.
    """
    kinds = transformer.layer_kinds(config)
    period, groups = transformer.repetition(kinds)
    is_cpu, is_tpu = (numerics.backend == backend for backend in ("cpu", "tpu"))
    if scans is None:
        scans = is_tpu and transformer.scans_layers(config, numerics.backend)
    if not scans or groups < 2:
        period, groups = 0, 0
    layout = CacheLayout(
        max_length=max_length,
        block=128 if is_cpu else 512,
        by_head=is_cpu,
        # A product with fewer rows than a TPU register has runs on the vector unit, which takes
        # several times the cycles.
        query_rows=8 if is_tpu else 1,
    )
    return Plan(
        config=config,
        kinds=kinds,
        period=period,
        groups=groups,
        dtype=numerics.dtype,
        kernel=numerics.attention,
        settings=attention.KernelSettings.from_config(config, numerics.backend),
        heads=attention.Heads.from_config(config),
        cache=layout,
    )


# ---- Weights and cache --------------------------------------------------------------------------


def prepare(plan: Plan, params: dict[str, Any]) -> Weights:
    """The weights of a parameter tree, with layers apart: `loop` those that prefill scans, and
    `layers`.

    loop[j] stacks layer j of every group. `head` is (D, V): a CPU's products with few rows take
    more than twice as long with (V, D).
    """
    config = plan.config
    weights = inference_weights.prepare(config, params, plan.dtype)
    stack = transformer.stack_layers(config, weights, 0, 0)
    scanned, rest = stack.tail[: plan.period * plan.groups], stack.tail[plan.period * plan.groups :]
    for name in ("resid_lambdas", "x0_lambdas", "value_gate"):
        weights.pop(name, None)
    return weights | {
        "head": weights.pop("lm_head").T,
        "loop": tuple(
            jax.tree.map(lambda *x: jnp.stack(x), *scanned[j :: plan.period])
            for j in range(plan.period)
        ),
        "layers": tuple(rest),
        "rotary": tuple(
            map(jnp.asarray, rotary_tables(plan.max_length, config.head_dim, config.rope_theta))
        ),
    }


def weight_shardings(plan: Plan, mesh: Mesh, shapes: Weights) -> Weights:
    """Shardings of the weights: see inference/weights.py."""
    return inference_weights.shardings(plan.config, mesh, shapes)


def cache_shapes(plan: Plan, mesh: Mesh, slots: int) -> KVCache:
    """The KV cache of `slots` slots as abstract arrays with shardings."""
    config = plan.config
    return kv_cache.cache_shapes(
        plan.cache,
        [kind.window for kind in plan.kinds],
        (slots, config.num_kv_heads, config.head_dim),
        plan.dtype,
        mesh,
        config.logical_axis_rules,
    )


def logits_of(plan: Plan, weights: Weights, hidden: jax.Array) -> jax.Array:
    """Hidden states (T, D) -> soft-capped float32 logits (T, padded V), -inf for ids without a
    token.
    """
    config = plan.config
    logits = transformer.head(config, hidden, weights["head"], columns=True)
    logits = sharding.constrain(logits, (None, None), config.logical_axis_rules)
    known = jnp.arange(logits.shape[1]) < config.vocab_size
    return logits if logits.shape[1] == config.vocab_size else jnp.where(known, logits, -jnp.inf)


# ---- Prefill ------------------------------------------------------------------------------------


class Copies(NamedTuple):
    """Which prompt is copied to which slot: the first `count` () entries of rows and slots (B,)."""

    rows: jax.Array
    slots: jax.Array
    count: jax.Array


def prefill(
    plan: Plan,
    weights: Weights,
    cache: KVCache,
    tokens: jax.Array,
    lengths: jax.Array,
    copies: Copies,
) -> tuple[KVCache, jax.Array]:
    """The cache with prompts written to their slots, and the prompts' hidden states (R, L, D).

    tokens (R, L) are prompts padded at the end, lengths (R,). One prompt may be copied to many
    slots.
    """
    rows, length = tokens.shape
    positions = jnp.tile(jnp.arange(length), rows)
    rotary = tuple(table[:length] for table in weights["rotary"])

    def attend(qkv, value_embed, kind, index):
        del index
        qkv, value_embed = transformer.split_rows(row_major(qkv), value_embed, length)
        q, k, v = attention.split_heads(qkv, rotary, value_embed, plan.heads)
        y = attention.attention(
            q,
            k,
            v,
            window=kind.window,
            kernel=plan.kernel,
            settings=plan.settings,
            rules=plan.config.logical_axis_rules,
        )
        made = kv_cache.prompt_cache(plan.cache, k, v, kind.window, lengths)
        return y.swapaxes(1, 2).reshape(rows * length, -1), made

    context = make_context(
        plan, tokens.reshape(-1), positions, attend, lambda x: jnp.roll(x, 1, axis=0)
    )
    stack = Stack(
        plan.kinds,
        weights["layers"],
        plan.period,
        plan.groups,
        weights["loop"],
        lambda group: group,
    )
    hidden, made = transformer.forward(plan.config, weights, stack, context)
    count = len(copies.rows) if plan.is_full else copies.count
    cache = kv_cache.copy_to_slots(cache, made, copies.rows, copies.slots, count)
    return cache, hidden.reshape(rows, length, -1)


def make_context(
    plan: Plan,
    tokens: jax.Array,
    positions: jax.Array,
    attend: Callable[..., Any],
    previous: Callable[[jax.Array], jax.Array],
) -> Context:
    """The context of tokens and their positions (T,)."""

    def lookup(tables, index, table):
        del table
        return embedding.rows(tables, index, tokens)

    return Context(attend, lookup, previous, positions == 0, products.plain(plan.config))


class TokenScores(NamedTuple):
    """Log-probabilities of tokens (...), and of the likeliest ones (..., LARGEST_LOGPROBS) with
    their ids.
    """

    logprobs: jax.Array
    top_logprobs: jax.Array
    top_tokens: jax.Array


def score(
    plan: Plan, weights: Weights, hidden: jax.Array, targets: jax.Array, with_top: jax.Array
) -> TokenScores:
    """Log-probabilities of targets (R, L) given hidden states (R, L, D), and with_top () of the
    likeliest.
    """

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
    """sampling.alternatives of logits (B, V) if wanted (), else zeros."""
    shape = (len(logits), sampling.LARGEST_LOGPROBS)
    return jax.lax.cond(
        wanted,
        lambda: sampling.alternatives(logits),
        lambda: (jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.int32)),
    )


# ---- Decode -------------------------------------------------------------------------------------


def decode_step(
    plan: Plan,
    weights: Weights,
    cache: KVCache,
    tokens: jax.Array,
    previous: jax.Array,
    positions: jax.Array,
) -> tuple[jax.Array, KVCache]:
    """Logits (B, V) after one token per slot, and the cache with it; the other arguments are (B,).

    A token overwrites one that it cannot see. An idle slot may therefore repeat its last token, or
    run a token that is still to be decoded, and stays as it is.
    """
    rotary = tuple(table[positions] for table in weights["rotary"])

    def attend(qkv, value_embed, kind, index):
        q, k, v = attention.split_heads(
            row_major(qkv), rotary, value_embed, plan.heads, heads_first=False
        )
        q = q.reshape(*k.shape[:2], -1, k.shape[2])
        layer = kv_cache.store(plan.cache, cache[index], (k, v), kind.window, positions)
        y = kv_cache.attend(plan.cache, q, layer, kind.window, positions, plan.is_full)
        return y.reshape(len(y), -1), layer

    def embed_previous(x):
        return rms_norm(weights["token_embed"][previous], plan.config.norm_epsilon)

    context = make_context(plan, tokens, positions, attend, embed_previous)
    stack = Stack(plan.kinds, unrolled_layers(plan, weights))
    hidden, cache = transformer.forward(plan.config, weights, stack, context)
    return logits_of(plan, weights, hidden), cache


def unrolled_layers(plan: Plan, weights: Weights) -> list[transformer.Layer]:
    """The weights of every layer, those that prefill scans first."""
    scanned = [
        jax.tree.map(lambda x, g=group: x[g], weights["loop"][j])
        for group in range(plan.groups)
        for j in range(plan.period)
    ]
    return [*scanned, *weights["layers"]]


class Control(NamedTuple):
    """The host's instructions for each slot in a round of decode steps; arrays (B,), int32 by
    default.

    They are the columns of one array, because each transfer to the devices costs the host time.
    """

    token: jax.Array  # the newest token, not yet in the cache
    previous: jax.Array  # the token before it
    position: jax.Array  # of `token`
    left: jax.Array  # tokens that may still be generated; 0: the slot is idle
    sample: jax.Array  # index of the sample in its request
    seed: jax.Array  # (B, 2) uint32
    temperature: jax.Array  # float32; 0: greedy
    top_k: jax.Array  # 0: off
    top_p: jax.Array  # float32; 1: off
    min_p: jax.Array  # float32; 0: off
    penalty: jax.Array  # float32; 1: off
    logprobs: jax.Array  # 0: none, 1: of the token, 2: and of the likeliest ones
    stop: jax.Array  # (B, STOP_IDS), padded with -1
    forced: jax.Array  # (B, steps) tokens that replace sampled ones; -1: sample

    @property
    def is_sampled(self) -> jax.Array:
        """Which slots sample; the others are greedy."""
        return self.temperature > 0

    @property
    def is_penalized(self) -> jax.Array:
        """Which slots have a repetition penalty."""
        return self.penalty != 1

    @classmethod
    def of(cls, packed: np.ndarray | jax.Array) -> Self:
        """The columns of an array (B, CONTROL_COLUMNS + steps) int32; NumPy columns share its
        memory.
        """
        singles = [name for name in cls._fields if name not in ("seed", "stop", "forced")]
        columns = {name: packed[:, i] for i, name in enumerate(singles)}
        columns |= {
            name: columns[name].view(np.float32)
            for name in ("temperature", "top_p", "min_p", "penalty")
        }
        columns["seed"] = packed[:, len(singles) : len(singles) + 2].view(np.uint32)
        columns["stop"] = packed[:, len(singles) + 2 : CONTROL_COLUMNS]
        return cls(**columns, forced=packed[:, CONTROL_COLUMNS:])


CONTROL_COLUMNS = len(Control._fields) - 3 + 2 + STOP_IDS  # without `forced`


class Adjustments(NamedTuple):
    """What changes the logits of a round besides the repetition penalty; neutral in other slots."""

    frequency: jax.Array  # (B,) float32; 0: off
    presence: jax.Array  # (B,) float32; 0: off
    sampled: jax.Array  # (B, longest sequence) tokens sampled before this round, padded with -1
    biased: jax.Array  # (B, BIASED) tokens of logit_bias, padded with -1
    bias: jax.Array  # (B, BIASED) float32
    allowed: (
        jax.Array
    )  # (B, words) the tokens that a grammar permits, as sampling.permit takes them


class Round(NamedTuple):
    """The result of a round of decode steps: tokens (steps, B), -1 for none, and their scores."""

    tokens: jax.Array
    scores: TokenScores


def decode_round(
    plan: Plan,
    weights: Weights,
    cache: KVCache,
    control: Control,
    seen: jax.Array,
    is_eager: jax.Array,
    adjustments: Adjustments | None = None,
) -> tuple[KVCache, Round]:
    """Up to `steps` tokens (the width of control.forced) for each slot, in a loop on the device.

    The loop ends early when no slot is active and, if is_eager (), when the first slot stops. A
    slot stops when it samples a token in `stop`, which is returned too, or when `left` tokens are
    generated. seen (B, padded V): the tokens that the repetition penalty applies to. The random
    number for position p of a sample depends only on seed, sample and p. With `adjustments`, the
    round may have only one step if a slot has a grammar.
    """
    slots, steps = control.forced.shape
    is_greedy = ~jnp.any(control.is_sampled | control.is_penalized)
    adjust = None
    if adjustments is not None:
        is_greedy, adjust = jnp.bool_(False), _adjuster(control, adjustments, weights)
    started = control.left > 0

    # All at once, before the loop: an active slot advances by one position per step.
    uniforms = jax.lax.cond(
        jnp.any(control.is_sampled),
        partial(_uniforms, steps),
        lambda control: jnp.zeros((steps, slots)),
        control,
    )

    def continues(carry):
        i, left = carry[0], carry[4]
        has_stopped = jnp.any(started & (left == 0))
        return (i < steps) & jnp.any(left > 0) & ~(is_eager & has_stopped)

    def step(carry):
        i, token, previous, position, left, cache, out = carry
        is_active = left > 0
        logits, cache = decode_step(plan, weights, cache, token, previous, position)
        sampled = jax.lax.cond(
            is_greedy,
            sampling.likeliest,
            lambda logits: _sample(control, logits, uniforms[i], seen, out.tokens, adjust),
            logits,
        )
        forced = jax.lax.dynamic_index_in_dim(control.forced, i, axis=1, keepdims=False)
        new = jnp.where(forced >= 0, forced, sampled)
        result = Round(jnp.where(is_active, new, -1), _score_tokens(control, logits, new))
        out = jax.tree.map(
            lambda all_, x: jax.lax.dynamic_update_index_in_dim(all_, x, i, 0), out, result
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

    start = (
        jnp.int32(0),
        control.token,
        control.previous,
        control.position,
        control.left,
        cache,
        _empty_round(steps, slots),
    )
    if plan.is_full:
        *_, cache, out = jax.lax.fori_loop(0, steps, lambda _, carry: step(carry), start)
    else:
        *_, cache, out = jax.lax.while_loop(continues, step, start)
    return cache, out


def _score_tokens(control, logits, tokens):
    """The TokenScores of tokens (B,) that the slots ask for, else zeros."""
    logprobs = jax.lax.cond(
        jnp.any(control.logprobs > 0),
        lambda: sampling.log_probabilities(logits, tokens),
        lambda: jnp.zeros(tokens.shape, jnp.float32),
    )
    return TokenScores(logprobs, *_top(logits, jnp.any(control.logprobs > 1)))


def _adjuster(control, adjustments, weights):
    """The function (logits (B, V), tokens (steps, B) of this round) -> logits with adjustments."""
    size = weights["head"].shape[1]
    has_penalty = jnp.any((adjustments.frequency != 0) | (adjustments.presence != 0))
    counts = jax.lax.cond(
        has_penalty,
        lambda: sampling.count_tokens(adjustments.sampled, size),
        lambda: jnp.zeros((len(adjustments.sampled), size), jnp.int32),
    )

    def penalize(logits, tokens):
        new = jnp.where(control.forced < 0, tokens.T, -1)  # forced tokens are not sampled
        return sampling.penalize_counts(
            logits,
            counts + sampling.count_tokens(new, size),
            adjustments.frequency,
            adjustments.presence,
        )

    def adjust(logits, tokens):
        logits = jax.lax.cond(has_penalty, penalize, lambda logits, _: logits, logits, tokens)
        logits = sampling.add_at(logits, adjustments.biased, adjustments.bias)
        return sampling.permit(logits, adjustments.allowed)

    return adjust


def _sample(control, logits, uniform, seen, tokens, adjust=None):
    """The next token (B,) of each slot: sampled with random numbers uniform (B,), or greedy.

    tokens (steps, B): the tokens of this round, which penalties count too.
    """
    logits = jax.lax.cond(
        jnp.any(control.is_penalized),
        lambda: sampling.penalize(logits, seen | _among(tokens, logits.shape[1]), control.penalty),
        lambda: logits,
    )
    if adjust is not None:
        logits = adjust(logits, tokens)
    scores = sampling.scale(logits, control.temperature)

    def keep(scores):
        lowest = sampling.lowest_kept(scores, control.top_k, control.top_p)[:, None]
        return jnp.where(scores >= lowest, scores, -jnp.inf)

    # Compared in the branch that computes the threshold: outside of it, the compiler may compute
    # the scores once more with other rounding, and then no token would reach the threshold.
    filters = jnp.any((control.top_k > 0) | (control.top_p < 1))
    scores = jax.lax.cond(filters, keep, lambda scores: scores, scores)
    is_kept = scores >= jnp.log(control.min_p)[:, None]
    drawn = sampling.draw(jnp.where(is_kept, scores, -jnp.inf), uniform)
    return jnp.where(control.is_sampled, drawn, sampling.likeliest(logits))


def _empty_round(steps, slots):
    """A Round without tokens."""

    def zeros(dtype, *shape):
        return jnp.zeros((steps, slots, *shape), dtype)

    top = sampling.LARGEST_LOGPROBS
    scores = TokenScores(zeros(jnp.float32), zeros(jnp.float32, top), zeros(jnp.int32, top))
    return Round(zeros(jnp.int32) - 1, scores)


def _uniforms(steps, control):
    """The random numbers (steps, B) of the tokens after each slot's newest one."""

    def of_slot(seed, sample, position):
        key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), sample)
        positions = position + 1 + jnp.arange(steps)
        return jax.vmap(lambda p: jax.random.uniform(jax.random.fold_in(key, p)))(positions)

    return jax.vmap(of_slot, out_axes=1)(control.seed, control.sample, control.position)


def _among(tokens, size):
    """Which of `size` token ids (B, size) occur in tokens (steps, B); -1 is no token."""
    where = jnp.arange(tokens.shape[1]), jnp.where(tokens < 0, size, tokens)
    return jnp.zeros((tokens.shape[1], size), jnp.bool_).at[where].set(True, mode="drop")

"""Scores continuations that share a prefix: the prefix is computed once, and of each layer only what the answer needs.

The model sees at most a window of tokens in each layer, so what lies further before the branches than all windows
together cannot reach them and is left out; of the last layer only the branches' own tokens are computed, and only they
meet the output head. The numbers are those of the whole model over whole rows: see tests/test_core.py.

Rows are aligned at the end of the prefix and padded on its left, so that windows fall on the same columns in all rows
of a batch. Lengths are rounded up to few sizes, so that few programs are compiled.

Legend: E prefixes, P prefix columns, C branches of each, S branch columns, T = P + C x S, D embed, K kv_heads, G query
heads a kv head, H head_dim.
"""

import collections
import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from MaxNano import losses, runtime, sharding
from MaxNano.evals import core
from MaxNano.evals.core import Prompt
from MaxNano.layers import apply_rotary, rms_norm
from MaxNano.model import LayerKind, Transformer, layer_kinds, repetition

SMALLEST_PREFIX, SMALLEST_BRANCH = 32, 8  # columns
MOST_BLOCKS = 8  # of queries, in a layer: more of them only take longer to compile
UNDER_WAY = 2  # batches that the devices have before the host waits for one
CPU_TOKENS, TOKENS = 2048, 16384  # a device computes at once where core_batch_tokens leaves it open


# ---- The forward pass -----------------------------------------------------------------------------------------------


def branch_hidden(model: Transformer, prefix: jax.Array, branches: jax.Array, lengths: jax.Array) -> jax.Array:
    """Final hidden states (E, C, S, D) of branches (E, C, S), each going on from its prefix.

    prefix (E, P): the last P tokens of it, padded on the left; lengths (E,): tokens of the whole prefix, which decide
    positions and what is padding. P is at most receptive_field(model), or what lies before is left out.
    """
    config, dtype = model.config, model.numerics.dtype
    (rows, columns), (_, count, size) = prefix.shape, branches.shape
    offsets = np.concatenate([np.arange(-columns, 0), np.tile(np.arange(size), count)])
    positions = lengths[:, None] + offsets  # negative: padding
    context = _Context(
        rotary=_rotary(positions, config.head_dim, config.rope_theta), lengths=lengths, count=count, size=size,
        chunk=max(config.attention_chunk, -(-columns // MOST_BLOCKS)),
    )  # fmt: skip
    tokens = jnp.concatenate([prefix, branches.reshape(rows, -1)], axis=1)

    x = rms_norm(model.token_embed[...][tokens].astype(dtype), config.norm_epsilon)
    if config.smear_gate_channels:
        own = x[:, columns:].reshape(rows, count, size, -1)
        last = jnp.broadcast_to(x[:, columns - 1, None, None], own[:, :, :1].shape)
        previous = jnp.concatenate([last, own[:, :, :-1]], axis=2).reshape(rows, count * size, -1)
        previous = jnp.concatenate([x[:, :1], x[:, : columns - 1], previous], axis=1)
        gate = jax.nn.sigmoid(x[..., : config.smear_gate_channels] @ model.smear_gate[...].astype(x.dtype))
        gate = jnp.where(positions <= 0, 0, model.smear_lambda[...] * gate)[..., None].astype(x.dtype)
        x = x + gate * previous

    x, middle = _run_layers(model, x, tokens, context, columns)
    if config.use_backout:
        x = _mix(x, jnp.float32(1), middle, -model.backout_lambda[...])
    return rms_norm(x, config.norm_epsilon).reshape(rows, count, size, -1)


def receptive_field(kinds: Sequence[LayerKind]) -> int:
    """Tokens before a branch that can reach its hidden states; one more than all windows because of the smear."""
    return sum(kind.window for kind in kinds) + 1


class _Context(NamedTuple):
    """What all layers share."""

    rotary: tuple[jax.Array, jax.Array]  # cosines and sines (E, T, H / 2)
    lengths: jax.Array
    count: int  # C
    size: int  # S
    chunk: int  # queries of a block

    @property
    def own(self) -> int:
        """Columns of the branches, which come last."""
        return self.count * self.size


def _run_layers(model: Transformer, x, tokens, context: _Context, columns: int):
    """All blocks; x (E, T, D) -> the last output and that of block num_decoder_layers // 2, both (E, C x S, D).

    Equal groups of layers are looped over, at full width; in the last group, or if there are no groups, each layer
    computes only the columns that the next one reads.
    """
    config, kinds = model.config, model.kinds
    graph, params = nnx.split(model.layers)
    per_layer = (params, model.resid_lambdas[...], model.x0_lambdas[...])
    valued = any(kind.has_value_embed for kind in kinds)
    per_value = (model.value_embeds[...], model.value_gate[...]) if valued else ()
    x0, middle_layer = x, config.num_decoder_layers // 2
    period, groups = repetition(kinds)
    looped = period * max(0, groups - 1) if config.scan_layers else 0

    def run(x, kinds, layers, values, widths, outputs):
        """The blocks of `kinds` on slices of the stacks; appends each block's branch columns to `outputs`."""
        value_index = 0
        for j, kind in enumerate(kinds):
            value = None
            if kind.has_value_embed:
                value = jax.tree.map(lambda a, e=value_index: a[e], values)
                value_index += 1
            layer, resid, share = jax.tree.map(lambda a, j=j: a[j], layers)
            start, wide, narrow = columns - widths[j], widths[j], widths[j + 1]
            x = x[:, x.shape[1] - wide - context.own :]
            x = _mix(x, resid, x0[:, start:], share)
            x = _block(nnx.merge(graph, layer), config, x, tokens[:, start:], value, kind.window, narrow, context)
            outputs.append(x[:, narrow:])
        return x

    middle = None
    if looped:
        in_loop = sum(kind.has_value_embed for kind in kinds[:looped])

        def grouped(tree, count):
            return jax.tree.map(lambda a: a[:count].reshape(groups - 1, -1, *a.shape[1:]), tree)

        def step(x, scanned):
            outputs: list[jax.Array] = []
            x = run(x, kinds[:period], *scanned, [columns] * (period + 1), outputs)
            return x, outputs[middle_layer % period]

        x, middles = jax.lax.scan(step, x, (grouped(per_layer, looped), grouped(per_value, in_loop)))
        middle = middles[min(middle_layer // period, groups - 2)]
        per_layer = jax.tree.map(lambda a: a[looped:], per_layer)
        per_value = jax.tree.map(lambda a: a[in_loop:], per_value)
    outputs: list[jax.Array] = []
    x = run(x, kinds[looped:], per_layer, per_value, _widths(kinds[looped:], columns), outputs)
    return x, outputs[middle_layer - looped] if middle_layer >= looped else middle


def _widths(kinds: Sequence[LayerKind], columns: int) -> list[int]:
    """Prefix columns that each block reads, and behind them those that the last one hands out: none."""
    widths = [0]
    for kind in reversed(kinds):
        widths.insert(0, min(columns, widths[0] + kind.window))
    return widths


def _block(layer, config, x, tokens, value, window: int, narrow: int, context: _Context) -> jax.Array:
    """One block: x (E, W + C x S, D) -> (E, narrow + C x S, D), the last columns; tokens likewise.

    value: a table of value embeddings (V, K x H) with its gate (channels, K), or None.
    """
    h = rms_norm(x, config.norm_epsilon)
    attention, dropped = layer.attention, x.shape[1] - context.own - narrow

    def project(weight, columns):
        return columns @ weight[...].astype(x.dtype)

    v = project(attention.value, h)
    if value is not None:
        table, gate = value
        gate = jax.nn.sigmoid(h[..., : config.value_embed_gate_channels] @ gate.astype(h.dtype))
        gate = config.value_embed_gate_range * jnp.repeat(gate, config.head_dim, axis=-1)
        v = v + gate * table[tokens].astype(h.dtype)
    q, k = project(attention.query, h[:, dropped:]), project(attention.key, h)
    x = x[:, dropped:] + project(attention.out, _attend(config, q, k, v, window, context))
    return x + layer.mlp(rms_norm(x, config.norm_epsilon))


def _attend(config, q, k, v, window: int, context: _Context) -> jax.Array:
    """q (E, Q + C x S, N x H), k and v (E, W + C x S, K x H), of the last columns -> (E, Q + C x S, N x H)."""
    kv_heads, size = config.num_kv_heads, config.head_dim
    own = context.own

    def split(x):
        """(E, columns, heads x H) -> (E, K, heads / K, columns, H)"""
        return x.reshape(*x.shape[:2], kv_heads, -1, size).transpose(0, 2, 3, 1, 4)

    def prepare(x):
        tables = tuple(table[:, -x.shape[1] :] for table in context.rotary)
        turned = jax.vmap(lambda row, *own: apply_rotary(row[None], own)[0])(
            x.reshape(*x.shape[:2], -1, size), *tables
        )
        return split(config.qk_norm_scale * rms_norm(turned, config.norm_epsilon))

    q, k, v = prepare(q), prepare(k)[:, :, 0], split(v)[:, :, 0]
    queries, keys = q.shape[3] - own, k.shape[2] - own
    real = jnp.arange(-keys, 0) >= -context.lengths[:, None]  # (E, keys)
    scale = size**-0.5

    parts = []
    for start in range(0, queries, context.chunk):
        stop = min(start + context.chunk, queries)
        # As offsets before the branches: queries first ... last - 1, and the keys that they see.
        first, last = start - queries, stop - queries
        low = max(-keys, first - window)
        distance = np.arange(first, last)[:, None] - np.arange(low, last)
        seen = (distance >= 0) & (distance <= window)
        # Padding sees itself, so that it stays finite.
        visible = (real[:, None, keys + low : keys + last] | (distance == 0)) & seen
        scores = jnp.einsum(
            "EKGQH,EKSH->EKGQS", q[:, :, :, start:stop], k[:, :, keys + low : keys + last],
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        scores = jnp.where(visible[:, None, None], scores * scale, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        parts.append(jnp.einsum("EKGQS,EKSH->EKGQH", weights, v[:, :, keys + low : keys + last]))

    # The branches' own queries see the end of the prefix, and of their own branch what lies before them.
    low = max(0, keys - window)

    def branched(x):
        return x[..., -own:, :].reshape(*x.shape[:-2], context.count, context.size, size)

    own_q, own_k, own_v = branched(q), branched(k), branched(v)
    columns = np.arange(context.size)
    distance = columns[:, None] - np.arange(low - keys, 0)
    before = jnp.einsum("EKGCSH,EKPH->EKGCSP", own_q, k[:, :, low:keys], preferred_element_type=jnp.float32)
    before = jnp.where((real[:, None, low:] & (distance <= window))[:, None, None, None], before * scale, -jnp.inf)
    distance = columns[:, None] - columns
    within = jnp.einsum("EKGCSH,EKCTH->EKGCST", own_q, own_k, preferred_element_type=jnp.float32)
    within = jnp.where((distance >= 0) & (distance <= window), within * scale, -jnp.inf)
    weights = jax.nn.softmax(jnp.concatenate([before, within], axis=-1), axis=-1).astype(v.dtype)
    y = jnp.einsum("EKGCSP,EKPH->EKGCSH", weights[..., : keys - low], v[:, :, low:keys])
    y = y + jnp.einsum("EKGCST,EKCTH->EKGCSH", weights[..., keys - low :], own_v)
    parts.append(y.reshape(*y.shape[:3], own, size))
    return jnp.concatenate(parts, axis=3).transpose(0, 3, 1, 2, 4).reshape(len(q), queries + own, -1)


def _rotary(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines (E, T, head_dim / 2) of positions (E, T), as layers.rotary_tables has them."""
    frequency = theta ** (-np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    angle = positions[..., None].astype(jnp.float32) * frequency.astype(np.float32)
    return jnp.cos(angle), jnp.sin(angle)


def _mix(x, scale, other, share):
    return (scale * x.astype(jnp.float32) + share * other.astype(jnp.float32)).astype(x.dtype)


def score_step(params, prefix, branches, lengths, *, model, greedy: bool) -> jax.Array:
    """For each token of branches (E, C, S) how it predicts the next: loss in nats, or, if `greedy`, whether it does."""
    bound = model.bind(params)
    config = bound.config
    hidden = branch_hidden(bound, prefix, branches, lengths)
    targets = jnp.concatenate([branches[..., 1:], jnp.full_like(branches[..., :1], -1)], axis=-1)
    flat = hidden.reshape(-1, *hidden.shape[2:])
    with jax.named_scope("loss"):
        if greedy:
            return jnp.argmax(bound.logits(flat), axis=-1).reshape(targets.shape) == targets
        chunk = losses.vocab_chunk(config.vocab_size, config.vocab_chunk_size)
        nll = losses.token_losses(
            flat, bound.lm_head[...], targets.reshape(flat.shape[:2]), config.vocab_size, config.logits_soft_cap, chunk
        )
        return nll.reshape(targets.shape)


# ---- Batches --------------------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """Columns and branches of a batch."""

    branches: int
    prefix: int
    size: int

    @property
    def tokens(self) -> int:
        return self.prefix + self.branches * self.size


class Batch(NamedTuple):
    """Prompts by index that are scored together, in arrays of `rows` rows."""

    shape: Shape
    rows: int
    prompts: list[int]


def round_up(count: int, smallest: int) -> int:
    """The smallest of `smallest` x 1, 1.25, 1.5, 1.75, 2, 2.5 ... not below `count`; below 128 only doublings."""
    size = smallest
    while size * 2 <= max(count, smallest):
        size *= 2
    if size < 128:
        return size if size >= count else size * 2
    return next(size * quarters // 4 for quarters in (4, 5, 6, 7, 8) if size * quarters // 4 >= count)


def shape_of(prompt: Prompt, field: int) -> Shape:
    """The shape of a batch for a prompt and others like it, of a model with a receptive field of `field` tokens."""
    return Shape(
        round_up(len(prompt.branches), 1),
        min(field, round_up(len(prompt.prefix), SMALLEST_PREFIX)),
        round_up(max(map(len, prompt.branches)), SMALLEST_BRANCH),
    )


def plan_batches(shapes: Sequence[Shape], tokens: int, ways: int) -> Iterator[Batch]:
    """All prompts in batches of at most `tokens` tokens a device, or one prompt, over `ways` devices.

    What does not fill a batch goes with those of the next larger shape, if that holds it.
    """
    groups = collections.defaultdict(list)
    for index, shape in enumerate(shapes):
        groups[shape].append(index)
    order = sorted(groups)
    for shape, larger in itertools.pairwise([*order, None]):
        rows = ways * max(1, tokens // shape.tokens)
        members = groups[shape]
        full = len(members) // rows * rows
        for start in range(0, full, rows):
            yield Batch(shape, rows, members[start : start + rows])
        rest = members[full:]
        if larger and larger.branches == shape.branches and larger.prefix >= shape.prefix and larger.size >= shape.size:
            groups[larger] += rest
        elif rest:
            yield Batch(shape, rows, rest)


def fill(batch: Batch, prompts: Sequence[Prompt], bos_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(prefix, branches, lengths) of a batch for branch_hidden; unused rows and branches hold `bos_id`."""
    count, columns, size = batch.shape
    prefix = np.full((batch.rows, columns), bos_id, np.int32)
    branches = np.full((batch.rows, count, size), bos_id, np.int32)
    lengths = np.zeros(batch.rows, np.int32)
    for row, index in enumerate(batch.prompts):
        prompt = prompts[index]
        kept = prompt.prefix[-columns:]
        prefix[row, columns - len(kept) :] = kept
        lengths[row] = len(prompt.prefix)
        for branch, ids in zip(branches[row], prompt.branches, strict=False):
            branch[: len(ids)] = ids
    return prefix, branches, lengths


class Scorer:
    """core.Scorer of a model over the devices of a set-up (train.Setup), for the parameters it is bound to."""

    def __init__(self, setup: Any, bos_id: int):
        default = CPU_TOKENS if setup.numerics.backend == "cpu" else TOKENS
        self._setup, self._bos_id = setup, bos_id
        self._tokens = setup.config.core_batch_tokens or default
        self._ways = setup.plan.ways
        self._field = receptive_field(layer_kinds(setup.config))
        others = [axis for axis in setup.mesh.axis_names if axis not in setup.batch_axes]
        everywhere = NamedSharding(setup.mesh, PartitionSpec())
        self._rows = NamedSharding(setup.mesh, setup.batch_specs)
        whole = jax.tree.map(
            lambda leaf: NamedSharding(setup.mesh, sharding.manual_spec(leaf.sharding.spec, others)),
            setup.abstract.params,
        )
        self._gather = jax.jit(self._working_copy, out_shardings=whole)
        self._programs = {
            greedy: jax.jit(
                setup.over_devices(
                    partial(score_step, model=setup.model, greedy=greedy),
                    (PartitionSpec(), *(setup.batch_specs,) * 3),
                    setup.batch_specs,
                ),
                out_shardings=everywhere,
                compiler_options=runtime.compiler_options(setup.config, setup.numerics.backend),
            )
            for greedy in (False, True)
        }

    def _working_copy(self, params):
        dtype = self._setup.numerics.dtype
        return jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 1 else x, params)

    def bind(self, params: Any) -> core.Scorer:
        """The scorer of a tree of parameters that lie as the set-up says; they are gathered once, here."""
        return partial(self._score, self._gather(params))

    def cost(self, prompt: Prompt) -> int:
        """Tokens that are computed for a prompt."""
        return shape_of(prompt, self._field).tokens

    def _score(self, params, prompts: Sequence[Prompt], *, greedy: bool):
        shapes = [shape_of(prompt, self._field) for prompt in prompts]
        under_way: collections.deque = collections.deque()
        for batch in plan_batches(shapes, self._tokens, self._ways):
            arrays = [self._put(array) for array in fill(batch, prompts, self._bos_id)]
            under_way.append((batch, self._programs[greedy](params, *arrays)))
            if len(under_way) > UNDER_WAY:
                yield from self._read(prompts, *under_way.popleft())
        while under_way:
            yield from self._read(prompts, *under_way.popleft())

    def _put(self, array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, self._rows, lambda part: array[part])

    @staticmethod
    def _read(prompts: Sequence[Prompt], batch: Batch, scores: jax.Array) -> Iterator[tuple[int, list[np.ndarray]]]:
        for index, rows in zip(batch.prompts, np.asarray(scores), strict=False):
            prompt = prompts[index]
            # The score of a token stands at the token before it.
            yield index, [
                row[start - 1 : len(ids) - 1]
                for row, ids, start in zip(rows, prompt.branches, prompt.starts, strict=False)
            ]

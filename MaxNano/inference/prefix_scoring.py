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

from MaxNano.distributed import hardware, sharding
from MaxNano.inference import prompts as scored_prompts
from MaxNano.inference.prompts import Prompt
from MaxNano.models.layers import apply_rotary, rms_norm
from MaxNano.models.transformer import LayerKind, Transformer, layer_kinds, repetition, scans_layers

SMALLEST_PREFIX, SMALLEST_BRANCH = 64, 16  # columns
SMALLEST_BLOCK, LARGEST_BLOCK = 128, 512  # queries that are scored against the same keys
UNDER_WAY = 2  # batches that the devices have before the host waits for one


class Limits(NamedTuple):
    """Tokens of a device."""

    tokens: int  # computed at once where core_batch_tokens leaves it open
    compilation: int  # computed in the time that a program takes to compile


LIMITS = {"cpu": Limits(2048, 4096), "other": Limits(16384, 2**20)}


# ---- The forward pass -----------------------------------------------------------------------------------------------


def branch_hidden(
    model: Transformer, prefix: jax.Array, branches: jax.Array, lengths: jax.Array
) -> jax.Array:
    """Final hidden states (E, C, S, D) of branches (E, C, S), each going on from its prefix.

    prefix (E, P): the last P tokens of it, padded on the left; lengths (E,): tokens of the whole prefix, which decide
    positions and what is padding. P is at most receptive_field(model), or what lies before is left out.
    """
    config, dtype = model.config, model.numerics.dtype
    (rows, columns), (_, count, size) = prefix.shape, branches.shape
    offsets = np.concatenate([np.arange(-columns, 0), np.tile(np.arange(size), count)])
    positions = lengths[:, None] + offsets  # negative: padding
    context = _Context(
        rotary=_rotary(positions, config.head_dim, config.rope_theta),
        lengths=lengths,
        count=count,
        size=size,
    )
    tokens = jnp.concatenate([prefix, branches.reshape(rows, -1)], axis=1)

    x = rms_norm(model.token_embed[...][tokens].astype(dtype), config.norm_epsilon)
    if config.smear_gate_channels:
        own = x[:, columns:].reshape(rows, count, size, -1)
        last = jnp.broadcast_to(x[:, columns - 1, None, None], own[:, :, :1].shape)
        previous = jnp.concatenate([last, own[:, :, :-1]], axis=2).reshape(rows, count * size, -1)
        previous = jnp.concatenate([x[:, :1], x[:, : columns - 1], previous], axis=1)
        gate = jax.nn.sigmoid(
            x[..., : config.smear_gate_channels] @ model.smear_gate[...].astype(x.dtype)
        )
        gate = jnp.where(positions <= 0, 0, model.smear_lambda[...] * gate)[..., None].astype(
            x.dtype
        )
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
    looped = period * max(0, groups - 1) if scans_layers(config, model.numerics.backend) else 0

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
            x = _block(
                nnx.merge(graph, layer),
                config,
                x,
                tokens[:, start:],
                value,
                kind.window,
                narrow,
                context,
            )
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

        x, middles = jax.lax.scan(
            step, x, (grouped(per_layer, looped), grouped(per_value, in_loop))
        )
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


def _block(
    layer, config, x, tokens, value, window: int, narrow: int, context: _Context
) -> jax.Array:
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
    scale = size**-0.5
    parts = []
    if queries:
        parts.append(
            _attend_prefix(*(x[..., :-own, :] for x in (q, k, v)), window, context.lengths)
        )

    # The branches' own queries see the end of the prefix, and of their own branch what lies before them.
    low = max(0, keys - window)

    def branched(x):
        return x[..., -own:, :].reshape(*x.shape[:-2], context.count, context.size, size)

    own_q, own_k, own_v = branched(q), branched(k), branched(v)
    columns = np.arange(context.size)
    distance = columns[:, None] - np.arange(low - keys, 0)
    before = jnp.einsum(
        "EKGCSH,EKPH->EKGCSP", own_q, k[:, :, low:keys], preferred_element_type=jnp.float32
    )
    real = np.arange(low - keys, 0) >= -context.lengths[:, None]
    before = jnp.where(
        (real[:, None] & (distance <= window))[:, None, None, None], before * scale, -jnp.inf
    )
    distance = columns[:, None] - columns
    within = jnp.einsum("EKGCSH,EKCTH->EKGCST", own_q, own_k, preferred_element_type=jnp.float32)
    within = jnp.where((distance >= 0) & (distance <= window), within * scale, -jnp.inf)
    weights = jax.nn.softmax(jnp.concatenate([before, within], axis=-1), axis=-1).astype(v.dtype)
    y = jnp.einsum("EKGCSP,EKPH->EKGCSH", weights[..., : keys - low], v[:, :, low:keys])
    y = y + jnp.einsum("EKGCST,EKCTH->EKGCSH", weights[..., keys - low :], own_v)
    parts.append(y.reshape(*y.shape[:3], own, size))
    return (
        jnp.concatenate(parts, axis=3).transpose(0, 3, 1, 2, 4).reshape(len(q), queries + own, -1)
    )


def _attend_prefix(q, k, v, window: int, lengths) -> jax.Array:
    """Within the prefix: q (E, K, G, Q, H), k and v (E, K, W, H), of its last Q and W columns -> as q.

    Queries go in blocks, each with the keys that its window can hold; all blocks are one product, so that one is
    compiled.
    """
    queries, keys, size = q.shape[3], k.shape[2], q.shape[4]
    block = min(max(window, SMALLEST_BLOCK), LARGEST_BLOCK, queries)
    reach = min(window, keys - 1)  # keys before the block's first query
    count = -(-queries // block)
    # Columns before the first are made up, and hidden.
    q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (count * block - queries, 0), (0, 0)))
    q = q.reshape(*q.shape[:3], count, block, size)
    first = count * block + reach  # the earliest key, in columns before the branches
    starts = range(0, count * block, block)

    def blocks(x):
        x = jnp.pad(x, ((0, 0), (0, 0), (max(0, first - keys), 0), (0, 0)))[:, :, -first:]
        return jnp.stack([x[:, :, start : start + reach + block] for start in starts], axis=2)

    offsets = np.arange(reach + block) - first + np.array(starts)[:, None]
    distance = reach + np.arange(block)[:, None] - np.arange(reach + block)
    seen = (distance >= 0) & (distance <= window) & (offsets >= -keys)[:, None]
    real = offsets >= -lengths[:, None, None]
    # Padding sees itself, so that it stays finite.
    visible = (real[:, :, None] & seen) | (distance == 0)
    scores = jnp.einsum("EKGBQH,EKBSH->EKGBQS", q, blocks(k), preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None, None], scores * size**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    y = jnp.einsum("EKGBQS,EKBSH->EKGBQH", weights, blocks(v))
    return y.reshape(*y.shape[:3], count * block, size)[:, :, :, -queries:]


def _rotary(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines (E, T, head_dim / 2) of positions (E, T), as layers.rotary_tables has them."""
    frequency = theta ** (-np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    angle = positions[..., None].astype(jnp.float32) * frequency.astype(np.float32)
    return jnp.cos(angle), jnp.sin(angle)


def _mix(x, scale, other, share):
    return (scale * x.astype(jnp.float32) + share * other.astype(jnp.float32)).astype(x.dtype)


def score_step(params, prefix, branches, lengths, *, model) -> tuple[jax.Array, jax.Array]:
    """How each token of branches (E, C, S) predicts the next: loss in nats, and whether that is the likeliest."""
    bound = model.bind(params)
    hidden = branch_hidden(bound, prefix, branches, lengths)
    targets = jnp.roll(branches, -1, axis=-1)

    def score(row):  # one at a time: the logits of all are many
        hidden, targets = row
        logits = bound.logits(hidden)
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - picked, jnp.argmax(logits, axis=-1) == targets

    with jax.named_scope("loss"):
        return jax.lax.map(score, (hidden, targets))


# ---- Batches --------------------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """Columns and branches of a batch, by which a program is compiled."""

    branches: int
    prefix: int
    size: int

    @property
    def tokens(self) -> int:
        return self.prefix + self.branches * self.size

    def holds(self, other: "Shape") -> bool:
        return all(own >= theirs for own, theirs in zip(self, other, strict=True))


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
    return next(
        size * quarters // 4 for quarters in (4, 5, 6, 7, 8) if size * quarters // 4 >= count
    )


def shape_of(prompt: Prompt, field: int) -> Shape:
    """The least shape for a prompt, of a model with a receptive field of `field` tokens."""
    return Shape(
        round_up(len(prompt.branches), 1),
        min(field, round_up(len(prompt.prefix), SMALLEST_PREFIX)),
        round_up(max(map(len, prompt.branches)), SMALLEST_BRANCH),
    )


class Shapes:
    """The shapes that are compiled: only where padding to a larger one would cost more, over all that was asked."""

    def __init__(self, worth: int):
        """worth: tokens that are computed in the time that a compilation takes."""
        self._worth = worth
        self._known: set[Shape] = set()
        self._wasted: collections.Counter[Shape] = collections.Counter()

    def choose(self, needed: Sequence[Shape]) -> list[Shape]:
        """The shape in which each prompt is scored: the needed one or a larger one."""
        chosen = {}
        for shape, count in sorted(collections.Counter(needed).items(), reverse=True):
            best = min(
                (other for other in self._known if other.holds(shape)),
                key=lambda s: s.tokens,
                default=shape,
            )
            self._wasted[shape] += count * (best.tokens - shape.tokens)
            if best == shape or self._wasted[shape] > self._worth:
                best = shape
                self._known.add(shape)
            chosen[shape] = best
        return [chosen[shape] for shape in needed]


def plan_batches(shapes: Sequence[Shape], tokens: int, ways: int) -> Iterator[Batch]:
    """All prompts in batches of at most `tokens` tokens a device, or one prompt, over `ways` devices.

    What does not fill a batch goes with those of the next larger shape, if that holds it.
    """
    groups = collections.defaultdict(list)
    for index, shape in enumerate(shapes):
        groups[shape].append(index)
    for shape, larger in itertools.pairwise([*sorted(groups), None]):
        rows = ways * max(1, tokens // shape.tokens)
        members = groups[shape]
        full = len(members) // rows * rows
        for start in range(0, full, rows):
            yield Batch(shape, rows, members[start : start + rows])
        rest = members[full:]
        if larger and larger.holds(shape):
            groups[larger] += rest
        elif rest:
            yield Batch(shape, rows, rest)


def fill(
    batch: Batch, prompts: Sequence[Prompt], bos_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
    """scored_prompts.Scorer of a model over the devices of a RunSetup, once it is bound to parameters."""

    def __init__(self, setup: Any, bos_id: int):
        limits = LIMITS.get(setup.numerics.backend, LIMITS["other"])
        self.dtype = setup.numerics.dtype  # in which the model computes
        self._setup, self._bos_id, self._ways = setup, bos_id, setup.plan.data_parallel_size
        self._tokens = setup.config.core_batch_tokens or limits.tokens
        self._shapes = Shapes(limits.compilation * self._ways)
        self._field = receptive_field(layer_kinds(setup.config))
        self._rows = NamedSharding(setup.mesh, setup.batch_spec)
        others = [axis for axis in setup.mesh.axis_names if axis not in setup.batch_axes]
        whole = jax.tree.map(
            lambda leaf: NamedSharding(
                setup.mesh, sharding.manual_spec(leaf.sharding.spec, others)
            ),
            setup.abstract.params,
        )
        options = hardware.compiler_options(setup.config, setup.numerics.backend)
        if setup.numerics.backend == "cpu":  # compiles in half the time what runs as fast
            options = {"xla_backend_optimization_level": 1, **options}
        self._gather = jax.jit(self._working_copy, out_shardings=whole)
        self._program = jax.jit(
            setup.over_devices(
                partial(score_step, model=setup.model),
                (PartitionSpec(), *(setup.batch_spec,) * 3),
                setup.batch_spec,
            ),
            out_shardings=NamedSharding(setup.mesh, PartitionSpec()),
            compiler_options=options,
        )

    def _working_copy(self, params):
        dtype = self._setup.numerics.dtype
        return jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 1 else x, params)

    def bind(self, params: Any) -> scored_prompts.Scorer:
        """The scorer of a tree of parameters that lie as the set-up says; they are gathered once, here."""
        return partial(self._score, self._gather(params))

    def cost(self, prompt: Prompt) -> int:
        """Tokens that are computed for a prompt."""
        return shape_of(prompt, self._field).tokens

    def _score(self, params, prompts: Sequence[Prompt], *, greedy: bool):
        shapes = self._shapes.choose([shape_of(prompt, self._field) for prompt in prompts])
        under_way: collections.deque = collections.deque()
        for batch in plan_batches(shapes, self._tokens, self._ways):
            arrays = [self._put(array) for array in fill(batch, prompts, self._bos_id)]
            under_way.append((batch, self._program(params, *arrays)[greedy]))
            if len(under_way) > UNDER_WAY:
                yield from self._read(prompts, *under_way.popleft())
        while under_way:
            yield from self._read(prompts, *under_way.popleft())

    def _put(self, array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, self._rows, lambda part: array[part])

    @staticmethod
    def _read(
        prompts: Sequence[Prompt], batch: Batch, scores: jax.Array
    ) -> Iterator[tuple[int, list[np.ndarray]]]:
        for index, rows in zip(batch.prompts, np.asarray(scores), strict=False):
            prompt = prompts[index]
            # The score of a token stands at the token before it.
            yield (
                index,
                [
                    row[start - 1 : len(ids) - 1]
                    for row, ids, start in zip(rows, prompt.branches, prompt.starts, strict=False)
                ],
            )

"""Scores continuations that share a prefix: the prefix is computed once for all of them.

Each layer sees at most a window of tokens, so a prefix is cut to what all windows together can
reach. The last layers compute only the tokens that the next layer reads, and only the branches'
tokens meet the output head. The scores are those of the whole model over whole rows: see
tests/test_core.py.

Rows are aligned at the end of the prefix and padded on its left, so that windows cover the same
columns in all rows of a batch. Lengths are rounded up to few sizes, so that few programs are
compiled.

Legend: E prefixes, P prefix columns, C branches per prefix, S branch columns, T = P + C x S, D
embed, K kv_heads, G query heads per kv head, H head_dim.
"""

import collections
import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import FrozenConfigDict

from MaxNano.distributed import hardware, runtime
from MaxNano.inference import weights as inference_weights
from MaxNano.inference.prompts import Prompt, Scorer
from MaxNano.inference.weights import Weights
from MaxNano.models import attention, embedding, products, transformer
from MaxNano.models.layers import rotary
from MaxNano.models.setup import ModelSetup
from MaxNano.models.transformer import Context, LayerKind, layer_kinds

SMALLEST_PREFIX, SMALLEST_BRANCH = 64, 16  # columns
SMALLEST_BLOCK, LARGEST_BLOCK = 128, 512  # queries that are scored against the same keys
BATCHES_IN_FLIGHT = 2  # batches queued on the devices before the host waits for one


class ScoringLimits(NamedTuple):
    """Tokens per device."""

    tokens: int  # computed at once if core_batch_tokens is null
    compilation: int  # computed in the time that one program takes to compile


# On a CPU, temporaries of more tokens do not fit into its caches: see benchmarks/evaluation.md.
LIMITS = {"cpu": ScoringLimits(512, 4096), "other": ScoringLimits(16384, 2**20)}


# ---- The forward pass ---------------------------------------------------------------------------


def branch_hidden(
    config: FrozenConfigDict,
    weights: Weights,
    prefix: jax.Array,
    branches: jax.Array,
    lengths: jax.Array,
    *,
    scans: bool,
) -> jax.Array:
    """Final hidden states (E, C, S, D) of branches (E, C, S) that continue a shared prefix.

    prefix (E, P): its last P tokens, padded on the left; lengths (E,): tokens of the whole prefix,
    which decide positions and what is padding. P is at most receptive_field(model), or the prefix
    is cut. scans: equal groups of layers but the last are a scan, over all columns. The layers that
    remain compute only the columns that the next one reads.
    """
    (rows, columns), (_, count, size) = prefix.shape, branches.shape
    offsets = np.concatenate([np.arange(-columns, 0), np.tile(np.arange(size), count)])
    positions = lengths[:, None] + offsets  # negative: padding
    tables = rotary(positions, config.head_dim, config.rope_theta)
    tokens = jnp.concatenate([prefix, branches.reshape(rows, -1)], axis=1)
    kinds = layer_kinds(config)
    period, groups = transformer.repetition(kinds) if scans else (0, 1)
    groups = max(0, groups - 1)
    widths = _widths(kinds, columns)

    def attend(qkv, value_embed, kind, index):
        local = tuple(table[:, -qkv.shape[1] :] for table in tables)
        q, k, v = attention.split_heads(
            qkv, local, value_embed, attention.Heads.from_config(config)
        )
        kept = (columns if index is None else widths[index]) + count * size
        q = q[:, :, -kept:].reshape(*k.shape[:2], -1, kept, config.head_dim)
        return _attend(q, k, v, kind.window, lengths, (count, size)), None

    def previous(x):
        branch_x = x[:, columns:].reshape(rows, count, size, -1)
        last = jnp.broadcast_to(x[:, columns - 1, None, None], branch_x[:, :, :1].shape)
        shifted = jnp.concatenate([last, branch_x[:, :, :-1]], axis=2)
        shifted = shifted.reshape(rows, count * size, -1)
        return jnp.concatenate([x[:, :1], x[:, : columns - 1], shifted], axis=1)

    context = Context(
        attend=attend,
        lookup=lambda tables, index, table: embedding.rows(tables, index, tokens),
        previous=previous,
        is_first=positions <= 0,
        products=products.plain(config),
    )
    stack = transformer.stack_layers(config, weights, period, groups)
    hidden, _ = transformer.forward(config, weights, stack, context)
    return hidden.reshape(rows, count, size, -1)


def receptive_field(kinds: Sequence[LayerKind]) -> int:
    """Tokens before a branch that can reach its hidden states: all windows, and one more by the
    smear.
    """
    return sum(kind.window for kind in kinds) + 1


def _widths(kinds: Sequence[LayerKind], columns: int) -> list[int]:
    """Prefix columns of each layer's output that the next layers read; none of the last layer's."""
    widths = [0]
    for kind in reversed(kinds[1:]):
        widths.insert(0, min(columns, widths[0] + kind.window))
    return widths


def _attend(q, k, v, window: int, lengths, branches: tuple[int, int]) -> jax.Array:
    """q (E, K, G, Q + C x S, H), k and v (E, K, W + C x S, H), the last columns -> (E, Q + C x S, N
    x H).

    branches: C and S.
    """
    count, branch = branches
    total, size = count * branch, q.shape[-1]
    queries, keys = q.shape[3] - total, k.shape[2] - total
    parts = []
    if queries:
        prefix = (x[..., :-total, :] for x in (q, k, v))
        parts.append(_attend_prefix(*prefix, window, lengths))

    # The queries of a branch see the end of the prefix, and the columns before them in their
    # branch.
    low = max(0, keys - window)
    q, branch_k, branch_v = (
        x[..., -total:, :].reshape(*x.shape[:-2], count, branch, size) for x in (q, k, v)
    )
    columns = np.arange(branch)
    distance = columns[:, None] - np.arange(low - keys, 0)
    before = jnp.einsum(
        "EKGCSH,EKPH->EKGCSP", q, k[:, :, low:keys], preferred_element_type=jnp.float32
    )
    real = np.arange(low - keys, 0) >= -lengths[:, None]
    visible = (real[:, None] & (distance <= window))[:, None, None, None]
    before = jnp.where(visible, before * size**-0.5, -jnp.inf)
    distance = columns[:, None] - columns
    within = jnp.einsum("EKGCSH,EKCTH->EKGCST", q, branch_k, preferred_element_type=jnp.float32)
    visible = (distance >= 0) & (distance <= window)
    within = jnp.where(visible, within * size**-0.5, -jnp.inf)
    weights = jax.nn.softmax(jnp.concatenate([before, within], axis=-1), axis=-1).astype(v.dtype)
    y = jnp.einsum("EKGCSP,EKPH->EKGCSH", weights[..., : keys - low], v[:, :, low:keys])
    y = y + jnp.einsum("EKGCST,EKCTH->EKGCSH", weights[..., keys - low :], branch_v)
    parts.append(y.reshape(*y.shape[:3], total, size))
    y = jnp.concatenate(parts, axis=3).transpose(0, 3, 1, 2, 4)
    return y.reshape(len(q), queries + total, -1)


def _attend_prefix(q, k, v, window: int, lengths) -> jax.Array:
    """Within the prefix: q (E, K, G, Q, H), k and v (E, K, W, H), its last Q and W columns -> as q.

    Queries are split into blocks, each with the keys that its window can hold. All blocks are one
    product, so that one is compiled.
    """
    queries, keys, size = q.shape[3], k.shape[2], q.shape[4]
    block = min(max(window, SMALLEST_BLOCK), LARGEST_BLOCK, queries)
    reach = min(window, keys - 1)  # keys before the block's first query
    count = -(-queries // block)
    # Columns before the first are padding, and masked.
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


def branch_scores(
    weights: Weights,
    prefix: jax.Array,
    branches: jax.Array,
    lengths: jax.Array,
    *,
    setup: ModelSetup,
) -> tuple[jax.Array, jax.Array]:
    """How each token of branches (E, C, S) predicts the next: loss in nats, and whether it is the
    likeliest.
    """
    config = setup.config
    scans = transformer.scans_layers(config, setup.numerics.backend)
    hidden = branch_hidden(config, weights, prefix, branches, lengths, scans=scans)
    targets = jnp.roll(branches, -1, axis=-1)

    def score(row):  # one prefix at a time, because the logits of all take much memory
        hidden, targets = row
        logits = transformer.head(config, hidden, weights["lm_head"][: config.vocab_size])
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - picked, jnp.argmax(logits, axis=-1) == targets

    with jax.named_scope("loss"):
        return jax.lax.map(score, (hidden, targets))


# ---- Batches ------------------------------------------------------------------------------------


class BatchShape(NamedTuple):
    """The branches and columns of a batch, for which a program is compiled."""

    branches: int
    prefix: int
    size: int

    @property
    def tokens(self) -> int:
        """Tokens computed per prompt."""
        return self.prefix + self.branches * self.size

    def holds(self, other: "BatchShape") -> bool:
        """Whether prompts of another shape fit."""
        return all(mine >= theirs for mine, theirs in zip(self, other, strict=True))


class PromptBatch(NamedTuple):
    """Prompts, by index, that are scored together in arrays of `rows` rows."""

    shape: BatchShape
    rows: int
    prompts: list[int]


def round_up(count: int, smallest: int) -> int:
    """The smallest of `smallest` x 1, 1.25, 1.5, 1.75, 2, 2.5 ... not below `count`; below 128 only
    doublings.
    """
    size = smallest
    while size * 2 <= max(count, smallest):
        size *= 2
    if size < 128:
        return size if size >= count else size * 2
    return next(
        size * quarters // 4 for quarters in (4, 5, 6, 7, 8) if size * quarters // 4 >= count
    )


def shape_of(prompt: Prompt, field: int) -> BatchShape:
    """The smallest shape for a prompt, of a model with a receptive field of `field` tokens."""
    return BatchShape(
        round_up(len(prompt.branches), 1),
        min(field, round_up(len(prompt.prefix), SMALLEST_PREFIX)),
        round_up(max(map(len, prompt.branches)), SMALLEST_BRANCH),
    )


class CompiledShapes:
    """The shapes that are compiled: a new one only if padding to a larger one has cost more by now."""

    def __init__(self, worth: int):
        """worth: number of tokens that are computed in the time of one compilation."""
        self._worth = worth
        self._known: set[BatchShape] = set()
        self._wasted: collections.Counter[BatchShape] = collections.Counter()

    def choose(self, needed: Sequence[BatchShape]) -> list[BatchShape]:
        """The shape in which each prompt is scored: the one it needs, or a larger one."""
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


def plan_batches(shapes: Sequence[BatchShape], tokens: int, shards: int) -> Iterator[PromptBatch]:
    """All prompts in batches of at most `tokens` tokens, or one prompt, on each of `shards`
    devices.

    Prompts that do not fill a batch join those of the next larger shape, if it holds them.
    """
    groups = collections.defaultdict(list)
    for index, shape in enumerate(shapes):
        groups[shape].append(index)
    for shape, larger in itertools.pairwise([*sorted(groups), None]):
        rows = shards * max(1, tokens // shape.tokens)
        members = groups[shape]
        full = len(members) // rows * rows
        for start in range(0, full, rows):
            yield PromptBatch(shape, rows, members[start : start + rows])
        rest = members[full:]
        if larger and larger.holds(shape):
            groups[larger] += rest
        elif rest:
            yield PromptBatch(shape, rows, rest)


def fill(
    batch: PromptBatch, prompts: Sequence[Prompt], bos_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(prefix, branches, lengths) of a batch for branch_hidden; unused rows and branches hold
    `bos_id`.
    """
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


class PrefixScorer:
    """Scores prompts with a model over the devices of a set-up, once it is bound to parameters."""

    def __init__(self, setup: ModelSetup, bos_id: int):
        limits = LIMITS.get(setup.numerics.backend, LIMITS["other"])
        self.dtype = setup.numerics.dtype  # in which the model computes
        self._bos_id, self._shards = bos_id, setup.data_parallel_size
        self._tokens = setup.config.core_batch_tokens or limits.tokens
        self._shapes = CompiledShapes(limits.compilation * self._shards)
        self._field = receptive_field(layer_kinds(setup.config))
        self._rows = NamedSharding(setup.mesh, setup.batch_spec)
        options = hardware.compiler_options(setup.config, setup.numerics.backend)
        if setup.numerics.backend == "cpu":  # half the compile time for programs that run as fast
            options = {"xla_backend_optimization_level": 1, **options}
        prepare = partial(inference_weights.prepare, setup.config, dtype=setup.numerics.dtype)
        shapes = jax.eval_shape(prepare, setup.params)
        shardings = inference_weights.shardings(setup.config, setup.mesh, shapes)
        self._prepare = jax.jit(prepare, out_shardings=shardings)
        in_specs = (PartitionSpec(), *(setup.batch_spec,) * 3)
        self._program = jax.jit(
            setup.over_devices(partial(branch_scores, setup=setup), in_specs, setup.batch_spec),
            out_shardings=setup.replicated,
            compiler_options=options,
        )

    def bind(self, params: dict[str, Any]) -> Scorer:
        """The scorer of parameters with the set-up's shardings, which are gathered once, here."""
        return partial(self._score, self._prepare(params))

    def cost(self, prompt: Prompt) -> int:
        """Number of tokens that are computed for a prompt."""
        return shape_of(prompt, self._field).tokens

    def _score(self, weights, prompts: Sequence[Prompt], *, greedy: bool):
        shapes = self._shapes.choose([shape_of(prompt, self._field) for prompt in prompts])

        def started():
            for batch in plan_batches(shapes, self._tokens, self._shards):
                arrays = [self._put(array) for array in fill(batch, prompts, self._bos_id)]
                yield batch, self._program(weights, *arrays)[greedy]

        for batch, scores in runtime.limit_in_flight(started(), BATCHES_IN_FLIGHT):
            yield from self._read(prompts, batch, scores)

    def _put(self, array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, self._rows, lambda part: array[part])

    @staticmethod
    def _read(
        prompts: Sequence[Prompt], batch: PromptBatch, scores: jax.Array
    ) -> Iterator[tuple[int, list[np.ndarray]]]:
        for index, rows in zip(batch.prompts, np.asarray(scores), strict=False):
            prompt = prompts[index]
            branches = zip(rows, prompt.branches, prompt.starts, strict=False)
            # The score of a token is at the token before it.
            yield index, [row[start - 1 : len(ids) - 1] for row, ids, start in branches]

"""The engine's compiled programs, prefill and decode, and the weights and KV cache they run on.

Every array has one fixed shape, whatever requests are running, so each program is compiled once:
decode for all slots, prefill for each prompt length in `EnginePrograms.buckets`. Slots are split
over the data-parallel mesh axes: each of `setup.data_parallel_size` shards computes
`slots_per_shard` slots on its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding, PartitionSpec

from MaxNano import scaling
from MaxNano.distributed import hardware, runtime
from MaxNano.inference import decode, extend
from MaxNano.inference.kv_cache import KVCache
from MaxNano.inference.weights import Weights
from MaxNano.models.setup import ModelSetup

# XLA's fastest CPU matrix products at these sizes: benchmarks/decoding.md.
_CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": ""}
_FEW_ROWS_OPTIONS = _CPU_OPTIONS | {"xla_cpu_multi_thread_eigen": False}
SMALLEST_BUCKET = 64  # prompts are padded to this many tokens times a power of two


@dataclass(frozen=True)
class EnginePrograms:
    """The programs of an engine, compiled when first used."""

    setup: ModelSetup
    plan: decode.Plan
    slots: int
    steps: int  # most decode steps between two host syncs
    prefill_rows: int  # prompts per shard and prefill call
    prefix_entries: int = 0  # entries of the prefix cache

    @classmethod
    def build(
        cls,
        setup: ModelSetup,
        *,
        slots: int,
        max_length: int,
        prefix_entries: int = 0,
        is_full: bool = False,
    ) -> Self:
        """Programs for at least `slots` sequences of up to `max_length` tokens, prompt included,
        and at least `prefix_entries` entries of the prefix cache.

        is_full: loops run as long as they ever can, for the compile report.
        """
        config, shards = setup.config, setup.data_parallel_size
        plan = decode.make_plan(config, setup.numerics, max_length)._replace(is_full=is_full)
        prefill_rows = config.prefill_rows or (1 if setup.numerics.backend == "cpu" else 8)
        slots, prefix_entries = (-(-n // shards) * shards for n in (slots, prefix_entries))
        return cls(setup, plan, slots, config.stream_interval, prefill_rows, prefix_entries)

    @property
    def slots_per_shard(self) -> int:
        """Number of slots in each data-parallel shard."""
        return self.slots // self.setup.data_parallel_size

    @property
    def prefill_size(self) -> int:
        """Prompts per prefill call, over all shards."""
        return self.prefill_rows * self.setup.data_parallel_size

    def bucket(self, length: int) -> int:
        """The padded length of a prompt of `length` tokens."""
        size = SMALLEST_BUCKET
        while size < length:
            size *= 2
        return min(size, max(self.plan.max_length, 1))

    @property
    def buckets(self) -> list[int]:
        """All padded prompt lengths, shortest first."""
        return sorted({self.bucket(length) for length in range(1, self.plan.max_length)})

    @cached_property
    def weights(self) -> Weights:
        """The prepared weights as abstract arrays."""
        shapes = jax.eval_shape(partial(decode.prepare, self.plan), self.setup.params)
        shardings = decode.weight_shardings(self.plan, self.setup.mesh, shapes)
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            shapes,
            shardings,
        )

    @cached_property
    def cache(self) -> KVCache:
        """The KV cache as abstract arrays."""
        return decode.cache_shapes(self.plan, self.setup.mesh, self.slots)

    @cached_property
    def store(self) -> KVCache:
        """The store of the prefix cache as abstract arrays."""
        return decode.cache_shapes(self.plan, self.setup.mesh, self.prefix_entries)

    def formats(self, cache: KVCache) -> KVCache:
        """Memory layout of the cache or store; on a TPU, the heads of a position are adjacent."""
        if self.setup.numerics.backend != "tpu":
            return jax.tree.map(lambda x: x.sharding, cache)
        return jax.tree.map(lambda x: Format(Layout((0, 2, 1, 3)), x.sharding), cache)

    @cached_property
    def by_slot(self) -> NamedSharding:
        """Sharding of arrays whose first axis is slots or prompts."""
        return NamedSharding(self.setup.mesh, self.setup.batch_spec)

    @cached_property
    def prepare(self) -> Callable[[dict[str, Any]], Weights]:
        """Model parameters -> weights for decoding."""
        shardings = jax.tree.map(lambda x: x.sharding, self.weights)
        return jax.jit(partial(decode.prepare, self.plan), out_shardings=shardings)

    @cached_property
    def decode(self) -> Callable:
        """(weights, cache, packed Control, seen, is_eager) -> (cache, Round); donates the cache."""
        return self._jit_decode()

    @cached_property
    def adjusted_decode(self) -> Callable:
        """Like `decode`, with the fields of decode.Adjustments as further arguments.

        A program of its own, so that rounds without them do not pay for them.
        """
        return self._jit_decode(len(decode.Adjustments._fields))

    def _jit_decode(self, adjustments: int = 0) -> Callable:
        def local(weights, cache, packed, seen, is_eager, *fields):
            control = decode.Control.of(packed)
            extra = (decode.Adjustments(*fields),) if fields else ()
            return decode.decode_round(self.plan, weights, cache, control, seen, is_eager, *extra)

        slots, by_step = self.setup.batch_spec, PartitionSpec(None, self.setup.batch_axes)
        is_small = self.slots_per_shard <= runtime.FEW_ROWS
        return self._jit(
            local,
            (slots, slots, PartitionSpec(), *(slots,) * adjustments),
            by_step,
            _FEW_ROWS_OPTIONS if is_small else _CPU_OPTIONS,
        )

    @cached_property
    def prefill(self) -> Callable:
        """(weights, cache, tokens, lengths, copies, with_top) -> (cache, ()): prompts into slots.

        tokens (prefill_size, L + 1) and lengths (prefill_size,) int32. copies (shards,
        slots_per_shard + 1, 2) int32: pairs of a prompt and a slot of the same shard; the last pair
        is their number, twice. Donates the cache.
        """
        return self._jit_prefill(is_scored=False)

    @cached_property
    def scoring_prefill(self) -> Callable:
        """Like `prefill`, and returns the TokenScores (prefill_size, L) of tokens[:, 1:]."""
        return self._jit_prefill(is_scored=True)

    def _jit_prefill(self, is_scored: bool) -> Callable:
        plan = self.plan

        def local(weights, cache, tokens, lengths, copies, with_top):
            pairs = decode.Copies(copies[0, :-1, 0], copies[0, :-1, 1], copies[0, -1, 0])
            # The prompt's last token goes through decode, so that all tokens are sampled there.
            cache, hidden = decode.prefill(plan, weights, cache, tokens[:, :-1], lengths - 1, pairs)
            if not is_scored:
                return cache, ()
            return cache, decode.score(plan, weights, hidden, tokens[:, 1:], with_top)

        rows = self.setup.batch_spec
        return self._jit(local, (rows, rows, rows, PartitionSpec()), rows, _CPU_OPTIONS)

    @cached_property
    def extend(self) -> Callable:
        """(weights, cache, work, tokens, *leaves of the store) -> (cache, ()): see
        extend.extend. work (shards, 5) int32 has a Work per shard, tokens (shards, L) int32.
        Donates the cache.
        """
        store = jax.tree.structure(self.store)

        def local(weights, cache, work, tokens, *leaves):
            kept = jax.tree.unflatten(store, leaves)
            return extend.extend(self.plan, weights, cache, kept, work, tokens), ()

        rows, specs = self.setup.batch_spec, jax.tree.leaves(self.setup.manual_specs(self.store))
        formats = jax.tree.leaves(self.formats(self.store))
        return self._jit(local, (rows, rows, *specs), rows, _CPU_OPTIONS, formats)

    @cached_property
    def save(self) -> Callable:
        """(store, cache, work) -> store: see extend.save. Donates the store."""
        setup, formats = self.setup, self.formats(self.store)
        store, cache = setup.manual_specs(self.store), setup.manual_specs(self.cache)
        return jax.jit(
            setup.over_devices(extend.save, (store, cache, setup.batch_spec), store),
            donate_argnums=0,
            in_shardings=(formats, self.formats(self.cache), None),
            out_shardings=formats,
        )

    def _jit(
        self,
        function: Callable,
        in_specs,
        out_spec,
        cpu_options: dict[str, Any],
        formats: Sequence[Any] = (),
    ) -> Callable:
        """jit of `function(weights, cache, *inputs) -> (cache, output)` over the shards.

        in_specs: of the inputs; out_spec: of the output, which every host receives whole; formats:
        of the last inputs.
        """
        setup, backend = self.setup, self.setup.numerics.backend
        weights, cache = setup.manual_specs(self.weights), setup.manual_specs(self.cache)
        local = setup.over_devices(function, (weights, cache, *in_specs), (cache, out_spec))
        kept = self.formats(self.cache)
        return jax.jit(
            local,
            donate_argnums=1,
            in_shardings=(None, kept, *[None] * (len(in_specs) - len(formats)), *formats),
            out_shardings=(kept, setup.replicated),
            compiler_options=(cpu_options if backend == "cpu" else {})
            | hardware.compiler_options(setup.config, backend),
        )


# ---- Compile report -----------------------------------------------------------------------------


def report_programs(setup: ModelSetup) -> EnginePrograms:
    """The programs of a config with every slot at its longest, to be compiled but not run."""
    config = setup.config
    max_length = config.decode_max_length or config.max_target_length
    return EnginePrograms.build(
        setup, slots=config.decode_slots, max_length=max_length, is_full=True
    )


def lower_decode(programs: EnginePrograms) -> jax.stages.Lowered:
    """Lower the decode program."""

    def abstract(dtype, columns):
        return jax.ShapeDtypeStruct((programs.slots, columns), dtype, sharding=programs.by_slot)

    packed = abstract(np.int32, decode.CONTROL_COLUMNS + programs.steps)
    seen = abstract(np.bool_, programs.weights["head"].shape[1])
    return programs.decode.lower(programs.weights, programs.cache, packed, seen, np.bool_(False))


def lower_prefill(programs: EnginePrograms, length: int | None = None) -> jax.stages.Lowered:
    """Lower the prefill of prompts of `length` tokens (None: the longest)."""
    length = programs.bucket(length or programs.plan.max_length)
    shards, rows = programs.setup.data_parallel_size, programs.prefill_size
    shapes = (rows, length + 1), (rows,), (shards, programs.slots_per_shard + 1, 2)
    inputs = [jax.ShapeDtypeStruct(shape, np.int32, sharding=programs.by_slot) for shape in shapes]
    return programs.prefill.lower(programs.weights, programs.cache, *inputs, np.bool_(False))


def decode_costs(programs: EnginePrograms, context: int) -> tuple[float, float]:
    """(bytes read per device, model FLOPs over all devices) of one decode step of all slots.

    Bytes are the weight matrices, without embedding tables, and the KV cache at `context` tokens.
    """
    plan, setup = programs.plan, programs.setup
    config, shape = setup.config, scaling.shape_of(setup.config)
    itemsize = jnp.dtype(plan.dtype).itemsize
    positions = tuple(min(context, size) for size in plan.sizes)  # per layer
    cache_bytes = 2 * config.num_kv_heads * config.head_dim * sum(positions) * itemsize
    weight_bytes = scaling.parameter_counts(shape).scaling * itemsize
    # Each data-parallel shard reads all weights and the cache of its slots.
    total_bytes = weight_bytes * setup.data_parallel_size + cache_bytes * programs.slots
    forward_flops = scaling.flops_per_token(shape, positions) / 3
    return total_bytes / setup.mesh.size, forward_flops * programs.slots


# ---- Weights and cache on the devices -----------------------------------------------------------


class ModelRunner:
    """Runs the programs on weights and a KV cache. `cache` is replaced by every call."""

    def __init__(self, programs: EnginePrograms):
        self.programs = programs
        self.weights: Weights | None = None
        self.cache = self._empty(programs.cache)
        self.store: KVCache | None = None  # allocated when first used
        seen = np.zeros((programs.slots, programs.weights["head"].shape[1]), np.bool_)
        self._none_seen = jax.device_put(seen, programs.by_slot)
        self._prompts = 0  # calls of prefill and extend

    def set_params(self, params: dict[str, Any]) -> None:
        """Prepare a parameter tree of jax or numpy arrays for decoding."""
        setup = self.programs.setup
        placed = jax.tree.map(
            lambda x, like: x if isinstance(x, jax.Array) else jax.device_put(x, like.sharding),
            params,
            setup.params,
        )
        self.weights = self.programs.prepare(placed)
        if setup.numerics.backend == "cpu" and jax.process_count() == 1:
            # Virtual devices of one process can share the memory of replicated arrays.
            self.weights = jax.tree.map(
                lambda x: jax.device_put(np.asarray(x), x.sharding), self.weights
            )

    def clear(self) -> None:
        """Replace cache and store, after a call that failed and may have consumed them."""
        self.cache, self.store = self._empty(self.programs.cache), None

    def _empty(self, shapes: KVCache) -> KVCache:
        def zeros():
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        return jax.jit(zeros, out_shardings=self.programs.formats(shapes))()

    def save(self, shard: int, entry: int, slot: int) -> None:
        """Copy a slot to an entry of the store, as numbered in a shard; shard -1 compiles only."""
        programs = self.programs
        if self.store is None:
            self.store = self._empty(programs.store)
        self.store = programs.save(self.store, self.cache, self._work(shard, entry, slot))

    def extend(self, shard: int, entry: int, slot: int, prompt: Sequence[int], length: int) -> None:
        """Write a prompt but its last token to a slot; the first `length` tokens, at least one, are
        those of an entry of the store. Slot and entry as in `save`; shard -1 compiles only.
        """
        programs, count = self.programs, max(0, len(prompt) - 1 - length)
        work = self._work(shard, entry, slot, length, count)
        size = -(-programs.plan.max_length // extend.CHUNK) * extend.CHUNK
        tokens = np.zeros((len(work), size + 1), np.int32)
        tokens[shard, : count + 1] = prompt[length - 1 : -1]
        tokens = jax.device_put(tokens, programs.by_slot)
        leaves = jax.tree.leaves(self.store)
        self.cache, _ = programs.extend(self.weights, self.cache, work, tokens, *leaves)
        self._limit_in_flight()

    def _work(self, shard: int, *fields: int) -> jax.Array:
        work = np.zeros((self.programs.setup.data_parallel_size, 5), np.int32)
        if shard >= 0:
            work[shard, : 1 + len(fields)] = 1, *fields
        return jax.device_put(work, self.programs.by_slot)

    def prefill(
        self, inputs: Sequence[np.ndarray], is_scored: bool, with_top: bool
    ) -> decode.TokenScores | tuple[()]:
        """Write prompts into slots. inputs: tokens, lengths, copies of EnginePrograms.prefill."""
        programs = self.programs
        program = programs.scoring_prefill if is_scored else programs.prefill
        inputs = (jax.device_put(x, programs.by_slot) for x in inputs)
        self.cache, scores = program(self.weights, self.cache, *inputs, np.bool_(with_top))
        self._limit_in_flight()
        return jax.device_get(scores)

    def _limit_in_flight(self) -> None:
        """Waits for the cache from time to time, for the reason of runtime.limit_in_flight."""
        self._prompts += 1
        if self._prompts % runtime.IN_FLIGHT == 0:
            jax.block_until_ready(self.cache)

    def decode(
        self,
        packed: np.ndarray,
        seen: np.ndarray | None,
        is_eager: bool,
        with_scores: bool,
        adjustments: decode.Adjustments | None = None,
    ) -> tuple[np.ndarray, decode.TokenScores | None]:
        """Run decode steps: (tokens (steps, slots), -1 for none; their scores if wanted).

        packed (slots, columns) int32 is a packed Control; seen (slots, padded vocabulary) bool,
        None if no slot has a repetition penalty. is_eager: end the round when the first sample
        stops.
        """
        programs = self.programs
        seen = self._none_seen if seen is None else jax.device_put(seen, programs.by_slot)
        # jit transfers a small numpy array to the devices several times as fast as device_put.
        program = programs.decode if adjustments is None else programs.adjusted_decode
        self.cache, out = program(
            self.weights, self.cache, packed, seen, np.bool_(is_eager), *(adjustments or ())
        )
        return np.asarray(out.tokens), jax.device_get(out.scores) if with_scores else None

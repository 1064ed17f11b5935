"""The inference engine: requests come and go in a running batch of slots, tokens come out.

    engine = Engine.load(config, slots=16)
    [[completion]] = engine.generate([Request(prompt=ids, max_tokens=64)])

A request's samples depend on the request alone, never on who shares the batch: every program has one shape whoever is
there, and a drawn token's random number is made from seed, sample and position.
One thread uses an engine; the host decides who is in which slot, and the device goes round a loop until somebody is
needed (decode.py).
"""

import bisect
import codecs
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from etils import epath
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import FrozenConfigDict

from MaxNano.distributed import runtime, sharding
from MaxNano.inference import decode, sampling, weights
from MaxNano.inference.kv_cache import KVCache
from MaxNano.models.setup import abstract_params, architecture, numerics_of, set_up_model
from MaxNano.models.transformer import Numerics
from MaxNano.tokenization.tokenizer import Tokenizer, load_tokenizer
from MaxNano.tools import calculator
from MaxNano.training.checkpointing import Checkpointer

# On a CPU, whose device is about one core: which of XLA's products are the fastest here. See benchmarks/README.md.
_CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": ""}
_FEW_ROWS_OPTIONS = _CPU_OPTIONS | {
    "xla_cpu_multi_thread_eigen": False
}  # runtime.tile_small_products
SMALLEST_BUCKET = 64  # prompts are padded to this many tokens, or to a power of two times as many


# ---- What is asked and answered --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What to generate. Engine.submit raises ValueError for what cannot be served."""

    prompt: tuple[int, ...]
    max_tokens: int  # 0: only the prompt's log-probabilities
    samples: int = 1
    temperature: float = 1.0  # 0: always the likeliest token
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off; tokens less likely than this times the likeliest are not drawn
    repetition_penalty: float = 1.0  # 1: off
    seed: int = 0
    stop_ids: frozenset[int] = (
        frozenset()
    )  # a sample ends when one of them comes, which is not part of it
    stop: tuple[
        str, ...
    ] = ()  # a sample ends when its text holds one of them; the text ends before it
    logprobs: int | None = (
        None  # alternatives reported a token; None: no log-probabilities, 0: the token's own
    )
    prompt_logprobs: bool = False  # report the prompt's tokens too
    tools: bool = False  # a call of the calculator is answered with forced tokens


class TokenLogprobs(NamedTuple):
    """Log-probability of a token under the model, whatever the temperature, and the likeliest (id, log-probability)."""

    logprob: float
    top: tuple[tuple[int, float], ...]


class Event(NamedTuple):
    """What one sample gained in a step."""

    request: int
    sample: int
    tokens: tuple[int, ...]
    forced: tuple[bool, ...]  # of each token: a tool said it, not the model
    text: str  # whole characters, and never a part of what may become a stop string
    logprobs: tuple[TokenLogprobs, ...]  # empty where none were asked for
    finish: str | None  # None while it goes on; then stop, length, cancelled or error
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # of prompt[1:], with the sample's first event


@dataclass
class Completion:
    """All of a sample. A stop string's tokens are in `tokens`, its text is not in `text`."""

    tokens: list[int] = field(default_factory=list)
    forced: list[bool] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: str | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    def add(self, event: Event) -> None:
        """Append what an event brought."""
        self.tokens += event.tokens
        self.forced += event.forced
        self.text += event.text
        self.logprobs += event.logprobs
        self.prompt_logprobs += event.prompt_logprobs
        self.finish = event.finish


# ---- Programs --------------------------------------------------------------------------------------------------------


def load_params(config: FrozenConfigDict, mesh: Mesh) -> tuple[dict[str, Any], Tokenizer]:
    """Parameters and tokenizer of a run: its newest checkpoint, or that of config.step.

    Raises ValueError where there is none, or where it belongs to another model or tokenizer.
    """
    tokenizer = load_tokenizer(config)
    directory = epath.Path(config.base_output_directory).expanduser() / config.run_name
    target = set_up_model(config, mesh=mesh).params
    with Checkpointer(
        config, directory, tokenizer_fingerprint=tokenizer.fingerprint(), writer=False
    ) as checkpointer:
        params, _ = checkpointer.restore_params_only(target, config.step)
    return params, tokenizer


@dataclass(frozen=True)
class Programs:
    """The compiled programs of an engine, for the devices of a mesh: each holds `slots / ways` slots by itself."""

    config: FrozenConfigDict
    mesh: Mesh
    plan: decode.Plan
    params: dict[str, Any]  # abstract
    slots: int
    steps: int
    rows: int  # prompts that a device takes at once

    @classmethod
    def build(
        cls,
        config: FrozenConfigDict,
        mesh: Mesh,
        numerics: Numerics,
        params: dict[str, Any],
        *,
        slots: int,
        max_length: int,
    ) -> Self:
        """Programs for at least `slots` slots, as many on each device that cuts the batch."""
        ways = sharding.batch_ways(mesh, config.logical_axis_rules)
        plan = decode.make_plan(config, numerics, max_length)
        rows = config.prefill_rows or (1 if numerics.backend == "cpu" else 8)
        return cls(
            config, mesh, plan, params, -(-slots // ways) * ways, config.stream_interval, rows
        )

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes over which the slots are spread."""
        return sharding.batch_axes(self.mesh, self.config.logical_axis_rules)

    @property
    def ways(self) -> int:
        """Number of devices, or groups of them, that have slots of their own."""
        return sharding.batch_ways(self.mesh, self.config.logical_axis_rules)

    @cached_property
    def weights(self) -> decode.Weights:
        """The weights as abstract arrays."""
        shapes = jax.eval_shape(partial(decode.prepare, self.plan), self.params)
        placed = decode.weight_shardings(self.plan, self.mesh, shapes)
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, placed
        )

    @cached_property
    def cache(self) -> KVCache:
        """The cache as abstract arrays."""
        return decode.cache_shapes(self.plan, self.mesh, self.slots)

    @cached_property
    def cache_formats(self) -> KVCache:
        """How the cache lies on the devices: on a TPU a position's heads together, as a step's loop wants it."""
        if self.mesh.devices.flat[0].platform != "tpu":
            return jax.tree.map(lambda x: x.sharding, self.cache)
        return jax.tree.map(lambda x: Format(Layout((0, 2, 1, 3)), x.sharding), self.cache)

    @cached_property
    def by_slot(self) -> NamedSharding:
        """How arrays with the slots, or the prompts, in front lie."""
        return NamedSharding(self.mesh, PartitionSpec(self.axes))

    @cached_property
    def everywhere(self) -> NamedSharding:
        """How what the host reads lies, so that each of several hosts has it."""
        return NamedSharding(self.mesh, PartitionSpec())

    @cached_property
    def prepare(self) -> Callable[[dict[str, Any]], decode.Weights]:
        """Parameters -> weights, made and placed once for all that is generated with them."""
        placed = jax.tree.map(lambda x: x.sharding, self.weights)
        return jax.jit(partial(decode.prepare, self.plan), out_shardings=placed)

    def empty_cache(self) -> KVCache:
        """A cache of zeros."""
        shapes = self.cache
        make = jax.jit(
            lambda: jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), shapes),
            out_shardings=self.cache_formats,
        )
        return make()

    def bucket(self, length: int) -> int:
        """Tokens to which a prompt of `length` is padded."""
        size = SMALLEST_BUCKET
        while size < length:
            size *= 2
        return min(size, max(self.plan.max_length, 1))

    @property
    def buckets(self) -> list[int]:
        """All that bucket() can give, shortest first."""
        return sorted({self.bucket(length) for length in range(1, self.plan.max_length)})

    def decode_costs(self, context: int) -> tuple[float, float]:
        """What one step of all slots at a context length asks for: (bytes that a device has to read, FLOPs of all).

        Bytes are the matrices and the cached keys and values, FLOPs those of the model.
        """
        plan, heads = self.plan, self.config.num_query_heads * self.config.head_dim
        matrices = weights.matrices(self.weights)
        seen = sum(min(context, size) for size in plan.sizes)
        keys = (
            2
            * self.config.num_kv_heads
            * self.config.head_dim
            * seen
            * jax.numpy.dtype(plan.dtype).itemsize
        )
        size = sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in matrices
        )
        flops = 2 * sum(leaf.size for leaf in matrices) + 4 * heads * seen
        return size + keys * self.slots / self.mesh.size, flops * self.slots

    @cached_property
    def decode(self) -> Callable:
        """(weights, cache, packed Control, seen, is_eager) -> (cache, Round): some steps; the cache is taken over."""

        def local(weights, cache, packed, seen, is_eager):
            return decode.decode_round(
                self.plan, weights, cache, decode.Control.of(packed), seen, is_eager
            )

        slots = PartitionSpec(self.axes)
        by_step = PartitionSpec(None, self.axes)
        return self._jit(
            local,
            (self._manual(self.weights), self._manual(self.cache), slots, slots, PartitionSpec()),
            (self._manual(self.cache), by_step),
            _FEW_ROWS_OPTIONS if self.slots <= runtime.FEW_ROWS * self.ways else _CPU_OPTIONS,
        )

    def prefill(self, scored: bool) -> Callable:
        """(weights, cache, tokens, lengths, copies, with_top) -> (cache, scores): prompts into slots.

        tokens (ways x rows, L), lengths; copies (ways, slots / ways + 1, 2): pairs of a prompt and a slot of the same
        device, behind them their number, twice. scores: of tokens 1 ... of each prompt if `scored`, else nothing.
        """
        return self._scoring_prefill if scored else self._plain_prefill

    @cached_property
    def _scoring_prefill(self) -> Callable:
        return self._jit_prefill(True)

    @cached_property
    def _plain_prefill(self) -> Callable:
        return self._jit_prefill(False)

    def _jit_prefill(self, scored: bool) -> Callable:
        def local(weights, cache, tokens, lengths, copies, with_top):
            pairs = decode.Copies(copies[0, :-1, 0], copies[0, :-1, 1], copies[0, -1, 0])
            # The last token of a prompt is decoded, so that every token is drawn in one place.
            cache, hidden = decode.prefill(
                self.plan, weights, cache, tokens[:, :-1], lengths - 1, pairs
            )
            scores = (
                decode.score(self.plan, weights, hidden, tokens[:, 1:], with_top) if scored else ()
            )
            return cache, scores

        rows = PartitionSpec(self.axes)
        return self._jit(
            local,
            (
                self._manual(self.weights),
                self._manual(self.cache),
                rows,
                rows,
                rows,
                PartitionSpec(),
            ),
            (self._manual(self.cache), rows),
            _CPU_OPTIONS,
        )

    def _manual(self, tree):
        """How arrays are cut along the axes that every device goes through by itself."""
        return jax.tree.map(lambda x: sharding.manual_spec(x.sharding.spec, self.axes), tree)

    def _jit(
        self, function: Callable, in_specs, out_specs, cpu_options: dict[str, bool | str]
    ) -> Callable:
        """`function` of each device's part, jitted; its second argument and first result are the cache."""
        backend = self.mesh.devices.flat[0].platform
        single = {axis for axis, size in self.mesh.shape.items() if size == 1}
        local = jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names=single.union(self.axes),
            check_vma=False,
        )
        return jax.jit(
            local,
            donate_argnums=1,
            in_shardings=(None, self.cache_formats, *[None] * (len(in_specs) - 2)),
            out_shardings=(self.cache_formats, self.everywhere),
            compiler_options=(cpu_options if backend == "cpu" else {})
            | runtime.compiler_options(self.config, backend),
        )

    def lower_decode(self) -> jax.stages.Lowered:
        """The round of steps, ready to be compiled for the devices."""

        def of(dtype, *shape):
            return jax.ShapeDtypeStruct((self.slots, *shape), dtype, sharding=self.by_slot)

        packed = of(np.int32, decode.CONTROL_COLUMNS + self.steps)
        seen = of(np.bool_, self.weights["head"].shape[1])
        return self.decode.lower(self.weights, self.cache, packed, seen, np.bool_(False))

    def lower_prefill(self, length: int | None = None, scored: bool = False) -> jax.stages.Lowered:
        """The prefill of prompts of `length` tokens (None: the longest), ready to be compiled for the devices."""
        rows, ways = self.rows * self.ways, self.ways
        tokens = (rows, self.bucket(length or self.plan.max_length) + 1)
        shapes = [tokens, (rows,), (ways, self.slots // ways + 1, 2)]
        arrays = [jax.ShapeDtypeStruct(shape, np.int32, sharding=self.by_slot) for shape in shapes]
        return self.prefill(scored).lower(self.weights, self.cache, *arrays, np.bool_(False))


def full_programs(setup) -> Programs:
    """The programs of a set-up's model, to be compiled for devices that need not be there.

    They are made to be costed: every slot is at its longest, prompts are the longest ones.
    """
    config = setup.config
    programs = Programs.build(
        config,
        setup.mesh,
        setup.numerics,
        setup.abstract.params,
        slots=config.decode_slots,
        max_length=config.decode_max_length or config.max_target_length,
    )
    return replace(programs, plan=programs.plan._replace(is_full=True))


def empty_control(slots: int, steps: int) -> tuple[np.ndarray, decode.Control]:
    """The host's side of the slots, nobody in them: the array that goes to the devices, and its columns."""
    packed = np.zeros((slots, decode.CONTROL_COLUMNS + steps), np.int32)
    control = decode.Control.of(packed)
    control.top_p[:] = control.penalty[:] = 1
    control.stop[:] = control.forced[:] = -1
    return packed, control


# ---- Text ------------------------------------------------------------------------------------------------------------


class TextStream:
    """Bytes in, text out: whole characters, held back while they may still become a stop string.

    Attribute is_stopped: a stop string came; the text ended before it.
    """

    def __init__(self, stop: Sequence[str] = ()):
        self.is_stopped = False
        self._stop = [text.encode() for text in stop]
        self._held = b""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, new: bytes) -> str:
        """The text that is certain now; nothing once it is stopped."""
        if self.is_stopped:
            return ""
        self._held += new
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.is_stopped = True
            return self._decoder.decode(self._held[: min(found)], final=True)
        certain = len(self._held) - max((self._beginning(stop) for stop in self._stop), default=0)
        text, self._held = self._decoder.decode(self._held[:certain]), self._held[certain:]
        return text

    def close(self) -> str:
        """The rest of the text; what is no whole character becomes U+FFFD."""
        return "" if self.is_stopped else self._decoder.decode(self._held, final=True)

    def _beginning(self, stop: bytes) -> int:
        """Bytes at the end of what is held with which a stop string could begin."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)


# ---- The engine ------------------------------------------------------------------------------------------------------


class _ToolCalls:
    """Reads a sample's tokens for calls of the calculator. Source: nanochat/engine.py@92d63d4."""

    def __init__(self, tokenizer: Tokenizer):
        self._vocabulary = tokenizer
        self._call: list[int] | None = None  # the tokens since python_start

    def push(self, token: int) -> list[int]:
        """The tokens to force upon the sample behind this one."""
        special = self._vocabulary.special
        if token == special.python_start:
            self._call = []
        elif token == special.python_end:
            call, self._call = self._call, None
            if call:
                result = calculator.calculate(self._vocabulary.decode(call))
                if result is not None:
                    return [
                        special.output_start,
                        *self._vocabulary.encode(result),
                        special.output_end,
                    ]
        elif self._call is not None:
            self._call.append(token)
        return []


class _Sample:
    """One sample in its slot."""

    def __init__(self, job: "_Job", index: int, slot: int, tokenizer: Tokenizer | None):
        request = job.request
        self.job = job
        self.index = index
        self.slot = slot
        self.left = job.room
        self.forced: deque[int] = deque()
        self.text = TextStream(request.stop) if tokenizer else None
        self.calls = _ToolCalls(tokenizer) if request.tools else None
        self.prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # not yet reported


class _Job:
    """A request on its way."""

    def __init__(self, number: int, request: Request, room: int):
        self.number = number
        self.request = request
        self.room = room  # tokens that a sample may have
        self.admitted = 0  # samples that got a slot
        self.prompt_logprobs: tuple[TokenLogprobs, ...] = ()


class Engine:
    """Requests in, events out. Attributes: programs, tokenizer, max_length, slots."""

    def __init__(
        self,
        config: FrozenConfigDict,
        mesh: Mesh,
        params: dict[str, Any],
        tokenizer: Tokenizer | None,
        *,
        slots: int | None = None,
        max_length: int | None = None,
        streams: bool = False,
    ):
        """params: the model's parameter tree, as jax or numpy arrays. Without a tokenizer there are no texts, stop
        strings and tools.

        slots: sequences at a time, rounded up to what the mesh shares equally; max_length: tokens of the longest,
        prompt included. None: as config.decode_slots and config.decode_max_length say.
        streams: somebody watches the answers grow, so steps are about config.stream_milliseconds long. They go by this
        host's clock: ValueError where it is not the only one.
        """
        if streams and jax.process_count() > 1:
            raise ValueError("answers are streamed by one host alone: leave num_processes null")
        numerics = numerics_of(config, mesh)
        self.max_length = max_length or config.decode_max_length or config.max_target_length
        target = abstract_params(config, architecture(config, numerics), mesh)
        self.programs = Programs.build(
            config,
            mesh,
            numerics,
            target,
            slots=slots or config.decode_slots,
            max_length=self.max_length,
        )
        self.tokenizer = tokenizer
        self.slots = self.programs.slots
        self._config = config
        self._target = target
        self._step_seconds = config.stream_milliseconds / 1e3 if streams else math.inf
        self._token_seconds = math.inf  # in the newest round; it takes one to know
        self._numbers = itertools.count()
        self._waiting: deque[_Job] = deque()
        self._events: list[Event] = []  # not yet handed out
        self._forget()
        self.set_params(params)

    @classmethod
    def load(
        cls,
        config: FrozenConfigDict,
        *,
        slots: int | None = None,
        max_length: int | None = None,
        streams: bool = False,
        devices: Sequence[jax.Device] | None = None,
    ) -> Self:
        """The engine for a run's checkpoint; see load_params."""
        mesh = sharding.make_mesh(config, devices)
        params, tokenizer = load_params(config, mesh)
        return cls(
            config, mesh, params, tokenizer, slots=slots, max_length=max_length, streams=streams
        )

    # ---- For its owner ----

    @property
    def waiting(self) -> int:
        """Requests of which a sample has no slot yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Samples in slots."""
        return len(self._running)

    @property
    def free_slots(self) -> int:
        """Slots with nobody in them."""
        return self.slots - len(self._running)

    @property
    def is_idle(self) -> bool:
        """Whether a step would do nothing."""
        return not (self._waiting or self._running or self._events)

    def set_params(self, params: dict[str, Any]) -> None:
        """Serve other parameters from now on. Raises ValueError where a sample is under way, which would mix both."""
        if self._running:
            raise ValueError("parameters cannot change while samples are under way")
        placed = jax.tree.map(
            lambda x, like: x if isinstance(x, jax.Array) else jax.device_put(x, like.sharding),
            params,
            self._target,
        )
        self._weights = self.programs.prepare(placed)
        if self.programs.mesh.devices.flat[0].platform == "cpu" and jax.process_count() == 1:
            # Virtual devices of one process can all read the same arrays, and need no copy each.
            self._weights = jax.tree.map(
                lambda x: jax.device_put(np.asarray(x), x.sharding), self._weights
            )

    def submit(self, request: Request) -> int:
        """Queue a request; returns its number, which its events carry. Raises ValueError where it cannot be served."""
        self._check(request)
        number = next(self._numbers)
        room = min(request.max_tokens, self.max_length - len(request.prompt))
        self._waiting.append(_Job(number, request, room))
        return number

    def cancel(self, number: int) -> None:
        """End a request's samples, waiting and running; their slots are free at once. Unknown numbers are ignored."""
        for job in [job for job in self._waiting if job.number == number]:
            self._waiting.remove(job)
            ended = range(job.admitted, job.request.samples)
            self._events += [Event(number, i, (), (), "", (), "cancelled") for i in ended]
        for sample in [sample for sample in self._running.values() if sample.job.number == number]:
            self._release(sample)
            self._events.append(Event(number, sample.index, (), (), "", (), "cancelled"))

    def step(self) -> list[Event]:
        """Admit who waits, as far as slots are free, and let all samples gain some tokens, stream_interval at most."""
        while self._waiting and self._admit():
            pass
        if self._running:
            self._decode()
        events, self._events = self._events, []
        return events

    def generate(
        self, requests: Iterable[Request], on_step: Callable[[], Any] = lambda: None
    ) -> list[list[Completion]]:
        """The samples of each request, all run to their ends. Nothing else may be under way.

        on_step is called after every step; what it raises leaves the engine as after a step that raised.
        """
        requests = list(requests)
        for request in requests:
            self._check(request)
        numbers = {self.submit(request): request for request in requests}
        found = {
            number: [Completion() for _ in range(request.samples)]
            for number, request in numbers.items()
        }
        while not self.is_idle:
            for event in self.step():
                found[event.request][event.sample].add(event)
            on_step()
        return list(found.values())

    def reset(self) -> None:
        """After a step that raised: every request ends with an error, with the next step, and the engine is new."""
        ended = [(sample.job.number, sample.index) for sample in self._running.values()]
        ended += [
            (job.number, i)
            for job in self._waiting
            for i in range(job.admitted, job.request.samples)
        ]
        self._events += [Event(number, i, (), (), "", (), "error") for number, i in ended]
        self._waiting.clear()
        self._forget()

    def compile(self) -> None:
        """Compile every program now, so that no request waits for one: decode, and prefill for each length."""
        self._run_decode(is_eager=False)
        for length in self.programs.buckets:
            self._run_prefill(length, [], False)
            self._run_prefill(length, [], True)

    # ---- Inside ----

    def _forget(self) -> None:
        self._cache = self.programs.empty_cache()
        self._packed, self._control = empty_control(self.slots, self.programs.steps)
        self._running: dict[int, _Sample] = {}  # by slot
        own = self.slots // self.programs.ways
        self._free = [list(range(way * own, (way + 1) * own)) for way in range(self.programs.ways)]
        tokenizer = self.programs.weights["head"].shape[1]
        self._seen = np.zeros((self.slots, tokenizer), np.bool_)
        self._none_seen = jax.device_put(self._seen, self.programs.by_slot)

    def _check(self, request: Request) -> None:
        def refuse(problem: str):
            raise ValueError(problem)

        size = self._config.vocab_size
        if not request.prompt:
            refuse("the prompt is empty: it needs at least one token, such as <|bos|>")
        if not all(0 <= token < size for token in (*request.prompt, *request.stop_ids)):
            refuse(f"a token id of the prompt or of stop_ids is not in 0 ... {size - 1}")
        if request.max_tokens < 0 or request.max_tokens == 0 and not request.prompt_logprobs:
            refuse("max_tokens must be at least 1, or 0 with prompt_logprobs")
        if len(request.prompt) + (request.max_tokens > 0) > self.max_length:
            refuse(
                f"the prompt has {len(request.prompt)} tokens and there is room for {self.max_length} with the answer"
            )
        if request.samples < 1:
            refuse("samples must be at least 1")
        if not 0 <= request.temperature <= 100:
            refuse(f"temperature={request.temperature} must be between 0 and 100")
        if request.top_k < 0:
            refuse(f"top_k={request.top_k} must be at least 0")
        if not 0 < request.top_p <= 1:
            refuse(f"top_p={request.top_p} must be above 0 and at most 1")
        if not 0 <= request.min_p <= 1:
            refuse(f"min_p={request.min_p} must be between 0 and 1")
        if not 0.01 <= request.repetition_penalty <= 100:
            refuse(f"repetition_penalty={request.repetition_penalty} must be between 0.01 and 100")
        if not 0 <= (request.logprobs or 0) <= sampling.LARGEST_LOGPROBS:
            refuse(f"logprobs={request.logprobs} must be between 0 and {sampling.LARGEST_LOGPROBS}")
        if len(request.stop_ids) + request.tools > decode.STOP_IDS:
            refuse(f"there may be at most {decode.STOP_IDS - 1} stop_ids")
        if not all(request.stop):
            refuse("a stop string is empty")
        if (request.stop or request.tools) and self.tokenizer is None:
            refuse("stop strings and tools need a tokenizer")

    # Admission: a call of the prefill program takes prompts of one bucket, `rows` on each device.

    def _admit(self) -> bool:
        """Give slots to the first of the queue, and to others whose prompts fit into the same call; False: to none."""
        programs, head = self.programs, self._waiting[0].request
        length, is_scored = programs.bucket(len(head.prompt) - 1), head.prompt_logprobs
        rows: list[list[_Job]] = [[] for _ in range(programs.ways)]
        copies: list[
            tuple[_Sample, int, int]
        ] = []  # a sample, its device and its prompt's row there
        for job in list(self._waiting):
            request = job.request
            own = programs.bucket(len(request.prompt) - 1), request.prompt_logprobs
            if own == (length, is_scored) and not self._seat(job, rows, copies):
                break
        taken = list({job.number: job for jobs in rows for job in jobs}.values())
        if any(len(job.request.prompt) > 1 for job in taken):
            scores = self._run_prefill(
                length, rows, is_scored, [(sample.slot, *where) for sample, *where in copies]
            )
            if is_scored:
                for way, jobs in enumerate(rows):
                    for row, job in enumerate(jobs, way * programs.rows):
                        count = len(job.request.prompt) - 1
                        own = jax.tree.map(lambda x, row=row, count=count: x[row, :count], scores)
                        job.prompt_logprobs = _read(own, job.request.logprobs or 0)
        for sample, _, _ in copies:
            sample.prompt_logprobs = sample.job.prompt_logprobs
        for job in taken:
            if job.room == 0:  # the prompt was all
                job.admitted = job.request.samples
                ended = range(job.request.samples)
                self._events += [
                    Event(job.number, i, (), (), "", (), "length", job.prompt_logprobs)
                    for i in ended
                ]
            if job.admitted == job.request.samples:
                self._waiting.remove(job)
        return bool(taken)

    def _seat(
        self, job: _Job, rows: list[list[_Job]], copies: list[tuple[_Sample, int, int]]
    ) -> bool:
        """Find rows and slots for a request, as far as there are any; whether all its samples have got one."""
        samples = job.request.samples
        while job.admitted < samples:
            ways = [way for way, jobs in enumerate(rows) if len(jobs) < self.programs.rows]
            way = max(ways, key=lambda way: len(self._free[way]), default=None)
            if way is None or (job.room and not self._free[way]):
                return False
            rows[way].append(job)
            if job.room == 0:
                return True
            for _ in range(min(samples - job.admitted, len(self._free[way]))):
                copies.append((self._place(job, self._free[way].pop(0)), way, len(rows[way]) - 1))
                job.admitted += 1
        return True

    def _place(self, job: _Job, slot: int) -> _Sample:
        """Put the next sample of a request into a slot."""
        request, control = job.request, self._control
        sample = _Sample(job, job.admitted, slot, self.tokenizer)
        self._running[slot] = sample
        prompt = request.prompt
        control.token[slot] = prompt[-1]
        control.previous[slot] = prompt[-2] if len(prompt) > 1 else 0
        control.position[slot] = len(prompt) - 1
        control.sample[slot] = sample.index
        seed = request.seed % 2**64
        control.seed[slot] = seed >> 32, seed & 0xFFFFFFFF
        control.temperature[slot] = request.temperature
        control.top_k[slot] = min(request.top_k, self._config.vocab_size)
        control.top_p[slot] = request.top_p
        control.min_p[slot] = request.min_p
        control.penalty[slot] = request.repetition_penalty
        control.logprobs[slot] = 0 if request.logprobs is None else 1 + (request.logprobs > 0)
        stops = set(request.stop_ids)
        if request.tools:
            stops.add(self.tokenizer.special.python_end)
        control.stop[slot] = -1
        control.stop[slot, : len(stops)] = sorted(stops)
        if request.repetition_penalty != 1:
            self._seen[slot] = False
            self._seen[slot, list(prompt)] = True
        return sample

    def _release(self, sample: _Sample) -> None:
        slot, control = sample.slot, self._control
        del self._running[slot]
        # Lowest first: what an idle engine is asked lies where it would in a new one, and is the same to the last bit.
        bisect.insort(self._free[slot // (self.slots // self.programs.ways)], slot)
        # Off, so that nobody pays for it.
        control.left[slot] = control.position[slot] = control.logprobs[slot] = control.top_k[
            slot
        ] = 0
        control.temperature[slot] = 0
        control.top_p[slot] = control.penalty[slot] = 1
        control.forced[slot] = -1

    def _run_prefill(
        self, length: int, rows: list[list[_Job]], is_scored: bool, copies: Sequence = ()
    ):
        """Prompts (by device) into slots; copies are (slot, device, row)."""
        programs = self.programs
        own = self.slots // programs.ways
        tokens = np.zeros((programs.ways * programs.rows, length + 1), np.int32)
        lengths = np.ones(len(tokens), np.int32)
        for way, jobs in enumerate(rows):
            for row, job in enumerate(jobs, way * programs.rows):
                prompt = job.request.prompt
                tokens[row, : len(prompt)] = prompt
                lengths[row] = len(prompt)
        pairs = np.zeros((programs.ways, own + 1, 2), np.int32)
        for slot, way, row in copies:
            count = pairs[way, -1, 0]
            pairs[way, count] = row, slot - way * own
            pairs[way, -1] += 1
        with_top = np.bool_(any((job.request.logprobs or 0) > 0 for jobs in rows for job in jobs))
        run = programs.prefill(is_scored)
        arrays = (jax.device_put(x, programs.by_slot) for x in (tokens, lengths, pairs))
        self._cache, scores = run(self._weights, self._cache, *arrays, with_top)
        return jax.device_get(scores)

    # Decoding: the host says who is where, the device goes on until somebody is needed.

    def _run_decode(self, is_eager: bool) -> tuple[np.ndarray, decode.TokenScores | None]:
        programs = self.programs
        penalized = bool((self._control.penalty != 1).any())
        seen = jax.device_put(self._seen, programs.by_slot) if penalized else self._none_seen
        # The call itself puts a small array on the devices several times as fast as device_put does.
        self._cache, out = programs.decode(
            self._weights, self._cache, self._packed, seen, np.bool_(is_eager)
        )
        wanted = self._control.logprobs.any()
        return np.asarray(out.tokens), jax.device_get(out.scores) if wanted else None

    def _decode(self) -> None:
        control, steps = self._control, self.programs.steps
        if self._step_seconds < math.inf:
            steps = min(steps, max(1, int(self._step_seconds / self._token_seconds)))
        for slot, sample in self._running.items():
            control.left[slot] = min(sample.left, steps)
            control.forced[slot] = -1
            queued = list(itertools.islice(sample.forced, steps))
            control.forced[slot, : len(queued)] = queued
        is_eager = bool(self._waiting) or any(sample.calls for sample in self._running.values())
        start = time.perf_counter()
        tokens, scores = self._run_decode(is_eager)
        self._token_seconds = (time.perf_counter() - start) / np.sum(np.any(tokens >= 0, axis=1))
        for slot, sample in list(self._running.items()):
            own = tokens[:, slot]
            own = own[own >= 0]
            if len(own):
                self._take(sample, own.tolist(), scores)

    def _take(self, sample: _Sample, tokens: list[int], scores: decode.TokenScores | None) -> None:
        """What a sample gained in a round."""
        request, slot, control = sample.job.request, sample.slot, self._control
        finish, text = None, ""
        kept: list[int] = []
        forced: list[bool] = []
        for token in tokens:
            is_forced = bool(sample.forced)
            if is_forced:
                sample.forced.popleft()
            elif token in request.stop_ids:
                finish = "stop"
                break
            kept.append(token)
            forced.append(is_forced)
            if sample.calls:
                sample.forced.extend(sample.calls.push(token))
            if request.stop:
                text += sample.text.push(self.tokenizer.decode_bytes([token]))
                if sample.text.is_stopped:
                    finish = "stop"
                    break
        sample.left -= len(kept)
        if finish is None and sample.left == 0:
            finish = "length"
        if sample.text and not request.stop:
            text = sample.text.push(self.tokenizer.decode_bytes(kept))
        if sample.text and finish:
            text += sample.text.close()
        logprobs: tuple[TokenLogprobs, ...] = ()
        if request.logprobs is not None:
            own = jax.tree.map(lambda x: x[: len(kept), slot], scores)
            logprobs = _read(own, request.logprobs)
        prompt_logprobs, sample.prompt_logprobs = sample.prompt_logprobs, ()
        self._events.append(
            Event(
                sample.job.number,
                sample.index,
                tuple(kept),
                tuple(forced),
                text,
                logprobs,
                finish,
                prompt_logprobs,
            )
        )
        if finish:
            self._release(sample)
            return
        control.previous[slot] = kept[-2] if len(kept) > 1 else control.token[slot]
        control.token[slot] = kept[-1]
        control.position[slot] += len(kept)
        if request.repetition_penalty != 1:
            self._seen[slot, kept] = True


def _read(scores: decode.TokenScores, top: int) -> tuple[TokenLogprobs, ...]:
    """Scores of some tokens as what is reported, with `top` alternatives each."""
    logprobs, values, ids = (x.tolist() for x in scores)
    return tuple(
        TokenLogprobs(own, tuple(zip(tokens[:top], probable[:top], strict=True)))
        for own, probable, tokens in zip(logprobs, values, ids, strict=True)
    )

"""Continuous batching: an engine that admits requests while other samples are running.

    engine = load_engine(config, slots=16)
    [[completion]] = engine.generate([Request(prompt=ids, max_tokens=64)])

The samples of a request do not depend on the other requests in the batch: every program has a fixed
shape, and a token's random number follows from seed, sample and position. The host assigns samples
to slots; the device then runs decode steps in a loop until a sample ends or `stream_interval` steps
are done (the host sync). Not thread-safe.
"""

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from MaxNano.inference import decode
from MaxNano.inference.prefix_cache import PrefixCache
from MaxNano.inference.programs import EnginePrograms, ModelRunner
from MaxNano.inference.requests import Completion, Event, Request, TokenLogprobs
from MaxNano.inference.slots import PrefillBatch, QueuedRequest, RunningSample, SlotTable
from MaxNano.models.setup import ModelSetup
from MaxNano.tokenization.tokenizer import Tokenizer


class Engine:
    """Runs requests on a model, `slots` samples at a time, of `max_length` tokens at most."""

    def __init__(
        self,
        setup: ModelSetup,
        params: dict[str, Any],
        tokenizer: Tokenizer | None,
        *,
        slots: int | None = None,
        max_length: int | None = None,
        streams: bool = False,
        prefix_entries: int = 0,
    ):
        """Prepare the parameters and an empty KV cache. Programs compile when first used.

        params: the parameter tree of `setup`, as jax or numpy arrays.
        tokenizer: None for token ids only, without texts, stop strings and tools.
        slots: rounded up to a multiple of the data-parallel size; default config.decode_slots.
        max_length: tokens of a sequence, prompt included; default config.decode_max_length.
        streams: sync with the host about every config.stream_milliseconds, for clients that read a
        reply as it grows. ValueError with several hosts, since each has its own clock.
        prefix_entries: of the prefix cache, rounded up like slots; 0: none. With them, answers
        are the same up to the rounding of sums.
        """
        if streams and jax.process_count() > 1:
            raise ValueError("streaming needs a single host: leave num_processes null")
        config = setup.config
        self.max_length = max_length or config.decode_max_length or config.max_target_length
        self.programs = EnginePrograms.build(
            setup,
            slots=slots or config.decode_slots,
            max_length=self.max_length,
            prefix_entries=prefix_entries,
        )
        self.slots = self.programs.slots
        self.tokenizer = tokenizer
        self.trained_steps: int | None = None  # of the checkpoint, if the parameters are of one
        self._limits = config.vocab_size, self.max_length, tokenizer is not None
        self._runner = ModelRunner(self.programs)
        self._table = SlotTable(self.programs)
        self.prefix_cache = PrefixCache(self._runner)
        self._waiting: deque[QueuedRequest] = deque()
        self._events: list[Event] = []  # for the next step() to return
        self._numbers = itertools.count()
        self._sync_seconds = config.stream_milliseconds / 1e3 if streams else math.inf
        self._step_seconds = math.inf  # of a decode step in the last round
        self.set_params(params)

    @property
    def waiting(self) -> int:
        """Number of requests with samples that wait for a slot."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of samples in slots."""
        return len(self._table.running)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do and no event to return."""
        return not (self._waiting or self.running or self._events)

    def set_params(self, params: dict[str, Any]) -> None:
        """Replace the parameters. Raises ValueError while samples are running."""
        if self.running:
            raise ValueError("parameters cannot change while samples are running")
        self._runner.set_params(params)
        self.prefix_cache.index.clear()

    def submit(self, request: Request) -> int:
        """Queue a request and return its number for its events. Raises ValueError if invalid."""
        request.check(*self._limits)
        number = next(self._numbers)
        max_tokens = min(request.max_tokens, self.max_length - len(request.prompt))
        self._waiting.append(QueuedRequest(number, request, max_tokens))
        return number

    def cancel(self, number: int) -> None:
        """End a request's samples and free their slots. Ignores unknown numbers."""
        self._end(lambda queued: queued.number == number, "cancelled")

    def reset(self) -> None:
        """Recover from a step that raised: every request ends with finish="error"."""
        self._end(lambda queued: True, "error")
        self._runner.clear()
        self.prefix_cache.index.clear()
        self._table = SlotTable(self.programs)

    def _end(self, is_ended: Callable[[QueuedRequest], bool], finish: str) -> None:
        ended = []
        for sample in list(self._table.running.values()):
            if is_ended(sample.queued):
                if finish == "cancelled":
                    self.prefix_cache.save(sample, (), self._table)
                self._table.release(sample)
                ended.append((sample.queued.number, sample.index))
        for queued in list(self._waiting):
            if is_ended(queued):
                self._waiting.remove(queued)
                ended += [(queued.number, index) for index in queued.waiting_samples]
        self._events += [Event(*sample, (), (), (), (), finish) for sample in ended]

    def step(self) -> list[Event]:
        """Admit waiting requests into free slots, then run up to `stream_interval` decode steps."""
        free = sum(map(len, self._table.free))
        for queued in list(itertools.islice(self._waiting, free)):
            if self.prefix_cache.admit(queued, self._table, self.tokenizer):
                self._waiting.remove(queued)
        while self._waiting and self._admit():
            pass
        if self.running:
            self._decode()
        events, self._events = self._events, []
        return events

    def generate(
        self, requests: Iterable[Request], on_step: Callable[[], Any] = lambda: None
    ) -> list[list[Completion]]:
        """Run requests to completion and return the samples of each. The engine must be idle.

        on_step is called after every step; if it raises, call reset() before the next request.
        """
        requests = list(requests)
        for request in requests:
            request.check(*self._limits)
        completions = {
            self.submit(request): [Completion() for _ in range(request.samples)]
            for request in requests
        }
        while not self.is_idle:
            for event in self.step():
                completions[event.request][event.sample].add(event)
            on_step()
        return list(completions.values())

    def compile(self) -> None:
        """Compile every program now, so that no request waits for the compiler."""
        for _ in self.compile_programs():
            pass

    def compile_programs(self, with_scores: bool = True) -> Iterator[str]:
        """Compile a program per step, in the order of need; yields its name. After the first two,
        every short prompt has its programs. Take a step only while no sample is running.

        with_scores: also those that score prompts.
        """
        self._runner.decode(self._table.packed, None, is_eager=False, with_scores=False)
        yield "decode"
        for is_scored in (False, True) if with_scores else (False,):
            for length in self.programs.buckets:
                inputs = PrefillBatch(self.programs, length).arrays()
                self._runner.prefill(inputs, is_scored, with_top=False)
                yield f"prefill {length}" + ", scored" * is_scored
            if not is_scored:
                self.prefix_cache.compile()
                yield "prefix cache"

    def _admit(self) -> bool:
        """Prefill waiting requests in one call with the first; False if no slot is free."""

        def kind(request: Request) -> tuple[int, bool]:
            return self.programs.bucket(len(request.prompt) - 1), request.prompt_logprobs

        length, is_scored = kind(self._waiting[0].request)
        batch = PrefillBatch(self.programs, length)
        for queued in self._waiting:
            if kind(queued.request) == (length, is_scored) and not batch.add(
                queued, self._table, self.tokenizer
            ):
                break
        admitted = batch.requests
        if any(len(queued.request.prompt) > 1 for queued in admitted):
            with_top = any((queued.request.logprobs or 0) > 0 for queued in admitted)
            scores = self._runner.prefill(batch.arrays(), is_scored, with_top)
            for queued in admitted if is_scored else ():
                part = batch.row_of(queued), slice(len(queued.request.prompt) - 1)
                queued.prompt_logprobs = _logprobs(scores, part, queued.request.logprobs or 0)
        for placement in batch.placements:
            placement.sample.prompt_logprobs = placement.sample.queued.prompt_logprobs
            self.prefix_cache.save_prompt(placement.sample, self._table)
        for queued in admitted:
            if queued.max_tokens == 0:
                for index in queued.waiting_samples:
                    ended = Event(queued.number, index, (), (), (), (), "length")
                    self._events.append(ended._replace(prompt_logprobs=queued.prompt_logprobs))
                queued.admitted = queued.request.samples
            if not queued.waiting_samples:
                self._waiting.remove(queued)
        return bool(admitted)

    def _decode(self) -> None:
        """Run a round of decode steps for all running samples."""
        table, steps = self._table, self.programs.steps
        if self._sync_seconds < math.inf:
            steps = min(steps, max(1, int(self._sync_seconds / self._step_seconds)))
        adjustments = table.begin_round(steps)
        is_eager = bool(self._waiting) or any(sample.calls for sample in table.running.values())
        start = time.perf_counter()
        tokens, scores = self._runner.decode(
            table.packed,
            table.seen if (table.control.penalty != 1).any() else None,
            is_eager,
            bool(table.control.logprobs.any()),
            adjustments,
        )
        self._step_seconds = (time.perf_counter() - start) / np.sum(np.any(tokens >= 0, axis=1))
        for slot, sample in list(table.running.items()):
            new = tokens[:, slot]
            new = new[new >= 0].tolist()
            if new:
                self._take(sample, new, scores)

    def _take(
        self, sample: RunningSample, tokens: list[int], scores: decode.TokenScores | None
    ) -> None:
        """Record a sample's new tokens as an event; free its slot if it ended."""
        new, request = sample.take(tokens), sample.request
        logprobs: tuple[TokenLogprobs, ...] = ()
        if request.logprobs is not None:
            part = slice(len(new.tokens)), sample.slot
            logprobs = _logprobs(scores, part, request.logprobs)
        prompt_logprobs, sample.prompt_logprobs = sample.prompt_logprobs, ()
        event = Event(
            sample.queued.number,
            sample.index,
            tuple(new.tokens),
            tuple(new.forced),
            tuple(new.parts),
            logprobs,
            new.finish,
            prompt_logprobs,
        )
        self._events.append(event)
        if new.finish:
            self.prefix_cache.save(sample, tokens, self._table)
            self._table.release(sample)
        else:
            self._table.advance(sample, new)


def _logprobs(scores: decode.TokenScores, part: tuple, top: int) -> tuple[TokenLogprobs, ...]:
    """The scores at an index, with `top` alternatives per token."""
    logprobs, top_logprobs, top_ids = (x[part].tolist() for x in scores)
    return tuple(
        TokenLogprobs(logprob, tuple(zip(ids[:top], values[:top], strict=True)))
        for logprob, values, ids in zip(logprobs, top_logprobs, top_ids, strict=True)
    )

"""The host's side of continuous batching: samples in slots, and batches of prompts to prefill."""

import bisect
import itertools
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from MaxNano.inference import decode, sampling
from MaxNano.inference.dialogue import ReplyDecoder, ReplyPart, merge_parts
from MaxNano.inference.programs import EnginePrograms
from MaxNano.inference.requests import Request, TokenLogprobs
from MaxNano.tokenization.tokenizer import Tokenizer
from MaxNano.tools import calculator


class QueuedRequest:
    """A request that still has samples without a slot."""

    def __init__(self, number: int, request: Request, max_tokens: int):
        self.number = number
        self.request = request
        self.max_tokens = max_tokens  # per sample, limited by the context
        self.admitted = 0  # samples that have a slot
        self.prompt_logprobs: tuple[TokenLogprobs, ...] = ()

    @property
    def waiting_samples(self) -> range:
        """Indices of the samples without a slot."""
        return range(self.admitted, self.request.samples)


class ToolCalls:
    """Finds calls of the calculator in a sample's tokens. Source: nanochat/engine.py@92d63d4."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._call: list[int] | None = None  # the tokens since python_start

    def push(self, token: int) -> list[int]:
        """The tokens to force after this one: the result, if the token completes a valid call."""
        special = self._tokenizer.special
        if token == special.python_start:
            self._call = []
        elif token == special.python_end:
            call, self._call = self._call, None
            result = calculator.calculate(self._tokenizer.decode(call)) if call else None
            if result is not None:
                return [special.output_start, *self._tokenizer.encode(result), special.output_end]
        elif self._call is not None:
            self._call.append(token)
        return []


class NewTokens(NamedTuple):
    """New tokens and text of a sample after a round of decode steps."""

    tokens: list[int]
    forced: list[bool]  # per token: from a tool, not from the model
    parts: list[ReplyPart]
    finish: str | None


class RunningSample:
    """A sample in a slot: tokens left, tokens to force, tool calls, grammar and text."""

    def __init__(self, queued: QueuedRequest, slot: int, tokenizer: Tokenizer | None):
        request = queued.request
        self.queued = queued
        self.request = request
        self.index = queued.admitted
        self.slot = slot
        self.tokens_left = queued.max_tokens
        self.to_force: deque[int] = deque()
        self.calls = ToolCalls(tokenizer) if request.tools else None
        self.prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # until the first event
        self._decoder = ReplyDecoder(tokenizer, request.stop) if tokenizer else None
        self.grammar = request.grammar.start() if request.grammar else None
        self.tokens: list[int] = []  # of earlier rounds
        self.sampled = 0  # tokens that were not forced, counted if penalties need them
        self.stop_ids = request.stop_ids | ({request.grammar.end} if request.grammar else set())

    def take(self, tokens: Sequence[int]) -> NewTokens:
        """Add the tokens of a round, up to a stop token or the end of a stop string."""
        request, finish = self.request, None
        kept: list[int] = []
        forced: list[bool] = []
        parts: list[ReplyPart] = []
        for token in tokens:
            is_forced = bool(self.to_force)
            if is_forced:
                self.to_force.popleft()
            elif token in self.stop_ids:
                finish = "stop"
                break
            kept.append(token)
            forced.append(is_forced)
            if self.grammar:
                self.grammar.take(token)
                finish = self.grammar.finish
            if self.calls:
                self.to_force.extend(self.calls.push(token))
            if request.stop:
                parts += self._decoder.feed([token])
                if self._decoder.is_stopped:
                    finish = "stop"
            if finish:
                break
        self.tokens_left -= len(kept)
        if finish is None and self.tokens_left == 0:
            finish = "length"
        if self._decoder:
            if not request.stop:
                parts = self._decoder.feed(kept)
            if finish:
                parts += self._decoder.finish()
        return NewTokens(kept, forced, merge_parts(parts), finish)


class SlotTable:
    """The running samples and, as arrays for the device, each slot's state and sampling settings.

    `control` has views of the columns of `packed` (slots, columns) int32; `seen` (slots, padded
    vocabulary) bool marks the tokens that a repetition penalty applies to; `adjustments` is None
    until a sample needs them.
    """

    def __init__(self, programs: EnginePrograms):
        self.per_shard = programs.slots_per_shard
        self._vocab_size = programs.setup.config.vocab_size
        self.running: dict[int, RunningSample] = {}  # by slot
        self.packed = np.zeros((programs.slots, decode.CONTROL_COLUMNS + programs.steps), np.int32)
        self.control = control = decode.Control.of(self.packed)
        control.top_p[:] = control.penalty[:] = 1
        control.stop[:] = control.forced[:] = -1
        self.seen = np.zeros((programs.slots, programs.weights["head"].shape[1]), np.bool_)
        self.adjustments: decode.Adjustments | None = None
        self._max_length = programs.plan.max_length
        starts = range(0, programs.slots, self.per_shard)
        self.free = [list(range(start, start + self.per_shard)) for start in starts]  # by shard

    def place(
        self, queued: QueuedRequest, shard: int, tokenizer: Tokenizer | None
    ) -> RunningSample:
        """Start the next sample of a request in a free slot of a shard."""
        request, control = queued.request, self.control
        prompt, seed = request.prompt, request.seed % 2**64
        # The lowest slot, so that an idle engine computes the same bits as a new one.
        slot = self.free[shard].pop(0)
        sample = self.running[slot] = RunningSample(queued, slot, tokenizer)
        queued.admitted += 1
        control.token[slot] = prompt[-1]
        control.previous[slot] = prompt[-2] if len(prompt) > 1 else 0
        control.position[slot] = len(prompt) - 1
        control.sample[slot] = sample.index
        control.seed[slot] = seed >> 32, seed & 0xFFFFFFFF
        control.temperature[slot] = request.temperature
        control.top_k[slot] = min(request.top_k, self._vocab_size)
        control.top_p[slot] = request.top_p
        control.min_p[slot] = request.min_p
        control.penalty[slot] = request.repetition_penalty
        control.logprobs[slot] = 0 if request.logprobs is None else 1 + (request.logprobs > 0)
        stops = set(sample.stop_ids)
        if request.tools:
            stops.add(tokenizer.special.python_end)
        control.stop[slot] = -1
        control.stop[slot, : len(stops)] = sorted(stops)
        if request.repetition_penalty != 1:
            self.seen[slot] = False
            self.seen[slot, list(prompt)] = True
        if request.is_adjusted:
            self._adjust(slot, request)
        return sample

    def _adjust(self, slot: int, request: Request) -> None:
        """Set the adjustments of a slot for a request."""
        if self.adjustments is None:
            slots, words = len(self.packed), -(-self.seen.shape[1] // sampling.MASK_BITS)
            self.adjustments = decode.Adjustments(
                frequency=np.zeros(slots, np.float32),
                presence=np.zeros(slots, np.float32),
                sampled=np.full((slots, self._max_length), -1, np.int32),
                biased=np.full((slots, decode.BIASED), -1, np.int32),
                bias=np.zeros((slots, decode.BIASED), np.float32),
                allowed=np.full((slots, words), -1, np.int32),
            )
        adjustments, count = self.adjustments, len(request.logit_bias)
        adjustments.frequency[slot] = request.frequency_penalty
        adjustments.presence[slot] = request.presence_penalty
        adjustments.biased[slot, :count] = [token for token, _ in request.logit_bias]
        adjustments.bias[slot, :count] = [bias for _, bias in request.logit_bias]

    def begin_round(self, steps: int) -> decode.Adjustments | None:
        """Set how many tokens each sample may gain in the next round, and which are forced.

        Returns the adjustments that the round needs, None for none.
        """
        grammars = {slot: sample.grammar for slot, sample in self.running.items() if sample.grammar}
        if grammars:  # the host computes the mask of each token
            steps = 1
        for slot, grammar in grammars.items():
            self.adjustments.allowed[slot] = 0
            self.adjustments.allowed[slot, : len(grammar.allowed)] = grammar.allowed
        for slot, sample in self.running.items():
            self.control.left[slot] = min(sample.tokens_left, steps)
            self.control.forced[slot] = -1
            to_force = list(itertools.islice(sample.to_force, steps))
            self.control.forced[slot, : len(to_force)] = to_force
        is_adjusted = any(sample.request.is_adjusted for sample in self.running.values())
        return self.adjustments if is_adjusted else None

    def advance(self, sample: RunningSample, new: NewTokens) -> None:
        """Continue after new tokens, at least one."""
        slot, control, tokens = sample.slot, self.control, new.tokens
        control.previous[slot] = tokens[-2] if len(tokens) > 1 else control.token[slot]
        control.token[slot] = tokens[-1]
        control.position[slot] += len(tokens)
        sample.tokens += tokens
        if sample.request.repetition_penalty != 1:
            self.seen[slot, tokens] = True
        if sample.request.is_adjusted:
            sampled = [t for t, forced in zip(tokens, new.forced, strict=True) if not forced]
            end = sample.sampled + len(sampled)
            self.adjustments.sampled[slot, sample.sampled : end] = sampled
            sample.sampled = end

    def release(self, sample: RunningSample) -> None:
        """Free a sample's slot."""
        slot, control = sample.slot, self.control
        del self.running[slot]
        bisect.insort(self.free[slot // self.per_shard], slot)
        # Neutral settings: the device skips what no slot asks for.
        for column in (control.left, control.position, control.logprobs, control.top_k):
            column[slot] = 0
        control.temperature[slot] = 0
        control.top_p[slot] = control.penalty[slot] = 1
        control.forced[slot] = -1
        if sample.request.is_adjusted:
            adjustments = self.adjustments
            for column in (adjustments.frequency, adjustments.presence, adjustments.bias):
                column[slot] = 0
            for column in (adjustments.sampled, adjustments.biased, adjustments.allowed):
                column[slot] = -1


class PromptPlacement(NamedTuple):
    """A sample and the row of its prompt in its shard's part of a prefill call."""

    sample: RunningSample
    shard: int
    row: int


class PrefillBatch:
    """Prompts of one padded length for one prefill call. A prompt may fill several slots."""

    def __init__(self, programs: EnginePrograms, length: int):
        self.rows: list[list[QueuedRequest]] = [
            [] for _ in range(programs.setup.data_parallel_size)
        ]
        self.placements: list[PromptPlacement] = []
        self._programs = programs
        self._length = length

    def add(self, queued: QueuedRequest, slots: SlotTable, tokenizer: Tokenizer | None) -> bool:
        """Admit samples while rows and slots are free; True if the whole request is admitted."""
        while queued.waiting_samples:
            shards = [
                shard
                for shard, row in enumerate(self.rows)
                if len(row) < self._programs.prefill_rows
            ]
            shard = max(shards, key=lambda shard: len(slots.free[shard]), default=None)
            if shard is None or (queued.max_tokens and not slots.free[shard]):
                return False
            self.rows[shard].append(queued)
            if queued.max_tokens == 0:  # only the prompt is scored
                return True
            row = len(self.rows[shard]) - 1
            for _ in range(min(len(queued.waiting_samples), len(slots.free[shard]))):
                sample = slots.place(queued, shard, tokenizer)
                self.placements.append(PromptPlacement(sample, shard, row))
        return True

    @property
    def requests(self) -> list[QueuedRequest]:
        """The requests in the batch, each once."""
        return list({queued.number: queued for row in self.rows for queued in row}.values())

    def row_of(self, queued: QueuedRequest) -> int:
        """A row of the request's prompt in the arrays."""
        return next(row for row, other in self._numbered_rows() if other is queued)

    def _numbered_rows(self):
        for shard, queue in enumerate(self.rows):
            yield from enumerate(queue, shard * self._programs.prefill_rows)

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """tokens, lengths and copies, as EnginePrograms.prefill takes them."""
        programs, per_shard = self._programs, self._programs.slots_per_shard
        tokens = np.zeros((programs.prefill_size, self._length + 1), np.int32)
        lengths = np.ones(len(tokens), np.int32)
        for row, queued in self._numbered_rows():
            prompt = queued.request.prompt
            tokens[row, : len(prompt)] = prompt
            lengths[row] = len(prompt)
        copies = np.zeros((len(self.rows), per_shard + 1, 2), np.int32)
        for sample, shard, row in self.placements:
            count = copies[shard, -1, 0]
            copies[shard, count] = row, sample.slot - shard * per_shard
            copies[shard, -1] += 1
        return tokens, lengths, copies

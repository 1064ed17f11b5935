"""The engine's interface without a model: each test defines the replies."""

import itertools
import time
from collections.abc import Callable, Iterable
from types import SimpleNamespace

from MaxNano.inference.dialogue import ReplyDecoder, merge_parts
from MaxNano.inference.requests import Event, Request, TokenLogprobs
from MaxNano.tokenization.bpe import BpeTokenizer

SCORE = -0.5  # log-probability of every token


def byte_tokenizer() -> BpeTokenizer:
    """One token per byte, and the nine special tokens."""
    return BpeTokenizer(r"\s+|\S+", {bytes([i]): i for i in range(256)})


class FakeEngine:
    """Generates `reply(request, sample)`, `step_tokens` tokens of each sample per step."""

    def __init__(
        self,
        reply: Callable[[Request, int], Iterable[int]],
        slots: int = 4,
        max_length: int = 512,
        step_seconds: float = 0.0,
        step_tokens: int = 4,
        programs: Iterable[str] = (),
        compile_seconds: float = 0.0,
    ):
        self.tokenizer = byte_tokenizer()
        self.trained_steps = 2100
        self.reply = reply
        self.slots = slots
        self.max_length = max_length
        self.step_seconds = step_seconds
        self.step_tokens = step_tokens
        self.prefix_cache = SimpleNamespace(tokens_looked_up=8, tokens_reused=3)
        self.requests: list[Request] = []  # all that were submitted
        self.programs = programs
        self.compile_seconds = compile_seconds
        self.compiled: list[str] = []
        self.fails = False  # the next step raises
        self.failure: str | None = None  # how samples end instead of "stop"
        self._numbers = itertools.count()
        self._queue: list[tuple[int, int, Request]] = []
        self._running: dict[tuple[int, int], tuple[Request, Iterable[int], int]] = {}
        self._decoders: dict[tuple[int, int], ReplyDecoder] = {}
        self._events: list[Event] = []

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len({number for number, _, _ in self._queue})

    @property
    def is_idle(self) -> bool:
        return not (self._queue or self._running or self._events)

    def compile_programs(self, with_scores: bool = True) -> Iterable[str]:
        for name in self.programs:
            time.sleep(self.compile_seconds)
            self.compiled.append(name)
            yield name

    def submit(self, request: Request) -> int:
        if request.seed == 13:
            raise ValueError("this engine takes no request of seed 13")
        self.requests.append(request)
        number = next(self._numbers)
        self._queue += [(number, sample, request) for sample in range(request.samples)]
        return number

    def cancel(self, number: int) -> None:
        ended = [(one, sample) for one, sample, _ in self._queue if one == number]
        ended += [key for key in self._running if key[0] == number]
        self._queue = [waiting for waiting in self._queue if waiting[0] != number]
        for key in ended:
            self._running.pop(key, None)
            self._events.append(Event(*key, (), (), (), (), "cancelled"))

    def reset(self) -> None:
        keys = [*self._running, *((number, sample) for number, sample, _ in self._queue)]
        self._running.clear()
        self._queue.clear()
        self._events += [Event(*key, (), (), (), (), "error") for key in keys]

    def step(self) -> list[Event]:
        if self.fails:
            self.fails = False
            raise RuntimeError("a step that fails")
        time.sleep(self.step_seconds)
        events, self._events = self._events, []
        while self._queue and self.running < self.slots:
            number, sample, request = self._queue.pop(0)
            self._decoders[number, sample] = ReplyDecoder(self.tokenizer, request.stop)
            self._running[number, sample] = (
                request,
                iter(self.reply(request, sample)),
                request.max_tokens,
            )
        for key in list(self._running):
            events.append(self._advance(key))
        return events

    def _advance(self, key: tuple[int, int]) -> Event:
        request, tokens, left = self._running[key]
        is_first = left == request.max_tokens
        new = list(itertools.islice(tokens, min(self.step_tokens, left)))
        finish = None
        if len(new) < min(self.step_tokens, left):
            finish = "stop"
        elif left == len(new):
            finish = "length"
        stops = [i for i, token in enumerate(new) if token in request.stop_ids]
        if stops:
            new, finish = new[: stops[0]], "stop"
        parts = self._decoders[key].feed(new)
        if self._decoders[key].is_stopped:
            finish = "stop"
        if finish == "stop" and self.failure:
            finish = self.failure
        if finish:
            parts = merge_parts([*parts, *self._decoders[key].finish()])
        self._running[key] = request, tokens, left - len(new)
        if finish:
            del self._running[key]
        scores = self._scores(new, request) if request.logprobs is not None else ()
        before = (
            self._scores(request.prompt[1:], request)
            if request.prompt_logprobs and is_first
            else ()
        )
        return Event(*key, tuple(new), (False,) * len(new), tuple(parts), scores, finish, before)

    @staticmethod
    def _scores(tokens: Iterable[int], request: Request) -> tuple[TokenLogprobs, ...]:
        top = request.logprobs or 0
        return tuple(
            TokenLogprobs(SCORE, tuple((token + i & 255, SCORE - i) for i in range(top)))
            for token in tokens
        )

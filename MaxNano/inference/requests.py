"""Input and output of the engine: requests, events of running samples, completions."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from MaxNano.inference import sampling
from MaxNano.inference.decode import BIASED, STOP_IDS
from MaxNano.inference.dialogue import ReplyPart, merge_parts
from MaxNano.inference.grammar import Grammar


@dataclass(frozen=True)
class Request:
    """A prompt and how to sample its continuations.

    A sample ends before a token of `stop_ids`, and its text ends before a string of `stop`.
    """

    prompt: tuple[int, ...]
    max_tokens: int  # 0: score the prompt only
    samples: int = 1
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off; smallest probability, relative to the most likely token
    repetition_penalty: float = 1.0  # 1: off
    # Subtracted from a token's logit: per time it was sampled, and if it was sampled at all.
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its logit)
    grammar: Grammar | None = None  # the sample is a text of this grammar
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    logprobs: int | None = None  # alternatives reported per token; None: no log-probabilities
    prompt_logprobs: bool = False  # report the log-probabilities of prompt[1:] too
    tools: bool = False  # run calls of the calculator and force their results into the sample

    @property
    def is_adjusted(self) -> bool:
        """Whether the logits need decode.Adjustments."""
        return bool(
            self.frequency_penalty or self.presence_penalty or self.logit_bias or self.grammar
        )

    def check(self, vocab_size: int, max_length: int, has_tokenizer: bool) -> None:
        """Raise ValueError if an engine with these limits cannot serve the request."""
        problem = next(self._problems(vocab_size, max_length, has_tokenizer), None)
        if problem:
            raise ValueError(problem)

    def _problems(self, vocab_size: int, max_length: int, has_tokenizer: bool) -> Iterator[str]:
        if not self.prompt:
            yield "the prompt is empty: it needs at least one token, such as <|bos|>"
        if not all(0 <= token < vocab_size for token in (*self.prompt, *self.stop_ids)):
            yield f"a token id of the prompt or of stop_ids is not in 0 ... {vocab_size - 1}"
        if self.max_tokens < 0 or self.max_tokens == 0 and not self.prompt_logprobs:
            yield "max_tokens must be at least 1, or 0 with prompt_logprobs"
        if len(self.prompt) + (self.max_tokens > 0) > max_length:
            yield (
                f"the prompt has {len(self.prompt)} tokens, which does not fit into the context of"
                f" {max_length} tokens with room for an answer"
            )
        if self.samples < 1:
            yield "samples must be at least 1"
        if not 0 <= self.temperature <= 100:
            yield f"temperature={self.temperature} must be between 0 and 100"
        if self.top_k < 0:
            yield f"top_k={self.top_k} must be at least 0"
        if not 0 < self.top_p <= 1:
            yield f"top_p={self.top_p} must be above 0 and at most 1"
        if not 0 <= self.min_p <= 1:
            yield f"min_p={self.min_p} must be between 0 and 1"
        if not 0.01 <= self.repetition_penalty <= 100:
            yield f"repetition_penalty={self.repetition_penalty} must be between 0.01 and 100"
        for name in ("frequency_penalty", "presence_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                yield f"{name}={getattr(self, name)} must be between -2 and 2"
        if len(self.logit_bias) > BIASED:
            yield f"logit_bias has {len(self.logit_bias)} tokens; at most {BIASED} are supported"
        for token, bias in self.logit_bias:
            if not 0 <= token < vocab_size:
                yield f"logit_bias of token {token}: token ids are 0 ... {vocab_size - 1}"
            if not -100 <= bias <= 100:
                yield f"logit_bias={bias} of token {token} must be between -100 and 100"
        if self.grammar and self.grammar.vocab_size != vocab_size:
            yield f"the grammar has {self.grammar.vocab_size} tokens but the model {vocab_size}"
        if not 0 <= (self.logprobs or 0) <= sampling.LARGEST_LOGPROBS:
            yield f"logprobs={self.logprobs} must be between 0 and {sampling.LARGEST_LOGPROBS}"
        limit = STOP_IDS - 1 - (self.grammar is not None)
        if len(self.stop_ids) > limit + (not self.tools):
            yield f"there are {len(self.stop_ids)} stop_ids; at most {limit} are supported"
        if not all(self.stop):
            yield "a stop string is empty"
        if (self.stop or self.tools) and not has_tokenizer:
            yield "stop strings and tools need a tokenizer"


class TokenLogprobs(NamedTuple):
    """A token's log-probability at temperature 1, and (id, log-probability) of the top tokens."""

    logprob: float
    top: tuple[tuple[int, float], ...]


class Event(NamedTuple):
    """New tokens of one sample."""

    request: int
    sample: int
    tokens: tuple[int, ...]
    forced: tuple[bool, ...]  # per token: from a tool, not from the model
    parts: tuple[ReplyPart, ...]  # new text, as ReplyDecoder returns it; () without a tokenizer
    logprobs: tuple[TokenLogprobs, ...]  # empty unless requested
    # None while the sample runs; then stop, length, cancelled, error or grammar_error
    finish: str | None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # with the sample's first event


@dataclass
class Completion:
    """A whole sample. The tokens of a stop string are in `tokens`, its text is not in `parts`."""

    tokens: list[int] = field(default_factory=list)
    forced: list[bool] = field(default_factory=list)
    parts: list[ReplyPart] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: str | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The text of all parts."""
        return "".join(part.text for part in self.parts)

    def add(self, event: Event) -> None:
        """Append an event."""
        self.tokens += event.tokens
        self.forced += event.forced
        self.parts = merge_parts([*self.parts, *event.parts])
        self.logprobs += event.logprobs
        self.prompt_logprobs += event.prompt_logprobs
        self.finish = event.finish

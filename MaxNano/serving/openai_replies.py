"""Replies of the OpenAI API: from events of the engine to JSON objects, whole or in chunks.

Calls of the calculator are returned in a field `parts` next to `content`, a list of
{"type": "text" | "python" | "python_output", "text"}; calls of the client's tools in `tool_calls`.
"""

import itertools
import secrets
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from MaxNano.inference.dialogue import ReplyDecoder, ReplyPart, merge_parts
from MaxNano.inference.requests import Event, TokenLogprobs
from MaxNano.inference.text_stream import TextStream
from MaxNano.serving.api_fields import ApiError
from MaxNano.serving.openai_api import ApiCall
from MaxNano.serving.tool_calls import CallDelta, ToolCallReader
from MaxNano.tokenization.tokenizer import Tokenizer

LOWEST_LOGPROB = -9999.0  # JSON has no infinity


class ScoredToken(NamedTuple):
    """A token with its log-probability."""

    token: int
    offset: int  # characters of the text before it
    scores: TokenLogprobs | None  # None for the first token of a prompt


class ReplyDelta(NamedTuple):
    """New parts and tokens of a choice."""

    index: int
    parts: list[ReplyPart]
    tokens: list[ScoredToken]  # empty unless log-probabilities were requested
    finish: str | None
    calls: list[CallDelta] = []  # of the client's tools


class ReplyChoice:
    """One of the replies to a call, accumulated from the engine's events."""

    def __init__(self, call: ApiCall, index: int, tokenizer: Tokenizer):
        self.index = index
        self.call = call
        self.completion_tokens = 0
        self.parts: list[ReplyPart] = []
        self.tokens: list[ScoredToken] = []
        self.calls: list[CallDelta] = []
        self.finish: str | None = None
        self._reader = ToolCallReader(call.tools) if call.tools else None
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.special)
        self._offset = 0  # characters of the text before the next scored token
        self._text = TextStream()  # finds the offsets

    @property
    def has_begun(self) -> bool:
        """Whether there was an event."""
        return bool(self.completion_tokens or self.parts or self.finish)

    @property
    def all(self) -> ReplyDelta:
        """The choice so far."""
        return ReplyDelta(self.index, self.parts, self.tokens, self.finish, self.calls)

    def echo(self, prompt_logprobs: Sequence[TokenLogprobs | None]) -> ReplyDelta:
        """Begin the reply with the prompt. prompt_logprobs: one per token, if requested."""
        position = self.index // self.call.samples
        hidden = self.call.hidden[position]
        ids = self.call.requests[position].prompt[hidden:]
        decoder = ReplyDecoder(self._tokenizer)
        parts = merge_parts([*decoder.feed(ids), *decoder.finish()])
        tokens = self._score(ids, prompt_logprobs[hidden:]) if self.call.logprobs else []
        return self._add(ReplyDelta(self.index, parts, tokens, None))

    def feed(self, event: Event) -> ReplyDelta:
        """Add an event of the engine."""
        new = event.tokens[: self.call.max_tokens]  # max_tokens may be 0
        self.completion_tokens += len(new)
        parts = list(event.parts) if self.call.max_tokens else []
        tokens = self._score(new, event.logprobs[: len(new)]) if self.call.logprobs else []
        finish, calls = event.finish, []
        if self._reader:
            parts, calls = self._reader.feed(parts, is_final=finish is not None)
            if finish == "stop" and self._reader.has_call:
                finish = "tool_calls"
        return self._add(ReplyDelta(self.index, parts, tokens, finish, calls))

    def _add(self, delta: ReplyDelta) -> ReplyDelta:
        self.parts = merge_parts([*self.parts, *delta.parts])
        self.tokens += delta.tokens
        self.calls += delta.calls
        self.finish = delta.finish
        return delta

    def _score(
        self, tokens: Sequence[int], scores: Sequence[TokenLogprobs | None]
    ) -> list[ScoredToken]:
        scored = []
        for token, score in zip(tokens, scores, strict=True):
            scored.append(ScoredToken(token, self._offset, score))
            if token not in self._special:
                self._offset += len(self._text.push(self._tokenizer.decode_bytes([token])))
        return scored


class ReplyObjects:
    """The JSON objects of a reply: `whole`, or `opening`, `chunks` of each delta and `closing`."""

    end = b"data: [DONE]\n\n"  # of a stream

    def __init__(self, call: ApiCall, tokenizer: Tokenizer):
        self.call = call
        self._tokenizer = tokenizer
        self._id = ("chatcmpl-" if call.is_chat else "cmpl-") + secrets.token_hex(12)
        self._created = int(time.time())

    def whole(self, choices: Sequence[ReplyChoice]) -> dict[str, Any]:
        """The reply that is not streamed."""
        kind = "chat.completion" if self.call.is_chat else "text_completion"
        make = self._chat_choice if self.call.is_chat else self._text_choice
        objects = [make(choice.all) for choice in choices]
        return self._envelope(kind, objects) | {"usage": self._usage(choices)}

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first token."""
        if not self.call.is_chat:
            return []
        first = {
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        return [self._chunk([{"index": index} | first]) for index in range(self.call.sequences)]

    def chunks(self, delta: ReplyDelta) -> list[dict[str, Any]]:
        """Chunks of a delta; none if it is empty."""
        if not (delta.parts or delta.calls or delta.tokens or delta.finish):
            return []
        if not self.call.is_chat:
            return [self._chunk([self._text_choice(delta)])]
        choice = {
            "index": delta.index,
            "delta": (_chat_content(delta.parts) if delta.parts else {})
            | _call_deltas(delta.calls),
            "logprobs": self._chat_logprobs(delta.tokens),
            "finish_reason": delta.finish,
        }
        return [self._chunk([choice])]

    def closing(self, choices: Sequence[ReplyChoice]) -> list[dict[str, Any]]:
        """Chunks after the last token."""
        if not self.call.include_usage:
            return []
        return [self._chunk([]) | {"usage": self._usage(choices)}]

    def failure(self, error: ApiError) -> dict[str, Any]:
        """The chunk for an error after the first token."""
        return error.body()

    def _usage(self, choices: Sequence[ReplyChoice]) -> dict[str, int]:
        prompt = sum(len(request.prompt) for request in self.call.requests)
        completion = sum(choice.completion_tokens for choice in choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self.call.model,
            "choices": choices,
        }

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.call.is_chat else "text_completion"
        chunk = self._envelope(kind, choices)
        return chunk | {"usage": None} if self.call.include_usage else chunk

    def _chat_choice(self, delta: ReplyDelta) -> dict[str, Any]:
        message = {"role": "assistant", "content": "", "refusal": None}
        message |= _chat_content(delta.parts)
        if delta.calls:
            message |= {"content": message["content"] or None} | _call_deltas(delta.calls)
            for call in message["tool_calls"]:
                del call["index"]
        return {
            "index": delta.index,
            "message": message,
            "logprobs": self._chat_logprobs(delta.tokens),
            "finish_reason": delta.finish,
        }

    def _text_choice(self, delta: ReplyDelta) -> dict[str, Any]:
        return {
            "index": delta.index,
            "text": "".join(part.text for part in delta.parts),
            "logprobs": self._text_logprobs(delta.tokens),
            "finish_reason": delta.finish,
        }

    def _chat_logprobs(self, tokens: Sequence[ScoredToken]) -> dict[str, Any] | None:
        if not self.call.logprobs:
            return None

        def entry(token: int, logprob: float) -> dict[str, Any]:
            raw = self._tokenizer.decode_bytes([token])
            return {"token": _token_text(raw), "logprob": _finite(logprob), "bytes": list(raw)}

        content = [
            entry(token, scores.logprob)
            | {"top_logprobs": [entry(other, logprob) for other, logprob in scores.top]}
            for token, _, scores in tokens
            if scores is not None
        ]
        return {"content": content, "refusal": None}

    def _text_logprobs(self, tokens: Sequence[ScoredToken]) -> dict[str, Any] | None:
        if not self.call.logprobs:
            return None
        return {
            "tokens": [self._name(token) for token, _, _ in tokens],
            "token_logprobs": [scores and _finite(scores.logprob) for _, _, scores in tokens],
            "top_logprobs": [self._alternatives(token, scores) for token, _, scores in tokens],
            "text_offset": [offset for _, offset, _ in tokens],
        }

    def _alternatives(self, token: int, scores: TokenLogprobs | None) -> dict[str, float] | None:
        """The most likely tokens and the sampled one, by name."""
        if scores is None:
            return None
        named: dict[str, float] = {}
        for other, logprob in (*scores.top, (token, scores.logprob)):
            named.setdefault(self._name(other), _finite(logprob))
        return named

    def _name(self, token: int) -> str:
        return _token_text(self._tokenizer.decode_bytes([token]))


def _chat_content(parts: Sequence[ReplyPart]) -> dict[str, Any]:
    """`content`, and `parts` if there are tool calls."""
    content: dict[str, Any] = {
        "content": "".join(part.text for part in parts if part.kind == "text")
    }
    if any(part.kind != "text" for part in parts):
        content["parts"] = [{"type": kind, "text": text} for kind, text in parts]
    return content


def _call_deltas(calls: Sequence[CallDelta]) -> dict[str, Any]:
    """`tool_calls` with what is new of each call; empty if nothing is."""
    entries = []
    for index, group in itertools.groupby(calls, key=lambda call: call.index):
        first, *others = group
        function = {"arguments": "".join(call.arguments for call in (first, *others))}
        entry: dict[str, Any] = {"index": index, "function": function}
        if first.id is not None:
            entry["function"] = {"name": first.name} | function
            entry |= {"id": first.id, "type": "function"}
        entries.append(entry)
    return {"tool_calls": entries} if entries else {}


def _token_text(raw: bytes) -> str:
    """A token as text; bytes that are not whole characters as bytes:\\x.., like OpenAI."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _finite(logprob: float) -> float:
    return max(float(logprob), LOWEST_LOGPROB)

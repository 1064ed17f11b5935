"""OpenAI's protocol: request bodies to engine requests, what the engine draws to the objects that clients read.

Nothing here waits, listens or generates; serve.py does. Every limit on what one request may ask for is here.
Two things are added to the protocol. The assistant's tool calls travel as `parts` beside `content`, a list of
{"type": "text" | "python" | "python_output", "text"}, and such a list is also taken as an assistant message's
content. And top_k, min_p and repetition_penalty may be given, as other servers have them.
Source: https://platform.openai.com/docs/api-reference (chat, completions).
"""

import codecs
import json
import math
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from MaxNano.inference.dialogue import Part, ReplyDecoder, merge_parts, prompt_ids
from MaxNano.inference.engine import Event, Request, TokenLogprobs
from MaxNano.tokenization.tokenizer import Tokenizer

MAX_BODY_BYTES = 1 << 20
MAX_JSON_DEPTH = 16
MAX_MESSAGES = 500
MAX_SAMPLES = 16  # n
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_TOP_LOGPROBS = 20
LONGEST_TOKEN_BYTES = (
    512  # a prompt of more bytes than this times the context is refused before it is encoded
)

SMALLEST_TOP_P = 1e-6  # the likeliest token alone, which is what 0 means

LOWEST_LOGPROB = -9999.0  # JSON has no infinity

IGNORED = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
# What is not supported may be named with the value that asks for nothing.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}


class ApiError(Exception):
    """A refusal: an HTTP status, and the error object that clients of OpenAI read."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        }


@dataclass(frozen=True)
class Rules:
    """What this server allows and what it takes for granted."""

    model: str
    max_length: int  # tokens of a prompt and its reply
    max_sequences: int  # prompts times samples of one call
    max_tokens: int  # of a reply, where the call leaves it open
    temperature: float
    top_k: int


@dataclass(frozen=True)
class Call:
    """What a client asked for, checked."""

    chat: bool
    requests: tuple[Request, ...]  # one a prompt
    hidden: tuple[int, ...]  # tokens at the start of each prompt that the client did not give
    max_tokens: int  # may be 0, though the engine may then draw one token, which nobody is shown
    stream: bool
    include_usage: bool
    echo: bool
    stop: tuple[str, ...]
    model: str

    @property
    def samples(self) -> int:
        return self.requests[0].samples

    @property
    def sequences(self) -> int:
        return len(self.requests) * self.samples

    @property
    def logprobs(self) -> bool:
        return self.requests[0].logprobs is not None


# ---- Reading a body -----------------------------------------------------------------------------


def parse_json(body: bytes) -> dict[str, Any]:
    """The object in a request's body. Raises ApiError where it is no JSON object or nested too deeply."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(body.decode("utf-8"), parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8: byte {error.start} is wrong") from None
    except RecursionError:
        raise ApiError(400, f"the body is nested more than {MAX_JSON_DEPTH} deep") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [child for parent in level for child in _children(parent)]
    if level:
        raise ApiError(400, f"the body is nested more than {MAX_JSON_DEPTH} deep")
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    return value


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


class _Fields:
    """The fields of a body, read one by one; null is the same as absent."""

    def __init__(self, body: Mapping[str, Any]):
        self._left = {name: value for name, value in body.items() if value is not None}

    def take(self, name: str, default: Any = None) -> Any:
        return self._left.pop(name, default)

    def flag(self, name: str) -> bool:
        value = self.take(name, False)
        if not isinstance(value, bool):
            raise ApiError(400, f"{name} must be true or false", name)
        return value

    def integer(self, name: str, default: int | None, low: int, high: int) -> int | None:
        value = self.take(name, default)
        if value is None:
            return None
        whole = isinstance(value, int) or isinstance(value, float) and value.is_integer()
        if isinstance(value, bool) or not whole or not low <= value <= high:
            raise ApiError(400, f"{name} must be a whole number from {low} to {high}", name)
        return int(value)

    def number(self, name: str, default: float, low: float, high: float) -> float:
        value = self.take(name, default)
        known = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not known or not math.isfinite(value) or not low <= value <= high:
            raise ApiError(400, f"{name} must be a number from {low:g} to {high:g}", name)
        return float(value)

    def refuse_rest(self) -> None:
        for name, value in self._left.items():
            if name in NEUTRAL and value in NEUTRAL[name] or name in IGNORED:
                continue
            what = "is not supported here" if name in NEUTRAL else "is no parameter of this call"
            raise ApiError(400, f"{name[:64]} {what}", name[:64], "unsupported_parameter")


def _stops(fields: _Fields) -> tuple[str, ...]:
    stop = fields.take("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(text, str) and text for text in stops):
        raise ApiError(400, "stop must be a text or a list of texts, none of them empty", "stop")
    if len(stops) > MAX_STOPS or max(map(len, stops), default=0) > MAX_STOP_CHARACTERS:
        message = f"stop must be at most {MAX_STOPS} texts of {MAX_STOP_CHARACTERS} characters"
        raise ApiError(400, message, "stop")
    return tuple(stops)


def _seed(fields: _Fields) -> int:
    seed = fields.integer("seed", None, -(1 << 63), (1 << 64) - 1)
    return secrets.randbits(31) if seed is None else seed % (1 << 31)


def _common(fields: _Fields, rules: Rules) -> dict[str, Any]:
    """Fields of `Request` that both calls read alike."""
    model = fields.take("model", rules.model)
    if model != rules.model:
        raise ApiError(404, f"this server has one model, {rules.model}", "model", "model_not_found")
    return {
        "samples": fields.integer("n", 1, 1, MAX_SAMPLES),
        "temperature": fields.number("temperature", rules.temperature, 0, 2),
        "top_k": fields.integer("top_k", rules.top_k, 0, 1 << 31),
        "top_p": max(fields.number("top_p", 1.0, 0, 1), SMALLEST_TOP_P),
        "min_p": fields.number("min_p", 0.0, 0, 1),
        "repetition_penalty": fields.number("repetition_penalty", 1.0, 0.01, 10),
        "seed": _seed(fields),
        "stop": _stops(fields),
    }


def _streaming(fields: _Fields) -> dict[str, bool]:
    stream, options = fields.flag("stream"), fields.take("stream_options", {})
    if not isinstance(options, dict) or options and not stream:
        raise ApiError(400, "stream_options must be an object beside stream=true", "stream_options")
    options = _Fields(options)
    options.take("include_obfuscation")  # asks for padding against eavesdroppers; loopback has none
    usage = options.flag("include_usage")
    options.refuse_rest()
    return {"stream": stream, "include_usage": usage}


def _max_tokens(
    asked: int | None, prompts: Sequence[Sequence[int]], rules: Rules, least: int = 1
) -> int:
    """Tokens of a reply. Raises ApiError where they or the prompts do not fit into the context.

    least: tokens that the engine draws anyway.
    """
    longest = max(map(len, prompts))
    room = rules.max_length - longest
    if max(asked or 0, least) > room:
        wanted = "" if asked is None else f" and {asked} of the reply"
        message = f"{longest} tokens of the prompt{wanted} do not fit into the context of {rules.max_length} tokens"
        raise ApiError(400, message, "max_tokens", "context_length_exceeded")
    return min(rules.max_tokens, room) if asked is None else asked


def _check_sequences(call: Call, rules: Rules) -> Call:
    if call.sequences > rules.max_sequences:
        message = f"{call.sequences} samples in one call; at most {rules.max_sequences} are taken"
        raise ApiError(400, message, "n")
    return call


# ---- Chat ---------------------------------------------------------------------------------------


def parse_chat(body: Mapping[str, Any], tokenizer: Tokenizer, rules: Rules) -> Call:
    """The body of /v1/chat/completions; ApiError with the right status for anything wrong."""
    fields = _Fields(body)
    common = _common(fields, rules)
    streaming = _streaming(fields)
    messages = _messages(fields.take("messages"), rules)
    old = fields.integer("max_tokens", None, 1, 1 << 31)
    asked = fields.integer("max_completion_tokens", old, 1, 1 << 31)
    with_logprobs = fields.flag("logprobs")
    top = fields.integer("top_logprobs", None, 0, MAX_TOP_LOGPROBS)
    if top is not None and not with_logprobs:
        raise ApiError(400, "top_logprobs needs logprobs=true", "top_logprobs")
    fields.refuse_rest()
    try:
        ids = prompt_ids(tokenizer, messages)
    except ValueError as error:
        raise ApiError(400, str(error), "messages") from None
    max_tokens = _max_tokens(asked, [ids], rules)
    request = Request(
        prompt=tuple(ids),
        max_tokens=max_tokens,
        stop_ids=frozenset({tokenizer.special.assistant_end, tokenizer.special.bos}),
        logprobs=(top or 0) if with_logprobs else None,
        tools=True,
        **common,
    )
    call = Call(
        True,
        (request,),
        (0,),
        max_tokens,
        echo=False,
        stop=request.stop,
        model=rules.model,
        **streaming,
    )
    return _check_sequences(call, rules)


def _messages(value: Any, rules: Rules) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise ApiError(400, "messages must be a list of at least one message", "messages")
    if len(value) > MAX_MESSAGES:
        raise ApiError(
            400, f"messages are {len(value)}; at most {MAX_MESSAGES} are taken", "messages"
        )
    messages = [_message(message, f"messages[{index}]") for index, message in enumerate(value)]
    texts = (part["text"] for message in messages for part in _parts_of(message["content"]))
    _check_size(texts, rules, "messages")
    return messages


def _parts_of(content: str | list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _check_size(texts: Iterable[str], rules: Rules, param: str) -> None:
    if sum(map(len, texts)) > rules.max_length * LONGEST_TOKEN_BYTES:
        message = f"{param} cannot fit into the context of {rules.max_length} tokens"
        raise ApiError(400, message, param, "context_length_exceeded")


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ApiError(400, f'{where} must be {{"role": ..., "content": ...}}', where)
    role = message.get("role")
    role = "system" if role == "developer" else role
    if role not in ("system", "user", "assistant"):
        raise ApiError(400, f"{where}.role must be system, user or assistant", f"{where}.role")
    kinds = ("text", "python", "python_output") if role == "assistant" else ("text",)
    content = message.get("content")
    if content is None and role == "assistant":
        content = ""
    if isinstance(content, str):
        return {"role": role, "content": content}
    if not isinstance(content, list) or not all(_is_part(part, kinds) for part in content):
        message = f"{where}.content must be a text, or a list of parts of type {' or '.join(kinds)}"
        raise ApiError(400, message, f"{where}.content")
    parts = [{"type": part["type"], "text": part["text"]} for part in content]
    if role != "assistant":
        return {"role": role, "content": "".join(part["text"] for part in parts)}
    return {"role": role, "content": parts}


def _is_part(part: Any, kinds: Sequence[str]) -> bool:
    return (
        isinstance(part, dict) and part.get("type") in kinds and isinstance(part.get("text"), str)
    )


# ---- Completions --------------------------------------------------------------------------------


def parse_completion(body: Mapping[str, Any], tokenizer: Tokenizer, rules: Rules) -> Call:
    """The body of /v1/completions; ApiError with the right status for anything wrong."""
    fields = _Fields(body)
    common = _common(fields, rules)
    streaming = _streaming(fields)
    prompts, hidden = _prompts(fields.take("prompt"), tokenizer, rules)
    asked = fields.integer("max_tokens", None, 0, 1 << 31)
    echo = fields.flag("echo")
    logprobs = fields.integer("logprobs", None, 0, MAX_TOP_LOGPROBS)
    fields.refuse_rest()
    scores = echo and logprobs is not None
    least = int(asked != 0 or not scores)  # the engine scores a prompt without drawing anything
    max_tokens = _max_tokens(asked, prompts, rules, least)
    requests = tuple(
        Request(
            prompt=tuple(prompt),
            max_tokens=max(least, max_tokens),
            # Who has a prompt scored counts on one token behind it, whatever it is, to leave away.
            stop_ids=frozenset() if scores else frozenset({tokenizer.bos_id}),
            logprobs=logprobs,
            prompt_logprobs=scores,
            **common,
        )
        for prompt in prompts
    )
    call = Call(
        False,
        requests,
        hidden,
        max_tokens,
        echo=echo,
        stop=common["stop"],
        model=rules.model,
        **streaming,
    )
    return _check_sequences(call, rules)


def _prompts(
    value: Any, tokenizer: Tokenizer, rules: Rules
) -> tuple[list[list[int]], tuple[int, ...]]:
    """(ids of each prompt, how many of them the client did not give).

    <|bos|> stands before every prompt, for the model has never seen a text without it.
    """
    if isinstance(value, str) or are_ids(value, tokenizer) and value:
        value = [value]
    if not isinstance(value, list) or not value:
        raise ApiError(400, "prompt must be a text, token ids, or a list of either", "prompt")
    if len(value) > rules.max_sequences:
        message = f"{len(value)} prompts in one call; at most {rules.max_sequences} are taken"
        raise ApiError(400, message, "prompt")
    if all(isinstance(text, str) for text in value):
        _check_size(value, rules, "prompt")
        return [[tokenizer.bos_id, *tokenizer.encode(text)] for text in value], (1,) * len(value)
    if not all(are_ids(ids, tokenizer) for ids in value):
        message = f"prompt must be a text, token ids from 0 to {tokenizer.vocab_size - 1}, or a list of either"
        raise ApiError(400, message, "prompt")
    hidden = tuple(int(ids[:1] != [tokenizer.bos_id]) for ids in value)
    return [[tokenizer.bos_id] * add + ids for add, ids in zip(hidden, value, strict=True)], hidden


def are_ids(value: Any, tokenizer: Tokenizer) -> bool:
    """Whether a value out of JSON is a list of the tokenizer's ids."""
    return isinstance(value, list) and all(
        type(i) is int and 0 <= i < tokenizer.vocab_size for i in value
    )


# ---- Replies ------------------------------------------------------------------------------------


class ScoredToken(NamedTuple):
    """A token as it is reported."""

    token: int
    offset: int  # characters of the text before it
    scores: TokenLogprobs | None  # None for the first token of a prompt


class Delta(NamedTuple):
    """What a choice gained."""

    index: int
    parts: list[Part]
    tokens: list[ScoredToken]  # empty where no log-probabilities were asked for
    finish: str | None


class _Offsets:
    """Where tokens begin in the text that they make."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.special)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at = 0

    def score(
        self, tokens: Sequence[int], scores: Sequence[TokenLogprobs | None]
    ) -> list[ScoredToken]:
        scored = []
        for token, score in zip(tokens, scores, strict=True):
            scored.append(ScoredToken(token, self._at, score))
            if token not in self._special:
                self._at += len(self._utf8.decode(self._tokenizer.decode_bytes([token])))
        return scored


class Choice:
    """One reply while it is drawn, and the whole of it in the end."""

    def __init__(self, call: Call, index: int, tokenizer: Tokenizer):
        self.index = index
        self.call = call
        self.drawn = 0  # tokens, which the client pays for
        self.parts: list[Part] = []
        self.tokens: list[ScoredToken] = []
        self.finish: str | None = None
        self._decoder = ReplyDecoder(tokenizer, call.stop)
        self._offsets = _Offsets(tokenizer)
        self._tokenizer = tokenizer

    @property
    def has_begun(self) -> bool:
        """Whether anything has been drawn."""
        return bool(self.drawn or self.parts or self.finish)

    def echo(self, prompt_logprobs: Sequence[TokenLogprobs | None]) -> Delta:
        """The prompt, as the beginning of the reply. prompt_logprobs: of each token, or nothing."""
        position = self.index // self.call.samples
        ids = self.call.requests[position].prompt[self.call.hidden[position] :]
        decoder = ReplyDecoder(self._tokenizer)
        parts = merge_parts([*decoder.feed(ids), *decoder.finish()])
        tokens = []
        if self.call.logprobs:
            tokens = self._offsets.score(ids, prompt_logprobs[self.call.hidden[position] :])
        return self._add(Delta(self.index, parts, tokens, None))

    def feed(self, event: Event) -> Delta:
        """What the engine's event adds."""
        drawn = event.tokens[: self.call.max_tokens]  # none of a reply of no tokens
        self.drawn += len(drawn)
        parts = self._decoder.feed(drawn)
        if event.finish:
            parts = merge_parts([*parts, *self._decoder.finish()])
        tokens = []
        if self.call.logprobs:
            tokens = self._offsets.score(drawn, event.logprobs[: len(drawn)])
        finish = "stop" if self._decoder.stopped else event.finish
        return self._add(Delta(self.index, parts, tokens, finish))

    def _add(self, delta: Delta) -> Delta:
        self.parts = merge_parts([*self.parts, *delta.parts])
        self.tokens += delta.tokens
        self.finish = delta.finish
        return delta


class Replies:
    """The objects in which a call is answered: whole, or chunk by chunk."""

    def __init__(self, call: Call, tokenizer: Tokenizer):
        self.call = call
        self._tokenizer = tokenizer
        self._id = ("chatcmpl-" if call.chat else "cmpl-") + secrets.token_hex(12)
        self._created = int(time.time())

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        kind = "chat.completion" if self.call.chat else "text_completion"
        make = self._chat_choice if self.call.chat else self._text_choice
        usage = self.usage(sum(choice.drawn for choice in choices))
        deltas = [Delta(each.index, each.parts, each.tokens, each.finish) for each in choices]
        return self._envelope(kind, list(map(make, deltas))) | {"usage": usage}

    def opening(self) -> list[dict[str, Any]]:
        """The chunks before the first token."""
        if not self.call.chat:
            return []
        opened = [
            {
                "index": index,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": None,
                "finish_reason": None,
            }
            for index in range(self.call.sequences)
        ]
        return [self._chunk([choice]) for choice in opened]

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """The chunks in which something new is told; none where there is nothing to tell."""
        if not (delta.parts or delta.tokens or delta.finish):
            return []
        if not self.call.chat:
            return [self._chunk([self._text_choice(delta)])]
        choice = {
            "index": delta.index,
            "delta": self._chat_content(delta.parts) if delta.parts else {},
            "logprobs": self._chat_logprobs(delta.tokens),
            "finish_reason": delta.finish,
        }
        return [self._chunk([choice])]

    def closing(self, choices: Sequence[Choice]) -> list[dict[str, Any]]:
        """The chunks behind the last token."""
        if not self.call.include_usage:
            return []
        return [self._chunk([]) | {"usage": self.usage(sum(choice.drawn for choice in choices))}]

    def usage(self, drawn: int) -> dict[str, int]:
        prompt = sum(len(request.prompt) for request in self.call.requests)
        return {"prompt_tokens": prompt, "completion_tokens": drawn, "total_tokens": prompt + drawn}

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self.call.model,
            "choices": choices,
        }

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.call.chat else "text_completion"
        chunk = self._envelope(kind, choices)
        return chunk | {"usage": None} if self.call.include_usage else chunk

    def _chat_choice(self, delta: Delta) -> dict[str, Any]:
        message = {"role": "assistant", "content": "", "refusal": None} | self._chat_content(
            delta.parts
        )
        return {
            "index": delta.index,
            "message": message,
            "logprobs": self._chat_logprobs(delta.tokens),
            "finish_reason": delta.finish,
        }

    @staticmethod
    def _chat_content(parts: Sequence[Part]) -> dict[str, Any]:
        """content, and parts where there is more than text."""
        content: dict[str, Any] = {
            "content": "".join(part.text for part in parts if part.kind == "text")
        }
        if any(part.kind != "text" for part in parts):
            content["parts"] = [{"type": kind, "text": text} for kind, text in parts]
        return content

    def _text_choice(self, delta: Delta) -> dict[str, Any]:
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
            return {"token": self._name(token), "logprob": _finite(logprob), "bytes": list(raw)}

        content = [
            entry(token, scores[0])
            | {"top_logprobs": [entry(i, logprob) for i, logprob in scores[1]]}
            for token, _, scores in tokens
            if scores is not None
        ]
        return {"content": content, "refusal": None}

    def _text_logprobs(self, tokens: Sequence[ScoredToken]) -> dict[str, Any] | None:
        if not self.call.logprobs:
            return None
        return {
            "tokens": [self._name(token) for token, _, _ in tokens],
            "token_logprobs": [scores and _finite(scores[0]) for _, _, scores in tokens],
            "top_logprobs": [self._alternatives(token, scores) for token, _, scores in tokens],
            "text_offset": [offset for _, offset, _ in tokens],
        }

    def _alternatives(self, token: int, scores: TokenLogprobs | None) -> dict[str, float] | None:
        """The likeliest tokens, and the one that was drawn, by name."""
        if scores is None:
            return None
        found: dict[str, float] = {}
        for i, logprob in (*scores[1], (token, scores[0])):
            found.setdefault(self._name(i), _finite(logprob))
        return found

    def _name(self, token: int) -> str:
        """A token as text; one that is a part of a character only as its bytes."""
        raw = self._tokenizer.decode_bytes([token])
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _finite(logprob: float) -> float:
    return max(float(logprob), LOWEST_LOGPROB)

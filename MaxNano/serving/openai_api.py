"""Requests of the OpenAI API: from validated JSON bodies to requests of the engine.

The limits on a single request are here. Extensions: an assistant message's content may be a list of
parts {"type": "text" | "python" | "python_output", "text"}, which are its tool calls; top_k, min_p
and repetition_penalty are sampling settings, as in other servers.
Source: https://platform.openai.com/docs/api-reference (chat, completions).
"""

import json
import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from MaxNano.inference.dialogue import prompt_ids
from MaxNano.inference.requests import Request
from MaxNano.tokenization.tokenizer import Tokenizer

MAX_BODY_BYTES = 1 << 20
MAX_JSON_DEPTH = 16
MAX_MESSAGES = 500
MAX_SAMPLES = 16  # n
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_TOP_LOGPROBS = 20
MAX_TOKEN_BYTES = 512  # longer prompts than this times the context are refused before encoding
SMALLEST_TOP_P = 1e-6  # only the most likely token, which is what 0 means

IGNORED = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
# Unsupported parameters are accepted with the values that have no effect.
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
    """An HTTP status with an error object of the OpenAI API."""

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
        """The error object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        }


@dataclass(frozen=True)
class ApiRules:
    """The limits of a server, and the defaults of optional fields."""

    model: str
    max_length: int  # tokens of a prompt with its reply
    max_sequences: int  # prompts times samples of one call
    max_tokens: int  # default
    temperature: float  # default
    top_k: int  # default


@dataclass(frozen=True)
class ApiCall:
    """A validated call of an endpoint."""

    is_chat: bool
    requests: tuple[Request, ...]  # one per prompt
    hidden: tuple[int, ...]  # tokens that the server added at the start of each prompt
    max_tokens: int  # may be 0 although the engine samples one token then
    stream: bool
    include_usage: bool
    echo: bool
    model: str

    @property
    def samples(self) -> int:
        """Samples per prompt."""
        return self.requests[0].samples

    @property
    def sequences(self) -> int:
        """Samples of all prompts."""
        return len(self.requests) * self.samples

    @property
    def logprobs(self) -> bool:
        """Whether log-probabilities are requested."""
        return self.requests[0].logprobs is not None


# ---- Fields of a body ---------------------------------------------------------------------------


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object in a request's body. Raises ApiError if invalid or nested too deeply."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(body.decode("utf-8"), parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8: byte {error.start} is invalid") from None
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


class BodyFields:
    """The fields of a body, taken one by one. null is the same as a missing field."""

    def __init__(self, body: Mapping[str, Any]):
        self._left = {name: value for name, value in body.items() if value is not None}

    def take(self, name: str, default: Any = None) -> Any:
        """A field as it is."""
        return self._left.pop(name, default)

    def flag(self, name: str) -> bool:
        """A boolean field, false by default."""
        value = self.take(name, False)
        if not isinstance(value, bool):
            raise ApiError(400, f"{name} must be true or false", name)
        return value

    def integer(self, name: str, default: int | None, low: int, high: int) -> int | None:
        """An integer field; 2.0 is an integer."""
        value = self.take(name, default)
        if value is None:
            return None
        is_whole = isinstance(value, int) or isinstance(value, float) and value.is_integer()
        if isinstance(value, bool) or not is_whole or not low <= value <= high:
            raise ApiError(400, f"{name} must be an integer from {low} to {high}", name)
        return int(value)

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A finite number."""
        value = self.take(name, default)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or not low <= value <= high:
            raise ApiError(400, f"{name} must be a number from {low:g} to {high:g}", name)
        return float(value)

    def refuse_rest(self) -> None:
        """Raise ApiError if a field that was not taken would have an effect."""
        for name, value in self._left.items():
            if name in NEUTRAL and value in NEUTRAL[name] or name in IGNORED:
                continue
            problem = "is not supported" if name in NEUTRAL else "is not a parameter of this call"
            raise ApiError(400, f"{name[:64]} {problem}", name[:64], "unsupported_parameter")


def _stop_strings(fields: BodyFields) -> tuple[str, ...]:
    stop = fields.take("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(text, str) and text for text in stops):
        message = "stop must be a string or a list of strings, none of them empty"
        raise ApiError(400, message, "stop")
    if len(stops) > MAX_STOPS or max(map(len, stops), default=0) > MAX_STOP_CHARACTERS:
        message = f"stop must be at most {MAX_STOPS} strings of {MAX_STOP_CHARACTERS} characters"
        raise ApiError(400, message, "stop")
    return tuple(stops)


def _seed(fields: BodyFields) -> int:
    seed = fields.integer("seed", None, -(1 << 63), (1 << 64) - 1)
    return secrets.randbits(31) if seed is None else seed % (1 << 31)


def _sampling(fields: BodyFields, rules: ApiRules) -> dict[str, Any]:
    """The fields of `Request` that both endpoints share."""
    model = fields.take("model", rules.model)
    if model != rules.model:
        raise ApiError(
            404, f"the model of this server is {rules.model}", "model", "model_not_found"
        )
    return {
        "samples": fields.integer("n", 1, 1, MAX_SAMPLES),
        "temperature": fields.number("temperature", rules.temperature, 0, 2),
        "top_k": fields.integer("top_k", rules.top_k, 0, 1 << 31),
        "top_p": max(fields.number("top_p", 1.0, 0, 1), SMALLEST_TOP_P),
        "min_p": fields.number("min_p", 0.0, 0, 1),
        "repetition_penalty": fields.number("repetition_penalty", 1.0, 0.01, 10),
        "seed": _seed(fields),
        "stop": _stop_strings(fields),
    }


def _streaming(fields: BodyFields) -> dict[str, bool]:
    stream, options = fields.flag("stream"), fields.take("stream_options", {})
    if not isinstance(options, dict) or options and not stream:
        message = "stream_options must be an object and needs stream=true"
        raise ApiError(400, message, "stream_options")
    options = BodyFields(options)
    options.take("include_obfuscation")  # padding against traffic analysis
    include_usage = options.flag("include_usage")
    options.refuse_rest()
    return {"stream": stream, "include_usage": include_usage}


def _max_tokens(
    requested: int | None, prompts: Sequence[Sequence[int]], rules: ApiRules, least: int = 1
) -> int:
    """Most tokens of a reply. Raises ApiError if they or the prompts do not fit into the context.

    least: tokens that the engine samples in any case.
    """
    longest = max(map(len, prompts))
    room = rules.max_length - longest
    if max(requested or 0, least) > room:
        reply = "" if requested is None else f" and {requested} of the reply"
        message = (
            f"{longest} tokens of the prompt{reply} do not fit into the context of"
            f" {rules.max_length} tokens"
        )
        raise ApiError(400, message, "max_tokens", "context_length_exceeded")
    return min(rules.max_tokens, room) if requested is None else requested


def _check_sequences(call: ApiCall, rules: ApiRules) -> ApiCall:
    if call.sequences > rules.max_sequences:
        message = f"{call.sequences} samples in one call; the limit is {rules.max_sequences}"
        raise ApiError(400, message, "n")
    return call


def _check_size(texts: Iterable[str], rules: ApiRules, param: str) -> None:
    if sum(map(len, texts)) > rules.max_length * MAX_TOKEN_BYTES:
        message = f"{param} cannot fit into the context of {rules.max_length} tokens"
        raise ApiError(400, message, param, "context_length_exceeded")


# ---- Chat ---------------------------------------------------------------------------------------


def parse_chat(body: Mapping[str, Any], tokenizer: Tokenizer, rules: ApiRules) -> ApiCall:
    """The body of /v1/chat/completions. Raises ApiError for an invalid one."""
    fields = BodyFields(body)
    sampling, streaming = _sampling(fields, rules), _streaming(fields)
    messages = _messages(fields.take("messages"), rules)
    requested = fields.integer("max_tokens", None, 1, 1 << 31)
    requested = fields.integer("max_completion_tokens", requested, 1, 1 << 31)
    logprobs = fields.flag("logprobs")
    top = fields.integer("top_logprobs", None, 0, MAX_TOP_LOGPROBS)
    if top is not None and not logprobs:
        raise ApiError(400, "top_logprobs needs logprobs=true", "top_logprobs")
    fields.refuse_rest()
    try:
        ids = prompt_ids(tokenizer, messages)
    except ValueError as error:
        raise ApiError(400, str(error), "messages") from None
    max_tokens = _max_tokens(requested, [ids], rules)
    request = Request(
        prompt=tuple(ids),
        max_tokens=max_tokens,
        stop_ids=frozenset({tokenizer.special.assistant_end, tokenizer.special.bos}),
        logprobs=(top or 0) if logprobs else None,
        tools=True,
        **sampling,
    )
    call = ApiCall(
        is_chat=True,
        requests=(request,),
        hidden=(0,),
        max_tokens=max_tokens,
        echo=False,
        model=rules.model,
        **streaming,
    )
    return _check_sequences(call, rules)


def _messages(value: Any, rules: ApiRules) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise ApiError(400, "messages must be a list of at least one message", "messages")
    if len(value) > MAX_MESSAGES:
        message = f"there are {len(value)} messages; the limit is {MAX_MESSAGES}"
        raise ApiError(400, message, "messages")
    messages = [_message(message, f"messages[{index}]") for index, message in enumerate(value)]
    contents = [message["content"] for message in messages]
    texts = (
        content if isinstance(content, str) else "".join(part["text"] for part in content)
        for content in contents
    )
    _check_size(texts, rules, "messages")
    return messages


def _message(message: Any, path: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ApiError(400, f'{path} must be {{"role": ..., "content": ...}}', path)
    role = message.get("role")
    role = "system" if role == "developer" else role
    if role not in ("system", "user", "assistant"):
        raise ApiError(400, f"{path}.role must be system, user or assistant", f"{path}.role")
    kinds = ("text", "python", "python_output") if role == "assistant" else ("text",)
    content = message.get("content")
    if content is None and role == "assistant":
        content = ""
    if isinstance(content, str):
        return {"role": role, "content": content}
    if not isinstance(content, list) or not all(_is_part(part, kinds) for part in content):
        problem = f"must be a string, or a list of parts of type {' or '.join(kinds)}"
        raise ApiError(400, f"{path}.content {problem}", f"{path}.content")
    parts = [{"type": part["type"], "text": part["text"]} for part in content]
    if role != "assistant":
        return {"role": role, "content": "".join(part["text"] for part in parts)}
    return {"role": role, "content": parts}


def _is_part(part: Any, kinds: Sequence[str]) -> bool:
    return (
        isinstance(part, dict) and part.get("type") in kinds and isinstance(part.get("text"), str)
    )


# ---- Completions --------------------------------------------------------------------------------


def parse_completion(body: Mapping[str, Any], tokenizer: Tokenizer, rules: ApiRules) -> ApiCall:
    """The body of /v1/completions. Raises ApiError for an invalid one."""
    fields = BodyFields(body)
    sampling, streaming = _sampling(fields, rules), _streaming(fields)
    prompts, hidden = _prompts(fields.take("prompt"), tokenizer, rules)
    requested = fields.integer("max_tokens", None, 0, 1 << 31)
    echo = fields.flag("echo")
    logprobs = fields.integer("logprobs", None, 0, MAX_TOP_LOGPROBS)
    fields.refuse_rest()
    is_scored = echo and logprobs is not None
    least = int(requested != 0 or not is_scored)  # the engine can score without sampling
    max_tokens = _max_tokens(requested, prompts, rules, least)
    requests = tuple(
        Request(
            prompt=tuple(prompt),
            max_tokens=max(least, max_tokens),
            # lm-eval scores a prompt with max_tokens=1 and drops one token, which must exist.
            stop_ids=frozenset() if is_scored else frozenset({tokenizer.bos_id}),
            logprobs=logprobs,
            prompt_logprobs=is_scored,
            **sampling,
        )
        for prompt in prompts
    )
    call = ApiCall(
        is_chat=False,
        requests=requests,
        hidden=hidden,
        max_tokens=max_tokens,
        echo=echo,
        model=rules.model,
        **streaming,
    )
    return _check_sequences(call, rules)


def _prompts(
    value: Any, tokenizer: Tokenizer, rules: ApiRules
) -> tuple[list[list[int]], tuple[int, ...]]:
    """(token ids of each prompt, number of tokens that were added to it).

    <|bos|> is added to a prompt without it: every training text begins with it.
    """
    if isinstance(value, str) or are_ids(value, tokenizer) and value:
        value = [value]
    if not isinstance(value, list) or not value:
        raise ApiError(400, "prompt must be a string, token ids, or a list of either", "prompt")
    if len(value) > rules.max_sequences:
        message = f"{len(value)} prompts in one call; the limit is {rules.max_sequences}"
        raise ApiError(400, message, "prompt")
    if all(isinstance(text, str) for text in value):
        _check_size(value, rules, "prompt")
        return [[tokenizer.bos_id, *tokenizer.encode(text)] for text in value], (1,) * len(value)
    if not all(are_ids(ids, tokenizer) for ids in value):
        kinds = f"a string, token ids from 0 to {tokenizer.vocab_size - 1}, or a list of either"
        raise ApiError(400, f"prompt must be {kinds}", "prompt")
    hidden = tuple(int(ids[:1] != [tokenizer.bos_id]) for ids in value)
    return [[tokenizer.bos_id] * add + ids for add, ids in zip(hidden, value, strict=True)], hidden


def are_ids(value: Any, tokenizer: Tokenizer) -> bool:
    """Whether a JSON value is a list of token ids."""
    return isinstance(value, list) and all(
        type(i) is int and 0 <= i < tokenizer.vocab_size for i in value
    )

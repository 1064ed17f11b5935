"""Calls of the OpenAI API: what every call has, and the bodies of /v1/completions.

The limits on a single request are here. Extensions: top_k, min_p and repetition_penalty are
sampling settings, as in other servers.
Source: https://platform.openai.com/docs/api-reference (completions).
"""

import re
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from MaxNano.inference.dialogue import MAX_TOKEN_CHARACTERS
from MaxNano.inference.requests import Request
from MaxNano.serving.api_fields import MAX_INTEGER, ApiError, BodyFields
from MaxNano.serving.tool_calls import Tools
from MaxNano.tokenization.tokenizer import Tokenizer

MAX_SAMPLES = 16  # n
MAX_STOPS = 64  # editors send a list per programming language
MAX_STOP_CHARACTERS = 256
MAX_TOP_LOGPROBS = 20
MAX_BIASED_TOKENS = 300
MAX_BIAS = 100
MAX_PENALTY = 2
SMALLEST_TOP_P = 1e-6  # only the most likely token, which is what 0 means


@dataclass(frozen=True)
class ApiRules:
    """The limits of a server, and the defaults of optional fields."""

    model: str
    max_length: int  # tokens of a prompt with its reply
    max_sequences: int  # prompts times samples of one call
    max_tokens: int  # default
    temperature: float  # default
    top_k: int  # default
    trims: bool  # drop the oldest turns of a chat that does not fit, instead of refusing it


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
    tools: Tools | None = None  # that the reply may call
    repeated: Mapping[str, Any] = field(default_factory=dict)  # fields that the reply repeats

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


# ---- Fields that all calls share ----------------------------------------------------------------


def _stop_strings(fields: BodyFields) -> tuple[str, ...]:
    stop = fields.take("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(text, str) for text in stops):
        raise ApiError(400, "stop must be a string or a list of strings", "stop")
    stops = [text for text in stops if text]
    if len(stops) > MAX_STOPS or max(map(len, stops), default=0) > MAX_STOP_CHARACTERS:
        message = f"stop must be at most {MAX_STOPS} strings of {MAX_STOP_CHARACTERS} characters"
        raise ApiError(400, message, "stop")
    return tuple(stops)


def _seed(fields: BodyFields) -> int:
    seed = fields.integer("seed", None, -(1 << 63), (1 << 64) - 1)
    return secrets.randbits(31) if seed in (None, -1) else seed % (1 << 31)


def _logit_bias(fields: BodyFields, tokenizer: Tokenizer) -> tuple[tuple[int, float], ...]:
    """(token, bias) pairs, by token."""
    given = fields.take("logit_bias") or {}  # [] and "" are off too
    if not isinstance(given, dict) or len(given) > MAX_BIASED_TOKENS:
        message = f"logit_bias must be an object of at most {MAX_BIASED_TOKENS} token ids"
        raise ApiError(400, message, "logit_bias")
    biases, values = {}, BodyFields(given, "logit_bias.")
    for name in given:
        is_id = re.fullmatch(r"[0-9]{1,9}", name) and int(name) < tokenizer.vocab_size
        if not is_id:
            message = (
                f"logit_bias has the key {name[:64]!r}, which is no token id from 0 to"
                f" {tokenizer.vocab_size - 1}"
            )
            raise ApiError(400, message, "logit_bias")
        biases[int(name)] = values.number(name, 0.0, -MAX_BIAS, MAX_BIAS)
    return tuple(sorted((token, bias) for token, bias in biases.items() if bias))


def take_model(fields: BodyFields, rules: ApiRules) -> str:
    """The model's name. Raises ApiError if this server does not have it."""
    if fields.text("model", rules.model) != rules.model:
        message = f"the model of this server is {rules.model}"
        raise ApiError(404, message, "model", "model_not_found")
    return rules.model


def take_sampling(fields: BodyFields, tokenizer: Tokenizer, rules: ApiRules) -> dict[str, Any]:
    """The fields of `Request` that all calls share. Values that clients use for "off" are off."""
    top_k = fields.integer("top_k", rules.top_k, -1, 1 << 31)
    return {
        "samples": fields.integer("n", 1, 1, MAX_SAMPLES),
        "temperature": fields.number("temperature", rules.temperature, 0, 2),
        "top_k": max(0, top_k),
        "top_p": max(fields.number("top_p", 1.0, 0, 1), SMALLEST_TOP_P),
        "min_p": fields.number("min_p", 0.0, 0, 1),
        "repetition_penalty": max(0.01, fields.number("repetition_penalty", 1.0, 0, 10) or 1.0),
        "frequency_penalty": fields.number("frequency_penalty", 0.0, -MAX_PENALTY, MAX_PENALTY),
        "presence_penalty": fields.number("presence_penalty", 0.0, -MAX_PENALTY, MAX_PENALTY),
        "logit_bias": _logit_bias(fields, tokenizer),
        "seed": _seed(fields),
        "stop": _stop_strings(fields),
    }


def take_streaming(fields: BodyFields) -> dict[str, bool]:
    """The fields of `ApiCall` that say how the reply is sent."""
    stream, options = fields.flag("stream"), fields.mapping("stream_options")
    if options and not stream:
        raise ApiError(400, "stream_options needs stream=true", "stream_options")
    options = BodyFields(options or {}, "stream_options.")
    options.take("include_obfuscation")  # padding against traffic analysis
    include_usage = options.flag("include_usage")
    options.finish()
    return {"stream": stream, "include_usage": include_usage}


def take_max_tokens(fields: BodyFields, name: str) -> int | None:
    """Requested length of a reply; None, -1 or 0: what the server gives."""
    requested = fields.integer(name, None, -1, MAX_INTEGER)
    return requested if requested and requested > 0 else None


def overflow(tokens: int, rules: ApiRules, param: str) -> ApiError:
    """The error for a prompt of this many tokens, which leaves no room for a reply."""
    # Clients recognize OpenAI's words.
    message = (
        f"this model's maximum context length is {rules.max_length} tokens, but the prompt has"
    )
    message += f" {tokens} and the reply needs at least one: shorten the messages"
    return ApiError(400, message, param, "context_length_exceeded")


def check_size(texts: Collection[str], rules: ApiRules, param: str) -> None:
    """Raise ApiError for texts that cannot fit, before they are encoded."""
    if sum(map(len, texts)) > rules.max_length * MAX_TOKEN_CHARACTERS:
        raise overflow(sum(map(len, texts)) // MAX_TOKEN_CHARACTERS, rules, param)


def check_sequences(call: ApiCall, rules: ApiRules) -> ApiCall:
    """The call. Raises ApiError if it has more sequences than the server takes."""
    if call.sequences > rules.max_sequences:
        message = f"{call.sequences} samples in one call; the limit is {rules.max_sequences}"
        raise ApiError(400, message, "n")
    return call


# ---- Completions --------------------------------------------------------------------------------


def parse_completion(body: Mapping[str, Any], tokenizer: Tokenizer, rules: ApiRules) -> ApiCall:
    """The body of /v1/completions. Raises ApiError for an invalid one."""
    fields = BodyFields(body)
    model = take_model(fields, rules)
    sampling, streaming = take_sampling(fields, tokenizer, rules), take_streaming(fields)
    prompts, hidden = _prompts(fields.take("prompt"), tokenizer, rules)
    requested = fields.integer("max_tokens", None, -1, MAX_INTEGER)
    requested = None if requested == -1 else requested
    echo = fields.flag("echo")
    logprobs = fields.integer("logprobs", None, 0, MAX_TOP_LOGPROBS)
    fields.finish()
    is_scored = echo and logprobs is not None
    least = int(requested != 0 or not is_scored)  # the engine can score without sampling
    longest = max(map(len, prompts))
    room = rules.max_length - longest
    if room < least:
        raise overflow(longest, rules, "prompt")
    max_tokens = min(rules.max_tokens if requested is None else requested, room)
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
        model=model,
        **streaming,
    )
    return check_sequences(call, rules)


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
        check_size(value, rules, "prompt")
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

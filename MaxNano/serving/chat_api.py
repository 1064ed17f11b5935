"""Chats of the OpenAI API: the body of /v1/chat/completions.

Extension: an assistant message's content may be a list of parts
{"type": "text" | "python" | "python_output", "text"}, the calls of the calculator.
Source: https://platform.openai.com/docs/api-reference/chat.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from MaxNano.inference import dialogue
from MaxNano.inference.grammar import Grammar, compile_calls, compile_json
from MaxNano.inference.requests import Request
from MaxNano.serving.api_fields import ApiError, BodyFields
from MaxNano.serving.openai_api import (
    MAX_TOP_LOGPROBS,
    ApiCall,
    ApiRules,
    check_sequences,
    check_size,
    overflow,
    take_max_tokens,
    take_model,
    take_sampling,
    take_streaming,
)
from MaxNano.serving.tool_calls import Tools, render_calls, take_tools
from MaxNano.tokenization.chat_format import PART_TYPES
from MaxNano.tokenization.tokenizer import Tokenizer

MAX_MESSAGES = 500

Message = dict[str, Any]


class ReplySchema(NamedTuple):
    """The JSON schema that a reply must satisfy; None: any object."""

    schema: dict[str, Any] | bool | None
    is_strict: bool  # refuse a schema with keywords that are not supported


class Chat(NamedTuple):
    """What a body asks for, apart from sampling."""

    messages: list[Message]
    requested: int | None  # tokens of the reply
    tools: Tools | None = None
    schema: ReplySchema | None = None  # None: the reply is free
    logprobs: int | None = None
    repeated: Mapping[str, Any] = {}  # fields that the reply repeats


def parse_chat(body: Mapping[str, Any], tokenizer: Tokenizer, rules: ApiRules) -> ApiCall:
    """The body of /v1/chat/completions. Raises ApiError for an invalid one."""
    fields = BodyFields(body)
    messages = take_messages(fields)
    requested = take_max_tokens(fields, "max_tokens")
    requested = take_max_tokens(fields, "max_completion_tokens") or requested
    tools, schema = take_tools(fields), take_schema(fields, "response_format")
    logprobs = fields.flag("logprobs")
    top = fields.integer("top_logprobs", 0, 0, MAX_TOP_LOGPROBS)
    if top and not logprobs:
        raise ApiError(400, "top_logprobs needs logprobs=true", "top_logprobs")
    chat = Chat(messages, requested, tools, schema, top if logprobs else None)
    return make_call(chat, fields, tokenizer, rules)


def make_call(chat: Chat, fields: BodyFields, tokenizer: Tokenizer, rules: ApiRules) -> ApiCall:
    """The call for the reply to a chat; `fields` has the rest of the body."""
    model = take_model(fields, rules)
    sampling, streaming = take_sampling(fields, tokenizer, rules), take_streaming(fields)
    fields.finish()
    ids = fit_prompt(chat, tokenizer, rules)
    max_tokens = min(chat.requested or rules.max_tokens, rules.max_length - len(ids))
    grammar = _compile(chat, tokenizer)
    request = Request(
        prompt=tuple(ids),
        max_tokens=max_tokens,
        stop_ids=frozenset({tokenizer.special.assistant_end, tokenizer.special.bos}),
        logprobs=chat.logprobs,
        tools=grammar is None,
        grammar=grammar,
        **sampling,
    )
    call = ApiCall(
        is_chat=True,
        requests=(request,),
        hidden=(0,),
        max_tokens=max_tokens,
        echo=False,
        model=model,
        tools=chat.tools,
        repeated=chat.repeated,
        **streaming,
    )
    return check_sequences(call, rules)


# ---- Messages -----------------------------------------------------------------------------------


def take_messages(fields: BodyFields) -> list[Message]:
    """The field messages, as tokenization/chat_format.py takes them."""
    value = fields.take("messages")
    if not isinstance(value, list) or not value:
        raise ApiError(400, "messages must be a list of at least one message", "messages")
    return read_messages(value, "messages")


def read_messages(value: Sequence[Any], param: str) -> list[Message]:
    """Messages of roles system, user and assistant. A tool's result is on the user's side."""
    if len(value) > MAX_MESSAGES:
        message = f"there are {len(value)} messages; the limit is {MAX_MESSAGES}"
        raise ApiError(400, message, param)
    names: dict[str, str] = {}  # of the called functions, by id of the call
    return [_message(message, f"{param}[{index}]", names) for index, message in enumerate(value)]


def _message(message: Any, path: str, names: dict[str, str]) -> Message:
    if not isinstance(message, dict):
        raise ApiError(400, f'{path} must be {{"role": ..., "content": ...}}', path)
    role, content = message.get("role"), message.get("content")
    if role in ("tool", "function"):
        called = message.get("name") or names.get(str(message.get("tool_call_id"))) or "the tool"
        text = _content("" if content is None else content, f"{path}.content", ("text",))
        return {"role": "user", "content": f"Result of {called}: {text}"}
    role = "system" if role == "developer" else role
    if role not in ("system", "user", "assistant"):
        problem = "must be system, developer, user, assistant or tool"
        raise ApiError(400, f"{path}.role {problem}", f"{path}.role")
    if role != "assistant":
        return {"role": role, "content": _content(content, f"{path}.content", ("text",))}
    content = _content("" if content is None else content, f"{path}.content", PART_TYPES)
    calls = render_calls(message, path)
    names.update((call.id, call.name) for call in calls)
    return {"role": role, "content": _append(content, [call.text for call in calls])}


def _append(content: str | list[dict[str, str]], lines: Sequence[str]) -> str | list[Any]:
    if not lines:
        return content
    if isinstance(content, str):
        return "\n".join([content, *lines] if content else lines)
    return [*content, *({"type": "text", "text": line} for line in lines)]


def _content(content: Any, path: str, kinds: Sequence[str]) -> str | list[dict[str, str]]:
    """A text, or a list of parts if they are of several kinds."""
    if isinstance(content, str):
        return content
    parts = [_part(part) for part in content] if isinstance(content, list) else [None]
    if not all(part and part["type"] in kinds for part in parts):
        problem = f"must be a string, or a list of parts of type {' or '.join(kinds)}"
        raise ApiError(400, f"{path} {problem}", path)
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


def _part(part: Any) -> dict[str, str] | None:
    """{"type", "text"} of a part of a content, None if it has no text."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("refusal" if kind == "refusal" else "text") if isinstance(kind, str) else None
    if not isinstance(text, str):
        return None
    # The other names are those of /v1/responses.
    is_text = kind in ("refusal", "input_text", "output_text")
    return {"type": "text" if is_text else kind, "text": text}


# ---- Prompts that fit ---------------------------------------------------------------------------


def fit_prompt(chat: Chat, tokenizer: Tokenizer, rules: ApiRules) -> list[int]:
    """Token ids of the prompt for the reply. Raises ApiError if it does not fit into the context.

    The tools are described after the first system messages, unless there is no space for that.
    """
    if chat.tools:
        count = len(chat.messages)
        is_system = [message["role"] == "system" for message in chat.messages]
        start = is_system.index(False) if False in is_system else count
        described = list(chat.messages)
        described.insert(start, {"role": "system", "content": chat.tools.describe()})
        try:
            return _fit(described, chat.requested, tokenizer, rules)
        except ApiError:
            pass
    return _fit(chat.messages, chat.requested, tokenizer, rules)


def _fit(
    messages: Sequence[Message], requested: int | None, tokenizer: Tokenizer, rules: ApiRules
) -> list[int]:
    longest = rules.max_length - 1
    if not rules.trims:
        check_size([dialogue.text_of(message) for message in messages], rules, "messages")
        ids = dialogue.prompt_ids(tokenizer, messages)
        if len(ids) > longest:
            raise overflow(len(ids), rules, "messages")
        return ids
    # Turns are dropped for a reply of a quarter of the context; a last turn that is longer is kept.
    reply = min(requested or rules.max_tokens, rules.max_length // 4)
    for limit in (rules.max_length - reply, longest):
        try:
            return dialogue.trim(tokenizer, messages, limit)[1]
        except dialogue.TooLongError as error:
            tokens = error.tokens
    raise overflow(tokens, rules, "messages")


# ---- Grammars -----------------------------------------------------------------------------------


def take_schema(fields: BodyFields, name: str) -> ReplySchema | None:
    """The field response_format, or text.format of /v1/responses."""
    given = fields.mapping(name)
    kind = given.get("type") if given else "text"
    if kind == "text":
        return None
    if kind == "json_object":
        return ReplySchema(None, is_strict=False)
    if kind != "json_schema":
        raise fields.refusal(name, "must be of type text, json_object or json_schema")
    holder = given.get("json_schema", given)  # /v1/responses has the schema one level higher
    schema = holder.get("schema") if isinstance(holder, dict) else None
    if not isinstance(schema, (dict, bool)):
        raise fields.refusal(name, "of type json_schema needs a JSON schema in the field schema")
    return ReplySchema(schema, is_strict=holder.get("strict") is True)


def _compile(chat: Chat, tokenizer: Tokenizer) -> Grammar | None:
    """The grammar of the reply: of calls, of the response format, or of either."""
    tools, asked = chat.tools, chat.schema
    if asked is None and not (tools and tools.is_forced):
        return None
    param = "tools" if tools else "response_format"
    try:
        if not tools:
            return compile_json(asked.schema, tokenizer, lenient=not asked.is_strict)
        reply = None
        if not tools.is_forced:
            reply = {"type": "object"} if asked.schema is None else asked.schema
        return compile_calls(tools.schema(), tools.max_calls, reply, tokenizer)
    except ValueError as error:
        raise ApiError(400, f"{param}: {error}", param) from None

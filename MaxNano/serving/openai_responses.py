"""Calls of the OpenAI API's /v1/responses: bodies, whole replies and events of a stream.

Nothing is stored: a body has all messages of the conversation.
Source: https://platform.openai.com/docs/api-reference/responses.
"""

import dataclasses
import itertools
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from MaxNano.serving.api_fields import ApiError, BodyFields
from MaxNano.serving.chat_api import Chat, Message, make_call, read_messages, take_schema
from MaxNano.serving.openai_api import ApiCall, ApiRules, take_max_tokens
from MaxNano.serving.openai_replies import ReplyChoice, ReplyDelta
from MaxNano.serving.tool_calls import take_tools
from MaxNano.tokenization.tokenizer import Tokenizer

SILENT_ITEMS = ("reasoning",)  # items of an input without a text for the model


def parse_response(body: Mapping[str, Any], tokenizer: Tokenizer, rules: ApiRules) -> ApiCall:
    """The body of /v1/responses. Raises ApiError for an invalid one."""
    fields = BodyFields(body)
    instructions = fields.text("instructions")
    messages = _messages(fields.take("input"))
    if instructions:
        messages.insert(0, {"role": "system", "content": instructions})
    requested = take_max_tokens(fields, "max_output_tokens")
    text = fields.mapping("text") or {}
    options = BodyFields(text, "text.")
    schema = take_schema(options, "format")
    options.finish()
    truncation = fields.text("truncation", "auto" if rules.trims else "disabled")
    if truncation not in ("auto", "disabled"):
        raise fields.refusal("truncation", "must be auto or disabled")
    tools = take_tools(fields)
    if fields.take("n", 1) != 1 or fields.integer("top_logprobs", 0, 0, 20):
        message = "n and top_logprobs are not supported by /v1/responses"
        raise ApiError(400, message, "n", "unsupported_parameter")
    fields.take("include")
    repeated = {
        "instructions": instructions,
        "max_output_tokens": requested,
        "text": {"format": {"type": "text"}} | text,
        "truncation": truncation,
        "metadata": body.get("metadata") or {},
        "tools": body.get("tools") or [],
        "tool_choice": body.get("tool_choice") or "auto",
        "parallel_tool_calls": tools is None or tools.max_calls > 1,
    }
    chat = Chat(messages, requested, tools, schema, repeated=repeated)
    rules = dataclasses.replace(rules, trims=truncation == "auto")
    return make_call(chat, fields, tokenizer, rules)


def _messages(given: Any) -> list[Message]:
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise ApiError(400, "input must be a string or a list of at least one item", "input")
    messages: list[Any] = []
    before = None
    for item in given:
        kind = _type_of(item)
        if kind in SILENT_ITEMS:
            continue
        message = _chat_message(item)
        if kind == before == "function_call":  # of one reply
            messages[-1]["tool_calls"] += message["tool_calls"]
        else:
            messages.append(message)
        before = kind
    return read_messages(messages, "input")


def _type_of(item: Any) -> Any:
    return item.get("type", "message") if isinstance(item, dict) else None


def _chat_message(item: Any) -> Any:
    """An item of the input as a message of a chat."""
    kind = _type_of(item)
    if kind == "function_call":
        return {"role": "assistant", "tool_calls": [{"id": item.get("call_id"), "function": item}]}
    if kind == "function_call_output":
        called = item.get("call_id")
        return {"role": "tool", "tool_call_id": called, "content": item.get("output")}
    if kind != "message":
        message = "an item of input must be a message, function_call or function_call_output"
        raise ApiError(400, message, "input")
    return item


class ResponseObjects:
    """The JSON objects of a reply: `whole`, or `opening`, `chunks` of each delta and `closing`."""

    end = b""  # of a stream

    def __init__(self, call: ApiCall, tokenizer: Tokenizer):
        self.call = call
        self._id = "resp_" + secrets.token_hex(12)
        self._created = int(time.time())
        self._numbers = itertools.count()  # of the stream's events
        self._output: list[dict[str, Any]] = []  # items; the last one is open

    def whole(self, choices: Sequence[ReplyChoice]) -> dict[str, Any]:
        """The reply that is not streamed."""
        self.chunks(choices[0].all)
        return self.closing(choices)[-1]["response"]

    def opening(self) -> list[dict[str, Any]]:
        """Events before the first token."""
        begun = {"response": self._response("in_progress")}
        kinds = ("response.created", "response.in_progress")
        return [self._event(kind, **begun) for kind in kinds]

    def chunks(self, delta: ReplyDelta) -> list[dict[str, Any]]:
        """Events of a delta; none if it has no text and no calls."""
        events = []
        text = "".join(part.text for part in delta.parts if part.kind == "text")
        if text:
            events += self._add_text(text)
        for call in delta.calls:
            if call.id is not None:
                item = {"id": "fc_" + secrets.token_hex(12), "type": "function_call"}
                item |= {"call_id": call.id, "name": call.name, "arguments": ""}
                events += self._open(item)
            if call.arguments:
                self._output[-1]["arguments"] += call.arguments
                kind = "response.function_call_arguments.delta"
                events.append(self._event(kind, **self._where(), delta=call.arguments))
        return events

    def closing(self, choices: Sequence[ReplyChoice]) -> list[dict[str, Any]]:
        """Events after the last token."""
        [choice] = choices
        is_complete = choice.finish in ("stop", "tool_calls")
        status = "completed" if is_complete else "incomplete"
        events = [] if self._output else self._add_text("")
        events += self._close(status)
        prompt, completion = len(self.call.requests[0].prompt), choice.completion_tokens
        response = self._response(status) | {
            "incomplete_details": None if is_complete else {"reason": "max_output_tokens"},
            "usage": {
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": completion,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": prompt + completion,
            },
        }
        return [*events, self._event(f"response.{status}", response=response)]

    def failure(self, error: ApiError) -> dict[str, Any]:
        """The event for an error after the first token."""
        code = error.code or "server_error"
        return self._event("error", code=code, message=error.message, param=error.param)

    def _add_text(self, text: str) -> list[dict[str, Any]]:
        """Events of more text of the message, which the first text opens."""
        events = []
        if not self._output:
            item = {"id": "msg_" + secrets.token_hex(12), "type": "message", "role": "assistant"}
            events = self._open(item | {"content": []})
            self._output[-1]["content"] = [_part("")]
            kind = "response.content_part.added"
            events.append(self._event(kind, **self._where(0), part=_part("")))
        if text:
            self._output[-1]["content"][0]["text"] += text
            kind = "response.output_text.delta"
            events.append(self._event(kind, **self._where(0), delta=text, logprobs=[]))
        return events

    def _open(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        """Events of a new item of the output, which ends the one before."""
        events = self._close("completed") if self._output else []
        self._output.append(item | {"status": "in_progress"})
        added = {"output_index": len(self._output) - 1, "item": dict(self._output[-1])}
        return [*events, self._event("response.output_item.added", **added)]

    def _close(self, status: str) -> list[dict[str, Any]]:
        """Events of the end of the last item."""
        item = self._output[-1]
        item["status"] = status
        if item["type"] == "message":
            [part] = item["content"]
            text = {"text": part["text"], "logprobs": []}
            events = [
                self._event("response.output_text.done", **self._where(0), **text),
                self._event("response.content_part.done", **self._where(0), part=part),
            ]
        else:
            done = {"name": item["name"], "arguments": item["arguments"]}
            kind = "response.function_call_arguments.done"
            events = [self._event(kind, **self._where(), **done)]
        index = len(self._output) - 1
        return [*events, self._event("response.output_item.done", output_index=index, item=item)]

    def _where(self, content_index: int | None = None) -> dict[str, Any]:
        """Fields of an event that say which item it is about, and which part of its content."""
        where = {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}
        return where if content_index is None else where | {"content_index": content_index}

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        return {"type": kind, "sequence_number": next(self._numbers)} | fields

    def _response(self, status: str) -> dict[str, Any]:
        request = self.call.requests[0]
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "model": self.call.model,
            "output": list(self._output),
            "error": None,
            "incomplete_details": None,
            "previous_response_id": None,
            "store": False,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "usage": None,
            **self.call.repeated,
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

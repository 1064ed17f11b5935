"""Calls of the OpenAI API's /v1/responses, for texts: bodies, whole replies and events of a stream.

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
    tools, choice = fields.take("tools"), fields.take("tool_choice")
    if tools and choice != "none":
        message = "tools are not supported by /v1/responses; /v1/chat/completions has them"
        raise ApiError(400, message, "tools", "unsupported_parameter")
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
    }
    chat = Chat(messages, requested, schema=schema, repeated=repeated)
    rules = dataclasses.replace(rules, trims=truncation == "auto")
    return make_call(chat, fields, tokenizer, rules)


def _messages(given: Any) -> list[Message]:
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise ApiError(400, "input must be a string or a list of at least one item", "input")
    items = [item for item in given if _type_of(item) not in SILENT_ITEMS]
    return read_messages(list(map(_chat_message, items)), "input")


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
        self._item_id = "msg_" + secrets.token_hex(12)
        self._created = int(time.time())
        self._numbers = itertools.count()  # of the stream's events
        self._where = {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    def whole(self, choices: Sequence[ReplyChoice]) -> dict[str, Any]:
        """The reply that is not streamed."""
        [choice] = choices
        is_complete = choice.finish == "stop"
        status = "completed" if is_complete else "incomplete"
        prompt, completion = len(self.call.requests[0].prompt), choice.completion_tokens
        return self._response(status, [self._item(status, [_part(_text(choice.parts))])]) | {
            "incomplete_details": None if is_complete else {"reason": "max_output_tokens"},
            "usage": {
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": completion,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": prompt + completion,
            },
        }

    def opening(self) -> list[dict[str, Any]]:
        """Events before the first token."""
        begun = {"response": self._response("in_progress", [])}
        item = self._item("in_progress", [])
        return [
            self._event("response.created", **begun),
            self._event("response.in_progress", **begun),
            self._event("response.output_item.added", output_index=0, item=item),
            self._event("response.content_part.added", **self._where, part=_part("")),
        ]

    def chunks(self, delta: ReplyDelta) -> list[dict[str, Any]]:
        """Events of a delta; none if it has no text."""
        text = _text(delta.parts)
        if not text:
            return []
        kind = "response.output_text.delta"
        return [self._event(kind, **self._where, delta=text, logprobs=[])]

    def closing(self, choices: Sequence[ReplyChoice]) -> list[dict[str, Any]]:
        """Events after the last token."""
        response, text = self.whole(choices), _text(choices[0].parts)
        [item] = response["output"]
        return [
            self._event("response.output_text.done", **self._where, text=text, logprobs=[]),
            self._event("response.content_part.done", **self._where, part=_part(text)),
            self._event("response.output_item.done", output_index=0, item=item),
            self._event(f"response.{response['status']}", response=response),
        ]

    def failure(self, error: ApiError) -> dict[str, Any]:
        """The event for an error after the first token."""
        code = error.code or "server_error"
        return self._event("error", code=code, message=error.message, param=error.param)

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        return {"type": kind, "sequence_number": next(self._numbers)} | fields

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        item = {"id": self._item_id, "type": "message", "role": "assistant"}
        return item | {"status": status, "content": content}

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        request = self.call.requests[0]
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "model": self.call.model,
            "output": output,
            "error": None,
            "incomplete_details": None,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": request.temperature,
            "tool_choice": "none",
            "tools": [],
            "top_p": request.top_p,
            "usage": None,
            **self.call.repeated,
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _text(parts: Sequence[Any]) -> str:
    return "".join(part.text for part in parts if part.kind == "text")

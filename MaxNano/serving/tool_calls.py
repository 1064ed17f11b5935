"""Tools of the OpenAI API: their description in the prompt, and tool calls in a reply.

A call is the JSON object {"name": ..., "arguments": {...}}; a reply has text or calls, one per line.
With tool_choice "required" or a function's name, a grammar makes any model write calls. With "auto"
the reply is free, and is calls if it has nothing else than such objects with names of tools. With a
function's name, or without parallel_tool_calls, a reply has at most one call.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from MaxNano.inference.dialogue import ReplyPart
from MaxNano.serving.api_fields import ApiError, BodyFields

MAX_TOOLS = 128
MAX_CALLS = 16  # in a reply
MAX_NAME_CHARACTERS = 128
MAX_DESCRIPTION_CHARACTERS = 200  # of a tool, in the prompt

_CALL_BEGINS = '{"name":'
_CALL_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')


class Function(NamedTuple):
    """A tool that the model may call."""

    name: str
    description: str
    parameters: Mapping[str, Any]  # JSON schema of the arguments


class RenderedCall(NamedTuple):
    """A call in an assistant's message, as the model writes it."""

    id: str
    name: str
    text: str


class CallDelta(NamedTuple):
    """The beginning of a call, with its id and name, or more text of its arguments."""

    index: int  # of the call in the reply
    id: str | None
    name: str | None
    arguments: str


@dataclass(frozen=True)
class Tools:
    """The tools of a call, whether the reply must call one, and how many calls it may have."""

    functions: tuple[Function, ...]
    is_forced: bool
    max_calls: int = MAX_CALLS

    def schema(self) -> dict[str, Any]:
        """The JSON schema of a call."""
        return {"anyOf": [_call_schema(each, index) for index, each in enumerate(self.functions)]}

    def describe(self) -> str:
        """The description of the tools in the prompt."""
        lines = [_signature(function) for function in self.functions]
        asked = "Call a tool" if self.is_forced else "To call a tool, reply"
        call = '{"name": "...", "arguments": {...}}'
        several = ", a line per call" if self.max_calls > 1 else ""
        return "\n".join(["Tools:", *lines, f"{asked} with only this JSON{several}: {call}"])


def _call_schema(function: Function, index: int) -> dict[str, Any]:
    path = f"#/anyOf/{index}/properties/arguments"
    arguments = move_references(function.parameters, path)
    if "properties" in arguments:
        # A model that does not know when to stop invents arguments.
        arguments = {"additionalProperties": False} | arguments
    return {
        "type": "object",
        "properties": {
            "name": {"const": function.name},
            "arguments": {"type": "object"} | arguments,
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def move_references(schema: Any, path: str) -> Any:
    """A JSON schema whose local references are right when it is at `path` of a larger one."""
    if isinstance(schema, list):
        return [move_references(child, path) for child in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {name: move_references(child, path) for name, child in schema.items()}
    target = schema.get("$ref")
    if isinstance(target, str) and re.match(r"#(/|$)", target):
        moved["$ref"] = path + target[1:]
    return moved


def _signature(function: Function) -> str:
    properties = function.parameters.get("properties")
    required = function.parameters.get("required")
    arguments = []
    for name, schema in properties.items() if isinstance(properties, dict) else ():
        kind = schema.get("type") if isinstance(schema, dict) else None
        optional = "" if isinstance(required, list) and name in required else "?"
        arguments.append(f"{name}{optional}" + (f": {kind}" if isinstance(kind, str) else ""))
    description = " ".join(function.description.split())[:MAX_DESCRIPTION_CHARACTERS]
    line = f"- {function.name}({', '.join(arguments)})"
    return f"{line}: {description}" if description else line


# ---- Fields of a body ---------------------------------------------------------------------------


def take_tools(fields: BodyFields) -> Tools | None:
    """The fields tools, tool_choice and parallel_tool_calls; None if the reply may not call a tool.

    A tool has its function in a field, as in chats, or is the function, as in /v1/responses.
    """
    given, choice = fields.take("tools") or [], fields.take("tool_choice") or "auto"
    max_calls = MAX_CALLS if fields.flag("parallel_tool_calls", True) else 1
    if choice == "none":
        return None
    if not isinstance(given, list) or len(given) > MAX_TOOLS:
        raise ApiError(400, f"tools must be a list of at most {MAX_TOOLS} tools", "tools")
    functions = tuple(_function(tool, f"tools[{index}]") for index, tool in enumerate(given))
    if choice == "auto":
        return Tools(functions, False, max_calls) if functions else None
    if not functions:
        raise ApiError(400, "tool_choice needs tools", "tool_choice")
    if choice in ("required", "any"):
        return Tools(functions, True, max_calls)
    name = _chosen_name(choice)
    chosen = tuple(function for function in functions if function.name == name)
    if not chosen:
        message = "tool_choice must be none, auto, required or the function of one of the tools"
        raise ApiError(400, message, "tool_choice")
    return Tools(chosen[:1], True, max_calls=1)


def _chosen_name(choice: Any) -> Any:
    if not isinstance(choice, dict) or choice.get("type") != "function":
        return None
    function = choice.get("function", choice)
    return function.get("name") if isinstance(function, dict) else None


def _function(tool: Any, path: str) -> Function:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if not isinstance(kind, str):
        raise ApiError(400, f"{path} must be a tool of type function", path)
    if kind != "function":
        message = f"{path} is of type {kind[:64]}, but this server has only tools of type function"
        raise ApiError(400, message, "tools", "unsupported_parameter")
    function = tool
    if "function" in tool or "name" not in tool:
        path = f"{path}.function"
        function = tool.get("function")
    if not isinstance(function, dict):
        raise ApiError(400, f"{path} must be an object", path)
    fields = BodyFields(function, f"{path}.")
    name = fields.text("name")
    if not name or len(name) > MAX_NAME_CHARACTERS or not name.isprintable():
        problem = f"must be a name of 1 to {MAX_NAME_CHARACTERS} characters"
        raise fields.refusal("name", problem)
    parameters = fields.mapping("parameters") or {}
    if parameters.get("type", "object") != "object":
        raise fields.refusal("parameters", "must be the JSON schema of an object")
    return Function(name, fields.text("description", "") or "", parameters)


# ---- Messages -----------------------------------------------------------------------------------


def render_calls(message: Mapping[str, Any], path: str) -> list[RenderedCall]:
    """The calls in an assistant's message. Raises ApiError for a malformed one."""
    calls = message.get("tool_calls") or []
    if message.get("function_call"):  # the older form
        calls = [{"function": message["function_call"]}]
    if not isinstance(calls, list):
        raise ApiError(400, f"{path}.tool_calls must be a list", f"{path}.tool_calls")
    return [_render_call(call, f"{path}.tool_calls[{i}]") for i, call in enumerate(calls)]


def _render_call(call: Any, path: str) -> RenderedCall:
    function = call.get("function") if isinstance(call, dict) else None
    function = function if isinstance(function, dict) else {}
    name, arguments = function.get("name"), function.get("arguments") or "{}"
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if not isinstance(name, str) or not isinstance(arguments, str):
        raise ApiError(400, f"{path} must have a function with name and arguments", path)
    text = f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": {arguments}}}'
    return RenderedCall(str(call.get("id")), name, text)


# ---- Replies ------------------------------------------------------------------------------------


class ToolCallReader:
    """Finds the calls in the text of a reply while it is generated."""

    def __init__(self, tools: Tools):
        self._tools = tools
        self._names = {function.name for function in tools.functions}
        self._is_text = False
        self._count = 0  # calls that have begun
        self._held = ""  # may be the beginning of a call
        self._arguments: ArgumentScanner | None = None  # of the call that was begun last

    @property
    def has_call(self) -> bool:
        """Whether a call has begun."""
        return self._count > 0

    def feed(
        self, parts: Sequence[ReplyPart], is_final: bool
    ) -> tuple[list[ReplyPart], list[CallDelta]]:
        """More of a reply: (parts that are not of a call, parts of calls)."""
        if self._is_text:
            return list(parts), []
        text = "".join(part.text for part in parts)
        self._held += text
        if self._tools.is_forced:
            return [], self._scan()
        if any(part.kind != "text" for part in parts) or not _may_begin_call(self._held):
            self._is_text = True
            before = ReplyPart("text", self._held[: len(self._held) - len(text)])
            return [part for part in (before, *parts) if part.text], []
        if not is_final:
            return [], []
        calls = self._whole_calls()
        if not calls:
            return [ReplyPart("text", self._held)] if self._held else [], []
        return [], calls

    def _whole_calls(self) -> list[CallDelta]:
        """The held text as calls; none unless all of it is calls."""
        calls, rest = [], self._held.strip()
        while rest:
            try:
                call, end = json.JSONDecoder().raw_decode(rest)
            except (ValueError, RecursionError):
                return []
            rest = rest[end:].lstrip()
            if not isinstance(call, dict) or call.keys() != {"name", "arguments"}:
                return []
            name, arguments = call["name"], call["arguments"]
            is_call = isinstance(name, str) and name in self._names and isinstance(arguments, dict)
            if not is_call:
                return []
            calls.append((name, json.dumps(arguments, ensure_ascii=False)))
        deltas = []
        for name, arguments in calls[: self._tools.max_calls]:
            deltas += [self._open(name), CallDelta(self._count - 1, None, None, arguments)]
        return deltas

    def _open(self, name: str) -> CallDelta:
        self._count += 1
        return CallDelta(self._count - 1, f"call_{secrets.token_hex(12)}", name, "")

    def _scan(self) -> list[CallDelta]:
        """The calls in the held text, which follows a grammar, and in what comes after it."""
        deltas = []
        while self._held:
            if self._arguments is None:
                head = _CALL_HEAD.match(self._held)
                if not head:
                    break
                deltas.append(self._open(json.loads(head[1])))
                self._held = self._held[head.end() :]
                self._arguments = ArgumentScanner()
            arguments = self._arguments.feed(self._held)
            self._held = self._held[len(arguments) :]
            if arguments:
                deltas.append(CallDelta(self._count - 1, None, None, arguments))
            if self._arguments.is_over:  # the end of the call itself comes before the next one
                _, brace, rest = self._held.partition("}")
                if not brace:
                    break
                self._held, self._arguments = rest, None
        return deltas


def _may_begin_call(text: str) -> bool:
    compact = re.sub(r"\s", "", text[:1000])
    return compact.startswith(_CALL_BEGINS) or _CALL_BEGINS.startswith(compact)


class ArgumentScanner:
    """Returns text up to the end of the JSON object that it begins with."""

    def __init__(self):
        self.is_over = False
        self._depth = 0
        self._in_string = False
        self._is_escaped = False

    def feed(self, text: str) -> str:
        """The part of more text that belongs to the object."""
        if self.is_over:
            return ""
        for index, character in enumerate(text):
            self._step(character)
            if self.is_over:
                return text[: index + 1]
        return text

    def _step(self, character: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif self._in_string:
            self._is_escaped = character == "\\"
            self._in_string = character != '"'
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            self.is_over = self._depth == 0

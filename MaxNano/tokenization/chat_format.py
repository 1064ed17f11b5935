"""The chat format: conversations as token ids with their training mask.

A conversation is {"messages": [{"role", "content"}, ...]} with roles system, user and assistant.
Content is a text or a list of parts {"type", "text"}: of type text, and for the assistant also
python (a tool call) or python_output (the tool's output). The assistant is trained on its text, its
tool calls and the end of its message, not on tool output.

The model only knows turns of two sides. One rule makes them of any order of messages: a system
message is on the user's side, and consecutive messages of one side are one turn, joined by a blank
line. A conversation may therefore begin with the assistant. interop/templates/chat_template.jinja
has the same rule.
Source: nanochat/tokenizer.py@92d63d4, render_conversation, which takes one system message before
the user's first and strictly alternating turns, and renders them the same.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

PART_TYPES = ("text", "python", "python_output")
JOINT = "\n\n"  # between consecutive messages of one side


def render(
    conversation: Mapping[str, Any], encode: Callable[[str], list[int]], special: Any
) -> tuple[list[int], list[int]]:
    """(ids, mask) of a conversation; mask is 1 for the tokens that the assistant is trained on.

    special: tokenizer.SpecialIds. Raises ValueError for a malformed conversation.
    """
    ids, mask = [special.bos], [0]

    def add(new_ids: Sequence[int], trained: int) -> None:
        ids.extend(new_ids)
        mask.extend([trained] * len(new_ids))

    for role, content in turns(conversation):
        if role == "user":
            add([special.user_start, *encode(content), special.user_end], 0)
            continue
        add([special.assistant_start], 0)
        for kind, text in content:
            if kind == "python":
                add([special.python_start, *encode(text), special.python_end], 1)
            elif kind == "python_output":
                add([special.output_start, *encode(text), special.output_end], 0)
            else:
                add(encode(text), 1)
        add([special.assistant_end], 1)
    return ids, mask


def without_answer(conversation: Mapping[str, Any]) -> dict[str, Any]:
    """The conversation without its last message. Raises ValueError if that is not the assistant's,
    or the one before it is too.
    """
    messages = _messages(conversation)
    roles = [_role(message, index) for index, message in enumerate(messages)]
    if roles[-1] != "assistant" or roles[-2:-1] == ["assistant"]:
        raise ValueError("the last message must be from the assistant, to be completed")
    return {"messages": messages[:-1]}


def _messages(conversation: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    messages = conversation.get("messages") if isinstance(conversation, Mapping) else None
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError('a conversation must be {"messages": [...]} with at least one message')
    return messages


def _role(message: Mapping[str, Any], index: int) -> str:
    keys = message.keys() if isinstance(message, Mapping) else ()
    missing = [repr(key) for key in ("role", "content") if key not in keys]
    if missing:
        raise ValueError(
            f'message {index + 1} must be {{"role": ..., "content": ...}}; it has no '
            + " and no ".join(missing)
        )
    return message["role"]


def turns(conversation: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(side, content) of each turn, user and assistant alternately: a text of the user, a list of
    (type, text) parts of the assistant.

    Raises ValueError for a malformed conversation.
    """
    turns: list[tuple[str, list[tuple[str, str]]]] = []
    for index, message in enumerate(_messages(conversation)):
        role = _role(message, index)
        side = "user" if role == "system" else role
        if side not in ("user", "assistant"):
            raise ValueError(
                f"message {index + 1} is from {role!r} but must be from 'system', 'user' or 'assistant'"
            )
        types = PART_TYPES if side == "assistant" else PART_TYPES[:1]
        parts = _parts(message["content"], f"the content of message {index + 1}", types)
        if turns and turns[-1][0] == side:
            _join(turns[-1][1], parts)
        else:
            turns.append((side, parts))
    return [
        (side, parts if side == "assistant" else "".join(text for _, text in parts))
        for side, parts in turns
    ]


def _parts(content: Any, what: str, types: Sequence[str]) -> list[tuple[str, str]]:
    """The (type, text) parts of a message's content."""
    if isinstance(content, (list, tuple)):
        return [_part(part, what, types) for part in content]
    return [("text", _text(content, what))]


def _part(part: Any, what: str, types: Sequence[str]) -> tuple[str, str]:
    if not isinstance(part, Mapping) or part.get("type") not in types:
        raise ValueError(
            f'{what}: each part must be {{"type", "text"}} of a type {", ".join(types)}'
        )
    return part["type"], _text(part.get("text"), f"{what}: the text of a part")


def _text(content: Any, what: str) -> str:
    if not isinstance(content, str):
        raise ValueError(f"{what} must be a text, not {type(content).__name__}")
    return content


def _join(parts: list[tuple[str, str]], following: Sequence[tuple[str, str]]) -> None:
    """Append the parts of the next message of the same side; texts that meet become one."""
    text, rest = JOINT, list(following)
    if rest and rest[0][0] == "text":
        text += rest.pop(0)[1]
    if parts and parts[-1][0] == "text":
        text = parts.pop()[1] + text
    parts += [("text", text), *rest]

"""The chat format: conversations as token ids with their training mask.

A conversation is {"messages": [{"role", "content"}, ...]}: an optional system message, which is
joined to the first user message, then user and assistant in turn. Content is a text; the
assistant's may also be a list of parts {"type", "text"} of type text, python (a tool call) or
python_output (the tool's output). The assistant is trained on its text, its tool calls and the end
of its message, not on tool output.
Source: nanochat/tokenizer.py@92d63d4, render_conversation.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

PART_TYPES = ("text", "python", "python_output")


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
    """The conversation without its last message. Raises ValueError if that is not the assistant's."""
    messages = _messages(conversation)
    if _role(messages[-1], len(messages) - 1) != "assistant":
        raise ValueError("the last message must be from the assistant, to be completed")
    return {"messages": messages[:-1]}


def _messages(conversation: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    messages = conversation.get("messages") if isinstance(conversation, Mapping) else None
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError('a conversation must be {"messages": [...]} with at least one message')
    return messages


def _role(message: Mapping[str, Any], index: int) -> str:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise ValueError(f'message {index} must be {{"role": ..., "content": ...}}')
    return message["role"]


def _text(content: Any, what: str) -> str:
    if not isinstance(content, str):
        raise ValueError(f"{what} must be a text, not {type(content).__name__}")
    return content


def turns(conversation: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(role, content) of each turn; the assistant's content is a list of (type, text) parts.

    Raises ValueError for a malformed conversation.
    """
    messages = _messages(conversation)
    system = []
    if _role(messages[0], 0) == "system":
        system = [_text(messages[0]["content"], "the content of message 0")]
        messages = messages[1:]
        if not messages:
            raise ValueError("the system message must be followed by a user message")
    checked: list[tuple[str, Any]] = []
    for turn, message in enumerate(messages):
        index = turn + len(system)
        role, expected = _role(message, index), ("user", "assistant")[turn % 2]
        if role != expected:
            raise ValueError(f"message {index} is from {role!r} but must be from {expected!r}")
        what, content = f"the content of message {index}", message["content"]
        if role == "user":
            text = _text(content, what)
            checked.append((role, "\n\n".join([*system, text]) if turn == 0 else text))
        elif isinstance(content, (list, tuple)):
            checked.append((role, [_part(part, what) for part in content]))
        else:
            checked.append((role, [("text", _text(content, what))]))
    return checked


def _part(part: Mapping[str, Any], what: str) -> tuple[str, str]:
    if not isinstance(part, Mapping) or part.get("type") not in PART_TYPES:
        types = ", ".join(PART_TYPES)
        raise ValueError(f'{what}: each part must be {{"type", "text"}} of a type {types}')
    return part["type"], _text(part.get("text"), f"{what}: the text of a part")

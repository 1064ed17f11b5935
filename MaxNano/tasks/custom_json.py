"""Your own conversations, from a JSON or JSON Lines file.

A .jsonl file has one conversation per line, a .json file a list of them. A conversation is a list
of messages {"role", "content"}, or an object whose "messages" is such a list; shapes.py has the
other shapes, and tokenization/chat_format.py describes messages.
Source: nanochat/tasks/customjson.py@72b9064.
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from MaxNano.storage import files
from MaxNano.tasks import shapes
from MaxNano.tasks.base import Conversation, Task
from MaxNano.tokenization.chat_format import turns


class CustomJson(Task):
    """Reads and checks the whole file at once. Raises ValueError that names the malformed line.

    A row whose messages, or one of them, are null is not refused: training leaves it out and counts
    it.
    """

    def __init__(self, config: Any, path: str):
        text = files.read_text(path, f"json:{path}").removeprefix("\ufeff")  # byte order mark
        read = _lines if Path(path).suffix == ".jsonl" else _items
        self._conversations = [_checked(content, where) for where, content in read(text, path)]

    def __len__(self) -> int:
        return len(self._conversations)

    def conversation(self, index: int) -> Conversation:
        return copy.deepcopy(self._conversations[index])


def _lines(text: str, path: str) -> Iterator[tuple[str, Any]]:
    """(location for messages, content) of every line that is not empty."""
    # Not splitlines(), which also cuts at characters that JSON allows within a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}, line {number}", _parse(line, path, number)


def _items(text: str, path: str) -> Iterator[tuple[str, Any]]:
    """(location for messages, content) of every element of a JSON list."""
    try:
        items = _parse(text, path, 1)
    except ValueError as error:
        raise ValueError(f"{error}; name it .jsonl if each line is a conversation") from None
    if not isinstance(items, list):
        raise ValueError(f"{path} must be a list of conversations; or name it .jsonl")
    for number, item in enumerate(items, start=1):
        yield f"{path}, conversation {number}", item


def _parse(text: str, path: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(
            f"{path}, line {line}: not JSON: {error.msg}, column {error.colno}"
        ) from None
    except RecursionError:
        raise ValueError(f"{path}, line {first_line}: nested too deeply") from None
    except ValueError as error:  # an integer of thousands of digits
        raise ValueError(f"{path}, line {first_line}: not JSON: {error}") from None


def _checked(content: Any, where: str) -> Conversation:
    conversation = {"messages": content} if isinstance(content, list) else content
    if isinstance(conversation, dict) and set(shapes.COLUMNS) & conversation.keys():
        messages = shapes.messages_of(conversation)
        conversation = {**conversation, "messages": messages}
        if messages is None or isinstance(messages, list) and None in messages:
            return conversation
    try:
        messages = turns(conversation)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if all(role != "assistant" for role, _ in messages):
        raise ValueError(
            f"{where}: no message is from 'assistant', so there is nothing to train on"
        )
    return conversation

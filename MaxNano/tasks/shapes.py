"""The shapes in which data sets store conversations, as messages {"role", "content"}.

A row has its messages in one of COLUMNS: a list of {"role", "content"} or of {"from", "value"}, or
either as JSON text.
"""

import json
from collections.abc import Mapping
from typing import Any

COLUMNS = ("messages", "conversations", "conversation")

# Names of the sides in data sets -> ours.
_ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}


def messages_of(row: Mapping[str, Any]) -> Any:
    """The messages of a row, each with role and content only.

    What is no conversation, such as null or a null message, stays as it is: rendering refuses it
    with a ValueError, and training leaves it out and counts it.
    """
    messages = next((row[name] for name in COLUMNS if name in row), None)
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError):
            return messages
    return list(map(_message, messages)) if isinstance(messages, list) else messages


def _message(message: Any) -> Any:
    if not isinstance(message, Mapping):
        return message
    if "role" not in message and {"from", "value"} <= message.keys():
        message = {"role": message["from"], "content": message["value"]}
    named = {key: message[key] for key in ("role", "content") if key in message}
    if isinstance(named.get("role"), str):
        named["role"] = _ROLES.get(named["role"], named["role"])
    return named

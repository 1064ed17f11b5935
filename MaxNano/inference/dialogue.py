"""Conversations: prompts that fit into the context, and replies as text while they are generated.

The terminal chat and the server share this module. A reply is a sequence of parts (kind, text), of
the kinds that `Tokenizer.render_conversation` takes: "text", "python" (a tool call) and
"python_output" (its result).
"""

import bisect
import itertools
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import FrozenConfigDict

from MaxNano.inference.text_stream import TextStream
from MaxNano.tokenization.tokenizer import Tokenizer

Message = Mapping[str, Any]

MAX_TOKEN_CHARACTERS = 512  # a text of more than this times a number of tokens is not encoded


class TooLongError(ValueError):
    """A prompt that does not fit; `tokens` is its length, or a lower bound of it."""

    def __init__(self, tokens: int, limit: int):
        super().__init__(
            f"the message is too long: its prompt has {tokens} tokens, at most {limit} fit"
        )
        self.tokens = tokens


class ReplyPart(NamedTuple):
    """A piece of a reply."""

    kind: str  # text, python or python_output
    text: str


def merge_parts(parts: Iterable[ReplyPart]) -> list[ReplyPart]:
    """Join adjacent parts of the same kind and drop empty ones."""
    merged: list[ReplyPart] = []
    for part in parts:
        if merged and merged[-1].kind == part.kind:
            merged[-1] = ReplyPart(part.kind, merged[-1].text + part.text)
        elif part.text:
            merged.append(part)
    return merged


def content_of(parts: Sequence[ReplyPart]) -> str | list[dict[str, str]]:
    """The content of a message with this reply: a string, or a list of parts for tool calls."""
    if all(part.kind == "text" for part in parts):
        return "".join(part.text for part in parts)
    return [{"type": kind, "text": text} for kind, text in parts]


def in_turns(config: FrozenConfigDict) -> bool:
    """Whether the checkpoint is a chat model; a base model only continues a text."""
    return config.stage is not None if config.chat_turns is None else config.chat_turns


# ---- Prompts ------------------------------------------------------------------------------------


def text_of(message: Message) -> str:
    """The text of a message, of all its parts."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def prompt_ids(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Token ids of a prompt for the assistant's reply, or for the rest of its message if the last
    message is the assistant's.

    tokenization/chat_format.py says how messages become turns. Raises ValueError if a message is
    malformed.
    """
    ids, _ = tokenizer.render_conversation({"messages": messages})
    if messages[-1]["role"] == "assistant":
        return ids[:-1]  # without the end of its message
    return [*ids, tokenizer.special.assistant_start]


def trim(
    tokenizer: Tokenizer, messages: Sequence[Message], limit: int
) -> tuple[list[Message], list[int]]:
    """Drop the oldest turns until the prompt has at most `limit` tokens: (messages, prompt).

    A turn is what the user says until the reply, with the reply; system messages at the beginning
    are kept. About half of `limit` is dropped at a time: the chat then begins with the same turn
    while it grows by that much, and the prefix cache holds it. Raises TooLongError if the last turn
    alone is too long.
    """
    system = list(itertools.takewhile(lambda message: message["role"] == "system", messages))
    turns = list(messages[len(system) :])
    roles = [message["role"] for message in turns]
    starts = [0] + [
        index
        for index, (before, role) in enumerate(itertools.pairwise(roles), start=1)
        if before == "assistant" != role
    ]

    def tokens_of(kept: Sequence[Message]) -> int:
        characters = sum(len(text_of(message)) for message in kept)
        if characters > limit * MAX_TOKEN_CHARACTERS:  # it may take long to encode
            return characters // MAX_TOKEN_CHARACTERS
        return len(prompt_ids(tokenizer, kept))

    def fits(start: int) -> bool:
        return tokens_of([*system, *turns[start:]]) <= limit

    first = bisect.bisect_left(starts, True, key=fits)
    if first == len(starts):
        raise TooLongError(tokens_of([*system, *turns[starts[-1] :]]), limit)
    # Where the chat may begin depends on its older turns only, not on how long it has become.
    start, dropped = starts[first], 0
    for begin, end in itertools.pairwise(starts if first else []):
        dropped += tokens_of(turns[begin:end])
        if dropped >= limit // 2:
            dropped = 0
            if end >= start:
                start = end
                break
    kept = [*system, *turns[start:]]
    return kept, prompt_ids(tokenizer, kept)


# ---- Replies ------------------------------------------------------------------------------------


class ReplyDecoder:
    """Decodes the tokens of a reply to parts; characters and stop strings as in TextStream.

    Special tokens have no text. After a stop string `is_stopped` is true and no more parts follow.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        special = tokenizer.special
        self._tokenizer = tokenizer
        self._stream = TextStream(stop)
        self._kinds = {
            special.python_start: "python",
            special.python_end: "text",
            special.output_start: "python_output",
            special.output_end: "text",
        }
        self._special = frozenset(special)
        self._kind = "text"  # of the next character to return
        self._returned = 0  # characters
        self._changes: deque[tuple[int, str]] = deque()  # (character, the kind that begins there)

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string ended the reply."""
        return self._stream.is_stopped

    def feed(self, ids: Iterable[int]) -> list[ReplyPart]:
        """Decode more tokens."""
        text = ""
        for is_special, group in itertools.groupby(ids, self._special.__contains__):
            if not is_special:
                text += self._stream.push(self._tokenizer.decode_bytes(list(group)))
                continue
            for token in group:
                if token in self._kinds:
                    text += self._stream.end_character()
                    self._changes.append((self._stream.decoded, self._kinds[token]))
        return self._parts(text)

    def finish(self) -> list[ReplyPart]:
        """The rest of the reply, after its last token."""
        return self._parts(self._stream.close())

    def _parts(self, text: str) -> list[ReplyPart]:
        parts, end = [], self._returned + len(text)
        while self._changes and self._changes[0][0] <= end:
            start, kind = self._changes.popleft()
            size = start - self._returned
            parts.append(ReplyPart(self._kind, text[:size]))
            text, self._returned, self._kind = text[size:], start, kind
        self._returned = end
        return merge_parts([*parts, ReplyPart(self._kind, text)])

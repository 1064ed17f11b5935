"""Conversations as they happen: what fits into the context, and the text of a reply while it is drawn.

The terminal chat and the server share this. A reply is a sequence of parts (kind, text), of the kinds that
`Tokenizer.render_conversation` takes: "text", "python" (a call of the tool) and "python_output" (its answer).
"""

import codecs
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import FrozenConfigDict

from MaxNano.tokenization.tokenizer import Tokenizer

Message = Mapping[str, Any]


class Part(NamedTuple):
    """A piece of a reply."""

    kind: str  # text, python or python_output
    text: str


def merge_parts(parts: Iterable[Part]) -> list[Part]:
    """Parts in which neighbors of one kind are joined and empty ones left out."""
    merged: list[Part] = []
    for part in parts:
        if merged and merged[-1].kind == part.kind:
            merged[-1] = Part(part.kind, merged[-1].text + part.text)
        elif part.text:
            merged.append(part)
    return merged


def content_of(parts: Sequence[Part]) -> str | list[dict[str, str]]:
    """A reply as the content of a message: a text, or its parts where it used the tool."""
    if all(part.kind == "text" for part in parts):
        return "".join(part.text for part in parts)
    return [{"type": kind, "text": text} for kind, text in parts]


def in_turns(config: FrozenConfigDict) -> bool:
    """Whether the config's checkpoint talks in turns; a base model only goes on with a text."""
    return config.stage is not None if config.chat_turns is None else config.chat_turns


# ---- What fits ----------------------------------------------------------------------------------


def prompt_ids(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Ids that ask the assistant for the message behind these, of which the last is the user's.

    Raises ValueError where the messages are no conversation.
    """
    if messages and messages[-1]["role"] != "user":
        raise ValueError("the last message must be from the user, to be answered")
    reply = {"role": "assistant", "content": ""}
    return tokenizer.render_for_completion({"messages": [*messages, reply]})


def trim(
    tokenizer: Tokenizer, messages: Sequence[Message], limit: int
) -> tuple[list[Message], list[int]]:
    """(messages, prompt_ids) with the oldest turns left out until the ids are at most `limit`.

    A turn is a user message with its reply; a system message stays. Raises ValueError where the last message
    alone is too long.
    """
    system = list(messages[:1]) if messages and messages[0]["role"] == "system" else []
    turns = list(messages[len(system) :])
    while True:
        ids = prompt_ids(tokenizer, [*system, *turns])
        if len(ids) <= limit:
            return [*system, *turns], ids
        if len(turns) < 3:
            raise ValueError(
                f"this message makes a prompt of {len(ids)} tokens; at most {limit} fit, so shorten it"
            )
        turns = turns[2:]


# ---- A reply as text ----------------------------------------------------------------------------


class ReplyDecoder:
    """Tokens to parts of text, as they come: characters whole, tool calls apart, stop strings held back.

    A character whose bytes are spread over tokens appears with its last one; bytes that are no UTF-8 become
    U+FFFD. Special tokens have no text. `feed` gives what is sure: text that may be the beginning of one of the
    `stop` strings waits, and once one is complete `stopped` is set and nothing more comes, neither it nor what
    is behind it. `length` counts the characters given out.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.stopped = False
        self.length = 0
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        special = tokenizer.special
        self._kinds = {
            special.python_start: "python",
            special.python_end: "text",
            special.output_start: "python_output",
            special.output_end: "text",
        }
        self._special = frozenset(special)
        self._kind = "text"
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._held: list[Part] = []  # behind which a stop string may be completed

    def feed(self, ids: Iterable[int]) -> list[Part]:
        """The parts that these further tokens make sure."""
        parts: list[Part] = []
        for token in ids:
            if token not in self._special:
                text = self._utf8.decode(self._tokenizer.decode_bytes([token]))
                parts.append(Part(self._kind, text))
            elif token in self._kinds:
                parts.append(Part(self._kind, self._flush_bytes()))
                self._kind = self._kinds[token]
        return self._release(parts, final=False)

    def finish(self) -> list[Part]:
        """The rest, when no more tokens come."""
        return self._release([Part(self._kind, self._flush_bytes())], final=True)

    def _flush_bytes(self) -> str:
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text

    def _release(self, parts: list[Part], final: bool) -> list[Part]:
        if self.stopped:
            return []
        parts = [*self._held, *parts]
        text = "".join(part.text for part in parts)
        found = [at for at in map(text.find, self._stop) if at >= 0]
        if found:
            self.stopped = True
            sure = min(found)
        else:
            sure = len(text) if final else len(text) - self._possible_stop(text)
        given, self._held = _split(parts, sure)
        self.length += sure
        return merge_parts(given)

    def _possible_stop(self, text: str) -> int:
        """Characters at the end of the text that may be the beginning of a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stop):
                return size
        return 0


def _split(parts: Sequence[Part], at: int) -> tuple[list[Part], list[Part]]:
    """The parts of the first `at` characters, and those of the rest."""
    before, after = [], []
    for part in parts:
        cut = min(len(part.text), max(at, 0))
        before.append(Part(part.kind, part.text[:cut]))
        if part.text[cut:]:
            after.append(Part(part.kind, part.text[cut:]))
        at -= cut
    return before, after

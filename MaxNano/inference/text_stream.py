"""Tokens to text while they are generated: whole characters, stop strings."""

import codecs
from collections.abc import Sequence


class TextStream:
    """Incremental UTF-8 decoding that stops before the first of the `stop` strings.

    A character whose bytes are spread over tokens is decoded with its last byte; bytes that are not
    UTF-8 become U+FFFD. Text that may be the beginning of a stop string is held back. After a stop
    string, `is_stopped` is true and no more text follows.
    """

    def __init__(self, stop: Sequence[str] = ()):
        self.is_stopped = False
        self.decoded = 0  # characters decoded so far, with those that are held back
        self._stop = tuple(stop)
        self._held = ""
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, new: bytes) -> str:
        """Decode more bytes; returns the text that no stop string can remove any more."""
        return self._release(self._utf8.decode(new))

    def end_character(self) -> str:
        """Decode an incomplete character as U+FFFD: the next bytes do not continue it."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return self._release(text)

    def close(self) -> str:
        """The rest of the text, after the last token."""
        return self.end_character() + self._release("", is_final=True)

    def _release(self, new: str, is_final: bool = False) -> str:
        if self.is_stopped:
            return ""
        self.decoded += len(new)
        text = self._held + new
        starts = [start for start in map(text.find, self._stop) if start >= 0]
        if starts:
            self.is_stopped = True
            return text[: min(starts)]
        end = len(text) - (0 if is_final else self._possible_stop(text))
        self._held = text[end:]
        return text[:end]

    def _possible_stop(self, text: str) -> int:
        """Number of characters at the end of the text that may begin a stop string."""
        longest = min(max(map(len, self._stop), default=1) - 1, len(text))
        sizes = range(longest, 0, -1)
        return next((n for n in sizes if any(s.startswith(text[-n:]) for s in self._stop)), 0)

"""Tokenizers: text to token ids and back, and conversations to ids with their training mask.

    tokenizer = load_tokenizer(config)
    ids = tokenizer.encode("Hello")                  # ordinary text, never a special token
    rows = tokenizer.encode_batch(documents, bos=True)

Four types share one interface: `bpe` is nanochat's, trained by train_tokenizer.py; `tiktoken`,
`sentencepiece` and `huggingface` load tokenizers made elsewhere. All have nanochat's nine special
tokens. The begin-of-text token of a loaded tokenizer serves as `<|bos|>` if no text encodes to it;
missing special tokens get new ids after the last one, which increases vocab_size.
Source: nanochat/tokenizer.py@92d63d4.
"""

import abc
import hashlib
import importlib
import itertools
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from ml_collections import FrozenConfigDict

from MaxNano import console
from MaxNano.tokenization import chat_format


class SpecialIds(NamedTuple):
    """The ids of the nine special tokens; the field `bos` is the token `<|bos|>`, and so on."""

    bos: int  # begins every document and every conversation
    user_start: int
    user_end: int
    assistant_start: int
    assistant_end: int
    python_start: int  # the assistant calls the tool ...
    python_end: int
    output_start: int  # ... and the tool's output is inserted here
    output_end: int


SPECIAL_TOKENS = tuple(f"<|{field}|>" for field in SpecialIds._fields)
BYTES = 256  # single bytes are the first tokens of a trained tokenizer


def valid_unicode(text: str) -> str:
    """Replace unpaired surrogates by U+FFFD; JSON can contain them, but UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class Tokenizer(abc.ABC):
    """The interface of all tokenizer types.

    Attributes: vocab_size, the number of ids with special tokens; special, the SpecialIds; bos_id;
    threads, for batches.
    """

    def __init__(
        self,
        pieces: Sequence[bytes],  # the bytes of each id; a special token's name
        special: SpecialIds,
        silent: Collection[int],  # further ids that no text encodes to
        fingerprint: str,
        threads: int,
    ):
        self.vocab_size = len(pieces)
        self.special = special
        self.bos_id = special.bos
        self.threads = threads
        self._pieces = list(pieces)
        self._fingerprint = fingerprint
        self._token_bytes = np.array([len(piece) for piece in pieces], dtype=np.int32)
        self._token_bytes[[*special, *silent]] = 0

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of a text. The name of a special token in it is encoded as text."""

    @abc.abstractmethod
    def _encode_rows(self, texts: Sequence[str]) -> Iterable[Sequence[int]]:
        """encode() of each text, in threads."""

    def encode_batch(self, texts: Sequence[str], bos: bool) -> list[np.ndarray]:
        """Ids of each text as an int32 array, after <|bos|> if bos; in threads."""
        rows = []
        for ids in self._encode_rows(texts):
            row = np.empty(len(ids) + bos, dtype=np.int32)
            row[:bos] = self.bos_id
            row[bos:] = ids
            rows.append(row)
        return rows

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The concatenated bytes of the ids. Raises ValueError for an unknown id."""
        return b"".join([self._pieces[i] for i in self._checked(ids)])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids: special tokens by name, U+FFFD for invalid UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def token_bytes(self) -> np.ndarray:
        """The number of text bytes of each id, int32 (vocab_size,); 0 for special tokens."""
        return self._token_bytes.copy()

    def fingerprint(self) -> str:
        """sha256, in hex, of everything that determines the ids; checkpoints store it."""
        return self._fingerprint

    def _checked(self, ids: Sequence[int]) -> list[int]:
        ids = np.asarray(ids, dtype=np.int64)
        unknown = ids[(ids < 0) | (ids >= self.vocab_size)]
        if unknown.size:
            raise ValueError(f"token id {unknown[0]} is not below vocab_size={self.vocab_size}")
        return ids.tolist()

    # ---- Chat ----

    def render_conversation(
        self, conversation: Mapping[str, Any], max_tokens: int | None = None
    ) -> tuple[list[int], list[int]]:
        """Ids of a conversation and its training mask, 1 for the tokens that the assistant learns.

        chat_format.py describes a conversation. Both lists are cut to max_tokens. Raises ValueError
        for a malformed conversation.
        """
        ids, mask = chat_format.render(conversation, self.encode, self.special)
        return ids[:max_tokens], mask[:max_tokens]

    def render_for_completion(self, conversation: Mapping[str, Any]) -> list[int]:
        """Ids that ask the assistant for its last message, which is dropped from the conversation.

        Raises ValueError if the last message is not the assistant's.
        """
        ids, _ = self.render_conversation(chat_format.without_answer(conversation))
        return [*ids, self.special.assistant_start]


# ---- What the types share -----------------------------------------------------------------------


def place_specials(given: Mapping[str, int], size: int, used: Iterable[int]) -> SpecialIds:
    """Ids of the special tokens: those given, and new ids after all that are in use."""
    new = itertools.count(max([size - 1, *used, *given.values()]) + 1)
    return SpecialIds(*(given[name] if name in given else next(new) for name in SPECIAL_TOKENS))


def piece_list(tokens: Mapping[int, bytes], special: SpecialIds) -> list[bytes]:
    """The bytes of each id, up to the last one; empty for unused ids.

    Raises ValueError if most ids are unused.
    """
    names = dict(zip(special, (name.encode() for name in SPECIAL_TOKENS), strict=True))
    largest, in_use = max([*tokens, *special]), len(tokens) + len(special)
    if largest >= 2 * in_use:  # a damaged id could require any amount of memory
        raise ValueError(f"the largest id is {largest}, but there are {in_use} tokens")
    return [names.get(i, tokens.get(i, b"")) for i in range(largest + 1)]


def content_hash(content: Any) -> str:
    """sha256, in hex, of the canonical JSON of a value."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def read_bytes(path: epath.Path) -> bytes:
    """The content of a file. Raises ValueError if it is missing or unreadable."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ValueError("the file does not exist") from None
    except OSError as error:
        raise ValueError(f"the file cannot be read: {error.strerror or error}") from None


def parse_file(path: epath.Path, what: str, parse: Callable[[], Tokenizer]) -> Any:
    """Return parse(); any failure becomes a ValueError with one line that names the file."""
    try:
        return parse()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is not {what}: {console.one_line(reason, 200)}") from None


def byte_characters() -> list[str]:
    """The character for each byte in byte-level vocabularies, as a list of 256.

    Visible bytes are themselves, the others are the characters from U+0100 in order.
    Source: GPT-2's encoder.py.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return [chr(byte if byte in visible else next(others)) for byte in range(BYTES)]


def decode_runs(ids: Sequence[int], special: SpecialIds, decode: Callable[[list[int]], str]) -> str:
    """Decode ids by a library that does not know the special tokens: the runs between them."""
    names = dict(zip(special, SPECIAL_TOKENS, strict=True))
    text = []
    for is_special, run in itertools.groupby(ids, key=names.__contains__):
        run_ids = list(run)
        text.append("".join(map(names.get, run_ids)) if is_special else decode(run_ids))
    return "".join(text)


_SPACE_MARK = "▁"  # stands for a space in SentencePiece pieces, also in tokenizer.json files


def byte_of_piece(piece: str) -> bytes:
    """The byte of a piece such as <0x0A>."""
    return bytes([int(piece[3:5], 16)])


def bytes_of_piece(piece: str) -> bytes:
    """The UTF-8 bytes of a SentencePiece piece."""
    return piece.replace(_SPACE_MARK, " ").encode()


# ---- Loading ------------------------------------------------------------------------------------

# type -> (module, function), imported on use: the modules import this one, and their libraries.
_LOADERS = {
    "bpe": ("bpe", "load_bpe"),
    "tiktoken": ("bpe", "load_tiktoken"),
    "sentencepiece": ("sentence_piece", "load"),
    "huggingface": ("hugging_face", "load"),
}


def load_tokenizer_from(
    tokenizer_type: str, path: str | os.PathLike[str], threads: int = 1
) -> Tokenizer:
    """Load a tokenizer of a type (bpe, tiktoken, sentencepiece or huggingface) from a path.

    The path is local or gs://, a folder for bpe and a file for the others. Raises ValueError with
    one line that names the file if it is missing, damaged or of another type.
    """
    module, load = _LOADERS[tokenizer_type]
    load = getattr(importlib.import_module(f"MaxNano.tokenization.{module}"), load)
    return load(epath.Path(path).expanduser(), threads)


def load_tokenizer(config: FrozenConfigDict) -> Tokenizer:
    """Load the config's tokenizer. Raises ValueError also if config.vocab_size is not its size."""
    tokenizer = load_tokenizer_from(
        config.tokenizer_type, config.tokenizer_path, config.tokenizer_threads
    )
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(
            f"the tokenizer {config.tokenizer_path} has {tokenizer.vocab_size} tokens but"
            f" vocab_size={config.vocab_size}: set vocab_size={tokenizer.vocab_size}"
        )
    return tokenizer

"""Tokenizers: text to token ids and back, and conversations to ids with their training mask.

    tokenizer = load(config)                         # or load_from("bpe", "data/tokenizer")
    ids = tokenizer.encode("Hello")                  # ordinary text only, never a special token
    rows = tokenizer.encode_batch(documents, bos=True)

Four types have one interface. `bpe` is nanochat's own kind, made by train_tokenizer.py; `tiktoken`,
`sentencepiece` and `huggingface` load vocabularies made elsewhere. Each has nanochat's nine special
tokens. A foreign vocabulary's own begin-of-text token serves as `<|bos|>` where ordinary text
cannot become it; the specials it lacks get new ids behind its last one, so that vocab_size grows.
Source: nanochat/tokenizer.py@92d63d4.
"""

import abc
import base64
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import tiktoken
from etils import epath
from ml_collections import FrozenConfigDict

from MaxNano import console
from MaxNano.storage import files


class SpecialIds(NamedTuple):
    """The ids of the nine special tokens; the field `bos` is the token `<|bos|>`, and so on."""

    bos: int  # every document and every conversation begins with it
    user_start: int
    user_end: int
    assistant_start: int
    assistant_end: int
    python_start: int  # the assistant calls the tool ...
    python_end: int
    output_start: int  # ... whose answer is forced upon it
    output_end: int


SPECIAL_TOKENS = tuple(f"<|{field}|>" for field in SpecialIds._fields)
BYTES = 256  # single bytes are the first tokens of a trained vocabulary

FILE_NAME = "tokenizer.json"  # in the folder of a bpe tokenizer
_FORMAT = "maxnano-tokenizer"
_VERSION = 1


def _either(*rows: str) -> str:
    """A regex that takes the first of its rows that matches."""
    return "|".join(rows)


# How text is cut before merges, which never cross a cut.
NANOCHAT_PATTERN = _either(
    r"'(?i:[sdmt]|ll|ve|re)",  # an English contraction
    r"[^\r\n\p{L}\p{N}]?+\p{L}+",  # a word, with the space or sign before it
    r"\p{N}{1,2}",  # digits by twos: numbers take few places of a small vocabulary
    r" ?[^\s\p{L}\p{N}]++[\r\n]*",  # signs, with the line ends behind them
    r"\s*[\r\n]",  # white space up to a line's end
    r"\s+(?!\S)",  # white space, but for the last one before a word
    r"\s+",
)
_GPT2_PATTERN = _either(
    r"'(?:[sdmt]|ll|ve|re)",
    r" ?\p{L}+",
    r" ?\p{N}+",
    r" ?[^\s\p{L}\p{N}]+",
    r"\s+(?!\S)",
    r"\s+",
)
_CL100K_PATTERN = _either(
    r"'(?i:[sdmt]|ll|ve|re)",
    r"[^\r\n\p{L}\p{N}]?+\p{L}+",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]++[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
)
_O200K_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K_PATTERN = _either(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    + _O200K_CONTRACTION,
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    + _O200K_CONTRACTION,
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
)

# A rank file says nothing of its split pattern or of its begin-of-text token: published ones are
# known by their number of ranks. Source: tiktoken_ext/openai_public.py (tiktoken 0.14), Llama 3.
_KNOWN_RANK_FILES = {  # ranks -> (pattern, id of the token that serves as <|bos|>)
    50256: (_GPT2_PATTERN, 50256),  # gpt2, r50k_base
    50280: (_GPT2_PATTERN, 50256),  # p50k_base
    100256: (_CL100K_PATTERN, 100257),  # cl100k_base
    128000: (_CL100K_PATTERN, 128000),  # Llama 3
    199998: (_O200K_PATTERN, 199999),  # o200k_base
}

# Names under which Hugging Face files keep the token that begins a text, the likeliest first.
_BOS_NAMES = ("<|begin_of_text|>", "<|startoftext|>", "<bos>", "<s>", "<|endoftext|>")

# tiktoken's regex engine overflows its stack, which ends the process, on a run of about a million
# characters of white space; longer runs than this are cut.
_LONGEST_SPACE = 100_000
_LONG_SPACE = re.compile(rf"\s{{{_LONGEST_SPACE}}}")


def valid_unicode(text: str) -> str:
    """The text with each surrogate that has lost its partner replaced by U+FFFD.

    JSON can hold half of a surrogate pair, which no UTF-8 encoder takes.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def cut_long_space(text: str) -> Iterator[str]:
    """The text in pieces that the split patterns can take; in one piece but for pathological ones."""
    start = 0
    if len(text) > _LONGEST_SPACE:
        for match in _LONG_SPACE.finditer(text):
            yield text[start : match.end()]
            start = match.end()
    yield text[start:]


# ---- The interface ----------------------------------------------------------------------------


class Tokenizer(abc.ABC):
    """What every type of tokenizer can do.

    Attributes: vocab_size, the number of ids, special tokens included; special, the SpecialIds;
    bos_id; threads, with which batches are encoded.
    """

    def __init__(
        self,
        pieces: Sequence[bytes],  # what each id stands for; a special's own name
        special: SpecialIds,
        silent: Collection[int],  # further ids that no text can become
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
        """Ids of a text. A special token's name within it is text like any other."""

    @abc.abstractmethod
    def _encode_rows(self, texts: Sequence[str]) -> Iterable[Sequence[int]]:
        """encode() of each text, over threads."""

    def encode_batch(self, texts: Sequence[str], bos: bool) -> list[np.ndarray]:
        """Ids of each text as an int32 array, behind <|bos|> where asked for; over threads."""
        rows = []
        for ids in self._encode_rows(texts):
            row = np.empty(len(ids) + bos, dtype=np.int32)
            row[:bos] = self.bos_id
            row[bos:] = ids
            rows.append(row)
        return rows

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes that the ids stand for, one after the other; ValueError for an unknown id."""
        return b"".join([self._pieces[i] for i in self._checked(ids)])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens by name, U+FFFD for bytes that are no UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def token_bytes(self) -> np.ndarray:
        """Bytes of text that each id stands for, int32 (vocab_size,), 0 for special tokens."""
        return self._token_bytes.copy()

    def fingerprint(self) -> str:
        """sha256, in hex, of everything that decides the ids; checkpoints carry it."""
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
        """Ids of a conversation and, for each, whether the assistant is trained to say it (1 or 0).

        A conversation is {"messages": [{"role", "content"}, ...]}: perhaps a system message, which
        joins the first user message, then user and assistant by turns. Content is a text; the
        assistant's may also be a list of parts {"type", "text"} of type text, python (a call of the
        tool) or python_output (its answer, which is not trained on). Both lists are cut to
        max_tokens. Raises ValueError for any other shape.
        """
        ids, mask = [self.special.bos], [0]

        def add(new_ids: Sequence[int], trained: int) -> None:
            ids.extend(new_ids)
            mask.extend([trained] * len(new_ids))

        for role, content in turns(conversation):
            if role == "user":
                user_ids = self.encode(content)
                add([self.special.user_start, *user_ids, self.special.user_end], 0)
            else:
                add([self.special.assistant_start], 0)
                for kind, text in content:
                    add(*self._render_part(kind, text))
                add([self.special.assistant_end], 1)
        return ids[:max_tokens], mask[:max_tokens]

    def render_for_completion(self, conversation: Mapping[str, Any]) -> list[int]:
        """Ids that ask the assistant for its last message, which is dropped from the conversation.

        Raises ValueError where the last message is not the assistant's.
        """
        messages = _messages(conversation)
        if _role(messages[-1], len(messages) - 1) != "assistant":
            raise ValueError("the last message must be from the assistant, to be completed")
        ids, _ = self.render_conversation({"messages": messages[:-1]})
        return [*ids, self.special.assistant_start]

    def _render_part(self, kind: str, text: str) -> tuple[list[int], int]:
        """(ids, trained) of a part of the assistant's message."""
        ids = self.encode(text)
        if kind == "python":
            return [self.special.python_start, *ids, self.special.python_end], 1
        if kind == "python_output":
            return [self.special.output_start, *ids, self.special.output_end], 0
        return ids, 1


_PART_TYPES = ("text", "python", "python_output")


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
    """(role, content) by turns from the user; the assistant's content as (type, text) of each part.

    The system message is joined to the user's first. Raises ValueError for any shape other than
    Tokenizer.render_conversation describes.
    """
    messages = _messages(conversation)
    system = []
    if _role(messages[0], 0) == "system":
        system = [_text(messages[0]["content"], "the content of message 0")]
        messages = messages[1:]
        if not messages:
            raise ValueError("the system message must be followed by a user message")
    found: list[tuple[str, Any]] = []
    for turn, message in enumerate(messages):
        index = turn + len(system)
        role, expected = _role(message, index), ("user", "assistant")[turn % 2]
        if role != expected:
            raise ValueError(f"message {index} is from {role!r} but must be from {expected!r}")
        what, content = f"the content of message {index}", message["content"]
        if role == "user":
            text = _text(content, what)
            found.append((role, "\n\n".join([*system, text]) if turn == 0 else text))
        elif isinstance(content, (list, tuple)):
            found.append((role, [_part(part, what) for part in content]))
        else:
            found.append((role, [("text", _text(content, what))]))
    return found


def _part(part: Mapping[str, Any], what: str) -> tuple[str, str]:
    if not isinstance(part, Mapping) or part.get("type") not in _PART_TYPES:
        types = ", ".join(_PART_TYPES)
        raise ValueError(f'{what}: each part must be {{"type", "text"}} of a type {types}')
    return part["type"], _text(part.get("text"), f"{what}: the text of a part")


# ---- bpe and tiktoken -------------------------------------------------------------------------


class BpeTokenizer(Tokenizer):
    """Byte-level BPE, encoded by tiktoken.

    ranks: the bytes of each token -> its id, which is also its merge priority, from 0; every single
    byte is among them. special_tokens: ids that are given; a special that is not among them gets
    the next id behind all others, in the order of SPECIAL_TOKENS.
    Raises ValueError where these make no vocabulary.
    """

    def __init__(
        self,
        pattern: str,
        ranks: Mapping[bytes, int],
        special_tokens: Mapping[str, int] | None = None,
        threads: int = 1,
    ):
        special = _place_specials(special_tokens or {}, len(ranks), ranks.values())
        pieces = _pieces({i: token for token, i in ranks.items()}, special)
        _check_ranks(ranks, special, len(pieces))
        self.pattern = pattern
        self._content = {
            "pattern": pattern,
            "special_tokens": dict(zip(SPECIAL_TOKENS, special, strict=True)),
            "tokens": _to_text(ranks),
        }
        super().__init__(pieces, special, (), _hash(self._content), threads)
        self._encoding = tiktoken.Encoding(
            name=_FORMAT,
            pat_str=pattern,
            mergeable_ranks=dict(ranks),
            special_tokens=self._content["special_tokens"],
        )

    def encode(self, text: str) -> list[int]:
        return self._encode_array(text).tolist()

    def _encode_array(self, text: str) -> np.ndarray:
        # The ids of encode_ordinary, as no special is allowed, without a Python object for each.
        if len(text) > _LONGEST_SPACE:
            pieces = [self._encode_piece(piece) for piece in cut_long_space(text)]
            return np.concatenate(pieces)
        return self._encode_piece(text)

    def _encode_piece(self, text: str) -> np.ndarray:
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            return self._encoding.encode_to_numpy(valid_unicode(text), disallowed_special=())

    def _encode_rows(self, texts: Sequence[str]) -> Iterable[np.ndarray]:
        if self.threads == 1:
            return map(self._encode_array, texts)
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(self._encode_array, texts))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write tokenizer.json into a folder, which is made; whole or not at all."""
        folder = epath.Path(folder).expanduser()
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "fingerprint": self.fingerprint(),
            **self._content,
        }
        files.write_whole(folder / FILE_NAME, json.dumps(content, indent=1) + "\n")


def _place_specials(given: Mapping[str, int], size: int, used: Iterable[int]) -> SpecialIds:
    """Ids of the specials: those given, and new ones behind the `size` or more ids in use."""
    new = itertools.count(max([size - 1, *used, *given.values()]) + 1)
    return SpecialIds(*(given[name] if name in given else next(new) for name in SPECIAL_TOKENS))


def _pieces(tokens: Mapping[int, bytes], special: SpecialIds) -> list[bytes]:
    """What each id stands for, up to the last id; nothing for an id that is not in use."""
    names = dict(zip(special, (name.encode() for name in SPECIAL_TOKENS), strict=True))
    largest, in_use = max([*tokens, *special]), len(tokens) + len(special)
    if largest >= 2 * in_use:  # a damaged id would ask for any amount of memory
        raise ValueError(f"the largest id is {largest}, of {in_use} tokens")
    return [names.get(i, tokens.get(i, b"")) for i in range(largest + 1)]


def _check_ranks(ranks: Mapping[bytes, int], special: SpecialIds, size: int) -> None:
    ids = {*ranks.values(), *special}
    missing = [byte for byte in range(BYTES) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"the single byte {missing[0]} is not among the tokens")
    if b"" in ranks:
        raise ValueError("a token is empty")
    if len(ids) != len(ranks) + len(special):
        raise ValueError("two tokens have the same id")
    if min(ids) < 0 or size > len(ids) + 1:  # published vocabularies leave out one id at most
        raise ValueError("the ids are not consecutive")


def _to_text(ranks: Mapping[bytes, int]) -> list[str | None]:
    """Tokens in base64 by rank, None for a rank that is not in use."""
    tokens: list[str | None] = [None] * (max(ranks.values()) + 1)
    for token, rank in ranks.items():
        tokens[rank] = base64.b64encode(token).decode()
    return tokens


def _hash(content: Any) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _load_bpe(folder: epath.Path, threads: int) -> BpeTokenizer:
    path = folder / FILE_NAME
    if not path.exists():
        raise ValueError(
            f"there is no tokenizer in {folder}: make one with python MaxNano/train_tokenizer.py"
            f" configs/base.yml tokenizer_path={folder} and the other arguments of this command"
        )
    return _parse(path, "a tokenizer made by train_tokenizer.py", lambda: _read_bpe(path, threads))


def _read_bpe(path: epath.Path, threads: int) -> BpeTokenizer:
    content = json.loads(_read(path).decode())
    if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
        raise ValueError(f'"format" is not "{_FORMAT}"')
    if content.pop("version", None) != _VERSION:
        raise ValueError(f'"version" is not {_VERSION}')
    if content.pop("fingerprint", None) != _hash(content):
        raise ValueError("the content does not match its fingerprint")
    if set(content["special_tokens"]) != set(SPECIAL_TOKENS):
        raise ValueError("its special tokens are others")
    tokens = content["tokens"]
    ranks = {
        base64.b64decode(token, validate=True): rank
        for rank, token in enumerate(tokens)
        if token is not None
    }
    if len(ranks) != len(tokens) - tokens.count(None):
        raise ValueError("a token stands there twice")
    return BpeTokenizer(content["pattern"], ranks, content["special_tokens"], threads)


def _load_tiktoken(path: epath.Path, threads: int) -> BpeTokenizer:
    """A rank file: a line `base64 rank` for each token. An unknown one is cut by nanochat's pattern."""
    return _parse(path, "a tiktoken rank file", lambda: _read_tiktoken(path, threads))


def _read_tiktoken(path: epath.Path, threads: int) -> BpeTokenizer:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(_read(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            token, rank = base64.b64decode(token, validate=True), int(rank)
        except ValueError:
            raise ValueError(f"line {number} is not `base64 rank`") from None
        if token in ranks:
            raise ValueError(f"line {number} repeats a token")
        ranks[token] = rank
    pattern, bos = _KNOWN_RANK_FILES.get(len(ranks), (NANOCHAT_PATTERN, None))
    given = {} if bos is None else {SPECIAL_TOKENS[0]: bos}
    return BpeTokenizer(pattern, ranks, given, threads)


def train_bpe(texts: Iterable[str], vocab_size: int, threads: int = 1) -> BpeTokenizer:
    """A tokenizer of vocab_size ids learned from texts: bytes, merges, special tokens.

    The most frequent pair of tokens is merged first, so the same texts give the same tokenizer.
    Raises ValueError where vocab_size leaves no room for bytes and specials, or where the texts
    hold too few different pairs to fill it.
    """
    import rustbpe

    least = BYTES + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: {BYTES} bytes and {len(SPECIAL_TOKENS)} special"
            f" tokens need vocab_size={least} at least"
        )
    trainer = rustbpe.Tokenizer()
    pieces = (piece for text in texts for piece in cut_long_space(valid_unicode(text)))
    trainer.train_from_iterator(pieces, vocab_size - len(SPECIAL_TOKENS), pattern=NANOCHAT_PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    found = len(ranks) + len(SPECIAL_TOKENS)
    if found < vocab_size:
        raise ValueError(
            f"the text gives only {found} of the vocab_size={vocab_size} tokens: train on more text"
            f" or give vocab_size={found} or less"
        )
    return BpeTokenizer(NANOCHAT_PATTERN, ranks, threads=threads)


# ---- sentencepiece ----------------------------------------------------------------------------

_SPACE_MARK = "▁"  # stands for a space in pieces of sentencepiece and of its kin


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; its control symbol for the beginning of a sentence serves as <|bos|>.

    Its own normalization holds: most models put a space before a text, which counts as a byte in
    token_bytes(), and may fold characters. Bytes of the unknown token are not counted.
    """

    def __init__(self, model: bytes, threads: int = 1):
        sentencepiece = _import("sentencepiece")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise ValueError("the model cannot be read") from None
        size = self._model.vocab_size()
        if not size:
            raise ValueError("the model is empty")
        special = _place_specials(self._control_symbols(size), size, ())
        pieces = _pieces({i: self._piece(i) for i in range(size)}, special)
        content = {"model": hashlib.sha256(model).hexdigest(), "special_tokens": special}
        super().__init__(pieces, special, (), _hash(content), threads)

    def _control_symbols(self, size: int) -> dict[str, int]:
        """The specials that the model has, as control symbols: those alone no text can become."""
        found = {self._model.id_to_piece(i): i for i in range(size) if self._model.is_control(i)}
        given = {name: found[name] for name in SPECIAL_TOKENS if name in found}
        if self._model.bos_id() >= 0:
            given.setdefault(SPECIAL_TOKENS[0], self._model.bos_id())
        return given

    def _piece(self, i: int) -> bytes:
        piece = self._model.id_to_piece(i)
        if self._model.is_control(i) or self._model.is_unknown(i) or self._model.is_unused(i):
            return b""
        return _byte_piece(piece) if self._model.is_byte(i) else _spaced_piece(piece)

    def encode(self, text: str) -> list[int]:
        return self._model.encode(valid_unicode(text))

    def _encode_rows(self, texts: Sequence[str]) -> Iterable[Sequence[int]]:
        return self._model.encode([valid_unicode(text) for text in texts], num_threads=self.threads)

    def decode(self, ids: Sequence[int]) -> str:
        return _decode_runs(self._checked(ids), self.special, self._model.decode)


def _byte_piece(piece: str) -> bytes:
    """The byte of a piece like <0x0A>."""
    return bytes([int(piece[3:5], 16)])


def _spaced_piece(piece: str) -> bytes:
    return piece.replace(_SPACE_MARK, " ").encode()


def _decode_runs(
    ids: Sequence[int], special: SpecialIds, decode: Callable[[list[int]], str]
) -> str:
    """The text of ids by a library that knows nothing of the specials: its runs between them."""
    names = dict(zip(special, SPECIAL_TOKENS, strict=True))
    text = []
    for is_special, run in itertools.groupby(ids, key=names.__contains__):
        run_ids = list(run)
        text.append("".join(map(names.get, run_ids)) if is_special else decode(run_ids))
    return "".join(text)


def _load_sentencepiece(path: epath.Path, threads: int) -> SentencePieceTokenizer:
    return _parse(
        path, "a SentencePiece model", lambda: SentencePieceTokenizer(_read(path), threads)
    )


# ---- huggingface ------------------------------------------------------------------------------


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face tokenizer.json, through the library `tokenizers`, which brings its own threads.

    Its normalizer holds; the special tokens it would add, truncation and padding do not. ValueError
    for a decoder under which the bytes of a token cannot be told, such as WordPiece's.
    """

    def __init__(self, text: str, threads: int = 1):
        tokenizers = _import("tokenizers")
        content = json.loads(text)
        content |= {"truncation": None, "padding": None, "post_processor": None}
        added = {entry["content"]: entry for entry in content["added_tokens"]}
        for name in (*SPECIAL_TOKENS, *_BOS_NAMES):
            if name in added:
                added[name]["special"] = True  # not all files mark them
        try:
            self._model = tokenizers.Tokenizer.from_str(json.dumps(content))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"the tokenizer cannot be read: {error}") from None
        self._keep_special_tokens_text()

        given = self._unreachable(content["model"], added)
        tokens = {i: token for token, i in self._model.get_vocab().items()}
        special = _place_specials(given, len(tokens), tokens)
        to_bytes = _bytes_of_token(content.get("decoder"))
        plain = {name for name, entry in added.items() if not entry["special"]}
        silent = [i for i, token in tokens.items() if token in added and token not in plain]
        pieces = {
            i: token.encode() if token in added else to_bytes(token) for i, token in tokens.items()
        }
        digest = _hash({"tokenizer": content, "special_tokens": special})
        super().__init__(_pieces(pieces, special), special, silent, digest, threads)

    def _keep_special_tokens_text(self) -> None:
        self._model.encode_special_tokens = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._keep_special_tokens_text()  # the library's pickle forgets it

    def _unreachable(self, model: Mapping[str, Any], added: Collection[str]) -> dict[str, int]:
        """The specials that the file has and that its model can make of no text.

        The model makes a token of text where a merge ends in it or, in all but plain BPE, where it
        stands in the vocabulary at all.
        """
        reachable = set(model["vocab"]) if isinstance(model["vocab"], dict) else None
        if model.get("type") == "BPE" and not model.get("ignore_merges"):
            merges = (m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"])
            reachable = {left + right for left, right in merges}
        elif reachable is None:
            reachable = {piece for piece, _ in model["vocab"]}

        def usable(name: str) -> bool:
            return name in added and name not in reachable

        given = {name: self._model.token_to_id(name) for name in SPECIAL_TOKENS if usable(name)}
        for name in filter(usable, _BOS_NAMES):
            given.setdefault(SPECIAL_TOKENS[0], self._model.token_to_id(name))
        return given

    def encode(self, text: str) -> list[int]:
        return self._model.encode(valid_unicode(text), add_special_tokens=False).ids

    def _encode_rows(self, texts: Sequence[str]) -> Iterable[Sequence[int]]:
        texts = [valid_unicode(text) for text in texts]
        rows = self._model.encode_batch_fast(texts, add_special_tokens=False)
        return (row.ids for row in rows)

    def decode(self, ids: Sequence[int]) -> str:
        def decode(run: list[int]) -> str:
            return self._model.decode(run, skip_special_tokens=False)

        return _decode_runs(self._checked(ids), self.special, decode)


def _bytes_of_token(decoder: Mapping[str, Any] | None) -> Callable[[str], bytes]:
    """How a token of a tokenizer.json becomes bytes, as its decoder tells."""
    kinds = {step["type"] for step in _decoder_steps(decoder)}
    if "ByteLevel" in kinds:
        to_byte = {character: byte for byte, character in enumerate(byte_characters())}

        def byte_level(token: str) -> bytes:
            if not to_byte.keys() >= set(token):
                return token.encode()  # not of that alphabet: the library takes it literally
            return bytes([to_byte[character] for character in token])

        return byte_level
    if kinds & {"Metaspace", "ByteFallback"}:

        def spaced(token: str) -> bytes:
            is_byte = "ByteFallback" in kinds and re.fullmatch(r"<0x[0-9A-F]{2}>", token)
            return _byte_piece(token) if is_byte else _spaced_piece(token)

        return spaced
    raise ValueError(
        f"its decoder ({', '.join(sorted(kinds)) or 'none'}) hides the bytes of a token;"
        " one of ByteLevel, Metaspace or ByteFallback is needed"
    )


def _decoder_steps(decoder: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if decoder is not None:
        for step in decoder.get("decoders", ()):
            yield from _decoder_steps(step)
        yield decoder


def byte_characters() -> list[str]:
    """The character by which byte-level vocabularies write each byte: visible bytes as themselves,
    the others, in order, as the characters from U+0100. Source: GPT-2's encoder.py."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return [chr(byte if byte in visible else next(others)) for byte in range(BYTES)]


def _load_huggingface(path: epath.Path, threads: int) -> HuggingFaceTokenizer:
    return _parse(
        path,
        "a Hugging Face tokenizer.json",
        lambda: HuggingFaceTokenizer(_read(path).decode(), threads),
    )


# ---- Loading ----------------------------------------------------------------------------------


def _import(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"the package {name} is needed: pip install {name}") from None


def _read(path: epath.Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ValueError("there is no such file") from None
    except OSError as error:
        raise ValueError(f"it cannot be read: {error.strerror or error}") from None


def _parse(path: epath.Path, what: str, read: Callable[[], Tokenizer]) -> Any:
    """read(), any failure of which becomes one line that names the file."""
    try:
        return read()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is not {what}: {console.one_line(reason, 200)}") from None


_LOADERS: dict[str, Callable[[epath.Path, int], Tokenizer]] = {
    "bpe": _load_bpe,
    "tiktoken": _load_tiktoken,
    "sentencepiece": _load_sentencepiece,
    "huggingface": _load_huggingface,
}


def load_tokenizer_from(
    tokenizer_type: str, path: str | os.PathLike[str], threads: int = 1
) -> Tokenizer:
    """The tokenizer of a type (bpe, tiktoken, sentencepiece or huggingface) at a path.

    The path is local or gs://, a folder for bpe and a file for the others. Raises ValueError with
    one line that names the file where it is missing, damaged or of another kind.
    """
    return _LOADERS[tokenizer_type](epath.Path(path).expanduser(), threads)


def load_tokenizer(config: FrozenConfigDict) -> Tokenizer:
    """The config's tokenizer; ValueError also where config.vocab_size is not its size."""
    tokenizer = load_tokenizer_from(
        config.tokenizer_type, config.tokenizer_path, config.tokenizer_threads
    )
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(
            f"the tokenizer {config.tokenizer_path} has {tokenizer.vocab_size} tokens but"
            f" vocab_size={config.vocab_size}: give vocab_size={tokenizer.vocab_size}"
        )
    return tokenizer

"""Byte-level BPE tokenizers: training, tokenizer.json of this project, and tiktoken's rank files.

Merges happen within pieces of the text, which a split pattern cuts.
Source: nanochat/tokenizer.py@92d63d4, RustBPETokenizer.
"""

import base64
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tiktoken
from etils import epath

from MaxNano.storage import files
from MaxNano.tokenization.tokenizer import (
    BYTES,
    SPECIAL_TOKENS,
    SpecialIds,
    Tokenizer,
    content_hash,
    parse_file,
    piece_list,
    place_specials,
    read_bytes,
    valid_unicode,
)

FILE_NAME = "tokenizer.json"  # in the folder of a bpe tokenizer
_FORMAT = "maxnano-tokenizer"
_VERSION = 1


def _either(*rows: str) -> str:
    """A regex that tries its rows in order."""
    return "|".join(rows)


NANOCHAT_PATTERN = _either(
    r"'(?i:[sdmt]|ll|ve|re)",  # an English contraction
    r"[^\r\n\p{L}\p{N}]?+\p{L}+",  # a word, with the space or punctuation before it
    r"\p{N}{1,2}",  # at most two digits: numbers use few ids of a small vocabulary
    r" ?[^\s\p{L}\p{N}]++[\r\n]*",  # punctuation, with the line ends after it
    r"\s*[\r\n]",  # whitespace up to the end of a line
    r"\s+(?!\S)",  # whitespace except the last character before a word
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

# A rank file has neither its split pattern nor its begin-of-text token; published files are
# recognized by their number of ranks. Source: tiktoken_ext/openai_public.py (tiktoken 0.14), Llama
# 3.
_KNOWN_RANK_FILES = {  # ranks -> (pattern, id that serves as <|bos|>)
    50256: (_GPT2_PATTERN, 50256),  # gpt2, r50k_base
    50280: (_GPT2_PATTERN, 50256),  # p50k_base
    100256: (_CL100K_PATTERN, 100257),  # cl100k_base
    128000: (_CL100K_PATTERN, 128000),  # Llama 3
    199998: (_O200K_PATTERN, 199999),  # o200k_base
}

# tiktoken's regex engine overflows its stack, which kills the process, on about a million
# whitespace characters in a row; runs longer than this are cut.
_LONGEST_SPACE = 100_000
_LONG_SPACE = re.compile(rf"\s{{{_LONGEST_SPACE}}}")


def cut_long_space(text: str) -> Iterator[str]:
    """Cut a text where it has more than _LONGEST_SPACE whitespace characters in a row."""
    start = 0
    if len(text) > _LONGEST_SPACE:
        for match in _LONG_SPACE.finditer(text):
            yield text[start : match.end()]
            start = match.end()
    yield text[start:]


class BpeTokenizer(Tokenizer):
    """Byte-level BPE, encoded by tiktoken.

    ranks: the bytes of each token -> its id, which is also its merge priority, from 0; all single
    bytes are required. special_tokens: known ids; the other special tokens get the next ids, in the
    order of SPECIAL_TOKENS. Raises ValueError if these are inconsistent.
    """

    def __init__(
        self,
        pattern: str,
        ranks: Mapping[bytes, int],
        special_tokens: Mapping[str, int] | None = None,
        threads: int = 1,
    ):
        special = place_specials(special_tokens or {}, len(ranks), ranks.values())
        pieces = piece_list({i: token for token, i in ranks.items()}, special)
        _check_ranks(ranks, special, len(pieces))
        self.pattern = pattern
        self._content = {
            "pattern": pattern,
            "special_tokens": dict(zip(SPECIAL_TOKENS, special, strict=True)),
            "tokens": _to_text(ranks),
        }
        super().__init__(pieces, special, (), content_hash(self._content), threads)
        self._encoding = tiktoken.Encoding(
            name=_FORMAT,
            pat_str=pattern,
            mergeable_ranks=dict(ranks),
            special_tokens=self._content["special_tokens"],
        )

    def encode(self, text: str) -> list[int]:
        return self._encode_array(text).tolist()

    def _encode_array(self, text: str) -> np.ndarray:
        # The same ids as encode_ordinary, but as an array.
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
        """Write tokenizer.json into a folder, atomically; creates the folder."""
        folder = epath.Path(folder).expanduser()
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "fingerprint": self.fingerprint(),
            **self._content,
        }
        files.write_whole(folder / FILE_NAME, json.dumps(content, indent=1) + "\n")


def _check_ranks(ranks: Mapping[bytes, int], special: SpecialIds, size: int) -> None:
    ids = {*ranks.values(), *special}
    missing = [byte for byte in range(BYTES) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"the single byte {missing[0]} is not among the tokens")
    if b"" in ranks:
        raise ValueError("a token is empty")
    if len(ids) != len(ranks) + len(special):
        raise ValueError("two tokens have the same id")
    if min(ids) < 0 or size > len(ids) + 1:  # published tokenizers skip at most one id
        raise ValueError("the ids are not consecutive")


def _to_text(ranks: Mapping[bytes, int]) -> list[str | None]:
    """Tokens in base64 by rank; None for an unused rank."""
    tokens: list[str | None] = [None] * (max(ranks.values()) + 1)
    for token, rank in ranks.items():
        tokens[rank] = base64.b64encode(token).decode()
    return tokens


def load_bpe(folder: epath.Path, threads: int) -> BpeTokenizer:
    """Load a tokenizer that train_tokenizer.py saved. Raises ValueError that names its folder."""
    path = folder / FILE_NAME
    if not path.exists():
        raise ValueError(
            f"Tokenizer not found at {folder}: set tokenizer_path to the folder of one, or train it with"
            f" .venv/bin/python MaxNano/train_tokenizer.py configs/base.yml tokenizer_path={folder} and"
            " the other arguments of this command"
        )
    return parse_file(
        path, "a tokenizer made by train_tokenizer.py", lambda: _read_bpe(path, threads)
    )


def _read_bpe(path: epath.Path, threads: int) -> BpeTokenizer:
    content = json.loads(read_bytes(path).decode())
    if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
        raise ValueError(f'"format" is not "{_FORMAT}"')
    if content.pop("version", None) != _VERSION:
        raise ValueError(f'"version" is not {_VERSION}')
    if content.pop("fingerprint", None) != content_hash(content):
        raise ValueError("the content does not match its fingerprint")
    if set(content["special_tokens"]) != set(SPECIAL_TOKENS):
        raise ValueError("it has other special tokens")
    tokens = content["tokens"]
    ranks = {
        base64.b64decode(token, validate=True): rank
        for rank, token in enumerate(tokens)
        if token is not None
    }
    if len(ranks) != len(tokens) - tokens.count(None):
        raise ValueError("a token is repeated")
    return BpeTokenizer(content["pattern"], ranks, content["special_tokens"], threads)


def load_tiktoken(path: epath.Path, threads: int) -> BpeTokenizer:
    """Load a rank file: a line `base64 rank` per token. An unknown file gets nanochat's pattern.

    Raises ValueError that names the file.
    """
    return parse_file(path, "a tiktoken rank file", lambda: _read_tiktoken(path, threads))


def _read_tiktoken(path: epath.Path, threads: int) -> BpeTokenizer:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_bytes(path).splitlines(), start=1):
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
    """Train a tokenizer of vocab_size ids on texts: bytes, merges, special tokens.

    The same texts give the same tokenizer. Raises ValueError if vocab_size is too small for bytes
    and special tokens, or if the texts have too few different pairs to fill it.
    """
    import rustbpe

    smallest = BYTES + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: {BYTES} bytes and {len(SPECIAL_TOKENS)} special"
            f" tokens need vocab_size={smallest} at least"
        )
    trainer = rustbpe.Tokenizer()
    pieces = (piece for text in texts for piece in cut_long_space(valid_unicode(text)))
    trainer.train_from_iterator(pieces, vocab_size - len(SPECIAL_TOKENS), pattern=NANOCHAT_PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    trained = len(ranks) + len(SPECIAL_TOKENS)
    if trained < vocab_size:
        raise ValueError(
            f"the text yields only {trained} of the vocab_size={vocab_size} tokens: train on more"
            f" text or set vocab_size={trained} or less"
        )
    return BpeTokenizer(NANOCHAT_PATTERN, ranks, threads=threads)

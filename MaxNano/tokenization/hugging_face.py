"""Hugging Face tokenizer.json files as tokenizers, through the library `tokenizers`."""

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from MaxNano.tokenization.tokenizer import (
    SPECIAL_TOKENS,
    Tokenizer,
    byte_characters,
    byte_of_piece,
    bytes_of_piece,
    content_hash,
    decode_runs,
    parse_file,
    piece_list,
    place_specials,
    read_bytes,
    valid_unicode,
)

# Names of begin-of-text tokens in Hugging Face files, the most likely first.
_BOS_NAMES = ("<|begin_of_text|>", "<|startoftext|>", "<bos>", "<s>", "<|endoftext|>")


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face tokenizer.json; the library uses its own threads.

    Its normalizer applies; its post-processor, truncation and padding do not. Raises ValueError if
    the file is damaged, or if its decoder hides the bytes of a token, as WordPiece's does.
    """

    def __init__(self, text: str, threads: int = 1):
        try:
            import tokenizers
        except ImportError:
            raise ValueError("it needs the package tokenizers: pip install tokenizers") from None
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
        special = place_specials(given, len(tokens), tokens)
        to_bytes = _bytes_of_token(content.get("decoder"))
        plain = {name for name, entry in added.items() if not entry["special"]}
        silent = [i for i, token in tokens.items() if token in added and token not in plain]
        pieces = {
            i: token.encode() if token in added else to_bytes(token) for i, token in tokens.items()
        }
        digest = content_hash({"tokenizer": content, "special_tokens": special})
        super().__init__(piece_list(pieces, special), special, silent, digest, threads)

    def _keep_special_tokens_text(self) -> None:
        self._model.encode_special_tokens = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._keep_special_tokens_text()  # the library's pickle loses it

    def _unreachable(self, model: Mapping[str, Any], added: Collection[str]) -> dict[str, int]:
        """The special tokens of the file that its model cannot produce from text.

        The model produces a token that is the result of a merge or, unless it is plain BPE, any
        token in its vocabulary.
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

        return decode_runs(self._checked(ids), self.special, decode)


def _bytes_of_token(decoder: Mapping[str, Any] | None) -> Callable[[str], bytes]:
    """The function from a token of a tokenizer.json to its bytes, according to the decoder."""
    kinds = {step["type"] for step in _decoder_steps(decoder)}
    if "ByteLevel" in kinds:
        to_byte = {character: byte for byte, character in enumerate(byte_characters())}

        def byte_level(token: str) -> bytes:
            if not to_byte.keys() >= set(token):
                return token.encode()  # outside that alphabet: the library takes it literally
            return bytes([to_byte[character] for character in token])

        return byte_level
    if kinds & {"Metaspace", "ByteFallback"}:

        def spaced(token: str) -> bytes:
            is_byte = "ByteFallback" in kinds and re.fullmatch(r"<0x[0-9A-F]{2}>", token)
            return byte_of_piece(token) if is_byte else bytes_of_piece(token)

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


def load(path: epath.Path, threads: int) -> HuggingFaceTokenizer:
    """Load a tokenizer.json. Raises ValueError that names it."""
    return parse_file(
        path,
        "a Hugging Face tokenizer.json",
        lambda: HuggingFaceTokenizer(read_bytes(path).decode(), threads),
    )

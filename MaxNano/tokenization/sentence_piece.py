"""SentencePiece models as tokenizers."""

import hashlib
from collections.abc import Iterable, Sequence

import sentencepiece
from etils import epath

from MaxNano.tokenization.tokenizer import (
    SPECIAL_TOKENS,
    Tokenizer,
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


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; its begin-of-sentence symbol serves as <|bos|>.

    Its normalization applies: most models prepend a space to a text, which counts as a byte in
    token_bytes(), and may fold characters. The unknown token counts as 0 bytes. Raises ValueError
    if the model is damaged.
    """

    def __init__(self, model: bytes, threads: int = 1):
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise ValueError("the model cannot be read") from None
        size = self._model.vocab_size()
        if not size:
            raise ValueError("the model is empty")
        special = place_specials(self._control_symbols(size), size, ())
        pieces = piece_list({i: self._piece(i) for i in range(size)}, special)
        content = {"model": hashlib.sha256(model).hexdigest(), "special_tokens": special}
        super().__init__(pieces, special, (), content_hash(content), threads)

    def _control_symbols(self, size: int) -> dict[str, int]:
        """The special tokens among the model's control symbols, which no text encodes to."""
        controls = {self._model.id_to_piece(i): i for i in range(size) if self._model.is_control(i)}
        given = {name: controls[name] for name in SPECIAL_TOKENS if name in controls}
        if self._model.bos_id() >= 0:
            given.setdefault(SPECIAL_TOKENS[0], self._model.bos_id())
        return given

    def _piece(self, i: int) -> bytes:
        piece = self._model.id_to_piece(i)
        if self._model.is_control(i) or self._model.is_unknown(i) or self._model.is_unused(i):
            return b""
        return byte_of_piece(piece) if self._model.is_byte(i) else bytes_of_piece(piece)

    def encode(self, text: str) -> list[int]:
        return self._model.encode(valid_unicode(text))

    def _encode_rows(self, texts: Sequence[str]) -> Iterable[Sequence[int]]:
        return self._model.encode([valid_unicode(text) for text in texts], num_threads=self.threads)

    def decode(self, ids: Sequence[int]) -> str:
        return decode_runs(self._checked(ids), self.special, self._model.decode)


def load(path: epath.Path, threads: int) -> SentencePieceTokenizer:
    """Load a SentencePiece model file. Raises ValueError that names it."""
    return parse_file(
        path, "a SentencePiece model", lambda: SentencePieceTokenizer(read_bytes(path), threads)
    )

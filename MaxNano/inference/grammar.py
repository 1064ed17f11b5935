"""Constrained decoding: which tokens may follow, so that a reply is JSON that satisfies a schema.

llguidance compiles a schema for a tokenizer and computes the mask of the next token on the host. It
is part of the `serve` extra and imported on use.
Source: https://github.com/guidance-ai/llguidance.
"""

import functools
import json
from typing import TYPE_CHECKING

import numpy as np

from MaxNano import console
from MaxNano.tokenization.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

MAX_SCHEMA_BYTES = 64 * 1024
MAX_SCHEMA_DEPTH = 64  # objects and lists inside each other
_MASK_BITS = 32  # tokens in a word of a mask

# At most a space or a line's indentation between JSON tokens: a model may not fill its answer with
# whitespace. Patterns of a schema are compiled on use; the limits below bound that.
_OPTIONS = {"whitespace_pattern": r"[ ]?|\n[ ]{0,32}"}
_LIMITS = {
    "initial_lexer_fuel": 1_000_000,  # about 20 ms
    "step_lexer_fuel": 200_000,  # about 14 ms per token
    "step_max_items": 50_000,
    "max_lexer_states": 20_000,  # about 2 kB each
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}


class Grammar:
    """A compiled grammar. Requests may share it; each sample has its own GrammarState."""

    def __init__(self, matcher: "llguidance.LLMatcher", vocab_size: int, end: int):
        self.vocab_size = vocab_size
        self.end = end  # the token that ends the reply, permitted when the value is complete
        self._matcher = matcher

    def start(self) -> "GrammarState":
        """The state before the first token."""
        return GrammarState(self._matcher.deep_copy(), self.vocab_size)


class GrammarState:
    """The state of a sample's grammar after the tokens taken so far.

    allowed: the tokens that may follow, as bits: token t is bit t % 32 of word t // 32, int32.
    finish: None while tokens may follow; then "stop" if the text is complete, or "error" if it
    cannot be completed, for example because of a limit.
    """

    def __init__(self, matcher: "llguidance.LLMatcher", vocab_size: int):
        self._matcher = matcher
        self.allowed = np.zeros(-(-vocab_size // _MASK_BITS), np.int32)
        self.finish: str | None = None
        self._advance()

    def take(self, token: int) -> None:
        """Continue after an allowed token that does not end the text."""
        self._matcher.consume_token(token)
        self._advance()

    def _advance(self) -> None:
        matcher = self._matcher
        if not matcher.is_stopped():
            matcher.unsafe_compute_mask_ptr(self.allowed.ctypes.data, self.allowed.nbytes)
        if matcher.is_error() or not self.allowed.any():
            self.finish = "error"
        elif matcher.is_stopped():
            self.finish = "stop" if matcher.is_accepting() else "error"


def compile_json(
    schema: dict | bool | None, tokenizer: Tokenizer, *, lenient: bool = False
) -> Grammar:
    """Compile a JSON schema to the grammar of the values that satisfy it; None: any JSON object.

    lenient: ignore keywords that are not supported. Raises ValueError with one line if the schema
    is invalid, cannot be satisfied, is too large or too deep or would take too long, or if
    llguidance is not installed. Time and memory are bounded.
    """
    try:
        import llguidance
    except ImportError:
        raise ValueError("it needs the package llguidance: pip install llguidance") from None
    if schema is None:
        schema = {"type": "object"}
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    if not isinstance(schema, dict):
        raise ValueError(f"a JSON schema must be an object, not {type(schema).__name__}")
    _check_depth(schema)
    try:
        text = json.dumps(schema, allow_nan=False)
        if len(text) > MAX_SCHEMA_BYTES:
            raise ValueError(f"it has {len(text)} bytes; the limit is {MAX_SCHEMA_BYTES}")
        grammar = llguidance.LLMatcher.grammar_from_json_schema(
            text, overrides={**_OPTIONS, "lenient": lenient}
        )
        limits = llguidance.LLParserLimits(**_LIMITS)
        matcher = llguidance.LLMatcher(_vocabulary(tokenizer), grammar, log_level=0, limits=limits)
        compiled = Grammar(matcher, tokenizer.vocab_size, tokenizer.special.assistant_end)
        is_possible = compiled.start().finish is None
    except (ValueError, TypeError) as error:
        reason = console.one_line(str(error), 200)
        raise ValueError(f"the JSON schema cannot be used: {reason}") from None
    if matcher.is_error() or not is_possible:
        reason = matcher.get_error().partition("<")[0].strip()
        if not reason or reason.startswith("NoExtension"):
            reason = "no value satisfies it"
        raise ValueError(f"the JSON schema cannot be used: {console.one_line(reason, 200)}")
    return compiled


def _check_depth(schema):
    """Raise ValueError if a schema is nested deeper than MAX_SCHEMA_DEPTH."""
    level = [schema]
    for _ in range(MAX_SCHEMA_DEPTH + 1):
        level = [
            child
            for value in level
            if isinstance(value, dict | list)
            for child in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise ValueError(
        f"the JSON schema cannot be used: it is nested more than {MAX_SCHEMA_DEPTH} levels deep"
    )


class _Encoder:
    """What llguidance asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        count = tokenizer.vocab_size
        sizes = tokenizer.token_bytes()
        self.eos_token_id = tokenizer.special.assistant_end
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [tokenizer.decode_bytes([token]) for token in range(count)]
        # No text encodes to these.
        self.special_token_ids = [token for token in range(count) if sizes[token] == 0]
        self._tokenizer = tokenizer
        self._ids = {piece: token for token, piece in enumerate(self.tokens) if sizes[token]}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: bytes) -> list[int]:
        """Tokens of exactly these bytes: the tokenizer's, unless it adds a space or folds letters."""
        ids = self._tokenizer.encode(text.decode("utf-8", "replace"))
        if self._tokenizer.decode_bytes(ids) == text:
            return ids
        ids = []
        while text:
            sizes = range(min(self._longest, len(text)), 0, -1)
            size = next((n for n in sizes if text[:n] in self._ids), None)
            if size is None:
                break
            ids.append(self._ids[text[:size]])
            text = text[size:]
        return ids


@functools.lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer) -> "llguidance.LLTokenizer":
    import llguidance

    return llguidance.LLTokenizer(
        llguidance.TokenizerWrapper(_Encoder(tokenizer)),
        n_vocab=tokenizer.vocab_size,
        slices=llguidance.LLTokenizer.json_slices(),
    )

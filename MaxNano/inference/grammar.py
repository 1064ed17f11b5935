"""Constrained decoding: which tokens may follow, so that a reply is JSON that satisfies a schema.

llguidance compiles a schema for a tokenizer and computes the mask of the next token on the host. It
is part of the `serve` extra and imported on use.
Source: https://github.com/guidance-ai/llguidance.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from MaxNano import console
from MaxNano.inference import json_schema
from MaxNano.tokenization.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

MAX_SCHEMA_BYTES = 64 * 1024
_MASK_BITS = 32  # tokens in a word of a mask
CLOSING_TOKENS = 64  # the last tokens of a reply, in which its end is planned
CLOSING_RESERVE = 8  # tokens that a reply may end early
NEVER = 1 << 31  # more tokens than a reply has
LONGEST_REPEAT = 256  # tokens; of a value that needs more there is only one in a reply

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

    def __init__(self, matcher: "llguidance.LLMatcher", tokenizer: Tokenizer):
        self.vocab_size = tokenizer.vocab_size
        # The token that ends the reply, permitted when the value is complete.
        self.end = tokenizer.special.assistant_end
        # Values may follow each other while at least so many tokens are left; 0: there is only one.
        self.again = 0
        self._matcher = matcher
        self._closer = _closer(tokenizer)

    def start(self) -> "GrammarState":
        """The state before the first token."""
        return GrammarState(self._matcher.deep_copy(), self._closer, self.again)


class GrammarState:
    """The state of a sample's grammar after the tokens taken so far.

    allowed: the tokens that may follow, as bits: token t is bit t % 32 of word t // 32, int32.
    finish: None while tokens may follow; then "stop" if the text is complete, or "grammar_error" if
    it cannot be completed, for example because of a limit.
    """

    def __init__(self, matcher: "llguidance.LLMatcher", closer: "_Closer", again: int = 0):
        self._matcher = matcher
        self._closer = closer
        self._again = again  # Grammar.again
        self._closing: list[int] = []  # the tokens that complete the text, once it must end
        self.allowed = np.zeros(-(-closer.vocab_size // _MASK_BITS), np.int32)
        self.finish: str | None = None
        self._advance()

    def take(self, token: int) -> None:
        """Continue after an allowed token that does not end the text."""
        self._matcher.consume_token(token)
        self._closing = self._closing[1:]
        self._advance()

    def limit(self, tokens_left: int) -> None:
        """Allow only the tokens of a short end if there is just enough space left for it.

        A model that never learned to end a text fills its reply otherwise, which is then no JSON.
        A further value begins only if there is space for it.
        """
        if self.finish is None and tokens_left < self._again:
            self._closer.keep_to_line(self.allowed)
        if tokens_left > CLOSING_TOKENS or self.finish:
            return
        if not self._closing:
            end = self.plan_end(tokens_left)
            self._closing = end if len(end) + CLOSING_RESERVE >= tokens_left else []
        if self._closing:
            word, bit = divmod(self._closing[0], _MASK_BITS)
            self.allowed[:] = 0
            self.allowed.view(np.uint32)[word] = 1 << bit

    def plan_end(self, tokens_left: int) -> list[int]:
        """Tokens that complete the text; none if they are more than `tokens_left`."""
        state, tokens = GrammarState(self._matcher.deep_copy(), self._closer), []
        while state.finish is None and len(tokens) < tokens_left:
            if self._again:
                self._closer.keep_to_line(state.allowed)
            tokens.append(self._closer.choose(state.allowed))
            if tokens[-1] == self._closer.end:
                return tokens
            state.take(tokens[-1])
        return tokens if state.finish == "stop" else []

    def _advance(self) -> None:
        matcher = self._matcher
        if not matcher.is_stopped():
            matcher.unsafe_compute_mask_ptr(self.allowed.ctypes.data, self.allowed.nbytes)
        if matcher.is_error() or not self.allowed.any():
            self.finish = "grammar_error"
        elif matcher.is_stopped():
            self.finish = "stop" if matcher.is_accepting() else "grammar_error"


def compile_json(
    schema: dict | bool | None, tokenizer: Tokenizer, *, lenient: bool = False
) -> Grammar:
    """Compile a JSON schema to the grammar of the values that satisfy it; None: any JSON object.

    lenient: ignore keywords that are not supported. Raises ValueError with one line if the schema
    is invalid, cannot be satisfied by a finite value, is too large or too deep or would take too
    long, or if llguidance is not installed. Time and memory are bounded.
    """

    def write(matcher_type: type["llguidance.LLMatcher"]) -> str:
        overrides = {**_OPTIONS, "lenient": lenient}
        return matcher_type.grammar_from_json_schema(_json_text(schema), overrides=overrides)

    return _compile(write, tokenizer)


def compile_calls(
    call: dict, most: int, reply: dict | bool | None, tokenizer: Tokenizer
) -> Grammar:
    """Compile the grammar of 1 to `most` JSON values of the schema `call`, one per line, or of one
    value of the schema `reply` instead; None: calls only. Errors and limits as of compile_json.
    """

    options = {"x-guidance": {**_OPTIONS, "lenient": True}}

    def compile_one(start: str, **schemas: dict | bool) -> Grammar:
        def write(matcher_type: type["llguidance.LLMatcher"]) -> str:
            rules = [f"{name}: %json {_json_text(x, options)}" for name, x in schemas.items()]
            return matcher_type.grammar_from_lark("\n".join([start, *rules]))

        return _compile(write, tokenizer)

    start = "start: call" + (f' ("\\n" call){{0,{most - 1}}}' if most > 1 else "")
    calls = compile_one(start, call=call)
    if most > 1:
        calls.again = NEVER
        shortest = calls.start().plan_end(LONGEST_REPEAT)
        if shortest:  # twice its tokens, because another value may be chosen
            calls.again = 2 * len(shortest) + CLOSING_RESERVE
    if reply is None:
        return calls
    either = compile_one(f"{start} | reply", call=call, reply=reply)
    either.again = calls.again
    return either


def _json_text(schema: dict | bool | None, options: Mapping[str, Any] | None = None) -> str:
    """A schema as text, with options of llguidance. Raises ValueError for one of no use."""
    if schema is None:
        schema = {"type": "object"}
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    if not isinstance(schema, dict):
        raise ValueError(f"it must be an object, not {type(schema).__name__}")
    json_schema.check_depth(schema)
    text = json.dumps({**schema, **(options or {})}, allow_nan=False)
    if len(text) > MAX_SCHEMA_BYTES:
        raise ValueError(f"it has {len(text)} bytes; the limit is {MAX_SCHEMA_BYTES}")
    json_schema.check_end(schema)
    return text


def _compile(
    write: Callable[[type["llguidance.LLMatcher"]], str],
    tokenizer: Tokenizer,
) -> Grammar:
    """The grammar that `write` makes with the methods of llguidance."""
    try:
        import llguidance
    except ImportError:
        raise ValueError("it needs the package llguidance: pip install llguidance") from None
    try:
        grammar = write(llguidance.LLMatcher)
        limits = llguidance.LLParserLimits(**_LIMITS)
        matcher = llguidance.LLMatcher(_vocabulary(tokenizer), grammar, log_level=0, limits=limits)
        compiled = Grammar(matcher, tokenizer)
        is_possible = compiled.start().finish is None
    except (ValueError, TypeError) as error:
        reason = console.one_line(str(error), 200)
        raise ValueError(f"the JSON schema cannot be used: {reason}") from None
    if matcher.is_error() or not is_possible:
        # In a grammar of several values, before the lines of the grammar: "at 2(7): ...: REASON".
        reason = matcher.get_error().partition("\n   1 |")[0].partition("<")[0].strip()
        reason = reason.rpartition("failed to compile JSON schema: ")[2]
        if not reason or reason.startswith("NoExtension"):
            reason = "no value satisfies it"
        raise ValueError(f"the JSON schema cannot be used: {console.one_line(reason, 200)}")
    return compiled


class _Closer:
    """Chooses the tokens of a short end."""

    def __init__(self, tokenizer: Tokenizer):
        self.vocab_size = tokenizer.vocab_size
        self.end = tokenizer.special.assistant_end
        sizes = tokenizer.token_bytes()
        pieces = [
            tokenizer.decode_bytes([token]) if sizes[token] else b""
            for token in range(self.vocab_size)
        ]
        ids = {piece: token for token, piece in enumerate(pieces)}
        self._letters = [ids[letter] for letter in (b"q", b"z") if letter in ids]
        self._quote = [ids[b'"']] if b'"' in ids else []
        # A comma after a number that may not be the last value.
        self._closing = [ids[piece] for piece in (b"}", b"]", b'"', b",") if piece in ids]
        self._line_starts = _bits([piece.startswith(b"\n") for piece in pieces])
        self._line_ends = _bits([re.search(rb"}\s*\n", piece) is not None for piece in pieces])
        # The longest text leads to the end of a word soonest; white space and brackets do not.
        self._scores = np.array(
            [len(piece.strip()) - 0.5 * piece.strip().startswith((b"{", b"[")) for piece in pieces]
        )

    def keep_to_line(self, allowed: np.ndarray) -> None:
        """Disallow the tokens that begin a new line after a value, unless there are no others."""
        word, bit = divmod(self.end, _MASK_BITS)
        kept = allowed & ~self._line_ends
        if allowed.view(np.uint32)[word] >> bit & 1:  # a value is complete
            kept &= ~self._line_starts
        if kept.any():
            allowed[:] = kept

    def choose(self, allowed: np.ndarray) -> int:
        """An allowed token, given as GrammarState has them."""
        bits = np.unpackbits(allowed.view(np.uint8), bitorder="little")[: self.vocab_size]
        if bits[self.end]:
            return self.end
        is_string = len(self._letters) == 2 and bits[self._letters].all()  # of any characters
        for token in self._quote if is_string else self._closing:
            if bits[token]:
                return token
        return int(np.argmax(np.where(bits, self._scores, -1.0)))


_closer = functools.lru_cache(maxsize=4)(_Closer)


def _bits(flags: Sequence[bool]) -> np.ndarray:
    """Tokens as bits, as GrammarState has them."""
    padded = np.zeros(-(-len(flags) // _MASK_BITS) * _MASK_BITS, bool)
    padded[: len(flags)] = flags
    return np.packbits(padded, bitorder="little").view(np.int32)


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

"""Grammars: whatever the mask allows ends as JSON that satisfies the schema, in bounded time."""

import io
import json
import random

import numpy as np
import pytest
import sentencepiece
from fake_engine import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from MaxNano.inference import grammar
from MaxNano.inference.grammar import CLOSING_TOKENS, compile_calls, compile_json
from MaxNano.inference.json_schema import check_end
from MaxNano.tokenization.bpe import BpeTokenizer
from MaxNano.tokenization.sentence_piece import SentencePieceTokenizer
from MaxNano.tokenization.tokenizer import SpecialIds, Tokenizer


class Pieces(Tokenizer):
    """Tokens as a SentencePiece model has them: pieces with spaces, bytes, an unknown token, twins."""

    def __init__(self, size=250):
        special = SpecialIds(*range(size - 9, size))
        pieces = [b"", b"\xff", *(bytes([i]) for i in range(128)), *(b"\xc3\xa9", b"\xc3", b"\xa9")]
        pieces += [
            b'{"',
            b'":',
            b'", "',
            b'"}',
            b" {",
            b'{"',
            b"true",
            b"12",
            b" 7",
            b"]",
            b"a\xc3",
        ]
        pieces += [b"w%d" % i for i in range(size - 9 - len(pieces))]
        names = [b"<%d>" % i for i in special]
        super().__init__([*pieces, *names], special, (), "pieces", 1)

    def encode(self, text):
        return [byte + 2 for byte in text.encode("ascii", "replace")]

    def _encode_rows(self, texts):
        return map(self.encode, texts)


def sentence_piece():
    """A model that was trained on JSON, and writes other bytes by byte tokens."""
    lines = [json.dumps({"name": f"word{i}", "list": [i, True, None]}) for i in range(50)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return SentencePieceTokenizer(model.getvalue())


TOKENIZERS = {
    "sentencepiece": sentence_piece(),
    "bytes": byte_tokenizer(),
    "merges": BpeTokenizer(
        r"\s+|\S+",
        {bytes([i]): i for i in range(256)}
        | {piece: 256 + i for i, piece in enumerate([b'{"', b'":', b"tr", b"true", b"\xc3\xa9"])},
    ),
    "pieces": Pieces(),
}


def allowed(state):
    """The ids that may follow."""
    bits = np.unpackbits(state.allowed.view(np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()


def write(compiled, tokenizer, seed, limit=400):
    """A random text of a grammar: (bytes, whether it is complete). Prefers to end."""
    rng, state, tokens = random.Random(seed), compiled.start(), []
    while state.finish is None and len(tokens) < limit:
        ids = allowed(state)
        if compiled.end in ids and rng.random() < 0.5:
            break
        closing = [i for i in ids if tokenizer.decode_bytes([i])[:1] in (b'"', b"}", b"]")]
        tokens.append(rng.choice(closing if closing and rng.random() < 0.3 else ids))
        if tokens[-1] == compiled.end:
            return tokenizer.decode_bytes(tokens[:-1]), True
        state.take(tokens[-1])
    is_complete = state.finish == "stop" or state.finish is None and compiled.end in allowed(state)
    return tokenizer.decode_bytes(tokens), is_complete


SCALARS = st.sampled_from(
    [
        {"type": "integer"},
        {"type": "integer", "minimum": -3, "maximum": 12},
        {"type": "number"},
        {"type": "boolean"},
        {"type": "null"},
        {"type": "string"},
        {"type": "string", "maxLength": 4},
        {"type": "string", "pattern": "^[a-c]{1,3}$"},
        {"enum": ["red", "blue", 3, None]},
        {"const": {"a": [1, "é"]}},
    ]
)


def _objects(inner):
    def build(properties, count):
        return {
            "type": "object",
            "properties": properties,
            "required": list(properties)[:count],
            "additionalProperties": False,
        }

    return st.builds(
        build, st.dictionaries(st.sampled_from("abcé "), inner, max_size=3), st.integers(0, 3)
    )


def _arrays(inner):
    return st.builds(
        lambda items, low, more: {
            "type": "array",
            "items": items,
            "minItems": low,
            "maxItems": low + more,
        },
        inner,
        st.integers(0, 2),
        st.integers(0, 2),
    )


SCHEMAS = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        _objects(inner),
        _arrays(inner),
        st.builds(lambda *options: {"anyOf": [*options]}, inner, inner),
    ),
    max_leaves=6,
)
TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
}


def satisfies(value, schema):
    """Whether a value satisfies a schema of SCHEMAS."""
    if "anyOf" in schema:
        return any(satisfies(value, option) for option in schema["anyOf"])
    if "const" in schema:
        return value == schema["const"]
    if "enum" in schema:
        return value in schema["enum"]
    kind = schema["type"]
    if kind in ("integer", "number"):
        types = (int,) if kind == "integer" else (int, float)
        low, high = schema.get("minimum", value), schema.get("maximum", value)
        return isinstance(value, types) and not isinstance(value, bool) and low <= value <= high
    if not isinstance(value, TYPES[kind]):
        return False
    if kind == "object":
        parts = schema["properties"]
        return set(schema["required"]) <= value.keys() <= parts.keys() and all(
            satisfies(part, parts[name]) for name, part in value.items()
        )
    if kind == "array":
        return schema["minItems"] <= len(value) <= schema["maxItems"] and all(
            satisfies(item, schema["items"]) for item in value
        )
    if kind == "string" and "pattern" in schema:
        return 1 <= len(value) <= 3 and set(value) <= set("abc")
    return kind != "string" or len(value) <= schema.get("maxLength", len(value))


@settings(max_examples=60)
@given(SCHEMAS, st.sampled_from(sorted(TOKENIZERS)), st.integers(0, 2**31))
def test_every_complete_text_satisfies_the_schema(schema, name, seed):
    tokenizer = TOKENIZERS[name]
    text, is_complete = write(compile_json(schema, tokenizer), tokenizer, seed)
    if is_complete:
        assert satisfies(json.loads(text.decode()), schema), text


def test_random_texts_are_mostly_complete():
    """The property above is about complete texts: they must occur."""
    tokenizer = TOKENIZERS["merges"]
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    compiled = compile_json(schema, tokenizer)
    complete = [write(compiled, tokenizer, seed, limit=1000)[1] for seed in range(20)]
    assert sum(complete) >= 15


ENDLESS = {
    "a text": {"type": "string"},
    "a title": {
        "type": "object",
        "properties": {"title": {"type": "string"}},
        "required": ["title"],
        "additionalProperties": False,
    },
    "rows": {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {"x": {"type": "integer"}, "is_new": {"type": "boolean"}},
            "required": ["x", "is_new"],
        },
    },
    "a tree": {
        "type": "object",
        "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
        "required": ["next"],
    },
}


@pytest.mark.parametrize("budget", [40, 100])
@pytest.mark.parametrize("schema", ENDLESS)
@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_a_model_that_never_ends_a_text_is_made_to(name, schema, budget):
    """It fills strings, numbers and lists as long as it may, and is left alone until the end nears."""
    tokenizer, rng = TOKENIZERS[name], random.Random(0)
    compiled = compile_json(ENDLESS[schema], tokenizer)
    state, tokens, restricted = compiled.start(), [], []
    while state.finish is None and len(tokens) < budget:
        before = allowed(state)
        state.limit(budget - len(tokens))
        ids = allowed(state)
        restricted.append(ids != before)
        going_on = [i for i in ids if tokenizer.decode_bytes([i]).isalnum()]
        tokens.append(rng.choice(going_on or [i for i in ids if i != compiled.end] or ids))
        if tokens[-1] == compiled.end:
            break
        state.take(tokens[-1])
    assert state.finish in (None, "stop") and (state.finish or tokens.pop() == compiled.end)
    json.loads(tokenizer.decode_bytes(tokens))
    assert not any(restricted[: max(0, budget - CLOSING_TOKENS)])


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_no_schema_means_any_object(name):
    tokenizer = TOKENIZERS[name]
    state = compile_json(None, tokenizer).start()
    starts = {tokenizer.decode_bytes([i]) for i in allowed(state)}
    assert starts and all(piece.startswith(b"{") for piece in starts)


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_the_end_follows_a_complete_value_and_no_special_token_is_text(name):
    tokenizer = TOKENIZERS[name]
    end, special = tokenizer.special.assistant_end, set(tokenizer.special)
    compiled = compile_json({"type": ["integer", "string"]}, tokenizer)
    number = compiled.start()
    assert special.isdisjoint(allowed(number))
    exact = grammar._Encoder(tokenizer)
    assert tokenizer.decode_bytes(exact("é 12".encode())) == "é 12".encode()
    for token in exact(b"12"):
        number.take(token)
        assert special & set(allowed(number)) == {end} and number.finish is None
    text = compiled.start()
    for token in exact(b'"<|assistant_end|>12'):
        text.take(token)
        assert special.isdisjoint(allowed(text)) and text.finish is None
    text.take(exact(b'"')[0])
    assert text.finish == "stop"


def test_a_text_that_cannot_go_on_is_an_error():
    state = compile_json({"type": "integer"}, TOKENIZERS["bytes"]).start()
    state.take(ord("x"))
    assert state.finish == "grammar_error"


def test_samples_do_not_share_their_state():
    compiled = compile_json(None, TOKENIZERS["bytes"])
    first, second = compiled.start(), compiled.start()
    before = allowed(second)
    first.take(ord("{"))
    assert allowed(first) != before == allowed(second) == allowed(compiled.start())


def test_whitespace_is_bounded():
    """A small model would fill its answer with it."""
    state = compile_json(None, TOKENIZERS["bytes"]).start()
    for byte in b"{\n" + b" " * 32 + b'"a": ':
        assert byte in allowed(state)
        state.take(byte)
    assert not {ord(" "), ord("\n"), ord("\t")} & set(allowed(state))


def nested(depth):
    schema = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def doubling(levels, key):
    """References that would unfold to 2 ** levels schemas."""
    names = {
        f"d{i}": {key: [{"$ref": f"#/$defs/d{i + 1}"}, {"$ref": f"#/$defs/d{i + 1}"}]}
        for i in range(levels)
    }
    return {"$defs": names | {f"d{levels}": {"type": "integer"}}, "$ref": "#/$defs/d0"}


REFUSED = {
    "no schema": "a text",
    "a list": [1],
    "false": False,
    "unknown type": {"type": "nonsense"},
    "type of a type": {"type": 7},
    "unsupported": {"not": {"type": "integer"}},
    "deep": nested(100),
    "very deep": nested(20_000),
    "large": {"enum": ["a" * 70_000]},
    "many": {"enum": [f"value {i}" for i in range(20_000)]},
    "only itself": {"$ref": "#"},
    "circle": {
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
        "$ref": "#/$defs/a",
    },
    "missing": {"$ref": "#/$defs/none"},
    "elsewhere": {"$ref": "https://example.com/schema.json"},
    "a file": {"$ref": "file:///etc/passwd"},
    "empty": {"enum": []},
    "contradiction": {"type": "integer", "minimum": 3, "maximum": 2},
    "bad pattern": {"type": "string", "pattern": "(("},
    "deep pattern": {"type": "string", "pattern": "(" * 5000 + ")" * 5000},
    "not a number": {"type": "number", "minimum": float("nan")},
    "surrogate": {"enum": ["\ud800"]},
    "product": {"allOf": [{"anyOf": [{"required": [f"a{i}"]}, {"required": [f"b{i}"]}]} for i in range(16)]},
    "intersection": {"allOf": [{"type": "string", "pattern": f"a{{{i}}}b*"} for i in range(12)]},
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compiled_is_refused_in_one_line(name):
    with pytest.raises(ValueError, match="JSON schema") as caught:
        compile_json(REFUSED[name], TOKENIZERS["bytes"])
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


TREE = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "parts": {"type": "array", "items": {"$ref": "#"}}},
    "required": ["name"],
}
BOUNDED = {
    "tree": TREE,
    "without an end": {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
    "doubling anyOf": doubling(40, "anyOf"),
    "doubling allOf": doubling(16, "allOf"),
    "long": {"type": "string", "minLength": 10**6, "maxLength": 10**9},
    "many items": {"type": "array", "minItems": 10**6, "maxItems": 10**9},
    "large pattern": {"type": "string", "pattern": "(((a{100}){100}){100}){100}"},
    "slow pattern": {"type": "string", "pattern": "^(a|b)*a(a|b){300}$"},
    "long constant": {"const": "a" * 50_000},
    "enumeration": {"enum": [str(i) for i in range(1500)]},
    "properties": {"type": "object", "properties": {f"k{i}": {} for i in range(500)}},
    "large numbers": {"type": "integer", "minimum": 1, "maximum": 10**300},
}


@pytest.mark.parametrize("name", BOUNDED)
def test_hard_schemas_cost_bounded_time(name):
    """Twenty random tokens: compiled and written, or refused. The limits hold, not the clock."""
    tokenizer = TOKENIZERS["bytes"]
    try:
        compiled = compile_json(BOUNDED[name], tokenizer)
    except ValueError as error:
        assert str(error).startswith("the JSON schema cannot be used: ")
    else:
        text, _ = write(compiled, tokenizer, seed=1, limit=20)
        assert text


SELF = {"$ref": "#"}
NEXT = {"type": "object", "properties": {"a": SELF}, "required": ["a"]}
PAIR = {"type": "object", "properties": {"a": {"$ref": "#/$defs/d1"}}, "required": ["a"]}
BACK = {"type": "array", "items": {"$ref": "#/$defs/d0"}, "minItems": 2}


def chain(names, last):
    """References in a row; names: the order in which they are written."""
    links = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}]} for i in names}
    return {"$ref": "#/$defs/d0", "$defs": links | {f"d{len(names)}": last}}


ENDLESS_SCHEMAS = {
    "itself": SELF,
    "a property": NEXT,
    "an item": {"type": "array", "items": SELF, "minItems": 1},
    "a first item": {"type": "array", "prefixItems": [{}, SELF], "items": {}, "minItems": 2},
    "the rest": {"type": "array", "prefixItems": [{}], "items": SELF, "minItems": 2},
    "any additional property": {"type": "object", "required": ["x"], "additionalProperties": SELF},
    "each option": {"anyOf": [NEXT, {"type": "array", "items": SELF, "minItems": 1}]},
    "one part": {"allOf": [{"type": "object"}, NEXT]},
    "each type": NEXT | {"type": ["object", "array"], "items": SELF, "minItems": 1},
    "two in turn": {"$ref": "#/$defs/d0", "$defs": {"d0": PAIR, "d1": BACK}},
    "escaped names": {"$ref": "#/$defs/a~1b%25", "$defs": {"a/b%": NEXT}},
    "a long chain": chain(range(300), {"$ref": "#/$defs/d0"}),
}
ENDING_SCHEMAS = {
    "an optional property": {"type": "object", "properties": {"a": SELF}},
    "a list": {"type": "array", "items": SELF},
    "no type": {"properties": {"a": SELF}, "required": ["a"]},
    "or null": NEXT | {"type": ["object", "null"]},
    "an option": {"anyOf": [NEXT, {"const": 1}]},
    "one of two in turn": {"$ref": "#/$defs/d0", "$defs": {"d0": PAIR, "d1": BACK | {"minItems": 0}}},
    "constants": {"const": {"$ref": "#"}},
    "an unused one": {"type": "integer", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    "by a pattern": {"type": "object", "required": ["x"], "patternProperties": {"x": SELF}},
    "a chain": chain(range(300), {"type": "null"}),
    "a chain in reverse": chain(range(299, -1, -1), {"type": "null"}),
    "a chain in zigzag": chain(sorted(range(300), key=lambda i: (i % 7) * 2000 + i), {}),
    "what is not valid": {"type": {}, "required": 1, "anyOf": {}, "minItems": "1", "$ref": 3},
    "what is missing": {"$ref": "#/$defs/none"},
}  # fmt: skip


@pytest.mark.parametrize("name", ENDLESS_SCHEMAS)
def test_a_schema_that_requires_itself_without_an_end_is_refused(name):
    with pytest.raises(ValueError, match="requires itself without an end"):
        check_end(ENDLESS_SCHEMAS[name])
    with pytest.raises(ValueError, match="cannot be used: it requires itself"):
        compile_json(ENDLESS_SCHEMAS[name], TOKENIZERS["bytes"])
    with pytest.raises(ValueError, match="cannot be used: it requires itself"):
        compile_calls(ENDLESS_SCHEMAS[name], 2, None, TOKENIZERS["bytes"])


@pytest.mark.parametrize("name", ENDING_SCHEMAS)
def test_a_schema_that_may_end_is_not_refused_for_that(name):
    check_end(ENDING_SCHEMAS[name])


NAMED = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
NAMED |= {"additionalProperties": False}
# Tokens that end a value and begin the next one at once.
LINES = BpeTokenizer(
    r"\s+|\S+",
    {bytes([i]): i for i in range(256)}
    | {piece: 256 + i for i, piece in enumerate([b"}\n", b'1}\n{"', b'\n{"n": 2}', b'{"n":'])},
)


def values_of(text):
    """The JSON values of a text, one per line."""
    values, at = [], 0
    while at < len(text):
        assert values == [] or text[at] == "\n"
        at += len(text[at:]) - len(text[at:].lstrip())
        value, at = json.JSONDecoder().raw_decode(text, at)
        values.append(value)
    return values


@pytest.mark.parametrize("tokenizer", [LINES, TOKENIZERS["bytes"]], ids=["lines", "bytes"])
@pytest.mark.parametrize(
    ("most", "reply"), [(1, None), (1, {"const": "no"}), (3, None), (3, {"const": "no"})]
)
def test_values_follow_each_other_if_there_is_space(tokenizer, most, reply):
    """Whatever the budget is: whole values, one per line, or the reply."""
    compiled = compile_calls(NAMED, most, reply, tokenizer)
    seen = {}
    for seed in range(60):
        budget = (12, 30, 60, 200)[seed % 4]
        rng, state, tokens = random.Random(seed), compiled.start(), []
        while state.finish is None and len(tokens) < budget:
            state.limit(budget - len(tokens))
            ids = allowed(state)
            closing = [i for i in ids if b"}" in tokenizer.decode_bytes([i])]
            tokens.append(rng.choice(closing if closing and rng.random() < 0.3 else ids))
            if tokens[-1] == compiled.end:
                break
            state.take(tokens[-1])
        ended = state.finish == "stop" or tokens.pop() == compiled.end
        text = tokenizer.decode_bytes(tokens).decode()
        assert ended and (reply or text.startswith("{")), (budget, text)
        values = values_of(text)
        is_call = [isinstance(value, dict) and type(value["n"]) is int for value in values]
        assert all(is_call) or reply and values == ["no"]
        seen.setdefault(budget, set()).add(len(values))
    assert seen[12] == {1} and min(most, 2) <= max(seen[200]) <= most


@pytest.mark.parametrize("name", ["no schema", "unknown type", "missing", "empty", "bad pattern"])
def test_a_schema_of_calls_that_cannot_be_compiled_is_refused_with_the_same_words(name):
    for call, reply in ((REFUSED[name], None), ({"type": "null"}, REFUSED[name])):
        with pytest.raises(ValueError, match="cannot be used") as told:
            compile_calls(call, 2, reply, TOKENIZERS["bytes"])
        with pytest.raises(ValueError, match="cannot be used") as expected:
            compile_json(REFUSED[name], TOKENIZERS["bytes"])
        assert str(told.value) == str(expected.value)


def test_keywords_without_support_are_ignored_on_request():
    schema = {"type": "array", "items": {"type": "null"}, "uniqueItems": True}
    with pytest.raises(ValueError, match="uniqueItems"):
        compile_json(schema, TOKENIZERS["bytes"])
    assert compile_json(schema, TOKENIZERS["bytes"], lenient=True).start().finish is None


def test_a_tokenizer_without_the_characters_of_json_is_refused():
    special = SpecialIds(*range(1, 10))

    class Letters(Pieces):
        def __init__(self):
            names = [b"<%d>" % i for i in special]
            Tokenizer.__init__(self, [b"a", *names], special, (), "letters", 1)

    with pytest.raises(ValueError, match="no value satisfies it"):
        compile_json(None, Letters())


def test_without_the_library_the_error_names_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(ValueError, match="pip install llguidance"):
        grammar.compile_json(None, TOKENIZERS["bytes"])

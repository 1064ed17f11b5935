"""Tokenizers: ids, round trips, special tokens, chat masks, files and their damage."""

import base64
import io
import itertools
import json
import pickle

import jinja2.ext
import numpy as np
import pytest
import tiktoken
import tiktoken_ext.openai_public
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from MaxNano import pyconfig
from MaxNano.interop.huggingface import TEMPLATES
from MaxNano.tokenization import bpe, tokenizer
from MaxNano.tokenization.bpe import NANOCHAT_PATTERN, BpeTokenizer, cut_long_space, train_bpe
from MaxNano.tokenization.chat_format import turns
from MaxNano.tokenization.tokenizer import (
    SPECIAL_TOKENS,
    load_tokenizer,
    load_tokenizer_from,
    valid_unicode,
)

BYTE_RANKS = {bytes([i]): i for i in range(256)}
CORPUS = [
    "The quick brown fox jumps over the lazy dog; the dog doesn't mind at all.",
    "In 2024 there were 1234567 tokens in the table, and 17 of them weren't used.",
    "Wer reitet so spät durch Nacht und Wind? Es ist der Vater mit seinem Kind.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))\n",
] * 3
TYPES = ("bpe", "tiktoken", "sentencepiece", "huggingface")
LOSSLESS = ("bpe", "tiktoken", "huggingface")  # a SentencePiece model normalizes spaces

few = settings(max_examples=60)
# Text that is full of what must not become a special token.
tricky = st.lists(
    st.sampled_from([*SPECIAL_TOKENS, "<s>", "</s>", "<unk>", "<|endoftext|>", " ", "\n", "<|"])
    | st.text(max_size=8),
    max_size=8,
).map("".join)


def byte_tokenizer() -> BpeTokenizer:
    """No merges: ids are the bytes, and the specials are 256 to 264."""
    return BpeTokenizer(NANOCHAT_PATTERN, BYTE_RANKS)


def rank_file(ranks) -> str:
    return "".join(f"{base64.b64encode(t).decode()} {r}\n" for t, r in ranks.items())


def sentencepiece_model() -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        user_defined_symbols=["<|user_start|>"],  # a trap: text becomes it
        control_symbols=["<|user_end|>"],
        minloglevel=2,
    )
    return model.getvalue()


def huggingface_json() -> dict:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>", "<|user_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(CORPUS, trainer)
    return json.loads(model.to_str())


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A vocabulary of each type."""
    folder = tmp_path_factory.mktemp("tokenizers")
    trained = train_bpe(CORPUS, 330)
    trained.save(folder / "bpe")
    ranks = {trained.decode_bytes([i]): i for i in range(trained.vocab_size - 9)}
    (folder / "tiktoken").write_text(rank_file(ranks))
    (folder / "sentencepiece").write_bytes(sentencepiece_model())
    (folder / "huggingface").write_text(json.dumps(huggingface_json()))
    return {kind: folder / kind for kind in TYPES}


@pytest.fixture(scope="module")
def tokenizers(paths):
    return {kind: load_tokenizer_from(kind, path, threads=3) for kind, path in paths.items()}


# ---- Ids ----------------------------------------------------------------------------------------


def test_ids_worked_out_by_hand():
    ranks = {**BYTE_RANKS, b"he": 256, b"ll": 257, b"hell": 258, b" w": 259}
    t = BpeTokenizer(NANOCHAT_PATTERN, ranks)
    assert t.encode("hello w") == [258, ord("o"), 259]
    assert t.special == tuple(range(260, 269))
    assert (t.vocab_size, t.bos_id) == (269, 260)
    assert t.decode([260, 258, 259, 268]) == "<|bos|>hell w<|output_end|>"
    assert t.token_bytes()[255:].tolist() == [1, 2, 2, 4, 2] + [0] * 9
    assert t.token_bytes().dtype == np.int32


def test_training_merges_the_most_frequent_pair_and_of_equals_the_smaller():
    # "xy" stands there twice; of the rest, (space, c) has smaller ids than (a, b) and (c, d).
    t = train_bpe(["xy!xy", "ab cd"], 256 + 2 + 9)
    assert [t.decode_bytes([i]) for i in (256, 257)] == [b"xy", b" c"]
    assert t.vocab_size == 267
    assert t.special == tuple(range(258, 267))


def test_training_is_reproducible():
    assert train_bpe(CORPUS, 330).fingerprint() == train_bpe(iter(CORPUS), 330).fingerprint()


def test_too_little_text_and_too_small_vocabularies_say_what_to_change():
    with pytest.raises(ValueError, match=r"more text or set vocab_size=267 or less"):
        train_bpe(["abc"], 4096)
    with pytest.raises(ValueError, match=r"vocab_size=265 at least"):
        train_bpe(["abc"], 264)
    assert train_bpe([], 265).vocab_size == 265


# ---- Where text is cut --------------------------------------------------------------------------


def cut(pattern: str, text: str) -> list[str]:
    """How a pattern cuts a text: every stretch of the text is a token, so each piece becomes one."""
    data = text.encode()
    stretches = {data[i:j] for i, j in itertools.combinations(range(len(data) + 1), 2)}
    tokens = [*BYTE_RANKS, *sorted(stretches - BYTE_RANKS.keys())]
    encoding = tiktoken.Encoding(
        "cut",
        pat_str=pattern,
        mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
        special_tokens={},
    )
    return [tokens[i].decode() for i in encoding.encode_ordinary(text)]


@pytest.mark.parametrize(
    "pieces",
    [
        ["It", "'s", " I", "'M", " we", "'LL", " they", "'Re"],
        ["'re", "sume", " rock", "'n", "'roll"],
        ["12", "34", "56", "7"],
        ["in", " ", "20", "24", "!"],
        ["a", "\n\n", "b"],
        ["a", " \n\n", " ", " b"],
        ["x", "  \t"],
        ["x", "   ", " y"],
        ["foo", "(bar", ")", " =>", " ", "1", ";\r\n\n", "y"],
        ["é", "1²", "Ⅷ", "한국", " 어"],
        ["\tx", " \t", "\ty"],
        ["--", "x", " --\n", " --\n"],
    ],
)
def test_nanochat_pattern(pieces):
    assert cut(NANOCHAT_PATTERN, "".join(pieces)) == pieces


@pytest.mark.parametrize(
    "name, pattern",
    [
        ("gpt2", bpe._GPT2_PATTERN),
        ("cl100k_base", bpe._CL100K_PATTERN),
        ("o200k_base", bpe._O200K_PATTERN),
    ],
)
def test_patterns_of_published_vocabularies_cut_as_tiktoken_does(name, pattern, monkeypatch):
    for loader in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(tiktoken_ext.openai_public, loader, lambda *_, **__: {})
    theirs = tiktoken_ext.openai_public.ENCODING_CONSTRUCTORS[name]()["pat_str"]

    @settings(max_examples=150)
    @given(
        st.text(st.sampled_from("aZéǅ한\u0301'sStTlLvVeErRdDmM0129² \t\n\r\u3000/.,-"), max_size=14)
    )
    def check(text):
        assert cut(pattern, text) == cut(theirs, text)

    check()


@pytest.mark.parametrize("tail", ["", "x"])
def test_a_million_spaces_do_not_end_the_process(tail):
    text = " " * 1_200_000 + tail
    assert byte_tokenizer().encode(text) == list(text.encode())
    assert train_bpe([text, "a b"], 266).vocab_size == 266


def test_only_pathological_texts_are_cut():
    text = "a" * 300_000 + " " * 50_000
    assert list(cut_long_space(text)) == [text]
    pieces = list(cut_long_space(text + " " * 60_000 + "b"))
    assert len(pieces) == 2 and "".join(pieces) == text + " " * 60_000 + "b"


# ---- Every type ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES)
def test_ids_are_those_of_the_vocabulary_and_nine_specials(tokenizers, kind):
    t = tokenizers[kind]
    assert len(set(t.special)) == 9
    assert t.bos_id == t.special.bos
    assert all(0 <= i < t.vocab_size for i in t.special)
    assert t.token_bytes().shape == (t.vocab_size,)
    assert not t.token_bytes()[list(t.special)].any()
    assert t.decode(t.special) == "".join(SPECIAL_TOKENS)


@few
@example("\ud800 lone surrogate")
@example("nul \0 and � and 𝔘𝔫𝔦")
@given(st.text())
def test_round_trip(tokenizers, text):
    for kind in LOSSLESS:
        t = tokenizers[kind]
        ids = t.encode(text)
        whole = valid_unicode(text)
        assert t.decode(ids) == whole
        assert t.decode_bytes(ids) == whole.encode()
        assert t.token_bytes()[ids].sum() == len(whole.encode())


def test_sentencepiece_round_trip(tokenizers):
    t = tokenizers["sentencepiece"]
    for text in [*CORPUS[:3], "naïve 北京 🌍 <|bos|>", "<|user_start|> x"]:
        ids = t.encode(text)
        assert t.decode(ids) == text
        # The model puts a space before the text.
        assert t.decode_bytes(ids) == b" " + text.encode()
        assert t.token_bytes()[ids].sum() == 1 + len(text.encode())


@given(st.binary())
def test_any_bytes_decode(data):
    t = byte_tokenizer()
    assert t.decode_bytes(list(data)) == data
    assert t.decode(list(data)) == data.decode("utf-8", "replace")


@few
@given(tricky)
def test_no_text_becomes_a_special_token(tokenizers, text):
    for kind, t in tokenizers.items():
        ids = t.encode(text)
        assert not set(ids) & set(t.special), kind
        if kind in LOSSLESS:
            assert t.decode(ids) == text
        if isinstance(t, BpeTokenizer):
            assert ids == t._encoding.encode_ordinary(text)


@few
@given(st.lists(tricky, max_size=9), st.booleans())
def test_a_threaded_batch_is_each_text_by_itself(tokenizers, texts, bos):
    for t in tokenizers.values():
        rows = t.encode_batch(texts, bos)
        assert [row.tolist() for row in rows] == [[t.bos_id] * bos + t.encode(x) for x in texts]
        assert all(row.dtype == np.int32 for row in rows)


@pytest.mark.parametrize("kind", TYPES)
def test_a_copy_in_another_process_is_the_same(tokenizers, kind):
    t, copy = tokenizers[kind], pickle.loads(pickle.dumps(tokenizers[kind]))
    text = "The dog <|endoftext|><|user_start|><s>" + "".join(SPECIAL_TOKENS)
    assert copy.encode(text) == t.encode(text)
    assert copy.fingerprint() == t.fingerprint()


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("bad", [-1, 10**9])
def test_an_unknown_id_is_refused(tokenizers, kind, bad):
    with pytest.raises(ValueError, match="vocab_size"):
        tokenizers[kind].decode([1, bad])


# ---- Foreign vocabularies -----------------------------------------------------------------------


def test_an_unknown_rank_file_is_cut_as_nanochat_does(tokenizers):
    ours, theirs = tokenizers["bpe"], tokenizers["tiktoken"]
    assert theirs.fingerprint() == ours.fingerprint()
    assert theirs.special == ours.special


def padded_ranks(text: str, count: int) -> list[bytes]:
    """`count` tokens: bytes, all stretches of a text, and whatever else."""
    tokens = list(BYTE_RANKS)
    data = text.encode()
    stretches = {data[i:j] for i, j in itertools.combinations(range(len(data) + 1), 2)}
    tokens += sorted(stretches - BYTE_RANKS.keys())
    return tokens + [b"\xff" + i.to_bytes(3, "big") for i in range(count - len(tokens))]


@pytest.mark.parametrize(
    "count, bos, vocab_size, pieces",
    [
        (50256, 50256, 50265, ["I", "'m", " 12345", ",", " I", "'", "M"]),
        (100256, 100257, 100266, ["I", "'m", " ", "123", "45", ",", " I", "'M"]),
        (128000, 128000, 128009, ["I", "'m", " ", "123", "45", ",", " I", "'M"]),
        (199998, 199999, 200008, ["I'm", " ", "123", "45", ",", " I'M"]),
    ],
)
def test_published_rank_files_are_known_by_their_size(tmp_path, count, bos, vocab_size, pieces):
    text = "".join(pieces)
    tokens = padded_ranks(text, count)
    path = tmp_path / "ranks.tiktoken"
    path.write_text(rank_file({token: rank for rank, token in enumerate(tokens)}))
    t = load_tokenizer_from("tiktoken", path)
    assert [t.decode([i]) for i in t.encode(text)] == pieces
    assert (t.bos_id, t.vocab_size) == (bos, vocab_size)
    assert t.special[1:] == tuple(range(vocab_size - 8, vocab_size))


def test_a_rank_file_may_leave_its_end_of_text_out(tmp_path):
    tokens = padded_ranks("", 50280)
    ranks = {token: rank + (rank >= 50256) for rank, token in enumerate(tokens)}
    path = tmp_path / "p50k_base.tiktoken"
    path.write_text(rank_file(ranks))
    t = load_tokenizer_from("tiktoken", path)
    assert t.bos_id == 50256
    assert t.special[1:] == tuple(range(50281, 50289))
    assert t.decode([50255, 50256, 50257]) == t.decode([50255]) + "<|bos|>" + t.decode([50257])


@pytest.mark.parametrize(
    "lines",
    ["AA== 0\n", "AA==\n", "AA== x\n", "? 0\n", "", "AA== 0\nAA== 1\n", "\xff\xfe"]
    + [
        rank_file(BYTE_RANKS) + line for line in ("AAA= -1\n", "AAA= 300\n", "AAA= 1000000000000\n")
    ],
)
def test_damaged_rank_files(tmp_path, lines):
    path = tmp_path / "ranks.tiktoken"
    path.write_text(lines)
    assert_refused("tiktoken", path)


def test_sentencepiece_specials(tokenizers):
    t = tokenizers["sentencepiece"]
    size = t._model.vocab_size()
    assert t.bos_id == t._model.bos_id()
    assert t.special.user_end == t._model.piece_to_id("<|user_end|>")
    # Text becomes a user-defined symbol, so that one is ordinary and the special is another.
    assert t.special.user_start == size
    assert t.vocab_size == size + 7


def test_huggingface_specials(tokenizers):
    t = tokenizers["huggingface"]
    assert (t.special.bos, t.special.user_start) == (0, 1)
    assert t.special[2:] == tuple(range(330, 337))
    assert t.special.user_end == 330 and t.vocab_size == 337


def load_huggingface(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    return load_tokenizer_from("huggingface", path)


def test_huggingface_specials_that_text_could_become_are_not_used(tmp_path):
    content = huggingface_json()
    content["model"]["ignore_merges"] = True  # now whatever is in the vocabulary can come of text
    t = load_huggingface(tmp_path, content)
    assert t.bos_id == 330
    assert not {0, 1} & set(t.special)


def test_huggingface_special_tokens_may_be_unmarked_and_truncation_is_dropped(tmp_path):
    content = huggingface_json()
    for entry in content["added_tokens"]:
        entry["special"] = False
    content["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    t = load_huggingface(tmp_path, content)
    text = "a text of more than two tokens <|user_start|>"
    ids = t.encode(text)
    assert t.decode(ids) == text and t.encode_batch([text], bos=False)[0].tolist() == ids
    assert not set(ids) & set(t.special)


def test_huggingface_metaspace_and_byte_fallback(tmp_path):
    bytes_ = {f"<0x{i:02X}>": i + 3 for i in range(256)}
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **bytes_, "▁": 259, "a": 260, "▁a": 261, "b": 262}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "pre_tokenizer": None,
        "added_tokens": [
            {
                "id": i,
                "content": c,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i, c in enumerate(["<unk>", "<s>", "</s>"])
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "fuse_unk": True,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": ["▁ a"],
        },
    }
    t = load_huggingface(tmp_path, content)
    assert t.bos_id == 1
    assert t.encode("a bé") == [261, 259, 262, 3 + 0xC3, 3 + 0xA9]
    assert t.decode(t.encode("a bé")) == "a bé"
    assert t.decode_bytes(t.encode("a bé")) == " a bé".encode()
    assert t.token_bytes()[[0, 1, 2, 3, 259, 261, 262]].tolist() == [0, 0, 0, 1, 1, 2, 1]
    assert not {0, 1, 2} & set(t.encode("<s></s><unk>"))


def test_huggingface_without_bytes_is_refused(tmp_path):
    content = huggingface_json() | {
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}
    }
    with pytest.raises(ValueError, match="WordPiece"):
        load_huggingface(tmp_path, content)


def test_a_missing_library_is_one_line(paths, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="pip install tokenizers$"):
        load_tokenizer_from("huggingface", paths["huggingface"])


# ---- Files --------------------------------------------------------------------------------------


def assert_refused(kind, path):
    with pytest.raises(ValueError) as error:
        load_tokenizer_from(kind, path)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message and len(message) < 1000


def test_save_and_load(paths, tmp_path):
    t = load_tokenizer_from("bpe", paths["bpe"])
    t.save(tmp_path / "a" / "b")
    copy = load_tokenizer_from("bpe", tmp_path / "a" / "b")
    assert copy.fingerprint() == t.fingerprint()
    assert copy.encode(CORPUS[0]) == t.encode(CORPUS[0])
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["tokenizer.json"]


def test_a_known_vocabulary_can_be_kept_as_bpe(tmp_path):
    ranks = {token: i for i, token in enumerate(padded_ranks("", 260))}
    t = BpeTokenizer(bpe._GPT2_PATTERN, ranks, {"<|bos|>": 261})  # 260 is left out
    t.save(tmp_path)
    copy = load_tokenizer_from("bpe", tmp_path)
    assert (copy.special, copy.fingerprint()) == (t.special, t.fingerprint())


def test_the_fingerprint_covers_pattern_tokens_and_specials(tokenizers):
    other_ranks = {**BYTE_RANKS, b"ab": 256}
    prints = {
        byte_tokenizer().fingerprint(),
        BpeTokenizer(NANOCHAT_PATTERN, other_ranks).fingerprint(),
        BpeTokenizer(NANOCHAT_PATTERN, {**BYTE_RANKS, b"ac": 256}).fingerprint(),
        BpeTokenizer(bpe._GPT2_PATTERN, other_ranks).fingerprint(),
        BpeTokenizer(NANOCHAT_PATTERN, other_ranks, {"<|bos|>": 258}).fingerprint(),
        *(tokenizers[kind].fingerprint() for kind in ("bpe", "sentencepiece", "huggingface")),
    }
    assert len(prints) == 8
    assert all(len(p) == 64 and set(p) <= set("0123456789abcdef") for p in prints)


@pytest.fixture(scope="module")
def damaged(paths, tmp_path_factory):
    """(whole bytes, function that writes damaged ones and expects one line)."""
    folder = tmp_path_factory.mktemp("damaged")
    path = folder / "tokenizer.json"

    def refuse(data: bytes) -> None:
        path.write_bytes(data)
        with pytest.raises(ValueError) as error:
            load_tokenizer_from("bpe", folder)
        assert str(path) in str(error.value) and "\n" not in str(error.value)

    return (paths["bpe"] / "tokenizer.json").read_bytes(), refuse


@settings(max_examples=300)
@given(st.data())
def test_a_flipped_bit_is_noticed(damaged, data):
    whole, refuse = damaged
    position = data.draw(st.integers(0, len(whole) - 1))
    bit = data.draw(st.integers(0, 7))
    refuse(whole[:position] + bytes([whole[position] ^ 1 << bit]) + whole[position + 1 :])


@settings(max_examples=100)
@given(st.data())
def test_a_cut_file_is_noticed(damaged, data):
    whole, refuse = damaged
    refuse(whole[: data.draw(st.integers(0, len(whole.rstrip()) - 1))])


def sealed(**fields) -> bytes:
    """A file whose fingerprint is right."""
    content = {"pattern": "x", "special_tokens": {}, "tokens": []} | fields
    head = {
        "format": "maxnano-tokenizer",
        "version": 1,
        "fingerprint": tokenizer.content_hash(content),
    }
    return json.dumps(head | content).encode()


BYTE_TOKENS = [base64.b64encode(token).decode() for token in BYTE_RANKS]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"{}",
        b"\xff",
        b"[" * 100_000,
        b"1" * 10_000,
        b'{"format": "maxnano-tokenizer", "version": 2}',
        b'{"version": "1.0", "model": {"type": "BPE"}}',
        sealed(),
        sealed(tokens=BYTE_TOKENS, pattern="("),
        sealed(tokens=BYTE_TOKENS, pattern=3),
        sealed(tokens=BYTE_TOKENS, special_tokens=[]),
        sealed(tokens=BYTE_TOKENS, special_tokens={"<|bos|>": "7"}),
        sealed(tokens=BYTE_TOKENS, special_tokens={"<|bos|>": 7}),
        sealed(tokens=BYTE_TOKENS, special_tokens={"<|bos|>": -7}),
        sealed(tokens=BYTE_TOKENS, special_tokens={"<|bos|>": 10**15}),
        sealed(tokens=BYTE_TOKENS[1:]),
        sealed(tokens=[*BYTE_TOKENS, BYTE_TOKENS[0]]),
        sealed(tokens=[*BYTE_TOKENS, ""]),
        sealed(tokens=[*BYTE_TOKENS, "?"]),
        sealed(tokens=[*BYTE_TOKENS, 5]),
        sealed(tokens=5),
    ],
)
def test_foreign_and_forged_files(damaged, data):
    damaged[1](data)


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
@pytest.mark.parametrize("damage", [b"", b"\xff\xfe garbage", b"{}", b"[]", None])
def test_damaged_foreign_files(paths, tmp_path, kind, damage):
    path = tmp_path / "file"
    whole = paths[kind].read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert_refused(kind, path)


@pytest.mark.parametrize("kind", TYPES)
def test_a_missing_file(tmp_path, kind):
    assert_refused(kind, tmp_path / "none")


def test_a_missing_tokenizer_says_which_command_makes_one(tmp_path):
    with pytest.raises(ValueError, match=r"python MaxNano/train_tokenizer.py configs/base.yml"):
        load_tokenizer_from("bpe", tmp_path / "none")


def test_load_reads_the_config(paths):
    def config(*words):
        return pyconfig.initialize(["configs/base.yml", f"tokenizer_path={paths['bpe']}", *words])

    t = load_tokenizer(config("vocab_size=330", "tokenizer_threads=3"))
    assert (t.vocab_size, t.threads) == (330, 3)
    with pytest.raises(ValueError, match="set vocab_size=330$"):
        load_tokenizer(config())
    path = f"tokenizer_path={paths['sentencepiece']}"
    t = load_tokenizer(config("tokenizer_type=sentencepiece", path, "vocab_size=337"))
    assert t.vocab_size == 337


# ---- Chat ---------------------------------------------------------------------------------------

BOS, USER, USER_END, ASSISTANT, ASSISTANT_END, PYTHON, PYTHON_END, OUTPUT, OUTPUT_END = range(
    256, 265
)


def message(role, content):
    return {"role": role, "content": content}


CALL = [
    {"type": "text", "text": "so "},
    {"type": "python", "text": "1+1"},
    {"type": "python_output", "text": "2"},
    {"type": "text", "text": "!"},
]


def test_the_mask_of_a_conversation():
    conversation = {
        "messages": [
            message("user", "hi"),
            message("assistant", "yo"),
            message("user", "?"),
            message("assistant", CALL),
        ]
    }
    expected = [
        ([BOS], 0),
        ([USER, *b"hi", USER_END], 0),
        ([ASSISTANT], 0),
        ([*b"yo", ASSISTANT_END], 1),
        ([USER, *b"?", USER_END], 0),
        ([ASSISTANT], 0),
        ([*b"so ", PYTHON, *b"1+1", PYTHON_END], 1),
        ([OUTPUT, *b"2", OUTPUT_END], 0),
        ([*b"!", ASSISTANT_END], 1),
    ]
    ids = [i for part, _ in expected for i in part]
    mask = [trained for part, trained in expected for _ in part]
    before = json.dumps(conversation)
    t = byte_tokenizer()
    assert t.render_conversation(conversation) == (ids, mask)
    assert t.render_conversation(conversation, 7) == (ids[:7], mask[:7])
    assert t.render_conversation(conversation, 10_000) == (ids, mask)
    assert t.render_for_completion(conversation) == ids[: ids.index(ASSISTANT, 10) + 1]
    assert json.dumps(conversation) == before


def test_a_system_message_joins_the_first_user_message():
    turns = [message("user", "a"), message("assistant", "b"), message("user", "c")]
    t = byte_tokenizer()
    ids, mask = t.render_conversation({"messages": [message("system", "s"), *turns]})
    joined = [message("user", "s\n\na"), *turns[1:]]
    assert (ids, mask) == t.render_conversation({"messages": joined})
    assert ids[:7] == [BOS, USER, *b"s\n\na", USER_END]


ANY_MESSAGES = st.lists(
    st.builds(
        message,
        st.sampled_from(["system", "user", "assistant"]),
        st.text("ab\n", max_size=3)
        | st.lists(st.builds(lambda text: {"type": "text", "text": text}, st.text("ab"))),
    )
    | st.just(message("assistant", CALL)),
    min_size=1,
    max_size=8,
)


@given(messages=ANY_MESSAGES)
@example([message("assistant", "hello"), message("user", "a"), message("assistant", "b")])
@example([message("system", "s"), message("system", "t"), message("user", "a")])
@example([message("user", "a"), message("user", "b"), message("system", "c")])
@example([message("user", "a"), message("assistant", CALL), message("assistant", "b")])
@example([message("system", "s"), message("assistant", "b"), message("assistant", CALL)])
def test_any_order_of_messages_is_turns_by_one_rule(messages):
    """System is the user's side, and a blank line joins the messages of one side; nothing is lost."""
    made = turns({"messages": messages})
    sides = ["assistant" if m["role"] == "assistant" else "user" for m in messages]
    assert [side for side, _ in made] == [side for side, _ in itertools.groupby(sides)]

    def text_of(content):
        if isinstance(content, str):
            return content
        parts = [part if isinstance(part, tuple) else tuple(part.values()) for part in content]
        return "".join(f"<{kind}>{text}" if kind != "text" else text for kind, text in parts)

    groups = itertools.groupby(zip(sides, messages, strict=True), key=lambda pair: pair[0])
    expected = ["\n\n".join(text_of(m["content"]) for _, m in group) for _, group in groups]
    assert [text_of(content) for _, content in made] == expected


@given(messages=ANY_MESSAGES)
def test_the_exported_template_has_the_same_rule(messages):
    """transformers renders it with this environment; see its chat_template_utils.py."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    template = environment.from_string((TEMPLATES / "chat_template.jinja").read_text())
    tokenizer = byte_tokenizer()
    for generates in (False, True):
        text = template.render(
            messages=messages, bos_token="<|bos|>", add_generation_prompt=generates
        )
        ids, _ = tokenizer.render_conversation({"messages": messages})
        expected = tokenizer.decode([*ids, *[ASSISTANT] * generates])
        assert text == expected


def test_parts_are_encoded_one_by_one():
    t = BpeTokenizer(NANOCHAT_PATTERN, {**BYTE_RANKS, b"ab": 256})
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    ids, _ = t.render_conversation(
        {"messages": [message("user", "ab"), message("assistant", parts)]}
    )
    assert ids[2] == 256
    assert ids[-3:-1] == [*b"ab"]


@few
@given(st.lists(tricky, min_size=2, max_size=6), st.integers(0, 40))
def test_texts_cannot_forge_turns(tokenizers, texts, max_tokens):
    roles = itertools.cycle(("user", "assistant"))
    conversation = {"messages": [message(r, x) for r, x in zip(roles, texts, strict=False)]}
    for t in tokenizers.values():
        ids, mask = t.render_conversation(conversation)
        s = t.special
        turns = [(s.user_start, s.user_end), (s.assistant_start, s.assistant_end)]
        expected = [s.bos, *(i for n in range(len(texts)) for i in turns[n % 2])]
        assert [i for i in ids if i in s] == expected
        assert len(mask) == len(ids)
        assert sum(mask) == sum(len(t.encode(x)) + 1 for x in texts[1::2])
        cut_ids, cut_mask = t.render_conversation(conversation, max_tokens)
        assert (cut_ids, cut_mask) == (ids[:max_tokens], mask[:max_tokens])


@pytest.mark.parametrize(
    "conversation",
    [
        None,
        [],
        {},
        {"messages": []},
        {"messages": "hi"},
        {"messages": ["hi"]},
        {"messages": [{"role": "user"}]},
        {"messages": [message("system", 1), message("user", "b")]},
        {"messages": [message("user", "a"), message("tool\nbox", "b")]},
        {"messages": [message("user", [{"type": "python", "text": "a"}])]},
        {"messages": [message("system", [{"type": "python", "text": "a"}])]},
        {"messages": [message("user", "a"), None]},
        {"messages": [message("user", None)]},
        {"messages": [message("user", "a"), message("assistant", None)]},
        {"messages": [message("user", "a"), message("assistant", ["b"])]},
        {
            "messages": [
                message("user", "a"),
                message("assistant", [{"type": "image", "text": "b"}]),
            ]
        },
        {"messages": [message("user", "a"), message("assistant", [{"type": "text"}])]},
        {"messages": [message("user", "a"), message("assistant", [{"type": "text", "text": 1}])]},
        {"messages": [message("user", "a"), message("assistant", [{"type": [], "text": "b"}])]},
    ],
)
def test_a_malformed_conversation_is_one_line(conversation):
    with pytest.raises(ValueError) as error:
        byte_tokenizer().render_conversation(conversation)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("messages", [[message("user", "a")], [], [message("assistant", "a")] * 2])
def test_completion_needs_a_last_message_of_the_assistant(messages):
    with pytest.raises(ValueError):
        byte_tokenizer().render_for_completion({"messages": messages})

"""How much text validates: one pass of a newcomer's own text, as before of everything else."""

import json

import pytest
from byte_tokenizer import ByteTokenizer
from test_sources import make_config, write_parquet

from MaxNano import pyconfig
from MaxNano.data import held_out
from MaxNano.tokenization.bpe import NANOCHAT_PATTERN, BpeTokenizer
from MaxNano.training import start

TOKENIZER = ByteTokenizer()
PARAGRAPH = "The sea is wide and the boat is small.\n\n"


def text_folder(folder, sizes):
    for name, size in sizes.items():
        (folder / name).write_text((PARAGRAPH * (size // len(PARAGRAPH) + 1))[:size])
    sizes = {"max_target_length": 256, "global_batch_tokens": 1024}
    return make_config("text", folder, eval_tokens="null", **sizes)


def test_own_text_validates_in_one_pass(tmp_path):
    """It was 41,943,040 tokens: a file of 30,000 characters 1,400 times, for hours on a CPU."""
    config = text_folder(tmp_path, {"a.txt": 60_000, "b.txt": 60_000, "c.txt": 30_000})
    tokens = held_out.validation_tokens(config, TOKENIZER)
    assert 29_000 < tokens <= 30_010
    resolved = held_out.with_eval_tokens(config, TOKENIZER)
    assert resolved.eval_tokens == tokens and resolved.origin["eval_tokens"] == held_out.ORIGIN
    assert held_out.small(config, TOKENIZER) is None
    described = held_out.describe(resolved, TOKENIZER)
    assert described.startswith(f"about {tokens:,}; a validation reads 29,696, 0.9"), described


def test_a_tiny_last_file_is_said(tmp_path):
    config = text_folder(tmp_path, {"a.txt": 60_000, "b.txt": 60_000, "z.txt": 200})
    warning = held_out.small(config, TOKENIZER)
    assert warning.startswith("only about 199 tokens validate (z.txt)")
    assert "validation.txt" in warning and "\n" not in warning
    resolved = held_out.with_eval_tokens(config, TOKENIZER)
    assert held_out.describe(resolved, TOKENIZER) == (
        "about 199; a validation reads 1,024, 5.15 passes"
    )
    (tmp_path / "zz.txt").write_text("")  # an error of its own, where it is read
    assert held_out.small(config, TOKENIZER) is None
    (tmp_path / "zz.txt").unlink()
    # What the warning advises.
    (tmp_path / "b.txt").rename(tmp_path / "validation.txt")
    assert held_out.small(config, TOKENIZER) is None
    assert held_out.with_eval_tokens(config, TOKENIZER).eval_tokens > 59_000


def test_a_given_number_and_much_text_stay(tmp_path, monkeypatch):
    config = text_folder(tmp_path, {"a.txt": 60_000, "b.txt": 60_000})
    given = pyconfig.replace(config, "command line", eval_tokens=4096)
    assert held_out.with_eval_tokens(given, TOKENIZER) is given
    monkeypatch.setattr(held_out, "EVAL_TOKENS", 50_000)
    assert held_out.with_eval_tokens(config, TOKENIZER).eval_tokens == 50_000


def test_what_a_download_lists_is_not_read(tmp_path):
    """The hub's shards arrive during training, and each process must find the same number."""
    for name in ("a", "b"):
        write_parquet(tmp_path / f"{name}.parquet", [PARAGRAPH] * 100)
    config = make_config("parquet", tmp_path, eval_tokens="null")
    expected = 100 * (len(PARAGRAPH) + 1)
    assert held_out.validation_tokens(config, TOKENIZER) == expected
    facts = {"size": 1, "sha256": "0", "done": True}
    files = {"a.parquet": facts, "b.parquet": facts}
    (tmp_path / "manifest.json").write_text(json.dumps({"files": files}))
    assert held_out.validation_tokens(config, TOKENIZER) is None
    assert held_out.with_eval_tokens(config, TOKENIZER).eval_tokens == held_out.EVAL_TOKENS
    assert held_out.small(config, TOKENIZER) is None
    synthetic = make_config("synthetic", tmp_path, eval_tokens="null")
    assert held_out.with_eval_tokens(synthetic, TOKENIZER).eval_tokens == held_out.EVAL_TOKENS


@pytest.mark.parametrize("groups", [1, 40])
def test_much_text_is_estimated_from_its_beginning(tmp_path, monkeypatch, groups):
    """In one row group, as pandas writes it, or in many; little of it is encoded."""
    texts = [PARAGRAPH * (1 + number % 7) for number in range(4000)]
    for name in ("train-0", "validation-0", "validation-1"):
        write_parquet(tmp_path / f"{name}.parquet", texts, group=4000 // groups)
    expected = 2 * sum(len(text) + 1 for text in texts)
    monkeypatch.setattr(held_out, "MEASURED_CHARACTERS", expected // 40)
    encoded = []

    class Counting(ByteTokenizer):
        def encode_batch(self, texts, bos):
            encoded.extend(map(len, texts))
            return super().encode_batch(texts, bos)

    config = make_config("parquet", tmp_path, eval_tokens="null")
    assert held_out.validation_tokens(config, Counting()) == pytest.approx(expected, rel=0.02)
    assert sum(encoded) < expected / 8


def test_the_part_of_a_mixture_that_ends_first_decides(tmp_path):
    for part, documents in (("long", 1000), ("short", 10)):
        (tmp_path / part).mkdir()
        for name in ("a", "b"):
            write_parquet(tmp_path / part / f"{name}.parquet", [PARAGRAPH] * documents)
    mixture = f"[[3, parquet:{tmp_path}/long], [1, parquet:{tmp_path}/short]]"
    config = make_config("mixture", tmp_path, eval_tokens="null", dataset_mixture=mixture)
    tokens = held_out.validation_tokens(config, TOKENIZER)
    assert tokens == 4 * 10 * (len(PARAGRAPH) + 1)


def test_own_conversations_validate_in_one_pass(tmp_path):
    """They were 20,971,520 tokens, the better part of an hour on a CPU, however few there are."""
    path = tmp_path / "own.jsonl"
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    path.write_text(json.dumps({"messages": talk}) + "\n")
    base = ["configs/base.yml", "model=d2", "stage=sft", "load_from=x", "vocab_size=265"]
    own = pyconfig.initialize([*base, f"chat_validation_mixture=[[json:{path}, 3000]]"])
    tokenizer = BpeTokenizer(NANOCHAT_PATTERN, {bytes([n]): n for n in range(256)})
    size = len(tokenizer.render_conversation({"messages": talk})[0])
    assert held_out.validation_tokens(own, tokenizer) == 3000 * size
    assert held_out.with_eval_tokens(own, tokenizer).eval_tokens == 3000 * size
    few = pyconfig.replace(own, "test", chat_validation_mixture=[[f"json:{path}", "2"]])
    assert held_out.small(own, tokenizer) is None
    assert "own.jsonl), and bits" in held_out.small(few, tokenizer)
    assert "add conversations" in held_out.small(few, tokenizer)
    # nanochat's mixture, of which nothing is downloaded here.
    hub = pyconfig.initialize(base)
    assert held_out.with_eval_tokens(hub, tokenizer).eval_tokens == 20_971_520


def test_a_run_that_exists_keeps_its_eval_tokens(tmp_path):
    """One of before: its config has the number that was the default."""
    words = ["configs/base.yml", "model=d2", f"base_output_directory={tmp_path}", "run_name=old"]
    config = pyconfig.initialize(words)
    assert config.eval_tokens is None and start.with_start(config).eval_tokens is None
    (tmp_path / "old").mkdir()
    saved = pyconfig.replace(config, "base", eval_tokens=41_943_040)
    pyconfig.save(saved, tmp_path / "old/config.yml")
    assert start.with_start(config).eval_tokens == 41_943_040
    assert start.with_start(pyconfig.initialize([*words, "eval_tokens=512"])).eval_tokens == 512

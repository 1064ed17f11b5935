"""Tokenizer training: what is read, the table, and the command itself."""

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from MaxNano import pyconfig, train_tokenizer
from MaxNano.tokenization.bpe import NANOCHAT_PATTERN, BpeTokenizer, train_bpe
from MaxNano.tokenization.tokenizer import load_tokenizer_from

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ["The cat sat on the mat, and the dog sat on the log."] * 3
WORDS = [f"number {i * i * 7919} makes word{i} and stem{i % 37}ing" for i in range(400)]


def test_reading_stops_behind_the_wanted_characters():
    texts = ["a" * 10, "b" * 3, "c" * 9, "d" * 9]
    assert list(train_tokenizer.capped(texts, 7, 4)) == ["a" * 4, "b" * 3, "c" * 4]
    assert list(train_tokenizer.capped(texts, 8, 4)) == ["a" * 4, "b" * 3, "c" * 4]
    assert list(train_tokenizer.capped(texts, 6, 4)) == ["a" * 4, "b" * 3]


def test_progress_gives_the_texts_and_the_count(capsys):
    texts = ["ab", "c" * 1_000_000]
    assert list(train_tokenizer.with_progress(iter(texts), 2_000_000)) == texts
    assert "Read 2 documents, 1.0 M of at most 2.0 M characters" in capsys.readouterr().out


def test_the_table_counts_bytes_per_token():
    ours = BpeTokenizer(NANOCHAT_PATTERN, {**{bytes([i]): i for i in range(256)}, b"ab": 256})
    lines = train_tokenizer.compression_table(
        ours, {"itself": ours._encoding}, {"one": ["abab"], "two": ["é", "ab"]}
    )
    assert [line.split() for line in lines] == [
        ["bytes", "per", "token", "bytes", "ours", "itself"],
        ["one", "4", "2.00", "2.00"],
        ["two", "4", "1.33", "1.33"],
    ]


def test_references_that_fail_are_left_out(monkeypatch):
    def get(name):
        if name == "broken":
            raise OSError("no network")
        return name

    monkeypatch.setattr(train_tokenizer.tiktoken, "get_encoding", get)
    assert train_tokenizer.reference_encodings(["broken", "whole"], 60) == {"whole": "whole"}


def test_references_that_hang_are_left_out(monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(train_tokenizer.tiktoken, "get_encoding", lambda name: release.wait())
    assert train_tokenizer.reference_encodings(["gpt2", "cl100k_base"], 0.01) == {}
    release.set()


# ---- The command --------------------------------------------------------------------------------


def run(*words, script=True):
    program = ["MaxNano/train_tokenizer.py"] if script else ["-m", "MaxNano.train_tokenizer"]
    closed = "http://127.0.0.1:9"  # no test downloads anything
    env = os.environ | {
        "HTTPS_PROXY": closed,
        "https_proxy": closed,
        "NO_PROXY": "",
        "no_proxy": "",
    }
    env.pop("TIKTOKEN_CACHE_DIR", None)
    return subprocess.run(
        [sys.executable, *program, "configs/base.yml", "dataset_type=jsonl", *words],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=250,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for shard in range(2):
        lines = [json.dumps({"text": text}) for text in WORDS[shard::2]]
        (folder / f"{shard}.jsonl").write_text("\n".join(lines) + "\n")
    return f"dataset_path={folder}"


def test_from_documents_to_a_tokenizer(data, tmp_path):
    words = (data, f"tokenizer_path={tmp_path}", "vocab_size=320")
    first = run(*words)
    assert (first.returncode, first.stderr) == (0, "")
    trained = load_tokenizer_from("bpe", tmp_path)
    assert trained.vocab_size == 320
    assert trained.fingerprint()[:16] in first.stdout
    rows = re.findall(r"^(\w+) +([\d,]+) +(\d+\.\d\d)", first.stdout, re.MULTILINE)
    assert [row[0] for row in rows] == [*train_tokenizer.SAMPLES, "train", "validation"]
    assert sum(len(text) for text in WORDS[1::2]) == int(rows[-1][1].replace(",", ""))
    # Only the training shard is learned from, and the same documents give the same tokenizer.
    assert trained.fingerprint() == train_bpe(WORDS[0::2], 320).fingerprint()
    assert run(*words, script=False).returncode == 0
    assert load_tokenizer_from("bpe", tmp_path).fingerprint() == trained.fingerprint()
    assert sorted(os.listdir(tmp_path)) == ["tokenizer.json", "trained_on.json"]


def main_of(monkeypatch, *words):
    monkeypatch.setattr(train_tokenizer, "REFERENCES", ())
    config = pyconfig.initialize([str(ROOT / "configs/base.yml"), "dataset_type=jsonl", *words])
    train_tokenizer.main(config)


def test_it_says_that_it_replaces_another_tokenizer(data, tmp_path, monkeypatch, capsys):
    words = (data, f"tokenizer_path={tmp_path}")
    for size, replaces in (
        ("vocab_size=320", False),
        ("vocab_size=320", False),
        ("vocab_size=300", True),
    ):
        main_of(monkeypatch, *words, size)
        assert (f"Replacing {tmp_path}: runs" in capsys.readouterr().out) is replaces


def test_text_without_characters_is_refused(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text('{"text": ""}\n' * 3)
    with pytest.raises(ValueError, match=f"no text to train on in {tmp_path}"):
        main_of(
            monkeypatch,
            f"dataset_path={tmp_path}",
            f"tokenizer_path={tmp_path}/t",
            "vocab_size=265",
        )
    assert not (tmp_path / "t/tokenizer.json").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (["vocab_size=32768"], "train on more text or set vocab_size="),
        (["vocab_size=100"], "need vocab_size=265 at least"),
        (["tokenizer_type=tiktoken"], "tokenizer_type=bpe"),
        (
            ["dataset_path=none"],
            "dataset_path=none does not exist; set it to a folder of text, or get",
        ),
        (["dataset_path=setup.sh"], "dataset_path=setup.sh is a file; set it to the folder"),
        (["text_column=body"], "body"),
        (["vocab_sise=400"], "vocab_size"),
        (["tokenizer_path=/dev/null/x"], "cannot write to /dev/null/x (Not a directory); set"),
    ],
)
def test_errors_are_one_line_and_leave_the_old_tokenizer(data, tmp_path, words, message):
    train_bpe(TEXTS, 280).save(tmp_path)
    before = (tmp_path / "tokenizer.json").read_bytes()
    done = run(data, f"tokenizer_path={tmp_path}", *words)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert "cannot write" not in message or "Read" not in done.stdout, "it looks before it works"
    assert (tmp_path / "tokenizer.json").read_bytes() == before
    assert os.listdir(tmp_path) == ["tokenizer.json"]

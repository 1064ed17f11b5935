"""JSON lines and running text: nothing lost, sensible documents, whatever other tools wrote."""

import gzip
import json
import pickle

import numpy as np
import pyarrow as pa
import pytest
from byte_tokenizer import ByteTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sources import documents_of, make_config

from MaxNano.data import lines, loader, stream

# Lines of all lengths around the block's, with characters of several bytes.
LINES = st.lists(st.text("aé\U0001f600 ", max_size=12), min_size=1, max_size=30)


@settings(max_examples=100)
@given(texts=LINES, block=st.integers(1, 40))
def test_blocks_of_lines_have_every_document_once_and_in_order(tmp_path_factory, texts, block):
    folder = tmp_path_factory.mktemp("jsonl")
    rows = [json.dumps({"text": line}, ensure_ascii=False) for line in texts]
    (folder / "a.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (folder / "b.jsonl").write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "BLOCK_BYTES", block)
        found = documents_of(lines.JsonlSource(make_config("jsonl", folder), "train"))
    assert [text for _, _, text in found] == texts


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut off', "line 2: cannot be read"),
        ("[" * 100_000, "line 2: cannot be read .nested too deeply"),
        ('{"number": ' + "9" * 5000 + "}", "line 2: cannot be read .Exceeds the limit"),
        ('{"text": 5}', "no text in field 'text'"),
        ('["text"]', "no text in field 'text'"),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "ok"}\n' + line)
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(ValueError, match=message) as caught:
        list(stream.iterate_texts(make_config("jsonl", tmp_path), "train"))
    assert "a.jsonl" in str(caught.value)


def without_space(text):
    return "".join(text.split())


ENDS = ["\n", "\n\n", "\r\n", "\r\n\r\n", "\r", "\r\r", "\f", "\u2028", ". ", " "]
WORDS = st.sampled_from(["word", "some words", "Hé. 😀", "字。", "x" * 50, "y" * 300, "-"])


@settings(max_examples=200)
@given(
    pieces=st.lists(st.tuples(WORDS, st.sampled_from(ENDS)), max_size=60),
    only=st.sampled_from([None, *ENDS]),
    block=st.integers(4, 400),
)
def test_text_files_lose_nothing_whatever_their_line_ends(pieces, only, block):
    """Every character but whitespace, once and in order; no document is empty or too long."""
    text = "".join(word + (only or end) for word, end in pieces)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "BLOCK_BYTES", block)
        patch.setattr(lines, "TEXT_DOCUMENT_CHARACTERS", 40)
        patch.setattr(lines, "TEXT_DOCUMENT_MAX_CHARACTERS", 100)
        blocks = lines._TextBlocks(pa.BufferReader(text.encode()), "a.txt")
        texts = [text for group in range(len(blocks)) for text in blocks.documents(group)]
    assert all(texts)
    assert without_space("".join(texts)) == without_space(text)
    assert max(map(len, texts), default=0) < 200


SENTENCE = "A sentence of some words, as they are in books. "
FORMS = {
    "one line": lambda paragraphs: " ".join(paragraphs),
    "a line per paragraph": lambda paragraphs: "\n".join(paragraphs),
    "unix": lambda paragraphs: "\n\n".join(paragraphs),
    "windows": lambda paragraphs: "\r\n\r\n".join(paragraphs),
    "old mac": lambda paragraphs: "\r\r".join(paragraphs),
    "old mac, no blank line": lambda paragraphs: "\r".join(paragraphs),
    "pages": lambda paragraphs: "\f".join(paragraphs),
    "windows with a byte order mark": lambda paragraphs: "\ufeff" + "\r\n".join(paragraphs),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_book_in_any_form_becomes_documents_of_whole_sentences_for_all_readers(tmp_path, form):
    """A line of two million characters becomes several documents, so that all of it is trained on."""
    paragraphs = [f"{number} {SENTENCE * (5 + number % 7)}".strip() for number in range(5000)]
    text = FORMS[form](paragraphs)
    for name in "ab":
        (tmp_path / f"{name}.txt").write_bytes(text.encode())
    source = lines.TextSource(make_config("text", tmp_path), "train")
    assert stream.usable_readers(source, 8) == 8
    found = documents_of(source)
    assert {group % 8 for _, group, _ in found} == set(range(8))
    texts = [document for _, _, document in found]
    assert without_space("".join(texts)) == without_space(text.removeprefix("\ufeff"))
    assert max(map(len, texts)) <= 1.1 * lines.TEXT_DOCUMENT_MAX_CHARACTERS
    assert sum(map(len, texts)) / len(texts) > 0.9 * lines.TEXT_DOCUMENT_CHARACTERS
    assert all(document.endswith(".") for document in texts)


def test_a_file_of_lines_is_cut_as_before(tmp_path):
    """What a run of an earlier version has in its position: lines by block, cut at blank lines."""
    random = np.random.default_rng(0)
    rows = ["x" * int(n) if n > 20 else "" for n in random.integers(0, 900, 3000)]
    (tmp_path / "a.txt").write_text("\n".join(rows))
    (tmp_path / "b.txt").write_text("")
    expected, offset = [], 0
    by_block = {}
    for row in rows:
        by_block.setdefault(offset // lines.BLOCK_BYTES, []).append(row + "\n")
        offset += len(row) + 1
    for block, block_lines in by_block.items():
        document = ""
        for line in block_lines:
            document += line
            blank = not line.strip() and len(document) >= lines.TEXT_DOCUMENT_CHARACTERS
            if blank or len(document) >= lines.TEXT_DOCUMENT_MAX_CHARACTERS:
                expected.append((0, block, document.strip()))
                document = ""
        expected += [(0, block, document.strip())] * bool(document.strip())
    assert documents_of(lines.TextSource(make_config("text", tmp_path), "train")) == expected


def test_text_is_cut_at_blank_lines_and_serves_many_readers(tmp_path):
    paragraph = "one sentence of many words. " * 40
    text = "\n\n".join(f"{n} {paragraph}" for n in range(1000))
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(text)
    source = lines.TextSource(make_config("text", tmp_path), "train")
    assert stream.usable_readers(source, 8) == 8
    found = documents_of(source)
    whole = [text for _, _, text in found if len(text) >= lines.TEXT_DOCUMENT_CHARACTERS]
    assert len(whole) > 0.9 * len(found)
    assert all(text[0].isdigit() and text.endswith("words.") for text in whole)


def write_compressed(path, content, kind):
    if kind == "gz":  # two members, as parallel compressors write them
        path.write_bytes(gzip.compress(content[:9000]) + gzip.compress(content[9000:]))
    else:
        compressed = pa.BufferOutputStream()
        with pa.CompressedOutputStream(compressed, "zstd") as out:
            out.write(content)
        path.write_bytes(compressed.getvalue().to_pybytes())


def test_notes_in_markdown_are_text(tmp_path):
    """The guide and the quickstart promise .md files, which were silently not read."""
    for name in ("a.md", "b.txt", "c.md"):
        (tmp_path / name).write_text(name)
    config = make_config("text", tmp_path)
    assert list(stream.iterate_texts(config, "train")) == ["a.md", "b.txt"]
    assert list(stream.iterate_texts(config, "validation")) == ["c.md"]
    with pytest.raises(ValueError, match="no .parquet files.*; dataset_type=text reads its .txt"):
        list(stream.iterate_texts(make_config("parquet", tmp_path), "train"))


def test_small_files_train_with_the_defaults(tmp_path):
    """A folder of notes: no file is large enough for 8 readers, which was refused."""
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 200)
    config = make_config("text", tmp_path, max_target_length=16)
    for split in ("train", "validation"):
        with loader.make_loader(config, ByteTokenizer(), split, batch_rows=8) as batches:
            first = next(batches)["inputs"]
            state = batches.state()
            assert state["data_readers"] == 1 and first.shape == (8, 16)
            second = next(batches)["inputs"]
        with loader.make_loader(config, ByteTokenizer(), split, batch_rows=8, state=state) as again:
            assert (next(again)["inputs"] == second).all()


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_compressed_lines_are_read_by_several_readers(tmp_path, kind):
    rows = [json.dumps({"text": f"{n} " + "x" * 300}) for n in range(2000)]
    content = "\n".join(rows).encode()
    for name in "ab":
        write_compressed(tmp_path / f"{name}.jsonl.{kind}", content, kind)
    (tmp_path / "a.jsonl").write_bytes(content)  # the same file, decompressed: read once
    config = make_config("jsonl", tmp_path)
    source = lines.JsonlSource(config, "train")
    assert source.files == ["a.jsonl"]
    (tmp_path / "a.jsonl").rename(tmp_path / "plain")
    source = lines.JsonlSource(config, "train")
    assert source.files == [f"a.jsonl.{kind}"]
    assert stream.usable_readers(source, 4) == 4
    texts = [text for _, _, text in documents_of(pickle.loads(pickle.dumps(source)))]
    assert texts == [json.loads(row)["text"] for row in rows]
    damaged = tmp_path / f"a.jsonl.{kind}"
    damaged.write_bytes(damaged.read_bytes()[:-40])
    with pytest.raises(ValueError, match=f"a.jsonl.{kind}: cannot be read") as caught:
        list(stream.iterate_texts(config, "train"))
    assert "skip_corrupt_data=true" in str(caught.value)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n', "utf-8-sig")
    (tmp_path / "b.jsonl").write_text("")
    assert list(stream.iterate_texts(make_config("jsonl", tmp_path), "train")) == ["one", "two"]


def test_lines_without_text_are_skipped_and_damaged_ones_only_if_asked(tmp_path):
    rows = ['{"text": "a"}', '{"text": null}', '{"body": "b"}', '{"text": "c', '{"text": "d"}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    (tmp_path / "b.jsonl").write_text("")
    config = make_config("jsonl", tmp_path)
    with pytest.raises(ValueError, match="a.jsonl, line 4: cannot be read"):
        list(stream.iterate_texts(config, "train"))
    source = lines.JsonlSource(config, "train")
    start = stream.start_position(source, 0)
    read = stream.read_lists(source, 0, 1, 2, start, skip_damaged=True)
    results = [next(read) for _ in range(4)]
    assert [texts for _, texts in results] == [["a"], [], ["d"], ["a"]]
    assert [position[3:] for position, _ in results] == [
        (2, 1, 0),
        (4, 2, 1),
        (5, 2, 1),
        (2, 3, 1),
    ]
    again = stream.read_lists(source, 0, 1, 2, results[0][0], skip_damaged=True)
    assert [next(again) for _ in range(3)] == results[1:]


def test_a_field_that_no_line_has_is_told(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n{"body": "y"}')
    (tmp_path / "b.jsonl").write_text("")
    for skip in ("false", "true"):
        config = make_config("jsonl", tmp_path, skip_corrupt_data=skip)
        with pytest.raises(
            ValueError, match="line 1: no text in field 'text'; set text_column to one of body"
        ):
            list(stream.iterate_texts(config, "train"))


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_a_damaged_line_far_into_a_file_is_named_by_its_number(tmp_path, ending):
    rows = [json.dumps({"text": f"é {number}" * 40}, ensure_ascii=False) for number in range(3000)]
    rows[2345] = '{"text" "no colon"}'
    open_file = gzip.open if ending.endswith(".gz") else open
    with open_file(tmp_path / f"a{ending}", "wt", encoding="utf-8") as file:
        file.write("\n".join(["", *rows]))
    (tmp_path / "b.jsonl").write_text("")
    documents = stream.iterate_texts(make_config("jsonl", tmp_path), "train")
    with pytest.raises(ValueError, match=f"a{ending}, line 2347: cannot be read .*, column 9"):
        list(documents)
    # Skipped, it costs no count, and the lines after it are read.
    config = make_config("jsonl", tmp_path, skip_corrupt_data="true")
    assert len(list(stream.iterate_texts(config, "train"))) == 2999


def test_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(ValueError, match="a.txt: cannot be read .*utf-8"):
        list(stream.iterate_texts(make_config("text", tmp_path), "train"))

"""What other tools write: types, damage, splits by name. Read, or skipped and counted, or said."""

import itertools
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_sources import make_config, write_parquet

from MaxNano.data import folder, sources, stream, summary


def test_the_types_of_text_that_other_tools_write_are_read(tmp_path):
    texts = ["plain", "grüß", "", "x" * 40]
    kinds = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary()]
    for kind in [*kinds, pa.binary_view(), pa.dictionary(pa.int32(), pa.string())]:
        for name in "ab":
            values = pa.array(texts, pa.string()).cast(pa.binary()).cast(pa.string())
            is_binary = "binary" in str(kind)
            values = (
                pa.array([text.encode() for text in texts], kind)
                if is_binary
                else values.cast(kind)
            )
            pq.write_table(pa.table({"text": values}), tmp_path / f"{name}.parquet")
        assert list(stream.iterate_texts(make_config("parquet", tmp_path), "train")) == texts
        # As other writers do, without Arrow's own schema beside the file's.
        table = pq.read_table(tmp_path / "a.parquet")
        pq.write_table(table, tmp_path / "a.parquet", store_schema=False)
        assert list(stream.iterate_texts(make_config("parquet", tmp_path), "train")) == texts


def test_a_column_twice_and_bytes_that_are_no_text_are_one_line(tmp_path):
    write_parquet(tmp_path / "b.parquet", ["x"])
    table = pa.Table.from_arrays([pa.array(["x"])] * 2, names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    config = make_config("parquet", tmp_path)
    with pytest.raises(ValueError, match="a.parquet: two columns 'text'"):
        list(stream.iterate_texts(config, "train"))
    pq.write_table(pa.table({"text": pa.array([b"ok", b"caf\xe9"])}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet, row group 0: cannot be read .*utf-8"):
        list(stream.iterate_texts(config, "train"))


def damage_group(path, group):
    """Change a byte of the data of a row group."""
    column = pq.ParquetFile(path).metadata.row_group(group).column(0)
    content = bytearray(path.read_bytes())
    content[column.data_page_offset + column.total_compressed_size - 3] ^= 0xFF
    path.write_bytes(content)


def read_until_epoch_2(source, reader, readers, size, position=None, **options):
    position = position or stream.start_position(source, reader)
    lists = stream.read_lists(source, reader, readers, size, position, **options)
    return list(itertools.takewhile(lambda item: item[0].epoch == 1, lists))


@pytest.mark.parametrize("readers", [1, 2])
def test_rows_without_text_and_damaged_groups_are_skipped_counted_and_resumed(tmp_path, readers):
    texts = [None if n % 5 == 2 else f"document {n}" for n in range(24)]
    for name in "abc":
        table = pa.table({"text": texts})
        options = {"row_group_size": 4, "write_page_checksum": True, "use_dictionary": False}
        pq.write_table(table, tmp_path / f"{name}.parquet", **options)
    damage_group(tmp_path / "a.parquet", 3)
    source = sources.ParquetSource(make_config("parquet", tmp_path), "train")
    with pytest.raises(sources.DamagedData, match="a.parquet, row group 3: .*skip_corrupt_data"):
        for reader in range(readers):
            read_until_epoch_2(source, reader, readers, 3)
    read, skipped = [], []
    for reader in range(readers):
        lists = read_until_epoch_2(source, reader, readers, 3, skip_damaged=True)
        for index, (position, _) in enumerate(lists):
            saved = json.loads(json.dumps(stream.position_to_json(source, position)))
            again = stream.position_from_json(source, saved)
            options = {"position": again, "skip_damaged": True}
            assert read_until_epoch_2(source, reader, readers, 3, **options) == lists[index + 1 :]
        read += [text for _, some in lists for text in some]
        skipped.append(lists[-1][0][-2:])
    kept = [text for text in texts[:12] + texts[16:] if text] + [text for text in texts if text]
    assert sorted(read) == sorted(kept)
    assert [sum(counts) for counts in zip(*skipped, strict=True)] == [4 + 5, 1]


def test_a_file_that_cannot_be_opened_is_skipped_and_counted_once(tmp_path):
    for name in "abc":
        write_parquet(tmp_path / f"{name}.parquet", [f"{name} {n}" for n in range(8)])
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and then nothing")
    source = sources.ParquetSource(make_config("parquet", tmp_path), "train")
    with pytest.raises(sources.DamagedData, match="a.parquet: cannot be read .*skip_corrupt_data"):
        stream.usable_readers(source, 2)
    assert stream.usable_readers(source, 2, skip_damaged=True) == 2
    lists = [read_until_epoch_2(source, reader, 2, 8, skip_damaged=True) for reader in range(2)]
    assert sorted(text for part in lists for _, texts in part for text in texts) == [
        f"b {n}" for n in range(8)
    ]
    assert sum(part[-1][0].damaged_parts for part in lists) == 1


def test_a_failing_disk_or_bucket_is_no_damage():
    """What another attempt may read is never skipped."""
    for error in (OSError(5, "Input/output error"), OSError("google::cloud::Status(UNAVAILABLE)")):
        with pytest.raises(ValueError, match="a: cannot be read") as caught, folder.naming("a"):
            raise error
        assert not isinstance(caught.value, folder.DamagedData)


# ---- Splits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00008", "train"),
        ("validation-00000-of-00001", "validation"),
        ("test-00000-of-00001", "test"),
        ("data/test-00000-of-00001", "test"),
        ("data--test-00000-of-00001", "test"),  # as data/download.py stores it
        ("plain_text/test/0000", "test"),
        ("default--partial-train--0000", "train"),
        ("c4-validation.00000-of-00008", "validation"),
        ("wiki.valid", "validation"),
        ("fineweb_val_000000", "validation"),
        ("dev", "validation"),
        ("Test", "test"),
        ("test/train-0", "train"),  # its own name first
        ("shard_00000", None),
        ("latest", None),
        ("contest-0", None),
        ("training_data", None),
        ("test of time", None),
        ("train to nowhere", None),
        ("tests/shard_0", None),
    ],
)
def test_splits_by_the_names_of_the_hub(name, split):
    assert folder.split_of(f"{name}.parquet", ".parquet") == split


def files(*names):
    return [f"{name}.parquet" for name in names]


@pytest.mark.parametrize(
    ("names", "train", "validation", "unused"),
    [
        (["s_0", "s_1", "s_2"], ["s_0", "s_1"], ["s_2"], []),
        (["train-0", "train-1", "validation-0", "test-0"], ["train-0", "train-1"],
         ["validation-0"], ["test-0"]),
        (["test-0", "train-0"], ["train-0"], ["test-0"], []),
        (["train-0", "train-1"], ["train-0"], ["train-1"], []),
        (["a", "b", "val"], ["a", "b"], ["val"], []),
        (["test", "val"], [], ["val"], ["test"]),
        ([], [], [], []),
    ],
)  # fmt: skip
def test_what_trains_and_what_validates(names, train, validation, unused):
    expected = (files(*train), files(*validation), files(*unused))
    assert folder.split_files(files(*names)) == expected


@pytest.mark.parametrize("layout", ["{split}-00000-of-00001", "data/{split}-0", "{split}/0"])
def test_test_files_of_a_hub_layout_are_never_trained_on(tmp_path, layout):
    """`test-*` in a folder with `validation-*`, in subfolders and at its top, was trained on."""
    for split in ("train", "validation", "test"):
        path = tmp_path / f"{layout.format(split=split)}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_parquet(path, [f"{split} {n}" for n in range(8)])
    config = make_config("parquet", tmp_path)
    for split in ("train", "validation"):
        texts = list(stream.iterate_texts(config, split))
        assert texts == [f"{split} {n}" for n in range(8)]
    described = summary.describe_files(config)
    assert described == {
        f"{kind} files": f"{layout.format(split=split)}.parquet"
        for kind, split in (("training", "train"), ("validation", "validation"), ("unused", "test"))
    }


def test_files_that_are_not_read_are_said(tmp_path):
    (tmp_path / "more").mkdir()
    for name in ("shard_0", "shard_1", "shard_2", "more/shard_7"):
        write_parquet(tmp_path / f"{name}.parquet", ["text"])
    config = make_config("parquet", tmp_path)
    assert summary.describe_files(config) == {
        "training files": "shard_0.parquet, shard_1.parquet",
        "validation files": "shard_2.parquet",
        "unused files": "more/",
    }
    with pytest.raises(ValueError, match=r"has no \.jsonl .*dataset_type=parquet reads its"):
        sources.JsonlSource(config, "train")
    missing = summary.describe_files(make_config("parquet", tmp_path / "none"))
    assert missing["training files"].startswith("none yet: dataset_path=")


def test_a_folder_without_text_is_one_plain_line(tmp_path):
    with pytest.raises(ValueError, match=r"has no \.txt or \.md files; put some there, or name"):
        sources.TextSource(make_config("text", tmp_path), "train")
    for name, content in (
        ("a.txt", b"text"),
        ("b.txt", b""),
        ("c.txt", "caf\xe9".encode("latin-1")),
    ):
        (tmp_path / name).write_bytes(content)
    config = make_config("text", tmp_path)
    with pytest.raises(ValueError, match="c.txt: cannot be read .*; convert it to UTF-8, or leave"):
        list(stream.iterate_texts(config, "validation"))
    (tmp_path / "c.txt").unlink()
    source = sources.TextSource(config, "validation")
    lists = stream.read_lists(source, 0, 1, 4, stream.start_position(source, 0))
    with pytest.raises(ValueError, match=r"no text in b\.txt; add text, or take such files away"):
        for _ in range(3):
            next(lists)

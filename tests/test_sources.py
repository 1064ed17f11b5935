"""Document sources: who reads what in which order, and one line for bad files."""

import itertools
import json
import os
import pickle
import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from MaxNano import pyconfig
from MaxNano.data import manifest, sources, stream


def make_config(kind, path, **values):
    overrides = [f"{key}={value}" for key, value in values.items()]
    return pyconfig.initialize(
        ["configs/base.yml", f"dataset_type={kind}", f"dataset_path={path}", *overrides]
    )


def write_parquet(path, texts, group=4, column="text"):
    pq.write_table(pa.table({column: texts}), path, row_group_size=group, write_page_checksum=True)


def documents_of(source):
    """Every document with its file and row group."""
    found = []
    for file in range(len(source.files)):
        groups = source.open(file)
        for group in range(len(groups)):
            found += [(file, group, text) for text in groups.documents(group)]
    return found


@pytest.fixture
def shards(tmp_path):
    """Three parquet files: 10 and 7 documents to train on in groups of 4, 5 held out."""
    for index, count in enumerate((10, 7, 5)):
        texts = [f"file {index} document {n}" for n in range(count)]
        write_parquet(tmp_path / f"shard_{index}.parquet", texts)
    (tmp_path / "shard_9.parquet.tmp").write_bytes(b"half a download")
    return tmp_path


def test_the_last_file_in_sorted_order_is_held_out(shards):
    config = make_config("parquet", shards)
    train = list(stream.iterate_texts(config, "train"))
    assert len(train) == 17
    assert train[0] == "file 0 document 0"
    assert train[-1] == "file 1 document 6"
    held_out = list(stream.iterate_texts(config, "validation"))
    assert held_out == [f"file 2 document {n}" for n in range(5)]


def test_a_path_may_be_a_uri(shards):
    config = make_config("parquet", f"file://{shards}")
    assert len(list(stream.iterate_texts(config, "train"))) == 17


def test_reader_takes_every_rth_row_group_of_each_file(shards):
    source = sources.ParquetSource(make_config("parquet", shards), "train")
    lists = stream.read_lists(source, 1, 2, 3, stream.StreamPosition(1, 0, 1, 0))
    read = [next(lists) for _ in range(4)]
    # Reader 1 of 2 has group 1 of file 0 and group 1 of file 1; lists do not cross groups.
    assert [position[:4] for position, _ in read] == [
        (1, 0, 1, 3),
        (1, 0, 1, 4),
        (1, 1, 1, 3),
        (2, 0, 1, 3),
    ]
    assert read[1][1] == ["file 0 document 7"]
    assert read[3][1] == read[0][1]


@settings(max_examples=30)
@given(readers=st.integers(1, 4), size=st.integers(1, 5), cut=st.integers(0, 20))
def test_reading_goes_on_exactly_behind_any_position(readers, size, cut):
    class Numbered:
        where, files = "test", ["a", "b", "c"]

        def open(self, file):
            return Groups(file)

    class Groups:
        def __init__(self, file):
            self.file = file

        def __len__(self):
            return 4 + self.file

        def documents(self, group):
            # Some groups are empty, and lengths differ.
            return (f"{self.file} {group} {row}" for row in range((self.file + group) % 4))

    for reader in range(readers):
        lists = stream.read_lists(
            Numbered(), reader, readers, size, stream.StreamPosition(1, 0, reader, 0)
        )
        read = [next(lists) for _ in range(cut + 10)]
        position = read[cut - 1][0] if cut else stream.StreamPosition(1, 0, reader, 0)
        again = stream.read_lists(Numbered(), reader, readers, size, position)
        assert [next(again) for _ in range(10)] == read[cut:]


def test_readers_are_no_more_than_have_something_to_read(shards):
    source = sources.ParquetSource(make_config("parquet", shards), "train")
    # Three row groups: a divisor of what is asked for that leaves no reader without one.
    usable = {asked: stream.usable_readers(source, asked) for asked in (1, 2, 3, 4, 6, 7, 8)}
    assert usable == {1: 1, 2: 2, 3: 3, 4: 2, 6: 3, 7: 1, 8: 2}


def test_an_epoch_without_documents_is_an_error_not_an_endless_loop(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("\n\n")
    source = sources.JsonlSource(make_config("jsonl", tmp_path), "train")
    with pytest.raises(ValueError, match="no text in a.jsonl"):
        next(stream.read_lists(source, 0, 1, 8, stream.StreamPosition(1, 0, 0, 0)))


# ---- Files that still arrive --------------------------------------------------------------------


def write_manifest(folder, done):
    """A manifest of some files: {name: whether it has arrived}."""
    files = {
        name: {"size": 1, "sha256": None, "etag": None, "done": here} for name, here in done.items()
    }
    (folder / manifest.MANIFEST).write_text(json.dumps({"source": "test", "files": files}))


@pytest.fixture
def arriving(shards, tmp_path_factory):
    """The three shards, of which the middle one is still elsewhere: (folder, function to bring it)."""
    middle = shards / "shard_1.parquet"
    elsewhere = middle.rename(tmp_path_factory.mktemp("elsewhere") / middle.name)
    write_manifest(shards, {"shard_0.parquet": True, middle.name: False, "shard_2.parquet": True})
    return shards, lambda: elsewhere.rename(middle)


def test_a_file_that_has_not_arrived_is_asked_for_again_and_changes_nothing(arriving):
    folder, bring = arriving
    source = sources.ParquetSource(make_config("parquet", folder), "train")
    assert source.files == ["shard_0.parquet", "shard_1.parquet"]
    assert sources.ParquetSource(make_config("parquet", folder), "validation").files == [
        "shard_2.parquet"
    ]
    lists = stream.read_lists(source, 0, 1, 4, stream.StreamPosition(1, 0, 0, 0))
    read = [next(lists) for _ in range(3)]
    for _ in range(2):
        missing = next(lists)
        assert isinstance(missing, sources.NotArrived)
        assert missing.path == f"{folder}/shard_1.parquet"
    bring()
    read += [next(lists) for _ in range(3)]
    again = stream.read_lists(
        sources.ParquetSource(make_config("parquet", folder), "train"),
        0,
        1,
        4,
        stream.StreamPosition(1, 0, 0, 0),
    )
    assert read == [next(again) for _ in range(6)]
    assert read[-1][0].epoch == 2


def test_the_tokenizer_waits_for_a_file_with_a_message(arriving, monkeypatch, capsys):
    folder, bring = arriving
    polls, mine, wait_really = [], threading.current_thread(), threading.Event.wait

    def wait(self, timeout=None):
        if threading.current_thread() is not mine:  # one that another test has left behind
            return wait_really(self, timeout)
        polls.append(timeout)
        if len(polls) == 3:
            bring()

    monkeypatch.setattr(threading.Event, "wait", wait)
    assert len(list(stream.iterate_texts(make_config("parquet", folder), "train"))) == 17
    assert polls == [stream.POLL_SECONDS] * 3
    message = f"Waiting for the download of {folder}/shard_1.parquet\n"
    assert capsys.readouterr().err == message


def test_waiting_ends_when_nothing_arrives_any_more(arriving, monkeypatch):
    folder, _ = arriving
    monkeypatch.setattr(stream, "POLL_SECONDS", 0.01)
    config = make_config("parquet", folder, data_wait_seconds=0.2)
    begin = time.monotonic()
    # A download that was last alive an hour ago is still given the time to be started again.
    os.utime(folder / manifest.MANIFEST, (0, time.time() - 3600))
    with pytest.raises(
        ValueError, match="timed out after .*shard_1.parquet: run data/download.py again"
    ):
        list(stream.iterate_texts(config, "train"))
    assert time.monotonic() - begin >= 0.2


def test_the_manifest_has_the_last_word_on_the_files(shards):
    names = {f"shard_{n}.parquet": True for n in range(3)}
    write_manifest(shards, names | {"shard_1a.parquet": True})
    source = sources.ParquetSource(make_config("parquet", shards), "train")
    with pytest.raises(ValueError, match="shard_1a.parquet is missing, but manifest.json lists it"):
        source.open(2)
    (shards / "extra.parquet").write_bytes((shards / "shard_0.parquet").read_bytes())
    with pytest.raises(ValueError, match="extra.parquet is not in manifest.json"):
        sources.ParquetSource(make_config("parquet", shards), "train")
    for content in ("{", "[]", '{"files": [1]}', '{"files": {"a.parquet": 5}}'):
        (shards / manifest.MANIFEST).write_text(content)
        with pytest.raises(ValueError, match="manifest.json") as caught:
            sources.ParquetSource(make_config("parquet", shards), "train")
        assert "\n" not in str(caught.value)


def test_readers_are_checked_by_the_files_that_have_arrived(arriving):
    folder, bring = arriving
    source = sources.ParquetSource(make_config("parquet", folder), "train")
    assert stream.usable_readers(source, 3) == 3
    assert stream.usable_readers(source, 4) == 4  # the file that is to come may have them
    bring()
    assert stream.usable_readers(source, 4) == 2


# ---- The hub ------------------------------------------------------------------------------------


def test_a_data_set_of_the_hub_is_read_where_downloads_are_kept(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("downloads")
    config = make_config(
        "hf", "unused", download_path=folder, dataset_name="hf:some-one/texts.v2/data/train-*"
    )
    with pytest.raises(
        ValueError, match=r"hf:some-one/texts.v2/data/train-\* not found in .*download.py"
    ):
        sources.HubSource(config, "train")
    # Put there by hand, without a manifest.
    place = folder / "some-one--texts.v2--data--train"
    place.mkdir()
    with pytest.raises(
        ValueError, match=r"not found in .*download.py"
    ):  # a download that never began
        sources.HubSource(config, "train")
    place.rmdir()
    shards.rename(place)
    assert len(list(stream.iterate_texts(config, "train"))) == 17
    name = sources.hub_name(config)
    assert name == ("some-one/texts.v2", "data/train-*")
    assert name.includes("data/train-0.parquet")
    assert not name.includes("data/test-0.parquet")
    assert not name.includes("data/train-0.json")


@pytest.mark.parametrize("name", ["null", "texts", "a/b c", "../etc", "hf:a/..", "a/b/../../c"])
def test_what_is_no_name_on_the_hub_is_told(name):
    with pytest.raises(ValueError, match="needs dataset_name=OWNER/NAME"):
        sources.HubSource(make_config("hf", "unused", dataset_name=name), "train")


# ---- Mixtures -----------------------------------------------------------------------------------


@pytest.fixture
def several(shards):
    """Parquet, jsonl with another field, and running text."""
    folder = shards / "more"
    for name in ("jsonl", "text"):
        (folder / name).mkdir(parents=True)
    for name in "ab":
        rows = [json.dumps({"body": f"jsonl {name} {n} " + "x" * (n % 40)}) for n in range(60)]
        (folder / f"jsonl/{name}.jsonl").write_text("\n".join(rows))
        (folder / f"text/{name}.txt").write_text("\n\n".join(f"text {name} {n}" for n in range(50)))
    return shards


def mixture_of(folder, *weights):
    parts = [f"parquet:{folder}", f"jsonl:{folder}/more/jsonl, body", f"text:{folder}/more/text"]
    words = [f"[{weight}, {part}]" for weight, part in zip(weights, parts, strict=False)]
    return make_config("mixture", "unused", dataset_mixture=f"[{', '.join(words)}]")


def test_a_mixture_gives_each_part_its_share_in_its_own_order(several):
    config = mixture_of(several, 0.5, 0.2, 0.3)
    source = sources.open_source(config, "train")
    lists = stream.read_lists(source, 0, 1, 2, stream.start_position(source, 0))
    texts = [text for _, some in itertools.islice(lists, 1000) for text in some]
    by_part = {
        kind: [text for text in texts if text.startswith(kind)]
        for kind in ("file", "jsonl", "text")
    }
    total = sum(len(text) + 1 for text in texts)
    shares = [sum(len(text) + 1 for text in own) / total for own in by_part.values()]
    # No part is ever further off than one list of its documents.
    assert shares == pytest.approx([0.5, 0.2, 0.3], abs=0.02)
    alone = sources.open_source(make_config("parquet", several), "train")
    lists = stream.read_lists(alone, 0, 1, 2, stream.StreamPosition(1, 0, 0, 0))
    own = [text for _, some in itertools.islice(lists, 5000) for text in some]
    assert by_part["file"] == own[: len(by_part["file"])]
    held_out = {text.split()[1] for text in stream.iterate_texts(config, "validation")}
    assert held_out == {"2", "b"}


@pytest.fixture(scope="module")
def two_parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    for kind in "pq":
        (folder / kind).mkdir()
        for index, count in enumerate((9, 14, 4)):
            texts = [f"{kind}{index} {n} " + "y" * (n % 7) for n in range(count)]
            write_parquet(folder / kind / f"{index}.parquet", texts)
    mixture = f"[[1, parquet:{folder}/p], [2.5, parquet:{folder}/q]]"
    config = make_config("mixture", "unused", dataset_mixture=mixture)
    return sources.open_source(config, "train")


@settings(max_examples=20)
@given(cut=st.integers(0, 60), readers=st.integers(1, 2))
def test_a_mixture_goes_on_exactly_behind_any_position(two_parts, cut, readers):
    source, reader = pickle.loads(pickle.dumps(two_parts)), readers - 1
    lists = stream.read_lists(source, reader, readers, 3, stream.start_position(source, reader))
    read = [next(lists) for _ in range(cut + 10)]
    position = read[cut - 1][0] if cut else stream.start_position(source, reader)
    saved = json.loads(json.dumps(stream.position_to_json(source, position)))
    again = stream.position_from_json(source, saved)
    assert again == position
    lists = stream.read_lists(source, reader, readers, 3, again)
    assert [next(lists) for _ in range(10)] == read[cut:]


def test_every_document_of_a_mixture_comes_once_for_the_tokenizer(several):
    config = mixture_of(several, 1, 8)
    texts = list(stream.iterate_texts(config, "train"))
    assert len(texts) == len(set(texts)) == 17 + 60
    assert (
        sum(text.startswith("jsonl") for text in texts[:10]) >= 6
    )  # in their shares as long as both last


def test_a_mixture_waits_for_a_part_instead_of_taking_another(arriving, tmp_path_factory):
    folder, bring = arriving
    other = tmp_path_factory.mktemp("other")
    for name in "ab":
        write_parquet(other / f"{name}.parquet", [f"other {n}" for n in range(8)])
    mixture = f"[[1, parquet:{folder}], [1, parquet:{other}]]"
    source = sources.open_source(make_config("mixture", "unused", dataset_mixture=mixture), "train")
    lists = stream.read_lists(source, 0, 1, 4, stream.start_position(source, 0))
    read = list(itertools.takewhile(lambda item: not isinstance(item, sources.NotArrived), lists))
    assert isinstance(next(lists), sources.NotArrived)
    bring()
    read += itertools.islice(lists, 5)
    whole = stream.read_lists(source, 0, 1, 4, stream.start_position(source, 0))
    assert read == list(itertools.islice(whole, len(read)))


def test_a_position_of_another_data_set_is_told(several):
    mixture = sources.open_source(mixture_of(several, 1, 2), "train")
    plain = sources.open_source(make_config("parquet", several), "train")
    saved = stream.position_to_json(mixture, stream.start_position(mixture, 0))
    with pytest.raises(ValueError, match="another kind of data set"):
        stream.position_from_json(plain, saved)
    with pytest.raises(ValueError, match="another kind of data set"):
        stream.position_from_json(
            mixture, stream.position_to_json(plain, stream.StreamPosition(1, 0, 0, 0))
        )
    for weights in ((1, 3), (1, 2, 3), (1,)):
        other = sources.open_source(mixture_of(several, *weights), "train")
        with pytest.raises(ValueError, match="with the weights 1, 2"):
            stream.position_from_json(other, saved)


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ("[]", "needs dataset_mixture, such as"),
        ("[[1]]", r"a part \[1\] that is not \[weight, type:location\]"),
        ("[[0, text:a]]", r"a part \[0, text:a\]"),
        ("[[x, text:a]]", r"a part \[x, text:a\]"),
        ("[[nan, text:a]]", r"a part \[nan, text:a\]"),
        ("[[1, words:a]]", "a type of parquet, hf, jsonl, text, tfds, synthetic"),
        ("[[1, mixture:a]]", r"a part \[1, mixture:a\]"),
        ("[[1, data/text]]", r"a part \[1, data/text\]"),
        ("[[1, 'text:']]", r"a part \[1, text:\]"),
        ("[[1, text:a, b, c]]", r"a part \[1, text:a, b, c\]"),
        ("[[1, synthetic], [1, text:/nowhere]]", "dataset_path=/nowhere"),
    ],
)
def test_mistakes_in_a_mixture_are_one_line(mixture, message):
    config = make_config("mixture", "unused", dataset_mixture=mixture)
    with pytest.raises(ValueError, match=message) as caught:
        sources.open_source(config, "train")
    assert "\n" not in str(caught.value)


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: write_parquet(path, ["x"], column="body"), "set text_column to one of body"),
        (lambda path: write_parquet(path, [1, 2]), "holds int64, not text"),
        (lambda path: path.write_bytes(b"PAR1 and then nothing"), "cannot be read"),
        (flip_a_byte, "CRC checksum verification failed"),
    ],
)
def test_a_bad_parquet_file_is_named_in_one_line(tmp_path, damage, message):
    for name in "ab":
        write_parquet(tmp_path / f"{name}.parquet", [f"{n} " * 200 for n in range(100)], group=100)
    damage(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message) as caught:
        list(stream.iterate_texts(make_config("parquet", tmp_path), "train"))
    assert "a.parquet" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_folder_and_missing_validation_file_are_told(tmp_path):
    with pytest.raises(ValueError, match="dataset_path=.*nowhere"):
        sources.ParquetSource(make_config("parquet", tmp_path / "nowhere"), "train")
    write_parquet(tmp_path / "only.parquet", ["x"])
    with pytest.raises(
        ValueError, match=r"has 1 \.parquet files, 0 of them to train on; at least 2"
    ):
        sources.ParquetSource(make_config("parquet", tmp_path), "train")


def test_synthetic_documents_follow_seed_and_split():
    def first(split, seed):
        source = sources.SyntheticSource(make_config("synthetic", "unused", seed=seed), split)
        return next(stream.read_lists(source, 3, 8, 16, stream.StreamPosition(1, 0, 3, 0)))[1]

    assert first("train", 1) == first("train", 1)
    assert first("train", 1) != first("train", 2)
    assert first("train", 1) != first("validation", 1)
    assert all(text and text.isascii() for text in first("train", 1))


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """A data set of 2,500 documents in array_record files, as tfds writes them."""
    import numpy as np
    import tensorflow_datasets as tfds

    class TinyText(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"text": tfds.features.Text(), "number": np.int32}
            features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(2500), "test": self._generate_examples(3)}

        def _generate_examples(self, count):
            for n in range(count):
                yield n, {"text": f"dôcument {n}", "number": n}

    folder = tmp_path_factory.mktemp("tfds")
    TinyText(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def tfds_config(folder, **values):
    splits = {"dataset_name": "tiny_text", "dataset_splits": "[train, test]"}
    return make_config("tfds", folder, **splits | values)


def test_tfds_is_read_in_blocks_without_tensorflow(tfds_folder):
    config = tfds_config(tfds_folder)
    texts = list(stream.iterate_texts(config, "train"))
    assert sorted(texts) == sorted(f"dôcument {n}" for n in range(2500))
    assert len(list(stream.iterate_texts(config, "validation"))) == 3
    source = sources.TfdsSource(config, "train")
    assert stream.usable_readers(source, 3) == 3
    traveled = pickle.loads(pickle.dumps(source))
    assert documents_of(traveled) == documents_of(source)


def test_tfds_is_a_part_of_a_mixture(tfds_folder):
    mixture = "[[1, tfds:tiny_text], [1, synthetic]]"
    values = {"dataset_mixture": mixture, "dataset_splits": "[train, test]"}
    source = sources.open_source(make_config("mixture", tfds_folder, **values), "train")
    source = pickle.loads(pickle.dumps(source))
    lists = stream.read_lists(source, 2, 3, 64, stream.start_position(source, 2))
    texts = [text for _, some in itertools.islice(lists, 60) for text in some]
    assert {f"dôcument {n}" for n in range(2500)} & set(texts)
    assert not all(text.startswith("dôcument") for text in texts)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dataset_name": "unheard_of"}, "unheard_of in"),
        ({"dataset_splits": "[other, test]"}, "cannot open split 'other'"),
        ({"dataset_name": "null"}, "needs dataset_name"),
        ({"text_column": "body"}, "set text_column to one of"),
        ({"text_column": "number"}, "'number' is not text"),
    ],
)
def test_tfds_mistakes_are_one_line(tfds_folder, values, message):
    with pytest.raises(ValueError, match=message) as caught:
        list(stream.iterate_texts(tfds_config(tfds_folder, **values), "train"))
    assert "\n" not in str(caught.value)

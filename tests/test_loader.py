"""The loader: one batch per step whatever reads it, an exact state, and clean ends."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from byte_tokenizer import BOS, ByteTokenizer, FailingTokenizer, JaxReportingTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from MaxNano import pyconfig
from MaxNano.data import loader, manifest, packing, sources, stream, summary
from MaxNano.distributed.preemption import Preempted, Preemption
from MaxNano.training import start

READERS = 4
ROWS = 8


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two files of 4 and 5 row groups to train on, so that epochs end every few batches."""
    folder = tmp_path_factory.mktemp("shards")
    random = np.random.default_rng(0)
    for name, count in (("a", 46), ("b", 53), ("c", 48)):
        lengths = random.integers(1, 90, count)
        texts = [f"{name}{n} ".ljust(length, "x")[:length] for n, length in enumerate(lengths)]
        pq.write_table(pa.table({"text": texts}), folder / f"{name}.parquet", row_group_size=12)
    return folder


# So little is buffered that some batches need no more than the first file.
PROMPT = {"data_readers": 1, "packing_buffer_documents": 2}


def make_config(folder, **values):
    small = {
        "dataset_path": folder,
        "data_readers": READERS,
        "max_target_length": 32,
        "packing_buffer_documents": 10,
        "tokenize_batch_documents": 5,
    }
    overrides = [f"{key}={value}" for key, value in (small | values).items()]
    return pyconfig.initialize(["configs/base.yml", "model=d2", *overrides])


def open_loader(config, **options):
    return loader.make_loader(config, ByteTokenizer(), "train", **{"batch_rows": ROWS} | options)


def take(batches, count):
    """(count, rows, T + 1): inputs with the last target behind them."""
    taken = [next(batches) for _ in range(count)]
    return np.stack([np.hstack([b["inputs"], b["targets"][:, -1:]]) for b in taken])


@pytest.fixture(scope="module")
def expected(shards):
    """Batches of several epochs, in one go in one process."""
    with open_loader(make_config(shards)) as batches:
        return take(batches, 65)


def test_a_batch_has_shifted_targets_weight_one_and_rows_that_begin_with_bos(shards):
    with open_loader(make_config(shards)) as batches:
        batch = next(batches)
    assert {name: (rows.shape, rows.dtype.name) for name, rows in batch.items()} == {
        "inputs": ((ROWS, 32), "int32"),
        "targets": ((ROWS, 32), "int32"),
        "weights": ((ROWS, 32), "float32"),
    }
    np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])
    assert (batch["inputs"][:, 0] == BOS).all()
    assert (batch["weights"] == 1).all()


def test_reader_r_fills_the_rth_block_of_rows(shards, expected):
    source = sources.ParquetSource(make_config(shards), "train")
    for reader in range(READERS):
        lists = stream.read_lists(
            source, reader, READERS, 5, stream.StreamPosition(1, 0, reader, 0)
        )

        def next_documents(lists=lists):
            encoded = ByteTokenizer().encode_batch(next(lists)[1], bos=True)
            return [packing.cut_document(ids, 33) for ids in encoded]

        packer = packing.BestFitPacker(33, 10, next_documents)
        for batch in expected:
            for row in batch[2 * reader : 2 * reader + 2]:
                own = np.empty(33, np.int32)
                packer.fill(own)
                np.testing.assert_array_equal(row, own)


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_the_hosts_together_have_the_same_batches(shards, expected, hosts):
    """Also with more hosts than readers, where two hosts share one."""
    parts = []
    for host in range(hosts):
        with open_loader(make_config(shards), host_index=host, host_count=hosts) as batches:
            parts.append(take(batches, 10))
            # A host opens no more readers than its rows need.
            assert len(batches.state()["readers"]) == max(1, READERS // hosts)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), expected[:10])


class Device:
    def __init__(self, process):
        self.process_index = process


class Layout:
    """Rows cut into parts, one of which each device holds; what host_share asks of a sharding."""

    def __init__(self, *parts_of_process):
        self.parts_of_process = parts_of_process

    def devices_indices_map(self, shape):
        size = shape[0] // (1 + max(part for parts in self.parts_of_process for part in parts))
        return {
            Device(process): (slice(part * size, (part + 1) * size), slice(None))
            for process, parts in enumerate(self.parts_of_process)
            for part in parts
        }


@pytest.mark.parametrize(
    "parts, shares",
    [
        ([(0, 1), (2, 3)], [(0, 2), (1, 2)]),
        ([(0, 3), (1, 2)], [(0, 2), (1, 2)]),  # a ring through the hosts
        ([(2, 3), (0, 1)], [(1, 2), (0, 2)]),
        ([(0, 0), (0, 0)], [(0, 1), (0, 1)]),  # nothing cuts the batch
        (
            [(0, 0), (0, 0), (1, 1), (1, 1)],
            [(0, 2), (0, 2), (1, 2), (1, 2)],
        ),  # tensor over two hosts
    ],
)
def test_hosts_with_the_same_rows_share_their_part(monkeypatch, parts, shares):
    for process, share in enumerate(shares):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        found = loader.host_share(Layout(*parts), 8)
        assert (found["host_index"], found["host_count"]) == share


@pytest.mark.parametrize("parts", [[(0, 1), (1, 2)], [(0, 1, 2), (3,)]])
def test_hosts_that_cannot_share_the_rows_are_told(monkeypatch, parts):
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    with pytest.raises(ValueError, match="parallelism keys"):
        loader.host_share(Layout(*parts), 8)


def test_readers_may_straddle_hosts(shards):
    config = make_config(shards, data_readers=3)
    with open_loader(config, batch_rows=6) as batches:
        whole = take(batches, 10)
    for host in range(2):
        with open_loader(config, batch_rows=6, host_index=host, host_count=2) as batches:
            np.testing.assert_array_equal(take(batches, 10), whole[:, 3 * host : 3 * host + 3])


@settings(max_examples=25)
@given(cuts=st.lists(st.integers(0, 20), min_size=1, max_size=3))
def test_a_restored_state_goes_on_exactly(shards, expected, cuts):
    config, state, done = make_config(shards), None, 0
    for cut in [*cuts, 5]:
        with open_loader(config, state=state) as batches:
            if cut:
                np.testing.assert_array_equal(take(batches, cut), expected[done : done + cut])
            time.sleep(0.01)  # batches prefetched behind the last one must not count
            state = json.loads(json.dumps(batches.state()))
        done += cut


def test_a_state_goes_on_under_another_number_of_hosts(shards, expected):
    config, states = make_config(shards), []
    for host in range(2):
        with open_loader(config, host_index=host, host_count=2) as batches:
            take(batches, 7)
            states.append(batches.state())
    merged = json.loads(json.dumps(loader.merge_states(states)))
    with open_loader(config, state=merged) as batches:
        np.testing.assert_array_equal(take(batches, 10), expected[7:17])
    with pytest.raises(ValueError, match="has no reader 2"):
        open_loader(config, state=states[0])


def discarded_share(folder, rows, **values):
    with open_loader(make_config(folder, **values)) as batches:
        take(batches, rows)
        return batches.position()["discarded_share"]


def test_discarded_tokens_are_counted_and_none_are_with_split(tmp_path):
    """Of 40 books only the first row each was trained on, and nothing said so."""
    for name in "ab":
        texts = [f"{number} " + "words of a book " * 130 for number in range(40)]
        pq.write_table(pa.table({"text": texts}), tmp_path / f"{name}.parquet", row_group_size=10)
    length = len(texts[11]) + 1
    for rows in (1, 20):  # from the first step on
        share = discarded_share(tmp_path, rows)
        assert share == pytest.approx(1 - 33 / length, abs=1e-3)
    assert discarded_share(tmp_path, 20, long_documents="split") == 0
    for kind, tokens in (("crop", 33), ("split", length)):
        plan = summary.estimate_discarded(
            make_config(tmp_path, long_documents=kind), ByteTokenizer()
        )
        percent = f"{100 * (1 - tokens / length):.0f} %"
        assert plan.startswith("none" if kind == "split" else percent), plan
    assert "estimate from the first 10 documents; long_documents=split uses all" in (
        summary.estimate_discarded(make_config(tmp_path), ByteTokenizer())
    )


@pytest.mark.parametrize("kind", ["crop", "split"])
def test_long_documents_and_their_counts_resume_exactly_on_any_hosts_and_workers(shards, kind):
    values = {"long_documents": kind, "max_target_length": 16}
    with open_loader(make_config(shards, **values)) as batches:
        whole, positions = take(batches, 8), []
        positions.append(batches.position())
        whole = np.concatenate([whole, take(batches, 12)])
        positions.append(batches.position())
    assert (positions[1]["discarded_share"] > 0) == (kind == "crop")
    states = []
    for host in range(2):
        options = {"host_index": host, "host_count": 2}
        with open_loader(make_config(shards, **values, data_workers=host), **options) as batches:
            take(batches, 8)
            states.append(batches.state())
    state = json.loads(json.dumps(loader.merge_states(states)))
    with open_loader(make_config(shards, **values, data_workers=2), state=state) as batches:
        assert batches.position() == positions[0]
        np.testing.assert_array_equal(take(batches, 12), whole[8:])
        assert batches.position() == positions[1]
    other = {"crop": "split", "split": "crop"}[kind]
    with pytest.raises(ValueError, match=f"has long_documents={kind} but the run has {other}"):
        open_loader(make_config(shards, **values | {"long_documents": other}), state=state)


def test_a_state_of_an_earlier_version_resumes_exactly(shards, expected):
    """Without long_documents and counts: its documents were cropped."""
    with open_loader(make_config(shards)) as batches:
        take(batches, 7)
        state = json.loads(json.dumps(batches.state()))
    del state["long_documents"]
    for reader in state["readers"].values():
        for name in ("tokens_read", "tokens_discarded", "rows_without_text", "damaged_parts"):
            del reader[name]
    with open_loader(make_config(shards), state=state) as batches:
        np.testing.assert_array_equal(take(batches, 10), expected[7:17])
        assert 0 < batches.position()["discarded_share"] < 1


def test_long_documents_follow_the_data_and_a_run_keeps_its_own(tmp_path):
    def config(*words):
        base = ["configs/base.yml", "model=d2", f"base_output_directory={tmp_path}"]
        return pyconfig.initialize([*base, *words])

    assert config().long_documents == "crop"
    assert config("dataset_type=text").long_documents == "split"
    assert config("dataset_type=text", "long_documents=crop").long_documents == "crop"
    assert config("model=d4_quickstart").long_documents == "split"
    # A run of an earlier version has no such key: it resumes and is evaluated as it began.
    saved = tmp_path / "d2" / "config.yml"
    text = pyconfig.to_yaml(config("dataset_type=text"))
    earlier = [line for line in text.splitlines() if not line.startswith("long_documents")]
    saved.parent.mkdir()
    saved.write_text("\n".join(earlier))
    assert start.with_start(config("dataset_type=text")).long_documents == "crop"
    asked = config("dataset_type=text", "long_documents=split")
    assert start.with_start(asked).long_documents == "split"
    assert pyconfig.initialize([str(saved)]).long_documents == "crop"
    saved.write_text(text)
    assert start.with_start(config("dataset_type=text")).long_documents == "split"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_part_ends_the_loader_with_its_state_or_is_skipped(shards, tmp_path, workers):
    for name in "abc":
        table = pq.read_table(shards / f"{name}.parquet")
        options = {"row_group_size": 12, "write_page_checksum": True, "use_dictionary": False}
        pq.write_table(table, tmp_path / f"{name}.parquet", **options)
    column = pq.ParquetFile(tmp_path / "b.parquet").metadata.row_group(3).column(0)
    content = bytearray((tmp_path / "b.parquet").read_bytes())
    content[column.data_page_offset + column.total_compressed_size - 3] ^= 0xFF
    (tmp_path / "b.parquet").write_bytes(content)
    config = make_config(tmp_path, **PROMPT, data_workers=workers)
    done = []
    with open_loader(config) as batches:
        with pytest.raises(sources.DamagedData, match="b.parquet, row group 3: .*CRC"):
            while True:
                done.append(take(batches, 1)[0])
        state = json.loads(json.dumps(batches.state()))
    assert done
    skipping = {**PROMPT, "skip_corrupt_data": "true"}
    with open_loader(make_config(tmp_path, **skipping)) as batches:
        whole = take(batches, len(done) + 30)
    np.testing.assert_array_equal(done, whole[: len(done)])
    with open_loader(make_config(tmp_path, **skipping, data_workers=workers), state=state) as rest:
        np.testing.assert_array_equal(take(rest, 30), whole[len(done) :])
        assert rest.position()["damaged_parts"] > 0


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_change_nothing(shards, expected, workers):
    config = make_config(shards, data_workers=workers)
    with open_loader(config) as batches:
        np.testing.assert_array_equal(take(batches, 10), expected[:10])
        state = batches.state()
    with open_loader(make_config(shards), state=state) as batches:
        np.testing.assert_array_equal(take(batches, 5), expected[10:15])
        state = batches.state()
    with open_loader(config, state=state) as batches:
        np.testing.assert_array_equal(take(batches, 5), expected[15:20])
    assert not multiprocessing.active_children()


@pytest.fixture(scope="module")
def prompt(shards):
    with open_loader(make_config(shards, **PROMPT)) as batches:
        return take(batches, 20)


@pytest.fixture
def arriving(shards, tmp_path):
    """The shards, of which the second is not there yet: (folder, function that brings it)."""
    for name in "ac":
        (tmp_path / f"{name}.parquet").write_bytes((shards / f"{name}.parquet").read_bytes())
    files = {f"{name}.parquet": {"done": name != "b"} for name in "abc"}
    (tmp_path / manifest.MANIFEST).write_text(json.dumps({"files": files}))

    def bring():
        if not (tmp_path / "b.parquet").exists():
            (tmp_path / ".b").write_bytes((shards / "b.parquet").read_bytes())
            (tmp_path / ".b").rename(tmp_path / "b.parquet")

    return tmp_path, bring


@pytest.mark.parametrize("workers", [0, 1])
def test_training_waits_for_a_shard_and_its_batches_stay_the_same(
    arriving, prompt, monkeypatch, capfd, workers
):
    """Not the first shard again: nothing wraps before the last of the manifest's list."""
    folder, bring = arriving
    monkeypatch.setattr(stream, "POLL_SECONDS", 0.01)
    wait = stream.Patience.wait

    def wait_and_bring(*args):
        wait(*args)
        bring()

    monkeypatch.setattr(stream.Patience, "wait", wait_and_bring)
    with open_loader(make_config(folder, **PROMPT, data_workers=workers)) as batches:
        np.testing.assert_array_equal(take(batches, 15), prompt[:15])
        state = batches.state()
    assert capfd.readouterr().err.count("Waiting for ") == 1
    with open_loader(make_config(folder, **PROMPT), state=state) as batches:
        np.testing.assert_array_equal(take(batches, 5), prompt[15:20])


def test_a_state_goes_on_exactly_when_more_shards_have_arrived(arriving, prompt):
    folder, bring = arriving
    with open_loader(make_config(folder, **PROMPT)) as batches:
        np.testing.assert_array_equal(take(batches, 2), prompt[:2])
        state = batches.state()
    bring()
    with open_loader(make_config(folder, **PROMPT), state=state) as batches:
        np.testing.assert_array_equal(take(batches, 13), prompt[2:15])


def test_sigterm_ends_the_wait_for_a_shard_and_the_state_goes_on_exactly(
    arriving, prompt, monkeypatch
):
    folder, bring = arriving
    wait = stream.Patience.wait

    def signal_and_wait(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        wait(*args)

    monkeypatch.setattr(stream.Patience, "wait", signal_and_wait)
    monkeypatch.setattr(stream, "POLL_SECONDS", 3600.0)
    own = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    batches = loader.DevicePrefetch(open_loader(make_config(folder, **PROMPT)), own, 2)
    taken = []
    with Preemption() as preemption, pytest.raises(Preempted):
        while True:
            with preemption.at_once():
                batches.fill()
            taken.append(np.asarray(next(batches)["inputs"]))
    state = batches.state()
    batches.close()  # would take the hour otherwise
    bring()
    with open_loader(make_config(folder, **PROMPT), state=state) as batches:
        following = take(batches, 5)
    np.testing.assert_array_equal([*taken, *following[:, :, :-1]], prompt[: len(taken) + 5, :, :-1])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_that_waits_for_a_shard_can_be_closed_and_gives_up(arriving, monkeypatch, workers):
    folder, _ = arriving
    waiting = threading.Event()
    wait = stream.Patience.wait

    def wait_and_tell(*args):
        waiting.set()
        wait(*args)

    monkeypatch.setattr(stream.Patience, "wait", wait_and_tell)
    monkeypatch.setattr(stream, "POLL_SECONDS", 3600.0)
    values = PROMPT | {"data_workers": workers, "prefetch_batches": 10}
    batches = open_loader(make_config(folder, **values))
    next(batches)
    assert waiting.wait(60)
    batches.close()  # would take the hour otherwise
    assert not multiprocessing.active_children()
    with open_loader(make_config(folder, **values, data_wait_seconds=0)) as batches:
        with pytest.raises(ValueError, match="timed out after .*b.parquet"):
            take(batches, 40)


def test_a_mixture_goes_on_exactly_with_any_number_of_workers(shards, tmp_path):
    for name in "ab":
        rows = [json.dumps({"text": f"{name} {n}"}) for n in range(9000)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    mixture = f"[[3, parquet:{shards}], [1, jsonl:{tmp_path}]]"
    values = {"dataset_type": "mixture", "dataset_mixture": mixture, "data_readers": 1}
    with open_loader(make_config(shards, **values)) as batches:
        whole = take(batches, 12)
        reached = batches.position()
    assert set(reached) == {"epoch", "file", "row_group", "discarded_share"}
    state = None
    for begin, end, count in ((0, 5, 1), (5, 6, 0), (6, 12, 2)):
        with open_loader(make_config(shards, **values, data_workers=count), state=state) as batches:
            np.testing.assert_array_equal(take(batches, end - begin), whole[begin:end])
            state = json.loads(json.dumps(batches.state()))
    assert [part["file"] for part in state["readers"]["0"]["parts"]][1] == "a.jsonl"


def test_the_position_is_that_of_the_batches_handed_out(shards):
    with open_loader(make_config(shards, data_readers=1), batch_rows=1) as batches:
        start = {"epoch": 1, "file": 0, "row_group": 0, "discarded_share": 0.0}
        assert batches.position() == start
        reached = []
        for _ in range(80):
            take(batches, 1)
            reached.append(tuple(batches.position().values())[:3])
    assert reached == sorted(reached)
    assert reached[0] == (1, 0, 0)
    assert {(1, 0, 3), (1, 1, 0), (1, 1, 4), (2, 0, 0)} <= set(reached)


def test_validation_is_the_last_file(shards):
    config = make_config(shards)
    with loader.make_loader(config, ByteTokenizer(), "validation", batch_rows=ROWS) as batches:
        rows = take(batches, 3)
    names = {
        bytes(document[1:2].astype(np.uint8))
        for row in rows.reshape(-1, 33)
        for document in np.split(row, np.flatnonzero(row == BOS)[1:])
        if len(document) > 1
    }
    assert names == {b"c"}


def test_what_does_not_fit_together_is_told(shards):
    with pytest.raises(ValueError, match="data_readers=4 does not divide the 6 rows .* 1, 2, 3, 6"):
        open_loader(make_config(shards), batch_rows=6)
    with pytest.raises(ValueError, match="3 hosts do not divide the 8 rows"):
        open_loader(make_config(shards), host_count=3)
    with open_loader(make_config(shards)) as batches:
        state = batches.state()
    with pytest.raises(ValueError, match="data_readers=4 but the run has 2"):
        open_loader(make_config(shards, data_readers=2), state=state)
    with pytest.raises(ValueError, match="row_tokens=33 but the run has 65"):
        open_loader(make_config(shards, max_target_length=64), state=state)
    state["readers"]["1"]["file"] = "gone.parquet"
    with pytest.raises(ValueError, match=r"gone\.parquet, which .* no longer has"):
        open_loader(make_config(shards), state=state)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_beside_training_is_raised_as_it_was_and_ends_everything(
    tmp_path, shards, workers
):
    for name in "abc":
        (tmp_path / f"{name}.parquet").write_bytes((shards / f"{name}.parquet").read_bytes())
    texts = pa.table({"text": [b"x", b"\xff"] * 24})
    pq.write_table(texts, tmp_path / "b.parquet", row_group_size=12)
    threads = set(threading.enumerate())
    batches = open_loader(make_config(tmp_path, data_workers=workers))
    with pytest.raises(ValueError, match=r"b\.parquet, row group .: cannot be read"):
        take(batches, 40)
    assert not set(threading.enumerate()) - threads
    assert not multiprocessing.active_children()
    with pytest.raises(ValueError, match="closed"):
        next(batches)


def test_other_errors_of_a_worker_bring_their_traceback(shards):
    config = make_config(shards, data_workers=1)
    batches = loader.make_loader(
        config, FailingTokenizer(KeyError("odd")), "train", batch_rows=ROWS
    )
    with pytest.raises(RuntimeError, match=r"(?s)data worker failed.*KeyError: 'odd'"):
        next(batches)


def test_a_killed_worker_is_one_clear_error(shards):
    with open_loader(make_config(shards, data_workers=1)) as batches:
        next(batches)
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(ValueError, match=r"a data worker died \(exit code -9\)"):
            take(batches, 200)


@pytest.fixture
def started(monkeypatch):
    """The threads that this test starts, and that those start; other tests leave threads that start more."""
    threads = []
    start = threading.Thread.start

    def record(thread):
        if threading.current_thread() in (threading.main_thread(), *threads):
            threads.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", record)
    return threads


def test_close_leaves_no_thread_and_no_process(shards, started):
    for workers in (0, 2):
        batches = open_loader(make_config(shards, data_workers=workers))
        next(batches)
        assert any(thread.is_alive() for thread in started)
        batches.close()
        batches.close()
        assert not any(thread.is_alive() for thread in started)
        assert not multiprocessing.active_children()


def test_workers_never_import_jax(shards):
    config = make_config(shards, data_workers=1)
    tokenizer = JaxReportingTokenizer()
    with loader.make_loader(config, tokenizer, "train", batch_rows=ROWS) as batches:
        assert not next(batches)["inputs"].any()


PARENT = """
import os, sys
from MaxNano import pyconfig
from MaxNano.data import sources, stream, workers
from byte_tokenizer import ByteTokenizer

if __name__ != "__main__":
    # The trainer's main module imports JAX, and this is what multiprocessing would do with it.
    raise SystemExit("a worker imported its parent's main module")
else:
    config = pyconfig.initialize(["configs/base.yml", "dataset_type=synthetic"])
    source = sources.SyntheticSource(config, "train")
    encoding = workers.TextEncoding(source, ByteTokenizer(), 1, 8, 33)
    reading = workers.start(encoding, {0: stream.StreamPosition(1, 0, 0, 0)}, 1)
    reading.next(0)
    print(*(child.pid for child in workers.multiprocessing.active_children()), flush=True)
    if sys.argv[1] == "wait":
        sys.stdin.read()
"""


def start_parent(tmp_path, what):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    root = Path(__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, script, what],
        cwd=root,
        env=os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    return process, int(process.stdout.readline())


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for_end(pid):
    for _ in range(2000):
        if not is_running(pid):
            return
        time.sleep(0.05)
    pytest.fail("the worker outlived its parent")


def test_workers_end_when_the_trainer_is_killed(tmp_path):
    process, worker = start_parent(tmp_path, "wait")
    with process:
        assert is_running(worker)
        # Signals to the whole group are the trainer's to handle.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            os.kill(worker, number)
        time.sleep(0.2)
        assert is_running(worker)
        process.kill()
    wait_for_end(worker)


def test_a_trainer_that_forgets_to_close_still_ends(tmp_path):
    process, worker = start_parent(tmp_path, "leave")
    with process:
        try:
            assert process.wait(timeout=200) == 0
        finally:
            process.kill()
    wait_for_end(worker)


def test_device_prefetch_hands_out_global_arrays_with_their_own_state(shards, expected):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    batches = loader.DevicePrefetch(open_loader(make_config(shards)), sharding, 2)
    for step in range(3):
        batch = next(batches)
        assert isinstance(batch["inputs"], jax.Array)
        np.testing.assert_array_equal(batch["inputs"], expected[step, :, :-1])
    state = batches.state()
    batches.close()
    with open_loader(make_config(shards), state=state) as again:
        np.testing.assert_array_equal(take(again, 5), expected[3:8])


class BreakingLoader:
    """Three batches, then an error; `snapshot` counts them."""

    snapshot = 0

    def __next__(self):
        if self.snapshot == 3:
            raise ValueError("damaged")
        self.snapshot += 1
        return {"inputs": np.full((1, 1), self.snapshot)}

    def state(self, snapshot):
        return snapshot


@pytest.mark.parametrize("size", [1, 5])
def test_device_prefetch_hands_out_the_batches_before_an_error(size):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    batches = loader.DevicePrefetch(BreakingLoader(), sharding, size)
    known = []
    for number in (1, 2, 3):
        batches.fill()
        shortage = batches.shortage()
        known.append(shortage and shortage.ready)
        assert np.asarray(next(batches)["inputs"]) == number
        assert batches.state() == number
    assert known == ([None, None, 1] if size == 1 else [3, 2, 1])
    batches.fill()
    assert batches.shortage().ready == 0 and str(batches.shortage().error) == "damaged"
    with pytest.raises(ValueError, match="damaged"):
        next(batches)
    assert batches.state() == 3

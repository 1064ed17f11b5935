"""Files and checkpoints in a bucket, by the real clients: what the store refuses, loses or cuts,
and other writers.
"""

import asyncio
import io
import json
import re
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path

import gcsfs.retry
import jax
import jax.numpy as jnp
import numpy as np
import object_store
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath
from test_checkpointing import abstract, assert_same, make_config, make_state

from MaxNano.data import folder, sources
from MaxNano.reporting import run_history
from MaxNano.storage import bucket, files
from MaxNano.storage.checkpoints import MANIFEST, CheckpointError
from MaxNano.training import checkpointing
from MaxNano.training.checkpointing import Checkpointer

ROOT = Path(__file__).parents[1]


@pytest.fixture
def store(served, monkeypatch):
    """A store with no faults, to whose clients a second is a moment."""
    object_store.use(served, monkeypatch)
    quick = types.SimpleNamespace(sleep=lambda seconds: asyncio.sleep(seconds / 200))
    monkeypatch.setattr(gcsfs.retry, "asyncio", quick)
    monkeypatch.setitem(checkpointing.BUCKET_RETRIES, "initial_delay", "5ms")
    monkeypatch.setitem(checkpointing.BUCKET_RETRIES, "max_delay", "20ms")
    yield served
    served.mend()
    served.slow()


@pytest.fixture
def run(store, request):
    """The folder of a run in the bucket, another one for each test."""
    return epath.Path(store.bucket) / "runs" / re.sub(r"\W+", "-", request.node.name)


def names(store, run):
    """What the bucket has of a run."""
    prefix = f"{run}/".removeprefix(f"{store.bucket}/")
    return {name.removeprefix(prefix): content for name, content in store.objects(prefix).items()}


def restore(run, like=None, **options):
    with Checkpointer(make_config(), run, writer=False) as reader:
        return reader.restore(abstract(make_state(0) if like is None else like), **options)


# ---- Files


def test_what_a_bucket_does_not_do_is_made_up_for(store, run):
    run.mkdir(parents=True)
    assert not run.exists(), "a bucket has no folders"
    assert files.names(run) == [] and files.sizes(run) == {}
    files.write_whole(run / "a" / "b.txt", "ä")
    files.write_whole(run / "c.txt", b"12")
    assert files.names(run) == ["a", "c.txt"]
    assert files.sizes(run) == {"a/b.txt": 2, "c.txt": 2}
    assert names(store, run) == {"a/b.txt": "ä".encode(), "c.txt": b"12"}


def test_the_same_on_a_disk(tmp_path):
    folder = epath.Path(tmp_path) / "x"
    assert files.names(folder) == [] and files.sizes(folder) == {}
    files.write_whole(folder / "a" / "b.txt", "ä")
    files.write_whole(folder / "c.txt", b"12")
    assert files.names(folder) == ["a", "c.txt"]
    assert files.sizes(folder) == {"a/b.txt": 2, "c.txt": 2}


def test_a_reader_sees_what_another_machine_wrote_after_it_looked(store, run):
    files.write_whole(run / "a", "1")
    assert files.names(run) == ["a"] and not (run / "b").exists()
    key = f"{run}/".removeprefix(f"{store.bucket}/")
    store.put(f"{key}b", b"2")
    store.put(f"{key}a", b"123")
    assert (
        files.names(run) == ["a", "b"] and (run / "b").exists() and (run / "a").stat().length == 3
    )
    store.delete(f"{key}a")
    assert not (run / "a").exists()


LARGE = bytes(range(256)) * (12 << 12)  # 12 MiB, of which gcsfs sends 5 at a time


@pytest.mark.parametrize("kind", [503, 429, "drop", "lose"])
@pytest.mark.parametrize("operation", ["write", "read", "stat", "list", "delete"])
def test_what_passes_is_tried_again(store, run, kind, operation):
    fault = store.fail(kind, operation, skip=1)
    content = LARGE if operation == "write" and kind == "drop" else b"some text"
    files.write_whole(run / "a", content)
    assert (run / "a").read_bytes() == content
    assert (
        (run / "a").exists()
        and (run / "a").exists()
        and files.names(run) == files.names(run) == ["a"]
    )
    (run / "a").read_bytes()
    (run / "a").unlink()
    files.write_whole(run / "a", content)
    if (kind, operation) == ("lose", "delete"):
        with pytest.raises(FileNotFoundError):  # it was deleted, but nobody heard
            (run / "a").unlink()
    else:
        (run / "a").unlink()
    assert fault.hits == 1
    assert names(store, run) == {}


@pytest.mark.parametrize(
    "kind,words", [(403, "Forbidden"), (412, "precondition failed"), (400, "400 on demand")]
)
@pytest.mark.parametrize("operation", ["write", "read", "list"])
def test_what_lasts_is_one_line_that_names_the_object(store, run, kind, words, operation):
    files.write_whole(run / "a", "1")
    store.fail(kind, operation, count=None)
    acts = {
        "write": lambda: files.write_whole(run / "a", "2"),
        "read": (run / "a").read_text,
        "list": lambda: files.names(run),
    }
    with pytest.raises(bucket.BucketError, match=words) as caught:
        acts[operation]()
    line = str(caught.value)
    assert "\n" not in line and "http" not in line
    assert line.startswith("gs://ours" if operation == "list" else f"{run}/a: ")


@pytest.mark.parametrize("operation", ["write", "read", "list"])
def test_a_store_that_never_answers_is_given_up(store, run, operation, monkeypatch):
    files.write_whole(run / "a", "1")
    monkeypatch.setattr(bucket, "SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(bucket.Bucket, "cachable", False)
    monkeypatch.setattr(
        epath.backend.fsspec_backend, "_get_filesystem", lambda name: bucket.Bucket()
    )
    fault = store.fail("hang", operation, count=None)
    acts = {
        "write": lambda: files.write_whole(run / "a", LARGE),
        "read": (run / "a").read_text,
        "list": lambda: list(run.iterdir()),
    }
    with pytest.raises(bucket.BucketError, match="(?i)timeout"):
        acts[operation]()
    assert fault.hits > 1
    store.mend()
    assert names(store, run) == {"a": b"1"}


@pytest.mark.parametrize("operation", ["list", "read"])
def test_shards_in_a_bucket_that_fails_are_told_in_a_line(store, operation, monkeypatch):
    """What passes is outlasted; what lasts ends in time, by pyarrow's own client."""
    content = io.BytesIO()
    pq.write_table(pa.table({"text": ["one", "two"]}), content)
    for shard in range(2):
        store.put(f"shards/{shard}.parquet", content.getvalue())
    config = types.SimpleNamespace(
        dataset_type="parquet",
        dataset_path="gs://anonymous@ours/shards",
        text_column="text",
        data_wait_seconds=0,
    )
    store.fail(503, operation, "shards", count=1)
    source = sources.SOURCES["parquet"](config, "train")
    assert list(source.open(0).documents(0)) == ["one", "two"]

    monkeypatch.setattr(folder, "BUCKET_RETRY_SECONDS", 1)
    store.fail(503, operation, "shards", count=None)
    begin = time.monotonic()
    with pytest.raises(ValueError, match="cannot be read") as caught:
        list(sources.SOURCES["parquet"](config, "train").open(0).documents(0))
    assert time.monotonic() - begin < 100 and "\n" not in str(caught.value)


# ---- Checkpoints


def test_a_new_run_saves_keeps_and_restores(store, run):
    with Checkpointer(make_config("checkpoint_keep=2"), run) as checkpointer:
        assert checkpointer.latest_step() is None
        for step in (1, 2, 10, 11):
            checkpointer.save(step, make_state(step), {"step": step})
        checkpointer.wait()
        assert files.names(run / "checkpoints") == ["10", "11"]
        state, extra = checkpointer.restore(abstract(make_state(0)))
        assert_same(state, make_state(11))
        assert extra["step"] == 11
    recorded = json.loads((run / "checkpoints/11" / MANIFEST).read_text())["files"]
    stored = {name.removeprefix("checkpoints/11/") for name in names(store, run) if "/11/" in name}
    assert set(recorded) == stored - {MANIFEST}
    assert run_history.newest_extra(run)["run"]["step"] == 11


def test_a_reader_that_stays_sees_the_next_checkpoint(store, run):
    with (
        Checkpointer(make_config(), run) as writer,
        Checkpointer(make_config(), run, writer=False) as reader,
    ):
        assert reader.latest_step() is None
        for step in (1, 2):
            writer.save(step, make_state(step), {})
            writer.wait()
            assert reader.latest_step() == step
            assert_same(reader.restore(abstract(make_state(0)))[0], make_state(step))


WRITES = (
    r"process_0/d/",
    r"state/d/",
    "manifest.ocdbt",
    "extra/metadata",
    "_METADATA",
    "_sharding",
)
WRITES += ("commit_success", "array_metadatas", "MANIFEST")


@pytest.mark.parametrize("kind", [503, 429, "drop", "lose"])
def test_a_save_outlasts_faults_that_pass(store, run, kind):
    """At every kind of object, twice."""
    faults = [store.fail(kind, "write", name, count=2) for name in WRITES]
    store.fail(412, "write", "manifest.ocdbt")  # as if somebody else had written it meanwhile
    with Checkpointer(make_config(), run) as checkpointer:
        checkpointer.save(1, make_state(1), {})
        checkpointer.wait()
        assert_same(checkpointer.restore(abstract(make_state(0)))[0], make_state(1))
    assert all(fault.hits == 2 for fault in faults), [fault.hits for fault in faults]


@pytest.mark.parametrize(
    "kind,name", [*((403, name) for name in WRITES), (412, "process_0/d/"), (503, "manifest.ocdbt")]
)
def test_a_save_that_fails_is_told_and_harms_nothing(store, run, kind, name, capfd):
    with Checkpointer(make_config(), run) as checkpointer:
        checkpointer.save(1, make_state(1), {})
        checkpointer.wait()
        store.fail(kind, "write", f"/2/.*{name}", count=None)
        checkpointer.save(2, make_state(2), {})
        checkpointer._saver.join()
        checkpointer.check()
        warning = capfd.readouterr().err.strip().splitlines()[-1]
        assert warning.startswith("warning: the checkpoint of step 2 could not be written (")
        assert (
            warning.endswith("; trying again at the next interval")
            and "tensorstore_spec" not in warning
        )
        assert checkpointer.latest_step() == 1
        assert_same(checkpointer.restore(abstract(make_state(0)))[0], make_state(1))
        store.mend()
        store.fail(403, "bucket", count=None)  # rights to the objects are enough
        checkpointer.save(2, make_state(20), {})  # what is left of the first try does no harm
        checkpointer.wait()
        assert_same(checkpointer.restore(abstract(make_state(0)))[0], make_state(20))
    assert_same(restore(run, step=1)[0], make_state(1))


def test_the_first_save_may_fail_and_the_third_failure_in_a_row_stops_the_run(store, run):
    store.fail(403, "write", "manifest.ocdbt", count=None)
    with pytest.raises(
        CheckpointError, match=r"3 checkpoints in a row could not be written to gs://.*403"
    ):
        with Checkpointer(make_config("async_checkpointing=false"), run) as checkpointer:
            for step in (1, 2, 3):
                checkpointer.save(step, make_state(step), {})


def test_old_checkpoints_that_cannot_be_deleted_fail_no_save(store, run, capfd):
    with Checkpointer(make_config("checkpoint_keep=1"), run) as checkpointer:
        checkpointer.save(1, make_state(1), {})
        checkpointer.wait()
        store.fail(403, "delete", "/1/", count=None)
        checkpointer.save(2, make_state(2), {})
        checkpointer.wait()
        assert "warning: old checkpoints in" in capfd.readouterr().err
        store.mend()
        checkpointer.save(3, make_state(3), {})
        checkpointer.wait()
        assert files.names(run / "checkpoints") == ["3"]


def test_half_a_checkpoint_is_never_taken_for_a_whole_one_and_is_cleared_away(store, run, capfd):
    with Checkpointer(make_config(), run) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, make_state(step), {})
        checkpointer.wait()
    (
        run / "checkpoints/2" / MANIFEST
    ).unlink()  # as a process leaves it that is killed before the end
    assert_same(restore(run)[0], make_state(1))
    with Checkpointer(make_config(), run) as checkpointer:
        assert checkpointer.latest_step() == 1
    assert (
        f"warning: the checkpoint of step 2 in {run} is unfinished; removed"
        in capfd.readouterr().err
    )
    assert files.names(run / "checkpoints") == ["1"]


def test_a_damaged_checkpoint_is_set_aside_but_a_silent_store_damages_none(store, run, capfd):
    with Checkpointer(make_config(), run) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, make_state(step), {})
    for operation in ("read", "list"):
        store.fail(503, operation, "/2/", count=None)
        with (
            Checkpointer(make_config(), run) as checkpointer,
            pytest.raises(CheckpointError, match="cannot"),
        ):
            checkpointer.restore(abstract(make_state(0)))
        store.mend()
    assert_same(restore(run)[0], make_state(2))

    gone = next(
        name
        for name in store.objects()
        if f"{run.name}/checkpoints/2/state/ocdbt.process_0/d/" in name
    )
    store.delete(gone)
    with Checkpointer(make_config(), run) as checkpointer:
        assert_same(checkpointer.restore(abstract(make_state(0)))[0], make_state(1))
        assert "is damaged (state/ocdbt.process_0/d/" in capfd.readouterr().err
        assert checkpointer.latest_step() == 1
        checkpointer.save(2, make_state(20), {})
        checkpointer.wait()
    assert_same(restore(run)[0], make_state(20))


def test_the_process_that_came_last_owns_the_run(store, run):
    """A machine that was given up may still be writing."""
    first = Checkpointer(make_config(), run)
    first.save(1, make_state(1), {})
    first.wait()
    with Checkpointer(make_config(), run) as second:
        first.save(2, make_state(2), {})
        first._saver.join()
        with pytest.raises(CheckpointError, match=r"another process, on .*, has taken over gs://"):
            first.check()
        first.close()
        assert second.latest_step() == 1
        second.save(2, make_state(22), {})
    assert_same(restore(run)[0], make_state(22))


def test_a_bucket_that_refuses_is_told_before_training(store, run):
    store.fail(403, "write", count=None)
    with pytest.raises(
        CheckpointError, match=rf"cannot write to {run} \(.*Forbidden.*\); set base_output"
    ) as caught:
        Checkpointer(make_config(), run)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="cannot write to gs://elsewhere/run"):
        Checkpointer(make_config(), "gs://elsewhere/run")


@pytest.mark.slow
def test_a_save_outlasts_a_store_that_does_not_answer(store, run):
    """In a process of its own, since tensorstore reads its limit once."""
    code = f"""
        from MaxNano.training.checkpointing import Checkpointer
        from tests.test_checkpointing import make_config, make_state
        with Checkpointer(make_config(), {str(run)!r}) as checkpointer:
            checkpointer.save(1, make_state(1), {{}})
    """
    fault = store.fail("hang", "write", "manifest.ocdbt")
    env = {"TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "1", "PYTHONPATH": str(ROOT / "tests")}
    command = [
        "env",
        *(f"{key}={value}" for key, value in env.items()),
        sys.executable,
        "-c",
        textwrap.dedent(code),
    ]
    subprocess.run(command, cwd=ROOT, check=True, timeout=250)
    assert fault.hits == 1
    assert_same(restore(run)[0], make_state(1))


def test_large_arrays_are_cut_in_the_middle_and_arrive(store, run):
    state = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(1500, 1000)), jnp.float32)}
    fault = store.fail("drop", "write", "ocdbt.process_0/d/", count=2)
    with Checkpointer(make_config(), run) as checkpointer:
        checkpointer.save(1, state, {})
    assert fault.hits == 2
    assert_same(restore(run, like=state)[0], jax.tree.map(np.asarray, state))

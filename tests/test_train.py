"""train.py through its real command line: train, stop, go on, refuse."""

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import programs
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from MaxNano.tokenization.bpe import train_bpe

ROOT = Path(__file__).parents[1]
WORDS = "the quick brown fox jumps over a lazy dog while seven wizards mix strange and bright potions".split()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with documents, a tokenizer and a compilation cache that all runs share."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "text").mkdir()
    for shard in range(3):
        texts = [
            " ".join(WORDS[(i * j + shard) % len(WORDS)] for j in range(3 + i % 60))
            for i in range(300)
        ]
        table = pa.table({"text": texts})
        pq.write_table(table, folder / "text" / f"shard_{shard}.parquet", row_group_size=50)
    train_bpe(texts, 300).save(folder / "tokenizer")
    return folder


def words_of(place, run_name, *more):
    return [
        str(ROOT / "configs/base.yml"),
        "num_decoder_layers=1",
        "emb_dim=32",
        "head_dim=16",
        "num_query_heads=2",
        "vocab_size=300",
        "max_target_length=32",
        "short_window_multiple=16",
        "global_batch_tokens=256",
        "steps=14",
        "muon_iterations=1",  # compiles faster
        "data_readers=2",
        "packing_buffer_documents=20",
        f"dataset_path={place}/text",
        f"tokenizer_path={place}/tokenizer",
        f"jax_cache_dir={os.environ['MAXNANO_TEST_CACHE']}",
        f"base_output_directory={place}/runs",
        "num_cpu_devices=1",
        "eval_interval=7",
        "eval_tokens=1024",
        "sample_interval=7",
        "sample_tokens=4",
        "checkpoint_interval_steps=3",
        "warmup_steps=2",
        "embedding_lr=30",
        f"run_name={run_name}",
        *more,
    ]


def start(*words, cwd=ROOT, env=None, pause=None):
    """train.py, with a pause of so many seconds before each step if a test interrupts it."""
    program = [ROOT / "MaxNano/train.py"]
    if pause is not None:
        program = [ROOT / "tests/slow_train.py", pause]
    return programs.start(*program, *words, cwd=cwd, env=env)


def run(*words, cwd=ROOT, env=None, status=0):
    return programs.finish(start(*words, cwd=cwd, env=env), status)


def rows_of(place, run_name):
    return programs.rows_of(place / "runs" / run_name)


def losses_of(place, run_name):
    """(step, loss, bpb) of every step, exact."""
    return [(r["step"], r["loss"], r["bpb"]) for r in rows_of(place, run_name) if "event" not in r]


@pytest.fixture(scope="module")
def whole(place):
    """A run that nothing interrupted. Its operations have the lines that made them, for the profile,
    also where the program is compiled: so it shares no cache with runs that have none.
    """
    words = words_of(place, "whole", "profile_steps=[3,5]", f"jax_cache_dir={place}/cache")
    out, _ = run(*words, env=os.environ | {"JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "10"})
    return out


def test_a_run_trains_evaluates_and_says_so(place, whole):
    losses = losses_of(place, "whole")
    assert [step for step, *_ in losses] == list(range(14))
    assert losses[-1][1] < losses[0][1]
    validation = [r for r in rows_of(place, "whole") if r.get("event") == "validation"]
    assert [r["step"] for r in validation] == [0, 7, 14]
    assert validation[-1]["bpb"] < validation[0]["bpb"]
    assert [r["step"] for r in rows_of(place, "whole") if r.get("event") == "samples"] == [7, 14]
    for word in (
        "token_embed",
        "muon",
        "command line",
        "derived",
        "13/14",
        "tok/s",
        "TFLOP/s | epoch",
        "MFU",
        "bpb",
        "left",
        "epoch",
    ):
        assert word in whole, word
    assert (place / "runs/whole/checkpoints/14/MANIFEST.json").exists()
    assert len(list((place / "runs/whole/checkpoints").iterdir())) == 2, "checkpoint_keep"


def history_of(place, run_name):
    lines = (place / "runs" / run_name / "history.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def contents_of(folder):
    """The bytes and the time of the last change of every file."""
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_a_finished_run_started_again_says_so_and_changes_nothing(place, whole):
    before = contents_of(place / "runs/whole")
    out, _ = run(*words_of(place, "whole", "log_interval=7", "num_cpu_devices=2"))
    assert "Run already complete (14 of 14 steps)" in out and "Resuming" not in out
    assert contents_of(place / "runs/whole") == before


def test_a_run_started_again_with_other_values_is_refused_with_the_difference(place, whole):
    before = contents_of(place / "runs/whole")
    out, err = run(*words_of(place, "whole", "matrix_lr=0.5", "seed=7"), status=2)
    assert (
        "trained to step 14 with other values: seed=7 instead of 42, matrix_lr=0.5 instead of"
        in err
    )
    assert "allow_config_change=true" in err and err.count("\n") == 1 and "tok/s" not in out
    after = contents_of(place / "runs/whole")
    changed = {path.name for path in after if after[path] != before.get(path)}
    assert changed == {"history.jsonl"}
    assert [entry["event"] for entry in history_of(place, "whole")] == ["start", "end", "refused"]


def test_a_profile_shows_where_the_time_of_its_steps_is_spent(place, whole):
    table = whole[whole.index("most expensive operations") :].splitlines()
    end = table.index(f"Saved the trace of 2 steps in {place}/runs/whole/tensorboard")
    rows = [line for line in table[2:end] if line[0].isdigit()]  # a long name takes two lines
    assert len(rows) == 10
    times = [float(row.split()[0]) for row in rows]
    assert times == sorted(times, reverse=True) and times[-1] > 0
    assert any(re.search(r"\b(layer|loss|optimizer)/\w+", row) for row in rows)
    # A file name may be that of two folders, or of a library.
    sources = [
        any(
            int(match[2]) <= len(path.read_text().splitlines())
            for path in (ROOT / "MaxNano").rglob(match[1])
        )
        for row in rows
        if (match := re.search(r"(\w+\.py):(\d+)", row))
    ]
    assert sum(sources) >= 5, table
    folder = place / "runs/whole/tensorboard/plugins/profile"
    assert len(list(folder.glob("*/*.xplane.pb"))) == 1
    (events,) = folder.glob("*/*.trace.json.gz")
    names = {event.get("name") for event in json.loads(gzip.open(events).read())["traceEvents"]}
    assert any(row.split()[-1] in names for row in rows)


def wait_for_step(place, run_name, step, process):
    path = place / "runs" / run_name / "metrics.jsonl"
    for _ in range(12_000):
        if process.poll() is not None:
            break
        if path.exists() and f'"step": {step}' in path.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"never saw step {step}: {process.communicate()}")


def test_killed_twice_it_goes_on_bit_for_bit(place, whole):
    words = words_of(place, "killed", "sample_interval=0")
    for step in (4, 8):
        process = start(*words, pause=0.2)
        wait_for_step(place, "killed", step, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    out, _ = run(*words)
    assert "Resuming" in out
    assert losses_of(place, "killed") == losses_of(place, "whole")
    validation = [r["step"] for r in rows_of(place, "killed") if r.get("event") == "validation"]
    assert validation == [0, 7, 14]


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.long)]
)
def test_asked_to_stop_it_saves_and_leaves_with_75(place, whole, number, tmp_path):
    """By a preemption; by a terminal that closes, after which no line can be printed.

    The saved config resumes the run, from another folder too.
    """
    name = f"stopped{int(number)}"
    values = ("checkpoint_interval_steps=0", "sample_interval=0")
    process = start(*words_of(place, name, *values), pause=0.2)
    wait_for_step(place, name, 3, process)
    if number == signal.SIGHUP:
        process.stdout.close()
    process.send_signal(number)
    err = process.stderr.read()
    assert process.wait(timeout=250) == 75, err
    assert "Traceback" not in err and "Exception" not in err
    out, _ = run(str(place / "runs" / name / "config.yml"), cwd=tmp_path)
    assert "Resuming" in out
    assert losses_of(place, name) == losses_of(place, "whole")
    first, stopped, second, finished = history_of(place, name)
    assert [first["event"], stopped["event"]] == ["start", "end"]
    assert first["changes"]["steps"] == [None, 14] and second["changes"] == {}
    assert stopped["status"] == "preempted" and stopped["exit_status"] == 75
    assert second["step"] == stopped["step"] > first["step"] == 0
    assert finished["status"] == "finished" and finished["step"] == 14


def copy_without_last_checkpoint(place, copy):
    """A copy of the run `whole` that has only its checkpoint of step 12."""
    shutil.copytree(place / "runs/whole", place / "runs" / copy)
    shutil.rmtree(place / "runs" / copy / "checkpoints/14")
    (place / "runs" / copy / "evals/step_000014.json").unlink(missing_ok=True)


def test_it_goes_on_with_other_devices_and_workers(place, whole):
    """Accumulation, devices, FSDP and workers do not change the tokens, hence the same losses up to
    the order of sums.
    """
    copy_without_last_checkpoint(place, "moved")
    # Neither where the data are nor when something is logged changes a number.
    copy = place / "copy of text"
    shutil.copytree(place / "text", copy)
    free = ["num_cpu_devices=4", "ici_fsdp_parallelism=2", "data_workers=1", f"dataset_path={copy}"]
    free += ["eval_interval=14", "sample_interval=0"]
    run(*words_of(place, "moved", *free, "log_interval=5", "per_device_batch_size=1"))
    started = history_of(place, "moved")[-2]
    assert started["step"] == 12 and started["changes"]["num_cpu_devices"] == [1, 4]
    for got, expected in zip(losses_of(place, "moved"), losses_of(place, "whole"), strict=True):
        assert got == pytest.approx(expected, rel=1e-4)


def test_dry_run_shows_the_plan_and_writes_nothing(place):
    out, _ = run(*words_of(place, "dry", "dry_run=true"))
    for word in ("parameters", "FLOPs", "memory", "14 steps", "256 tokens", "parquet, "):
        assert word in out, word
    assert not (place / "runs/dry").exists()


@pytest.mark.slow
def test_damaged_data_stop_a_run_that_is_saved_and_can_leave_them_out(place):
    """A corrupt row group after hours ended the run unsaved, and the same command stopped again."""
    (place / "damaged").mkdir()
    for shard in range(3):
        texts = pq.read_table(place / "text" / f"shard_{shard}.parquet")["text"].to_pylist()
        texts[5] = None
        options = {"row_group_size": 10, "write_page_checksum": True, "use_dictionary": False}
        path = place / "damaged" / f"{('train-0', 'train-1', 'test-0')[shard]}.parquet"
        pq.write_table(pa.table({"text": texts}), path, **options)
    path = place / "damaged" / "train-0.parquet"
    column = pq.ParquetFile(path).metadata.row_group(8).column(0)
    content = bytearray(path.read_bytes())
    content[column.data_page_offset + column.total_compressed_size - 3] ^= 0xFF
    path.write_bytes(content)
    values = ["checkpoint_interval_steps=0", "packing_buffer_documents=5", "eval_interval=0"]
    words = words_of(
        place, "damaged", f"dataset_path={place}/damaged", *values, "sample_interval=0"
    )
    out, err = run(*words, status=2)
    saved = next(line for line in out.splitlines() if line.startswith("Saved checkpoint at step"))
    step = int(saved.split()[4].rstrip(";"))
    assert 0 < step < 14
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert "train-0.parquet, row group 8: cannot be read" in line
    assert "skip_corrupt_data=true" in line
    for shown in ("training files    train-0.parquet, train-1.parquet", "test-0.parquet"):
        assert shown in out
    assert re.search(r"discarded tokens +\d+ % \(estimate from the first \d+ documents", out)
    before = losses_of(place, "damaged")
    assert [row[0] for row in before] == list(range(step))
    out, _ = run(*words, "skip_corrupt_data=true")
    assert f"from step {step}" in out
    assert re.search(r"rows without text \d damaged parts 1 discarded \d+\.\d% \|", out)
    assert losses_of(place, "damaged")[:step] == before
    last = rows_of(place, "damaged")[-1]
    assert last["step"] == 13 and last["damaged_parts"] == 1 and last["rows_without_text"] > 0
    assert 0 < last["discarded_share"] < 1


def test_three_updates_that_are_not_finite_stop_the_run(place):
    out, err = run(
        *words_of(place, "spoilt", "matrix_lr=1e38", "embedding_lr=1e38"),
        *("eval_interval=0", "sample_interval=0"),
        status=2,
    )
    assert err.startswith("error: loss or gradient was not finite in 3 steps in a row")
    assert err.count("\n") == 1


BAD = {
    "no tokenizer": (["tokenizer_path={place}/nowhere"], "train_tokenizer.py"),
    "another vocabulary": (["vocab_size=400"], "300"),
    "no data": (["dataset_path={place}/nowhere"], "nowhere"),
    "readers and rows": (["data_readers=3"], "data_readers"),
    "devices and rows": (["num_cpu_devices=3"], "global_batch_tokens"),
    "a typo": (["stepss=3"], "steps"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(place, case):
    words, hint = BAD[case]
    _, err = run(*words_of(place, "bad", *(w.format(place=place) for w in words)), status=2)
    assert err.startswith("error: ") and err.count("\n") == 1 and hint in err, err


@pytest.mark.parametrize("program", ["train.py", "convert.py", "compare.py"])
def test_a_typo_is_told_before_jax_is_imported(tmp_path, program):
    (tmp_path / "jax.py").write_text("raise SystemExit('jax was imported')")
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "MaxNano" / program),
            str(ROOT / "configs/base.yml"),
            "modle=d4",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 2
    assert (
        done.stderr.startswith("error: ")
        and "model" in done.stderr
        and done.stderr.count("\n") == 1
    )


@pytest.mark.slow
def test_a_second_run_on_the_same_folder_is_refused(place):
    words = words_of(place, "locked", "eval_interval=0", "sample_interval=0")
    first = start(*words, pause=3)  # its other steps take longer than the second start
    wait_for_step(place, "locked", 0, first)
    _, err = run(*words_of(place, "locked"), status=2)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.slow
def test_a_change_that_is_allowed_is_recorded(place, whole):
    """In the middle of a run: another rate, and other text under the same path."""
    shutil.copytree(place / "text", place / "edited")
    copy_without_last_checkpoint(place, "changed")
    shard = place / "edited/shard_1.parquet"
    shard.write_bytes((place / "text/shard_0.parquet").read_bytes())
    values = ("matrix_lr=0.04", f"dataset_path={place}/edited", "sample_interval=0")
    words = words_of(place, "changed", *values)
    _, err = run(*words, status=2)
    assert "matrix_lr=0.04 instead of 0.02; in the training data shard_1.parquet has changed" in err
    saved = (place / "runs/changed/config.yml").read_text()
    assert "matrix_lr: 0.02" in saved, "what the run used"

    run(*words, "allow_config_change=true")
    refused, started, ended = history_of(place, "changed")[-3:]
    assert (refused["event"], ended["status"]) == ("refused", "finished")
    assert started["step"] == 12 and started["allowed"] == ["data", "matrix_lr"]
    assert started["changes"]["matrix_lr"] == [0.02, 0.04]
    assert started["versions"]["source"] and started["devices"]["kind"] == "cpu"
    saved = (place / "runs/changed/config.yml").read_text()
    assert "matrix_lr: 0.04" in saved and "allow_config_change: false" in saved
    _, err = run(*words_of(place, "changed"), status=2)
    assert "matrix_lr=0.02 instead of 0.04" in err


def test_another_tokenizer_cannot_go_on_with_a_run(place, whole):
    other = place / "other"
    train_bpe([" ".join(reversed(WORDS)) + " some other words altogether"] * 9, 300).save(other)
    _, err = run(*words_of(place, "whole", f"tokenizer_path={other}"), status=2)
    assert "tokenizer" in err and err.count("\n") == 1, err

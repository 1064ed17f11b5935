"""What a run tells about itself: late numbers, whole files, trackers that fail alone."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import object_store
import programs
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData
from tensorboardX.record_writer import RecordWriter, masked_crc32c

from MaxNano import console, pyconfig
from MaxNano.storage import growing_file, remote
from MaxNano.storage.bucket import Bucket
from MaxNano.training import display, metric_files, metrics, tensorboard, trackers

ROOT = Path(__file__).resolve().parents[1]

NUMBERS = {"total_steps": 20, "tokens_per_step": 1000, "flops_per_token": 6.0, "peak_flops": 1e6}


def make_config(*overrides):
    return pyconfig.initialize(["configs/base.yml", "tensorboard=false", *overrides])


@pytest.fixture(scope="module")
def config():
    return make_config()


def start(config, directory, start_step=0, state=None, **overrides):
    arguments = NUMBERS | overrides
    return metrics.MetricLogger(config, directory, start_step=start_step, state=state, **arguments)


def run(logger, steps, loss=2.0, **more):
    for step in steps:
        logger.step(
            step, {"loss": jnp.float32(loss), "skipped": 0, **more}, {"epoch": 0, "file": 3}
        )


def rows_of(directory):
    return rows_in((directory / "metrics.jsonl").read_bytes())


def rows_in(content):
    return [json.loads(line) for line in content.splitlines()]


def count_rows(state):
    """Rows that a process which resumes from `state` starts with."""
    return state["rows"] + len(state["unwritten"])


def test_a_step_is_read_when_the_next_one_is_under_way(config, tmp_path):
    fetched = []

    class Pending:
        """A number on a device that takes note when the host asks for it."""

        def __init__(self, value):
            self.value = value

        def __array__(self, dtype=None, copy=None):
            fetched.append(self.value)
            return jnp.asarray(self.value, dtype).__array__()

        def __float__(self):
            fetched.append(self.value)
            return self.value

    logger = start(config, tmp_path)
    assert logger.step(0, {"loss": Pending(7.0)}, {}) is None
    assert fetched == []
    assert logger.step(1, {"loss": Pending(8.0)}, {}) == {"loss": 7.0}
    assert set(fetched) == {7.0}
    logger.close()
    assert [row["loss"] for row in rows_of(tmp_path)] == [7.0, 8.0]


def test_numbers_that_an_event_fetched_still_reach_the_loop(config, tmp_path):
    logger = start(config, tmp_path)
    run(logger, [0], skipped=jnp.int32(1))
    logger.event(1, "validation", {"bpb": 1.5})
    assert logger.step(1, {"loss": 2.0, "skipped": 0}, {})["skipped"] == 1
    assert logger.step(2, {"loss": 2.0, "skipped": 0}, {})["skipped"] == 0
    logger.close()
    assert [row.get("event", "step") for row in rows_of(tmp_path)] == [
        "step",
        "validation",
        "step",
        "step",
    ]


@pytest.mark.parametrize("waits", [False, True])
def test_what_is_no_training_counts_in_no_step(config, tmp_path, monkeypatch, waits):
    """A step takes 2 s here, whether the program waits for it (`waits`) or returns at once."""
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(metrics, "_is_ready", lambda value: waits)
    done = {}

    def wait(values):
        now[0] = max(now[0], done[int(values["number"])])
        return values

    monkeypatch.setattr(metrics.jax, "device_get", wait)
    logger = start(config, tmp_path)
    for step in range(14):
        done[step] = max([now[0], *done.values()]) + 2.0
        if waits:
            now[0] = done[step]
        logger.step(step, {"loss": 1.0, "number": step}, {})
        if step == 12:
            logger.flush()
            now[0] += 1000.0  # evaluation
            logger.event(13, "validation", {"bpb": 1.0})
    logger.close()
    steps = [row for row in rows_of(tmp_path) if "event" not in row]
    assert [row["milliseconds"] for row in steps] == [2000.0] * 14
    assert steps[-1]["tokens_per_second"] == 500.0
    assert steps[-1]["mfu"] == pytest.approx(500 * 6 / 1e6)
    assert steps[-1]["tflops_per_second"] == pytest.approx(500 * 6 / 1e12)
    assert steps[-1]["training_seconds"] == 3 * 2.0  # steps 11, 12 and 13: the first 11 are warm-up
    assert steps[-1]["elapsed_seconds"] == 14 * 2.0 + 1000.0
    assert steps[-1]["seconds_left"] == pytest.approx(6 * 2.0)


@pytest.mark.parametrize("is_ready", [[True], [False], [False, True], [False, True, True]])
def test_a_loader_slower_than_the_device_makes_no_step_of_0_ms(
    config, tmp_path, monkeypatch, capsys, is_ready
):
    """A step takes 1 s of waiting for its batch and 1 ms on the device, which is done when the step
    is handed over or, where `is_ready` says no, just after.
    """
    now, computing = [100.0], [False]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(metrics, "_is_ready", lambda value: not computing[0])
    logger = start(config, tmp_path)
    for step in range(12):
        with logger.waiting():
            now[0] += 1.0
            computing[0] = False
        now[0] += 0.001
        computing[0] = not is_ready[step % len(is_ready)]
        logger.step(step, {"loss": 1.0}, {})
    logger.close()
    rows = rows_of(tmp_path)
    assert [row["milliseconds"] for row in rows[1:-1]] == pytest.approx([1001.0] * 10)
    # The first waits for its own batch and the next one, the last for none.
    assert rows[0]["milliseconds"] == pytest.approx(2001.0)
    assert rows[0]["batch_wait_milliseconds"] == pytest.approx(2000.0)
    assert sum(row["milliseconds"] for row in rows) == pytest.approx(12 * 1001.0)
    assert sum(row["batch_wait_milliseconds"] for row in rows) == pytest.approx(12_000)
    assert max(row["tokens_per_second"] for row in rows) < 2e6
    assert "1,001 ms | waiting 1,000 ms | 999 tok/s" in capsys.readouterr().out


def test_the_line_and_the_row_of_a_step_agree(config, tmp_path, capsys):
    logger = start(config, tmp_path)
    for step, loss in enumerate([4.0, 3.0, 1.0]):
        logger.step(step, {"loss": jnp.float32(loss), "skipped": 0}, {})
    logger.close()
    lines = capsys.readouterr().out.splitlines()
    for line, row in zip(lines, rows_of(tmp_path), strict=True):
        shown = f"step {row['step']:>2}/20 | loss {row['loss']:.4f} | smoothed {row['smoothed_loss']:.4f} |"
        assert line.startswith(shown)
    assert "loss 1.0000 | smoothed 2.5609" in lines[-1]


def test_the_line_of_a_rollout_step_has_short_numbers_and_each_once():
    """It said "reward 0.000 | ... | epoch 1 reward 0.0 ... rollout seconds 0.03899525100041501"."""
    facts = {
        "epoch": 3,
        "reward": 0.5,
        "answer_tokens": 4.0,
        "rollout_seconds": 0.03899525100041501,
    }
    row = {"step": 7, "loss": 1.0, "smoothed_loss": 1.0, "milliseconds": 20.0}
    row |= {"tokens_per_second": 9.0, "skipped_in_all": 0, "elapsed_seconds": 1.0}
    line = display.step_line({**row, "seconds_left": None, **facts}, facts, 10)
    assert line.count("reward") == 1 and "reward 0.500" in line
    assert "| epoch 3 answer tokens 4 rollout seconds 0.039 |" in line


def test_an_unknown_chip_reports_tflops_instead_of_mfu(config, tmp_path, capsys):
    logger = start(config, tmp_path, peak_flops=None)
    run(logger, [0])
    logger.close()
    (row,) = rows_of(tmp_path)
    assert "mfu" not in row
    assert row["tflops_per_second"] == pytest.approx(row["tokens_per_second"] * 6 / 1e12)
    line = capsys.readouterr().out
    assert "MFU" not in line and f"tok/s | {row['tflops_per_second']:.3g} TFLOP/s |" in line


def test_loss_is_smoothed_without_bias_and_past_what_is_not_finite(config, tmp_path):
    logger = start(config, tmp_path)
    for step, loss in enumerate([4.0, float("nan"), 4.0, 2.0]):
        logger.step(step, {"loss": jnp.float32(loss), "skipped": int(step == 1)}, {})
    logger.close()
    rows = rows_of(tmp_path)
    assert [row["loss"] for row in rows] == [4.0, None, 4.0, 2.0]
    weights = 0.81 + 0.9 + 1
    expected = (4 * 0.81 + 4 * 0.9 + 2) / weights
    assert [row["smoothed_loss"] for row in rows] == pytest.approx([4, 4, 4, expected])
    assert [row["skipped_in_all"] for row in rows] == [0, 1, 1, 1]


def test_a_resumed_run_goes_on_as_if_never_stopped(config, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    logger = start(config, whole)
    run(logger, range(12))
    logger.event(12, "validation", {"bpb": 1.5})
    run(logger, range(12, 20), loss=1.0)
    logger.close()

    logger = start(config, cut)
    run(logger, range(12))
    logger.event(12, "validation", {"bpb": 1.5})
    state = json.loads(json.dumps(logger.state()))
    run(logger, range(12, 17), loss=1.0)
    logger.event(17, "validation", {"bpb": 0.1})  # of steps that will be done again
    logger.close()
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"step": 17, "lo')  # killed while writing
    logger = start(config, cut, start_step=12, state=state)
    run(logger, range(12, 20), loss=1.0)
    assert logger.state()["lowest_validation_bpb"] == 1.5
    assert logger.state()["training_seconds"] > state["training_seconds"]
    logger.close()

    def timeless(rows):
        keep = ("step", "event", "loss", "smoothed_loss", "bpb", "lowest_bpb", "epoch", "file")
        return [{key: row[key] for key in keep if key in row} for row in rows]

    assert timeless(rows_of(cut)) == timeless(rows_of(whole))


def test_a_lost_or_foreign_file_is_no_hindrance(config, tmp_path):
    logger = start(config, tmp_path)
    run(logger, range(3))
    wait_until(lambda: logger.state()["rows"] == 3)
    state = logger.state()
    logger.close()
    (tmp_path / "metrics.jsonl").write_bytes(b"not json\n")
    logger = start(config, tmp_path, start_step=3, state=state)
    run(logger, [3])
    logger.close()
    assert logger.state()["rows"] == count_rows(logger.state()) == 1
    assert [row["step"] for row in rows_of(tmp_path)] == [3]


def test_lines_for_people_outside_a_terminal(tmp_path, capsys):
    logger = start(make_config("log_interval=4"), tmp_path)
    run(logger, range(6), lr_multiplier=0.5, bpb=1.25)
    logger.event(6, "validation", {"bpb": 1.5})
    logger.event(6, "samples", {"The sky is": " blue\nand [bold]red[/bold]"})
    logger.message("saved")
    logger.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" |")[0] for line in lines[:2]] == ["step  0/20", "step  4/20"]
    assert re.fullmatch(
        r"step  4/20 \| loss 2\.0000 \| smoothed 2\.0000 \| bpb 1\.2500 \| lr x0\.50 \| [\d.]+ ms"
        r" \| [\d,]+ tok/s"
        r" \| MFU [\d.]+% \| epoch 0 file 3 \| 0m00s, 0m00s left",
        lines[1],
    )
    assert lines[2:] == [
        "Validation at step 6: bpb 1.5, lowest bpb 1.5",
        "Samples at step 6",
        "  The sky is -> blue\\nand [bold]red[/bold]",
        "saved",
    ]


def test_a_terminal_gets_a_live_line_and_is_left_clean(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes stdout for a terminal
    monkeypatch.setenv("COLUMNS", "160")
    logger = start(config, tmp_path)
    run(logger, range(3))
    logger.event(3, "samples", {"One [plain] prompt": " and [/its] text"})
    logger.close()
    out = capsys.readouterr().out
    assert "\x1b[?25l" in out  # the cursor is hidden ...
    assert out.rindex("\x1b[?25h") > out.rindex("\x1b[?25l")  # ... and comes back
    assert "step  2/20" in out and "One [plain] prompt -> and [/its] text" in out


def test_only_the_main_process_prints_and_writes(config, tmp_path, capsys):
    logger = start(config, tmp_path / "run", is_main=False)
    run(logger, range(3))
    logger.event(3, "validation", {"bpb": 1.0})
    logger.close()
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "run").exists()


def test_tensorboard_has_the_curves(tmp_path):

    logger = start(make_config("tensorboard=true"), tmp_path)
    run(logger, range(3))
    logger.event(3, "validation", {"bpb": 1.25})
    run(logger, [3], loss=float("nan"))
    logger.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert curve([file.read_bytes()], "train/loss") == [(0, 2.0), (1, 2.0), (2, 2.0)]
    assert curve([file.read_bytes()], "validation/bpb") == [(3, 1.25)]


def test_tensorboard_has_hyperparameters_and_absolute_learning_rates(tmp_path):
    config = make_config("tensorboard=true", "matrix_lr=0.04", "seed=7", "learning_rate_scale=0.5")
    logger = start(config, tmp_path)
    run(logger, [0], lr_multiplier=0.25)
    run(logger, [1], lr_multiplier=1.0)
    logger.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    content = file.read_bytes()
    # 0.3 is embedding_lr at width 768, which d4's width of 256 raises.
    width = (256 / 768) ** -0.5
    for group, rate in (("muon", 0.02), ("token_embed", 0.15 * width), ("smear", 0.2)):
        points = curve([content], f"learning_rate/{group}")
        assert points == [(0, pytest.approx(rate / 4)), (1, pytest.approx(rate))]
    shown = {
        value.tag: HParamsPluginData.FromString(value.metadata.plugin_data.content)
        for event in events_of(content)
        for value in event.summary.value
        if value.metadata.plugin_data.plugin_name == "hparams"
    }
    values = shown["_hparams_/session_start_info"].session_start_info.hparams
    assert (values["matrix_lr"].number_value, values["seed"].number_value) == (0.04, 7)
    assert values["model"].string_value == "d4" and values["use_backout"].bool_value is True
    assert values["embedding_betas"].string_value == "[0.8, 0.995]"
    assert not {"prompt", "dataset_path"} & set(values)
    experiment = shown["_hparams_/experiment"].experiment
    assert [info.name.tag for info in experiment.metric_infos] == ["validation/bpb", "train/loss"]


def events_of(content):
    """The events of a TensorBoard file, whose checksums must be right."""
    while content:
        length, data = int.from_bytes(content[:8], "little"), content[12:]
        assert masked_crc32c(content[:8]) == int.from_bytes(content[8:12], "little")
        data, checksum, content = data[:length], data[length : length + 4], data[length + 4 :]
        assert masked_crc32c(data) == int.from_bytes(checksum, "little")
        yield Event.FromString(data)


def curve(files, tag):
    """(step, value) as TensorBoard shows the files of a folder, read in the order of their names."""
    points = []
    for content in files:
        first, *events = events_of(content)
        assert first.file_version == "brain.Event:2"
        for event in events:
            assert abs(event.wall_time - time.time()) < 1000
            if (
                event.session_log.status == SessionLog.START
            ):  # a new process: what it does again is forgotten
                points = [point for point in points if point[0] < event.step]
            values = {value.tag: value.simple_value for value in event.summary.value}
            points += [(event.step, values[tag])] if tag in values else []
    return points


def test_an_event_file_is_framed_as_its_library_does(tmp_path):
    writer = RecordWriter(str(tmp_path / "events"))
    for data in (b"", b"x" * 1000):
        writer.write(data)
    writer.close()
    assert (tmp_path / "events").read_bytes() == tensorboard.record(b"") + tensorboard.record(
        b"x" * 1000
    )


class FakeTracker(types.ModuleType):
    """Stands for wandb and trackio: a module with init, a run with log and finish."""

    def __init__(self, fails_at):
        super().__init__("tracker")
        self.fails_at, self.logged, self.finished = fails_at, [], 0

    def _maybe(self, name):
        if self.fails_at == name:
            raise RuntimeError(f"no network\nin {name}")

    def init(self, **arguments):
        self._maybe("init")
        self.arguments = arguments
        return self

    def log(self, numbers, step):
        self._maybe("log")
        self.logged.append((step, numbers))

    def finish(self):
        self.finished += 1
        self._maybe("finish")


@pytest.mark.parametrize("tracker", sorted(trackers.TRACKERS))
@pytest.mark.parametrize("fails_at", [None, "init", "log", "finish"])
def test_a_failing_tracker_stops_nothing(tracker, fails_at, tmp_path, monkeypatch, caplog):
    fake = FakeTracker(fails_at)
    monkeypatch.setitem(sys.modules, tracker, fake)
    logger = start(make_config(f"trackers=[{tracker}]", "run_name=mine"), tmp_path)
    run(logger, range(3))
    logger.event(3, "validation", {"bpb": 1.25})
    logger.event(3, "samples", {"prompt": "text"})
    run(logger, range(3, 5), loss=float("inf"))
    logger.close()
    assert len(rows_of(tmp_path)) == 7
    warnings = [record.getMessage() for record in caplog.records if tracker in record.getMessage()]
    if fails_at:
        (warning,) = warnings  # once, not at every step
        assert "no network in " + fails_at in warning and "\n" not in warning
    else:
        assert not warnings and fake.finished == 1
    if fails_at in (None, "finish"):
        assert fake.arguments["project"] == "maxnano" and fake.arguments["config"]["seed"] == 42
        assert [step for step, _ in fake.logged] == [0, 1, 2, 3, 3, 4]
        assert fake.logged[0][1]["train/loss"] == 2.0
        assert fake.logged[3][1] == {"validation/bpb": 1.25, "validation/lowest_bpb": 1.25}
        assert "train/loss" not in fake.logged[-1][1]  # not finite
    else:
        assert fake.logged == []


def test_a_tracker_that_is_not_installed_stops_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    logger = start(make_config("trackers=[wandb]"), tmp_path)
    run(logger, range(2))
    logger.close()
    assert len(rows_of(tmp_path)) == 2
    assert "wandb is off" in caplog.text


@pytest.mark.parametrize("hanging", ["init", "log"])
def test_a_tracker_that_hangs_delays_nothing(hanging, tmp_path, monkeypatch, caplog):
    released = threading.Event()
    fake = FakeTracker(None)
    monkeypatch.setattr(fake, "_maybe", lambda name: name == hanging and released.wait())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(trackers, "MAX_TRACKER_ROWS", 3)
    logger = start(make_config("trackers=[wandb]"), tmp_path)
    run(logger, range(9))
    assert caplog.text.count("wandb is 3 rows behind; further rows are dropped") == 1
    (tracker,) = logger._files._trackers
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(logger.close)
        wait_until(tracker._closing.is_set)  # while its rows are full
        released.set()
        closing.result()
    assert len(rows_of(tmp_path)) == 9
    assert fake.finished == 1 and "did not finish" not in caplog.text
    assert len(fake.logged) >= 3


def test_the_end_waits_for_a_tracker_but_not_for_ever(tmp_path, monkeypatch, caplog):
    released = threading.Event()
    fake = FakeTracker(None)
    monkeypatch.setattr(fake, "_maybe", lambda name: name == "finish" and released.wait())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(metric_files, "CLOSE_TIMEOUT_SECONDS", 0.2)
    logger = start(make_config("trackers=[wandb]"), tmp_path)
    run(logger, range(2))
    logger.flush()
    wait_until(lambda: len(fake.logged) == 2)
    logger.close()
    assert [step for step, _ in fake.logged] == [0, 1]
    assert caplog.text.count("wandb did not finish in time") == 1
    released.set()


def test_a_tracker_that_failed_for_a_while_gets_every_row(tmp_path, monkeypatch, caplog):
    fake = FakeTracker("log")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(trackers, "RETRY_SECONDS", 0.01)
    logger = start(make_config("trackers=[wandb]"), tmp_path)
    run(logger, range(3))
    wait_until(lambda: "wandb failed" in caplog.text)
    fake.fails_at = None
    wait_until(lambda: len(fake.logged) >= 2)
    fake.fails_at = "init"
    run(logger, range(3, 5))
    fake.fails_at = None
    wait_until(lambda: len(fake.logged) >= 4)
    logger.close()
    assert [step for step, _ in fake.logged] == [0, 1, 2, 3, 4] and fake.finished == 1
    assert caplog.text.count("wandb failed, retrying") == 1


# ---- Disks and stores that fail -----------------------------------------------------------------


@pytest.mark.parametrize("end", ["", '{"step": 1'], ids=["absent", "torn"])
def test_a_run_is_not_complete_before_all_its_rows_are_written(config, tmp_path, end):
    """A full disk, or a kill after the last checkpoint, left them in its state only."""
    assert metric_files.has_all_rows(tmp_path, {"rows": 0, "unwritten": []})
    state = {"rows": 1, "unwritten": [[0.0, {"step": 1}], [0.0, {"step": 2}]]}
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n' + end)
    assert not metric_files.has_all_rows(tmp_path, state)
    files = metric_files.MetricFiles(config, tmp_path, state, next_step=3, is_main=True)
    files.close()
    assert metric_files.has_all_rows(tmp_path, state)
    assert [row["step"] for row in rows_of(tmp_path)] == [0, 1, 2]


def test_what_cannot_be_written_stops_nothing(config, tmp_path, caplog):
    (tmp_path / "metrics.jsonl").mkdir()  # cannot be written, whoever asks
    logger = start(config, tmp_path)
    run(logger, range(2))
    state = logger.state()
    assert state["rows"] == 0 and count_rows(state) == 2
    logger.close()
    assert caplog.text.count("metrics.jsonl cannot be written") == 1
    assert caplog.text.count("metrics.jsonl does not have the last 2 rows") == 1


def test_a_full_disk_delays_nothing_and_loses_nothing(tmp_path, monkeypatch, caplog):
    append, is_full = growing_file._LocalFile.append, threading.Event()

    def append_until_full(self, data):
        if is_full.is_set():
            append(self, data[: len(data) // 2])  # what still fits
            self._size -= len(data) // 2
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, data)

    monkeypatch.setattr(growing_file._LocalFile, "append", append_until_full)
    monkeypatch.setattr(growing_file, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(metric_files, "CURVES_WRITE_SECONDS", 0.0)
    logger = start(make_config("tensorboard=true"), tmp_path)
    run(logger, range(3))
    wait_until(lambda: logger.state()["rows"] >= 2)
    is_full.set()
    run(logger, range(3, 60))
    wait_until(lambda: caplog.text.count("cannot be written") == 2)  # each file, once
    assert count_rows(logger.state()) == 60
    is_full.clear()
    wait_until(lambda: logger.state()["rows"] == 60)
    run(logger, range(60, 62))
    logger.close()
    assert caplog.text.count("cannot be written") == caplog.text.count("is written again") == 2
    assert [row["step"] for row in rows_of(tmp_path)] == list(range(62))
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert [step for step, _ in curve([file.read_bytes()], "train/loss")] == list(range(62))


def test_an_output_that_is_full_stops_nothing(tmp_path):
    code = """
        import sys
        sys.path.insert(0, "tests")
        import test_metrics
        from MaxNano import console
        console.keep_output()  # as every program does first
        logger = test_metrics.start(test_metrics.make_config(), sys.argv[1])
        test_metrics.run(logger, range(3))
        logger.event(3, "validation", {"bpb": 1.0})
        logger.message("saved")
        logger.close()
    """
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), tmp_path],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(rows_of(tmp_path)) == 4


def wait_until(condition, seconds=200):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)


@pytest.fixture
def store(served, monkeypatch):
    """An object store without faults, to which gcsfs in this process speaks."""
    object_store.use(served, monkeypatch)
    Bucket.clear_instance_cache()
    yield served
    served.mend()


def curves_in(store, run_name, tag):
    return curve(store.objects(f"{run_name}/tensorboard/").values(), tag)


def test_an_object_store_gets_whole_files_now_and_then(store, monkeypatch):
    store.put("seldom/metrics.jsonl", b'{"step": 0}\n{"step": 1}\n')
    monkeypatch.setattr(growing_file, "REMOTE_WRITE_SECONDS", 1e9)
    config = make_config()
    empty = start(config, f"{store.bucket}/other").state()
    logger = start(config, f"{store.bucket}/seldom", start_step=1, state={**empty, "rows": 1})
    wait_until(lambda: rows_in(store.objects("seldom/")["seldom/metrics.jsonl"]) == [{"step": 0}])
    run(logger, range(1, 4))
    logger.flush()
    time.sleep(0.2)
    assert rows_in(store.objects("seldom/")["seldom/metrics.jsonl"]) == [{"step": 0}]
    assert count_rows(logger.state()) == 4  # which also asks for them to be written
    wait_until(lambda: logger.state()["rows"] == 4)
    writes = [
        request for request in store.requests if request[:2] == ("write", "seldom/metrics.jsonl")
    ]
    assert len(writes) == 2
    assert [row["step"] for row in rows_in(store.objects("seldom/")["seldom/metrics.jsonl"])] == [
        0,
        1,
        2,
        3,
    ]
    logger.close()


@pytest.mark.parametrize("fault", [503, 403, "hang"])
def test_a_store_that_fails_for_ever_delays_no_step_and_loses_no_row(
    store, monkeypatch, caplog, fault
):
    """The steps that a later process does, when the store works again, bring the earlier rows
    along.
    """
    monkeypatch.setattr(growing_file, "UPLOAD_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(growing_file, "RETRY_SECONDS", 0.1)
    monkeypatch.setattr(metric_files, "CLOSE_TIMEOUT_SECONDS", 1.0)
    name, config = f"fails_{fault}", make_config("tensorboard=true")
    directory = f"{store.bucket}/{name}"
    store.fail(fault, "any", count=None)
    logger = start(config, directory)
    run(logger, range(100))
    logger.event(100, "validation", {"bpb": 1.5})
    wait_until(lambda: caplog.text.count("cannot be written now") == 2)
    began = time.monotonic()
    run(logger, range(100, 200))
    state = json.loads(json.dumps(logger.state()))
    assert time.monotonic() - began < 50  # 200 calls; the least of waits would take 0.5 s each
    assert (state["rows"], count_rows(state)) == (0, 201)
    logger.close()
    assert time.monotonic() - began < 100
    assert (
        caplog.text.count("cannot be written now")
        == caplog.text.count("does not have the last 201 rows")
        == 2
    )
    assert store.objects(name) == {}

    store.mend()
    monkeypatch.setattr(growing_file, "UPLOAD_TIMEOUT_SECONDS", 100)
    monkeypatch.setattr(metric_files, "CLOSE_TIMEOUT_SECONDS", 100)
    logger = start(config, directory, start_step=200, state=state)
    run(logger, range(200, 203))
    logger.close()
    rows = rows_in(store.objects(name)[f"{name}/metrics.jsonl"])
    assert [row["step"] for row in rows if "event" not in row] == list(range(203))
    assert [row["bpb"] for row in rows if "event" in row] == [1.5]
    assert [step for step, _ in curves_in(store, name, "train/loss")] == list(range(203))


def test_a_store_that_works_again_gets_everything(store, monkeypatch, caplog):
    monkeypatch.setattr(growing_file, "RETRY_SECONDS", 0.1)
    monkeypatch.setattr(growing_file, "REMOTE_WRITE_SECONDS", 0.1)
    logger = start(make_config(), f"{store.bucket}/back")
    run(logger, range(3))
    wait_until(lambda: logger.state()["rows"] == 3)
    monkeypatch.setattr(growing_file, "UPLOAD_TIMEOUT_SECONDS", 0.5)
    store.fail("hang", "write", count=None)
    run(logger, range(3, 6))
    wait_until(lambda: "cannot be written now" in caplog.text)
    store.mend()
    monkeypatch.setattr(growing_file, "UPLOAD_TIMEOUT_SECONDS", 100)
    wait_until(lambda: logger.state()["rows"] == 6)
    logger.close()
    assert [row["step"] for row in rows_in(store.objects("back/")["back/metrics.jsonl"])] == list(
        range(6)
    )
    assert caplog.text.count("cannot be written now") == caplog.text.count("is written again") == 1


class Machine:
    """Where a process runs that can be killed: after that, none of its writes reaches the store."""

    def __init__(self, monkeypatch):
        self._write, self._lock, self._dead, self._writing = (
            remote.write,
            threading.Lock(),
            set(),
            set(),
        )
        monkeypatch.setattr(growing_file.remote, "write", self._write_if_alive)

    def _write_if_alive(self, path, content, seconds):
        thread = threading.current_thread()
        with self._lock:
            assert thread not in self._dead
            self._writing.add(thread)
        try:
            self._write(path, content, seconds)
        finally:
            self._writing.discard(thread)

    def kill(self, logger):
        with self._lock:
            self._dead |= {file._thread for file in logger._files._files}
        wait_until(lambda: not self._dead & self._writing)


STOPPED_AT = ("nothing", "before the checkpoint", "at the checkpoint", "after the checkpoint")


@pytest.mark.parametrize("fault", [None, "hang"])
@pytest.mark.parametrize("uploaded", STOPPED_AT)
def test_a_run_that_is_killed_and_resumed_has_every_row_once(store, monkeypatch, uploaded, fault):
    """However much the store had when it began to hang, whether or not it worked again before the
    kill.
    """
    machine = Machine(monkeypatch)
    monkeypatch.setattr(growing_file, "REMOTE_WRITE_SECONDS", 0.01)
    monkeypatch.setattr(growing_file, "UPLOAD_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(growing_file, "RETRY_SECONDS", 0.01)
    config, name, state = (
        make_config("tensorboard=true"),
        f"killed_{uploaded.split()[0]}_{fault}",
        None,
    )

    def stop_at(what):
        """The store has all rows so far and gets no more."""
        if what == uploaded:
            wait_until(
                lambda: (
                    not logger._files._files[0].state()[1]
                    and not logger._files._files[1].state()[1]
                )
            )
            store.fail(fault or "hang", "write", name, count=None)

    for start_step in (0, 4, 8):
        logger = start(config, f"{store.bucket}/{name}", start_step=start_step, state=state)
        stop_at("nothing")
        run(logger, range(start_step, start_step + 2), loss=float(start_step))
        logger.flush()
        stop_at("before the checkpoint")
        run(logger, range(start_step + 2, start_step + 4), loss=float(start_step))
        logger.event(start_step + 4, "validation", {"bpb": float(start_step)})
        stop_at("at the checkpoint")
        state = json.loads(json.dumps(logger.state()))
        assert count_rows(state) == 5 * (start_step // 4 + 1)
        run(logger, range(start_step + 4, start_step + 7), loss=99.0)  # is done again
        logger.event(start_step + 7, "validation", {"bpb": 99.0})
        stop_at("after the checkpoint")
        if fault is None:
            store.mend()  # it may all have come, or not
        machine.kill(logger)
        store.mend()
    logger = start(config, f"{store.bucket}/{name}", start_step=12, state=state)
    run(logger, range(12, 14), loss=12.0)
    logger.close()
    rows = rows_in(store.objects(name)[f"{name}/metrics.jsonl"])
    expected = [(step, float(step // 4 * 4)) for step in range(14)]
    assert [(row["step"], row["loss"]) for row in rows if "event" not in row] == expected
    assert [(row["step"], row["bpb"]) for row in rows if "event" in row] == [
        (4, 0.0),
        (8, 4.0),
        (12, 8.0),
    ]
    assert curves_in(store, name, "train/loss") == expected
    assert curves_in(store, name, "validation/bpb") == [(4, 0.0), (8, 4.0), (12, 8.0)]
    assert (
        len(store.objects(f"{name}/tensorboard/")) >= 3
    )  # no process overwrote the curves of another


def test_curves_that_are_behind_the_rows_lose_nothing(store, monkeypatch):
    machine = Machine(monkeypatch)
    monkeypatch.setattr(growing_file, "REMOTE_WRITE_SECONDS", 0.01)
    monkeypatch.setattr(growing_file, "RETRY_SECONDS", 0.01)
    config = make_config("tensorboard=true")
    logger = start(config, f"{store.bucket}/behind")
    run(logger, range(3))
    wait_until(lambda: logger.state()["rows"] == 3)
    monkeypatch.setattr(growing_file, "UPLOAD_TIMEOUT_SECONDS", 0.5)
    store.fail("hang", "write", "behind/tensorboard", count=None)
    run(logger, range(3, 6))
    logger.flush()
    wait_until(lambda: logger._files._files[0].state() == (6, []))
    state = json.loads(json.dumps(logger.state()))
    assert (state["rows"], count_rows(state)) == (3, 6)
    store.mend()
    machine.kill(logger)
    monkeypatch.setattr(growing_file, "UPLOAD_TIMEOUT_SECONDS", 100)
    logger = start(config, f"{store.bucket}/behind", start_step=6, state=state)
    run(logger, [6])
    logger.close()
    assert [row["step"] for row in rows_in(store.objects()["behind/metrics.jsonl"])] == list(
        range(7)
    )
    assert [step for step, _ in curves_in(store, "behind", "train/loss")] == list(range(7))


def test_kill_9_on_another_machine(store):
    """The same with a real process."""
    code = """
        import json, os, signal, sys
        sys.path.insert(0, "tests")
        import test_metrics
        logger = test_metrics.start(test_metrics.make_config(), "gs://ours/killed_9")
        test_metrics.run(logger, range(5))
        test_metrics.wait_until(lambda: logger.state()["rows"] == 5)
        test_metrics.run(logger, range(5, 8))
        print("STATE " + json.dumps(logger.state()), flush=True)
        test_metrics.run(logger, range(8, 10))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = programs.run("-c", textwrap.dedent(code), env={**os.environ, **store.env})
    assert done.returncode == -signal.SIGKILL, done.stderr
    state = json.loads(re.search("^STATE (.*)$", done.stdout, re.MULTILINE)[1])
    logger = start(make_config(), f"{store.bucket}/killed_9", start_step=8, state=state)
    run(logger, [8])
    logger.close()
    rows = rows_in(store.objects("killed_9")["killed_9/metrics.jsonl"])
    assert [row["step"] for row in rows] == list(range(9))


def test_a_table_is_readable_without_a_terminal(capsys):
    long = "[vocab, tensor], " * 20
    console.print_table("config", ("key", "value"), [("depth", 4), ("rules", long)])
    out = capsys.readouterr().out
    assert out.startswith("config\nkey") and "\x1b" not in out
    assert max(map(len, out.splitlines())) <= console.PLAIN_WIDTH
    assert out.count("tensor],") == 20

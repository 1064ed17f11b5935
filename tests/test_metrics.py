"""What a run tells about itself: late numbers, whole files, trackers that fail alone."""

import json
import re
import sys
import types

import jax.numpy as jnp
import pytest

from MaxNano import metrics, pyconfig

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
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


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
        "step", "validation", "step", "step",
    ]  # fmt: skip


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
    assert steps[-1]["training_seconds"] == 3 * 2.0  # steps 11, 12 and 13: the first 11 are warm-up
    assert steps[-1]["elapsed_seconds"] == 14 * 2.0 + 1000.0
    assert steps[-1]["seconds_left"] == pytest.approx(6 * 2.0)


def test_no_mfu_where_the_peak_is_unknown(config, tmp_path, capsys):
    logger = start(config, tmp_path, peak_flops=None)
    run(logger, [0])
    logger.close()
    assert "mfu" not in rows_of(tmp_path)[0]
    assert "MFU" not in capsys.readouterr().out


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
    state = logger.state()
    logger.close()
    (tmp_path / "metrics.jsonl").write_bytes(b"not json\n")
    logger = start(config, tmp_path, start_step=3, state=state)
    run(logger, [3])
    assert logger.state()["rows"] == 1
    logger.close()
    assert [row["step"] for row in rows_of(tmp_path)] == [3]


def test_lines_for_people_outside_a_terminal(tmp_path, capsys):
    logger = start(make_config("log_interval=4"), tmp_path)
    run(logger, range(6), lr_multiplier=0.5, bpb=1.25)
    logger.event(6, "validation", {"bpb": 1.5})
    logger.event(6, "samples", {"The sky is": " blue\nand [bold]red[/bold]"})
    logger.message("saved")
    logger.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" |")[0] for line in lines[:2]] == ["step  1/20", "step  4/20"]
    assert re.fullmatch(
        r"step  4/20 \| loss 2\.0000 \| bpb 1\.2500 \| lr x0\.50 \| [\d,]+ ms \| [\d,]+ tok/s"
        r" \| MFU [\d.]+% \| epoch 0 file 3 \| 0m00s, 0m00s left",
        lines[1],
    )
    assert lines[2:] == [
        "validation after step 6: bpb 1.5, lowest bpb 1.5",
        "samples after step 6",
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
    assert "step  3/20" in out and "One [plain] prompt -> and [/its] text" in out


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
    logger.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    content = file.read_bytes()
    assert b"train/loss" in content and b"validation/bpb" in content


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


@pytest.mark.parametrize("tracker", sorted(metrics.TRACKERS))
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


def test_a_full_disk_stops_nothing(config, tmp_path, caplog):
    (tmp_path / "metrics.jsonl").mkdir()  # cannot be written, whoever asks
    logger = start(config, tmp_path)
    run(logger, range(2))
    assert logger.state()["rows"] == 0
    logger.close()
    assert caplog.text.count("metrics.jsonl is off") == 1


def test_an_object_store_gets_whole_files(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n')
    monkeypatch.setattr(metrics, "REMOTE_WRITE_SECONDS", 1e9)
    file = metrics._Jsonl(path, keep=1, append=False)
    file.log({"step": 1, "again": True})
    assert file.rows == 2 and path.read_text() == '{"step": 0}\n'
    file.finish()
    assert path.read_text() == '{"step": 0}\n{"step": 1, "again": true}\n'


def test_a_table_is_readable_without_a_terminal(capsys):
    long = "[vocab, tensor], " * 20
    metrics.print_table("config", ("key", "value"), [("depth", 4), ("rules", long)])
    out = capsys.readouterr().out
    assert out.startswith("config\nkey") and "\x1b" not in out
    assert max(map(len, out.splitlines())) <= metrics.PLAIN_WIDTH
    assert out.count("tensor],") == 20

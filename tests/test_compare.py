"""compare.py: statistics, the same batches for all arms, runs that stop and resume, the leaderboard."""

import argparse
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from byte_tokenizer import ByteTokenizer
from etils import epath
from test_report import V6E, core_entries, make_run, rows_of, validation

from MaxNano import compare, pyconfig
from MaxNano.data import loader
from MaxNano.data.conversations import Mixture
from MaxNano.reporting import charts, comparison, leaderboard, render
from MaxNano.reporting.blocks import Missing, Table
from MaxNano.reporting.run_history import read_run
from MaxNano.tokenization.bpe import train_bpe

ROOT = Path(__file__).resolve().parents[1]
BASE = str(ROOT / "configs" / "base.yml")


# ---- Statistics ---------------------------------------------------------------------------------

# Student, The probable error of a mean, Biometrika 6 (1908): hours of sleep gained with two drugs.
DRUG_1 = dict(enumerate((0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0)))
DRUG_2 = dict(enumerate((1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4)))


def test_the_paired_difference_of_students_data():
    """The interval is that of R's t.test(extra ~ group, data = sleep, paired = TRUE)."""
    gap = comparison.paired_difference(DRUG_1, DRUG_2)
    assert gap.pairs == 10
    assert (gap.mean, gap.low, gap.high) == pytest.approx((1.58, 0.7001142, 2.4598858), abs=5e-8)


@pytest.mark.parametrize(
    "pairs, quantile", [(2, 12.706), (3, 4.303), (6, 2.571), (11, 2.228), (31, 2.042)]
)
def test_the_interval_has_the_quantiles_of_published_tables(pairs, quantile):
    """Two-sided 95 % points of Student's t, as in any table of them."""
    values = {seed: float(seed % 2) for seed in range(pairs)}
    gap = comparison.paired_difference(dict.fromkeys(values, 0.0), values)
    error = np.std(list(values.values()), ddof=1) / pairs**0.5
    assert (gap.high - gap.mean) / error == pytest.approx(quantile, abs=6e-4)


def test_only_runs_of_the_same_seed_are_paired():
    gap = comparison.paired_difference({1: 2.0, 2: 3.0, 9: 0.0}, {2: 3.5, 1: 2.1, 5: 7.0})
    assert (gap.pairs, gap.mean) == (2, pytest.approx(0.3))
    assert comparison.paired_difference({1: 2.0}, {1: 2.5}) == (1, 0.5, None, None)
    assert comparison.paired_difference({1: 2.0}, {2: 2.5}) is None


# ---- The same data ------------------------------------------------------------------------------


def batches_of(config, count=6):
    with loader.make_loader(config, ByteTokenizer(), "train", batch_rows=8) as batches:
        return np.stack([next(batches)["inputs"] for _ in range(count)])


def test_arms_see_the_same_batches_and_text_has_one_order(tmp_path):
    for name, count in (("a", 60), ("b", 40)):
        table = pa.table({"text": [f"{name}{n} " * (1 + n % 7) for n in range(count)]})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=5)

    def batches(*words):
        small = ["data_readers=2", "max_target_length=32", "packing_buffer_documents=10"]
        words = [BASE, "model=d2", f"dataset_path={tmp_path}", *small, *words]
        return batches_of(pyconfig.initialize(words))

    first = batches("seed=1", "matrix_lr=0.02")
    np.testing.assert_array_equal(batches("seed=1", "matrix_lr=0.5", "model=d4"), first)
    np.testing.assert_array_equal(batches("seed=2", "matrix_lr=0.02"), first)


def test_the_order_of_conversations_is_the_seeds_and_not_the_arms():
    def order(*words):
        mixture = "chat_train_mixture=[[SpellingBee/train, 1, 200]]"
        config = pyconfig.initialize([BASE, "model=d2", "stage=sft", mixture, *words])
        made = Mixture(config, "train")
        return [str(made.conversation(1, n)) for n in range(20)]

    first = order("seed=1")
    assert order("seed=1", "matrix_lr=0.5") == first
    assert order("seed=2") != first


# ---- Tables -------------------------------------------------------------------------------------


def make_runs(folder):
    """Two arms with two seeds, and one run of another arm that has one seed."""
    values = {"0.02": {1: 1.50, 2: 1.60}, "0.03": {1: 1.48, 2: 1.56}, "0.5": {1: 2.0}}
    for rate, by_seed in values.items():
        for seed, bpb in by_seed.items():
            middle = [validation(10, bpb + 0.5), validation(20, bpb + 0.25)]
            rows = [validation(0, 3.0), *rows_of(30), *middle, validation(30, bpb)]
            words = f"matrix_lr={rate}", f"seed={seed}", f"log_interval={seed}"
            make_run(folder / f"lr{rate}_s{seed}", *words, rows=rows)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return make_runs(tmp_path_factory.mktemp("compared") / "runs")


def tables_of(report):
    return [
        block for section in report.sections for block in section.blocks if isinstance(block, Table)
    ]


def test_runs_that_exist_are_arms_by_what_differs(runs):
    names = ("lr0.02_s1", "lr0.03_s1", "lr0.03_s2", "lr0.02_s2", "lr0.5_s1")
    arms = comparison.group_runs([read_run(epath.Path(runs / name)) for name in names])
    assert [(arm.name, sorted(arm.runs)) for arm in arms] == [
        ("matrix_lr=0.02", [1, 2]),
        ("matrix_lr=0.03", [1, 2]),
        ("matrix_lr=0.5", [1]),
    ]
    report = comparison.compare("rates", arms)
    header, rows, _ = tables_of(report)[0]
    assert header == "arm,seeds,mean,std,difference,95% interval,tokens/s,time".split(",")
    # The gaps are -0.02 and -0.04: mean -0.03, half the interval 12.706 x 0.01.
    speed = ["1,000,000", "1 min 15 s"]
    assert rows == [
        ["matrix_lr=0.02", "2", "1.5500", "0.0707", "–", "–", *speed],
        ["matrix_lr=0.03", "2", "1.5200", "0.0566", "-0.0300", "-0.1571 to +0.0971", *speed],
        ["matrix_lr=0.5", "1", "2.0000", "–", "+0.5000", "–", *speed],
    ]
    (curves,) = report.sections[1].blocks
    assert curves.series[1].points == [(10, 2.02), (20, pytest.approx(1.77)), (30, 1.52)]
    notes = [block.text for block in report.sections[-1].blocks]
    assert notes[0] == "matrix_lr: 0.02, 0.03, 0.5" and "same batches" in notes[1]
    text = render.to_markdown(report)
    assert "![bits per byte, validation](compare.svg)" in text and "-0.1571 to +0.0971" in text
    assert "same batches" in render.to_html(report)


def test_arms_with_other_data_are_said_to_have_it(tmp_path):
    for name, tokens in (("a", 2**15), ("b", 2**16)):
        make_run(tmp_path / name, f"global_batch_tokens={tokens}", rows=rows_of(30))
    arms = comparison.group_runs([read_run(epath.Path(tmp_path / name)) for name in "ab"])
    report = comparison.compare("batches", arms)
    assert Missing("Not the same batches in all arms: global_batch_tokens differ.") in (
        report.sections[-1].blocks
    )
    # Without a validation the training loss is compared.
    assert [table.rows[0][2] for table in tables_of(report)[:1]] == ["3.8550"]


def test_two_runs_of_one_config_and_seed_are_no_arm(tmp_path):
    for name in "ab":
        make_run(tmp_path / name, rows=rows_of(30))
    with pytest.raises(ValueError, match="a and b have the same config and seed=42"):
        comparison.group_runs([read_run(epath.Path(tmp_path / name)) for name in "ab"])


def test_the_picture_stands_alone():
    series = [charts.Series(f"arm <{n}>", [(0, 2.0 + n), (10, 1.0 + n)]) for n in range(10)]
    text = ElementTree.tostring(charts.picture(series, title="a & b"), encoding="unicode")
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"a & b", "arm <0>", "arm <9>"} <= set(texts)
    paths = [node.get("class") for node in root.iter("{http://www.w3.org/2000/svg}path")]
    assert paths.count("s7") == 2 and paths.count("s0") == 4, "eight colors, in turn"


def test_the_leaderboard_has_a_row_per_finished_run(runs, tmp_path, capsys):
    folder = make_runs(tmp_path / "all")
    make_run(
        folder / "scored",
        rows=[*rows_of(30), validation(30, 1.7)],
        evals={30: core_entries()},
    )
    make_run(folder / "begun", rows=rows_of(12))
    make_run(folder / "on_a_cpu", rows=rows_of(30), devices={**V6E, "kind": "cpu", "count": 2})
    (folder / "comparisons").mkdir()
    assert command_in_process([BASE, "--leaderboard", str(folder)]) == 0
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert [row["run"] for row in rows][:3] == ["scored", "lr0.03_s1", "lr0.02_s1"]
    assert {row["run"] for row in rows} >= {"on_a_cpu"} and len(rows) == 7
    score = core_entries()["core"]["core"]
    assert float(rows[0]["core"]) == pytest.approx(score) and rows[1]["core"] == ""
    assert rows[0]["commit"] == "0123456789abcdef" and "TPU v6 lite" in rows[0]["hardware"]
    assert float(rows[1]["seconds"]) == 75
    assert float(rows[1]["usd"]) == pytest.approx(8 * 75 / 3600 * 0.540137)
    assert float(rows[1]["flops"]) > 0 and float(rows[1]["loss"]) > 0 and rows[1]["layers"]
    by_name = {row["run"]: row for row in rows}
    assert by_name["on_a_cpu"]["usd"] == "" and by_name["on_a_cpu"]["bpb"] == ""
    text = (folder / "results.md").read_text()
    assert "begun is not finished: 12 of 30 steps" in text and "| scored |" in text
    assert "scored" in capsys.readouterr().out
    assert command_in_process([BASE, "--leaderboard", str(folder), "--price=2"]) == 0
    by_name = {row["run"]: row for row in csv.DictReader((folder / "results.csv").open())}
    assert float(by_name["lr0.03_s1"]["usd"]) == pytest.approx(8 * 75 / 3600 * 2)
    assert float(by_name["on_a_cpu"]["usd"]) == pytest.approx(2 * 75 / 3600 * 2)
    assert "2 USD/h" in (folder / "results.md").read_text()
    with pytest.raises(ValueError, match="no finished run"):
        compare.write_leaderboard(epath.Path(tmp_path / "nothing"))


def test_names_in_a_pipe_are_whole(tmp_path, capsys):
    """Of twelve columns in 120 characters, a name was cut into pieces below each other."""
    names = [f"a_run_with_a_long_name_of_{kind}_{'x' * 28}" for kind in ("one", "two")]
    for name in names:
        make_run(tmp_path / name, rows=[*rows_of(30), validation(30, 1.7)])
    assert command_in_process([BASE, "--leaderboard", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = [line.split() for line in lines[lines.index(f"results of {tmp_path}") + 1 :]]
    assert [row[0] for row in table[1:3]] == names and table[3] == []
    assert "TPU v6 lite" in lines[2] and lines[2].split()[-1] == "0123456789ab"


def test_an_unreadable_run_is_a_line_of_the_leaderboard(tmp_path):
    make_run(tmp_path / "good", rows=rows_of(30))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.yml").write_text("- 1")
    finished, problems = leaderboard.read_runs(epath.Path(tmp_path))
    assert [run.name for run in finished] == ["good"]
    assert len(problems) == 1 and "bad" in problems[0]


# ---- Jobs ---------------------------------------------------------------------------------------


def options_of(*arms, **values):
    made = {
        "arm": list(arms),
        "seeds": 2,
        "devices": None,
        "runs": None,
        "leaderboard": None,
        "price": None,
    }
    return argparse.Namespace(**made | values)


def test_jobs_are_seeds_by_arms_under_names_of_their_own():
    words = [BASE, "model=d2", "run_name=rates", "seed=5", "matrix_lr=0.1", "steps=9"]
    jobs = compare.make_jobs(words, options_of("", "matrix_lr=0.03 warmup_steps=3"))
    assert [(job.config.run_name, job.seed, job.config.matrix_lr) for job in jobs] == [
        ("rates_unchanged_s5", 5, 0.1),
        ("rates_matrix-lr-0.03-warmup-steps-3_s5", 5, 0.03),
        ("rates_unchanged_s6", 6, 0.1),
        ("rates_matrix-lr-0.03-warmup-steps-3_s6", 6, 0.03),
    ]
    assert {job.config.steps for job in jobs} == {9} and jobs[3].config.seed == 6
    long = compare.run_name("x" * 60, "window_pattern=SSSL " * 9, 123)
    assert len(long) <= 64 and long != compare.run_name("x" * 60, "window_pattern=SSLL " * 9, 123)


@pytest.mark.parametrize(
    "arms, values, problem",
    [
        (["matrix_lr=0.1"], {}, "give --arm twice"),
        (["matrix_lr=0.1", "matrix_lr=0.1"], {}, "two arms are the same"),
        (["seed=3", ""], {}, "sets seed"),
        (["", "matrix_lrr=1"], {}, "unknown key matrix_lrr; did you mean matrix_lr"),
        (["", "matrix_lr=1"], {"seeds": 0}, "out of range"),
    ],
)
def test_wrong_arms_are_one_line_before_anything_is_trained(arms, values, problem):
    with pytest.raises(ValueError, match=re.escape(problem)):
        compare.make_jobs([BASE, "model=d2"], options_of(*arms, **values))


@pytest.mark.parametrize("text", ["", "0;0", "a", "0;", "999"])
def test_wrong_devices_are_one_line(text, tmp_path):
    with pytest.raises(ValueError, match="--devices"):
        compare.parse_slots(text, epath.Path(tmp_path))


# A stand-in for train.py: a file says what each run does; it records when.
TRAIN = """
import json, os, signal, sys, time
from pathlib import Path
from MaxNano import pyconfig

config = pyconfig.initialize(sys.argv[1:])
plan = json.loads(Path(PLAN).read_text()).get(config.run_name, {})

def note(what):
    with open(LOG, "a") as log:
        print(config.run_name, what, *sorted(os.sched_getaffinity(0)), file=log, flush=True)

signal.signal(signal.SIGTERM, lambda *_: (note("stopped"), os._exit(75)))
note("start")
time.sleep(plan.get("seconds", 0))
if not plan.get("status"):
    folder = Path(config.base_output_directory) / config.run_name
    extra = folder / "checkpoints" / str(config.steps) / "extra"
    extra.mkdir(parents=True)
    pyconfig.save(config, folder / "config.yml")
    bpb = 1 + config.matrix_lr + config.seed / 100
    end = {"step": config.steps, "event": "validation", "bpb": bpb}
    rows = [row | {"step": n} for n, row in enumerate([ROW] * config.steps)] + [end]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
    state = {"metrics": {"run_id": "a"}, "run": {"step": config.steps}}
    (extra / "metadata").write_text(json.dumps(state))
    (extra.parent / "MANIFEST.json").write_text("{}")
note("end")
sys.exit(plan.get("status", 0))
"""


THREE = ("matrix_lr=0.1", "matrix_lr=0.2", "")


class Trainer:
    """Runs compare.main with the stand-in of train.py."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.plan, self.log = folder, folder / "plan.json", folder / "log"
        self.log.touch()
        self.set()
        script = folder / "train.py"
        names = {"PLAN": str(self.plan), "LOG": str(self.log), "ROW": rows_of(1)[0]}
        constants = "".join(f"{name} = {value!r}\n" for name, value in names.items())
        script.write_text(constants + TRAIN)
        monkeypatch.setattr(compare, "TRAIN", script)
        monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def set(self, **plan):
        self.plan.write_text(json.dumps(plan))

    def run(self, *words, arms=("matrix_lr=0.1", "matrix_lr=0.2"), **values):
        given = [BASE, "model=d2", "vocab_size=4096", "steps=30", "run_name=x", *words]
        given.append(f"base_output_directory={self.folder}/runs")
        options = options_of(*arms, **values)
        return pyconfig.launch(lambda config: compare.main(config, given, options), given)

    def events(self):
        return [tuple(line.split()[:2]) for line in self.log.read_text().splitlines()]

    def results(self):
        path = self.folder / "runs/comparisons/x/runs.csv"
        return {row["run"]: float(row["bpb"]) for row in csv.DictReader(path.open())}


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    return Trainer(tmp_path, monkeypatch)


def test_a_comparison_trains_what_is_missing_and_nothing_twice(trainer, capfd):
    assert trainer.run(seeds=1) == 0
    first = ["x_matrix-lr-0.1_s42", "x_matrix-lr-0.2_s42"]
    assert trainer.events() == [(name, what) for name in first for what in ("start", "end")]
    assert trainer.results() == pytest.approx(dict(zip(first, (1.52, 1.62), strict=True)))
    folder = trainer.folder / "runs/comparisons/x"
    assert {path.name for path in folder.iterdir()} == {
        "compare.html",
        "compare.md",
        "compare.svg",
        "runs.csv",
    }
    assert trainer.run(seeds=1) == 0 and len(trainer.events()) == 4
    assert "2 of 2 runs are complete" in capfd.readouterr().out
    # Another arm and another seed.
    assert trainer.run("dry_run=true", arms=("matrix_lr=0.1", "matrix_lr=0.3")) == 0
    assert "to train: x_matrix-lr-0.3_s43" in capfd.readouterr().out
    # Another value of the rest of the config.
    assert trainer.run("steps=31", seeds=1) == 2
    error = capfd.readouterr().err
    assert "was trained with steps=30, not 31: choose another run_name" in error
    assert len(trainer.events()) == 4


def test_a_run_that_stops_stops_the_comparison_with_75_and_it_resumes(trainer, capfd):
    trainer.set(**{"x_matrix-lr-0.2_s42": {"status": 75}})
    assert trainer.run(arms=THREE, seeds=1) == 75
    assert [name for name, what in trainer.events() if what == "start"] == [
        "x_matrix-lr-0.1_s42",
        "x_matrix-lr-0.2_s42",
    ]
    assert "the same command resumes" in capfd.readouterr().out
    assert not (trainer.folder / "runs/comparisons").exists()
    trainer.set()
    assert trainer.run(arms=THREE, seeds=1) == 0
    starts = [name for name, what in trainer.events() if what == "start"]
    assert starts[2:] == ["x_matrix-lr-0.2_s42", "x_unchanged_s42"]
    assert len(trainer.results()) == 3


def test_sigterm_reaches_the_runs(trainer):
    """As pressing Ctrl-C or a preempted machine: they save, and the status is theirs."""
    trainer.set(**{"x_matrix-lr-0.1_s42": {"seconds": 100}})

    def terminate_when_started(signal_number, frame):
        if ("x_matrix-lr-0.1_s42", "start") in trainer.events():
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.kill(os.getpid(), signal.SIGTERM)

    previous = signal.signal(signal.SIGALRM, terminate_when_started)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
    try:
        assert trainer.run(seeds=1) == 75
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert trainer.events()[-1] == ("x_matrix-lr-0.1_s42", "stopped")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_run_that_fails_is_told_and_the_others_are_compared(trainer, capfd):
    trainer.set(**{"x_matrix-lr-0.1_s42": {"status": 2}})
    assert trainer.run(arms=THREE, seeds=1) == 2
    assert list(trainer.results()) == ["x_matrix-lr-0.2_s42", "x_unchanged_s42"]
    text = (trainer.folder / "runs/comparisons/x/compare.md").read_text()
    assert "s42 is not finished: train.py ended with status 2" in text
    assert "| matrix_lr=0.1 | 0 | – | – | – | – | – | – |" in text
    assert "| matrix_lr=0.2 | 1 | 1.6200 | – | – | – |" in text


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_several_runs_at_once_have_devices_of_their_own(trainer, monkeypatch):
    monkeypatch.setattr(compare, "has_nvidia", lambda: False)
    monkeypatch.setattr(pyconfig, "has_accelerator", lambda: False)
    names = [f"x_matrix-lr-{rate}_s42" for rate in ("0.1", "0.2")]
    trainer.set(**dict.fromkeys(names, {"seconds": 3}))
    cores = sorted(os.sched_getaffinity(0))[:2]
    assert trainer.run(seeds=1, devices=f"{cores[0]};{cores[1]}") == 0
    assert [what for _, what in trainer.events()] == ["start", "start", "end", "end"]
    used = {tuple(line.split()[2:]) for line in trainer.log.read_text().splitlines()}
    assert used == {(str(cores[0]),), (str(cores[1]),)}
    logs = trainer.folder / "runs/comparisons/x"
    assert {path.stem for path in logs.glob("*.log")} == set(names)


# ---- With train.py ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    (folder / "text").mkdir()
    texts = [f"{n} times {n % 7} is {n * (n % 7)}. " * (1 + n % 5) for n in range(400)]
    for name in "ab":
        pq.write_table(pa.table({"text": texts}), folder / f"text/{name}.parquet", row_group_size=9)
    train_bpe(texts, 300).save(folder / "tokenizer")
    return folder


def command_of(folder, *words):
    return [
        sys.executable,
        str(ROOT / "MaxNano/compare.py"),
        BASE,
        *"model=d1 emb_dim=32 head_dim=16 num_query_heads=2 vocab_size=300 steps=12".split(),
        *"max_target_length=32 window_pattern=L muon_iterations=1 global_batch_tokens=256".split(),
        *"data_readers=2 num_cpu_devices=1 eval_interval=4 eval_tokens=512".split(),
        *"sample_interval=0 warmup_steps=2 checkpoint_interval_steps=3".split(),
        f"dataset_path={folder}/text",
        f"tokenizer_path={folder}/tokenizer",
        f"base_output_directory={folder}/runs",
        f"jax_cache_dir={os.environ['MAXNANO_TEST_CACHE']}",
        *words,
    ]


def run(*command, status=0):
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == status, result.stdout + result.stderr
    return result.stdout


def losses_of(folder, name):
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "event" not in row]


@pytest.mark.slow
def test_two_arms_are_trained_and_compared(folder, monkeypatch, capsys):
    command = command_of(
        folder, "run_name=two", "--arm", "matrix_lr=0.02", "--arm", "matrix_lr=0.2", "--seeds=1"
    )
    out = run(*command)
    assert "==== run 2 of 2: two_matrix-lr-0.2_s42" in out and "step 11/12" in out
    table = out[out.index("difference") :].splitlines()
    assert table[1].startswith("matrix_lr=0.02") and table[2].startswith("matrix_lr=0.2 ")
    first, second = (losses_of(folder, f"two_matrix-lr-{rate}_s42") for rate in ("0.02", "0.2"))
    assert first[0] == second[0] and first[-1] != second[-1], "the same start and the same batch"
    monkeypatch.setattr(compare, "train_all", lambda jobs, *_: dict.fromkeys(jobs, 1))
    assert command_in_process(command[2:]) == 0, "both are complete"
    runs = "--runs=two_matrix-lr-0.2_s42,two_matrix-lr-0.02_s42"
    capsys.readouterr()
    assert command_in_process(command_of(folder, runs, "run_name=again")[2:]) == 0
    out = capsys.readouterr().out
    assert "less is better. An interval that contains 0 may be noise" in out
    again = out[out.index("difference") :].splitlines()
    assert again[1].split()[:3] == ["matrix_lr=0.2", "1", table[2].split()[2]]


def command_in_process(arguments):
    options, words = compare.make_parser().parse_known_args(arguments)
    return pyconfig.launch(lambda config: compare.main(config, words, options), words)


@pytest.mark.long
def test_stopped_again_and_again_a_comparison_has_the_same_numbers(folder):
    arms = ["--arm", "", "--arm", "matrix_lr=0.2", "--seeds", "2"]
    run(*command_of(folder, "run_name=whole", *arms))
    # In the first three runs of four, or in the start of the one after each.
    for number, name in (
        (signal.SIGTERM, "unchanged_s42"),
        (signal.SIGINT, "matrix-lr-0.2_s42"),
        (signal.SIGTERM, "unchanged_s43"),
    ):
        process = subprocess.Popen(command_of(folder, "run_name=stopped", *arms))
        path = folder / f"runs/stopped_{name}/metrics.jsonl"
        while not (path.exists() and '"step": 5,' in path.read_text()):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(timeout=250) == 75
    run(*command_of(folder, "run_name=stopped", *arms))
    for arm in ("unchanged", "matrix-lr-0.2"):
        for seed in (42, 43):
            name = f"{arm}_s{seed}"
            assert losses_of(folder, f"stopped_{name}") == losses_of(folder, f"whole_{name}")

"""evaluate.py on a run with a checkpoint: numbers, files, going on after a kill, refusals."""

import contextlib
import csv
import json
import math
import os
import shutil
import subprocess
import time
import zipfile
from pathlib import Path

import jax
import numpy as np
import programs
import pytest
import yaml

from MaxNano import evaluate, pyconfig, train
from MaxNano.data import loader
from MaxNano.distributed import runtime
from MaxNano.distributed.preemption import EXIT_PREEMPTED, Preempted
from MaxNano.evals import core
from MaxNano.evals.bpb import BpbEval
from MaxNano.evals.results import Results
from MaxNano.inference import prefix_scoring
from MaxNano.tokenization.tokenizer import load_tokenizer
from MaxNano.training import state as train_state
from MaxNano.training.checkpointing import Checkpointer
from MaxNano.training.setup import set_up
from MaxNano.training.validation import PackedRows, bits_per_byte, tell_if_long

pytestmark = pytest.mark.usefixtures("compiled_once")
ROOT = Path(__file__).parents[1]
BASE = str(ROOT / "configs/base.yml")
TASKS = ("copa", "winograd", "lambada_openai")  # one of each kind, without examples
SHAPE = ["emb_dim=32", "head_dim=16", "num_query_heads=2", "vocab_size=320", "max_target_length=32"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run with one checkpoint, saved by hand; its text, tokenizer and three tasks."""
    folder = tmp_path_factory.mktemp("place")
    with zipfile.ZipFile(ROOT / "tests/golden/core_small.zip") as archive:
        archive.extractall(folder)
    bundle = folder / "eval_bundle/core.yaml"
    listed = yaml.safe_load(bundle.read_text())["icl_tasks"]
    bundle.write_text(
        yaml.safe_dump({"icl_tasks": [task for task in listed if task["label"] in TASKS]})
    )
    (folder / "text").mkdir()
    for split in "ab":
        lines = [
            f"document {split}{i}: " + "the kite is in the bucket. " * (i % 7) for i in range(80)
        ]
        (folder / "text" / f"{split}.jsonl").write_text(
            "".join(json.dumps({"text": x}) + "\n" for x in lines)
        )
    config = pyconfig.initialize([BASE, *words(folder), *SHAPE])
    setup = set_up(config, jax.devices()[:1])
    state = train_state.initialize(config, setup.numerics, setup.optimizer, setup.abstract)
    fingerprint = load_tokenizer(config).fingerprint()
    with Checkpointer(
        config, folder / "runs/run", tokenizer_fingerprint=fingerprint
    ) as checkpointer:
        checkpointer.save(7, state, {})
    pyconfig.save(config, folder / "runs/run/config.yml")
    return folder


def words(folder):
    return [
        "model=d2",
        "run_name=run",
        f"base_output_directory={folder}/runs",
        "num_cpu_devices=1",
        f"tokenizer_path={folder}",
        "dataset_type=jsonl",
        f"dataset_path={folder}/text",
        "data_readers=1",
        "packing_buffer_documents=10",
        "global_batch_tokens=64",
        "eval_tokens=512",
        "sample_tokens=2",
        "steps=1",
        f"core_bundle={folder}/eval_bundle",
        "core_max_per_task=4",
        "jax_cache_dir=''",
    ]


def command(folder, *more):
    """The arguments; what they do not say the run knows."""
    return [BASE, "model=d2", "run_name=run", f"base_output_directory={folder}/runs", *more]


def run(folder, *more):
    """The exit status of the entry point in this process."""
    argv = command(folder, *more)
    return pyconfig.launch(lambda config: evaluate.main(config, argv), argv)


@pytest.fixture(autouse=True)
def in_place(monkeypatch):
    """What the entry point changes of JAX's settings belongs to a process of its own."""
    monkeypatch.setattr(evaluate.runtime, "initialize", lambda config: None)
    devices = jax.devices()[:1]
    make = set_up
    monkeypatch.setattr(evaluate, "set_up", lambda config: make(config, devices))
    # Columns for everything, so that little is compiled.
    monkeypatch.setattr(prefix_scoring, "SMALLEST_PREFIX", 1024)
    monkeypatch.setattr(prefix_scoring, "SMALLEST_BRANCH", 64)


def results(folder):
    return json.loads((folder / "runs/run/evals/step_000007.json").read_text())["evals"]


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_with_the_task_that_was_under_way(place, monkeypatch, capsys):
    """Also: the run's own shape is used, tables and files hold the numbers, a finished one is not
    done again.
    """
    answered = []
    answer = core.answer

    def dying(task, *arguments):
        if len(answered) == 2:
            raise KeyboardInterrupt
        answered.append(task.label)
        return answer(task, *arguments)

    monkeypatch.setattr(core, "answer", dying)
    assert run(place, "evals=core") == 130
    assert len([name for name in results(place) if name.startswith("core ")]) == 2
    assert not (place / "runs/run/evals/step_000007.csv").exists()
    first = set(answered)

    def counting(task, *arguments):
        answered.append(task.label)
        return answer(task, *arguments)

    monkeypatch.setattr(core, "answer", counting)
    assert run(place, "evals=core,samples") == 0
    assert set(answered[2:]) == set(TASKS) - first
    printed = capsys.readouterr().out
    assert "2 of 3 CORE tasks are already done" in printed
    assert "The capital of France is" in printed

    found = results(place)
    centered = {label: found[f"core {label}"]["values"]["centered"] for label in TASKS}
    score = sum(centered.values()) / 3
    assert found["core"]["values"]["core"] == pytest.approx(score)
    with open(place / "runs/run/evals/step_000007.csv", newline="") as file:
        rows = {row["task"]: row for row in csv.DictReader(file)}
    assert {label: float(rows[label]["centered"]) for label in TASKS} == pytest.approx(centered)
    assert float(rows["CORE"]["centered"]) == pytest.approx(score)
    assert all(int(rows[label]["examples"]) == 4 for label in TASKS)

    answered.clear()
    assert run(place, "evals=core") == 0
    assert answered == []


def killed_after(name, folder, *words):
    """What the command in a process of its own has printed when an evaluation is there, which is
    its end.
    """
    script = ROOT / "MaxNano/evaluate.py"
    process = programs.start(script, *command(folder, *words), cwd="/", stderr=subprocess.STDOUT)
    path = folder / "runs/run/evals/step_000007.json"
    while not (path.exists() and any(found.startswith(name) for found in results(folder))):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    return process.communicate()[0]


@pytest.mark.slow
def test_killed_twice_and_on_other_devices_it_has_the_same_numbers(place, capsys):
    """On two devices it is killed within CORE and, gone on, within the chat tasks; then this
    process goes on.
    """
    path = place / "runs/run/evals/step_000007.json"
    path.unlink(missing_ok=True)
    words = (
        "evals=bpb,core,chat",
        "chat_tasks=[SimpleSpelling/test, SpellingBee/train]",
        "chat_max_per_task=40",
        "max_new_tokens=2",
        "chat_slots=4",
    )
    more = ("num_cpu_devices=2", f"jax_cache_dir={os.environ['MAXNANO_TEST_CACHE']}")
    assert "on 2 x cpu" in killed_after("core ", place, *words, *more)
    assert "chat" not in " ".join(results(place))
    assert "CORE tasks are already done" in killed_after("chat ", place, *words, *more)
    assert (
        "chat SpellingBee/train" not in results(place)
        and {f"core {task}" for task in TASKS} < results(place).keys()
    )
    assert run(place, *words) == 0
    assert "SimpleSpelling/test is already done" in capsys.readouterr().out
    two = results(place)
    path.unlink()
    assert run(place, *words) == 0
    one = results(place)
    assert one.keys() == two.keys()
    for task in ("SimpleSpelling/test", "SpellingBee/train"):
        assert (
            one[f"chat {task}"]["values"]["problems"]
            == two[f"chat {task}"]["values"]["problems"]
            == 40
        )
        assert (
            one[f"chat {task}"]["values"]["accuracy"] == two[f"chat {task}"]["values"]["accuracy"]
        )
    for split in ("train", "validation"):
        here, there = (found[f"bpb {split}"]["values"]["bpb"] for found in (one, two))
        assert here == pytest.approx(there, rel=1e-6)
        assert 1 < here < 9  # an untrained model: log2(320) bits a token
    for label in TASKS:
        here, there = (found[f"core {label}"]["values"]["accuracy"] for found in (one, two))
        assert here == there, label


@pytest.mark.slow
def test_results_of_other_inputs_are_measured_again(place, capsys):
    """Other text under the same and another path, other keys of sampling."""

    def bpb():
        assert run(place, "evals=bpb", f"dataset_path={text}") == 0
        return {
            split: results(place)[f"bpb {split}"]["values"] for split in ("train", "validation")
        }

    text = place / "other"
    shutil.copytree(place / "text", text)
    first = bpb()
    assert bpb() == first, "kept, with its time"
    text = text.rename(place / "moved")
    assert bpb() == first
    line = (text / "b.jsonl").read_text()
    (text / "b.jsonl").write_text(line.replace("bucket", "carton"))
    second = bpb()
    assert second["train"] == first["train"]
    assert second["validation"]["bpb"] != first["validation"]["bpb"]
    text = place / "text"
    assert bpb()["validation"]["bpb"] == first["validation"]["bpb"]

    words = ("evals=chat", "chat_tasks=[SpellingBee/train]", "chat_max_per_task=2")
    words += ("max_new_tokens=1", "chat_slots=2", "chat_temperature=1.0")
    assert run(place, *words) == 0 and run(place, *words) == 0
    assert capsys.readouterr().out.count("SpellingBee/train is already done") == 1
    for other in ("top_k=1", "seed=7"):
        assert run(place, *words, other) == 0
        assert "already done" not in capsys.readouterr().out, other


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["evals=bpb,cor"], "evals=bpb,cor names 'cor': choose among bpb,samples,core,chat"),
        (["core_bundle=nowhere"], "core_bundle=nowhere does not exist"),
        (["step=3"], "has no checkpoint of step 3, only [7]"),
        (["run_name=other"], "other holds no checkpoint"),
    ],
)
def test_what_cannot_be_evaluated_is_told_in_one_line(place, more, message, capsys):
    assert run(place, *more) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_damaged_file_of_results_is_written_anew(tmp_path, capsys):
    path = tmp_path / "evals/step_000001.json"
    path.parent.mkdir()
    path.write_text('{"evals": {')
    found = Results(tmp_path, 1)
    assert found.get("core", {}) is None
    found.put("core", {"of": [1]}, {"core": 0.5})
    again = Results(tmp_path, 1)
    assert again.get("core", {"of": (1,)}) == {"core": 0.5}
    assert again.get("core", {"of": [2]}) is None
    assert Results(tmp_path, 1, run_id="another").get("core", {"of": [1]}) is None
    assert "is damaged" in capsys.readouterr().err
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_other_data_than_at_the_step_before_are_told_once(tmp_path, capsys):
    """A CORE bundle or chat data that were replaced during a run: the curve has a break."""
    tasks = {"core copa": "a", "core winograd": "b"}

    def measure(step, digests, is_training=True, **settings):
        results = Results(tmp_path, step, "run", is_training=is_training)
        for name, digest in digests.items():
            results.put(name, {"task": digest, "shots": (1, 2), **settings}, {"centered": 0.5})
        return capsys.readouterr().err

    assert measure(90, tasks) == measure(100, tasks) == measure(200, tasks) == ""
    other = {"core copa": "c", "core winograd": "d"}
    assert measure(300, other, is_training=False) == ""
    (tmp_path / "evals/step_000300.json").unlink()
    (line,) = measure(300, other).splitlines()
    assert "core copa is measured on other data" in line and "step_000200.json: task chang" in line
    assert measure(400, other) == ""
    assert ": max_per_task changed;" in measure(1_000_000, other, max_per_task=3)
    assert "step_1000000.json: task changed;" in measure(1_000_001, tasks, max_per_task=3)
    (tmp_path / "evals/step_1000001.json").write_text("{")
    assert measure(1_000_002, other) == ""


def test_validation_rows_are_packed_once_and_kept():
    rows = np.random.default_rng(0).integers(0, 300, (3, 2, 9))
    rows[0, 1, 4:] = ~rows[0, 1, 4:]  # not to be predicted
    packed = [loader.to_batch(row.astype(np.int32)) for row in rows]
    batches = iter(packed)
    kept = PackedRows(batches, 2, vocab_size=300)
    assert next(batches) is packed[2], "no more than asked for is read"
    for _ in range(2):
        for batch, expected in zip(kept, packed, strict=False):
            for name, values in expected.items():
                np.testing.assert_array_equal(batch[name], values)
    assert len(kept) == 2


@pytest.mark.parametrize(
    ("seconds", "told"), [(1.0, ["It takes about 16m40s;"]), (0.05, []), (0.01, [])]
)
def test_a_long_validation_is_told_once_with_its_time(seconds, told):
    """The first validation of own conversations took an hour on a CPU, without a word."""
    now, lines, seen = [0.0], [], []
    for batch in tell_if_long(range(2000), 1000, "It", lines.append, lambda: now[0]):
        now[0] += seconds if batch >= 3 else 100.0  # the first ones compile
        seen.append(batch)
    assert seen == list(range(1000)) and len(lines) == len(told)
    assert all(part in line for part, line in zip(told, lines, strict=True))


def test_bits_per_byte_are_of_all_batches_together():
    counts = iter([(np.float32(8), np.float32(4)), (np.float32(1), np.float32(5))])
    assert bits_per_byte(lambda batch: next(counts), range(2)) == pytest.approx(9 / 9 / math.log(2))
    assert bits_per_byte(lambda batch: (0.0, 0.0), range(1)) == math.inf


def test_an_evaluation_waits_before_virtual_devices_wait_for_each_other_forever():
    """From 32 queued programs with collectives on, virtual CPU devices never end."""
    started, ended, waiting = [], [], []

    class Count(float):
        def block_until_ready(self):
            waiting.append(len(started) - len(ended))
            ended.append(self)
            return self

    def count_bits(batch):
        started.append(batch)
        return Count(batch), 2.0

    assert bits_per_byte(count_bits, range(100)) == pytest.approx(4950 / 200 / math.log(2))
    assert ended == list(range(100)), "in order, and each is waited for"
    assert 1 < max(waiting) <= runtime.IN_FLIGHT + 1 < 32


# ---- In training --------------------------------------------------------------------------------


class Preemption:
    """A Preemption that comes in the middle of CORE as soon as `comes()`."""

    def __init__(self, comes):
        self.comes = comes

    def check(self, step=None):
        if step is None and self.comes():
            raise Preempted

    def checked(self, items):
        return items

    def at_once(self):
        return contextlib.nullcontext()


@pytest.mark.slow
def test_core_while_training(place, monkeypatch, capsys):
    """After the last step; stopped in the middle it goes on with the task that was under way;
    evaluate.py knows it.
    """
    changed = (
        "run_name=trained",
        "core_interval=1",
        "num_decoder_layers=1",
        "eval_interval=0",
        "sample_interval=0",
    )
    config = pyconfig.initialize([BASE, *words(place), *SHAPE, *changed])
    answered = []
    answer = core.answer

    def counting(task, *arguments):
        result = answer(task, *arguments)
        answered.append(task.label)
        return result

    def train_until(comes):
        setup = set_up(config)
        with jax.set_mesh(setup.mesh):
            return train.train(setup, config, Preemption(comes))

    monkeypatch.setattr(core, "answer", counting)
    assert train_until(lambda: len(answered) == 1) == EXIT_PREEMPTED
    assert len(answered) == 1
    assert train_until(lambda: False) == 0
    assert set(answered) == set(TASKS), "each once"
    assert len(answered) == len(TASKS)
    printed = capsys.readouterr().out
    assert "1 of 3 CORE tasks are already done" in printed
    rows = programs.rows_of(place / "runs/trained")
    (event,) = (row for row in rows if row.get("event") == "core")
    assert event["step"] == 1
    assert event["core"] == pytest.approx(sum(event[label] for label in TASKS) / 3)
    assert f"Core at step 1: core {event['core']:.6g}, " in printed

    assert run(place, "evals=core", "run_name=trained") == 0
    assert len(answered) == len(TASKS), "nothing is done again"
    assert "3 of 3 CORE tasks are already done" in capsys.readouterr().out


def test_an_evaluation_that_fails_while_training_leaves_a_saved_run(place, monkeypatch, capsys):
    """Held-out data or questions that are gone after hours."""
    changed = (
        "run_name=failing",
        "steps=3",
        "num_decoder_layers=1",
        "eval_interval=2",
        "sample_interval=0",
        "checkpoint_interval_steps=0",
        "tensorboard=false",
    )
    config = pyconfig.initialize([BASE, *words(place), *SHAPE, *changed])
    measure, setup = BpbEval.measure, set_up(config)

    def fail(evaluation, results):
        if int(evaluation._run.state.step) == 2:
            raise ValueError("held_out.parquet is gone")
        return measure(evaluation, results)

    monkeypatch.setattr(BpbEval, "measure", fail)
    with jax.set_mesh(setup.mesh), pytest.raises(ValueError, match="held_out.parquet is gone"):
        train.train(setup, setup.config, Preemption(lambda: False))
    folder = place / "runs/failing"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["2"]
    assert "Saved checkpoint at step 2; the same command resumes" in capsys.readouterr().out
    rows = programs.rows_of(folder)
    assert [row["step"] for row in rows if "event" not in row] == [0, 1]
    assert [row["step"] for row in rows if row.get("event") == "validation"] == [0]

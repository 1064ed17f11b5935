"""tune.py: it finds the fastest settings, survives what a device does, resumes; train.py uses its file."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from MaxNano import pyconfig, tune
from MaxNano.models import attention, products
from MaxNano.training import checkpoint_identity
from MaxNano.training.run_config import config_of_run
from MaxNano.tuning import candidates, children, kernels, measure, search, session, tuned_file
from MaxNano.tuning.candidates import Facts, Knob
from MaxNano.tuning.results import Journal
from MaxNano.tuning.search import Outcome, Trial

ROOT = Path(__file__).resolve().parents[1]
BASE = str(ROOT / "configs/base.yml")
WORDS = ("model=d4", "max_target_length=128", "global_batch_tokens=4096", "vocab_size=512")
FACTS = Facts(
    backend="cpu",
    device="Some chip",
    devices=1,
    cores=4,
    dtype="float32",
    kernels=["chunked", "reference"],
    resolved={
        "attention": "chunked",
        "embedding_gradient": "scatter",
        "layer_products": "xla",
        "remat_policy": "none",
        "scan_layers": True,
        "vocab_chunk_size": 0,
        "per_device_batch_size": 32,
        "ici_fsdp_parallelism": 1,
        "data_workers": 0,
    },
    device_rows=32,
    micro_rows=32,
    data_parallel_size=1,
    flops_per_token=10**6,
    peak_flops=None,
    versions={"maxnano": "1", "jax": "2", "jaxlib": "2", "libtpu": None},
)


def make_config(*words):
    return pyconfig.initialize([BASE, *WORDS, *words])


# ---- The search ---------------------------------------------------------------------------------

KNOBS = [
    Knob("rows", [{"per_device_batch_size": n} for n in (1, 2, 4, 8)]),
    Knob("remat", [{"remat_policy": name} for name in ("minimal", "full")]),
    Knob("layers", [{"scan_layers": False}]),
]


def run_search(cost, knobs=KNOBS, budget=1000, start=None):
    """(the result, the trials) of a search in which `cost` gives the seconds of a trial, and which has
    time for `budget` trials; those that are equal are measured once.
    """
    trials = []

    def measure(trial):
        if trial not in trials:
            trials.append(trial)
        return Outcome(cost(trial), "")

    best = search.search(
        start or {},
        knobs,
        measure,
        lambda: budget - len(trials),
        lambda best, choice: best | choice,
    )
    return best, trials


def cost_of(trial):
    """Rows of 4 are the fastest; layers that are not scanned only help with rows of 4."""
    rows = trial.overrides.get("per_device_batch_size", 16)
    seconds = {1: 3.0, 2: 2.0, 4: 1.0, 8: 1.5, 16: 2.5}[rows]
    seconds += {"minimal": 0.2, "full": 0.4}.get(trial.overrides.get("remat_policy"), 0)
    return seconds - (0.2 if rows == 4 and "scan_layers" in trial.overrides else 0)


def test_the_search_finds_the_fastest():
    best, trials = run_search(lambda trial: 10 + cost_of(trial))
    assert best == {"per_device_batch_size": 4, "scan_layers": False}
    rungs = [trial.steps for trial in trials if not trial.turn][:10]
    assert rungs == [3] * 5 + [6] * 3 + [12] * 2  # 5 settings, the faster half of them twice


def test_what_is_far_slower_is_not_measured_again():
    best, trials = run_search(cost_of, KNOBS[:1])
    assert best == {"per_device_batch_size": 4}
    assert [(trial.steps, bool(trial.turn)) for trial in trials][:7] == [(3, False)] * 5 + [
        (6, True)
    ] * 2
    # One rival that is not far slower: only both by turns can tell.
    best, trials = run_search(lambda trial: 1 + len(trial.overrides) / 20, KNOBS[1:2])
    assert best == {} and [trial.steps for trial in trials] == [3, 3, 3, 6, 6]


def test_a_short_search_reaches_every_knob():
    knobs = [Knob(str(n), [{f"key_{n}": value} for value in range(6)]) for n in range(5)]
    best, trials = run_search(lambda trial: 1 + len(trial.overrides), knobs, budget=11)
    assert best == {} and len(trials) == 11
    assert [sum(f"key_{n}" in t.overrides for t in trials) for n in range(5)] == [2] * 5


def test_what_a_share_cuts_off_is_measured_in_the_next_cycle():
    knobs = [KNOBS[0], KNOBS[2]]

    def cost(trial):
        fast = trial.overrides.get("per_device_batch_size") == 8
        return (0.5 if fast else 1.0) + len(trial.overrides) / 4

    best, trials = run_search(cost, knobs, budget=7)
    assert best == {"per_device_batch_size": 8}
    values = [trial.overrides.get("per_device_batch_size") for trial in trials]
    assert values == [None, 1, 2, 4, None, 8, None, 8]


def test_settings_that_fail_are_never_chosen():
    def fails(trial):
        return None if trial.overrides.get("per_device_batch_size") == 4 else cost_of(trial)

    assert run_search(fails)[0] == {"per_device_batch_size": 8}
    assert run_search(lambda trial: None)[0] == {}
    assert run_search(lambda trial: None if trial.overrides else 1.0)[0] == {}


def test_a_gain_that_is_gone_when_both_are_measured_again_is_noise():
    best, trials = run_search(lambda trial: 1.0 if trial.turn or not trial.overrides else 0.5)
    assert best == {} and any(trial.turn for trial in trials)
    assert run_search(lambda trial: 1 - 0.001 * len(trial.overrides))[0] == {}


def test_without_time_the_start_stays():
    start = {"scan_layers": False}
    assert run_search(cost_of, budget=0, start=start) == (start, [])


@pytest.mark.parametrize("count, rows", [(2, 16), (3, 2), (4, 4), (5, 4)])
def test_the_leader_of_a_knob_counts_if_the_time_ends_in_it(count, rows):
    """In the first rung, and before its gain is confirmed."""
    best, trials = run_search(cost_of, KNOBS[:1], count)
    assert best == ({} if rows == 16 else {"per_device_batch_size": rows}) and len(trials) == count


def test_the_leader_of_a_second_rung_counts():
    for count in (6, 7, 9):
        best, trials = run_search(lambda trial: 10 + cost_of(trial), KNOBS[:1], count)
        assert best == {"per_device_batch_size": 4} and len(trials) == count


def test_what_was_confirmed_is_not_lost_if_the_time_ends():
    """Nor does a leader count that was measured with data: the comparison at the end is without."""

    def cost(trial):
        return 0.1 if "remat_policy" in trial.overrides else cost_of(trial)

    best, trials = run_search(cost, KNOBS[:2], budget=9)
    assert best == {"per_device_batch_size": 4} and "remat_policy" in trials[-1].overrides
    knobs = [Knob("data workers", [{"data_workers": 1}], with_data=True)]
    assert run_search(lambda trial: 1 - len(trial.overrides) / 2, knobs, 2)[0] == {}


def test_if_the_data_cannot_be_read_nothing_is_tried_with_them():
    knobs = [Knob("data workers", [{"data_workers": n} for n in (1, 2)], with_data=True)]
    best, trials = run_search(lambda trial: None, knobs)
    assert (best, len(trials)) == ({}, 1)


@pytest.mark.parametrize(
    "default, best, expected",
    [
        ([1.0, 1.1, 0.9], [0.8, 0.8, 0.8], True),
        ([1.0, 1.0, 1.0], [0.995, 0.995, 0.995], False),  # within the noise
        ([1.0, 1.0, 1.0], [0.5, 0.5, 1.1], False),  # not in every turn
        ([1.0], [0.9], True),
        ([], [], False),
    ],
)
def test_what_is_faster_than_the_defaults(default, best, expected):
    assert search.is_faster(default, best) is expected


# ---- What is tried ------------------------------------------------------------------------------


def names_and_values(config, facts):
    listed = candidates.knobs(
        config,
        facts,
        candidates.attention_choices(config, facts),
        [
            *candidates.gradient_choices(config, facts),
            *candidates.product_choices(config, facts),
        ],
    )
    return {
        knob.name: [candidates.changes(config, facts, choice) for choice in knob.choices]
        for knob in listed
    }


def test_what_is_tried_on_a_cpu():
    values = names_and_values(make_config(), FACTS)
    assert values["attention"] == [
        {},
        {"attention_chunk": 64},
        {"attention": "reference"},
    ]  # 256 and 512 are longer than the rows
    assert values["rows"][:2] == [{"per_device_batch_size": 1}, {"per_device_batch_size": 2}]
    assert values["rows"][-1] == {}  # 32: the default
    assert "XLA flags" not in values and "layout" not in values
    assert values["data workers"] == [{}, {"data_workers": 1}, {"data_workers": 2}]


def test_what_is_tried_on_a_tpu_slice():
    kernel_names = ["flash", "chunked", "splash", "reference"]
    resolved = FACTS.resolved | {"attention": "flash", "embedding_gradient": "sorted"}
    resolved |= {"layer_products": "pallas"}
    facts = FACTS._replace(backend="tpu", devices=8, kernels=kernel_names, resolved=resolved)
    values = names_and_values(make_config("max_target_length=2048", "num_kv_heads=2"), facts)
    assert {} in values["attention"] and {"flash_block": 512} in values["attention"]
    assert {"attention": "splash", "splash_fused_backward": False} in values["attention"]
    assert {"xla_flags": ()} in values["XLA flags"]  # without vmem
    assert {"xla_flags": ("vmem", "sparse_core")} in values["XLA flags"]
    assert {"ici_fsdp_parallelism": 8} in values["layout"]
    assert {"ici_tensor_parallelism": 2} in values["layout"]
    assert {"ici_tensor_parallelism": 4} not in values["layout"]  # two kv heads
    assert {"embedding_gradient": "one_hot"} in values["embedding gradient"]
    assert values["layer products"] == [{}, {"layer_products": "xla"}]


def test_flags_that_change_more_than_speed_are_kept():
    facts = FACTS._replace(backend="gpu")
    assert names_and_values(make_config(), facts)["XLA flags"] == [
        {"xla_flags": ("vmem", "cublas")},
        {"xla_flags": ("vmem", "cuda_graphs")},
    ]
    groups = "[[vmem, tpu, xla_v=1], [deterministic, gpu, xla_a=true], [fast, gpu, xla_b=1],"
    groups += " [faster, gpu, xla_b=2]]"
    config = make_config(f"xla_flag_groups={groups}")
    assert names_and_values(config, facts)["XLA flags"] == [
        {"xla_flags": ("vmem", "fast")},
        {"xla_flags": ("vmem", "faster")},
    ]
    config = make_config(f"xla_flag_groups={groups}", "xla_flags=[deterministic, fast]")
    assert "XLA flags" not in names_and_values(config, facts)  # the user's choice


def test_what_the_user_sets_is_not_tried():
    config = make_config("per_device_batch_size=4", "attention=reference", "remat_policy=full")
    values = names_and_values(config, FACTS)
    assert values["attention"] == [{}] and values["remat"] == [{}]
    assert "rows" not in values or values["rows"] == [{}]


def test_long_steps_are_measured_with_fewer_micro_batches():
    config = make_config("global_batch_tokens=131072")
    facts = FACTS._replace(device_rows=1024, flops_per_token=10**8)
    assert candidates.measured_rows(config, facts) == 64  # two micro-batches, not 32
    rows = names_and_values(config, facts)["rows"]
    assert max(row.get("per_device_batch_size", 0) for row in rows) == 16 and {} in rows
    assert candidates.measured_rows(config, FACTS) == 32


# ---- Measurements in processes ------------------------------------------------------------------

FIRST = {"loss": [6.0, 5.0, 4.0], "grad_norm": [1.0, 1.0, 1.0], "micro_rows": 4, "gib": 1.5}
FAULTS = {
    1: children.Report([], "out of memory"),
    2: children.Report([{"loss": FIRST["loss"], "grad_norm": FIRST["grad_norm"]}], "timed out"),
    4: children.Report([], "ended with signal 11: no output"),
    8: children.Report([{**FIRST, "loss": [6.0, 5.0, 4.1], "seconds": 0.1}], ""),
}


class FakeDevice:
    """Does the tasks of children.run: rows of 16 are the fastest, FAULTS has others' failures."""

    def __init__(self, stop_at=None):
        self.tasks, self.stop_at = [], stop_at

    def __call__(self, task, limit):
        self.tasks.append(task)
        if len(self.tasks) == self.stop_at:
            raise KeyboardInterrupt
        if task["task"] == "probe":
            return children.Report([{"facts": FACTS._asdict()}], "")
        if task["task"] == "kernels":
            return self.check(task)
        rows = task["overrides"].get("per_device_batch_size", 32)
        if rows in FAULTS:
            return FAULTS[rows]
        seconds = {32: 1.0, 16: 0.5}[rows] + 0.01 * (len(task["overrides"]) - 1)
        return children.Report([FIRST, {"seconds": seconds, "operations": "a table"}], "")

    def check(self, task):
        """The first kernel is correct, the next is wrong, the one after it ends the process."""
        right = {"milliseconds": 2.0, "error": 0.5, "problem": ""}
        wrong = {"milliseconds": 1.0, "error": 9.0, "problem": "output differs"}
        answers = []
        for index in task["indices"]:
            answers.append({"started": index})
            if index == 2:
                return children.Report(answers, "ended with signal 6: no output")
            answers.append({"checked": index, "result": wrong if index == 1 else right})
        return children.Report(answers, "")

    def count(self, kind):
        return sum(task["task"] == kind for task in self.tasks)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder for runs, and another for tuned files."""
    monkeypatch.setattr(tuned_file, "FOLDER", tmp_path / "tuned")
    return tmp_path


def start(folder, device, monkeypatch, *words):
    monkeypatch.setattr(children, "run", device)
    argv = [BASE, *WORDS, f"base_output_directory={folder}/runs", *words]
    return tune.main(pyconfig.initialize(argv), argv)


def test_a_whole_search_on_a_device_that_fails(folder, monkeypatch, capsys):
    device = FakeDevice()
    assert start(folder, device, monkeypatch) == 0
    out = capsys.readouterr().out
    for row, words in {
        1: "out of memory",
        2: "timed out",
        4: "ended with signal 11",
        8: "wrong: loss at step 2 is 4.1 instead of 4",
    }.items():
        assert f"per_device_batch_size={row}: {words}" in out
    assert "struck off: output differs" in out and "struck off: ended with signal 6" in out
    assert "attention_chunk" not in "".join(map(str, (t.get("overrides") for t in device.tasks)))
    facts, values = tuned_file.read(folder / "tuned/some-chip-1-d4.yml")
    assert values == {"per_device_batch_size": 16}
    assert (facts["device"], facts["devices"], facts["times"]) == ("Some chip", "1", "1.980")
    assert "command" in facts and "jax=2" in facts["all versions"]
    table = (folder / "runs/tune/some-chip-1-d4.md").read_text()
    assert "| per_device_batch_size=16 |" in table and "a table" in table
    rows = (folder / "runs/tune/some-chip-1-d4.csv").read_text().splitlines()
    assert len(rows) == 2 and rows[0].startswith("date,device,devices,model,defaults tokens/s")
    assert not any("\r" in line or "\x1b" in line for line in out.splitlines())


class WrongProducts(FakeDevice):
    """A chip whose layer products in kernels, the default, are wrong."""

    def __call__(self, task, limit):
        if task["task"] == "probe":
            facts = FACTS._replace(resolved=FACTS.resolved | {"layer_products": "pallas"})
            return children.Report([{"facts": facts._asdict()}], "")
        return super().__call__(task, limit)

    def check(self, task):
        result = {"milliseconds": 2.0, "error": 0.5, "problem": ""}
        wrong = {"milliseconds": 0.0, "error": 9.0, "problem": "layer differs"}
        answers = []
        for index in task["indices"]:
            is_wrong = task["choices"][index].get("layer_products") == "pallas"
            answers += [
                {"started": index},
                {"checked": index, "result": wrong if is_wrong else result},
            ]
        return children.Report(answers, "")


def test_wrong_layer_products_are_never_measured(folder, monkeypatch, capsys):
    device = WrongProducts()
    assert start(folder, device, monkeypatch) == 0
    assert "the default layer products are struck off" in capsys.readouterr().out
    measured = [task["overrides"] for task in device.tasks if "overrides" in task]
    assert measured and all(choice["layer_products"] == "xla" for choice in measured)
    _, values = tuned_file.read(folder / "tuned/some-chip-1-d4.yml")
    assert values["layer_products"] == "xla"


@pytest.mark.parametrize("stop_at", [2, 3, 6, 9, 20])
def test_a_search_that_was_stopped_resumes_without_measuring_again(
    stop_at, folder, monkeypatch, capsys
):
    whole = FakeDevice()
    start(folder, whole, monkeypatch, "base_output_directory=" + str(folder / "whole"))
    stopped, after = FakeDevice(stop_at), FakeDevice()
    assert start(folder, stopped, monkeypatch) == tune.EXIT_STOPPED
    journal = folder / "runs/tune/some-chip-1-d4.jsonl"
    with journal.open("a") as file:
        file.write('{"key": "half a li')
    capsys.readouterr()
    assert start(folder, after, monkeypatch) == 0
    total = stopped.count("steps") + after.count("steps")
    assert total == whole.count("steps") + (stop_at > 2)  # the measurement that was stopped
    again = FakeDevice()
    assert start(folder, again, monkeypatch) == 0
    assert (again.count("kernels"), again.count("steps")) == (0, 1)  # the trace
    assert "Resuming from" in capsys.readouterr().out


def test_the_journal_of_another_search_is_replaced(folder, monkeypatch, capsys):
    start(folder, FakeDevice(), monkeypatch)
    device = FakeDevice()
    start(folder, device, monkeypatch, "qk_norm_scale=1.1")
    assert device.count("steps") > 10
    assert "was of another search" in capsys.readouterr().out


def test_where_the_defaults_do_not_fit_a_smaller_start_is_taken(folder, monkeypatch, capsys):
    class Small(FakeDevice):
        def __call__(self, task, limit):
            rows = task.get("overrides", {}).get("per_device_batch_size", 32)
            if task["task"] == "steps" and rows > 4:
                self.tasks.append(task)
                return children.Report([], "out of memory")
            if task["task"] == "steps":
                return children.Report([FIRST, {"seconds": 1.0 / rows}], "")
            return super().__call__(task, limit)

    assert start(folder, Small(), monkeypatch) == 0
    values = tuned_file.read(folder / "tuned/some-chip-1-d4.yml")[1]
    assert values["per_device_batch_size"] == 4


def test_where_nothing_runs_the_error_says_why(folder, monkeypatch):
    def run(task, limit):
        if task["task"] == "steps":
            return children.Report([], "out of memory")
        return FakeDevice()(task, limit)

    with pytest.raises(ValueError, match="no settings could be measured: out of memory"):
        start(folder, run, monkeypatch)


def test_bad_input_is_one_line(folder, monkeypatch):
    argv = [BASE, "model=d4", "stage=rl", "load_from=d4"]
    with pytest.raises(ValueError, match="stage=rl: tune.py measures"):
        tune.main(pyconfig.initialize(argv), argv)
    failing = children.Report([{"failure": "d4 needs about 90 GB"}], "d4 needs about 90 GB")
    with pytest.raises(ValueError, match="d4 needs about 90 GB"):
        start(folder, lambda task, limit: failing, monkeypatch)


def test_a_result_is_not_faster_than_noise(folder, monkeypatch):
    """The defaults then stay, and the file says so."""

    def run(task, limit):
        if task["task"] != "steps":
            return FakeDevice()(task, limit)
        return children.Report([FIRST, {"seconds": 1.0 - 0.002 * len(task["overrides"])}], "")

    start(folder, run, monkeypatch)
    path = folder / "tuned/some-chip-1-d4.yml"
    assert tuned_file.read(path)[1] == {} and "The defaults are the fastest" in path.read_text()


@pytest.mark.parametrize(
    "result, problem",
    [
        ({"loss": [6.0, 5.0003], "grad_norm": [1.0, 1.0005]}, ""),
        ({"loss": [6.0, 5.1], "grad_norm": [1.0, 1.0]}, "wrong: loss at step 1"),
        ({"loss": [6.0, 5.0], "grad_norm": [1.0, 1.1]}, "wrong: grad_norm at step 1"),
        ({"loss": [6.0, float("nan")], "grad_norm": [1.0, 1.0]}, "wrong: loss at step 1 is nan"),
    ],
)
def test_losses_must_be_equal_up_to_rounding(result, problem):
    reference = {"loss": [6.0, 5.0], "grad_norm": [1.0, 1.0]}
    assert session.difference(reference, result, "float32").startswith(problem)
    assert bool(session.difference(reference, result, "float32")) == bool(problem)


def test_a_trial_that_only_lacked_time_is_measured_when_there_is_more(tmp_path):
    reports = iter([children.Report([], "timed out after 60 s"), children.Report([], "no")])
    made = session.Session(
        make_config("tune_minutes=0.001"),
        [BASE, *WORDS],
        FACTS,
        Journal(tmp_path / "journal", {}),
        lambda task, limit: next(reports),
    )
    assert made.measure(Trial({}, 3)).failure == "timed out after 60 s"
    assert made.measure(Trial({}, 3)).failure == "no"
    assert made.measure(Trial({}, 3)).failure == "no"  # from the journal


# ---- A process of its own -----------------------------------------------------------------------

PROGRAM = """
import json, os, signal, sys, time
task = json.loads(sys.stdin.readline())
def answer(values):
    with open(task["answers"], "a") as file:
        file.write(json.dumps(values) + chr(10))
answer({"first": 1})
if task["do"] == "crash": os.kill(os.getpid(), signal.SIGABRT)
if task["do"] == "hang": time.sleep(600)
if task["do"] == "full": print("RESOURCE_EXHAUSTED: Out of memory"); sys.exit(1)
if task["do"] == "raise": print("Traceback"); print("KeyError: 7"); sys.exit(1)
if task["do"] == "refuse": answer({"failure": "too large"}); sys.exit(2)
answer({"second": 2})
"""


@pytest.mark.parametrize(
    "what, failure",
    [
        ("end", ""),
        ("crash", "ended with signal 6: no output"),
        ("hang", "timed out after 1 s"),
        ("full", "out of memory"),
        ("raise", "ended with status 1: KeyError: 7"),
        ("refuse", "too large"),
    ],
)
def test_what_a_process_did(what, failure):
    limit = 1.0 if what == "hang" else 60.0
    report = children.run({"do": what}, limit, (sys.executable, "-c", PROGRAM))
    assert report.failure == failure
    if what != "hang":  # it may have been slow to start
        assert report.answer["first"] == 1
    assert ("second" in report.answer) == (what == "end")


def test_a_process_ends_with_the_search():
    """However the search ends: then nothing holds the other end of stdin."""
    code = "from MaxNano.tuning import children; children.end_with_parent(); print(1, flush=True)"
    code += "; import time; time.sleep(600)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"1\n"
    process.stdin.close()
    assert process.wait(60) == children.FATAL_STATUS
    process.stdout.close()


# ---- Kernels ------------------------------------------------------------------------------------

SMALL = ("model=d2", "emb_dim=32", "head_dim=16", "num_query_heads=2", "max_target_length=64")


def small_config(*words):
    return pyconfig.initialize([BASE, *SMALL, "short_window_multiple=8", "vocab_size=64", *words])


def test_a_correct_kernel_passes_and_a_wrong_one_does_not(monkeypatch):
    monkeypatch.setattr(kernels, "CALLS", 1)
    monkeypatch.setattr(kernels, "LEAST_SECONDS", 0)
    right = kernels.check(small_config("attention=chunked", "num_decoder_layers=1"))
    assert right["problem"] == "" and right["error"] < 1 and right["milliseconds"] > 0

    def wrong(q, k, v, window, settings, rules):
        """One key too many, and no gradient of the values."""
        return attention.reference(q, k, jax.lax.stop_gradient(v), window + 1, settings, rules)

    row = attention.Kernel(wrong, attention.EVERYWHERE)
    monkeypatch.setitem(attention.KERNELS, "chunked", row)
    errors, _ = kernels.attention_error(small_config("attention=chunked"), 8, "float32")
    assert errors["output (window 8)"] > 1 and errors["gradient of qkv (window 8)"] > 1
    assert errors["gradient of value embeddings (window 8)"] > 1
    monkeypatch.setattr(kernels, "attention_error", lambda *_: (errors, 0.001))
    result = kernels.check(small_config("attention=chunked"))
    assert "(window 8) differs from the reference by" in result["problem"] and result["error"] > 1


def test_the_error_of_a_kernel_is_relative_to_that_of_the_reference_in_its_dtype():
    exact = {"out": jnp.ones(100)}
    plain = {"out": 1.01 * jnp.ones(100)}
    for factor, expected in ((1.01, 0.5), (1.04, 2.0), (float("nan"), None)):
        error = kernels.excess({"out": factor * jnp.ones(100)}, plain, exact, "bfloat16")["out"]
        assert error != error if expected is None else error == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_products_of_layers_are_checked(dtype, monkeypatch):
    monkeypatch.setattr(kernels, "TOKENS", 256)
    words = ("layer_products=pallas", "emb_dim=128", "head_dim=64", f"dtype={dtype}")
    assert kernels.check(small_config(*words))["problem"] == ""
    right = products.in_kernels

    def wrong(config, *, interpret):
        chosen = right(config, interpret=interpret)
        return chosen._replace(mlp=lambda x, weights: chosen.mlp(x, weights) * 1.1)

    monkeypatch.setattr(products, "in_kernels", wrong)
    assert " differs from the reference by " in kernels.check(small_config(*words))["problem"]


def test_embedding_gradients_are_checked():
    assert kernels.check(small_config("embedding_gradient=one_hot"))["problem"] == ""


# ---- A real measurement -------------------------------------------------------------------------


def test_steps_are_measured_and_their_losses_fall(monkeypatch):
    """In this process, as measure.main does it in one of its own."""
    monkeypatch.setattr(kernels, "LEAST_SECONDS", 0)
    words = [BASE, *SMALL, "num_decoder_layers=1", "vocab_size=64", "global_batch_tokens=256"]
    words += ["value_embed_gate_channels=0", "smear_gate_channels=0", "use_backout=false"]
    words += ["short_window_multiple=8", "muon_iterations=1", "steps=1000", "warmup_steps=0"]
    answers = []
    task = {"argv": words, "overrides": {"per_device_batch_size": 4, "remat_names": ["qkv"]}}
    measure.probe(task, answers.append)
    facts = Facts(**answers.pop()["facts"])
    assert (facts.backend, facts.micro_rows, facts.dtype) == ("cpu", 4, "float32")
    assert set(facts.kernels) == {"chunked", "reference"}
    measure.time_steps({**task, "steps": 2, "with_data": False}, answers.append)
    first, second = json.loads(json.dumps(answers))
    assert first["loss"] == sorted(first["loss"], reverse=True) and len(first["grad_norm"]) == 3
    assert second["seconds"] > 0 and second["micro_rows"] == 4


# ---- What train.py uses -------------------------------------------------------------------------

VALUES = {"per_device_batch_size": 4, "remat_policy": "full", "attention": "reference"}


@pytest.fixture
def machine(monkeypatch, folder):
    """Other devices than the tests': 8 x TPU."""
    result = SimpleNamespace(
        devices={"kind": "TPU v6 lite", "count": 8}, versions={"maxnano": "1", "jax": "2"}
    )
    monkeypatch.setattr(checkpoint_identity, "describe", lambda config, fingerprint: vars(result))
    return result


def tuned_config(folder, *words):
    return make_config(f"base_output_directory={folder}/runs", *words)


def write_tuned(folder, *words, name="tpu-v6-lite-8-d4.yml", values=VALUES, versions=None):
    path = folder / "tuned" / name
    result = versions or {"maxnano": "1", "jax": "2"}
    facts = tuned_file.description(tuned_config(folder, *words), "TPU v6 lite", 8, result)
    tuned_file.write(path, facts, values)
    return path


def used(config):
    """The values that come from a tuned file."""
    return {
        key: config[key]
        for key in pyconfig.keys_of(config)
        if config.origin[key].startswith(pyconfig.TUNED_ORIGIN)
    }


def test_auto_uses_the_file_for_these_devices_and_says_so(folder, machine, capsys):
    assert tuned_file.with_tuned(tuned_config(folder)) == tuned_config(folder)
    assert capsys.readouterr().out == ""  # without a file, nothing is said
    path = write_tuned(folder)
    config = tuned_file.with_tuned(tuned_config(folder))
    assert used(config) == VALUES
    assert config.origin["attention"] == "tuned/tpu-v6-lite-8-d4.yml"
    out = capsys.readouterr().out
    assert out.startswith(f"Tuned settings of {path}: per_device_batch_size=4, ")
    assert out.count("\n") == 1
    assert used(tuned_file.with_tuned(tuned_config(folder, "tuned=off"))) == {}


def test_the_command_line_and_the_model_win(folder, machine, capsys):
    write_tuned(folder, "model=d24", name="tpu-v6-lite-8-d24.yml")
    config = tuned_file.with_tuned(tuned_config(folder, "model=d24", "attention=chunked"))
    assert (config.attention, config.remat_policy) == ("chunked", None)
    assert used(config) == {"per_device_batch_size": 4}
    assert "remat_policy, attention as set elsewhere" in capsys.readouterr().out


def test_a_value_of_the_models_file_is_replaced_if_the_search_began_with_it(folder, machine):
    """d24.yml leaves its remat policy to the memory plan."""
    config = tuned_config(folder, "model=d24")
    facts = FACTS._replace(resolved=FACTS.resolved | {"remat_policy": "names"})
    assert {} in names_and_values(config, facts)["remat"]  # "names" is one of those tried
    path = write_tuned(folder, "model=d24", name="tpu-v6-lite-8-d24.yml")
    facts, values = tuned_file.read(path)
    tuned_file.write(path, facts | tuned_file.replaced(config, values), values)
    tuned = tuned_file.with_tuned(config)
    assert used(tuned) == VALUES
    begin(folder, tuned, "d24")
    assert used(tuned_file.with_tuned(config)) == VALUES  # resumed
    path.write_text(path.read_text().replace("replaces: remat_policy=null", "replaces: x=1"))
    fresh = tuned_config(folder, "model=d24", "run_name=fresh")
    assert tuned_file.with_tuned(fresh).remat_policy is None  # the model's file has changed
    given = tuned_config(folder, "model=d24", "run_name=fresh", "remat_policy=minimal")
    assert tuned_file.with_tuned(given).remat_policy == "minimal"


def test_a_file_for_something_else_is_not_used_and_the_reason_is_one_line(folder, machine, capsys):
    write_tuned(folder, "global_batch_tokens=8192")
    assert used(tuned_file.with_tuned(tuned_config(folder))) == {}
    printed = capsys.readouterr()
    assert "workload global_batch_tokens=8192, and this run has global_batch_tokens=4096" in (
        printed.err
    )
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    path = write_tuned(folder, versions={"maxnano": "1", "jax": "3"})
    assert used(tuned_file.with_tuned(tuned_config(folder))) == {}
    assert "versions jax=3, and this run has jax=2" in capsys.readouterr().err
    # By name it is used.
    assert used(tuned_file.with_tuned(tuned_config(folder, f"tuned={path}"))) == VALUES
    assert "although it was measured for versions jax=3" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, problem",
    [
        ("", "is no tuned file, or is damaged"),
        ("attention: reference\n", "is no tuned file, or is damaged"),
        ("{head}matrix_lr: 0.5\n", "sets matrix_lr, which changes more than speed"),
        ("{head}attention: nonsense\n", "attention=nonsense is not one of"),
        ("{head}attentoin: flash\n", "unknown key attentoin"),
        ("{head}attention: [\n", "not YAML"),
        ("{head}xla_flags: [other]\n", "sets xla_flags=other, which is not in xla_flag_groups"),
    ],
)
def test_a_damaged_or_foreign_file_is_one_line(text, problem, folder, machine, capsys):
    path = write_tuned(folder)
    head = path.read_text().split("\n\n")[0] + "\n\n"
    path.write_text(text.replace("{head}", head))
    with pytest.raises(ValueError, match=problem) as error:
        tuned_file.with_tuned(tuned_config(folder, f"tuned={path}"))
    assert "\n" not in str(error.value)
    assert tuned_file.with_tuned(tuned_config(folder)) == tuned_config(folder)
    assert problem in capsys.readouterr().err
    path.write_bytes(b"\xff\xfe\x00")
    assert tuned_file.with_tuned(tuned_config(folder)) == tuned_config(folder)


def test_a_file_that_is_missing_is_one_line(folder, machine):
    with pytest.raises(ValueError, match="nowhere.yml does not exist"):
        tuned_file.with_tuned(tuned_config(folder, "tuned=nowhere.yml"))


def begin(folder, config, name="d4"):
    """A run that was started with a config."""
    pyconfig.save(config, folder / f"runs/{name}/config.yml")
    return tuned_config(folder)


def test_a_run_that_is_resumed_keeps_what_it_began_with(folder, machine, capsys):
    config = begin(folder, tuned_config(folder))
    path = write_tuned(folder)
    assert tuned_file.with_tuned(config) == config  # it began without
    assert f"tuned={path} uses it" in capsys.readouterr().out
    assert used(tuned_file.with_tuned(tuned_config(folder, f"tuned={path}"))) == VALUES
    begin(folder, tuned_file.with_tuned(tuned_config(folder, "run_name=new")))
    write_tuned(folder, values={"attention": "flash", "flash_block": 512})  # tuned again
    assert used(tuned_file.with_tuned(config)) == VALUES
    capsys.readouterr()
    path.unlink()
    assert used(tuned_file.with_tuned(config)) == VALUES
    assert "as at the start of the run: " in capsys.readouterr().out
    changed = tuned_file.with_tuned(tuned_config(folder, "attention=chunked"))
    assert (changed.attention, changed.remat_policy) == ("chunked", "full")
    machine.devices["count"] = 4  # resumed on other devices
    assert used(tuned_file.with_tuned(config)) == {}


def test_the_saved_config_trains_with_the_same_settings(folder, machine):
    write_tuned(folder)
    begin(folder, tuned_file.with_tuned(tuned_config(folder)))
    saved = pyconfig.initialize([str(folder / "runs/d4/config.yml")])
    assert {key: tuned_file.with_tuned(saved)[key] for key in VALUES} == VALUES


def test_other_programs_use_no_settings_of_the_devices_that_trained(folder, machine):
    """Which may not run on theirs; a value of the command line stays."""
    write_tuned(folder)
    begin(folder, tuned_file.with_tuned(tuned_config(folder, "scan_layers=false")))
    (folder / "runs/d4/checkpoints/7").mkdir(parents=True)
    argv = [BASE, "run_name=d4", f"base_output_directory={folder}/runs"]
    config = config_of_run(pyconfig.initialize(argv), argv)
    assert (config.attention, config.remat_policy, config.scan_layers) == ("auto", "none", False)
    assert config.max_target_length == 128
    argv.append("attention=chunked")
    assert config_of_run(pyconfig.initialize(argv), argv).attention == "chunked"


def test_only_keys_that_do_not_change_numbers_are_tuned():
    from MaxNano.training.config_changes import FREE_KEYS

    assert set(candidates.TUNABLE) <= FREE_KEYS and "tuned" in FREE_KEYS


# ---- For real -----------------------------------------------------------------------------------


@pytest.mark.long
def test_a_real_search_on_this_cpu(tmp_path):
    """Its file is used by train.py, and SIGINT in the middle costs nothing that was measured."""
    words = [BASE, *WORDS, "aspect_ratio=16", "head_dim=32", "num_cpu_devices=1"]
    words += [f"base_output_directory={tmp_path}", f"jax_cache_dir={tmp_path}/cache"]
    code = f"""
import sys
from pathlib import Path
from MaxNano import pyconfig, tune, train
from MaxNano.tuning import tuned_file
tuned_file.FOLDER = Path({str(tmp_path / "tuned")!r})
program, words = sys.argv[1], sys.argv[2:]
main = {{"tune": lambda config: tune.main(config, words), "train": train.main}}[program]
sys.exit(pyconfig.launch(main, words))
"""

    def start(program, *extra):
        return subprocess.Popen(
            [sys.executable, "-c", code, program, *words, *extra],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    first = start("tune", "tune_minutes=1.5")
    for line in first.stdout:
        if "ms per step" in line:
            first.send_signal(signal.SIGINT)
            break
    assert "the same command resumes" in first.communicate()[0] and first.returncode == 75
    out = start("tune", "tune_minutes=1.5").communicate()[0]
    assert "Resuming from" in out and "most expensive operations" in out, out
    (row,) = [line for line in out.splitlines() if line.startswith("| 20")]
    assert float(row.split("|")[7]) >= 1.0
    out = start("train", "dry_run=true", "dataset_type=synthetic").communicate()[0]
    assert f"Tuned settings of {tmp_path}/tuned/cpu-1-d4.yml" in out, out
    (journal,) = (tmp_path / "tune").glob("*.jsonl")
    assert all(json.loads(line) for line in journal.read_text().splitlines())

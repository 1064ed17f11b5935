"""Fine-tuning through train.py: the start from another run, the horizon, kill -9, and nanochat's
gradients.
"""

import json
import os
import signal
import time
from pathlib import Path

import jax
import numpy as np
import programs
import pytest
from tuning import GOLDEN, PACKING, check_gradients

from MaxNano import pyconfig
from MaxNano.storage.files import run_directory
from MaxNano.tokenization.bpe import train_bpe
from MaxNano.tokenization.tokenizer import load_tokenizer
from MaxNano.training import start as start_from
from MaxNano.training import state as train_state
from MaxNano.training.checkpointing import Checkpointer
from MaxNano.training.setup import set_up
from MaxNano.training.stages import with_horizon

ROOT = Path(__file__).parents[1]
BASE = str(ROOT / "configs/base.yml")
WORDS = "one two three four five six seven eight nine ten".split()
CONTEXT = 256


def words_of(place, *more):
    """A model with the data of `place`, for every stage."""
    return [
        BASE,
        "model=d2",
        "emb_dim=32",
        "head_dim=16",
        "num_query_heads=2",
        f"max_target_length={CONTEXT}",
        "vocab_size=288",
        "global_batch_tokens=1024",
        "learning_rate_scale=1",
        "data_readers=2",
        "num_cpu_devices=1",
        "packing_buffer_documents=10",
        f"tokenizer_path={place}/tokenizer",
        f"base_output_directory={place}/runs",
        f"jax_cache_dir={os.environ['MAXNANO_TEST_CACHE']}",
        "tensorboard=false",
        *more,
    ]


def sft_words(place, *more):
    return words_of(
        place,
        "stage=sft",
        "load_from=base",
        "chat_interval=0",
        f"chat_train_mixture=[[json:{place}/chat.jsonl, 1], [json:{place}/empty.jsonl, 3]]",
        f"chat_validation_mixture=[[json:{place}/held_out.jsonl, 1]]",
        "eval_interval=4",
        "eval_tokens=4096",
        "checkpoint_interval_steps=2",
        "embedding_lr=1",
        "load_optimizer=false",
        *more,
    )


def say(number, count=None):
    """The n-th conversation: counting on, by two to six words; every ninth is longer than the
    context.
    """
    count = count or (400 if number % 9 == 0 else 2 + number % 5)
    start = number % len(WORDS)
    counted = " ".join(WORDS[(start + i) % len(WORDS)] for i in range(count))
    return [{"role": "user", "content": WORDS[start]}, {"role": "assistant", "content": counted}]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(folder, state): conversations, a tokenizer and a base run of which nothing but its
    checkpoint is there.

    The state is the one with which a run in it would begin by itself; the checkpoint has more in
    its optimizer's.
    """
    folder = tmp_path_factory.mktemp("sft")
    (folder / "chat.jsonl").write_text("".join(json.dumps(say(n)) + "\n" for n in range(160)))
    (folder / "held_out.jsonl").write_text("".join(json.dumps(say(n, 7)) + "\n" for n in range(30)))
    (folder / "empty.jsonl").write_text("")
    train_bpe([" ".join(WORDS)] * 9, 288).save(folder / "tokenizer")
    config, setup = make_setup(folder)
    state = train_state.initialize(config, setup.numerics, setup.optimizer, setup.abstract)
    opt_state = jax.tree.map(lambda x: x + np.ones((), x.dtype), state.opt_state)
    with Checkpointer(
        config, folder / "runs/base", tokenizer_fingerprint=load_tokenizer(config).fingerprint()
    ) as checkpointer:
        checkpointer.save(7, train_state.TrainState(state.step + 7, state.params, opt_state), {})
    return folder, jax.device_get(state)


@pytest.fixture(scope="module")
def place(base):
    """The folder."""
    return base[0]


def make_setup(place, *more):
    config = pyconfig.initialize(words_of(place, *more))
    return config, set_up(config, jax.devices()[:1])


def start(*words, pause=0):
    """train.py, with a pause of so many seconds before each step."""
    return programs.start(ROOT / "tests/slow_train.py", pause, *words)


def run(*words, status=0):
    return programs.finish(start(*words), status)


def rows_of(place, run_name):
    return programs.rows_of(place / "runs" / run_name)


def losses_of(place, run_name):
    return [(r["step"], r["loss"], r["bpb"]) for r in rows_of(place, run_name) if "event" not in r]


# ---- The start from another run -----------------------------------------------------------------


@pytest.mark.parametrize("load_optimizer", [True, False])
def test_a_run_starts_with_another_ones_checkpoint(base, load_optimizer):
    place, fresh = base
    config, setup = make_setup(
        place, "stage=sft", "load_from=base", f"load_optimizer={load_optimizer}"
    )
    assert config.run_name == "d2_sft"
    state, _ = start_from.load_start(setup, load_tokenizer(config).fingerprint())
    assert int(state.step) == 0
    jax.tree.map(np.testing.assert_array_equal, state.params, fresh.params)
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x, y + load_optimizer),
        state.opt_state,
        fresh.opt_state,
    )
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(
        lambda x: x.sharding, setup.abstract
    )


def test_a_path_names_a_run_too(place):
    config, setup = make_setup(place, f"load_from={place}/runs/base", "run_name=other")
    assert int(start_from.load_start(setup, "")[0].step) == 0


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["load_from=nowhere"], "nowhere has no finished checkpoint"),
        (
            ["load_from=base", "run_name=base"],
            "load_from=base is the folder of this run itself; choose another",
        ),
        (["load_from=base", "mlp_dim=64"], "mlp_dim is 128 in the checkpoint of .*base but 64 now"),
        (["load_from=base", "rope_theta=1000"], "rope_theta is 100000.0 in the checkpoint"),
        (
            ["load_from=base", "window_pattern=L"],
            r"are \(256, 256\) .* window_pattern=SSSL short_window_fraction=0.5",
        ),
        (
            ["load_from=base", "max_target_length=512", "short_window_fraction=0.5"],
            "short_window_fraction=0.25$",
        ),
    ],
)
def test_a_start_that_cannot_be_is_one_line(place, words, problem):
    _, setup = make_setup(place, *words)
    with pytest.raises(ValueError, match=problem) as error:
        start_from.load_start(setup, "")
    assert "\n" not in str(error.value)


def test_another_tokenizer_is_refused(place):
    _, setup = make_setup(place, "load_from=base")
    with pytest.raises(ValueError, match="tokenizer"):
        start_from.load_start(setup, "f" * 64)


@pytest.mark.parametrize("length", [64, 128, 512])
def test_the_context_may_change_if_the_windows_stay(place, length):
    """At 64 tokens every layer sees all; the suggestion of the error is what works."""
    saved = pyconfig.initialize(words_of(place))
    words = words_of(place, "load_from=base", f"max_target_length={length}")
    fraction = min(1, 128 / length)
    start_from.check_windows(
        pyconfig.initialize([*words, f"short_window_fraction={fraction}"]), saved
    )


def test_a_run_goes_on_only_from_where_it_started(place):
    config = pyconfig.initialize(sft_words(place))
    start_from.check_start(config, {"load_from": "base"})
    with pytest.raises(
        ValueError, match="d2_sft was started from other, not from base; choose another run_name"
    ):
        start_from.check_start(config, {"load_from": "other"})
    with pytest.raises(ValueError, match="from random parameters, not from base"):
        start_from.check_start(config, {})


def test_a_run_that_goes_on_need_not_be_told_again_where_it_started(place, tmp_path):
    words = [*sft_words(place), f"base_output_directory={tmp_path}"]
    again = pyconfig.initialize([word for word in words if not word.startswith("load_from=")])
    assert start_from.with_start(again).load_from is None, "a new run"
    config = pyconfig.initialize(words)
    run_directory(config).mkdir(parents=True)
    pyconfig.save(config, run_directory(config) / "config.yml")
    assert start_from.with_start(again).load_from == "base"


# ---- Whole runs ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(place):
    """A run that nothing interrupted; 160 conversations, of which 18 are longer than the context."""
    chat = [
        "chat_interval=8",
        "chat_tasks=[SimpleSpelling/test]",
        "chat_interval_generative=2",
        "max_new_tokens=4",
    ]
    out, _ = run(*sft_words(place, "chat_epochs=2", *chat, "chat_slots=2"))
    return out


def test_fine_tuning_lowers_the_loss_of_conversations(place, whole):
    losses = losses_of(place, "d2_sft")
    assert losses[-1][1] < losses[0][1] - 0.5
    rows = rows_of(place, "d2_sft")
    validation = [row for row in rows if row.get("event") == "validation"]
    assert validation[-1]["bpb"] < 0.9 * validation[0]["bpb"]
    assert [row["step"] for row in validation] == [*range(0, len(losses), 4), len(losses)]
    last = [row for row in rows if "event" not in row][-1]
    assert last["lr_multiplier"] < 0.2, "down to nothing at the end of the last pass"
    assert last["epoch"] in (2, 3), "what is buffered is of the next pass already"
    assert last["conversations_cut"] >= 18
    assert "Starting from step 7 of" in whole and "conversations cut" in whole
    assert "chat_epochs" in whole and f"{len(losses)} steps" in whole
    assert (place / "runs/base/checkpoints/7").exists() and not (
        place / "runs/base/metrics.jsonl"
    ).exists()


def test_chat_tasks_are_asked_at_intervals(place, whole):
    rows = rows_of(place, "d2_sft")
    last = max(row["step"] for row in rows)
    told = {row["step"]: row["SimpleSpelling/test"] for row in rows if row.get("event") == "chat"}
    assert told == dict.fromkeys(range(8, last, 8), 0.0) | {last: 0.0}, (
        "nobody spells in four tokens"
    )
    records = place / f"runs/d2_sft/evals/step_{last:06}/SimpleSpelling-test.jsonl"
    asked = [
        json.loads(line)["messages"][0]["content"] for line in records.read_text().splitlines()
    ]
    assert len(asked) == 2 and all(question.startswith("Spell the word: ") for question in asked)


def wait_for_step(place, run_name, step, process):
    path = place / "runs" / run_name / "metrics.jsonl"
    for _ in range(12_000):
        if process.poll() is not None:
            break
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"never saw step {step}: {process.communicate()}")


@pytest.mark.slow
def test_killed_it_goes_on_bit_for_bit(place, whole):
    words = sft_words(place, "chat_epochs=2", "run_name=killed")
    process = start(*words, pause=0.2)
    wait_for_step(place, "killed", 5, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    out, _ = run(*words)
    assert "Resuming" in out
    assert losses_of(place, "killed") == losses_of(place, "d2_sft")
    assert [r for r in rows_of(place, "killed") if r.get("event") == "validation"] == [
        r for r in rows_of(place, "d2_sft") if r.get("event") == "validation"
    ]


def test_the_base_runs_own_config_can_come_first(place):
    """It brings the model's keys; steps and folder are those of the new stage."""
    config = pyconfig.initialize(words_of(place, "run_name=base", "steps=99", "window_pattern=L"))
    path = place / "config.yml"
    pyconfig.save(config, path)
    later = pyconfig.initialize([str(path), "stage=sft", "load_from=base"])
    assert (later.window_pattern, later.vocab_size, later.run_name) == ("L", 288, "d2_sft")
    assert later.origin["steps"] == pyconfig.DERIVED and later.warmdown_ratio == 0.5


def test_passes_decide_the_steps(place):
    steps = [
        with_horizon(pyconfig.initialize(sft_words(place, f"chat_epochs={passes}"))).steps
        for passes in (1, 3)
    ]
    assert steps[1] == pytest.approx(3 * steps[0], abs=2)
    asked = pyconfig.initialize(sft_words(place, "steps=5"))
    assert with_horizon(asked) is asked


# ---- nanochat's gradients -----------------------------------------------------------------------


def test_gradients_are_nanochats():
    """Of its first packed batch, in which a part of the targets is ignored."""
    inputs, targets = (np.array(x, np.int32) for x in PACKING["batches"]["1"][0][0])
    assert (targets >= 0).sum() == GOLDEN["sft"]["supervised"]
    batch = {"inputs": inputs, "targets": targets, "weights": np.ones(targets.shape, np.float32)}
    loss = check_gradients(batch, GOLDEN["sft"]["gradients"])
    assert loss == pytest.approx(GOLDEN["sft"]["loss"], rel=1e-6)

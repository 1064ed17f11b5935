"""Reinforcement learning: nanochat's gradients, what is trained and with which weight, resume,
rewards that rise.
"""

import json
import os
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tuning import GOLDEN, check_gradients

from MaxNano import pyconfig
from MaxNano.models import losses
from MaxNano.tasks.arithmetic import Sums
from MaxNano.tokenization.bpe import NANOCHAT_PATTERN, BpeTokenizer
from MaxNano.training import rollouts
from MaxNano.training import state as train_state
from MaxNano.training.checkpointing import Checkpointer
from MaxNano.training.loading import load_engine
from MaxNano.training.setup import set_up
from MaxNano.training.step import score_step

ROOT = Path(__file__).parents[1]
BASE = str(ROOT / "configs/base.yml")
TOKENIZER = BpeTokenizer(NANOCHAT_PATTERN, {bytes([i]): i for i in range(256)})
END = TOKENIZER.special.assistant_end


# ---- Batches ------------------------------------------------------------------------------------


def golden_batch(length):
    groups = [
        [
            rollouts.Rollout(question["prompt"], sample["tokens"], sample["forced"], False, reward)
            for sample, reward in zip(question["samples"], question["rewards"], strict=True)
        ]
        for question in GOLDEN["rl"]["questions"]
    ]
    batch = rollouts.make_batch(groups, length, END)
    return {name: batch[name] for name in ("inputs", "targets", "weights")}


def test_gradients_are_nanochats():
    """Forced tokens among the answers; none of them ends by the token that nanochat does not train."""
    loss = check_gradients(golden_batch(96), GOLDEN["rl"]["gradients"])
    assert loss == pytest.approx(GOLDEN["rl"]["loss"], rel=1e-5)


def test_where_nothing_has_changed_since_the_draw_clipping_and_divergence_change_no_gradient():
    words = [
        "dataset_type=rollouts",
        "rl_problems=2",
        "rl_samples=4",
        "rl_row_tokens=96",
        "rl_clip=0.2",
        "rl_kl=0.5",
    ]

    def complete(setup, params, batch):
        nll = jax.jit(lambda params, batch: score_step(params, batch, setup=setup))(params, batch)
        drawn = jnp.where(jnp.arange(96) % 3, nll, jnp.nan)  # some are not known
        kl_weights = jnp.full_like(nll, 0.5)
        return {**batch, "old_losses": drawn, "reference_losses": nll, "kl_weights": kl_weights}

    check_gradients(golden_batch(96), GOLDEN["rl"]["gradients"], *words, complete=complete)


ANSWERS = st.builds(
    lambda drawn, said, stopped, reward: rollouts.Rollout(
        [1, 2, 3],
        [5] * (drawn + said),
        [False] * drawn + [True] * said,
        stopped,
        reward,
        [-0.5] * (drawn + said),
    ),
    drawn=st.integers(1, 9),
    said=st.integers(0, 3),
    stopped=st.booleans(),
    reward=st.floats(-2, 2),
)


@given(groups=st.lists(st.lists(ANSWERS, min_size=2, max_size=5), min_size=1, max_size=4))
def test_every_problem_counts_alike_and_what_was_drawn_is_trained(groups):
    batch = rollouts.make_batch(groups, 16, END)
    is_target = batch["targets"] >= 0
    answers = [answer for group in groups for answer in group]
    for row, answer in enumerate(answers):
        drawn = len(answer.tokens) - sum(answer.forced)
        expected = [-1, -1, *[5] * drawn, *[-1] * sum(answer.forced), *[END] * answer.stopped]
        assert batch["targets"][row].tolist() == expected + [-1] * (16 - len(expected))
        known = [1, 2, 3, *answer.tokens][
            : 2 + len(answer.tokens) + answer.stopped
        ]  # nothing follows the last one
        assert batch["inputs"][row].tolist() == known + [END] * (16 - len(known))
        assert np.isnan(batch["old_losses"][row]).sum() == 16 - len(answer.tokens)
    assert (batch["weights"][~is_target] == 0).all()
    start = 0
    for group in groups:
        rows = slice(start, start + len(group))
        start += len(group)
        # Of the mean over all targets, each group's tokens make up 1 / len(groups).
        share = batch["shares"][rows].sum() / is_target.sum()
        assert share == pytest.approx(1 / len(groups), rel=1e-5)
        rewards = [answer.reward for answer in group]
        for row, reward in enumerate(rewards, rows.start):
            own = batch["weights"][row][is_target[row]]
            advantage = (reward - np.mean(rewards)) * batch["shares"][row].max()
            np.testing.assert_allclose(own, advantage, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [(1.0, 2, 2), (1.3, 2, 0), (0.7, 2, 1.4), (1.3, -2, -2.6), (0.7, -2, 0)],
)
def test_clipping_stops_what_has_gone_far_enough(ratio, advantage, slope):
    drawn = jnp.float32(1.5)
    now = drawn - jnp.log(ratio)
    gradient = jax.grad(
        lambda x: losses.clipped_policy_losses(x, drawn, jnp.float32(advantage), 0.2)
    )(now)
    assert gradient == pytest.approx(slope, abs=1e-5)


@given(st.floats(0, 9), st.floats(0, 9))
def test_divergence_is_least_where_the_models_agree(loss, reference):
    value = float(losses.divergence(jnp.float32(loss), jnp.float32(reference)))
    assert value >= -1e-3 and losses.divergence(jnp.float32(loss), jnp.float32(loss)) == 0


def test_prompts_that_leave_no_room_are_left_out_and_counted():
    class Odd(Sums):
        def conversation(self, index):
            conversation = super().conversation(index)
            conversation["messages"][0]["content"] += "?" * 50 * (index % 2)
            return conversation

    problems, position = rollouts.next_problems(
        Odd(None, "train"), TOKENIZER, rollouts.ProblemPosition(77, 3), 4, 20
    )
    expected = [Sums(None, "train").conversation(n) for n in (78, 0, 2, 4)]
    assert [p.conversation for p in problems] == expected
    assert position == rollouts.ProblemPosition(85, 7)
    with pytest.raises(ValueError, match="all prompts have 3 tokens or more; raise rl_row_tokens"):
        rollouts.next_problems(Odd(None, "train"), TOKENIZER, rollouts.ProblemPosition(0, 0), 4, 3)


def test_pass_at_k_is_one_right_among_the_first_k():
    right = ([False, True, False], [False, False, False], [True, False, False])
    records = [{"completions": [{"right": one} for one in row]} for row in right] + [
        {"completions": []}
    ]
    assert rollouts.pass_at_k(records, 3) == {"pass@1": 0.25, "pass@2": 0.5, "pass@3": 0.5}


# ---- Whole runs ---------------------------------------------------------------------------------


def words_of(place, *more):
    return [
        BASE,
        "model=d2",
        "emb_dim=32",
        "head_dim=16",
        "num_query_heads=2",
        "max_target_length=32",
        f"vocab_size={TOKENIZER.vocab_size}",
        "num_cpu_devices=1",
        f"tokenizer_path={place}/tokenizer",
        f"base_output_directory={place}/runs",
        f"jax_cache_dir={os.environ['MAXNANO_TEST_CACHE']}",
        "tensorboard=false",
        *more,
    ]


def test_a_task_without_a_reward_is_refused_in_a_line(tmp_path):
    path = tmp_path / "talk.jsonl"
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    path.write_text(json.dumps(talk) + "\n")
    config = pyconfig.initialize(["configs/base.yml", f"rl_task=json:{path}"])
    with pytest.raises(
        ValueError, match="talk.jsonl is for training only; choose a task that grades"
    ):
        rollouts.open_task(config)


def rl_words(place, *more):
    return words_of(
        place,
        "stage=rl",
        "load_from=base",
        "rl_task=Ascii/train",
        "rl_problems=2",
        "rl_samples=8",
        "rl_row_tokens=24",
        "max_new_tokens=12",
        "rl_eval_task=Ascii/test",
        "rl_eval_problems=4",
        "rl_eval_samples=2",
        "eval_interval=6",
        "steps=12",
        "embedding_lr=0.3",
        "unembedding_lr=0.02",
        "matrix_lr=0.02",
        "checkpoint_interval_steps=2",
        *more,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tokenizer and a run of which nothing but its checkpoint is there."""
    folder = tmp_path_factory.mktemp("rl")
    TOKENIZER.save(folder / "tokenizer")
    config = pyconfig.initialize(words_of(folder))
    setup = set_up(config, jax.devices()[:1])
    state = train_state.initialize(config, setup.numerics, setup.optimizer, setup.abstract)
    with Checkpointer(
        config, folder / "runs/base", tokenizer_fingerprint=TOKENIZER.fingerprint()
    ) as checkpointer:
        checkpointer.save(7, state, {})
    return folder


def start(*words):
    return programs.start(ROOT / "tests/toy_rl.py", *words)


def run(*words, status=0):
    return programs.finish(start(*words), status, timeout=3000)


def rows_of(place, run_name):
    return programs.rows_of(place / "runs" / run_name)


def steps_of(place, run_name):
    return [
        (r["step"], r["loss"], r["reward"]) for r in rows_of(place, run_name) if "event" not in r
    ]


@pytest.fixture(scope="module")
def whole(place):
    """A run that nothing interrupted, with clipping and divergence."""
    out, _ = run(*rl_words(place, "rl_clip=0.2", "rl_kl=0.01"))
    return out


def test_rewards_rise_and_are_told(place, whole):
    steps = steps_of(place, "d2_rl")
    rewards = [reward for *_, reward in steps]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.1
    validation = [row for row in rows_of(place, "d2_rl") if row.get("event") == "validation"]
    assert [row["step"] for row in validation] == [0, 6, 12]
    assert all(row["pass@1"] <= row["pass@2"] <= 1 for row in validation)
    assert "reward 0." in whole and "8 answers to each of 2 problems of Ascii/train" in whole


def test_its_checkpoint_can_be_talked_to(place, whole):
    config = pyconfig.initialize([str(place / "runs/d2_rl/config.yml")])
    engine = load_engine(config, devices=jax.devices()[:1])
    assert engine.max_length == 32, "the model's context, not that of the rollouts"


@pytest.mark.slow
def test_killed_it_goes_on_bit_for_bit(place, whole):
    words = rl_words(place, "rl_clip=0.2", "rl_kl=0.01", "run_name=killed")
    process = start(*words)
    path = place / "runs/killed/metrics.jsonl"
    while not (path.exists() and '"step": 5,' in path.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    out, _ = run(*words)
    assert "Resuming" in out
    assert steps_of(place, "killed") == steps_of(place, "d2_rl")


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_sums_by_the_calculator_are_learned_from_reward(place, tmp_path, seed):
    """Fine-tuning teaches to call the calculator with any digits, reinforcement learning with the
    right ones: also for the 20 sums that it never trains on.
    """
    common = [
        f"base_output_directory={tmp_path}/runs",
        f"seed={seed}",
        "emb_dim=64",
        "num_query_heads=4",
    ]
    run(
        *words_of(
            place,
            *common,
            "stage=sft",
            "chat_train_mixture=[[Sums/guess, 1]]",
            "chat_validation_mixture=[[Sums/guess, 1]]",
            "global_batch_tokens=2048",
            "learning_rate_scale=1",
            "eval_tokens=2048",
            "data_readers=1",
            "chat_interval=0",
            "chat_epochs=3",
        )
    )
    out, _ = run(
        *words_of(
            place,
            *common,
            "stage=rl",
            "load_from=d2_sft",
            "rl_task=Sums/train",
            "rl_problems=25",
            "rl_samples=16",
            "rl_row_tokens=24",
            "max_new_tokens=14",
            "rl_eval_task=Sums/test",
            "rl_eval_problems=0",
            "rl_eval_samples=4",
            "eval_interval=20",
            "steps=60",
            "chat_slots=64",
            "embedding_lr=0.02",
            "unembedding_lr=0.002",
            "matrix_lr=0.005",
        )
    )
    first, *_ = (row for row in rows_of(tmp_path, "d2_rl") if "event" not in row)
    assert first["stopped"] > 0.9, "fine-tuning has taught it to end its turn"
    rewards = [reward for *_, reward in steps_of(tmp_path, "d2_rl")]
    assert rewards[0] < 0.2 and np.mean(rewards[-5:]) > 0.8, rewards
    first, *_, last = [
        row["pass@1"] for row in rows_of(tmp_path, "d2_rl") if row.get("event") == "validation"
    ]
    assert first < 0.4 and last > 0.8, out  # 20 problems, the first sample of each

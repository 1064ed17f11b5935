"""Chat tasks: the letter that the model finds likeliest, answers in words, records, going on after
a kill, ChatCORE.
"""

import contextlib
import io
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from test_tasks import folder  # noqa: F401 (a fixture)

from MaxNano import evaluate, pyconfig, tasks
from MaxNano.evals import chat, core
from MaxNano.inference import chat_tasks
from MaxNano.inference.requests import Completion
from MaxNano.tokenization.bpe import NANOCHAT_PATTERN, BpeTokenizer
from MaxNano.tools import sandbox
from MaxNano.training import state as train_state
from MaxNano.training.checkpointing import Checkpointer
from MaxNano.training.setup import set_up

ROOT = Path(__file__).parents[1]
BASE = str(ROOT / "configs/base.yml")
TOKENIZER = BpeTokenizer(NANOCHAT_PATTERN, {bytes([i]): i for i in range(256)})
LETTERED, SPOKEN = ("ARC-Easy/test", "MMLU/test"), ("GSM8K/test", "HumanEval/test")
NO_LIMITS = {"categorical": 0, "generative": 0}


class ListTask(tasks.Task):
    """Problems from a list of (question, answer); right is what holds the answer."""

    kind = "generative"

    def __init__(self, problems):
        self.problems = problems

    def __len__(self):
        return len(self.problems)

    def conversation(self, index):
        question, answer = self.problems[index]
        return {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        }

    def evaluate(self, conversation, completion):
        return conversation["messages"][-1]["content"] in completion


# ---- Without a model ----------------------------------------------------------------------------


def problems_of(folder, name):  # noqa: F811
    config = SimpleNamespace(chat_data=str(folder), chat_word_list=None)
    return chat_tasks.load_problems(config, name, TOKENIZER, NO_LIMITS)


@pytest.mark.parametrize("name", LETTERED)
def test_the_likeliest_letter_of_the_problem_is_what_is_said(folder, name):  # noqa: F811
    """Likelier tokens that are none of its letters do not count; the letters may be digits, and two
    to five.
    """
    problems = problems_of(folder, name)
    favorite = iter([0.5, 0.7, 0.6, 0.9, 0.8] * 2)
    rank = {letter: next(favorite) for letter in "ABCDE1234"}

    def forward(tokens):
        logits = np.zeros((*tokens.shape, TOKENIZER.vocab_size), np.float32)
        logits[..., ord("z")] = 9
        for letter, value in rank.items():
            logits[..., ord(letter)] = value
        return logits

    records = chat.choose_letters(
        problems, TOKENIZER, core.logits_scorer(forward, TOKENIZER.bos_id)
    )
    assert [record["problem"] for record in records] == list(range(len(problems.prompts)))
    for record, conversation in zip(records, problems.conversations, strict=True):
        letters = list(conversation["letters"])
        assert record["said"] == max(letters, key=rank.get)
        assert (
            record["right"] == (record["said"] == record["answer"])
            and list(record["losses"]) == letters
        )
        assert record["messages"] == conversation["messages"][:-1]


class Engine:
    """Says what the test says."""

    def __init__(self, texts, max_length=100):
        self.tokenizer, self.texts, self.max_length = TOKENIZER, texts, max_length
        self.requests = []

    def generate(self, requests, on_step):
        self.requests = list(requests)
        on_step()
        return [
            [Completion(TOKENIZER.encode(text), finish="stop") for text in self.texts[r.seed]]
            for r in requests
        ]


def test_one_right_answer_of_several_is_enough_and_a_long_prompt_is_wrong():
    task = ListTask([("a?", "yes"), ("b" * 200, "yes"), ("c?", "yes")])
    conversations = [task.conversation(index) for index in range(3)]
    problems = chat_tasks.ProblemSet(
        "list", task, conversations, [TOKENIZER.render_for_completion(c) for c in conversations]
    )
    engine = Engine({7: ["no", "yes"], 9: ["no", "never"]})
    steps = []
    records = chat_tasks.generate_answers(
        problems,
        engine,
        samples=2,
        temperature=0.5,
        top_k=3,
        max_tokens=9,
        seed=7,
        on_step=lambda: steps.append(1),
    )
    assert [record["right"] for record in records] == [True, False, False]
    assert [[c["right"] for c in record["completions"]] for record in records] == [
        [False, True],
        [],
        [False, False],
    ]
    assert records[0]["completions"][1] == {
        "text": "yes",
        "tokens": 3,
        "finish": "stop",
        "right": True,
    }
    first = engine.requests[0]
    assert (first.samples, first.temperature, first.top_k, first.max_tokens, first.tools) == (
        2,
        0.5,
        3,
        9,
        True,
    )
    assert first.stop_ids == {TOKENIZER.special.assistant_end, TOKENIZER.special.bos} and steps


def test_chatcore_is_the_mean_of_its_five_tasks_centered_on_guessing():
    centered = dict(zip(chat.CHATCORE, (0.1, 0.2, 0.3, 0.4, 0.5), strict=True))
    found = {name: {"centered": value} for name, value in centered.items()}
    assert chat.chatcore({**found, "SpellingBee/test": {"centered": 1.0}}) == pytest.approx(
        {"chatcore": 0.3, "chatcore_categorical": 0.2}
    )
    del found["GSM8K/test"]
    assert chat.chatcore(found) == pytest.approx({"chatcore_categorical": 0.2})
    del found["MMLU/test"]
    assert chat.chatcore(found) == {}


def test_what_cannot_be_asked_is_one_line(folder):  # noqa: F811
    with pytest.raises(ValueError, match="SmolTalk/train is for training only"):
        problems_of(folder, "SmolTalk/train")
    tasks.TASKS["none"] = lambda config, argument: ListTask([])
    try:
        with pytest.raises(ValueError, match="none/x has no problems"):
            problems_of(folder, "none/x")
    finally:
        del tasks.TASKS["none"]


# ---- evaluate.py --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run with one checkpoint, saved by hand, that talks in turns."""
    base = tmp_path_factory.mktemp("place")
    TOKENIZER.save(base / "tokenizer")
    config = pyconfig.initialize(
        [
            BASE,
            "model=d2",
            "emb_dim=32",
            "head_dim=16",
            "num_query_heads=2",
            "max_target_length=256",
            "stage=sft",
            f"vocab_size={TOKENIZER.vocab_size}",
            "run_name=run",
            f"base_output_directory={base}/runs",
            "num_cpu_devices=1",
            f"tokenizer_path={base}/tokenizer",
            "global_batch_tokens=256",
            "steps=1",
            "max_new_tokens=6",
            "chat_slots=4",
            f"chat_tasks=[{', '.join((*LETTERED, *SPOKEN))}]",
            "jax_cache_dir=''",
        ]
    )
    setup = set_up(config, jax.devices()[:1])
    state = train_state.initialize(config, setup.numerics, setup.optimizer, setup.abstract)
    params = state.params | {"lm_head": 30 * state.params["lm_head"]}  # opinions
    with Checkpointer(
        config, base / "runs/run", tokenizer_fingerprint=TOKENIZER.fingerprint()
    ) as checkpointer:
        checkpointer.save(7, train_state.TrainState(state.step, params, state.opt_state), {})
    pyconfig.save(config, base / "runs/run/config.yml")
    return base, setup, params


def run(place, folder, *more):  # noqa: F811
    argv = [
        BASE,
        "model=d2",
        "run_name=run",
        f"base_output_directory={place}/runs",
        "evals=chat",
        f"chat_data={folder}",
        *more,
    ]
    return pyconfig.launch(lambda config: evaluate.main(config, argv), argv)


@pytest.fixture(scope="module")
def evaluated(place, folder):  # noqa: F811
    """What an evaluation that was killed midway and started again has left: (folder, what it
    printed).
    """
    base, *_ = place
    directory = base / "runs/run/evals"
    make = set_up

    def dying(*arguments, **options):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        # What the entry point changes of JAX's settings belongs to a process of its own.
        patch.setattr(evaluate.runtime, "initialize", lambda config: None)
        patch.setattr(evaluate, "set_up", lambda config: make(config, jax.devices()[:1]))
        with pytest.MonkeyPatch.context() as first:
            first.setattr(chat, "generate_answers", dying)
            assert run(base, folder) == 130
        finished = json.loads((directory / "step_000007.json").read_text())["evals"]
        assert set(finished) == {f"chat {name}" for name in LETTERED}
        patch.setattr(chat, "choose_letters", dying)
        assert run(base, folder) == 0
    return directory, out.getvalue()


def records_of(directory, name):
    lines = (directory / "step_000007" / f"{name.replace('/', '-')}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_with_the_task_that_was_under_way(evaluated, folder):  # noqa: F811
    directory, out = evaluated
    assert all(f"{name} is already done" in out for name in LETTERED)
    evals = json.loads((directory / "step_000007.json").read_text())["evals"]
    assert evals["chat"]["values"] == {}, "no ChatCORE without ARC-Challenge"
    judged = list(SPOKEN)
    try:
        sandbox.working_mechanism()
    except sandbox.SandboxError:
        assert "HumanEval/test is left out: no sandbox works" in out
        judged.remove("HumanEval/test")
    for name in (*LETTERED, *judged):
        records, values = records_of(directory, name), evals[f"chat {name}"]["values"]
        assert values["problems"] == len(records) == len(problems_of(folder, name).prompts)
        assert values["accuracy"] == np.mean([record["right"] for record in records])
        baseline = 0.25 if name in LETTERED else 0
        assert values["centered"] == pytest.approx((values["accuracy"] - baseline) / (1 - baseline))
    for name in judged:
        completions = [
            one for record in records_of(directory, name) for one in record["completions"]
        ]
        assert completions and all(one["text"] and one["tokens"] <= 6 for one in completions)


def test_the_losses_of_letters_are_the_whole_models(place, evaluated, folder):  # noqa: F811
    """At the last token of each prompt."""
    _, setup, params = place
    problems = problems_of(folder, "ARC-Easy/test")
    tokens = np.full(
        (len(problems.prompts), max(map(len, problems.prompts))), TOKENIZER.bos_id, np.int32
    )
    for row, prompt in zip(tokens, problems.prompts, strict=True):
        row[: len(prompt)] = prompt
    last = [len(prompt) - 1 for prompt in problems.prompts]

    @jax.jit
    def logprobs(params):
        bound = setup.model.bind(params)
        hidden = bound(tokens)[np.arange(len(tokens)), np.array(last)]
        return jax.nn.log_softmax(bound.logits(hidden[:, None])[:, 0])

    for record, row in zip(
        records_of(evaluated[0], "ARC-Easy/test"), np.asarray(logprobs(params)), strict=True
    ):
        for letter, loss in record["losses"].items():
            assert loss == pytest.approx(-row[ord(letter)], abs=1e-4)
        assert len({round(loss, 3) for loss in record["losses"].values()}) > 1

"""CORE: prompts, draws and choices are nanochat's; the shared prefix changes no number; bundles and
their faults.

tests/golden holds its answers, on invented tasks (core_small) and on the real ones (core_real): see
the README there.
"""

import collections
import csv
import io
import json
import lzma
import os
import random
import tarfile
import zipfile
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_nanochat_reference import hashed

from MaxNano import pyconfig
from MaxNano.distributed import hardware
from MaxNano.evals import core, core_tasks
from MaxNano.inference import prefix_scoring
from MaxNano.inference.prompts import Prompt
from MaxNano.interop import nanochat
from MaxNano.tokenization.tokenizer import load_tokenizer_from
from MaxNano.training.setup import set_up

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests/golden"
# Compiling fast matters more here than running fast.


def make_setup(*words):
    quick = ("num_cpu_devices=1",)
    config = pyconfig.initialize([str(ROOT / "configs/base.yml"), *quick, *words])
    return set_up(config, jax.devices()[:1])


def from_formula(setup, scales):
    """Parameters by the formula of test_nanochat_reference, some of them larger."""
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), setup.model.shapes)
    arrays = {}
    for index, (name, like) in enumerate(sorted(nanochat.from_params(zeros, setup.config).items())):
        values = scales.get(name, 1) * hashed(like.size, index) + (name == "resid_lambdas")
        arrays[name] = values.reshape(like.shape).astype(np.float32)
    params = nanochat.to_params(arrays, setup.config)
    return jax.tree.map(
        lambda leaf, like: jax.device_put(leaf, like.sharding), params, setup.abstract.params
    )


def whole_rows(setup, params, bos_id):
    """The scorer that runs the model as it is over whole rows."""
    params = jax.device_get(params)

    @partial(jax.jit, compiler_options=hardware.compiler_options(setup.config, "cpu"))
    def forward(tokens):
        bound = setup.model.bind(params)
        return bound.logits(bound(tokens))

    def padded(tokens):  # few shapes to compile
        size = -(-tokens.shape[1] // 256) * 256
        return forward(np.pad(tokens, ((0, -len(tokens) % 2), (0, size - tokens.shape[1]))))[
            : len(tokens)
        ]

    return core.logits_scorer(padded, bos_id)


# ---- Against nanochat ---------------------------------------------------------------------------


@pytest.fixture
def few_shapes(monkeypatch):
    """Columns for everything, so that little is compiled."""
    monkeypatch.setattr(prefix_scoring, "SMALLEST_PREFIX", 1024)
    monkeypatch.setattr(prefix_scoring, "SMALLEST_BRANCH", 128)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The invented bundle, its tokenizer, and the model whose answers are recorded."""
    folder = tmp_path_factory.mktemp("tokenizer")
    with zipfile.ZipFile(GOLDEN / "core_small.zip") as archive:
        archive.extract("tokenizer.json", folder)
    tokenizer = load_tokenizer_from("bpe", folder)
    setup = make_setup(
        "max_target_length=256",
        "vocab_size=320",
        "num_decoder_layers=4",
        "emb_dim=32",
        "num_query_heads=2",
        "head_dim=16",
        "global_batch_tokens=512",
        "steps=1",
        "core_batch_tokens=4096",
        "attention_chunk=640",
    )
    params = from_formula(setup, {"lm_head.weight": 4, "transformer.wte.weight": 4})
    return setup, tokenizer, params


@pytest.mark.parametrize("limit", [3, pytest.param(None, marks=pytest.mark.long)])
def test_every_answer_is_nanochats(small, few_shapes, limit):
    """All 22 tasks; of each the first questions, with examples from all of them."""
    setup, tokenizer, params = small
    golden = json.loads((GOLDEN / "core_small.json").read_text())
    tasks = core_tasks.load_bundle(GOLDEN / "core_small.zip")
    assert [task.label for task in tasks] == list(golden["tasks"])
    score = prefix_scoring.PrefixScorer(setup, tokenizer.bos_id).bind(params)
    right = collections.Counter()
    for task in tasks:
        questions, expected = task.questions(), golden["tasks"][task.label]
        prompts = core_tasks.build_prompts(task, questions, tokenizer, limit=limit)
        answers = core.answer(task, questions, prompts, score)
        found = "".join("01"[answer.correct] for answer in answers)
        assert found == expected["correct"][:limit], task.label
        right[task.kind] += found.count("1")
        for answer, losses in zip(answers, expected.get("losses", []), strict=False):
            np.testing.assert_allclose(answer.losses, losses, atol=1e-4, err_msg=task.label)
    assert right.keys() == set(core_tasks.FIELDS), "a kind without a right answer tests nothing"


def test_the_recorded_score_is_that_of_the_recorded_answers():
    golden = json.loads((GOLDEN / "core_small.json").read_text())
    centered = {}
    for task in core_tasks.load_bundle(GOLDEN / "core_small.zip"):
        correct = golden["tasks"][task.label]["correct"]
        assert len(correct) == len(task.questions())
        centered[task.label] = core_tasks.center(correct.count("1") / len(correct), task.baseline)
        assert centered[task.label] == pytest.approx(
            golden["tasks"][task.label]["centered"], abs=1e-9
        )
    assert core_tasks.core_score(centered) == pytest.approx(golden["core"], abs=1e-9)


@pytest.mark.slow
def test_the_shared_prefix_changes_no_number(few_shapes):
    setup = shared_prefix_setup()
    check_shared_prefixes(setup, from_formula(setup, {}))


def shared_prefix_setup():
    """Layers in a scan, grouped heads, and windows shorter than the prompts."""
    return make_setup(
        "max_target_length=24",
        "vocab_size=50",
        "num_decoder_layers=6",
        "window_pattern=SL",
        "emb_dim=32",
        "num_query_heads=4",
        "num_kv_heads=2",
        "head_dim=8",
        "short_window_multiple=4",
        "attention_chunk=40",
        "attention=reference",
        "global_batch_tokens=48",
        "steps=1",
        "core_batch_tokens=600",
    )


def check_shared_prefixes(setup, params):
    """Prompts of all lengths have the losses of the whole model over whole rows."""
    rng = np.random.default_rng(0)
    prompts = []
    for prefix, *lengths in (
        (0, 5, 7),
        (3, 9, 4),
        (60, 12, 3),
        (200, 6, 2),
        (97, 30, 3),
        (20, 50, 8),
        (128, 2, 2),
    ):
        rows = [rng.integers(0, 49, length, np.int32) for length in lengths]
        rows[1][0] = rows[0][0]
        prompts.append(Prompt(rng.integers(0, 49, prefix, np.int32), tuple(rows), (1, 1), (0, 1)))
    score = prefix_scoring.PrefixScorer(setup, 49).bind(params)
    expected = dict(whole_rows(setup, params, 49)(prompts, greedy=False))
    scores = dict(score(prompts, greedy=False))
    assert scores.keys() == expected.keys()
    for index, rows in expected.items():
        for row, other in zip(rows, scores[index], strict=True):
            np.testing.assert_allclose(other, row, atol=1e-5)


def test_a_scorer_from_logits():
    """Losses are of the scored tokens, from the position before; greedy ones are the largest
    logit's.
    """
    logits = np.log([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.2, 0.2, 0.6]]).astype(np.float32)
    score = core.logits_scorer(lambda tokens: logits[tokens], bos_id=0)
    prompt = Prompt(np.array([0]), (np.array([1, 1, 2, 2]), np.array([1, 0])), (1, 1), (0, 1))
    [(index, losses)] = score([prompt], greedy=False)
    assert index == 0
    np.testing.assert_allclose(np.exp(-losses[0]), [0.5, 0.25, 0.6], rtol=1e-6)
    np.testing.assert_allclose(np.exp(-losses[1]), [0.25], rtol=1e-6)
    [(_, right)] = score([prompt], greedy=True)
    assert [row.tolist() for row in right] == [[True, False, True], [False]]


# ---- Prompts ------------------------------------------------------------------------------------


def task_of(kind, *questions, shots=0, delimiter=" "):
    content = "".join(json.dumps(question) + "\n" for question in questions).encode()
    return core_tasks.CoreTask("invented", kind, shots, delimiter, 0.25, content)


class Letters:
    """A token per character; <bos> is 0."""

    def encode_batch(self, texts, bos):
        return [np.array([0, *map(ord, text)], np.int32) for text in texts]


def text_of(ids):
    return "".join(map(chr, ids))


def prompts_of(task, **kwargs):
    questions = task.questions()
    return core_tasks.build_prompts(task, questions, Letters(), **kwargs)


def test_only_what_follows_the_common_beginning_is_scored():
    task = task_of(
        "multiple_choice", {"query": "Is", "choices": ["anna", "anton", "anna"], "gold": 1}
    )
    (prompt,) = prompts_of(task)
    assert text_of(prompt.prefix[1:]) == "Is a"
    assert [text_of(branch) for branch in prompt.branches] == ["nna", "nton"]
    assert prompt.starts == (1, 1)
    assert prompt.answers == (0, 1, 0)


def test_of_a_schema_the_common_end_is_scored():
    question = {
        "context_options": ["The cat, as it", "The dog, as it"],
        "continuation": "ran.",
        "gold": 0,
    }
    (prompt,) = prompts_of(task_of("schema", question))
    assert text_of(prompt.prefix[1:]) == "The"
    assert [
        text_of(branch[start:])
        for branch, start in zip(prompt.branches, prompt.starts, strict=True)
    ] == [", as it ran."] * 2


def test_of_a_text_the_continuation_is_scored_with_the_space_before_it():
    task = task_of(
        "language_modeling",
        {"context": " One two ", "continuation": "three"},
        delimiter="\nAnswer: ",
    )
    (prompt,) = prompts_of(task)
    assert (
        text_of(np.concatenate([prompt.prefix, *prompt.branches])[1:]) == "One two\nAnswer: three"
    )
    assert text_of(prompt.branches[0][prompt.starts[0] :]) == " three"


def test_examples_stand_before_the_question():
    questions = [{"query": f"q{i}", "choices": ["no", f"a{i}"], "gold": 1} for i in range(4)]
    task = task_of("multiple_choice", *questions, shots=2, delimiter=": ")
    asked = task.questions()
    first, second = (asked[i] for i in core_tasks.draw_shots(0, 4, 2))
    expected = "".join(f"{shot['query']}: {shot['choices'][1]}\n\n" for shot in (first, second))
    assert core_tasks.render(task, asked, 0) == [
        f"{expected}{asked[0]['query']}: {c}" for c in asked[0]["choices"]
    ]


def test_too_few_examples_are_all_shown():
    questions = [{"context": f"q{i}", "continuation": "a"} for i in range(3)]
    task = task_of("language_modeling", *questions, shots=10)
    assert sorted(core_tasks.draw_shots(1, 3, 10)) == [0, 2]
    assert len(prompts_of(task)) == 3
    assert len(core_tasks.build_prompts(task, task.questions(1), Letters())) == 1


@given(st.integers(0, 500), st.integers(1, 500), st.integers(0, 12))
def test_examples_are_drawn_as_from_a_list_of_all_others(index, count, shots):
    if shots < count and index < count:
        others = [i for i in range(count) if i != index]
        assert core_tasks.draw_shots(index, count, shots) == random.Random(1234 + index).sample(
            others, shots
        )


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), min_size=1, max_size=4))
def test_common_length(rows):
    length = core_tasks.common_length([np.array(row) for row in rows])
    assert all(row[:length] == rows[0][:length] for row in rows)
    assert any(len(row) == length for row in rows) or len({row[length] for row in rows}) > 1


def test_long_prompts_lose_their_beginning_only_where_asked():
    question = {"query": "abcdefgh", "choices": ["xx", "yyy"], "gold": 1}
    task = task_of("multiple_choice", question)
    (prompt,) = prompts_of(task, max_length=6)
    rows = [text_of(np.concatenate([prompt.prefix, branch])) for branch in prompt.branches]
    assert rows == ["fgh xx", "gh yyy"]
    scored = [
        text_of(branch[start:])
        for branch, start in zip(prompt.branches, prompt.starts, strict=True)
    ]
    assert scored == ["xx", "yyy"]


def test_the_first_of_equals_is_chosen():
    prompt = Prompt(np.array([0]), (np.array([1, 2]), np.array([1, 3])), (1, 1), (1, 0, 1))
    answer = core.decide(prompt, [np.float32([2]), np.float32([1])], gold=2)
    assert (answer.choice, answer.correct, answer.losses) == (0, False, (1, 2, 1))


@pytest.mark.parametrize(("choices", "choice"), [(["no", "nothing"], 0), (["nothing", "no"], 0)])
def test_an_answer_without_tokens_of_its_own_is_chosen_only_where_it_is_first(choices, choice):
    (prompt,) = prompts_of(
        task_of("multiple_choice", {"query": "q", "choices": choices, "gold": 0})
    )
    scores = [
        np.full(len(ids) - start, 2.0)
        for ids, start in zip(prompt.branches, prompt.starts, strict=True)
    ]
    assert sorted(map(len, scores)) == [0, 5]
    assert core.decide(prompt, scores, gold=0).choice == choice


def test_a_cut_comes_after_the_shuffle():
    task = task_of(
        "language_modeling", *({"context": str(i), "continuation": "a"} for i in range(50))
    )
    expected = [str(i) for i in range(50)]
    random.Random(1337).shuffle(expected)
    assert [question["context"] for question in task.questions(7)] == expected[:7]


# ---- Batches ------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 700), st.integers(2, 90)), max_size=60),
    st.integers(1, 3),
    st.sampled_from([1, 500, 4000]),
)
def test_each_prompt_is_in_one_batch_that_holds_it(sizes, ways, tokens):
    field = 400
    prompts = [
        Prompt(
            np.zeros(prefix, np.int32), (np.zeros(branch, np.int32),) * count, (1,) * count, (0,)
        )
        for count, prefix, branch in sizes
    ]
    batches = list(
        prefix_scoring.plan_batches(
            [prefix_scoring.shape_of(p, field) for p in prompts], tokens, ways
        )
    )
    assert sorted(index for batch in batches for index in batch.prompts) == list(
        range(len(prompts))
    )
    for batch in batches:
        assert len(batch.prompts) <= batch.rows
        assert batch.rows == ways * max(1, tokens // batch.shape.tokens)
        for index in batch.prompts:
            assert batch.shape.prefix >= min(field, len(prompts[index].prefix))
            assert batch.shape.branches >= len(prompts[index].branches)
            assert batch.shape.size >= len(prompts[index].branches[0])


@given(st.integers(0, 100_000), st.sampled_from([1, 8, 32]))
def test_sizes_waste_little(count, smallest):
    size = prefix_scoring.round_up(count, smallest)
    assert size >= max(count, smallest)
    assert size <= smallest or size <= (1.25 * count if size > 160 else 2 * count)


# ---- Bundles and scores -------------------------------------------------------------------------


def test_the_scores_of_gpt2():
    """Accuracies and CORE as the real bundle's result files for the four sizes of GPT-2 have them."""
    with open(GOLDEN / "core_gpt2.csv", newline="") as file:
        *rows, score = csv.DictReader(file)
    assert len(rows) == 22
    for model in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        centered = {
            row["task"]: core_tasks.center(float(row[model]), 0.01 * float(row["guessing"]))
            for row in rows
        }
        assert core_tasks.core_score(centered) == pytest.approx(float(score[model]), abs=1e-6)


def files_of_small():
    with zipfile.ZipFile(GOLDEN / "core_small.zip") as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


def test_folder_and_archives_hold_the_same_bundle(tmp_path):
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for name, content in files_of_small().items():
            place = tmp_path / "folder" / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    (tmp_path / "bundle.tar.xz").write_bytes(lzma.compress(tar.getvalue()))
    expected = core_tasks.load_bundle(GOLDEN / "core_small.zip")
    assert core_tasks.load_bundle(tmp_path / "bundle.tar.xz") == expected
    assert core_tasks.load_bundle(tmp_path / "folder/eval_bundle") == expected


def damaged(**changed):
    files = {
        name: changed.get(Path(name).stem, content) for name, content in files_of_small().items()
    }
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, text in files.items():
            if text is not None:
                archive.writestr(name, text)
    return content.getvalue()


BAD = {
    "neither an archive": (b"<html>", "is no .zip or .tar.* archive"),
    "cut": ((GOLDEN / "core_small.zip").read_bytes()[:3000], "damaged"),
    "no list of tasks": (damaged(core=None), "has no core.yaml"),
    "an empty list": (damaged(core=b"- 1"), "are damaged"),
    "no such file": (damaged(copa=None), "has no eval_data/commonsense_reasoning/copa.jsonl"),
    "no baselines": (damaged(eval_meta_data=b"Eval Task,Random baseline\n"), "are damaged"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_damaged_bundle_is_refused_in_one_line(what, tmp_path):
    content, message = BAD[what]
    path = tmp_path / "bundle.zip"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="core_bundle=.*") as caught:
        core_tasks.load_bundle(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_bundle_is_told():
    with pytest.raises(ValueError, match="core_bundle=nowhere does not exist"):
        core_tasks.load_bundle("nowhere")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "is no question"),
        ('{"query": "q", "gold": 0}', "has no 'choices'"),
        ('{"query": "q", "choices": [], "gold": 0}', "has no list of choices"),
        ('{"query": "q", "choices": ["a"], "gold": 1}', "has gold 1"),
        ('{"query": 3, "choices": ["a"], "gold": 0}', "has a value that is no text"),
    ],
)
def test_a_line_that_is_no_question_is_named(line, message):
    task = task_of("multiple_choice", {"query": "q", "choices": ["a"], "gold": 0})
    task = task._replace(content=task.content + line.encode() + b"\n")
    with pytest.raises(ValueError, match=f"line 2 of the CORE task invented {message}"):
        task.questions()


# ---- The real bundle ----------------------------------------------------------------------------


REAL = Path(os.environ.get("CORE_BUNDLE", ROOT.parent / "shared/data/core_eval_bundle.tar.xz"))


@pytest.mark.slow
@pytest.mark.skipif(
    not REAL.exists(), reason="the real bundle is not there: CORE_BUNDLE=PATH says where it is"
)
@pytest.mark.parametrize("limit", [2, pytest.param(None, marks=pytest.mark.long)])
def test_every_answer_on_the_real_bundle_is_nanochats(limit, tmp_path, monkeypatch):
    """All 22 tasks, of each the first questions of a cut to 60: answers, and losses also of texts
    to go on with.
    """
    # The model is small: all prompts at once in few shapes.
    monkeypatch.setitem(
        prefix_scoring.LIMITS, "cpu", prefix_scoring.ScoringLimits(tokens=8192, compilation=400_000)
    )
    with zipfile.ZipFile(GOLDEN / "core_real.zip") as archive:
        archive.extract("tokenizer.json", tmp_path)
        golden = json.loads(archive.read("answers.json"))
    tokenizer = load_tokenizer_from("bpe", tmp_path)
    setup = make_setup(
        "max_target_length=512",
        "vocab_size=4096",
        "num_decoder_layers=4",
        "emb_dim=32",
        "num_query_heads=2",
        "head_dim=16",
        "global_batch_tokens=512",
        "steps=1",
    )
    params = from_formula(setup, {"lm_head.weight": 4, "transformer.wte.weight": 4})
    score = prefix_scoring.PrefixScorer(setup, tokenizer.bos_id).bind(params)

    tasks = core_tasks.load_bundle(REAL)
    assert [task.label for task in tasks] == list(golden["tasks"])
    asked = []
    for task in tasks:
        questions = task.questions(golden["max_per_task"])
        prompts = core_tasks.build_prompts(task, questions, tokenizer, limit=limit)
        asked += [
            (task, index, questions[index].get("gold"), prompt)
            for index, prompt in enumerate(prompts)
        ]
    prompts = [prompt for *_, prompt in asked]
    losses = dict(score(prompts, greedy=False))
    likeliest = dict(score(prompts, greedy=True))
    for number, (task, index, gold, prompt) in enumerate(asked):
        expected = golden["tasks"][task.label]
        answer = core.decide(prompt, likeliest[number] if gold is None else losses[number], gold)
        assert answer.correct == (expected["correct"][index] == "1"), (task.label, index)
        means = answer.losses or [np.mean(row) for row in losses[number]]
        np.testing.assert_allclose(
            means, expected["losses"][index], atol=1e-4, err_msg=f"{task.label} {index}"
        )

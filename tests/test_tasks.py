"""Chat tasks: nanochat's conversations and verdicts, data from a folder or an archive, clear
errors.
"""

import json
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from MaxNano import tasks
from MaxNano.tasks import humaneval, spelling
from MaxNano.tokenization.chat_format import turns
from MaxNano.tools import sandbox

GOLDEN = json.loads((Path(__file__).parent / "golden" / "tasks_conversations.json").read_text())
NANOCHAT_ROWS = sorted(GOLDEN["conversations"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The golden rows, laid out as nanochat keeps them, in two files where there are rows for two."""
    base = tmp_path_factory.mktemp("chat") / "task_data"
    for place, rows in GOLDEN["rows"].items():
        (base / place).mkdir(parents=True)
        table = pa.Table.from_pylist(rows)
        half = (len(rows) + 1) // 2
        for name, part in (("00000", table[:half]), ("00001", table[half:])):
            if len(part):
                pq.write_table(part, base / place / f"{name}.parquet")
    return base


@pytest.fixture(scope="module")
def word_list(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text("\n".join(GOLDEN["words"]) + "\n")
    return path


def open_task(name, chat_data=None, chat_word_list=None):
    return tasks.open_task(
        SimpleNamespace(
            chat_data=chat_data and str(chat_data),
            chat_word_list=chat_word_list and str(chat_word_list),
        ),
        name,
    )


def conversations_of(task, count=None):
    """As JSON has them, for which a tuple is a list."""
    numbers = range(len(task) if count is None else count)
    return json.loads(json.dumps([task.conversation(n) for n in numbers]))


# ---- Conversations ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NANOCHAT_ROWS)
def test_conversations_are_nanochats(folder, name):
    assert conversations_of(open_task(name, folder)) == GOLDEN["conversations"][name]


@pytest.mark.parametrize("name", sorted(GOLDEN["spelling"]))
def test_spelling_problems_are_nanochats_with_its_words(word_list, name):
    expected = GOLDEN["spelling"][name]
    assert conversations_of(open_task(name, None, word_list), len(expected)) == expected


def test_every_way_to_ask_is_nanochats(word_list):
    task = open_task("SpellingBee/train", None, word_list)
    asked = [task.conversation(n)["messages"][0]["content"] for n in range(300)]
    assert asked == GOLDEN["spelling_questions"]


@pytest.mark.parametrize("compression", ["", "gz", "xz"])
@pytest.mark.parametrize("root", ["task_data", "."])
def test_an_archive_is_as_good_as_a_folder(folder, tmp_path, compression, root):
    path = tmp_path / "data.tar"
    with tarfile.open(path, f"w:{compression}") as archive:
        archive.add(folder, root)
    for name in ("GSM8K/train", "MMLU/test"):
        assert conversations_of(open_task(name, path)) == GOLDEN["conversations"][name]


def test_the_folder_above_task_data_will_do(folder):
    task = open_task("GSM8K/test", folder.parent)
    assert conversations_of(task) == GOLDEN["conversations"]["GSM8K/test"]


def test_chat_takes_any_data_set_with_messages(folder):
    task = open_task("chat:HuggingFaceTB/smol-smoltalk/default/train", folder)
    assert conversations_of(task) == GOLDEN["conversations"]["SmolTalk/train"]


def test_kinds_and_baselines(folder):
    assert {name: open_task(name, folder).kind for name in NANOCHAT_ROWS} == {
        "ARC-Challenge/validation": "categorical",
        "ARC-Easy/test": "categorical",
        "GSM8K/test": "generative",
        "GSM8K/train": "generative",
        "HumanEval/test": "generative",
        "MMLU/auxiliary_train": "categorical",
        "MMLU/test": "categorical",
        "SmolTalk/train": None,
    }
    baselines = {open_task(name, folder).baseline for name in ("ARC-Easy/test", "MMLU/test")}
    assert baselines == {0.25} and open_task("GSM8K/test", folder).baseline == 0


def test_the_words_that_come_with_maxnano_are_words():
    words = spelling.load_words(None)
    assert len(words) == len(set(words)) > 40_000
    assert all(word.isascii() and word.isalpha() and word.islower() for word in words)


# ---- Verdicts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("completion", "nanochats"), GOLDEN["gsm8k_grades"])
def test_gsm8k_judges_as_nanochat_but_for_a_dot_at_the_end(folder, completion, nanochats):
    task = open_task("GSM8K/test", folder)
    verdict = task.evaluate(task.conversation(0), completion)
    assert verdict == (True if completion == "#### 8." else nanochats)
    assert task.reward(task.conversation(0), completion) == float(verdict)


def test_multiple_choice_wants_the_letter_and_nothing_else(folder):
    task = open_task("ARC-Easy/test", folder)
    for number in range(len(task)):
        conversation = task.conversation(number)
        right = [
            letter for letter in conversation["letters"] if task.evaluate(conversation, letter)
        ]
        assert right == [conversation["messages"][-1]["content"]]
        assert not task.evaluate(conversation, f" {right[0]}")


@pytest.mark.parametrize(("number", "completion", "nanochats"), GOLDEN["humaneval_programs"])
def test_humaneval_takes_the_code_that_nanochat_takes(folder, number, completion, nanochats):
    conversation = open_task("HumanEval/test", folder).conversation(number)
    program = humaneval.program(conversation["messages"][0]["content"], completion)
    call = f"check({conversation['entry_point']})"
    assert f"{program}\n\n{conversation['test']}\n{call}" == nanochats


def test_humaneval_runs_the_tests(folder):
    task = open_task("HumanEval/test", folder)
    try:
        sandbox.working_mechanism()
    except sandbox.SandboxError as error:
        pytest.skip(f"no program can be run safely here: {error}")
    for number in range(len(task)):
        conversation = task.conversation(number)
        solution = conversation["messages"][-1]["content"]
        assert task.evaluate(conversation, f"Here:\n```python\n{solution}\n```")
        assert not task.evaluate(conversation, solution.replace("return", "return 1 +"))


@given(number=st.integers(0, 79_999))
def test_an_answer_counts_the_letter_and_is_right(number):
    task = BEE
    conversation = task.conversation(number)
    by_hand, _, call, output, final = (p["text"] for p in conversation["messages"][-1]["content"])
    word, letter = call.removesuffix("')").split(".count('")
    count = word.strip("'").count(letter)
    assert output == str(count) and f"This gives us {count}." in by_hand
    assert task.evaluate(conversation, final)
    assert not task.evaluate(conversation, final + "1") and not task.evaluate(conversation, by_hand)


BEE = open_task("SpellingBee/train")


def test_spelling_wants_every_letter():
    task = open_task("SimpleSpelling/test")
    conversation = task.conversation(3)
    answer = conversation["messages"][-1]["content"]
    word, letters = answer.split(":")
    assert letters.replace(",", "") == word
    assert task.evaluate(conversation, f"{answer}\n") and not task.evaluate(
        conversation, answer[:-1]
    )


def test_sums_hold_out_a_fifth_and_want_a_single_call_with_their_digits():
    train, test, guess = (open_task(f"Sums/{split}") for split in ("train", "test", "guess"))
    questions = [
        {task.conversation(n)["messages"][0]["content"] for n in range(len(task))}
        for task in (train, test, guess)
    ]
    assert [len(each) for each in questions] == [80, 20, 80] and len(guess) == 8000
    assert not questions[0] & questions[1] and questions[2] == questions[0]

    def answer(conversation):
        call, output = (part["text"] for part in conversation["messages"][1]["content"])
        return f"<|python_start|>{call}<|python_end|><|output_start|>{output}<|output_end|>"

    for task in (train, test):
        problems = [task.conversation(n) for n in range(len(task))]
        assert all(task.evaluate(problem, answer(problem)) for problem in problems)
    problem = test.conversation(0)
    wrong = answer(problem).replace("<|output_start|>", "<|output_start|>1")
    for text in ("", wrong, wrong + answer(problem), answer(problem) * 2):
        assert not test.evaluate(problem, text)
    guessed = [guess.conversation(n) for n in range(1000)]
    assert 0.05 < sum(guess.evaluate(each, answer(each)) for each in guessed) / 1000 < 0.2


def test_what_is_only_trained_on_has_no_verdict(folder):
    task = open_task("SmolTalk/train", folder)
    with pytest.raises(NotImplementedError, match="SmolTalk is for training only"):
        task.evaluate(task.conversation(0), "")


# ---- Conversations of one's own -----------------------------------------------------------------

HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def test_json_lines_and_json_lists(tmp_path):
    system = {"messages": [{"role": "system", "content": "Be\u2028kind."}, *HELLO], "source": "me"}
    lines = tmp_path / "a.jsonl"
    lines.write_text(f"{json.dumps(HELLO)}\n\n{json.dumps(system, ensure_ascii=False)}\n", "utf-8")
    task = open_task(f"json:{lines}")
    assert conversations_of(task) == [{"messages": HELLO}, system]
    whole = tmp_path / "a.json"
    whole.write_text(json.dumps([HELLO, system], indent=2))
    assert conversations_of(open_task(f"json:{whole}")) == conversations_of(task)


def test_a_conversation_may_be_changed_without_harm(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(HELLO))
    task = open_task(f"json:{path}")
    task.conversation(0)["messages"].pop()
    assert conversations_of(task) == [{"messages": HELLO}]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 3: not JSON: .*, column 2"),
        ("3", "line 3: a conversation must be"),
        ("[]", "line 3: .* at least one message"),
        ('{"text": "x"}', "line 3: a conversation must be"),
        ('["Hi"]', "line 3: message 1 must be .*; it has no 'role' and no 'content'"),
        ('[{"role": "user"}]', "line 3: message 1 must be .*; it has no 'content'$"),
        (json.dumps([{**HELLO[0], "role": "tool"}]), "line 3: message 1 is from 'tool' but must"),
        (
            json.dumps([HELLO[0], {"role": "assistant", "content": 5}]),
            "line 3: .* message 2 must be a text",
        ),
        (json.dumps(HELLO[:1]), "line 3: no message is from 'assistant'"),
        ("[" * 100_000, "line 3: nested too deeply"),
        ("9" * 5000, "line 3: not JSON: Exceeds the limit"),
    ],
)
def test_an_error_names_the_line(tmp_path, line, problem):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(HELLO)}\n\n{line}\n{json.dumps(HELLO)}\n")
    with pytest.raises(ValueError, match=f"a.jsonl, {problem}"):
        open_task(f"json:{path}")


def test_text_that_is_not_utf8_is_named_with_its_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(f"{json.dumps(HELLO)}\n\n".encode() + '[{"role": "é'.encode("latin-1"))
    with pytest.raises(ValueError, match="a.jsonl cannot be read: line 3 is not UTF-8 text$"):
        open_task(f"json:{path}")


def test_an_error_in_a_list_names_the_conversation_or_the_line(tmp_path):
    path = tmp_path / "a.json"
    for content, problem in (
        (json.dumps([HELLO, HELLO[:1]]), "conversation 2: no message is from"),
        ("[\n[],\n}", "line 3: not JSON"),
        ('{"messages": []}', "must be a list of conversations; or name it .jsonl"),
        ('{"messages": []}\n{}', "line 2: not JSON: .*; name it .jsonl if each line is a conv"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=problem):
            open_task(f"json:{path}")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["messages", "role", "content", "type", "text"]), inner)
    ),
    max_leaves=12,
)


@given(content=JSON)
def test_any_json_is_a_conversation_or_an_error_with_its_line(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text(json.dumps(content))
    try:
        (conversation,) = conversations_of(open_task(f"json:{path}"))
    except ValueError as error:
        assert str(error).startswith(f"{path}, line 1: ")
    else:
        messages = conversation["messages"]
        assert messages is None or None in messages or turns(conversation)


SHARED = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
SHAPES = [
    {"messages": HELLO},
    {"messages": json.dumps(HELLO)},
    {"conversations": SHARED},
    {"conversation": json.dumps(SHARED)},
    {"messages": [{"role": "human", "content": "Hi"}, {"role": "model", "content": "Hello"}]},
    {"messages": [{**HELLO[0], "name": None, "tool_calls": None}, {**HELLO[1], "weight": 1}]},
]


@pytest.mark.parametrize("row", SHAPES)
def test_conversations_in_the_shapes_of_other_data_sets_are_read(tmp_path, row):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row), "utf-8-sig")
    (conversation,) = conversations_of(open_task(f"json:{path}"))
    assert conversation["messages"] == HELLO
    folder = tmp_path / "a--b" / "default" / "train"
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([row]), folder / "00000.parquet")
    assert conversations_of(open_task("chat:a/b/default/train", tmp_path)) == [{"messages": HELLO}]


MALFORMED = [
    None,
    [None],
    [HELLO[0], None, HELLO[1]],
    [],
    "no JSON",
    [{**HELLO[0], "content": None}],
]


@pytest.mark.parametrize("messages", MALFORMED)
def test_a_row_that_is_no_conversation_is_refused_only_when_it_is_rendered(tmp_path, messages):
    """`messages` null and a null message ended the run with a TypeError."""
    folder = tmp_path / "a--b" / "default" / "train"
    folder.mkdir(parents=True)
    kind = pa.string()
    if not isinstance(messages, str):
        kind = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
    pq.write_table(pa.table({"messages": pa.array([messages], kind)}), folder / "0.parquet")
    (conversation,) = conversations_of(open_task("chat:a/b/default/train", tmp_path))
    with pytest.raises(ValueError):
        turns(conversation)


@pytest.mark.parametrize("messages", MALFORMED[:3])
def test_null_messages_in_a_file_of_ones_own_are_left_for_training_to_count(tmp_path, messages):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps({'messages': messages})}\n{json.dumps(HELLO)}")
    assert len(open_task(f"json:{path}")) == 2


# ---- Errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("gsm8k/test", "unknown task 'gsm8k/test'; did you mean GSM8K"),
        ("data/c.jsonl", "unknown task 'data/c.jsonl'; write json:data/c.jsonl for a file"),
        ("", "unknown task ''; tasks are ARC-Easy, ARC-Challenge, MMLU"),
        ("MMLU", "cais/mmlu all has no split ''; write TASK/SPLIT with one of auxiliary_train"),
        ("MMLU/train", "has no split 'train'"),
        ("SpellingBee/validation", "SpellingBee has no split 'validation'"),
        ("Sums/validation", "Sums has no split 'validation'; write TASK/SPLIT with one of train"),
        ("chat:owner/name/train", "must be chat:OWNER/NAME/SUBSET/SPLIT"),
        (
            "chat:owner/name/default/train",
            "does not have owner--name/default/train; put the parquet files",
        ),
        ("json:nowhere.jsonl", "json:nowhere.jsonl cannot be read: No such file"),
        ("chat:openai/gsm8k/main/test", "has no column messages"),
    ],
)
def test_a_wrong_name_is_one_line(folder, name, problem):
    with pytest.raises(ValueError, match=problem) as error:
        open_task(name, folder)
    assert "\n" not in str(error.value)


def test_missing_and_broken_data_are_one_line(folder, tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist; name a folder or archive"):
        open_task("MMLU/test", tmp_path / "nowhere")
    text = tmp_path / "a.tar"
    text.write_text("no archive")
    with pytest.raises(ValueError, match="is neither a folder nor a tar archive"):
        open_task("MMLU/test", text)
    place = tmp_path / "cais--mmlu" / "all" / "test"
    place.mkdir(parents=True)
    with pytest.raises(ValueError, match="a parquet file is missing|does not have cais--mmlu"):
        open_task("MMLU/test", tmp_path)
    source = (folder / "cais--mmlu/all/test/00000.parquet").read_bytes()
    (place / "00000.parquet").write_bytes(source[:-20])
    with pytest.raises(ValueError, match="cais--mmlu/all/test: cannot be read"):
        open_task("MMLU/test", tmp_path)
    (place / "00000.parquet").write_bytes(source)
    assert len(open_task("MMLU/test", tmp_path)) == 2
    (place / "manifest.json").write_text('["00000.parquet", "00001.parquet"]')
    with pytest.raises(ValueError, match="00001.parquet is missing"):
        open_task("MMLU/test", tmp_path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [("one\ntwo words\n", "line 2: 'two words' is not one word"), ("", "has no words")],
)
def test_a_wrong_word_list_is_one_line(tmp_path, content, problem):
    path = tmp_path / "words.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=problem):
        open_task("SpellingBee/train", None, path)
    with pytest.raises(ValueError, match="none.txt cannot be read: No such file"):
        open_task("SpellingBee/train", None, tmp_path / "none.txt")

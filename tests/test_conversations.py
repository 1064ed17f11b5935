"""Conversations as training rows: nanochat's rows, nothing lost, nothing stuck, an exact state."""

import itertools
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from MaxNano import pyconfig, tasks
from MaxNano.data import conversations, loader, packing
from MaxNano.stage_configs import stage_config
from MaxNano.tokenization.bpe import NANOCHAT_PATTERN, BpeTokenizer

GOLDEN = json.loads((Path(__file__).parent / "golden" / "tasks_packing.json").read_text())
TOKENIZER = BpeTokenizer(NANOCHAT_PATTERN, {bytes([i]): i for i in range(256)})
BOS = TOKENIZER.bos_id


class ListTask(tasks.Task):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def conversation(self, index):
        return {"messages": self.items[index]}


LISTS: dict[str, list] = {}


@pytest.fixture(autouse=True, scope="module")
def tasks_from_lists():
    tasks.TASKS["list"] = lambda config, name: ListTask(LISTS[name])
    yield
    del tasks.TASKS["list"]


def dialogue(*texts):
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


BASE = pyconfig.initialize(["configs/base.yml", "model=d2", "dataset_type=chat", "data_readers=1"])


def make_config(mixture, **values):
    rows = tuple(tuple(map(str, row)) for row in mixture)
    values = {"chat_train_mixture": rows, "tokenize_batch_documents": 1} | values
    return pyconfig.replace(BASE, "test", **values)


def mixture_of(config):
    return conversations.Mixture(config, "train")


def first_messages(mixture, epoch=1):
    places = range(len(mixture))
    return [mixture.conversation(epoch, n)["messages"][0]["content"] for n in places]


# ---- nanochat's rows ----------------------------------------------------------------------------


@pytest.fixture
def golden_config():
    LISTS.update(first=GOLDEN["first"], second=GOLDEN["second"])
    return make_config(
        [["list:first", 1], ["list:second", GOLDEN["second_epochs"]]],
        max_target_length=GOLDEN["max_target_length"],
        packing_buffer_documents=GOLDEN["packing_buffer_documents"],
    )


def test_the_order_of_the_first_pass_is_nanochats(golden_config):
    assert first_messages(mixture_of(golden_config)) == GOLDEN["order"]


@pytest.mark.parametrize("readers", [1, 2])
def test_batches_are_nanochats(golden_config, readers):
    """Rank r of nanochat's is reader r."""
    config = pyconfig.replace(golden_config, "test", data_readers=readers)
    ranks = GOLDEN["batches"][str(readers)]
    with loader.make_loader(config, TOKENIZER, "train", batch_rows=2 * readers) as batches:
        for parts in zip(*ranks, strict=True):
            batch = next(batches)
            for name, place in (("inputs", 0), ("targets", 1)):
                expected = np.concatenate([part[place] for part in parts])
                np.testing.assert_array_equal(batch[name], expected)
            assert (batch["weights"] == 1).all() and batch["weights"].dtype == np.float32


# ---- Rows ---------------------------------------------------------------------------------------


def split_documents(rows):
    """The documents that rows hold, as tuples of tokens with their mask in the sign; no padding."""
    found = Counter()
    for row in rows:
        starts = [*np.flatnonzero(row == ~BOS), len(row)]
        assert starts[0] == 0  # a row begins with a document
        found.update(tuple(row[a:b].tolist()) for a, b in itertools.pairwise(starts))
    del found[(~BOS,)]
    return found


def expected_document(messages, row_tokens):
    """(signed tokens or None, whether it was cut), by taking turns off the end."""
    for keep in range(len(messages), 1, -1):
        if messages[keep - 1]["role"] == "assistant" or keep == len(messages):
            ids, mask = TOKENIZER.render_conversation({"messages": messages[:keep]})
            if len(ids) <= row_tokens:
                break
    else:
        keep = 0
        ids, mask = TOKENIZER.render_conversation({"messages": messages}, row_tokens)
    if not any(mask):
        return None, False
    return tuple(i if m else ~i for i, m in zip(ids, mask, strict=True)), keep < len(messages)


TURNS = st.lists(st.integers(0, 70), min_size=1, max_size=7)


@given(
    lengths=st.lists(TURNS, min_size=1, max_size=25),
    length=st.sampled_from([4, 9, 33, 64, 100, 256]),
    buffer_documents=st.integers(1, 9),
    list_documents=st.integers(1, 5),
)
@example(
    lengths=[[300, 5], [3, 300], [3, 3, 300, 300], [1, 1]],
    length=256,
    buffer_documents=2,
    list_documents=1,
)
@example(lengths=[[1, 300], [1, 300, 1]], length=64, buffer_documents=1, list_documents=1)
def test_no_token_is_lost_or_comes_twice(lengths, length, buffer_documents, list_documents):
    LISTS["any"] = [
        dialogue(*(f"{n}." + "x" * size for size in sizes)) for n, sizes in enumerate(lengths)
    ]
    expected = [expected_document(messages, length + 1) for messages in LISTS["any"]]
    documents = Counter(document for document, _ in expected if document)
    config = make_config(
        [["list:any", 1]], max_target_length=length, tokenize_batch_documents=list_documents
    )
    encoding = conversations.ConversationEncoding(config, TOKENIZER, "train")
    lists = encoding.lists(0, encoding.start_position(0))
    if not documents:
        with pytest.raises(ValueError, match="none of the conversations of reader 0"):
            list(lists)
        return
    position = encoding.start_position(0)

    def next_documents():
        nonlocal position
        if position.index >= len(lengths):
            raise StopIteration  # the pass ends here
        position, new = next(lists)
        return new

    packer = packing.BestFitPacker(
        length + 1, buffer_documents, next_documents, (), encoding.padding
    )
    rows = []
    with pytest.raises(StopIteration):
        while True:
            row = np.full(length + 1, 10**6, np.int32)
            rows.append(row)
            packer.fill(row)
    last = rows.pop()  # begun, but not filled
    found = split_documents([*rows, np.where(last == 10**6, ~BOS, last)])
    found.update(tuple(document.tokens.tolist()) for document in packer.documents)
    assert found == documents
    assert position.cut == sum(was_cut for _, was_cut in expected)
    assert position.left_out == sum(document is None for document, _ in expected)

    batch = loader.to_batch(np.stack([*rows, np.full(length + 1, ~BOS, np.int32)]))
    signed = np.stack([*rows, np.full(length + 1, ~BOS, np.int32)])
    np.testing.assert_array_equal(batch["inputs"], np.where(signed < 0, ~signed, signed)[:, :-1])
    np.testing.assert_array_equal(batch["targets"], np.where(signed[:, 1:] < 0, -1, signed[:, 1:]))
    assert (batch["targets"][-1] == -1).all()  # nothing is learned from padding


def test_only_what_the_assistant_says_is_a_target():
    parts = [
        {"type": "text", "text": "Sum:"},
        {"type": "python", "text": "1+1"},
        {"type": "python_output", "text": "2"},
        {"type": "text", "text": " two."},
    ]
    LISTS["one"] = [[*dialogue("What is 1+1?"), {"role": "assistant", "content": parts}]]
    config = make_config([["list:one", 1]], max_target_length=64, packing_buffer_documents=1)
    with loader.make_loader(config, TOKENIZER, "train", batch_rows=1) as batches:
        batch = next(batches)
    targets = batch["targets"][0]
    said = "Sum:<|python_start|>1+1<|python_end|> two.<|assistant_end|>"
    assert TOKENIZER.decode(targets[targets >= 0]) == said
    places = np.flatnonzero(targets >= 0)
    np.testing.assert_array_equal(batch["inputs"][0, places + 1], targets[places])


def test_what_is_too_long_is_cut_behind_an_answer_and_counted():
    first, second = dialogue("Hi", "Hello"), dialogue("Tell me more", "x" * 100)
    LISTS["long"] = [[*first, *second], dialogue("Go", "y" * 100), dialogue("z" * 100, "no"), first]
    config = make_config([["list:long", 1]], max_target_length=40)
    encoding = conversations.ConversationEncoding(config, TOKENIZER, "train")
    whole = [encoding.encode({"messages": messages}) for messages in LISTS["long"]]
    assert [(item.document is None, item.was_cut) for item in whole] == [
        (False, True),
        (False, True),
        (True, False),
        (False, False),
    ]
    assert whole[0].document.tokens.tolist() == whole[3].document.tokens.tolist()
    assert whole[1].document.length == 41 and whole[1].document.tokens[-1] == ord("y")
    with loader.make_loader(config, TOKENIZER, "train", batch_rows=4) as batches:
        for _ in range(30):  # never stuck
            assert (next(batches)["targets"] >= 0).any(axis=1).all()
        progress = batches.position()
    passes = progress["epoch"]
    assert passes > 2
    assert 2 * (passes - 1) <= progress["conversations_cut"] <= 2 * passes
    assert passes - 1 <= progress["conversations_left_out"] <= passes


def test_rows_that_are_no_conversations_are_left_out_and_counted():
    strange = [
        [{"role": "tool", "content": "x"}, *dialogue("a", "b")],
        [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "x"}],
    ]
    strange += [None, [None], [{"role": "user", "content": None}, *dialogue("a", "b")]]
    LISTS["strange"], LISTS["mixed"] = strange, [*strange, dialogue("Hi", "Hello")]
    config = make_config([["list:mixed", 1]], max_target_length=32)
    with loader.make_loader(config, TOKENIZER, "train", batch_rows=1) as batches:
        next(batches)
        assert batches.position()["conversations_left_out"] > 0
    config = make_config([["list:strange", 1]], max_target_length=32)
    with (
        loader.make_loader(config, TOKENIZER, "train", batch_rows=1) as batches,
        pytest.raises(
            ValueError, match=r"chat_train_mixture \(list:strange\): none of the .*message 1"
        ),
    ):
        next(batches)


# ---- Mixtures -----------------------------------------------------------------------------------


@given(
    tasks_of=st.lists(
        st.tuples(st.integers(0, 1000), st.floats(0, 9, allow_subnormal=False)),
        min_size=1,
        max_size=6,
    )
)
def test_weights_give_their_share_of_a_pass(tasks_of):
    lengths, weights = zip(*tasks_of, strict=True)
    counts = conversations.conversations_per_epoch(lengths, weights, "weights")
    used = [(n, w) for n, w in tasks_of if n and w]
    size, whole = sum(n for n, _ in used), math.fsum(w for _, w in used)
    assert sum(counts) == size
    for count, length, weight in zip(counts, lengths, weights, strict=True):
        share = size * weight / whole if length and weight else 0
        assert abs(count - share) <= 1.001
        assert count >= 0 and (length or not count)


def test_epochs_say_how_often_a_conversation_comes():
    LISTS.update(
        a=[dialogue(f"a{n}", "x") for n in range(5)], b=[dialogue(f"b{n}", "x") for n in range(8)]
    )
    mixture = mixture_of(make_config([["list:a", 3], ["list:b", 0.5], ["list:b", 1, 2]]))
    first, second = Counter(first_messages(mixture)), Counter(first_messages(mixture, 2))
    assert {first[f"a{n}"] for n in range(5)} == {second[f"a{n}"] for n in range(5)} == {3}
    # Half a pass goes on with the other half; the third row holds b0 and b1 only.
    assert [first[f"b{n}"] for n in range(8)] == [2, 2, 1, 1, 0, 0, 0, 0]
    assert [second[f"b{n}"] for n in range(8)] == [1, 1, 0, 0, 1, 1, 1, 1]
    assert first_messages(mixture) == first_messages(mixture)
    assert first_messages(mixture) != first_messages(mixture, 2)


@pytest.mark.parametrize("unit", ["epochs", "weights"])
def test_an_empty_task_changes_nothing(unit):
    LISTS.update(full=[dialogue(f"{n}", "x") for n in range(20)], empty=[])
    rows = [["list:empty", 2], ["list:full", 1], ["list:full", 5, 0]]
    with_empty = mixture_of(make_config(rows, chat_mixture_unit=unit))
    assert first_messages(with_empty) == first_messages(mixture_of(make_config(rows[1:2])))
    config = make_config(rows, chat_mixture_unit=unit, max_target_length=32)
    with loader.make_loader(config, TOKENIZER, "train", batch_rows=2) as batches:
        assert (next(batches)["targets"] >= 0).any()


@pytest.mark.parametrize(("count", "readers"), [(1, 1), (5, 4)])
def test_a_few_conversations_are_enough(count, readers):
    """Fewer than data_readers=8 were refused, as a validation file of a newcomer's may be."""
    LISTS["few"] = [dialogue(f"{n}", "x") for n in range(count)]
    config = make_config([["list:few", 1]], data_readers=8)
    with loader.make_loader(config, TOKENIZER, "train", batch_rows=8) as batches:
        assert batches.state()["data_readers"] == readers
        assert (next(batches)["targets"] >= 0).any()
        state = batches.state()
    with loader.make_loader(config, TOKENIZER, "train", batch_rows=8, state=state) as again:
        assert again.state()["data_readers"] == readers


@pytest.mark.parametrize(
    ("mixture", "problem"),
    [
        ([], "chat_train_mixture is empty; write a row"),
        ([["list:full"]], r"has a row \[list:full\]; write \[task, amount\]"),
        ([["list:full", "much"]], "has a row"),
        ([["list:full", "-1"]], "has a row"),
        ([["list:full", "nan"]], "has a row"),
        ([["list:full", "1", "2.5"]], "has a row"),
        ([["list:full", "1", "2", "3"]], "has a row"),
        ([["list:empty", 1]], r"chat_train_mixture \(list:empty\) has no conversation"),
        ([["list:full", 0]], "has no conversation"),
        ([["GSM9K/train", 1]], "unknown task 'GSM9K/train'; did you mean GSM8K"),
    ],
)
def test_a_wrong_mixture_is_one_line(mixture, problem):
    LISTS.update(full=[dialogue(f"{n}", "x") for n in range(20)], empty=[])
    config = make_config(mixture, data_readers=8)
    with pytest.raises(ValueError, match=problem) as error:
        loader.make_loader(config, TOKENIZER, "train", batch_rows=8)
    assert "\n" not in str(error.value)
    # The start-up table came first, and its error was "not enough values to unpack".
    assert stage_config(config).describe_data(config) is not None


def test_mixtures_are_described():
    rows = [["list:full", "2"], ["list:empty", "1", "5"]]
    config = make_config(rows)
    described = stage_config(config).describe_data(config)
    assert described == "list:full x 2, list:empty x 1 (at most 5)"
    values = {"stage": None, "dataset_type": "mixture"}
    values["dataset_mixture"] = [["3", "jsonl:a"], ["1", "text:b", "body"], ["1"], []]
    described = stage_config(values).describe_data(values)
    assert described == "jsonl:a x 3, text:b x 1, 1, "


# ---- State --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat_file(tmp_path_factory):
    """Conversations of all lengths, some of them too long for a row of 65."""
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("chat") / "chat.jsonl"
    with path.open("w") as file:
        for n in range(61):
            sizes = random.integers(0, 40, 2 * random.integers(1, 4))
            file.write(json.dumps(dialogue(*(f"{n}".ljust(size, "x") for size in sizes))) + "\n")
    return path


def open_loader(chat_file, state=None, data_workers=0, **hosts):
    config = make_config(
        [[f"json:{chat_file}", 1.5], [f"json:{chat_file}", 1, 7]],
        max_target_length=64,
        data_readers=4,
        packing_buffer_documents=6,
        tokenize_batch_documents=3,
        data_workers=data_workers,
    )
    return loader.make_loader(config, TOKENIZER, "train", batch_rows=8, state=state, **hosts)


def take(batches, count):
    taken = [next(batches) for _ in range(count)]
    return np.stack([np.stack([b["inputs"], b["targets"]]) for b in taken])


@pytest.fixture(scope="module")
def expected(chat_file):
    """Batches of several passes."""
    with open_loader(chat_file) as batches:
        taken = take(batches, 30)
        assert batches.position()["epoch"] > 3
    return taken


@pytest.mark.parametrize("stop", [1, 4, 13])
def test_a_restored_state_goes_on_exactly(chat_file, expected, stop):
    with open_loader(chat_file) as batches:
        take(batches, stop)
        state, position = json.loads(json.dumps(batches.state())), batches.position()
    with open_loader(chat_file, state) as batches:
        assert batches.position() == position and batches.state() == state
        np.testing.assert_array_equal(take(batches, 12), expected[stop : stop + 12])


@pytest.mark.parametrize("hosts", [2, 8])
def test_the_hosts_together_have_the_same_batches_also_after_a_change(chat_file, expected, hosts):
    parts, states = [], []
    for host in range(hosts):
        with open_loader(chat_file, host_index=host, host_count=hosts) as batches:
            parts.append(take(batches, 5))
            states.append(batches.state())
    np.testing.assert_array_equal(np.concatenate(parts, axis=2), expected[:5])
    with open_loader(chat_file, loader.merge_states(states)) as batches:
        np.testing.assert_array_equal(take(batches, 5), expected[5:10])


def test_worker_processes_give_the_same_batches(chat_file, expected):
    with open_loader(chat_file, data_workers=1) as batches:
        np.testing.assert_array_equal(take(batches, 12), expected[:12])


def test_a_state_of_other_data_is_refused(chat_file):
    with open_loader(chat_file) as batches:
        state = batches.state()
    LISTS["full"] = [dialogue(f"{n}", "x") for n in range(20)]
    config = make_config([["list:full", 1]], max_target_length=64, data_readers=4)
    with pytest.raises(
        ValueError, match="position is in 92 of json:.*but the run has 20 of list:full"
    ):
        loader.make_loader(config, TOKENIZER, "train", batch_rows=8, state=state)


@given(
    ids=st.lists(st.integers(0, 40_000) | st.integers(0, 300_000), min_size=1, max_size=20),
    data=st.data(),
)
def test_saved_tokens_keep_their_mask(ids, data):
    kept = [i if data.draw(st.booleans()) else ~i for i in ids]
    document = packing.Document(len(kept), np.array(kept, np.int32))
    (restored,) = loader._documents_from_text(loader._documents_to_text([document]))
    assert restored.length == len(kept) and restored.tokens.tolist() == kept


# ---- Horizon ------------------------------------------------------------------------------------


def test_steps_of_a_pass_use_its_conversations_up(chat_file):
    config = make_config(
        [[f"json:{chat_file}", 8]],
        max_target_length=64,
        global_batch_tokens=128,
        packing_buffer_documents=20,
    )
    with loader.make_loader(config, TOKENIZER, "train", batch_rows=2) as batches:
        consumed = 0
        while batches.position()["epoch"] == 1:
            next(batches)
            consumed += 1
    steps = conversations.steps_of_passes(config, TOKENIZER)
    assert abs(steps - consumed) <= 0.05 * consumed + 1
    half = pyconfig.replace(config, "test", chat_epochs=0.5)
    assert abs(conversations.steps_of_passes(half, TOKENIZER) - steps / 2) <= 1

"""Conversations: prompts that fit the context, and replies decoded from tokens."""

import itertools
import random

import pytest
from fake_engine import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from MaxNano.inference import dialogue
from MaxNano.inference.dialogue import ReplyDecoder, ReplyPart, content_of, merge_parts, trim

TOKENIZER = byte_tokenizer()
SPECIAL = TOKENIZER.special
TEXTS = st.text(st.sampled_from("abé€😀 \n"), max_size=12)


def decode(ids, stop=(), pieces=1):
    """The parts of a reply, decoded `pieces` tokens at a time."""
    decoder = ReplyDecoder(TOKENIZER, stop)
    parts = []
    for start in range(0, len(ids), pieces):
        parts += decoder.feed(ids[start : start + pieces])
    return merge_parts([*parts, *decoder.finish()]), decoder


@given(text=TEXTS, pieces=st.integers(1, 5))
def test_characters_come_whole(text, pieces):
    decoder = ReplyDecoder(TOKENIZER)
    ids = TOKENIZER.encode(text)
    said = ""
    for start in range(0, len(ids), pieces):
        for part in decoder.feed(ids[start : start + pieces]):
            assert "�" not in part.text
            said += part.text
    assert said == text and decoder.finish() == []


def test_bytes_that_are_no_text_are_shown_as_such():
    ids = [*TOKENIZER.encode("a"), 0xE2, 0x82]
    assert decode(ids)[0] == [ReplyPart("text", "a�")]
    assert decode([0xE2, *TOKENIZER.encode("b")])[0] == [ReplyPart("text", "�b")]


def test_calls_and_results_are_parts_and_other_specials_are_silent():
    ids = [
        *TOKENIZER.encode("So "),
        SPECIAL.python_start,
        *TOKENIZER.encode("1+1"),
        SPECIAL.python_end,
        SPECIAL.output_start,
        *TOKENIZER.encode("2"),
        SPECIAL.output_end,
        SPECIAL.user_start,
        *TOKENIZER.encode("."),
    ]
    parts, _ = decode(ids)
    assert parts == [("text", "So "), ("python", "1+1"), ("python_output", "2"), ("text", ".")]
    message = {"role": "assistant", "content": content_of(parts)}
    rendered, _ = TOKENIZER.render_conversation(
        {"messages": [{"role": "user", "content": "?"}, message]}
    )
    assert rendered[5:-1] == [token for token in ids if token != SPECIAL.user_start]


def test_a_reply_without_calls_is_a_text():
    assert content_of(decode(TOKENIZER.encode("hi"))[0]) == "hi"
    assert content_of([]) == ""


@given(
    text=TEXTS,
    stops=st.lists(st.text(st.sampled_from("abé \n"), min_size=1, max_size=3), max_size=3),
    pieces=st.integers(1, 4),
)
def test_text_ends_before_the_first_stop_string(text, stops, pieces):
    parts, decoder = decode(TOKENIZER.encode(text), stops, pieces)
    ends = [text.find(stop) for stop in stops if stop in text]
    said = "".join(part.text for part in parts)
    assert said == text[: min(ends, default=len(text))]
    assert decoder.is_stopped == bool(ends)


def test_what_may_become_a_stop_string_waits():
    decoder = ReplyDecoder(TOKENIZER, ["END"])
    feed = lambda text: "".join(part.text for part in decoder.feed(TOKENIZER.encode(text)))  # noqa: E731
    assert [feed("a E"), feed("N"), feed("T E"), feed("ND b"), feed("c")] == [
        "a ",
        "",
        "ENT ",
        "",
        "",
    ]
    assert decoder.is_stopped and decoder.finish() == []


def turn(text, answer="yes"):
    return [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


def test_the_oldest_turns_go_first_and_the_system_message_stays():
    system = {"role": "system", "content": "be brief"}
    messages = [system, *turn("a" * 70), *turn("b" * 50), {"role": "user", "content": "c"}]
    whole = len(dialogue.prompt_ids(TOKENIZER, messages))
    assert trim(TOKENIZER, messages, whole)[0] == messages
    kept, ids = trim(TOKENIZER, messages, whole - 1)
    assert kept == [system, *messages[3:]] and ids == dialogue.prompt_ids(TOKENIZER, kept)
    assert "be brief" in TOKENIZER.decode(ids)
    assert trim(TOKENIZER, messages, 40)[0] == [system, messages[-1]]


def test_turns_of_several_messages_go_together():
    system = [{"role": "system", "content": "x"}, {"role": "system", "content": "y"}]
    greeting = {"role": "assistant", "content": "g" * 140}
    first = [{"role": "user", "content": "a" * 20}, *turn("b" * 20, "d" * 20)]
    messages = [*system, greeting, *first, {"role": "user", "content": "c"}]
    whole = len(dialogue.prompt_ids(TOKENIZER, messages))
    assert trim(TOKENIZER, messages, whole - 1)[0] == [*system, *first, messages[-1]]
    shorter = len(dialogue.prompt_ids(TOKENIZER, [*system, *first, messages[-1]]))
    assert trim(TOKENIZER, messages, shorter - 1)[0] == [*system, messages[-1]]


def test_a_long_chat_begins_with_the_same_turn_for_several_turns():
    """Half of the space is dropped at a time: prompts in between continue the one before."""
    rng, limit = random.Random(0), 400
    messages, begins, before = [{"role": "system", "content": "be brief"}], [], []
    for _ in range(80):
        messages.append({"role": "user", "content": "q" * rng.randrange(5, 30)})
        kept, ids = trim(TOKENIZER, messages, limit)
        assert len(ids) <= limit and kept[0] == messages[0] and kept[-1] == messages[-1]
        begins.append(len(messages) - len(kept))
        if begins[-1]:
            assert len(ids) > limit // 2 - 100  # of a turn
        if begins[-1:] == begins[-2:-1]:
            assert ids[: len(before)] == before
        before = ids
        messages.append({"role": "assistant", "content": "a" * rng.randrange(5, 30)})
    tokens = len(dialogue.prompt_ids(TOKENIZER, messages))
    assert begins == sorted(begins) and len(set(begins)) <= 1 + tokens // (limit // 2)


def test_a_last_turn_that_leaves_little_space_has_the_turns_that_fit():
    long = {"role": "user", "content": "c" * 180}
    messages = [*turn("a" * 20), *turn("b" * 10), *turn("d" * 10), long]
    kept, ids = trim(TOKENIZER, messages, 205)
    assert kept == messages[4:] and len(ids) <= 205


def test_one_message_that_is_too_long_is_told():
    with pytest.raises(ValueError, match=r"prompt has 104 tokens, at most 64 fit"):
        trim(TOKENIZER, [*turn("a"), {"role": "user", "content": "x" * 100}], 64)


@given(
    st.lists(
        st.tuples(st.sampled_from(["text", "python"]), st.sampled_from(["", "a", "b"])), max_size=6
    )
)
def test_merged_parts_alternate_and_keep_the_text(pairs):
    merged = merge_parts([ReplyPart(*pair) for pair in pairs])
    assert "".join(part.text for part in merged) == "".join(text for _, text in pairs)
    assert all(before.kind != after.kind for before, after in itertools.pairwise(merged))

"""The prefix cache: the same answers as without it, for turns of any kind, in bounded memory."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from MaxNano import pyconfig
from MaxNano.inference import dialogue, extend
from MaxNano.inference.engine import Engine
from MaxNano.inference.prefix_cache import SHORTEST, PrefixIndex
from MaxNano.inference.requests import Request
from MaxNano.models.setup import set_up_model

BASE = str(Path(__file__).parents[1] / "configs/base.yml")
VOCAB, LONGEST, ENTRIES = 250, 320, 4
MODEL = (
    "num_decoder_layers=4 emb_dim=32 head_dim=16 num_query_heads=2 num_kv_heads=1"
    f" max_target_length=128 vocab_size={VOCAB} short_window_multiple=16 stream_interval=6"
)


@pytest.fixture(scope="module")
def setup():
    """Windows of 32, 32, 32 and 128 tokens, all shorter than the longest sequence."""
    return set_up_model(pyconfig.initialize([BASE, *MODEL.split()]), jax.devices()[:1])


@pytest.fixture(scope="module")
def params(setup):
    rng = np.random.default_rng(0)

    def draw(leaf):
        values = rng.standard_normal(leaf.shape, np.float32)
        return values / math.sqrt(leaf.shape[-2]) if leaf.ndim > 2 else 0.3 * values

    return jax.tree.map(draw, setup.params)


@pytest.fixture(scope="module")
def shared(setup, params):
    """An engine whose programs are compiled once."""
    return Engine(setup, params, None, slots=2, max_length=LONGEST, prefix_entries=ENTRIES)


class Plain:
    """The same engine without the prefix cache."""

    def __init__(self, engine):
        self.engine = engine

    def generate(self, requests):
        self.engine.prefix_cache._is_on = False
        try:
            return self.engine.generate(requests)
        finally:
            self.engine.prefix_cache._is_on = True


@pytest.fixture
def plain(shared):
    return Plain(shared)


@pytest.fixture
def cached(shared, params):
    """The engine with an empty prefix cache."""
    shared.set_params(params)
    shared.prefix_cache.tokens_looked_up = shared.prefix_cache.tokens_reused = 0
    return shared


def prompt(length, seed=0):
    return tuple(np.random.default_rng(seed).integers(0, VOCAB, length).tolist())


def one(engine, request):
    [[completion]] = engine.generate([request])
    return completion


def check_same(cached, plain, request):
    """The completion of both engines, which must be the same; logprobs up to rounding."""
    found, expected = one(cached, request), one(plain, request)
    assert (found.tokens, found.finish) == (expected.tokens, expected.finish)
    if request.logprobs is not None:
        np.testing.assert_allclose(
            [x.logprob for x in found.logprobs], [x.logprob for x in expected.logprobs], atol=2e-4
        )
    return found


def reused(cached, request):
    """Tokens of a prompt that the cache holds when the request runs."""
    before = cached.prefix_cache.tokens_reused
    one(cached, request)
    return cached.prefix_cache.tokens_reused - before


FIRST = Request(prompt(100), 20, temperature=0, logprobs=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("length", [SHORTEST + 1, 100, 200])
def test_the_turns_of_a_conversation_are_the_same(cached, plain, length, temperature):
    """Within and beyond the windows. Of an earlier turn only the answer's last token, which no
    decode step has read, is computed again.
    """
    request = replace(FIRST, prompt=prompt(length, length), temperature=temperature, seed=3)
    expected = [0]
    for turn, new in enumerate((1, 9, 40)):
        before = cached.prefix_cache.tokens_reused
        answer = check_same(cached, plain, request)
        assert cached.prefix_cache.tokens_reused - before == expected[-1]
        earlier = (*request.prompt, *answer.tokens)
        expected.append(len(earlier) - 1)
        request = replace(request, prompt=(*earlier, *prompt(new, turn)))
    assert cached.prefix_cache.tokens_looked_up > sum(expected[:-1])


def test_a_long_rest_is_computed_in_chunks(cached, plain):
    """The second chunk overwrites positions of the first in a window."""
    check_same(cached, plain, replace(FIRST, prompt=prompt(150), max_tokens=4))
    longer = replace(FIRST, prompt=prompt(150) + prompt(148, 1))
    assert len(longer.prompt) - 149 > extend.CHUNK
    check_same(cached, plain, longer)
    # The answer differs from the new turn, but the prompt was saved before it.
    assert cached.prefix_cache.tokens_reused == 149


def test_the_same_prompt_again_computes_nothing_of_it(cached, plain, monkeypatch):
    requests = [replace(FIRST, temperature=1.0, seed=seed) for seed in range(3)]
    expected = [one(plain, request).tokens for request in requests]
    one(cached, FIRST)
    monkeypatch.setattr(cached._runner, "prefill", None)  # would raise
    assert [one(cached, request).tokens for request in requests] == expected
    assert cached.prefix_cache.tokens_reused == 3 * (len(FIRST.prompt) - 1)


def test_an_answer_that_is_tokenized_differently_costs_only_itself(cached, plain):
    """Beyond the windows only whole prefixes can be used: that of the prompt is one."""
    answer = one(cached, FIRST).tokens
    other = [answer[0], (answer[1] + 1) % VOCAB, *answer[2:]]
    changed = replace(FIRST, prompt=(*FIRST.prompt, *other, *prompt(9, 5)))
    check_same(cached, plain, changed)
    assert cached.prefix_cache.tokens_reused == len(FIRST.prompt) - 1


def test_a_stopped_answer_is_reused_whole(cached, plain):
    """After a stop token the device may have stored that token too; both turns agree."""
    answer = one(plain, FIRST)
    stop = next(token for token in answer.tokens[8:] if token not in answer.tokens[:8])
    request = replace(FIRST, stop_ids=frozenset({stop}))
    kept = check_same(cached, plain, request).tokens
    following = replace(FIRST, prompt=(*FIRST.prompt, *kept, stop, *prompt(5, 1)))
    check_same(cached, plain, following)
    assert cached.prefix_cache.tokens_reused >= len(FIRST.prompt) + len(kept)


def test_a_cancelled_answer_is_reused(cached, plain):
    whole = one(plain, FIRST).tokens
    number = cached.submit(replace(FIRST, max_tokens=100))
    kept = [token for event in cached.step() for token in event.tokens]
    cached.cancel(number)
    assert [event.finish for event in cached.step()] == ["cancelled"] and kept == whole[: len(kept)]
    following = replace(FIRST, prompt=(*FIRST.prompt, *kept, *prompt(5, 1)))
    check_same(cached, plain, following)
    assert cached.prefix_cache.tokens_reused == len(FIRST.prompt) + len(kept) - 1


def test_other_samples_do_not_disturb_a_prefix(cached, plain):
    """Idle slots write to the cache, not to the store; many requests together are as alone."""
    answer = one(cached, FIRST)
    one(cached, replace(FIRST, prompt=prompt(20, 9), max_tokens=60))  # too short to be saved
    following = replace(FIRST, prompt=(*FIRST.prompt, *answer.tokens, *prompt(30, 2)))
    requests = [following, *(replace(FIRST, prompt=prompt(70, i), max_tokens=9) for i in range(3))]
    together = cached.generate(requests)
    assert cached.prefix_cache.tokens_reused == 119
    for [completion], request in zip(together, requests, strict=True):
        assert completion.tokens == one(plain, request).tokens


def test_what_is_not_a_turn_is_neither_saved_nor_looked_up(cached):
    for changes in ({"samples": 2}, {"prompt_logprobs": True}, {"prompt": prompt(SHORTEST - 25)}):
        cached.generate([replace(FIRST, **changes)])
        assert reused(cached, FIRST) == 0
        cached.prefix_cache.index.clear()


def test_new_parameters_forget_the_prefixes(cached, params):
    one(cached, FIRST)
    cached.set_params(params)
    assert reused(cached, FIRST) == 0 < reused(cached, FIRST)


def test_a_failure_forgets_the_prefixes(cached, plain, monkeypatch):
    one(cached, FIRST)
    cached.submit(FIRST)
    with monkeypatch.context() as patch:
        patch.setattr(cached._runner, "decode", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cached.step()
    cached.reset()
    cached.step()
    cached.prefix_cache.tokens_reused = 0
    check_same(cached, plain, FIRST)
    assert cached.prefix_cache.tokens_reused == 0


def test_without_entries_there_is_no_store_and_no_program(setup, params):
    engine = Engine(setup, params, None, slots=2, max_length=LONGEST)
    engine.prefix_cache.compile()
    assert engine._runner.store is None and not {"save", "extend"} & vars(engine.programs).keys()


class Characters:
    """A tokenizer whose tokens are characters, for what dialogue.trim asks of one."""

    special = SimpleNamespace(assistant_start=1)

    def render_conversation(self, conversation):
        ids = [0]
        for message in conversation["messages"]:
            ids += [2 if message["role"] == "user" else 1, *map(ord, message["content"]), 3]
        return ids, None


def test_a_chat_that_was_trimmed_is_reused_again(cached, plain):
    """After a cut, later turns begin as the turn before until the next cut; equal answers."""
    messages, hits, limit = [], [], LONGEST - 40
    for number in range(16):
        said = "".join(map(chr, prompt(20, number)))
        messages.append({"role": "user", "content": said})
        kept, ids = dialogue.trim(Characters(), messages, limit)
        before = cached.prefix_cache.tokens_reused
        answer = check_same(cached, plain, replace(FIRST, prompt=tuple(ids)))
        if len(kept) < len(messages):
            reused = cached.prefix_cache.tokens_reused - before
            hits.append(reused > len(ids) / 2)
        messages.append({"role": "assistant", "content": "".join(map(chr, answer.tokens))})
    assert len(hits) > 8 and sum(hits) >= 2 / 3 * (len(hits) - 1)


# ---- The index ----------------------------------------------------------------------------------


def conversation(*turns):
    return np.concatenate([np.full(SHORTEST, turn, np.int32) for turn in turns])


def test_a_conversation_uses_two_entries():
    """Of its last prompt, and of prompt and answer."""
    index = PrefixIndex(shards=1, entries=8, sizes=[33, 129])
    for turns in (2, 4, 6):
        assert index.add(conversation(*range(turns - 1)), 0) is not None
        assert index.add(conversation(*range(turns)), 0) is not None
    assert len(index._free[0]) == 6
    assert index.find([*conversation(*range(6)), 1]).length == 6 * SHORTEST


def test_within_the_windows_entries_are_cut_and_replaced():
    index = PrefixIndex(shards=1, entries=8, sizes=[1000])
    for turns in range(1, 6):
        assert index.add(conversation(*range(turns)), 0) is not None
    assert len(index._free[0]) == 7
    match = index.find([*conversation(0, 1, 2, 9), 1])
    assert match.length == 3 * SHORTEST
    assert index.find([*conversation(0, 9, 9, 9), 1]) is None  # less than half


@settings(max_examples=30)
@given(st.data(), st.sampled_from([30, 200, 1000]), st.integers(1, 2))
def test_the_index_holds_the_last_used_and_finds_the_longest(data, window, shards):
    """Against a list of all prefixes: entries are distinct, and a match is a usable one."""
    index, entries = PrefixIndex(shards, 3, [window, 1000]), 3
    held = {}
    for _ in range(data.draw(st.integers(1, 25))):
        turns = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=4))
        tokens, shard = conversation(*turns), data.draw(st.integers(0, shards - 1))
        entry = index.add(tokens, shard)
        if entry is not None:
            assert 0 <= entry < entries
            held[shard, entry] = tokens
        asked = conversation(*data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=5)))
        match = index.find([*asked, 7])
        if match:
            stored = held[match.prefix.shard, match.prefix.entry]
            np.testing.assert_array_equal(stored, match.prefix.tokens)
            np.testing.assert_array_equal(stored[: match.length], asked[: match.length])
            assert match.length == len(stored) or len(stored) < window
            assert match.length >= len(asked) / 2
            index.touch(match.prefix)
        for number in range(shards):
            used = [p.entry for p in index._prefixes if p.shard == number]
            assert sorted([*used, *index._free[number]]) == list(range(entries))

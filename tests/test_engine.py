"""The engine: nanochat's greedy continuations, and samples that do not depend on the batch."""

import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_grammar import Pieces
from test_model import golden_overrides, named

from MaxNano import pyconfig
from MaxNano.distributed import runtime
from MaxNano.inference.engine import Engine
from MaxNano.inference.grammar import compile_json
from MaxNano.inference.programs import EnginePrograms, decode_costs, lower_decode, lower_prefill
from MaxNano.inference.requests import Completion, Request
from MaxNano.inference.text_stream import TextStream
from MaxNano.interop import nanochat
from MaxNano.models.setup import set_up_model
from MaxNano.tokenization.tokenizer import SpecialIds, Tokenizer
from MaxNano.tools import calculator
from MaxNano.training import loading
from MaxNano.training import state as train_state
from MaxNano.training.checkpointing import Checkpointer
from MaxNano.training.loading import load_engine

pytestmark = pytest.mark.usefixtures("compiled_once")
ROOT = Path(__file__).parents[1]
LONGEST, SLOTS, INTERVAL = 320, 4, 5


class Letters(Tokenizer):
    """One letter per token, several tokens per letter; the last nine ids are special."""

    def __init__(self, size=250):
        special = SpecialIds(*range(size - 9, size))
        pieces = [bytes([97 + i % 26]) for i in range(size - 9)] + [b"<%d>" % i for i in special]
        super().__init__(pieces, special, (), "letters", 1)

    def encode(self, text):
        return [ord(letter) - 97 for letter in text]

    def _encode_rows(self, texts):
        return map(self.encode, texts)


@pytest.fixture(scope="module")
def golden():
    with np.load(ROOT / "tests/golden/nanochat_small.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def words(golden):
    return [
        str(ROOT / "configs/base.yml"),
        *golden_overrides(golden),
        f"stream_interval={INTERVAL}",
    ]


@pytest.fixture(scope="module")
def config(words):
    return pyconfig.initialize(words)


@pytest.fixture(scope="module")
def params(golden, config):
    return nanochat.to_params(named(golden, "final/"), config)


@pytest.fixture(scope="module")
def setup(config):
    return set_up_model(config, jax.devices()[:1])


@pytest.fixture(scope="module")
def served(setup, params):
    return Engine(setup, params, Letters(), slots=SLOTS, max_length=LONGEST)


@pytest.fixture(scope="module")
def logits(setup, params):
    """The full forward's logits (length, vocabulary) of tokens."""

    @jax.jit
    def compute(params, tokens):
        bound = setup.model.bind(params)
        return bound.logits(bound(tokens))

    def of(tokens):
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(compute(params, padded))[0, : len(tokens)]

    return of


def one(served, request):
    [[completion]] = served.generate([request])
    return completion


def prompt(length, seed=0):
    return tuple(np.random.default_rng(seed).integers(0, 241, length).tolist())


GREEDY = Request(prompt=prompt(20), max_tokens=12, temperature=0)


# ---- The model's own words ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded():
    """nanochat's greedy continuations, beyond window and context: tests/golden/README.md."""
    content = json.loads((ROOT / "tests/golden/engine_nanochat.json").read_text())
    return [(tuple(row["prompt"]), row["tokens"]) for row in content["continuations"]]


def test_greedy_tokens_are_nanochats(served, recorded):
    requests = [
        Request(prompt=given, max_tokens=len(tokens), temperature=0) for given, tokens in recorded
    ]
    for request, (_, tokens) in zip(requests, recorded, strict=True):
        assert one(served, request).tokens == tokens
    for [together], (_, tokens) in zip(served.generate(requests), recorded, strict=True):
        assert together.tokens == tokens and together.finish == "length"


@pytest.mark.slow
def test_greedy_tokens_are_nanochats_with_many_slots(setup, params, recorded):
    """Above runtime.FEW_ROWS rows, other matrix products run on a CPU."""
    served = Engine(setup, params, Letters(), slots=2 * runtime.FEW_ROWS, max_length=LONGEST)
    requests = [
        Request(prompt=given, max_tokens=len(tokens), temperature=0) for given, tokens in recorded
    ]
    for completions, (_, tokens) in zip(served.generate(requests), recorded, strict=True):
        assert completions[0].tokens == tokens


def test_sequences_end_with_the_room(served):
    completion = one(served, replace(GREEDY, prompt=prompt(LONGEST - 3), max_tokens=100))
    assert (len(completion.tokens), completion.finish) == (3, "length")


def test_log_probabilities_are_the_full_forwards(served, logits):
    completion = one(served, replace(GREEDY, logprobs=3, prompt_logprobs=True))
    tokens = [*GREEDY.prompt, *completion.tokens]
    expected = np.asarray(jax.nn.log_softmax(logits(tokens)))
    reported = [*completion.prompt_logprobs, *completion.logprobs]
    assert len(reported) == len(tokens) - 1
    for row, token, (logprob, top) in zip(expected[:-1], tokens[1:], reported, strict=True):
        assert logprob == pytest.approx(row[token], abs=1e-4)
        assert [i for i, _ in top] == np.argsort(-row)[:3].tolist()
        np.testing.assert_allclose([value for _, value in top], -np.sort(-row)[:3], atol=1e-4)


def test_a_prompt_can_be_scored_alone(served, logits):
    request = Request(prompt=prompt(30, 1), max_tokens=0, prompt_logprobs=True, samples=2)
    one_token = Request(prompt=(5,), max_tokens=0, prompt_logprobs=True)
    found, other = served.generate([request, one_token])
    row = np.asarray(jax.nn.log_softmax(logits(request.prompt)))
    expected = row[np.arange(29), np.array(request.prompt[1:])]
    for completion in found:
        assert completion.tokens == [] and completion.finish == "length"
        np.testing.assert_allclose(
            [value for value, _ in completion.prompt_logprobs], expected, atol=1e-4
        )
    assert other[0].prompt_logprobs == [] and other[0].finish == "length"


# ---- Sharing a batch ----------------------------------------------------------------------------

GRAMMAR = compile_json({"type": "array", "items": {"enum": ["a", "bc", 7]}}, Pieces())
REQUESTS = st.builds(
    Request,
    prompt=st.lists(st.integers(0, 249), min_size=1, max_size=60).map(tuple),
    max_tokens=st.integers(1, 13),
    samples=st.integers(1, 3),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 1, 20]),
    top_p=st.sampled_from([1.0, 0.8]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.0, -1.5]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.0, 2.0]),
    logit_bias=st.sampled_from([(), (), (), ((3, 5.0), (249, -100.0))]),
    grammar=st.sampled_from([None, None, None, GRAMMAR]),
    seed=st.integers(-5, 2**64),
    stop_ids=st.frozensets(st.integers(0, 249), max_size=4),
    stop=st.sampled_from([(), ("a", "bc")]),
    logprobs=st.sampled_from([None, None, 0, 2]),
)


@settings(max_examples=12)
@given(st.lists(REQUESTS, min_size=2, max_size=6))
def test_a_request_gets_the_same_alone_and_in_any_batch(served, requests):
    """Bit-identical, log-probabilities included."""
    together = served.generate(requests)
    for request, completions in zip(requests, together, strict=True):
        assert served.generate([request]) == [completions]


def test_samples_differ_by_index_and_seed_and_are_the_same_again(served):
    request = replace(GREEDY, temperature=2.0, samples=3, seed=7)
    [samples] = served.generate([request])
    assert len({tuple(sample.tokens) for sample in samples}) == 3
    assert served.generate([request]) == [samples]
    [others] = served.generate([replace(request, seed=8)])
    assert {tuple(sample.tokens) for sample in samples}.isdisjoint(
        tuple(sample.tokens) for sample in others
    )


def test_one_prefill_serves_many_samples(served, monkeypatch):
    calls = []
    prefill = served._runner.prefill
    monkeypatch.setattr(
        served._runner, "prefill", lambda *args: calls.append(args) or prefill(*args)
    )
    [samples] = served.generate([replace(GREEDY, samples=SLOTS)])
    assert len(calls) == 1 and all(sample == samples[0] for sample in samples)
    [samples] = served.generate([replace(GREEDY, samples=2 * SLOTS + 1)])
    assert len(samples) == 2 * SLOTS + 1 and all(sample == samples[0] for sample in samples)


def test_requests_join_and_leave_a_running_batch(served):
    alone = one(served, replace(GREEDY, max_tokens=40))
    found = {}

    def take(events):
        for event in events:
            found.setdefault((event.request, event.sample), Completion()).add(event)

    long = [served.submit(replace(GREEDY, max_tokens=40)) for _ in range(SLOTS - 1)]
    take(served.step())
    short = served.submit(replace(GREEDY, max_tokens=2))
    take(served.step())
    assert found[short, 0].finish == "length" and served.running == SLOTS - 1
    late = [
        served.submit(replace(GREEDY, prompt=prompt(5, seed), max_tokens=3)) for seed in range(3)
    ]
    assert served.waiting == 3
    while not served.is_idle:
        take(served.step())
    assert all(found[number, 0] == alone for number in long)
    assert [len(found[number, 0].tokens) for number in late] == [3, 3, 3]
    assert found[late[1], 0] == one(served, replace(GREEDY, prompt=prompt(5, 1), max_tokens=3))


def test_a_slot_is_refilled_at_once_when_somebody_waits(served):
    """If requests wait, a round on the device ends with the first sample that ends."""
    for _ in range(SLOTS - 1):
        served.submit(replace(GREEDY, max_tokens=40))
    served.submit(replace(GREEDY, max_tokens=2))
    last = served.submit(replace(GREEDY, max_tokens=1))
    gained = [len(event.tokens) for event in served.step()]
    assert gained == [2] * SLOTS
    assert any(event.request == last for event in served.step())
    while not served.is_idle:
        served.step()


@pytest.mark.parametrize(
    ("milliseconds", "gains"), [(0, [1] * 12), (1e6, [1, INTERVAL, INTERVAL, 1])]
)
def test_streamed_answers_come_by_the_clock(words, params, served, milliseconds, gains):
    """The first round has one step, later ones as many as fit the interval."""
    config = pyconfig.initialize([*words, f"stream_milliseconds={milliseconds}"])
    setup = set_up_model(config, jax.devices()[:1])
    streaming = Engine(setup, params, Letters(), slots=SLOTS, max_length=LONGEST, streams=True)
    found, gained = Completion(), []
    streaming.submit(GREEDY)
    while not streaming.is_idle:
        [event] = streaming.step()
        found.add(event)
        gained.append(len(event.tokens))
    assert found == one(served, GREEDY)
    assert gained == gains
    assert "adjusted_decode" not in vars(streaming.programs)  # nor compiled for those who need none


def test_several_hosts_do_not_stream(setup, params, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="a single host: leave num_processes null"):
        Engine(setup, params, Letters(), streams=True)


def test_cancelled_requests_leave_their_slots(served):
    numbers = [served.submit(replace(GREEDY, max_tokens=30, samples=2)) for _ in range(4)]
    served.step()
    assert (served.running, served.waiting) == (SLOTS, 2)
    served.cancel(numbers[0])
    served.cancel(numbers[3])
    served.cancel(12345)
    assert (served.running, served.waiting) == (SLOTS - 2, 1)
    events = served.step()
    ended = [(event.request, event.sample) for event in events if event.finish == "cancelled"]
    assert sorted(ended) == [(numbers[0], 0), (numbers[0], 1), (numbers[3], 0), (numbers[3], 1)]
    assert {event.request for event in events if event.tokens} == {numbers[1], numbers[2]}
    while not served.is_idle:
        served.step()
    assert served.running == 0


def test_after_a_failure_all_end_with_an_error_and_the_engine_is_new(served, monkeypatch):
    expected = one(served, GREEDY)
    numbers = [served.submit(replace(GREEDY, samples=3)) for _ in range(2)]
    served.step()
    with monkeypatch.context() as patch:
        patch.setattr(served._runner, "decode", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            served.step()
    served.reset()
    ended = [(event.request, event.sample, event.finish) for event in served.step()]
    assert sorted(ended) == [(number, sample, "error") for number in numbers for sample in range(3)]
    assert one(served, GREEDY) == expected and served.running == 0


# ---- Settings of a request ----------------------------------------------------------------------


def test_a_stop_id_ends_a_sample_and_is_not_part_of_it(served):
    tokens = one(served, GREEDY).tokens
    stopped = one(served, replace(GREEDY, stop_ids=frozenset({tokens[7]}), logprobs=0))
    first = tokens.index(tokens[7])
    assert (
        stopped.tokens == tokens[:first]
        and stopped.finish == "stop"
        and len(stopped.logprobs) == first
    )


def test_a_stop_string_cuts_the_text(served):
    whole = one(served, replace(GREEDY, max_tokens=30))
    assert whole.text == served.tokenizer.decode(whole.tokens) and len(whole.text) == 30
    stop = whole.text[10:14]
    at = whole.text.index(stop)
    stopped = one(served, replace(GREEDY, max_tokens=30, stop=("something else", stop)))
    assert stopped.text == whole.text[:at] and stopped.finish == "stop"
    assert stopped.tokens == whole.tokens[: at + 4]
    [beginning, end] = [stop[:2] + "something", whole.text[-2:] + "more"]
    assert one(served, replace(GREEDY, max_tokens=30, stop=(beginning, end))).text == whole.text


@settings(max_examples=200)
@given(st.data(), st.text("aé😀b", max_size=12), st.text("aé😀b", min_size=1, max_size=3))
def test_text_is_whole_characters_before_the_stop_string(data, text, stop):
    stream = TextStream((stop, "never"))
    left = text.encode()
    pieces = []
    while left:
        size = data.draw(st.integers(1, 5))
        pieces.append(stream.push(left[:size]))
        left = left[size:]
    shown = "".join(pieces)
    assert text.startswith(shown) and "�" not in shown
    assert shown + stream.close() == text.split(stop)[0]
    assert stream.is_stopped == (stop in text)


def test_bytes_that_are_no_text_are_shown_as_such():
    stream = TextStream()
    assert stream.push(b"a\xff\xf0\x9f") + stream.close() == "a��"


def test_repetition_penalty_keeps_tokens_from_coming_again(served):
    completion = one(served, replace(GREEDY, max_tokens=40, repetition_penalty=100.0))
    seen = [*GREEDY.prompt, *completion.tokens]
    assert len(set(completion.tokens)) == 40 and len(set(seen)) == len(set(GREEDY.prompt)) + 40


def test_presence_and_frequency_penalties_count_what_was_sampled(served, logits):
    """Each token is the likeliest after its logits lose the penalties; the prompt does not count."""
    request = replace(GREEDY, max_tokens=30, frequency_penalty=1.5, presence_penalty=-0.5)
    tokens = one(served, request).tokens
    rows = logits([*request.prompt, *tokens])[len(request.prompt) - 1 : -1]
    for i, (row, token) in enumerate(zip(rows, tokens, strict=True)):
        counts = np.bincount(tokens[:i], minlength=len(row))
        assert token == np.argmax(row - 1.5 * counts + 0.5 * (counts > 0))


def test_a_logit_bias_bans_and_forces_tokens(served):
    banned = one(served, GREEDY).tokens[0]
    completion = one(served, replace(GREEDY, logit_bias=((banned, -100.0),)))
    assert banned not in completion.tokens
    forced = one(served, replace(GREEDY, logit_bias=((11, 100.0), (banned, -3.0))))
    assert forced.tokens == [11] * GREEDY.max_tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_json_is_complete_when_its_tokens_are_used_up(served, temperature):
    """A text without a limit: a model that does not end it is made to, in time."""
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    grammar = compile_json(schema | {"additionalProperties": False}, Pieces())
    request = Request(prompt(9), 30, samples=4, temperature=temperature, grammar=grammar)
    for sample in served.generate([request])[0]:
        assert sample.finish == "stop"
        assert json.loads(Pieces().decode(sample.tokens)).keys() == {"a"}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammar_holds_in_a_batch_that_others_share(served, temperature):
    """Complete values satisfy it and end with stop, others end with length; neighbors are as alone."""
    request = Request(prompt(9), 40, samples=6, temperature=temperature, grammar=GRAMMAR)
    neighbor = replace(GREEDY, max_tokens=40, temperature=0.8)
    samples, [beside] = served.generate([request, neighbor])
    assert beside == one(served, neighbor)
    for sample in samples:
        text = Pieces().decode(sample.tokens)
        if sample.finish == "stop":
            assert set(json.loads(text)) <= {"a", "bc", 7}
        else:
            assert sample.finish == "length" and len(sample.tokens) == 40 and text[0] == "["
    biased = ((Pieces().encode("]")[0], 100.0),)  # ends as soon as the grammar lets it
    ended = one(served, replace(request, samples=1, logit_bias=biased))
    assert ended.finish == "stop" and Pieces().decode(ended.tokens) == "[]"
    cut = one(served, replace(request, samples=1, max_tokens=1, logit_bias=biased))
    assert (cut.finish, len(cut.tokens)) == ("length", 1)


def test_the_end_of_the_answer_is_sampled_only_after_a_complete_value(served):
    integer, tokenizer = compile_json({"type": "integer"}, Pieces()), Pieces()
    biased = ((tokenizer.special.assistant_end, 100.0),)
    ended = one(served, replace(GREEDY, grammar=integer, logit_bias=biased))
    assert ended.finish == "stop" and tokenizer.decode(ended.tokens).strip().isdigit()


def test_top_k_of_one_is_greedy(served):
    assert one(served, replace(GREEDY, temperature=5.0, top_k=1)) == one(served, GREEDY)


def test_draws_follow_the_models_probabilities(served, logits):
    """First tokens of 400 samples against the full forward: chi-square test with 8 classes."""
    [samples] = served.generate([replace(GREEDY, temperature=1.0, max_tokens=1, samples=400)])
    probability = np.asarray(jax.nn.softmax(logits(GREEDY.prompt)[-1]))
    groups = np.argsort(-probability) % 8
    expected = 400 * np.bincount(groups, probability, 8)
    counted = np.bincount([groups[sample.tokens[0]] for sample in samples], minlength=8)
    assert (
        (counted - expected) ** 2 / expected
    ).sum() < 24.3  # one seed in a thousand is above, this one is not


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"prompt": ()}, "the prompt is empty"),
        ({"prompt": (250,)}, "token id"),
        ({"prompt": prompt(LONGEST)}, f"the context of {LONGEST} tokens"),
        ({"max_tokens": 0}, "max_tokens must be"),
        ({"samples": 0}, "samples must be"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"frequency_penalty": 2.5}, "frequency_penalty=2.5 must be between -2 and 2"),
        ({"presence_penalty": float("nan")}, "presence_penalty=nan"),
        ({"logit_bias": ((250, 1.0),)}, "logit_bias of token 250"),
        ({"logit_bias": ((1, 101.0),)}, "logit_bias=101.0 of token 1"),
        ({"logit_bias": ((1, 1.0),) * 1025}, "logit_bias has 1025 tokens"),
        ({"grammar": compile_json(None, Pieces(251))}, "the grammar has 251 tokens"),
        ({"logprobs": 21}, "logprobs=21"),
        ({"stop_ids": frozenset(range(17))}, "at most 15 are supported"),
        ({"stop": ("",)}, "a stop string is empty"),
    ],
)
def test_what_cannot_be_served_is_refused(served, changes, problem):
    with pytest.raises(ValueError, match=re.escape(problem)):
        served.submit(replace(GREEDY, **changes))
    assert served.is_idle


# ---- Tools --------------------------------------------------------------------------------------


def test_a_call_of_the_calculator_is_answered(served, monkeypatch, logits):
    """Two tokens of a greedy completion are declared special, so that it calls the tool."""
    tokens = one(served, GREEDY).tokens
    start = 1
    end = next(i for i in range(start + 2, 12) if tokens[i] not in tokens[:i])
    special = served.tokenizer.special._replace(python_start=tokens[start], python_end=tokens[end])
    monkeypatch.setattr(served.tokenizer, "special", special)
    asked = []
    monkeypatch.setattr(calculator, "calculate", lambda text: asked.append(text) or "abcdefgh")
    completion = one(served, replace(GREEDY, max_tokens=25, tools=True, logprobs=0))
    assert asked[0] == served.tokenizer.decode(tokens[start + 1 : end])
    answer = [special.output_start, *range(8), special.output_end]
    stop = end + 1 + len(answer)
    assert completion.tokens[:stop] == tokens[: end + 1] + answer
    assert completion.forced[:stop] == [False] * (end + 1) + [True] * len(answer)
    # What follows is what the model says after the answer.
    rows = logits([*GREEDY.prompt, *completion.tokens])
    said = rows[len(GREEDY.prompt) - 1 : -1].argmax(1)
    drawn = ~np.array(completion.forced)
    assert len(completion.tokens) == 25
    np.testing.assert_array_equal(said[drawn], np.array(completion.tokens)[drawn])


def test_a_call_without_an_answer_goes_on(served, monkeypatch):
    expected = one(served, GREEDY)
    special = served.tokenizer.special._replace(
        python_start=expected.tokens[0], python_end=expected.tokens[3]
    )
    monkeypatch.setattr(served.tokenizer, "special", special)
    monkeypatch.setattr(calculator, "calculate", lambda text: None)
    completion = one(served, replace(GREEDY, tools=True))
    assert completion.tokens == expected.tokens and True not in completion.forced
    assert [part.kind for part in completion.parts] == ["python", "text"]


# ---- Where it comes from and where it runs ------------------------------------------------------


def test_loads_a_run(config, params, served, tmp_path, monkeypatch):
    config = pyconfig.replace(config, "test", base_output_directory=str(tmp_path), run_name="tiny")
    state = train_state.TrainState(
        jnp.int32(3), jax.tree.map(jnp.asarray, params), {"unused": jnp.zeros(2)}
    )
    with Checkpointer(config, tmp_path / "tiny", tokenizer_fingerprint="letters") as checkpointer:
        checkpointer.save(3, state, {})
        checkpointer.wait()
    monkeypatch.setattr(loading, "load_tokenizer", lambda config: Letters())
    loaded = load_engine(config, devices=jax.devices()[:1])
    assert (loaded.slots, loaded.max_length) == (config.decode_slots, config.max_target_length)
    assert loaded.trained_steps == 3
    for ours, theirs in zip(
        jax.tree.leaves(loaded._runner.weights),
        jax.tree.leaves(served._runner.weights),
        strict=True,
    ):
        if ours.shape == theirs.shape:  # the rotary tables are as long as max_length
            np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(ValueError, match="4"):
        load_engine(pyconfig.replace(config, "test", step=4), devices=jax.devices()[:1])


def test_serves_other_parameters(served, params):
    expected = one(served, GREEDY)
    served.set_params({**params, "lm_head": params["lm_head"][::-1].copy()})
    assert one(served, GREEDY) != expected
    served.set_params(params)
    assert one(served, GREEDY) == expected


def test_decode_costs_follow_the_declared_parameters(setup):
    programs = EnginePrograms.build(setup, slots=SLOTS, max_length=LONGEST)
    params = setup.params
    matrices = jax.tree.leaves([params["layers"], params["lm_head"], params["value_gate"]])
    count = sum(leaf.size for leaf in matrices)
    config, weight_bytes = setup.config, 4 * count
    read_bytes, flops = decode_costs(programs, 0)
    assert read_bytes == weight_bytes
    assert flops == 2 * (count + params["smear_gate"].size) * SLOTS
    longer_bytes, longer_flops = decode_costs(programs, 10)
    positions = 10 * config.num_decoder_layers * config.head_dim * SLOTS
    assert longer_bytes - read_bytes == 4 * 2 * positions * config.num_kv_heads
    assert longer_flops - flops == 4 * positions * config.num_query_heads


@pytest.mark.parametrize("slots", [1, SLOTS])
def test_the_cache_is_never_copied(config, slots):
    config = pyconfig.replace(config, "test", num_decoder_layers=2)
    setup = set_up_model(config, jax.devices()[:1])
    programs = EnginePrograms.build(setup, slots=slots, max_length=LONGEST)
    rings = {f"f32[{','.join(map(str, ring.shape))}]" for ring in jax.tree.leaves(programs.cache)}
    for lowered in (lower_decode(programs), lower_prefill(programs, 64)):
        text = lowered.compile().as_text()
        assert all(ring in text for ring in rings)
        copied = re.findall(r"= (\S+?)\{\S* (?:copy|copy-start)\(", text)
        assert rings.isdisjoint(copied)


def answers_of_every_kind(served):
    """[tokens, log-probabilities] of samples that share prompts, are adjusted, and of two turns."""
    requests = [
        replace(
            GREEDY, prompt=prompt(length, length), samples=2, temperature=t, top_k=k, logprobs=1
        )
        for length, t, k in ((3, 0, 0), (150, 1, 5), (40, 0.5, 0))
    ]
    requests += [
        replace(GREEDY, grammar=GRAMMAR, temperature=1.0, logprobs=0),
        replace(GREEDY, frequency_penalty=1.5, logit_bias=((7, 4.0),), samples=3, logprobs=0),
    ]
    samples = [sample for row in served.generate(requests) for sample in row]
    turns = [replace(GREEDY, prompt=prompt(length, length), logprobs=0) for length in (80, 90, 70)]
    for _ in range(2):
        answers = [sample for [sample] in served.generate(turns)]
        turns = [
            replace(turn, prompt=(*turn.prompt, *answer.tokens, *prompt(5)))
            for turn, answer in zip(turns, answers, strict=True)
        ]
        samples += answers
    return [[sample.tokens, [x.logprob for x in sample.logprobs]] for sample in samples]


SEVERAL_DEVICES = """
import json, sys
import jax
from test_engine import *
golden = dict(np.load(ROOT / "tests/golden/nanochat_small.npz"))
config = pyconfig.initialize([
    str(ROOT / "configs/base.yml"), *golden_overrides(golden), "ici_fsdp_parallelism=2", "ici_tensor_parallelism=2",
])
params = nanochat.to_params(named(golden, "final/"), config)
served = Engine(set_up_model(config), params, None, slots=3, max_length=192, prefix_entries=3)
assert served.slots == 4 and served.programs.setup.data_parallel_size == 2
answers = answers_of_every_kind(served)
assert served.prefix_cache.tokens_reused >= 240, served.prefix_cache.tokens_reused
print(json.dumps(answers))
"""


@pytest.mark.slow
def test_slots_and_heads_over_several_devices(served):
    """Two data-parallel shards of two tensor-parallel devices, with a prefix cache."""
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *sys.path]),
    }
    result = programs.run("-c", SEVERAL_DEVICES, env=environment)
    assert result.returncode == 0, result.stderr
    pairs = zip(json.loads(result.stdout), answers_of_every_kind(served), strict=True)
    for (tokens, logprobs), (expected, expected_logprobs) in pairs:
        assert tokens == expected
        np.testing.assert_allclose(logprobs, expected_logprobs, atol=1e-4)

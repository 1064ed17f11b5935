"""Several tool calls in a reply, and tools in /v1/responses, as OpenAI's client reads them."""

import json
import random

import numpy as np
import pytest
from client_requests import assistant, user
from fake_engine import FakeEngine
from serving import Server
from test_serve_clients import (
    CALL,
    CHAT,
    RESPONSES,
    SPECIAL,
    TOKENIZER,
    WEATHER,
    answer,
    post,
)

from MaxNano.inference.dialogue import ReplyPart, prompt_ids
from MaxNano.serving.api_fields import BodyFields
from MaxNano.serving.tool_calls import MAX_CALLS, ToolCallReader, take_tools

SAY = {
    "type": "function",
    "function": {
        "name": "say",
        "parameters": {
            "type": "object",
            "properties": {"word": {"enum": ["}", "a\n", '"']}},
            "required": ["word"],
        },
    },
}
FLAT = [{"type": "function", **each["function"]} for each in (SAY, WEATHER)]  # of /v1/responses
TOOLS = [SAY, WEATHER]
ONE_TOOL = {"type": "function", "function": {"name": "say"}}


def talkative(request, sample):
    """Random tokens, of those that the grammar permits; ends seldom before it must."""
    draw, state = random.Random(request.seed + sample), request.grammar.start()
    for left in range(request.max_tokens, 0, -1):
        state.limit(left)
        allowed = np.flatnonzero(np.unpackbits(state.allowed.view(np.uint8), bitorder="little"))
        others = [token for token in allowed.tolist() if token != SPECIAL.assistant_end]
        closing = [token for token in others if token in b'"}']
        if others and draw.random() > 0.1:
            token = draw.choice(closing or others)
        else:
            token = int(allowed[-1])
        yield token
        if token == SPECIAL.assistant_end:
            return
        state.take(token)
        if state.finish:
            return


@pytest.fixture(scope="module")
def server():
    """An untrained model with space for many calls."""
    with Server(FakeEngine(talkative, step_tokens=16, max_length=1024)) as running:
        yield running


@pytest.fixture(scope="module")
def speaker():
    """A server whose model says what a test sets."""
    with Server(FakeEngine(answer(""), step_tokens=3)) as running:
        yield running


def check(name, arguments):
    """The arguments satisfy the schema of the tool."""
    arguments = json.loads(arguments)
    if name == "say":
        assert arguments.keys() == {"word"} and arguments["word"] in ("}", "a\n", '"')
    else:
        assert name == "get_weather" and arguments.keys() == {"city", "unit"}
        assert arguments["unit"] in ("C", "F")


def choice_of(server, **fields):
    """The choice of a chat that must call one of its tools."""
    fields = {"tools": TOOLS, "tool_choice": "required", "temperature": 1} | fields
    create = server.client.chat.completions.create
    [choice] = create(model="tiny", messages=[user("both?")], **fields).choices
    return choice


def test_an_untrained_model_writes_several_valid_calls(server):
    counts = []
    for seed in range(4):
        choice = choice_of(server, seed=seed)
        calls = choice.message.tool_calls
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        for call in calls:
            check(call.function.name, call.function.arguments)
        assert len({call.id for call in calls}) == len(calls) <= MAX_CALLS
        counts.append(len(calls))
    assert max(counts) > 2


@pytest.mark.parametrize(
    "fields", [{"parallel_tool_calls": False}, {"tool_choice": ONE_TOOL}], ids=["off", "named"]
)
def test_there_is_one_call_if_more_are_not_wanted(server, fields):
    for seed in range(3):
        [call] = choice_of(server, seed=seed, **fields).message.tool_calls
        check(call.function.name, call.function.arguments)


def test_calls_are_streamed_by_their_index(server):
    fields = {"model": "tiny", "messages": [user("both?")], "tools": TOOLS, "seed": 2}
    fields |= {"tool_choice": "required", "temperature": 1}
    whole = choice_of(server, seed=2).message.tool_calls
    assert len(whole) > 1
    pieces = {}
    for chunk in server.client.chat.completions.create(**fields, stream=True):
        for call in chunk.choices[0].delta.tool_calls or ():
            assert call.index in pieces or (call.index == len(pieces) and call.id)
            name, arguments = pieces.get(call.index, (call.function.name, ""))
            pieces[call.index] = name, arguments + call.function.arguments
    assert list(pieces.values()) == [
        (call.function.name, call.function.arguments) for call in whole
    ]
    with server.client.chat.completions.stream(**fields) as events:
        [final] = events.get_final_completion().choices
    assert [call.function for call in final.message.tool_calls]
    assert [call.function.arguments for call in final.message.tool_calls] == [
        call.function.arguments for call in whole
    ]


def test_a_further_call_begins_only_if_there_is_space_for_it(server):
    """Whatever max_tokens is, no call is cut, if the first one has space."""
    counts = set()
    for max_tokens in range(80, 300, 20):
        choice = choice_of(server, tools=[SAY], seed=1, max_tokens=max_tokens)
        for call in choice.message.tool_calls:
            check(call.function.name, call.function.arguments)
        assert choice.finish_reason == "tool_calls"
        counts.add(len(choice.message.tool_calls))
    assert len(counts) > 2


SAYING = '{"name": "say", "arguments": {"word": "}"}}'


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("said", "names"),
    [
        (f"{CALL}\n{SAYING}", ["get_weather", "say"]),
        (f"\n{SAYING}{CALL} {SAYING}\n", ["say", "get_weather", "say"]),
        (f"{CALL}\nThat is all.", []),
        (f'{CALL}\n{{"name": "other", "arguments": {{}}}}', []),
        (f"{CALL}\n{SAYING[:-1]}", []),
    ],
)
def test_a_free_reply_is_calls_if_it_has_nothing_else(speaker, said, names, stream):
    speaker.engine.reply = answer(said)
    fields = {"model": "tiny", "messages": [user("hi")], "tools": TOOLS}
    for parallel in (True, False):
        asked = fields | {"parallel_tool_calls": parallel}
        if stream:
            with speaker.client.chat.completions.stream(**asked) as events:
                [choice] = events.get_final_completion().choices
        else:
            [choice] = speaker.client.chat.completions.create(**asked).choices
        called = [call.function.name for call in choice.message.tool_calls or ()]
        assert called == (names if parallel else names[:1])
        assert choice.finish_reason == ("tool_calls" if names else "stop")
        assert bool(names) or choice.message.content == said


def test_calls_are_found_at_any_cut():
    text = f"{SAYING}\n {CALL}\n{SAYING}"
    tools = take_tools(BodyFields({"tools": TOOLS, "tool_choice": "required"}))
    for size in range(1, len(text) + 2):
        reader, calls = ToolCallReader(tools), []
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        for i, piece in enumerate(pieces):
            parts, new = reader.feed([ReplyPart("text", piece)], i == len(pieces) - 1)
            assert parts == []
            calls += new
        assert [call.name for call in calls if call.id] == ["say", "get_weather", "say"]
        for index, line in enumerate((SAYING, CALL, SAYING)):
            arguments = "".join(call.arguments for call in calls if call.index == index)
            assert json.loads(arguments) == json.loads(line)["arguments"]


# ---- /v1/responses ------------------------------------------------------------------------------


def test_responses_call_tools(server):
    counts = []
    for seed in range(2):
        reply = server.client.responses.create(
            model="tiny",
            input="both?",
            tools=FLAT,
            tool_choice="required",
            temperature=1,
            extra_body={"seed": seed},
        )
        assert reply.status == "completed" and reply.parallel_tool_calls
        assert [tool.name for tool in reply.tools] == ["say", "get_weather"]
        for item in reply.output:
            assert item.type == "function_call" and item.status == "completed"
            assert item.id.startswith("fc_") and item.call_id.startswith("call_")
            check(item.name, item.arguments)
        counts.append(len(reply.output))
        # The engine was asked for the same as by a chat.
        [told] = server.engine.requests[-1:]
        choice_of(server, seed=seed)
        assert server.engine.requests[-1].prompt == told.prompt
    assert max(counts) > 1
    [one] = server.client.responses.create(
        model="tiny",
        input="both?",
        tools=FLAT,
        tool_choice={"type": "function", "name": "say"},
    ).output
    assert one.name == "say"
    [one] = server.client.responses.create(
        model="tiny",
        input="both?",
        tools=FLAT,
        tool_choice="required",
        parallel_tool_calls=False,
    ).output


def test_responses_stream_calls(server):
    asked = {"model": "tiny", "input": "both?", "tools": FLAT, "tool_choice": "required"}
    asked |= {"temperature": 1, "extra_body": {"seed": 2}}
    events = list(server.client.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:2] == ["created", "in_progress"] and kinds[-1] == "completed"
    output = events[-1].response.output
    assert len(output) > 1
    for index, item in enumerate(output):
        mine = [event for event in events if getattr(event, "output_index", None) == index]
        added, *deltas, done, item_done = mine
        assert added.type == "response.output_item.added" and added.item.arguments == ""
        assert added.item.status == "in_progress" and added.item.call_id == item.call_id
        assert {each.type for each in deltas} == {"response.function_call_arguments.delta"}
        assert "".join(each.delta for each in deltas) == item.arguments == done.arguments
        assert done.type == "response.function_call_arguments.done"
        assert item_done.type == "response.output_item.done" and item_done.item == item
        assert {each.item_id for each in (*deltas, done)} == {item.id}
        check(item.name, item.arguments)
    with server.client.responses.stream(**asked) as stream:
        final = stream.get_final_response().output
    assert [item.arguments for item in final] == [item.arguments for item in output]


def test_responses_say_text_although_there_are_tools(speaker):
    for said in ("It is cold.", ""):
        speaker.engine.reply = answer(said)
        asked = {"model": "tiny", "input": "hi", "tools": FLAT}
        reply = speaker.client.responses.create(**asked)
        assert reply.output_text == said and [item.type for item in reply.output] == ["message"]
        with speaker.client.responses.stream(**asked) as stream:
            assert stream.get_final_response().output_text == said
    speaker.engine.reply = answer(f"{CALL}\n{SAYING}")
    names = [item.name for item in speaker.client.responses.create(**asked).output]
    assert names == ["get_weather", "say"]
    cut = speaker.client.responses.create(**asked | {"max_output_tokens": 9})
    assert cut.status == cut.output[0].status == "incomplete"


def test_responses_take_calls_and_their_results(speaker):
    """As a chat has them: the calls of a reply are its lines."""
    calls = [
        {
            "type": "function_call",
            "call_id": f"c{i}",
            "name": "say",
            "arguments": f'{{"word": {i}}}',
        }
        for i in range(2)
    ]
    results = [
        {"type": "function_call_output", "call_id": "c0", "output": "zero"},
        {
            "type": "function_call_output",
            "call_id": "c1",
            "output": [{"type": "input_text", "text": "one"}],
        },
    ]
    thought = {"type": "reasoning", "id": "rs_1", "summary": []}
    speaker.engine.reply = answer("Done.")
    given = [user("hi"), thought, *calls, *results]
    assert speaker.client.responses.create(model="tiny", input=given).output_text == "Done."
    lines = [f'{{"name": "say", "arguments": {{"word": {i}}}}}' for i in range(2)]
    plain = [user("hi"), assistant("\n".join(lines))]
    plain += [user("Result of say: zero"), user("Result of say: one")]
    assert list(speaker.engine.requests[-1].prompt) == prompt_ids(TOKENIZER, plain)


def test_what_responses_cannot_do_with_tools_is_refused(speaker):
    for fields, param in (
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [*FLAT, {"type": "custom", "name": "x"}]}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "name": ""}]}, "tools[0].name"),
        ({"tools": FLAT, "tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
        ({"tools": FLAT, "parallel_tool_calls": "yes"}, "parallel_tool_calls"),
        ({"tool_choice": "required"}, "tool_choice"),
    ):
        status, reply = post(speaker, RESPONSES, {"input": "hi", **fields})
        error = reply["error"]
        assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)


# ---- Failures ------------------------------------------------------------------------------------


def test_a_failure_is_the_requests_fault_only_if_its_grammar_failed():
    """500 for the engine's; the client may send that again."""

    def reply(request, sample):
        engine.fails = True
        yield from b'{"name": "say"'

    engine = FakeEngine(reply, step_tokens=1)
    with Server(engine) as running:
        for fields in ({"tools": TOOLS, "tool_choice": "required"}, {}):
            status, told = post(running, CHAT, {"messages": [user("hi")], **fields})
            assert (status, told["error"]["type"]) == (500, "server_error")
            assert bool(engine.requests[-1].grammar) == bool(fields)
        engine.reply = lambda request, sample: [ord("{"), SPECIAL.assistant_end]
        engine.failure = "grammar_error"
        fields = {"response_format": {"type": "json_object"}}
        status, told = post(running, CHAT, {"messages": [user("hi")], **fields})
        assert (status, told["error"]["type"]) == (400, "invalid_request_error")
        assert "JSON schema" in told["error"]["message"]

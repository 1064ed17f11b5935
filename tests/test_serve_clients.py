"""What clients send to the server: recorded requests, values for "off", long chats, tools, JSON."""

import http.client
import itertools
import json
import random
import time

import client_requests
import pytest
from client_requests import READ_FILE, SEARCH, assistant, system, user
from fake_engine import FakeEngine, byte_tokenizer
from serving import Server

from MaxNano import pyconfig
from MaxNano.inference.dialogue import prompt_ids
from MaxNano.serving import api_fields
from MaxNano.serving.api_fields import ApiError, BodyFields
from MaxNano.serving.tool_calls import ArgumentScanner, Tools, move_references, take_tools

TOKENIZER = byte_tokenizer()
SPECIAL = TOKENIZER.special
CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 12},
                "unit": {"enum": ["C", "F"]},
            },
            "required": ["city", "unit"],
        },
    },
}


CLOSING = {*b'"}]', SPECIAL.assistant_end}


def answer(text):
    """A model that says one thing."""
    return lambda request, sample: [*text.encode(), SPECIAL.assistant_end]


def untrained(request, sample):
    """A model without any idea: random tokens, of those that the grammar permits."""
    draw = random.Random(request.seed + sample)
    state = request.grammar.start() if request.grammar else None
    while state is None:
        yield draw.randrange(32, 127)
    for left in range(request.max_tokens, 0, -1):
        if state.finish:
            return
        state.limit(left)
        allowed = [t for t in range(265) if state.allowed[t // 32] >> (t % 32) & 1]
        # Texts of a schema may be of any length; this model prefers short ones.
        closing = [t for t in allowed if t in CLOSING]
        token = draw.choice(closing if closing and draw.random() < 0.3 else allowed)
        yield token
        if token == SPECIAL.assistant_end:
            return
        state.take(token)


@pytest.fixture(scope="module")
def server():
    with Server(FakeEngine(untrained, slots=4, step_tokens=16)) as running:
        yield running


@pytest.fixture(scope="module")
def speaker():
    """A server whose model says what a test sets."""
    with Server(FakeEngine(answer(""), step_tokens=3)) as running:
        yield running


def post(server, path, body, **headers):
    """(status, object) of a request."""
    status, _, content = server.request("POST", path, body, headers)
    return status, json.loads(content)


def events_of(content):
    """The objects of a stream."""
    *events, end = content.decode().removesuffix("\n\n").split("\n\n")
    assert end == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


def choice(content):
    """The only choice of a reply."""
    [only] = json.loads(content)["choices"]
    return only


def ask(server, **fields):
    """The engine's request for the body of a chat, which must be answered."""
    status, reply = post(server, CHAT, {"messages": [user("hi")], "max_tokens": 4, **fields})
    assert status == 200, reply
    return server.engine.requests[-1]


# ---- Recorded requests ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", client_requests.ALL)
def test_what_clients_send_by_default_is_answered(server, name):
    path, body = client_requests.ALL[name]
    status, headers, content = server.request("POST", path, body)
    assert status == 200, content
    request = server.engine.requests[-1]
    if "messages" in body and not body.get("tools"):
        assert list(request.prompt) == prompt_ids(TOKENIZER, flat(body["messages"]))
    if body.get("stream"):
        ends = [event["choices"] for event in events_of(content)]
        assert [end[0]["finish_reason"] for end in ends if end][-1] in ("stop", "length")
    else:
        assert choice(content)["finish_reason"] in ("stop", "length", "tool_calls")
    assert len(request.prompt) + request.max_tokens <= server.engine.max_length


def flat(messages):
    """Messages whose content is a text."""
    return [
        message | {"content": "".join(part["text"] for part in message["content"])}
        if isinstance(message["content"], list)
        else message
        for message in messages
    ]


# ---- Fields --------------------------------------------------------------------------------------


def test_values_for_off_are_off(server):
    """Clients write the same in many ways: a missing field, null, an empty box, -1, 0."""
    default = ask(server, max_tokens=None)
    fields = {
        "max_tokens": [-1, 0, "", None],
        "max_completion_tokens": [-1, 0, ""],
        "stop": ["", [], [""], None],
        "logit_bias": [{}, [], "", None],
        "frequency_penalty": [0, "", None],
        "presence_penalty": [0, 0.0, ""],
        "repetition_penalty": [0, 1, ""],
        "top_k": [None, ""],
        "top_p": [1, 1.0, ""],
        "min_p": [0, ""],
        "temperature": [None, ""],
        "n": [1, "", None],
        "tools": [[], None, ""],
        "tool_choice": ["auto", "none", "", None],
        "functions": [[]],
        "function_call": ["none", "auto"],
        "response_format": [{"type": "text"}, {}, "", None],
        "logprobs": [False, "", None],
        "top_logprobs": [0, "", None],
        "stream": [False, "", None],
        "stream_options": [{}, "", None],
        "best_of": [1],
        "suffix": [""],
        "modalities": [["text"]],
        "model": ["tiny", "", None],
        "user": ["", "somebody"],
    }
    for name, values in fields.items():
        for value in values:
            request = ask(server, **{"max_tokens": None, name: value, "seed": default.seed})
            assert request == default, (name, value)
    assert ask(server, top_k=-1).top_k == ask(server, top_k=0).top_k == 0
    assert default.top_k == server.config.top_k > 0
    assert len({ask(server, seed=seed).seed for seed in (-1, -1, None, "")}) == 4
    status, _ = post(server, TEXT, {"prompt": "hi", "max_tokens": -1})
    text = server.engine.requests[-1]
    assert status == 200 and text.max_tokens == server.engine.max_length - len(text.prompt)


def test_penalties_and_biases_reach_the_engine(server):
    fields = {"frequency_penalty": 0.5, "presence_penalty": -1.5, "logit_bias": {"7": 2, "3": -100}}
    for path, body in ((CHAT, {"messages": [user("hi")]}), (TEXT, {"prompt": "hi"})):
        assert post(server, path, body | fields)[0] == 200
        request = server.engine.requests[-1]
        assert (request.frequency_penalty, request.presence_penalty) == (0.5, -1.5)
        assert request.logit_bias == ((3, -100.0), (7, 2.0))


def test_unknown_fields_are_ignored_and_logged_once(server, caplog, monkeypatch):
    monkeypatch.setattr(api_fields, "_logged", set())
    with caplog.at_level("INFO", "maxnano.serve"):
        for _ in range(3):
            ask(server, num_ctx=4096, an_unknown_field="my-secret", **{"x" * 1000: 1})
    lines = [record.message for record in caplog.records if "Ignoring" in record.message]
    assert sum("an_unknown_field" in line for line in lines) == 1
    assert "my-secret" not in caplog.text and max(map(len, lines)) < 200
    with caplog.at_level("INFO", "maxnano.serve"):
        ask(server, **{f"field_{i}": i for i in range(1000)})
    assert caplog.text.count("Ignoring") <= api_fields.MAX_LOGGED


def test_known_fields_that_would_change_the_reply_are_refused_as_openai_does(server):
    for path, name, value in (
        (CHAT, "functions", [{"name": "f"}]),
        (CHAT, "audio", {"voice": "a"}),
        (CHAT, "modalities", ["audio"]),
        (CHAT, "web_search_options", {"search_context_size": "low"}),
        (TEXT, "suffix", "the end"),
        (TEXT, "best_of", 3),
        (RESPONSES, "previous_response_id", "resp_1"),
        (RESPONSES, "background", True),
        (RESPONSES, "tools", [{"type": "web_search"}]),
    ):
        body = {
            CHAT: {"messages": [user("hi")]},
            TEXT: {"prompt": "hi"},
            RESPONSES: {"input": "hi"},
        }
        status, reply = post(server, path, body[path] | {name: value})
        error = reply["error"]
        assert (status, error["type"]) == (400, "invalid_request_error"), name
        assert (error["param"], error["code"]) == (name, "unsupported_parameter")


# ---- Messages and the context --------------------------------------------------------------------


def test_the_answer_is_continued(server):
    server.client.chat.completions.create(
        model="tiny", messages=[user("hi"), assistant("It is")], max_tokens=2
    )
    prompt = list(server.engine.requests[-1].prompt)
    assert prompt == [*prompt_ids(TOKENIZER, [user("hi")]), *b"It is"]


def test_results_of_tools_are_messages_of_the_users_side(server):
    call = {"id": "call_9", "type": "function"}
    call["function"] = {"name": "get_weather", "arguments": '{"city": "Ulm"}'}
    messages = [
        user("weather?"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_9", "content": "cold"},
        {
            "role": "tool",
            "tool_call_id": "call_unknown",
            "content": [{"type": "text", "text": "x"}],
        },
        user("so?"),
    ]
    ask(server, messages=messages)
    plain = [
        user("weather?"),
        assistant('{"name": "get_weather", "arguments": {"city": "Ulm"}}'),
        user("Result of get_weather: cold"),
        user("Result of the tool: x"),
        user("so?"),
    ]
    assert list(server.engine.requests[-1].prompt) == prompt_ids(TOKENIZER, plain)


def test_the_length_of_a_reply_is_clamped_to_the_context(server):
    for field in ("max_tokens", "max_completion_tokens"):
        status, reply = server.chat("hi", **{field: 1000})
        [choice] = reply["choices"]
        request = server.engine.requests[-1]
        assert status == 200 and choice["finish_reason"] == "length"
        assert len(request.prompt) + reply["usage"]["completion_tokens"] == 512
    status, reply = post(server, TEXT, {"prompt": "hi", "max_tokens": 100_000})
    assert status == 200 and reply["usage"]["total_tokens"] == 512


def test_a_long_chat_loses_its_oldest_turns(server):
    first = [system("Be brief.")]
    turns = [[user(f"question {i:2} " + "x" * 40), assistant("y" * 40)] for i in range(30)]
    last = [user("the last")]

    def turns_dropped(count):
        """Of a chat of so many turns."""
        ask(server, messages=[*first, *sum(turns[:count], []), *last], max_tokens=None)
        prompt = list(server.engine.requests[-1].prompt)
        kept = [
            n
            for n in range(count + 1)
            if prompt == prompt_ids(TOKENIZER, first + sum(turns[n:count], []) + last)
        ]
        # A quarter of the context is left for the reply.
        assert len(kept) == 1 and len(prompt) <= 384
        return kept[0]

    # Turns of 97 tokens go two at a time, so that every second prompt continues the one before.
    assert [turns_dropped(count) for count in range(3, 12)] == [0, 2, 2, 4, 4, 6, 6, 8, 8]
    # The last turn alone may be longer than that, but not longer than the context.
    ask(server, messages=[*first, *turns[0], user("z" * 450)], max_tokens=None)
    assert len(server.engine.requests[-1].prompt) > 384
    status, reply = server.chat("z" * 510)
    assert status == 400 and reply["error"]["code"] == "context_length_exceeded"


def test_a_long_chat_is_refused_if_the_config_says_so():
    long = [*[user("x" * 60), assistant("y" * 60)] * 5, user("hi")]
    with Server(FakeEngine(answer("ok")), "serve_long_chats=refuse") as running:
        status, reply = post(running, CHAT, {"messages": long})
        assert status == 400 and reply["error"]["code"] == "context_length_exceeded"
        assert "the prompt has 626" in reply["error"]["message"]
        assert post(running, CHAT, {"messages": long[-3:]})[0] == 200
        # /v1/responses can say it itself.
        assert post(running, RESPONSES, {"input": long})[0] == 400
        assert post(running, RESPONSES, {"input": long, "truncation": "auto"})[0] == 200


def test_a_huge_history_is_trimmed_in_bounded_time(server):
    turns = [user("word " * 180), assistant("word " * 180)] * 249
    began = time.monotonic()
    ask(server, messages=[*turns, user("hi")])
    assert time.monotonic() - began < 60
    assert len(server.engine.requests[-1].prompt) < 512


# ---- JSON and tools ------------------------------------------------------------------------------

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
    "required": ["x", "next"],
    "additionalProperties": False,
}


def schema_format(schema, **more):
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, **more}}


def test_a_model_without_any_training_writes_json(server):
    create = server.client.chat.completions.create
    for seed in range(3):
        reply = create(
            model="tiny",
            messages=[user("json")],
            response_format=schema_format(POINT, strict=True),
            seed=seed,
        )
        choice = reply.choices[0]
        value = json.loads(choice.message.content)
        assert choice.finish_reason == "stop" and isinstance(value["x"], int)
    reply = create(
        model="tiny", messages=[user("json")], response_format={"type": "json_object"}, seed=1
    )
    assert isinstance(json.loads(reply.choices[0].message.content), dict)
    assert not server.engine.requests[-1].tools  # the calculator would break the JSON


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}]
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_model_without_any_training_calls_a_tool(server, choice, stream):
    fields = {
        "model": "tiny",
        "messages": [user("weather?")],
        "tools": [WEATHER] if choice == "required" else [SEARCH, WEATHER],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "seed": 3,
    }
    if not stream:
        [reply] = server.client.chat.completions.create(**fields).choices
        [call] = reply.message.tool_calls
        assert reply.finish_reason == "tool_calls" and reply.message.content is None
    else:
        with server.client.chat.completions.stream(**fields) as events:
            [reply] = events.get_final_completion().choices
        [call] = reply.message.tool_calls
        assert reply.finish_reason == "tool_calls" and not reply.message.content
    arguments = json.loads(call.function.arguments)
    assert call.id.startswith("call_") and call.function.name == "get_weather"
    assert len(arguments["city"]) <= 12 and arguments["unit"] in ("C", "F")
    assert arguments.keys() == {"city", "unit"}


def test_the_model_is_told_about_the_tools_if_there_is_space(speaker):
    request = ask(speaker, messages=[system("Be brief."), user("hi")], tools=[SEARCH, WEATHER])
    told = bytes(token for token in request.prompt if token < 256).decode()
    assert told.startswith("Be brief.\n\nTools:\n- search_web(query: string, count?: integer)")
    assert "- get_weather(city: string, unit): Get the weather\n" in told
    assert told.endswith("\n\nhi")
    plain = tuple(prompt_ids(TOKENIZER, [user("hi")]))
    assert ask(speaker, tools=[WEATHER], tool_choice="none").prompt == plain
    many = [client_requests.tool(f"tool_{i}", "y" * 50) for i in range(20)]
    assert ask(speaker, tools=many).prompt == plain


CALL = '{"name": "get_weather", "arguments": {"city": "a}\\"b", "unit": "C"}}'


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("said", "is_call"),
    [
        (CALL, True),
        ("\n " + CALL.replace(": ", " :\n"), True),
        ("It is cold.", False),
        ('{"name": "other", "arguments": {}}', False),
        ('{"name": "get_weather", "arguments": {', False),
        ('{"name": "get_weather", "arguments": "none"}', False),
        ('{"answer": 42}', False),
        ("Sure: " + CALL, False),
        ("", False),
    ],
)
def test_a_free_reply_is_a_call_if_it_is_exactly_that(speaker, said, is_call, stream):
    speaker.engine.reply = answer(said)
    body = {"messages": [user("weather?")], "tools": [WEATHER], "stream": stream}
    status, _, content = speaker.request("POST", CHAT, body)
    assert status == 200 and speaker.engine.requests[-1].grammar is None
    choices = [event["choices"][0] for event in events_of(content)] if stream else [choice(content)]
    said_parts = [each.get("delta") or each.get("message", {}) for each in choices]
    text = "".join(part.get("content") or "" for part in said_parts)
    calls = [call["function"] for part in said_parts for call in part.get("tool_calls", ())]
    if is_call:
        assert ("".join(call.get("name", "") for call in calls), text) == ("get_weather", "")
        arguments = "".join(call["arguments"] for call in calls)
        assert json.loads(arguments) == {"city": 'a}"b', "unit": "C"}
        assert choices[-1]["finish_reason"] == "tool_calls"
    else:
        assert (calls, text, choices[-1]["finish_reason"]) == ([], said, "stop")


def test_a_call_that_is_cut_short_says_so(server):
    reply = server.client.chat.completions.create(
        model="tiny",
        messages=[user("weather?")],
        tools=[WEATHER],
        tool_choice="required",
        max_tokens=45,
        seed=3,
    )
    [choice] = reply.choices
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls[0].function.name == "get_weather"


def test_tools_and_a_response_format_permit_either(server):
    seen = set()
    for seed in range(12):
        [choice] = server.client.chat.completions.create(
            model="tiny",
            messages=[user("weather?")],
            tools=[WEATHER],
            response_format=schema_format(POINT),
            seed=seed,
        ).choices
        if choice.finish_reason == "tool_calls":
            json.loads(choice.message.tool_calls[0].function.arguments)
        elif choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content)["x"], int)
        seen.add(choice.finish_reason)
    assert {"tool_calls", "stop"} <= seen


def test_references_in_the_schema_of_a_tool_stay_right(server):
    node = {"type": "object", "properties": {"v": {"enum": [1, 2]}}, "required": ["v"]}
    node["additionalProperties"] = False
    parameters = {
        "type": "object",
        "properties": {"node": {"$ref": "#/$defs/Node"}},
        "required": ["node"],
        "$defs": {"Node": node},
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    [choice] = server.client.chat.completions.create(
        model="tiny",
        messages=[user("hi")],
        tools=[SEARCH, tool],
        tool_choice={"type": "function", "function": {"name": "f"}},
        seed=5,
    ).choices
    assert json.loads(choice.message.tool_calls[0].function.arguments)["node"]["v"] in (1, 2)
    assert move_references(
        {"a": [{"$ref": "#/x"}, {"$ref": "#"}, {"$ref": "http://b"}]}, "#/p"
    ) == {"a": [{"$ref": "#/p/x"}, {"$ref": "#/p"}, {"$ref": "http://b"}]}


def test_the_end_of_arguments_is_found_at_any_cut():
    text = '{"a": "}\\"{", "b": [{"c": "\\\\"}], "d": {}}'
    for size in range(1, len(text) + 2):
        scanner, whole = ArgumentScanner(), text + "}}  x"
        pieces = [whole[i : i + size] for i in range(0, len(whole), size)]
        assert "".join(map(scanner.feed, pieces)) == text


# ---- /v1/responses, /tokenize, /v1/models --------------------------------------------------------


def test_responses_as_openais_client_reads_them():
    with Server(FakeEngine(answer("Grüß dich"), step_tokens=1)) as running:
        client = running.client
        whole = client.responses.create(model="tiny", input="hi", instructions="Be brief.")
        assert whole.output_text == "Grüß dich" and whole.status == "completed"
        assert list(running.engine.requests[-1].prompt) == prompt_ids(
            TOKENIZER, [system("Be brief."), user("hi")]
        )
        assert whole.usage.output_tokens == len("Grüß dich".encode())
        assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
        events = list(client.responses.create(model="tiny", input="hi", stream=True))
        assert [event.sequence_number for event in events] == list(range(len(events)))
        kinds = [event.type.removeprefix("response.") for event in events]
        assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
        ends = ["output_text.done", "content_part.done", "output_item.done", "completed"]
        assert kinds[-4:] == ends and set(kinds[4:-4]) == {"output_text.delta"}
        assert "".join(event.delta for event in events[4:-4]) == "Grüß dich"
        assert events[-1].response.output_text == "Grüß dich"
        with client.responses.stream(model="tiny", input="hi") as stream:
            assert stream.get_final_response().output_text == "Grüß dich"
        short = client.responses.create(model="tiny", input="hi", max_output_tokens=2)
        assert short.status == "incomplete"
        assert short.incomplete_details.reason == "max_output_tokens"


def test_responses_take_conversations_and_schemas(server):
    item = {"type": "output_text", "text": "Hello.", "annotations": []}
    reply = server.client.responses.create(
        model="tiny",
        input=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {
                "type": "message",
                "id": "msg_1",
                "role": "assistant",
                "status": "completed",
                "content": [item],
            },
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "7"},
        ],
        text={"format": {"type": "json_schema", "name": "p", "schema": POINT}},
        extra_body={"seed": 1},
        store=False,
    )
    assert isinstance(json.loads(reply.output_text)["x"], int)
    said = 'Hello.\n\n{"name": "f", "arguments": {}}'
    plain = [system("Be brief."), user("hi"), assistant(said), user("Result of f: 7")]
    assert list(server.engine.requests[-1].prompt) == prompt_ids(TOKENIZER, plain)


def test_responses_end_with_an_error_event_if_the_engine_fails():
    engine = FakeEngine(lambda request, sample: itertools.cycle(b"ab"), step_seconds=0.01)
    with Server(engine) as running:
        stream = running.client.responses.create(model="tiny", input="hi", stream=True)
        for event in stream:
            if event.type == "response.output_text.delta":
                engine.fails = True
                break
        *_, last = stream
        assert last.type == "error" and "the engine failed" in last.message


def test_tokenize_counts_a_prompt_or_messages(server):
    def tokens(**body):
        status, reply = post(server, "/tokenize", body)
        assert status == 200 and reply["count"] == len(reply["tokens"])
        assert reply["max_model_len"] == 512
        return reply["tokens"]

    assert tokens(prompt="hé") == [*"hé".encode()]
    assert tokens(prompt="hé", add_special_tokens=True) == [SPECIAL.bos, *"hé".encode()]
    messages = [system("Be brief."), user("hi")]
    assert tokens(messages=messages, model="tiny") == prompt_ids(TOKENIZER, messages)
    assert post(server, "/tokenize", {"messages": []})[0] == 400


def test_a_model_is_found_by_its_name(server):
    import openai

    assert server.client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError) as told:
        server.client.models.retrieve("gpt-4")
    assert told.value.code == "model_not_found"


# ---- Other sites and hosts -----------------------------------------------------------------------

# What the browser asks before openai's client for JavaScript may send a request.
PREFLIGHT = {
    "Origin": "http://localhost:3000",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-arch,"
    "x-stainless-lang,x-stainless-os,x-stainless-package-version,x-stainless-retry-count,"
    "x-stainless-runtime,x-stainless-runtime-version,x-stainless-timeout",
}


@pytest.mark.parametrize(
    ("override", "origin"),
    [
        ("serve_cors_origins=[http://localhost:3000]", "http://localhost:3000"),
        ("serve_cors_origins=['*']", "*"),
        ("serve_cors_origin_regex=http://localhost:[0-9]+", "http://localhost:3000"),
    ],
)
def test_javascript_clients_of_permitted_sites(override, origin):
    with Server(FakeEngine(answer("ok")), override, key="a-key-of-sixteen-or-more") as running:
        status, headers, _ = running.request(
            "OPTIONS", CHAT, headers=PREFLIGHT | {"Authorization": ""}
        )
        assert status == 200 and headers["access-control-allow-origin"] == origin
        allowed = headers["access-control-allow-headers"]
        assert allowed == PREFLIGHT["Access-Control-Request-Headers"]
        site = {"Origin": "http://localhost:3000"}
        for key, expected in ((running.key, 200), ("wrong", 401)):
            body = {"messages": [user("hi")]}
            status, headers, _ = running.request(
                "POST", CHAT, body, site | {"Authorization": f"Bearer {key}"}
            )
            assert status == expected and headers["access-control-allow-origin"] == origin
            assert headers["access-control-expose-headers"] == "retry-after"
        other = running.request(
            "OPTIONS", CHAT, headers=PREFLIGHT | {"Origin": "http://evil.example"}
        )
        assert other[0] == (200 if origin == "*" else 400)


def status_for(server, host):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    headers = {"Authorization": f"Bearer {server.key}"} if server.key else {}
    connection.request("GET", "/v1/models", headers={"Host": host, **headers})
    status = connection.getresponse().status
    connection.close()
    return status


def test_host_names_are_permitted_as_in_starlette():
    engine = FakeEngine(answer("ok"))
    with Server(engine) as running:
        for host in ("localhost:8000", "host.docker.internal:8000", "host.containers.internal"):
            assert status_for(running, host) == 200
        for host in ("maxnano:8000", "evil.example", "host.docker.internal.evil.example"):
            assert status_for(running, host) == 403
    hosts = "serve_allowed_hosts=[chat.example.org, '*.local', maxnano, '[::1]']"
    with Server(engine, hosts) as running:
        for host in ("chat.example.org", "CHAT.example.org:443", "a.b.local", "maxnano:8000"):
            assert status_for(running, host) == 200
        for host in ("example.org", "local", "xlocal", "localhost", "chat.example.org.evil"):
            assert status_for(running, host) == 403
    with Server(engine, hosts, key="a-key-of-sixteen-or-more") as running:
        assert status_for(running, "maxnano") == 200 and status_for(running, "localhost") == 403
    with Server(engine, key="a-key-of-sixteen-or-more") as running:
        assert status_for(running, "anything.example") == 200
    with Server(engine, "serve_allowed_hosts=['*']") as running:
        assert status_for(running, "anything.example") == 200


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("serve_cors_origin_regex=http://(", "is no regular expression"),
        ("serve_allowed_hosts=[a*.example.org]", "takes * only"),
        ("serve_allowed_hosts=['*.*']", "takes * only"),
        ("serve_long_chats=cut", "serve_long_chats"),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused(word, problem):
    with pytest.raises(pyconfig.ConfigError) as told:
        pyconfig.initialize(["configs/base.yml", word])
    assert problem in str(told.value)


# ---- Abuse of schemas and tools ------------------------------------------------------------------


def nested(depth, key="properties"):
    schema = {"type": "integer"}
    for _ in range(depth):
        if key == "properties":
            schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
        else:
            schema = {key: [schema]} if key in ("anyOf", "allOf") else {key: schema}
    return schema


def with_schema(schema, **more):
    return {"response_format": schema_format(schema, **more)}


def with_tool(parameters, choice="required", name="f"):
    function = {"name": name, "parameters": parameters}
    return {"tools": [{"type": "function", "function": function}], "tool_choice": choice}


LOOP = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
BOMB = {  # each definition is two of the next: 2^40 objects
    "$ref": "#/$defs/d0",
    "$defs": {
        f"d{i}": {
            "type": "object",
            "properties": {"l": {"$ref": f"#/$defs/d{i + 1}"}, "r": {"$ref": f"#/$defs/d{i + 1}"}},
            "required": ["l", "r"],
        }
        for i in range(40)
    }
    | {"d40": False},
}
NODE = {"type": "object", "properties": {"b": {"$ref": "#"}}, "required": ["b"]}
SCHEMA_ABUSE = [
    # Shapes of the fields
    {"response_format": "json"},
    {"response_format": {"type": "xml"}},
    {"response_format": {"type": "json_schema"}},
    {"response_format": {"type": "json_schema", "json_schema": []}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
    with_schema("object"),
    {"tools": "all"},
    {"tools": [1]},
    {"tools": [{"type": "function"}]},
    {"tools": [{"type": "web_search"}]},
    {"tools": [{"type": "function", "function": {"parameters": {}}}]},
    {"tools": [WEATHER] * 129},
    {"tools": [WEATHER], "tool_choice": "sometimes"},
    {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "other"}}},
    {"tools": [WEATHER], "tool_choice": {"type": "function", "function": "get_weather"}},
    {"tools": [WEATHER], "tool_choice": ["required"]},
    {"tool_choice": "required"},
    with_tool([1]),
    with_tool({}, name="x" * 129),
    with_tool({}, name="a\nb"),
    {"messages": [user("a"), {"role": "assistant", "tool_calls": "f"}]},
    {"messages": [user("a"), {"role": "assistant", "tool_calls": [{"function": {"name": 1}}]}]},
    # Schemas that are invalid, or that no value satisfies
    with_schema(False),
    with_schema({"type": "text"}),
    with_schema({"enum": []}),
    with_schema({"type": "string", "pattern": "("}),
    with_schema({"type": "integer", "minimum": 2, "maximum": 1}),
    with_schema({"$ref": "#/$defs/missing"}),
    with_schema({"$ref": "https://example.org/schema.json"}),
    with_schema({"type": "object", "properties": 1}),
    with_schema({"type": "object", "unknownKeyword": 1, "not": {"type": "object"}}, strict=True),
    with_tool({"type": "string"}),
    with_tool({"$ref": "#/$defs/missing"}),
    # Recursive ones without an end
    with_schema(LOOP),
    with_schema({"$ref": "#"}),
    with_schema({"type": "array", "items": {"$ref": "#"}, "minItems": 1}),
    with_schema({"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}], "$defs": {"a": NODE}}),
    with_tool({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}),
    with_tool({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "auto")
    | with_schema({"type": "object"}),
    with_schema(BOMB),
    # Deep ones
    with_schema(nested(40)),
    with_tool(nested(35)),
    with_schema(nested(200)),
    with_schema(nested(60, "anyOf")),
    with_schema(nested(70, "not")),
    # Huge ones
    with_schema({"enum": [f"word {i}" for i in range(20_000)]}),
    with_schema(
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(5000)}}
    ),
    with_schema({"type": "string", "const": "x" * 100_000}),
    with_tool({"type": "object", "properties": {"a": {"enum": ["y" * 500] * 200}}}),
]


# Expensive or endless while the reply is generated, which a limit on each token bounds.
EXPENSIVE = [
    with_schema({"type": "string", "pattern": "(a|b|c){1,1000}(d|e){1,1000}(f?){1000}"}),
    with_schema({"type": "string", "pattern": ".*a.{4000}b.{4000}"}),
]


def test_schemas_that_are_expensive_end_in_bounded_time(server):
    for fields in EXPENSIVE:
        began = time.monotonic()
        status, _ = post(server, CHAT, {"messages": [user("hi")], "max_tokens": 32, **fields})
        assert status == 200 and time.monotonic() - began < 60


def test_abuse_of_schemas_and_tools_is_refused_in_bounded_time(server):
    """Each is a 400 with one line, within seconds, and never reaches the engine."""
    assert len(SCHEMA_ABUSE) >= 30
    before, slowest = len(server.engine.requests), 0.0
    for fields in SCHEMA_ABUSE:
        began = time.monotonic()
        status, reply = post(server, CHAT, {"messages": [user("hi")], **fields})
        slowest = max(slowest, time.monotonic() - began)
        shown = json.dumps(fields)[:150]
        assert status == 400, (shown, reply)
        message = reply["error"]["message"]
        assert reply["error"]["type"] == "invalid_request_error"
        assert 0 < len(message) < 400 and "\n" not in message, shown
    assert slowest < 60
    assert len(server.engine.requests) == before
    assert server.chat("alive", max_tokens=1)[0] == 200


def test_tools_are_taken_as_openai_and_others_send_them():
    def take(**fields):
        return take_tools(BodyFields(fields))

    assert take() is None and take(tools=[], tool_choice="auto") is None
    assert take(tools=[{"type": "web_search"}], tool_choice="none") is None
    assert not take(tools=[WEATHER]).is_forced
    assert take(tools=[WEATHER], tool_choice="any").is_forced
    chosen = take(
        tools=[SEARCH, READ_FILE, WEATHER], tool_choice={"type": "function", "name": "read_file"}
    )
    assert isinstance(chosen, Tools) and [f.name for f in chosen.functions] == ["read_file"]
    without = {"type": "function", "function": {"name": "now", "parameters": None}}
    assert take(tools=[without]).functions[0].parameters == {}
    with pytest.raises(ApiError):
        take(tools=[WEATHER], tool_choice=5)

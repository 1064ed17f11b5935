"""What clients for Python do with a server: run by tests/test_clients.py, by another Python.

    python tests/with_clients.py openai|langchain|litellm URL

The server's model has random weights, so replies are judged by their shape.
"""

import json
import sys
from typing import Literal

from pydantic import BaseModel, Field

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hi"},
    {"role": "user", "content": "are you there?"},
]


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Ulm", "Rome"]
    is_warm: bool
    note: str = Field(max_length=5)


TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather",
        "parameters": Weather.model_json_schema(),
    },
}


def check_openai(url: str) -> None:
    """Everything that the server has, by OpenAI's own client."""
    import openai

    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    chat = client.chat.completions
    common = {"model": "tiny", "messages": MESSAGES, "max_tokens": 8, "seed": 1}
    reply = chat.create(**common, frequency_penalty=0.5, presence_penalty=0.5, n=2)
    assert len(reply.choices) == 2 and reply.usage.completion_tokens > 0
    chunks = list(chat.create(**common, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage.total_tokens > 0
    biased = chat.create(**common, logit_bias={"65": 100}, temperature=0)
    assert biased.choices[0].message.content == "A" * 8
    common["max_tokens"] = 120
    parsed = chat.parse(**common, response_format=Weather).choices[0].message.parsed
    assert isinstance(parsed, Weather)
    titled = {"type": "object", "properties": {"title": {"type": "string"}}, "required": ["title"]}
    format = {"type": "json_schema", "json_schema": {"name": "a", "schema": titled}}
    endless = chat.create(**common, response_format=format).choices[0]
    assert endless.finish_reason == "stop" and "title" in json.loads(endless.message.content)
    common["max_tokens"] = 240
    asked = {"tools": [TOOL], "tool_choice": "required"}
    forced = chat.create(**common, **asked).choices[0]
    assert forced.finish_reason == "tool_calls"
    called = [call.function.arguments for call in forced.message.tool_calls]
    for arguments in called:
        Weather.model_validate_json(arguments)
    with chat.stream(**common, **asked) as events:
        streamed = events.get_final_completion().choices[0].message.tool_calls
    assert [call.function.arguments for call in streamed] == called
    forced = chat.create(**common, **asked, parallel_tool_calls=False).choices[0]
    [call] = forced.message.tool_calls
    history = [*MESSAGES, forced.message, {"role": "tool", "tool_call_id": call.id, "content": "5"}]
    chat.create(**common | {"messages": history}, tools=[TOOL], tool_choice="none")
    assert client.completions.create(model="tiny", prompt="hi", max_tokens=3, logprobs=2).choices
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    whole = client.responses.create(model="tiny", input=MESSAGES, max_output_tokens=8)
    assert whole.status in ("completed", "incomplete")
    with client.responses.stream(model="tiny", input="hi", max_output_tokens=8) as stream:
        kinds = [event.type for event in stream]
    assert kinds[-1] in ("response.completed", "response.incomplete")
    asked = {"model": "tiny", "input": MESSAGES, "tool_choice": "required"}
    asked["tools"] = [{"type": "function", **TOOL["function"]}]
    called = client.responses.create(**asked).output
    with client.responses.stream(**asked) as stream:
        streamed = stream.get_final_response().output
    for item in (*called, *streamed):
        Weather.model_validate_json(item.arguments)
    result = {"type": "function_call_output", "call_id": called[0].call_id, "output": "5"}
    client.responses.create(**asked | {"input": [*MESSAGES, *called[:1], result]})
    for error, fields in (
        (openai.BadRequestError, {"messages": [{"role": "user", "content": "x" * 600}]}),
        (openai.NotFoundError, {"model": "gpt-4"}),
    ):
        try:
            chat.create(**common | fields)
        except error as told:
            assert told.code in ("context_length_exceeded", "model_not_found")
        else:
            raise AssertionError(f"{error.__name__} was not raised")


def check_langchain(url: str) -> None:
    """ChatOpenAI with its defaults: messages, streams, tools, structured output."""
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(model="tiny", base_url=url, api_key="none", seed=1, max_retries=0)
    short = model.bind(max_tokens=8)
    history = [SystemMessage("Be brief."), HumanMessage("hi"), HumanMessage("there?")]
    assert short.invoke(history).usage_metadata["output_tokens"] > 0
    chunks = list(short.stream(history, stream_usage=True))
    assert sum(chunk.usage_metadata is not None for chunk in chunks) == 1
    assert model.bind(max_tokens=4, stop=["x"]).invoke([*history, AIMessage("It is")])
    for choice in ("any", "required", "Weather"):
        message = model.bind_tools([Weather], tool_choice=choice).invoke(history)
        for call in message.tool_calls:
            Weather.model_validate(call["args"])
        assert len(message.tool_calls) == 1 or choice != "Weather"
    single = model.bind_tools([Weather], tool_choice="any", parallel_tool_calls=False)
    message = single.invoke(history)
    [call] = message.tool_calls
    answered = [*history, message, ToolMessage("5 degrees", tool_call_id=call["id"])]
    assert short.bind(tools=[TOOL]).invoke(answered).response_metadata
    for method in ("function_calling", "json_schema"):
        asked = model.with_structured_output(Weather, method=method)
        assert isinstance(asked.invoke("weather?"), Weather)
    raw = model.with_structured_output(Weather, method="json_mode", include_raw=True)
    assert raw.invoke("weather? json")["raw"].content.startswith("{")
    streamed = None
    for chunk in model.bind_tools([Weather], tool_choice="any").stream(history):
        streamed = chunk if streamed is None else streamed + chunk
    Weather.model_validate(streamed.tool_calls[0]["args"])
    unlimited = ChatOpenAI(model="tiny", base_url=url, api_key="none", use_responses_api=True)
    responses = unlimited.bind(max_tokens=8)
    assert responses.invoke(history).response_metadata["object"] == "response"
    assert list(responses.stream(history))
    tools = unlimited.bind_tools([Weather], tool_choice="any")
    streamed = None
    for chunk in tools.stream(history):
        streamed = chunk if streamed is None else streamed + chunk
    for reply in (tools.invoke(history), streamed):
        assert reply.tool_calls
        for call in reply.tool_calls:
            Weather.model_validate(call["args"])


def check_litellm(url: str) -> None:
    """LiteLLM's OpenAI-compatible provider."""
    import litellm

    common = {
        "model": "openai/tiny",
        "api_base": url,
        "api_key": "none",
        "messages": MESSAGES,
        "num_retries": 0,
        "seed": 1,
    }
    reply = litellm.completion(**common, max_tokens=8, frequency_penalty=0.3, logit_bias={"65": 1})
    assert reply.usage.completion_tokens > 0
    chunks = list(litellm.completion(**common, max_tokens=8, stream=True))
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    forced = litellm.completion(**common, tools=[TOOL], tool_choice="required").choices[0]
    for call in forced.message.tool_calls:
        Weather.model_validate_json(call.function.arguments)
    content = litellm.completion(**common, response_format=Weather).choices[0].message.content
    Weather.model_validate_json(content)
    continued = [*MESSAGES, {"role": "assistant", "content": "It is"}]
    assert litellm.completion(**common | {"messages": continued}, max_tokens=4).choices
    text = litellm.text_completion(
        model="text-completion-openai/tiny", prompt="hi", api_base=url, api_key="none", max_tokens=4
    )
    assert text.choices[0].finish_reason in ("stop", "length")
    try:
        long = [{"role": "user", "content": "x" * 600}]
        litellm.completion(**common | {"messages": long})
    except litellm.ContextWindowExceededError:
        pass
    else:
        raise AssertionError("ContextWindowExceededError was not raised")


if __name__ == "__main__":
    client, address = sys.argv[1:]
    {"openai": check_openai, "langchain": check_langchain, "litellm": check_litellm}[client](
        address
    )
    print(json.dumps({"client": client, "passed": True}))

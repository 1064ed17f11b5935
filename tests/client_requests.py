"""Bodies of requests as chat clients send them by default, written from what their sources do.

Sources: open-webui/open-webui (backend: utils/payload.py, routers/tasks.py, routers/openai.py),
danny-avila/LibreChat with danny-avila/agents and langchain-ai/langchainjs (chat_models/
completions.ts, title.ts), continuedev/continue (core/llm/openaiTypeConverters.ts,
packages/openai-adapters/src/apis/OpenAI.ts, core/autocomplete).
"""

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def tool(name, description, **properties):
    parameters = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "properties": properties,
        "required": list(properties)[:1],
    }
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


TEXT_FIELD = {"type": "string", "description": "a text"}
READ_FILE = tool("read_file", "Read a file of the workspace", filepath=TEXT_FIELD)
SEARCH = tool("search_web", "Search the web", query=TEXT_FIELD, count={"type": "integer"})
TITLE_TASK = "### Task:\nGenerate a concise, 3-5 word title.\n### Chat History:\nUSER: hi"

OPEN_WEBUI = {
    "a chat": (CHAT, {"stream": True, "model": "tiny", "messages": [user("hi")]}),
    "with usage": (
        CHAT,
        {
            "stream": True,
            "model": "tiny",
            "messages": [system("Be brief."), user("hi"), assistant("Hello."), user("more")],
            "stream_options": {"include_usage": True},
        },
    ),
    "all of the advanced parameters": (
        CHAT,
        {
            "stream": True,
            "model": "tiny",
            "messages": [user("hi")],
            "temperature": 0.8,
            "top_p": 0.9,
            "top_k": 40,
            "min_p": 0.0,
            "max_tokens": 128,
            "frequency_penalty": 1.1,
            "presence_penalty": 0.4,
            "repeat_penalty": 1.1,
            "repeat_last_n": 64,
            "mirostat": 0,
            "mirostat_eta": 0.1,
            "mirostat_tau": 5.0,
            "tfs_z": 1,
            "num_ctx": 2048,
            "num_keep": 24,
            "num_batch": 512,
            "use_mmap": True,
            "keep_alive": "5m",
            "think": False,
            "seed": 0,
            "stop": ["\n\n"],
            "reasoning_effort": "medium",
            "logit_bias": {"104": 5, "105": -100},
            "chat_template_kwargs": {"enable_thinking": False},
        },
    ),
    "empty boxes": (
        CHAT,
        {
            "stream": True,
            "model": "tiny",
            "messages": [user("hi")],
            "stop": [""],
            "seed": None,
            "max_tokens": None,
            "temperature": "",
            "reasoning_effort": "",
            "logit_bias": {},
            "response_format": "",
        },
    ),
    "the message after a failed answer": (
        CHAT,
        {"stream": True, "model": "tiny", "messages": [user("hi"), assistant(""), user("hello?")]},
    ),
    "continue the answer": (
        CHAT,
        {"stream": True, "model": "tiny", "messages": [user("hi"), assistant("It is")]},
    ),
    "a title": (
        CHAT,
        {
            "model": "tiny",
            "messages": [user(TITLE_TASK)],
            "stream": False,
            "max_completion_tokens": 1000,
            "metadata": {"task": "title_generation", "chat_id": None},
        },
    ),
    "a title as an older version asks": (
        CHAT,
        {"model": "tiny", "messages": [user(TITLE_TASK)], "stream": False, "max_tokens": 1000},
    ),
    "tags": (CHAT, {"model": "tiny", "messages": [user("### Task: tags")], "stream": False}),
    "tools by native function calling": (
        CHAT,
        {
            "stream": True,
            "model": "tiny",
            "messages": [user("what is new?")],
            "tools": [SEARCH],
        },
    ),
    "the result of a tool": (
        CHAT,
        {
            "stream": True,
            "model": "tiny",
            "messages": [
                user("what is new?"),
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [
                        {
                            "index": 0,
                            "id": "call_1",
                            "type": "function",
                            "function": {"name": "search_web", "arguments": '{"query": "new"}'},
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "call_1", "content": "nothing"},
            ],
            "tools": [SEARCH],
        },
    ),
}

TITLE_SCHEMA = {
    "type": "object",
    "properties": {"title": {"type": "string", "description": "A concise title"}},
    "required": ["title"],
    "additionalProperties": False,
    "$schema": "http://json-schema.org/draft-07/schema#",
}

LIBRECHAT = {
    "a chat": (
        CHAT,
        {
            "model": "tiny",
            "stream": True,
            "stream_options": {"include_usage": True},
            "user": "6650f2a4d3c1b2a1908f7e6d",
            "messages": [system("You are helpful."), user("hi")],
        },
    ),
    "all of the parameters": (
        CHAT,
        {
            "model": "tiny",
            "temperature": 1,
            "top_p": 1,
            "frequency_penalty": 0.5,
            "presence_penalty": -0.5,
            "stop": ["User:"],
            "max_tokens": 4096,
            "user": "6650f2a4d3c1b2a1908f7e6d",
            "reasoning_effort": "low",
            "verbosity": "low",
            "stream": True,
            "stream_options": {"include_usage": True},
            "messages": [user("hi")],
        },
    ),
    "content in parts": (
        CHAT,
        {
            "model": "tiny",
            "stream": True,
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "hi"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "Hello."}]},
                {"role": "user", "content": [{"type": "text", "text": "more"}]},
            ],
        },
    ),
    "continue the answer": (
        CHAT,
        {"model": "tiny", "stream": True, "messages": [user("hi"), assistant("It is")]},
    ),
    "a title by a function": (
        CHAT,
        {
            "model": "tiny",
            "stream": False,
            "user": "6650f2a4d3c1b2a1908f7e6d",
            "messages": [user("Analyze this conversation and provide a title.\n\nUser: hi")],
            "tools": [
                {
                    "type": "function",
                    "function": {
                        "name": "extract",
                        "description": "A function available to call.",
                        "parameters": TITLE_SCHEMA,
                    },
                }
            ],
            "tool_choice": {"type": "function", "function": {"name": "extract"}},
        },
    ),
    "a title by a schema": (
        CHAT,
        {
            "model": "tiny",
            "stream": False,
            "messages": [user("Analyze this conversation and provide a title.\n\nUser: hi")],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "extract", "schema": TITLE_SCHEMA, "strict": True},
            },
        },
    ),
    "an agent": (
        CHAT,
        {
            "model": "tiny",
            "stream": True,
            "stream_options": {"include_usage": True},
            "messages": [system("You are an agent."), user("what is new?")],
            "tools": [SEARCH, READ_FILE],
        },
    ),
}

FIM_STOPS = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<file_sep>", "<|endoftext|>"]
LINE_STOPS = ["/src/", "#- coding: utf-8", "```", "\ndef", "\nclass", '\n"""#', "\n\n\n", "\r\n"]

CONTINUE = {
    "a chat": (
        CHAT,
        {
            "messages": [system("You are a coding assistant."), user("explain")],
            "model": "tiny",
            "max_tokens": 4096,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    ),
    "an agent": (
        CHAT,
        {
            "messages": [system("You are in agent mode."), user("read the readme")],
            "model": "tiny",
            "max_tokens": 4096,
            "stream": True,
            "stream_options": {"include_usage": True},
            "tools": [READ_FILE],
        },
    ),
    "the result of a tool": (
        CHAT,
        {
            "messages": [
                user("read the readme"),
                {
                    "role": "assistant",
                    "content": " ",
                    "tool_calls": [
                        {
                            "id": "call_2",
                            "type": "function",
                            "function": {
                                "name": "read_file",
                                "arguments": '{"filepath": "README.md"}',
                            },
                        }
                    ],
                },
                {"role": "tool", "content": "# A title", "tool_call_id": "call_2"},
            ],
            "model": "tiny",
            "max_tokens": 4096,
            "stream": True,
            "stream_options": {"include_usage": True},
            "tools": [READ_FILE],
        },
    ),
    "an edit, whose answer is begun": (
        CHAT,
        {
            "messages": [user("Rewrite this code."), assistant("```python\n")],
            "model": "tiny",
            "max_tokens": 2048,
            "temperature": 0.01,
            "stream": True,
            "stop": ["```"],
            "prediction": {"type": "content", "content": "x = 1"},
        },
    ),
    "a completion in the editor": (
        TEXT,
        {
            "prompt": "<fim_prefix>def f(x):\n    return <fim_suffix>\n<fim_middle>",
            "model": "tiny",
            "max_tokens": 4096,
            "temperature": 0.01,
            "stream": True,
            "stop": [
                *FIM_STOPS,
                *LINE_STOPS,
                *(f"\n{word} " for word in "if for while with".split()),
            ],
        },
    ),
}

ALL = {
    f"{client}: {name}": request
    for client, requests in (
        ("Open WebUI", OPEN_WEBUI),
        ("LibreChat", LIBRECHAT),
        ("Continue", CONTINUE),
    )
    for name, request in requests.items()
}

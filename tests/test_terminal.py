"""The chat at a terminal: typing, pasting, history, wrapping, interrupts, in a pseudo-terminal."""

import json
import os
import stat
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from screen import Screen, Terminal

from MaxNano.inference.dialogue import ReplyPart
from MaxNano.serving.reply_view import ReplyView
from MaxNano.serving.terminal import is_open, unquote

ROOT = Path(__file__).resolve().parents[1]

# A model that repeats the user's last message, and writes what it was asked to a file.
SESSION = """
import itertools, json, sys, time
from pathlib import Path
from MaxNano import chat, pyconfig
from MaxNano.storage.files import read_text

def load(config):
    if LOAD_ERROR:
        read_text("nowhere", LOAD_ERROR)
    from fake_engine import FakeEngine  # imports JAX

    def reply(request, sample):
        prompt = fake.tokenizer.decode(request.prompt)
        with open("asked.jsonl", "a") as file:
            file.write(json.dumps(prompt) + "\\n")
        last = prompt.split("<|user_start|>")[-1].split("<|user_end|>")[0]
        while last == "early" and not Path("go").exists():
            time.sleep(0.01)
        endless = itertools.cycle(b"ab ") if last == "endless" else ()
        return itertools.chain(last.encode(), endless)

    fake = FakeEngine(reply, max_length=10**6, step_seconds=STEP, step_tokens=8, programs=PROGRAMS,
                      compile_seconds=COMPILE)
    return fake

STEP, PROGRAMS, COMPILE, LOAD_ERROR = json.loads(sys.argv[1])
chat.load = load
argv = ["ROOT/configs/base.yml", "run_name=tiny", "chat_turns=true", *sys.argv[2:]]
sys.exit(pyconfig.launch(lambda config: chat.main(config, argv), argv))
""".replace("ROOT", str(ROOT))


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts the chat with a fake model in a folder with a run `tiny`."""
    (tmp_path / "runs/tiny/checkpoints/1").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "TERM": "xterm-256color",
        "PYTHONIOENCODING": "utf-8",
        "COLUMNS": "80",  # of an earlier size of the terminal
        "LINES": "24",
        "XDG_STATE_HOME": str(tmp_path / "state"),
    }
    environment.pop("NO_COLOR", None)

    def start(*words, step=0.0, programs=(), compile_seconds=0.0, error="", **size):
        facts = json.dumps([step, list(programs), compile_seconds, error])
        return Terminal([sys.executable, "-c", SESSION, facts, *words], environment, **size)

    return start


def asked():
    """The last message of each prompt, in order."""
    prompts = map(json.loads, Path("asked.jsonl").read_text().splitlines())
    return [text.split("<|user_start|>")[-1].split("<|user_end|>")[0] for text in prompts]


def is_ready(text):
    """Whether the prompt waits for a message, with nothing typed, and every program is compiled."""
    last = text.rstrip().splitlines()[-1:]
    return (
        "> Send a message" in text and last and last[0].startswith("tiny") and "..." not in last[0]
    )


REPLY = "Some **bold** words that do not fit into one line of `30` columns.\n\n- first\n- second"
SHOWN = (
    "Some bold words that do not fit into one line of\n30 columns.\n\n • first\n • second\n> Send"
)


@pytest.mark.slow
def test_typing_wrapping_interrupts_and_history(start):
    """A pasted text and a quoted one are one message; replies are Markdown, wrapped between words;
    Ctrl-C stops one, says how to leave and keeps the chat; the arrow keys bring back messages.
    """
    with start("max_new_tokens=1000000", step=0.01, columns=50) as terminal:
        terminal.wait_for("tiny; /help lists the commands")
        terminal.wait_for(is_ready)
        terminal.type("\x1b[200~first\nsecond\nthird\x1b[201~")
        terminal.wait_for("> first\n  second\n  third")
        terminal.type("\r")
        terminal.wait_for("\nfirst\nsecond\nthird\n")
        terminal.wait_for(is_ready)
        terminal.type('"""one\r')
        terminal.wait_for('> """one\n')
        terminal.type('two"""\r')
        terminal.wait_for("one\ntwo\n")
        assert "tiny | context " in terminal.wait_for(is_ready)

        terminal.type(f"\x1b[200~{REPLY}\x1b[201~\r")
        text = terminal.wait_for(lambda text: SHOWN in text and is_ready(text))
        assert "Ctrl-C stops" not in text, "the region under the reply is removed"

        terminal.type("endless\r")
        terminal.wait_for("tokens/s | Ctrl-C stops")
        terminal.interrupt()
        terminal.wait_for("(interrupted; Ctrl-D or /quit leaves the chat)")
        terminal.wait_for(is_ready)
        assert terminal.screen.is_cursor_shown

        terminal.type("\x1b[A")
        terminal.wait_for(lambda text: text.count("\n> endless") == 2)
        terminal.type("\x03")  # clears the line and says how to leave
        terminal.wait_for("\n(Ctrl-D or /quit leaves the chat)")
        terminal.wait_for(is_ready)
        terminal.type("/he\t")
        terminal.wait_for("> /help")
        terminal.type("\r")
        terminal.wait_for("/system TEXT      set the system message;")
        terminal.wait_for(is_ready)
        terminal.type("\x04")
        assert terminal.end() == 0
    assert asked() == ["first\nsecond\nthird", "one\ntwo", REPLY, "endless"]
    history = Path("state/maxnano/chat_history")
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    with start() as terminal:
        terminal.wait_for(is_ready)
        terminal.type("\x1b[A" * 2)  # /help, and before it
        terminal.wait_for("> endless")
        terminal.type("\x03")
        terminal.wait_for(is_ready)
        terminal.type(b"caf\xe9\r")
        terminal.wait_for("the message is not UTF-8 and was not sent")
        terminal.wait_for(is_ready)
        terminal.type("/quit\r")
        assert terminal.end() == 0
    assert len(asked()) == 4


def test_a_message_sent_before_the_model_is_ready(start):
    """The prompt is there at once; the reply says what it waits for. One can leave while programs
    are compiled.
    """
    with start(programs=["decode", "prefill 64"], compile_seconds=1000) as terminal:
        terminal.wait_for("> Send a message")
        terminal.type("early\r")
        terminal.wait_for("> early\nCompiling (first time only)...")
        Path("go").touch()
        terminal.wait_for("> early\nearly\n> Send a message")
        terminal.type("\x04")
        assert terminal.end() == 0
    assert asked() == ["early"]


@pytest.mark.parametrize("keys", ["", "hello\r"], ids=["at the prompt", "waiting for a reply"])
def test_a_model_that_cannot_be_loaded_is_one_line(start, keys):
    with start(error="the tokenizer") as terminal:
        terminal.wait_for("tiny; /help")
        terminal.type(keys)
        assert terminal.end() == 2
        assert "error: the tokenizer cannot be read: " in terminal.screen.text
        assert "Traceback" not in terminal.screen.text
        assert terminal.screen.is_cursor_shown


def test_an_unknown_run_is_one_line_with_the_runs_that_exist(start):
    with start("run_name=tinny") as terminal:
        assert terminal.end() == 2
        assert "did you mean tiny?" in terminal.screen.text.replace("\n", " ")


@pytest.mark.parametrize(
    ("text", "opened", "message"),
    [
        ("hi", False, "hi"),
        ('"""', True, None),
        ('"""a\n', True, None),
        ('"""a\nb"""', False, "a\nb"),
        ('"""\na\n"""', False, "a"),
        ('""""""', False, ""),
        ('say """', False, 'say """'),
    ],
)
def test_quotes_around_a_message(text, opened, message):
    assert is_open(text) == opened
    assert opened or unquote(text) == message


# ---- Replies ------------------------------------------------------------------------------------

REPLIES = {
    "paragraphs": "One two three four five six seven eight nine.\n\nTen eleven twelve.\n",
    "line breaks": "roses are red\nviolets are blue\n\nthe end",
    "list": "Things:\n\n1. first item that is so long that it wraps\n2. second\n   - nested\n\nAfter.",
    "code": "Look:\n\n```python\n" + "".join(f"x{i} = {i}\n" for i in range(30)) + "```\n\nDone.",
    "table": "| a | b |\n|---|---|\n| 1 | 2 |\n\nthat was it",
    "html": "a <b>tag</b> and #include <stdio.h>\n\n<div>\nblock\n</div>",
    "wide": "中文字符没有空格所以在任何地方都可以换行而且每个都是两列宽 😀 ok",
    "unclosed": "**bold and `code",
    "empty": "",
}


def shown(text, size, is_markdown=True, columns=30, rows=12):
    """The screen after a reply that came in pieces of `size` characters."""
    screen, out = Screen(columns, rows), StringIO()
    console = Console(file=out, force_terminal=True, width=columns, height=rows, highlight=False)
    with ReplyView(console, is_markdown) as view:
        for start in range(0, len(text), size):
            view.update([ReplyPart("text", text[start : start + size])], "12 tokens/s")
            screen.feed(out.getvalue().replace("\n", "\r\n"))
            out.seek(0)
            out.truncate()
            assert screen.text.endswith("12 tokens/s")
    screen.feed(out.getvalue().replace("\n", "\r\n"))
    return screen.text


@pytest.mark.parametrize("name", REPLIES)
def test_a_reply_looks_the_same_in_pieces_of_any_size(name):
    """Also one that is taller than the terminal: nothing is missing or shown twice."""
    whole = shown(REPLIES[name], 10_000)
    assert shown(REPLIES[name], 7) == whole
    if name == "code":
        assert all(whole.count(f" x{i} = {i}\n") == 1 for i in range(30)), whole
    if name == "line breaks":
        assert whole == "roses are red\nviolets are blue\n\nthe end"
    if name == "html":
        assert "a <b>tag</b> and #include" in whole and "<div>" in whole


def test_a_continued_text_is_no_markdown():
    assert shown("# one *two*\nthree four five six seven eight", 3, is_markdown=False) == (
        "# one *two*\nthree four five six seven\neight"
    )


def test_a_tool_call_and_control_characters():
    out = StringIO()
    console = Console(file=out, force_terminal=True, width=40, height=10, color_system=None)
    with ReplyView(console, True) as view:
        parts = [
            ("text", "It is "),
            ("python", "6*7"),
            ("python_output", "42"),
            ("text", ".\x1b[2J"),
        ]
        view.update([ReplyPart(*part) for part in parts], "\x1b]0;title\x07")
    screen = Screen(40, 10)
    screen.feed(out.getvalue().replace("\n", "\r\n"))
    assert screen.text == "It is [6*7 = 42].[2J"

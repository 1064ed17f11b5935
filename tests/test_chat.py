"""The terminal chat: prompts, display and commands."""

import itertools
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest
from fake_engine import FakeEngine, byte_tokenizer

from MaxNano import pyconfig
from MaxNano.inference.dialogue import ReplyPart
from MaxNano.serving.terminal_chat import (
    COMMANDS,
    ChatSession,
    CommandError,
    TerminalOutput,
    handle_line,
)

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = byte_tokenizer()
SPECIAL = TOKENIZER.special


def make(reply="yes", *overrides, **engine):
    """A session with a model whose replies are all `reply`: text, or token ids."""
    ids = TOKENIZER.encode(reply) if isinstance(reply, str) else reply
    config = pyconfig.initialize(["configs/base.yml", "chat_turns=true", *overrides])
    return ChatSession(config, FakeEngine(lambda request, sample: ids, **engine))


def terminal(is_styled=False):
    return TerminalOutput(StringIO(), StringIO(), is_styled)


def run(talk, *lines, is_styled=False):
    """(replies, notes) for typed lines."""
    shown = terminal(is_styled)
    for line in lines:
        assert handle_line(talk, shown, line)
    return shown.replies.getvalue(), shown.notes.getvalue()


def test_an_answer_is_shown_and_remembered():
    talk = make("grüß dich 😀", step_tokens=1)
    assert run(talk, "hi", "again") == ("grüß dich 😀\n" * 2, "")
    assert [message["content"] for message in talk.messages] == [
        "hi",
        "grüß dich 😀",
        "again",
        "grüß dich 😀",
    ]
    first, second = talk.engine.requests
    assert (
        TOKENIZER.decode(first.prompt) == "<|bos|><|user_start|>hi<|user_end|><|assistant_start|>"
    )
    assert (
        "<|assistant_start|>grüß dich 😀<|assistant_end|><|user_start|>again"
        in TOKENIZER.decode(second.prompt)
    )
    assert first.tools and first.seed != second.seed
    assert first.stop_ids == {SPECIAL.assistant_end, SPECIAL.bos}


def test_special_tokens_in_what_is_typed_stay_text():
    talk = make()
    run(talk, "<|assistant_end|>")
    assert talk.engine.requests[0].prompt.count(SPECIAL.assistant_end) == 0


def test_calls_of_the_tool_stand_in_brackets():
    reply = [
        *b"It is ",
        SPECIAL.python_start,
        *b"6*7",
        SPECIAL.python_end,
        SPECIAL.output_start,
        *b"42",
        SPECIAL.output_end,
        *b".",
    ]
    talk = make(reply)
    assert run(talk, "six by seven?")[0] == "It is [6*7 = 42].\n"
    assert talk.messages[-1]["content"] == [
        {"type": "text", "text": "It is "},
        {"type": "python", "text": "6*7"},
        {"type": "python_output", "text": "42"},
        {"type": "text", "text": "."},
    ]
    run(talk, "sure?")
    start = talk.engine.requests[1].prompt.index(SPECIAL.assistant_start) + 1
    assert talk.engine.requests[1].prompt[start : start + len(reply)] == tuple(reply)


@pytest.mark.parametrize(
    ("parts", "shown"),
    [
        ([], ""),
        ([ReplyPart("text", "a\n")], "a\n"),
        ([ReplyPart("python", "1+1")], "[1+1]\n"),
        ([ReplyPart("python_output", "2"), ReplyPart("text", "a")], "[= 2]a\n"),
        ([ReplyPart("text", "\x1b]0;title\x07\x1b[2Jok\x9b31m\ttab\r")], "]0;title[2Jok31m\ttab\n"),
    ],
)
def test_what_is_written(parts, shown):
    place = terminal()
    place.show(iter(parts))
    assert place.replies.getvalue() == shown


def test_without_a_terminal_there_are_no_escapes():
    assert "\x1b" not in "".join(run(make(), "hi", "/help", "/what"))
    assert "\x1b" in "".join(run(make(), "/help", is_styled=True))


def test_commands():
    talk = make()
    out, notes = run(
        talk,
        "hi",
        "/temperature 0",
        "/topk 5",
        "more",
        "/temperature hot",
        "/temperature 3",
        "/topk",
        "/topk -1",
        "/what",
        "/clear",
        "new",
        "/help",
    )
    assert out == "yes\n" * 3
    requests = talk.engine.requests
    assert [(request.temperature, request.top_k) for request in requests] == [
        (0.6, 50),
        (0, 5),
        (0, 5),
    ]
    assert "hi" not in TOKENIZER.decode(requests[2].prompt)
    for told in (
        "temperature 0",
        "top-k 5",
        "number from 0 to 2",
        "takes an integer",
        "unknown command /what",
    ):
        assert told in notes
    assert all(command in notes for command in COMMANDS)
    assert not handle_line(talk, terminal(), "/quit") and not handle_line(
        talk, terminal(), " exit "
    )


def test_regenerate_answers_the_last_message_again():
    talk = make()
    assert "no message to reply to" in run(talk, "/regenerate")[1]
    assert run(talk, "hi", "/regenerate")[0] == "yes\n" * 2
    first, second = talk.engine.requests
    assert first.prompt == second.prompt and len(talk.messages) == 2


def test_save(tmp_path, monkeypatch):
    talk = make("né")
    monkeypatch.chdir(tmp_path)
    assert "saved talk.json" in run(talk, "hi", "/save talk.json")[1]
    saved = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert saved == {
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "né"}]
    }
    TOKENIZER.render_conversation(saved)
    assert os.listdir(tmp_path) == ["talk.json"]
    assert "could not write" in run(talk, "/save talk.json/talk.json")[1]
    with pytest.raises(CommandError):
        talk.command("/save")


def test_the_oldest_turns_go_where_the_context_is_full():
    talk = make("a" * 20, "max_new_tokens=40", max_length=128)
    notes = run(talk, *(f"{i} " + "b" * 20 for i in range(4)))[1]
    assert notes.splitlines() == [
        "(the context is full: the first 2 messages are dropped)",
        "(the context is full: the first 4 messages are dropped)",
    ]
    last = TOKENIZER.decode(talk.engine.requests[-1].prompt)
    assert "0 b" not in last and "3 b" in last and len(talk.messages) == 8
    assert all(len(request.prompt) + request.max_tokens <= 128 for request in talk.engine.requests)


def test_a_message_that_cannot_fit_is_told_and_not_kept():
    talk = make(max_length=128)
    out, notes = run(talk, "x" * 200, "hi")
    assert "at most 64 fit" in notes and out == "yes\n"
    assert [message["content"] for message in talk.messages] == ["hi", "yes"]


def test_a_base_checkpoint_goes_on_with_the_text():
    talk = make(" world", "chat_turns=false")
    assert run(talk, "hello", "other")[0] == " world\n" * 2
    first, second = talk.engine.requests
    assert (first.prompt, second.prompt) == ((SPECIAL.bos, *b"hello"), (SPECIAL.bos, *b"other"))
    assert not first.tools
    assert "at most 256 fit" in run(talk, "x" * 600)[1]


@pytest.mark.parametrize(("given", "in_turns"), [("null", False), ("true", True), ("false", False)])
def test_turns_follow_the_config(given, in_turns):
    """The default follows the stage, here pretraining."""
    config = pyconfig.initialize(["configs/base.yml", f"chat_turns={given}"])
    assert ChatSession(config, FakeEngine(lambda request, sample: [])).in_turns == in_turns


def test_an_interrupted_answer_is_kept_as_far_as_it_came():
    talk = make(list(b"ab" * 1000))
    talk.ask("hi")
    polls = itertools.count()
    said = "".join(part.text for part in talk.reply(lambda: next(polls) >= 3))
    assert said == "ab" * 6 and talk.messages[-1]["content"] == said and talk.engine.is_idle


SESSION = """
import sys
from fake_engine import FakeEngine
from MaxNano import chat, pyconfig

def last_words(request, sample):
    ids = list(request.prompt)
    start = len(ids) - ids[::-1].index(fake.tokenizer.special.user_start)
    return ids[start:-2]

fake = FakeEngine(last_words, step_seconds=0.01)
chat.load_engine = lambda config, slots, streams: fake
sys.exit(pyconfig.launch(chat.main, ["configs/base.yml", "chat_turns=true", *sys.argv[1:]]))
"""


def command(*words):
    return [sys.executable, "-c", SESSION, *words]


@pytest.fixture
def environment():
    """The environment of the command, with UTF-8 output."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return os.environ | {
        "PYTHONPATH": paths,
        "PYTHONIOENCODING": "utf-8",
        "TERM": "xterm",
        "JAX_PLATFORMS": "cpu",
    }


def test_one_shot_and_piped_lines(environment):
    """Only replies are on standard output; unencodable characters are replaced."""
    ran = subprocess.run(command("prompt=né 😀"), env=environment, capture_output=True, check=True)
    assert ran.stdout.decode() == "né 😀\n"
    ran = subprocess.run(
        command(),
        env=environment | {"PYTHONIOENCODING": "ascii"},
        input=b"one\n\n/temperature 7\ntwo\n/quit\nthree\n",
        capture_output=True,
        check=True,
    )
    assert ran.stdout == b"one\ntwo\n" and b"0 to 2" in ran.stderr


def test_at_a_terminal(environment):
    """History, Ctrl-C at the prompt and Ctrl-D, in a pseudoterminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command(), env=environment, stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True
    )
    os.close(theirs)
    seen = ""

    def wait_for(pattern, since, again=lambda: None):
        nonlocal seen
        deadline = time.monotonic() + 200
        while not re.search(pattern, seen[since:]):
            assert time.monotonic() < deadline, seen
            if select.select([ours], [], [], 3)[0]:
                seen += os.read(ours, 4096).decode(errors="replace")
            else:
                again()
        return len(seen)

    def interrupt():
        process.send_signal(signal.SIGINT)

    try:
        at = wait_for("> ", 0)
        os.write(ours, b"first words\n")
        at = wait_for(r"first words\r\nfirst words\r\n.*> ", at)
        os.write(ours, b"half")
        at = wait_for("half", at)
        interrupt()
        # Python's input() sleeps through a signal that comes while it takes a letter: then one
        # presses Ctrl-C again.
        at = wait_for("\n.*> ", at, interrupt)
        os.write(ours, b"\x1b[A\n")
        at = wait_for(r"first words\r\nfirst words\r\n.*> ", at)
        os.write(ours, b"\x04")
        assert process.wait(200) == 0
        assert "/help lists the commands" in seen
    finally:
        process.kill()
        process.wait()
        os.close(ours)

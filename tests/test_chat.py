"""The terminal chat: prompts, display and commands."""

import itertools
import json
import os
import subprocess
import sys
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
    run_command,
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
        "/set top_k -1",
        "/set seed 7",
        "/set what 1",
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
        "top_k 5",
        "a number from 0 (greedy) to 2, not 'hot'",
        "top_k takes an integer",
        "top_k takes an integer; 0 samples from all tokens, not '-1'",
        "seed 7",
        "unknown setting what; the settings are temperature,",
        "unknown command /what",
    ):
        assert told in notes
    assert all(command in notes for command in COMMANDS)
    assert not handle_line(talk, terminal(), "/quit") and not handle_line(
        talk, terminal(), " exit "
    )


@pytest.mark.parametrize("command", ["/retry", "/regenerate"])
def test_retry_answers_the_last_message_again(command):
    talk = make()
    assert "no message to reply to" in run(talk, command)[1]
    assert run(talk, "hi", command)[0] == "yes\n" * 2
    first, second = talk.engine.requests
    assert first.prompt == second.prompt and len(talk.messages) == 2


def test_settings_reach_the_engine():
    talk = make()
    run(talk, "/set top_p 0.5", "/set min_p 0.1", "/set repetition_penalty 1.5", "/set seed 3")
    run(talk, "/set max_tokens 2", "/set markdown off", "a", "b")
    for request in talk.engine.requests:
        assert (request.top_p, request.min_p, request.repetition_penalty) == (0.5, 0.1, 1.5)
        assert (request.seed, request.max_tokens) == (3, 2)
    shown = run(talk, "/show")[1]
    for fact in ("d4: d4, ", " M parameters, chat model", "markdown off", "2 tokens", "4 messages"):
        assert fact in shown
    assert "takes on or off" in run(talk, "/set markdown maybe")[1]
    assert "top_p" in run(talk, "/set")[1]


def test_undo_removes_a_message_with_its_reply():
    talk = make()
    assert "no message to remove" in run(talk, "/system be kind", "/undo")[1]
    run(talk, "first", "second", "/undo", "third")
    last = TOKENIZER.decode(talk.engine.requests[-1].prompt)
    assert "first" in last and "second" not in last and "third" in last


def test_the_system_message_is_in_every_prompt():
    """It is kept by /clear and counts for the room that a message has."""
    talk = make(max_length=128)
    run(
        talk,
        "/system be kind",
        "hi",
        "/clear",
        "again",
        "/system be brief",
        "more",
        "/system",
        "end",
    )
    prompts = [TOKENIZER.decode(request.prompt) for request in talk.engine.requests]
    start = "<|bos|><|user_start|>"
    assert prompts[0].startswith(f"{start}be kind\n\nhi<|user_end|>")
    assert prompts[1] == f"{start}be kind\n\nagain<|user_end|><|assistant_start|>"
    assert prompts[2].startswith(f"{start}be brief\n\nagain")
    assert prompts[3].startswith(f"{start}again")
    assert "at most 64 fit" in run(talk, f"/system {'x' * 60}", "hello")[1]
    assert "a base model" in run(make("yes", "chat_turns=false"), "/system be kind")[1]


def test_load_continues_a_saved_conversation(tmp_path, monkeypatch):
    first, talk = make(), make()
    monkeypatch.chdir(tmp_path)
    run(first, "/system be kind", "hi", "/save a b.json")
    assert "loaded a b.json: 3 messages" in run(talk, "/load a b.json", "more")[1]
    prompt = TOKENIZER.decode(talk.engine.requests[0].prompt)
    assert "be kind\n\nhi<|user_end|><|assistant_start|>yes<|assistant_end|>" in prompt
    before = list(talk.messages)
    for content in (
        b"{",
        b"[]",
        b'{"messages": [{"role": "dog", "content": ""}]}',
        b"\xff",
        b"[" * 10**5,
    ):
        Path("bad.json").write_bytes(content)
        assert run(talk, "/load bad.json")[1].startswith("could not load bad.json: ")
    assert "could not load nowhere" in run(talk, "/load nowhere")[1]
    assert talk.messages == before and "takes a file name" in run(talk, "/load")[1]


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
        run_command(talk, "/save")


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
chat.load = lambda config: fake
argv = ["ROOT/configs/base.yml", "run_name=tiny", "chat_turns=true", *sys.argv[1:]]
sys.exit(pyconfig.launch(lambda config: chat.main(config, argv), argv))
""".replace("ROOT", str(ROOT))


def test_one_shot_and_piped_lines(tmp_path):
    """Only replies are on standard output; characters that cannot be encoded are replaced, and a
    line that cannot be decoded is refused.
    """
    (tmp_path / "runs/tiny/checkpoints/1").mkdir(parents=True)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONIOENCODING": "utf-8"}

    def chat(*words, **more):
        return subprocess.run(
            [sys.executable, "-c", SESSION, *words], capture_output=True, cwd=tmp_path, **more
        )

    ran = chat("prompt=né 😀".encode(), env=environment)
    assert (ran.returncode, ran.stdout.decode()) == (0, "né 😀\n")
    ran = chat(
        env=environment | {"PYTHONIOENCODING": "ascii"},
        input=b"\xef\xbb\xbfone\n\n/temperature 7\ncaf\xe9\ntwo\n/quit\nthree\n",
    )
    assert ran.stdout == b"one\ntwo\n" and b"0 (greedy) to 2" in ran.stderr
    assert (
        b"line 4 is not UTF-8 and was not sent: byte 4 is 0xe9\n" in ran.stderr
        and ran.returncode == 1
    )
    assert b"Traceback" not in ran.stderr

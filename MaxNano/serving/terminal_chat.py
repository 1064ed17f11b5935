"""The chat in a terminal or a pipe: the conversation, its commands, and plain output.

Imports no JAX, so that a prompt can appear while a thread loads the model (serving/terminal.py).
"""

import contextlib
import itertools
import json
import os
import re
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from ml_collections import FrozenConfigDict

from MaxNano import scaling
from MaxNano.inference import dialogue
from MaxNano.inference.dialogue import ReplyPart
from MaxNano.storage.files import read_text, write_whole
from MaxNano.tokenization import chat_format

if TYPE_CHECKING:
    from MaxNano.inference.engine import Engine

HELP = """\
/system TEXT      set the system message; without TEXT, remove it
/set NAME VALUE   change a setting; without VALUE, list the settings
/show             show model, settings, context and speed
/retry            another reply to the last message
/undo             remove the last message and its reply
/clear            start a new conversation
/save FILE        write the conversation as JSON
/load FILE        continue a conversation that /save wrote
/help             show this list
/quit             quit, like Ctrl-D; Ctrl-C stops a reply\
"""
COMMANDS = re.findall(r"^/\w+", HELP, re.MULTILINE)
QUIT_WORDS = ("/quit", "/exit", "/bye", "quit", "exit")
RETRY_WORDS = ("/retry", "/regenerate")

BLUE, DIM, PLAIN = "\033[34m", "\033[2m", "\033[0m"
# Removed from a reply, in which they could control the terminal: all but tab and line feed.
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
LARGEST = 2**31 - 1  # of an integer setting


class CommandError(ValueError):
    """An unknown command or an invalid argument."""


class Setting(NamedTuple):
    """What /set NAME accepts: a number of a kind and range, or on and off."""

    kind: type
    low: float
    high: float
    text: str

    def parse(self, name: str, text: str) -> Any:
        """The value of a text. Raises CommandError."""
        if self.kind is bool and text in ("on", "off"):
            return text == "on"
        with contextlib.suppress(ValueError):
            value = self.kind(text)
            if self.kind is not bool and self.low <= value <= self.high:
                return value
        raise CommandError(f"{name} takes {self.text}, not {text!r}")


SETTINGS = {
    "temperature": Setting(float, 0, 2, "a number from 0 (greedy) to 2"),
    "top_k": Setting(int, 0, LARGEST, "an integer; 0 samples from all tokens"),
    "top_p": Setting(float, 1e-6, 1, "a number above 0, at most 1 (off)"),
    "min_p": Setting(float, 0, 1, "a number from 0 (off) to 1"),
    "repetition_penalty": Setting(float, 0.01, 10, "a number from 0.01 to 10; 1 is off"),
    "max_tokens": Setting(int, 1, LARGEST, "an integer of at least 1"),
    "seed": Setting(int, -1, LARGEST, "an integer; -1 draws a new seed for each reply"),
    "markdown": Setting(bool, 0, 1, "on or off"),
    "history": Setting(bool, 0, 1, "on or off: whether messages are saved for the arrow keys"),
}


@dataclass
class ReplyUsage:
    """Tokens and times of the last reply."""

    prompt_tokens: int = 0
    tokens: int = 0
    first_tokens: int = 0  # that came with the first event
    started: float = 0.0  # time.monotonic()
    first_at: float | None = None
    last_at: float = 0.0

    def add(self, tokens: int) -> None:
        """Count new tokens."""
        self.last_at = time.monotonic()
        self.tokens += tokens
        if self.first_at is None and tokens:
            self.first_at, self.first_tokens = self.last_at, tokens

    @property
    def speed(self) -> float | None:
        """Tokens per second after the first ones; None if that is unknown."""
        if self.first_at is None or self.last_at <= self.first_at:
            return None
        return (self.tokens - self.first_tokens) / (self.last_at - self.first_at)

    def describe(self) -> str:
        """`42 tokens, 35.1 tokens/s, first token after 0.12 s`."""
        parts = [f"{self.tokens} tokens"]
        if self.speed is not None:
            parts.append(f"{self.speed:.1f} tokens/s")
        if self.first_at is not None:
            parts.append(f"first token after {self.first_at - self.started:.2f} s")
        return ", ".join(parts)


class ChatSession:
    """A conversation with an engine, and its sampling settings.

    engine: may be set later, before ask().
    """

    def __init__(self, config: FrozenConfigDict, engine: "Engine | None" = None):
        self.config = config
        self.engine = engine
        self.in_turns = dialogue.in_turns(config)
        self.max_length = config.decode_max_length or config.max_target_length
        self.settings: dict[str, Any] = {
            "temperature": config.temperature,
            "top_k": config.top_k,
            "top_p": 1.0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "max_tokens": config.max_new_tokens,
            "seed": -1,
            "markdown": self.in_turns,
            "history": True,
        }
        self.messages: list[dict[str, Any]] = []
        self.dropped = 0  # messages that did not fit into the context of the last reply
        self.usage = ReplyUsage()

    def ask(self, text: str) -> None:
        """Add the user's next message. Raises ValueError if it leaves no room for a reply."""
        message = {"role": "user", "content": text}
        self._prompt([*self._system(), message])
        # A base model continues this text alone.
        self.messages = [*self.messages, message] if self.in_turns else [message]

    def retry(self) -> None:
        """Remove the last reply, so that reply() generates another."""
        if self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        if not self.messages or self.messages[-1]["role"] != "user":
            raise CommandError("there is no message to reply to")

    def undo(self) -> None:
        """Remove the last message of the user and the reply to it."""
        indices = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not indices:
            raise CommandError("there is no message to remove")
        del self.messages[indices[-1] :]

    def _system(self) -> list[dict[str, Any]]:
        return [message for message in self.messages[:1] if message["role"] == "system"]

    def _prompt(self, messages: Sequence[dict[str, Any]]) -> tuple[list[Any], list[int]]:
        """(messages that fit, their prompt), with room left for a reply."""
        length, tokenizer = self.engine.max_length, self.engine.tokenizer
        limit = length - min(self.settings["max_tokens"], length // 2)
        if self.in_turns:
            return dialogue.trim(tokenizer, messages, limit)
        ids = [tokenizer.bos_id, *tokenizer.encode(messages[-1]["content"])]
        if len(ids) > limit:
            raise ValueError(f"the text is too long: it has {len(ids)} tokens, at most {limit} fit")
        return list(messages), ids

    def reply(self, is_interrupted: Callable[[], bool] = lambda: False) -> Iterator[ReplyPart]:
        """Generate the reply to the last message, part by part, and add it to the messages."""
        from MaxNano.inference.requests import Request  # imports JAX

        usage = self.usage = ReplyUsage(started=time.monotonic())
        kept, ids = self._prompt(self.messages)
        self.dropped, usage.prompt_tokens = len(self.messages) - len(kept), len(ids)
        special, settings = self.engine.tokenizer.special, self.settings
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        number = self.engine.submit(
            Request(
                prompt=tuple(ids),
                max_tokens=min(settings["max_tokens"], self.engine.max_length - len(ids)),
                seed=secrets.randbits(31) if settings["seed"] < 0 else settings["seed"],
                stop_ids=frozenset({special.assistant_end, special.bos}),
                tools=self.in_turns,
                **{name: settings[name] for name in names},
            )
        )
        parts: list[ReplyPart] = []
        while not self.engine.is_idle:
            if is_interrupted():
                self.engine.cancel(number)
            for event in self.engine.step():
                usage.add(len(event.tokens))
                parts += event.parts
                yield from event.parts
        content = dialogue.content_of(dialogue.merge_parts(parts))
        self.messages.append({"role": "assistant", "content": content})


# ---- Commands -----------------------------------------------------------------------------------


def run_command(session: ChatSession, line: str) -> str:
    """Run a command, except those that quit or retry. Returns what to show; raises CommandError."""
    name, _, argument = line.partition(" ")
    if name not in _COMMANDS:
        raise CommandError(f"unknown command {name}; /help lists the commands")
    return _COMMANDS[name](session, argument.strip())


def _clear(session: ChatSession, argument: str) -> str:
    session.messages = session._system()
    return "new conversation" + ", with the system message" * bool(session.messages)


def _undo(session: ChatSession, argument: str) -> str:
    session.undo()
    return f"removed the last message and its reply; {len(session.messages)} messages are left"


def _set_system(session: ChatSession, text: str) -> str:
    _check_in_turns(session)
    rest = session.messages[len(session._system()) :]
    session.messages = [{"role": "system", "content": text}, *rest] if text else rest
    return "system message set" if text else "no system message"


def _check_in_turns(session: ChatSession) -> None:
    if not session.in_turns:
        raise CommandError("a base model has no conversation (chat_turns=true to chat with it)")


def _set(session: ChatSession, argument: str) -> str:
    name, _, text = argument.partition(" ")
    if not name:
        return "\n".join(f"{key:<18} {setting.text}" for key, setting in SETTINGS.items())
    if name not in SETTINGS:
        raise CommandError(f"unknown setting {name}; the settings are {', '.join(SETTINGS)}")
    session.settings[name] = SETTINGS[name].parse(name, text.strip())
    return f"{name} {_value_text(session.settings[name])}"


def _value_text(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _show(session: ChatSession, argument: str) -> str:
    config, usage = session.config, session.usage
    millions = scaling.parameter_counts(scaling.shape_of(config)).total / 1e6
    kind = "chat model" if session.in_turns else "base model: it continues your text"
    settings = ", ".join(f"{name} {_value_text(v)}" for name, v in session.settings.items())
    used = usage.prompt_tokens + usage.tokens
    lines = [
        f"model     {config.run_name}: {config.model}, {millions:.1f} M parameters, {kind}",
        f"settings  {settings}",
        f"context   {used} of {session.max_length} tokens used, {len(session.messages)} messages",
    ]
    lines += [f"system    {message['content']}" for message in session._system()]
    if usage.tokens:
        lines.append(f"last      {usage.describe()}")
    return "\n".join(lines)


def _save(session: ChatSession, name: str) -> str:
    """Write {"messages": [...]} to a file."""
    if not name:
        raise CommandError("/save takes a file name")
    path = Path(name).expanduser()
    content = json.dumps({"messages": session.messages}, ensure_ascii=False, indent=1) + "\n"
    try:
        write_whole(path, content)
    except OSError as error:
        raise CommandError(f"could not write {path}: {error.strerror or error}") from None
    return f"saved {path}"


def _load(session: ChatSession, name: str) -> str:
    """Read a conversation that _save wrote."""
    _check_in_turns(session)
    if not name:
        raise CommandError("/load takes a file name")
    try:
        conversation = json.loads(read_text(Path(name).expanduser(), name))
        chat_format.turns(conversation)
    except (ValueError, RecursionError) as error:
        raise CommandError(f"could not load {name}: {error}") from None
    session.messages = [dict(message) for message in conversation["messages"]]
    return f"loaded {name}: {len(session.messages)} messages"


_COMMANDS: dict[str, Callable[[ChatSession, str], str]] = {
    "/system": _set_system,
    "/set": _set,
    "/show": _show,
    "/undo": _undo,
    "/clear": _clear,
    "/save": _save,
    "/load": _load,
    "/help": lambda session, argument: HELP,
    "/?": lambda session, argument: HELP,
    # Names of earlier versions.
    "/temperature": lambda session, argument: _set(session, f"temperature {argument}"),
    "/topk": lambda session, argument: _set(session, f"top_k {argument}"),
}


# ---- Display ------------------------------------------------------------------------------------


class TerminalOutput(NamedTuple):
    """Prints replies and notes to two streams."""

    replies: TextIO
    notes: TextIO
    is_styled: bool

    def style(self, text: str, *codes: str) -> str:
        """The text with escape codes, if the output is styled."""
        return "".join(codes) + text + PLAIN if self.is_styled else text

    def note(self, text: str) -> None:
        """Print a line that is not part of a reply."""
        print(self.style(text, DIM), file=self.notes, flush=True)

    def show(self, parts: Iterator[ReplyPart]) -> None:
        """Print a reply as it is generated, tool calls as [call = result]."""
        kind, is_line_ended = "text", True
        for part in parts:
            if part.kind != kind:
                self.replies.write(self._separator(kind, part.kind))
            kind = part.kind
            text = CONTROL_CHARACTERS.sub("", part.text)
            self.replies.write(text if kind == "text" else self.style(text, BLUE))
            self.replies.flush()
            is_line_ended = text.endswith("\n")
        self.replies.write(self._separator(kind, "text") if kind != "text" else "")
        self.replies.write("" if is_line_ended and kind == "text" else "\n")
        self.replies.flush()

    def _separator(self, before: str, after: str) -> str:
        return self.style(separator(before, after), BLUE)


def separator(before: str, after: str) -> str:
    """The text between parts of two kinds: a tool call is shown as [call = result]."""
    if after == "text":
        return "]"
    if before == "text":
        return "[" if after == "python" else "[= "
    return " = " if after == "python_output" else "] ["


@contextlib.contextmanager
def catch_interrupt(on_second: Callable[[], None] = lambda: None) -> Iterator[Callable[[], bool]]:
    """Within the block, Ctrl-C raises nothing; the function returns whether it was pressed.

    on_second: called when it is pressed again.
    """
    is_interrupted = False

    def handle(*_: Any) -> None:
        nonlocal is_interrupted
        if is_interrupted:
            on_second()
        is_interrupted = True

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: is_interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def dropped_note(session: ChatSession) -> str:
    """What to say if messages did not fit into the context."""
    return f"(the context is full: the first {session.dropped} messages are dropped)"


def show_reply(session: ChatSession, output: TerminalOutput) -> None:
    """Generate and print the reply to the last message."""
    dropped = session.dropped

    def noted(parts: Iterator[ReplyPart]) -> Iterator[ReplyPart]:
        for index, part in enumerate(parts):
            if index == 0 and session.dropped > dropped:
                output.note(dropped_note(session))
            yield part

    with catch_interrupt() as is_interrupted:
        output.show(noted(session.reply(is_interrupted)))
        if is_interrupted():
            output.note("(interrupted)")


def handle_line(session: ChatSession, output: TerminalOutput, line: str) -> bool:
    """Run a command or reply to a message; False to quit."""
    line = line.strip()
    if line in QUIT_WORDS:
        return False
    try:
        if line in RETRY_WORDS:
            session.retry()
            show_reply(session, output)
        elif line.startswith("/"):
            output.note(run_command(session, line))
        elif line:
            session.ask(line)
            show_reply(session, output)
    except ValueError as error:
        output.note(str(error))
    return True


def run_plain(config: FrozenConfigDict, engine: "Engine") -> int:
    """Answer config.prompt, or each line of standard input; returns the exit status.

    Lines that are not UTF-8 are refused, and the status is then 1.
    """
    is_terminal = sys.stdout.isatty()
    is_styled = is_terminal and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    output = TerminalOutput(sys.stdout, sys.stdout if is_terminal else sys.stderr, is_styled)
    session = ChatSession(config, engine)
    if config.prompt is not None:
        session.ask(config.prompt)
        show_reply(session, output)
        return 0
    try:
        return _answer_lines(session, output)
    except KeyboardInterrupt:  # while waiting for a line
        return 130


def _answer_lines(session: ChatSession, output: TerminalOutput) -> int:
    status = 0
    is_typed = sys.stdin.isatty()  # at a terminal without cursor control
    for number in itertools.count(1):
        if is_typed:
            print("> ", end="", file=output.notes, flush=True)
        line = sys.stdin.buffer.readline()
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            byte = f"byte {error.start + 1} is 0x{line[error.start]:02x}"
            output.note(f"line {number} is not UTF-8 and was not sent: {byte}")
            status = 1
            continue
        if not line or not handle_line(session, output, text):
            break
    return status

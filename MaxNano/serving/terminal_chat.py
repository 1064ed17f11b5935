"""The chat in a terminal: conversation with the engine, commands, display of replies."""

import contextlib
import json
import re
import secrets
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from ml_collections import FrozenConfigDict

from MaxNano.inference import dialogue
from MaxNano.inference.dialogue import ReplyPart
from MaxNano.inference.engine import Engine
from MaxNano.inference.requests import Request
from MaxNano.storage.files import write_whole

HELP = """\
/clear            start a new conversation
/temperature X    0 (greedy) to 2
/topk N           sample from the N most likely tokens; 0: from all
/regenerate       another reply to the last message
/save FILE        write the conversation as JSON
/help             show this list
/quit             quit, like Ctrl-D; Ctrl-C stops a reply\
"""
COMMANDS = re.findall(r"^/\w+", HELP, re.MULTILINE)

BOLD, DIM, GREEN, BLUE, PLAIN = "\033[1m", "\033[2m", "\033[32m", "\033[34m", "\033[0m"
# Removed from a reply, in which they could control the terminal: all but tab and line feed.
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class CommandError(ValueError):
    """An unknown command or an invalid argument."""


class ChatSession:
    """A conversation with an engine, and its sampling settings."""

    def __init__(self, config: FrozenConfigDict, engine: Engine):
        self.engine = engine
        self.tokenizer = engine.tokenizer
        self.in_turns = dialogue.in_turns(config)
        self.temperature = config.temperature
        self.top_k = config.top_k
        self.max_new_tokens = config.max_new_tokens
        self.messages: list[dict[str, Any]] = []
        self.dropped = 0  # messages that did not fit into the context of the last reply

    def ask(self, text: str) -> None:
        """Add the user's next message. Raises ValueError if it leaves no room for a reply."""
        message = {"role": "user", "content": text}
        self._prompt([message])
        # A base model continues this text alone.
        self.messages = [*self.messages, message] if self.in_turns else [message]

    def regenerate(self) -> None:
        """Remove the last reply, so that reply() generates another."""
        if self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        if not self.messages:
            raise CommandError("there is no message to reply to")

    def _prompt(self, messages: Sequence[dict[str, Any]]) -> tuple[list[Any], list[int]]:
        """(messages that fit, their prompt), with room left for a reply."""
        room = min(self.max_new_tokens, self.engine.max_length // 2)
        limit = self.engine.max_length - room
        if self.in_turns:
            return dialogue.trim(self.tokenizer, messages, limit)
        ids = [self.tokenizer.bos_id, *self.tokenizer.encode(messages[-1]["content"])]
        if len(ids) > limit:
            raise ValueError(f"the text is too long: it has {len(ids)} tokens, at most {limit} fit")
        return list(messages), ids

    def reply(self, is_interrupted: Callable[[], bool] = lambda: False) -> Iterator[ReplyPart]:
        """Generate the reply to the last message, part by part, and add it to the messages."""
        kept, ids = self._prompt(self.messages)
        self.dropped = len(self.messages) - len(kept)
        special = self.tokenizer.special
        number = self.engine.submit(
            Request(
                prompt=tuple(ids),
                max_tokens=min(self.max_new_tokens, self.engine.max_length - len(ids)),
                temperature=self.temperature,
                top_k=self.top_k,
                seed=secrets.randbits(31),
                stop_ids=frozenset({special.assistant_end, special.bos}),
                tools=self.in_turns,
            )
        )
        parts: list[ReplyPart] = []
        while not self.engine.is_idle:
            if is_interrupted():
                self.engine.cancel(number)
            for event in self.engine.step():
                parts += event.parts
                yield from event.parts
        content = dialogue.content_of(dialogue.merge_parts(parts))
        self.messages.append({"role": "assistant", "content": content})

    def command(self, line: str) -> str:
        """Run /clear, /temperature, /topk, /save or /help.

        Returns what to show. Raises CommandError.
        """
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name == "/clear":
            self.messages = []
            return "new conversation"
        if name == "/temperature":
            usage = "/temperature takes a number from 0 to 2"
            self.temperature = _number(argument, float, 0, 2, usage)
            return f"temperature {self.temperature:g}"
        if name == "/topk":
            usage = "/topk takes an integer; 0 samples from all tokens"
            self.top_k = _number(argument, int, 0, 2**31 - 1, usage)
            return f"top-k {self.top_k or 'off'}"
        if name == "/save":
            return f"saved {self.save(argument)}"
        if name == "/help":
            return HELP
        raise CommandError(f"unknown command {name}; /help lists the commands")

    def save(self, name: str) -> Path:
        """Write {"messages": [...]} to a file. Raises CommandError."""
        if not name:
            raise CommandError("/save takes a file name")
        path = Path(name).expanduser()
        content = json.dumps({"messages": self.messages}, ensure_ascii=False, indent=1) + "\n"
        try:
            write_whole(path, content)
        except OSError as error:
            raise CommandError(f"could not write {path}: {error.strerror or error}") from None
        return path


def _number(text: str, kind: type, low: float, high: float, usage: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        raise CommandError(usage) from None
    if not low <= value <= high:
        raise CommandError(usage)
    return value


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
        """The text between parts of two kinds."""
        if after == "text":
            return self.style("]", BLUE)
        if before == "text":
            return self.style("[" if after == "python" else "[= ", BLUE)
        return self.style(" = " if after == "python_output" else "] [", BLUE)


@contextlib.contextmanager
def catch_interrupt() -> Iterator[Callable[[], bool]]:
    """Within the block, Ctrl-C raises nothing; the function returns whether it was pressed."""
    is_interrupted = False

    def handle(*_: Any) -> None:
        nonlocal is_interrupted
        is_interrupted = True

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: is_interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def show_reply(session: ChatSession, output: TerminalOutput) -> None:
    """Generate and print the reply to the last message."""
    dropped = session.dropped

    def noted(parts: Iterator[ReplyPart]) -> Iterator[ReplyPart]:
        for index, part in enumerate(parts):
            if index == 0 and session.dropped > dropped:
                output.note(
                    f"(the context is full: the first {session.dropped} messages are dropped)"
                )
            yield part

    with catch_interrupt() as is_interrupted:
        output.show(noted(session.reply(is_interrupted)))
        if is_interrupted():
            output.note("(interrupted)")


def handle_line(session: ChatSession, output: TerminalOutput, line: str) -> bool:
    """Run a command or reply to a message; False to quit."""
    line = line.strip()
    if line in ("/quit", "/exit", "quit", "exit"):
        return False
    try:
        if line == "/regenerate":
            session.regenerate()
            show_reply(session, output)
        elif line.startswith("/"):
            output.note(session.command(line))
        elif line:
            session.ask(line)
            show_reply(session, output)
    except ValueError as error:
        output.note(str(error))
    return True


def _set_up_readline() -> None:
    """Line editing, history and completion of commands, on platforms with readline."""
    with contextlib.suppress(ImportError):
        import readline

        def complete(text: str, state: int) -> str | None:
            matches = [f"{command} " for command in COMMANDS if command.startswith(text)]
            return matches[state] if state < len(matches) else None

        readline.set_completer_delims(" ")
        readline.set_completer(complete)
        readline.parse_and_bind("tab: complete")


def run_interactive(session: ChatSession, output: TerminalOutput, name: str) -> None:
    """Read lines from a terminal until Ctrl-D or /quit."""
    # A shell may have started this process with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _set_up_readline()
    output.note(f"{name}; /help lists the commands, Ctrl-D quits")
    if not session.in_turns:
        output.note("a base model: it continues your text (chat_turns=true to chat with it)")
    # \001 and \002 enclose characters of no width, for readline.
    prompt = f"\001{BOLD}{GREEN}\002> \001{PLAIN}\002" if output.is_styled else ""
    prompt = prompt or ("> " if sys.stdout.isatty() else "")
    while True:
        try:
            line = input(prompt)
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            print()
            return
        if not handle_line(session, output, line):
            return

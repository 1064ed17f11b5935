"""A chat in the terminal with a checkpoint.

    python MaxNano/chat.py configs/base.yml model=d24 stage=sft
    python MaxNano/chat.py configs/base.yml model=d24 stage=sft prompt="Why is the sky blue?"

A checkpoint that has not learned to talk in turns goes on with the text that it is given. Without a terminal, lines
of standard input are answered one by one and only the answers are on standard output.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    if not __package__:  # run as a script: MaxNano/ itself must not be where modules are looked for
        sys.path[0] = str(Path(__file__).resolve().parents[1])
    from MaxNano import pyconfig

    pyconfig.check_command_line()  # a typo is told now, not when JAX has been imported

import contextlib
import json
import os
import re
import secrets
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TextIO

from ml_collections import FrozenConfigDict

from MaxNano import pyconfig
from MaxNano.distributed import runtime
from MaxNano.inference import dialogue
from MaxNano.inference.dialogue import Part
from MaxNano.inference.engine import Engine, Request
from MaxNano.storage import files
from MaxNano.training.loading import load_engine

HELP = """\
/clear            forget the conversation
/temperature X    0: always the likeliest token; up to 2
/topk N           draw from the N likeliest tokens; 0: from all
/regenerate       another answer to the last message
/save FILE        write the conversation as JSON
/help             this
/quit             leave, as Ctrl-D does; Ctrl-C ends an answer\
"""
COMMANDS = re.findall(r"^/\w+", HELP, re.MULTILINE)

BOLD, DIM, GREEN, BLUE, PLAIN = "\033[1m", "\033[2m", "\033[32m", "\033[34m", "\033[0m"
# Text of a model can hold what a terminal takes for commands: all control characters but tab and line feed go.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class CommandError(ValueError):
    """What was typed is no command, or one with a wrong argument."""


class Chat:
    """A conversation, its settings and the engine that answers."""

    def __init__(self, config: FrozenConfigDict, engine: Engine):
        self.engine = engine
        self.tokenizer = engine.tokenizer
        self.in_turns = dialogue.in_turns(config)
        self.temperature = config.temperature
        self.top_k = config.top_k
        self.max_new_tokens = config.max_new_tokens
        self.messages: list[dict[str, Any]] = []
        self.left_out = 0  # messages that the model saw no more of, with the last answer

    def ask(self, text: str) -> None:
        """Take the user's next message; ValueError where it is too long for any answer."""
        message = {"role": "user", "content": text}
        self._prompt([message])
        # Without turns nothing of what was said before is the model's business.
        self.messages = [*self.messages, message] if self.in_turns else [message]

    def regenerate(self) -> None:
        """Take the last answer back, so that another one can be drawn."""
        if self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        if not self.messages:
            raise CommandError("there is nothing to answer yet")

    def _prompt(self, messages: Sequence[dict[str, Any]]) -> tuple[list[Any], list[int]]:
        """(messages that fit, their ids), with room left for an answer."""
        room = min(self.max_new_tokens, self.engine.max_length // 2)
        limit = self.engine.max_length - room
        if self.in_turns:
            return dialogue.trim(self.tokenizer, messages, limit)
        ids = [self.tokenizer.bos_id, *self.tokenizer.encode(messages[-1]["content"])]
        if len(ids) > limit:
            raise ValueError(f"this text has {len(ids)} tokens; at most {limit} fit, so shorten it")
        return list(messages), ids

    def answer(self, is_interrupted: Callable[[], bool] = lambda: False) -> Iterator[Part]:
        """The parts of the answer to the last message, as they are drawn; then it is the last message."""
        kept, ids = self._prompt(self.messages)
        self.left_out = len(self.messages) - len(kept)
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
        decoder = dialogue.ReplyDecoder(self.tokenizer)
        said: list[Part] = []
        while not self.engine.is_idle:
            if is_interrupted():
                self.engine.cancel(number)
            for event in self.engine.step():
                parts = decoder.feed(event.tokens)
                if event.finish:
                    parts = dialogue.merge_parts([*parts, *decoder.finish()])
                said += parts
                yield from parts
        content = dialogue.content_of(dialogue.merge_parts(said))
        self.messages.append({"role": "assistant", "content": content})

    def command(self, line: str) -> str:
        """Carry out /clear, /temperature, /topk, /save or /help; what to tell the user."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name == "/clear":
            self.messages = []
            return "a new conversation"
        if name == "/temperature":
            self.temperature = _number(
                argument, float, 0, 2, "/temperature takes a number from 0 to 2"
            )
            return f"temperature {self.temperature:g}"
        if name == "/topk":
            self.top_k = _number(
                argument, int, 0, 2**31 - 1, "/topk takes a whole number; 0 draws from all tokens"
            )
            return f"top-k {self.top_k or 'off'}"
        if name == "/save":
            return f"saved {self.save(argument)}"
        if name == "/help":
            return HELP
        raise CommandError(f"{name} is no command; /help lists them")

    def save(self, name: str) -> Path:
        """Write {"messages": [...]} to a file, whole or not at all."""
        if not name:
            raise CommandError("/save takes a file's name")
        path = Path(name).expanduser()
        content = {"messages": self.messages}
        try:
            files.write_whole(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
        except OSError as error:
            raise CommandError(f"{path} cannot be written: {error.strerror or error}") from None
        return path


def _number(text: str, kind: type, low: float, high: float, message: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        raise CommandError(message) from None
    if not low <= value <= high:
        raise CommandError(message)
    return value


# ---- The terminal -------------------------------------------------------------------------------


class Terminal(NamedTuple):
    """Where answers and remarks go."""

    out: TextIO  # answers
    notes: TextIO  # everything else
    is_styled: bool

    def style(self, text: str, *codes: str) -> str:
        return "".join(codes) + text + PLAIN if self.is_styled else text

    def note(self, text: str) -> None:
        print(self.style(text, DIM), file=self.notes, flush=True)

    def say(self, parts: Iterator[Part]) -> None:
        """Write an answer as it comes; a call of the tool and its result as [call = result]."""
        kind, ended = "text", True
        for part in parts:
            if part.kind != kind:
                self.out.write(self._between(kind, part.kind))
            kind = part.kind
            text = CONTROL.sub("", part.text)
            self.out.write(text if kind == "text" else self.style(text, BLUE))
            self.out.flush()
            ended = text.endswith("\n")
        self.out.write(self._between(kind, "text") if kind != "text" else "")
        self.out.write("" if ended and kind == "text" else "\n")
        self.out.flush()

    def _between(self, before: str, after: str) -> str:
        """What stands between parts of two kinds."""
        if after == "text":
            return self.style("]", BLUE)
        if before == "text":
            return self.style("[" if after == "python" else "[= ", BLUE)
        return self.style(" = " if after == "python_output" else "] [", BLUE)


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C came, for the time of the block in which it raises nothing."""
    came = False

    def note(*_: Any) -> None:
        nonlocal came
        came = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGINT, before)


def answer(chat: Chat, terminal: Terminal) -> None:
    """Draw and show the answer to the last message."""
    with interruptible() as is_interrupted:
        terminal.say(_with_note(chat, terminal, is_interrupted))
        if is_interrupted():
            terminal.note("(interrupted)")


def _with_note(
    chat: Chat, terminal: Terminal, is_interrupted: Callable[[], bool]
) -> Iterator[Part]:
    left_out = chat.left_out
    for part in chat.answer(is_interrupted):
        if chat.left_out > left_out:
            terminal.note(
                f"(the context is full: the first {chat.left_out} messages are no longer seen)"
            )
            left_out = chat.left_out
        yield part


def take(chat: Chat, terminal: Terminal, line: str) -> bool:
    """Do what a typed line asks for; False if it asks to leave."""
    line = line.strip()
    if line in ("/quit", "/exit", "quit", "exit"):
        return False
    try:
        if line == "/regenerate":
            chat.regenerate()
            answer(chat, terminal)
        elif line.startswith("/"):
            terminal.note(chat.command(line))
        elif line:
            chat.ask(line)
            answer(chat, terminal)
    except ValueError as error:
        terminal.note(str(error))
    return True


def set_up_editing() -> None:
    """Editing, history and completion of commands at the prompt, where the platform has readline."""
    with contextlib.suppress(ImportError):
        import readline

        def complete(text: str, state: int) -> str | None:
            found = [f"{command} " for command in COMMANDS if command.startswith(text)]
            return found[state] if state < len(found) else None

        readline.set_completer_delims(" ")
        readline.set_completer(complete)
        readline.parse_and_bind("tab: complete")


def talk(chat: Chat, terminal: Terminal, name: str) -> None:
    """The dialogue at a terminal, until Ctrl-D or /quit."""
    # Who sits at a terminal means Ctrl-C; a shell may have started us with it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    set_up_editing()
    terminal.note(f"{name}; /help lists the commands, Ctrl-D leaves")
    if not chat.in_turns:
        terminal.note(
            "this checkpoint has not learned to chat: it goes on with your text (chat_turns=true to try)"
        )
    # readline is told which characters take no room, or else it loses count of the line.
    prompt = f"\001{BOLD}{GREEN}\002> \001{PLAIN}\002" if terminal.is_styled else ""
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
        if not take(chat, terminal, line):
            return


def main(config: FrozenConfigDict) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # where the terminal's encoding lacks a character
    is_styled = (
        sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    )
    terminal = Terminal(sys.stdout, sys.stdout if sys.stdout.isatty() else sys.stderr, is_styled)
    runtime.initialize(config)
    chat = Chat(config, load_engine(config, slots=1, streams=True))
    if config.prompt is not None:
        chat.ask(config.prompt)
        answer(chat, terminal)
    elif sys.stdin.isatty():
        talk(chat, terminal, config.run_name)
    else:
        for line in sys.stdin:
            if not take(chat, terminal, line):
                return


if __name__ == "__main__":
    sys.exit(pyconfig.launch(main))

"""The interactive chat: line editing, a thread with the engine, replies as they grow.

The prompt appears before the model is loaded. One thread loads the engine, compiles its programs
while nothing else is to be done, and runs the replies; the main thread reads and shows.
"""

import contextlib
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import FrozenConfigDict
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import Completer, Completion
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.styles import Style
from rich.console import Console
from rich.text import Text

from MaxNano import console
from MaxNano.inference.dialogue import ReplyPart
from MaxNano.serving import terminal_chat
from MaxNano.serving.terminal_chat import COMMANDS, ChatSession, catch_interrupt
from MaxNano.tokenization.tokenizer import valid_unicode

if TYPE_CHECKING:
    from MaxNano.inference.engine import Engine

QUOTES = '"""'  # begin and end a message of several lines
LEAVE = "Ctrl-D or /quit leaves the chat"
UPDATE_SECONDS = 0.1  # between looks at the worker
PATIENCE_SECONDS = 0.5  # wait for a first token before the reason is shown
LOADING, COMPILING = "Loading the model...", "Compiling (first time only)..."
STYLE = Style.from_dict({"bottom-toolbar": "noreverse", "prompt": "bold ansigreen"})


class EngineWorker(threading.Thread):
    """The only thread that uses the engine: it loads it, compiles its programs, runs replies.

    load: returns the engine. on_change: called in the thread when `status` or `error` changes.
    """

    def __init__(self, load: "Callable[[], Engine]", on_change: Callable[[], None]):
        super().__init__(name="engine", daemon=True)
        self.status = LOADING  # empty: every program is compiled
        self.error: BaseException | None = None  # of loading
        self.is_busy = True
        self._load = load
        self._on_change = on_change
        self._jobs: queue.SimpleQueue[tuple[Callable, queue.SimpleQueue]] = queue.SimpleQueue()

    def run(self) -> None:
        """The thread's work."""
        try:
            engine = self._load()
        except BaseException as error:  # noqa: BLE001 (the main thread raises it)
            self.error = error
            self._on_change()
            return
        programs = engine.compile_programs(with_scores=False)
        self._show(COMPILING)
        while True:
            self.is_busy = bool(self.status)
            try:
                job, out = self._jobs.get(block=not self.status)
            except queue.Empty:
                if next(programs, None) is None:
                    self._show("")
                continue
            self.is_busy = True
            try:
                for item in job(engine):
                    out.put(item)
                out.put(None)
            except BaseException as error:  # noqa: BLE001 (as above)
                out.put(error)

    def _show(self, status: str) -> None:
        self.status = status
        self._on_change()

    def reply(self, job: "Callable[[Engine], Iterable[ReplyPart]]") -> Iterator[ReplyPart | None]:
        """Run a job in the thread: its parts as they come, None about every UPDATE_SECONDS.

        Raises the errors of the job, and of loading.
        """
        out: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._jobs.put((job, out))
        while True:
            try:
                item = out.get(timeout=UPDATE_SECONDS)
            except queue.Empty:
                if self.error is not None:
                    raise self.error from None
                yield None
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item


# ---- Reading ------------------------------------------------------------------------------------


def history_path() -> Path:
    """The file of the messages that were typed, for the arrow keys."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "maxnano" / "chat_history"


class ChatHistory(FileHistory):
    """Messages of earlier sessions. A file that cannot be read or written is no reason to stop."""

    def __init__(self, path: Path, is_on: Callable[[], bool]):
        super().__init__(str(path))
        self._path = path
        self._is_on = is_on

    def load_history_strings(self) -> Iterable[str]:
        """The messages, newest first."""
        with contextlib.suppress(OSError):
            return list(super().load_history_strings())
        return []

    def store_string(self, string: str) -> None:
        """Append a message; only this user can read the file."""
        with contextlib.suppress(OSError):
            if self._is_on():
                self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                os.close(os.open(self._path, os.O_CREAT | os.O_APPEND, 0o600))
                super().store_string(valid_unicode(string))


class CommandCompleter(Completer):
    """Completes the commands, and the settings after /set."""

    def get_completions(self, document: Any, complete_event: Any) -> Iterator[Completion]:
        """The words that continue the text before the cursor."""
        text = document.text_before_cursor
        is_set = text.startswith("/set ")
        start = text.removeprefix("/set ") if is_set else text
        words = terminal_chat.SETTINGS if is_set else COMMANDS
        if text.startswith("/") and "\n" not in text:
            for word in words:
                if word.startswith(start):
                    yield Completion(f"{word} ", -len(start))


def is_open(text: str) -> bool:
    """Whether a message that begins with three quotes still misses those that end it."""
    text = text.strip()
    return text.startswith(QUOTES) and not (text.endswith(QUOTES) and len(text) >= 2 * len(QUOTES))


def unquote(text: str) -> str:
    """A message without the three quotes around it."""
    text = text.strip()
    if text.startswith(QUOTES) and not is_open(text):
        return text.removeprefix(QUOTES).removesuffix(QUOTES).strip("\n")
    return text


def make_keys() -> KeyBindings:
    """Enter sends the message, unless three quotes are open; Alt-Enter begins a new line."""
    keys = KeyBindings()

    @keys.add("enter")
    def enter(event: Any) -> None:
        if is_open(event.current_buffer.text):
            event.current_buffer.insert_text("\n")
        else:
            event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def begin_line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    return keys


# ---- The chat -----------------------------------------------------------------------------------


class InteractiveChat:
    """Reads messages and shows replies until Ctrl-D or /quit."""

    def __init__(self, config: FrozenConfigDict, load: "Callable[[FrozenConfigDict], Engine]"):
        self.session = ChatSession(config)
        for name in ("COLUMNS", "LINES"):  # the terminal knows its size; exported ones may be old
            os.environ.pop(name, None)
        self.console = Console(highlight=False)
        self.worker = EngineWorker(lambda: load(config), self._on_change)
        self.reader: PromptSession[str] = PromptSession(
            [("class:prompt", "> ")],
            multiline=True,
            prompt_continuation="  ",
            placeholder=[("ansibrightblack", "Send a message, or /help")],
            history=ChatHistory(history_path(), lambda: self.session.settings["history"]),
            completer=CommandCompleter(),
            complete_while_typing=False,
            reserve_space_for_menu=4,
            key_bindings=make_keys(),
            bottom_toolbar=self._toolbar,
            style=STYLE,
        )
        # The thread starts after the prompt is drawn: its imports would delay that.
        self.reader.app.after_render += lambda app: self._start()

    def _start(self) -> None:
        if self.worker.ident is None:
            self.worker.start()

    def _on_change(self) -> None:
        """Draw the toolbar again, or leave the prompt if the model could not be loaded."""
        app = self.reader.app
        if self.worker.error is None:
            app.invalidate()
        elif app.loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                app.loop.call_soon_threadsafe(self._leave_prompt)

    def _leave_prompt(self) -> None:
        app = self.reader.app
        if self.worker.error is not None and app.is_running and not app.is_done:
            app.exit(exception=self.worker.error)

    def _toolbar(self) -> list[tuple[str, str]]:
        session, usage = self.session, self.session.usage
        used = usage.prompt_tokens + usage.tokens
        parts = [session.config.run_name]
        parts += [f"context {used} of {session.max_length} tokens"] * bool(used)
        parts += [f"{usage.speed:.1f} tokens/s"] if usage.speed else []
        parts += [self.worker.status] if self.worker.status else []
        return [("ansibrightblack", " | ".join(parts))]

    def note(self, text: str) -> None:
        """Print lines that are not part of a reply."""
        self.console.print(Text(text, style="dim"))

    def run(self) -> int:
        """The chat; returns the exit status. Raises the error of loading."""
        session = self.session
        self.note(f"{session.config.run_name}; /help lists the commands, Ctrl-D quits")
        if not session.in_turns:
            self.note("a base model: it continues your text (chat_turns=true to chat with it)")
        while True:
            try:
                text = self.reader.prompt(pre_run=self._leave_prompt)
            except KeyboardInterrupt:
                self.note(f"({LEAVE})")
                continue
            except EOFError:
                return 0
            if not self._handle(unquote(text)):
                return 0

    def _handle(self, text: str) -> bool:
        """Run a command or reply to a message; False to quit."""
        session = self.session
        if text in terminal_chat.QUIT_WORDS:
            return False
        try:
            if valid_unicode(text) != text:
                self.note(
                    "the message is not UTF-8 and was not sent: check the terminal's encoding"
                )
            elif text in terminal_chat.RETRY_WORDS:
                session.retry()
                self._reply(lambda: None)
            elif text.startswith("/"):
                self.note(terminal_chat.run_command(session, text))
            elif text:
                self._reply(lambda: session.ask(text))
        except ValueError as error:
            if error is self.worker.error:
                raise
            self.note(str(error))
        return True

    def _reply(self, prepare: Callable[[], None]) -> None:
        """Generate and show a reply; Ctrl-C stops it, a second one ends the program."""
        from MaxNano.serving.reply_view import ReplyView  # markdown-it is not needed before

        session, dropped = self.session, self.session.dropped
        session.usage = terminal_chat.ReplyUsage()
        with catch_interrupt(_quit_now) as is_interrupted:

            def job(engine: "Engine") -> Iterator[ReplyPart]:
                session.engine = engine
                prepare()
                yield from session.reply(is_interrupted)

            with ReplyView(self.console, session.settings["markdown"]) as view:
                for count, part in enumerate(self.worker.reply(job)):
                    if session.dropped > dropped:
                        view.note(terminal_chat.dropped_note(session))
                        dropped = session.dropped
                    waited_seconds = count * UPDATE_SECONDS
                    status = self._reply_status(is_interrupted(), waited_seconds)
                    view.update([part] if part else [], status)
            if is_interrupted():
                self.note(f"(interrupted; {LEAVE})")

    def _reply_status(self, is_interrupted: bool, waited_seconds: float) -> str:
        usage = self.session.usage
        if is_interrupted:
            return "Stopping... (Ctrl-C again quits)"
        if usage.first_at is not None:
            speed = f"{usage.speed:.1f} tokens/s | " if usage.speed else ""
            return f"{usage.tokens} tokens | {speed}Ctrl-C stops"
        return self.worker.status if waited_seconds >= PATIENCE_SECONDS else ""


def _quit_now() -> None:
    """End the program while the worker works; JAX cannot be stopped otherwise."""
    sys.stdout.write("\n\033[?25h")  # show the cursor
    console.exit_now(130)


def run_interactive(config: FrozenConfigDict, load: "Callable[[FrozenConfigDict], Engine]") -> int:
    """Chat at a terminal; returns the exit status. Raises ValueError if the model cannot be loaded."""
    # A shell may have started this process with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    chat = InteractiveChat(config, load)
    status = chat.run()
    if chat.worker.is_busy and chat.worker.is_alive():
        console.exit_now(status)
    return status

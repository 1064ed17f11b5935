"""A pseudo-terminal with a program in it, and the screen that a person would see."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time

from wcwidth import wcwidth

_PIECE = re.compile(r"\x1b\[([?>]?)([\d;]*)([@-~])|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b.|[\s\S]")


class Screen:
    """What a terminal shows of a text with the escape codes that rich and prompt_toolkit use.

    `lines` includes those that have scrolled out at the top.
    """

    def __init__(self, columns: int, rows: int):
        self.columns, self.rows = columns, rows
        self.lines: list[list[str]] = [[]]
        self.row = self.column = 0
        self.wraps = True
        self.is_cursor_shown = True

    def feed(self, text: str) -> str:
        """Show the text; returns what the terminal answers to the program."""
        answer = ""
        for piece in _PIECE.finditer(text):
            mode, numbers, code = piece.groups()
            if code is None:
                if not piece[0].startswith("\x1b"):
                    self._put(piece[0])
                continue
            number = int(numbers.split(";")[0] or 0)
            if mode:
                if number == 7:
                    self.wraps = code == "h"
                if number == 25:
                    self.is_cursor_shown = code == "h"
            elif code == "n":
                answer += f"\x1b[{self.row - self._top + 1};{self.column + 1}R"
            else:
                self._control(code, number)
        return answer

    @property
    def _top(self) -> int:
        return max(0, len(self.lines) - self.rows)

    def _control(self, code: str, number: int) -> None:
        count = max(1, number)
        if code == "A":
            self.row = max(self._top, self.row - count)
        elif code == "B":
            self.row = min(len(self.lines) - 1, self.row + count)
        elif code == "C":
            self.column = min(self.columns - 1, self.column + count)
        elif code == "D":
            self.column = max(0, min(self.column, self.columns - 1) - count)
        elif code == "K":
            if number == 2:
                self.lines[self.row] = []
            else:
                del self.lines[self.row][self.column :]
        elif code == "J":
            assert number == 0
            del self.lines[self.row][self.column :]
            del self.lines[self.row + 1 :]
        else:
            assert code in "mhlq", code

    def _put(self, character: str) -> None:
        if character == "\r":
            self.column = 0
        elif character == "\n":
            self._go_down()
        elif character == "\b":
            self.column = max(0, self.column - 1)
        elif character == "\x07":
            pass
        else:
            width = wcwidth(character)
            assert width >= 0, repr(character)
            if self.column + width > self.columns:
                if self.wraps:
                    self._go_down()
                    self.column = 0
                else:
                    self.column = self.columns - width
            line = self.lines[self.row]
            line += [" "] * (self.column - len(line))
            # A wide character takes two cells: itself and an empty one.
            line[self.column : self.column + width] = [character, *[""] * (width - 1)]
            self.column += width

    def _go_down(self) -> None:
        self.row += 1
        if self.row == len(self.lines):
            self.lines.append([])

    @property
    def text(self) -> str:
        """The lines without blanks at their ends, up to the last one with a text."""
        return "\n".join("".join(line).rstrip() for line in self.lines).rstrip("\n")


class Terminal:
    """A program at a pseudo-terminal, within a `with` block."""

    def __init__(self, command, environment, columns=60, rows=20):
        self.screen = Screen(columns, rows)
        self._ours, theirs = pty.openpty()
        size = struct.pack("HHHH", rows, columns, 0, 0)
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, size)
        self.process = subprocess.Popen(
            command, env=environment, stdin=theirs, stdout=theirs, stderr=theirs
        )
        os.close(theirs)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self._ours)

    def type(self, text):
        """Press keys: text, or bytes."""
        os.write(self._ours, text.encode() if isinstance(text, str) else text)

    def interrupt(self):
        self.process.send_signal(signal.SIGINT)

    def wait_for(self, condition, seconds=200):
        """Read until the screen has the text, or fulfills the condition; returns its text."""
        is_met = condition if callable(condition) else lambda text: condition in text
        deadline = time.monotonic() + seconds
        while not is_met(self.screen.text):
            assert time.monotonic() < deadline, f"it showed\n{self.screen.text}"
            assert self._read(), f"the program ended; it showed\n{self.screen.text}"
        return self.screen.text

    def _read(self) -> bool:
        if not select.select([self._ours], [], [], 1)[0]:
            return True
        try:
            data = os.read(self._ours, 65536)
        except OSError:  # the other side is closed
            return False
        answer = self.screen.feed(data.decode(errors="replace"))
        if answer:
            os.write(self._ours, answer.encode())
        return bool(data)

    def end(self) -> int:
        """Read until the program ends; its exit status."""
        while self._read():
            pass
        return self.process.wait(200)

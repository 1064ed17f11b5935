"""The pages of the documentation: their commands, their code, and what they name."""

import ast
import functools
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"(?ms)^(```+)(\w*)[^\n]*\n(.*?)^\1[ \t]*$")
ASSIGNMENT = re.compile(r"([A-Z][A-Z0-9_]*)=")


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    line: int  # of its first line
    language: str
    text: str

    @property
    def where(self) -> str:
        """Where it is, for messages."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


class Command(NamedTuple):
    """A command without redirections: the environment that it sets, and its words."""

    where: str
    environment: dict[str, str]
    words: list[str]


@functools.cache
def read(path):
    return path.read_text(encoding="utf-8")


def blocks(*languages):
    """The fenced blocks in these languages, of all pages."""
    return [
        Block(page, read(page)[: match.start(3)].count("\n") + 1, match[2], match[3])
        for page in PAGES
        for match in FENCE.finditer(read(page))
        if match[2] in languages
    ]


def prose(page):
    """The text of a page without its fenced blocks."""
    return FENCE.sub("", read(page))


def commands():
    """The commands of all bash blocks."""
    listed = []
    for block in blocks("bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, ";"]:
                if word and set(word) <= set(";&|"):
                    if words:
                        listed.append(_command(block.where, words))
                    words = []
                else:
                    words.append(word)
    return listed


def _command(where, words):
    rest = list(words)
    environment = {}
    while rest and ASSIGNMENT.match(rest[0]):
        name, _, value = rest.pop(0).partition("=")
        environment[name] = value
    return Command(where, environment, rest)


@functools.cache
def strings():
    """The texts in the sources; "..." stands for what a format string inserts."""
    texts = []
    for path in [*(ROOT / "MaxNano").rglob("*.py"), ROOT / "end_to_end/results.py"]:
        tree = ast.parse(read(path))
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = (
                    value.value if isinstance(value, ast.Constant) else "..."
                    for value in node.values
                )
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def build_site(folder):
    """Builds the documentation into a folder; skips the test without the extra docs."""
    if not all(map(importlib.util.find_spec, ("mkdocs", "material"))):
        pytest.skip("the extra docs is not installed (EXTRAS=docs bash setup.sh)")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr

"""The grammar of configs/base.yml and of values: text -> typed values, and back.

Nothing else reads that grammar, which the head of base.yml explains. A YAML scalar is kept as text
until its key decides the type, so that `1e-4` is a number and `no` can be a word.
"""

import difflib
import functools
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

PACKAGE = Path(__file__).resolve().parent
# A checkout has the configs beside the package; setup.py copies them into the package of a wheel.
IS_INSTALLED = (PACKAGE / "configs").is_dir()
BASE = (PACKAGE if IS_INSTALLED else PACKAGE.parent) / "configs" / "base.yml"
COMMAND_LINE = "command line"
INT_LIMIT = 2**63  # integers are below this

# The programs, what each does, and the words that a banner or a key of base.yml names them by. Each
# is MaxNano/<program>.py, and `maxnano <program>` runs it.
PROGRAMS = {
    "train": "train a model, fine-tune it, or resume a run",
    "train_tokenizer": "train a tokenizer on the text",
    "evaluate": "evaluate a run: bits per byte, CORE, chat tasks, samples",
    "chat": "chat with a run in the terminal",
    "serve": "serve runs with the OpenAI API and a chat page",
    "convert": "import and export: nanochat, Hugging Face",
    "report": "write the report of a run",
    "compare": "train several configs, or read runs, and compare them",
    "train_compile": "compile for devices that this machine does not have",
    "tune": "find the fastest settings on these devices",
    "download": "download data sets, CORE and the chat tasks",
}


def module_of(program: str) -> str:
    """The module of one of PROGRAMS."""
    return "MaxNano.data.download" if program == "download" else f"MaxNano.{program}"


_NULL_WORDS = {"", "~", "null", "Null", "NULL", "None"}
_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_DIGITS = r"\d+(?:_\d+)*"
_NUMBER = r"-?\d+(?:\.\d+)?"
_SPEC = re.compile(
    r"(?P<star>\* )?(?:\[(?P<programs>[^\]]*)\] )?"
    r"(?P<lists>(?:list of )*)(?P<type>bool|int|float|str|path)(?P<nullable>\?)?"
    rf"(?: (?:one of (?P<choices>\S.*)|(?P<bound>>=?) (?P<least>{_NUMBER})"
    rf"|(?P<low>{_NUMBER})\.\.(?P<high>{_NUMBER})))?"
)
_BANNER = re.compile(r"# -{2,} (?P<title>.*?)(?: \[(?P<programs>[^\]]*)\])? -*")


class ConfigError(ValueError):
    """A config that cannot be used; the message is one line for the user."""


class Key(NamedTuple):
    """The declaration of a key in base.yml."""

    name: str
    section: str
    programs: tuple[str, ...]  # that read the key
    common_in: tuple[str, ...]  # the programs whose --help shows the key
    help: str
    kind: str  # bool, int, float, str or path
    depth: int  # 0 a value, 1 a list, 2 a list of lists
    nullable: bool
    low: float | None
    low_is_open: bool
    high: float | None
    choices: tuple[str, ...]
    default: yaml.Node

    @property
    def type_text(self) -> str:
        """The type as base.yml writes it."""
        return "list of " * self.depth + self.kind + "?" * self.nullable

    @property
    def range_text(self) -> str:
        """The range as base.yml writes it, empty if there is none."""
        if self.choices:
            return "one of " + " ".join(self.choices)
        if self.high is not None:
            return f"{self.low:g}..{self.high:g}"
        if self.low is not None:
            return f"{'>' if self.low_is_open else '>='} {self.low:g}"
        return ""


def shorten(value: Any) -> str:
    """A value for an error message: one line of at most 60 characters."""
    text = value if isinstance(value, str) and value.isprintable() and value else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def suggest(word: str, words: Sequence[str]) -> str:
    """'; did you mean a or b?' with the words most similar to `word`, or ''."""
    matches = difflib.get_close_matches(word.lower(), words, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""


# What nanochat's flags are called here, where no similar key says so.
OTHER_NAMES = {
    "depth": "num_decoder_layers",
    "lr": "learning_rate_scale",
    "max_seq_len": "max_target_length",
    "device_batch_size": "per_device_batch_size",
    "total_batch_size": "global_batch_tokens",
    "num_iterations": "steps",
    "eval_every": "eval_interval",
    "sample_every": "sample_interval",
    "save_every": "checkpoint_interval_steps",
    "core_metric_every": "core_interval",
    "model_tag": "run_name",
    "fp8": "quantization",
}


def _other_name(name: str, keys: Mapping[str, Key]) -> str:
    """'; write KEY=VALUE' for a name of OTHER_NAMES, with dashes or without, or ''."""
    key = OTHER_NAMES.get(name.lstrip("-").replace("-", "_"))
    return f"; write {key}=VALUE" if key in keys else ""


def find_key(name: str, keys: Mapping[str, Key], source: str) -> Key:
    """The key of a name. Raises ConfigError with the nearest names if there is none."""
    if name not in keys:
        hint = _other_name(name, keys) or suggest(name, list(keys)) or "; --help=all lists all keys"
        raise ConfigError(f"{source}: unknown key {shorten(name)}{hint}")
    return keys[name]


# ---- YAML ---------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """The text of a config file. Raises ConfigError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        hint = "; run this in MaxNano's folder" if str(path).startswith("configs/") else ""
        raise ConfigError(f"config file {shorten(str(path))} does not exist{hint}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read config file {shorten(str(path))}: {error}") from None


def _compose(text: str, source: str) -> yaml.Node | None:
    """YAML text as nodes, in which scalars are still text."""
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark and not source.startswith(COMMAND_LINE) else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "unreadable"
        is_cut = source.startswith(COMMAND_LINE) and text.count("[") != text.count("]")
        hint = "; a bracket is missing: the shell needs quotes around a list" if is_cut else ""
        raise ConfigError(f"{source}{line}: not YAML: {problem}{hint}") from None
    except RecursionError:
        raise ConfigError(f"{source}: not YAML: nested too deeply") from None


def _entries(text: str, source: str) -> dict[str, tuple[yaml.Node, yaml.Node]]:
    """The key and value nodes of a YAML mapping, by key. Raises ConfigError for a repeated key."""
    root = _compose(text, source)
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{source}: must consist of lines `key: value`")
    entries: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    for key, value in root.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{source} line {line}: a key must be a word")
        if key.value in entries:
            first = entries[key.value][0].start_mark.line + 1
            raise ConfigError(
                f"{source} line {line}: {shorten(key.value)} is already set in line {first}"
            )
        entries[key.value] = (key, value)
    return entries


# ---- Declarations in base.yml -------------------------------------------------------------------


@functools.cache
def base_keys() -> dict[str, Key]:
    """The keys of configs/base.yml."""
    return read_keys(BASE)


def read_keys(path: Path) -> dict[str, Key] | None:
    """The keys that a base file declares, or None if the file has values but no declarations.

    Raises ConfigError with the line number of a comment that does not follow the grammar.
    """
    text = read_text(path)
    entries = _entries(text, str(path))
    comments = _comments(text, entries)
    if not any(_SPEC.match(comment) and " | " in comment for comment in comments.values()):
        return None
    banners = [(row, _BANNER.fullmatch(line)) for row, line in enumerate(text.splitlines())]
    banners = [(row, banner) for row, banner in banners if banner]
    keys = {}
    for name, (key, value) in entries.items():
        row = key.start_mark.line
        banner = next((banner for line, banner in reversed(banners) if line < row), None)
        try:
            keys[name] = _parse_key(name, comments[name], value, banner)
        except ValueError as error:
            raise ConfigError(f"{path} line {row + 1}: the comment of {name} {error}") from None
    return keys


def _comments(text: str, entries: Mapping[str, tuple[yaml.Node, yaml.Node]]) -> dict[str, str]:
    """The comment of each key, with the comment lines, indented by 4 or more, that continue it; ''
    if none.
    """
    lines = text.splitlines()
    comments = {}
    for name, (key, value) in entries.items():
        # A value on the line of its key ends before the comment; a block list starts below it.
        same_line = value.end_mark.line == key.start_mark.line
        column = value.end_mark.column if same_line else key.end_mark.column + 1
        row = key.start_mark.line
        parts = [lines[row][column:].strip()]
        while row + 1 < len(lines) and re.match(r"\s{4,}#", lines[row + 1]):
            row += 1
            parts.append(lines[row].strip())
        comments[name] = " ".join(part.lstrip("#").strip() for part in parts).strip()
    return comments


def _parse_key(name: str, comment: str, default: yaml.Node, banner: re.Match | None) -> Key:
    """A Key from its comment. Raises ValueError if the comment does not follow the grammar."""
    spec, bar, help_text = comment.partition(" | ")
    match = _SPEC.fullmatch(spec.strip())
    if not bar or not match:
        raise ValueError("must read `type range | help`")
    kind, choices = match["type"], tuple((match["choices"] or "").split())
    low = match["least"] or match["low"]
    if low and kind not in ("int", "float"):
        raise ValueError(f"gives a range, but a {kind} has none")
    if choices and kind != "str":
        raise ValueError(f"gives choices, but a {kind} has none")
    programs, starred = _parse_programs(match["programs"], banner)
    return Key(
        name=name,
        section=banner["title"] if banner else "",
        programs=programs,
        common_in=programs if match["star"] else starred,
        help=help_text.strip(),
        kind=kind,
        depth=match["lists"].count("list"),
        nullable=bool(match["nullable"]),
        low=float(low) if low else None,
        low_is_open=match["bound"] == ">",
        high=float(match["high"]) if match["high"] else None,
        choices=choices,
        default=default,
    )


def _parse_programs(
    bracket: str | None, banner: re.Match | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(programs that read a key, those of them with a star), from its bracket and its banner."""
    words = (bracket or "").split()
    programs = [word.strip("+*") for word in words]
    if not words or any(word.startswith("+") for word in words):
        section = banner and banner["programs"]
        programs = [*(section.split() if section else PROGRAMS), *programs]
    unknown = set(programs) - set(PROGRAMS)
    if unknown:
        raise ValueError(f"names {min(unknown)}, which is not one of {' '.join(PROGRAMS)}")
    starred = tuple(word.strip("+*") for word in words if word.endswith("*"))
    return tuple(dict.fromkeys(programs)), starred


# ---- Values -------------------------------------------------------------------------------------


class _InvalidValue(Exception):
    """A value does not fit its key; the message continues `key=value`."""


def read_values(
    path: Path, keys: Mapping[str, Key], *, ignore_unknown: bool = False
) -> dict[str, Any]:
    """The values of a YAML file without declarations. Raises ConfigError."""
    source = shorten(path.name)
    return {
        name: _convert(node, find_key(name, keys, source), source)
        for name, (_, node) in _entries(read_text(path), source).items()
        if name in keys or not ignore_unknown
    }


def read_words(words: Sequence[str], keys: Mapping[str, Key]) -> dict[str, Any]:
    """The values of key=value words; of two words for a key the last one wins. Raises ConfigError."""
    values = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or name.startswith("-"):
            bare = name.lstrip("-")
            hint = f"; write {bare}=VALUE" if bare in keys else _other_name(bare, keys)
            raise ConfigError(f"{COMMAND_LINE}: {shorten(word)} is not of the form key=value{hint}")
        key = find_key(name, keys, COMMAND_LINE)
        values[name] = _convert(_word_node(text, key), key, COMMAND_LINE)
    return values


def default_values(keys: Mapping[str, Key], source: str) -> dict[str, Any]:
    """The value of each key in its base file. Raises ConfigError."""
    return {name: _convert(key.default, key, source) for name, key in keys.items()}


def _word_node(text: str, key: Key) -> yaml.Node:
    """The text after key= as a node: a list or quoted text as YAML, anything else unchanged."""
    if key.depth or (len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"):
        node = _compose(text, f"{COMMAND_LINE}: {key.name}={shorten(text)}")
        if node is not None:
            return node
    # No text after key= is an empty string, not null: `steps=$UNSET` must fail.
    return yaml.ScalarNode("", text, style=None if text else '"')


def _convert(node: yaml.Node, key: Key, source: str) -> Any:
    try:
        return _parse_value(node, key, key.depth)
    except _InvalidValue as error:
        raise ConfigError(f"{source}: {key.name}={shorten(_text_of(node))} {error}") from None


def _parse_value(node: yaml.Node, key: Key, depth: int) -> Any:
    """The value of a node in the type of its key, lists as tuples."""
    is_null = isinstance(node, yaml.ScalarNode) and node.style is None and node.value in _NULL_WORDS
    if is_null and depth == key.depth and key.nullable:
        return None
    if depth == 0:
        return _parse_scalar(node, key)
    if not isinstance(node, yaml.SequenceNode):
        form = "[" * key.depth + "a, b" + "]" * key.depth
        raise _InvalidValue(f"is not a {'list of ' * key.depth}{key.kind}: write it as {form}")
    return tuple(_parse_value(item, key, depth - 1) for item in node.value)


def _parse_scalar(node: yaml.Node, key: Key) -> Any:
    expected = f"is not {'an' if key.kind == 'int' else 'a'} {key.kind}"
    if not isinstance(node, yaml.ScalarNode):
        raise _InvalidValue(expected)
    text, is_plain = node.value, node.style is None
    if is_plain and text in _NULL_WORDS:
        raise _InvalidValue("is null, which this key does not allow")
    if key.kind in ("str", "path"):
        value: Any = text
    elif not is_plain:
        raise _InvalidValue(f"{expected}: it is {'in quotes' if text else 'empty'}")
    elif key.kind == "bool":
        if text.lower() not in _BOOLS:
            raise _InvalidValue(f"{expected}: write true or false")
        value = _BOOLS[text.lower()]
    else:
        try:
            value = _parse_number(text, key.kind)
        except _InvalidValue as error:
            raise _InvalidValue(str(error) or expected) from None
    _check_range(value, key)
    return value


def _check_range(value: Any, key: Key) -> None:
    if key.choices and value not in key.choices:
        raise _InvalidValue(f"is not {key.range_text}{suggest(value, key.choices)}")
    if key.low is not None and (value < key.low or (value == key.low and key.low_is_open)):
        raise _InvalidValue(f"is out of range: {key.range_text}")
    if key.high is not None and value > key.high:
        raise _InvalidValue(f"is out of range: {key.range_text}")


def _parse_number(text: str, kind: str) -> int | float:
    """The number that `text` is; an int may be written as 1e9 or 5.0 if it is whole."""
    if re.fullmatch(rf"[+-]?{_DIGITS}", text, re.ASCII) and len(text) < 40:
        number: int | float = int(text.replace("_", ""))
    elif re.fullmatch(rf"[+-]?({_DIGITS}\.?\d*|\.\d+)([eE][+-]?\d+)?", text, re.ASCII):
        number = float(text.replace("_", ""))
        if not math.isfinite(number):
            raise _InvalidValue("is too large")
    else:
        raise _InvalidValue("")
    if kind == "float":
        return float(number)
    if number != int(number):
        raise _InvalidValue("is not a whole number")
    if abs(number) >= INT_LIMIT:
        raise _InvalidValue("is too large")
    return int(number)


def _text_of(node: yaml.Node) -> str:
    """A node as text for an error message."""
    if isinstance(node, yaml.ScalarNode):
        return node.value if node.value else "''"
    if isinstance(node, yaml.SequenceNode):
        return "[" + ", ".join(_text_of(item) for item in node.value[:8]) + "]"
    return "{...}"


def format_value(value: Any) -> str:
    """A value as YAML, which this module and other YAML readers read back as the same value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(format_value(item) for item in value) + "]"
    if isinstance(value, float):
        return yaml.safe_dump(value).split("\n")[0]
    if isinstance(value, str):
        is_word = re.fullmatch(r"[A-Za-z_/][\w./-]*", value, re.ASCII)
        if not is_word or value in _NULL_WORDS or value.lower() in _BOOLS:
            return yaml.safe_dump(value, default_style='"', width=math.inf).rstrip("\n")
    return str(value)


def help_text(program: str | None = None, *, show_all: bool = True) -> str:
    """The keys that a program reads, with type, range, default and help, by section of base.yml.

    program: one of PROGRAMS; any other name stands for all of them.
    show_all: all keys, or only the common ones.
    """
    keys = base_keys()
    defaults = default_values(keys, BASE.name)
    programs = {program} & set(PROGRAMS) or set(PROGRAMS)
    keys = {name: key for name, key in keys.items() if programs & set(key.programs)}
    shown = [key for key in keys.values() if show_all or programs & set(key.common_in)]
    lines = []
    section = None
    for key in shown:
        if key.section != section:
            section = key.section
            lines += ["", section]
        facts = " ".join(filter(None, (key.type_text, key.range_text)))
        first = f"{key.name}={format_value(defaults[key.name])}  ({facts})"
        for text, indent in ((first, "  "), (key.help, "      ")):
            lines += textwrap.wrap(
                text,
                100,
                initial_indent=indent,
                subsequent_indent="      ",
                break_on_hyphens=False,
            )
    if not show_all:
        lines += ["", f"These are {len(shown)} of {len(keys)} keys; --help=all shows all."]
    return "\n".join(lines) + "\n"

"""One frozen config from YAML files and the command line, with the origin of every value.

    config = pyconfig.initialize(["configs/base.yml", "model=d24", "steps=100"])

configs/base.yml names every key once; the comment behind a key gives its type, range and help in
the grammar that the head of that file explains. This module is the only reader of that grammar. It
imports no JAX, so that a mistyped key is reported before any device starts.
"""

import difflib
import math
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from etils import epath
from ml_collections import FrozenConfigDict

from MaxNano import console, scaling
from MaxNano.storage import files

BASE = Path(__file__).resolve().parents[1] / "configs" / "base.yml"
ORIGIN = "origin"  # the one entry of a config that is not a key: key -> where its value came from
COMMAND_LINE = "command line"
DERIVED = "derived"

XLA_BACKENDS = ("tpu", "gpu", "cpu")  # for which xla_flag_groups can be

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
_NULL_WORDS = {"", "~", "null", "Null", "NULL", "None"}
_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_INT_LIMIT = 2**63
_DIGITS = r"\d+(?:_\d+)*"
_NUMBER = r"-?\d+(?:\.\d+)?"
_SPEC = re.compile(
    r"(?P<lists>(?:list of )*)(?P<type>bool|int|float|str|path)(?P<nullable>\?)?"
    rf"(?: (?:one of (?P<choices>\S.*)|(?P<bound>>=?) (?P<least>{_NUMBER})"
    rf"|(?P<low>{_NUMBER})\.\.(?P<high>{_NUMBER})))?"
)


class ConfigError(ValueError):
    """A config that cannot be used; the message is one line for the user."""


class Key(NamedTuple):
    """What base.yml says about a key."""

    name: str
    section: str
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
        """The type in words, as base.yml writes it."""
        return "list of " * self.depth + self.kind + "?" * self.nullable

    @property
    def range_text(self) -> str:
        """The range in words, empty where there is none."""
        if self.choices:
            return "one of " + " ".join(self.choices)
        if self.high is not None:
            return f"{self.low:g}..{self.high:g}"
        if self.low is not None:
            return f"{'>' if self.low_is_open else '>='} {self.low:g}"
        return ""


# ---- Reading YAML ------------------------------------------------------------------------------


def _short(value: Any) -> str:
    """A value as the user may recognize it in a message: one line, not too long."""
    text = value if isinstance(value, str) and value.isprintable() and value else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _nearest(word: str, words: Sequence[str]) -> str:
    matches = difflib.get_close_matches(word.lower(), words, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""


def _compose(text: str, source: str) -> yaml.Node | None:
    """YAML text as nodes: which keep a scalar's own text, so that its key decides what it means."""
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}" if mark and not source.startswith(COMMAND_LINE) else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "unreadable"
        raise ConfigError(f"{source}{place}: not YAML: {problem}") from None
    except RecursionError:
        raise ConfigError(f"{source}: not YAML: nested too deeply") from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"config file {_short(str(path))} does not exist") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"config file {_short(str(path))} cannot be read: {error}") from None


def _entries(text: str, source: str) -> dict[str, tuple[yaml.Node, yaml.Node]]:
    """The key and value nodes of a YAML mapping, by key; a key that comes twice is an error."""
    root = _compose(text, source)
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{source}: must hold lines `key: value`")
    entries: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    for key, value in root.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{source} line {line}: a key must be a word")
        if key.value in entries:
            first = entries[key.value][0].start_mark.line + 1
            raise ConfigError(
                f"{source} line {line}: {_short(key.value)} is already set in line {first}"
            )
        entries[key.value] = (key, value)
    return entries


# ---- Types from base.yml -----------------------------------------------------------------------


def _parse_spec(comment: str, name: str, section: str, default: yaml.Node) -> Key:
    """A Key from the comment behind it; ValueError where that does not follow the grammar."""
    spec, bar, help_text = comment.partition(" | ")
    match = _SPEC.fullmatch(spec.strip())
    if not bar or not match:
        raise ValueError("must read `type range | help`")
    kind, choices = match["type"], tuple((match["choices"] or "").split())
    low = match["least"] or match["low"]
    if low and kind not in ("int", "float"):
        raise ValueError(f"a {kind} has no range")
    if choices and kind != "str":
        raise ValueError(f"a {kind} has no choices")
    return Key(
        name=name,
        section=section,
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


def _comments(text: str, entries: Mapping[str, tuple[yaml.Node, yaml.Node]]) -> dict[str, str]:
    """The comment behind each key, with the comment lines that go on with it; '' where none is."""
    lines = text.splitlines()
    comments = {}
    for name, (key, value) in entries.items():
        # A value on the key's own line ends before the comment; a block list starts below it.
        same_line = value.end_mark.line == key.start_mark.line
        column = value.end_mark.column if same_line else key.end_mark.column + 1
        row = key.start_mark.line
        parts = [lines[row][column:].strip()]
        while row + 1 < len(lines) and re.match(r"\s+#", lines[row + 1]):
            row += 1
            parts.append(lines[row].strip())
        comments[name] = " ".join(part.lstrip("#").strip() for part in parts).strip()
    return comments


def _sections(text: str) -> list[tuple[int, str]]:
    """(line, title) of the banners `# ---- title ---`, in order."""
    banners = (re.fullmatch(r"# -{2,} (.*?) -*", line) for line in text.splitlines())
    return [(row, banner[1]) for row, banner in enumerate(banners) if banner]


def _read_keys(path: Path) -> dict[str, Key] | None:
    """The keys that a base file declares; None where no comment declares a type.

    Then the file only holds values. ConfigError names the line whose comment does not parse.
    """
    text = _read_text(path)
    entries = _entries(text, str(path))
    comments = _comments(text, entries)
    if not any(_SPEC.match(comment) and " | " in comment for comment in comments.values()):
        return None
    sections = _sections(text)
    keys = {}
    for name, (key, value) in entries.items():
        row = key.start_mark.line
        section = next((title for line, title in reversed(sections) if line < row), "")
        try:
            keys[name] = _parse_spec(comments[name], name, section, value)
        except ValueError as error:
            raise ConfigError(f"{path} line {row + 1}: the comment behind {name} {error}") from None
    return keys


# ---- Values ------------------------------------------------------------------------------------


class _Unfit(Exception):
    """A value does not fit its key; the message goes on from `key=value`."""


def _parse_number(text: str, kind: str) -> int | float:
    """A number, _Unfit where `text` is none. An int may be written 1e9 or 5.0 if it is whole."""
    if re.fullmatch(rf"[+-]?{_DIGITS}", text, re.ASCII) and len(text) < 40:
        number: int | float = int(text.replace("_", ""))
    elif re.fullmatch(rf"[+-]?({_DIGITS}\.?\d*|\.\d+)([eE][+-]?\d+)?", text, re.ASCII):
        number = float(text.replace("_", ""))
        if not math.isfinite(number):
            raise _Unfit("is too large")
    else:
        raise _Unfit("")
    if kind == "float":
        return float(number)
    if number != int(number):
        raise _Unfit("is not a whole number")
    if abs(number) >= _INT_LIMIT:
        raise _Unfit("is too large")
    return int(number)


def _parse_scalar(node: yaml.Node, key: Key) -> Any:
    """The value of a scalar node in the type of its key; _Unfit says what is wrong."""
    expected = f"is not {'an' if key.kind == 'int' else 'a'} {key.kind}"
    if not isinstance(node, yaml.ScalarNode):
        raise _Unfit(expected)
    text, is_plain = node.value, node.style is None
    if is_plain and text in _NULL_WORDS:
        raise _Unfit("is null, which this key does not take")
    if key.kind in ("str", "path"):
        value: Any = text
    elif not is_plain:
        raise _Unfit(f"{expected}: it is {'in quotes' if text else 'empty'}")
    elif key.kind == "bool":
        if text.lower() not in _BOOLS:
            raise _Unfit(f"{expected}: write true or false")
        value = _BOOLS[text.lower()]
    else:
        try:
            value = _parse_number(text, key.kind)
        except _Unfit as error:
            raise _Unfit(str(error) or expected) from None
    if key.choices and value not in key.choices:
        raise _Unfit(f"is not {key.range_text}{_nearest(value, key.choices)}")
    if key.low is not None and (value < key.low or (value == key.low and key.low_is_open)):
        raise _Unfit(f"is out of range: {key.range_text}")
    if key.high is not None and value > key.high:
        raise _Unfit(f"is out of range: {key.range_text}")
    return value


def _parse_value(node: yaml.Node, key: Key, depth: int | None = None) -> Any:
    """The value of a node in the type of its key, lists as tuples; _Unfit says what is wrong."""
    depth = key.depth if depth is None else depth
    is_null = isinstance(node, yaml.ScalarNode) and node.style is None and node.value in _NULL_WORDS
    if is_null and depth == key.depth and key.nullable:
        return None
    if depth == 0:
        return _parse_scalar(node, key)
    if not isinstance(node, yaml.SequenceNode):
        raise _Unfit(f"is not a {'list of ' * depth}{key.kind}: write it as [a, b]")
    return tuple(_parse_value(item, key, depth - 1) for item in node.value)


def _text_of(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return node.value if node.value else "''"
    if isinstance(node, yaml.SequenceNode):
        return "[" + ", ".join(_text_of(item) for item in node.value[:8]) + "]"
    return "{...}"


def _convert(node: yaml.Node, key: Key, source: str) -> Any:
    try:
        return _parse_value(node, key)
    except _Unfit as error:
        raise ConfigError(f"{source}: {key.name}={_short(_text_of(node))} {error}") from None


def _command_line_node(text: str, key: Key) -> yaml.Node:
    """The text behind key= as a node: a list as YAML, a scalar as it stands or unquoted."""
    if key.depth or (len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"):
        node = _compose(text, f"{COMMAND_LINE}: {key.name}={_short(text)}")
        if node is not None:
            return node
    # Nothing behind key= is an empty string, never null: `steps=$UNSET` is to fail.
    return yaml.ScalarNode("", text, style=None if text else '"')


# ---- Layers: base < model < stage < command line -----------------------------------------------


class _Values:
    """The values gathered so far, each with where it came from."""

    def __init__(self, keys: Mapping[str, Key]):
        self.keys = keys
        self.value: dict[str, Any] = {}
        self.origin: dict[str, str] = {}

    def set(self, name: str, value: Any, origin: str) -> None:
        self.value[name] = value
        self.origin[name] = origin

    def update(self, values: Mapping[str, Any], origin: str) -> None:
        for name, value in values.items():
            self.set(name, value, origin)

    def error(self, name: str, problem: str) -> ConfigError:
        """The error that a value has, with its origin."""
        value = _format(self.value[name])
        return ConfigError(f"{self.origin[name]}: {name}={_short(value)} {problem}")


def _find(name: str, keys: Mapping[str, Key], source: str) -> Key:
    if name not in keys:
        hint = _nearest(name, list(keys)) or "; --help lists all"
        raise ConfigError(f"{source}: unknown key {_short(name)}{hint}")
    return keys[name]


def _file_values(path: Path, keys: Mapping[str, Key]) -> dict[str, Any]:
    """The values of a YAML file without types."""
    source = _short(path.name)
    entries = _entries(_read_text(path), source)
    return {
        name: _convert(node, _find(name, keys, source), source)
        for name, (_, node) in entries.items()
    }


def _command_line_values(words: Sequence[str], keys: Mapping[str, Key]) -> dict[str, Any]:
    """The values of key=value words; the last one for a key wins, as scripts that append expect."""
    given = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or name.startswith("-"):
            bare = name.lstrip("-")
            hint = f"; write {bare}=VALUE" if bare in keys else ""
            raise ConfigError(f"{COMMAND_LINE}: {_short(word)} is not of the form key=value{hint}")
        key = _find(name, keys, COMMAND_LINE)
        given[name] = _convert(_command_line_node(text, key), key, COMMAND_LINE)
    return given


def _depth_in_name(model: str) -> int | None:
    """The N of a model named dN."""
    match = re.fullmatch(r"d([1-9]\d{0,8})", model, re.ASCII)
    return int(match[1]) if match else None


def _override_file(folder: Path, what: str, values: _Values) -> Path | None:
    """configs/models/<model>.yml or configs/stages/<stage>.yml; None where none is needed."""
    name = values.value[what]
    if name is None:
        return None
    if not _NAME.fullmatch(name):
        raise values.error(what, "must be of [A-Za-z0-9._-], at most 64, no dot first")
    path = folder / f"{what}s" / f"{name}.yml"
    if path.is_file():
        return path
    if what == "model" and _depth_in_name(name) is not None:
        return None
    known = sorted(file.stem for file in path.parent.glob("*.yml"))
    hint = _nearest(name, known) or f"; there are: {', '.join(known) or 'none'}"
    other = " (a name dN needs no file)" if what == "model" else ""
    raise values.error(what, f"has no file configs/{what}s/{name}.yml{hint}{other}")


def _gather(argv: Sequence[str]) -> _Values:
    """All values that files and command line give, in order of precedence.

    A first file without types lies above the model and stage that it names. A saved config is such
    a file with every key, so that nothing below it is read; a stage on the command line is newer.
    """
    if not argv or "=" in argv[0] or argv[0].startswith("-"):
        raise ConfigError(
            "the first argument must be a config file: configs/base.yml key=value ..."
        )
    first = (epath.Path if files.is_remote(argv[0]) else Path)(argv[0])
    keys = _read_keys(first)
    is_base = keys is not None
    base = first if is_base else BASE
    keys = keys if is_base else _read_keys(BASE)
    missing = _read_keys(BASE).keys() - keys.keys() if is_base and base.resolve() != BASE else ()
    if missing:
        raise ConfigError(f"{first} lacks the key {min(missing)} of configs/base.yml")
    folder = base.parent if (base.parent / "models").is_dir() else BASE.parent
    values = _Values(keys)
    values.update(
        {name: _convert(key.default, key, base.name) for name, key in keys.items()}, "base"
    )
    fixed = {} if is_base else _file_values(first, keys)
    given = _command_line_values(argv[1:], keys)
    if given.get("model", fixed.get("model")) != fixed.get("model", given.get("model")):
        raise ConfigError(
            f"{COMMAND_LINE}: model={given['model']}, but {_short(first.name)} holds model="
            f"{fixed['model']}; start from configs/base.yml"
        )

    def choose(what: str) -> None:
        for source, origin in ((fixed, _short(first.name)), (given, COMMAND_LINE)):
            if what in source:
                values.set(what, source[what], origin)
        path = _override_file(folder, what, values)
        if path is None:
            return
        overrides = _file_values(path, keys)
        for name in ("model", "stage"):
            if name in overrides:
                raise ConfigError(f"{path.name}: {name} is chosen on the command line, not here")
        values.update(overrides, path.name)

    has_new_stage = not is_base and given.get("stage", fixed.get("stage")) != fixed.get("stage")
    if fixed.keys() != keys.keys():
        choose("model")
        if not has_new_stage:
            choose("stage")
    values.update(fixed, _short(first.name))
    if has_new_stage:
        choose("stage")
    values.update(given, COMMAND_LINE)
    return values


# ---- Derived values ----------------------------------------------------------------------------


def _derive(values: _Values) -> None:
    """Fill the keys that follow from others and are null."""
    value = values.value

    def fill(name: str, make: Callable[[], Any]) -> None:
        if values.value[name] is None:
            values.set(name, make(), DERIVED)

    # A later stage has a folder of its own beside the run that it starts from.
    fill("run_name", lambda: "_".join(filter(None, (value["model"], value["stage"]))))
    if values.value["num_decoder_layers"] is None:
        depth = _depth_in_name(value["model"])
        if depth is None:
            raise values.error("model", "sets no num_decoder_layers: give one")
        key = values.keys["num_decoder_layers"]
        if not key.low <= depth <= key.high:
            raise values.error("model", f"has a depth out of range: {key.range_text}")
        values.set("num_decoder_layers", depth, DERIVED)
    depth, head_dim, aspect_ratio = (
        value[name] for name in ("num_decoder_layers", "head_dim", "aspect_ratio")
    )
    fill("emb_dim", lambda: scaling.width(depth, aspect_ratio, head_dim))
    fill("mlp_dim", lambda: 4 * value["emb_dim"])
    fill("num_query_heads", lambda: value["emb_dim"] // head_dim)
    fill("num_kv_heads", lambda: value["num_query_heads"])
    _check_shape(values)

    shape = scaling.shape_of(value)
    ratio = value["target_param_data_ratio"]
    size = scaling.parameter_counts(shape).scaling
    if not scaling.horizon_tokens(ratio, size):
        raise values.error("target_param_data_ratio", "gives not one token to train on")
    reference = scaling.parameter_counts(scaling.reference_shape(shape, aspect_ratio)).scaling
    if value["dataset_type"] == "rollouts":
        _set_rollout_batch(values)
    fill("global_batch_tokens", lambda: scaling.batch_tokens(size, reference, ratio))
    batch = value["global_batch_tokens"]
    fill("learning_rate_scale", lambda: scaling.learning_rate_scale(batch))
    fill("weight_decay_scale", lambda: scaling.weight_decay_scale(batch, size, reference, ratio))
    fill("steps", lambda: _steps(values, shape, size))


def _set_rollout_batch(values: _Values) -> None:
    """A batch is as large as the answers of a step."""
    value = values.value
    tokens = value["rl_problems"] * value["rl_samples"] * row_length(value)
    if (
        values.origin["global_batch_tokens"] == COMMAND_LINE
        and value["global_batch_tokens"] != tokens
    ):
        raise values.error(
            "global_batch_tokens", "is not rl_problems x rl_samples x rl_row_tokens; leave it null"
        )
    values.set("global_batch_tokens", tokens, DERIVED)


def _steps(values: _Values, shape: scaling.Shape, scaling_parameters: int) -> int:
    value = values.value
    batch, flops = value["global_batch_tokens"], value["target_flops"]
    if flops is None:
        why = "target_param_data_ratio"
        steps = scaling.steps_for_ratio(value[why], scaling_parameters, batch)
    else:
        why = "target_flops"
        steps = scaling.steps_for_flops(
            flops, scaling.flops_per_token(shape, windows_of(value)), batch
        )
    if steps == 0:
        raise values.error(why, f"is less than one step of {batch} tokens; raise it or set steps")
    if steps >= _INT_LIMIT:
        raise OverflowError
    return steps


def windows_of(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Attention window of each layer of a config."""
    return scaling.window_sizes(
        config["num_decoder_layers"],
        config["window_pattern"],
        config["max_target_length"],
        config["short_window_fraction"],
        config["short_window_multiple"],
    )


def horizon_is_open(config: Mapping[str, Any]) -> bool:
    """Whether only the data can tell `steps`: in a later stage, where nothing else says them."""
    is_said = config[ORIGIN]["steps"] != DERIVED or config["target_flops"] is not None
    return config["dataset_type"] in ("chat", "rollouts") and not is_said


def row_length(config: Mapping[str, Any]) -> int:
    """Tokens of a row of a batch: the context, or what rollouts have in its place."""
    rows = config["rl_row_tokens"] if config["dataset_type"] == "rollouts" else None
    return rows or config["max_target_length"]


# ---- Contradictions ----------------------------------------------------------------------------


def _check_shape(values: _Values) -> None:
    value = values.value
    if value["head_dim"] % 2:
        raise values.error("head_dim", "is odd; rotary embeddings need an even one")
    heads_dim = value["num_query_heads"] * value["head_dim"]
    if value["emb_dim"] != heads_dim:
        guilty = "num_query_heads" if values.origin["emb_dim"] == DERIVED else "emb_dim"
        raise values.error(
            guilty,
            f"does not fit: num_query_heads x head_dim = {value['num_query_heads']} x "
            f"{value['head_dim']} = {heads_dim} must be emb_dim={value['emb_dim']}",
        )
    if value["num_query_heads"] % value["num_kv_heads"]:
        raise values.error(
            "num_kv_heads", f"is no divisor of num_query_heads={value['num_query_heads']}"
        )
    if not value["window_pattern"] or set(value["window_pattern"]) - set("SL"):
        raise values.error("window_pattern", "must be letters S and L, such as SSSL")
    for name in ("value_embed_gate_channels", "smear_gate_channels"):
        if value[name] > value["emb_dim"]:
            raise values.error(name, f"is more than emb_dim={value['emb_dim']}")


def _check_lists(values: _Values) -> None:
    value = values.value
    for name in values.keys:
        pair = name.endswith(("_betas", "_lambda_init")) and values.keys[name].depth == 1
        if (pair or name == "dataset_splits") and len(value[name]) != 2:
            raise values.error(name, "must have two elements")
        if name.endswith("_betas") and max(value[name]) >= 1:
            raise values.error(name, "must be below 1")


def _check_layout(values: _Values) -> None:
    axes = values.value["mesh_axes"]
    if len(set(axes)) != len(axes):
        raise values.error("mesh_axes", "names an axis twice")
    for axis in axes:
        for name in (f"ici_{axis}_parallelism", f"dcn_{axis}_parallelism"):
            if name not in values.keys:
                raise values.error("mesh_axes", f"has {_short(axis)}, but no key {name}")
    for name in values.keys:
        axis = re.fullmatch(r"(?:ici|dcn)_(\w+)_parallelism", name)
        if axis and axis[1] not in axes and (values.value[name] or 1) > 1:
            raise values.error(name, f"needs {axis[1]} in mesh_axes")
    _check_rules(values, axes)


def _check_rules(values: _Values, axes: Sequence[str]) -> None:
    key = "logical_axis_rules"
    seen = set()
    for rule in values.value[key]:
        name, *mesh_axes = rule or ("",)
        if not name or name in seen:
            problem = "has a rule without a name" if not name else f"has two rules for {name}"
            raise values.error(key, problem)
        seen.add(name)
        for axis in mesh_axes:
            if axis in axes:
                continue
            if values.origin[key] == "base":
                problem = f"lacks {axis}, by which {key} cut {name}; change both"
                raise values.error("mesh_axes", problem)
            problem = f"cuts {name} by {_short(axis)}, which is not in mesh_axes"
            raise values.error(key, problem + _nearest(axis, axes))
        if len(set(mesh_axes)) != len(mesh_axes):
            raise values.error(key, f"cuts {name} twice by one axis")


def _check_processes(values: _Values) -> None:
    value = values.value
    names = ("coordinator_address", "num_processes", "process_id")
    given = [name for name in names if value[name] is not None]
    missing = [name for name in names if value[name] is None]
    if not given:
        return
    if missing:
        problem = f"needs {' and '.join(missing)} beside it; or leave all three to the environment"
        raise values.error(given[0], problem)
    if value["process_id"] >= value["num_processes"]:
        last = value["num_processes"] - 1
        raise values.error("process_id", f"is none of the num_processes: they are 0 to {last}")


def _check_xla_flags(values: _Values) -> None:
    groups: dict[str, tuple[str, ...]] = {}
    for name, *flags in (group or ("",) for group in values.value["xla_flag_groups"]):
        backend, *flags = flags or ("",)
        if not name or name in groups:
            problem = f"has two groups {name}" if name else "has a group without a name"
            raise values.error("xla_flag_groups", problem)
        if backend not in XLA_BACKENDS or not flags:
            problem = f"has a group {name} that is not name, {' or '.join(XLA_BACKENDS)}, flags"
            raise values.error("xla_flag_groups", problem)
        for flag in flags:
            if not re.fullmatch(r"xla_\w+=\S+", flag, re.ASCII):
                problem = f"has {_short(flag)} in {name}, which is not xla_flag=value"
                raise values.error("xla_flag_groups", problem)
        groups[name] = (backend, *(flag.partition("=")[0] for flag in flags))
    set_by: dict[tuple[str, str], str] = {}
    for name in values.value["xla_flags"]:
        if name not in groups:
            problem = f"names {_short(name)}, which is not in xla_flag_groups"
            raise values.error("xla_flags", problem + _nearest(name, list(groups)))
        backend, *flags = groups[name]
        for flag in flags:
            if (backend, flag) in set_by:
                raise values.error(
                    "xla_flags", f"sets {flag} twice: in {set_by[backend, flag]} and {name}"
                )
            set_by[backend, flag] = name


def _check_rest(values: _Values) -> None:
    value = values.value
    if not _NAME.fullmatch(value["run_name"]):
        raise values.error("run_name", "must be of [A-Za-z0-9._-], at most 64, no dot first")
    batch, length = value["global_batch_tokens"], row_length(value)
    if (value["rl_row_tokens"] or 0) > value["max_target_length"]:
        raise values.error(
            "rl_row_tokens", f"is more than max_target_length={value['max_target_length']}"
        )
    if batch % length:
        nearest = max(1, round(batch / length)) * length
        raise values.error(
            "global_batch_tokens",
            f"is no multiple of max_target_length={length}; the nearest is {nearest}",
        )
    if value["dataset_type"] == "tfds" and not value["dataset_name"]:
        raise values.error("dataset_type", "needs dataset_name, such as wikipedia/20230601.en")
    if value["dataset_type"] == "hf" and not value["dataset_name"]:
        raise values.error(
            "dataset_type", "needs dataset_name=OWNER/NAME, such as karpathy/climbmix-400b-shuffle"
        )
    if value["dataset_type"] == "rollouts" and value["quantization"] != "none":
        raise values.error(
            "quantization", "does not go with rollouts: answers are drawn from the model without it"
        )
    directions = ("from_nanochat", "to_nanochat", "from_huggingface", "to_huggingface")
    first, *others = [name for name in directions if value[name]] or ("",)
    if others:
        raise values.error(others[0], f"and {first} exclude each other; give one")


# ---- The config --------------------------------------------------------------------------------


def initialize(argv: Sequence[str]) -> FrozenConfigDict:
    """The config of a run: argv is a config file followed by key=value words.

    The file is base.yml, or a saved config, whose values are then all fixed and only overridden by
    the command line (and by a stage that it names). Keys that follow from others are filled; those
    that follow from the backend stay null. `config.origin[key]` tells where a value came from. The
    result is hashable and can be pickled; lists are tuples.
    Raises ConfigError with one line for the user.
    """
    values = _gather(argv)
    try:
        _derive(values)
    except (OverflowError, ZeroDivisionError):
        raise ConfigError("these sizes, ratio or FLOPs give no finite batch and steps") from None
    _check_lists(values)
    _check_layout(values)
    _check_processes(values)
    _check_xla_flags(values)
    _check_rest(values)
    return FrozenConfigDict({**values.value, ORIGIN: values.origin})


def replace(config: FrozenConfigDict, origin: str, **values: Any) -> FrozenConfigDict:
    """The config with some values replaced, now from `origin`; nothing is checked or derived."""
    unknown = values.keys() - config.keys()
    if unknown:
        raise KeyError(f"no such keys: {sorted(unknown)}")
    new = {name: config[name] for name in config} | values
    new[ORIGIN] = {**config[ORIGIN].to_dict(), **dict.fromkeys(values, origin)}
    return FrozenConfigDict(new)


def keys_of(config: FrozenConfigDict) -> Iterator[str]:
    """The names of a config's keys, in alphabetical order."""
    return (name for name in config if name != ORIGIN)


def _in_order_of_base(config: FrozenConfigDict, keys: Mapping[str, Key]) -> list[str]:
    own = dict.fromkeys(keys_of(config))
    return [name for name in keys if name in own] + [name for name in own if name not in keys]


def describe(config: FrozenConfigDict) -> list[tuple[str, Any, str]]:
    """(key, value, origin) of every value that differs from base.yml, for the start-up table."""
    keys = _read_keys(BASE)
    defaults = {name: _parse_value(key.default, key) for name, key in keys.items()}
    return [
        (name, config[name], config[ORIGIN][name])
        for name in _in_order_of_base(config, keys)
        if config[ORIGIN][name] != "base"
        and not (name in defaults and defaults[name] == config[name])
    ]


# ---- Writing -----------------------------------------------------------------------------------


def _format(value: Any) -> str:
    """A value as YAML that this module and any other reader take for the same."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(_format(item) for item in value) + "]"
    if isinstance(value, float):
        return yaml.safe_dump(value).split("\n")[0]
    if isinstance(value, str):
        is_word = re.fullmatch(r"[A-Za-z_/][\w./-]*", value, re.ASCII)
        if not is_word or value in _NULL_WORDS or value.lower() in _BOOLS:
            return yaml.safe_dump(value, default_style='"', width=math.inf).rstrip("\n")
    return str(value)


def to_yaml(config: FrozenConfigDict) -> str:
    """The config as text, every key with its origin behind it; saved, a valid first argument."""
    names = _in_order_of_base(config, _read_keys(BASE))
    lines = [f"{name}: {_format(config[name])}  # {config[ORIGIN][name]}" for name in names]
    return "\n".join(
        ["# A resolved config: every key, and behind it where its value came from.", *lines, ""]
    )


def save(config: FrozenConfigDict, path: Path) -> None:
    """Write to_yaml(config) to a file, whole or not at all; `path` may be an epath.Path of remote storage."""
    files.write_whole(path, to_yaml(config))


def saved_values(path: Path) -> dict[str, Any]:
    """The values in a file that `save` wrote, as YAML has them. ConfigError where it holds no such thing."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        values = None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is damaged")
    return values


def help_text(base_path: str | os.PathLike[str] = BASE) -> str:
    """Every key with type, range, default and help, under the banners of base.yml."""
    lines = []
    section = None
    for key in (_read_keys(Path(base_path)) or {}).values():
        if key.section != section:
            section = key.section
            lines += ["", section]
        facts = " ".join(filter(None, (key.type_text, key.range_text)))
        first = f"{key.name}={_format(_parse_value(key.default, key))}  ({facts})"
        for text, indent in ((first, "  "), (key.help, "      ")):
            lines += textwrap.wrap(
                text,
                100,
                initial_indent=indent,
                subsequent_indent="      ",
                break_long_words=False,
                break_on_hyphens=False,
            )
    return "\n".join(lines) + "\n"


# ---- Entry points ------------------------------------------------------------------------------


def has_accelerator(dev: Path = Path("/dev")) -> bool:
    """Whether the system shows a TPU or a GPU below `dev`; dxg is Windows' GPU under WSL2, kfd AMD's."""
    names = ("accel*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd", "dxg")
    return any(any(dev.glob(name)) for name in names)


def check_command_line() -> None:
    """Answer --help and refuse a bad command line at once; to be called before slow modules are imported.

    On a machine without an accelerator JAX is told so: where libtpu is installed, to compile for a TPU, JAX would
    look for one and print pages about not finding it.
    """
    status = launch(lambda config: None)
    if status or {"-h", "--help"} & set(sys.argv):
        sys.exit(status)
    if not has_accelerator():
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def launch(
    main: Callable[[FrozenConfigDict], int | None], argv: Sequence[str] | None = None
) -> int:
    """Run an entry point: `sys.exit(pyconfig.launch(main))`; returns the exit status.

    -h and --help print the keys. A ValueError raised in this package is the user's to mend: one
    line on stderr and status 2. One raised in a library is a fault of ours: it keeps its traceback.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        if {"-h", "--help"} & set(argv):
            print(f"usage: python {sys.argv[0]} configs/base.yml [key=value ...]")
            print(help_text(), end="")
            return 0
        return main(initialize(argv)) or 0
    except ValueError as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        if Path(__file__).resolve().parent not in raised_in.parents:
            raise
        print(f"error: {console.one_line(error)}", file=sys.stderr)
        return 2

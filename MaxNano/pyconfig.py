"""One frozen config from YAML files and the command line, with the origin of every value.

    config = pyconfig.initialize(["configs/base.yml", "model=d24", "steps=100"])

configs/base.yml declares every key once. Order of precedence: base.yml < models/<model>.yml <
stages/<stage>.yml < command line. Keys that follow from others are then derived, and contradictions
are refused. This module does not import JAX, so that a mistyped key is reported at once.
"""

import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from etils import epath
from ml_collections import FrozenConfigDict

from MaxNano import config_schema, console, end_on_interrupt, raise_on_interrupt, scaling
from MaxNano.config_schema import BASE, COMMAND_LINE, ConfigError, Key, shorten, suggest
from MaxNano.stage_configs import stage_config
from MaxNano.storage import files

ORIGIN = "origin"  # the only entry of a config that is not a key: key -> origin of its value
DERIVED = "derived"
RUN_ORIGIN = "the run"  # of a value with which the run to resume was started
TUNED_ORIGIN = "tuned/"  # begins the origin of a value from a file that tune.py wrote
SAVED_HEADER = "# A resolved config"  # first words of a file that `save` wrote

# Values that the saved config of an earlier version implies beside scaling.ARCHITECTURE_KEYS: its
# runs resume with the documents that they began with.
IMPLIED_VALUES = {"long_documents": "crop"}

XLA_BACKENDS = ("tpu", "gpu", "cpu")  # for xla_flag_groups

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")


# ---- Layers: base < model < stage < command line ------------------------------------------------


class _Values:
    """The values so far, each with its origin."""

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
        """The ConfigError of a key's value, with its origin."""
        value = config_schema.format_value(self.value[name])
        return ConfigError(f"{self.origin[name]}: {name}={shorten(value)} {problem}")


def _gather(argv: Sequence[str]) -> _Values:
    """The values of all files and of the command line, in order of precedence.

    A first file without declarations overrides the model and stage that it names. A saved config is
    such a file with every key; only a stage on the command line overrides it.
    """
    if not argv or "=" in argv[0] or argv[0].startswith("-"):
        raise ConfigError(
            "the first argument must be a config file: configs/base.yml key=value ..."
        )
    first = (epath.Path if files.is_remote(argv[0]) else Path)(argv[0])
    is_ours = os.path.abspath(argv[0]) == str(BASE)
    declared = config_schema.base_keys() if is_ours else config_schema.read_keys(first)
    is_base, keys = declared is not None, declared or config_schema.base_keys()
    base = first if is_base else BASE
    missing = config_schema.base_keys().keys() - keys.keys()
    if missing:
        raise ConfigError(f"{first} does not have the key {min(missing)} of configs/base.yml")
    folder = base.parent if (base.parent / "models").is_dir() else BASE.parent
    fixed = {} if is_base else _read_first_file(first, keys)
    given = config_schema.read_words(argv[1:], keys)
    if given.get("model", fixed.get("model")) != fixed.get("model", given.get("model")):
        raise ConfigError(
            f"{COMMAND_LINE}: model={given['model']}, but {shorten(first.name)} has model="
            f"{fixed['model']}; start from configs/base.yml"
        )
    values = _Values(keys)
    values.update(config_schema.default_values(keys, base.name), "base")

    def apply_file(what: str) -> None:
        for source, origin in ((fixed, shorten(first.name)), (given, COMMAND_LINE)):
            if what in source:
                values.set(what, source[what], origin)
        path = _override_file(folder, what, values)
        if path is None:
            return
        overrides = config_schema.read_values(path, keys)
        for name in ("model", "stage"):
            if name in overrides:
                raise ConfigError(f"{path.name}: {name} is set on the command line, not here")
        values.update(overrides, path.name)

    has_new_stage = not is_base and given.get("stage", fixed.get("stage")) != fixed.get("stage")
    if fixed.keys() != keys.keys():
        apply_file("model")
        if not has_new_stage:
            apply_file("stage")
    values.update(fixed, shorten(first.name))
    if has_new_stage:
        apply_file("stage")
    values.update(given, COMMAND_LINE)
    return values


def _read_first_file(path: Path, keys: Mapping[str, Key]) -> dict[str, Any]:
    """The values of a first file without declarations.

    A file that an earlier version saved may have keys that no longer exist, which are ignored, and
    may not have newer keys, which then have the value that its checkpoints imply.
    """
    text = config_schema.read_text(path)
    if not text.startswith(SAVED_HEADER):
        return config_schema.read_values(path, keys)
    saved = config_schema.read_values(path, keys, ignore_unknown=True)
    implied = {
        name: value for name, value in scaling.ARCHITECTURE_KEYS.items() if value is not None
    }
    return implied | IMPLIED_VALUES | saved


def _override_file(folder: Path, what: str, values: _Values) -> Path | None:
    """configs/models/<model>.yml or configs/stages/<stage>.yml, or None if no file is needed."""
    name = values.value[what]
    if name is None:
        return None
    if not _NAME.fullmatch(name):
        raise values.error(what, "must consist of [A-Za-z0-9._-], at most 64, no dot first")
    path = folder / f"{what}s" / f"{name}.yml"
    if path.is_file():
        return path
    if what == "model" and _depth_in_name(name) is not None:
        return None
    known = sorted(file.stem for file in path.parent.glob("*.yml"))
    hint = suggest(name, known) or f"; there are: {', '.join(known) or 'none'}"
    other = " (a name dN needs no file)" if what == "model" else ""
    raise values.error(what, f"has no file configs/{what}s/{name}.yml{hint}{other}")


def _depth_in_name(model: str) -> int | None:
    """The N of a model named dN."""
    match = re.fullmatch(r"d([1-9]\d{0,8})", model, re.ASCII)
    return int(match[1]) if match else None


# ---- Derived values -----------------------------------------------------------------------------


def _derive(values: _Values) -> None:
    """Fills the null keys that follow from other keys."""
    value = values.value

    def fill(name: str, make: Callable[[], Any]) -> None:
        if values.value[name] is None:
            values.set(name, make(), DERIVED)

    # A later stage has its own folder, next to the run that it starts from.
    fill("run_name", lambda: "_".join(filter(None, (value["model"], value["stage"]))))
    if values.value["num_decoder_layers"] is None:
        depth = _depth_in_name(value["model"])
        if depth is None:
            raise values.error("model", "does not set num_decoder_layers: set it too")
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
        raise values.error(
            "target_param_data_ratio", "is too small: there is not one token to train on"
        )
    reference = scaling.parameter_counts(scaling.reference_shape(shape, aspect_ratio)).scaling
    _set_stage_batch(values)
    fill("global_batch_tokens", lambda: scaling.batch_tokens(size, reference, ratio))
    batch = value["global_batch_tokens"]
    fill("learning_rate_scale", lambda: scaling.learning_rate_scale(batch))
    fill("weight_decay_scale", lambda: scaling.weight_decay_scale(batch, size, reference, ratio))
    fill("steps", lambda: _steps(values, shape, size))
    fill("long_documents", lambda: "split" if value["dataset_type"] == "text" else "crop")


def _set_stage_batch(values: _Values) -> None:
    """Sets global_batch_tokens if the stage decides it. Raises ConfigError for another value."""
    value, stage = values.value, stage_config(values.value)
    if stage.batch_tokens is None:
        return
    tokens = stage.batch_tokens(value)
    if (
        values.origin["global_batch_tokens"] == COMMAND_LINE
        and value["global_batch_tokens"] != tokens
    ):
        raise values.error(
            "global_batch_tokens", f"is not {stage.batch_tokens_text}; leave it null"
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
        raise values.error(
            why, f"is less than one step of {batch} tokens; increase it or set steps"
        )
    if steps >= config_schema.INT_LIMIT:
        raise OverflowError
    return steps


def windows_of(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The attention window of each layer of a config, in tokens."""
    return scaling.window_sizes(
        config["num_decoder_layers"],
        config["window_pattern"],
        config["max_target_length"],
        config["short_window_fraction"],
        config["short_window_multiple"],
    )


def horizon_is_open(config: Mapping[str, Any]) -> bool:
    """Whether `steps` depends on the data: in a stage with epochs, if no key sets the steps."""
    is_set = config[ORIGIN]["steps"] != DERIVED or config["target_flops"] is not None
    return stage_config(config).horizon_from_data and not is_set


def row_length(config: Mapping[str, Any]) -> int:
    """Sequence length of a training batch, which the stage decides."""
    return stage_config(config).row_tokens(config)


def start_directory(load_from: str, directory: epath.Path) -> epath.Path:
    """The folder of the run load_from: a path, or the name of a folder next to `directory`."""
    path = epath.Path(load_from).expanduser()
    return path if "/" in load_from else directory.parent / load_from


# ---- Contradictions -----------------------------------------------------------------------------


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
            "num_kv_heads", f"does not divide num_query_heads={value['num_query_heads']}"
        )
    if not value["window_pattern"] or set(value["window_pattern"]) - set("SL"):
        raise values.error("window_pattern", "must consist of the letters S and L, such as SSSL")
    for name in ("value_embed_gate_channels", "smear_gate_channels"):
        if value[name] > value["emb_dim"]:
            raise values.error(name, f"is larger than emb_dim={value['emb_dim']}")


def _check_lists(values: _Values) -> None:
    value = values.value
    for name in values.keys:
        pair = name.endswith(("_betas", "_lambda_init")) and values.keys[name].depth == 1
        if (pair or name == "dataset_splits") and len(value[name]) != 2:
            raise values.error(name, "must have two elements")
        if name.endswith("_betas") and max(value[name]) >= 1:
            raise values.error(name, "must be below 1")
    traced = value["profile_steps"]
    if traced and (len(traced) != 2 or traced[0] >= traced[1]):
        raise values.error("profile_steps", "is not [first, end] with first below end")
    if traced and not horizon_is_open({**value, ORIGIN: values.origin}):
        if traced[0] >= value["steps"]:
            raise values.error("profile_steps", f"begins after the last of steps={value['steps']}")


def _check_layout(values: _Values) -> None:
    axes = values.value["mesh_axes"]
    if len(set(axes)) != len(axes):
        raise values.error("mesh_axes", "has an axis twice")
    for axis in axes:
        for name in (f"ici_{axis}_parallelism", f"dcn_{axis}_parallelism"):
            if name not in values.keys:
                raise values.error("mesh_axes", f"has {shorten(axis)}, but no key {name}")
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
                problem = f"does not have {axis}, by which {key} shard {name}; change both"
                raise values.error("mesh_axes", problem)
            problem = f"shards {name} by {shorten(axis)}, which is not in mesh_axes"
            raise values.error(key, problem + suggest(axis, axes))
        if len(set(mesh_axes)) != len(mesh_axes):
            raise values.error(key, f"shards {name} twice by one axis")


def _check_processes(values: _Values) -> None:
    value = values.value
    names = ("coordinator_address", "num_processes", "process_id")
    given = [name for name in names if value[name] is not None]
    missing = [name for name in names if value[name] is None]
    if not given:
        return
    if missing:
        problem = f"needs {' and '.join(missing)} too; or leave all three to the environment"
        raise values.error(given[0], problem)
    if value["process_id"] >= value["num_processes"]:
        last = value["num_processes"] - 1
        raise values.error("process_id", f"is out of range: the processes are numbered 0 to {last}")


def _check_xla_flags(values: _Values) -> None:
    groups: dict[str, tuple[str, ...]] = {}
    for name, *flags in (group or ("",) for group in values.value["xla_flag_groups"]):
        backend, *flags = flags or ("",)
        if not name or name in groups:
            problem = f"has two groups {name}" if name else "has a group without a name"
            raise values.error("xla_flag_groups", problem)
        if backend not in XLA_BACKENDS or not flags:
            problem = f"has a group {name} that is not [name, {' or '.join(XLA_BACKENDS)}, flags]"
            raise values.error("xla_flag_groups", problem)
        for flag in flags:
            if not re.fullmatch(r"xla_\w+=\S+", flag, re.ASCII):
                problem = f"has {shorten(flag)} in {name}, which is not xla_flag=value"
                raise values.error("xla_flag_groups", problem)
        groups[name] = (backend, *(flag.partition("=")[0] for flag in flags))
    set_by: dict[tuple[str, str], str] = {}
    for name in values.value["xla_flags"]:
        if name not in groups:
            problem = f"names {shorten(name)}, which is not in xla_flag_groups"
            raise values.error("xla_flags", problem + suggest(name, list(groups)))
        backend, *flags = groups[name]
        for flag in flags:
            if (backend, flag) in set_by:
                raise values.error(
                    "xla_flags", f"sets {flag} twice: in {set_by[backend, flag]} and {name}"
                )
            set_by[backend, flag] = name


def _check_server(values: _Values) -> None:
    value = values.value
    try:
        re.compile(value["serve_cors_origin_regex"] or "")
    except re.error as error:
        raise values.error(
            "serve_cors_origin_regex", f"is no regular expression: {error}"
        ) from None
    for pattern in value["serve_allowed_hosts"] or ():
        if "*" in pattern.removeprefix("*.") and pattern != "*":
            raise values.error("serve_allowed_hosts", "takes * only alone or as in *.example.org")


def _check_rest(values: _Values) -> None:
    value = values.value
    layers, depth = value["remat_layers"], value["num_decoder_layers"]
    if layers is not None and layers > depth:
        raise values.error("remat_layers", f"is larger than num_decoder_layers={depth}")
    if layers is not None and value["remat_policy"] == "none":
        raise values.error("remat_layers", "has no effect with remat_policy=none; set that to full")
    if not _NAME.fullmatch(value["run_name"]):
        raise values.error("run_name", "must consist of [A-Za-z0-9._-], at most 64, no dot first")
    batch, length = value["global_batch_tokens"], row_length(value)
    if batch % length:
        nearest = max(1, round(batch / length)) * length
        raise values.error(
            "global_batch_tokens",
            f"is not a multiple of the sequence length {length}; the nearest is {nearest}",
        )
    if value["dataset_type"] == "tfds" and not value["dataset_name"]:
        raise values.error("dataset_type", "needs dataset_name, such as wikipedia/20230601.en")
    if value["dataset_type"] == "hf" and not value["dataset_name"]:
        raise values.error(
            "dataset_type", "needs dataset_name=OWNER/NAME, such as karpathy/climbmix-400b-shuffle"
        )
    for key, problem in stage_config(value).contradictions(value):
        raise values.error(key, problem)
    directions = ("from_nanochat", "to_nanochat", "from_huggingface", "to_huggingface")
    first, *others = [name for name in directions if value[name]] or ("",)
    if others:
        raise values.error(others[0], f"and {first} exclude each other; set one of them")


# ---- The config ---------------------------------------------------------------------------------


def initialize(argv: Sequence[str]) -> FrozenConfigDict:
    """The config of a run. argv: a config file, followed by key=value words.

    The file is base.yml or a saved config, which only the command line overrides (and a stage that
    it names). Keys that depend on the backend stay null. `config.origin[key]` is the origin of a
    value. The config is hashable and can be pickled; lists are tuples.
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
    _check_server(values)
    _check_rest(values)
    return FrozenConfigDict({**values.value, ORIGIN: values.origin})


def replace(config: FrozenConfigDict, origin: str, **values: Any) -> FrozenConfigDict:
    """The config with some values replaced, from `origin`; nothing is checked or derived.

    Raises KeyError for an unknown key.
    """
    unknown = values.keys() - config.keys()
    if unknown:
        raise KeyError(f"no such keys: {sorted(unknown)}")
    new = {name: config[name] for name in config} | values
    new[ORIGIN] = {**config[ORIGIN].to_dict(), **dict.fromkeys(values, origin)}
    return FrozenConfigDict(new)


def keys_of(config: FrozenConfigDict) -> Iterator[str]:
    """The names of a config's keys, in alphabetical order."""
    return (name for name in config if name != ORIGIN)


def _in_order_of_base(config: FrozenConfigDict) -> list[str]:
    keys, names = config_schema.base_keys(), dict.fromkeys(keys_of(config))
    return [name for name in keys if name in names] + [name for name in names if name not in keys]


def describe(config: FrozenConfigDict) -> list[tuple[str, Any, str]]:
    """(key, value, origin) of every value that differs from base.yml, for the start-up table."""
    defaults = config_schema.default_values(config_schema.base_keys(), BASE.name)
    return [
        (name, config[name], config[ORIGIN][name])
        for name in _in_order_of_base(config)
        if config[ORIGIN][name] != "base"
        and not (name in defaults and defaults[name] == config[name])
    ]


def to_yaml(config: FrozenConfigDict) -> str:
    """The config as text, each key with its origin; saved, it is a valid first argument."""
    lines = [
        f"{name}: {config_schema.format_value(config[name])}  # {config[ORIGIN][name]}"
        for name in _in_order_of_base(config)
    ]
    return "\n".join([f"{SAVED_HEADER}: every key, with the origin of its value.", *lines, ""])


def save(config: FrozenConfigDict, path: Path) -> None:
    """Writes to_yaml(config) to a local or remote file, completely or not at all."""
    files.write_whole(path, to_yaml(config))


def saved_values(path: Path) -> dict[str, Any]:
    """The values in a file that `save` wrote, in YAML's types. Raises ConfigError if damaged."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        values = None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is damaged")
    return values


def saved_lines(text: str) -> dict[str, tuple[str, str]]:
    """{key: (its value as text, its origin)} of a file that `save` wrote."""
    lines = {}
    for line in text.splitlines():
        if not line.startswith("#") and ":" in line:
            written, _, origin = line.rpartition("  # ")
            name, _, value = written.partition(":")
            lines[name] = value.strip(), origin
    return lines


# ---- Entry points -------------------------------------------------------------------------------


COMMAND = ""  # "maxnano train" if __main__.py runs the program, which --help then names
HELP_WORDS = {"-h": False, "--help": False, "--help=all": True}  # word -> whether to show all keys


def has_accelerator(dev: Path = Path("/dev")) -> bool:
    """Whether the system has a TPU or GPU: dxg is a GPU under WSL2, kfd one of AMD."""
    names = ("accel*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd", "dxg")
    return any(any(dev.glob(name)) for name in names)


def check_command_line() -> None:
    """Answers --help and refuses a wrong command line; call before importing slow modules.

    Without an accelerator it also sets JAX_PLATFORMS=cpu: if libtpu is installed for compiling, JAX
    would otherwise search for a TPU and print pages about not finding one.
    """
    status = launch(lambda config: None)
    if status or HELP_WORDS.keys() & set(sys.argv):
        sys.exit(status)
    if not has_accelerator():
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    end_on_interrupt()


def launch(
    main: Callable[[FrozenConfigDict], int | None],
    argv: Sequence[str] | None = None,
    *,
    options: str = "",
) -> int:
    """Runs an entry point and returns its exit status: `sys.exit(pyconfig.launch(main))`.

    --help prints the common keys, --help=all all keys. A ValueError raised in this package is a
    user error: one line on stderr and status 2. So is an error of the disk (files.DISK_ERRORS), whoever
    raised it. A ValueError raised in a library is a bug and keeps its traceback. After Ctrl-C the
    status is 130. options: the help of what is no key, for --help.
    """
    console.keep_output()
    raise_on_interrupt()
    argv = sys.argv[1:] if argv is None else argv
    try:
        for word in HELP_WORDS.keys() & set(argv):
            program = Path(sys.argv[0])
            command = f"{COMMAND} [CONFIG.yml]" if COMMAND else f"python {program} configs/base.yml"
            print(f"usage: {command} [key=value ...]")
            print(options, end="")
            print(config_schema.help_text(program.stem, show_all=HELP_WORDS[word]), end="")
            return 0
        return main(initialize(argv)) or 0
    except KeyboardInterrupt:
        print("Interrupted", file=sys.stderr)
        return 130
    except ValueError as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        if Path(__file__).resolve().parent not in raised_in.parents:
            raise
        print(f"error: {console.one_line(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in files.DISK_ERRORS:
            raise
        remedy = files.DISK_ERRORS[error.errno]
        print(f"error: {console.one_line(error)}; {remedy}", file=sys.stderr)
        return 2

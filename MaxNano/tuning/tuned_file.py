"""The file of tuned settings: tune.py writes it, and train.py reads it as the key `tuned` says.

configs/tuned/<device>-<devices>-<model>.yml has values of TUNABLE keys, and comment lines
`# name: value` with what it was measured for. Values of the command line, of a stage file and of a
saved config win over it; so does a value of the model's file, unless the search found a faster one
than just that value.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import FrozenConfigDict

from MaxNano import config_schema, console, pyconfig
from MaxNano.config_schema import BASE, IS_INSTALLED, format_value
from MaxNano.storage import files
from MaxNano.training import checkpoint_identity
from MaxNano.tuning.candidates import TUNABLE, Overrides, is_free

# An upgrade replaces an installed package: its user's files are in the current folder.
FOLDER = (Path("configs") if IS_INSTALLED else BASE.parent) / "tuned"
ORIGIN_PREFIX = pyconfig.TUNED_ORIGIN  # before the file's name, as the origin of its values
HEADER = "# The fastest settings that MaxNano/tune.py measured; see `tuned` in configs/base.yml."
# With other values of these, other settings are the fastest, or the settings do not fit.
WORKLOAD_KEYS = """
    stage num_decoder_layers emb_dim mlp_dim num_query_heads num_kv_heads head_dim vocab_size
    max_target_length window_pattern short_window_fraction global_batch_tokens dtype quantization
""".split()
VERSIONS = ("maxnano", "jax")  # with other versions, the file is not used by itself


def file_name(config: Mapping[str, Any], device: str, devices: int) -> str:
    """The name of the tuned file of a model on devices of a kind."""
    parts = [device, str(devices), config["model"], config["stage"] or ""]
    return re.sub(r"[^a-z0-9._]+", "-", "-".join(parts).lower()).strip("-") + ".yml"


def description(
    config: Mapping[str, Any], device: str, devices: int, versions: Mapping[str, str | None]
) -> dict[str, str]:
    """What must agree between a tuned file and a run that uses it by itself: name -> text."""
    return {
        "device": device,
        "devices": str(devices),
        "model": config["model"],
        "workload": " ".join(f"{key}={format_value(config[key])}" for key in WORKLOAD_KEYS),
        "versions": " ".join(f"{name}={versions.get(name)}" for name in VERSIONS),
    }


def replaced(config: Mapping[str, Any], overrides: Overrides) -> dict[str, str]:
    """The values of the model's file that the overrides replace, as a fact of a tuned file."""
    words = [_word(config, key) for key in overrides if config[pyconfig.ORIGIN][key] != "base"]
    return {"replaces": "; ".join(words)} if words else {}


def _word(config: Mapping[str, Any], key: str) -> str:
    return f"{key}={format_value(config[key])}"


def write(path: Path, facts: Mapping[str, str], overrides: Overrides) -> None:
    """Write a tuned file. facts: `description`, and whatever else a reader wants to know."""
    comments = [f"# {name}: {console.one_line(value)}" for name, value in facts.items()]
    values = [f"{key}: {format_value(value)}" for key, value in overrides.items()]
    lines = [HEADER, *comments, "", *(values or ["# The defaults are the fastest."])]
    files.write_whole(path, "\n".join([*lines, ""]))


def read(path: Path) -> tuple[dict[str, str], Overrides]:
    """(facts, values) of a tuned file. Raises ValueError, in one line, if it is none."""
    text = config_schema.read_text(path)
    facts = dict(re.findall(r"^# ([\w/ ]+): (.*)$", text, re.MULTILINE))
    missing = {"device", "devices", "model", "workload", "versions"} - facts.keys()
    if not text.startswith(HEADER) or missing:
        raise ValueError(f"{path} is no tuned file, or is damaged: write it again with tune.py")
    values = config_schema.read_values(path, config_schema.base_keys())
    if foreign := sorted(values.keys() - set(TUNABLE)):
        raise ValueError(
            f"{path} sets {foreign[0]}, which changes more than speed: set it on the command line"
        )
    return facts, values


def with_tuned(config: FrozenConfigDict) -> FrozenConfigDict:
    """The config with the tuned settings that config.tuned asks for; says so in one line.

    Call it when the devices are known. auto: the file in FOLDER, if it is for these devices, this
    model and these versions. A run that is resumed keeps the tuned settings of its start, or none.
    Raises ValueError for a named file that cannot be used.
    """
    if config.tuned == "off":
        return config
    identity = checkpoint_identity.describe(config, "")
    devices = identity["devices"]
    expected = description(config, devices["kind"], devices["count"], identity["versions"])
    if config.tuned != "auto":
        path = Path(config.tuned).expanduser()
        facts, values = read(path)
        different = _difference(facts, expected)
        remark = f", although {different}" if different else ""
        return _replace(config, path, facts, values, remark)
    path = FOLDER / file_name(config, devices["kind"], devices["count"])
    saved = files.run_directory(config) / "config.yml"
    if config.enable_checkpointing and saved.exists():
        return _keep(config, path, saved)
    if not path.exists():
        return config
    try:
        facts, values = read(path)
        different = _difference(facts, expected)
        if not different:
            return _replace(config, path, facts, values, "")
        problem = f"{path} is not used: {different}; tune.py measures again"
    except ValueError as error:
        problem = console.one_line(error)
    if jax.process_index() == 0:
        console.warn(problem)
    return config


def _difference(facts: Mapping[str, str], expected: Mapping[str, str]) -> str:
    """The first difference between what a file was measured for and this run, "" if none."""
    for name, now in expected.items():
        for before, after in _pairs(facts[name], now):
            if before != after:
                return f"it was measured for {name} {before}, and this run has {after}"
    return ""


def _pairs(before: str, now: str) -> Iterable[tuple[str, str]]:
    """The parts of two facts: words of equal number, or the whole texts."""
    parts = before.split(), now.split()
    return zip(*parts, strict=True) if len(parts[0]) == len(parts[1]) else [(before, now)]


def _replace(
    config: FrozenConfigDict, path: Path, facts: Mapping[str, str], values: Overrides, remark: str
) -> FrozenConfigDict:
    known = facts.get("replaces", "").split("; ")
    used = {
        key: value
        for key, value in values.items()
        if config.origin[key] == "base" or (is_free(config, key) and _word(config, key) in known)
    }
    groups = {group[0] for group in config.xla_flag_groups}
    if unknown := sorted(set(used.get("xla_flags", ())) - groups):
        raise ValueError(f"{path} sets xla_flags={unknown[0]}, which is not in xla_flag_groups")
    words = [f"{key}={format_value(value)}" for key, value in used.items()]
    left = [key for key in values if key not in used]
    kept = f"; {', '.join(left)} as set elsewhere" if left else ""
    _say(f"Tuned settings of {path}{remark}: {', '.join(words) or 'none'}{kept}")
    return pyconfig.replace(config, ORIGIN_PREFIX + path.name, **used)


def _keep(config: FrozenConfigDict, path: Path, saved: Any) -> FrozenConfigDict:
    """The config of a run that is resumed, with the tuned settings that it was started with here."""
    origin = ORIGIN_PREFIX + path.name
    lines = pyconfig.saved_lines(config_schema.read_text(saved))
    before = config_schema.read_values(saved, config_schema.base_keys(), ignore_unknown=True)
    kept = {
        key: before[key]
        for key in TUNABLE
        if lines.get(key, ("", ""))[1] == origin and is_free(config, key)
    }
    if kept:
        words = ", ".join(f"{key}={format_value(value)}" for key, value in kept.items())
        _say(f"Tuned settings as at the start of the run: {words}")
        return pyconfig.replace(config, origin, **kept)
    if path.exists():
        _say(f"{path} is not used: the run was started without it; tuned={path} uses it")
    return config


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)

"""What may change between the starts of a run: which keys change its numbers, and the refusal.

A key that train.py reads and that is not in FREE_KEYS changes numbers.
"""

import functools
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from MaxNano import config_schema, pyconfig
from MaxNano.config_schema import BASE, format_value, shorten
from MaxNano.data import fingerprint
from MaxNano.storage.checkpoints import CheckpointError, newest_extra
from MaxNano.storage.files import run_directory

# These may change: when something is measured, saved or printed; where files are, whose contents
# are compared by fingerprint (load_from by start.py); which devices compute, and how they share and
# schedule the same computation, equal up to rounding.
FREE_KEYS = frozenset(
    """
    model run_name base_output_directory load_from dry_run allow_config_change
    dataset_path tokenizer_path core_bundle chat_data chat_word_list download_path
    download_connections hub_url skip_corrupt_data data_wait_seconds data_workers prefetch_batches tokenizer_threads
    enable_checkpointing checkpoint_interval_steps checkpoint_interval_minutes checkpoint_keep
    async_checkpointing log_interval tensorboard trackers tracker_project profile_steps max_nonfinite_steps
    eval_interval sample_interval sample_tokens core_interval core_batch_tokens chat_interval
    chat_slots stream_interval prefill_rows
    per_device_batch_size num_cpu_devices jax_cache_dir ici_data_parallelism ici_fsdp_parallelism
    ici_tensor_parallelism dcn_data_parallelism dcn_fsdp_parallelism dcn_tensor_parallelism
    mesh_axes logical_axis_rules coordinator_address num_processes process_id
    remat_policy remat_names remat_layers scan_layers vocab_chunk_size embedding_gradient layer_products
    xla_flags xla_flag_groups attention attention_chunk flash_block splash_short_window splash_short_forward
    splash_short_backward splash_long_forward splash_long_backward splash_fused_backward tuned
    """.split()
)
# Of these, the processes of one run may have different values: each host has its own paths.
HOST_KEYS = frozenset(
    """
    coordinator_address process_id dataset_path tokenizer_path core_bundle chat_data chat_word_list
    download_path download_connections hub_url data_workers prefetch_batches tokenizer_threads
    jax_cache_dir log_interval tensorboard trackers tracker_project
    """.split()
)


class ConfigChanged(CheckpointError):
    """A run was started again with other values of keys that change its numbers, or other data."""


class Change(NamedTuple):
    """Two values of a key, JSON-able: in the run so far and now, or in two processes."""

    before: Any
    now: Any


@functools.cache
def result_keys() -> frozenset[str]:
    """The keys that a resumed run may not change: they change its parameters or measurements."""
    keys = config_schema.base_keys().values()
    return frozenset(key.name for key in keys if "train" in key.programs) - FREE_KEYS


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Change]:
    """The keys of `now` whose value differs from that in `before`.

    A key that is not in `before`, of an earlier version, had the default of base.yml.
    """
    keys = config_schema.base_keys()
    defaults = config_schema.default_values(keys, BASE.name)
    pairs = {
        name: Change(_plain(before.get(name, defaults[name])), _plain(now[name])) for name in keys
    }
    # What an earlier version could not derive is unknown.
    return {
        name: pair
        for name, pair in pairs.items()
        if pair.before != pair.now and not (name not in before and pair.before is None)
    }


def result_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Change]:
    """The changes of keys that change numbers."""
    return {name: pair for name, pair in changes(before, now).items() if name in result_keys()}


def describe(found: Mapping[str, Change], limit: int = 5) -> str:
    """Changes in words: "matrix_lr=0.5 instead of 0.02"; the first `limit` of them."""
    words = [
        f"{name}={_text(pair.now)} instead of {_text(pair.before)}"
        for name, pair in list(found.items())[:limit]
    ]
    rest = len(found) - len(words)
    return ", ".join(words) + (f" and {rest} more" if rest else "")


def check_resume(
    config: Mapping[str, Any], extra: Mapping[str, Any], contents: Mapping[str, Any]
) -> dict[str, Any]:
    """The differences from the run that `extra` was saved with, {} if there are none.

    {key: Change} of keys that change numbers; "data": the difference of `contents`, which is from
    fingerprint.contents_of_run; "load_from": that another run is there now.
    Raises ConfigChanged if there are any, unless allow_config_change.
    """
    if not extra.get("metrics"):  # imported: it was not trained with this config
        return {}
    found: dict[str, Any] = result_changes(extra["run"]["config"], config)
    saved = extra.get("inputs", {}).get("data")
    problem = fingerprint.run_difference(saved, contents) if saved and contents else None
    words = [describe(found)] if found else []
    problems = {"data": problem, "load_from": _start_difference(config, extra)}
    for name, problem in problems.items():
        if problem is not None:
            found[name] = problem
            words.append(problem)
    if found and not config["allow_config_change"]:
        raise ConfigChanged(
            f"{run_directory(config)} was trained to step {extra['run']['step']} with other values: "
            f"{'; '.join(words)}. Set them back, choose another run_name, or set "
            "allow_config_change=true"
        )
    return found


def _start_difference(config: Mapping[str, Any], extra: Mapping[str, Any]) -> str | None:
    """That load_from is another run now than at the start, such as one that was trained again."""
    start = extra.get("inputs", {}).get("start")
    if not start or not start["run"] or config["load_from"] is None:
        return None
    folder = pyconfig.start_directory(config["load_from"], run_directory(config))
    now = parameters_id(newest_extra(folder))
    if now is None or now.split("-")[0] == start["run"].split("-")[0]:
        return None
    return f"{folder} is another run now than the one that it started from"


def parameters_id(extra: Mapping[str, Any]) -> str | None:
    """The identity of a checkpoint's training, from what was saved with it: the id of the run, and
    a fingerprint of the changes that were allowed since. Results are kept by it.

    None if the checkpoint was imported.
    """
    run_id = (extra.get("metrics") or {}).get("run_id")
    return run_id and run_id + (extra.get("inputs") or {}).get("changes", "")


def changes_suffix(before: str, step: int, found: Mapping[str, Any]) -> str:
    """What parameters_id adds to the id of the run, after further changes at a step."""
    if not found:
        return before
    return f"-{fingerprint.summary([before, step, found])}"


def saved_config(directory: epath.Path) -> dict[str, Any] | None:
    """The config of the latest start of a run, None if there is none."""
    path = directory / "config.yml"
    return pyconfig.saved_values(path) if path.exists() else None


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _text(value: Any) -> str:
    value = tuple(value) if isinstance(value, list) else value
    return shorten(format_value(value))

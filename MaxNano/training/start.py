"""The state with which a run starts: its checkpoint, another run's (load_from), or initialized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from etils import epath
from ml_collections import FrozenConfigDict

from MaxNano import pyconfig
from MaxNano.config_schema import COMMAND_LINE
from MaxNano.storage.files import run_directory
from MaxNano.training.checkpointing import Checkpointer
from MaxNano.training.config_changes import ConfigChanged
from MaxNano.training.state import TrainState, initialize

if TYPE_CHECKING:
    from MaxNano.training.context import RunContext
    from MaxNano.training.run_record import RunRecord
    from MaxNano.training.setup import RunSetup


def load_start(setup: RunSetup, tokenizer_fingerprint: str) -> tuple[TrainState, dict[str, Any]]:
    """(state, extra) of the newest checkpoint of load_from as step 0: its parameters and, with
    load_optimizer, its optimizer state.

    Raises ValueError if there is none, or if it is of another model or tokenizer.
    """
    config = setup.config
    with _open_start(config, tokenizer_fingerprint) as source:
        if config.load_optimizer:
            try:
                state, extra = source.restore(setup.abstract)
            except ValueError as error:
                raise ValueError(
                    f"{error}; load_optimizer=false reads only its parameters"
                ) from error
            params, opt_state = state.params, state.opt_state
        else:
            params, extra = source.restore_params_only(setup.abstract.params)
            shardings = jax.tree.map(lambda leaf: leaf.sharding, setup.abstract.opt_state)
            opt_state = jax.jit(setup.optimizer.init, out_shardings=shardings)(params)
    check_windows(config, extra["run"]["config"])
    if jax.process_index() == 0:
        directory = start_directory(config)
        print(f"Starting from step {extra['run']['step']} of {directory}", flush=True)
    step = jax.device_put(np.int32(0), setup.abstract.step.sharding)
    return TrainState(step, params, opt_state), extra


def load_start_params(setup: RunSetup, tokenizer_fingerprint: str) -> dict[str, Any]:
    """The parameters of load_from's newest checkpoint. Raises ValueError as load_start."""
    with _open_start(setup.config, tokenizer_fingerprint) as source:
        return source.restore_params_only(setup.abstract.params)[0]


def _open_start(config: FrozenConfigDict, tokenizer_fingerprint: str) -> Checkpointer:
    return Checkpointer(
        config, start_directory(config), tokenizer_fingerprint=tokenizer_fingerprint, writer=False
    )


def start_directory(config: FrozenConfigDict) -> epath.Path:
    """The folder of the run that load_from names. Raises ValueError if it is this run's folder."""
    directory = run_directory(config)
    start = pyconfig.start_directory(config.load_from, directory)
    if start == directory:
        raise ValueError(
            f"load_from={config.load_from} is the folder of this run itself; choose another run_name"
        )
    return start


def check_windows(config: FrozenConfigDict, saved: Mapping[str, Any]) -> None:
    """Raise ValueError if a layer would have another attention window than it was trained with.

    Windows of the whole context may shrink with it.
    """
    length, known = config.max_target_length, pyconfig.windows_of(saved)
    expected = tuple(length if w >= saved["max_target_length"] else min(w, length) for w in known)
    if pyconfig.windows_of(config) != expected:
        raise ValueError(
            f"the layers' windows are {pyconfig.windows_of(config)} tokens but {known} in {config.load_from}: set "
            f"window_pattern={saved['window_pattern']} short_window_fraction={min(expected) / length:g}"
        )


def with_start(config: FrozenConfigDict) -> FrozenConfigDict:
    """The config with what a run to resume was started with and no later command changes by chance:
    its load_from and load_optimizer, if no load_from is given, its long_documents, its eval_tokens,
    if it follows from the data now, and the remat_policy of its files, if they leave it to the
    memory plan now. A key on the command line stays.
    """
    saved = run_directory(config) / "config.yml"
    if not config.enable_checkpointing or not saved.exists():
        return config
    before = pyconfig.IMPLIED_VALUES | pyconfig.saved_values(saved)
    keys = ["long_documents"]
    if config.load_from is None and before.get("load_from") is not None:
        keys += ["load_from", "load_optimizer"]
    if config.eval_tokens is None:
        keys.append("eval_tokens")
    if config.remat_policy is None:
        _, origin = pyconfig.saved_lines(saved.read_text()).get("remat_policy", ("", ""))
        if origin != COMMAND_LINE and not origin.startswith(pyconfig.TUNED_ORIGIN):
            keys.append("remat_policy")
    values = {
        key: before[key]
        for key in keys
        if key in before
        and before[key] != config[key]
        and (key == "load_from" or config.origin[key] != COMMAND_LINE)
    }
    return pyconfig.replace(config, pyconfig.RUN_ORIGIN, **values) if values else config


def check_start(config: FrozenConfigDict, saved: Mapping[str, Any]) -> None:
    """Raise ConfigChanged if load_from differs from the start of the run to resume; saved: its
    config.
    """
    before = saved.get("load_from")
    if config.load_from not in (None, before):
        start = f"from {before}" if before else "from random parameters"
        raise ConfigChanged(
            f"{run_directory(config)} was started {start}, not from {config.load_from}; "
            "choose another run_name"
        )


def start_state(run: RunContext, checkpointer: Checkpointer, record: RunRecord) -> dict[str, Any]:
    """Set run.state: from the run's latest checkpoint, from another run's, or initialized.

    Returns what was saved with the run's checkpoint, {} at the start of a run.
    """
    config, setup, extra = run.config, run.setup, {}
    if config.enable_checkpointing and checkpointer.latest_step() is not None:
        run.state, extra = checkpointer.restore(setup.abstract, check=record.check)
    elif config.load_from is not None:
        run.state, source = load_start(setup, run.tokenizer.fingerprint())
        record.start_from(source)
    else:
        run.state = initialize(config, setup.numerics, setup.optimizer, setup.abstract)
    if config.enable_checkpointing:
        checkpointer.check_free_space(setup.abstract)
    return extra

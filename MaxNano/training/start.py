"""Starts a run from the checkpoint of another run, as load_from says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from etils import epath
from ml_collections import FrozenConfigDict

from MaxNano import pyconfig
from MaxNano.storage.files import run_directory
from MaxNano.training.checkpointing import Checkpointer
from MaxNano.training.state import TrainState

if TYPE_CHECKING:
    from MaxNano.training.setup import RunSetup


def load_start(setup: RunSetup, tokenizer_fingerprint: str) -> TrainState:
    """The newest checkpoint of load_from as step 0: its parameters and, with load_optimizer, its
    optimizer state.

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
    return TrainState(jax.device_put(np.int32(0), setup.abstract.step.sharding), params, opt_state)


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
    its load_from, if none is given, and its long_documents, unless the command line sets it.
    """
    saved = run_directory(config) / "config.yml"
    if not config.enable_checkpointing or not saved.exists():
        return config
    before = pyconfig.IMPLIED_VALUES | pyconfig.saved_values(saved)
    if config.load_from is None and before.get("load_from") is not None:
        config = pyconfig.replace(config, "the run", load_from=before["load_from"])
    is_asked = config[pyconfig.ORIGIN]["long_documents"] == pyconfig.COMMAND_LINE
    if not is_asked and config.long_documents != before["long_documents"]:
        config = pyconfig.replace(config, "the run", long_documents=before["long_documents"])
    return config


def check_start(config: FrozenConfigDict, saved: Mapping[str, Any]) -> None:
    """Raise ValueError if load_from differs from the start of the run to resume; saved: its config."""
    before = saved.get("load_from")
    if config.load_from not in (None, before):
        start = f"from {before}" if before else "from random parameters"
        raise ValueError(
            f"{run_directory(config)} was started {start}, not from {config.load_from}; "
            "choose another run_name"
        )

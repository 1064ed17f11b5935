"""Loads the parameters of a run's checkpoint, or an engine that serves them."""

from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import FrozenConfigDict

from MaxNano.inference.engine import Engine
from MaxNano.models.setup import ModelSetup, set_up_model
from MaxNano.storage.files import run_directory
from MaxNano.tokenization.tokenizer import Tokenizer, load_tokenizer
from MaxNano.training.checkpointing import Checkpointer


def load_params(setup: ModelSetup) -> tuple[dict[str, Any], Tokenizer]:
    """Parameters and tokenizer of a run, from its newest checkpoint or that of config.step.

    The parameters have the shardings of `setup.params`.
    Raises ValueError if there is no such checkpoint, or if it is of another model or tokenizer.
    """
    config, tokenizer = setup.config, load_tokenizer(setup.config)
    with Checkpointer(
        config, run_directory(config), tokenizer_fingerprint=tokenizer.fingerprint(), writer=False
    ) as checkpointer:
        params, _ = checkpointer.restore_params_only(setup.params, config.step)
    return params, tokenizer


def load_engine(
    config: FrozenConfigDict,
    *,
    slots: int | None = None,
    max_length: int | None = None,
    streams: bool = False,
    devices: Sequence[jax.Device] | None = None,
) -> Engine:
    """The engine that serves a run's checkpoint; see load_params, and Engine for the arguments."""
    setup = set_up_model(config, devices)
    params, tokenizer = load_params(setup)
    # Two prefixes per slot: of the prompt, and of prompt and answer.
    most = 2 * (slots or config.decode_slots)
    return Engine(
        setup,
        params,
        tokenizer,
        slots=slots,
        max_length=max_length,
        streams=streams,
        prefix_entries=min(config.prefix_cache_entries, most) if streams else 0,
    )

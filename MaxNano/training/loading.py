"""Loads the parameters of a run's checkpoint, without its optimizer state; and an engine that serves them."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from MaxNano.distributed.mesh import make_mesh
from MaxNano.inference.engine import Engine
from MaxNano.models.setup import set_up_model
from MaxNano.storage.files import run_directory
from MaxNano.tokenization.tokenizer import Tokenizer, load_tokenizer
from MaxNano.training.checkpointing import Checkpointer


def load_params(config: FrozenConfigDict, mesh: Mesh) -> tuple[dict[str, Any], Tokenizer]:
    """Parameters and tokenizer of a run, from its newest checkpoint or that of config.step.

    The parameters are sharded over `mesh` as config.logical_axis_rules say.
    Raises ValueError if there is no such checkpoint, or if it is of another model or tokenizer.
    """
    tokenizer = load_tokenizer(config)
    target = set_up_model(config, mesh=mesh).params
    with Checkpointer(
        config, run_directory(config), tokenizer_fingerprint=tokenizer.fingerprint(), writer=False
    ) as checkpointer:
        params, _ = checkpointer.restore_params_only(target, config.step)
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
    mesh = make_mesh(config, devices)
    params, tokenizer = load_params(config, mesh)
    return Engine(
        config, mesh, params, tokenizer, slots=slots, max_length=max_length, streams=streams
    )

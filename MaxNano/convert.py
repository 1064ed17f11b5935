"""Converts between MaxNano runs and nanochat checkpoints or Hugging Face model folders.

    .venv/bin/python MaxNano/convert.py configs/base.yml from_nanochat=PATH run_name=NAME
    .venv/bin/python MaxNano/convert.py configs/base.yml to_nanochat=PATH run_name=NAME
    .venv/bin/python MaxNano/convert.py configs/base.yml to_huggingface=FOLDER run_name=NAME
    .venv/bin/python MaxNano/convert.py configs/base.yml from_huggingface=FOLDER run_name=NAME

Parameters, model config and tokenizer are converted, the optimizer state is not. The formats are in
interop/nanochat.py and interop/huggingface.py.
"""

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    if not __package__:  # run as a script: modules are imported from the parent of MaxNano/
        sys.path[0] = str(Path(__file__).resolve().parents[1])
    from MaxNano import pyconfig

    pyconfig.check_command_line()  # reports a typo before JAX is imported

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import FrozenConfigDict

from MaxNano import pyconfig, scaling
from MaxNano.interop import huggingface, nanochat, parameters
from MaxNano.interop.tensor_files import read_tensors
from MaxNano.optimizers import groups
from MaxNano.storage import files
from MaxNano.tokenization.bpe import FILE_NAME, BpeTokenizer
from MaxNano.tokenization.tokenizer import (
    Tokenizer,
    load_tokenizer,
    load_tokenizer_from,
)
from MaxNano.training.checkpointing import Checkpointer
from MaxNano.training.run_config import config_of_run
from MaxNano.training.state import TrainState

TABLES = ("token_embed", "value_embeds")  # parameters in embedding_dtype; all others are float32

# ---- Import -------------------------------------------------------------------------------------


class ImportSource(NamedTuple):
    """A foreign checkpoint that becomes a run."""

    path: str
    format: str  # the origin of the config's values
    version: str  # of the format, as printed
    names: parameters.TensorNames
    values: dict[str, Any]  # config keys that the checkpoint decides
    arrays: dict[str, np.ndarray]
    tokenizer: Tokenizer | None
    step: int
    batch: dict[str, int] = {}  # config keys that the command line may set otherwise


def import_run(config: FrozenConfigDict, argv: list[str]) -> None:
    """Creates a run from the checkpoint that `config` names. argv: what `config` was read from.

    Raises ValueError if the run exists, or if checkpoint, tokenizer and command line contradict.
    """
    run = files.run_directory(config)
    if files.names(run / "checkpoints"):
        raise ValueError(f"{run} already has checkpoints; choose another run_name")
    files.check_writable(run.parent, "set base_output_directory to another folder")
    source = _nanochat_source(config) if config.from_nanochat else _huggingface_source(config)
    values = source.values
    _check_command_line(config, values, f"the checkpoint {source.path}")
    if config.origin["embedding_dtype"] != pyconfig.COMMAND_LINE:
        values["embedding_dtype"] = _table_dtype(source)
    is_given = config.origin["global_batch_tokens"] == pyconfig.COMMAND_LINE
    values |= {} if is_given else source.batch
    values |= _tokenizer_values(config, run, source)
    config = _resolve(config, argv, source.format, values)
    params = parameters.to_params(source.arrays, config, source.names)
    state = _fresh_state(params, config, source.step)
    del params

    run.mkdir(parents=True, exist_ok=True)
    tokenizer = source.tokenizer
    if isinstance(tokenizer, BpeTokenizer):
        tokenizer.save(config.tokenizer_path)
    elif tokenizer:
        content = (epath.Path(source.path) / FILE_NAME).read_bytes()
        files.write_whole(run / FILE_NAME, content)
    pyconfig.save(config, run / "config.yml")
    fingerprint = tokenizer.fingerprint() if tokenizer else ""
    with Checkpointer(config, run, tokenizer_fingerprint=fingerprint) as checkpointer:
        start = {"data": None, "metrics": None, "evaluated_step": None}  # of a new run
        checkpointer.save(int(state.step), state, {**start, "imported_from": source.path})
    print(f"Recognized {source.version}: {_listed(source.values)}")
    print(f"Imported {source.path} as {run}, step {state.step}")
    if source.format == "nanochat":
        by = config.origin["global_batch_tokens"]
        print(f"Batch size: global_batch_tokens={config.global_batch_tokens} ({by})")
    if not tokenizer:
        print("Found no tokenizer near it: set tokenizer_path to the model's tokenizer")
    print(f"Use {run / 'config.yml'} instead of configs/base.yml to load it")


def _nanochat_source(config: FrozenConfigDict) -> ImportSource:
    path = config.from_nanochat
    meta = nanochat.read_meta(path)
    arrays = nanochat.without_prefix(read_tensors(path))
    given = {key: config[key] for key, by in config.origin.items() if by == pyconfig.COMMAND_LINE}
    values = nanochat.config_values(meta, arrays, given)
    version = f"nanochat of {nanochat.era_of(arrays).dates}"
    pickled = nanochat.find_tokenizer(path)
    tokenizer = nanochat.read_tokenizer(pickled) if pickled else None
    step = nanochat.step_of(meta, path)
    batch = nanochat.batch_values(meta)
    return ImportSource(
        path, "nanochat", version, nanochat.NAMES, values, arrays, tokenizer, step, batch
    )


def _listed(values: Mapping) -> str:
    """The architecture in a checkpoint's values, as it is written on the command line."""
    keys = (key for key in (*scaling.ARCHITECTURE_KEYS, *scaling.CONTEXT_KEYS) if key in values)
    return " ".join(f"{key}={values[key]}" for key in keys)


def _huggingface_source(config: FrozenConfigDict) -> ImportSource:
    folder = epath.Path(config.from_huggingface).expanduser()
    content = huggingface.read_folder(folder)
    arrays: dict[str, np.ndarray] = {}
    for file in content.weights:
        arrays |= read_tensors(file)
    tokenizer: Tokenizer | None = None
    if (folder / FILE_NAME).exists():
        # A tokenizer of another kind is used as it is.
        tokenizer = huggingface.read_tokenizer(folder) or load_tokenizer_from(
            "huggingface", folder / FILE_NAME
        )
    values = dict(content.values)
    if content.names is not huggingface.NAMES and (
        config.origin["chat_turns"] == pyconfig.COMMAND_LINE
    ):
        del values["chat_turns"]  # only a guess
    return ImportSource(
        str(folder),
        "huggingface",
        content.version,
        content.names,
        values,
        arrays,
        tokenizer,
        content.step,
    )


def _check_command_line(config: FrozenConfigDict, values: Mapping, where: str) -> None:
    """Raises ValueError if the command line contradicts `values`, those of a checkpoint."""
    for key, expected in values.items():
        given = config[key]
        origin = "model" if key == "num_decoder_layers" else key
        is_given = pyconfig.COMMAND_LINE in (config.origin[key], config.origin[origin])
        if is_given and given != expected:
            raise ValueError(f"{key} is {given} on the command line but {expected} in {where}")


def _table_dtype(source: ImportSource) -> str:
    """The embedding_dtype that represents the checkpoint's tables exactly."""
    names = (source.names.token_embed, source.names.value_embeds)
    patterns = [re.escape(name).replace(re.escape("{i}"), r"\d+") for name in names]
    dtypes = {
        str(array.dtype)
        for key, array in source.arrays.items()
        if any(re.fullmatch(pattern, key) for pattern in patterns)
    }
    return "bfloat16" if dtypes == {"bfloat16"} else "float32"


def _tokenizer_values(
    config: FrozenConfigDict, run: epath.Path, source: ImportSource
) -> dict[str, str]:
    """The tokenizer keys of the new run. Raises ValueError if the tokenizer does not fit."""
    tokenizer = source.tokenizer
    if tokenizer is None:
        return {}
    if tokenizer.vocab_size != source.values["vocab_size"]:
        raise ValueError(
            f"the tokenizer of {source.path} has {tokenizer.vocab_size} tokens but the model has"
            f" {source.values['vocab_size']}"
        )
    if not isinstance(tokenizer, BpeTokenizer):
        return {"tokenizer_type": "huggingface", "tokenizer_path": str(run / FILE_NAME)}
    folder = run / "tokenizer"
    if config.origin["tokenizer_path"] == pyconfig.COMMAND_LINE:
        folder = epath.Path(config.tokenizer_path).expanduser()
        if (folder / FILE_NAME).exists():
            existing = load_tokenizer_from("bpe", folder)
            if existing.fingerprint() != tokenizer.fingerprint():
                raise ValueError(
                    f"tokenizer_path={folder} has another tokenizer; choose another path"
                )
    return {"tokenizer_type": "bpe", "tokenizer_path": str(folder)}


def _resolve(
    config: FrozenConfigDict, argv: list[str], origin: str, values: Mapping
) -> FrozenConfigDict:
    """The config of the new run: argv's, with the checkpoint's values from `origin`."""
    words = [f"{key}={str(v).lower() if type(v) is bool else v}" for key, v in values.items()]
    words.append(f"run_name={config.run_name}")  # also if it follows from the model's name
    if config.origin["model"] == "base":
        words.append(f"model=d{values['num_decoder_layers']}")
    resolved = pyconfig.initialize([*argv, *words])
    exact = {k: v if isinstance(resolved[k], str) else resolved[k] for k, v in values.items()}
    return pyconfig.replace(resolved, origin, **exact, from_nanochat=None, from_huggingface=None)


def _fresh_state(params: dict, config: FrozenConfigDict, step: int) -> TrainState:
    """The train state of a run that starts from these parameters, on one device."""
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(
            _cast(leaf, config.embedding_dtype if path[0].key in TABLES else "float32", path)
        ),
        params,
    )
    optimizer = groups.make_optimizer(config, dtype=jnp.float32)
    return TrainState(jnp.asarray(step, jnp.int32), params, jax.jit(optimizer.init)(params))


def _cast(array: np.ndarray, dtype: str, path: tuple) -> np.ndarray:
    """The array in another dtype. Raises ValueError if a value would change."""
    cast = array.astype(dtype)
    if cast.astype(array.dtype).tobytes() != array.tobytes():
        name = "/".join(key.key for key in path)
        raise ValueError(
            f"{name} is {array.dtype} in the checkpoint and would lose digits as {dtype}; "
            "leave embedding_dtype out"
        )
    return cast


# ---- Export -------------------------------------------------------------------------------------


def export_nanochat(config: FrozenConfigDict, argv: list[str]) -> None:
    """Writes a checkpoint of the run as the nanochat checkpoint config.to_nanochat."""
    target = nanochat.check_target(config.to_nanochat)
    files.check_writable(target.parent, "choose another path")
    saved, params, step = _read_run(config, argv, nanochat.check_exportable)
    arrays = nanochat.from_params(params, saved)
    nanochat.write_checkpoint(target, arrays, nanochat.meta_of(saved, step))
    print(f"Exported {files.run_directory(config)}, step {step}, to {target}")


def export_huggingface(config: FrozenConfigDict, argv: list[str]) -> None:
    """Writes a checkpoint of the run, with its tokenizer, as the folder config.to_huggingface."""
    target = huggingface.check_target(config.to_huggingface, config.convert_overwrite)
    files.check_writable(target.parent, "choose another path")
    saved, params, step = _read_run(config, argv, huggingface.check_exportable)
    tensors = parameters.from_params(params, saved, huggingface.NAMES)
    huggingface.write_folder(
        target, saved, step, tensors, load_tokenizer(saved), replace=config.convert_overwrite
    )
    print(f"Exported {files.run_directory(config)}, step {step}, to {target}")


def _read_run(
    config: FrozenConfigDict, argv: list[str], check: Callable[[FrozenConfigDict], None]
) -> tuple[FrozenConfigDict, dict, int]:
    """(config, parameters, step) of a run's newest checkpoint, or of checkpoint config.step.

    The config is the run's, as far as the checkpoint does not say it. `check` sees it before
    anything large is read. Tokenizer keys of the command line replace the saved ones, because a
    tokenizer may have moved.
    """
    config, run = config_of_run(config, argv), files.run_directory(config)
    with Checkpointer(config, run, writer=False) as checkpointer:
        saved = checkpointer.read_extra(config.step)["run"]["config"]
    saved = {**saved, **scaling.architecture_of(saved)}
    keys = (*scaling.Shape._fields, "max_target_length", "window_pattern")
    _check_command_line(config, {key: saved[key] for key in keys}, f"the run {run}")
    moved = ("tokenizer_type", "tokenizer_path", "tokenizer_threads")
    moved = {key: config[key] for key in moved if config.origin[key] == pyconfig.COMMAND_LINE}
    # Keys that are newer than the run have the current values, except architecture keys.
    saved = FrozenConfigDict({**config.to_dict(), **saved, **moved})
    check(saved)
    with Checkpointer(saved, run, writer=False) as checkpointer:
        params, extra = checkpointer.restore_params_only(step=config.step)
    return saved, params, extra["run"]["step"]


# ---- Command ------------------------------------------------------------------------------------


def main(config: FrozenConfigDict, argv: list[str]) -> None:
    """Converts as the config says. argv: what `config` was read from."""
    jax.config.update("jax_platforms", "cpu")  # conversion needs no accelerator
    if config.from_nanochat or config.from_huggingface:
        import_run(config, argv)
    elif config.to_nanochat:
        export_nanochat(config, argv)
    elif config.to_huggingface:
        export_huggingface(config, argv)
    else:
        directions = ("from_nanochat", "to_nanochat", "from_huggingface", "to_huggingface")
        raise ValueError(f"set one of {', '.join(f'{name}=PATH' for name in directions)}")


if __name__ == "__main__":
    sys.exit(pyconfig.launch(lambda config: main(config, sys.argv[1:])))

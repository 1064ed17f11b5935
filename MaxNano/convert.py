"""Converter between MaxNano runs and nanochat checkpoints or folders of the library `transformers`.

    python MaxNano/convert.py configs/base.yml from_nanochat=PATH run_name=NAME
    python MaxNano/convert.py configs/base.yml to_nanochat=PATH run_name=NAME
    python MaxNano/convert.py configs/base.yml to_huggingface=FOLDER run_name=NAME
    python MaxNano/convert.py configs/base.yml from_huggingface=FOLDER run_name=NAME

A nanochat checkpoint is a file `model_<step>.pt`, or the same tensors in `.safetensors` or `.npz`,
with `meta_<step>.json` beside it. Parameters travel; optimizer state does not. A `tokenizer.pkl`
beside the checkpoint, or in a folder `tokenizer` near it, comes along with an import. What lies in
a folder of transformers is in huggingface.py.
Source: nanochat/checkpoint_manager.py and nanochat/gpt.py@92d63d4.
"""

import io
import json
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    if not __package__:  # run as a script: not MaxNano/ but its parent is where modules are
        sys.path[0] = str(Path(__file__).resolve().parents[1])
    from MaxNano import pyconfig

    pyconfig.check_command_line()  # a typo is told now, not when JAX has been imported

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from etils import epath
from ml_collections import FrozenConfigDict

from MaxNano import pyconfig, scaling
from MaxNano.interop import huggingface
from MaxNano.optimizers import groups
from MaxNano.storage import files
from MaxNano.tokenization.bpe import FILE_NAME, BpeTokenizer
from MaxNano.tokenization.tokenizer import (
    SPECIAL_TOKENS,
    Tokenizer,
    load_tokenizer,
    load_tokenizer_from,
)
from MaxNano.training.checkpointing import Checkpointer
from MaxNano.training.state import TrainState

NANOCHAT_VOCAB_MULTIPLE = 64  # nanochat pads its tables to a multiple of this many rows

_MODEL_FIELDS = {  # nanochat's name: ours
    "sequence_len": "max_target_length",
    "vocab_size": "vocab_size",
    "n_layer": "num_decoder_layers",
    "n_head": "num_query_heads",
    "n_kv_head": "num_kv_heads",
    "n_embd": "emb_dim",
}


# ---- Parameters ----------------------------------------------------------------------------------


class Names(NamedTuple):
    """What a format calls its tensors; {i} stands for a layer."""

    token_embed: str
    lm_head: str
    query: str
    key: str
    value: str
    out: str
    wi: str
    wo: str
    value_embeds: str
    value_gate: str
    resid_lambdas: str
    x0_lambdas: str
    smear_gate: str
    smear_lambda: str
    backout_lambda: str


NANOCHAT = Names(
    token_embed="transformer.wte.weight",
    lm_head="lm_head.weight",
    query="transformer.h.{i}.attn.c_q.weight",
    key="transformer.h.{i}.attn.c_k.weight",
    value="transformer.h.{i}.attn.c_v.weight",
    out="transformer.h.{i}.attn.c_proj.weight",
    wi="transformer.h.{i}.mlp.c_fc.weight",
    wo="transformer.h.{i}.mlp.c_proj.weight",
    value_embeds="value_embeds.{i}.weight",
    value_gate="transformer.h.{i}.attn.ve_gate.weight",
    resid_lambdas="resid_lambdas",
    x0_lambdas="x0_lambdas",
    smear_gate="smear_gate.weight",
    smear_lambda="smear_lambda",
    backout_lambda="backout_lambda",
)
HUGGINGFACE = Names(
    token_embed="model.embed_tokens.weight",
    lm_head="lm_head.weight",
    query="model.layers.{i}.self_attn.q_proj.weight",
    key="model.layers.{i}.self_attn.k_proj.weight",
    value="model.layers.{i}.self_attn.v_proj.weight",
    out="model.layers.{i}.self_attn.o_proj.weight",
    wi="model.layers.{i}.mlp.up_proj.weight",
    wo="model.layers.{i}.mlp.down_proj.weight",
    value_embeds="model.layers.{i}.self_attn.value_embed.weight",
    value_gate="model.layers.{i}.self_attn.value_gate.weight",
    resid_lambdas="model.resid_lambdas",
    x0_lambdas="model.x0_lambdas",
    smear_gate="model.smear_gate.weight",
    smear_lambda="model.smear_lambda",
    backout_lambda="model.backout_lambda",
)


@dataclass(frozen=True)
class Entry:
    """One parameter of the tree and the tensors of a format that hold it."""

    path: tuple[str, ...]  # in the parameter tree
    names: tuple[str, ...]  # of tensors; one a layer where `stacked`
    shape: tuple[int, ...]  # of each tensor
    stacked: bool = False  # the tensors become one array with a leading layer axis
    transposed: bool = False  # a Linear weight: (out, in) there, (in, out) here
    vocab_rows: bool = (
        False  # axis 0 is the padded vocabulary, which may be padded differently here
    )
    squeezed: bool = False  # a leading axis of size 1 there, absent here
    default: float | None = None  # value of old nanochat checkpoints that lack the tensor


def entries(config: FrozenConfigDict, names: Names = NANOCHAT) -> list[Entry]:
    """Every parameter of `config`'s model, in a format's names and shapes."""
    depth, width, mlp = config.num_decoder_layers, config.emb_dim, config.mlp_dim
    query = config.num_query_heads * config.head_dim
    kv = config.num_kv_heads * config.head_dim
    is_nanochat = names is NANOCHAT
    rows = scaling.round_up(
        config.vocab_size, NANOCHAT_VOCAB_MULTIPLE if is_nanochat else config.vocab_multiple
    )
    every_layer = range(depth)
    value_layers = scaling.value_embed_layers(depth, config.value_embed_gate_channels)

    def table(path: str, name: str) -> Entry:
        return Entry((path,), (name,), (rows, width), vocab_rows=True)

    def linear(path: tuple[str, ...], layers, name: str, out_size: int, in_size: int) -> Entry:
        found = tuple(name.format(i=i) for i in layers)
        return Entry(path, found, (out_size, in_size), stacked=True, transposed=True)

    found = [
        table("token_embed", names.token_embed),
        table("lm_head", names.lm_head),
        linear(("layers", "attention", "query"), every_layer, names.query, query, width),
        linear(("layers", "attention", "key"), every_layer, names.key, kv, width),
        linear(("layers", "attention", "value"), every_layer, names.value, kv, width),
        linear(("layers", "attention", "out"), every_layer, names.out, width, query),
        linear(("layers", "mlp", "wi"), every_layer, names.wi, mlp, width),
        linear(("layers", "mlp", "wo"), every_layer, names.wo, width, mlp),
        Entry(
            ("resid_lambdas",),
            (names.resid_lambdas,),
            (depth,),
            default=1.0 if is_nanochat else None,
        ),
        Entry(("x0_lambdas",), (names.x0_lambdas,), (depth,), default=0.0 if is_nanochat else None),
    ]
    if channels := config.value_embed_gate_channels:
        tables = tuple(names.value_embeds.format(i=i) for i in value_layers)
        heads = config.num_kv_heads
        found += [
            Entry(("value_embeds",), tables, (rows, kv), stacked=True, vocab_rows=True),
            linear(("value_gate",), value_layers, names.value_gate, heads, channels),
        ]
    if channels := config.smear_gate_channels:
        found += [
            Entry(("smear_gate",), (names.smear_gate,), (1, channels), squeezed=True),
            Entry(("smear_lambda",), (names.smear_lambda,), (1,), squeezed=True),
        ]
    if config.use_backout:
        found += [Entry(("backout_lambda",), (names.backout_lambda,), (1,), squeezed=True)]
    return found


def nanochat_to_params(arrays: Mapping[str, np.ndarray], config: FrozenConfigDict) -> dict:
    """Parameter tree (nested dict of numpy arrays) of nanochat's tensors; dtypes are kept.

    Tensors missing from old checkpoints are filled in as nanochat does. Raises ValueError naming
    the key where one is missing, left over or of another shape than `config` says.
    """
    return to_params(_without_prefix(arrays), config, NANOCHAT)


def _without_prefix(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors without what torch.compile prefixes to the names of a model it wraps."""
    return {name.removeprefix("_orig_mod."): array for name, array in arrays.items()}


def to_params(arrays: Mapping[str, np.ndarray], config: FrozenConfigDict, names: Names) -> dict:
    """Parameter tree of a format's tensors, as nanochat_to_params."""
    arrays = dict(arrays)
    rows = scaling.round_up(config.vocab_size, config.vocab_multiple)
    params: dict = {}
    for entry in entries(config, names):
        parts = []
        for name in entry.names:
            array = _take(arrays, name, entry)
            if entry.vocab_rows:
                array = _with_rows(array, rows)
            if entry.transposed:
                array = array.T
            if entry.squeezed:
                array = array[0]
            parts.append(array)
        value = np.stack(parts) if entry.stacked else np.array(parts[0])
        branch = params
        for key in entry.path[:-1]:
            branch = branch.setdefault(key, {})
        branch[entry.path[-1]] = value
    if arrays:
        raise ValueError(f"the checkpoint holds {next(iter(arrays))!r}, which this model has not")
    return params


def params_to_nanochat(params: Mapping, config: FrozenConfigDict) -> dict[str, np.ndarray]:
    """nanochat's tensors of a parameter tree (arrays of numpy or JAX); dtypes are kept.

    Raises ValueError naming the path where a parameter is missing, left over or of another shape
    than `config` says.
    """
    return from_params(params, config, NANOCHAT)


def from_params(params: Mapping, config: FrozenConfigDict, names: Names) -> dict[str, np.ndarray]:
    """A format's tensors of a parameter tree, as params_to_nanochat."""
    flat = dict(_flatten(params))
    own_rows = scaling.round_up(config.vocab_size, config.vocab_multiple)
    arrays: dict[str, np.ndarray] = {}
    for entry in entries(config, names):
        path = "/".join(entry.path)
        if path not in flat:
            raise ValueError(f"the parameters lack {path!r}, which this configuration's model has")
        value = np.asarray(flat.pop(path))
        expected = _own_shape(entry, own_rows)
        if value.shape != expected:
            raise ValueError(f"parameter {path!r} has shape {value.shape}, expected {expected}")
        for i, name in enumerate(entry.names):
            part = value[i] if entry.stacked else value
            if entry.squeezed:
                part = part[None]
            if entry.transposed:
                part = part.T
            if entry.vocab_rows:
                part = _with_rows(part, entry.shape[0])
            arrays[name] = np.ascontiguousarray(part)
    if flat:
        raise ValueError(f"parameter {next(iter(flat))!r} has no place in the format asked for")
    return arrays


def _with_rows(table: np.ndarray, rows: int) -> np.ndarray:
    """The table cut or zero-padded to `rows`; rows past the vocabulary never reach an output."""
    if len(table) >= rows:
        return table[:rows]
    padding = np.zeros((rows - len(table), *table.shape[1:]), table.dtype)
    return np.concatenate([table, padding])


def _take(arrays: dict[str, np.ndarray], name: str, entry: Entry) -> np.ndarray:
    """Removes and returns one nanochat tensor, checked."""
    if name not in arrays:
        if entry.default is None:
            raise ValueError(
                f"the checkpoint lacks {name!r}, which this configuration's model needs"
            )
        return np.full(entry.shape, entry.default, np.float32)
    array = np.asarray(arrays.pop(name))
    if array.shape != entry.shape:
        raise ValueError(
            f"{name!r} has shape {array.shape} in the checkpoint, expected {entry.shape}"
        )
    return array


def _own_shape(entry: Entry, rows: int) -> tuple[int, ...]:
    """Shape of the entry's parameter in the tree."""
    shape = entry.shape
    if entry.vocab_rows:
        shape = (rows, *shape[1:])
    if entry.transposed:
        shape = shape[::-1]
    if entry.squeezed:
        shape = shape[1:]
    return (len(entry.names), *shape) if entry.stacked else shape


def _flatten(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path joined by "/", leaf) of a nested mapping."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


# ---- nanochat's files ----------------------------------------------------------------------------


def read_tensors(path: epath.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a file by name, bfloat16 ones as such; nothing in it is executed.

    Raises ValueError with one line where the file is missing, damaged or of another kind.
    """
    path = epath.Path(path).expanduser()
    read = _format_of(path, _READERS)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        return read(path)
    except _MissingTorch:
        raise
    except Exception as error:  # noqa: BLE001 (each format fails in ways of its own)
        raise ValueError(f"cannot read {path}: {_first_line(error)}") from None


def write_nanochat(path: epath.PathLike, arrays: Mapping[str, np.ndarray], meta: Mapping) -> None:
    """Writes the tensors and, beside them, meta_<step>.json; each file whole or not at all."""
    path = epath.Path(path).expanduser()
    write = _format_of(path, _WRITERS)
    meta_path = _meta_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The model last: nanochat takes a checkpoint to be there when its model is.
    files.write_whole(meta_path, json.dumps(meta, indent=2).encode())
    files.write_whole(path, write(arrays))


def read_meta(path: epath.PathLike) -> dict:
    """The metadata that belongs to a model file, its `model_config` checked."""
    meta_path = _meta_path(epath.Path(path).expanduser())
    if not meta_path.exists():
        raise ValueError(f"there is no {meta_path}, which describes the model")
    try:
        meta = json.loads(meta_path.read_text())
        model = meta["model_config"]
        model.setdefault("window_pattern", "L")  # as nanochat reads checkpoints that lack it
        for field in _MODEL_FIELDS:
            if type(model[field]) is not int or model[field] < 1:
                raise ValueError(f"model_config.{field} is {model[field]!r}")
        if model["n_embd"] % model["n_head"]:
            raise ValueError("model_config.n_embd is no multiple of n_head")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"cannot read {meta_path}: {_first_line(error)}") from None
    return meta


class _MissingTorch(ValueError):
    """torch is needed and not installed."""


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise _MissingTorch(
            "a .pt file needs torch: pip install torch, or give the checkpoint as .safetensors or .npz"
        ) from None
    return torch


def _read_pt(path: epath.Path) -> dict[str, np.ndarray]:
    torch = _torch()
    with path.open("rb") as file:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    return {name: _from_tensor(torch, tensor) for name, tensor in tensors.items()}


def _from_tensor(torch: Any, tensor: Any) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:  # numpy has none of its own
        return tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _to_tensor(torch: Any, array: np.ndarray) -> Any:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _write_pt(arrays: Mapping[str, np.ndarray]) -> bytes:
    torch = _torch()
    buffer = io.BytesIO()
    torch.save({name: _to_tensor(torch, array) for name, array in arrays.items()}, buffer)
    return buffer.getbuffer()


def _read_safetensors(path: epath.Path) -> dict[str, np.ndarray]:
    from safetensors import safe_open

    with safe_open(os.fspath(path), "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)


def _read_npz(path: epath.Path) -> dict[str, np.ndarray]:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        # numpy writes bfloat16 as two bytes without a type.
        return {
            name: array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array
            for name, array in arrays.items()
        }


def _write_npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getbuffer()


_READERS = {".pt": _read_pt, ".safetensors": _read_safetensors, ".npz": _read_npz}
_WRITERS = {".pt": _write_pt, ".safetensors": huggingface.safetensors_bytes, ".npz": _write_npz}


def _format_of(path: epath.Path, table: Mapping[str, Any]) -> Any:
    if path.suffix not in table:
        raise ValueError(f"{path} must end in one of {', '.join(table)}")
    return table[path.suffix]


def _meta_path(path: epath.Path) -> epath.Path:
    if not path.name.startswith("model_"):
        raise ValueError(f"{path.name} must be named model_<step>{path.suffix}, as in nanochat")
    return path.with_name(f"meta_{path.stem.removeprefix('model_')}.json")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    return f"{type(error).__name__}: {text}" if isinstance(error, KeyError) or not text else text


# ---- nanochat's tokenizer ------------------------------------------------------------------------


class _EncodingState:
    """Stands in for tiktoken's Encoding while a pickle is read: keeps the state, runs nothing."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _TokenizerUnpickler(pickle.Unpickler):
    """Reads a pickled tiktoken Encoding; a pickle that refers to anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("tiktoken.core", "Encoding"):
            return _EncodingState
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside")


def read_tokenizer(path: epath.PathLike) -> BpeTokenizer:
    """nanochat's tokenizer.pkl; ValueError with one line where it is anything else."""
    try:
        with epath.Path(path).open("rb") as file:
            encoding = _TokenizerUnpickler(file).load()
        state = encoding.state
        ranks, special = state["mergeable_ranks"], state["special_tokens"]
        if not all(type(token) is bytes and type(rank) is int for token, rank in ranks.items()):
            raise ValueError("its ranks are not a table from bytes to int")
        if not all(type(name) is str and type(i) is int for name, i in special.items()):
            raise ValueError("its special tokens are not a table from str to int")
        unknown = sorted(special.keys() - set(SPECIAL_TOKENS))
        if unknown:
            raise ValueError(f"it has a special token {unknown[0]!r} that nanochat has not")
        return BpeTokenizer(state["pat_str"], ranks, special)
    except Exception as error:  # noqa: BLE001 (a damaged pickle can raise anything)
        raise ValueError(f"{path} is not nanochat's tokenizer: {_first_line(error)}") from None


def find_tokenizer(checkpoint: epath.PathLike) -> epath.Path | None:
    """The tokenizer.pkl beside a checkpoint, or in `tokenizer` beside it or up to two above it.

    nanochat keeps BASE/tokenizer/tokenizer.pkl and BASE/base_checkpoints/d24/model_005568.pt.
    """
    folder = epath.Path(checkpoint).expanduser().parent
    near = [
        folder,
        *(parent / "tokenizer" for parent in (folder, folder.parent, folder.parent.parent)),
    ]
    return next((d / "tokenizer.pkl" for d in near if (d / "tokenizer.pkl").exists()), None)


# ---- Import --------------------------------------------------------------------------------------


class Source(NamedTuple):
    """A checkpoint that becomes a run."""

    path: str
    format: str  # the origin of the config's values
    names: Names
    values: dict[str, Any]  # config keys that the checkpoint decides
    arrays: dict[str, np.ndarray]
    encoder: Tokenizer | None
    step: int


def import_run(config: FrozenConfigDict, argv: list[str]) -> None:
    """Makes a run from the checkpoint that `config` names; argv is what `config` was read from."""
    run = files.run_directory(config)
    if files.names(run / "checkpoints"):
        raise ValueError(f"{run} already holds checkpoints; choose another run_name")
    source = _nanochat_source(config) if config.from_nanochat else _huggingface_source(config)
    values = source.values
    _check_command_line(config, values, f"the checkpoint {source.path}")
    if config.origin["embedding_dtype"] != pyconfig.COMMAND_LINE:
        values["embedding_dtype"] = _table_dtype(source)
    encoder = source.encoder
    if encoder and encoder.vocab_size != values["vocab_size"]:
        raise ValueError(
            f"the tokenizer of {source.path} has {encoder.vocab_size} tokens but the model has"
            f" {values['vocab_size']}"
        )
    if isinstance(encoder, BpeTokenizer):
        values["tokenizer_type"] = "bpe"
        values["tokenizer_path"] = _tokenizer_place(config, run, encoder)
    elif encoder:
        values["tokenizer_type"] = "huggingface"
        values["tokenizer_path"] = str(run / FILE_NAME)
    config = _resolve(config, argv, source.format, values)
    params = to_params(source.arrays, config, source.names)
    state = _fresh_state(params, config, source.step)
    del params

    run.mkdir(parents=True, exist_ok=True)
    if isinstance(encoder, BpeTokenizer):
        encoder.save(config.tokenizer_path)
    elif encoder:
        text = (epath.Path(source.path) / FILE_NAME).read_bytes()
        files.write_whole(run / FILE_NAME, text)
    pyconfig.save(config, run / "config.yml")
    fingerprint = encoder.fingerprint() if encoder else ""
    with Checkpointer(config, run, tokenizer_fingerprint=fingerprint) as checkpointer:
        start = {"data": None, "metrics": None, "evaluated_step": None}  # of a run without a past
        checkpointer.save(int(state.step), state, {**start, "imported_from": source.path})
    print(f"wrote {run}, step {state.step}, from {source.path}")
    if not encoder:
        print("found no tokenizer near it: set tokenizer_path to this model's tokenizer")
    print(f"in place of configs/base.yml it needs {run / 'config.yml'}")


def _nanochat_source(config: FrozenConfigDict) -> Source:
    path = config.from_nanochat
    meta = read_meta(path)
    arrays = _without_prefix(read_tensors(path))
    values = _found_values(meta["model_config"], arrays)
    pickled = find_tokenizer(path)
    encoder = read_tokenizer(pickled) if pickled else None
    return Source(path, "nanochat", NANOCHAT, values, arrays, encoder, _step(meta, path))


def _huggingface_source(config: FrozenConfigDict) -> Source:
    folder = epath.Path(config.from_huggingface).expanduser()
    found = huggingface.read_folder(folder)
    arrays: dict[str, np.ndarray] = {}
    for file in found.weights:
        arrays |= read_tensors(file)
    encoder: Tokenizer | None = None
    if (folder / FILE_NAME).exists():
        # Of another kind than ours it is taken as it is.
        encoder = huggingface.read_tokenizer(folder) or load_tokenizer_from(
            "huggingface", folder / FILE_NAME
        )
    return Source(
        str(folder), "huggingface", HUGGINGFACE, found.values, arrays, encoder, found.step
    )


def _found_values(model: Mapping, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The config keys that a checkpoint decides: what its metadata says and its tensors show."""

    def size(name: str, axis: int, otherwise: int) -> int:
        found = [a.shape for key, a in arrays.items() if key.endswith(name) and a.ndim == 2]
        return found[0][axis] if found else otherwise

    return {
        **{ours: model[theirs] for theirs, ours in _MODEL_FIELDS.items()},
        "head_dim": model["n_embd"] // model["n_head"],
        "window_pattern": model["window_pattern"].upper(),
        "mlp_dim": size("mlp.c_fc.weight", 0, 4 * model["n_embd"]),
        "value_embed_gate_channels": size("attn.ve_gate.weight", 1, 0),
        "smear_gate_channels": size("smear_gate.weight", 1, 0),
        "use_backout": any(name.endswith("backout_lambda") for name in arrays),
    }


def _check_command_line(config: FrozenConfigDict, values: Mapping, where: str) -> None:
    """ValueError where the command line contradicts what the checkpoint is."""
    for key, found in values.items():
        given = config[key]
        origin = "model" if key == "num_decoder_layers" else key
        said = pyconfig.COMMAND_LINE in (config.origin[key], config.origin[origin])
        if said and given != found:
            raise ValueError(f"{key} is {given} by the command line but {found} in {where}")


def _resolve(
    config: FrozenConfigDict, argv: list[str], origin: str, values: Mapping
) -> FrozenConfigDict:
    """The config of the new run: argv's, with the checkpoint's values in it, from `origin`."""
    words = [f"{key}={str(v).lower() if type(v) is bool else v}" for key, v in values.items()]
    words.append(f"run_name={config.run_name}")  # also where it follows from the model's name
    if config.origin["model"] == "base":
        words.append(f"model=d{values['num_decoder_layers']}")
    resolved = pyconfig.initialize([*argv, *words])
    found = {k: v if isinstance(resolved[k], str) else resolved[k] for k, v in values.items()}
    return pyconfig.replace(resolved, origin, **found, from_nanochat=None, from_huggingface=None)


def _table_dtype(source: Source) -> str:
    """The embedding_dtype that holds the checkpoint's tables exactly."""
    names = (source.names.token_embed, source.names.value_embeds)
    patterns = [re.escape(name).replace(re.escape("{i}"), r"\d+") for name in names]
    dtypes = {
        str(array.dtype)
        for key, array in source.arrays.items()
        if any(re.fullmatch(pattern, key) for pattern in patterns)
    }
    return "bfloat16" if dtypes == {"bfloat16"} else "float32"


def _tokenizer_place(config: FrozenConfigDict, run: epath.Path, encoder: BpeTokenizer) -> str:
    """Where the imported tokenizer goes: into the run, or where the command line says."""
    if config.origin["tokenizer_path"] != pyconfig.COMMAND_LINE:
        return str(run / "tokenizer")
    place = epath.Path(config.tokenizer_path).expanduser()
    if (place / FILE_NAME).exists():
        there = load_tokenizer_from("bpe", place)
        if there.fingerprint() != encoder.fingerprint():
            raise ValueError(f"tokenizer_path={place} holds another tokenizer; choose another path")
    return str(place)


def _step(meta: Mapping, source: str) -> int:
    step = meta.get("step")
    if step is None:
        digits = re.search(r"\d+", epath.Path(source).stem)
        step = int(digits[0]) if digits else 0
    if type(step) is not int or not 0 <= step < 2**31:
        raise ValueError(f"the metadata of {source} has step {step!r}")
    return step


def _fresh_state(params: dict, config: FrozenConfigDict, step: int) -> TrainState:
    """The train state of a run that starts from these parameters, on one device."""
    tables = ("token_embed", "value_embeds")
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(
            _cast(leaf, config.embedding_dtype if path[0].key in tables else "float32", path)
        ),
        params,
    )
    optimizer = groups.make_optimizer(config, dtype=jnp.float32)
    return TrainState(jnp.asarray(step, jnp.int32), params, jax.jit(optimizer.init)(params))


def _cast(array: np.ndarray, dtype: str, path: tuple) -> np.ndarray:
    """The array in another dtype; ValueError where a value would change."""
    cast = array.astype(dtype)
    if cast.astype(array.dtype).tobytes() != array.tobytes():
        name = "/".join(key.key for key in path)
        raise ValueError(
            f"{name} is {array.dtype} in the checkpoint and would lose digits as {dtype}; "
            "leave embedding_dtype out"
        )
    return cast


# ---- Export --------------------------------------------------------------------------------------

# What nanochat's code fixes and a config here may vary.
_NANOCHAT_FIXED = {
    "rope_theta": 100000.0,
    "qk_norm_scale": 1.2,
    "norm_epsilon": 1.1920929e-07,
    "value_embed_gate_channels": 12,
    "value_embed_gate_range": 3.0,
    "smear_gate_channels": 24,
    "use_backout": True,
    "logits_soft_cap": 15.0,
}


def export_run(config: FrozenConfigDict) -> None:
    """Writes a checkpoint of the run as the nanochat checkpoint config.to_nanochat."""
    target = epath.Path(config.to_nanochat).expanduser()
    _format_of(target, _WRITERS)
    _meta_path(target)
    run = files.run_directory(config)
    saved, params, step = _read_run(config, _check_expressible)
    meta = {
        "step": step,
        "model_config": {
            **{theirs: saved[ours] for theirs, ours in _MODEL_FIELDS.items()},
            "window_pattern": saved.window_pattern,
        },
    }
    write_nanochat(target, params_to_nanochat(params, saved), meta)
    print(f"wrote {target}, step {step}, from {run}")


def export_folder(config: FrozenConfigDict) -> None:
    """Writes a checkpoint of the run, with its tokenizer, as the folder config.to_huggingface."""
    target = huggingface.check_target(config.to_huggingface, config.convert_overwrite)
    run = files.run_directory(config)
    saved, params, step = _read_run(config)
    encoder = load_tokenizer(saved)
    tensors = from_params(params, saved, HUGGINGFACE)
    huggingface.write_folder(
        target, saved, step, tensors, encoder, replace=config.convert_overwrite
    )
    print(f"wrote {target}, step {step}, from {run}")


def _read_run(
    config: FrozenConfigDict, check: Callable[[FrozenConfigDict], None] = lambda saved: None
) -> tuple[FrozenConfigDict, dict, int]:
    """(config, parameters, step) of a run's newest checkpoint, or that of config.step.

    The run's own config is checked before anything large is read; tokenizer keys of the command
    line, which may have moved, count.
    """
    run = files.run_directory(config)
    with Checkpointer(config, run, writer=False) as checkpointer:
        saved = FrozenConfigDict(checkpointer.read_extra(config.step)["run"]["config"])
    keys = (*scaling.Shape._fields, "max_target_length", "window_pattern")
    _check_command_line(config, {key: saved[key] for key in keys}, f"the run {run}")
    check(saved)
    with Checkpointer(saved, run, writer=False) as checkpointer:
        params, extra = checkpointer.restore_params_only(step=config.step)
    moved = ("tokenizer_type", "tokenizer_path", "tokenizer_threads")
    moved = {key: config[key] for key in moved if config.origin[key] == pyconfig.COMMAND_LINE}
    # Keys that are younger than the run have today's values.
    whole = FrozenConfigDict({**config.to_dict(), **saved.to_dict(), **moved})
    return whole, params, extra["run"]["step"]


def _check_expressible(config: FrozenConfigDict) -> None:
    """ValueError where nanochat's code would compute something else with these parameters."""
    expected = {
        **_NANOCHAT_FIXED,
        "mlp_dim": 4 * config.emb_dim,
        "head_dim": config.emb_dim // config.num_query_heads,
    }
    for key, value in expected.items():
        if config[key] != value:
            raise ValueError(
                f"nanochat cannot run this model: {key} is {config[key]}, there {value}"
            )
    windows = scaling.window_sizes(
        config.num_decoder_layers, config.window_pattern, config.max_target_length, 0.25, 128
    )
    if pyconfig.windows_of(config) != windows:
        raise ValueError("nanochat cannot run this model: its short windows have another length")


# ---- Command -------------------------------------------------------------------------------------


def main(config: FrozenConfigDict, argv: list[str]) -> None:
    """Converts as the config says; argv is what it was read from."""
    jax.config.update("jax_platforms", "cpu")  # nothing here is worth taking an accelerator for
    if config.from_nanochat or config.from_huggingface:
        import_run(config, argv)
    elif config.to_nanochat:
        export_run(config)
    elif config.to_huggingface:
        export_folder(config)
    else:
        directions = ("from_nanochat", "to_nanochat", "from_huggingface", "to_huggingface")
        raise ValueError(f"give one of {', '.join(f'{name}=PATH' for name in directions)}")


if __name__ == "__main__":
    sys.exit(pyconfig.launch(lambda config: main(config, sys.argv[1:])))

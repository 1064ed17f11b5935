"""nanochat's checkpoints: tensors, metadata and tokenizer.

A checkpoint is `model_<step>.pt`, or the same tensors in `.safetensors` or `.npz`, next to
`meta_<step>.json`. Its tokenizer is a `tokenizer.pkl` nearby. Reading executes no code in it.
nanochat's code has constants that a checkpoint does not hold and that have changed: ERAS has them.

Source: nanochat/checkpoint_manager.py@92d63d4, and nanochat/gpt.py from 3a5e0bc to 92d63d4.
"""

import json
import pickle
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from ml_collections import FrozenConfigDict

from MaxNano import pyconfig, scaling
from MaxNano.interop import parameters
from MaxNano.interop.parameters import TensorNames
from MaxNano.interop.tensor_files import check_format, first_line, write_tensors
from MaxNano.storage import files
from MaxNano.tokenization.bpe import BpeTokenizer
from MaxNano.tokenization.tokenizer import SPECIAL_TOKENS

NAMES = TensorNames(
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
    vocab_multiple=64,
    lambdas_are_optional=True,
)

# Field of model_config in the metadata -> config key.
MODEL_FIELDS = {
    "sequence_len": "max_target_length",
    "vocab_size": "vocab_size",
    "n_layer": "num_decoder_layers",
    "n_head": "num_query_heads",
    "n_kv_head": "num_kv_heads",
    "n_embd": "emb_dim",
}


class Era(NamedTuple):
    """A period of nanochat's code: the tensors by which it is recognized, and its constants."""

    dates: str
    parts: tuple[int, int, bool]  # channels of the value gate and of the smear gate; has backout
    constants: dict[str, Any]  # config key -> value
    either: dict[str, dict[Any, str]] = {}  # config key -> value -> the dates of its code


_HALF = {"short_window_fraction": 0.5, "short_window_multiple": 1}
_FIRST = {"rope_theta": 10000.0, "qk_norm_scale": 1.0, **_HALF}
ERAS = (
    # Without value embeddings; since 2026-01-11 with residual and x0 scalars and windows.
    Era("2025-10-13 to 2026-01-16", (0, 0, False), {**_FIRST, "logits_soft_cap": 15.0}),
    Era(
        "2026-01-16 to 2026-03-09",
        (32, 0, False),
        {**_FIRST, "value_embed_gate_range": 2.0},
        {"logits_soft_cap": {15.0: "until 2026-03-02", 20.0: "since then"}},
    ),
    Era(
        "2026-03-09 to 2026-03-14",
        (12, 0, False),
        {
            "rope_theta": 100000.0,
            "qk_norm_scale": 1.15,
            "value_embed_gate_range": 3.0,
            "short_window_fraction": 1 / 3,
            "short_window_multiple": 128,
            "logits_soft_cap": 15.0,
        },
    ),
    Era(
        "2026-03-14 or later",
        (12, 24, True),
        {
            "rope_theta": 100000.0,
            "qk_norm_scale": 1.2,
            "value_embed_gate_range": 3.0,
            "short_window_fraction": 0.25,
            "short_window_multiple": 128,
            "logits_soft_cap": 15.0,
        },
    ),
)
PARTS = ("value_embed_gate_channels", "smear_gate_channels", "use_backout")
NORM_EPSILON = 1.1920929e-07  # of every era: float32's machine epsilon


# ---- Parameters ---------------------------------------------------------------------------------


def to_params(arrays: Mapping[str, np.ndarray], config: FrozenConfigDict) -> dict:
    """The parameter tree of nanochat's tensors.

    Residual and x0 scalars missing from old checkpoints get the values that nanochat gives them.
    Raises ValueError as parameters.to_params does.
    """
    return parameters.to_params(without_prefix(arrays), config, NAMES)


def from_params(params: Mapping, config: FrozenConfigDict) -> dict[str, np.ndarray]:
    """nanochat's tensors of a parameter tree. Raises ValueError as parameters.from_params does."""
    return parameters.from_params(params, config, NAMES)


def without_prefix(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors without the prefix that torch.compile adds to the names of a wrapped model."""
    return {name.removeprefix("_orig_mod."): array for name, array in arrays.items()}


def era_of(arrays: Mapping[str, np.ndarray]) -> Era:
    """The era of nanochat whose model has these tensors. Raises ValueError if there is none."""
    arrays = without_prefix(arrays)
    gates = {a.shape[-1] for name, a in arrays.items() if name.endswith("attn.ve_gate.weight")}
    smear = arrays[NAMES.smear_gate].shape[-1] if NAMES.smear_gate in arrays else 0
    parts = (max(gates, default=0), smear, NAMES.backout_lambda in arrays)
    for era in ERAS:
        if era.parts == parts:
            return era
    has = ", ".join(f"{key}={value}" for key, value in zip(PARTS, parts, strict=True))
    raise ValueError(f"the tensors are those of no version of nanochat: {has}")


def config_values(
    meta: Mapping, arrays: Mapping[str, np.ndarray], given: Mapping[str, Any]
) -> dict[str, Any]:
    """The config keys that a checkpoint decides: by its metadata, and by its era's constants.

    given: values by config key; used for what the checkpoint leaves open. Raises
    ValueError for tensors of no era, and if such a key is not given or has a value of no era.
    """
    model, era = meta["model_config"], era_of(arrays)
    values = {key: model[field] for field, key in MODEL_FIELDS.items()}
    values |= dict(zip(PARTS, era.parts, strict=True)) | era.constants
    values |= {
        "head_dim": model["n_embd"] // model["n_head"],
        "mlp_dim": 4 * model["n_embd"],
        "norm_epsilon": NORM_EPSILON,
    }
    if era.constants["short_window_fraction"] == 0.5:  # rounded down
        length = model["sequence_len"]
        values["short_window_fraction"] = length // 2 / length
    either = dict(era.either)
    if "window_pattern" in model:
        values["window_pattern"] = model["window_pattern"].upper()
    elif NAMES.x0_lambdas in without_prefix(arrays):
        # Mid-training left the pattern out: it ran with SSSL, what followed it with L.
        either["window_pattern"] = {"SSSL": "if mid-trained", "L": "if trained after that"}
    else:
        values["window_pattern"] = "L"  # there were no windows
    for key, choices in either.items():
        if given.get(key) not in choices:
            options = " or ".join(f"{key}={value} {dates}" for value, dates in choices.items())
            raise ValueError(
                f"this checkpoint of nanochat ({era.dates}) does not say {key}: pass {options}"
            )
        values[key] = given[key]
    return values


def batch_values(meta: Mapping) -> dict[str, int]:
    """The batch size with which a checkpoint was trained, by config key; {} if it is not recorded.

    nanochat's fine-tuning inherits it from the metadata of pretraining. Those of 2025 have it among
    the arguments only.
    """
    arguments = meta.get("user_config")
    sources = (meta, arguments if isinstance(arguments, Mapping) else {})
    length = meta["model_config"]["sequence_len"]
    for source in sources:
        tokens = source.get("total_batch_size")
        if type(tokens) is int and tokens > 0 and tokens % length == 0:
            return {"global_batch_tokens": tokens}
    return {}


def check_exportable(config: FrozenConfigDict) -> None:
    """Raises ValueError if nanochat's code would compute something else with these parameters."""
    latest = ERAS[-1]
    known = {"vocab_multiple", *MODEL_FIELDS.values()}
    implied = {key: value for key, value in scaling.ARCHITECTURE_KEYS.items() if key not in known}
    constants = {**latest.constants, **dict(zip(PARTS, latest.parts, strict=True))}
    fraction, multiple = (constants.pop(key) for key in _HALF)
    expected = {
        **implied,
        **constants,
        "norm_epsilon": NORM_EPSILON,
        "mlp_dim": 4 * config.emb_dim,
        "head_dim": config.emb_dim // config.num_query_heads,
    }
    for key, value in expected.items():
        if config[key] != value:
            raise ValueError(
                f"nanochat cannot run this model: {key} is {config[key]}, in nanochat {value}"
            )
    windows = scaling.window_sizes(
        config.num_decoder_layers,
        config.window_pattern,
        config.max_target_length,
        fraction,
        multiple,
    )
    if pyconfig.windows_of(config) != windows:
        raise ValueError("nanochat cannot run this model: its short windows have another length")


# ---- Files --------------------------------------------------------------------------------------


def check_target(path: epath.PathLike) -> epath.Path:
    """The path of a checkpoint to write. Raises ValueError for a name that nanochat does not use."""
    path = epath.Path(path).expanduser()
    check_format(path)
    _meta_path(path)
    return path


def write_checkpoint(
    path: epath.PathLike, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]
) -> None:
    """Writes the tensors and, next to them, meta_<step>.json."""
    path = check_target(path)
    # The model last: nanochat takes a checkpoint for complete when its model exists.
    files.write_whole(_meta_path(path), json.dumps(meta, indent=2))
    write_tensors(path, arrays)


def meta_of(config: FrozenConfigDict, step: int) -> dict[str, Any]:
    """The metadata of a checkpoint of `config`'s model."""
    model = {field: config[key] for field, key in MODEL_FIELDS.items()}
    return {
        "step": step,
        "model_config": {**model, "window_pattern": config.window_pattern},
        "max_seq_len": config.max_target_length,
        "total_batch_size": config.global_batch_tokens,
    }


def read_meta(path: epath.PathLike) -> dict[str, Any]:
    """The metadata of a model file. Raises ValueError if `model_config` is missing or damaged."""
    path = epath.Path(path).expanduser()
    if path.is_dir():
        models = [name for name in files.names(path) if name.startswith("model_")]
        example = models[-1] if models else "model_<step>.pt"
        raise ValueError(f"{path} is a folder; name its model file, {path / example}")
    meta_path = _meta_path(path)
    if not meta_path.exists():
        raise ValueError(
            f"there is no {meta_path}, which describes the model; copy it from where {path.name} is from"
        )
    try:
        meta = json.loads(meta_path.read_text())
        model = meta["model_config"]
        for field in MODEL_FIELDS:
            if type(model[field]) is not int or model[field] < 1:
                raise ValueError(f"model_config.{field} is {model[field]!r}")
        if model["n_embd"] % model["n_head"]:
            raise ValueError("model_config.n_embd is not a multiple of n_head")
        if not re.fullmatch("[SLsl]+", str(model.get("window_pattern", "L"))):
            raise ValueError(f"model_config.window_pattern is {model['window_pattern']!r}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"cannot read {meta_path}: {first_line(error)}") from None
    return meta


def step_of(meta: Mapping, path: epath.PathLike) -> int:
    """The step in the metadata, or else in the file's name. Raises ValueError for a wrong value."""
    step = meta.get("step")
    if step is None:
        digits = re.search(r"\d+", epath.Path(path).stem)
        step = int(digits[0]) if digits else 0
    if type(step) is not int or not 0 <= step < 2**31:
        raise ValueError(f"the metadata of {path} has step {step!r}")
    return step


def _meta_path(path: epath.Path) -> epath.Path:
    if not path.name.startswith("model_"):
        raise ValueError(f"{path.name} must be named model_<step>{path.suffix}, as in nanochat")
    return path.with_name(f"meta_{path.stem.removeprefix('model_')}.json")


# ---- Tokenizer ----------------------------------------------------------------------------------


class _EncodingState:
    """Replaces tiktoken's Encoding in a pickle: keeps the state, executes nothing."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _TokenizerUnpickler(pickle.Unpickler):
    """Reads a pickled tiktoken Encoding and refuses a pickle that refers to anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("tiktoken.core", "Encoding"):
            return _EncodingState
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside")


def read_tokenizer(path: epath.PathLike) -> BpeTokenizer:
    """nanochat's tokenizer.pkl. Raises ValueError with one line for any other file."""
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
            raise ValueError(f"it has a special token {unknown[0]!r}, which nanochat does not have")
        return BpeTokenizer(state["pat_str"], ranks, special)
    except Exception as error:  # noqa: BLE001 (a damaged pickle can raise anything)
        raise ValueError(f"{path} is not nanochat's tokenizer: {first_line(error)}") from None


def find_tokenizer(checkpoint: epath.PathLike) -> epath.Path | None:
    """The tokenizer.pkl next to a checkpoint, or in `tokenizer` next to it or up to two levels up.

    nanochat has BASE/tokenizer/tokenizer.pkl and BASE/base_checkpoints/d24/model_005568.pt.
    """
    folder = epath.Path(checkpoint).expanduser().parent
    parents = (folder, folder.parent, folder.parent.parent)
    paths = [d / "tokenizer.pkl" for d in (folder, *(parent / "tokenizer" for parent in parents))]
    return next((path for path in paths if path.exists()), None)

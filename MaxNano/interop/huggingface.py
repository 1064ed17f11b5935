"""Model folders of Hugging Face transformers: weights, config, tokenizer and the model's code.

    write_folder(folder, config, step, tensors, tokenizer, replace=False)
    content = read_folder(folder)

All files are JSON, safetensors or text, and reading executes nothing. The code that is exported
with the weights is in interop/templates/.
Source: https://huggingface.co/docs/transformers/custom_models, and the file formats of tokenizers
and safetensors.
"""

import contextlib
import itertools
import json
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from ml_collections import FrozenConfigDict

from MaxNano import scaling
from MaxNano.inference import dialogue
from MaxNano.interop import huggingface_nanochat
from MaxNano.interop.parameters import TensorNames
from MaxNano.interop.tensor_files import safetensors_bytes
from MaxNano.storage import files
from MaxNano.tokenization.bpe import BpeTokenizer
from MaxNano.tokenization.tokenizer import SPECIAL_TOKENS, Tokenizer, byte_characters

MODEL_TYPE = "maxnano"
SHARD_BYTES = 5 * 10**9  # larger models become several files
TEMPLATES = Path(__file__).resolve().parent / "templates"
CODE = ("configuration_maxnano.py", "modeling_maxnano.py")
# Versions in which the exported code was tested: the last 4.x, and one of each minor version of 5.
# tests/run_transformers.sh runs the first and the last, with this torch; the folder's README.md
# names all.
TESTED = tuple(
    """
    4.57.6 5.0.0 5.1.0 5.2.0 5.3.0 5.4.0 5.5.4 5.6.2 5.7.0 5.8.1 5.9.0 5.10.4 5.11.0 5.12.1 5.13.1
    5.14.1 5.15.1 5.16.1 5.17.0 5.18.0 5.19.0 5.20.2 5.21.1 5.22.2 5.23.0 5.24.0
    """.split()
)
TESTED_TORCH = "2.13.0"

NAMES = TensorNames(
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

# Fields of config.json whose name differs from the config key.
RENAMED = {
    "emb_dim": "hidden_size",
    "mlp_dim": "intermediate_size",
    "num_decoder_layers": "num_hidden_layers",
    "num_query_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "max_target_length": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "value_embed_gate_channels": "value_gate_channels",
    "value_embed_gate_range": "value_gate_range",
}
# Architecture keys that templates/ does not implement yet: a model is exported only if they have
# the value that older checkpoints imply.
UNSUPPORTED: frozenset[str] = frozenset()


# ---- The folder ---------------------------------------------------------------------------------


class FolderContent(NamedTuple):
    """The content of a model folder."""

    values: dict[str, Any]  # config keys that the model decides
    step: int
    weights: list[epath.Path]  # safetensors files that together have all tensors
    names: TensorNames = NAMES
    version: str = "a MaxNano model of transformers"


def fields() -> dict[str, str]:
    """Field of config.json -> config key, for every key that defines the model."""
    keys = [key for key in scaling.ARCHITECTURE_KEYS if key not in UNSUPPORTED]
    return {RENAMED.get(key, key): key for key in (*keys, *scaling.CONTEXT_KEYS)}


def check_exportable(config: FrozenConfigDict) -> None:
    """Raises ValueError if the exported code would compute something else."""
    for key in UNSUPPORTED:
        if config[key] != scaling.ARCHITECTURE_KEYS[key]:
            raise ValueError(f"cannot export {key}={config[key]} to transformers")


def check_target(folder: epath.PathLike, replace: bool) -> epath.Path:
    """The folder to write. Raises ValueError if it has content that must not be overwritten."""
    folder = epath.Path(folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not _is_model(folder):
            raise ValueError(f"{folder} exists and is not a MaxNano model; choose another path")
        if not replace:
            raise ValueError(
                f"{folder} already has a model; choose another path, or set convert_overwrite=true"
            )
    return folder


def write_folder(
    folder: epath.PathLike,
    config: FrozenConfigDict,
    step: int,
    tensors: Mapping[str, np.ndarray],
    tokenizer: Tokenizer,
    *,
    replace: bool = False,
) -> None:
    """Writes the model of `config`, completely or not at all. tensors: by the names of NAMES.

    Raises ValueError as check_target does, and for a tokenizer without a tokenizer.json.
    """
    folder = check_target(folder, replace)
    names = _special_names(config, tokenizer)
    texts = {
        "config.json": _to_json(config_json(config, step)),
        "generation_config.json": _to_json(_generation_json(config, tokenizer)),
        "tokenizer.json": _to_json(tokenizer_json(config, tokenizer)),
        "tokenizer_config.json": _to_json(_tokenizer_config(config, names)),
        "README.md": _readme(config, step),
        **{name: (TEMPLATES / name).read_text(encoding="utf-8") for name in CODE},
    }
    with files.replace_folder(folder, last="config.json") as new:  # readers need it
        for name, text in texts.items():
            (new / name).write_text(text, encoding="utf-8")
        _write_tensors(new, tensors)


def read_folder(folder: epath.PathLike) -> FolderContent:
    """The content of a folder that write_folder wrote, or that transformers saved from one, or of
    its NanoChatForCausalLM.

    Raises ValueError for any other folder.
    """
    folder = epath.Path(folder).expanduser()
    content = _read_json(folder / "config.json")
    if content.get("model_type") == huggingface_nanochat.MODEL_TYPE:
        return _read_nanochat(folder, content)
    if content.get("model_type") != MODEL_TYPE:
        raise ValueError(
            f"{folder / 'config.json'} has model_type {content.get('model_type')!r}, "
            f"not {MODEL_TYPE!r} or {huggingface_nanochat.MODEL_TYPE!r}"
        )
    # A field that is missing because the folder is older than its key has the implied value.
    implied = {**scaling.CONTEXT_KEYS, **scaling.ARCHITECTURE_KEYS}
    values = {key: content.get(field, implied[key]) for field, key in fields().items()}
    missing = [field for field, key in fields().items() if values[key] is None]
    missing += sorted({"chat_turns", "step"} - content.keys())
    if missing:
        raise ValueError(f"{folder / 'config.json'} does not have {missing[0]!r}")
    if type(content["step"]) is not int or not 0 <= content["step"] < 2**31:
        raise ValueError(f"{folder / 'config.json'} has step {content['step']!r}")
    values["chat_turns"] = content["chat_turns"]
    return FolderContent(values, content["step"], _weight_files(folder))


def _read_nanochat(folder: epath.Path, content: Mapping[str, Any]) -> FolderContent:
    try:
        values = huggingface_nanochat.config_values(content)
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"cannot import {folder / 'config.json'}: {error}") from None
    has_template = (folder / "chat_template.jinja").exists() or "chat_template" in (
        _read_json(folder / "tokenizer_config.json")
        if (folder / "tokenizer_config.json").exists()
        else {}
    )
    values["chat_turns"] = has_template
    version = "transformers' NanoChatForCausalLM"
    return FolderContent(values, 0, _weight_files(folder), huggingface_nanochat.NAMES, version)


def _weight_files(folder: epath.Path) -> list[epath.Path]:
    """The safetensors files of a folder. Raises ValueError for an index that names other files."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        names = sorted(set(_read_json(index).get("weight_map", {}).values()))
        if not names or not all(
            isinstance(name, str) and Path(name).name == name for name in names
        ):
            raise ValueError(f"{index} does not name files of this folder")
    return [folder / name for name in names]


def _is_model(folder: epath.Path) -> bool:
    with contextlib.suppress(ValueError):
        return (
            folder.is_dir() and _read_json(folder / "config.json").get("model_type") == MODEL_TYPE
        )
    return False


def _to_json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _read_json(path: epath.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no {path}; name the folder of a model") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"cannot read {path}: it holds no JSON object")
    return content


def config_json(config: FrozenConfigDict, step: int) -> dict[str, Any]:
    """config.json: the architecture in the names of transformers, and the files of its code."""
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["MaxNanoForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_maxnano.MaxNanoConfig",
            "AutoModel": "modeling_maxnano.MaxNanoModel",
            "AutoModelForCausalLM": "modeling_maxnano.MaxNanoForCausalLM",
        },
        "dtype": "float32",
        **{field: config[key] for field, key in fields().items()},
        "chat_turns": dialogue.in_turns(config),
        "step": step,
    }


def _readme(config: FrozenConfigDict, step: int) -> str:
    """README.md: how to load the model, and what was tested."""
    template = string.Template((TEMPLATES / "README.md").read_text(encoding="utf-8"))
    return template.substitute(
        layers=config.num_decoder_layers,
        width=config.emb_dim,
        context=config.max_target_length,
        vocab=config.vocab_size,
        step=step,
        versions=f"{', '.join(TESTED[:-1])} and {TESTED[-1]}",
        torch=TESTED_TORCH,
    )


def _generation_json(config: FrozenConfigDict, tokenizer: Tokenizer) -> dict[str, Any]:
    special = tokenizer.special
    draws = {"temperature": config.temperature, "top_k": config.top_k} if config.temperature else {}
    return {
        "bos_token_id": special.bos,
        # <|bos|> begins the next document.
        "eos_token_id": [special.assistant_end, special.bos]
        if dialogue.in_turns(config)
        else special.bos,
        "pad_token_id": special.bos,
        "max_new_tokens": config.max_new_tokens,
        "do_sample": bool(draws),
        **draws,
    }


# ---- Tensors ------------------------------------------------------------------------------------


def _write_tensors(folder: epath.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes model.safetensors, or several files and the index of the tensors in each."""
    shards = _shards({name: array.nbytes for name, array in tensors.items()})
    file_names = ["model.safetensors"]
    if len(shards) > 1:
        file_names = [
            f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)
        ]
        weight_map = {
            name: file for file, names in zip(file_names, shards, strict=True) for name in names
        }
        size = sum(array.nbytes for array in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(_to_json(index))
    for file, names in zip(file_names, shards, strict=True):
        content = safetensors_bytes({name: tensors[name] for name in names}, {"format": "pt"})
        (folder / file).write_bytes(content)


def _shards(sizes: Mapping[str, int]) -> list[list[str]]:
    """The names in groups of at most SHARD_BYTES, in order; a larger tensor is a group of its own."""
    shards: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= size
    return shards


# ---- Tokenizer ----------------------------------------------------------------------------------


def tokenizer_json(config: FrozenConfigDict, tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer.json of the config's tokenizer; by default it adds <|bos|> before every text.

    Raises ValueError for a SentencePiece model, whose normalization the format cannot express.
    """
    if isinstance(tokenizer, BpeTokenizer):
        content = bpe_json(tokenizer)
    elif config.tokenizer_type == "huggingface":
        content = _extended_json(config, tokenizer)
    else:
        raise ValueError(
            f"tokenizer_type={config.tokenizer_type} has no tokenizer.json: only bpe, tiktoken and "
            "huggingface have one"
        )
    bos = _special_names(config, tokenizer)["bos"]
    begin, text = (
        {"SpecialToken": {"id": bos, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    )
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, text],
        "pair": [begin, text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
    }
    return content


def bpe_json(tokenizer: BpeTokenizer) -> dict[str, Any]:
    """A BpeTokenizer in the format of the library tokenizers, without post-processor."""
    special = set(tokenizer.special)
    pieces = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
    ranks = {piece: i for i, piece in enumerate(pieces) if piece and i not in special}
    letters = byte_characters()

    def spell(piece: bytes) -> str:
        return "".join(letters[byte] for byte in piece)

    vocab = {spell(piece): i for piece, i in ranks.items()}
    # Some published vocabularies have ids that are neither ranks nor special tokens.
    others = {
        i: pieces[i].decode() or f"<|unused_{i}|>"
        for i in range(len(pieces))
        if i in special or not pieces[i]
    }
    last = max(ranks.values())
    # The library numbers all other tokens after the last rank.
    vocab |= {name: i for i, name in others.items() if i < last}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(i, name) for i, name in others.items()],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": tokenizer.pattern},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": False,
                },
            ],
        },
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": dict(sorted(vocab.items(), key=lambda entry: entry[1])),
            "merges": [[spell(left), spell(right)] for left, right in merges(ranks)],
        },
    }


def merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The pair of tokens that is merged into each token, in order of rank.

    The pair is unique: BPE merges the bytes of a token in the same order inside a longer text as
    alone. A token whose bytes do not end as two parts is only ever matched as a whole word.
    """
    for token, rank in sorted(ranks.items(), key=lambda entry: entry[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            joined = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            best = min(joined)
            if best >= rank:
                break
            i = joined.index(best)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]


def _extended_json(config: FrozenConfigDict, tokenizer: Tokenizer) -> dict[str, Any]:
    """The config's tokenizer.json with the missing special tokens added."""
    path = epath.Path(config.tokenizer_path).expanduser()
    content = _read_json(path) | {"truncation": None, "padding": None}
    added = {entry["id"]: entry for entry in content["added_tokens"]}
    names = zip(tokenizer.special, SPECIAL_TOKENS, strict=True)
    added |= {i: _added_token(i, name) for i, name in names if i not in added}
    for i in tokenizer.special:
        added[i]["special"] = True
    return content | {"added_tokens": [added[i] for i in sorted(added)]}


def _added_token(number: int, name: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": name, **flags, "special": True}


def _special_names(config: FrozenConfigDict, tokenizer: Tokenizer) -> dict[str, str]:
    """Name of each special token by field of SpecialIds; foreign tokenizers name <|bos|>
    differently.
    """
    pieces = {
        field: tokenizer.decode_bytes([i]).decode()
        for field, i in tokenizer.special._asdict().items()
    }
    if config.tokenizer_type == "huggingface":
        path = epath.Path(config.tokenizer_path).expanduser()
        added = {entry["id"]: entry["content"] for entry in _read_json(path)["added_tokens"]}
        pieces["bos"] = added.get(tokenizer.bos_id, SPECIAL_TOKENS[0])
    return pieces


def _tokenizer_config(config: FrozenConfigDict, names: Mapping[str, str]) -> dict[str, Any]:
    in_turns = dialogue.in_turns(config)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names["bos"],
        "eos_token": names["assistant_end"] if in_turns else names["bos"],
        "pad_token": names["bos"],
        "additional_special_tokens": [name for field, name in names.items() if field != "bos"],
        "model_max_length": config.max_target_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "chat_template": (TEMPLATES / "chat_template.jinja").read_text(encoding="utf-8"),
    }


def read_tokenizer(folder: epath.PathLike) -> BpeTokenizer | None:
    """The BpeTokenizer that a folder's tokenizer.json was written from, or None for another kind."""
    path = epath.Path(folder).expanduser() / "tokenizer.json"
    content = _read_json(path)
    try:
        tokenizer = _bpe_of(content)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None
    written = bpe_json(tokenizer)
    same = all(
        content.get(part) == written[part] for part in ("normalizer", "pre_tokenizer", "model")
    )
    return tokenizer if same else None


def _bpe_of(content: Mapping[str, Any]) -> BpeTokenizer:
    bytes_of = {letter: byte for byte, letter in enumerate(byte_characters())}
    added = {entry["content"]: entry["id"] for entry in content["added_tokens"]}
    special = {name: added[name] for name in SPECIAL_TOKENS}
    ranks = {
        bytes(bytes_of[letter] for letter in token): i
        for token, i in content["model"]["vocab"].items()
        if token not in added
    }
    split: Sequence[Mapping[str, Any]] = content["pre_tokenizer"]["pretokenizers"]
    return BpeTokenizer(split[0]["pattern"]["Regex"], ranks, special)

"""The folder in which the library `transformers` finds a model: weights, config, tokenizer and the model's own code.

    write_folder(folder, config, step, tensors, vocabulary, replace=False)
    found = read_folder(folder)

Everything in it is JSON, safetensors or text; nothing is pickled, and reading executes nothing. The code that travels
with the weights lies in MaxNano/export/.
Source: https://huggingface.co/docs/transformers/custom_models, tokenizers' and safetensors' file formats.
"""

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from ml_collections import FrozenConfigDict

from MaxNano.inference import dialogue
from MaxNano.storage import files
from MaxNano.tokenization.bpe import BpeTokenizer
from MaxNano.tokenization.tokenizer import SPECIAL_TOKENS, Tokenizer, byte_characters

MODEL_TYPE = "maxnano"
SHARD_BYTES = 5 * 10**9  # larger models are cut into several files
TEMPLATES = Path(__file__).resolve().parent / "templates"
CODE = ("configuration_maxnano.py", "modeling_maxnano.py")

_FIELDS = {  # name in config.json: ours
    "vocab_size": "vocab_size",
    "vocab_multiple": "vocab_multiple",
    "hidden_size": "emb_dim",
    "intermediate_size": "mlp_dim",
    "num_hidden_layers": "num_decoder_layers",
    "num_attention_heads": "num_query_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_target_length",
    "window_pattern": "window_pattern",
    "short_window_fraction": "short_window_fraction",
    "short_window_multiple": "short_window_multiple",
    "rope_theta": "rope_theta",
    "qk_norm_scale": "qk_norm_scale",
    "rms_norm_eps": "norm_epsilon",
    "value_gate_channels": "value_embed_gate_channels",
    "value_gate_range": "value_embed_gate_range",
    "smear_gate_channels": "smear_gate_channels",
    "use_backout": "use_backout",
    "logits_soft_cap": "logits_soft_cap",
}


# ---- The folder ------------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """What read_folder finds."""

    values: dict[str, Any]  # config keys that the model decides
    step: int
    weights: list[epath.Path]  # safetensors files that hold the tensors together


def check_target(folder: epath.PathLike, replace: bool) -> epath.Path:
    """The folder to write, if it may be; ValueError where something is there that must not be lost."""
    folder = epath.Path(folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not _is_own(folder):
            raise ValueError(f"{folder} exists and is no model of this kind; give another path")
        if not replace:
            raise ValueError(
                f"{folder} already holds a model; give another path, or convert_overwrite=true"
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
    """Writes the model that `config` describes, whole or not at all; `tensors` go by the names of the model's code.

    Raises ValueError as check_target does, and for a tokenizer that has no tokenizer.json.
    """
    folder = check_target(folder, replace)
    names = _special_names(config, tokenizer)
    texts = {
        "config.json": _to_json(config_json(config, step)),
        "generation_config.json": _to_json(_generation_json(config, tokenizer)),
        "tokenizer.json": _to_json(tokenizer_json(config, tokenizer)),
        "tokenizer_config.json": _to_json(_tokenizer_config(config, names)),
        **{name: (TEMPLATES / name).read_text(encoding="utf-8") for name in CODE},
    }
    with files.replace_folder(folder, last="config.json") as place:  # readers need it
        for name, text in texts.items():
            (place / name).write_text(text, encoding="utf-8")
        _write_tensors(place, tensors)


def read_folder(folder: epath.PathLike) -> Found:
    """What a folder holds that write_folder wrote, or that transformers saved from one; ValueError for any other."""
    folder = epath.Path(folder).expanduser()
    content = _read_json(folder / "config.json")
    if content.get("model_type") != MODEL_TYPE:
        raise ValueError(
            f"{folder / 'config.json'} describes a model of type {content.get('model_type')!r}, not ours"
        )
    missing = sorted({*_FIELDS, "chat_turns", "step"} - content.keys())
    if missing:
        raise ValueError(f"{folder / 'config.json'} lacks {missing[0]!r}")
    values = {ours: content[theirs] for theirs, ours in _FIELDS.items()}
    if type(content["step"]) is not int or not 0 <= content["step"] < 2**31:
        raise ValueError(f"{folder / 'config.json'} has step {content['step']!r}")
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        names = sorted(set(_read_json(index).get("weight_map", {}).values()))
        if not names or not all(
            isinstance(name, str) and Path(name).name == name for name in names
        ):
            raise ValueError(f"{index} names no files of this folder")
    return Found(
        values | {"chat_turns": content["chat_turns"]},
        content["step"],
        [folder / name for name in names],
    )


def _is_own(folder: epath.Path) -> bool:
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
        raise ValueError(f"there is no {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"cannot read {path}: it holds no JSON object")
    return content


def config_json(config: FrozenConfigDict, step: int) -> dict[str, Any]:
    """config.json: the architecture under the names that transformers is used to, and where its code is."""
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["MaxNanoForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_maxnano.MaxNanoConfig",
            "AutoModel": "modeling_maxnano.MaxNanoModel",
            "AutoModelForCausalLM": "modeling_maxnano.MaxNanoForCausalLM",
        },
        "dtype": "float32",
        **{theirs: config[ours] for theirs, ours in _FIELDS.items()},
        "chat_turns": dialogue.in_turns(config),
        "step": step,
    }


def _generation_json(config: FrozenConfigDict, tokenizer: Tokenizer) -> dict[str, Any]:
    special = tokenizer.special
    draws = {"temperature": config.temperature, "top_k": config.top_k} if config.temperature else {}
    return {
        "bos_token_id": special.bos,
        # A document ends where the next one begins.
        "eos_token_id": [special.assistant_end, special.bos]
        if dialogue.in_turns(config)
        else special.bos,
        "pad_token_id": special.bos,
        "max_new_tokens": config.max_new_tokens,
        "do_sample": bool(draws),
        **draws,
    }


# ---- Tensors ---------------------------------------------------------------------------------------------------------


def _write_tensors(folder: epath.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """model.safetensors, or several files and the index that says which tensor is in which."""
    shards = _shards({name: array.nbytes for name, array in tensors.items()})
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        weight_map = {
            name: file for file, names in zip(files, shards, strict=True) for name in names
        }
        size = sum(array.nbytes for array in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(_to_json(index))
    for file, names in zip(files, shards, strict=True):
        content = safetensors_bytes({name: tensors[name] for name in names}, {"format": "pt"})
        (folder / file).write_bytes(content)


def safetensors_bytes(
    arrays: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None
) -> bytes:
    """The arrays as the content of a safetensors file; ValueError where the package is not installed."""
    try:
        from safetensors import numpy as safetensors
    except ImportError:
        raise ValueError("the package safetensors is needed: EXTRAS=export bash setup.sh") from None
    return safetensors.save(dict(arrays), metadata)


def _shards(sizes: Mapping[str, int]) -> list[list[str]]:
    """The names in groups, in order, each of at most SHARD_BYTES unless one tensor alone is more."""
    shards: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= size
    return shards


# ---- Tokenizer -------------------------------------------------------------------------------------------------------


def tokenizer_json(config: FrozenConfigDict, tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer.json of the config's tokenizer, which puts <|bos|> before every text unless told not to.

    Raises ValueError for a SentencePiece model, whose normalization has no equal there.
    """
    if isinstance(tokenizer, BpeTokenizer):
        content = bpe_json(tokenizer)
    elif config.tokenizer_type == "huggingface":
        content = _extended_json(config, tokenizer)
    else:
        raise ValueError(
            f"tokenizer_type={config.tokenizer_type} has no tokenizer.json: bpe, tiktoken and huggingface have one"
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
    """A BpeTokenizer in the format of the library `tokenizers`, without post-processor."""
    special = set(tokenizer.special)
    pieces = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
    ranks = {piece: i for i, piece in enumerate(pieces) if piece and i not in special}
    letters = byte_characters()

    def spell(piece: bytes) -> str:
        return "".join(letters[byte] for byte in piece)

    vocab = {spell(piece): i for piece, i in ranks.items()}
    # An id that is neither a rank nor a special is left out by some published vocabularies.
    others = {
        i: pieces[i].decode() or f"<|unused_{i}|>"
        for i in range(len(pieces))
        if i in special or not pieces[i]
    }
    last = max(ranks.values())
    vocab |= {
        name: i for i, name in others.items() if i < last
    }  # the library numbers all others behind the last
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
    """The two tokens of which each token is made, in order of rank.

    There is one such pair: where a token is about to be made, the merges inside its bytes have come about in the same
    order as in those bytes alone. A token that they do not leave in two is only ever made of a whole word.
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
    """The config's tokenizer.json with the special tokens that it lacks."""
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
    """Name of each special token, by the fields of SpecialIds; a foreign vocabulary's <|bos|> has its own."""
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
    """The BpeTokenizer that a folder's tokenizer.json was written from; None where it is of another kind."""
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

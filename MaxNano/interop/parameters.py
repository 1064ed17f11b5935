"""The parameter tree <-> the named tensors of another format.

A format is a TensorNames and two facts about its tables; every tensor becomes exactly one parameter
or one layer of a stacked parameter. Dtypes are kept.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from ml_collections import FrozenConfigDict

from MaxNano import scaling


class TensorNames(NamedTuple):
    """A format's names of the tensors; {i} is the layer."""

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
    vocab_multiple: int | None = None  # tables are padded to this; None: as the config says
    lambdas_are_optional: bool = False  # old checkpoints may not have the residual and x0 scalars


@dataclass(frozen=True)
class TensorEntry:
    """One parameter and the tensors of a format that hold it."""

    path: tuple[str, ...]  # in the parameter tree
    names: tuple[str, ...]  # of tensors; one per layer if `stacked`
    shape: tuple[int, ...]  # of each tensor
    stacked: bool = False  # the tensors become one array with a leading layer axis
    transposed: bool = False  # a Linear weight: (out, in) there, (in, out) here
    vocab_rows: bool = (
        False  # axis 0 is the padded vocabulary; the padding may differ or be missing
    )
    squeezed: bool = False  # the tensor has a leading axis of size 1
    default: float | None = None  # value if the tensor is missing

    def parameter_shape(self, rows: int) -> tuple[int, ...]:
        """Shape of the parameter, with tables of `rows` rows."""
        shape = self.shape
        if self.vocab_rows:
            shape = (rows, *shape[1:])
        if self.transposed:
            shape = shape[::-1]
        if self.squeezed:
            shape = shape[1:]
        return (len(self.names), *shape) if self.stacked else shape


def entries(config: FrozenConfigDict, names: TensorNames) -> list[TensorEntry]:
    """Every parameter of `config`'s model, in a format's names and shapes."""
    depth, width, mlp = config.num_decoder_layers, config.emb_dim, config.mlp_dim
    query = config.num_query_heads * config.head_dim
    kv = config.num_kv_heads * config.head_dim
    rows = scaling.round_up(config.vocab_size, names.vocab_multiple or config.vocab_multiple)
    every_layer = range(depth)
    value_layers = scaling.value_embed_layers(depth, config.value_embed_gate_channels)

    def table(path: str, name: str) -> TensorEntry:
        return TensorEntry((path,), (name,), (rows, width), vocab_rows=True)

    def linear(
        path: tuple[str, ...], layers, name: str, out_size: int, in_size: int
    ) -> TensorEntry:
        per_layer = tuple(name.format(i=i) for i in layers)
        return TensorEntry(path, per_layer, (out_size, in_size), stacked=True, transposed=True)

    def lambdas(path: str, name: str, default: float) -> TensorEntry:
        default = default if names.lambdas_are_optional else None
        return TensorEntry((path,), (name,), (depth,), default=default)

    result = [
        table("token_embed", names.token_embed),
        table("lm_head", names.lm_head),
        linear(("layers", "attention", "query"), every_layer, names.query, query, width),
        linear(("layers", "attention", "key"), every_layer, names.key, kv, width),
        linear(("layers", "attention", "value"), every_layer, names.value, kv, width),
        linear(("layers", "attention", "out"), every_layer, names.out, width, query),
        linear(("layers", "mlp", "wi"), every_layer, names.wi, mlp, width),
        linear(("layers", "mlp", "wo"), every_layer, names.wo, width, mlp),
        lambdas("resid_lambdas", names.resid_lambdas, 1.0),
        lambdas("x0_lambdas", names.x0_lambdas, 0.0),
    ]
    if channels := config.value_embed_gate_channels:
        tables = tuple(names.value_embeds.format(i=i) for i in value_layers)
        heads = config.num_kv_heads
        result += [
            TensorEntry(("value_embeds",), tables, (rows, kv), stacked=True, vocab_rows=True),
            linear(("value_gate",), value_layers, names.value_gate, heads, channels),
        ]
    if channels := config.smear_gate_channels:
        result += [
            TensorEntry(("smear_gate",), (names.smear_gate,), (1, channels), squeezed=True),
            TensorEntry(("smear_lambda",), (names.smear_lambda,), (1,), squeezed=True),
        ]
    if config.use_backout:
        result.append(
            TensorEntry(("backout_lambda",), (names.backout_lambda,), (1,), squeezed=True)
        )
    return result


def to_params(
    arrays: Mapping[str, np.ndarray], config: FrozenConfigDict, names: TensorNames
) -> dict:
    """The parameter tree (nested dict of numpy arrays) of a format's tensors.

    Raises ValueError that names a tensor which is missing, unexpected or of another shape than the
    config's model has.
    """
    arrays = dict(arrays)
    rows = scaling.round_up(config.vocab_size, config.vocab_multiple)
    params: dict = {}
    for entry in entries(config, names):
        parts = []
        for name in entry.names:
            array = _take(arrays, name, entry, config.vocab_size)
            if entry.vocab_rows:
                array = _with_rows(array, rows)
            if entry.transposed:
                array = array.T
            if entry.squeezed:
                array = array[0]
            parts.append(array)
        branch = params
        for key in entry.path[:-1]:
            branch = branch.setdefault(key, {})
        branch[entry.path[-1]] = np.stack(parts) if entry.stacked else np.array(parts[0])
    if arrays:
        raise ValueError(
            f"the checkpoint has {next(iter(arrays))!r}, which this model does not have"
        )
    return params


def from_params(
    params: Mapping, config: FrozenConfigDict, names: TensorNames
) -> dict[str, np.ndarray]:
    """A format's tensors of a parameter tree (arrays of numpy or JAX).

    Raises ValueError that names a parameter which is missing, unexpected or of another shape than
    the config's model has.
    """
    flat = dict(_flatten(params))
    rows = scaling.round_up(config.vocab_size, config.vocab_multiple)
    arrays: dict[str, np.ndarray] = {}
    for entry in entries(config, names):
        path = "/".join(entry.path)
        if path not in flat:
            raise ValueError(f"the parameters do not have {path!r}, which the config's model has")
        value = np.asarray(flat.pop(path))
        expected = entry.parameter_shape(rows)
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
        raise ValueError(f"the format has no tensor for parameter {next(iter(flat))!r}")
    return arrays


def _with_rows(table: np.ndarray, rows: int) -> np.ndarray:
    """The table cut or zero-padded to `rows`; rows after the vocabulary never affect an output."""
    if len(table) >= rows:
        return table[:rows]
    padding = np.zeros((rows - len(table), *table.shape[1:]), table.dtype)
    return np.concatenate([table, padding])


def _take(
    arrays: dict[str, np.ndarray], name: str, entry: TensorEntry, vocab_size: int
) -> np.ndarray:
    """Removes and returns one tensor of the right shape."""
    if name not in arrays:
        if entry.default is None:
            raise ValueError(f"the checkpoint does not have {name!r}, which this model needs")
        return np.full(entry.shape, entry.default, np.float32)
    array = np.asarray(arrays.pop(name))
    is_unpadded = entry.vocab_rows and array.shape == (vocab_size, *entry.shape[1:])
    if array.shape != entry.shape and not is_unpadded:
        raise ValueError(
            f"{name!r} has shape {array.shape} in the checkpoint, expected {entry.shape}"
        )
    return array


def _flatten(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path joined by "/", leaf) of a nested mapping."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value

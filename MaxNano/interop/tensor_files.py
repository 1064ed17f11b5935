"""Files of named tensors: .safetensors, .npz and PyTorch's .pt. Reading one executes no code in it."""

import io
import os
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from MaxNano.storage import files


def read_tensors(path: epath.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a file by name, bfloat16 included.

    Raises ValueError with one line if the file is missing, damaged or of another kind.
    """
    path = epath.Path(path).expanduser()
    read = _READERS[check_format(path)]
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        return read(path)
    except _MissingTorch:
        raise
    except Exception as error:  # noqa: BLE001 (each format has its own exceptions)
        raise ValueError(f"cannot read {path}: {first_line(error)}") from None


def write_tensors(path: epath.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes the tensors in the format of the path's ending, completely or not at all."""
    path = epath.Path(path).expanduser()
    files.write_whole(path, _WRITERS[check_format(path)](arrays))


def check_format(path: epath.Path) -> str:
    """The ending of a path. Raises ValueError if it is not the ending of a known format."""
    if path.suffix not in _READERS:
        raise ValueError(f"{path} must end in one of {', '.join(_READERS)}")
    return path.suffix


def first_line(error: Exception) -> str:
    """The first line of an error's message, with its type if the message alone is not enough."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    return f"{type(error).__name__}: {text}" if isinstance(error, KeyError) or not text else text


def safetensors_bytes(
    arrays: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None
) -> bytes:
    """The content of a safetensors file. Raises ValueError if the package is not installed."""
    try:
        from safetensors import numpy as safetensors
    except ImportError:
        raise ValueError("the package safetensors is needed: EXTRAS=export bash setup.sh") from None
    return safetensors.save(dict(arrays), metadata)


class _MissingTorch(ValueError):
    """torch is needed but not installed."""


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise _MissingTorch(
            "a .pt file needs torch: .venv/bin/python -m pip install torch, or use .safetensors or"
            " .npz"
        ) from None
    return torch


def _read_pt(path: epath.Path) -> dict[str, np.ndarray]:
    torch = _torch()
    with path.open("rb") as file:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    return {name: _from_tensor(torch, tensor) for name, tensor in tensors.items()}


def _from_tensor(torch: Any, tensor: Any) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:  # numpy has no bfloat16
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
        # numpy saves bfloat16 as two bytes without a type.
        return {
            name: array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array
            for name, array in arrays.items()
        }


def _write_npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getbuffer()


_READERS = {".pt": _read_pt, ".safetensors": _read_safetensors, ".npz": _read_npz}
_WRITERS = {".pt": _write_pt, ".safetensors": safetensors_bytes, ".npz": _write_npz}

"""Stands in for the package ml_collections where it is missing and cannot be installed.

first_hour.py puts its folder on PYTHONPATH there. It has what MaxNano uses of FrozenConfigDict: keys
as attributes and items, nested dicts frozen too, lists as tuples.
"""

from collections.abc import Iterator, Mapping
from typing import Any


class FrozenConfigDict(Mapping):
    """A mapping that never changes, with its keys as attributes."""

    def __init__(self, values: Mapping[str, Any] = ()):
        object.__setattr__(self, "_values", {k: _freeze(v) for k, v in dict(values).items()})

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __getattr__(self, key: str) -> Any:
        if key.startswith("_") or key not in self._values:
            raise AttributeError(key)
        return self._values[key]

    def __setattr__(self, key: str, value: Any) -> None:
        raise AttributeError(f"{key} of a FrozenConfigDict cannot be set")

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(tuple(sorted(self._values.items(), key=lambda item: item[0])))

    def __reduce__(self) -> tuple:
        return FrozenConfigDict, (self.to_dict(),)

    def to_dict(self) -> dict[str, Any]:
        """A dict, with nested ones; lists stay tuples."""
        return {
            key: value.to_dict() if isinstance(value, FrozenConfigDict) else value
            for key, value in self._values.items()
        }


def _freeze(value: Any) -> Any:
    if isinstance(value, Mapping):
        return FrozenConfigDict(value)
    if isinstance(value, list | tuple):
        return tuple(_freeze(item) for item in value)
    return value

"""What a search leaves: a journal, from which it resumes, and a row for a table of results."""

import csv
import io
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from MaxNano.storage import files


class Journal:
    """The results so far, in a file of JSON lines. The first line says what was searched.

    A file of another search, such as of other devices or versions, is replaced.
    """

    def __init__(self, path: epath.Path, search: Mapping[str, Any]):
        self.path = path
        self._rows: dict[str, dict[str, Any]] = {}
        first = json.loads(json.dumps({"search": search}))
        before = _read(path)
        self.is_other = bool(before) and before[0] != first
        if before and not self.is_other:
            self._rows = {row["key"]: row for row in before[1:] if "key" in row}
        else:
            files.write_whole(path, json.dumps(first) + "\n")
        self.resumed = len(self._rows)

    @property
    def wall_seconds(self) -> float:
        """Time that all measurements took, with compilation."""
        return sum(row.get("wall", 0.0) for row in self._rows.values())

    @property
    def walls(self) -> list[float]:
        """Seconds of each measurement of steps that succeeded, with compilation."""
        return [row["wall"] for row in self._rows.values() if "seconds" in row]

    def get(self, *key: Any) -> dict[str, Any] | None:
        """The row of a key of JSON-able parts, None if there is none."""
        return self._rows.get(_text(key))

    def add(self, row: Mapping[str, Any], *key: Any) -> dict[str, Any]:
        """Keep and return a row."""
        row = {"key": _text(key), **row}
        self._rows[row["key"]] = row
        files.append(self.path, json.dumps(row) + "\n")
        return row


def _text(key: tuple[Any, ...]) -> str:
    return json.dumps(key, sort_keys=True)


def _read(path: epath.Path) -> list[dict[str, Any]]:
    """The lines of a journal without those that are damaged."""
    return files.read_json_lines(path) if path.exists() else []


def to_markdown(row: Mapping[str, Any]) -> str:
    """A table of one row; its columns are the row's names."""
    cells = [str(value).replace("|", "\\|") for value in row.values()]
    return "\n".join(
        ["| " + " | ".join(row) + " |", "|" + "---|" * len(row), "| " + " | ".join(cells) + " |"]
    )


def to_csv(row: Mapping[str, Any]) -> str:
    """A header and a row."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([row.keys(), row.values()])
    return text.getvalue()

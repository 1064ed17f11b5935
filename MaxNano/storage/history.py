"""The history of a run: history.jsonl in its folder, a JSON object per start, end and refusal."""

import datetime
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from MaxNano import console
from MaxNano.storage import files

HISTORY = "history.jsonl"


def append(run: epath.Path, event: str, facts: Mapping[str, Any]) -> None:
    """Append an entry with the current time; a warning if it cannot be written."""
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    line = json.dumps({"event": event, "time": time, **facts}) + "\n"
    try:
        files.append(run / HISTORY, line)
    except OSError as error:
        console.warn(f"{run / HISTORY} could not be written ({console.one_line(error, 300)})")


def read(run: epath.Path) -> list[dict[str, Any]]:
    """The entries, oldest first; [] without a file. A line that a killed process left half written
    is left out.
    """
    path = run / HISTORY
    if not path.exists():
        return []
    return [entry for entry in files.read_json_lines(path) if "event" in entry]

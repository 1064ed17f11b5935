"""The list of a data set's files, written by downloads (hub.py) and read by sources.py.

It lists files before they arrive, so that training can start while later shards download.
"""

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from MaxNano.storage import files as storage

MANIFEST = "manifest.json"


def listed_files(text: str | bytes, path: str) -> dict[str, dict[str, Any]]:
    """{name: facts} of the manifest at `path`; a file with "done": false has not arrived yet.

    Raises ValueError if it lists no files, json.JSONDecodeError if it is not JSON.
    """
    try:
        return {name: dict(facts) for name, facts in json.loads(text)["files"].items()}
    except (LookupError, TypeError, AttributeError):
        raise ValueError(f"{path}: lists no files; move it away or repair it") from None


class Manifest:
    """The files of a data set's folder, in a JSON file in that folder.

    {"source", "selection", "files": {name: {"size", "sha256", "done"}}}. The selection names which
    of the source's files the user asked for. Raises ValueError if the folder has another source.
    """

    def __init__(self, folder: Path, source: str):
        self._folder, self._path = folder, folder / MANIFEST
        self._lock = threading.Lock()
        self.source, self.selection = source, ""
        self.files: dict[str, dict[str, Any]] = {}
        if not self._path.exists():
            return
        try:
            saved = json.loads(self._path.read_text(encoding="utf-8"))
            self.selection = saved["selection"]
            for name, facts in saved["files"].items():
                self.files[name] = {key: facts[key] for key in ("size", "sha256", "done")}
        except (ValueError, LookupError, TypeError, AttributeError):
            saved = {"source": None}
        if saved["source"] != source:
            raise ValueError(
                f"{folder} holds other data: its {MANIFEST} is not from {source}; set "
                "another download_path, or move that folder away"
            )

    def is_complete(self, selection: str) -> bool:
        """Whether the folder has every file of this selection."""
        return bool(self.files) and self.selection == selection and all(map(self.has, self.files))

    def has(self, name: str) -> bool:
        """Whether a file was downloaded and is still in the folder."""
        path, facts = self._folder / name, self.files[name]
        return facts["done"] and path.is_file() and path.stat().st_size == facts["size"]

    def plan(self, files: Mapping[str, tuple[int, str | None]], selection: str) -> list[str]:
        """List the files of a selection, {name: (bytes, sha256)}, and return the missing ones.

        Complete files of earlier selections stay listed. Raises ValueError if a downloaded file has
        changed on the hub.
        """
        planned = {name: facts for name, facts in self.files.items() if facts["done"]}
        for name, (size, sha256) in files.items():
            if name in planned and planned[name]["sha256"] != sha256 is not None:
                raise ValueError(
                    f"{self._folder / name} has changed on the hub since its download: move the "
                    "folder away to download the new version"
                )
            if name not in planned or not self.has(name):
                planned[name] = {"size": size, "sha256": sha256, "done": False}
        self.files, self.selection = dict(sorted(planned.items())), selection
        self._save()
        return [name for name in files if not self.files[name]["done"]]

    def mark_done(self, name: str) -> None:
        """Record that a file is complete."""
        with self._lock:
            self.files[name]["done"] = True
            self._save()

    def touch(self) -> None:
        """Show those who wait for a file that the download is alive."""
        os.utime(self._path)

    def _save(self) -> None:
        content = {"source": self.source, "selection": self.selection, "files": self.files}
        storage.write_whole(self._path, json.dumps(content, indent=1) + "\n")

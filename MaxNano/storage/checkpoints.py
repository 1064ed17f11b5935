"""The checkpoints in a run's folder: which are finished, which are intact, which to delete.

Each is a folder `checkpoints/<step>/`. `MANIFEST.json` in it, written last, lists the size and the
SHA-256 of every other file. A checkpoint counts from the moment its manifest exists, so if a
process dies before that, the previous checkpoint still counts. The manifest also detects damage:
orbax restores most bit flips silently as wrong weights. Retention is done here and not by orbax,
which deletes the old checkpoint before the new one has its manifest.

In a bucket the manifest has sizes only: the store verifies checksums of its own, and hashing would
download everything again. orbax writes a checkpoint there in place, not under a temporary name.
"""

import contextlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from etils import epath

from MaxNano import console
from MaxNano.storage import files

MANIFEST = "MANIFEST.json"
DAMAGED = "MANIFEST.damaged"  # its name on gs://, where a damaged checkpoint cannot be renamed
TEMPORARY = r"\d+\.orbax-checkpoint-tmp.*"  # names that orbax gives to unfinished checkpoints


class CheckpointError(ValueError):
    """A checkpoint cannot be written, found or trusted; the message is one line for the user."""


class CheckpointFolder:
    """The checkpoints of the run in `directory` (local or gs://)."""

    def __init__(self, directory: epath.PathLike) -> None:
        self.is_local = not files.is_remote(directory)
        self.run = epath.Path(directory)
        if self.is_local:  # orbax requires an absolute path
            self.run = epath.Path(Path(directory).expanduser().absolute())
        self.root = self.run / "checkpoints"

    def path(self, step: int) -> epath.Path:
        """Folder of the checkpoint of a step."""
        return self.root / str(step)

    def steps(self) -> list[int]:
        """Steps of finished checkpoints, ascending. Raises CheckpointError if it cannot look."""
        steps = sorted(int(name) for name in self._names() if name.isdigit())
        try:
            return [step for step in steps if files.exists(self.path(step) / MANIFEST)]
        except OSError as error:
            raise self._unreadable(error) from None

    def newest_intact(self, step: int | None = None, *, set_aside: bool) -> int:
        """The newest step whose files are as they were written, or `step` if they are.

        Warns about damaged ones and, with set_aside, renames them so that they no longer count.
        Raises CheckpointError if none is intact.
        """
        steps = self.steps()
        if step is not None:
            if step not in steps:
                raise CheckpointError(f"{self.run} has no checkpoint of step {step}, only {steps}")
            steps = [step]
        if not steps:
            raise CheckpointError(f"{self.run} has no finished checkpoint")
        for candidate in reversed(steps):
            try:
                problem = find_damage(self.path(candidate))
            except OSError as error:  # of permissions, the disk or the network: it may be intact
                raise CheckpointError(
                    f"the checkpoint of step {candidate} in {self.run} cannot be read: "
                    f"{console.one_line(error, 300)}; fix this, or rename its folder to use the one "
                    "before"
                ) from error
            if problem is None:
                return candidate
            if set_aside:
                self._set_aside(self.path(candidate))
            console.warn(f"the checkpoint of step {candidate} in {self.run} is damaged ({problem})")
        raise CheckpointError(
            f"no checkpoint in {self.run} is intact (steps {steps}); choose another run_name to "
            "start from scratch"
        )

    def remove_unfinished(self) -> None:
        """Delete checkpoints that a killed process did not finish; a warning for each."""
        self.remove_temporary()
        finished = self.steps()
        for step in (int(name) for name in self._names() if name.isdigit()):
            if step not in finished and not (self.path(step) / DAMAGED).exists():
                action = "ignored" if self.is_local else "removed"
                console.warn(f"the checkpoint of step {step} in {self.run} is unfinished; {action}")
                if not self.is_local:
                    self._remove(self.path(step))

    def remove_temporary(self) -> None:
        """Delete the temporary folders of saves that failed."""
        for name in self._names():
            if re.fullmatch(TEMPORARY, name):
                self._remove(self.root / name)

    def remove_old(self, keep: int) -> None:
        """Delete all finished checkpoints but the newest `keep`. Raises OSError, CheckpointError."""
        for step in self.steps()[:-keep]:
            path = self.path(step)
            (path / MANIFEST).unlink()  # first: a half-deleted checkpoint must not count
            path.rmtree(missing_ok=True)
        self.remove_temporary()

    def _names(self) -> list[str]:
        try:
            return files.names(self.root)
        except OSError as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"cannot read {self.root}: {console.one_line(error, 300)}")

    def _remove(self, path: epath.Path) -> None:
        with contextlib.suppress(OSError):  # a thread of the failed save may still write into it
            path.rmtree(missing_ok=True)

    def _set_aside(self, path: epath.Path) -> None:
        try:
            if self.is_local:
                aside = path.with_name(f"{path.name}.damaged")
                aside.rmtree(missing_ok=True)
                path.rename(aside)
            else:
                (path / DAMAGED).write_bytes((path / MANIFEST).read_bytes())
                (path / MANIFEST).unlink()
        except OSError as error:
            reason = console.one_line(error, 300)
            raise CheckpointError(f"cannot rename the damaged {path}: {reason}") from None


def newest_extra(run: epath.PathLike) -> dict[str, Any]:
    """The JSON that was saved with a run's newest finished checkpoint, whose hashes are not
    checked; {} if there is none.
    """
    checkpoints = CheckpointFolder(run)
    for step in reversed(checkpoints.steps()):
        try:
            extra = json.loads((checkpoints.path(step) / "extra" / "metadata").read_text())
        except (OSError, ValueError):
            continue
        if isinstance(extra, dict):
            return extra
    return {}


def write_manifest(folder: epath.Path) -> None:
    """Write the manifest of all files in a folder, which makes it a finished checkpoint."""
    sizes = files.sizes(folder)
    paths = [folder / name for name in sizes]
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        digests = [None] * len(paths) if files.is_remote(folder) else pool.map(files.sha256, paths)
        entries = {
            name: {"bytes": size, "sha256": digest}
            for (name, size), digest in zip(sizes.items(), digests, strict=True)
        }
    files.write_whole(folder / MANIFEST, json.dumps({"files": entries}, indent=1))


def find_damage(folder: epath.Path) -> str | None:
    """How the files of a finished checkpoint differ from its manifest, None if they do not.

    Damage means that bytes differ. Raises OSError if they cannot be read.
    """
    content = (folder / MANIFEST).read_bytes()
    try:
        entries = json.loads(content)["files"]
        entries = {name: (entry["bytes"], entry["sha256"]) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not a manifest"
    sizes = files.sizes(folder)
    for name, (size, _) in entries.items():
        if name not in sizes:
            return f"{name} is missing"
        if sizes[name] != size:
            return f"{name} has {sizes[name]} bytes instead of {size}"
    hashed = {name: digest for name, (_, digest) in entries.items() if digest}
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda name: files.sha256(folder / name), hashed)
        for name, digest in zip(hashed, digests, strict=True):
            if digest != hashed[name]:
                return f"{name} has changed"
    return None

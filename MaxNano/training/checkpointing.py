"""Checkpoints of a run: asynchronous, atomic, hashed, verified on restore, one writer a run.

A run's folder holds `checkpoints/<step>/`, each with `state/` (the train state, by orbax), `extra/`
(JSON: data position, metrics, resolved config, versions, devices) and, written last, `MANIFEST.json` with
the size and SHA-256 of every file. A checkpoint counts from the moment its manifest exists, so a
process that dies at any point leaves the previous checkpoint in force. orbax alone restores most
bit flips silently as wrong weights; the manifest is what detects them. Retention is done here and
not by orbax, whose manager deletes the old checkpoint before the new one has its manifest.

On gs:// the manifest records sizes only: the store keeps and checks checksums of its own, and
hashing would read everything back over the network. orbax writes a checkpoint there in place, so
that one without a manifest is half of one. Nobody can hold a lock on a bucket, as a machine may be
gone at any time: the process that came last owns the run, and an earlier one stops at its next save.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import filelock
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import FrozenConfigDict
from orbax.checkpoint._src.serialization import tensorstore_utils

from MaxNano import pyconfig, scaling
from MaxNano.distributed import runtime
from MaxNano.storage import files

MANIFEST = "MANIFEST.json"
DAMAGED = "MANIFEST.damaged"  # its name on gs://, where a damaged checkpoint cannot be renamed
LOCK = ".lock"
MAX_FAILED_SAVES = 3
SAVE_TIMEOUT_SECONDS = 1200  # for which a process waits for what the others write of a checkpoint
# How often tensorstore asks a bucket again that does not answer: for about two minutes, as the next save
# waits for this one. Its own default is far longer, and orbax has no option for it.
BUCKET_RETRIES = {"max_retries": 8, "initial_delay": "1s", "max_delay": "32s"}
for _context in (
    tensorstore_utils._BASE_TS_CONTEXT,
    tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT,
):
    _context["gcs_request_retries"] = BUCKET_RETRIES
# Keys besides the shape without which the same parameters are another model.
FUNCTION_KEYS = (
    "rope_theta",
    "qk_norm_scale",
    "value_embed_gate_range",
    "norm_epsilon",
    "logits_soft_cap",
)
CLOCK_STEPS = 16  # several hosts compare clocks only this often: each time costs a round trip


class CheckpointError(ValueError):
    """A checkpoint cannot be written, found or trusted; the message is one line for the user."""


class _Superseded(CheckpointError):
    """Another process owns the run now."""


class Checkpointer:
    """Saves and restores the checkpoints of the run in `directory` (local or gs://).

    Use as a context manager, or call close(). With `writer` it owns the run: a second writer is
    refused with CheckpointError; on gs:// the first one stops with it, at its next save.
    `tokenizer_fingerprint` is stored with each checkpoint and compared on restore; "" stands for
    unknown and is never compared.
    """

    def __init__(
        self,
        config: FrozenConfigDict,
        directory: epath.PathLike,
        *,
        tokenizer_fingerprint: str = "",
        writer: bool = True,
    ) -> None:
        # orbax logs each failure with several tracebacks and then raises it; check() says it once.
        logging.getLogger("absl").addFilter(_is_not_orbax)
        if sys.unraisablehook is sys.__unraisablehook__:
            sys.unraisablehook = _pass_over_late_answers
        self._config = config
        self._fingerprint = tokenizer_fingerprint
        self._run = epath.Path(directory)
        self._local = not files.is_remote(self._run)
        if self._local:
            self._run = epath.Path(Path(directory).expanduser().absolute())  # orbax wants it so
        self._root = self._run / "checkpoints"
        self._writer = writer
        self._primary = jax.process_index() == 0
        self._lock: filelock.BaseFileLock | None = None
        self._owner = uuid.uuid4().hex  # what LOCK holds on gs://
        self._orbax = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(), timeout_secs=SAVE_TIMEOUT_SECONDS
        )
        self._thread: threading.Thread | None = None  # commits and hashes the last save
        self._error: Exception | None = None  # of that save in this process
        self._is_judged = True  # whether that save was reported, or found good, in all processes
        self._failures = 0  # failed saves in a row
        self._last_step: int | None = None
        self._last_save = time.monotonic()
        if writer:
            self._take_over()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type | None, *exc_info: object) -> None:
        self._close(is_failing=exc_type is not None)

    # ---- When ----

    def should_save(self, step: int) -> bool:
        """Whether a checkpoint is due at `step`, by steps or by minutes; call at each step.

        Reports a failed earlier save, see check(). Process 0's clock decides for all processes.
        """
        self.check()
        config = self._config
        if step == self._last_step:
            return False
        if config.checkpoint_interval_steps and step % config.checkpoint_interval_steps == 0:
            return True
        if not config.checkpoint_interval_minutes:
            return False
        due = time.monotonic() - self._last_save >= 60 * config.checkpoint_interval_minutes
        if jax.process_count() > 1:
            if step % CLOCK_STEPS:
                return False
            due = bool(multihost_utils.broadcast_one_to_all(np.int32(due)))
        return due

    # ---- Write ----

    def save(self, step: int, state: Any, extra: dict) -> None:
        """Saves the pytree `state` of jax arrays and the JSON-able dict `extra` as step `step`.

        With async_checkpointing it returns once the state may be donated. A failure in any process
        is reported by check(), and the next interval tries again. A step that is saved already
        stays as it is.
        """
        self._join()
        self._report()
        try:
            if step in self._steps_of_primary():
                return
        except CheckpointError as error:
            self._error = error
        self._is_judged = False
        self._last_step = step
        self._last_save = time.monotonic()
        if self._error is None:
            self._start(step, state, extra)
        if not self._config.async_checkpointing:
            self._join()
            self._report()
        self.check()

    def check(self) -> None:
        """Reports a failed save in one line on stderr, and removes what it left behind.

        Several processes meet for that at the next save, or in wait().
        Raises CheckpointError after MAX_FAILED_SAVES failures in a row.
        """
        if self._thread is not None and not self._thread.is_alive():
            self._join()
        if self._thread is None and jax.process_count() == 1:
            self._report()

    def wait(self) -> None:
        """Returns when the last save is on disk with its manifest; CheckpointError if it failed."""
        self._join()
        reason = self._judge()
        if reason is not None:
            raise CheckpointError(
                f"the checkpoint of step {self._last_step} could not be written to {self._run}: "
                f"{reason}"
            )

    def close(self) -> None:
        """Finishes the last save and frees the run in any case; raises as wait() does."""
        self._close(is_failing=False)

    def check_free_space(self, state: Any) -> None:
        """CheckpointError if the disk cannot hold the checkpoints to keep; call before training.

        state: the train state or its abstract shapes. Nothing is checked on gs://.
        """
        if not self._local:
            return
        size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        # The oldest is deleted only when a new one stands.
        missing = max(1, self._config.checkpoint_keep + 1 - len(self._steps())) * size
        free = shutil.disk_usage(self._run).free
        if free < missing:
            raise CheckpointError(
                f"{self._run} has {free / 1e9:.1f} GB free but checkpoints need "
                f"{missing / 1e9:.1f} GB; free space, lower checkpoint_keep or set "
                "base_output_directory to another disk"
            )

    # ---- Read ----

    def latest_step(self) -> int | None:
        """Step of the newest finished checkpoint, None if there is none."""
        steps = self._steps_of_primary()
        return steps[-1] if steps else None

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict]:
        """(state, extra) of the newest intact checkpoint, or of `step`.

        abstract_state: pytree of jax.ShapeDtypeStruct with shardings, which may belong to another
        mesh than the one that saved. A damaged checkpoint is set aside as `<step>.damaged` with a
        line on stderr and the one before is used. Raises CheckpointError where none is intact, or
        where the checkpoint belongs to another tokenizer or model.
        """
        return self._restore(step, lambda path: self._read(path, abstract_state))

    def restore_params_only(
        self, abstract_params: Any = None, step: int | None = None
    ) -> tuple[Any, dict]:
        """(params, extra) as restore(), reading only `params` of the state.

        Without `abstract_params` they come as numpy arrays, in the dtypes in which they were saved.
        """
        return self._restore(step, lambda path: self._read_params(path, abstract_params))

    def read_extra(self, step: int | None = None) -> dict:
        """The JSON dict alone, as restore() returns it, not compared with this run's config."""
        return self._extra(self._root / str(self._choose(step)))

    # ---- Inside ----

    def _take_over(self) -> None:
        """Makes process 0 the owner of the run; CheckpointError in every process if it cannot."""
        problem = None
        if self._primary:
            try:
                self._lock_and_clear()
            except CheckpointError as error:
                problem = str(error)
        problem = runtime.first_problem(problem)
        if problem is not None:
            raise CheckpointError(problem)

    def _lock_and_clear(self) -> None:
        """Locks the run's folder and clears up after a process that died."""
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            if not self._local:
                files.write_whole(
                    self._run / LOCK, json.dumps({"owner": self._owner, "host": platform.node()})
                )
        except OSError as error:
            raise CheckpointError(
                f"cannot write to {self._run} ({_one_line(error)}); set base_output_directory"
            ) from None
        if self._local:
            lock = filelock.FileLock(self._run / LOCK)
            try:
                lock.acquire(blocking=False)
            except filelock.Timeout:
                raise CheckpointError(
                    f"another process is writing to {self._run}; stop it or choose another run_name"
                ) from None
            self._lock = lock
        self._remove_temporary()
        for step in self._unfinished():
            _warn(
                f"the checkpoint of step {step} in {self._run} was never finished; "
                + ("ignored" if self._local else "removed")
            )
            if not self._local:
                self._remove_tree(self._root / str(step))

    def _check_owner(self) -> None:
        """_Superseded if another process has taken over the run on gs://."""
        if self._local or not (self._run / LOCK).exists():
            return
        lock = json.loads((self._run / LOCK).read_text())
        if lock["owner"] != self._owner:
            raise _Superseded(
                f"another process, on {lock['host']}, has taken over {self._run}; this one stops, its last steps "
                "are not saved"
            )

    def _names(self) -> list[str]:
        """What lies in the checkpoints' folder. Raises CheckpointError where it cannot be looked at."""
        try:
            return files.names(self._root)
        except OSError as error:
            raise CheckpointError(f"cannot read {self._root}: {_one_line(error)}") from None

    def _steps(self) -> list[int]:
        """Finished checkpoints, oldest first."""
        steps = sorted(int(name) for name in self._names() if name.isdigit())
        try:
            return [step for step in steps if (self._root / str(step) / MANIFEST).exists()]
        except OSError as error:
            raise CheckpointError(f"cannot read {self._root}: {_one_line(error)}") from None

    def _unfinished(self) -> list[int]:
        """Steps of which something is there, but no manifest."""
        finished = self._steps()
        steps = (int(name) for name in self._names() if name.isdigit())
        return [
            step
            for step in steps
            if step not in finished and not (self._root / str(step) / DAMAGED).exists()
        ]

    def _steps_of_primary(self) -> list[int]:
        """_steps() as process 0 sees them, for every process; all must ask."""
        steps, problem = [], None
        if self._primary:
            try:
                steps = self._steps()
            except CheckpointError as error:
                problem = str(error)
        steps, problem = runtime.gather_json((steps, problem))[0]
        if problem is not None:
            raise CheckpointError(problem)
        return steps

    def _remove_temporary(self) -> None:
        if not self._primary:
            return
        for name in self._names():
            if re.fullmatch(rf"\d+{re.escape(ocp.utils.TMP_DIR_SUFFIX)}.*", name):
                self._remove_tree(self._root / name)

    def _remove_tree(self, path: epath.Path) -> None:
        """Removes what is of no use. What cannot be removed now, the next one who looks removes."""
        with contextlib.suppress(OSError):  # a thread of the failed save may still write there
            path.rmtree(missing_ok=True)

    def _start(self, step: int, state: Any, extra: dict) -> None:
        """Copies the state and leaves the rest to a thread."""
        record = {**extra, "run": {"step": step, **self._identity()}}
        try:
            if self._primary and not self._local:
                # What an interrupted save of the same step left behind; orbax would want rights to the bucket itself.
                (self._root / str(step)).rmtree(missing_ok=True)
            self._orbax.save(
                self._root / str(step),
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), extra=ocp.args.JsonSave(record)
                ),
                force=True,  # the same on a disk
            )
        except Exception as error:  # noqa: BLE001 (check() reports it)
            self._error = error
            self._forget_errors()
        else:
            self._thread = threading.Thread(target=self._commit, args=(step,), name="checkpoint")
            self._thread.start()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _judge(self) -> str | None:
        """Why the last save failed, in any process, None if it did not; asked once for each save.

        Every process must ask, as soon as it has joined the save.
        """
        if self._is_judged:
            return None
        self._is_judged = True
        error, self._error = self._error, None
        mine = error and (
            isinstance(error, TimeoutError),
            _one_line(error),
            isinstance(error, _Superseded),
        )
        problems = sorted(filter(None, runtime.gather_json(mine)))
        if not problems:
            self._failures = 0
            return None
        for _, reason, is_superseded in problems:
            if is_superseded:
                raise CheckpointError(reason)
        self._failures += 1
        with contextlib.suppress(CheckpointError):
            self._remove_temporary()
        return problems[0][1]  # what went wrong, before what merely waited for it

    def _report(self) -> None:
        """What check() says of the last save."""
        reason = self._judge()
        if reason is None:
            return
        if self._failures >= MAX_FAILED_SAVES:
            raise CheckpointError(
                f"{self._failures} checkpoints in a row could not be written to {self._run}: "
                f"{reason}"
            )
        if self._primary:
            _warn(
                f"the checkpoint of step {self._last_step} could not be written ({reason}); "
                "trying again at the next interval"
            )

    def _close(self, *, is_failing: bool) -> None:
        """is_failing: this process leaves by an error of which the others may know nothing."""
        try:
            if is_failing and jax.process_count() > 1:
                self._join()
            else:
                self.wait()
        finally:
            self._orbax.close()
            if self._lock is not None:
                self._lock.release()

    def _commit(self, step: int) -> None:
        """In the background: waits for orbax, writes the manifest, deletes what is not kept."""
        try:
            self._orbax.wait_until_finished()
            if self._primary:
                self._check_owner()
                _write_manifest(self._root / str(step), hashes=self._local)
        except Exception as error:  # noqa: BLE001 (check() reports it)
            self._error = error
            self._forget_errors()
            return
        if self._primary:
            try:
                self._remove_old()
            except (OSError, CheckpointError) as error:
                _warn(
                    f"old checkpoints in {self._run} could not be deleted ({_one_line(error)}); trying again later"
                )

    def _forget_errors(self) -> None:
        """orbax raises one error of a failed save at a time; the rest would fail the next save or restore."""
        for _ in range(10):
            try:
                return self._orbax.wait_until_finished()
            except Exception:  # noqa: BLE001, S112 (the first one is reported)
                continue

    def _remove_old(self) -> None:
        for old in self._steps()[: -self._config.checkpoint_keep]:
            path = self._root / str(old)
            (path / MANIFEST).unlink()  # first: a half-deleted checkpoint must not count
            path.rmtree(missing_ok=True)
        self._remove_temporary()

    def _identity(self) -> dict:
        return {
            "config": {key: self._config[key] for key in pyconfig.keys_of(self._config)},
            "tokenizer": self._fingerprint,
            "versions": _versions(),
            "devices": {
                "kind": jax.devices()[0].device_kind,
                "count": jax.device_count(),
                "processes": jax.process_count(),
                "host_cores": os.cpu_count(),
            },
        }

    def _choose(self, step: int | None) -> int:
        """The newest intact step, or `step` if that is intact; the same on every host."""
        chosen, message = -1, ""
        if self._primary:
            try:
                chosen = self._choose_here(step)
            except CheckpointError as error:
                message = str(error)
        if jax.process_count() > 1:
            chosen = int(multihost_utils.broadcast_one_to_all(np.int32(chosen)))
        if chosen < 0:
            raise CheckpointError(message or f"process 0 found no intact checkpoint in {self._run}")
        return chosen

    def _choose_here(self, step: int | None) -> int:
        steps = self._steps()
        if step is not None:
            if step not in steps:
                raise CheckpointError(f"{self._run} has no checkpoint of step {step}, only {steps}")
            steps = [step]
        if not steps:
            raise CheckpointError(f"{self._run} holds no finished checkpoint")
        for candidate in reversed(steps):
            path = self._root / str(candidate)
            try:
                problem = _find_damage(path)
            except OSError as error:  # of the network: that says nothing about the checkpoint
                raise CheckpointError(
                    f"the checkpoint of step {candidate} in {self._run} cannot be read: {_one_line(error)}"
                ) from error
            if problem is None:
                return candidate
            if self._writer:
                self._set_aside(path)
            _warn(f"the checkpoint of step {candidate} in {self._run} is damaged ({problem})")
        raise CheckpointError(
            f"no checkpoint in {self._run} is intact (newest first looked at: step {steps[-1]}); "
            "choose another run_name to start afresh"
        )

    def _set_aside(self, path: epath.Path) -> None:
        """Puts a damaged checkpoint out of the way, so that it is neither found again nor counted as kept."""
        try:
            if self._local:
                aside = path.with_name(f"{path.name}.damaged")
                aside.rmtree(missing_ok=True)
                path.rename(aside)
            else:
                (path / DAMAGED).write_bytes((path / MANIFEST).read_bytes())
                (path / MANIFEST).unlink()
        except OSError as error:
            raise CheckpointError(f"cannot set {path} aside: {_one_line(error)}") from None

    def _restore(self, step: int | None, read: Any) -> tuple[Any, dict]:
        chosen = self._choose(step)
        path = self._root / str(chosen)
        try:
            extra = self._extra(path)
            self._check_identity(extra["run"])
            return read(path), extra
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"the checkpoint of step {chosen} in {self._run} cannot be read: {_one_line(error)}"
            ) from error

    def _extra(self, path: epath.Path) -> dict:
        return self._orbax.restore(
            path, args=ocp.args.Composite(extra=ocp.args.JsonRestore())
        ).extra

    def _read(self, path: epath.Path, abstract_state: Any) -> Any:
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
        return self._orbax.restore(path, args=args).state

    def _read_params(self, path: epath.Path, abstract_params: Any) -> Any:
        # A handler of its own: this object's is bound to whole states.
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            if abstract_params is None:
                tree = reader.metadata(path / "state").item_metadata.tree
                item = {"params": jax.tree.map(lambda _: 0, tree["params"])}
                args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
            else:
                item = {"params": abstract_params}
                args = ocp.checkpoint_utils.construct_restore_args(item)
            restored = reader.restore(
                path / "state",
                args=ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True),
            )
        return restored["params"]

    def _check_identity(self, saved: dict) -> None:
        for key in (*scaling.Shape._fields, *FUNCTION_KEYS):
            was, now = saved["config"][key], self._config[key]
            if was != now:
                raise CheckpointError(
                    f"{key} is {was} in the checkpoint of {self._run} but {now} now; set it back "
                    "or choose another run_name"
                )
        if saved["tokenizer"] and self._fingerprint and saved["tokenizer"] != self._fingerprint:
            raise CheckpointError(
                f"the tokenizer of {self._run} has fingerprint {saved['tokenizer'][:16]} but "
                f"tokenizer_path holds {self._fingerprint[:16]}; set it back or choose another "
                "run_name"
            )


def _is_not_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in Path(record.pathname).parts


def _pass_over_late_answers(unraisable: Any) -> None:
    """Prints no traceback where tensorstore answers a save that orbax has given up."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _sha256(path: epath.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_manifest(directory: epath.Path, *, hashes: bool) -> None:
    sizes = files.sizes(directory)
    with ThreadPoolExecutor() as pool:  # hashing leaves the GIL free
        paths = [directory / name for name in sizes]
        digests = pool.map(_sha256, paths) if hashes else [None] * len(paths)
        entries = {
            name: {"bytes": size, "sha256": digest}
            for (name, size), digest in zip(sizes.items(), digests, strict=True)
        }
    files.write_whole(directory / MANIFEST, json.dumps({"files": entries}, indent=1))


def _find_damage(directory: epath.Path) -> str | None:
    """What is wrong with a finished checkpoint, None if it is as it was written.

    Raises OSError where a bucket gives no answer; a disk that gives none is damage.
    """
    try:
        entries = json.loads((directory / MANIFEST).read_text())["files"]
        sizes = files.sizes(directory)
        for name, entry in entries.items():
            if name not in sizes:
                return f"{name} is missing"
            if sizes[name] != entry["bytes"]:
                return f"{name} has {sizes[name]} bytes instead of {entry['bytes']}"
        with ThreadPoolExecutor() as pool:
            hashed = {
                name: entry["sha256"]
                for name, entry in entries.items()
                if entry["sha256"] is not None
            }
            digests = pool.map(lambda name: _sha256(directory / name), hashed)
            for name, digest in zip(hashed, digests, strict=True):
                if digest != hashed[name]:
                    return f"{name} has changed"
    except OSError as error:
        if files.is_remote(directory) and not isinstance(error, FileNotFoundError):
            raise
        return _one_line(error)
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not as it was written"
    return None


@functools.cache
def _versions() -> dict[str, str | None]:
    """Versions that bit-identical numbers depend on; None for what is not installed."""
    found: dict[str, str | None] = {"python": sys.version.split()[0]}
    for package in (
        "maxnano",
        "jax",
        "jaxlib",
        "libtpu",
        "flax",
        "optax",
        "orbax-checkpoint",
    ):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    try:
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, timeout=5, check=True)
        found["commit"] = commit.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        found["commit"] = None
    return found


def _one_line(error: Exception) -> str:
    # tensorstore adds pages about what it was told to open.
    text = re.sub(r" \[(tensorstore_spec|http_response_body)='.*?(?<!\\)'\]", "", str(error))
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:100]} ... {text[-190:]}"  # causes come last


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr, flush=True)

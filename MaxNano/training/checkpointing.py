"""Checkpoints of a run: asynchronous, atomic, verified on restore, one writer per run.

A run's folder has `checkpoints/<step>/`, each with `state/` (the train state, by orbax), `extra/`
(JSON: data position, metrics, resolved config, versions, devices) and, written last, a manifest
(MaxNano/storage/checkpoints.py) that makes it count. With several processes all of them call the
methods of Checkpointer in the same order; process 0 lists the folder.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import FrozenConfigDict
from orbax.checkpoint._src.serialization import tensorstore_utils

from MaxNano import console
from MaxNano.distributed import runtime
from MaxNano.storage.checkpoints import CheckpointError, CheckpointFolder, write_manifest
from MaxNano.storage.run_lock import RunLock, Superseded, take_run
from MaxNano.training import checkpoint_identity

MAX_FAILED_SAVES = 3
SAVE_TIMEOUT_SECONDS = 1200  # a process waits this long for the others' parts of a checkpoint
# tensorstore retries a bucket that does not answer for about two minutes, as the next save waits
# for this one. Its own default is far longer, and orbax has no option for it.
BUCKET_RETRIES = {"max_retries": 8, "initial_delay": "1s", "max_delay": "32s"}
for _context in (
    tensorstore_utils._BASE_TS_CONTEXT,
    tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT,
):
    _context["gcs_request_retries"] = BUCKET_RETRIES
CLOCK_STEPS = 16  # several hosts compare clocks this often: each time costs a round trip


class CheckpointReader:
    """Restores the checkpoints of the run in `directory` (local or gs://), and changes nothing
    there.

    `tokenizer_fingerprint` is compared with that of a checkpoint; "" is unknown and never compared.
    """

    def __init__(
        self,
        config: FrozenConfigDict,
        directory: epath.PathLike,
        *,
        tokenizer_fingerprint: str = "",
    ) -> None:
        _silence_libraries()
        self._config = config
        self._fingerprint = tokenizer_fingerprint
        self._folder = CheckpointFolder(directory)
        self._sets_aside = False  # whether damaged checkpoints are renamed
        self._orbax = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(), timeout_secs=SAVE_TIMEOUT_SECONDS
        )

    def latest_step(self) -> int | None:
        """Step of the newest finished checkpoint, None if there is none."""
        steps = _ask_primary(self._folder.steps)
        return steps[-1] if steps else None

    def restore(
        self,
        abstract_state: Any,
        step: int | None = None,
        check: Callable[[dict], Any] = lambda extra: None,
    ) -> tuple[Any, dict]:
        """(state, extra) of the newest intact checkpoint, or of `step`.

        check: called with `extra` before the state is read; it may raise CheckpointError.
        abstract_state: pytree of jax.ShapeDtypeStruct with shardings, which may belong to another
        mesh than the one that saved. A damaged checkpoint is reported on stderr, renamed to
        `<step>.damaged` if this is the run's writer, and the one before is used.
        Raises CheckpointError if none is intact, or if it is of another tokenizer or model.
        """

        def read(path: epath.Path) -> Any:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
            return self._orbax.restore(path, args=args).state

        return self._restore(step, read, check)

    def restore_params_only(
        self, abstract_params: Any = None, step: int | None = None
    ) -> tuple[Any, dict]:
        """(params, extra) as restore(), reading only `params` of the state.

        Without `abstract_params` they are numpy arrays, in the dtypes in which they were saved.
        """
        return self._restore(step, lambda path: _read_params(path / "state", abstract_params))

    def read_extra(self, step: int | None = None) -> dict:
        """The JSON dict alone, as restore() returns it, not compared with this run's config."""
        return self._read_extra(self._choose(step))

    def _choose(self, step: int | None) -> int:
        return _ask_primary(lambda: self._folder.newest_intact(step, set_aside=self._sets_aside))

    def _restore(
        self,
        step: int | None,
        read: Callable[[epath.Path], Any],
        check: Callable[[dict], Any] = lambda extra: None,
    ) -> tuple[Any, dict[str, Any]]:
        chosen = self._choose(step)
        run = self._folder.run
        try:
            extra = self._read_extra(chosen)
            checkpoint_identity.check(extra["run"], self._config, self._fingerprint, run)
            check(extra)
            return read(self._folder.path(chosen)), extra
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"the checkpoint of step {chosen} in {run} cannot be read: {_reason(error)}"
            ) from error

    def _read_extra(self, step: int) -> dict[str, Any]:
        args = ocp.args.Composite(extra=ocp.args.JsonRestore())
        return self._orbax.restore(self._folder.path(step), args=args).extra


class Checkpointer(CheckpointReader):
    """Saves and restores the checkpoints of the run in `directory` (local or gs://).

    Use as a context manager, or call close(). With `writer` it owns the run: on a disk a second
    writer is refused with CheckpointError, on gs:// the first one stops at its next save.
    `tokenizer_fingerprint` is saved with each checkpoint and compared on restore; "" is unknown and
    never compared.
    """

    def __init__(
        self,
        config: FrozenConfigDict,
        directory: epath.PathLike,
        *,
        tokenizer_fingerprint: str = "",
        writer: bool = True,
    ) -> None:
        super().__init__(config, directory, tokenizer_fingerprint=tokenizer_fingerprint)
        self._sets_aside = writer
        self._last_step: int | None = None
        self._last_save = time.monotonic()
        self._lock: RunLock | None = None
        if writer:
            _ask_primary(self._own_run)
        self._saver = _Saver(self._folder, self._orbax, self._lock, config.checkpoint_keep)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type | None, *exc_info: object) -> None:
        self.close(is_failing=exc_type is not None)

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
        is_due = time.monotonic() - self._last_save >= 60 * config.checkpoint_interval_minutes
        if jax.process_count() > 1:
            if step % CLOCK_STEPS:
                return False
            is_due = bool(multihost_utils.broadcast_one_to_all(np.int32(is_due)))
        return is_due

    def save(self, step: int, state: Any, extra: dict) -> None:
        """Save the pytree `state` of jax arrays and the JSON-able dict `extra` as step `step`.

        With async_checkpointing it returns once the state may be donated. A failure in any process
        is reported by check(), and the next interval tries again. A step that is already saved
        is not saved again.
        """
        self._saver.join()
        self._report()
        problem = None
        try:
            if step in _ask_primary(self._folder.steps):
                return
        except CheckpointError as error:
            problem = error
        self._last_step = step
        self._last_save = time.monotonic()
        identity = checkpoint_identity.describe(self._config, self._fingerprint)
        self._saver.start(step, state, {**extra, "run": {"step": step, **identity}}, problem)
        if not self._config.async_checkpointing:
            self._saver.join()
            self._report()
        self.check()

    def check(self) -> None:
        """Report a failed save in one line on stderr, and remove what it left.

        Several processes do so together, at the next save or in wait().
        Raises CheckpointError after MAX_FAILED_SAVES failures in a row.
        """
        if not self._saver.is_running() and jax.process_count() == 1:
            self._report()

    def wait(self) -> None:
        """Return when the last save is on disk with its manifest; CheckpointError if it failed."""
        self._saver.join()
        reason = self._saver.take_failure()
        if reason is not None:
            raise CheckpointError(
                f"the checkpoint of step {self._last_step} could not be written to "
                f"{self._folder.run}: {reason}"
            )

    def close(self, *, is_failing: bool = False) -> None:
        """Finish the last save and release the run in any case; raises as wait() does.

        is_failing: this process ends by an error that the others may not have.
        """
        try:
            if is_failing and jax.process_count() > 1:
                self._saver.join()
            else:
                self.wait()
        finally:
            self._orbax.close()
            if self._lock is not None:
                self._lock.release()

    def check_free_space(self, state: Any) -> None:
        """CheckpointError if the disk cannot hold the checkpoints to keep; call before training.

        state: the train state or its abstract shapes. Nothing is checked on gs://.
        """
        if not self._folder.is_local:
            return
        size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        # The oldest checkpoint is deleted only after a new one is finished.
        missing = max(1, self._config.checkpoint_keep + 1 - len(self._folder.steps())) * size
        free = shutil.disk_usage(self._folder.run).free
        if free < missing:
            raise CheckpointError(
                f"{self._folder.run} has {console.bytes_text(free)} free but checkpoints need "
                f"{console.bytes_text(missing)}; free space, lower checkpoint_keep or set "
                "base_output_directory to another disk"
            )

    def _own_run(self) -> None:
        """In process 0: become the owner, and clean up after a process that died."""
        self._lock = take_run(self._folder.run, self._folder.root)
        try:
            self._folder.remove_unfinished()
        except BaseException:
            self._lock.release()
            raise

    def _report(self) -> None:
        reason = self._saver.take_failure()
        if reason is None:
            return
        if self._saver.failures >= MAX_FAILED_SAVES:
            raise CheckpointError(
                f"{self._saver.failures} checkpoints in a row could not be written to "
                f"{self._folder.run}: {reason}"
            )
        if jax.process_index() == 0:
            console.warn(
                f"the checkpoint of step {self._last_step} could not be written ({reason}); "
                "trying again at the next interval"
            )


class _Saver:
    """One save at a time: orbax copies the state, a thread waits for it and writes the manifest."""

    def __init__(
        self,
        folder: CheckpointFolder,
        orbax: ocp.AsyncCheckpointer,
        lock: RunLock | None,
        keep: int,
    ) -> None:
        self.failures = 0  # failed saves in a row, in any process
        self._folder, self._orbax, self._lock, self._keep = folder, orbax, lock, keep
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None  # of the last save in this process
        self._is_judged = True  # whether the processes have agreed on how the last save ended

    def is_running(self) -> bool:
        """Whether the last save is still being written."""
        if self._thread is not None and not self._thread.is_alive():
            self.join()
        return self._thread is not None

    def join(self) -> None:
        """Wait for the last save."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def start(self, step: int, state: Any, extra: dict, problem: Exception | None) -> None:
        """Copy the state and write it in a thread; `problem` makes the save fail at once."""
        self._error, self._is_judged = problem, False
        if problem is not None:
            return
        path = self._folder.path(step)
        try:
            if jax.process_index() == 0 and not self._folder.is_local:
                # Left by an interrupted save of this step; orbax needs rights to the bucket for it.
                path.rmtree(missing_ok=True)
            self._orbax.save(
                path,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), extra=ocp.args.JsonSave(extra)
                ),
                force=True,  # the same on a disk
            )
        except Exception as error:  # noqa: BLE001 (take_failure() returns it)
            self._fail(error)
        else:
            self._thread = threading.Thread(target=self._finish, args=(path,), name="checkpoint")
            self._thread.start()

    def take_failure(self) -> str | None:
        """Why the last save failed in any process, None if it did not; answers once per save.

        All processes call it, as soon as they have joined the save.
        """
        if self._is_judged:
            return None
        self._is_judged = True
        error, self._error = self._error, None
        mine = error and (
            isinstance(error, TimeoutError),  # sorts a cause before what merely waited for it
            _reason(error),
            isinstance(error, Superseded),
        )
        problems = sorted(filter(None, runtime.gather_json(mine)))
        if not problems:
            self.failures = 0
            return None
        for _, reason, is_superseded in problems:
            if is_superseded:
                raise CheckpointError(reason)
        self.failures += 1
        if jax.process_index() == 0:
            with contextlib.suppress(CheckpointError):
                self._folder.remove_temporary()
        return problems[0][1]

    def _finish(self, path: epath.Path) -> None:
        """In the thread: wait for orbax, write the manifest, delete old checkpoints."""
        try:
            self._orbax.wait_until_finished()
            if self._lock is not None:
                self._lock.check()
            if jax.process_index() == 0:
                write_manifest(path)
        except Exception as error:  # noqa: BLE001 (take_failure() returns it)
            self._fail(error)
            return
        if jax.process_index() == 0:
            try:
                self._folder.remove_old(self._keep)
            except (OSError, CheckpointError) as error:
                console.warn(
                    f"old checkpoints in {self._folder.run} could not be deleted "
                    f"({_reason(error)}); trying again after the next save"
                )

    def _fail(self, error: Exception) -> None:
        self._error = error
        # orbax raises one error of a failed save per call; the rest would fail the next operation.
        for _ in range(10):
            try:
                return self._orbax.wait_until_finished()
            except Exception:  # noqa: BLE001, S112 (the first one is reported)
                continue


def _ask_primary(function: Callable[[], Any]) -> Any:
    """The JSON-able result of function() in process 0, or its CheckpointError, in all processes."""
    result, problem = None, None
    if jax.process_index() == 0:
        try:
            result = function()
        except CheckpointError as error:
            problem = str(error)
    result, problem = runtime.gather_json((result, problem))[0]
    if problem is not None:
        raise CheckpointError(problem)
    return result


def _read_params(path: epath.Path, abstract_params: Any) -> Any:
    # A separate checkpointer: the handler of the other one is bound to whole states.
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        if abstract_params is None:
            tree = reader.metadata(path).item_metadata.tree
            item = {"params": jax.tree.map(lambda _: 0, tree["params"])}
            args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        else:
            item = {"params": abstract_params}
            args = ocp.checkpoint_utils.construct_restore_args(item)
        restored = reader.restore(
            path, args=ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True)
        )
    return restored["params"]


def _reason(error: Exception) -> str:
    # tensorstore appends pages about the object that it opened.
    text = re.sub(r" \[(tensorstore_spec|http_response_body)='.*?(?<!\\)'\]", "", str(error))
    return console.one_line(text or type(error).__name__, 300)


def _silence_libraries() -> None:
    """Keep orbax and tensorstore from printing tracebacks for errors that are reported here."""
    logging.getLogger("absl").addFilter(_is_not_orbax)
    logging.getLogger("asyncio").addFilter(_is_not_unread)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _ignore_late_answers


def _is_not_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in Path(record.pathname).parts


def _is_not_unread(record: logging.LogRecord) -> bool:
    # Many arrays fail together, and orbax reads the error of one. asyncio tells the others at exit.
    text = record.getMessage()
    return "exception was never retrieved" not in text or "orbax" not in text


def _ignore_late_answers(unraisable: Any) -> None:
    """No traceback if tensorstore answers a save that orbax has given up."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)

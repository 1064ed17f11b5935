"""Reading and encoding for the loader: in this process, or in spawned ones that never import JAX.

A worker process has a fixed share of the readers and answers requests in order, so each reader is
the same sequence for any number of workers. A request names its reader because readers are consumed
at different speeds: a round-robin prefetcher would buffer the slower ones without bound. A worker
ends when its pipe closes, even if its parent was killed.
"""

import collections
import contextlib
import math
import multiprocessing
import multiprocessing.resource_tracker
import multiprocessing.util
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Protocol

import numpy as np

from MaxNano.data import packing, sources, stream

# Requests in flight per reader: the next list is encoded while the packer uses the current one.
_LOOKAHEAD = 2
_EXIT_SECONDS = 5.0

# Each encoding has its own type of position; the loader only stores it.
Reply = tuple[Any, list[packing.Document]] | sources.NotArrived


class Encoding(Protocol):
    """Reads documents and turns them into tokens. Can be pickled for worker processes."""

    readers: int  # of all hosts
    row_tokens: int
    padding: int | None  # for packing.BestFitPacker
    splits: bool  # whether long documents are split; for packing.BestFitPacker too

    def lists(self, reader: int, position: Any) -> Iterator[Reply]:
        """Endless lists of encoded documents of one reader, each with the position after it.

        Yields NotArrived while the next file is missing; the caller waits and asks again.
        """

    def start_position(self, reader: int) -> Any:
        """The position at which a reader begins."""

    def position_to_json(self, position: Any) -> dict[str, Any]:
        """A position as JSON values."""

    def position_from_json(self, saved: Mapping[str, Any]) -> Any:
        """The position that position_to_json got. Raises ValueError if the data have changed."""

    def progress(self, positions: Sequence[Any]) -> dict[str, float]:
        """The progress of these readers, as metrics for the step line."""


# A list of documents to split ends at this many characters: all their tokens are buffered.
SPLIT_LIST_CHARACTERS = 1 << 21


class TextEncoding(NamedTuple):
    """The Encoding of text documents; each begins with <|bos|>."""

    source: sources.Source
    tokenizer: Any
    readers: int
    list_documents: int
    row_tokens: int
    splits: bool = False
    skips_damaged: bool = False
    padding: None = None

    def lists(self, reader: int, position: Any) -> Iterator[Reply]:
        lists = stream.read_lists(
            self.source,
            reader,
            self.readers,
            self.list_documents,
            position,
            characters=SPLIT_LIST_CHARACTERS if self.splits else math.inf,
            skip_damaged=self.skips_damaged,
        )
        for item in lists:
            if isinstance(item, sources.NotArrived):
                yield item
                continue
            position, texts = item
            yield position, self._documents(self.tokenizer.encode_batch(texts, bos=True))

    def _documents(self, encoded: Sequence[np.ndarray]) -> list[packing.Document]:
        if not self.splits:
            return [packing.cut_document(ids, self.row_tokens) for ids in encoded]
        return [
            document for ids in encoded for document in packing.split_document(ids, self.row_tokens)
        ]

    def start_position(self, reader: int) -> Any:
        return stream.start_position(self.source, reader)

    def position_to_json(self, position: Any) -> dict[str, Any]:
        return stream.position_to_json(self.source, position)

    def position_from_json(self, saved: Mapping[str, Any]) -> Any:
        return stream.position_from_json(self.source, saved)

    def progress(self, positions: Sequence[Any]) -> dict[str, float]:
        """Epoch, file index and row group of the furthest reader, in a mixture's first part.

        Also, once there are any, the rows without text and the damaged parts that all of these
        readers have skipped.
        """
        furthest = max(positions)
        skipped = {
            "rows_without_text": sum(position.rows_without_text for position in positions),
            "damaged_parts": sum(position.damaged_parts for position in positions),
        }
        return {
            "epoch": furthest.epoch,
            "file": furthest.file,
            "row_group": furthest.group,
            **{name: count for name, count in skipped.items() if count},
        }


class Reading(Protocol):
    """Encoded lists of several readers, each in its own order."""

    def next(self, reader: int) -> Reply: ...

    def close(self) -> None: ...


def start(encoding: Encoding, positions: Mapping[int, Any], data_workers: int) -> Reading:
    """Start reading at `positions` ({reader: position}), with `data_workers` processes or none."""
    if data_workers == 0:
        return _LocalReading(encoding, positions)
    return _WorkerReading(encoding, positions, data_workers)


class _LocalReading:
    def __init__(self, encoding: Encoding, positions: Mapping[int, Any]):
        self._lists = {r: encoding.lists(r, at) for r, at in positions.items()}

    def next(self, reader: int) -> Reply:
        return next(self._lists[reader])

    def close(self) -> None:
        pass


class _WorkerReading:
    def __init__(self, encoding: Encoding, positions: Mapping[int, Any], data_workers: int):
        workers = min(data_workers, len(positions))
        shares: list[dict[int, Any]] = [{} for _ in range(workers)]
        for index, (reader, position) in enumerate(sorted(positions.items())):
            shares[index % workers][reader] = position
        self._workers = [_Worker(encoding, share) for share in shares]
        self._worker_of = {
            reader: worker
            for worker, share in zip(self._workers, shares, strict=True)
            for reader in share
        }

    def next(self, reader: int) -> Reply:
        return self._worker_of[reader].next(reader)

    def close(self) -> None:
        for worker in self._workers:
            worker.hang_up()
        for worker in self._workers:
            worker.join()


class _Worker:
    """The parent's side of one worker process."""

    def __init__(self, encoding: Encoding, positions: Mapping[int, Any]):
        context = multiprocessing.get_context("spawn")
        self._connection, child = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(child, encoding, positions), name="maxnano-data", daemon=True
        )
        with _signals_blocked(), _without_main():
            self._process.start()
        child.close()  # otherwise the pipe would stay open after the worker's death
        # At exit, before multiprocessing waits for the worker to end.
        multiprocessing.util.Finalize(self, self._connection.close, exitpriority=10)
        self._ready: dict[int, collections.deque] = {r: collections.deque() for r in positions}
        for reader in list(positions) * _LOOKAHEAD:
            self._connection.send(reader)

    def next(self, reader: int) -> Reply:
        try:
            while not self._ready[reader]:
                replied, reply = self._connection.recv()
                self._ready[replied].append(reply)
            reply = self._ready[reader].popleft()
            if isinstance(reply, Exception):
                raise reply
            self._connection.send(reader)
            return reply
        except (EOFError, ConnectionError):
            self._process.join(_EXIT_SECONDS)
            raise ValueError(
                f"a data worker died (exit code {self._process.exitcode}); if the host ran out of "
                "memory, set a smaller data_workers"
            ) from None

    def hang_up(self) -> None:
        self._connection.close()

    def join(self) -> None:
        self._process.join(_EXIT_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(connection: Connection, encoding: Encoding, positions: Mapping[int, Any]) -> None:
    """The worker process: answers (reader, reply) for every reader number until the pipe closes."""
    lists = {r: encoding.lists(r, at) for r, at in positions.items()}
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            reader = connection.recv()
            try:
                reply = next(lists[reader])
            except ValueError as error:
                kind = type(error) if isinstance(error, sources.DamagedData) else ValueError
                reply = kind(str(error))
            except Exception:
                # As text: not every exception can be pickled.
                reply = RuntimeError(f"a data worker failed:\n{traceback.format_exc()}")
            connection.send((reader, reply))


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Start processes that never see a signal to stop.

    It is for the trainer, which saves a checkpoint and then closes the pipe; but a closing terminal
    and SLURM signal all processes at once. A new process inherits the mask of the thread.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        # Starts at the first process, and then unblocks SIGINT and SIGTERM in this thread.
        multiprocessing.resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Keep a spawned process from importing the trainer's main module, which imports JAX."""
    main = vars(sys.modules["__main__"])
    hidden = {name: main[name] for name in ("__file__", "__spec__") if name in main}
    main |= dict.fromkeys(hidden)  # multiprocessing imports the file that these name
    try:
        yield
    finally:
        main |= hidden

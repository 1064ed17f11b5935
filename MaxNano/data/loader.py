"""The loader: this host's packed batches, prefetched in the background, with an exact state.

Reader r of R fills the r-th of R equal blocks of rows of the global batch. A host takes a
contiguous range of rows and opens only the readers that fill them. The batch of a step is therefore
the same for any number of hosts, devices and worker processes; with R readers it is nanochat's on R
ranks.

Worker processes (workers.py) only read and encode: packing takes microseconds per row, and its
state stays in this process.
"""

import base64
import collections
import contextlib
import queue
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from MaxNano.data import conversations, packing, sources, stream, workers
from MaxNano.distributed import hardware

Batch = dict[str, np.ndarray]


class ReaderState(NamedTuple):
    """What resumes a reader."""

    position: Any
    documents: tuple[packing.Document, ...] = ()  # not packed yet, in order of arrival
    counts: packing.Counts = packing.NO_TOKENS


class _Snapshot:
    """The state of every open reader between two batches. Immutable.

    Cheap, because the documents are shared with the packer; Loader.state serializes it.
    """

    def __init__(self, readers: Mapping[int, ReaderState]):
        self.readers = dict(readers)


class _PackedRows:
    """Endless (rows, row_tokens) int32: this host's `rows` of each global batch.

    `snapshot` has the initial state of the readers that fill these rows.
    """

    def __init__(
        self,
        encoding: workers.Encoding,
        snapshot: _Snapshot,
        *,
        rows: range,
        reader_rows: int,
        buffer_documents: int,
        data_workers: int,
    ):
        self.encoding = encoding
        self.snapshot = snapshot
        self.rows = rows
        self.reader_rows = reader_rows
        self.buffer_documents = buffer_documents
        self.data_workers = data_workers
        self.stopping = threading.Event()  # ends a wait for a file that has not arrived

    def __iter__(self) -> "_PackedRowsIterator":
        return _PackedRowsIterator(self)


class _PackedRowsIterator:
    def __init__(self, dataset: _PackedRows):
        self._dataset = dataset
        self._reading: workers.Reading | None = None
        self._patience = stream.Patience()
        readers = dataset.snapshot.readers
        self._positions = {reader: saved.position for reader, saved in readers.items()}
        self._packers = {
            reader: packing.BestFitPacker(
                self._dataset.encoding.row_tokens,
                self._dataset.buffer_documents,
                lambda reader=reader: self._next_documents(reader),
                saved.documents,
                self._dataset.encoding.padding,
                self._dataset.encoding.splits,
                saved.counts,
            )
            for reader, saved in readers.items()
        }

    def snapshot(self) -> _Snapshot:
        """The state after the rows returned last."""
        return _Snapshot(
            {
                r: ReaderState(self._positions[r], packer.documents, packer.counts)
                for r, packer in self._packers.items()
            }
        )

    def __next__(self) -> np.ndarray:
        dataset = self._dataset
        if self._reading is None:
            self._reading = workers.start(dataset.encoding, self._positions, dataset.data_workers)
        filled = np.empty(
            (len(self._packers), dataset.reader_rows, dataset.encoding.row_tokens), np.int32
        )
        for packer, rows in zip(self._packers.values(), filled, strict=True):
            for row in rows:
                packer.fill(row)
        # Hosts that share a reader fill all of its rows, and each keeps its part.
        first = dataset.rows.start - min(self._packers) * dataset.reader_rows
        rows = filled.reshape(-1, dataset.encoding.row_tokens)
        return rows[first : first + len(dataset.rows)]

    def close(self) -> None:
        if self._reading is not None:
            self._reading.close()
            self._reading = None

    def _next_documents(self, reader: int) -> list[packing.Document]:
        while isinstance(reply := self._reading.next(reader), sources.NotArrived):
            self._patience.wait(reply, self._dataset.stopping)
            if self._dataset.stopping.is_set():
                raise RuntimeError("the loader was closed")
        self._positions[reader], documents = reply
        return documents


class _Prefetch:
    """The rows of a data set and the state after each, `size` of them prepared ahead by a thread."""

    def __init__(self, dataset: _PackedRows, size: int):
        self._rows = iter(dataset)
        self._ready: queue.Queue = queue.Queue(size)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._prepare, name="maxnano-batches", daemon=True)
        self._thread.start()

    def _prepare(self) -> None:
        try:
            while not self._closed.is_set():
                self._ready.put((next(self._rows), self._rows.snapshot()))
        except BaseException as error:  # noqa: BLE001 (raised where the rows are awaited)
            self._ready.put(error)
        finally:
            self._rows.close()

    def __next__(self) -> tuple[np.ndarray, _Snapshot]:
        ready = self._ready.get()
        if isinstance(ready, BaseException):
            raise ready
        return ready

    def close(self) -> None:
        """End the thread, after the rows that it prepares."""
        self._closed.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):  # makes room for what the thread still puts
                self._ready.get(timeout=0.02)
        self._thread.join()


def to_batch(rows: np.ndarray) -> Batch:
    """Split int32 rows (rows, T + 1) into inputs, targets and weights, each (rows, T).

    A token without loss is stored as its complement, ~id (see conversations.py); its target is -1.
    """
    return {
        "inputs": np.where(rows < 0, ~rows, rows)[:, :-1].copy(),
        "targets": np.maximum(rows[:, 1:], -1),
        "weights": np.ones((rows.shape[0], rows.shape[1] - 1), np.float32),
    }


class Loader:
    """Endless batches of this host: dict(inputs int32, targets int32, weights float32), (rows, T).

    A context manager; `close` ends its thread and processes. `next` raises their errors and closes
    the loader.
    """

    def __init__(self, dataset: _PackedRows, prefetch_batches: int):
        self._encoding = dataset.encoding
        self._stopping = dataset.stopping
        # The state after the last batch returned, not after the prefetched ones.
        self.snapshot = dataset.snapshot
        self._rows: _Prefetch | None = _Prefetch(dataset, prefetch_batches)

    @property
    def readers(self) -> int:
        """The number of readers of all hosts: data_readers, or fewer of small data."""
        return self._encoding.readers

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._rows is None:
            raise ValueError("this loader is closed")
        try:
            rows, self.snapshot = next(self._rows)
        except BaseException:
            self.close()
            raise
        return to_batch(rows)

    def state(self, snapshot: _Snapshot | None = None) -> dict[str, Any]:
        """JSON values with which make_loader resumes after the last batch returned.

        Buffered documents are saved as tokens, at most a row of each. Positions would be smaller,
        but the buffer collects the longest documents of everything read so far, and a resumed run
        would have to read nearly all of it again to find them.
        """
        snapshot = self.snapshot if snapshot is None else snapshot
        return {
            "data_readers": self._encoding.readers,
            "row_tokens": self._encoding.row_tokens,
            "long_documents": _long_documents(self._encoding),
            "readers": {
                str(reader): {
                    **self._encoding.position_to_json(saved.position),
                    **_documents_to_text(saved.documents),
                    "tokens_read": saved.counts.read,
                    "tokens_discarded": saved.counts.discarded,
                }
                for reader, saved in snapshot.readers.items()
            },
        }

    def position(self, snapshot: _Snapshot | None = None) -> dict[str, float]:
        """The progress of this host's readers, as metrics for the step line.

        discarded_share: the share of the tokens read so far that long_documents=crop discards.
        """
        readers = (self.snapshot if snapshot is None else snapshot).readers.values()
        progress = self._encoding.progress([saved.position for saved in readers])
        if self._encoding.padding is not None:
            return progress
        read, discarded = map(sum, zip(*(saved.counts for saved in readers), strict=True))
        return {**progress, "discarded_share": discarded / max(1, read)}

    def close(self) -> None:
        if self._rows is not None:
            self._stopping.set()
            self._rows.close()
            self._rows = None

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def make_loader(
    config: Any,
    tokenizer: Any,
    split: str,
    *,
    batch_rows: int,
    state: Mapping[str, Any] | None = None,
    host_index: int = 0,
    host_count: int = 1,
) -> Loader:
    """The loader of one host: rows of `max_target_length` tokens, `batch_rows` over all hosts.

    split: "train" or "validation". state: from Loader.state; of several hosts, merge_states.
    tokenizer: anything with `encode_batch(texts, bos=True)` that can be pickled.
    Raises ValueError if readers, rows, hosts, data and state do not fit together.
    """
    encoding = _make_encoding(config, tokenizer, split)
    readers = encoding.readers
    if batch_rows % readers:
        works = ", ".join(str(n) for n in range(1, batch_rows + 1) if batch_rows % n == 0)
        raise ValueError(
            f"data_readers={readers} does not divide the {batch_rows} rows of a {split} batch; "
            f"set data_readers to one of {works}"
        )
    if batch_rows % host_count:
        raise ValueError(
            f"{host_count} hosts do not divide the {batch_rows} rows of a {split} batch; "
            f"set global_batch_tokens to a multiple of {host_count} x max_target_length"
        )
    host_rows, reader_rows = batch_rows // host_count, batch_rows // readers
    rows = range(host_index * host_rows, (host_index + 1) * host_rows)
    opened = range(rows[0] // reader_rows, rows[-1] // reader_rows + 1)
    dataset = _PackedRows(
        encoding,
        _restore(encoding, opened, state),
        rows=rows,
        reader_rows=reader_rows,
        buffer_documents=config.packing_buffer_documents,
        data_workers=hardware.data_workers(config, jax.default_backend(), jax.local_device_count()),
    )
    return Loader(dataset, config.prefetch_batches)


# The types of data sets whose documents are not plain text, with the class that encodes them.
ENCODINGS = {"chat": conversations.ConversationEncoding}


def _make_encoding(config: Any, tokenizer: Any, split: str) -> workers.Encoding:
    if config.dataset_type in ENCODINGS:
        return ENCODINGS[config.dataset_type](config, tokenizer, split)
    source = sources.open_source(config, split)
    return workers.TextEncoding(
        source=source,
        tokenizer=tokenizer,
        readers=stream.usable_readers(source, config.data_readers, config.skip_corrupt_data),
        list_documents=config.tokenize_batch_documents,
        row_tokens=config.max_target_length + 1,
        splits=config.long_documents == "split",
        skips_damaged=config.skip_corrupt_data,
    )


def host_share(sharding: jax.sharding.Sharding, rows: int) -> dict[str, int]:
    """host_index and host_count for make_loader, from the sharding of a batch of `rows` rows.

    Hosts whose devices have the same rows, because a mesh axis that does not shard the batch spans
    them, count as one and read the same data. Raises ValueError if two hosts share some of their
    rows only.
    """
    held: dict[int, set[int]] = {}  # process -> first row of each shard on its devices
    for device, (part, _) in sharding.devices_indices_map((rows, 1)).items():
        held.setdefault(device.process_index, set()).add(part.start or 0)
    shares = sorted({tuple(sorted(starts)) for starts in held.values()})
    parts = {start for share in shares for start in share}
    if sum(map(len, shares)) != len(parts) or len({len(share) for share in shares}) > 1:
        raise ValueError(
            "hosts share some of their batch rows only: choose parallelism keys so that a mesh axis "
            "that does not shard the batch spans whole hosts, or a part of one"
        )
    mine = tuple(sorted(held[jax.process_index()]))
    return {"host_index": shares.index(mine), "host_count": len(shares)}


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge the states of all hosts into one, from which any number of hosts can resume."""
    merged: dict[str, Any] = {**states[0], "readers": {}}
    for state in states:
        merged["readers"] |= state["readers"]
    return merged


def _restore(
    encoding: workers.Encoding, opened: range, state: Mapping[str, Any] | None
) -> _Snapshot:
    if state is None:
        return _Snapshot({r: ReaderState(encoding.start_position(r)) for r in opened})
    required = {
        "data_readers": encoding.readers,
        "row_tokens": encoding.row_tokens,
        "long_documents": _long_documents(encoding),
    }
    for key, now in required.items():
        saved = state.get(key, "crop")  # earlier versions had no long_documents
        if saved != now:
            raise ValueError(
                f"the saved data position has {key}={saved} but the run has {now}; "
                "resume with the same data_readers, max_target_length and long_documents"
            )
    restored = {}
    for reader in opened:
        saved = state["readers"].get(str(reader))
        if saved is None:
            raise ValueError(
                f"the saved data position has no reader {reader}; merge the states of all hosts"
            )
        documents = _documents_from_text(saved)
        counts = packing.Counts(saved.get("tokens_read", 0), saved.get("tokens_discarded", 0))
        if "tokens_read" not in saved:  # of an earlier version: count from here on
            lost = (document.length - len(document.tokens) for document in documents)
            counts = packing.Counts(sum(document.length for document in documents), sum(lost))
        restored[reader] = ReaderState(encoding.position_from_json(saved), documents, counts)
    return _Snapshot(restored)


def _long_documents(encoding: workers.Encoding) -> str:
    return "split" if encoding.splits else "crop"


def _documents_to_text(documents: Sequence[packing.Document]) -> dict[str, str]:
    tokens = np.concatenate([np.empty(0, np.int32), *(document.tokens for document in documents)])
    low, high = tokens.min(initial=0), tokens.max(initial=0)
    dtype = next(
        dtype
        for dtype in ("<u2", "<i2", "<i4")
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max
    )
    return {
        "lengths": _to_text(np.array([document.length for document in documents]), "<i8"),
        "kept": _to_text(np.array([len(document.tokens) for document in documents]), "<i4"),
        "token_dtype": dtype,
        "tokens": _to_text(tokens, dtype),
    }


def _documents_from_text(saved: Mapping[str, str]) -> tuple[packing.Document, ...]:
    lengths, kept = _from_text(saved["lengths"], "<i8"), _from_text(saved["kept"], "<i4")
    tokens = _from_text(saved["tokens"], saved["token_dtype"]).astype(np.int32)
    ends = np.cumsum(kept)
    return tuple(
        packing.Document(length, tokens[end - count : end].copy())
        for length, count, end in zip(lengths.tolist(), kept, ends, strict=True)
    )


def _to_text(values: np.ndarray, dtype: str) -> str:
    # Level 1: higher levels take ten times as long to save a tenth of the size.
    return base64.b64encode(zlib.compress(values.astype(dtype).tobytes(), 1)).decode()


def _from_text(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype)


def put_global(batch: Batch, sharding: jax.sharding.Sharding) -> dict[str, jax.Array]:
    """Global arrays with `sharding`, from this host's rows, `batch`."""
    return {
        name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
    }


class Shortage(NamedTuple):
    """The number of batches that are ready, and why no further batch can be made."""

    ready: int
    error: Exception


class DevicePrefetch:
    """A loader's batches as global arrays, `size` of them in transfer to the devices.

    `state` and `position` are those after the batch returned last, like the loader's. An error of
    the loader is raised when the batches before it have been returned.
    """

    def __init__(self, loader: Loader, sharding: jax.sharding.Sharding, size: int):
        self._loader, self._sharding, self._size = loader, sharding, size
        self._snapshot = loader.snapshot
        self._in_transfer: collections.deque = collections.deque()
        self._error: Exception | None = None

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        return self

    def fill(self) -> None:
        """Load and transfer until the next batch is available, or known to be impossible to make.

        If it is interrupted, only `state` may be used afterwards.
        """
        while self._error is None and len(self._in_transfer) <= self._size:
            try:
                batch = put_global(next(self._loader), self._sharding)
            except (ValueError, OSError, RuntimeError) as error:
                self._error = error
            else:
                self._in_transfer.append((batch, self._loader.snapshot))

    def shortage(self) -> Shortage | None:
        """What is left if no further batch can be made."""
        return None if self._error is None else Shortage(len(self._in_transfer), self._error)

    def __next__(self) -> dict[str, jax.Array]:
        self.fill()
        if not self._in_transfer:
            raise self._error
        batch, self._snapshot = self._in_transfer.popleft()
        return batch

    def state(self) -> dict[str, Any]:
        return self._loader.state(self._snapshot)

    def position(self) -> dict[str, float]:
        return self._loader.position(self._snapshot)

    def close(self) -> None:
        self._loader.close()

"""Throughput of the input pipeline: encoding, packing and transfer alone, and the whole loader.

    .venv/bin/python benchmarks/input_pipeline.py configs/base.yml dataset_path=... tokenizer_path=...

Prints tokens/s and the CPU seconds per million tokens, which equal the cores needed for a million
tokens/s and do not depend on the machine's other load; then the number of cores and data_workers
for a million tokens/s, and a JSON line. A v6e-8 that trains d24 in 99 minutes needs that
throughput.

With NANOCHAT=/path/to/its/checkout and NANOCHAT_PYTHON=/path/to/a/python with its packages,
nanochat's loader reads the same parquet files with the same tokenizer in alternation, and its first
rows are compared token by token.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from MaxNano import pyconfig

    pyconfig.check_command_line()

import contextlib
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import FrozenConfigDict

from benchmarks import common
from MaxNano import pyconfig
from MaxNano.data import loader, packing, sources, stream
from MaxNano.tokenization.bpe import FILE_NAME
from MaxNano.tokenization.tokenizer import Tokenizer, load_tokenizer

WARM_TOKENS = 1_000_000
MEASURED_TOKENS = 6_000_000
REPEATS = 3
POOL_DOCUMENTS = 20_000  # encoded once, and reused to measure packing alone

MILLION = 1e6


class PipelineResult(NamedTuple):
    """Tokens/s, a hash of the warm-up rows, and CPU seconds per million tokens if known."""

    speed: float
    rows: str
    cpu: float | None = None


def cpu_seconds() -> float:
    """CPU time of this process and its running children."""
    return time.process_time() + sum(
        _cpu_seconds_of(child.pid) for child in multiprocessing.active_children()
    )


def _cpu_seconds_of(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # not Linux, or it has just ended
        return math.nan
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(batches: Iterator[loader.Batch]) -> PipelineResult:
    """Throughput of `batches`; the warm-up rows are hashed."""
    rows = hashlib.sha256()
    for name, limit in (("warm", WARM_TOKENS), ("measured", MEASURED_TOKENS)):
        tokens, begin, cpu = 0, time.perf_counter(), cpu_seconds()
        while tokens < limit:
            batch = next(batches)
            tokens += batch["inputs"].size
            if name == "warm":
                for part in ("inputs", "targets"):
                    rows.update(batch[part].tobytes())
    spent = cpu_seconds() - cpu
    return PipelineResult(
        tokens / (time.perf_counter() - begin), rows.hexdigest(), spent / tokens * MILLION
    )


def measure_encoding(config: FrozenConfigDict, texts: list[list[str]]) -> PipelineResult:
    """Encoding alone, with one thread."""
    tokenizer = load_tokenizer(pyconfig.replace(config, "benchmark", tokenizer_threads=1))
    tokenizer.encode_batch(texts[0], bos=True)
    tokens, begin, cpu = 0, time.perf_counter(), cpu_seconds()
    for documents in texts:
        tokens += sum(map(len, tokenizer.encode_batch(documents, bos=True)))
        if tokens >= MEASURED_TOKENS:
            break
    spent = cpu_seconds() - cpu
    return PipelineResult(tokens / (time.perf_counter() - begin), "", spent / tokens * MILLION)


def measure_transfer(config: FrozenConfigDict, rows: int) -> PipelineResult:
    """Transfer of one batch from this host's memory to its devices, sharded by rows if possible."""
    devices = jax.local_devices()
    shards = math.gcd(rows, len(devices))
    mesh = jax.make_mesh((shards,), ("data",), devices=devices[:shards])
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    batch = loader.to_batch(np.zeros((rows, config.max_target_length + 1), np.int32))
    jax.block_until_ready(loader.put_global(batch, sharding))
    tokens, begin, cpu = 0, time.perf_counter(), cpu_seconds()
    while tokens < MEASURED_TOKENS:
        jax.block_until_ready(loader.put_global(batch, sharding))
        tokens += batch["inputs"].size
    spent = cpu_seconds() - cpu
    return PipelineResult(tokens / (time.perf_counter() - begin), "", spent / tokens * MILLION)


def measure_packing(
    config: FrozenConfigDict, lists: list[list[np.ndarray]], rows: int
) -> PipelineResult:
    """Packing alone, of encoded documents as lists of arrays."""
    row_tokens = config.max_target_length + 1
    endless = itertools.cycle(lists)

    def next_documents() -> list[packing.Document]:
        return [packing.cut_document(ids, row_tokens) for ids in next(endless)]

    packer = packing.BestFitPacker(row_tokens, config.packing_buffer_documents, next_documents)

    def batches() -> Iterator[loader.Batch]:
        while True:
            filled = np.empty((rows, row_tokens), np.int32)
            for row in filled:
                packer.fill(row)
            yield loader.to_batch(filled)

    return measure(batches())


def measure_loader(config: FrozenConfigDict, tokenizer: Tokenizer, rows: int) -> PipelineResult:
    """The whole loader: reading, encoding and packing in the background."""
    with loader.make_loader(config, tokenizer, "train", batch_rows=rows) as batches:
        return measure(batches)


def text_pool(config: FrozenConfigDict) -> list[list[str]]:
    """Lists of documents of one reader."""
    source = sources.SOURCES[config.dataset_type](config, "train")
    size = config.tokenize_batch_documents
    lists = stream.read_lists(source, 0, 1, size, stream.StreamPosition(1, 0, 0, 0))
    pool, documents = [], 0
    for position, texts in lists:
        if position.epoch > 1 or documents >= POOL_DOCUMENTS:
            return pool
        pool.append(texts)
        documents += len(texts)
    raise AssertionError("readers never end")


@contextlib.contextmanager
def start_nanochat(
    config: FrozenConfigDict, rows: int
) -> Iterator[Callable[[str], PipelineResult] | None]:
    """A function that runs nanochat's "packing" or "loader"; None without NANOCHAT."""
    if not os.environ.get("NANOCHAT"):
        yield None
        return
    if (config.dataset_type, config.tokenizer_type) != ("parquet", "bpe"):
        raise ValueError(
            "the comparison with NANOCHAT needs dataset_type=parquet and tokenizer_type=bpe"
        )
    source = sources.ParquetSource(config, "train")
    task = {
        "files": [str(Path(config.dataset_path).expanduser() / name) for name in source.files],
        "tokenizer": str(Path(config.tokenizer_path).expanduser() / FILE_NAME),
        "length": config.max_target_length,
        "rows": rows,
        "buffer_documents": config.packing_buffer_documents,
        "list_documents": config.tokenize_batch_documents,
        "threads": config.tokenizer_threads,
        "pool_documents": POOL_DOCUMENTS,
        "warm_tokens": WARM_TOKENS,
        "measured_tokens": MEASURED_TOKENS,
    }
    process = subprocess.Popen(
        [
            os.environ.get("NANOCHAT_PYTHON", sys.executable),
            Path(__file__).with_name("nanochat_input_pipeline.py"),
            json.dumps(task),
        ],
        env=os.environ | {"PYTHONPATH": os.environ["NANOCHAT"]},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(what: str) -> PipelineResult:
        process.stdin.write(f"{what}\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            raise ValueError("nanochat's loader failed; see its error above")
        return PipelineResult(*json.loads(answer))

    with process:
        yield run
        process.stdin.close()


def report(
    name: str,
    ours: Callable[[], PipelineResult],
    nanochat: Callable[[], PipelineResult] | None = None,
) -> common.Row:
    """Measure REPEATS times in alternation; returns the medians."""
    mine, theirs = [], []
    for _ in range(REPEATS):
        mine.append(ours())
        if nanochat:
            theirs.append(nanochat())
    speeds = [result.speed for result in mine]
    row = {
        "what": name,
        "tokens/s": round(statistics.median(speeds)),
        "slowest": round(min(speeds)),
        "fastest": round(max(speeds)),
        "CPU s a million": round(statistics.median(result.cpu for result in mine), 3),
    }
    if nanochat:
        other = statistics.median(result.speed for result in theirs)
        same = {result.rows for result in mine} == {result.rows for result in theirs}
        row |= {
            "nanochat": round(other),
            "times": row["tokens/s"] / other,
            "rows": "the same" if same else "OTHERS",
        }
    print(f"{name}: {row['tokens/s']:,} tokens/s", file=sys.stderr, flush=True)
    return row


def worker_counts(config: FrozenConfigDict) -> list[int]:
    """Powers of two up to the number of cores and of readers."""
    limit = min(os.cpu_count(), config.data_readers)
    return [2**power for power in range(limit.bit_length())]


def needed(rows: dict[str, common.Row]) -> str:
    """The cores and data_workers for a million tokens/s, from the CPU seconds of the parts."""
    encoding, packing_, transfer = (
        rows[name]["CPU s a million"] for name in ("encoding", "packing", "transfer")
    )
    loading = (
        rows["loader, 1 process"]["CPU s a million"] if "loader, 1 process" in rows else math.nan
    )
    main = packing_ + transfer
    return (
        f"A million tokens/s needs {encoding:.2f} cores to encode, {packing_:.2f} to pack and "
        f"{transfer:.2f} to transfer batches; with reading and communication, {loading:.2f} cores in "
        f"all. Set data_workers={math.ceil(encoding)} or more; the training process needs {main:.0%} "
        "of a core"
    )


def main(config: FrozenConfigDict) -> None:
    """Measure the pipeline that a config describes."""
    tokenizer = load_tokenizer(config)
    rows = 2 * config.data_readers
    one_reader = pyconfig.replace(config, "benchmark", data_readers=1)
    texts = text_pool(config)
    pool = [tokenizer.encode_batch(documents, bos=True) for documents in texts]
    lengths = [len(ids) for ids in itertools.chain.from_iterable(pool)]
    print(
        f"MEASURED: {len(lengths):,} documents of {statistics.mean(lengths):,.0f} tokens on average, "
        f"rows of {config.max_target_length}, {os.cpu_count()} cores, {jax.devices()[0].device_kind}"
    )
    table = [report("encoding", lambda: measure_encoding(config, texts))]
    with start_nanochat(config, rows) as nanochat:

        def run_nanochat(what: str) -> Callable[[], PipelineResult] | None:
            return (lambda: nanochat(what)) if nanochat else None

        table.append(
            report("packing", lambda: measure_packing(config, pool, rows), run_nanochat("packing"))
        )
        table.append(report("transfer", lambda: measure_transfer(config, rows)))
        name = "loader, data_readers=1"
        table.append(
            report(
                name, lambda: measure_loader(one_reader, tokenizer, rows), run_nanochat("loader")
            )
        )
    for workers in (0, *worker_counts(config)):
        name = (
            f"loader, {workers} process{'es' if workers > 1 else ''}"
            if workers
            else "loader, a thread"
        )
        variant = pyconfig.replace(config, "benchmark", data_workers=workers)
        table.append(report(name, lambda c=variant: measure_loader(c, tokenizer, rows)))
    common.show(table, digits=2)
    print(needed({row["what"]: row for row in table}))
    print(json.dumps({"cores": os.cpu_count(), "rows": table}))


if __name__ == "__main__":
    sys.exit(pyconfig.launch(main))

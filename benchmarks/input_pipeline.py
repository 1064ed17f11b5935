"""Speed of the input pipeline in tokens/s: packing alone, and the whole loader with its encoding.

    python benchmarks/input_pipeline.py configs/base.yml max_target_length=512

With NANOCHAT=/path/to/its/checkout and NANOCHAT_PYTHON=/path/to/a/python with its packages,
nanochat's own loader reads the same parquet files with the same tokenizer in the same run, turn by
turn, and its first rows are compared token by token.
"""

import contextlib
import hashlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the repository is where modules are looked for
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from ml_collections import FrozenConfigDict

from MaxNano import pyconfig, tokenizer
from MaxNano.data import loader, packing, sources

WARM_TOKENS = 1_000_000
MEASURED_TOKENS = 6_000_000
REPEATS = 3
POOL_DOCUMENTS = 20_000  # encoded beforehand for packing alone, then used again and again

Result = tuple[float, str]  # tokens/s, hash of the rows before the measured ones


def measure(batches: Iterator[loader.Batch]) -> Result:
    """Tokens per second of `batches`, and a hash of what came before the measured ones."""
    rows = hashlib.sha256()
    for name, most in (("warm", WARM_TOKENS), ("measured", MEASURED_TOKENS)):
        tokens, begin = 0, time.perf_counter()
        while tokens < most:
            batch = next(batches)
            tokens += batch["inputs"].size
            if name == "warm":
                for part in ("inputs", "targets"):
                    rows.update(batch[part].tobytes())
    return tokens / (time.perf_counter() - begin), rows.hexdigest()


def measure_packing(config: FrozenConfigDict, lists: list[list[np.ndarray]], rows: int) -> Result:
    """Documents that are already encoded, as lists of arrays, into batches."""
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


def measure_loader(config: FrozenConfigDict, encoder: tokenizer.Tokenizer, rows: int) -> Result:
    """Files into batches: reading, encoding, packing, in the background."""
    with loader.make_loader(config, encoder, "train", batch_rows=rows) as batches:
        return measure(batches)


def encoded_pool(config: FrozenConfigDict, encoder: tokenizer.Tokenizer) -> list[list[np.ndarray]]:
    """Lists of encoded documents as one reader gets them."""
    source = sources.SOURCES[config.dataset_type](config, "train")
    size = config.tokenize_batch_documents
    lists = sources.read_lists(source, 0, 1, size, sources.start_of(0))
    pool, documents = [], 0
    for position, texts in lists:
        if position.epoch > 1 or documents >= POOL_DOCUMENTS:
            return pool
        pool.append(encoder.encode_batch(texts, bos=True))
        documents += len(texts)
    raise AssertionError("readers never end")


@contextlib.contextmanager
def start_nanochat(config: FrozenConfigDict, rows: int) -> Iterator[Callable[[str], Result] | None]:
    """A function that runs nanochat's "packing" or "loader"; None where it is not asked for."""
    if not os.environ.get("NANOCHAT"):
        yield None
        return
    if (config.dataset_type, config.tokenizer_type) != ("parquet", "bpe"):
        raise ValueError(
            "NANOCHAT can be compared on dataset_type=parquet, tokenizer_type=bpe only"
        )
    source = sources.ParquetSource(config, "train")
    task = {
        "files": [str(Path(config.dataset_path).expanduser() / name) for name in source.files],
        "tokenizer": str(Path(config.tokenizer_path).expanduser() / tokenizer.FILE_NAME),
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

    def run(what: str) -> Result:
        process.stdin.write(f"{what}\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            raise ValueError("nanochat's loader failed; its error stands above")
        return tuple(json.loads(answer))

    with process:
        yield run
        process.stdin.close()


def report(name: str, ours: Callable[[], Result], nanochat: Callable[[], Result] | None) -> None:
    """Measure by turns and print the medians."""
    mine, theirs = [], []
    for _ in range(REPEATS):
        mine.append(ours())
        if nanochat:
            theirs.append(nanochat())
    speed = statistics.median(speed for speed, _ in mine)
    line = f"{name:34s} {speed:12,.0f} tokens/s"
    if nanochat:
        other = statistics.median(speed for speed, _ in theirs)
        same = "the same rows" if {h for _, h in mine} == {h for _, h in theirs} else "OTHER ROWS"
        line += f", nanochat {other:12,.0f}: {speed / other:.2f} times, {same}"
    print(line, flush=True)


def main(config: FrozenConfigDict) -> None:
    """Measure the pipeline that a config describes."""
    encoder = tokenizer.load(config)
    rows = 2 * config.data_readers
    one_reader = pyconfig.replace(config, "benchmark", data_readers=1)
    pool = encoded_pool(config, encoder)
    lengths = [len(ids) for ids in itertools.chain.from_iterable(pool)]
    print(
        f"{len(lengths):,} documents of {statistics.mean(lengths):,.0f} tokens on average, "
        f"rows of {config.max_target_length}, data_workers={config.data_workers}"
    )
    with start_nanochat(config, rows) as nanochat:

        def run_nanochat(what: str) -> Callable[[], Result] | None:
            return (lambda: nanochat(what)) if nanochat else None

        report(
            "packing alone", lambda: measure_packing(config, pool, rows), run_nanochat("packing")
        )
        report(
            "loader, data_readers=1",
            lambda: measure_loader(one_reader, encoder, rows),
            run_nanochat("loader"),
        )
    report(
        f"loader, data_readers={config.data_readers}",
        lambda: measure_loader(config, encoder, rows),
        None,
    )


if __name__ == "__main__":
    sys.exit(pyconfig.launch(main))

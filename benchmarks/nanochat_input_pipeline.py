"""nanochat's side of input_pipeline.py, which starts it in a Python with nanochat's packages.

Imports nothing of MaxNano. Reads "packing" or "loader" from each line of its input and answers with
one line of JSON: tokens/s, and a hash of the rows before the measured ones.
"""

import base64
import hashlib
import itertools
import json
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import tiktoken
from nanochat import dataloader
from nanochat.tokenizer import RustBPETokenizer


class EncodedTokenizer:
    """Replaces the tokenizer if the documents are already encoded."""

    def __init__(self, bos):
        self.bos = bos

    def get_bos_token_id(self):
        return self.bos

    def encode(self, documents, prepend, num_threads):
        return documents


def load_tokenizer(path):
    with open(path) as file:
        content = json.load(file)
    ranks = {
        base64.b64decode(token): rank
        for rank, token in enumerate(content["tokens"])
        if token is not None
    }
    encoding = tiktoken.Encoding(
        name="compared",
        pat_str=content["pattern"],
        mergeable_ranks=ranks,
        special_tokens=content["special_tokens"],
    )
    return RustBPETokenizer(encoding, "<|bos|>")


def encode_pool(task, tokenizer):
    pool = []
    for path in task["files"]:
        file = pq.ParquetFile(path)
        for group in range(file.num_row_groups):
            texts = file.read_row_group(group).column("text").to_pylist()
            for i in range(0, len(texts), task["list_documents"]):
                if sum(map(len, pool)) >= task["pool_documents"]:
                    return pool
                bos = tokenizer.get_bos_token_id()
                pool.append(tokenizer.encode(texts[i : i + task["list_documents"]], prepend=bos))
    return pool


def measure(task, tokenizer):
    batches = dataloader.tokenizing_distributed_data_loader_bos_bestfit(
        tokenizer,
        task["rows"],
        task["length"],
        "train",
        tokenizer_threads=task["threads"],
        tokenizer_batch_size=task["list_documents"],
        device="cpu",
        buffer_size=task["buffer_documents"],
    )
    rows = hashlib.sha256()
    for name in ("warm", "measured"):
        tokens, begin = 0, time.perf_counter()
        while tokens < task[f"{name}_tokens"]:
            parts = next(batches)
            tokens += parts[0].numel()
            if name == "warm":
                for part in parts:
                    rows.update(part.numpy().astype(np.int32).tobytes())
    return tokens / (time.perf_counter() - begin), rows.hexdigest()


def main():
    task = json.loads(sys.argv[1])
    tokenizer = load_tokenizer(task["tokenizer"])
    pool = encode_pool(task, tokenizer)
    dataloader.list_parquet_files = lambda **_: [*task["files"], "the held-out file"]
    from_files = dataloader._document_batches

    def from_pool(*_):
        return ((documents, (0, 0, 1)) for documents in itertools.cycle(pool))

    for line in sys.stdin:
        if line.strip() == "packing":
            dataloader._document_batches = from_pool
            result = measure(task, EncodedTokenizer(tokenizer.get_bos_token_id()))
        else:
            dataloader._document_batches = from_files
            result = measure(task, tokenizer)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()

"""What a run reads, in words for its start-up table: files by their use, and what packing discards."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from MaxNano.data import packing, sources, stream

# The estimate packs the documents of about this many rows, and no more text than this.
ESTIMATE_ROWS = 256
ESTIMATE_CHARACTERS = 2_000_000
_CHARACTERS_PER_TOKEN = 4
_MUCH_DISCARDED = 0.3  # from this share on, the table names the key that changes it


def describe_files(config: Any) -> dict[str, str]:
    """Which files of the text train, which validate, and which are not used.

    Files that cannot be found are the value, in words: a dry run needs none.
    """
    try:
        train, validation = (
            sources.open_source(config, split) for split in ("train", "validation")
        )
    except ValueError as error:
        return {"training files": f"none yet: {error}"}
    parts = [(train, validation)]
    if isinstance(train, sources.MixtureSource):
        parts = list(zip(train.parts, validation.parts, strict=True))
    rows = {
        "training files": [_count(part.files) for part, _ in parts],
        "validation files": [_count(part.files) for _, part in parts],
        "unused files": [_count(part.unused) for part, _ in parts if getattr(part, "unused", ())],
    }
    return {name: "; ".join(counts) for name, counts in rows.items() if counts}


def _count(names: Sequence[str]) -> str:
    if len(names) <= 2:
        return ", ".join(names)
    return f"{len(names):,}, {names[0]} to {names[-1]}"


def estimate_discarded(config: Any, tokenizer: Any) -> str:
    """The share of the tokens that packing discards, estimated from the first documents."""
    if config.long_documents == "split":
        return "none: long_documents=split"
    try:
        source = sources.open_source(config, "train")
        documents = _first_documents(config, source, tokenizer)
    except ValueError as error:
        return f"unknown: {error}"
    if not documents:
        return "unknown: no document has arrived"
    read, discarded = _pack(config, documents)
    share = discarded / max(1, read)
    hint = "; long_documents=split uses all" if share >= _MUCH_DISCARDED else ""
    return f"{100 * share:.0f} % (estimate from the first {len(documents):,} documents{hint})"


def _first_documents(config: Any, source: sources.Source, tokenizer: Any) -> list[packing.Document]:
    """The first documents of the first reader; not of a file that has not arrived, and none twice.

    Of a document that is longer than all text that is read here, the length is an estimate too.
    """
    row_tokens, readers = config.max_target_length + 1, config.data_readers
    left = min(ESTIMATE_CHARACTERS, ESTIMATE_ROWS * row_tokens * _CHARACTERS_PER_TOKEN)
    longest, documents = left, []
    lists = stream.read_lists(
        source,
        0,
        readers,
        config.tokenize_batch_documents,
        stream.start_position(source, 0),
        characters=longest,
        skip_damaged=True,  # the run itself may not get so far
    )
    for item in lists:
        if isinstance(item, sources.NotArrived) or item[0].epoch > 1:
            break
        encoded = tokenizer.encode_batch([text[:longest] for text in item[1]], bos=True)
        for text, ids in zip(item[1], encoded, strict=True):
            length = round(len(ids) * max(1, len(text) / longest))
            documents.append(packing.Document(length, np.asarray(ids[:row_tokens], np.int32)))
        left -= sum(map(len, item[1]))
        if left <= 0:
            break
    return documents


def _pack(config: Any, documents: Sequence[packing.Document]) -> packing.Counts:
    """What becomes of the tokens of these documents, packed until none is left."""
    row = np.empty(config.max_target_length + 1, np.int32)
    lists = iter([documents])
    packer = packing.BestFitPacker(len(row), 1, lambda: next(lists))
    try:
        while True:
            packer.fill(row)
    except StopIteration:
        return packer.counts

"""Best-fit packing of encoded documents into rows; every row begins with a document.

A row takes the longest buffered document that still fits, repeatedly. When none fits, a row of text
is filled with the first tokens of the shortest document; a row of conversations is padded. The
remainder of a document is discarded and counted, so that the rows equal nanochat's token for token,
or with long_documents=split it becomes a document of its own. The search is logarithmic.
Source: nanochat/dataloader.py@92d63d4, tokenizing_distributed_data_loader_with_state_bos_bestfit;
nanochat/scripts/chat_sft.py@92d63d4, sft_data_generator_bos_bestfit.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

# Sort keys are length << _ARRIVAL_BITS | arrival: one integer orders by length, then by arrival.
_ARRIVAL_BITS = 48
_ARRIVAL_MASK = (1 << _ARRIVAL_BITS) - 1


class Document(NamedTuple):
    """An encoded document: its length in tokens, and its first tokens, at most a row.

    The length decides the order of packing, also for a document that is longer than a row.
    """

    length: int
    tokens: np.ndarray  # int32


class Counts(NamedTuple):
    """The tokens of all documents that a packer has received, and those of them that no row gets.

    What is beyond the first row of a document counts as discarded at once, the remainder of a
    document that is cut when it is cut.
    """

    read: int = 0
    discarded: int = 0


NO_TOKENS = Counts()


def cut_document(ids: Sequence[int] | np.ndarray, row_tokens: int) -> Document:
    """A document for rows of `row_tokens`; a copy, so that a long original can be freed."""
    return Document(len(ids), np.array(ids[:row_tokens], np.int32))


def split_document(ids: np.ndarray, row_tokens: int) -> Iterator[Document]:
    """The documents of at most `row_tokens` that have all tokens of a document.

    Each begins with the document's first token, <|bos|>, because every row begins with it.
    """
    yield cut_document(ids[:row_tokens], row_tokens)
    for begin in range(row_tokens, len(ids), row_tokens - 1):
        yield _continuation(ids[0], ids[begin : begin + row_tokens - 1])


def _continuation(bos: int, ids: np.ndarray) -> Document:
    return Document(len(ids) + 1, np.concatenate([[bos], ids], dtype=np.int32))


class BestFitPacker:
    """Fills rows from a buffer of at least `buffer_documents` documents.

    `next_documents` returns the next list of documents, each of at least one token. `documents` are
    those already buffered, in order of arrival, and `counts` include them.
    `padding` is the token that fills the rest of a row into which no document fits (documents may
    then be no longer than a row); None: cut a document. `split`: buffer the remainder of a document
    that is cut, instead of discarding it; documents may be no longer than a row either.
    """

    def __init__(
        self,
        row_tokens: int,
        buffer_documents: int,
        next_documents: Callable[[], Sequence[Document]],
        documents: Sequence[Document] = (),
        padding: int | None = None,
        split: bool = False,
        counts: Counts = NO_TOKENS,
    ):
        self.row_tokens = row_tokens
        self.counts = counts
        self._split = split
        self._padding = padding
        self._target = buffer_documents
        self._next_documents = next_documents
        self._keys: list[int] = []
        self._documents: dict[int, Document] = {}  # by arrival, in order of arrival
        self._arrivals = 0
        self._add(documents)

    @property
    def documents(self) -> tuple[Document, ...]:
        """The buffered documents in order of arrival: the packer's state."""
        return tuple(self._documents.values())

    def fill(self, row: np.ndarray) -> None:
        """Fill `row`, int32 (row_tokens,)."""
        begin = 0
        while begin < self.row_tokens:
            while len(self._keys) < self._target:
                self._receive(self._next_documents())
            space = self.row_tokens - begin
            # Keys before `fits` fit; take the longest document, the first to arrive if several.
            fits = bisect_left(self._keys, (space + 1) << _ARRIVAL_BITS)
            if fits:
                longest = self._keys[fits - 1] & ~_ARRIVAL_MASK
                tokens = self._take(bisect_left(self._keys, longest, 0, fits)).tokens
            elif self._padding is not None:
                row[begin:] = self._padding
                return
            else:
                shortest = self._take(0)
                tokens = shortest.tokens[:space]
                if self._split:
                    self._add([_continuation(tokens[0], shortest.tokens[space:])])
                else:
                    self._count(0, len(shortest.tokens) - space)
            end = begin + len(tokens)
            row[begin:end] = tokens
            begin = end

    def _receive(self, documents: Sequence[Document]) -> None:
        self._add(documents)
        for length, tokens in documents:
            self._count(length, length - len(tokens))

    def _count(self, read: int, discarded: int) -> None:
        self.counts = Counts(self.counts.read + read, self.counts.discarded + discarded)

    def _add(self, documents: Sequence[Document]) -> None:
        for document in documents:
            self._documents[self._arrivals] = document
            self._keys.append(document.length << _ARRIVAL_BITS | self._arrivals)
            self._arrivals += 1
        self._keys.sort()  # a sorted run and a short tail: close to linear

    def _take(self, index: int) -> Document:
        return self._documents.pop(self._keys.pop(index) & _ARRIVAL_MASK)

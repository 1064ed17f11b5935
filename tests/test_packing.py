"""Best-fit packing: nanochat's rows, those of a plain search, and an exact state."""

import itertools

import numpy as np
import pytest
from byte_tokenizer import CountingTokenizer
from hypothesis import given
from hypothesis import strategies as st

from MaxNano.data import packing, stream


def rows_by_plain_search(lengths, row_tokens, buffer_documents, list_documents):
    """The rule said as slowly as it can be: rows as lists of (document, tokens taken)."""
    waiting = list(enumerate(lengths))
    buffer = []
    while True:
        row, space = [], row_tokens
        while space:
            while len(buffer) < buffer_documents:
                if not waiting:
                    return
                buffer += waiting[:list_documents]
                del waiting[:list_documents]
            fitting = [document for document in buffer if document[1] <= space]
            if fitting:
                longest = max(length for _, length in fitting)
                document = next(d for d in fitting if d[1] == longest)
            else:
                shortest = min(length for _, length in buffer)
                document = next(d for d in buffer if d[1] == shortest)
            buffer.remove(document)
            row.append((document[0], min(document[1], space)))
            space -= row[-1][1]
        yield row


def make_documents(lengths, row_tokens):
    """Documents in which token i of document n is 1000 n + i."""
    return [
        packing.cut_document(1000 * n + np.arange(length), row_tokens)
        for n, length in enumerate(lengths)
    ]


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=120)


@given(
    lengths=LENGTHS,
    row_tokens=st.integers(1, 25),
    buffer_documents=st.integers(1, 20),
    list_documents=st.integers(1, 10),
    cut=st.integers(0, 60),
)
def test_rows_are_those_of_a_plain_search_also_after_a_restart(
    lengths, row_tokens, buffer_documents, list_documents, cut
):
    documents = iter(make_documents(lengths, row_tokens))

    def next_documents():
        some = list(itertools.islice(documents, list_documents))
        if not some:
            raise EOFError
        return some

    def new_packer(buffered=(), counts=packing.NO_TOKENS):
        return packing.BestFitPacker(
            row_tokens, buffer_documents, next_documents, buffered, counts=counts
        )

    packer, taken_lengths = new_packer(), 0
    expected = rows_by_plain_search(lengths, row_tokens, buffer_documents, list_documents)
    for index, pieces in enumerate(expected):
        if index == cut:
            packer = new_packer(packer.documents, packer.counts)
        row = np.empty(row_tokens, np.int32)
        packer.fill(row)
        whole = np.concatenate([1000 * n + np.arange(taken) for n, taken in pieces])
        np.testing.assert_array_equal(row, whole)
        taken_lengths += sum(lengths[n] for n, _ in pieces)
        buffered = packer.documents
        assert packer.counts.read == taken_lengths + sum(d.length for d in buffered)
        kept = (index + 1) * row_tokens + sum(len(d.tokens) for d in buffered)
        assert packer.counts.discarded == packer.counts.read - kept
    with pytest.raises(EOFError):
        packer.fill(np.empty(row_tokens, np.int32))


@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=40),
    row_tokens=st.integers(2, 25),
    buffer_documents=st.integers(1, 20),
    cut=st.integers(0, 60),
)
def test_documents_that_are_split_lose_no_token(lengths, row_tokens, buffer_documents, cut):
    """Every token but the repeated <|bos|> is in the rows once, those of a document in order."""
    encoded = [
        np.array([0, *(1000 * n + np.arange(length))]) for n, length in enumerate(lengths, 1)
    ]
    lists = iter([list(packing.split_document(ids, row_tokens)) for ids in encoded])

    def new_packer(buffered=(), counts=packing.NO_TOKENS):
        return packing.BestFitPacker(
            row_tokens, buffer_documents, lambda: next(lists), buffered, None, True, counts
        )

    packer, rows = new_packer(), []
    row = np.zeros(row_tokens, np.int32)
    with pytest.raises(StopIteration):
        while True:
            if len(rows) == cut:  # a restart
                packer = new_packer(packer.documents, packer.counts)
            packer.fill(row)
            rows.append(row.copy())
            assert row[0] == 0
            row[:] = 0
    pieces = [piece for ids in encoded for piece in packing.split_document(ids, row_tokens)]
    assert packer.counts == (sum(piece.length for piece in pieces), 0)
    # In full rows, in the row that was begun, and in the buffer.
    held = np.concatenate([*rows, row, *(document.tokens for document in packer.documents)])
    expected = np.concatenate([ids[1:] for ids in encoded])
    np.testing.assert_array_equal(np.sort(held[held > 0]), expected)


def test_splitting_keeps_all_tokens_of_a_document_in_pieces_that_begin_with_bos():
    ids = np.arange(7, 107)
    pieces = list(packing.split_document(ids, 33))
    assert [piece.length for piece in pieces] == [33, 33, 33, 4]
    assert all(piece.tokens[0] == 7 and len(piece.tokens) == piece.length for piece in pieces)
    assert pieces[0].tokens.tolist() == ids[:33].tolist()
    rest = np.concatenate([piece.tokens[1:] for piece in pieces])
    np.testing.assert_array_equal(rest, ids[1:])
    (whole,) = packing.split_document(ids, 100)
    np.testing.assert_array_equal(whole.tokens, ids)


def test_a_document_keeps_its_length_but_only_a_row_of_its_tokens():
    original = np.arange(1_000_000)
    document = packing.cut_document(original, 65)
    assert document.length == 1_000_000
    assert document.tokens.nbytes == 65 * 4
    assert document.tokens.base is None


class GoldenDocuments:
    """The 64 documents of nanochat's golden run, in row groups of 16."""

    where, files = "golden", ["golden"]

    def open(self, file):
        return self

    def __len__(self):
        return 4

    def documents(self, group):
        for i in range(16 * group, 16 * group + 16):
            yield f"{i} {1 + (37 * i + 11) % 61 + (200 if i % 17 == 5 else 0)}"


def golden_rows(reader, readers, position, count):
    """Rows as lists of (document, tokens), the row group reached after each pair of rows."""
    lists = stream.read_lists(GoldenDocuments(), reader, readers, 8, position)
    reached = [position]

    def next_documents():
        behind, texts = next(lists)
        reached.append(behind)
        encoded = CountingTokenizer().encode_batch(texts, bos=True)
        return [packing.cut_document(ids, 65) for ids in encoded]

    packer = packing.BestFitPacker(65, 8, next_documents)
    rows, groups = [], []
    for index in range(count):
        row = np.empty(65, np.int32)
        packer.fill(row)
        pieces = np.split(row, np.flatnonzero(row == CountingTokenizer.bos_id)[1:])
        rows.append([(int(piece[-1]) if len(piece) > 1 else None, len(piece)) for piece in pieces])
        if index % 2:
            groups.append(reached[-1].group)
    return rows, groups


def test_rows_of_nanochat_on_one_rank():
    """Computed by running nanochat@92d63d4: rows of 65, batches of 2, a buffer of 8."""
    rows, groups = golden_rows(0, 1, stream.StreamPosition(1, 0, 0, 0), 12)
    only_bos = (None, 1)
    assert rows == [
        [(6, 52), (0, 13)],
        [(11, 54), (13, 6), (8, 4), only_bos],
        [(1, 50), (10, 15)],
        [(14, 43), (20, 21), only_bos],
        [(21, 58), (23, 7)],
        [(16, 56), (15, 9)],
        [(19, 45), (2, 20)],
        [(31, 62), (28, 3)],
        [(26, 60), (25, 5)],
        [(29, 49), (30, 16)],
        [(24, 47), (7, 18)],
        [(34, 51), (33, 14)],
    ]
    assert (groups[0], groups[1], groups[5]) == (0, 1, 2)


def test_rows_of_nanochat_from_the_third_row_group():
    rows, _ = golden_rows(0, 1, stream.StreamPosition(1, 0, 2, 0), 2)
    assert rows == [[(34, 51), (33, 14)], [(44, 55), (46, 7), (36, 3)]]


def test_rows_of_nanochat_on_the_second_of_two_ranks():
    rows, _ = golden_rows(1, 2, stream.StreamPosition(1, 0, 1, 0), 2)
    assert rows == [[(21, 58), (18, 7)], [(31, 62), (23, 3)]]

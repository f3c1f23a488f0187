"""Packing: nothing is lost, nothing doubled, end-of-text stands after every document."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp4jax.data.packing import PackedRows, concatenate, document_segments, token_dtype

END_OF_TEXT = 0
DOCUMENTS = st.lists(st.lists(st.integers(1, 65_535), max_size=40), max_size=20)


def stream_of(documents: list[list[int]]) -> np.ndarray:
    return concatenate(documents, END_OF_TEXT, token_dtype(1 << 16))


@given(DOCUMENTS)
def test_the_stream_is_the_documents_each_with_its_end(documents):
    expected = [token for document in documents for token in (*document, END_OF_TEXT)]
    assert stream_of(documents).tolist() == expected


@given(DOCUMENTS, st.integers(1, 17))
def test_every_token_is_an_input_once_and_a_target_once(documents, seq_len):
    stream = stream_of(documents)
    rows = PackedRows(stream, seq_len)
    read = [rows[i] for i in range(len(rows))]
    assert all(row.shape == (seq_len + 1,) and row.dtype == np.int32 for row in read)
    inputs = [token for row in read for token in row[:-1]]
    targets = [token for row in read for token in row[1:]]
    assert inputs == stream[: len(inputs)].tolist()
    assert targets == stream[1 : 1 + len(targets)].tolist()


@given(st.integers(0, 500), st.integers(1, 50))
def test_only_a_tail_shorter_than_a_row_is_left_out(token_count, seq_len):
    rows = PackedRows(np.zeros(token_count, np.uint16), seq_len)
    if len(rows):
        assert 0 <= rows.tokens_left_out < seq_len
        assert len(rows) * seq_len + 1 + rows.tokens_left_out == token_count
    else:
        assert token_count <= seq_len
        assert rows.tokens_left_out == token_count


def test_the_example_of_the_module():
    documents = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10]]
    rows = PackedRows(stream_of(documents), 4)
    assert [rows[i].tolist() for i in range(len(rows))] == [[1, 2, 3, 4, 5], [5, 0, 6, 7, 0], [0, 8, 9, 10, 0]]


@pytest.mark.parametrize("index", [-1, 3])
def test_there_is_no_row_outside(index):
    rows = PackedRows(np.arange(13, dtype=np.uint16), 4)
    assert len(rows) == 3
    with pytest.raises(IndexError):
        rows[index]


def test_a_row_is_a_copy_that_may_be_changed():
    stream = np.arange(13, dtype=np.uint16)
    PackedRows(stream, 4)[0][:] = 0
    assert stream[4] == 4


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(2, 2), (65_536, 2), (65_537, 4), (151_669, 4)])
def test_the_type_holds_the_highest_id(vocab_size, itemsize):
    dtype = token_dtype(vocab_size)
    assert dtype.itemsize == itemsize
    stream = concatenate([[vocab_size - 1]], 0, dtype)
    assert stream.tolist() == [vocab_size - 1, 0]


def test_an_id_too_large_for_the_type_is_not_wrapped():
    with pytest.raises(OverflowError):
        concatenate([[65_536]], 0, token_dtype(65_536))


def test_segments_of_the_example():
    segments, positions = document_segments(np.array([1, 1, 0, 2, 2, 0, 3]), END_OF_TEXT)
    assert segments.tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert positions.tolist() == [0, 1, 0, 1, 2, 0, 1]


@given(DOCUMENTS, st.integers(1, 17))
def test_an_input_is_in_the_document_of_its_target(documents, seq_len):
    stream = stream_of(documents)
    document_of = np.repeat(np.arange(len(documents)), [len(document) + 1 for document in documents])
    rows = PackedRows(stream, seq_len)
    for index in range(len(rows)):
        segments, positions = document_segments(rows[index][:-1], END_OF_TEXT)
        targets = document_of[index * seq_len + 1 : (index + 1) * seq_len + 1]
        np.testing.assert_array_equal(segments, targets - targets[0])
        lengths = np.bincount(segments)
        np.testing.assert_array_equal(positions, np.concatenate([np.arange(length) for length in lengths]))

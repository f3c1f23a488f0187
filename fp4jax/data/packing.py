"""Packing: documents' tokens become one stream, and the stream becomes rows of one length.

    documents    a a a a a   b b   c c c
    stream       a a a a a # b b # c c c #              # is end-of-text, once after every document
    rows, T = 4  a a a a a | a # b b # | # c c c #      T + 1 tokens: row[:-1] are inputs, row[1:] their targets

Long documents are split over rows and short ones share a row, so no position is padding. A row begins with the token
that the row before it ended with, as a target there and as an input here: along the stream every token but the first
is a target exactly once. Only the tail that fills no whole row is left out, fewer than T tokens.

Because rows are cut from the stream when they are read, one tokenized corpus serves every sequence length.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, Integer, Shaped, UInt

TOKEN_DTYPES = ("<u2", "<u4")
"""What a token stream may be stored in, by NumPy's names."""


def token_dtype(vocab_size: int) -> np.dtype:
    """The type a token stream is stored in: the smallest unsigned little-endian one for every id below `vocab_size`."""
    return np.dtype(TOKEN_DTYPES[vocab_size > 1 << 16])


def concatenate(
    documents: Sequence[Sequence[int] | UInt[np.ndarray, " _"]], end_of_text: int, dtype: np.dtype
) -> UInt[np.ndarray, " tokens"]:
    """Joins documents' token ids, with `end_of_text` after every document: len = sum(len(document) + 1)."""
    ends = np.cumsum([len(document) + 1 for document in documents], dtype=np.int64)
    stream = np.empty(ends[-1] if len(ends) else 0, dtype)
    for document, end in zip(documents, ends, strict=True):
        stream[end - 1 - len(document) : end - 1] = document
        stream[end - 1] = end_of_text
    return stream


@runtime_checkable
class TokenStream(Protocol):
    """What rows are cut from: an array, or anything of known length that gives the arrays of its slices."""

    def __len__(self) -> int: ...

    def __getitem__(self, tokens: slice) -> Shaped[np.ndarray, " tokens"]: ...


def document_segments(
    inputs: Integer[np.ndarray, " T"], end_of_text: int
) -> tuple[Int32[np.ndarray, " T"], Int32[np.ndarray, " T"]]:
    """For every input of a row the document its target belongs to, counted from 0, and its position in that document.

        inputs       a a # b b # c        targets      a # b b # c c
        segments     0 0 1 1 1 2 2        positions    0 1 0 1 2 0 1

    So the end-of-text token before a document stands at its beginning, and with attention kept inside a segment no
    target is predicted from another document. A document that a row begins in the middle of has position 0 there.

    >>> segments, positions = document_segments(np.array([5, 5, 0, 7, 7, 0, 9]), end_of_text=0)
    >>> print(segments, positions)
    [0 0 1 1 1 2 2] [0 1 0 1 2 0 1]
    """
    starts = inputs == end_of_text
    starts[0] = False
    segments = np.cumsum(starts, dtype=np.int32)
    indices = np.arange(len(inputs), dtype=np.int32)
    return segments, indices - np.maximum.accumulate(np.where(starts, indices, 0)).astype(np.int32)


class PackedRows:
    """The rows of a token stream, by index: a random-access source for Grain over a stream on disk.

    >>> rows = PackedRows(np.arange(9), seq_len=3)
    >>> len(rows), rows[1].tolist(), rows.tokens_left_out
    (2, [3, 4, 5, 6], 2)
    """

    def __init__(self, stream: TokenStream, seq_len: int):
        if seq_len < 1:
            raise ValueError(f"seq_len is {seq_len}; it must be at least 1")
        self._stream = stream
        self._seq_len = seq_len

    def __len__(self) -> int:
        # Row i reads tokens i*T to (i+1)*T inclusive, so N tokens make (N - 1) // T rows.
        return max(len(self._stream) - 1, 0) // self._seq_len

    @property
    def tokens_left_out(self) -> int:
        """Tokens after the last whole row: fewer than seq_len, or all of a stream too short for one row."""
        return len(self._stream) - (len(self) * self._seq_len + 1) if len(self) else len(self._stream)

    def __getitem__(self, index: int) -> Int32[np.ndarray, " row"]:
        """Returns row `index`, seq_len + 1 tokens, as a copy; raises IndexError outside."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        start = int(index) * self._seq_len
        return self._stream[start : start + self._seq_len + 1].astype(np.int32)

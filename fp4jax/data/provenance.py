"""Which documents a row was cut from: what to look at when a loss is not finite or spikes.

Documents are numbered from 1, in the order in which their split reads them: shards by name, lines from the first.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np

from fp4jax.data.packing import TokenStream

SEARCHED_TOKENS = 1 << 32
"""Streams up to this length are searched for the ends of documents, in about a second for 10^9 tokens; in longer ones
the tokens are named instead."""

_PIECE = 1 << 24


class NumberedRows:
    """Stands where a source's rows would: item i is (source, i)."""

    def __init__(self, source: int, count: int):
        self._source, self._count = source, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> tuple[int, int]:
        return self._source, int(row)


def describe_rows(
    rows: Sequence[tuple[int, int]],
    names: Sequence[str],
    streams: Mapping[int, TokenStream],
    seq_len: int,
    end_of_text: int,
) -> str:
    """Returns "web: documents 12-14, 97; books: document 3" for rows given as (source, row)."""
    parts = []
    for source, group in groupby(sorted(rows), key=lambda row: row[0]):
        starts = [row * seq_len for _, row in group]
        if len(streams[source]) > SEARCHED_TOKENS:
            parts.append(f"{names[source]}: tokens " + _ranges([(start, start + seq_len) for start in starts]))
            continue
        documents = _documents(streams[source], [(start, start + seq_len) for start in starts], end_of_text)
        plural = "" if len({number for pair in documents for number in pair}) == 1 else "s"
        parts.append(f"{names[source]}: document{plural} {_ranges(documents)}")
    return "; ".join(parts)


def _documents(stream: TokenStream, spans: Sequence[tuple[int, int]], end_of_text: int) -> list[tuple[int, int]]:
    """The documents that the first and the last token of each span belong to; spans include their last token."""
    places = sorted({place for span in spans for place in span})
    ended, before, position = {}, 0, 0
    for place in places:
        while position < place:
            piece = stream[position : min(place, position + _PIECE)]
            before += int(np.count_nonzero(piece == end_of_text))
            position += len(piece)
        ended[place] = before
    return [(ended[first] + 1, ended[last] + 1) for first, last in spans]


def _ranges(pairs: Sequence[tuple[int, int]]) -> str:
    """Writes pairs of first and last as "1-3, 7"; those that touch are joined."""
    joined: list[list[int]] = []
    for first, last in sorted(pairs):
        if joined and first <= joined[-1][1] + 1:
            joined[-1][1] = max(joined[-1][1], last)
        else:
            joined.append([first, last])
    return ", ".join(f"{first:,}" if first == last else f"{first:,}-{last:,}" for first, last in joined)

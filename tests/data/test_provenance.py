import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fp4jax.data.provenance import describe_rows

END = 0


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 7), st.data())
def test_names_the_documents_that_a_row_holds(lengths, seq_len, data):
    owners = np.repeat(np.arange(1, len(lengths) + 1), np.array(lengths) + 1)
    stream = np.concatenate([[*[5] * length, END] for length in lengths]).astype(np.uint16)
    count = (len(stream) - 1) // seq_len
    if not count:
        return
    row = data.draw(st.integers(0, count - 1))
    first, last = owners[row * seq_len], owners[(row + 1) * seq_len]
    expected = f"web: document {first}" if first == last else f"web: documents {first}-{last}"
    assert describe_rows([(0, row)], ["web"], {0: stream}, seq_len, END) == expected


def test_joins_ranges_and_names_every_source(monkeypatch):
    stream = np.array([1, 1, 1, END] * 20, np.uint16)  # a document every 4 tokens
    streams = {0: stream, 1: stream}
    rows = [(1, 0), (0, 8), (0, 0), (0, 1), (0, 9)]
    assert describe_rows(rows, ["a", "b"], streams, 4, END) == "a: documents 1-3, 9-11; b: documents 1-2"
    monkeypatch.setattr("fp4jax.data.provenance.SEARCHED_TOKENS", 10)
    assert describe_rows([(0, 2)], ["a"], streams, 4, END) == "a: tokens 8-12"

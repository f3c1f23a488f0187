"""Rows of continuations that share a context: what is in them, and which pairs share one."""

import numpy as np

from fp4jax.evaluation.sharing import shared_rows
from fp4jax.models.layers import EVERY_SEGMENT


def test_a_row_holds_the_context_once():
    (row,) = shared_rows([([5, 6, 7], [1]), ([5, 6, 7], [2, 3, 4]), ([5, 6, 7], [8, 9])], max_length=32)
    arrays = row.arrays()
    assert arrays["inputs"].tolist() == [5, 6, 7, 2, 3, 8]
    assert arrays["positions"].tolist() == [0, 1, 2, 3, 4, 3]
    assert arrays["segment_ids"].tolist() == [EVERY_SEGMENT] * 3 + [1, 1, 2]
    assert arrays["targets"].tolist() == [1, 2, 3, 4, 8, 9]
    assert arrays["at"].tolist() == [2, 2, 3, 4, 2, 5]
    assert arrays["owners"].tolist() == [0, 1, 1, 1, 2, 2]
    assert len(row) == 6 and row.pairs == [0, 1, 2]


def test_which_pairs_share_a_row():
    a, b = [1, 2], [1, 3]
    rows = shared_rows([(a, [4]), (b, [4]), (a, [5]), (a, [6]), (b, [7] * 20), (b, [8] * 20)], max_length=24)
    # A context of two tokens takes two continuations; a row of 2 + 0 + 19 inputs has no room for 19 more.
    assert [row.pairs for row in rows] == [[0, 2], [1, 4], [3], [5]]


def test_without_sharing_every_pair_has_a_row():
    rows = shared_rows([([1, 2, 3], [4]), ([1, 2, 3], [5])], max_length=8, share=False)
    assert [row.pairs for row in rows] == [[0], [1]]


def test_what_is_too_long_loses_its_beginning():
    context = list(range(100, 130))
    rows = shared_rows([(context, [1] * 4), (context, [2] * 4), (context, [3])], max_length=20)
    assert [row.context for row in rows] == [tuple(context[-17:]), tuple(context[-17:]), tuple(context[-20:])]
    assert all(len(row) <= 20 for row in rows)


def test_no_row_scores_more_than_it_has_inputs():
    rng = np.random.default_rng(0)
    for _ in range(50):
        context = rng.integers(0, 9, rng.integers(1, 6)).tolist()
        pairs = [(context, rng.integers(0, 9, rng.integers(1, 5)).tolist()) for _ in range(rng.integers(1, 12))]
        rows = shared_rows(pairs, max_length=16)
        assert sorted(number for row in rows for number in row.pairs) == list(range(len(pairs)))
        for row in rows:
            assert len(row.arrays()["targets"]) <= len(row) <= 16

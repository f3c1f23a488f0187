import numpy as np
import pytest
from scipy import stats

from fp4jax.comparison.statistics import estimate, gaps, gaps_by_seed, holm, pairs
from tests.comparison.records import record


def test_gap_is_relative_to_the_same_seed_of_the_baseline():
    records = [record("bf16", 0, 4.0), record("bf16", 1, 5.0), record("nvfp4", 0, 4.4), record("nvfp4", 1, 5.1)]
    assert gaps_by_seed(records, "bf16")["nvfp4"] == pytest.approx({0: 10.0, 1: 2.0})
    assert gaps(records, "bf16")["nvfp4"].mean == pytest.approx(6.0)
    assert gaps(records, "bf16")["bf16"].mean == 0


def test_estimate_equals_scipy():
    values = [1.2, 0.7, 1.9, 1.1]
    found, expected = estimate(values), stats.ttest_1samp(values, 0)
    interval = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx(tuple(interval))


@pytest.mark.parametrize(("values", "p"), [([0.0, 0.0], 1.0), ([0.5, 0.5], 0.0)])
def test_equal_differences_have_no_width(values, p):
    found = estimate(values)
    assert (found.mean, found.half_width, found.p) == (values[0], 0.0, p)


def test_one_seed_has_no_interval():
    found = estimate([3.0])
    assert (found.mean, found.half_width, found.p, found.n) == (3.0, None, None, 1)


def test_runs_that_diverged_leave_their_seed_out():
    records = [
        *(record("bf16", seed, 4.0) for seed in (0, 1)),
        record("mxfp4", 0, None),
        record("mxfp4", 1, 5.0),
        record("ternary", 0, None),
    ]
    assert gaps_by_seed(records, "bf16")["mxfp4"] == {1: 25.0}
    assert gaps(records, "bf16")["ternary"] is None
    assert {(pair.first, pair.second) for pair in pairs(records, "bf16", None)} == {("mxfp4", "bf16")}


def test_holm_by_hand():
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_primary_pair_stands_alone():
    losses = np.random.default_rng(0).normal(5, 0.1, (3, 4))
    names = ("bf16", "nvfp4", "averis")
    records = [
        record(name, seed, loss) for name, row in zip(names, losses, strict=True) for seed, loss in enumerate(row)
    ]
    found = pairs(records, "bf16", ("averis", "nvfp4"))
    assert [(pair.first, pair.second, pair.primary) for pair in found] == [
        ("averis", "nvfp4", True), ("nvfp4", "bf16", False), ("averis", "bf16", False),
    ]  # fmt: skip
    assert found[0].p_adjusted == found[0].difference.p
    assert [pair.p_adjusted for pair in found[1:]] == holm([pair.difference.p for pair in found[1:]])
    by_seed = 100 * (losses[2] - losses[1]) / losses[0]
    assert found[0].difference.mean == pytest.approx(by_seed.mean())

import numpy as np
import pytest

from fp4jax.analysis.geometry.estimates import Estimate, extrapolate, mean, ratio


def test_mean_and_its_interval_cover_the_truth():
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(400):
        estimate = mean(rng.standard_normal(8) + 3.0)
        low, high = estimate.interval()
        hits.append(low <= 3.0 <= high)
    assert 0.92 <= np.mean(hits) <= 0.98


def test_ratio_errors_are_paired():
    rng = np.random.default_rng(1)
    common = rng.uniform(1.0, 2.0, 50)
    assert ratio(2.0 * common, common).standard_error < 1e-12
    values = [ratio(*(rng.standard_normal((2, 30)) * [[0.4], [0.2]] + [[4.0], [2.0]])) for _ in range(300)]
    spread = np.std([value.value for value in values])
    assert np.mean([value.standard_error for value in values]) == pytest.approx(spread, rel=0.15)


def test_deviation_in_standard_errors():
    assert Estimate(1.1, 0.05, 4).deviation(1.0) == pytest.approx(2.0)
    assert Estimate(1.0, 0.0, 4).deviation(1.0) == 0.0
    assert Estimate(1.1, 0.0, 4).deviation(1.0) == np.inf


def test_extrapolation_finds_the_line():
    widths = (100, 200, 400)
    line = extrapolate(widths, [Estimate(2.0 + 5.0 / n, 0.1, 8) for n in widths])
    assert line.value == pytest.approx(2.0)
    rng = np.random.default_rng(2)
    values = [
        extrapolate(widths, [Estimate(2.0 + 0.1 * rng.standard_normal(), 0.1, 8) for _ in widths]).value
        for _ in range(500)
    ]
    assert line.standard_error == pytest.approx(np.std(values), rel=0.1)


def test_too_little():
    with pytest.raises(ValueError, match="at least 2 draws, got 1"):
        mean(np.ones(1))
    with pytest.raises(ValueError, match="at least 2 widths"):
        extrapolate((8, 8), [Estimate(1.0, 0.1, 2)] * 2)
    with pytest.raises(ValueError, match=r"level must be in \(0, 1\)"):
        Estimate(1.0, 0.1, 3).interval(1.0)

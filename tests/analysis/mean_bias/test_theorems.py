"""Every bound against Monte Carlo and the exact probability, over a grid."""

import itertools

import numpy as np
import pytest

from fp4jax.analysis.mean_bias import theorems
from fp4jax.analysis.mean_bias.figures import draw_theorems

DRAWS = 20_000
GRID = tuple(itertools.product((0.0, -0.5, 3.0), (0.1, 2.0), (1, 2, 7, 40)))


@pytest.mark.parametrize(("mu", "sigma", "tokens"), GRID)
def test_the_largest_entry(mu, sigma, tokens):
    largest = theorems.simulate_largest(mu, sigma, tokens, DRAWS, np.random.default_rng(0))
    noise = 4.0 * 0.5 / DRAWS**0.5
    assert np.mean(largest >= abs(mu)) >= theorems.exceeds_mean_bound(tokens) - noise
    for delta in (0.01, 0.05, 0.5, 0.9):
        low = theorems.largest_entry_quantile(mu, sigma, tokens, delta)
        high = theorems.largest_entry_upper(mu, sigma, tokens, delta)
        for threshold in (low, high):
            exact = theorems.largest_entry_probability(mu, sigma, tokens, threshold)
            assert abs(np.mean(largest >= threshold) - exact) < noise
        assert theorems.largest_entry_probability(mu, sigma, tokens, low) >= 1.0 - delta - 1e-12
        assert theorems.largest_entry_probability(mu, sigma, tokens, high) <= delta + 1e-12


def test_the_printed_quantile_fails():
    """One token, delta = .05: the guarantee of 95 % holds in 5 % of the draws."""
    printed = theorems.printed_quantile(3.0, 1.0, 1, 0.05)
    largest = theorems.simulate_largest(3.0, 1.0, 1, DRAWS, np.random.default_rng(1))
    assert np.mean(largest >= printed) == pytest.approx(0.05, abs=0.01)
    assert theorems.largest_entry_probability(3.0, 1.0, 1, printed) == pytest.approx(0.05, abs=1e-9)
    corrected = theorems.largest_entry_quantile(3.0, 1.0, 1, 0.05)
    assert np.mean(largest >= corrected) == pytest.approx(0.95, abs=0.01)


def test_the_mean_is_exceeded_more_often_than_the_printed_equality_says():
    assert theorems.largest_entry_probability(0.2, 1.0, 2, 0.2) > theorems.exceeds_mean_bound(2) + 0.1
    assert theorems.largest_entry_probability(9.0, 1.0, 2, 9.0) == pytest.approx(theorems.exceeds_mean_bound(2))


@pytest.mark.parametrize(("mu", "sigma"), tuple(itertools.product((0.0, -0.7, 2.0), (0.5, 1.0, 3.0))))
def test_the_tail_of_one_entry(mu, sigma):
    x = np.abs(mu + sigma * np.random.default_rng(2).standard_normal(DRAWS * 5))
    for threshold in np.linspace(0.0, 4.0 * sigma + abs(mu), 9).tolist():
        exact = theorems.tail_probability(mu, sigma, threshold)
        assert abs(np.mean(x >= threshold) - exact) < 0.01
        assert theorems.tail_bound(mu, sigma, threshold) <= exact + 1e-12
        if threshold >= abs(mu):
            ratio = exact / theorems.tail_probability(0.0, sigma, threshold)
            assert theorems.tail_amplification_bound(mu, sigma, threshold) <= ratio * (1.0 + 1e-9)


@pytest.mark.parametrize(("strength", "tokens"), tuple(itertools.product((0.05, 0.3, 1.0, 5.0), (20, 200))))
def test_the_leading_direction_is_the_mean(strength, tokens):
    for seed in range(5):
        random = np.random.default_rng(seed)
        x = strength + random.standard_normal((tokens, 30)) * random.uniform(0.1, 2.0, 30)
        mean = x.mean(axis=0)
        residual2 = np.linalg.norm(x - mean, 2) ** 2
        leading = np.linalg.svd(x, full_matrices=False)[2][0]
        cosine2 = (leading @ mean) ** 2 / (mean @ mean)
        bound = theorems.alignment_bound(tokens * float(mean @ mean), float(residual2))
        assert bound <= cosine2 + 1e-12
        if strength == 5.0:
            assert bound > 0.9


def test_the_tightness_is_drawn(tmp_path):
    draw_theorems(tmp_path / "theorems.png")
    assert (tmp_path / "theorems.png").stat().st_size > 10_000

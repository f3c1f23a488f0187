"""The range finder: finds a planted low-rank part, at any scale, and stays finite where there is none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp4jax.numerics import low_rank_factors

factors = jax.jit(low_rank_factors, static_argnums=(1, 2, 3))
RANK = 4
RNG = np.random.default_rng(0)
PLANTED = (RNG.standard_normal((96, RANK)) @ RNG.standard_normal((RANK, 72))).astype(np.float32)
NOISY = (PLANTED + 0.05 * RNG.standard_normal(PLANTED.shape)).astype(np.float32)


def product(left, right):
    return np.asarray(left, np.float64) @ np.asarray(right, np.float64)


def assert_orthonormal(right):
    right = np.asarray(right, np.float64)
    assert np.abs(right @ np.swapaxes(right, -1, -2) - np.eye(RANK)).max() < 1e-5


def test_captures_a_planted_part():
    left, right = factors(jnp.asarray(PLANTED), RANK, 0, 1)
    assert left.shape == (96, RANK) and right.shape == (RANK, 72)
    assert_orthonormal(right)
    assert np.abs(product(left, right) - PLANTED).max() < 1e-5 * np.abs(PLANTED).max()


def test_is_near_the_best_approximation():
    left, right = factors(jnp.asarray(NOISY), RANK, 0, 1)
    rest = np.linalg.svd(NOISY.astype(np.float64), compute_uv=False)[RANK:]
    error = np.linalg.norm(product(left, right) - NOISY)
    assert np.linalg.norm(rest) * 0.9999 < error < np.linalg.norm(rest) * 1.02
    np.testing.assert_allclose(left, NOISY @ np.asarray(right).T, rtol=1e-4, atol=1e-4)


def test_scale_equivariance():
    left, right = map(np.asarray, factors(jnp.asarray(NOISY), RANK, 0, 1))
    for exponent in (-60, -30, 30, 60):
        factor = np.float32(2.0**exponent)
        got_left, got_right = factors(jnp.asarray(NOISY * factor), RANK, 0, 1)
        assert np.array_equal(got_right, right) and np.array_equal(got_left, left * factor)


@pytest.mark.parametrize("rank_of_x", [0, 1, 2])
def test_deficient_matrices_give_finite_factors(rank_of_x):
    x = PLANTED.copy() * 0
    if rank_of_x:
        x = (RNG.standard_normal((96, rank_of_x)) @ RNG.standard_normal((rank_of_x, 72))).astype(np.float32)
    left, right = factors(jnp.asarray(x), RANK, 0, 1)
    assert np.isfinite(left).all() and np.isfinite(right).all()
    assert np.abs(product(left, right) - x).max() <= 1e-5 * np.abs(x).max()
    assert_orthonormal(right)


def test_batch_dimensions_are_independent():
    x = np.stack([NOISY, NOISY[::-1] * 2**20, np.zeros_like(NOISY)]).reshape(3, 4, 24, 72)
    left, right = factors(jnp.asarray(x), RANK, 1, 1)
    assert left.shape == (3, 4, 24, RANK) and right.shape == (3, RANK, 72)
    for i in range(3):
        alone = factors(jnp.asarray(x[i]), RANK, 0, 1)
        np.testing.assert_allclose(
            product(left[i].reshape(96, RANK), right[i]), product(np.reshape(alone[0], (96, RANK)), alone[1]),
            atol=1e-5 * max(np.abs(x[i]).max(), 1e-30),
        )  # fmt: skip


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_what_is_not_finite_is_not_hidden(bad):
    x = NOISY.copy()
    x[3, 5] = bad
    left, right = factors(jnp.asarray(x), RANK, 0, 1)
    with np.errstate(all="ignore"):
        assert not np.isfinite(product(left, right)[3]).all()


def test_rows_beyond_the_sample_are_split_too():
    """Directions come from every n-th row; every row is projected on them."""
    x = np.tile(PLANTED, (40, 1))  # 3840 rows
    left, right = factors(jnp.asarray(x), RANK, 0, 1)
    assert np.abs(product(left, right) - x).max() < 1e-4 * np.abs(x).max()

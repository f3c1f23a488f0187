"""Theorem 2, against JAX's derivative and over random perturbations of every size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp4jax.analysis.geometry import rmsnorm


def pairs(n, seed=0, count=2000):
    rng = np.random.default_rng(seed)
    y = rng.standard_normal((count, n)) * 10.0 ** rng.uniform(-3, 3, (count, 1))
    size = 10.0 ** rng.uniform(-4, 1, (count, 1)) * np.linalg.norm(y, axis=1, keepdims=True)
    d = rng.standard_normal((count, n))
    return y, d / np.linalg.norm(d, axis=1, keepdims=True) * size, size[:, 0] / np.linalg.norm(y, axis=1)


def test_derivative_is_jaxs():
    y, d, _ = pairs(5, count=4)
    with jax.enable_x64(True):
        function = lambda x: jnp.sqrt(5.0) * x / jnp.linalg.norm(x)  # noqa: E731
        for a, b in zip(y, d, strict=True):
            np.testing.assert_allclose(
                rmsnorm.rmsnorm_derivative(a, b), jax.jvp(function, (jnp.asarray(a),), (jnp.asarray(b),))[1], rtol=1e-9
            )


@pytest.mark.parametrize("n", [2, 3, 64])
def test_remainder_is_within_the_bound(n):
    y, d, ratio = pairs(n)
    remainder = rmsnorm.rmsnorm_remainder(y, d)
    assert np.all(remainder <= rmsnorm.rmsnorm_remainder_bound(ratio) + 1e-12)
    small = (ratio > 1e-3) & (ratio < 1e-2)  # the sharp constant; below it, rounding errors
    assert np.all(remainder[small] <= 0.59 * ratio[small] ** 2)


def test_bound_is_nearly_reached_by_a_reversal():
    y = np.array([1.0, 0.0])
    d = np.array([-1.0 - 1e-9, 1e-12])
    assert rmsnorm.rmsnorm_remainder(y, d) == pytest.approx(2.0, rel=1e-3)
    assert rmsnorm.rmsnorm_remainder_bound(1.0) == 3.0


def test_radial_perturbations_vanish():
    y = np.random.default_rng(0).standard_normal((3, 7))
    np.testing.assert_allclose(rmsnorm.rmsnorm_derivative(y, 0.3 * y), 0.0, atol=1e-15)
    np.testing.assert_allclose(rmsnorm.radial_fraction(y, -0.3 * y), 1.0)


def test_zero_vector_has_no_direction():
    with pytest.raises(ValueError, match="a vector of zeros has no direction"):
        rmsnorm.rmsnorm(np.zeros((2, 3)))

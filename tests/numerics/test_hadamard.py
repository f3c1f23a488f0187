"""The Hadamard transform is orthogonal, cancels in a product, and ends in bfloat16."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fp4jax.numerics import hadamard
from fp4jax.numerics.hadamard import SIGNS
from tests import oracle

rows = jax.jit(lambda x: hadamard(x, -1))
columns = jax.jit(lambda x: hadamard(x, -2))


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_signs_are_the_published_ones():
    assert np.array_equal(SIGNS, oracle.HADAMARD_SIGNS)


def test_identity_gives_the_matrix():
    matrix = np.asarray(rows(jnp.eye(16)))
    assert np.array_equal(matrix, oracle.hadamard_matrix())
    assert np.array_equal(matrix @ matrix.T, np.eye(16))


def test_exact_inputs_equal_the_oracle_bit_for_bit():
    # Integers below 2^12 sum exactly in float32, so only the one rounding to bfloat16 is left.
    x = np.random.default_rng(0).integers(-4095, 4096, (48, 64)).astype(np.float32)
    assert np.array_equal(rows(jnp.asarray(x)), oracle.hadamard(x, -1).astype(np.float32))
    assert np.array_equal(columns(jnp.asarray(x)), oracle.hadamard(x, -2).astype(np.float32))


@pytest.mark.parametrize("exponent", [-30, 0, 30])
def test_normal_inputs_are_within_one_bfloat16_ulp(exponent):
    x = normal((48, 64)) * np.float32(2.0**exponent)
    got, exact = np.asarray(rows(jnp.asarray(x))), oracle.rotate(x)
    # Half an ulp of bfloat16, and the float32 sums before it.
    assert np.all(np.abs(got - exact) <= np.abs(exact) * 2.0**-8 * 1.001 + np.abs(x).max() * 2.0**-20)
    assert np.mean(got != oracle.hadamard(x, -1).astype(np.float32)) < 1e-3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_result_is_float32_holding_bfloat16(dtype):
    out = rows(jnp.asarray(normal((48, 64)), dtype))
    assert out.dtype == jnp.float32
    assert np.array_equal(out, np.asarray(out).astype(ml_dtypes.bfloat16).astype(np.float32))


def test_energy_and_outliers():
    x = np.zeros((48, 64), np.float32)
    x[:, 5] = 8.0
    out = np.asarray(rows(jnp.asarray(x)))
    assert np.array_equal(np.abs(out[:, :16]), np.full((48, 16), 2.0))  # one outlier spread over its block only
    assert not out[:, 16:].any()


def test_cancels_in_a_product():
    x, w = normal((48, 64), 1), normal((48, 64), 2)
    transformed = np.asarray(columns(jnp.asarray(x)), np.float64).T @ np.asarray(columns(jnp.asarray(w)), np.float64)
    exact = x.astype(np.float64).T @ w
    assert np.abs(transformed - exact).max() < 0.01 * np.sqrt(48) * 4  # what bfloat16 leaves of each operand
    assert np.linalg.norm(transformed - exact) < 4e-3 * np.linalg.norm(exact)


def test_axis_by_either_sign_and_jit_equals_eager():
    x = jnp.asarray(normal((2, 32, 16)))
    first = hadamard(x, 1)
    assert np.array_equal(first, columns(x))
    assert np.array_equal(first[1], jax.jit(lambda x: hadamard(x, 0))(x[1]))

"""The mean split: exact for any centre, and blind to masked rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp4jax.numerics import column_mean, mask_rows, residual, row_count
from tests import oracle

SHAPE, BATCH_DIMS = (3, 5, 17, 40), 1  # experts, sequences, positions, features
AXES = (1, 2)
RNG = np.random.default_rng(0)
X = (RNG.standard_normal(SHAPE) + 3 * RNG.standard_normal(SHAPE[-1])).astype(np.float32)
MASK = RNG.random(SHAPE[:-1]) < 0.6


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_mean_equals_oracle(dtype, masked):
    x = jnp.asarray(X, dtype)
    mask = MASK if masked else np.ones(SHAPE[:-1], bool)
    mean = column_mean(x, AXES, jnp.asarray(mask) if masked else None)
    assert mean.dtype == jnp.float32 and mean.shape == (3, 1, 1, 40)
    expected = oracle.column_mean(np.asarray(x), mask[..., None], BATCH_DIMS)
    np.testing.assert_allclose(np.asarray(mean)[:, 0, 0], expected, rtol=1e-5, atol=1e-6)


def test_mean_of_bfloat16_is_accumulated_in_float32():
    x = jnp.full((4096, 16), 1.0078125, jnp.bfloat16)  # a bfloat16 sum would stop growing at 256
    assert np.array_equal(column_mean(x, (0,)), np.full((1, 16), 1.0078125, np.float32))


def test_split_is_exact():
    center = column_mean(jnp.asarray(X), AXES)
    r = residual(jnp.asarray(X), center)
    assert np.array_equal(r, X - np.asarray(center))
    assert np.abs(np.asarray(r).mean(axis=AXES)).max() < 1e-6


def test_residual_of_bfloat16_is_float32():
    x = jnp.asarray(X, jnp.bfloat16)
    center = column_mean(x, AXES)
    r = residual(x, center)
    assert r.dtype == jnp.float32
    assert np.array_equal(r, np.asarray(x).astype(np.float32) - np.asarray(center))


@pytest.mark.parametrize("poison", [1e30, np.inf, np.nan])
def test_masked_rows_enter_nothing(poison):
    mask = jnp.asarray(MASK)
    clean = jnp.asarray(X)
    poisoned = jnp.where(mask[..., None], clean, jnp.float32(poison))
    center = column_mean(poisoned, AXES, mask)
    assert np.array_equal(center, column_mean(clean, AXES, mask))
    r = np.asarray(residual(poisoned, center, mask))
    assert np.array_equal(r, residual(clean, center, mask))
    assert not r[~MASK].any() and r[MASK].all()
    assert np.array_equal(mask_rows(poisoned, mask), np.where(MASK[..., None], X, 0))


def test_row_count():
    assert np.array_equal(row_count(SHAPE, AXES), np.full((1, 1, 1, 1), 85, np.float32))
    counts = row_count(SHAPE, AXES, jnp.asarray(MASK))
    assert np.array_equal(counts, MASK.sum(axis=AXES).reshape(3, 1, 1, 1))


def test_no_real_row_means_zero():
    mask = jnp.asarray(MASK).at[1].set(False)
    center = column_mean(jnp.asarray(X), AXES, mask)
    assert not np.asarray(center)[1].any() and np.asarray(center)[0].all()
    assert row_count(SHAPE, AXES, mask)[1].item() == 1
    assert mask_rows(jnp.asarray(X), None) is not None and np.array_equal(mask_rows(jnp.asarray(X), None), X)


def test_jit_equals_eager_but_for_the_order_of_sums():
    mean = jax.jit(lambda x, m: column_mean(x, AXES, m))(jnp.asarray(X), jnp.asarray(MASK))
    np.testing.assert_allclose(mean, column_mean(jnp.asarray(X), AXES, jnp.asarray(MASK)), rtol=1e-6, atol=1e-6)

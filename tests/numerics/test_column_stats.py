"""`column_stats`: the order of its sum, and what follows from minimum and maximum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp4jax.numerics import ColumnStats, column_mean, column_stats, residual


def values(shape, seed=0):
    rng = np.random.default_rng([seed, *shape])
    return (rng.standard_normal(shape) * np.exp2(rng.uniform(-12, 8, shape)) + 3).astype(np.float32)


def tree(rows: np.ndarray) -> np.ndarray:
    """The definition, by recursion over a power of two."""
    if len(rows) == 1:
        return rows[0]
    half = len(rows) // 2
    return tree(rows[:half]) + tree(rows[half:])


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 9, 100, 513])
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_the_sum_is_a_balanced_tree_in_index_order(rows, jitted):
    x = values((rows, 20))
    padded = np.zeros((1 << (rows - 1).bit_length(), 20), np.float32)
    padded[:rows] = x
    stats = (jax.jit(column_stats) if jitted else column_stats)(jnp.asarray(x))
    np.testing.assert_array_equal(np.asarray(stats.sum), tree(padded)[None])
    np.testing.assert_array_equal(np.asarray(stats.minimum), x.min(0, keepdims=True))
    np.testing.assert_array_equal(np.asarray(stats.maximum), x.max(0, keepdims=True))


def test_another_order_gives_other_bits():
    x = values((513, 20))
    in_order = np.zeros(20, np.float32)
    for row in x:
        in_order = in_order + row
    assert (np.asarray(column_stats(jnp.asarray(x)).sum)[0] != in_order).any()


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_sums_of_shards_of_a_power_of_two_of_rows_add_up_to_the_same_bits(shards):
    x = jnp.asarray(values((1024, 20)))
    parts = column_stats(x.reshape(shards, -1, 20), batch_dims=1).sum
    np.testing.assert_array_equal(np.asarray(column_stats(parts).sum[0]), np.asarray(column_stats(x).sum))


def test_each_matrix_of_a_batch_has_its_own_over_all_its_tokens():
    x = jnp.asarray(values((2, 3, 5, 7)))
    stats = column_stats(x, batch_dims=1)
    for name, part in stats._asdict().items():
        assert part.shape == (2, 1, 1, 7)
        for matrix in range(2):
            alone = getattr(column_stats(x[matrix].reshape(15, 7)), name)
            np.testing.assert_array_equal(np.asarray(part[matrix, 0]), np.asarray(alone))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("power", [-30, 0, 30])
def test_mean_and_largest_residual(dtype, power):
    x = jnp.asarray(values((2, 37, 24)) * np.float32(2.0**power)).astype(dtype)
    stats = jax.jit(lambda x: column_stats(x, 1))(x)
    exact = np.asarray(x, np.float64).mean(1, keepdims=True)
    mean = stats.mean(37)
    scale = np.abs(np.asarray(x, np.float64)).mean(1, keepdims=True)
    assert (np.abs(np.asarray(mean) - exact) <= 2**-22 * scale).all()
    assert (np.abs(np.asarray(column_mean(x, (1,))) - exact) <= 2**-22 * scale).all()
    # Around the mean and around any other center it is the largest of the residual itself, bit for bit.
    for center in (mean, mean.astype(jnp.bfloat16).astype(jnp.float32), jnp.zeros_like(mean), 100 * mean):
        want = jnp.max(jnp.abs(residual(x, center)), axis=(1, 2), keepdims=True)
        np.testing.assert_array_equal(np.asarray(stats.residual_amax(center, 1)), np.asarray(want))


def test_the_mean_is_the_correctly_rounded_quotient_when_jitted():
    total = jnp.asarray(values((1, 1000)))
    stats = ColumnStats(total, total, total)
    want = np.asarray(total) / np.float32(49)
    np.testing.assert_array_equal(np.asarray(jax.jit(lambda stats: stats.mean(49))(stats)), want)
    assert (want != np.asarray(total) * np.float32(1 / 49)).any()


def test_nan_and_infinity_stay_in_their_column():
    x = jnp.asarray(values((9, 4))).at[2, 1].set(jnp.nan).at[3, 2].set(-jnp.inf)
    stats = jax.jit(column_stats)(x)
    assert np.isnan(stats.sum[0, 1])
    assert stats.sum[0, 2] == stats.minimum[0, 2] == -np.inf
    assert np.isfinite(stats.maximum[0, 2])
    for part in stats:
        assert np.isfinite(part[0, [0, 3]]).all()


def test_a_sum_of_zero_is_positive():
    assert not np.signbit(np.asarray(column_stats(jnp.full((2, 3), -0.0)).sum)).any()


@pytest.mark.parametrize(
    "shape, batch_dims, message",
    [
        ((0, 4), 0, r"non-empty array, got shape \(0, 4\)"),
        ((4,), 0, r"got shape \(4,\), batch_dims=0"),
        ((2, 4), 1, r"got shape \(2, 4\), batch_dims=1"),
        ((2, 4), -1, r"batch_dims=-1"),
    ],
)
def test_errors_say_what_was_given(shape, batch_dims, message):
    with pytest.raises(ValueError, match=message):
        column_stats(jnp.ones(shape), batch_dims)

"""Quantization equals the oracle bit for bit, at every magnitude and shape; and what must never be hidden is not."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import NamedSharding, PartitionSpec

from fp4jax import numerics
from fp4jax.numerics import NVFP4, key_words, rounding
from tests import oracle

STATIC = ("format", "axis", "block", "rounding", "batch_dims")
quantize = jax.jit(numerics.quantize, static_argnames=STATIC)
SR = {"rounding": "stochastic"}
dequantize = jax.jit(lambda q: q.dequantize())
opened = jax.jit(lambda q: (rounding.unpack(q.codes, q.axis), q.values(), q.dequantize()))


def key(seed=0):
    return jax.random.key(seed)


def words(seed=0):
    return np.asarray(key_words(key(seed)))


def normal(shape, seed=0, exponent=0, spread=0):
    """Normal numbers times 2^exponent, each block's magnitude lowered by up to `spread` octaves."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * np.exp2(exponent - spread * rng.random(shape))).astype(np.float32)


def spread_to_elements(scales, q):
    """Scale bytes of a QTensor repeated to its logical shape."""
    for axis, size in q.blocked:
        scales = np.take(np.repeat(scales, 16, axis), np.arange(size), axis)
    return scales


def assert_equals_oracle(q, expected):
    """Codes, scales, amax and dequantized values bit for bit; padding codes zero."""
    codes, values, dequantized = (np.asarray(x) for x in opened(q))
    assert not np.delete(codes, np.s_[: q.shape[q.axis]], q.axis).any()
    logical = codes[tuple(slice(n) for n in q.shape)]
    assert np.array_equal(logical, expected.codes)
    assert np.array_equal(spread_to_elements(np.asarray(q.scales), q), expected.scale_bytes)
    assert np.array_equal(np.asarray(q.amax).ravel(), expected.amax.ravel())
    assert np.array_equal(values, expected.unscaled())
    assert np.array_equal(dequantized, expected.dequantize())


def same(a, b):
    return a.blocked == b.blocked and all(
        np.array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# ---------------------------------------------------------------- golden vectors


def test_golden_ramp():
    q = quantize(jnp.arange(32, dtype=jnp.float32)[None] / 4 - 4)
    assert np.asarray(q.scales).tolist() == [[126, 125]]
    assert q.amax.item() == 4.0
    expected = [255, 239, 238, 222, 221, 204, 171, 154, 16, 34, 67, 84, 101, 102, 118, 119]
    assert np.asarray(q.codes).tolist() == [expected]


def test_golden_two_rows():
    q = quantize(jnp.asarray((np.arange(64) * 37 % 29 - 14).reshape(2, 32) / 8, jnp.float32))
    assert np.all(np.asarray(q.scales) == 126)
    assert q.amax.item() == 1.75
    assert np.asarray(q.codes).tolist() == [
        [223, 98, 190, 116, 13, 245, 60, 230, 90, 215, 97, 191, 115, 158, 245, 45],
        [230, 75, 215, 80, 207, 99, 174, 117, 29, 246, 59, 231, 89, 223, 98, 190],
    ]


def test_golden_square_blocks():
    x = (np.arange(512) * 7919 % 1009 - 504).reshape(16, 32) / 64
    q = quantize(jnp.asarray(x, jnp.float32), block=(16, 16))
    assert np.asarray(q.scales).tolist() == [[126, 126]]
    assert q.amax.item() == 7.875
    expected = [111, 20, 219, 126, 53, 200, 254, 86, 162, 237, 103, 4, 219, 111, 37, 201]
    assert np.asarray(q.codes)[0].tolist() == expected


# ---------------------------------------------------------------- against the oracle

CASES = [
    ((1,), -1),
    ((17,), -1),
    ((1, 15), -1),
    ((16, 1), -1),
    ((33, 1000), -1),
    ((33, 1000), -2),
    ((3, 17, 40), -2),
    ((3, 17, 40), -3),
]


@pytest.mark.parametrize("shape, axis", CASES, ids=str)
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_equals_oracle_over_shapes(shape, axis, stochastic):
    x = normal(shape, spread=12)
    draws = oracle.draws_like(words(), shape) if stochastic else None
    q = quantize(jnp.asarray(x), axis=axis, **(SR | {"key": key()} if stochastic else {}))
    assert_equals_oracle(q, oracle.quantize(x, axis, draws=draws))


@pytest.mark.parametrize("exponent", [-100, -30, -23, -14, -7, -1, 0, 1, 7, 15, 22, 30, 100])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def test_equals_oracle_over_magnitudes(exponent, dtype):
    for spread in (0, 8, 25):
        x = normal((33, 72), spread, exponent, spread).astype(dtype)
        assert_equals_oracle(quantize(jnp.asarray(x)), oracle.quantize(x))
        draws = oracle.draws_like(words(spread), x.shape)
        assert_equals_oracle(quantize(jnp.asarray(x), key=key(spread), **SR), oracle.quantize(x, draws=draws))


@pytest.mark.parametrize("shape, batch_dims, axis", [((33, 47), 0, -1), ((33, 47), 0, -2), ((3, 17, 40), 1, -2)])
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_square_blocks_equal_oracle(shape, batch_dims, axis, stochastic):
    x = normal(shape, spread=12)
    draws = oracle.draws_like(words(), shape, batch_dims) if stochastic else None
    options = SR | {"key": key()} if stochastic else {}
    q = quantize(jnp.asarray(x), axis=axis, block=(16, 16), batch_dims=batch_dims, **options)
    assert_equals_oracle(q, oracle.quantize(x, axis, two_d=True, batch_dims=batch_dims, draws=draws))


@pytest.mark.parametrize("batch_dims", [1, 2])
def test_batches_are_independent_matrices(batch_dims):
    x = normal((2, 3, 17, 40)) * np.float32(4.0) ** np.arange(6, dtype=np.float32).reshape(2, 3, 1, 1)
    draws = oracle.draws_like(words(), x.shape, batch_dims)
    q = quantize(jnp.asarray(x), axis=-2, batch_dims=batch_dims, key=key(), **SR)
    assert_equals_oracle(q, oracle.quantize(x, -2, batch_dims=batch_dims, draws=draws))
    assert q.amax.shape == (2, 3, 1, 1)[:batch_dims] + (1,) * (4 - batch_dims)


def test_equals_oracle_at_every_tie():
    # An operation more, less or elsewhere moves a value by an ulp: it shows only next to the ties of scale and element.
    rng = np.random.default_rng(5)
    matrices, blocks = 64, 64
    x = np.zeros((matrices, blocks, 16), np.float32)
    amax = rng.uniform(1, 2, matrices) * np.exp2(rng.integers(-20, 20, matrices))
    x[:, 0, 0] = amax
    scales = np.arange(8, 126, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    ties = rng.choice((scales[1:] + scales[:-1]) / 2, (matrices, blocks - 1))
    x[:, 1:, 0] = ulps_away(ties * 6 * amax[:, None] / 2688, rng)
    q = oracle.quantize(x, batch_dims=1)
    multiplier = 1 / (q.scales.astype(np.float64) * amax[:, None, None] / 2688)
    elements = rng.choice([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], (matrices, blocks - 1, 15)) / multiplier[:, 1:, 1:]
    x[:, 1:, 1:] = ulps_away(elements, rng) * rng.choice([-1, 1], elements.shape).astype(np.float32)
    x = x.reshape(matrices, 1, blocks * 16)
    assert_equals_oracle(quantize(jnp.asarray(x), batch_dims=1), oracle.quantize(x, batch_dims=1))


def ulps_away(x, rng):
    """float32 numbers up to two units in the last place from x."""
    return (x.astype(np.float32).view(np.int32) + rng.integers(-2, 3, x.shape, np.int32)).view(np.float32)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    hnp.arrays(np.float32, (5, 40), elements=st.floats(-(2.0**30), 2.0**30, width=32, allow_subnormal=False)),
    st.integers(-60, 60),
)
def test_equals_oracle_on_hypothesis(x, exponent):
    x = x * np.float32(2.0**exponent)
    # XLA:CPU flushes denormals: neither x, 1 / S_enc nor amax / 2688 may be one.
    x = np.where(np.abs(x) < 1.2e-38, np.float32(0), x)
    if np.abs(x).max() == 0 or np.abs(x).max() > 3.3e-35:
        assert_equals_oracle(quantize(jnp.asarray(x)), oracle.quantize(x))


@functools.cache
def _columns():
    return normal((33, 72), spread=8)


@pytest.mark.parametrize("options", [{}, SR | {"key": 0}, {"block": (16, 16)}], ids=["nearest", "stochastic", "square"])
def test_jit_equals_eager(options):
    options = {name: key() if name == "key" else value for name, value in options.items()}
    x = jnp.asarray(_columns())
    assert same(numerics.quantize(x, **options), quantize(x, **options))


# ---------------------------------------------------------------- laws


@pytest.mark.parametrize("options", [{}, SR | {"key": 0}], ids=["nearest", "stochastic"])
def test_scale_equivariance(options):
    options = {name: key() if name == "key" else value for name, value in options.items()}
    x = _columns()
    base = quantize(jnp.asarray(x), **options)
    for exponent in range(-30, 31):
        factor = np.float32(2.0**exponent)
        q = quantize(jnp.asarray(x * factor), **options)
        assert np.array_equal(q.codes, base.codes)
        assert np.array_equal(np.asarray(q.scales), np.asarray(base.scales))
        assert np.array_equal(dequantize(q), dequantize(base) * factor)


def test_square_blocks_serve_the_matrix_and_its_transpose():
    w = normal((33, 72), spread=10)
    q, transposed = quantize(jnp.asarray(w), block=(16, 16)), quantize(jnp.asarray(w.T), block=(16, 16))
    assert np.array_equal(dequantize(q), np.asarray(dequantize(transposed)).T)
    packed_along_rows = quantize(jnp.asarray(w), block=(16, 16), axis=-2)
    assert np.array_equal(dequantize(q), dequantize(packed_along_rows))
    assert packed_along_rows.codes.shape == (24, 80)


def test_error_is_within_half_a_step():
    x = _columns()
    q = quantize(jnp.asarray(x))
    expected = oracle.quantize(x)
    scale = expected.scales * (expected.amax / np.float32(2688))
    # Half the widest step of the grid is 1, and a scale rounded down by up to 1/16 clips the maximum by less.
    normal_scale = expected.scale_bytes >= 8
    error = np.abs(np.asarray(dequantize(q)) - x)
    assert np.all(error[normal_scale] <= scale[normal_scale] * 1.0001)
    assert np.linalg.norm(error) < 0.11 * np.linalg.norm(x)


def test_negation_flips_only_signs():
    x = normal((33, 72), 3)
    q, negated = quantize(jnp.asarray(x), key=key(), **SR), quantize(jnp.asarray(-x), key=key(), **SR)
    assert np.array_equal(dequantize(q), -np.asarray(dequantize(negated)))


# ---------------------------------------------------------------- zero, underflow, not finite


@pytest.mark.parametrize("options", [{}, SR | {"key": 0}], ids=["nearest", "stochastic"])
def test_zeros(options):
    options = {name: key() if name == "key" else value for name, value in options.items()}
    x = np.zeros((33, 72), np.float32)
    q = quantize(jnp.asarray(x), **options)
    assert q.amax.item() == 0 and not np.asarray(q.codes).any() and not np.asarray(q.scales).any()
    assert not np.asarray(dequantize(q)).any() and not np.asarray(q.values()).any()

    x[:, :16] = 2688 / 1024  # the tensor scale is a power of two
    q = quantize(jnp.asarray(x), **options)
    assert np.array_equal(dequantize(q), x)  # a zero block stays zero, a constant one is exact
    assert not np.asarray(q.scales)[:, 1:].any()


def test_a_block_that_underflows_is_zero():
    x = np.zeros((33, 72), np.float32)
    x[0, 0] = 1.0
    edge = 2.0**-10 / 448  # half the smallest scale, as a share of amax
    x[1, :16], x[2, :16] = edge * 0.999, edge * 1.01
    q = quantize(jnp.asarray(x))
    assert np.asarray(q.scales)[:3, 0].tolist() == [126, 0, 1]
    values = np.asarray(dequantize(q))
    assert not values[1].any()
    assert np.all(values[2, :16] > 0)
    assert_equals_oracle(q, oracle.quantize(x))


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("options", [{}, SR | {"key": 0}, {"block": (16, 16)}], ids=["nearest", "stochastic", "square"])
def test_what_is_not_finite_is_never_hidden(bad, options):
    options = {name: key() if name == "key" else value for name, value in options.items()}
    for where in ((0, 0), (7, 20), (32, 71)):
        x = _columns().copy()
        x[where] = bad
        q = quantize(jnp.asarray(x), **options)
        values = np.asarray(dequantize(q))
        row, column = where[0] // 16 * 16, where[1] // 16 * 16
        rows = slice(row, row + 16) if "block" in options else where[0]
        block = values[rows, column : column + 16]
        assert not np.isfinite(block).any()
        assert not np.isfinite(values[where])
        assert not np.isfinite(np.asarray(q.tensor_scale)).any()
        if np.isinf(bad) and not options:
            assert np.array_equal(q.scales, oracle.quantize(x).scale_bytes[:, ::16])  # S_enc is 1: 448 where it sits


def test_what_is_not_finite_stays_in_its_matrix():
    x = normal((3, 17, 40))
    clean = dequantize(quantize(jnp.asarray(x), batch_dims=1))
    x[1, 2, 3] = np.nan
    values = np.asarray(dequantize(quantize(jnp.asarray(x), batch_dims=1)))
    assert np.array_equal(values[[0, 2]], np.asarray(clean)[[0, 2]])
    assert np.isnan(values[1]).all()


# ---------------------------------------------------------------- stochastic rounding


def test_stochastic_is_unbiased_over_keys():
    x = np.zeros((33, 72), np.float32)
    x[:, :64] = np.linspace(-6, 6, 33 * 64).reshape(33, 64)
    x[:, 64], x[:, ::16] = 6.0, 6.0  # every block's maximum is 6: the scaled grid is the element grid
    mean = jax.jit(
        lambda keys: jax.lax.map(lambda k: numerics.quantize(jnp.asarray(x), key=k, **SR).dequantize(), keys).mean(0)
    )
    count = 2048
    error = np.asarray(mean(jax.random.split(key(1), count))) - x
    bound = np.interp(np.abs(x), [0, 2, 2.0001, 4, 4.0001, 6], [0.25, 0.25, 0.5, 0.5, 1.0, 1.0])  # largest deviations
    assert np.all(np.abs(error) < 5.5 * bound / np.sqrt(count))
    assert abs(error.mean()) < 5 * 1.0 / np.sqrt(count * x.size)
    # Signed by x, a bias towards or away from zero would show.
    assert abs((error * np.sign(x)).mean()) < 5 * 1.0 / np.sqrt(count * x.size)


def test_stochastic_takes_one_of_the_two_neighbours_and_reaches_all_values():
    x = _columns()
    q = oracle.quantize(x)
    scaled = x / np.asarray(q.scales * (q.amax / np.float32(2688)), np.float64)
    got = oracle.E2M1_VALUES[np.asarray(rounding.unpack(quantize(jnp.asarray(x), key=key(), **SR).codes, -1))[:, :72]]
    low = oracle.E2M1_MAGNITUDES[np.clip(np.searchsorted(oracle.E2M1_MAGNITUDES, np.abs(scaled) - 1e-5) - 1, 0, 6)]
    high = oracle.E2M1_MAGNITUDES[np.clip(np.searchsorted(oracle.E2M1_MAGNITUDES, np.abs(scaled) + 1e-5), 0, 7)]
    assert np.all((np.abs(got) >= low) & (np.abs(got) <= high))
    assert np.array_equal(np.unique(got), np.unique(oracle.E2M1_VALUES))


def test_stochastic_draws_follow_key_and_batch_index_only():
    x = np.broadcast_to(normal((17, 40)), (3, 17, 40))
    q = quantize(jnp.asarray(x), batch_dims=1, key=key(), **SR)
    codes = np.asarray(q.codes)
    assert same(q, quantize(jnp.asarray(x), batch_dims=1, key=key(), **SR))
    other = np.asarray(quantize(jnp.asarray(x), batch_dims=1, key=key(1), **SR).codes)
    for a, b in ((codes[0], codes[1]), (codes[1], codes[2]), (codes[0], other[0])):
        assert 0.1 < np.mean(a != b) < 0.9
    nearest = np.asarray(quantize(jnp.asarray(x), batch_dims=1).codes)
    assert 0.1 < np.mean(codes != nearest) < 0.9


def test_copies_of_one_matrix_draw_at_the_same_positions():
    # Along either axis the draw belongs to the element: a constant magnitude rounds to the same values.
    x = np.full((32, 48), 2.4, np.float32)
    x[::16], x[:, ::16] = 6.0, 6.0
    rows, columns = (quantize(jnp.asarray(x), axis=axis, key=key(), **SR) for axis in (-1, -2))
    assert np.array_equal(rows.values(), columns.values())
    assert set(np.unique(rows.values()) / 448) == {2, 3, 6}


@pytest.mark.parametrize("axis", [-1, -2])
def test_a_sharded_array_quantizes_like_the_whole(axis):
    mesh = jax.make_mesh((4, 2), ("rows", "columns"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = jnp.asarray(normal((128, 64), spread=8))
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("rows", "columns")))
    q, whole = (quantize(a, axis=axis, key=key(), **SR) for a in (sharded, x))
    assert len(q.codes.sharding.device_set) == 8
    assert same(q, whole)


def test_a_typed_a_raw_key_and_a_traced_key_agree():
    x = jnp.asarray(_columns())
    typed = quantize(x, key=key(), **SR)
    assert same(typed, quantize(x, key=jax.random.PRNGKey(0), **SR))
    assert not same(typed, quantize(x, key=jax.random.key(0, impl="rbg"), **SR))


# ---------------------------------------------------------------- errors

ERRORS = {
    "needs a random key: pass key=": SR,
    "rounding must be one of 'nearest', 'stochastic', got 'up'": {"rounding": "up"},
    "key must be one JAX random key": SR | {"key": jnp.zeros(3, jnp.uint32)},
    r"format must be a fp4jax.Format such as fp4jax.NVFP4, got 'nvfp4'": {"format": "nvfp4"},
    "floating-point arrays, got int32": {"x": jnp.ones((4, 16), jnp.int32)},
    r"non-empty array .* shape \(\)": {"x": jnp.float32(1)},
    r"non-empty array .* shape \(0, 16\)": {"x": jnp.ones((0, 16))},
    r"axis must be in \[-2, 2\), got 2": {"axis": 2},
    r"axis must be in \[-2, 2\), got -3": {"axis": -3},
    r"block must be None .* or \(16, 16\), got \(1, 16\)": {"block": (1, 16)},
    r"square blocks lie in the last two axes: got shape \(16,\)": {"block": (16, 16), "x": jnp.ones(16)},
    "square blocks lie in the last two axes: .* axis -3": {"block": (16, 16), "x": jnp.ones((2, 4, 16)), "axis": 0},
    r"batch_dims must be in \[0, 1\].* got 2": {"batch_dims": 2},
    r"batch_dims must be in \[0, 1\].* got -1": {"batch_dims": -1},
    r"batch_dims must be in \[0, 0\].* got 1 ": {"batch_dims": 1, "axis": -2},
    r"batch_dims must be in \[0, 0\].* got 1": {"batch_dims": 1, "block": (16, 16)},
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_what_was_given_and_what_is_accepted(message):
    options = {"x": jnp.ones((4, 16))} | ERRORS[message]
    with pytest.raises(ValueError, match=message.strip()) as error:
        numerics.quantize.__wrapped__(**options)
    assert "\n" not in str(error.value)


def test_axis_by_either_sign():
    x = jnp.asarray(normal((3, 17, 40)))
    assert same(quantize(x, NVFP4, axis=1), quantize(x, NVFP4, axis=-2))

"""Rounding by arithmetic equals the types' definition: exhaustively over bfloat16, at ties, and under every draw."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fp4jax.numerics import E2M1, E4M3, rounding
from tests import oracle

SIZE = 1 << 16  # one shape for every test below: one compilation a function
encode_nearest = jax.jit(lambda x: rounding.encode_nearest(x, E2M1))
encode_stochastic = jax.jit(lambda x, draw: rounding.encode_stochastic(x, E2M1, draw))
encode_scale = jax.jit(lambda x: rounding.encode_scale(x, E4M3))


def filled(values):
    """float32 array of SIZE entries that repeats `values`."""
    return jnp.asarray(np.resize(np.asarray(values, np.float32), SIZE))


def every_bfloat16():
    return np.arange(SIZE, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)


def with_neighbours(values):
    values = np.asarray(values, np.float32)
    return np.concatenate([values, np.nextafter(values, np.float32(np.inf)), np.nextafter(values, np.float32(-np.inf))])


def no_denormals(values):
    return np.where(np.abs(values) < 1.2e-38, np.float32(0) * values, values)


def test_nearest_ties_to_even():
    ties = {0.25: 0, 0.75: 1, 1.25: 1, 1.75: 2, 2.5: 2, 3.5: 4, 5: 4, 7: 6, 1e30: 6, np.inf: 6}
    codes = encode_nearest(filled(list(ties)))[: len(ties)]
    assert np.array_equal(np.array(E2M1.magnitudes)[codes], list(ties.values()))


def test_nearest_of_every_bfloat16():
    x = every_bfloat16()
    x = no_denormals(x[np.isfinite(x)])
    codes = np.asarray(encode_nearest(filled(x)))[: x.size]
    with np.errstate(over="ignore"):
        expected = np.clip(x, -6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15
    assert np.array_equal(codes, expected)


def test_nearest_next_to_ties_and_values():
    magnitudes = oracle.E2M1_MAGNITUDES
    points = with_neighbours(np.concatenate([magnitudes[1:], (magnitudes[1:] + magnitudes[:-1]) / 2]))
    points = np.concatenate([points, -points])
    codes = np.asarray(encode_nearest(filled(points)))[: points.size]
    assert np.array_equal(codes, points.astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15)
    assert np.array_equal(codes, oracle.encode_nearest(points))


def test_decode_of_every_code():
    codes = jnp.arange(16, dtype=jnp.uint32)
    values = np.asarray(rounding.decode(codes, E2M1))
    expected = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert np.array_equal(values, expected)
    assert np.array_equal(np.signbit(values), np.signbit(expected))


def test_scale_of_every_bfloat16():
    x = every_bfloat16()
    x = no_denormals(x[~np.signbit(x) & (x <= 448)])
    bytes_ = np.asarray(encode_scale(filled(x)))[: x.size]
    assert np.array_equal(bytes_, x.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))


def test_scale_next_to_ties_and_values():
    values = np.array(E4M3.magnitudes)
    points = with_neighbours(np.concatenate([values[1:], (values[1:] + values[:-1]) / 2]))
    points = points[points <= 448]
    bytes_ = np.asarray(encode_scale(filled(points)))[: points.size]
    assert np.array_equal(bytes_, points.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))


def test_scale_keeps_nan():
    assert np.all(np.asarray(encode_scale(filled([np.nan]))) == 0x7F)


def test_decode_of_every_scale():
    bytes_ = np.arange(128, dtype=np.uint8)
    expected = bytes_.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    values = rounding.decode_scale(jnp.asarray(bytes_), E4M3)
    assert np.array_equal(values, expected, equal_nan=True)


@pytest.fixture(scope="module")
def all_draws():
    return jnp.arange(SIZE, dtype=jnp.uint32)


@pytest.mark.parametrize("interval", range(7))
@pytest.mark.parametrize("sign", [1, -1])
def test_stochastic_is_exact_over_all_draws(interval, sign, all_draws):
    low, high = oracle.E2M1_MAGNITUDES[interval : interval + 2]
    for sixteenths_bits in (0, 1, 2, 777, 16384, 32767, 32768, 40001, 65535):
        v = sign * (low + (high - low) * sixteenths_bits / SIZE)
        codes = np.asarray(encode_stochastic(filled([v]), all_draws))
        values = oracle.E2M1_VALUES[codes]
        assert set(np.abs(values)) <= {low, high}
        assert np.mean(np.abs(values) == high) == sixteenths_bits / SIZE
        assert values.mean() == v  # exact: a sum of dyadic rationals
        assert np.all(np.signbit(values) == (sign < 0))


def test_stochastic_reaches_all_fifteen_values():
    x = filled(np.linspace(-6, 6, 4001))
    draw = jnp.asarray(np.random.default_rng(0).integers(0, SIZE, SIZE), jnp.uint32)
    values = oracle.E2M1_VALUES[np.asarray(encode_stochastic(x, draw))]
    assert np.array_equal(np.unique(values), np.unique(oracle.E2M1_VALUES))


def test_stochastic_keeps_the_grid(all_draws):
    for value in oracle.E2M1_VALUES:
        assert np.all(oracle.E2M1_VALUES[np.asarray(encode_stochastic(filled([value]), all_draws))] == value)


@pytest.mark.parametrize("beyond", [6.0, 6.0000005, 7.9, 8.0, 1e30, np.inf])
def test_stochastic_saturates(beyond, all_draws):
    assert np.all(np.asarray(encode_stochastic(filled([beyond]), all_draws)) == 7)
    assert np.all(np.asarray(encode_stochastic(filled([-beyond]), all_draws)) == 15)


@pytest.mark.parametrize("spread", [0.01, 1.0, 3.0, 100.0])
def test_stochastic_equals_oracle(spread):
    rng = np.random.default_rng(1)
    x = (rng.standard_normal(SIZE) * spread).astype(np.float32)
    draw = rng.integers(0, SIZE, SIZE)
    codes = encode_stochastic(jnp.asarray(x), jnp.asarray(draw, jnp.uint32))
    assert np.array_equal(codes, oracle.encode_stochastic(x, draw))


def test_position_is_rounded_to_nearest_even_at_16_fraction_bits(all_draws):
    # Halfway between two 16-bit positions of (0, .5): the even one decides how many draws go up.
    for count, expected in ((0.5, 0), (1.5, 2), (2.5, 2), (32768.5, 32768), (32769.5, 32770)):
        codes = np.asarray(encode_stochastic(filled([0.5 * count / SIZE]), all_draws))
        assert np.sum(codes == 1) == expected


def test_nan_keeps_to_four_bits(all_draws):
    x = filled([np.nan])
    assert np.all(np.asarray(encode_nearest(x)) < 16)
    assert np.all(np.asarray(encode_stochastic(x, all_draws)) < 16)


def test_jit_equals_eager(all_draws):
    x = filled(np.random.default_rng(2).standard_normal(SIZE) * 3)
    assert np.array_equal(encode_nearest(x), rounding.encode_nearest(x, E2M1))
    assert np.array_equal(encode_stochastic(x, all_draws), rounding.encode_stochastic(x, E2M1, all_draws))
    scale = jnp.minimum(jnp.abs(x) * 50, 448.0)
    assert np.array_equal(encode_scale(scale), rounding.encode_scale(scale, E4M3))


@pytest.mark.parametrize("axis", [0, 1, -1, -3])
def test_pack_puts_the_even_index_low(axis):
    codes = np.random.default_rng(3).integers(0, 16, (4, 6, 8))
    packed = rounding.pack(jnp.asarray(codes, jnp.uint32), axis)
    assert np.array_equal(packed, oracle.pack(codes, axis))
    assert np.array_equal(rounding.unpack(packed, axis), codes)

"""Every format equals the oracle bit for bit, at every magnitude and shape; and what must never be hidden is not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp4jax import numerics
from fp4jax.numerics import FORMATS, NVFP4, ScaleRounding, bits, key_words
from tests import oracle
from tests.combinations import half_quick

ORACLE = dict(zip((f.name for f in FORMATS), oracle.FORMATS, strict=True))  # the oracle's names, in the same order
OTHERS = [f for f in FORMATS if f is not NVFP4]  # NVFP4 has test_quantize.py
BY_NAME = {f.name: f for f in FORMATS}
UP = {"scale_rounding": ScaleRounding.UP}
FOUR_SIX = {"candidates": (6.0, 4.0)}
EDEN = {"correction": 128}
# A way to quantize: format, options of fp4jax, options of the oracle.
WAYS = {f.name: (f, {}, {}) for f in OTHERS}
WAYS |= {
    f"{f.name} up": (f, UP, {"scales": "up"}) for f in FORMATS if f.scale and f.scale_rounding is ScaleRounding.DOWN
}
WAYS["four over six"] = (BY_NAME["NVFP4-256"], FOUR_SIX, {"six_or_four": True})
STATIC = ("format", "axis", "block", "rounding", "batch_dims", "candidates", "scale_rounding", "correction")
quantize = jax.jit(numerics.quantize, static_argnames=STATIC)
opened = jax.jit(lambda q: (q.element_codes, q.values(), q.dequantize()))
SR = {"rounding": "stochastic"}
KEY = jax.random.key(0)
WORDS = np.asarray(key_words(KEY))
COLUMNS = 296  # more than two groups of 128, and nothing divides it but 8


def test_the_formats_are_the_published_ones():
    assert [ORACLE[f.name] for f in FORMATS][-3:] == ["int8", "ternary", "sign"]
    for format in FORMATS:
        expected = oracle.FORMATS[ORACLE[format.name]]
        assert np.array_equal(format.element.magnitudes, oracle.MAGNITUDES[expected.element])
        assert (format.block, str(format.outer)) == (expected.block, str(expected.outer))
        if format.outer:
            assert np.float32(format.range) == expected.range
        assert (format.scale.name.lower() if format.scale else None) == expected.scale


def normal(shape, format, seed=0, exponent=0, spread=0):
    """Numbers for a format: a mean magnitude depends on the order of its sum, unless the numbers have few bits."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    if format.statistic == "mean":
        x = np.round(x * 256) / 256 * np.exp2(-rng.integers(0, min(spread, 4) + 1, shape))
    else:
        x = x * np.exp2(-spread * rng.random(shape))
    return (x * np.exp2(float(exponent))).astype(np.float32)


def over_elements(scales, q):
    for axis, size in q.blocked:
        scales = np.take(np.repeat(scales, q.format.block, axis), np.arange(size), axis)
    return scales


def assert_equals_oracle(q, expected):
    """Codes, scales, float32 scales and dequantized values bit for bit; padding codes zero."""
    q.validate()
    codes, values, dequantized = map(np.asarray, opened(q))
    assert np.array_equal(codes[tuple(slice(n) for n in q.shape)], expected.codes)
    if expected.scale_bytes is not None:
        assert np.array_equal(over_elements(np.asarray(q.scales), q), expected.scale_bytes)
    if expected.amax is not None:
        assert np.array_equal(q.amax, expected.amax)
    assert np.array_equal(values, expected.unscaled())
    assert np.array_equal(dequantized, expected.dequantize())


def both(x, way, axis=-1, stochastic=False, batch_dims=0, square=False):
    """(fp4jax's, the oracle's)"""
    format, options, theirs = WAYS[way]
    draws = oracle.draws_like(WORDS, x.shape, batch_dims) if stochastic else None
    expected = oracle.quantize(
        x, axis, format=ORACLE[format.name], two_d=square, batch_dims=batch_dims, draws=draws, **theirs
    )
    options = options | (SR | {"key": KEY} if stochastic else {})
    block = (format.block,) * 2 if square else None
    got = quantize(jnp.asarray(x), format, axis=axis, batch_dims=batch_dims, block=block, **options)
    return got, expected


# One compilation each: rounding to nearest is quick for every format, the rest for one of each kind.
QUICK = ("NVFP4/128", "MXFP4 up", "INT8", "ternary")
SLOW = pytest.mark.slow
ROUNDED = [
    pytest.param(way, stochastic, marks=SLOW if stochastic and way not in QUICK else ())
    for way in WAYS
    for stochastic in (False, True)
]
SOME = [pytest.param(way, marks=() if way in QUICK else SLOW) for way in WAYS]
named = pytest.mark.parametrize("way, stochastic", ROUNDED, ids=lambda v: v if isinstance(v, str) else f"sr={v}")


@named
def test_equals_oracle_over_magnitudes(way, stochastic):
    # Four-over-six sums squares in units of x: they must not underflow.
    for exponent in (-30, -14, -1, 0, 7, 30, 60) if way == "four over six" else (-60, -30, -14, -1, 0, 7, 30, 60):
        for spread in (0, 4, 25):
            x = normal((9, COLUMNS), WAYS[way][0], spread, exponent, spread)
            assert_equals_oracle(*both(x, way, stochastic=stochastic))


SHAPES = [((1,), -1), ((17,), -1), ((1, 15), -1), ((33, 1), -1), ((33, 130), -2), ((3, 17, 40), -2), ((3, 17, 40), -3)]


@pytest.mark.slow
@named
def test_equals_oracle_over_shapes(way, stochastic):
    for shape, axis in SHAPES:
        assert_equals_oracle(*both(normal(shape, WAYS[way][0], spread=8), way, axis, stochastic))


@pytest.mark.slow
@named
def test_batches_are_independent_matrices(way, stochastic):
    x = normal((2, 3, 17, 40), WAYS[way][0], spread=4)
    x = x * np.float32(4.0) ** np.arange(6, dtype=np.float32).reshape(2, 3, 1, 1)
    q, expected = both(x, way, -2, stochastic, batch_dims=2)
    assert_equals_oracle(q, expected)


@half_quick(
    {
        "way": {name: name for name in ("NVFP4-256", "four over six", "MXFP4", "MXFP8", "MXFP4 up")},
        "axis": {"rows": -1, "columns": -2},
        "stochastic": {"nearest": False, "stochastic": True},
    }
)
def test_square_blocks_equal_oracle(way, axis, stochastic):
    x = normal((35, 72), WAYS[way][0], spread=10)
    assert_equals_oracle(*both(x, way, axis, stochastic, square=True))


# ---------------------------------------------------------------- next to ties


def ulps_away(x, rng):
    """float32 numbers up to two units in the last place from x."""
    return (x.astype(np.float32).view(np.int32) + rng.integers(-2, 3, x.shape, np.int32)).view(np.float32)


@pytest.mark.parametrize("way", [w for w in WAYS if WAYS[w][0].block is None and WAYS[w][0].statistic == "max"])
def test_equals_oracle_at_every_tie_of_the_element(way):
    """FP8 and INT8: next to every tie, and every value, of a matrix whose scale is not a power of two."""
    grid = oracle.MAGNITUDES[oracle.FORMATS[ORACLE[WAYS[way][0].name]].element]
    rng = np.random.default_rng(1)
    points = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2])
    for amax in (1.0, 1.37, 448.0, 2.9e-11, 7.7e13):
        x = ulps_away(np.tile(points * amax / grid[-1], (8, 1)), rng) * rng.choice([-1, 1], (8, points.size))
        x = np.clip(x, -np.float32(amax), np.float32(amax)).astype(np.float32)
        x[:, 0] = amax
        assert_equals_oracle(*both(x, way))


@pytest.mark.parametrize("way", ["MXFP4", "MXFP8", "MXFP4 up", "MXFP8 up"])
def test_equals_oracle_where_powers_of_two_change(way):
    """Maxima next to powers of two, and to the largest element times one."""
    rng = np.random.default_rng(2)
    largest = WAYS[way][0].element.max
    edges = np.exp2(np.arange(-30.0, 31))[:, None] * np.array([1, largest, 1.5, 1.75])
    x = np.zeros((edges.size * 8, 32), np.float32)
    x[:, 0] = ulps_away(np.repeat(edges.ravel(), 8), rng)
    x[:, 1:] = x[:, :1] * rng.uniform(-1, 1, (len(x), 31)).astype(np.float32)
    q, expected = both(x, way)
    assert_equals_oracle(q, expected)
    saturated = (np.abs(x) > largest * expected.scales.astype(np.float64)).any()
    assert saturated == (not way.endswith("up"))


@pytest.mark.parametrize("way", ["four over six", "NVFP4-256"])
@pytest.mark.parametrize("square", [False, True], ids=["rows", "square"])
def test_four_over_six_at_near_ties(way, square):
    """Blocks of few values, whose two errors are often equal or nearly so: the order of every operation shows."""
    rng = np.random.default_rng(3)
    x = rng.choice([0.5, 1, 1.5, 2, 3, 4, 5, 6], (512, 64)) * rng.choice([-1, 1], (512, 64))
    x = ulps_away(x * np.repeat(rng.uniform(1, 2, (512, 4)), 16, 1), rng)
    q, expected = both(x, way, square=square)
    assert_equals_oracle(q, expected)


def test_four_over_six_errs_less_than_either_scale():
    """And breaks ties for six: a block that both scales hold exactly keeps six."""
    format = BY_NAME["NVFP4-256"]
    x = normal((64, 64), format)
    errors = {
        candidates: np.square(np.asarray(opened(quantize(jnp.asarray(x), format, candidates=candidates))[2]) - x)
        .reshape(64, 4, 16).sum(-1)
        for candidates in ((6.0,), (4.0,), (6.0, 4.0))
    }  # fmt: skip
    np.testing.assert_allclose(errors[6.0, 4.0], np.minimum(errors[6.0,], errors[4.0,]), rtol=1e-5)
    assert 0.05 < np.mean(errors[6.0, 4.0] < errors[6.0,]) < 0.95

    x = np.full((1, 32), 1536 / 1024, np.float32)
    x[0, 16:] = 0.75 * 1.5
    q = quantize(jnp.asarray(x), format, candidates=(6.0, 4.0))
    assert np.array_equal(opened(q)[2], x)
    assert np.array_equal(np.asarray(opened(q)[0]), np.full((1, 32), 7))


# ---------------------------------------------------------------- EDEN

corrected = functools.partial(quantize, format=BY_NAME["NVFP4-EDEN"], correction=128)


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_correction_equals_oracle(axis, stochastic):
    for exponent in (-30, 0, 30):
        x = normal((2, 256, 128), BY_NAME["NVFP4-EDEN"], 1, exponent, 6)
        eden = "nearest"
        if stochastic:
            shape = (2, 256, 8) if axis == -1 else (2, 16, 128)
            eden = oracle.draws_like(oracle.fold(WORDS, bits.SCALES), shape, 1)
        options = {"scale_rounding": ScaleRounding.STOCHASTIC, "key": KEY} if stochastic else {}
        q = corrected(jnp.asarray(x), axis=axis, batch_dims=1, **options)
        assert_equals_oracle(q, oracle.quantize(x, axis, format="nvfp4-eden", batch_dims=1, eden=eden))


def test_corrected_scales_stay_within_e4m3():
    """The largest block's scale grows beyond 256, but not beyond 448, even where the correction is large."""
    x = np.full((4, 128), 0.2, np.float32)
    x[:, ::16] = 1.0
    q = corrected(jnp.asarray(x))
    scales = oracle.Quantized(np.asarray(q.scales), np.asarray(q.scales), None, 0).scales
    assert np.isfinite(scales).all() and 256 <= scales.max() <= 448
    tiny = np.full((1, 128), 1e-9, np.float32)  # x·q is zero in every group but the first: no correction, not 0 / 0
    assert np.isfinite(opened(corrected(jnp.asarray(np.concatenate([x, tiny]))))[2]).all()


def test_correction_preserves_projections():
    """x·(c q) = x·x in every group, up to the last rounding of the scales, which averages out over draws."""
    x = normal((32, 256), BY_NAME["NVFP4-EDEN"], spread=3)

    @jax.jit
    def mean(keys):
        def values(key):
            return numerics.quantize(
                jnp.asarray(x), BY_NAME["NVFP4-EDEN"], correction=128, scale_rounding="stochastic", key=key
            ).dequantize()

        return jax.lax.map(values, keys).mean(0)

    groups = x.reshape(32, 2, 128).astype(np.float64)
    projection = np.sum(np.asarray(mean(jax.random.split(KEY, 512))).reshape(groups.shape) * groups, -1)
    # One draw moves a scale by at most 1/8; a group has 8 scales, most of a size: 0.03 is the deviation of one draw.
    np.testing.assert_allclose(projection, np.sum(groups**2, -1), rtol=5 * 0.03 / np.sqrt(512))


def test_eden_is_unbiased_over_rotations():
    """Over fresh signs the quantized, rotated back, averages to the matrix; without the correction it shrinks."""
    count = 2048
    x = normal((1, 128), BY_NAME["NVFP4-EDEN"], 5) * np.where(np.arange(128) == 3, 8, 1).astype(np.float32)

    def estimate(key, correction):
        signs = bits.signs(key_words(key), 128)[None]
        rotated = numerics.rotate(jnp.asarray(x), -1, 128, signs)
        options = {"correction": 128, "scale_rounding": "stochastic", "key": key} if correction else {}
        q = numerics.quantize(rotated, BY_NAME["NVFP4-EDEN"], **options).dequantize()
        inverse = jnp.asarray(oracle.hadamard_matrix(128, np.ones(128)), jnp.float32)
        return jnp.matmul(q, inverse, precision="highest") * signs

    keys = jax.random.split(jax.random.key(7), count)
    for correction in (True, False):
        samples = np.asarray(jax.jit(lambda k, c=correction: jax.lax.map(lambda k: estimate(k, c), k))(keys))[:, 0]
        z = (samples.mean(0) - x[0]) * np.sqrt(count) / samples.std(0, ddof=1)
        shrinkage = np.dot(samples.mean(0), x[0]) / np.dot(x[0], x[0]) - 1
        if correction:
            assert np.abs(z).max() < 5 and abs(shrinkage) < 1e-3
        else:
            assert shrinkage < -2e-3


# ---------------------------------------------------------------- laws


@pytest.mark.parametrize("way", SOME)
def test_scale_equivariance(way):
    format, options, _ = WAYS[way]
    x = normal((9, COLUMNS), format, 4, spread=8)
    for rounding in ({}, SR | {"key": KEY}):
        base = quantize(jnp.asarray(x), format, **options, **rounding)
        values = np.asarray(opened(base)[2])
        for exponent in (-30, -7, 1, 30, 60):
            factor = np.float32(2.0**exponent)
            q = quantize(jnp.asarray(x * factor), format, **options, **rounding)
            assert np.array_equal(q.codes, base.codes)
            assert np.array_equal(opened(q)[2], values * factor)


@pytest.mark.parametrize("way", SOME)
def test_jit_equals_eager(way):
    format, options, _ = WAYS[way]
    x = jnp.asarray(normal((5, 40), format, spread=8))
    for rounding in ({}, SR | {"key": KEY}):
        eager = numerics.quantize(x, format, **options, **rounding)
        for a, b in zip(*map(jax.tree.leaves, (eager, quantize(x, format, **options, **rounding))), strict=True):
            assert np.array_equal(a, b)


@pytest.mark.parametrize("way", SOME)
def test_zeros(way):
    format, options, _ = WAYS[way]
    x = np.zeros((40, 72), np.float32)
    for rounding in ({}, SR | {"key": KEY}):
        q = quantize(jnp.asarray(x), format, **options, **rounding)
        q.validate()
        assert not np.asarray(opened(q)[2]).any()
        if q.scales is not None:
            assert not np.asarray(q.scales).any()
    x[3] = 1.0
    values = np.asarray(opened(quantize(jnp.asarray(x), format, **options))[2])
    assert np.isfinite(values).all() and values[3].all()
    if format.element.has_zero:
        assert not np.delete(values, 3, 0).any()


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("way", [*SOME, "eden"])
def test_what_is_not_finite_is_never_hidden(way, bad):
    format, options, _ = WAYS.get(way, (BY_NAME["NVFP4-EDEN"], EDEN, None))
    for rounding in ({}, SR | {"key": KEY}):
        for where in ((0, 0), (7, 20), (8, 255)):
            x = normal((9, 256), format, spread=8)
            x[where] = bad
            values = np.asarray(opened(quantize(jnp.asarray(x), format, **options, **rounding))[2])
            size = format.block or 1
            start = where[1] // size * size
            assert not np.isfinite(values[where[0], start : start + size]).any()


@pytest.mark.parametrize("way", [w for w in WAYS if WAYS[w][0].block])
def test_a_block_that_underflows_is_zero(way):
    format, options, _ = WAYS[way]
    x = np.full((2, 256), 2.0**-30, np.float32)
    x[0, 0] = 1.0
    values = np.asarray(opened(quantize(jnp.asarray(x), format, **options))[2])
    assert values[0, 0] > 0.9
    if format.outer == "matrix":
        assert not values[1].any()
    else:  # finer scales hold what is far below the largest magnitude
        assert values[1].all()
    far = np.asarray(opened(quantize(jnp.asarray(x), format, **options))[0])
    assert far[1, 0] == far[1, -1]


@pytest.mark.parametrize("way", ["FP8 E4M3", "FP8 E5M2", "INT8"])
def test_every_code_is_reachable(way):
    grid = oracle.MAGNITUDES[oracle.FORMATS[ORACLE[way]].element]
    x = np.concatenate([grid, -grid])[None].astype(np.float32)
    q, expected = both(x, way)
    assert_equals_oracle(q, expected)
    assert np.array_equal(opened(q)[2], x)
    assert np.unique(np.asarray(q.codes)).size == 2 * grid.size
    assert set(np.unique(np.asarray(both(x, way, stochastic=True)[0].codes))) == set(np.unique(np.asarray(q.codes)))


def test_ternary_and_sign_by_hand():
    x = jnp.asarray([[3.0, -1.0, 0.0, -4.0], [0.5, 0.25, -0.25, -1.0]])
    ternary = opened(quantize(x, BY_NAME["ternary"]))[2]  # mean magnitude 1.25: below 0.625 is zero
    assert np.array_equal(ternary, 1.25 * np.array([[1, -1, 0, -1], [0, 0, 0, -1]], np.float32))
    sign = opened(quantize(x, BY_NAME["sign"]))[2]  # a mean for every row
    assert np.array_equal(sign, np.array([[2, -2, 2, -2], [0.5, 0.5, -0.5, -0.5]], np.float32))
    by_column = opened(quantize(x, BY_NAME["sign"], axis=-2))[2]
    assert np.array_equal(np.abs(by_column)[0], [1.75, 0.625, 0.125, 2.5])


def test_a_correction_of_ragged_ends():
    """Groups are padded with zeros, which add nothing."""
    x = normal((5, 200), BY_NAME["NVFP4-EDEN"], 6)
    padded = np.pad(x, [(0, 0), (0, 56)])
    got, expected = (np.asarray(opened(corrected(jnp.asarray(a)))[2]) for a in (x, padded))
    assert np.array_equal(got, expected[:, :200])


@pytest.mark.parametrize("format", [f for f in FORMATS if f.outer is None or isinstance(f.outer, int)], ids=str)
def test_nan_is_not_lost_in_a_maximum_over_another_axis(format):
    """XLA:CPU's maximum of floats over an axis that is not the last one drops NaN."""
    x = normal((4, 8, 40), format)
    x[1, 1, 1] = np.nan
    values = np.asarray(opened(quantize(jnp.asarray(x), format, axis=-2))[2])
    assert np.isnan(values[1, :, 1]).all()

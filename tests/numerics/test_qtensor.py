"""QTensor: what its fields mean, that it is a plain pytree, and that `validate` notices every broken invariant."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp4jax import numerics
from fp4jax.numerics import NVFP4, QTensor
from tests import oracle

quantize = jax.jit(numerics.quantize, static_argnames=("axis", "block", "batch_dims"))
jitted_values = jax.jit(QTensor.values, static_argnames=("dtype", "padded"))
X = np.random.default_rng(0).standard_normal((3, 17, 40)).astype(np.float32)


@pytest.fixture(scope="module")
def q():
    return quantize(jnp.asarray(X), axis=-2, batch_dims=1)


@pytest.fixture(scope="module")
def square():
    return quantize(jnp.asarray(X), axis=-1, block=(16, 16), batch_dims=1)


def test_shapes(q, square):
    assert (q.shape, q.padded_shape) == ((3, 17, 40), (3, 32, 40))
    assert (q.codes.shape, q.scales.shape, q.amax.shape) == ((3, 16, 40), (3, 2, 40), (3, 1, 1))
    assert (q.axis, q.blocked, q.format) == (-2, ((-2, 17),), NVFP4)
    assert (square.shape, square.padded_shape) == ((3, 17, 40), (3, 32, 48))
    assert (square.codes.shape, square.scales.shape, square.amax.shape) == ((3, 32, 24), (3, 2, 3), (3, 1, 1))


def test_values_and_tensor_scale(q):
    expected = oracle.quantize(X, -2, batch_dims=1)
    assert np.array_equal(jitted_values(q), expected.unscaled())
    assert np.array_equal(q.tensor_scale, (expected.amax / np.float32(2688)).reshape(3, 1, 1))
    assert np.array_equal(q.dequantize(), expected.dequantize())
    assert q.dequantize(jnp.bfloat16).dtype == jnp.bfloat16


def test_tensor_scale_is_an_exact_division():
    # XLA multiplies by the reciprocal of a divisor it can see: one unit in the last place off for one value in five.
    amax = np.random.default_rng(0).uniform(1, 4000, (4096, 1, 1)).astype(np.float32)

    def of(amax):
        shape = amax.shape[:-1]
        codes, scales = jnp.zeros((*shape, 8), jnp.uint8), jnp.zeros((*shape, 1), jnp.uint8)
        return QTensor(codes, scales, amax, NVFP4, -1, ((-1, 16),)).tensor_scale

    expected = amax / np.float32(2688)
    for scale in (of, jax.jit(of), jax.vmap(of), jax.jit(jax.vmap(of)), jax.jit(lambda a: jax.lax.map(of, a))):
        assert np.array_equal(scale(jnp.asarray(amax)), expected)


@pytest.mark.parametrize("exponent", [-20, 0, 20])
def test_values_are_exact_in_bfloat16(exponent):
    x = X * np.exp2(np.random.default_rng(1).uniform(-15, 0, X.shape)).astype(np.float32) * np.float32(2.0**exponent)
    q = quantize(jnp.asarray(x), axis=-2, batch_dims=1)
    assert np.unique(np.asarray(q.scales)).size > 40
    assert np.array_equal(jitted_values(q, jnp.bfloat16).astype(jnp.float32), jitted_values(q))


def test_every_code_times_every_scale_is_exact_in_bfloat16():
    codes = np.tile(np.arange(16, dtype=np.uint8), 127)
    scales = np.arange(127, dtype=np.uint8)
    q = QTensor(
        codes=jnp.asarray(oracle.pack(codes)),
        scales=jnp.asarray(scales),
        amax=jnp.ones(1, jnp.float32),
        format=NVFP4,
        axis=-1,
        blocked=((-1, codes.size),),
    )
    q.validate()
    exact = oracle.Quantized(codes, np.repeat(scales, 16), np.float32(1), 0).unscaled()
    assert np.array_equal(jitted_values(q), exact)
    assert np.array_equal(jitted_values(q, jnp.bfloat16).astype(jnp.float32), exact)


def test_padding_is_zero_and_kept_on_request(q, square):
    kept = np.asarray(jitted_values(q, padded=(-2,)))
    assert kept.shape == (3, 32, 40)
    assert np.array_equal(kept[:, :17], jitted_values(q)) and not kept[:, 17:].any()
    for padded, shape in (((), (3, 17, 40)), ((-1,), (3, 17, 48)), ((-1, -2), (3, 32, 48))):
        assert jax.eval_shape(lambda q, padded=padded: q.values(padded=padded), square).shape == shape


def test_is_a_pytree(q):
    leaves, tree = jax.tree.flatten(q)
    assert len(leaves) == 3
    again = jax.tree.unflatten(tree, leaves)
    assert again.blocked == q.blocked and np.array_equal(again.dequantize(), q.dequantize())
    assert np.array_equal(jax.jit(lambda q: q)(q).codes, q.codes)


def test_scan_slices_and_vmap_adds_a_leading_axis(q):
    _, scanned = jax.lax.scan(lambda c, one: (c, one.dequantize()), 0, q)
    assert np.array_equal(scanned, q.dequantize())
    mapped = jax.vmap(lambda x: quantize(x, axis=-2))(jnp.asarray(X))
    mapped.validate()
    assert mapped.shape == q.shape
    for name in ("codes", "scales", "amax"):
        assert np.array_equal(getattr(mapped, name), getattr(q, name))


def test_jit_equals_eager(q):
    jitted = jax.jit(lambda q: (q.values(), q.dequantize(), q.tensor_scale))(q)
    for got, expected in zip(jitted, (q.values(), q.dequantize(), q.tensor_scale), strict=True):
        assert np.array_equal(got, expected)


def test_valid_ones_pass(q, square):
    q.validate()
    square.validate()
    quantize(jnp.asarray(X[0, 0])).validate()


BROKEN = {
    "codes must be uint8": lambda q: {"codes": q.codes.astype(jnp.int32)},
    "scales must be uint8": lambda q: {"scales": q.scales.astype(jnp.float32)},
    "scales must have shape": lambda q: {"scales": q.scales[:, :1]},
    "cannot be padded to 32": lambda q: {"blocked": ((-2, 16),)},
    "axis 1 of logical size": lambda q: {"blocked": ((1, 17),)},
    "packing axis -1 is not among": lambda q: {
        "axis": -1,
        "blocked": ((-2, 16),),
        "scales": q.scales[:, :1].repeat(2, 2),
    },
    "amax must be float32 .*bfloat16": lambda q: {"amax": q.amax.astype(jnp.bfloat16)},
    r"one entry a matrix, got float32\[3, 17, 1\]": lambda q: {"amax": jnp.ones((3, 17, 1))},
    r"one entry a matrix, got float32\[3\]": lambda q: {"amax": q.amax.reshape(3)},
    r"one entry a matrix, got float32\[2, 1, 1\]": lambda q: {"amax": jnp.ones((2, 1, 1))},
    "non-negative": lambda q: {"scales": q.scales.at[2, 1, 3].add(128)},
    "zero in the padding of axis -2, from index 17": lambda q: {"codes": q.codes.at[1, -1, 3].set(0x10)},
}


@pytest.mark.parametrize("message", BROKEN)
def test_validate_names_what_is_broken(q, message):
    # Types are checked when a QTensor is made, too: write behind the constructor's back.
    broken = dataclasses.replace(q)
    for name, value in BROKEN[message](q).items():
        object.__setattr__(broken, name, value)
    with pytest.raises(ValueError, match=f"QTensor: .*{message}"):
        broken.validate()

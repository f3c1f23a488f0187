"""`quantize_copies` gives both twins' bits, `numerics.quantize_blocks` along rows and columns, in one read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp4jax.numerics import NVFP4, QTensor, hadamard, key_words, quantize_blocks
from pallas_kernels import launch
from pallas_kernels.quantize import quantize_copies
from tests.pallas_kernels.quantize.test_quantize_rows import (
    DTYPES,
    assert_same,
    at_once,
    values,
)

WORDS = tuple(key_words(jax.random.key(seed)) for seed in (7, 8))


def check(x, interpret, *, words=(None, None), center=None, transformed=False, batch_dims=0):
    given = {"words": words, "center": center, "hadamard": transformed, "batch_dims": batch_dims}
    got = at_once(quantize_copies, x, interpret=interpret, **given)

    @jax.jit
    def twins(x):
        residual = x if center is None else x.astype(jnp.float32) - center
        down = hadamard(residual, -2) if transformed else residual
        return tuple(
            quantize_blocks(each, NVFP4, axes=(axis,), pack_axis=axis, batch_dims=batch_dims, words=drawn)
            for each, axis, drawn in ((residual, -1, words[0]), (down, -2, words[1]))
        )

    for copy, twin in zip(got, twins(x), strict=True):
        assert_same(copy, twin)
    return got


@pytest.mark.parametrize("shape", [(16, 16), (32, 528), (48, 300)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
def test_equals_both_twins(shape, dtype, interpret):
    check(values(shape, dtype), interpret)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
@pytest.mark.parametrize("transformed", [False, True], ids=["", "transformed"])
def test_centered_and_stochastic_each_with_its_own_draws(transformed, dtype, interpret):
    center = values((2, 1, 1, 272), jnp.float32, seed=1)
    x = values((2, 2, 32, 272), dtype)
    check(x, interpret, words=WORDS, center=center, transformed=transformed, batch_dims=1)


@pytest.mark.parametrize("drawn", [0, 1], ids=["rows", "columns"])
def test_one_copy_may_be_stochastic(drawn, interpret):
    words = tuple(WORDS[i] if i == drawn else None for i in range(2))
    check(values((32, 100), jnp.bfloat16), interpret, words=words)


def test_steps_of_one_thread_block(interpret, monkeypatch):
    monkeypatch.setattr(launch, "MIN_THREAD_BLOCKS", 1)
    monkeypatch.setattr(launch, "MOST_STEPS", 3)
    check(values((7 * 16, 288), jnp.bfloat16), interpret, words=WORDS)  # a shape of this test alone


def test_maxima_that_are_given_are_used(interpret):
    amax = jnp.full((1, 1), 37.5), jnp.full((1, 1), 50.0)
    got = quantize_copies(values((32, 48), jnp.bfloat16), amax=amax, interpret=interpret)
    assert [float(copy.amax[0, 0]) for copy in got] == [37.5, 50.0]
    assert (np.asarray(got[0].scales).max(), np.asarray(got[1].scales).max()) != (126, 126)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
def test_sums_in_the_same_read(dtype, interpret, monkeypatch):
    """Of two matrices of two sequences each; a thread block takes two blocks of rows, the last one less."""
    monkeypatch.setattr(launch, "MIN_THREAD_BLOCKS", 1)
    monkeypatch.setattr(launch, "MOST_STEPS", 2)
    x, center = values((2, 2, 48, 544), dtype), values((2, 1, 1, 544), jnp.float32, seed=1)
    given = {"center": center, "words": WORDS, "batch_dims": 1, "interpret": interpret}
    *got, sums = at_once(quantize_copies, x, sums=True, **given)
    for copy, twin in zip(got, at_once(quantize_copies, x, **given), strict=True):
        assert_same(copy, twin)
    represented = np.asarray(jax.jit(QTensor.dequantize)(got[1]), np.float64)
    want, scale = (part.sum(axis=(1, 2), keepdims=True) for part in (represented, np.abs(represented)))
    assert sums.shape == want.shape and sums.dtype == jnp.float32
    assert (np.abs(np.asarray(sums) - want) <= 2e-6 * scale).all()


@pytest.mark.gpu  # the maxima of XLA:CPU, which the interpreter runs on, may lose NaN
def test_sums_show_a_block_that_is_not_finite():
    x = jnp.ones((32, 544)).at[3, 7].set(jnp.nan)
    sums = np.asarray(quantize_copies(x, amax=(jnp.ones((1, 1)),) * 2, sums=True)[2])[0]
    assert np.isnan(sums[7]) and np.isfinite(np.delete(sums, 7)).all()


def test_sums_of_a_transformed_copy_are_refused():
    with pytest.raises(ValueError, match="sums=True needs hadamard=False"):
        quantize_copies(jnp.ones((32, 32)), sums=True, hadamard=True, interpret=True)


def test_rows_that_are_no_whole_blocks_are_refused():
    with pytest.raises(NotImplementedError, match=r"rows in whole blocks of 16, got shape \(24, 32\)"):
        quantize_copies(jnp.ones((24, 32)), interpret=True)

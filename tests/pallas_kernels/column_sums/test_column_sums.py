"""`column_sums` equals its twin `numerics.column_sums` bit for bit, in the GPU interpreter and on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp4jax import numerics
from fp4jax.numerics import NVFP4, QTensor, key_words, quantize_blocks
from pallas_kernels import launch
from pallas_kernels.column_sums import column_sums


def quantized(shape, batch_dims=0, axis=-2):
    """Blocks of few signs, so far apart in magnitude that their sums round: in another order they are other bits."""
    rng = np.random.default_rng([1, *shape])
    blocks = (*shape[:-2], -(-shape[-2] // 16), shape[-1])
    magnitudes = np.exp2(rng.choice([-17, -15, -1, 0], blocks)) * rng.choice([-1, 1], blocks, p=(0.2, 0.8))
    x = rng.uniform(0.3, 1, shape) * np.repeat(magnitudes, 16, axis=-2)[..., : shape[-2], :]
    x = jnp.asarray(x, jnp.float32)
    words = key_words(jax.random.key(5))
    given = {"axes": (axis,), "pack_axis": axis, "batch_dims": batch_dims, "words": words}
    return jax.jit(lambda x: quantize_blocks(x, NVFP4, **given))(x)


def check(q, batch_dims, interpret):
    got = np.asarray(jax.jit(lambda q: column_sums(q, batch_dims, interpret=interpret))(q))
    want = np.asarray(jax.jit(functools.partial(numerics.column_sums, batch_dims=batch_dims))(q))
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


SHAPES = [((16, 512), 0), ((700, 40), 0), ((3, 33, 517), 0), ((2, 3, 48, 1024), 1)]


@pytest.mark.parametrize("shape, batch_dims", SHAPES, ids=str)
def test_equals_its_twin(shape, batch_dims, interpret):
    check(quantized(shape, batch_dims), batch_dims, interpret)


@pytest.mark.parametrize("steps", [2, 3, 8])  # 3: what fills a GPU is no power of two
def test_steps_of_one_thread_block(steps, interpret, monkeypatch):
    monkeypatch.setattr(launch, "steps_each", lambda *_: steps)
    # Shapes of this test alone: jit keeps others. The last thread block reaches beyond the end.
    check(quantized((2, 3, 16 * (steps + 9), 520), 1), 1, interpret)


def test_zeros_have_no_sign(interpret):
    check(quantize_blocks(-jnp.zeros((2, 48, 516)), NVFP4, axes=(-2,), pack_axis=-2), 0, interpret)


@pytest.mark.parametrize("shape, batch_dims", SHAPES, ids=str)
def test_the_twin_is_the_sum_of_the_values(shape, batch_dims):
    q = quantized(shape, batch_dims)
    got = np.asarray(jax.jit(functools.partial(numerics.column_sums, batch_dims=batch_dims))(q))
    values = np.asarray(jax.jit(QTensor.dequantize)(q), np.float64)
    axes = tuple(range(batch_dims, len(shape) - 1))
    want, scale = values.sum(axis=axes, keepdims=True), np.abs(values).sum(axis=axes, keepdims=True)
    assert got.shape == want.shape
    assert (np.abs(got - want) <= 2e-6 * scale).all()
    assert np.abs(got).max() > 0


def test_a_block_that_is_not_finite_shows(interpret):
    x = jnp.ones((32, 512)).at[3, 7].set(jnp.nan)
    q = jax.jit(lambda x: quantize_blocks(x, NVFP4, axes=(-2,), pack_axis=-2, amax=jnp.ones((1, 1))))(x)
    got = np.asarray(column_sums(q, interpret=interpret))[0]
    assert np.isnan(got[7])
    assert np.isfinite(np.delete(got, 7)).all()


def test_other_ways_to_quantize_are_refused():
    with pytest.raises(ValueError, match="blocks along axis -2, got NVFP4"):
        column_sums(quantized((32, 32), axis=-1), interpret=True)

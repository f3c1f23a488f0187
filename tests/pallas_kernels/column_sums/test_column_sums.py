"""`column_sums` equals the sum of the represented values, in the GPU interpreter and on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp4jax.numerics import NVFP4, QTensor, key_words, quantize_blocks
from pallas_kernels.column_sums import column_sums


def quantized(shape, batch_dims=0, axis=-2):
    rng = np.random.default_rng([1, *shape])
    x = jnp.asarray(rng.standard_normal(shape) * np.exp2(rng.uniform(-9, 2, (*shape[:-1], 1))), jnp.float32)
    words = key_words(jax.random.key(5))
    given = {"axes": (axis,), "pack_axis": axis, "batch_dims": batch_dims, "words": words}
    return jax.jit(lambda x: quantize_blocks(x, NVFP4, **given))(x)


@pytest.mark.parametrize(
    "shape, batch_dims", [((16, 512), 0), ((700, 40), 0), ((3, 33, 517), 0), ((2, 3, 48, 1024), 1)], ids=str
)
def test_equals_the_sum_of_the_values(shape, batch_dims, interpret):
    q = quantized(shape, batch_dims)
    got = np.asarray(jax.jit(lambda q: column_sums(q, batch_dims, interpret=interpret))(q))
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

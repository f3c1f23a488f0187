"""`quantize_2d` equals its twin `numerics.quantize_blocks` bit for bit, in the GPU interpreter and on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp4jax.numerics import NVFP4, quantize_blocks
from pallas_kernels import launch
from pallas_kernels.quantize import quantize_2d, shapes
from tests.combinations import half_quick
from tests.pallas_kernels.quantize.test_quantize_rows import (
    DTYPE_NAMES,
    DTYPES,
    ROUNDINGS,
    assert_same,
    at_once,
    stream,
    values,
)


def twin(x, **arguments):
    return jax.jit(lambda x: quantize_blocks(x, NVFP4, axes=(-2, -1), pack_axis=-2, **arguments))(x)


def check(x, interpret, **arguments):
    got = at_once(quantize_2d, x, interpret=interpret, **arguments)
    assert_same(got, twin(x, **arguments))
    return got


# Less than a strip, a strip, a last strip that overlaps; ragged rows, columns and both; several matrices of one scale.
SHAPES = [(16, 16), (32, 512), (48, 784), (33, 300), (1, 17), (2, 40, 528)]


@half_quick({"stochastic": ROUNDINGS, "dtype": DTYPE_NAMES, "shape": {str(shape): shape for shape in SHAPES}})
def test_equals_its_twin(shape, dtype, stochastic, interpret):
    check(values(shape, dtype), interpret, words=stream(stochastic))


@pytest.mark.slow
@pytest.mark.parametrize("shape", shapes.WEIGHT_SHAPES, ids=lambda s: s.name)
def test_equals_its_twin_on_the_models_weights_scaled_down(shape, interpret):
    small = shapes.scaled_down(shape, 16)
    check(values(small.array, jnp.float32), interpret, batch_dims=len(small.array) - 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
def test_each_matrix_of_a_batch_has_its_own_scale_and_noise(dtype, interpret):
    x = values((3, 32, 260), dtype) * jnp.asarray([1, 32, 2.0**-20], dtype)[:, None, None]
    got = check(x, interpret, batch_dims=1, words=stream(True))
    assert len(set(np.asarray(got.amax).ravel().tolist())) == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
@pytest.mark.parametrize("exponent", [-30, 0, 30])
def test_across_magnitudes(dtype, exponent, interpret):
    check(values((32, 48), dtype) * jnp.asarray(2.0**exponent, dtype), interpret)


def test_the_largest_magnitude_of_a_block_may_lie_anywhere_in_it(interpret):
    """256 blocks, each with its peak at another place: a lane that the maximum did not reach would show."""
    place = np.eye(256, dtype=np.float32).reshape(16, 16, 16, 16)  # [block down, block across, row, column]
    x = jnp.asarray((place * 100 + 1).transpose(0, 2, 1, 3).reshape(256, 256))
    got = check(x, interpret)
    assert len(set(np.asarray(got.scales).ravel().tolist())) == 1


def test_steps_of_one_thread_block(interpret, monkeypatch):
    monkeypatch.setattr(launch, "MIN_THREAD_BLOCKS", 1)
    monkeypatch.setattr(launch, "MOST_STEPS", 3)
    check(values((7 * 16, 272), jnp.bfloat16), interpret, words=stream(True))  # a shape of this test alone


def test_golden_vector(interpret):
    x = ((jnp.arange(512) * 7919 % 1009 - 504).astype(jnp.float32) / 64).reshape(16, 32)
    got = check(x, interpret)
    assert float(got.amax[0, 0]) == 7.875
    assert np.asarray(got.scales).tolist() == [[126, 126]]


@pytest.mark.gpu
def test_what_is_not_finite_stays_so_in_its_block():
    """Not in the interpreter: XLA:CPU drops NaN from a maximum over an axis that is not the last; the kernel's PTX has
    max.NaN (test_compile.py).
    """
    x = values((32, 512), jnp.float32).at[3, 5].set(np.nan)
    finite = np.isfinite(np.asarray(quantize_2d(x, amax=jnp.full((1, 1), 8.0)).dequantize()))
    assert not finite[:16, :16].any()
    assert finite[16:].all() and finite[:, 16:].all()


def test_errors_say_what_was_given():
    with pytest.raises(ValueError, match="needs two axes behind batch_dims=1, got shape"):
        quantize_2d(jnp.ones((16, 16)), batch_dims=1, interpret=True)

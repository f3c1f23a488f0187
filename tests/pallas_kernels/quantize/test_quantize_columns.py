"""`quantize_columns` equals its twin `numerics.quantize_blocks` bit for bit, in the GPU interpreter and on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp4jax.numerics import NVFP4, hadamard, quantize_blocks
from pallas_kernels import launch
from pallas_kernels.quantize import elements, quantize_columns, quantize_copies
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


def transform(x):
    """What the project does before it quantizes a transformed operand: padded to whole blocks, transformed."""
    return hadamard(jnp.pad(x, [*[(0, 0)] * (x.ndim - 2), (0, -x.shape[-2] % 16), (0, 0)]), -2)


def twin(x, *, center=None, transformed=False, **arguments):
    def quantized(x):
        x = x if center is None else x.astype(jnp.float32) - center
        x = transform(x) if transformed else x
        return quantize_blocks(x, NVFP4, axes=(-2,), pack_axis=-2, **arguments)

    return jax.jit(quantized)(x)


def check(x, interpret, *, transformed=False, **arguments):
    got = at_once(quantize_columns, x, interpret=interpret, hadamard=transformed, **arguments)
    assert_same(got, twin(x, transformed=transformed, **arguments))
    return got


# A strip and less, a last strip that overlaps, rows that are no multiple of a block, several sequences, odd widths.
SHAPES = [(16, 16), (48, 300), (33, 513), (2, 40, 528), (3, 16, 1041)]


@half_quick({"stochastic": ROUNDINGS, "dtype": DTYPE_NAMES, "shape": {str(shape): shape for shape in SHAPES}})
def test_equals_its_twin(shape, dtype, stochastic, interpret):
    check(values(shape, dtype), interpret, words=stream(stochastic))


@half_quick(
    {
        "centered": {"": False, "centered": True},
        "stochastic": ROUNDINGS,
        "dtype": DTYPE_NAMES,
        "shape": {"whole blocks": (48, 300), "padded": (2, 40, 528)},
    }
)
def test_the_transform_is_the_projects(shape, dtype, stochastic, centered, interpret):
    center = values((*[1] * (len(shape) - 1), shape[-1]), jnp.float32, seed=1) if centered else None
    check(values(shape, dtype), interpret, transformed=True, center=center, words=stream(stochastic))


@half_quick(
    {
        "dtype": DTYPE_NAMES,
        "rows": {"whole blocks": 32, "padded": 24},
        "of_sequences": {"of the matrix": False, "of sequences": True},
    }
)
def test_the_center_is_subtracted(of_sequences, rows, dtype, interpret):
    x = values((2, 3, rows, 272), dtype)
    center = values((2, 3 if of_sequences else 1, 1, 272), jnp.float32, seed=1)
    got = check(x, interpret, center=center, batch_dims=1, words=stream(True))
    assert (np.asarray(got.codes) != np.asarray(twin(x, batch_dims=1, words=stream(True)).codes)).any()


@pytest.mark.parametrize("transformed", [False, True], ids=["", "transformed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
def test_each_matrix_of_a_batch_has_its_own_scale_and_noise(transformed, dtype, interpret):
    x = values((3, 32, 260), dtype) * jnp.asarray([1, 32, 2.0**-20], dtype)[:, None, None]
    got = check(x, interpret, batch_dims=1, transformed=transformed, words=stream(True))
    assert len(set(np.asarray(got.amax).ravel().tolist())) == 3


def test_steps_of_one_thread_block(interpret, monkeypatch):
    monkeypatch.setattr(launch, "MIN_THREAD_BLOCKS", 1)
    monkeypatch.setattr(launch, "MOST_STEPS", 3)
    for transformed in (False, True):  # shapes of this test alone: jit keeps the others
        check(values((7 * 16, 257), jnp.bfloat16), interpret, transformed=transformed, words=stream(True))


def test_signs_ties_and_underflow(interpret):
    grid = np.array([0, -0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, -1.25, -2.5, -3.5, -5, 6], np.float32)
    blocks = np.stack([np.zeros(16), -np.zeros(16), grid, grid * 448 / 6, grid * 1e-7, -grid, grid * 2.0**-9])
    check(jnp.asarray(blocks.T, jnp.float32), interpret)
    check(jnp.asarray(blocks.T, jnp.bfloat16), interpret)


def test_a_given_maximum_is_used(interpret):
    amax = jnp.full((1, 1), 37.5)
    assert float(check(values((32, 48), jnp.bfloat16), interpret, amax=amax).amax[0, 0]) == 37.5


@pytest.fixture
def nan_as_ptx_has_it(interpret, monkeypatch):
    """XLA:CPU gives a NaN bits whose low half is zero; those of `min.NaN.f32` of PTX are ones behind the sign."""
    position = elements._position

    def of_gpu(value):
        return jnp.where(jnp.isnan(value), jnp.uint32(0x7FFFFFFF), position(value))

    if interpret:
        monkeypatch.setattr(elements, "_position", of_gpu)


@pytest.mark.parametrize("width", [288, 290], ids=["columns", "copies"])  # shapes of this test alone: jit keeps others
def test_a_nan_stays_in_its_column(width, interpret, nan_as_ptx_has_it):
    x = values((32, width), jnp.bfloat16)
    amax = jnp.full((1, 1), 8.0)
    bad = x.at[5, 20].set(jnp.nan).at[9, 33].set(jnp.nan)  # an even and an odd column
    if width == 288:
        got = quantize_columns(bad, amax=amax, interpret=interpret)
    else:
        _, got = quantize_copies(bad, amax=(amax, amax), interpret=interpret)
    want, others = twin(x, amax=amax), np.delete(np.arange(width), [20, 33])
    for part in ("codes", "scales"):
        np.testing.assert_array_equal(
            np.asarray(getattr(got, part))[:, others], np.asarray(getattr(want, part))[:, others]
        )
    if not interpret:  # maxima of XLA:CPU pass over NaN
        assert ((np.asarray(got.scales)[0, [20, 33]] & 0x7F) == 0x7F).all()


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 15, 16, 100, 256])
@pytest.mark.parametrize("width", [1, 16, 255, 512, 1000])
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
def test_equals_its_twin_over_many_shapes(rows, width, dtype, stochastic, interpret):
    check(values((rows, width), dtype), interpret, words=stream(stochastic), transformed=rows == 100)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"x": jnp.ones(16)}, "needs two axes behind batch_dims=0"),
        ({"center": jnp.ones((1, 8))}, r"center must be of shape \(1, 16\) or \(1, 16\), got \(1, 8\)"),
    ],
    ids=["axes", "center"],
)
def test_errors_say_what_was_given(arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize_columns(**{"x": jnp.ones((32, 16)), "interpret": True, **arguments})

"""Codes that are not packed yet, and what spares XLA reads and writes: the same values, bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fp4jax
from fp4jax.numerics import MXFP4, NVFP4, NVFP4_256, QTensor, bits, quantize_blocks
from fp4jax.numerics.formats import FORMATS, Extent
from fp4jax.numerics.scales import largest_magnitude, outer_statistic
from tests.contract import assert_identical


@functools.cache
def matrix(shape=(3, 40, 48)):
    return jax.random.normal(jax.random.key(0), shape) * jnp.exp(jax.random.normal(jax.random.key(1), shape))


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("format", [NVFP4, NVFP4_256, MXFP4])
def test_packing_later_is_packing_at_once(format, axis):
    words = bits.key_words(jax.random.key(7))
    given = {"axes": (axis,), "pack_axis": axis, "batch_dims": 1, "words": words}
    at_once, later = (
        jax.jit(functools.partial(quantize_blocks, format=format, packed=packed, **given))(matrix())
        for packed in (True, False)
    )
    assert at_once.packed and not later.packed and later.codes.shape == later.padded_shape
    assert (later.shape, later.padded_shape) == (at_once.shape, at_once.padded_shape)
    later.validate()
    assert_identical(*(jax.jit(lambda q: (q.values(jnp.bfloat16), q.dequantize()))(q) for q in (later, at_once)))
    packed = later.pack()
    assert packed.packed and jax.tree.structure(packed) == jax.tree.structure(at_once)
    jax.tree.map(assert_identical, packed, at_once)
    assert packed.pack() is packed


def test_codes_that_are_a_byte_wide_have_nothing_to_pack():
    q = quantize_blocks(matrix(), fp4jax.MXFP8, axes=(-1,), pack_axis=-1, packed=False)
    assert q.packed and q.pack() is q


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bfloat16_values_are_the_float32_ones(value):
    """NaN and infinity too, which reach the values through a block's scale."""
    x = matrix((32, 64)).at[5, 7].set(value)
    for format in (NVFP4, MXFP4):
        q = jax.jit(lambda x, format=format: quantize_blocks(x, format, axes=(-1,), pack_axis=-1))(x)
        exact, narrow, dequantized = (
            jax.jit(of)(q)
            for of in (QTensor.values, lambda q: q.values(jnp.bfloat16).astype(jnp.float32), QTensor.dequantize)
        )
        assert not np.isfinite(dequantized).all()
        np.testing.assert_array_equal(narrow, exact)


@pytest.mark.parametrize("format", [f for f in FORMATS if f.block and f.outer is Extent.MATRIX], ids=str)
@pytest.mark.parametrize("value", [3.0, np.nan])
def test_the_largest_of_the_blocks_is_that_of_the_matrix(format, value):
    x = matrix((2, 32, 64)).at[1, 3, 5].set(value)
    of_blocks = largest_magnitude(x.reshape(2, 32, 64 // format.block, format.block), (3,))
    found = outer_statistic(x, format, -1, 1, of_blocks)
    assert found.shape == (2, 1, 1)
    np.testing.assert_array_equal(found, outer_statistic(x, format, -1, 1))


def residuals_of(recipe, **kept):
    """What the backward pass of a product keeps, as shapes; activations prepared before it with `kept`."""

    def forward(x, w):
        dimensions = (((1,), (0,)), ((), ()))
        x_q = fp4jax.prepare(x, recipe, **kept) if kept else None
        return jax.vjp(lambda x, w: fp4jax.dot_general(x, w, dimensions, recipe=recipe, lhs_q=x_q), x, w)

    _, pullback = jax.eval_shape(forward, jnp.ones((256, 128)), jnp.ones((128, 64)))
    return [leaf for leaf in jax.tree.leaves(pullback) if leaf.dtype == jnp.uint8]


@pytest.mark.parametrize("kept", [{}, {"forward_kept": True}, {"forward_kept": False}])
def test_the_backward_keeps_packed_codes(kept):
    """4.5 bits an element of X and W, whatever their copies for the forward product are."""
    sizes = sum(leaf.size for leaf in residuals_of("nvfp4+nearest", **kept))
    assert sizes * 8 == 4.5 * (256 * 128 + 128 * 64)


def test_only_activations_that_are_not_kept_stay_unpacked():
    x, w = jnp.ones((32, 64)), jnp.ones((64, 32))

    def packed(operand, *arguments, **kept):
        prepared = jax.eval_shape(lambda operand: fp4jax.prepare(operand, "nvfp4", *arguments, **kept), operand)
        assert isinstance(prepared.forward.residual, QTensor)
        return [part.residual.packed for part in (prepared.forward, prepared.backward)]

    assert packed(x) == [True, True]
    assert packed(x, forward_kept=False) == [False, True]
    assert packed(w, "rhs", forward_kept=False) == [True, True]

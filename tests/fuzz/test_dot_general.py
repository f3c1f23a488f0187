"""`dot_general` on random shapes, dimension numbers and dtypes that lax accepts: the result has lax's shape and dtype.

FP4JAX_FUZZ_EXAMPLES sets how many are tried.
"""

import functools
import inspect
import os

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4jax.dot import dot_general

pytestmark = pytest.mark.standard_promotion
fuzz = settings(max_examples=int(os.environ.get("FP4JAX_FUZZ_EXAMPLES", "40")), deadline=None)
FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)
SIZES = st.sampled_from([1, 2, 3, 15, 16, 17, 33, 48])


@st.composite
def products(draw):
    """(lhs, rhs, dimension_numbers) that lax accepts, with the axes in any order."""
    batch, contracted = (draw(st.lists(SIZES, max_size=2)), draw(st.lists(SIZES, min_size=1, max_size=2)))
    sides = []
    for _ in range(2):
        axes = [("b", i, n) for i, n in enumerate(batch)] + [("c", i, n) for i, n in enumerate(contracted)]
        axes += [("f", i, n) for i, n in enumerate(draw(st.lists(SIZES, min_size=1, max_size=2)))]
        sides.append(draw(st.permutations(axes)))
    numbers = [[[axes.index(a) for a in sorted(axes) if a[0] == kind] for axes in sides] for kind in "cb"]
    shapes = [tuple(size for _, _, size in axes) for axes in sides]
    arrays = [jax.ShapeDtypeStruct(shape, draw(st.sampled_from(FLOATS))) for shape in shapes]
    return (*arrays, tuple(tuple(map(tuple, pair)) for pair in numbers))


RECIPES = st.sampled_from(["bf16", "nvfp4", "nvfp4_hadamard", "averis"])


@fuzz
@given(products(), RECIPES, st.sampled_from([None, jnp.float32, jnp.bfloat16]))
def test_shape_and_dtype_are_those_of_lax(product, recipe, preferred):
    lhs, rhs, numbers = product
    ours = functools.partial(dot_general, preferred_element_type=preferred, recipe=recipe, key=jax.random.key(0))
    theirs = functools.partial(jax.lax.dot_general, preferred_element_type=preferred)
    expected = jax.eval_shape(lambda x, w: theirs(x, w, numbers), lhs, rhs)
    found = jax.eval_shape(lambda x, w: ours(x, w, numbers), lhs, rhs)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)


NUMBERS = st.lists(st.integers(-1, 3), max_size=2).map(tuple)
SHAPES = st.lists(st.sampled_from([0, 1, 2, 16]), max_size=3).map(tuple)
DTYPES = st.sampled_from([*FLOATS, jnp.int32, jnp.bool_, jnp.uint8])


@fuzz
@given(SHAPES, SHAPES, DTYPES, DTYPES, st.tuples(NUMBERS, NUMBERS), st.tuples(NUMBERS, NUMBERS), RECIPES)
def test_whatever_lax_refuses_is_refused_in_one_line(lhs, rhs, dtype, other, contracted, batch, recipe):
    x, w = jax.ShapeDtypeStruct(lhs, dtype), jax.ShapeDtypeStruct(rhs, other)
    numbers = (contracted, batch)
    try:
        expected = jax.eval_shape(functools.partial(jax.lax.dot_general, dimension_numbers=numbers), x, w)
    except (TypeError, ValueError):
        expected = None
    unchecked = inspect.unwrap(dot_general)  # without the type checker of the tests, which would raise first
    call = functools.partial(unchecked, dimension_numbers=numbers, recipe=recipe, key=jax.random.key(0))
    try:
        found = jax.eval_shape(call, x, w)
    except (TypeError, ValueError) as error:  # TypeError: lax's own
        assert "\n" not in str(error)
        floats = jnp.issubdtype(dtype, jnp.floating) and jnp.issubdtype(other, jnp.floating)
        # What lax takes and we do not: integers, and axes without an element.
        assert expected is None or not floats or not x.size or not w.size
    else:
        assert expected is not None
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)

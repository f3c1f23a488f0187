"""The kernel `column_stats` equals its twin bit for bit, in the GPU interpreter and on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp4jax import numerics
from pallas_kernels import compat
from pallas_kernels.column_stats import column_stats, kernel
from pallas_kernels.quantize import shapes

DTYPES = (jnp.bfloat16, jnp.float32)
needs_interpreter = pytest.mark.skipif(not compat.CAN_INTERPRET, reason="the GPU interpreter needs JAX 0.12.0")


def values(shape, dtype, seed=0):
    """Of many magnitudes, so that another order of additions gives other bits."""
    rng = np.random.default_rng([seed, *shape])
    x = rng.standard_normal(shape) * np.exp2(rng.uniform(-12, 8, shape)) + rng.standard_normal(shape[-1])
    return jnp.asarray(x, jnp.float32).astype(dtype)


def assert_same(got, want):
    for name in want._fields:
        np.testing.assert_array_equal(np.asarray(getattr(got, name)), np.asarray(getattr(want, name)), err_msg=name)


def check(x, interpret, batch_dims=0):
    want = jax.jit(lambda x: numerics.column_stats(x, batch_dims))(x)
    assert_same(jax.jit(lambda x: column_stats(x, batch_dims, interpret=interpret))(x), want)


# Vectors of 8, 4 and 2 columns; strips that tile the columns and that overlap; padded columns; fewer rows than are in
# flight, whole stretches, a last one that is ragged; several token axes.
@pytest.mark.parametrize(
    "shape, dtype, batch_dims",
    [
        ((1, 1024), jnp.bfloat16, 0),
        ((32, 512), jnp.bfloat16, 0),
        ((100, 768), jnp.bfloat16, 0),
        ((70, 1536), jnp.bfloat16, 0),
        ((300, 640), jnp.float32, 0),
        ((5, 33), jnp.bfloat16, 0),
        ((64, 257), jnp.float32, 0),
        ((3, 2, 40, 256), jnp.float32, 1),
        ((2, 3, 9, 512), jnp.bfloat16, 2),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type(jnp.float32)) else str(value),
)
def test_equals_its_twin(shape, dtype, batch_dims, interpret):
    check(values(shape, dtype), interpret, batch_dims)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 7, 8, 31, 33, 255, 256, 1000])
@pytest.mark.parametrize("columns", [1, 128, 256, 300, 1000, 1024])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
def test_equals_its_twin_over_many_shapes(rows, columns, dtype, interpret):
    check(values((rows, columns), dtype), interpret)


@pytest.mark.slow
@pytest.mark.parametrize("shape", shapes.SHAPES, ids=lambda s: f"{s.tokens}x{s.features}")
def test_equals_its_twin_on_the_models_shapes_scaled_down(shape, interpret):
    small = shapes.scaled_down(shape, 4)
    check(values((min(small.tokens, 2048), small.features), jnp.bfloat16), interpret)


@pytest.mark.parametrize("levels", range(kernel._MIN_LEVELS, kernel.MAX_LEVELS + 1))
def test_the_length_of_a_stretch_changes_no_bit(levels, interpret, monkeypatch):
    # Only large matrices get the long ones.
    monkeypatch.setattr(kernel, "levels_for", lambda batch, rows, strips: levels)
    check(values((333, 512), jnp.bfloat16), interpret)


def test_long_stretches_where_enough_thread_blocks_remain():
    assert kernel.levels_for(1, 65536, 3) == kernel.MAX_LEVELS
    assert kernel.levels_for(1, 4096, 1) == kernel._MIN_LEVELS
    assert kernel.levels_for(64, 4096, 1) == kernel.MAX_LEVELS


@pytest.mark.parametrize(
    "columns, itemsize, vector", [(1024, 2, 8), (3072, 4, 4), (768, 2, 2), (1032, 2, 8), (640, 4, 4), (257, 4, None)]
)
def test_vectors_tile_the_columns_where_they_can(columns, itemsize, vector):
    assert kernel.vector_for(columns, itemsize) == vector


@pytest.mark.parametrize("infinity", [np.inf, -np.inf])
def test_an_infinity_stays_in_its_column(infinity, interpret):
    check(values((40, 256), jnp.float32).at[3, 5].set(infinity), interpret)


def test_the_sum_carries_nan(interpret):
    x = values((40, 256), jnp.float32).at[3, 5].set(np.nan)
    got, want = column_stats(x, interpret=interpret), jax.jit(numerics.column_stats)(x)
    assert np.isnan(got.sum[0, 5])
    others = jnp.arange(256) != 5
    assert_same(*(jax.tree.map(lambda part: part[:, others], stats) for stats in (got, want)))
    np.testing.assert_array_equal(np.asarray(got.sum), np.asarray(want.sum))


def test_zeros_and_the_smallest_and_largest_numbers(interpret):
    info = jnp.finfo(jnp.bfloat16)
    columns = [0.0, -0.0, float(info.max), float(info.min), float(info.tiny), -1.0, 1.0, 2.0**-20]
    x = jnp.asarray(np.tile(np.float32(columns), (9, 32)), jnp.bfloat16)
    check(x, interpret)
    total = column_stats(x[:2], interpret=interpret).sum
    assert not np.signbit(np.asarray(total[0, :2])).any()


def test_under_jit_and_vmap(interpret):
    x = values((3, 40, 256), jnp.bfloat16)
    got = jax.jit(jax.vmap(lambda m: column_stats(m, interpret=interpret)))(x)
    assert_same(got, jax.vmap(numerics.column_stats)(x))


@needs_interpreter
@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"x": jnp.ones((2, 16), jnp.float16)}, ValueError, "takes bfloat16 or float32, got float16"),
        ({"x": jnp.ones((0, 16))}, ValueError, r"non-empty array, got shape \(0, 16\)"),
        ({"x": jnp.ones((16,))}, ValueError, r"takes \[\*batch, \*tokens, features\]: got shape \(16,\)"),
        ({"batch_dims": 1}, ValueError, r"got shape \(2, 16\), batch_dims=1"),
        ({"x": jnp.ones((65536, 1, 2)), "batch_dims": 1}, NotImplementedError, "65535 matrices at most, got 65536"),
    ],
    ids=["dtype", "empty", "no tokens", "batch_dims", "batch"],
)
def test_errors_say_what_was_given(arguments, error, message):
    with pytest.raises(error, match=message):
        column_stats(**{"x": jnp.ones((2, 16)), "interpret": True, **arguments})


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the default device may be able to run the kernel")
def test_a_device_that_cannot_run_it_is_named_with_the_alternative():
    with pytest.raises(NotImplementedError, match=r"the device is cpu \(cpu\); use fp4jax.numerics.column_stats"):
        column_stats(jnp.ones((2, 16)))


@pytest.mark.skipif(compat.CAN_INTERPRET, reason="shows what happens before JAX 0.12")
def test_an_old_interpreter_is_named():
    with pytest.raises(NotImplementedError, match=f"needs JAX 0.12.0 or newer, this is {jax.__version__}"):
        column_stats(jnp.ones((2, 16)), interpret=True)

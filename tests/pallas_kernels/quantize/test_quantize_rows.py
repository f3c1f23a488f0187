"""`quantize_rows` equals its twin `numerics.quantize_blocks` bit for bit, in the GPU interpreter and on a GPU."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp4jax.numerics import NVFP4, Format, key_words, quantize_blocks
from pallas_kernels import compat, launch
from pallas_kernels.quantize import api, quantize_rows, shapes
from tests.combinations import half_quick

DTYPES = (jnp.bfloat16, jnp.float32)
DTYPE_NAMES = {jnp.dtype(dtype).name: dtype for dtype in DTYPES}
ROUNDINGS = {"nearest": False, "stochastic": True}
needs_interpreter = pytest.mark.skipif(not compat.CAN_INTERPRET, reason="the GPU interpreter needs JAX 0.12")


def values(shape, dtype, seed=0):
    """Many magnitudes, so that blocks of one matrix use many scales, subnormal ones included."""
    rng = np.random.default_rng([seed, *shape])
    x = rng.standard_normal(shape) * np.exp2(rng.uniform(-12, 2, (*shape[:-1], 1)))
    return jnp.asarray(x, jnp.float32).astype(dtype)


def stream(stochastic):
    return key_words(jax.random.key(7)) if stochastic else None


def twin(x, **arguments):
    return jax.jit(lambda x: quantize_blocks(x, NVFP4, axes=(-1,), pack_axis=-1, **arguments))(x)


def assert_same(got, want):
    got.validate()
    assert jax.tree.structure(got) == jax.tree.structure(want)
    np.testing.assert_array_equal(np.asarray(got.scales), np.asarray(want.scales))
    np.testing.assert_array_equal(np.asarray(got.codes), np.asarray(want.codes))
    np.testing.assert_array_equal(np.asarray(got.amax), np.asarray(want.amax))


def at_once(kernel, x, **arguments):
    """The kernel in one program with what XLA does around it: op by op, each of that would be a compilation."""
    return jax.jit(lambda x: kernel(x, **arguments))(x)


def check(x, interpret, **arguments):
    assert_same(at_once(quantize_rows, x, interpret=interpret, **arguments), twin(x, **arguments))


# Fewer blocks than a tile, a whole tile, a last tile that overlaps; rows that begin inside a tile; ragged last axes.
@pytest.mark.parametrize(
    "shape, dtype, stochastic",
    [
        ((1, 16), jnp.bfloat16, False),
        ((17,), jnp.float32, True),
        ((3, 100), jnp.bfloat16, True),
        ((130, 48), jnp.bfloat16, False),
        ((130, 48), jnp.bfloat16, True),
        ((130, 48), jnp.float32, False),
        ((130, 48), jnp.float32, True),
        ((4, 1024), jnp.bfloat16, True),
        ((2, 3, 50, 40), jnp.bfloat16, True),
        ((200, 33), jnp.float32, True),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type(jnp.float32)) else str(value),
)
def test_equals_its_twin(shape, dtype, stochastic, interpret):
    check(values(shape, dtype), interpret, words=stream(stochastic))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2, 63, 64, 127, 200])
@pytest.mark.parametrize("columns", [16, 31, 240, 1000, 1024])
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
def test_equals_its_twin_over_many_shapes(rows, columns, dtype, stochastic, interpret):
    check(values((rows, columns), dtype), interpret, words=stream(stochastic))


@pytest.mark.slow
@pytest.mark.parametrize("shape", shapes.SHAPES, ids=lambda s: f"{s.tokens}x{s.features}")
def test_equals_its_twin_on_the_models_shapes_scaled_down(shape, interpret):
    small = shapes.scaled_down(shape, 16)
    x = values((min(small.tokens, 1024), small.features), jnp.bfloat16)
    check(x, interpret, words=stream(True))


@pytest.mark.slow
@pytest.mark.parametrize("shape", shapes.EXPERT_SHAPES, ids=lambda s: s.name)
def test_equals_its_twin_on_the_shapes_of_experts_scaled_down(shape, interpret):
    check(values(shapes.scaled_down(shape, 16).array, jnp.bfloat16), interpret, words=stream(True), batch_dims=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_magnitudes_from_2_to_the_minus_30_to_2_to_the_30(dtype, stochastic, interpret):
    power = jnp.exp2(jnp.arange(-30.0, 31.0, 4.0)).astype(dtype)[:, None, None]
    x = values((1, 3, 80), dtype) * power
    check(x, interpret, batch_dims=1, words=stream(stochastic))


@pytest.mark.parametrize("shape, batch_dims", [((2, 2, 3, 700), 2), ((2, 300, 48), 1)], ids=str)
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_each_matrix_of_a_batch_has_its_own_scale_and_noise(shape, batch_dims, stochastic, interpret):
    x = values(shape, jnp.bfloat16)
    x = x * jnp.exp2(jnp.arange(shape[0], dtype=jnp.float32) * 5).astype(x.dtype).reshape(-1, *[1] * (len(shape) - 1))
    check(x, interpret, batch_dims=batch_dims, words=stream(stochastic))


def test_every_scale_byte_and_every_code_occurs_and_agrees(interpret):
    # Blocks whose largest magnitudes walk through all scales of one matrix, below the smallest too.
    largest = np.concatenate([np.exp2(np.linspace(-20, 0, 640)), [0.0]]).astype(np.float32)
    within = np.linspace(-1, 1, 16, dtype=np.float32)
    x = jnp.asarray(largest[:, None] * within[None, :])
    got = quantize_rows(x, interpret=interpret)
    assert_same(got, twin(x))
    assert set(range(127)) == set(np.asarray(got.scales).ravel().tolist())
    codes = np.asarray(got.codes)
    assert set(range(16)) == set((codes & 15).ravel().tolist()) | set((codes >> 4).ravel().tolist())


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
def test_zeros_signs_ties_and_underflow(dtype, interpret):
    grid = np.array([0, -0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, -1.25, -2.5, -3.5, -5, 6], np.float32)
    blocks = np.stack([np.zeros(16), -np.zeros(16), grid, grid * 448 / 6, grid * 1e-7, -grid, grid * 2.0**-9])
    check(jnp.asarray(blocks, jnp.float32).astype(dtype), interpret)
    check(jnp.zeros((2, 32), dtype), interpret)


def test_golden_vectors(interpret):
    q = quantize_rows((jnp.arange(32.0) / 4 - 4)[None], interpret=interpret)
    assert np.asarray(q.scales).tolist() == [[126, 125]]
    want = [255, 239, 238, 222, 221, 204, 171, 154, 16, 34, 67, 84, 101, 102, 118, 119]
    assert np.asarray(q.codes).tolist() == [want]


@pytest.mark.parametrize("dtype, bad", [(jnp.bfloat16, np.nan), (jnp.bfloat16, -np.inf), (jnp.float32, np.nan)])
def test_what_is_not_finite_stays_not_finite(dtype, bad, interpret):
    x = values((4, 64), dtype).at[1, 20].set(bad)
    finite_amax = jnp.full((1, 1), 8.0)
    for arguments in ({}, {"amax": finite_amax}):
        got, want = quantize_rows(x, interpret=interpret, **arguments), twin(x, **arguments)
        got, want = jax.jit(lambda q: [each.dequantize() for each in q])([got, want])
        is_finite = np.isfinite(np.asarray(got))
        np.testing.assert_array_equal(is_finite, np.isfinite(np.asarray(want)))
        assert is_finite.any() == bool(arguments)


def test_a_given_maximum_is_used(interpret):
    x = values((2, 48), jnp.bfloat16)
    amax = jnp.full((1, 1), 37.5)
    check(x, interpret, amax=amax)
    assert float(quantize_rows(x, amax=amax, interpret=interpret).amax[0, 0]) == 37.5


def test_under_jit_and_vmap(interpret):
    x = values((3, 4, 64), jnp.bfloat16)
    got = jax.jit(jax.vmap(lambda m: quantize_rows(m, interpret=interpret)))(x)
    assert_same(got, jax.vmap(twin)(x))


def test_tiles_of_one_thread_block(interpret, monkeypatch):
    # Only large matrices give a thread block several tiles, the last of them beyond the end.
    monkeypatch.setattr(launch, "MIN_THREAD_BLOCKS", 1)
    monkeypatch.setattr(launch, "MOST_STEPS", 3)
    check(
        values((71, 320), jnp.bfloat16), interpret, words=stream(True)
    )  # a shape of this test alone: jit keeps others


@half_quick(
    {
        "stochastic": ROUNDINGS,
        "dtype": DTYPE_NAMES,
        "batched": {"of the matrix": ((40, 330), 0), "of each": ((2, 3, 20, 272), 1)},
    }
)
def test_the_center_is_subtracted(batched, dtype, stochastic, interpret):
    shape, batch_dims = batched
    x = values(shape, dtype)
    center = values((*shape[:batch_dims], *[1] * (len(shape) - batch_dims - 1), shape[-1]), jnp.float32, seed=1)
    arguments = {"batch_dims": batch_dims, "words": stream(stochastic)}
    got = at_once(quantize_rows, x, center=center, interpret=interpret, **arguments)
    assert_same(got, twin(x.astype(jnp.float32) - center, **arguments))
    assert (np.asarray(got.codes) != np.asarray(twin(x, **arguments).codes)).any()


@needs_interpreter
@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"x": jnp.ones((2, 16), jnp.float16)}, ValueError, "take bfloat16 or float32, got float16"),
        ({"x": jnp.ones((0, 16))}, ValueError, r"non-empty .* got shape \(0, 16\)"),
        ({"batch_dims": 2}, ValueError, r"batch_dims must be in \[0, 2\), got 2"),
        ({"amax": jnp.ones(())}, ValueError, r"amax must be float32 of shape \(1, 1\)"),
        ({"center": jnp.ones((2, 16))}, ValueError, r"center must be of shape \(1, 16\), got \(2, 16\)"),
        ({"x": jnp.ones((65536, 1, 16)), "batch_dims": 1}, NotImplementedError, "65535 sequences at most, got 65536"),
        ({"format": Format("OTHER", NVFP4.element, 32, NVFP4.scale)}, NotImplementedError, "not to OTHER"),
    ],
    ids=["dtype", "empty", "batch_dims", "amax", "center", "batch", "format"],
)
def test_errors_say_what_was_given(arguments, error, message):
    with pytest.raises(error, match=message):
        quantize_rows(**{"x": jnp.ones((2, 16)), "interpret": True, **arguments})


def device(platform, kind, capability=None):
    fake = mock.Mock(spec=jax.Device, platform=platform, device_kind=kind)
    if capability is not None:
        fake.compute_capability = capability
    return fake


def test_unsupported_reason_by_device():
    assert api.unsupported_reason(device("gpu", "NVIDIA H200", "9.0")) is None
    assert api.unsupported_reason(device("gpu", "NVIDIA B200", "10.0")) is None
    assert "NVIDIA A100 with 8.0" in api.unsupported_reason(device("gpu", "NVIDIA A100", "8.0"))
    assert "AMD MI300 (gpu)" in api.unsupported_reason(device("gpu", "AMD MI300", "gfx942"))
    assert "TPU v5e (tpu)" in api.unsupported_reason(device("tpu", "TPU v5e"))


def test_an_old_jax_is_named(monkeypatch):
    monkeypatch.setattr(compat, "CAN_INTERPRET", False)
    with pytest.raises(NotImplementedError, match=f"needs JAX 0.12.0 or newer, this is {jax.__version__}"):
        quantize_rows(jnp.ones((2, 16)), interpret=True)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the default device may be able to run the kernel")
def test_a_device_that_cannot_run_it_is_named_with_the_alternative():
    with pytest.raises(NotImplementedError, match=r'the device is cpu \(cpu\); use backend="xla"'):
        quantize_rows(jnp.ones((2, 16)))

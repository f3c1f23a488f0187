"""`dequant_matmul` against the emulated product, in the GPU interpreter and on a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp4jax import gemm
from fp4jax.numerics import MXFP4, NVFP4, NVFP4_VECTOR, quantize_blocks
from fp4jax.operands import Part
from fp4jax.recipes import as_recipe
from pallas_kernels import compat
from pallas_kernels.dequant_matmul import dequant_matmul, misfit, unsupported_reason


def quantized(shape, axes, seed, batch_dims=0, format=NVFP4):
    rng = np.random.default_rng([seed, *shape])
    x = jnp.asarray(rng.standard_normal(shape) * np.exp2(rng.uniform(-9, 2, (*shape[:-1], 1))), jnp.float32)
    return quantize_blocks(x, format, axes=axes, pack_axis=axes[0], batch_dims=batch_dims)


LAST, ROWS, SQUARE = (-1,), (-2,), (-2, -1)
# GEMM: the operands' logical shapes and blocks, the axes summed over, batch_dims. Sizes end inside of tiles and blocks;
# from 256 columns on tiles are twice as wide.
CASES = {
    "fprop": (((2, 72, 200), LAST), ((200, 256), ROWS), (LAST, ROWS), 0),
    "dgrad": (((128, 136), LAST), ((258, 136), LAST), (LAST, LAST), 0),
    "dgrad, square W": (((128, 168), LAST), ((132, 168), SQUARE), (LAST, LAST), 0),
    "wgrad": (((2, 88, 133), ROWS), ((2, 88, 256), ROWS), ((-3, -2), (-3, -2)), 0),
    "wgrad of experts": (((2, 96, 128), ROWS), ((2, 96, 131), ROWS), (ROWS, ROWS), 1),
}


def operands(case):
    left, right, contracted, batch_dims = CASES[case]
    pair = [quantized(*each, seed, batch_dims) for seed, each in enumerate((left, right))]
    return pair, contracted, batch_dims


def emulated(pair, contracted, batch_dims):
    """What `fp4jax.dot` computes of them, in float32."""
    how = gemm.Execution(jnp.dtype(jnp.float32))
    left, right = map(Part, pair)
    if contracted[0] == LAST:
        axis = contracted[1][-1]
        return gemm.contract_features(left, right, axis, batch_dims, how, None, None, jnp.dtype(jnp.float32))
    return gemm.contract_tokens(left, right, as_recipe("nvfp4"), pair[0].shape, batch_dims, how, None, None)


def sums_of_magnitudes(pair, contracted, batch_dims):
    absolute = [dataclasses.replace(q, codes=q.codes & jnp.uint8(0x77)) for q in pair]
    return np.asarray(emulated(absolute, contracted, batch_dims), np.float64)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case == "dgrad" else ()) for case in CASES]
)
def test_equals_the_emulated_product_up_to_the_order_of_additions(case, interpret):
    pair, contracted, batch_dims = operands(case)
    got = np.asarray(dequant_matmul(*pair, contracted, batch_dims, interpret=interpret))
    want = np.asarray(emulated(pair, contracted, batch_dims))
    magnitudes = sums_of_magnitudes(pair, contracted, batch_dims)
    depth = np.prod([pair[0].padded_shape[axis] for axis in contracted[0]])
    assert got.shape == want.shape and got.dtype == np.float32
    assert (np.abs(got.astype(np.float64) - want) <= 2 * depth * 2.0**-23 * magnitudes).all()
    assert np.abs(want).max() > 0


@pytest.mark.parametrize("case", ["fprop", "wgrad of experts"])
def test_is_exact_where_no_sum_is_rounded(case, interpret):
    """Block scales within three octaves, multiples of 2^-4: products are multiples of 2^-10."""
    pair, contracted, batch_dims = operands(case)
    rng = np.random.default_rng(1)
    pair = [
        dataclasses.replace(
            q,
            scales=jnp.asarray(rng.integers(0x30, 0x48, q.scales.shape), jnp.uint8),
            amax=jnp.full(q.amax.shape, q.format.range, jnp.float32),
        )
        for q in pair
    ]
    assert all(float(q.tensor_scale.max()) == 1 for q in pair)
    assert sums_of_magnitudes(pair, contracted, batch_dims).max() < 2**24 * 2.0**-10
    got = np.asarray(dequant_matmul(*pair, contracted, batch_dims, interpret=interpret))
    np.testing.assert_array_equal(got, np.asarray(emulated(pair, contracted, batch_dims)))


def test_every_code_under_every_scale(interpret):
    """Against the identity: a product is one element."""
    rows, depth = 128, 256
    row, block, column = np.arange(rows)[:, None], np.arange(depth // 16), np.arange(depth)
    codes, scales = (row + column) % 16, (row + 8 * block) % 127
    assert len(np.unique(codes + 16 * np.repeat(scales, 16, axis=1))) == 16 * 127
    lhs = dataclasses.replace(
        quantized((rows, depth), LAST, 0),
        codes=jnp.asarray(codes[:, ::2] | codes[:, 1::2] << 4, jnp.uint8),
        scales=jnp.asarray(scales, jnp.uint8),
        amax=jnp.full((1, 1), NVFP4.range, jnp.float32),
    )
    identity = quantize_blocks(jnp.eye(depth), NVFP4, axes=LAST, pack_axis=-1)
    got = np.asarray(dequant_matmul(lhs, identity, (LAST, LAST), interpret=interpret))
    np.testing.assert_array_equal(got, np.asarray(lhs.values()))


def test_a_block_that_is_not_finite_shows(interpret):
    (left, right), contracted, _ = operands("dgrad")
    left = dataclasses.replace(left, scales=left.scales.at[3, 5].set(0x7F))
    got = np.asarray(dequant_matmul(left, right, contracted, interpret=interpret))
    assert np.isnan(got[3]).all()
    assert np.isfinite(np.delete(got, 3, axis=0)).all()


REFUSED = {
    "format": (((128, 64), LAST), ((128, 64), LAST), (LAST, LAST), MXFP4, "MXFP4 is not E2M1 in blocks of 16"),
    "scale": (((128, 64), LAST), ((128, 64), LAST), (LAST, LAST), NVFP4_VECTOR, "no float32 scale that is one number"),
    "blocks": (((128, 64), ROWS), ((128, 64), LAST), (LAST, LAST), NVFP4, "blocks of NVFP4 run along another axis"),
    "axes": (((2, 128, 64), ROWS), ((2, 128, 64), ROWS), (ROWS, ROWS), NVFP4, "neither the last one nor all behind"),
    "rows": (((128, 64), LAST), ((127, 64), LAST), (LAST, LAST), NVFP4, "takes 128 rows or more, got 127"),
    "sizes": (((128, 64), LAST), ((128, 80), LAST), (LAST, LAST), NVFP4, "different contracted sizes, (64,) and (80,)"),
    "padding": (((128, 120), LAST), ((128, 128), LAST), (LAST, LAST), NVFP4, "different contracted sizes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_operands_are_refused(case):
    left, right, contracted, format, message = REFUSED[case]
    pair = [quantized(*each, seed, format=format) for seed, each in enumerate((left, right))]
    assert message in misfit(*pair, contracted)
    if compat.CAN_INTERPRET:
        with pytest.raises(ValueError, match="^dequant_matmul: "):
            dequant_matmul(*pair, contracted, interpret=True)


def test_one_scale_for_all_matrices_is_refused():
    left, right = (quantized((2, 128, 64), LAST, seed, batch_dims=seed) for seed in (0, 1))
    assert "no float32 scale that is one number a matrix" in misfit(left, right, (LAST, LAST), batch_dims=1)


def test_other_results_are_refused():
    pair = [quantized((128, 64), LAST, seed) for seed in (0, 1)]
    if compat.CAN_INTERPRET:
        with pytest.raises(ValueError, match="a result is of float32 or bfloat16, got float16"):
            dequant_matmul(*pair, (LAST, LAST), 0, jnp.float16, interpret=True)


def test_other_batches_are_refused():
    left, right = (quantized((batch, 128, 64), LAST, batch, batch_dims=1) for batch in (3, 1))
    assert misfit(left, right, (LAST, LAST), batch_dims=1) == "the operands have different batch sizes, (3,) and (1,)"


@pytest.mark.parametrize(
    "shape, message",
    [
        ((1, 128 * 65535 + 1, 16), "takes 8388480 rows at most, got 8388481"),
        ((65536, 128, 16), "takes 65535 products at most, got 65536"),
        ((65535, 128, 16), None),
    ],
    ids=str,
)
def test_the_limit_that_is_exceeded_is_named(shape, message):
    quantize = functools.partial(quantize_blocks, format=NVFP4, axes=LAST, pack_axis=-1, batch_dims=1)
    big = jax.eval_shape(quantize, jax.ShapeDtypeStruct(shape, jnp.float32))
    reason = misfit(big, big, (LAST, LAST), batch_dims=1)
    assert reason is None if message is None else message in reason


@dataclasses.dataclass
class Device:
    platform: str = "gpu"
    device_kind: str = "some device"
    compute_capability: str = "9.0"


def test_devices_that_are_served():
    assert unsupported_reason(Device()) is None
    for other in (Device(compute_capability="10.0"), Device(compute_capability="8.9"), Device("cpu")):
        assert "some device" in unsupported_reason(other)
        (left, right), contracted, _ = operands("dgrad")
        with pytest.raises(NotImplementedError, match="multiply the dequantized operands instead"):
            dequant_matmul(left, right, contracted, device=other)

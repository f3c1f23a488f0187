"""What the kernels compute, in plain JAX with the kernels' own arguments: for machines of several devices without GPUs.

The GPU interpreter is not allowed in the program of one device among several, so tests of how arrays are cut put these
in the place of `local`'s functions; that the kernels equal them, where a shard begins included, is a test of its own.
"""

import jax.numpy as jnp
from jax import lax

from fp4jax.numerics import NVFP4, hadamard, rounding
from fp4jax.numerics.blocks import blocked_shape, pad_to_blocks
from fp4jax.numerics.column_stats import tree_sum
from fp4jax.numerics.hadamard import SIGNS
from fp4jax.numerics.scales import largest_magnitude
from pallas_kernels.column_stats import kernel
from pallas_kernels.column_stats import local as stats_local
from pallas_kernels.column_sums import local as sums_local
from pallas_kernels.dequant_matmul import kernel as products
from pallas_kernels.quantize import elements, local


def install(monkeypatch) -> None:
    """Puts the functions below in the place of the kernels."""
    for module, function in (
        (local, quantize_rows),
        (local, quantize_columns),
        (local, quantize_2d),
        (local, quantize_copies),
        (local, hadamard_amax),
        (sums_local, column_sums),
        (stats_local.kernel, partial_stats),
        (products, fp4jax_dequant_matmul),
    ):
        monkeypatch.setattr(module, function.__name__, function)


def quantize_rows(x, factors, center=(), hashes=(), start=(), *, interpret):
    del interpret
    return _quantized(_centered(x, center), factors, hashes, start, -1)


def quantize_columns(x, factors, center=(), hashes=(), start=(), *, hadamard, interpret):
    del interpret
    x = _transformed(x, center) if hadamard else _centered(x, center)
    return _quantized(x, factors, hashes, start, -2)


def quantize_2d(x, factors, hashes=(), start=(), *, interpret):
    del interpret
    x = pad_to_blocks(x.astype(jnp.float32), (-2, -1), NVFP4.block)
    blocks = x.reshape(blocked_shape(x.shape, (-2, -1), NVFP4.block))
    scales, multipliers = elements.block_scale(jnp.max(jnp.abs(blocks), axis=(-3, -1)), _by_matrix(factors))
    scaled = (blocks * jnp.expand_dims(multipliers, (-3, -1))).reshape(x.shape)
    return _packed(scaled, hashes, start, -2), scales


def quantize_copies(x, factors, center=(), row_hashes=(), column_hashes=(), start=(), *, hadamard, sums, interpret):
    along = quantize_rows(x, factors[0], center, row_hashes, start, interpret=interpret)
    down = quantize_columns(x, factors[1], center, column_hashes, start, hadamard=hadamard, interpret=interpret)
    batch_dims = sum(size > 1 for size in factors[0].shape[:-1])
    totals = [column_sums(*down, batch_dims=batch_dims, interpret=interpret)] if sums else []
    return *along, *down, *totals


def hadamard_amax(x, center=(), *, batch_dims, interpret):
    del interpret
    return largest_magnitude(_transformed(x, center), tuple(range(batch_dims, x.ndim)))


def column_sums(codes, scales, *, batch_dims, interpret):
    del interpret
    values = rounding.decode(rounding.unpack(codes, -2), NVFP4.element)
    values = values * jnp.repeat(rounding.decode_scale(scales, NVFP4.scale), NVFP4.block, axis=-2)
    return jnp.sum(values, axis=tuple(range(batch_dims, values.ndim - 1)), keepdims=True)


def partial_stats(x, *, vector, levels, interpret):
    del vector, interpret
    x = x.astype(jnp.float32)
    batch, rows, columns = x.shape
    stretch = kernel.ROWS << levels
    padded = [(0, 0), (0, -rows % stretch), (0, 0)]
    zeros, edges = jnp.pad(x, padded), jnp.pad(x, padded, mode="edge")
    zeros, edges = (each.reshape(batch, -1, stretch, columns) for each in (zeros, edges))
    return tree_sum(zeros), jnp.min(edges, axis=2), jnp.max(edges, axis=2)


def fp4jax_dequant_matmul(scale, lhs, rhs, *, lhs_columns, rhs_columns, dtype, interpret):
    del interpret
    left, right = (_decoded(*of, columns) for of, columns in ((lhs, lhs_columns), (rhs, rhs_columns)))
    result = jnp.einsum("bmk,bnk->bmn", left, right, precision=lax.Precision.HIGHEST)
    return (result * scale[:, None, None]).astype(dtype)


def _decoded(codes, scales, columns):
    """Element × block scale, [batch, rows, contraction]."""
    if not columns:  # four blocks a word
        scales = lax.bitcast_convert_type(scales, jnp.uint8).reshape(*scales.shape[:2], -1)
    axis = -2 if columns else -1
    values = rounding.decode(rounding.unpack(codes, axis), NVFP4.element)
    values = values * jnp.repeat(rounding.decode_scale(scales, NVFP4.scale), NVFP4.block, axis=axis)
    return jnp.swapaxes(values, -1, -2) if columns else values


def _centered(x, center):
    x = x.astype(jnp.float32)
    return x - center[0] if center else x


def _transformed(x, center):
    x = pad_to_blocks(_centered(x, center), (-2,), NVFP4.block)
    shape = (*[1] * (x.ndim - 2), NVFP4.block, 1)
    negative = jnp.uint32(sum(1 << i for i, sign in enumerate(SIGNS) if sign < 0))
    is_negative = negative >> lax.broadcasted_iota(jnp.uint32, shape, x.ndim - 2) & 1 == 1
    # The fixed signs, computed: the function of a partition holds no constants.
    return hadamard(x, -2, signs=jnp.where(is_negative, jnp.float32(-1), jnp.float32(1)))


def _quantized(x, factors, hashes, start, axis):
    x = pad_to_blocks(x, (axis,), NVFP4.block)
    at = axis % x.ndim
    blocks = x.reshape(*x.shape[:at], -1, NVFP4.block, *x.shape[at + 1 :])
    scales, multipliers = elements.block_scale(jnp.max(jnp.abs(blocks), axis=at + 1), _by_matrix(factors))
    scaled = (blocks * jnp.expand_dims(multipliers, at + 1)).reshape(x.shape)
    return _packed(scaled, hashes, start, axis), scales


def _by_matrix(factors):
    return [factors[..., i] for i in range(elements.FACTORS)]


def _packed(scaled, hashes, start, axis):
    if not hashes:
        return rounding.pack(rounding.encode_nearest(scaled, NVFP4.element), axis)
    column = lax.broadcasted_iota(jnp.uint32, scaled.shape, scaled.ndim - 1)
    if start:
        column = column + start[0][0]
    a, b = (h[..., None] for h in hashes)
    if axis == -2:  # hashes of the padding are never used: zero is rounded to zero
        a, b = (jnp.pad(h, [*[(0, 0)] * (h.ndim - 2), (0, scaled.shape[-2] - h.shape[-2]), (0, 0)]) for h in (a, b))
    even, odd = elements.halves(elements.pair_hash(a, b, column >> 1))
    draws = jnp.where(column & 1 == 1, odd, even)
    return rounding.pack(rounding.encode_stochastic(scaled, NVFP4.element, draws), axis)

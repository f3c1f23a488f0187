"""Four-over-six: for every block the scale, out of several, under which it is quantized best.

E2M1 has no value between 4 and 6, so a block whose values lie near 5/6 of its largest magnitude is better served by a
scale that makes that magnitude 4 (arXiv 2512.02010). With S_enc = 6 × 256 / amax and a block's base scale
(max|x_b| / 6) S_enc, the candidate k rounds base × (6 / k) to E4M3, quantizes to nearest, and sums the squared errors
in units of x: along a row of the block from its first element to its last, then over rows in halves. These are the
order and the operations of TransformerEngine's reference, whose choice is reproduced bit for bit (its base scale
divides by 6, unlike that of plain NVFP4).
"""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32

from fp4jax.numerics import rounding
from fp4jax.numerics.blocks import inner_axes
from fp4jax.numerics.formats import Format
from fp4jax.numerics.scales import element_multiplier, largest_magnitude


def best_scales(
    blocks: Float32[Array, "..."],
    amax: Float32[Array, "..."],
    encode: Float32[Array, "..."],
    format: Format,
    axes: tuple[int, ...],
    row_axis: int,
    candidates: tuple[float, ...],
):
    """Scale byte and element multiplier of every block under its best candidate, the first of equals.

    Args:
      blocks: the array in its blocked shape.
      amax, encode: statistic and S_enc of the float32 scale, shaped to meet the blocks.
      axes, row_axis: the blocked axes of the array, and the one along which rows of a square block run.
      candidates: what a block's largest magnitude becomes in units of its scale.
    """
    rank = blocks.ndim - len(axes)
    inner = inner_axes(rank, axes)
    row = dict(zip(sorted(axis % rank for axis in axes), inner, strict=True))[row_axis % rank]
    base = _divide(largest_magnitude(blocks, inner), format.element_peak) * encode
    best = None
    for target in candidates:
        scale = jnp.minimum(base * jnp.float32(format.element_peak / target), format.scale.max)
        byte = rounding.encode_scale(scale, format.scale)
        decoded = rounding.decode_scale(byte, format.scale)
        inverse = element_multiplier(decoded, encode)
        codes = rounding.encode_nearest(blocks * inverse, format.element)
        values = _divide(rounding.decode(codes, format.element) * decoded * amax, format.range)
        error = _block_error(values - blocks, row, tuple(axis for axis in inner if axis != row))
        if best is None:
            best = (error, byte, inverse)
        else:
            better = error < best[0]
            best = tuple(jnp.where(better, new, old) for new, old in zip((error, byte, inverse), best, strict=True))
    return best[1:]


def _divide(x, divisor: float):
    """x / divisor in IEEE arithmetic: a constant or broadcast divisor would become a multiplication by 1 / divisor."""
    return x / jnp.where(jnp.isnan(x), jnp.float32(1), jnp.float32(divisor))


def _block_error(difference, row: int, others: tuple[int, ...]):
    """Sum of squares in each block.

    The barrier keeps a product and the addition behind it two operations, and the program small: without it the whole
    quantization is compiled once for each of the 16 slices.
    """
    squares = lax.optimization_barrier(difference * difference)
    elements = [lax.slice_in_dim(squares, i, i + 1, axis=row) for i in range(squares.shape[row])]
    total = functools.reduce(jnp.add, elements)
    for axis in others:
        while total.shape[axis] > 1:
            half = total.shape[axis] // 2
            total = lax.slice_in_dim(total, 0, half, axis=axis) + lax.slice_in_dim(total, half, 2 * half, axis=axis)
    return total

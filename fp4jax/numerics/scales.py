"""The scales of a quantized matrix: one in float32 for much of it, one in few bits for each block."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32

from fp4jax.numerics import rounding
from fp4jax.numerics.formats import Extent, Format, ScaleRounding, Statistic

FLT_MAX = np.finfo(np.float32).max


def largest_magnitude(
    x: Float32[Array, "*shape"], axes: tuple[int, ...], keepdims: bool = True
) -> Float32[Array, "..."]:
    """max|x| over `axes`; NaN if there is one.

    The maximum of the bit patterns, which are ordered like magnitudes, with NaN above infinity: XLA:CPU drops NaN from
    a maximum of floats over an axis that is not the last.
    """
    bits = jnp.max(lax.bitcast_convert_type(jnp.abs(x), jnp.int32), axis=axes, keepdims=keepdims)
    return lax.bitcast_convert_type(bits, jnp.float32)


def outer_statistic(
    x: Float32[Array, "*shape"],
    format: Format,
    axis: int,
    batch_dims: int,
    block_amax: Float32[Array, "..."] | None = None,
) -> Float32[Array, "..."]:
    """What the float32 scale follows, for every extent that has one of its own; reduced axes keep size 1.

    Args:
      x: in whole blocks.
      axis: the contraction axis, negative.
      block_amax: the blocks' largest magnitudes, in the blocked shape: the largest of a matrix is the largest of
        these, which saves a read of x.
    """
    if block_amax is not None and format.outer is Extent.MATRIX and format.statistic is Statistic.MAX:
        largest = largest_magnitude(block_amax, tuple(range(batch_dims, block_amax.ndim)))
        return largest.reshape(*x.shape[:batch_dims], *[1] * (x.ndim - batch_dims))
    magnitude = jnp.abs(x)
    if format.outer is Extent.MATRIX:
        axes = tuple(range(batch_dims, x.ndim))
    elif format.outer is Extent.VECTOR:
        axes = (axis % x.ndim,)
    else:
        at = axis % x.ndim
        magnitude = magnitude.reshape(*x.shape[:at], -1, format.outer, *x.shape[at + 1 :])
        return largest_magnitude(magnitude, (at + 1,), keepdims=False)
    if format.statistic is Statistic.MAX:
        return largest_magnitude(magnitude, axes)
    total = jnp.sum(magnitude, axis=axes, keepdims=True)
    count = np.float32(np.prod([x.shape[a] for a in axes]))
    return total / jnp.where(total > 0, count, np.float32(1))  # a constant divisor would become a multiplication


def encode_factor(amax: Float32[Array, "..."], format: Format) -> Float32[Array, "..."]:
    """S_enc: what the largest magnitude is multiplied by to become element peak × largest scale."""
    factor = jnp.minimum(format.range / amax, FLT_MAX)
    return jnp.where((amax == 0) | (factor == 0), 1.0, factor)


def block_scales(
    block_amax: Float32[Array, "..."],
    encode: Float32[Array, "..."] | None,
    format: Format,
    scale_rounding: ScaleRounding,
):
    """Scale byte and element multiplier of every block.

    Args:
      block_amax: the block's largest magnitude.
      encode: S_enc of the matrix; None where the format has no float32 scale.
    """
    if format.scale.mantissa_bits == 0:
        scaled = block_amax if encode is None else block_amax * encode
        byte = rounding.encode_power_of_two(scaled, format.element, format.scale, scale_rounding)
    else:
        factor = format.inverse_peak if encode is None else encode * format.inverse_peak
        byte = rounding.encode_scale(jnp.minimum(block_amax * factor, format.largest_scale), format.scale)
    return byte, element_multiplier(rounding.decode_scale(byte, format.scale), encode)


def element_multiplier(scale: Float32[Array, "..."], encode: Float32[Array, "..."] | None) -> Float32[Array, "..."]:
    """e_b: what a block's elements are multiplied by."""
    return jnp.minimum(1.0 / (scale if encode is None else scale * (1.0 / encode)), FLT_MAX)

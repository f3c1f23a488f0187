"""Rounding float32 to small floating-point types by arithmetic, and packing 4-bit codes.

Everything is additions, minima and bit operations on float32: no table, no narrow dtype cast. XLA may remove a
float32 → narrow → float32 round trip as excess precision, and its own casts turn NaN into zero; arithmetic is left
alone.

Adding 2^23 to a small float32 rounds it to an integer, ties to even, and leaves that integer in the low mantissa bits;
adding 2^7 leaves it with 16 fraction bits. Both are exact under contraction to a fused multiply-add, because the slopes
are powers of two.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, UInt8, UInt32

from fp4jax.numerics import formats

TO_INTEGER = 2.0**23
TO_FIXED_POINT = 2.0**7
_FLOAT32_BIAS = 127
_FLOAT32_MANTISSA_BITS = 23
_FEW_PIECES = 3  # beyond so many octaves, bit operations are cheaper than a minimum of lines


def _bits(x: Float32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    return lax.bitcast_convert_type(x, jnp.uint32)


def code_position(
    magnitude: Float32[Array, "*shape"], element: formats.Float, magic: float
) -> Float32[Array, "*shape"]:
    """Position of `magnitude` among the codes of `element` plus `magic`, rounded to the last mantissa bit that is left.

    Saturates at the largest code. With `TO_INTEGER` the low bits of the result are the nearest code, with
    `TO_FIXED_POINT` they are the position in fixed point, 16 fraction bits.
    """
    pieces = [magnitude * slope + (offset + magic) for slope, offset in element.code_pieces]
    return jnp.minimum(functools.reduce(jnp.minimum, pieces), magic + len(element.magnitudes) - 1)


def encode_nearest(x: Float32[Array, "*shape"], element: formats.Float) -> UInt32[Array, "*shape"]:
    """Code of the nearest value of `element`, ties to even, saturating; the sign is the bit above the magnitude.

    Source: OCP Microscaling v1.0, section 5.3; .25 → 0, .75 → 1, 1.25 → 1, 1.75 → 2, 2.5 → 2, 3.5 → 4, 5 → 4 for E2M1.
    """
    if len(element.code_pieces) > _FEW_PIECES:
        return _with_sign(_nearest_code(jnp.minimum(jnp.abs(x), element.max), element), x, element)
    return _with_sign(_bits(code_position(jnp.abs(x), element, TO_INTEGER)), x, element)


def encode_stochastic(
    x: Float32[Array, "*shape"], element: formats.Float, draw: UInt32[Array, "*shape"]
) -> UInt32[Array, "*shape"]:
    """Code of one of the two neighbours, the upper one for `p` of 2^16 draws, p/2^16 being x's position between them.

    Args:
      x: values; beyond the largest they saturate.
      draw: 16 uniform random bits for every element.

    The position is rounded to 16 fraction bits; over all 65,536 draws its mean is exact.
    """
    fixed = _bits(code_position(jnp.abs(x), element, TO_FIXED_POINT))
    return _with_sign((fixed + draw) >> 16, x, element)


def _with_sign(code, x, element: formats.Float):
    return (code & jnp.uint32((1 << element.width) - 1)) | (_bits(x) >> 31 << element.width)


def decode(code: UInt32[Array, "*shape"], element: formats.Float) -> Float32[Array, "*shape"]:
    """Values of codes (sign above magnitude), float32.

    The magnitude is convex and piecewise linear in the code: the maximum of the inverted pieces.
    """
    magnitude = code & jnp.uint32((1 << element.width) - 1)
    if len(element.magnitudes) == 1:
        value = jnp.full(code.shape, element.magnitudes[0], jnp.float32)
    elif len(element.code_pieces) > _FEW_PIECES:
        value = _decode_magnitude(magnitude, element)
    else:
        position = magnitude.astype(jnp.int32).astype(jnp.float32)
        pieces = [position * (1 / slope) + (-offset / slope) for slope, offset in element.code_pieces]
        value = functools.reduce(jnp.maximum, pieces)
    return lax.bitcast_convert_type(_bits(value) | (code >> element.width) << 31, jnp.float32)


def encode_scale(x: Float32[Array, "*shape"], scale: formats.Float) -> UInt8[Array, "*shape"]:
    """Byte of the nearest value of `scale`, ties to even, for 0 <= x <= scale.max; NaN keeps NaN's byte."""
    return jnp.where(jnp.isnan(x), _nan(scale), _nearest_code(x, scale)).astype(jnp.uint8)


def encode_scale_stochastic(
    x: Float32[Array, "*shape"], scale: formats.Float, draw: UInt32[Array, "*shape"]
) -> UInt8[Array, "*shape"]:
    """Byte of one of x's two neighbours in `scale`, so that the mean over draws is x; NaN keeps NaN's byte."""
    return jnp.where(jnp.isnan(x), _nan(scale), encode_stochastic(x, scale, draw)).astype(jnp.uint8)


def encode_power_of_two(
    amax: Float32[Array, "*shape"], element: formats.Float, scale: formats.Float, rounding: formats.ScaleRounding
) -> UInt8[Array, "*shape"]:
    """Byte of a block's power-of-two scale from its largest magnitude; infinities and NaN give NaN's byte.

    DOWN is OCP Microscaling v1.0, section 6.3: 2^(floor(log2 amax) - emax). UP is the smallest power of two under which
    amax / scale does not exceed the largest element.
    """
    if rounding is formats.ScaleRounding.UP:
        quotient = _bits(amax * jnp.float32(1 / element.max))
        exponent = (quotient >> _FLOAT32_MANTISSA_BITS) + ((quotient << 9) != 0).astype(jnp.uint32)
        offset = 0
    else:
        exponent = _bits(amax) >> _FLOAT32_MANTISSA_BITS
        offset = element.max_exponent
    shift = jnp.int32(_FLOAT32_BIAS + offset - scale.bias)
    code = jnp.maximum(exponent.astype(jnp.int32) - shift, 0).astype(jnp.uint32)
    return jnp.where(jnp.isfinite(amax), jnp.minimum(code, _nan(scale) - 1), _nan(scale)).astype(jnp.uint8)


def decode_scale(code: UInt8[Array, "*shape"], scale: formats.Float) -> Float32[Array, "*shape"]:
    """Values of scale bytes, float32. E8M0's lowest, 2^-127, is a denormal that XLA flushes: it is taken as zero."""
    code = code.astype(jnp.uint32)
    return jnp.where(code == _nan(scale), jnp.nan, _decode_magnitude(code, scale))


def _nan(scale: formats.Float):
    return jnp.uint32((1 << scale.width) - 1)


def _nearest_code(x, element: formats.Float):
    """Code of the nearest value for 0 <= x <= element.max.

    Normal numbers are rounded on their bits, subnormals by adding the power of two whose last place is their spacing.
    """
    drop = _FLOAT32_MANTISSA_BITS - element.mantissa_bits
    bits = _bits(x)
    half_to_even = (bits >> drop & 1) + jnp.uint32((1 << (drop - 1)) - 1)
    normal = (bits + half_to_even >> drop) - jnp.uint32((_FLOAT32_BIAS - element.bias) << element.mantissa_bits)
    subnormal = _bits(x + element.ulp_of_subnormals * TO_INTEGER) & jnp.uint32(0xFF)
    return jnp.where(x < 2.0**element.min_exponent, subnormal, normal)


def _decode_magnitude(code, element: formats.Float):
    shift = _FLOAT32_MANTISSA_BITS - element.mantissa_bits
    normal = lax.bitcast_convert_type(
        (code << shift) + jnp.uint32((_FLOAT32_BIAS - element.bias) << _FLOAT32_MANTISSA_BITS), jnp.float32
    )
    if not element.has_zero:
        return normal
    subnormal = code.astype(jnp.int32).astype(jnp.float32) * element.ulp_of_subnormals
    return jnp.where(code < (1 << element.mantissa_bits), subnormal, normal)


def pack(codes: UInt32[Array, "*shape"], axis: int) -> UInt8[Array, "*packed"]:
    """Two 4-bit codes a byte along `axis`: the even index in the low nibble, the odd one in the high nibble."""
    axis %= codes.ndim
    pairs = codes.reshape(*codes.shape[:axis], codes.shape[axis] // 2, 2, *codes.shape[axis + 1 :])
    low = lax.index_in_dim(pairs, 0, axis + 1, keepdims=False)
    high = lax.index_in_dim(pairs, 1, axis + 1, keepdims=False)
    return (low | high << 4).astype(jnp.uint8)


def unpack(packed: UInt8[Array, "*packed"], axis: int) -> UInt32[Array, "*shape"]:
    """Inverse of `pack`."""
    axis %= packed.ndim
    byte = packed.astype(jnp.uint32)
    pairs = jnp.stack([byte & 15, byte >> 4], axis=axis + 1)
    return pairs.reshape(*packed.shape[:axis], packed.shape[axis] * 2, *packed.shape[axis + 1 :])

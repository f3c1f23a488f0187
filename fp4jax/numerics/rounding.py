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

_TO_INTEGER = 2.0**23
_TO_FIXED_POINT = 2.0**7
_FIXED_POINT_ONE = 1 << 16


def _bits(x: Float32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    return lax.bitcast_convert_type(x, jnp.uint32)


def _code_position(magnitude, element: formats.Float, magic: float):
    """Position of `magnitude` among the codes plus `magic`, rounded to the last mantissa bit that `magic` leaves."""
    pieces = [magnitude * slope + (offset + magic) for slope, offset in element.code_pieces]
    return jnp.minimum(functools.reduce(jnp.minimum, pieces), magic + len(element.magnitudes) - 1)


def encode_nearest(x: Float32[Array, "*shape"], element: formats.Float) -> UInt32[Array, "*shape"]:
    """Code of the nearest value of `element`, ties to even, saturating; the sign is the bit above the magnitude.

    Source: OCP Microscaling v1.0, section 5.3; .25 → 0, .75 → 1, 1.25 → 1, 1.75 → 2, 2.5 → 2, 3.5 → 4, 5 → 4 for E2M1.
    """
    return _with_sign(_bits(_code_position(jnp.abs(x), element, _TO_INTEGER)), x, element)


def encode_stochastic(
    x: Float32[Array, "*shape"], element: formats.Float, draw: UInt32[Array, "*shape"]
) -> UInt32[Array, "*shape"]:
    """Code of one of the two neighbours, the upper one for `p` of 2^16 draws, p/2^16 being x's position between them.

    Args:
      x: values; beyond the largest they saturate.
      draw: 16 uniform random bits for every element.

    The position is rounded to 16 fraction bits; over all 65,536 draws its mean is exact.
    """
    fixed = _bits(_code_position(jnp.abs(x), element, _TO_FIXED_POINT))
    return _with_sign((fixed + draw) >> 16, x, element)


def _with_sign(code, x, element: formats.Float):
    width = element.exponent_bits + element.mantissa_bits
    return (code & jnp.uint32((1 << width) - 1)) | (_bits(x) >> 31 << width)


def decode(code: UInt32[Array, "*shape"], element: formats.Float) -> Float32[Array, "*shape"]:
    """Values of codes (sign above magnitude), float32.

    The magnitude is convex and piecewise linear in the code: the maximum of the inverted pieces.
    """
    width = element.exponent_bits + element.mantissa_bits
    position = (code & jnp.uint32((1 << width) - 1)).astype(jnp.int32).astype(jnp.float32)
    pieces = [position * (1 / slope) + (-offset / slope) for slope, offset in element.code_pieces]
    sign = (code >> width) << 31
    return lax.bitcast_convert_type(_bits(functools.reduce(jnp.maximum, pieces)) | sign, jnp.float32)


def encode_scale(x: Float32[Array, "*shape"], scale: formats.Float) -> UInt8[Array, "*shape"]:
    """Byte of the nearest value of `scale`, ties to even, for 0 <= x <= scale.max; NaN keeps NaN's byte.

    Normal numbers are rounded on their bits, subnormals by adding the power of two whose last place is their spacing.
    """
    drop = 23 - scale.mantissa_bits
    bits = _bits(x)
    half_to_even = (bits >> drop & 1) + jnp.uint32((1 << (drop - 1)) - 1)
    normal = (bits + half_to_even >> drop) - jnp.uint32((127 - scale.bias) << scale.mantissa_bits)
    subnormal = _bits(x + scale.ulp_of_subnormals * _TO_INTEGER) & jnp.uint32(0xFF)
    code = jnp.where(x < 2.0**scale.min_exponent, subnormal, normal)
    nan = jnp.uint32((1 << (scale.exponent_bits + scale.mantissa_bits)) - 1)
    return jnp.where(jnp.isnan(x), nan, code).astype(jnp.uint8)


def decode_scale(code: UInt8[Array, "*shape"], scale: formats.Float) -> Float32[Array, "*shape"]:
    """Values of non-negative scale bytes, float32."""
    code = code.astype(jnp.uint32)
    shift = 23 - scale.mantissa_bits
    normal = lax.bitcast_convert_type((code << shift) + jnp.uint32((127 - scale.bias) << 23), jnp.float32)
    subnormal = code.astype(jnp.int32).astype(jnp.float32) * scale.ulp_of_subnormals
    nan = (1 << (scale.exponent_bits + scale.mantissa_bits)) - 1
    value = jnp.where(code < (1 << scale.mantissa_bits), subnormal, normal)
    return jnp.where(code == nan, jnp.nan, value)


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

"""What the row-wise and the column-wise kernel share: from float32 values in registers to codes and scale bytes.

The element multiplier e_b = min(1 / (s_b * (1/S_enc)), FLT_MAX) needs a correctly rounded division, and a GPU kernel
has only `rcp.approx`. A Newton step would repair it only where the compiler contracts 1 - d*r into a fused
multiply-add, and would spoil exact quotients where it does not (the interpreter). But s_b has three mantissa bits,
s_b = t 2^-k with t one of the eight scales of the top octave, and multiplying by a power of two commutes with rounding.
So XLA computes the eight reciprocals 1 / (t * (1/S_enc)) of a matrix in IEEE arithmetic and the kernel picks one and
multiplies it by 2^k: no approximate instruction is left. (It is exact while s_b/S_enc is a normal number, that is for
blocks with a largest magnitude above 2e-37, near where XLA:CPU and GPUs differ about subnormals anyway.)

Codes are packed without masking each: the bits of 2^23 + code are summed with powers of 16, and what the exponents
contribute is a constant that is taken off at the end. An infinity becomes the largest code. A NaN smears over its word,
to which PTX gives the bits 0x7FFFFFFF: over codes of its own block, whose scale is NaN too. Whoever puts codes of other
blocks into the same word masks them first.
"""

import functools
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, UInt32

from fp4jax.numerics import NVFP4, bits, rounding
from fp4jax.numerics.scales import encode_factor

ELEMENT = NVFP4.element
_FLT_MAX = np.finfo(np.float32).max
_MANTISSA_BITS = 23
_EXPONENT = 0xFF << _MANTISSA_BITS
_POSITION_ZERO = int(np.float32(rounding.TO_INTEGER).view(np.uint32))  # `_position` of code 0
_WEYL = 0x9E3779B9  # of `fp4jax.numerics.bits`, where the draws are specified
_SCALE_MANTISSA_BITS = NVFP4.scale.mantissa_bits
_TOP_EXPONENT = math.frexp(NVFP4.scale.max)[1] - 1
_MANTISSAS = 2**_SCALE_MANTISSA_BITS
# The scales of the top octave, one for each mantissa (the last, NaN in E4M3, stands for its mantissa in other octaves).
_TOP_SCALES = np.float32(2.0**_TOP_EXPONENT) * (1 + np.arange(_MANTISSAS, dtype=np.float32) / _MANTISSAS)
FACTORS = 1 + _MANTISSAS
"""Numbers of a matrix that `block_scale` takes."""


def factors(amax: Float32[Array, "*shape"]) -> Float32[Array, "*shape {FACTORS}"]:
    """Outside the kernel: what gives a block's scale, then the element multiplier for each scale of the top octave."""
    encode = encode_factor(amax.reshape(-1), NVFP4)[:, None]
    inverses = 1.0 / (jnp.asarray(_TOP_SCALES)[None, :] * (1.0 / encode))
    return jnp.concatenate([encode * NVFP4.inverse_peak, inverses], axis=1).reshape(*amax.shape, FACTORS)


def block_scale(block_amax: Float32[Array, "..."], factors: Sequence[Float32[Array, ""]]):
    """Bits of the block scale as float8_e4m3fn and multiplier of the elements: `numerics.scales.block_scales`."""
    encode, *reciprocals = factors
    scale = jnp.minimum(block_amax * encode, NVFP4.scale.max).astype(jnp.float8_e4m3fn)
    word = lax.bitcast_convert_type(scale.astype(jnp.float32), jnp.uint32)
    for i in range(_SCALE_MANTISSA_BITS):
        bit = (word & jnp.uint32(1 << (_MANTISSA_BITS - _SCALE_MANTISSA_BITS + i))) != 0
        pairs = zip(reciprocals[::2], reciprocals[1::2], strict=True)
        reciprocals = [jnp.where(bit, odd, even) for even, odd in pairs]
    exponent = word & jnp.uint32(_EXPONENT)
    # 2^k, and infinity for the scale 0, whose multiplier is FLT_MAX.
    top = jnp.uint32(2 * 127 + _TOP_EXPONENT << _MANTISSA_BITS)
    power = jnp.where(exponent == 0, jnp.uint32(_EXPONENT), top - exponent)
    multiplier = jnp.minimum(reciprocals[0] * lax.bitcast_convert_type(power, jnp.float32), _FLT_MAX)
    return lax.bitcast_convert_type(scale, jnp.uint8), multiplier


def pack(values: Sequence[Float32[Array, "..."]], draws: Sequence[UInt32[Array, "..."]] | None) -> UInt32[Array, "..."]:
    """Codes of up to 8 scaled values in one word, the first in the lowest 4 bits; stochastic where draws are given."""
    if draws is not None:
        codes = (_stochastic_code(v, d) << 4 * i for i, (v, d) in enumerate(zip(values, draws, strict=True)))
        return functools.reduce(jnp.bitwise_or, codes)
    word = functools.reduce(lambda high, low: high * jnp.uint32(16) + low, [_position(v) for v in reversed(values)])
    word = word - jnp.uint32(sum(_POSITION_ZERO << 4 * i for i in range(len(values))) % 2**32)
    return functools.reduce(jnp.bitwise_or, [_sign(v, i) for i, v in enumerate(values)], word)


def row_hashes(words: UInt32[Array, "2"], batch: int, rows: int) -> tuple[UInt32[Array, "batch rows"], ...]:
    """Outside the kernel: what `bits.draws` computes for each row of each matrix before it looks at the column."""
    first, second = (word[:, None] for word in bits.fold_parts(words, lax.iota(jnp.uint32, batch)))
    a = bits.mix(lax.iota(jnp.uint32, rows)[None, :] ^ first)
    return a, bits.mix(a + second)


def pair_hash(a: UInt32[Array, "..."], b: UInt32[Array, "..."], pair: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The hash of two neighbouring columns, of which each takes 16 bits; `pair` is half their column."""
    return bits.mix(a + pair * jnp.uint32(_WEYL) ^ b)


def halves(h: UInt32[Array, "..."]) -> list[UInt32[Array, "..."]]:
    """Draws of the even and of the odd column from their hash."""
    return [h & jnp.uint32(0xFFFF), h >> 16]


def bfloat16_pair(word: UInt32[Array, "..."]) -> list[Float32[Array, "..."]]:
    """Float32 values of the two bfloat16 in a word: the even column in its low half, the odd one in its high half."""
    return [lax.bitcast_convert_type(half, jnp.float32) for half in (word << 16, word & jnp.uint32(0xFFFF0000))]


def _position(value):
    """Bits of 2^23 + code of the magnitude."""
    return lax.bitcast_convert_type(rounding.code_position(jnp.abs(value), ELEMENT, rounding.TO_INTEGER), jnp.uint32)


def _stochastic_code(value, draw):
    fixed = rounding.code_position(jnp.abs(value), ELEMENT, rounding.TO_FIXED_POINT)
    return (lax.bitcast_convert_type(fixed, jnp.uint32) + draw) >> 16 & jnp.uint32(7) | _sign(value, 0)


def _sign(value, position: int):
    """The sign bit, moved to the place it has in the code at `position`."""
    word = lax.bitcast_convert_type(value, jnp.uint32)
    return word >> (28 - 4 * position) & jnp.uint32(8 << 4 * position)

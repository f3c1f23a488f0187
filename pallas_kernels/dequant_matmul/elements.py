"""E2M1 codes, two a byte, to the float16 values they stand for: the instructions that the kernel spends its time on.

The bits of a code moved by 9 are those of a float16, the element times 2^-14, its subnormal included. Four bytes lie in
a register, and what leaves it are pairs of float16 that are neighbours: so bytes are spread to the upper halves of 16
bits, two in a register, and the rest is done to both at once. Pallas has no words for that, where an array keeps its
shape as its dtype changes: `halves` is written in terms of registers, the same for those that are compiled and for the
integers of a test. The GPU interpreter runs `interpreted`, a byte at a time, which takes the hardware half as many
instructions again.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith
from jaxtyping import Array, Float16, UInt8

Pair = tuple[Float16[Array, "..."], Float16[Array, "..."]]
"""Elements × 2^-14 of the low and of the high code of each byte."""

_SPREAD = (0x1404, 0x3424)  # selectors of `prmt`: bytes 0 and 1, bytes 2 and 3, each above a byte of zeros
_SIGNS, _MAGNITUDES = 0x80008000, 0x0E000E00


def decoded(codes: UInt8[Array, "..."], layout, *, interpret: bool) -> Pair:
    """Of codes in `layout`, four bytes or a multiple in a lane's vectors."""
    return interpreted(codes) if interpret else _compiled(codes, layout)


def halves(word, permute: Callable):
    """From four bytes the float16 bits of (the low codes, the high codes), each as two words of two.

    Args:
      word: 32 bits of what knows `&`, `|`, `<<` and `>>` (logical) with integers.
      permute: (word, selector) → the bytes that a selector of `prmt` chooses from the word and zeros.
    """
    high = [permute(word, selector) for selector in _SPREAD]
    return [_bits(each << 4) for each in high], [_bits(each) for each in high]


def interpreted(codes: UInt8[Array, "..."]) -> Pair:
    """The same by what the GPU interpreter has."""
    word = codes.astype(jnp.uint32) << 8
    low, high = ((_bits(each) & jnp.uint32(0xFFFF)).astype(jnp.uint16) for each in (word << 4, word))
    return lax.bitcast_convert_type(low, jnp.float16), lax.bitcast_convert_type(high, jnp.float16)


def _bits(word):
    """Of codes in the highest 4 bits of 16: the sign stays, exponent and mantissa move down by 3."""
    return word & np.uint32(_SIGNS) | word >> 3 & np.uint32(_MAGNITUDES)


def _compiled(codes, layout) -> Pair:
    result = plgpu.ShapeDtypeStruct(codes.shape, jnp.float16, layout)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=(result, result))
    def decode(_, fragment: mgpu.FragmentedArray):
        registers = [np.empty_like(fragment.registers) for _ in range(2)]
        for at, vector in np.ndenumerate(fragment.registers):
            for half, of_half in zip(registers, _decoded_vector(vector), strict=True):
                half[at] = of_half
        low, high = (
            mgpu.FragmentedArray(_registers=of_half, _layout=fragment.layout, _is_signed=None) for of_half in registers
        )
        return low, high

    return decode(codes)


def _decoded_vector(vector: ir.Value) -> list[ir.Value]:
    """Vectors of float16, of the low and of the high codes, from a vector of bytes."""
    pair = ir.VectorType.get((2,), ir.F16Type.get())
    parts: list[list[ir.Value]] = [[], []]
    for first in range(0, ir.VectorType(vector.type).shape[0], 4):
        four = mgpu.utils.vector_slice(vector, slice(first, first + 4))
        word = _Register(mgpu.utils.bitcast(four, ir.IntegerType.get_signless(32)))
        for half, of_half in zip(parts, halves(word, _Register.permuted), strict=True):
            half += [mgpu.utils.bitcast(two.value, pair) for two in of_half]
    return [mgpu.utils.vector_concat(half) for half in parts]


@dataclasses.dataclass(frozen=True)
class _Register:
    """A register of 32 bits in the program that is compiled."""

    value: ir.Value

    def __and__(self, mask: int) -> "_Register":
        return _Register(arith.andi(self.value, _constant(mask)))

    def __or__(self, other: "_Register") -> "_Register":
        return _Register(arith.ori(self.value, other.value))

    def __lshift__(self, bits: int) -> "_Register":
        return _Register(arith.shli(self.value, _constant(bits)))

    def __rshift__(self, bits: int) -> "_Register":
        return _Register(arith.shrui(self.value, _constant(bits)))

    def permuted(self, selector: int) -> "_Register":
        # PTX counts the bytes of the first source from 0, of the second from 4, whatever JAX calls its arguments.
        return _Register(mgpu.utils.prmt(self.value, _constant(0), _constant(selector)))


def _constant(bits: int) -> ir.Value:
    """The 32 bits, which MLIR writes as a signed integer."""
    return mgpu.utils.c(int(np.uint32(bits).view(np.int32)), ir.IntegerType.get_signless(32))

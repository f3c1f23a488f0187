"""From packed NVFP4 in device memory to float16 tiles in shared memory: the part of the kernel that depends on layout.

The bits of an E2M1 code, moved by 9, are those of a float16 that is the element times 2^-14, its subnormal included; so
are those of an E4M3 scale, moved by 7, the scale times 2^-8. Their product needs 6 significant bits and ends at 2688:
float16 holds element × block scale as exactly as bfloat16, and reaches it by a shift, a mask and half a multiplication
for each element. Tiles are in units of `UNIT`; the product of two of them is multiplied by `UNIT_PRODUCT` at the end.

The order of the contraction does not matter as long as both operands have the same one. Of the two codes in a byte the
low one goes to the first half of a tile, the high one to the second: halves are what a byte's lane writes, and nothing
crosses lanes.

    along rows      codes uint8[batch, extent, depth / 2]    scales uint32[batch, extent, depth / 64], 4 blocks a word
    down columns    codes uint8[batch, depth / 2, extent]    scales uint8[batch, depth / 16, extent]
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float16, Int32, UInt32

from fp4jax.numerics import NVFP4
from pallas_kernels import compat

WARPGROUPS = 2
DEPTH = 128
"""Elements along the contraction of a tile."""
BYTES = DEPTH // 2
"""Bytes of codes along it."""
UNIT_PRODUCT = 2.0**14

_BLOCKS = DEPTH // NVFP4.block
_BLOCK_BYTES = NVFP4.block // 2
_WORD_BLOCKS = 4
_ROWS = 64  # of a tile along rows that a warpgroup decodes at once
_SCALE_UNIT = np.float16(2.0**15)  # from 2^-8 of a scale to 2^7: the largest is 57344
_NAN_BYTE, _NAN_BITS = 0x7F, 0x7E00


@dataclasses.dataclass(frozen=True)
class Side:
    """One operand of the product.

    Attributes:
      columns: the contraction runs down the columns, and not along the rows, of the operand in memory.
      extent: of a tile across the contraction.
    """

    columns: bool
    extent: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a tile in shared memory: low and high codes, each [extent, bytes] or [bytes, extent]."""
        return (2, BYTES, self.extent) if self.columns else (2, self.extent, BYTES)

    def load(self, codes_ref, scales_ref, batch, start, warpgroup, step) -> tuple[Array, ...]:
        """What a warpgroup decodes of a tile, in registers: its codes, then its scales."""
        read = _load_columns if self.columns else _load_rows
        return read(self.extent, codes_ref.at[batch], scales_ref.at[batch], start, warpgroup, step)

    def decode(self, loaded: tuple[Array, ...], tile_ref, warpgroup) -> None:
        """Writes what `load` gave to `tile_ref`, of `shape`."""
        write = _decode_columns if self.columns else _decode_rows
        write(self.extent, loaded, tile_ref, warpgroup)


def _row_layout(*removed: int):
    """[rows, bytes]: a lane has the bytes of a block, 8 lanes beside one another those of a row."""
    layout = compat.tiled_layout(((16, BYTES), (4, BYTES), (1, _BLOCK_BYTES)), (-6,), (-4, -3), -1)
    return layout.reduce(removed) if removed else layout


def _row_parts(extent: int, warpgroup):
    """Where the rows begin that a warpgroup decodes."""
    mine = extent // WARPGROUPS
    return [pl.multiple_of(warpgroup * mine + part, _ROWS) for part in range(0, mine, _ROWS)]


def _load_rows(extent, codes_ref, scales_ref, start, warpgroup, step):
    rows = [pl.ds(start + first, _ROWS) for first in _row_parts(extent, warpgroup)]
    across = pl.ds(step * BYTES, BYTES)
    words = range(_BLOCKS // _WORD_BLOCKS)
    codes = [compat.load(codes_ref.at[part, across], _row_layout()) for part in rows]
    scales = [
        compat.load(scales_ref.at[part, step * len(words) + word], _row_layout(1)) for part in rows for word in words
    ]
    return *codes, *scales


def _decode_rows(extent, loaded, tile_ref, warpgroup):
    column = plgpu.broadcasted_iota(jnp.uint32, (_ROWS, BYTES), 1, layout=_row_layout())
    parts = _row_parts(extent, warpgroup)
    codes, scales = loaded[: len(parts)], loaded[len(parts) :]
    for i, first in enumerate(parts):
        low, high = (lax.broadcast_in_dim(word, column.shape, (0,)) for word in scales[2 * i : 2 * i + 2])
        word = jnp.where((column & jnp.uint32(32)) == 0, low, high)
        byte = word >> (column & jnp.uint32(24)) & jnp.uint32(0xFF)
        for half, values in enumerate(_values(codes[i], _scale(byte))):
            tile_ref[half, pl.ds(first, _ROWS)] = values


@functools.cache
def _column_layout(extent: int, *removed: int):
    """[bytes of a block, extent]: a lane has 4 columns, 16 lanes beside one another 64, so that no banks collide."""
    rows = extent // 64  # of a lane; twice that of a warp, the warps lie over the columns first
    tiles = ((_BLOCK_BYTES, extent), (2 * rows, 64), (rows, 4), (1, 4))
    layout = compat.tiled_layout(tiles, (-8, -7), (-6, -5), -1)
    return layout.reduce(removed) if removed else layout


def _column_blocks(warpgroup):
    """The blocks of a tile that a warpgroup decodes."""
    return [warpgroup * (_BLOCKS // WARPGROUPS) + i for i in range(_BLOCKS // WARPGROUPS)]


def _load_columns(extent, codes_ref, scales_ref, start, warpgroup, step):
    across = pl.ds(start, extent)
    blocks = [step * _BLOCKS + block for block in _column_blocks(warpgroup)]
    down = [pl.ds(block * _BLOCK_BYTES, _BLOCK_BYTES) for block in blocks]
    codes = [compat.load(codes_ref.at[rows, across], _column_layout(extent)) for rows in down]
    return *codes, *(compat.load(scales_ref.at[block, across], _column_layout(extent, 0)) for block in blocks)


def _decode_columns(extent, loaded, tile_ref, warpgroup):
    blocks = _column_blocks(warpgroup)
    for block, codes, scales in zip(blocks, loaded[: len(blocks)], loaded[len(blocks) :], strict=True):
        scale = lax.broadcast_in_dim(_scale(scales.astype(jnp.uint32)), codes.shape, (1,))
        rows = pl.ds(pl.multiple_of(block * _BLOCK_BYTES, _BLOCK_BYTES), _BLOCK_BYTES)
        for half, values in enumerate(_values(codes, scale)):
            tile_ref[half, rows] = values


def _values(codes, scale: Float16[Array, "..."]) -> tuple[Float16[Array, "..."], Float16[Array, "..."]]:
    """Element × block scale of the low and of the high code of each byte, in units of 2^-7."""
    word = codes.astype(jnp.int32)
    return _element(word << 28) * scale, _element(word << 24) * scale


def _element(code: Int32[Array, "..."]) -> Float16[Array, "..."]:
    """2^-14 of the E2M1 element whose code is in the highest 4 bits."""
    # The shift keeps the sign where it is and brings the magnitude to the highest bits of a float16's lower part.
    bits = lax.shift_right_arithmetic(code, jnp.int32(3)) & jnp.int32(-0x72000000)
    return _float16(lax.shift_right_logical(bits, jnp.int32(16)))


def _scale(byte: UInt32[Array, "..."]) -> Float16[Array, "..."]:
    """2^7 of the E4M3 value of a byte whose sign is clear; NaN stays."""
    return _float16(jnp.where(byte == _NAN_BYTE, jnp.uint32(_NAN_BITS), byte << 7)) * _SCALE_UNIT


def _float16(bits) -> Float16[Array, "..."]:
    return lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.float16)

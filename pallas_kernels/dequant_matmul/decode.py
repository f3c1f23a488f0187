"""From packed NVFP4 in device memory to float16 tiles in shared memory: the part of the kernel that depends on layout.

Element × block scale needs 6 significant bits and ends at 2688: float16 holds it as exactly as bfloat16, at the same
speed on tensor cores, and is reached sooner. The bits of a code are nearly those of a float16 (`elements`), those of an
E4M3 scale, moved by 7, are one of the scale times 2^-8, and half a multiplication an element joins them. Values are in
units that make both fit; the product of two tiles is multiplied by `UNIT_PRODUCT` at the end.

The order of the contraction does not matter as long as both operands have the same one. Of the two codes in a byte the
low one goes to the first half of a tile, the high one to the second, at the byte's place: nothing crosses lanes.

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
from jaxtyping import Array, Float16, UInt32

from fp4jax.numerics import NVFP4
from pallas_kernels import compat
from pallas_kernels.dequant_matmul import elements

WARPGROUPS = 2
DEPTH = 128
"""Elements along the contraction of a tile."""
BYTES = DEPTH // 2
"""Bytes of codes along it."""
UNIT_PRODUCT = 2.0**14
"""What a product of two tiles is multiplied by: elements are in units of 2^14, scales of 2^-7."""

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
      interpret: decode by what the GPU interpreter runs.
    """

    columns: bool
    extent: int
    interpret: bool

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
        write(self, loaded, tile_ref, warpgroup)

    def values(self, codes, scale: Float16[Array, "..."], layout) -> list[Float16[Array, "..."]]:
        """Element × block scale of the low and of the high codes, in units of 2^-7."""
        return [element * scale for element in elements.decoded(codes, layout, interpret=self.interpret)]


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


def _decode_rows(side: Side, loaded, tile_ref, warpgroup):
    # Bits of a byte's place say which block it is of: 8 bytes a block, 4 blocks a word.
    column = plgpu.broadcasted_iota(jnp.uint32, (_ROWS, BYTES), 1, layout=_row_layout())
    parts = _row_parts(side.extent, warpgroup)
    codes, scales = loaded[: len(parts)], loaded[len(parts) :]
    for i, first in enumerate(parts):
        low, high = (lax.broadcast_in_dim(word, column.shape, (0,)) for word in scales[2 * i : 2 * i + 2])
        word = jnp.where((column & jnp.uint32(32)) == 0, low, high)
        byte = word >> (column & jnp.uint32(24)) & jnp.uint32(0xFF)
        for half, values in enumerate(side.values(codes[i], _scale(byte), _row_layout())):
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


def _decode_columns(side: Side, loaded, tile_ref, warpgroup):
    blocks = _column_blocks(warpgroup)
    for block, codes, scales in zip(blocks, loaded[: len(blocks)], loaded[len(blocks) :], strict=True):
        scale = lax.broadcast_in_dim(_scale(scales.astype(jnp.uint32)), codes.shape, (1,))
        rows = pl.ds(pl.multiple_of(block * _BLOCK_BYTES, _BLOCK_BYTES), _BLOCK_BYTES)
        for half, values in enumerate(side.values(codes, scale, _column_layout(side.extent))):
            tile_ref[half, rows] = values


def _scale(byte: UInt32[Array, "..."]) -> Float16[Array, "..."]:
    """2^7 of the E4M3 value of a byte whose sign is clear; NaN stays."""
    return _float16(jnp.where(byte == _NAN_BYTE, jnp.uint32(_NAN_BITS), byte << 7)) * _SCALE_UNIT


def _float16(bits) -> Float16[Array, "..."]:
    return lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.float16)

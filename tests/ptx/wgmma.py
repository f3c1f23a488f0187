"""Hopper's matrix product of float16 tiles in shared memory: where its operands lie, and where its results go.

A warp has 16 of the 64 rows. Tiles are in 128-byte swizzle: eight rows of 128 bytes, whose 16-byte parts are exchanged
by the number of the row.
"""

import dataclasses
import re

import numpy as np

from tests.ptx.memory import Shared

_DEPTH = 16
_SWIZZLE_128 = 1
_SHAPE = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.f16\.f16")


@dataclasses.dataclass(frozen=True)
class Tile:
    """A descriptor, of 64 bits.

    Attributes:
      start: address; leading, stride: bytes between neighbouring blocks of 64 across the contraction, of eight along
        it (transposed), or of eight rows.
      transposed: the contraction runs down the columns of what lies in memory.
    """

    start: int
    leading: int
    stride: int
    transposed: bool

    @classmethod
    def of(cls, descriptor: int, transposed: bool) -> "Tile":
        """Raises NotImplementedError: another swizzle, or a tile that does not begin with a pattern."""
        if descriptor >> 62 != _SWIZZLE_128 or descriptor >> 49 & 7:
            raise NotImplementedError(f"a matrix descriptor {descriptor:#x}")
        fields = ((descriptor >> bit & 0x3FFF) << 4 for bit in (0, 16, 32))
        return cls(*fields, transposed)

    def read(self, shared: Shared, warp: int, rows: np.ndarray) -> np.ndarray:
        """[rows, 16] float64."""
        row, depth = rows[:, None], np.arange(_DEPTH)[None]
        if self.transposed:
            at = row // 64 * self.leading + depth // 8 * self.stride + depth % 8 * 128 + row % 64 * 2
        else:
            at = row // 8 * self.stride + row % 8 * 128 + depth * 2
        addresses = self.start + at
        addresses ^= (addresses >> 7 & 7) << 4
        found = shared.read(warp, addresses.reshape(-1), 2, asynchronously=True)
        return np.ascontiguousarray(found).view(np.float16).reshape(addresses.shape).astype(np.float64)


def width(opcode: str) -> int:
    """Columns of the product; raises NotImplementedError for another instruction."""
    found = _SHAPE.fullmatch(opcode)
    if not found:
        raise NotImplementedError(opcode)
    return int(found[1])


def multiply(shared: Shared, warp: int, a: Tile, b: Tile, columns: int, before: list[np.ndarray]) -> list[np.ndarray]:
    """before + a b: float32 bits of a warp's 16 rows, a register each for two neighbours in four, 32 lanes in each."""
    rows = 16 * (warp % 4) + np.arange(16)
    product = a.read(shared, warp, rows) @ b.read(shared, warp, np.arange(columns)).T
    lane = np.arange(32)
    results = []
    for j, old in enumerate(before):
        row, column = lane // 4 + 8 * (j // 2 % 2), 8 * (j // 4) + 2 * (lane % 4) + j % 2
        total = old.view(np.float32).astype(np.float64) + product[row, column]
        results.append(total.astype(np.float32).view(np.uint32))
    return results

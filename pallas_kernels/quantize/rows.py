"""The Mosaic GPU kernel for blocks of 16 along the last axis: one lane owns a block, nothing crosses lanes.

A warpgroup takes tiles of rows × 16 blocks. A lane reads its block as 16-byte vectors and writes its 16 codes as 8
bytes:

    bfloat16   uint32[batch, rows, blocks, 2, 4]    a word holds two values, the even column in its low half
    float32    float32[batch, rows, blocks, 4, 4]

The center of a mean split is read once for all tiles of a thread block. An axis that is no multiple of a tile is
covered by a last tile that starts earlier and repeats some blocks of its neighbour: both write the same bytes.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float32, Shaped, UInt8, UInt32

from pallas_kernels import compat, launch
from pallas_kernels.quantize import elements

TILE_BLOCKS = 16
TILE_ROWS = {jnp.dtype(jnp.uint32): 16, jnp.dtype(jnp.float32): 8}
"""Rows that a warpgroup holds in registers at once: 2 (bfloat16) or 1 (float32) blocks a lane."""

# [rows, blocks, groups, 4]: 4 warps of 2 rows × 16 blocks; groups in registers, the last axis a vector.
_TILES = ((8, TILE_BLOCKS, 1, 4), (2, TILE_BLOCKS, 1, 4))
_LAYOUT = functools.partial(compat.tiled_layout, _TILES, (-8,), (-4, -3), -1)


@functools.partial(jax.jit, static_argnames="interpret")  # lowered once for many calls
def quantize(
    x: Shaped[Array, "batch rows blocks groups 4"],
    factors: Float32[Array, "batch factors"],
    centers: tuple[Float32[Array, "batch blocks groups 4"], ...] = (),
    hashes: tuple[UInt32[Array, "batch rows"], ...] = (),
    start: tuple[UInt32[Array, "1"], ...] = (),
    *,
    interpret: bool,
) -> tuple[Shaped[Array, "batch rows blocks groups"], UInt8[Array, "batch rows blocks"]]:
    """Quantizes blocks.

    Args:
      x: uint32 pairs of bfloat16 (2 groups) or float32 (4 groups); at least one tile.
      factors: `elements.factors` of each matrix.
      centers: what to subtract: nothing, or one array for float32, the even and the odd columns for bfloat16.
      hashes: `elements.row_hashes`, for stochastic rounding.
      start: which block of its rows the first one is, where x is a part of a matrix; nothing for 0.
      interpret: run in the GPU interpreter, on any machine.

    Returns:
      The codes of each group (uint32 of 8 codes, or uint16 of 4) and the bytes of the block scales.
    """
    batch, rows, blocks, groups, _ = x.shape
    column_tiles, row_tiles = pl.cdiv(blocks, TILE_BLOCKS), pl.cdiv(rows, TILE_ROWS[x.dtype])
    tiles_each = launch.steps_each(batch * column_tiles * row_tiles, row_tiles)
    run = launch.kernel(
        functools.partial(
            _kernel, centered=bool(centers), stochastic=bool(hashes), shifted=bool(start), tiles=tiles_each
        ),
        out_type=(
            jax.ShapeDtypeStruct((batch, rows, blocks, groups), jnp.uint32 if groups == 2 else jnp.uint16),
            jax.ShapeDtypeStruct((batch, rows, blocks), jnp.uint8),
        ),
        grid={"batch": batch, "rows": pl.cdiv(row_tiles, tiles_each), "columns": column_tiles},
        name=f"quantize_rows{'_stochastic' if hashes else ''}{'_centered' if centers else ''}",
        interpret=interpret,
    )
    return run(x, factors, *centers, *hashes, *start)


def _kernel(x_ref, factors_ref, *refs, centered: bool, stochastic: bool, shifted: bool, tiles: int):
    *inputs, codes_ref, scales_ref = refs
    start_block = inputs.pop()[0] if shifted else jnp.uint32(0)
    parts = 2 if x_ref.dtype == jnp.uint32 else 1
    center_refs, hash_refs = (inputs[:parts], inputs[parts:]) if centered else ((), inputs)
    _, rows, blocks, *group_shape = x_ref.shape
    tile = (TILE_ROWS[x_ref.dtype], TILE_BLOCKS)
    layout, b = _LAYOUT(), lax.axis_index("batch")
    column = jnp.minimum(lax.axis_index("columns") * TILE_BLOCKS, blocks - TILE_BLOCKS)
    across = pl.ds(column, TILE_BLOCKS)
    factors = [factors_ref[b, i] for i in range(elements.FACTORS)]
    centers = [compat.load(ref.at[b, across], layout.reduce((0,))) for ref in center_refs]

    @pl.loop(0, tiles)
    def _(step):
        first_row = jnp.minimum((lax.axis_index("rows") * tiles + step) * tile[0], rows - tile[0])
        down = pl.ds(first_row, tile[0])
        loaded = compat.load(x_ref.at[b, down, across], layout)
        values = elements.bfloat16_pair(loaded) if parts == 2 else [loaded]
        if centered:
            whole = [lax.broadcast_in_dim(c, v.shape, (1, 2, 3)) for v, c in zip(values, centers, strict=True)]
            values = [v - c for v, c in zip(values, whole, strict=True)]
        largest = functools.reduce(jnp.maximum, [jnp.abs(v) for v in values])
        scale, multiplier = elements.block_scale(jnp.max(jnp.max(largest, axis=3), axis=2), factors)
        multiplier = lax.broadcast_in_dim(multiplier, largest.shape, (0, 1))
        draws = None
        if stochastic:
            hashes = [compat.load(ref.at[b, down], layout.reduce((1, 2, 3))) for ref in hash_refs]
            draws = _draws(hashes, start_block + column.astype(jnp.uint32), (*tile, *group_shape), parts)
        word = elements.pack([v * multiplier for v in values], draws)
        lane = plgpu.broadcasted_iota(jnp.uint32, word.shape, 3, layout=layout)
        codes = jnp.sum(word << lane * jnp.uint32(4 * parts), axis=3).astype(codes_ref.dtype)
        compat.store(codes_ref.at[b, down, across], codes, layout.reduce((3,)))
        compat.store(scales_ref.at[b, down, across], scale, layout.reduce((2, 3)))


def _draws(hashes, first_block, shape, parts: int):
    """Draws of the elements of a tile: one array for each part of a word."""
    a, b = (lax.broadcast_in_dim(h, shape, (0,)) for h in hashes)
    _, _, groups, vector = shape
    words_per_block = groups * vector
    block, group, lane = (plgpu.broadcasted_iota(jnp.uint32, shape, axis, layout=_LAYOUT()) for axis in (1, 2, 3))
    word = (block + first_block) * jnp.uint32(words_per_block) + group * jnp.uint32(vector) + lane
    if parts == 2:
        return elements.halves(elements.pair_hash(a, b, word))
    # A vector cannot be taken apart here, so both columns of a pair ask for the hash; the compiler computes it once.
    even, odd = elements.halves(elements.pair_hash(a, b, word >> 1))
    return [jnp.where(word & 1 == 1, odd, even)]

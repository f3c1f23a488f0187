"""The quantizers on one device: from arrays as callers have them to the kernels' words, and back.

Arrays keep their axes, [*batch, *tokens, features], so that the same functions serve a whole array and a shard of one
(`pallas_kernels.quantize.sharded`). What depends on where a shard lies in the whole, the rows that stochastic rounding
counts and the column where it begins, is given.
"""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, UInt8, UInt32

from fp4jax.numerics import NVFP4
from fp4jax.numerics.blocks import pad_to_blocks
from pallas_kernels.quantize import columns, copies, rows, squares

Codes = tuple[UInt8[Array, "..."], UInt8[Array, "..."]]
"""Packed codes and the bytes of the block scales, as in `QTensor`."""


def quantize_rows(
    x: Float[Array, "..."],
    factors: Float32[Array, "..."],
    center: tuple[Float32[Array, "..."], ...] = (),
    hashes: tuple[UInt32[Array, "..."], ...] = (),
    start: tuple[UInt32[Array, "1"], ...] = (),
    *,
    interpret: bool,
) -> Codes:
    """Blocks along the last axis.

    Args:
      x: bfloat16 or float32 [*batch, *tokens, features], not empty.
      factors: `elements.factors` of each matrix, [*batch, 1, ..., 1, factors] with one axis more than x.
      center: what to subtract, [*batch, 1, ..., 1, features], or nothing.
      hashes: `elements.row_hashes`, [*batch, *tokens], for stochastic rounding.
      start: the column of the whole array where x begins, a multiple of 16; nothing for 0.
      interpret: run in the GPU interpreter, on any machine.
    """
    *lead, width = x.shape
    batch = math.prod(factors.shape[:-1])
    count = math.prod(lead) // batch
    x = at_least(x.reshape(batch, count, width), (0, rows.TILE_ROWS[_word_dtype(x)], 16 * rows.TILE_BLOCKS))
    x = pad_to_blocks(x, (-1,), NVFP4.block)
    parts = [part for c in center for part in _words_of_center(_widened(c.reshape(batch, width), x.shape[-1]), x.dtype)]
    groups = 2 if x.dtype == jnp.bfloat16 else 4
    codes, scales = rows.quantize(
        words(x).reshape(*x.shape[:2], -1, groups, 4),
        factors.reshape(batch, -1),
        tuple(part.reshape(batch, -1, groups, 4) for part in parts),
        tuple(at_least(h.reshape(batch, count), (0, x.shape[1])) for h in hashes),
        tuple(s // NVFP4.block for s in start),
        interpret=interpret,
    )
    blocks = -(-width // NVFP4.block)
    codes = lax.bitcast_convert_type(codes, jnp.uint8).reshape(batch, x.shape[1], -1)
    return (
        codes[:, :count, : blocks * NVFP4.block // 2].reshape(*lead, -1),
        scales[:, :count, :blocks].reshape(*lead, -1),
    )


def quantize_columns(
    x: Float[Array, "..."],
    factors: Float32[Array, "..."],
    center: tuple[Float32[Array, "..."], ...] = (),
    hashes: tuple[UInt32[Array, "..."], ...] = (),
    start: tuple[UInt32[Array, "1"], ...] = (),
    *,
    hadamard: bool,
    interpret: bool,
) -> Codes:
    """Blocks along the last axis but one; arguments as for `quantize_rows`, but for:

    Args:
      x: at least two axes.
      center: one row for each matrix or for each sequence; none where the rows are no whole blocks.
      hashes: [*batch, *tokens], the last axis as long as x's rows, or padded to whole blocks under a transform.
      start: a multiple of 2.
    """
    *lead, _, width = x.shape
    sequences = math.prod(lead)
    full = _strips(x)
    hashes = tuple(pad_to_blocks(h.reshape(sequences, -1), (-1,), NVFP4.block) for h in hashes)
    codes, scales = columns.quantize(
        words(full),
        factors.reshape(-1, factors.shape[-1]),
        _centers(center, full),
        hashes,
        tuple(s // 2 for s in start) if full.dtype == jnp.bfloat16 else start,
        hadamard=hadamard,
        interpret=interpret,
    )
    return (
        _bytes(codes)[..., :width].reshape(*lead, -1, width),
        _bytes(scales)[..., :width].reshape(*lead, -1, width),
    )


def quantize_2d(
    x: Float[Array, "..."],
    factors: Float32[Array, "..."],
    hashes: tuple[UInt32[Array, "..."], ...] = (),
    start: tuple[UInt32[Array, "1"], ...] = (),
    *,
    interpret: bool,
) -> Codes:
    """Blocks of 16x16 over the last two axes, codes packed along the first of them; arguments as for `quantize_rows`.

    Args:
      x: at least two axes.
      start: a multiple of 2.
    """
    *lead, _, width = x.shape
    parts = 2 if x.dtype == jnp.bfloat16 else 1
    full = pad_to_blocks(x, (-2, -1), NVFP4.block).reshape(math.prod(lead), -1, width + -width % NVFP4.block)
    full = at_least(full, (0, 0, squares.STRIP * parts))
    groups, rows_of, columns_of = full.shape
    codes, scales = squares.quantize(
        words(full).reshape(groups, -1, NVFP4.block, columns_of // NVFP4.block, NVFP4.block // parts),
        factors.reshape(-1, factors.shape[-1]),
        tuple(pad_to_blocks(h.reshape(groups, -1), (-1,), NVFP4.block) for h in hashes),
        tuple(s // parts for s in start),
        interpret=interpret,
    )
    blocks = -(-width // NVFP4.block)
    codes = _bytes(codes.reshape(groups, rows_of // 2, -1))
    return (
        codes[..., : blocks * NVFP4.block].reshape(*lead, -1, blocks * NVFP4.block),
        scales[..., :blocks].reshape(*lead, -1, blocks),
    )


def quantize_copies(
    x: Float[Array, "..."],
    factors: tuple[Float32[Array, "..."], Float32[Array, "..."]],
    center: tuple[Float32[Array, "..."], ...] = (),
    row_hashes: tuple[UInt32[Array, "..."], ...] = (),
    column_hashes: tuple[UInt32[Array, "..."], ...] = (),
    start: tuple[UInt32[Array, "1"], ...] = (),
    *,
    hadamard: bool,
    sums: bool,
    interpret: bool,
) -> tuple[UInt8[Array, "..."] | Float32[Array, "..."], ...]:
    """What `quantize_rows` and `quantize_columns` give, in one read of x; arguments as for the latter, but for:

    Args:
      x: rows in whole blocks of 16.
      factors: of the copy along rows and of the one along columns.
      start: a multiple of 16.
      sums: add up element × block scale of the copy along columns over all tokens.

    Returns:
      Codes and scales of the copy along rows, those of the copy along columns and, asked for, the sums
      [*batch, 1, ..., 1, features].
    """
    *lead, length, width = x.shape
    parts = 2 if x.dtype == jnp.bfloat16 else 1
    full = pad_to_blocks(x.reshape(math.prod(lead), length, width), (-1,), NVFP4.block)
    full = at_least(full, (0, 0, copies.STRIP * parts))
    lanes = NVFP4.block // parts // copies.VECTOR
    by_row, by_column = (f.reshape(-1, f.shape[-1]) for f in factors)
    row_codes, row_scales, column_codes, column_scales, *totals = copies.quantize(
        words(full).reshape(full.shape[0], -1, NVFP4.block, full.shape[-1] // NVFP4.block, lanes, copies.VECTOR),
        by_row,
        by_column,
        tuple(c.reshape(c.shape[0], -1, lanes, copies.VECTOR) for c in _centers(center, full)),
        *(tuple(h.reshape(-1, length) for h in hashes) for hashes in (row_hashes, column_hashes)),
        tuple(s // parts for s in start),
        hadamard=hadamard,
        sums=sums,
        interpret=interpret,
    )
    blocks = -(-width // NVFP4.block)
    whole = (jnp.sum(t.reshape(len(by_row), -1, t.shape[-1]), axis=1)[:, :width] for t in totals)
    return (
        row_codes.reshape(*lead, length, -1)[..., : blocks * NVFP4.block // 2],
        row_scales.reshape(*lead, length, -1)[..., :blocks],
        *(_bytes(part.reshape(*lead, -1, part.shape[-1]))[..., :width] for part in (column_codes, column_scales)),
        *(total.reshape(*factors[0].shape[:-2], width) for total in whole),
    )


def hadamard_amax(
    x: Float[Array, "..."], center: tuple[Float32[Array, "..."], ...] = (), *, batch_dims: int, interpret: bool
) -> Float32[Array, "..."]:
    """The largest magnitude of each matrix after the transform along the rows, [*batch, 1, ..., 1]."""
    lead = x.shape[:batch_dims]
    full = _strips(x)
    largest = columns.hadamard_maxima(words(full), _centers(center, full), interpret=interpret)
    return jnp.max(largest.reshape(math.prod(lead), -1), axis=1).reshape(*lead, *[1] * (x.ndim - batch_dims))


def words(x):
    """The kernels' view of [..., columns]: pairs of bfloat16 in uint32 words, float32 as it is."""
    if x.dtype == jnp.float32:
        return x
    return lax.bitcast_convert_type(x.reshape(*x.shape[:-1], -1, 2), jnp.uint32)


def at_least(x, sizes):
    """Zeros behind the ends of axes that are shorter than `sizes`."""
    missing = [max(0, size - now) for size, now in zip(sizes, x.shape, strict=True)]
    return jnp.pad(x, [(0, m) for m in missing]) if any(missing) else x


def _strips(x):
    """[*lead, rows, features] as [sequences, rows in whole blocks, at least a strip of columns]."""
    full = pad_to_blocks(x, (-2,), NVFP4.block)
    full = full.reshape(math.prod(x.shape[:-2]), -1, x.shape[-1])
    full = at_least(full, (0, 0, columns.STRIP * (2 if x.dtype == jnp.bfloat16 else 1)))
    return pad_to_blocks(full, (-1,), 2 * columns.VECTOR)


def _centers(center, full):
    """The center of matrices or sequences as the kernels take it, for `_strips`."""
    flat = [_widened(c.reshape(-1, c.shape[-1]), full.shape[-1]) for c in center]
    return tuple(part for c in flat for part in _words_of_center(c, full.dtype))


def _word_dtype(x):
    return jnp.dtype(jnp.uint32 if x.dtype == jnp.bfloat16 else jnp.float32)


def _words_of_center(center, dtype):
    """The center [..., columns]: one array for each column of a word."""
    return (center[..., 0::2], center[..., 1::2]) if dtype == jnp.bfloat16 else (center,)


def _bytes(of_words):
    """uint8 [..., columns] of the bytes in words."""
    if of_words.dtype == jnp.uint8:
        return of_words
    return lax.bitcast_convert_type(of_words, jnp.uint8).reshape(*of_words.shape[:-1], -1)


def _widened(center, width: int):
    return jnp.pad(center, [(0, 0), (0, width - center.shape[-1])])

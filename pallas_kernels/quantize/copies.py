"""The Mosaic GPU kernel that makes both copies of an operand in one read: blocks along its rows, and down its rows.

    bfloat16   uint32[groups, blocks down, 16, blocks across, 4, 2]     a word holds two values, the even column low
    float32    float32[groups, blocks down, 16, blocks across, 8, 2]

A warpgroup takes a strip of words and 16 of its rows at a time, so that what it holds are whole blocks of both kinds.
A lane owns 2 neighbouring words of 16 rows: a block down the rows lies in one lane, as in `columns`, and a block along
a row in the 4 or 8 lanes beside one another, whose largest magnitude crosses them. Each copy has factors and random
bits of its own; the center is subtracted for both, the Hadamard transform is that of the copy down the rows.

Sums of the copy down the rows, as `column_sums` gives them, take what is in registers: a block's is exact in float32,
and rounded only where blocks are added, in index order within a thread block; XLA adds those of the thread blocks.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float32, Shaped, UInt32

from fp4jax.numerics import NVFP4, rounding
from pallas_kernels import compat, launch
from pallas_kernels.quantize import columns, elements

VECTOR = 2
STRIP = 128 * VECTOR
"""Words of a strip; arrays have that many at least."""

_SIDE = NVFP4.block
_BITS = _SIDE.bit_length() - 1
_ROWS = (2,) * _BITS
_ALL_ROWS = tuple(range(_BITS))
_BLOCKS, _LANES, _PAIR = _BITS, _BITS + 1, _BITS + 2
_RANK = _BITS + 3


@functools.cache
def _layout(lanes: int, *removed: int):
    """[2, 2, 2, 2, blocks, lanes of a block, 2], less the axes removed."""
    blocks = STRIP // (lanes * VECTOR)
    tiles = tuple((*_ROWS, *tile, VECTOR) for tile in ((blocks, lanes), (blocks // 4, lanes), (1, 1)))
    layout = compat.tiled_layout(tiles, (-2 * _RANK - 3,), (-_RANK - 3, -_RANK - 2), -1)
    return layout.reduce(removed) if removed else layout


@functools.partial(jax.jit, static_argnames=("hadamard", "sums", "interpret"))  # lowered once for many calls
def quantize(
    x: Shaped[Array, "groups down 16 across lanes 2"],
    row_factors: Float32[Array, "batch factors"],
    column_factors: Float32[Array, "batch factors"],
    centers: tuple[Float32[Array, "means across lanes 2"], ...] = (),
    row_hashes: tuple[UInt32[Array, "groups rows"], ...] = (),
    column_hashes: tuple[UInt32[Array, "groups rows"], ...] = (),
    start: tuple[UInt32[Array, "1"], ...] = (),
    *,
    hadamard: bool = False,
    sums: bool = False,
    interpret: bool,
) -> tuple[Shaped[Array, "..."], ...]:
    """Quantizes blocks of both kinds.

    Args:
      x: uint32 pairs of bfloat16, or float32; at least `STRIP` words across.
      row_factors, column_factors: `elements.factors` of each matrix, for either copy.
      centers: what to subtract: nothing, or one array for float32, the even and the odd columns for bfloat16.
      row_hashes, column_hashes: `elements.row_hashes` of either copy, where it is rounded stochastically.
      start: which word of its rows the first one is, where x is a part of a matrix; nothing for 0.
      hadamard: transform each block of the copy down the rows first, with fixed signs.
      sums: add up the copy down the rows.
      interpret: run in the GPU interpreter, on any machine.

    Returns:
      Of the copy along rows, bytes of codes [groups, down, 16, across, 8] and scales [groups, down, 16, across]; of the
      copy down the rows, codes and scales as from `columns.quantize`, [groups, down, 8 or 1, words]; with `sums` its
      elements × block scales added up over some blocks down, float32 [groups, chunks, columns].
    """
    groups, down, _, across, lanes, _ = x.shape
    strips = pl.cdiv(across * lanes * VECTOR, STRIP)
    steps = launch.steps_each(groups * down * strips, down)
    chunks, parts = pl.cdiv(down, steps), 2 if x.dtype == jnp.uint32 else 1
    given = {"centered": centers, "row_draws": row_hashes, "column_draws": column_hashes, "shifted": start}
    flags = {name: bool(value) for name, value in given.items()} | {"hadamard": hadamard, "sums": sums}
    row_codes, row_scales, column_codes, column_scales, *totals = launch.kernel(
        functools.partial(_kernel, steps=steps, **flags),
        out_type=_results(groups, down, across, lanes, parts, chunks if sums else None),
        grid={"groups": groups, "rows": chunks, "columns": strips},
        name="_".join(["quantize_copies", *(name for name, value in flags.items() if value)]),
        interpret=interpret,
    )(
        x.reshape(groups, down, *_ROWS, across, lanes, VECTOR),
        row_factors,
        column_factors,
        *centers,
        *(h.reshape(groups, down, *_ROWS) for h in (*row_hashes, *column_hashes)),
        *start,
    )
    return (
        row_codes.reshape(groups, down, _SIDE, across, -1),
        row_scales.reshape(groups, down, _SIDE, across),
        column_codes.reshape(groups, down, _SIDE // 2, -1),
        column_scales.reshape(groups, down, 1, -1),
        *([jnp.stack(totals, axis=-1).reshape(groups, chunks, -1)] if sums else []),
    )


def _results(
    groups: int, down: int, across: int, lanes: int, parts: int, chunks: int | None
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Codes and scales of the copy along rows, codes and scales of the copy down the rows; sums of chunks."""
    by_row, of_words = (groups, down, *_ROWS, across), jnp.uint16 if parts == 2 else jnp.uint8
    sums = (
        [] if chunks is None else [jax.ShapeDtypeStruct((groups, chunks, across, lanes, VECTOR), jnp.float32)] * parts
    )
    return (
        jax.ShapeDtypeStruct((*by_row, lanes, *[VECTOR] * (parts == 2)), jnp.uint8),
        jax.ShapeDtypeStruct(by_row, jnp.uint8),
        jax.ShapeDtypeStruct((groups, down, *_ROWS[1:], across, lanes, VECTOR), of_words),
        jax.ShapeDtypeStruct((groups, down, across, lanes, VECTOR), of_words),
        *sums,
    )


def _kernel(
    x_ref, row_factors_ref, column_factors_ref, *refs, centered, row_draws, column_draws, hadamard, sums, shifted, steps
):
    groups, down, *_, across, lanes, _ = x_ref.shape
    parts = 2 if x_ref.dtype == jnp.uint32 else 1
    refs, sum_refs = (refs[:-parts], refs[-parts:]) if sums else (refs, ())
    *inputs, row_codes, row_scales, column_codes, column_scales = refs
    first_word = inputs.pop()[0] if shifted else jnp.uint32(0)
    inputs, layout = iter(inputs), functools.partial(_layout, lanes)
    center_refs = [next(inputs) for _ in range(parts * centered)]
    row_hashes, column_hashes = ([next(inputs) for _ in range(2 * drawn)] for drawn in (row_draws, column_draws))
    group, blocks = lax.axis_index("groups"), STRIP // (lanes * VECTOR)
    matrix = group // (groups // row_factors_ref.shape[0])
    of_rows, of_columns = (
        [ref[matrix, i] for i in range(elements.FACTORS)] for ref in (row_factors_ref, column_factors_ref)
    )
    # The last strip starts earlier where the width is no multiple, and repeats what its neighbour writes.
    first = jnp.minimum(lax.axis_index("columns") * blocks, across - blocks)
    strip, rows = pl.ds(first, blocks), (slice(None),) * _BITS
    centers = [compat.load(ref.at[group // (groups // ref.shape[0]), strip], layout(*_ALL_ROWS)) for ref in center_refs]

    def draws(hash_refs, block, shape):
        if not hash_refs:
            return [None] * parts
        hashes = [compat.load(ref.at[group, block, *rows], layout(_BLOCKS, _LANES, _PAIR)) for ref in hash_refs]
        return _draws(hashes, first_word + first.astype(jnp.uint32) * jnp.uint32(lanes * VECTOR), shape, parts)

    def quantize_step(step, totals):
        wanted = lax.axis_index("rows") * steps + step
        block = jnp.minimum(wanted, down - 1)
        at = group, block
        loaded = compat.load(x_ref.at[*at, *rows, strip], layout())
        shape = loaded.shape
        values = elements.bfloat16_pair(loaded) if parts == 2 else [loaded]
        if centered:
            whole = [lax.broadcast_in_dim(c, shape, (_BLOCKS, _LANES, _PAIR)) for c in centers]
            values = [v - c for v, c in zip(values, whole, strict=True)]
        scale, codes = _along_rows(values, of_rows, draws(row_hashes, block, shape))
        packed = () if parts == 2 else (_PAIR,)
        compat.store(row_codes.at[*at, *rows, strip], codes.astype(jnp.uint8), layout(*packed))
        compat.store(row_scales.at[*at, *rows, strip], scale, layout(_LANES, _PAIR))
        if hadamard:
            values = [columns.transform(v, layout) for v in values]
        scales, codes, block_sums = _down_rows(values, of_columns, draws(column_hashes, block, shape), layout, sums)
        compat.store(column_codes.at[*at, *rows[1:], strip], codes.astype(column_codes.dtype), layout(_BITS - 1))
        compat.store(column_scales.at[*at, strip], scales.astype(column_scales.dtype), layout(*_ALL_ROWS))
        weight = jnp.where(wanted < down, jnp.float32(1), jnp.float32(0))  # the last block once
        return tuple(total + of_block * weight for total, of_block in zip(totals, block_sums, strict=True))

    zero = plgpu.layout_cast(jnp.zeros((blocks, lanes, VECTOR), jnp.float32), layout(*_ALL_ROWS))
    totals = lax.fori_loop(0, steps, quantize_step, (zero,) * len(sum_refs))
    for ref, total in zip(sum_refs, totals, strict=True):
        compat.store(ref.at[group, lax.axis_index("rows"), strip], total, layout(*_ALL_ROWS))


def _along_rows(values, factors, draws):
    """(bytes of scales [rows, blocks], codes of the columns of a word, or of a pair of words, in 8 bits)."""
    largest = functools.reduce(jnp.maximum, map(jnp.abs, values))
    scale, multiplier = elements.block_scale(jnp.max(jnp.max(largest, axis=_PAIR), axis=_LANES), factors)
    multiplier = lax.broadcast_in_dim(multiplier, largest.shape, tuple(range(_BLOCKS + 1)))
    word = elements.pack([v * multiplier for v in values], None if draws[0] is None else draws)
    if len(values) == 2:
        return scale, word
    lanes = largest.shape[_LANES]
    second = plgpu.broadcasted_iota(jnp.uint32, word.shape, _PAIR, layout=_layout(lanes))
    return scale, jnp.sum(word << second * jnp.uint32(4), axis=_PAIR)


def _down_rows(values, factors, draws, layout, sums: bool):
    """(bytes of scales, codes of two rows in 8 bits, those of the columns of a word side by side; sums of blocks)."""
    scales, codes, totals = [], [], []
    for x, drawn in zip(values, draws, strict=True):
        largest = functools.reduce(lambda y, axis: jnp.max(y, axis=axis), reversed(_ALL_ROWS), jnp.abs(x))
        scale, multiplier = elements.block_scale(largest, factors)
        x = x * lax.broadcast_in_dim(multiplier, x.shape, (_BLOCKS, _LANES, _PAIR))
        word = elements.pack([x], None if drawn is None else [drawn])
        second = plgpu.broadcasted_iota(jnp.uint32, x.shape, _BITS - 1, layout=layout())
        scales.append(scale.astype(jnp.uint32))
        codes.append(jnp.sum(word << second * jnp.uint32(4), axis=_BITS - 1))
        if sums:
            decoded = rounding.decode(word, NVFP4.element)
            total = functools.reduce(lambda y, axis: jnp.sum(y, axis=axis), reversed(_ALL_ROWS), decoded)
            totals.append(total * lax.bitcast_convert_type(scale, jnp.float8_e4m3fn).astype(jnp.float32))
    return columns.side_by_side(scales), columns.side_by_side(codes), totals


def _draws(hashes, first_word, shape, parts: int) -> list[UInt32[Array, "2 2 2 2 blocks lanes 2"]]:
    """For each column of a word the draws of its values."""
    lanes = shape[_LANES]
    block, lane, second = (
        plgpu.broadcasted_iota(jnp.uint32, shape, axis, layout=_layout(lanes)) for axis in (_BLOCKS, _LANES, _PAIR)
    )
    word = (block * jnp.uint32(lanes) + lane) * jnp.uint32(VECTOR) + second + first_word
    a, b = (lax.broadcast_in_dim(row, shape, _ALL_ROWS) for row in hashes)
    even, odd = elements.halves(elements.pair_hash(a, b, word if parts == 2 else word >> 1))
    return [even, odd] if parts == 2 else [jnp.where(word & 1 == 1, odd, even)]

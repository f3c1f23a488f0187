"""The Mosaic GPU kernel for blocks of 16x16, those of weights: a few lanes share a block, 16 rows of it at a time.

    bfloat16   uint32[groups, blocks down, 16, blocks across, 8]     a word holds two values, the even column low
    float32    float32[groups, blocks down, 16, blocks across, 16]

As in `columns` a lane owns `VECTOR` neighbouring words of 16 rows, so that two rows' codes are a byte in one lane and
the lanes of a warp read neighbouring words; only the largest magnitude of a block crosses the 4 or 8 lanes that it lies
in. Its scale is written once, where the repeated scales of its rows and columns would be 16 times as many.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float32, Shaped, UInt8, UInt32

from fp4jax.numerics import NVFP4
from pallas_kernels import compat, launch
from pallas_kernels.quantize import elements

VECTOR = 2
STRIP = 128 * VECTOR
"""Words of a strip; arrays have that many at least."""

_SIDE = NVFP4.block
_BITS = _SIDE.bit_length() - 1
_ROWS = (2,) * _BITS  # a block's rows, counted by axes of 2 so that pairs of rows are one
_ALL_ROWS = tuple(range(_BITS))
_BLOCKS, _WORDS = _BITS, _BITS + 1  # the axes behind the rows


@functools.cache
def _layout(words: int, *removed: int):
    """Of the blocks of a strip, [2, 2, 2, 2, blocks, words of a block], less the axes removed."""
    blocks = STRIP // words
    tiles = tuple((*_ROWS, *tile) for tile in ((blocks, words), (blocks // 4, words), (1, VECTOR)))
    rank = _BITS + 2
    layout = compat.tiled_layout(tiles, (-2 * rank - 2,), (-rank - 2, -rank - 1), -1)
    return layout.reduce(removed) if removed else layout


@functools.partial(jax.jit, static_argnames="interpret")  # lowered once for many calls
def quantize(
    x: Shaped[Array, "groups down 16 across words"],
    factors: Float32[Array, "batch factors"],
    hashes: tuple[UInt32[Array, "groups rows"], ...] = (),
    start: tuple[UInt32[Array, "1"], ...] = (),
    *,
    interpret: bool,
) -> tuple[Shaped[Array, "groups down 8 across words"], UInt8[Array, "groups down across"]]:
    """Quantizes blocks.

    Args:
      x: uint32 pairs of bfloat16, or float32; at least `STRIP` words across.
      factors: `elements.factors` of each matrix.
      hashes: `elements.row_hashes`, for stochastic rounding.
      start: which word of its rows the first one is, where x is a part of a matrix; nothing for 0.
      interpret: run in the GPU interpreter, on any machine.

    Returns:
      Codes, two rows of each column of a word (uint16 for pairs, uint8), and the bytes of the block scales.
    """
    groups, down, _, across, words = x.shape
    strips = pl.cdiv(across * words, STRIP)
    steps = launch.steps_each(groups * down * strips, down)
    codes, scales = launch.kernel(
        functools.partial(_kernel, stochastic=bool(hashes), shifted=bool(start), steps=steps),
        out_type=(
            jax.ShapeDtypeStruct(
                (groups, down, *_ROWS[1:], across, words), jnp.uint16 if x.dtype == jnp.uint32 else jnp.uint8
            ),
            jax.ShapeDtypeStruct((groups, down, across), jnp.uint8),
        ),
        grid={"groups": groups, "rows": pl.cdiv(down, steps), "columns": strips},
        name=f"quantize_2d{'_stochastic' if hashes else ''}",
        interpret=interpret,
    )(
        x.reshape(groups, down, *_ROWS, across, words),
        factors,
        *(h.reshape(groups, down, *_ROWS) for h in hashes),
        *start,
    )
    return codes.reshape(groups, down, _SIDE // 2, across, words), scales


def _kernel(x_ref, factors_ref, *refs, stochastic: bool, shifted: bool, steps: int):
    *hash_refs, codes_ref, scales_ref = refs
    first_word = hash_refs.pop()[0] if shifted else jnp.uint32(0)
    groups, down, *_, across, words = x_ref.shape
    layout = functools.partial(_layout, words)
    blocks = STRIP // words
    group = lax.axis_index("groups")
    factors = [factors_ref[group // (groups // factors_ref.shape[0]), i] for i in range(elements.FACTORS)]
    # The last strip starts earlier where the width is no multiple, and repeats what its neighbour writes.
    first = jnp.minimum(lax.axis_index("columns") * blocks, across - blocks)
    strip = pl.ds(first, blocks)
    rows = (slice(None),) * _BITS

    @pl.loop(0, steps)
    def _(step):
        block = jnp.minimum(lax.axis_index("rows") * steps + step, down - 1)
        loaded = compat.load(x_ref.at[group, block, *rows, strip], layout())
        columns = elements.bfloat16_pair(loaded) if loaded.dtype == jnp.uint32 else [loaded]
        scale, multiplier = elements.block_scale(_largest(columns), factors)
        multiplier = lax.broadcast_in_dim(multiplier, loaded.shape, (_BLOCKS,))
        draws = [None] * len(columns)
        if stochastic:
            hashes = [compat.load(ref.at[group, block, *rows], layout(_BLOCKS, _WORDS)) for ref in hash_refs]
            word = first_word + first.astype(jnp.uint32) * jnp.uint32(words)
            draws = _draws(hashes, word, loaded.shape, len(columns))
        codes = [_pair_codes(x * multiplier, drawn) for x, drawn in zip(columns, draws, strict=True)]
        codes = functools.reduce(jnp.bitwise_or, [code << 8 * i for i, code in enumerate(codes)])
        compat.store(codes_ref.at[group, block, *rows[1:], strip], codes.astype(codes_ref.dtype), layout(_BITS - 1))
        compat.store(scales_ref.at[group, block, strip], scale, layout(*_ALL_ROWS, _WORDS))


def _largest(columns) -> Float32[Array, " blocks"]:
    largest = functools.reduce(jnp.maximum, map(jnp.abs, columns))
    for axis in reversed(_ALL_ROWS):
        largest = jnp.max(largest, axis=axis)
    return jnp.max(largest, axis=1)  # across lanes


def _pair_codes(x: Float32[Array, "2 2 2 2 blocks words"], draws) -> UInt32[Array, "2 2 2 blocks words"]:
    """The codes of two rows in 8 bits, the first in the low ones."""
    word = elements.pack([x], None if draws is None else [draws])
    second = plgpu.broadcasted_iota(jnp.uint32, x.shape, _BITS - 1, layout=_layout(x.shape[-1]))
    return jnp.sum(word << second * jnp.uint32(4), axis=_BITS - 1)


def _draws(hashes, first_word, shape, parts: int) -> list[UInt32[Array, "2 2 2 2 blocks words"]]:
    """For each column of a word the draws of its block."""
    block, within = (
        plgpu.broadcasted_iota(jnp.uint32, shape, axis, layout=_layout(shape[-1])) for axis in (_BLOCKS, _WORDS)
    )
    word = block * jnp.uint32(shape[-1]) + within + first_word
    a, b = (lax.broadcast_in_dim(row, shape, _ALL_ROWS) for row in hashes)
    even, odd = elements.halves(elements.pair_hash(a, b, word if parts == 2 else word >> 1))
    return [even, odd] if parts == 2 else [jnp.where(word & 1 == 1, odd, even)]

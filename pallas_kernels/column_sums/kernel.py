"""The Mosaic GPU kernel that adds up the columns of packed NVFP4 codes, blocks of 16 rows.

    codes    uint32[groups, blocks, 2, 2, 2, words]    a word: 2 rows of 4 neighbouring columns, 4 bits each
    scales   uint32[groups, blocks, words]             a word: the scale bytes of the 4 columns

A lane owns `VECTOR` words and walks down its blocks. The 16 values of a block are multiples of 1/2 up to 6 and its
scale has 4 significant bits: a block's sum is exact in float32, and is rounded only where blocks are added, in the tree
of `fp4jax.numerics.column_sums`. The blocks of a thread block are a subtree of it, added like a binary counter.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float32, UInt32

from fp4jax.numerics import NVFP4, rounding
from pallas_kernels import compat, launch, tree

COLUMNS = 4
"""Columns of a word."""
VECTOR = 1
STRIP = 128 * VECTOR
"""Words of a strip; arrays have that many at least."""

_PAIRS = (2, 2, 2)  # of rows, counted by three axes of 2: what is in registers is added along them
_MOST_STEPS = 32
_TILES = tuple((*_PAIRS, words) for words in (STRIP, 32 * VECTOR, VECTOR))


def _layout(*removed: int):
    layout = compat.tiled_layout(_TILES, (-9,), (-5,), -1)
    return layout.reduce(removed) if removed else layout


@functools.partial(jax.jit, static_argnames="interpret")  # lowered once for many calls
def partial_sums(
    codes: UInt32[Array, "groups blocks 2 2 2 words"], scales: UInt32[Array, "groups blocks words"], *, interpret: bool
) -> tuple[Float32[Array, "groups chunks words"], ...]:
    """Element × block scale, added up over 2^k blocks of rows: one array for each column of a word."""
    groups, blocks, *_, words = codes.shape
    strips = pl.cdiv(words, STRIP)
    steps = launch.steps_each(groups * blocks * strips, blocks, _MOST_STEPS)
    levels = (steps - 1).bit_length()
    chunks = pl.cdiv(blocks, 1 << levels)
    return launch.kernel(
        functools.partial(_kernel, levels=levels),
        out_type=(jax.ShapeDtypeStruct((groups, chunks, words), jnp.float32),) * COLUMNS,
        grid={"groups": groups, "rows": chunks, "columns": strips},
        name="column_sums",
        interpret=interpret,
    )(codes, scales)


def _kernel(codes_ref, scales_ref, *out_refs, levels: int):
    group, chunk = lax.axis_index("groups"), lax.axis_index("rows")
    blocks, words = codes_ref.shape[1], codes_ref.shape[-1]
    across = pl.ds(jnp.minimum(lax.axis_index("columns") * STRIP, words - STRIP), STRIP)

    def step(i, sums):
        block = (chunk << levels) + i
        here = jnp.minimum(block, blocks - 1)
        codes = compat.load(codes_ref.at[group, here, slice(None), slice(None), slice(None), across], _layout())
        scale_bytes = compat.load(scales_ref.at[group, here, across], _layout(0, 1, 2))
        weight = jnp.where(block < blocks, jnp.float32(1), jnp.float32(0))  # none past the end
        of_block = (
            _block_sum(codes, 8 * column) * _scale(scale_bytes >> 8 * column) * weight for column in range(COLUMNS)
        )
        return tuple(tree.count_up(i, pending, total) for (*pending, _), total in zip(sums, of_block, strict=True))

    zero = plgpu.layout_cast(jnp.zeros((STRIP,), jnp.float32), _layout(0, 1, 2))
    sums = lax.fori_loop(0, 1 << levels, step, ((zero,) * (levels + 1),) * COLUMNS)
    for ref, (*_, total) in zip(out_refs, sums, strict=True):
        compat.store(ref.at[group, chunk, across], total, _layout(0, 1, 2))


def _block_sum(codes, shift: int):
    """The sum of the elements of a block; a byte at `shift` holds two rows of a column."""
    rows = (rounding.decode(codes >> position & jnp.uint32(15), NVFP4.element) for position in (shift, shift + 4))
    total = functools.reduce(jnp.add, rows)
    for axis in reversed(range(len(_PAIRS))):
        total = jnp.sum(total, axis=axis)
    return total


def _scale(byte):
    """E4M3 of the low byte, whose sign is clear: `numerics.rounding.decode_scale`, a NaN included."""
    return lax.bitcast_convert_type((byte & jnp.uint32(0xFF)).astype(jnp.uint8), jnp.float8_e4m3fn).astype(jnp.float32)

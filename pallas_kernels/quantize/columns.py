"""The Mosaic GPU kernel for blocks of 16 along the rows: a lane owns neighbouring columns, 16 rows of them at a time.

    bfloat16   uint32[groups, rows, columns / 2]    a word holds two values, the even column in its low half
    float32    float32[groups, rows, columns]

A warpgroup takes a strip of 128 lanes × `VECTOR` words and walks down its rows, 16 at a time: the 16 values of a block
lie in 16 registers of one lane, so its maximum, its Hadamard transform and its packing cross no lanes, and the lanes of
a warp read neighbouring words. Two rows' codes make a byte; the bytes of the columns of one word are written together.
A group is one sequence: matrices of a batch have `groups / batch` of them.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float32, Shaped, UInt32

from fp4jax.numerics import NVFP4
from fp4jax.numerics.hadamard import SIGNS
from pallas_kernels import compat, launch
from pallas_kernels.quantize import elements

VECTOR = 2
STRIP = 128 * VECTOR
"""Words of a strip; arrays have that many at least, and a multiple of `VECTOR`."""

_ROWS = NVFP4.block
_BITS = _ROWS.bit_length() - 1
# The rows of a block are counted by four axes of 2, so that pairs, and each step of the transform, are an axis. They
# lie in registers; 4 warps of 32 lanes × `VECTOR` words make a strip.
_BLOCK = (2,) * _BITS
_TILES = tuple((*_BLOCK, words) for words in (STRIP, 32 * VECTOR, VECTOR))
_ALL_ROWS = tuple(range(_BITS))


def _layout(*removed: int):
    """Of a block of a strip, less the axes removed."""
    layout = compat.tiled_layout(_TILES, (-3 - 2 * _BITS,), (-2 - _BITS,), -1)
    return layout.reduce(removed) if removed else layout


@functools.partial(jax.jit, static_argnames=("hadamard", "interpret"))  # lowered once for many calls
def quantize(
    x: Shaped[Array, "groups rows words"],
    factors: Float32[Array, "batch factors"],
    centers: tuple[Float32[Array, "means words"], ...] = (),
    hashes: tuple[UInt32[Array, "groups rows"], ...] = (),
    start: tuple[UInt32[Array, "1"], ...] = (),
    *,
    hadamard: bool = False,
    interpret: bool,
) -> tuple[Shaped[Array, "groups rows/2 words"], Shaped[Array, "groups rows/16 words"]]:
    """Quantizes blocks.

    Args:
      x: uint32 pairs of bfloat16, or float32; rows a multiple of 16, at least `STRIP` words.
      factors: `elements.factors` of each matrix.
      centers: what to subtract: nothing, or one array for float32, the even and the odd columns for bfloat16.
      hashes: `elements.row_hashes`, for stochastic rounding.
      start: which word of its rows the first one is, where x is a part of a matrix; nothing for 0.
      hadamard: transform each block first, as `numerics.hadamard` does with fixed signs.
      interpret: run in the GPU interpreter, on any machine.

    Returns:
      Codes, two rows of each column of a word (uint16 for pairs, uint8), and the bytes of the block scales likewise.
    """
    groups, rows, words = x.shape
    blocks = rows // _ROWS
    hashes = tuple(h.reshape(groups, blocks, *_BLOCK) for h in hashes)
    out_dtype = jnp.uint16 if x.dtype == jnp.uint32 else jnp.uint8
    variants = {"centered": bool(centers), "stochastic": bool(hashes), "shifted": bool(start), "hadamard": hadamard}
    body = functools.partial(_quantize_kernel, **variants)
    name = "_".join(["quantize_columns", *["stochastic"] * bool(hashes), *["hadamard"] * hadamard])
    run = _strips(
        body,
        (groups, rows, words),
        (
            jax.ShapeDtypeStruct((groups, blocks, *_BLOCK[1:], words), out_dtype),
            jax.ShapeDtypeStruct((groups, blocks, words), out_dtype),
        ),
        name + "_centered" * bool(centers),
        interpret,
    )
    codes, scales = run(x.reshape(groups, blocks, *_BLOCK, words), factors, *centers, *hashes, *start)
    return codes.reshape(groups, rows // 2, words), scales


@functools.partial(jax.jit, static_argnames="interpret")
def hadamard_maxima(
    x: Shaped[Array, "groups rows words"], centers: tuple[Float32[Array, "means words"], ...] = (), *, interpret: bool
) -> Float32[Array, "groups chunks words"]:
    """Largest magnitudes after the Hadamard transform, each over some rows of the columns of a word.

    Arguments as for `quantize`.
    """
    groups, rows, words = x.shape
    steps = _steps_each(x.shape)
    chunks = pl.cdiv(rows // _ROWS, steps)
    body = functools.partial(_maxima_kernel, centered=bool(centers))
    out = (jax.ShapeDtypeStruct((groups, chunks, words), jnp.float32),)
    run = _strips(body, x.shape, out, "hadamard_maxima" + "_centered" * bool(centers), interpret)
    return run(x.reshape(groups, rows // _ROWS, *_BLOCK, words), *centers)[0]


def _steps_each(shape) -> int:
    groups, rows, words = shape
    blocks = rows // _ROWS
    return launch.steps_each(groups * blocks * pl.cdiv(words, STRIP), blocks)


def _strips(body, shape, out_type, name: str, interpret: bool):
    groups, rows, words = shape
    steps = _steps_each(shape)
    grid = {"groups": groups, "rows": pl.cdiv(rows // _ROWS, steps), "columns": pl.cdiv(words, STRIP)}
    return launch.kernel(functools.partial(body, steps=steps), out_type, grid, name, interpret)


def _quantize_kernel(
    x_ref, factors_ref, *refs, centered: bool, stochastic: bool, shifted: bool, hadamard: bool, steps: int
):
    *inputs, codes_ref, scales_ref = refs
    first_word = inputs.pop()[0] if shifted else jnp.uint32(0)
    parts = _parts(x_ref)
    center_refs, hash_refs = (inputs[:parts], inputs[parts:]) if centered else ((), inputs)
    group, across = lax.axis_index("groups"), _across(x_ref)
    matrix = group // (x_ref.shape[0] // factors_ref.shape[0])
    factors = [factors_ref[matrix, i] for i in range(elements.FACTORS)]
    centers = _load_centers(center_refs, group, across, x_ref)

    @pl.loop(0, steps)
    def _(step):
        block = _block_index(x_ref, step, steps)
        columns = _block(x_ref, group, block, across, centers, hadamard)
        scales, multipliers = zip(*[elements.block_scale(_largest(x), factors) for x in columns], strict=True)
        scaled = [x * _down_rows(m, x.shape) for x, m in zip(columns, multipliers, strict=True)]
        draws = [None] * parts
        if stochastic:
            draws = _draws(hash_refs, group, block, first_word + across.start.astype(jnp.uint32), parts)
        codes = [_pair_codes(x, drawn) for x, drawn in zip(scaled, draws, strict=True)]
        compat.store(
            codes_ref.at[group, block, *_every(_BITS - 1), across],
            side_by_side(codes).astype(codes_ref.dtype),
            _layout(_BITS - 1),
        )
        word = side_by_side([scale.astype(jnp.uint32) for scale in scales])
        compat.store(scales_ref.at[group, block, across], word.astype(scales_ref.dtype), _layout(*_ALL_ROWS))


def _maxima_kernel(x_ref, *refs, centered: bool, steps: int):
    *center_refs, out_ref = refs
    group, across = lax.axis_index("groups"), _across(x_ref)
    centers = _load_centers(center_refs, group, across, x_ref)

    def step(i, largest):
        columns = _block(x_ref, group, _block_index(x_ref, i, steps), across, centers, hadamard=True)
        return functools.reduce(jnp.maximum, map(_largest, columns), largest)

    zero = plgpu.layout_cast(jnp.zeros((STRIP,), jnp.float32), _layout(*_ALL_ROWS))
    compat.store(
        out_ref.at[group, lax.axis_index("rows"), across], lax.fori_loop(0, steps, step, zero), _layout(*_ALL_ROWS)
    )


def _parts(x_ref) -> int:
    return 2 if x_ref.dtype == jnp.uint32 else 1


def _across(x_ref):
    """The words of this thread block; the last strip starts earlier where the width is no multiple."""
    return pl.ds(jnp.minimum(lax.axis_index("columns") * STRIP, x_ref.shape[-1] - STRIP), STRIP)


def _block_index(x_ref, step, steps: int):
    """The block of rows to take; past the end the last one once more: it writes the same bytes."""
    return jnp.minimum(lax.axis_index("rows") * steps + step, x_ref.shape[1] - 1)


def _load_centers(refs, group, across, x_ref):
    return [compat.load(ref.at[group // (x_ref.shape[0] // ref.shape[0]), across], _layout(*_ALL_ROWS)) for ref in refs]


def _block(x_ref, group, block, across, centers, hadamard: bool) -> list[Float32[Array, "2 2 2 2 strip"]]:
    """For each column of a word the 16 values of its block, in pairs of rows."""
    loaded = compat.load(x_ref.at[group, block, *_every(_BITS), across], _layout())
    columns = elements.bfloat16_pair(loaded) if _parts(x_ref) == 2 else [loaded]
    if centers:
        whole = [_down_rows(center, loaded.shape) for center in centers]
        columns = [x - center for x, center in zip(columns, whole, strict=True)]
    return [transform(x, _layout) for x in columns] if hadamard else columns


def _largest(x: Float32[Array, "2 2 2 2 strip"]) -> Float32[Array, " strip"]:
    return functools.reduce(lambda y, axis: jnp.max(y, axis=axis), reversed(_ALL_ROWS), jnp.abs(x))


def _pair_codes(x: Float32[Array, "2 2 2 2 strip"], draws) -> UInt32[Array, "2 2 2 strip"]:
    """The codes of two rows in 8 bits, the first in the low ones."""
    word = elements.pack([x], None if draws is None else [draws])
    second = plgpu.broadcasted_iota(jnp.uint32, x.shape, _BITS - 1, layout=_layout())
    return jnp.sum(word << second * jnp.uint32(4), axis=_BITS - 1)


def side_by_side(bytes_of_columns: Sequence[UInt32[Array, "..."]]) -> UInt32[Array, "..."]:
    """The low bytes of the columns of a word, in one; what is above the last one's is left to the caller to cut off.

    A NaN fills its own word, and must not reach the block of the column beside it.
    """
    *low, last = bytes_of_columns
    masked = [*(byte & jnp.uint32(0xFF) for byte in low), last]
    return functools.reduce(jnp.bitwise_or, [byte << 8 * i for i, byte in enumerate(masked)])


def _draws(hash_refs, group, block, first_word, parts: int) -> list[UInt32[Array, "2 2 2 2 strip"]]:
    """For each column of a word the draws of its block."""
    shape = (*_BLOCK, STRIP)
    word = plgpu.broadcasted_iota(jnp.uint32, shape, _BITS, layout=_layout()) + first_word
    rows = [compat.load(ref.at[group, block, *_every(_BITS)], _layout(_BITS)) for ref in hash_refs]
    a, b = (lax.broadcast_in_dim(row, shape, _ALL_ROWS) for row in rows)
    even, odd = elements.halves(elements.pair_hash(a, b, word if parts == 2 else word >> 1))
    return [even, odd] if parts == 2 else [jnp.where(word & 1 == 1, odd, even)]


def _every(axes: int):
    return (slice(None),) * axes


def _down_rows(x: Float32[Array, " strip"], shape) -> Float32[Array, "2 2 2 2 strip"]:
    """One number for each word, repeated for all rows of a block."""
    return lax.broadcast_in_dim(x, shape, (len(shape) - 1,))


def transform(x: Float32[Array, "2 2 2 2 *strip"], layout: Callable) -> Float32[Array, "2 2 2 2 *strip"]:
    """`numerics.hadamard` down a block: its order of additions, its rounding to bfloat16; `layout()` is that of x."""
    x = x * _along_rows(SIGNS, x.shape, layout)
    for axis in reversed(range(_BITS)):
        is_second = plgpu.broadcasted_iota(jnp.uint32, x.shape, axis, layout=layout()) == 1
        kept = tuple(i for i in range(x.ndim) if i != axis)
        total = jnp.sum(x, axis=axis)
        difference = jnp.sum(jnp.where(is_second, -x, x), axis=axis)
        total, difference = (lax.broadcast_in_dim(y, x.shape, kept) for y in (total, difference))
        x = jnp.where(is_second, difference, total)
    return _round_to_bfloat16(x * np.float32(_ROWS**-0.5))


def _round_to_bfloat16(x: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """Nearest bfloat16, ties to even, by its bits: XLA may remove a pair of casts, in the interpreter."""
    word = lax.bitcast_convert_type(x, jnp.uint32)
    word = word + (word >> 16 & jnp.uint32(1)) + jnp.uint32(0x7FFF) & jnp.uint32(0xFFFF0000)
    return lax.bitcast_convert_type(word, jnp.float32)


def _along_rows(signs, shape, layout: Callable):
    """An array of `shape` whose entries are the signs of their rows."""
    bits = [plgpu.broadcasted_iota(jnp.uint32, shape, axis, layout=layout()) for axis in range(_BITS)]
    row = functools.reduce(lambda high, low: high * jnp.uint32(2) + low, bits)
    negative = sum(1 << i for i, sign in enumerate(signs) if sign < 0)
    return jnp.where((jnp.uint32(negative) >> row & jnp.uint32(1)) == 1, jnp.float32(-1), jnp.float32(1))

"""The Mosaic GPU kernel that quantizes blocks of 16 consecutive values to NVFP4.

Blocks along the last axis of a row-major matrix lie one after the other in memory, so the kernel sees a matrix as a
list of blocks and needs rows and columns only as counters of the random bits. A warpgroup takes tiles of consecutive
blocks; one lane owns one block at a time, reads it as 16-byte vectors and writes its 16 codes as 8 bytes: nothing
crosses lanes.

    bfloat16   uint32[blocks, 2, 4]    a word holds two values, the even column in its low half
    float32    float32[blocks, 4, 4]

A list of blocks that is no multiple of a tile is covered by a last tile that starts earlier and repeats some blocks of
its neighbour: both write the same bytes.

The element multiplier e_b = min(1 / (s_b * (1/S_enc)), FLT_MAX) needs a correctly rounded division, and a GPU kernel
has only `rcp.approx`. A Newton step would repair it only where the compiler contracts 1 - d*r into a fused
multiply-add, and would spoil exact quotients where it does not (the interpreter). But s_b has three mantissa bits,
s_b = t 2^-k with t one of the eight scales of the top octave, and multiplying by a power of two commutes with rounding.
So XLA computes the eight reciprocals 1 / (t * (1/S_enc)) of a matrix in IEEE arithmetic and the kernel picks one and
multiplies it by 2^k: no approximate instruction is left. (It is exact while s_b/S_enc is a normal number, that is for
blocks with a largest magnitude above 2e-37, near where XLA:CPU and GPUs differ about subnormals anyway.)

Everything that decides a code comes from `fp4jax.numerics`. Products whose sum could be contracted into a fused
multiply-add are by powers of two, hence exact either way.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float32, Shaped, UInt8, UInt32

from fp4jax.numerics import NVFP4, bits, rounding

# Blocks a warpgroup holds in registers at once: 2 (bfloat16) or 1 (float32) of them a lane.
TILE = {jnp.dtype(jnp.uint32): 256, jnp.dtype(jnp.float32): 128}
# More tiles for each thread block amortize its start; fewer leave enough thread blocks to fill the GPU.
_MAX_TILES_PER_THREAD_BLOCK = 8
_MIN_THREAD_BLOCKS = 1024

_FLT_MAX = np.finfo(np.float32).max
_MANTISSA_BITS = 23
_EXPONENT = 0xFF << _MANTISSA_BITS
_WEYL = 0x9E3779B9  # of `fp4jax.numerics.bits`, where the draws are specified
_SCALE_MANTISSA_BITS = NVFP4.scale.mantissa_bits
_TOP_EXPONENT = math.frexp(NVFP4.scale.max)[1] - 1
_MANTISSAS = 2**_SCALE_MANTISSA_BITS
# The scales of the top octave, one for each mantissa (the last, NaN in E4M3, stands for its mantissa in other octaves).
TOP_SCALES = np.float32(2.0**_TOP_EXPONENT) * (1 + np.arange(_MANTISSAS, dtype=np.float32) / _MANTISSAS)


def quantize_block_list(
    x: Shaped[Array, "batch blocks groups 4"],
    factors: Float32[Array, "batch 9"],
    words: UInt32[Array, "batch 2"] | None,
    *,
    blocks_per_row: int,
    interpret: bool,
) -> tuple[Shaped[Array, "batch blocks groups"], UInt8[Array, "batch blocks"]]:
    """Quantizes lists of blocks, one list for each matrix.

    Args:
      x: uint32 pairs of bfloat16 (2 groups) or float32 (4 groups); at least `TILE` blocks.
      factors: for each matrix what multiplies a block's largest magnitude to give its scale, then the multiplier of
        the elements for each of `TOP_SCALES`.
      words: for each matrix the two words of its random stream; stochastic rounding exactly when they are given.
      blocks_per_row: blocks of one row, to find an element's row and column.
      interpret: run in the GPU interpreter, on any machine.

    Returns:
      The codes of each group (uint32 of 8 codes, or uint16 of 4) and the bytes of the block scales.
    """
    batch, blocks, groups, _ = x.shape
    tiles = pl.cdiv(blocks, TILE[x.dtype])
    tiles_each = int(np.clip(batch * tiles // _MIN_THREAD_BLOCKS, 1, _MAX_TILES_PER_THREAD_BLOCK))
    code_dtype = jnp.uint32 if groups == 2 else jnp.uint16
    stochastic = words is not None
    body = functools.partial(
        _stochastic_kernel if stochastic else _nearest_kernel, blocks_per_row=blocks_per_row, tiles=tiles_each
    )
    run = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((batch, blocks, groups), code_dtype),
            jax.ShapeDtypeStruct((batch, blocks), jnp.uint8),
        ),
        grid=(batch, pl.cdiv(tiles, tiles_each)),
        grid_names=("batch", "thread_block"),
        # No memory is both read and written, so the barriers around every load and store would only cost time.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        kernel_name="quantize_rows_stochastic" if stochastic else "quantize_rows_nearest",
    )
    return run(x, factors, words) if stochastic else run(x, factors)


def _nearest_kernel(x_ref, factors_ref, codes_ref, scales_ref, *, blocks_per_row, tiles):
    _kernel(x_ref, factors_ref, None, codes_ref, scales_ref, blocks_per_row, tiles)


def _stochastic_kernel(x_ref, factors_ref, words_ref, codes_ref, scales_ref, *, blocks_per_row, tiles):
    _kernel(x_ref, factors_ref, words_ref, codes_ref, scales_ref, blocks_per_row, tiles)


def _kernel(x_ref, factors_ref, words_ref, codes_ref, scales_ref, blocks_per_row, tiles):
    _, blocks, *group_shape = x_ref.shape
    tile = TILE[x_ref.dtype]
    b = lax.axis_index("batch")
    factors = [factors_ref[b, i] for i in range(1 + len(TOP_SCALES))]
    words = None if words_ref is None else (words_ref[b, 0], words_ref[b, 1])

    @pl.loop(0, tiles)
    def _(step):
        start = jnp.minimum((lax.axis_index("thread_block") * tiles + step) * tile, blocks - tile)
        here = pl.ds(start, tile)
        parts = _columns(plgpu.load(x_ref.at[b, here], layout=_layout(), optimized=False))
        largest = functools.reduce(jnp.maximum, [jnp.abs(part) for part in parts])
        scale, multiplier = _block_scale(jnp.max(jnp.max(largest, axis=2), axis=1), factors)
        multiplier = lax.broadcast_in_dim(multiplier, largest.shape, (0,))
        scaled = [part * multiplier for part in parts]
        if words is None:
            codes = [rounding.encode_nearest(v, NVFP4.element) for v in scaled]
        else:
            draws = _draws(words, start, (tile, *group_shape), len(parts), blocks_per_row)
            codes = [rounding.encode_stochastic(v, NVFP4.element, d) for v, d in zip(scaled, draws, strict=True)]
        plgpu.store(codes_ref.at[b, here], _pack(codes).astype(codes_ref.dtype), optimized=False)
        plgpu.store(scales_ref.at[b, here], scale, optimized=False)


@functools.cache
def _layout():
    """[blocks, groups, 4]: 4 warps of 32 lanes over consecutive blocks; groups in registers, the last axis a vector."""
    return plgpu.Layout.TILED(plgpu.Tiling(((128, 1, 4), (32, 1, 4))), warp_dims=(-6,), lane_dims=(-3,), vector_dim=-1)


def _columns(x):
    """Float32 values: one array for float32 input, the even and the odd columns for pairs of bfloat16."""
    if x.dtype == jnp.float32:
        return [x]
    even, odd = x << 16, x & jnp.uint32(0xFFFF0000)
    return [lax.bitcast_convert_type(half, jnp.float32) for half in (even, odd)]


def _block_scale(block_amax, factors):
    """Byte of the block scale and multiplier of the elements: `numerics.quantize.block_scales`."""
    encode, *reciprocals = factors
    byte = jnp.minimum(block_amax * encode, NVFP4.scale.max).astype(jnp.float8_e4m3fn)
    scale = lax.bitcast_convert_type(byte.astype(jnp.float32), jnp.uint32)
    for i in range(_SCALE_MANTISSA_BITS):
        bit = (scale & jnp.uint32(1 << (_MANTISSA_BITS - _SCALE_MANTISSA_BITS + i))) != 0
        pairs = zip(reciprocals[::2], reciprocals[1::2], strict=True)
        reciprocals = [jnp.where(bit, odd, even) for even, odd in pairs]
    exponent = scale & jnp.uint32(_EXPONENT)
    # 2^k, and infinity for the scale 0, whose multiplier is FLT_MAX.
    top = jnp.uint32(2 * 127 + _TOP_EXPONENT << _MANTISSA_BITS)
    power = jnp.where(exponent == 0, jnp.uint32(_EXPONENT), top - exponent)
    multiplier = jnp.minimum(reciprocals[0] * lax.bitcast_convert_type(power, jnp.float32), _FLT_MAX)
    return lax.bitcast_convert_type(byte, jnp.uint8), multiplier


def _draws(words, start, shape, parts, blocks_per_row):
    """`bits.draws` of the elements of a tile: one array for each part of `_columns`."""
    first, second = words
    tile, groups, vector = shape
    index = plgpu.broadcasted_iota(jnp.uint32, (tile,), 0, layout=_layout().reduce((1, 2)))
    index = index + start.astype(jnp.uint32)
    row = lax.div(index, jnp.full_like(index, blocks_per_row))
    a = bits.mix(row ^ first)
    b = bits.mix(a + second)
    column = (index - row * jnp.uint32(blocks_per_row)) * jnp.uint32(NVFP4.block)
    column, a, b = (lax.broadcast_in_dim(t, shape, (0,)) for t in (column, a, b))
    group, lane = (plgpu.broadcasted_iota(jnp.uint32, shape, axis, layout=_layout()) for axis in (1, 2))
    column = column + group * jnp.uint32(vector * parts) + lane * jnp.uint32(parts)
    h = bits.mix(a + (column >> 1) * jnp.uint32(_WEYL) ^ b)
    if parts == 2:
        return [h & jnp.uint32(0xFFFF), h >> 16]
    # A vector cannot be taken apart here, so both columns of a pair ask for the hash; the compiler computes it once.
    return [jnp.where(column & 1 == 1, h >> 16, h & jnp.uint32(0xFFFF))]


def _pack(codes):
    """The codes of each group in one word, the first in the lowest 4 bits."""
    lane = plgpu.broadcasted_iota(jnp.uint32, codes[0].shape, 2, layout=_layout())
    word = functools.reduce(jnp.bitwise_or, [code << 4 * i for i, code in enumerate(codes)])
    return jnp.sum(word << lane * jnp.uint32(4 * len(codes)), axis=2)

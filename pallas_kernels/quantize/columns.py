"""The Mosaic GPU kernel for blocks of 16 along the rows: a lane owns neighbouring columns, 16 rows of them at a time.

    bfloat16   uint32[groups, rows, columns / 2]    a word holds two values, the even column in its low half
    float32    float32[groups, rows, columns]

A warpgroup takes a strip of 128 lanes × `VECTOR` words and walks down its rows, 16 at a time: the 16 values of a block
lie in 16 registers of one lane, so its maximum, its Hadamard transform and its packing cross no lanes, and the lanes of
a warp read neighbouring words. Two rows' codes make a byte; the bytes of the columns of one word are written together.
A group is one sequence: matrices of a batch have `groups / batch` of them.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float32, Shaped, UInt32

from fp4jax.numerics import NVFP4
from fp4jax.numerics.hadamard import SIGNS
from pallas_kernels import compat
from pallas_kernels.quantize import elements

VECTOR = 2
STRIP = 128 * VECTOR
"""Words of a strip; arrays have that many at least, and a multiple of `VECTOR`."""

_ROWS = NVFP4.block
# More blocks of rows for each thread block amortize its start; fewer leave enough thread blocks to fill the GPU.
_MAX_STEPS_PER_THREAD_BLOCK = 8
_MIN_THREAD_BLOCKS = 1024
_LAYOUT = functools.partial(compat.tiled_layout, ((STRIP,), (32 * VECTOR,), (VECTOR,)), (-3,), (-2,), -1)


def quantize(
    x: Shaped[Array, "groups rows words"],
    factors: Float32[Array, "batch factors"],
    centers: tuple[Float32[Array, "means words"], ...] = (),
    hashes: tuple[UInt32[Array, "groups rows"], ...] = (),
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
      hadamard: transform each block first, as `numerics.hadamard` does with fixed signs.
      interpret: run in the GPU interpreter, on any machine.

    Returns:
      Codes, two rows of each column of a word (uint16 for pairs, uint8), and the bytes of the block scales likewise.
    """
    groups, rows, words = x.shape
    out_dtype = jnp.uint16 if x.dtype == jnp.uint32 else jnp.uint8
    body = functools.partial(_quantize_kernel, centered=bool(centers), stochastic=bool(hashes), hadamard=hadamard)
    name = "_".join(["quantize_columns", *["stochastic"] * bool(hashes), *["hadamard"] * hadamard])
    run = _strips(
        body,
        x.shape,
        (
            jax.ShapeDtypeStruct((groups, rows // 2, words), out_dtype),
            jax.ShapeDtypeStruct((groups, rows // _ROWS, words), out_dtype),
        ),
        name + "_centered" * bool(centers),
        interpret,
    )
    return run(x, factors, *centers, *hashes)


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
    return _strips(body, x.shape, out, "hadamard_maxima" + "_centered" * bool(centers), interpret)(x, *centers)[0]


def _steps_each(shape) -> int:
    groups, rows, words = shape
    return int(
        np.clip(groups * rows // _ROWS * pl.cdiv(words, STRIP) // _MIN_THREAD_BLOCKS, 1, _MAX_STEPS_PER_THREAD_BLOCK)
    )


def _strips(body, shape, out_type, name: str, interpret: bool):
    groups, rows, words = shape
    steps = _steps_each(shape)
    return plgpu.kernel(
        functools.partial(body, steps=steps),
        out_type=out_type,
        grid=(groups, pl.cdiv(rows // _ROWS, steps), pl.cdiv(words, STRIP)),
        grid_names=("groups", "rows", "columns"),
        # No memory is both read and written, so the barriers around every load and store would only cost time.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        kernel_name=name,
    )


def _quantize_kernel(x_ref, factors_ref, *refs, centered: bool, stochastic: bool, hadamard: bool, steps: int):
    *inputs, codes_ref, scales_ref = refs
    parts = _parts(x_ref)
    center_refs, hash_refs = (inputs[:parts], inputs[parts:]) if centered else ((), inputs)
    group, across = lax.axis_index("groups"), _across(x_ref)
    matrix = group // (x_ref.shape[0] // factors_ref.shape[0])
    factors = [factors_ref[matrix, i] for i in range(elements.FACTORS)]
    centers = _load_centers(center_refs, group, across, x_ref)
    lane = plgpu.broadcasted_iota(jnp.uint32, (STRIP,), 0, layout=_LAYOUT()) + across.start.astype(jnp.uint32)

    @pl.loop(0, steps)
    def _(step):
        block = _block_index(x_ref, step, steps)
        columns = _block(x_ref, group, block, across, centers, hadamard)
        codes, scales = [], []
        draws = _draws(hash_refs, group, block, lane, parts) if stochastic else [None] * parts
        for rows, drawn in zip(columns, draws, strict=True):
            scale, multiplier = elements.block_scale(_largest(rows), factors)
            scales.append(scale.astype(jnp.uint32))
            codes.append(([row * multiplier for row in rows], drawn))
        for i in range(0, _ROWS, 2):
            values = [row for rows, _ in codes for row in rows[i : i + 2]]
            drawn = [d for _, drawn in codes for d in drawn[i : i + 2]] if stochastic else None
            word = elements.pack(values, drawn)
            compat.store(
                codes_ref.at[group, block * (_ROWS // 2) + i // 2, across], word.astype(codes_ref.dtype), _LAYOUT()
            )
        word = functools.reduce(jnp.bitwise_or, [scale << 8 * i for i, scale in enumerate(scales)])
        compat.store(scales_ref.at[group, block, across], word.astype(scales_ref.dtype), _LAYOUT())


def _maxima_kernel(x_ref, *refs, centered: bool, steps: int):
    *center_refs, out_ref = refs
    group, across = lax.axis_index("groups"), _across(x_ref)
    centers = _load_centers(center_refs, group, across, x_ref)

    def step(i, largest):
        columns = _block(x_ref, group, _block_index(x_ref, i, steps), across, centers, hadamard=True)
        return functools.reduce(jnp.maximum, [_largest(rows) for rows in columns], largest)

    zero = plgpu.layout_cast(jnp.zeros((STRIP,), jnp.float32), _LAYOUT())
    compat.store(out_ref.at[group, lax.axis_index("rows"), across], lax.fori_loop(0, steps, step, zero), _LAYOUT())


def _parts(x_ref) -> int:
    return 2 if x_ref.dtype == jnp.uint32 else 1


def _across(x_ref):
    """The words of this thread block; the last strip starts earlier where the width is no multiple."""
    return pl.ds(jnp.minimum(lax.axis_index("columns") * STRIP, x_ref.shape[2] - STRIP), STRIP)


def _block_index(x_ref, step, steps: int):
    """The block of rows to take; past the end the last one once more: it writes the same bytes."""
    return jnp.minimum(lax.axis_index("rows") * steps + step, x_ref.shape[1] // _ROWS - 1)


def _load_centers(refs, group, across, x_ref):
    return [compat.load(ref.at[group // (x_ref.shape[0] // ref.shape[0]), across], _LAYOUT()) for ref in refs]


def _block(x_ref, group, block, across, centers, hadamard: bool) -> list[list[Float32[Array, " strip"]]]:
    """For each column of a word the 16 values of its block."""
    loaded = [compat.load(x_ref.at[group, block * _ROWS + i, across], _LAYOUT()) for i in range(_ROWS)]
    columns = list(zip(*map(elements.bfloat16_pair, loaded), strict=True)) if _parts(x_ref) == 2 else [loaded]
    if centers:
        columns = [[row - center for row in rows] for rows, center in zip(columns, centers, strict=True)]
    return [_hadamard(rows) if hadamard else list(rows) for rows in columns]


def _hadamard(rows: Sequence[Float32[Array, "..."]]) -> list[Float32[Array, "..."]]:
    """`numerics.hadamard` over a list of 16: its order of additions, its rounding to bfloat16."""
    rows = [row * np.float32(sign) for row, sign in zip(rows, SIGNS, strict=True)]
    width = 1
    while width < len(rows):
        for start in range(0, len(rows), 2 * width):
            even, odd = rows[start : start + width], rows[start + width : start + 2 * width]
            rows[start : start + width] = [e + o for e, o in zip(even, odd, strict=True)]
            rows[start + width : start + 2 * width] = [e - o for e, o in zip(even, odd, strict=True)]
        width *= 2
    return [(row * np.float32(len(rows) ** -0.5)).astype(jnp.bfloat16).astype(jnp.float32) for row in rows]


def _largest(rows):
    return functools.reduce(jnp.maximum, [jnp.abs(row) for row in rows])


def _draws(hash_refs, group, block, lane, parts: int) -> list[list[UInt32[Array, " strip"]]]:
    """For each column of a word the draws of the 16 values of its block."""
    pair = lane if parts == 2 else lane >> 1
    draws = []
    for i in range(_ROWS):
        a, b = (ref[group, block * _ROWS + i] for ref in hash_refs)
        even, odd = elements.halves(elements.pair_hash(a, b, pair))
        draws.append([even, odd] if parts == 2 else [jnp.where(lane & 1 == 1, odd, even)])
    return list(zip(*draws, strict=True))

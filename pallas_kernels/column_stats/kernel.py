"""The Mosaic GPU kernel that reads a matrix once and gives sum, minimum and maximum of every column.

A thread block of one warpgroup takes a strip of columns and a stretch of 2^k rows. The lanes lie side by side over the
columns, so that a warp reads consecutive memory and nothing crosses lanes; rows are read eight at a time. Each thread
block writes the statistics of its stretch, and XLA combines them: no atomics, the same bits in every run.

The sum is the balanced binary tree of `fp4jax.numerics.column_stats`. Eight rows are a subtree in registers; the sums
of eight that follow one another are added like a binary counter: `pending[l]` waits for its right neighbour of the same
size, 8 * 2^l rows, and a step that completes pairs adds them from the lowest level up.

A last strip that would reach beyond the columns starts earlier instead, and repeats what its neighbour writes. Rows
beyond the end are read from the last row, which changes no minimum and no maximum, and count as zero in the sum.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from pallas_kernels import compat, launch, tree

LANES = 128
ROWS = 8  # in flight
_MIN_THREAD_BLOCKS = 512  # about four for each multiprocessor
MAX_LEVELS = 5  # 256 rows: more would save little of the 12 bytes that a thread block writes for each column
_MIN_LEVELS = 2  # 32 rows
_MAX_VECTOR_BYTES = 16
MIN_VECTOR = 2  # columns; narrower loads than 4 bytes are not served


def vector_for(columns: int, itemsize: int) -> int | None:
    """Columns of a lane: the most whose strips tile the columns, else the most that fit; None: pad the columns."""
    vectors = [v for v in (8, 4, MIN_VECTOR) if v * itemsize <= _MAX_VECTOR_BYTES and columns % v == 0]
    fitting = [v for v in vectors if columns >= LANES * v]
    tiling = [v for v in fitting if columns % (LANES * v) == 0]
    return next(iter(tiling or fitting), None)


def levels_for(batch: int, rows: int, strips: int) -> int:
    """log2 of the steps of eight rows in a stretch: long ones, as far as enough thread blocks remain for a GPU."""
    levels = MAX_LEVELS
    while levels > _MIN_LEVELS and batch * strips * pl.cdiv(rows, ROWS << levels) < _MIN_THREAD_BLOCKS:
        levels -= 1
    return levels


def partial_stats(
    x: Float[Array, "batch rows columns"], *, vector: int, levels: int, interpret: bool
) -> tuple[Float32[Array, "batch parts columns"], ...]:
    """Sums, minima and maxima over stretches of 8 * 2^levels rows; `vector` columns a lane."""
    batch, rows, columns = x.shape
    parts, strips = pl.cdiv(rows, ROWS << levels), pl.cdiv(columns, LANES * vector)
    run = launch.kernel(
        functools.partial(_kernel, vector=vector, levels=levels, strips=strips),
        out_type=(jax.ShapeDtypeStruct((batch, parts, columns), jnp.float32),) * 3,
        grid={"batch": batch, "thread_block": parts * strips},
        name="column_stats",
        interpret=interpret,
    )
    return run(x)


def _kernel(x_ref, sums_ref, minima_ref, maxima_ref, *, vector, levels, strips):
    _, rows, columns = x_ref.shape
    width, layout = LANES * vector, _layout(vector)
    b, thread_block = lax.axis_index("batch"), lax.axis_index("thread_block")
    part = lax.div(thread_block, strips)
    strip = pl.ds(jnp.minimum((thread_block - part * strips) * width, columns - width), width)
    first = part * (ROWS << levels)
    zero, infinity = (plgpu.layout_cast(jnp.full((width,), value, jnp.float32), layout) for value in (0.0, np.inf))
    ragged = rows % (ROWS << levels) != 0

    def step(i, carry):
        *pending, _, minimum, maximum = carry
        start = first + i * ROWS
        at = [start + r for r in range(ROWS)]
        here = [jnp.minimum(row, rows - 1) for row in at] if ragged else at
        loaded = [compat.load(x_ref.at[b, row, strip], layout) for row in here]
        values = [value.astype(jnp.float32) for value in loaded]
        minimum = functools.reduce(jnp.minimum, values, minimum)
        maximum = functools.reduce(jnp.maximum, values, maximum)
        if ragged:
            values = [tree.choose(row < rows, value, zero) for row, value in zip(at, values, strict=True)]
        return *tree.count_up(i, pending, _tree(values)), minimum, maximum

    *_, total, minimum, maximum = lax.fori_loop(0, 1 << levels, step, (*[zero] * levels, zero, infinity, -infinity))
    for ref, value in ((sums_ref, total), (minima_ref, minimum), (maxima_ref, maximum)):
        compat.store(ref.at[b, part, strip], value, layout)


def _tree(values):
    while len(values) > 1:
        values = [left + right for left, right in zip(values[::2], values[1::2], strict=True)]
    return values[0]


@functools.cache
def _layout(vector: int):
    """[columns]: four warps of 32 lanes side by side, `vector` columns each."""
    return compat.tiled_layout(((LANES * vector,), (32 * vector,), (vector,)), (-3,), (-2,), -1)

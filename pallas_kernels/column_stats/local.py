"""`column_stats` on one device: of a whole array, or of the stretches of rows of a shard."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from fp4jax.numerics.column_stats import stats_shape, tree_sum
from pallas_kernels.column_stats import kernel

Stats = tuple[Float32[Array, "..."], Float32[Array, "..."], Float32[Array, "..."]]
"""Sums, minima and maxima."""


def column_stats(x: Float[Array, "..."], *, batch_dims: int, interpret: bool) -> Stats:
    """Of every column over all rows of its matrix, [*batch, 1, ..., 1, features]."""
    rows = x.reshape(math.prod(x.shape[:batch_dims]), -1, x.shape[-1])
    sums, minima, maxima = _partial_stats(rows, kernel.MAX_LEVELS, interpret)
    shape = stats_shape(x.shape, batch_dims)
    return tuple(part.reshape(shape) for part in (tree_sum(sums), jnp.min(minima, axis=1), jnp.max(maxima, axis=1)))


def stretches(x: Float[Array, "runs rows columns"], *, interpret: bool) -> Stats:
    """Sums over stretches of 2^k rows, k as large as whole stretches fill a run: subtrees of `numerics.column_stats`.

    Args:
      x: runs of a multiple of 8 rows that follow one another in the whole array.

    Returns:
      Sums [runs, stretches, columns]; minima and maxima over all rows of a run, [runs, 1, columns].
    """
    runs, rows, columns = x.shape
    whole = (rows & -rows) // kernel.ROWS  # the largest power of two that divides the rows, in steps of the kernel
    sums, minima, maxima = _partial_stats(x, min(kernel.MAX_LEVELS, whole.bit_length() - 1), interpret)
    stretch = whole * kernel.ROWS
    sums = tree_sum(sums.reshape(runs, rows // stretch, -1, columns))
    return sums, jnp.min(minima, axis=1, keepdims=True), jnp.max(maxima, axis=1, keepdims=True)


def _partial_stats(rows, most_levels: int, interpret: bool) -> Stats:
    """`kernel.partial_stats`, columns padded where a strip needs it."""
    batch, count, columns = rows.shape
    vector = kernel.vector_for(columns, rows.dtype.itemsize)
    if vector is None:
        vector = kernel.MIN_VECTOR
        padded = max(columns + columns % vector, kernel.LANES * vector)
        rows = jnp.pad(rows, [(0, 0), (0, 0), (0, padded - columns)])
    strips = -(-rows.shape[-1] // (kernel.LANES * vector))
    levels = min(most_levels, kernel.levels_for(batch, count, strips))
    parts = kernel.partial_stats(rows, vector=vector, levels=levels, interpret=interpret)
    return tuple(part[..., :columns] for part in parts)

"""Sum, minimum and maximum of every column in one read, and what the mean split needs of them.

The order of the sum is part of the definition, so that any implementation and any split of the rows over devices gives
the same bits: a balanced binary tree over the rows in index order, with zeros behind the last one,

    ((x0 + x1) + (x2 + x3)) + ((x4 + x5) + (x6 + 0))        for 7 rows.

Neighbouring stretches of 2^k rows that begin at a multiple of 2^k are subtrees: each can be summed by another thread
block or device, and the partial sums are added by the same rule. The error grows with log2(rows).
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32


class ColumnStats(NamedTuple):
    """Of every column over all rows of its matrix; float32, [*batch, 1, ..., 1, features]."""

    sum: Float32[Array, "*stats"]
    minimum: Float32[Array, "*stats"]
    maximum: Float32[Array, "*stats"]

    def mean(self, rows: int) -> Float32[Array, "*stats"]:
        """The mean over `rows` rows, correctly rounded from the sum."""
        # The divisor depends on the data, to no effect: XLA would multiply by the reciprocal of a constant.
        return self.sum / jnp.where(self.sum != 0, np.float32(rows), np.float32(1))

    def residual_amax(self, center: Float32[Array, "*stats"], batch_dims: int = 0) -> Float32[Array, "*amax"]:
        """max |x - center| of each matrix, exactly as from the float32 residual itself, without another read of x.

        Rounding is monotone, so the largest residual of a column is that of its minimum or its maximum, for any
        center. [*batch, 1, ..., 1].
        """
        largest = jnp.maximum(self.maximum - center, center - self.minimum)
        return jnp.max(largest, axis=tuple(range(batch_dims, largest.ndim)), keepdims=True)


def column_stats(x: Float[Array, "*shape"], batch_dims: int = 0) -> ColumnStats:
    """Sum in the order above, minimum and maximum of every column of [*batch, *tokens, features], in float32.

    The rows are all tokens of a matrix, in row-major order. A sum of zero is +0; of a minimum or maximum that is zero
    the sign is not specified. A column that holds a NaN has a NaN as its sum, and so as its mean; its minimum and
    maximum are not specified then (reductions of XLA:CPU pass over NaN where they are vectorized).

    Args:
      x: bfloat16 or float32, with at least one token axis, and not empty.
      batch_dims: leading axes that count independent matrices.

    Raises:
      ValueError: no token axis, or an empty array.
    """
    check_shape(x.shape, batch_dims)
    rows = x.reshape(*x.shape[:batch_dims], -1, x.shape[-1]).astype(jnp.float32)
    shape = stats_shape(x.shape, batch_dims)
    parts = (tree_sum(rows), jnp.min(rows, axis=-2), jnp.max(rows, axis=-2))
    return ColumnStats(*(part.reshape(shape) for part in parts))


def tree_sum(parts: Float32[Array, "*batch rows features"]) -> Float32[Array, "*batch features"]:
    """Sum over the rows in the order above; the rows may be partial sums of stretches of 2^k rows. Zero is +0."""
    while (rows := parts.shape[-2]) > 1:
        if rows % 2:
            parts = jnp.pad(parts, [(0, 0)] * (parts.ndim - 2) + [(0, 1), (0, 0)])
        parts = pair_sums(parts)
    total = parts[..., 0, :]
    return jnp.where(total == 0, jnp.zeros_like(total), total)


def added_up(parts: Float32[Array, "*batch rows features"], shards: int = 1) -> Float32[Array, "*batch fewer features"]:
    """Levels of the tree, as many as each of the `shards` that share the rows evenly can do with its own."""
    while parts.shape[-2] > shards and parts.shape[-2] % (2 * shards) == 0:
        parts = pair_sums(parts)
    return parts


def pair_sums(parts: Float32[Array, "*batch rows features"]) -> Float32[Array, "*batch half features"]:
    """One level of the tree: the sums of neighbouring rows, of which there are an even number.

    Written as a reshape, which devices that share the rows do each with its own.
    """
    pairs = parts.reshape(*parts.shape[:-2], parts.shape[-2] // 2, 2, parts.shape[-1])
    return pairs[..., 0, :] + pairs[..., 1, :]


def check_shape(shape: tuple[int, ...], batch_dims: int) -> None:
    """Raises ValueError for an empty array, or one without a token axis behind its batch axes."""
    if 0 in shape:
        raise ValueError(f"column_stats needs a non-empty array, got shape {shape}")
    if not 0 <= batch_dims <= len(shape) - 2:
        raise ValueError(f"column_stats takes [*batch, *tokens, features]: got shape {shape}, batch_dims={batch_dims}")


def stats_shape(shape: tuple[int, ...], batch_dims: int) -> tuple[int, ...]:
    """`shape` with its token axes of size 1."""
    return (*shape[:batch_dims], *[1] * (len(shape) - batch_dims - 1), shape[-1])

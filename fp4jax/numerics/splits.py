"""Mean-residual splitting: X = 1 c + (X - 1 c) for any row c, over the axes that hold tokens.

Source: "The Curse and Blessing of Mean Bias in FP4-Quantized LLM Training", arXiv 2603.10444, equations 9-12. The
mean is taken over real rows only; masked rows belong neither to the mean nor to the residual.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32

from fp4jax.numerics.blocks import Shape
from fp4jax.numerics.column_stats import added_up, tree_sum

MOST_STRETCHES = 64
"""Parts of a sequence whose sums are added in a fixed order: as many devices may share it."""

_BLOCK = 16

Stage = tuple[int, Callable[[Float32[Array, "..."]], Float32[Array, "..."]]]
"""A number of groups of devices, and what gives each group the partial sums [..., partials, features] of all its
devices: the group's sum is then one row, where those of far devices would be many.
"""


def column_mean(
    x: Float[Array, "*shape"],
    axes: tuple[int, ...],
    row_mask: Bool[Array, "*rows"] | None = None,
    shards: int = 1,
    gather: Callable[[Float32[Array, "..."]], Float32[Array, "..."]] = lambda partial: partial,
    sequence_shards: int = 1,
    stages: Sequence[Stage] = (),
) -> Float32[Array, "*mean"]:
    """Mean of every column over the rows along `axes` (kept with size 1), accumulated in float32.

    The order of the sum does not depend on the devices that share the rows: the last of the axes is cut into stretches
    (of equal length, in whole blocks of 16, as many as a power of two up to MOST_STRETCHES allows), each is summed, and
    the partial sums are added in a balanced binary tree over their index, row-major over `axes`.

    Args:
      x: [*batch, *tokens, features].
      axes: the token axes to average over.
      row_mask: [*batch, *tokens], True for real rows; without a real row the mean is zero.
      shards: how many devices share the rows, along all axes but the last; changes no bit.
      gather: called with partial sums [..., partials, features] when each device has added up its own.
      sequence_shards: how many devices share the last of the axes; changes no bit either.
      stages: what devices along all axes but the last exchange before `gather`; changes no bit.
    """
    x = mask_rows(x.astype(jnp.float32), row_mask)
    total = _ordered_sum(x, axes, shards, gather, sequence_shards, stages)
    # XLA multiplies by the reciprocal of a constant divisor when jitted: this one depends on the data, to no effect.
    return total / jnp.where(total != 0, row_count(x.shape, axes, row_mask), np.float32(1))


def _ordered_sum(x, axes: tuple[int, ...], shards: int, gather, sequence_shards: int, stages: Sequence[Stage]):
    """The sum described in `column_mean`, kept with size 1 along `axes`."""
    axes = tuple(sorted(axis % x.ndim for axis in axes))
    rows = [x.shape[axis] for axis in axes]
    if axes != tuple(range(axes[0], x.ndim - 1)) or not all(isinstance(size, int) for size in rows):
        return jnp.sum(x, axis=axes, keepdims=True)  # a symbolic size (`jax.export`), or rows that are not neighbours
    stretches = _stretches(rows[-1])
    cut = x.reshape(*x.shape[:-2], stretches, rows[-1] // stretches, x.shape[-1])
    parts, share_it = jnp.sum(cut, axis=-2), max(shards, sequence_shards)
    if len(axes) > 1 and sequence_shards > 1:
        # Of a sequence first: stretches are a power of two, so the tree over all of them begins within each sequence.
        parts, share_it = gather(added_up(parts, sequence_shards)), shards
    parts = added_up(parts.reshape(*x.shape[: axes[0]], -1, x.shape[-1]), share_it)
    for groups, gather_within in stages:
        parts = added_up(gather_within(parts), groups)
    total = tree_sum(gather(parts) if parts.shape[-2] > 1 else parts)
    return total.reshape(*x.shape[: axes[0]], *[1] * len(axes), x.shape[-1])


def _stretches(rows: int) -> int:
    blocks = rows // _BLOCK if rows % _BLOCK == 0 else 1
    return min(blocks & -blocks, MOST_STRETCHES) if blocks else 1


def row_count(shape: Shape, axes: tuple[int, ...], row_mask=None) -> Float32[Array, "..."]:
    """Number of real rows along `axes` (at least 1 where a mask is given), broadcastable to the mean."""
    if row_mask is None:
        count = 1
        for axis in axes:
            count *= shape[axis]
        return jnp.full([1] * len(shape), count, jnp.float32)
    return jnp.maximum(jnp.sum(row_mask[..., None].astype(jnp.float32), axis=axes, keepdims=True), 1.0)


def residual(
    x: Float[Array, "*shape"], center: Float32[Array, "*mean"], row_mask: Bool[Array, "*rows"] | None = None
) -> Float32[Array, "*shape"]:
    """X - 1 c in float32; masked rows are zero."""
    return mask_rows(x.astype(jnp.float32) - center, row_mask)


def mask_rows(x: Float[Array, "*shape"], row_mask: Bool[Array, "*rows"] | None) -> Float[Array, "*shape"]:
    """`x` with its masked rows set to zero."""
    return x if row_mask is None else jnp.where(row_mask[..., None], x, jnp.zeros((), x.dtype))

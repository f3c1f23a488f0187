"""Mean-residual splitting: X = 1 c + (X - 1 c) for any row c, over the axes that hold tokens.

Source: "The Curse and Blessing of Mean Bias in FP4-Quantized LLM Training", arXiv 2603.10444, equations 9-12. The
mean is taken over real rows only; masked rows belong neither to the mean nor to the residual.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32

from fp4jax.numerics.blocks import Shape


def column_mean(
    x: Float[Array, "*shape"], axes: tuple[int, ...], row_mask: Bool[Array, "*rows"] | None = None
) -> Float32[Array, "*mean"]:
    """Mean of every column over the rows along `axes` (kept with size 1), accumulated in float32.

    Args:
      x: [*batch, *tokens, features].
      axes: the token axes to average over.
      row_mask: [*batch, *tokens], True for real rows; without a real row the mean is zero.
    """
    x = mask_rows(x.astype(jnp.float32), row_mask)
    total = jnp.sum(x, axis=axes, keepdims=True)
    # XLA multiplies by the reciprocal of a constant divisor when jitted: this one depends on the data, to no effect.
    return total / jnp.where(total != 0, row_count(x.shape, axes, row_mask), np.float32(1))


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

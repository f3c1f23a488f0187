"""Sums over the rows of a quantized array, in an order that is part of the definition.

The 16 values of a block are multiples of 1/2 up to 6 and its scale has 4 significant bits: element × scale summed over
a block is exact in float32. The blocks of a sequence are added in the tree of `numerics.column_stats`, in index order,
then the sequences of a matrix in the same way, and the float32 scale multiplies the sum.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float32

from fp4jax.numerics import rounding
from fp4jax.numerics.blocks import blocked_shape
from fp4jax.numerics.column_stats import tree_sum
from fp4jax.numerics.formats import NVFP4
from fp4jax.numerics.qtensor import QTensor


def column_sums(q: QTensor, batch_dims: int = 0) -> Float32[Array, "*sums"]:
    """Sums of the represented values over all tokens of each matrix, [*batch, 1, ..., 1, features].

    A sum of zero is +0; a block that is not finite makes its column so.

    Args:
      q: NVFP4 in 1x16 blocks along the last axis but one; [*batch, *tokens, features] in logical shape.
      batch_dims: leading axes that count independent matrices, as when it was quantized.

    Raises:
      ValueError: q is quantized in another way.
    """
    check_blocks(q)
    elements = rounding.decode(q.element_codes, NVFP4.element)
    blocks = jnp.sum(elements.reshape(blocked_shape(elements.shape, (-2,), NVFP4.block)), axis=-2)
    of_sequences = tree_sum(blocks * rounding.decode_scale(q.scales, NVFP4.scale))
    *lead, width = of_sequences.shape
    total = tree_sum(of_sequences.reshape(*lead[:batch_dims], -1, width))
    return total.reshape(*lead[:batch_dims], *[1] * (elements.ndim - batch_dims - 1), width) * q.tensor_scale


def check_blocks(q: QTensor) -> None:
    """Raises ValueError unless q is NVFP4 in 1x16 blocks along the last axis but one."""
    if q.format != NVFP4 or q.axis != -2 or [axis for axis, _ in q.blocked] != [-2]:
        raise ValueError(f"column_sums takes NVFP4 in 1x16 blocks along axis -2, got {q.format}, blocked {q.blocked}")

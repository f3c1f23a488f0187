"""`column_sums` on one device, of codes and scales as `QTensor` has them."""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, UInt8

from fp4jax.numerics import NVFP4
from fp4jax.numerics.column_stats import tree_sum
from pallas_kernels.column_sums import kernel


def column_sums(
    codes: UInt8[Array, "..."], scales: UInt8[Array, "..."], *, batch_dims: int, interpret: bool
) -> Float32[Array, "..."]:
    """Sums of element × block scale over all tokens, [*batch, 1, ..., 1, features].

    Args:
      codes: [*batch, *tokens, features], two rows a byte.
      scales: [*batch, *tokens, features], one row for each block.
    """
    *lead, blocks, width = scales.shape
    groups, batch = math.prod(lead), math.prod(lead[:batch_dims])
    code_words, scale_words = (_words(part.reshape(groups, -1, width)) for part in (codes, scales))
    code_words = code_words.reshape(groups, blocks, 2, 2, 2, -1)
    sums = jnp.stack(kernel.partial_sums(code_words, scale_words, interpret=interpret), axis=-1)
    of_sequences = tree_sum(sums.reshape(*sums.shape[:2], -1))
    sums = tree_sum(of_sequences.reshape(batch, groups // batch, -1))[:, :width]
    return sums.reshape(*lead[:batch_dims], *[1] * (scales.ndim - batch_dims - 1), width)


PACKED_BLOCK = NVFP4.block // 2
"""Rows of bytes that hold the codes of a block."""


def _words(part):
    """uint32 words of 4 neighbouring columns' bytes, at least a strip of them."""
    width = part.shape[-1]
    missing = max(width + -width % kernel.COLUMNS, kernel.STRIP * kernel.COLUMNS) - width
    part = jnp.pad(part, [(0, 0), (0, 0), (0, missing)]) if missing else part
    return lax.bitcast_convert_type(part.reshape(*part.shape[:-1], -1, kernel.COLUMNS), jnp.uint32)

"""EDEN's correction: groups of a rotated vector are rescaled so that quantization to nearest is unbiased.

For x = H D y with random signs D, the nearest quantized q of x shrinks it; (x·x / x·q) q does not, in the mean over the
signs, and costs less variance than stochastic rounding of every element. The factor goes into the block scales, which
are rounded once more, stochastically, so that they stay unbiased (MS-EDEN, arXiv 2601.22813).
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, UInt8, UInt32

from fp4jax.numerics import bits, rounding
from fp4jax.numerics.formats import Format


def corrected_scales(
    scaled_blocks: Float32[Array, "..."],
    codes: UInt32[Array, "..."],
    scales: UInt8[Array, "..."],
    axis: int,
    group: int,
    format: Format,
    batch_dims: int,
    words: UInt32[Array, "2"] | None,
) -> UInt8[Array, "..."]:
    """The bytes of the rescaled block scales.

    Args:
      scaled_blocks: x × S_enc in its blocked shape [..., blocks, block, ...], so that code × scale approximates it.
      codes, scales: its codes to nearest, and the bytes of the scales that gave them, both in blocked shape.
      axis: the position of `blocks`.
      group: elements that share a correction: the width of the rotation.
      words: random words; None rounds the corrected scales to nearest.
    """
    decoded = rounding.decode_scale(scales, format.scale)
    quantized = rounding.decode(codes, format.element) * decoded
    norm, product = (_over_groups(scaled_blocks * other, axis, group) for other in (scaled_blocks, quantized))
    correction = jnp.where(product > 0, norm / jnp.where(product > 0, product, 1), 1.0)
    correction = jnp.repeat(correction, group // scaled_blocks.shape[axis + 1], axis=axis)
    correction = lax.slice_in_dim(correction, 0, decoded.shape[axis], axis=axis)  # the last group may be short
    corrected = jnp.minimum((decoded * correction).squeeze(axis + 1), format.scale.max)
    if words is None:
        return rounding.encode_scale(corrected, format.scale)
    draws = bits.matrix_draws(words, corrected.shape, batch_dims)
    return rounding.encode_scale_stochastic(corrected, format.scale, draws)


def _over_groups(x, axis: int, group: int):
    """Sums over groups: [..., blocks, block, ...] → [..., groups, 1, ...]."""
    block = x.shape[axis + 1]
    sums = jnp.sum(x, axis=axis + 1)
    sums = jnp.pad(sums, [(0, -size % (group // block) if i == axis else 0) for i, size in enumerate(sums.shape)])
    grouped = sums.reshape(*sums.shape[:axis], -1, group // block, *sums.shape[axis + 1 :])
    return jnp.expand_dims(jnp.sum(grouped, axis=axis + 1), axis + 1)

"""Sums and counts over a quantized gradient: what travels as the cotangent of `probe`.

Only sums, so that microbatches and scanned layers may add them up; ratios are taken by whoever reads them.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32

from fp4jax.numerics import QTensor, column_mean, hadamard, residual, row_count
from fp4jax.operands import Part, Prepared, dequantize, low_rank_product, mean_axes
from fp4jax.recipes import Center, MeanSplit, Recipe

# Energies are sums of squares; "noise" is the energy of a residual's quantization error, in the transformed domain
# where the operand has a Hadamard transform. The four code and scale counts are of the dgrad copy.
GRADIENT_STATISTICS = (
    "rows",
    "energy",
    "mean_energy",
    "dgrad_noise",
    "wgrad_noise",
    "zero_codes",
    "largest_codes",
    "zero_scales",
    "largest_scales",
)


def gradient_statistics(d, prepared: Prepared, recipe: Recipe, batch_dims: int, row_mask) -> Float32[Array, "*batch s"]:
    """The statistics of one output gradient [*batch, *tokens, N] and its prepared copies, in the order above.

    Counts of codes and scales are zero for a copy in high precision; so is its noise.
    """
    axes = tuple(range(batch_dims, d.ndim))
    d = d.astype(jnp.float32)
    rows = jnp.ones(d.shape[:-1], jnp.float32) if row_mask is None else row_mask.astype(jnp.float32)
    rows = jnp.sum(rows, axis=axes[:-1])
    parts = (prepared.forward, prepared.backward)
    mean_energy = jnp.zeros_like(rows)
    split = recipe.dgrad.lhs.split or recipe.wgrad.rhs.split
    if isinstance(split, MeanSplit):
        mean = dequantize(next(part.mean for part in parts if part.mean is not None))
        count = row_count(d.shape, mean_axes(split, d.ndim, batch_dims), row_mask)
        mean_energy = jnp.sum(jnp.square(mean) * count, axis=axes)
    noises = [
        _noise(d, part, operand, axis, axes, row_mask)
        for part, operand, axis in zip(parts, (recipe.dgrad.lhs, recipe.wgrad.rhs), (-1, -2), strict=True)
    ]
    return jnp.stack(
        [rows, _energy(d, axes), mean_energy, *noises, *_counts(parts[0].residual, rows, axes, row_mask)], axis=-1
    )


def _energy(x, axes):
    return jnp.sum(jnp.square(x), axis=axes)


def _noise(d, part: Part, operand, axis: int, axes, row_mask):
    if not isinstance(part.residual, QTensor):
        return jnp.zeros(d.shape[: axes[0]], jnp.float32)
    batch_dims = axes[0]
    if part.mean is not None:
        center = dequantize(part.mean) if operand.split.center is Center.QUANTIZED_MEAN else None
        if center is None:
            center = column_mean(d, mean_axes(operand.split, d.ndim, batch_dims), row_mask)
        d = residual(d, center, row_mask)
    elif part.low_rank is not None:
        d = d - low_rank_product(part.low_rank, batch_dims)
    quantized = part.residual.scaled_values(padded=(axis,))
    widths = [(0, quantized.shape[i] - d.shape[i], 0) for i in range(d.ndim)]
    d = lax.pad(d, jnp.zeros((), d.dtype), widths)
    return _energy(quantized - (hadamard(d, axis, operand.hadamard, part.signs) if operand.hadamard else d), axes)


def _counts(value, rows, axes, row_mask):
    if not isinstance(value, QTensor):
        return [jnp.zeros_like(rows)] * 4
    format = value.format
    largest_code = len(format.element.magnitudes) - 1
    codes = value.element_codes & ((1 << format.element.width) - 1)
    codes = lax.slice(codes, [0] * codes.ndim, value.shape)
    found = [codes == 0, codes == largest_code]
    if value.scales is not None:
        found += [value.scales == 0, value.scales == len(format.scale.magnitudes) - 1]
    if row_mask is not None:
        found = [what & _real_blocks(row_mask, what.shape[-2])[..., None] for what in found]
    counts = [jnp.sum(what, axis=axes, dtype=jnp.float32) for what in found]
    return counts + [jnp.zeros_like(rows)] * (4 - len(counts))


def _real_blocks(row_mask, blocks: int):
    """Which of the blocks along the last token axis (single rows, or 16 under square blocks) hold a real row."""
    size = -(-row_mask.shape[-1] // blocks)
    widths = [(0, 0)] * (row_mask.ndim - 1) + [(0, size * blocks - row_mask.shape[-1])]
    return jnp.any(jnp.pad(row_mask, widths).reshape(*row_mask.shape[:-1], blocks, size), axis=-1)

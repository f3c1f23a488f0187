"""Stacks of blocks: how the sign-to-magnitude ratio goes with depth (arXiv 2605.18933, multi-layer experiments).

    without residual    x ← RMSNorm(W2 relu(W1 x))
    with residual       x ← RMSNorm(x + W2 relu(W1 x)),  |W2 relu(W1 x)|² = |x|²/2

In every layer W1 alone is perturbed, and the perturbed stack feeds its own output on. In infinite width only the cosine
between the clean and the perturbed x counts, and it follows a recursion (derived here).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from fp4jax.analysis.geometry import ranges
from fp4jax.analysis.geometry.finite_width import flipped_shares
from fp4jax.analysis.geometry.perturbations import magnitude_correlation, magnitude_scale
from fp4jax.analysis.geometry.relu import relu_kernel

BRANCH_ENERGY = 0.5  # |W2 relu(W1 x)|²/|x|² for weights of variance 1/n


@dataclass(frozen=True)
class DepthRatios:
    """Sign flips over magnitude change after layers 1, 2, ..., in three readings.

    Attributes:
      chord: |RMSNorm(y') - RMSNorm(y)|², each output divided by its own norm.
      own_norm: the part of y' - y transverse to y, over the perturbed output's |y'|².
      transverse: the same over |y|²: theorem 2's first order.
    """

    chord: Float64[np.ndarray, " layers"]
    own_norm: Float64[np.ndarray, " layers"]
    transverse: Float64[np.ndarray, " layers"]


def depth_ratios(p: float, layers: int, *, residual: bool, n: int | None = None) -> DepthRatios:
    """The ratios in infinite width, or with the flipped shares of width n.

    Raises:
      ValueError: p outside (0, 0.5), n < 16, or layers < 1.
    """
    p = float(ranges.rate(p))
    if layers < 1:
        raise ValueError(f"layers must be at least 1, got {layers}")
    shares, weights = (np.array([p]), np.array([1.0])) if n is None else flipped_shares(p, n)
    scale, r = float(magnitude_scale(p)), float(magnitude_correlation(p))
    signs = _stack(1.0, 1.0 - 2.0 * shares, weights, layers, residual)
    magnitudes = _stack(scale, np.array([r]), np.array([1.0]), layers, residual)
    return DepthRatios(*(s / m for s, m in zip(signs, magnitudes, strict=True)))


def _stack(scale: float, correlations, weights, layers: int, residual: bool) -> tuple[np.ndarray, ...]:
    """The three readings after every layer, for pre-activations of that scale and those correlations."""
    cosine, rows = 1.0, []
    through, branch = float(residual), BRANCH_ENERGY
    for _ in range(layers):
        kernel = float(np.sum(weights * relu_kernel(correlations * cosine))) / np.pi
        inner = through * cosine + branch * scale * kernel
        clean, perturbed = through + branch, through + branch * scale**2
        cosine = inner / np.sqrt(clean * perturbed)
        sine2 = 1.0 - cosine**2
        rows.append((2.0 * (1.0 - cosine), sine2, sine2 * perturbed / clean))
    return tuple(np.array(rows).T)

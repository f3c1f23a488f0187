"""RMSNorm removes what is radial (arXiv 2605.18933, theorem 2). RMSNorm(y) = sqrt(n) y / |y|, without a gain."""

import numpy as np
from jaxtyping import Float64

from fp4jax.analysis.geometry import ranges
from fp4jax.analysis.geometry.ranges import Numbers, Values

Vectors = Float64[np.ndarray, "*batch n"]


def rmsnorm(y: Vectors) -> Vectors:
    """sqrt(n) y / |y| along the last axis.

    Raises:
      ValueError: a vector of zeros.
    """
    return np.sqrt(y.shape[-1]) * y / _norm(y)


def rmsnorm_derivative(y: Vectors, d: Vectors) -> Vectors:
    """The Fréchet derivative at y in direction d: sqrt(n)/|y| (I - y yᵀ/|y|²) d (theorem 2).

    Raises:
      ValueError: a vector y of zeros.
    """
    unit = y / _norm(y)
    transverse = d - np.sum(unit * d, axis=-1, keepdims=True) * unit
    return np.sqrt(y.shape[-1]) * transverse / _norm(y)


def rmsnorm_remainder(y: Vectors, d: Vectors) -> Float64[np.ndarray, "*batch"] | float:
    """|RMSNorm(y + d) - RMSNorm(y) - derivative| / sqrt(n): what theorem 2's first order leaves out.

    Raises:
      ValueError: y or y + d is a vector of zeros.
    """
    remainder = rmsnorm(y + d) - rmsnorm(y) - rmsnorm_derivative(y, d)
    return np.linalg.norm(remainder, axis=-1) / np.sqrt(y.shape[-1])


def rmsnorm_remainder_bound(ratio: Numbers) -> Values:
    """3 (|d|/|y|)², which `rmsnorm_remainder` never exceeds; `ratio` is |d|/|y| (theorem 2).

    The constant is theirs and holds for every d: where ratio >= 1 because the remainder is at most 2 + ratio. For small
    d the sharp constant is 1/sqrt(3): with a radial part a and a transverse part t of d/|y| the remainder is
    sqrt(t⁴/4 + a² t²) to second order, largest where t² is two thirds of the ratio squared (derived here).

    Raises:
      ValueError: a negative ratio.
    """
    return 3.0 * ranges.not_negative("ratio", ratio) ** 2


def radial_fraction(y: Vectors, d: Vectors) -> Float64[np.ndarray, "*batch"] | float:
    """<d, y>² / (|d|² |y|²): the share of d's energy along y, which the derivative of RMSNorm removes.

    Raises:
      ValueError: y or d is a vector of zeros.
    """
    return (np.sum(y * d, axis=-1) / (_norm(y) * _norm(d))[..., 0]) ** 2


def _norm(y: Vectors) -> Float64[np.ndarray, "*batch 1"]:
    norm = np.linalg.norm(y, axis=-1, keepdims=True)
    if np.any(norm == 0.0):
        raise ValueError("a vector of zeros has no direction: every vector must have a norm above 0")
    return norm

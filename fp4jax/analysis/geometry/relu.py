"""Two correlated Gaussians through a ReLU (arXiv 2605.18933, sections on the arc-cosine kernel and on gate flips).

u and v are standard normal with correlation r, theta = acos r. A *gate flip* is a sign of v that differs from u's.

A small theta is lost in r, which rounds to 1: formulas of a rate or of an amplitude know theta itself (`flipped_angle`)
and call the forms `..._at_angle`, which keep their digits down to theta = 0.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from fp4jax.analysis.geometry import ranges
from fp4jax.analysis.geometry.ranges import Numbers, Values

_SMALL_ANGLE = 0.05  # below it the series below are exact in float64, and the differences lose digits


def relu_kernel(r: Numbers) -> Values:
    """h(r) = sqrt(1 - r²) + r (pi - acos r), with E[relu(u) relu(v)] = h(r) / (2 pi).

    The arc-cosine kernel of order 1 (Cho and Saul, 2009).

    Raises:
      ValueError: |r| > 1.
    """
    r = ranges.correlation(r)
    return np.sqrt(1.0 - r * r) + r * (np.pi - np.arccos(r))


def relu_error(r: Numbers) -> Values:
    """E(r) = E[(relu(u) - relu(v))²] = 1 - h(r)/pi.

    Raises:
      ValueError: |r| > 1.
    """
    return error_at_angle(np.arccos(ranges.correlation(r)))


def gate_flip_rate(r: Numbers) -> Values:
    """P(u and v differ in sign) = acos(r) / pi.

    Raises:
      ValueError: |r| > 1.
    """
    return np.arccos(ranges.correlation(r)) / np.pi


def flip_error(r: Numbers) -> Values:
    """E_flip(r) = (theta - sin theta cos theta) / pi: the part of E(r) from units whose gate flips.

    For r = 1 - 2p it is 16 p^1.5 / (3 pi) to leading order.

    Raises:
      ValueError: |r| > 1.
    """
    return flip_error_at_angle(np.arccos(ranges.correlation(r)))


def smooth_error(r: Numbers) -> Values:
    """E_smooth(r) = E(r) - E_flip(r): the part of E(r) from units that stay open; 2p - 8 p^1.5/pi for r = 1 - 2p.

    Raises:
      ValueError: |r| > 1.
    """
    return relu_error(r) - flip_error(r)


def flipped_angle(share: Numbers) -> Values:
    """theta = 2 asin(sqrt(share)), with cos theta = 1 - 2 share: the share of the input's energy whose weights flip.

    Raises:
      ValueError: share outside [0, 1].
    """
    return 2.0 * np.arcsin(np.sqrt(ranges.energy_share(share, name="share")))


def error_at_angle(theta: Values) -> Values:
    """E(cos theta) = 2 sin²(theta/2) - (sin theta - theta cos theta)/pi."""
    difference = np.where(
        theta < _SMALL_ANGLE,
        theta**3 * (1.0 / 3.0 - theta**2 / 30.0 + theta**4 / 840.0 - theta**6 / 45360.0),
        np.sin(theta) - theta * np.cos(theta),
    )
    return 2.0 * np.sin(theta / 2.0) ** 2 - difference[()] / np.pi


def flip_error_at_angle(theta: Values) -> Values:
    """E_flip(cos theta) = (theta - sin theta cos theta)/pi."""
    difference = np.where(
        theta < _SMALL_ANGLE,
        theta**3 * (2.0 / 3.0 - 2.0 * theta**2 / 15.0 + 4.0 * theta**4 / 315.0 - 2.0 * theta**6 / 2835.0),
        theta - np.sin(theta) * np.cos(theta),
    )
    return difference[()] / np.pi


@dataclass(frozen=True)
class ReluPerturbation:
    """relu(u) against relu(s v), with E[u²] = 1, a scale s and the correlation r.

    Attributes:
      energy: E[(relu(u) - relu(s v))²] = 1/2 + s²/2 - s h(r)/pi.
      radial_fraction: E[relu(u) (relu(s v) - relu(u))]² / (energy E[relu(u)²]), the share that RMSNorm removes.
      both_open: the part of the energy from u > 0, v > 0.
      closing: from u > 0, v < 0: (theta - sin theta cos theta) / (2 pi).
      opening: from u < 0, v > 0: s² times `closing`.
      chord: 2 (1 - cosine of relu(u) and relu(s v)) = 2 E(r): squared distance after RMSNorm, over the width.
    """

    energy: Values
    radial_fraction: Values
    both_open: Values
    closing: Values
    opening: Values
    chord: Values

    @property
    def transverse(self) -> Values:
        """The energy that is left when the radial part is gone: energy (1 - radial_fraction)."""
        return self.energy * (1.0 - self.radial_fraction)

    @property
    def flip_fraction(self) -> Values:
        """The share of the energy that comes from gate flips."""
        return (self.closing + self.opening) / self.energy


def relu_perturbation(scale: Numbers, r: Numbers) -> ReluPerturbation:
    """Returns every moment of relu(u) against relu(scale v).

    Raises:
      ValueError: |r| > 1, or a negative scale.
    """
    scale = ranges.not_negative("scale", scale)
    return perturbation_at_angle(scale - 1.0, np.arccos(ranges.correlation(r)))


def perturbation_at_angle(growth: Values, theta: Values) -> ReluPerturbation:
    """`relu_perturbation` of the scale s = 1 + growth and r = cos theta, where both are small.

    With E = E(cos theta): the energy is growth²/2 + s E, and E[relu(u) d] is (growth - s E)/2.
    """
    scale, error = 1.0 + growth, error_at_angle(theta)
    energy = growth**2 / 2.0 + scale * error
    along = (growth - scale * error) / 2.0
    closing = flip_error_at_angle(theta) / 2.0
    opening = scale**2 * closing
    # relu(u) against itself: nothing to share out, and nothing is radial.
    radial = np.divide(along**2, energy / 2.0, out=np.zeros_like(energy + 0.0), where=energy > 0.0)[()]
    return ReluPerturbation(energy, radial, energy - closing - opening, closing, opening, 2.0 * error)


def relu_fourth_moments(scale: float, r: float) -> Float64[np.ndarray, "5"]:
    """E[a⁴], E[a³ d], E[a² d²], E[a d³], E[d⁴] for a = relu(u), d = relu(scale v) - a: how much finite sums fluctuate.

    In polar coordinates the radius gives E[rho⁴] = 8, the angle a trigonometric polynomial on every quadrant, which
    Gauss-Legendre integrates exactly.

    Raises:
      ValueError: |r| > 1.
    """
    theta = float(np.arccos(ranges.correlation(r)))
    nodes, weights = np.polynomial.legendre.leggauss(32)
    edges = np.sort([-np.pi / 2, np.pi / 2, theta - np.pi / 2, theta + np.pi / 2])
    moments = np.zeros(5)
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        phi = (high - low) / 2 * nodes + (high + low) / 2
        a = np.maximum(np.cos(phi), 0.0)
        d = scale * np.maximum(np.cos(phi - theta), 0.0) - a
        density = 8.0 * weights * (high - low) / 2 / (2.0 * np.pi)
        moments += [np.sum(density * a ** (4 - power) * d**power) for power in range(5)]
    return moments

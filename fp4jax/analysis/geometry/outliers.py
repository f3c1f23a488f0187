"""Inputs that are not delocalized (arXiv 2605.18933, theorems 5 and 6, proposition 3, appendix F).

The input x has norm 1; flipping the sign of the weights in a set F of columns leaves the pre-activations with the
correlation 1 - 2 S, where S is the sum of x_j² over F.
"""

import numpy as np

from fp4jax.analysis.geometry import ranges
from fp4jax.analysis.geometry.ranges import Numbers, Values
from fp4jax.analysis.geometry.relu import error_at_angle, flip_error_at_angle, flipped_angle


def flipped_set_error(gamma: Numbers) -> Values:
    """E(1 - 2 gamma) for any flipped set that holds the share gamma of the input's energy (our theorem 5).

    Derived here: for Gaussian weights only the set's energy counts, not how many inputs it has. For delocalized inputs
    gamma is the flip rate; one outlier with a large x_j is worth as many flips as its energy.

    Raises:
      ValueError: gamma outside [0, 1].
    """
    return error_at_angle(flipped_angle(ranges.energy_share(gamma)))


def outlier_gate_flip_rate(alpha: Numbers) -> Values:
    """acos(1 - 2 alpha²)/pi = 2 asin(alpha)/pi: gates flipped by the outlier's weight alone (proposition 3).

    Raises:
      ValueError: alpha outside [0, 1].
    """
    return 2.0 * np.arcsin(ranges.amplitude(alpha)) / np.pi


def outlier_flip_energy(alpha: Numbers) -> Values:
    """E_flip(1 - 2 alpha²), exactly; 16 alpha³/(3 pi) to leading order (proposition 3).

    Raises:
      ValueError: alpha outside [0, 1].
    """
    return flip_error_at_angle(2.0 * np.arcsin(ranges.amplitude(alpha)))


def outlier_flip_energy_leading(alpha: Numbers) -> Values:
    """16 alpha³/(3 pi) (proposition 3).

    Raises:
      ValueError: alpha outside [0, 1].
    """
    return 16.0 * ranges.amplitude(alpha) ** 3 / (3.0 * np.pi)


def leverage(alpha: Numbers, n: int) -> Values:
    """E(1 - 2 alpha²)/E(1 - 2 (1 - alpha²)/(n - 1)): flipping the outlier's weight over flipping another's (theorem 6).

    It is 1 at `leverage_crossover`.

    Raises:
      ValueError: alpha outside [0, 1), or n < 2.
    """
    alpha, n = ranges.amplitude(alpha), ranges.width(n)
    if np.any(alpha == 1.0):
        raise ValueError("alpha must be in [0, 1) here, got 1: the other inputs would have no energy to compare with")
    others = flipped_angle((1.0 - alpha**2) / (n - 1))
    return error_at_angle(2.0 * np.arcsin(alpha)) / error_at_angle(others)


def leverage_leading(alpha: Numbers, n: int) -> Values:
    """n alpha² (1 - 4 alpha/(3 pi)) (theorem 6).

    Raises:
      ValueError: alpha outside [0, 1], or n < 2.
    """
    alpha = ranges.amplitude(alpha)
    return ranges.width(n) * alpha**2 * (1.0 - 4.0 * alpha / (3.0 * np.pi))


def leverage_crossover(n: int) -> float:
    """1/sqrt(n): the amplitude from which an input is worse to flip than the others.

    Raises:
      ValueError: n < 2.
    """
    return float(1.0 / np.sqrt(ranges.width(n)))


def column_ratio(gamma: Numbers, fraction: Numbers = 0.05) -> Values:
    """R_col = (1-f)/f E(1 - 2 gamma)/E(2 gamma - 1), per flipped column (appendix F; 19 = .95/.05).

    The outlier columns, a fraction f of all with the energy share gamma, are flipped, against all others.

    Raises:
      ValueError: gamma outside [0, 1), fraction outside (0, 1).
    """
    gamma, f = ranges.energy_share(gamma, below_one=True), ranges.fraction(fraction)
    return (1.0 - f) / f * flipped_set_error(gamma) / flipped_set_error(1.0 - gamma)


def damage_fraction(gamma: Numbers) -> Values:
    """E(1 - 2 gamma)/(E(1 - 2 gamma) + E(2 gamma - 1)): the outlier columns' part of both groups' damage (appendix F).

    Raises:
      ValueError: gamma outside [0, 1].
    """
    outliers, others = flipped_set_error(gamma), flipped_set_error(1.0 - ranges.energy_share(gamma))
    return outliers / (outliers + others)


def group_amplitudes(gamma: Numbers, n: int, fraction: float = 0.05) -> tuple[Values, Values]:
    """sqrt(gamma/(f n)) and sqrt((1 - gamma)/((1 - f) n)): rms amplitudes of outlier columns and of the others.

    The unit norm of x allows no other: f n outliers of amplitude alpha need f n alpha² = gamma <= 1, hence
    alpha <= 1/sqrt(f n), and an outlier column counts at most n alpha² = 1/f delocalized ones (appendix F).

    Raises:
      ValueError: gamma outside [0, 1], fraction outside (0, 1), n < 2.
    """
    gamma, f, n = ranges.energy_share(gamma), ranges.fraction(fraction), ranges.width(n)
    return np.sqrt(gamma / (f * n)), np.sqrt((1.0 - gamma) / ((1.0 - f) * n))


def flipped_set_gate_flip_rate(gamma: Numbers) -> Values:
    """acos(1 - 2 gamma)/pi: gates flipped by a set of columns with the energy share gamma.

    Raises:
      ValueError: gamma outside [0, 1].
    """
    return flipped_angle(ranges.energy_share(gamma)) / np.pi

"""Sign flips against magnitude changes of equal Frobenius norm (arXiv 2605.18933, fact 1, theorems 1 and 3).

The block is y = W2 relu(W1 x) with standard Gaussian rows, followed by RMSNorm; W1 alone is perturbed.

    sign flips        every weight changes sign with probability p; u and v then have the correlation r = 1 - 2p
    magnitude change  w → w + a sign(w), with a = 2 sqrt(p) rms(w), the Frobenius norm of the sign flips

For the magnitude change, with m = E|w| = sqrt(2/pi): variance s² = 1 + 2am + a², covariance 1 + am.
"""

import numpy as np

from fp4jax.analysis.geometry import ranges
from fp4jax.analysis.geometry.ranges import Numbers, Values
from fp4jax.analysis.geometry.relu import ReluPerturbation, error_at_angle, flipped_angle, perturbation_at_angle

MEAN_ABSOLUTE = float(np.sqrt(2.0 / np.pi))  # of a standard normal
BUSSGANG = 2.0 / np.pi  # cos²(w, sign w) of a Gaussian row
SMALL_RATE_RATIO = float(np.pi / (np.pi - 2.0))  # theorem 3: the ratio for p → 0


def sign_alignment(cv: Numbers) -> Values:
    """cos²(w, sign w) = 1/(1 + cv²), with cv the coefficient of variation of |w| (fact 1; 2/pi for a Gaussian row).

    It follows from cos² = mean(|w|)² / mean(w²). Without the signs hardly anything is left: `random_sign_alignment`.

    Raises:
      ValueError: a negative cv.
    """
    return 1.0 / (1.0 + ranges.not_negative("cv", cv) ** 2)


def random_sign_alignment(n: int) -> float:
    """3/(n + 2): E cos²(w, |w| e) of a Gaussian row of n weights whose magnitudes get random signs e (fact 1).

    The paper's 1/n is its order. Derived here: the mean over e is sum w⁴/(sum w²)². 1/n is exact where all magnitudes
    are equal, and for the random signs without magnitudes, E cos²(w, e).

    Raises:
      ValueError: n < 2.
    """
    return 3.0 / (ranges.width(n) + 2.0)


def scaling_bound(cv: Numbers) -> Values:
    """min over c of |w - c sign(w)|²/|w|² = cv²/(1 + cv²): how far magnitudes are from one common scale (theorem 1).

    The smaller the coefficient of variation of |w|, the nearer sign(w) is to w up to a scale, which RMSNorm removes.
    Stated here as the equality that holds for every row.

    Raises:
      ValueError: a negative cv.
    """
    return 1.0 - sign_alignment(cv)


def gaussian_cv() -> float:
    """The coefficient of variation of |w| for Gaussian w: sqrt(pi/2 - 1)."""
    return float(np.sqrt(np.pi / 2.0 - 1.0))


def magnitude_scale(p: Numbers) -> Values:
    """s = sqrt(1 + 4p + 4 sqrt(p) sqrt(2/pi)): the pre-activations' scale after the magnitude change.

    Raises:
      ValueError: p outside (0, 0.5).
    """
    p = ranges.rate(p)
    return np.sqrt(1.0 + 4.0 * p + 4.0 * np.sqrt(p) * MEAN_ABSOLUTE)


def magnitude_correlation(p: Numbers) -> Values:
    """rho = (1 + 2 sqrt(p) sqrt(2/pi)) / s: of the pre-activations before and after the magnitude change.

    Raises:
      ValueError: p outside (0, 0.5).
    """
    return np.cos(_magnitude_angle(p))  # the quotient may round to more than 1


def _magnitude_angle(p: Numbers) -> Values:
    """acos rho, from a sqrt(1 - m²) across the old pre-activation and 1 + a m along it."""
    shift = 2.0 * np.sqrt(ranges.rate(p))
    return np.arctan2(shift * np.sqrt(1.0 - BUSSGANG), 1.0 + shift * MEAN_ABSOLUTE)


def sign_perturbation(p: Numbers) -> ReluPerturbation:
    """The moments after the ReLU for sign flips at rate p; `radial_fraction` is R_sign = E(1 - 2p)/2, exactly.

    Raises:
      ValueError: p outside (0, 0.5).
    """
    return perturbation_at_angle(0.0, flipped_angle(ranges.rate(p)))


def magnitude_perturbation(p: Numbers) -> ReluPerturbation:
    """The moments after the ReLU for the magnitude change of equal norm; `radial_fraction` is R_mag, 2/pi for p → 0.

    With cross = s h(rho)/(2 pi): E_m = 1/2 + s²/2 - 2 cross and R_m = (cross - 1/2)²/(E_m/2).

    Raises:
      ValueError: p outside (0, 0.5).
    """
    shift = 2.0 * np.sqrt(ranges.rate(p))
    growth = shift * (2.0 * MEAN_ABSOLUTE + shift) / (magnitude_scale(p) + 1.0)  # s - 1 = (s² - 1)/(s + 1)
    return perturbation_at_angle(growth, _magnitude_angle(p))


def linear_radial_fractions(p: Numbers) -> tuple[Values, Values]:
    """The radial fractions before the ReLU: p for sign flips, 2/pi for the magnitude change (our proposition 1).

    Derived here: for u, v of unit variance and correlation r, E[u (v-u)]²/E[(v-u)²] = (1-r)²/(2 (1-r)) = (1-r)/2 = p;
    for v = u + a sign(w)·x the covariance with u is a m and the energy a², so the fraction is m² at every p.

    Raises:
      ValueError: p outside (0, 0.5).
    """
    p = ranges.rate(p)
    return p, np.full_like(p, BUSSGANG)[()]


def ratio_paper(p: Numbers) -> Values:
    """c(p) = (1 - R_sign)/(1 - 2/pi) (1 - 4 sqrt(p)/(3 pi)): the paper's form of the transverse ratio at finite p.

    Its 4/(3 pi) = .4244 leaves out that the magnitude change flips gates too; see `ratio_slope`.

    Raises:
      ValueError: p outside (0, 0.5).
    """
    p = ranges.rate(p)
    return (1.0 - sign_perturbation(p).radial_fraction) / (1.0 - BUSSGANG) * (1.0 - 4.0 * np.sqrt(p) / (3.0 * np.pi))


def ratio_exact(p: Numbers) -> Values:
    """c = E_s (1 - R_s) / (E_m (1 - R_m)): transverse energy of sign flips over that of the magnitude change.

    The limit of infinite width at finite p. Both energies are measured against the *unperturbed* output's norm.

    Raises:
      ValueError: p outside (0, 0.5).
    """
    return sign_perturbation(p).transverse / magnitude_perturbation(p).transverse


def ratio_slope() -> float:
    """k in c = pi/(pi-2) (1 - k sqrt(p) + O(p)): 4/(3 pi) (1 - sqrt(1 - 2/pi)) = .1686.

    Derived here: sin² of the angle between pre-activations is 4p for sign flips and 4p (1 - 2/pi)/s² for the magnitude
    change; the transverse energy for an angle theta is (s²/2)(theta² - 2 theta³/(3 pi)), and s² drops out.
    """
    return 4.0 / (3.0 * np.pi) * (1.0 - float(np.sqrt(1.0 - BUSSGANG)))


def ratio_chord(p: Numbers) -> Values:
    """E(1 - 2p)/E(rho): ratio of |RMSNorm(y') - RMSNorm(y)|², where each output is divided by *its own* norm.

    Raises:
      ValueError: p outside (0, 0.5).
    """
    return sign_perturbation(p).chord / magnitude_perturbation(p).chord


def ratio_own_norm(p: Numbers) -> Values:
    """s² c: the transverse energies of `ratio_exact`, each divided by the *perturbed* output's squared norm.

    Raises:
      ValueError: p outside (0, 0.5).
    """
    return magnitude_scale(p) ** 2 * ratio_exact(p)


def sign_error_leading(p: Numbers) -> Values:
    """2p (1 - 4 sqrt(p)/(3 pi)): E(1 - 2p) to the first two orders.

    Raises:
      ValueError: p outside (0, 0.5).
    """
    p = ranges.rate(p)
    return 2.0 * p * (1.0 - 4.0 * np.sqrt(p) / (3.0 * np.pi))


def sign_error(p: Numbers) -> Values:
    """E(1 - 2p), the energy of sign flips after the ReLU.

    Raises:
      ValueError: p outside (0, 0.5).
    """
    return error_at_angle(flipped_angle(ranges.rate(p)))

"""What a finite width does to the limits: the corrections that the simulations are compared with (derived here).

A block has n inputs, n hidden units and n outputs, all weights Gaussian.

- The share S of an input's energy whose weights are flipped varies from row to row: the number of flips is binomial,
  and given k flips among n Gaussian entries S is Beta(k/2, (n-k)/2). Expectations over S replace r = 1 - 2p, exactly.
- Sums over the n hidden units and the n outputs fluctuate. Their moments follow from those of one unit.
"""

import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import Float64
from scipy.special import betainc, betaincinv
from scipy.stats import binom

from fp4jax.analysis.geometry import ranges
from fp4jax.analysis.geometry.perturbations import (
    BUSSGANG,
    magnitude_correlation,
    magnitude_perturbation,
    magnitude_scale,
)
from fp4jax.analysis.geometry.ranges import Values
from fp4jax.analysis.geometry.relu import (
    ReluPerturbation,
    gate_flip_rate,
    relu_error,
    relu_fourth_moments,
    relu_kernel,
    relu_perturbation,
)
from fp4jax.analysis.geometry.ternary import ternary_correlation, ternary_scale

_BINS = 64  # of equal probability, for the Beta distribution


@functools.lru_cache(maxsize=64)
def flipped_shares(p: float, n: int) -> tuple[Float64[np.ndarray, " points"], Float64[np.ndarray, " points"]]:
    """Values of S and their probabilities, for sign flips at rate p of a Gaussian row of n weights.

    Raises:
      ValueError: p outside (0, 0.5), or n < 16.
    """
    p, n = float(ranges.rate(p)), ranges.width(n, 16)
    low, high = (int(binom.ppf(q, n, p)) for q in (1e-12, 1.0 - 1e-12))
    counts = np.arange(max(low, 0), min(high, n - 1) + 1)
    probabilities = binom.pmf(counts, n, p)
    shares = np.zeros((len(counts), _BINS))
    some = counts > 0
    a, b = counts[some, None] / 2.0, (n - counts[some, None]) / 2.0
    edges = betaincinv(a, b, np.arange(_BINS + 1) / _BINS)
    # The mean over a bin of equal probability: E[S; S < e] = E[S] times the distribution function of Beta(a + 1, b).
    shares[some] = _BINS * np.diff(a / (a + b) * betainc(a + 1.0, b, edges), axis=1)
    weights = np.repeat(probabilities / probabilities.sum(), _BINS) / _BINS
    shares = shares.ravel()
    shares.flags.writeable = weights.flags.writeable = False  # they are kept for the next call
    return shares, weights


def over_flips(function: Callable[[Values], Values], p: float, n: int) -> float:
    """E[function(1 - 2 S)] over the rows' flipped shares S.

    Raises:
      ValueError: p outside (0, 0.5), or n < 16.
    """
    shares, weights = flipped_shares(p, n)
    return float(np.sum(weights * function(1.0 - 2.0 * shares)))


def sign_error_at_width(p: float, n: int) -> float:
    """E(1 - 2p) of `relu_error` at width n: the mean over the rows' flipped shares.

    Raises:
      ValueError: p outside (0, 0.5), or n < 16.
    """
    return over_flips(relu_error, p, n)


def gate_flip_rate_at_width(p: float, n: int) -> float:
    """acos(1 - 2p)/pi at width n: the mean over the rows' flipped shares.

    Raises:
      ValueError: p outside (0, 0.5), or n < 16.
    """
    return over_flips(gate_flip_rate, p, n)


def _unit_moments(p: float, n: int, signs: bool) -> tuple[float, float, Float64[np.ndarray, "5"]]:
    """E[d²], E[a d] and the fourth moments of one hidden unit, for sign flips or for the magnitude change."""
    if signs:
        error = sign_error_at_width(p, n)
        return error, -error / 2.0, relu_fourth_moments(1.0, 1.0 - 2.0 * p)
    scale, r = float(magnitude_scale(p)), float(magnitude_correlation(p))
    cross = scale * float(relu_kernel(r)) / (2.0 * np.pi)
    return float(magnitude_perturbation(p).energy), cross - 0.5, relu_fourth_moments(scale, r)


def transverse_at_width(p: float, n: int, *, signs: bool) -> float:
    """Mean transverse energy D - C²/A of n hidden units, with A, C, D the means of a², a d, d² over the units.

    To first order in 1/n: E[d²] - E[a d]²/E[a²] - E[a² (d - b a)²]/(n E[a²]), b = E[a d]/E[a²], E[a²] = 1/2. A Gaussian
    W2 with n outputs multiplies it by n - 1, exactly and for both kinds of perturbation.

    Raises:
      ValueError: p outside (0, 0.5), or n < 16.
    """
    energy, cross, fourth = _unit_moments(p, n, signs)
    b = cross / 0.5
    fluctuation = fourth[2] - 2.0 * b * fourth[1] + b**2 * fourth[0]
    return float(energy - cross**2 / 0.5 - fluctuation / (n * 0.5))


def ratio_at_width(p: float, n: int) -> float:
    """`perturbations.ratio_exact` at width n.

    Raises:
      ValueError: p outside (0, 0.5), or n < 16.
    """
    return transverse_at_width(p, n, signs=True) / transverse_at_width(p, n, signs=False)


def radial_fraction_at_width(p: float, n: int, *, signs: bool) -> float:
    """E<d, y>²/E[|d|² |y|²] at the output of a block of width n.

    With A, C, D the hidden sums: given them, the n outputs are independent pairs of Gaussians, so E<d, y>² is
    n² C² + n (A D + C²) and E|d|²|y|² is n² A D + 2 n C²; and E C² = mu² + (E[a²d²] - mu²)/n for the mean mu of a d.

    Raises:
      ValueError: p outside (0, 0.5), or n < 16.
    """
    energy, cross, fourth = _unit_moments(p, n, signs)
    c2 = cross**2 + (fourth[2] - cross**2) / n
    ad = 0.5 * energy + (fourth[2] - 0.5 * energy) / n
    return float((c2 + (ad + c2) / n) / (ad + 2.0 * c2 / n))


def linear_radial_fraction_at_width(p: float, n: int, *, signs: bool) -> float:
    """E<d, u>²/E[|d|² |u|²] over n pre-activations: `perturbations.linear_radial_fractions` at width n.

    The n pairs (u, d) are independent, so both are sums of n E[u² d²] and of n (n-1) E[u d]² or E[u²] E[d²]. For u of
    unit variance and E[d²] = 1, E[u² d²] = 1 + 2 r with r = E[u d]²; for sign flips r varies with the row's flipped
    share S, and its mean is p + (1-p) 3/(n+2).

    Raises:
      ValueError: p outside (0, 0.5), or n < 2.
    """
    p, n = float(ranges.rate(p)), ranges.width(n)
    r = p if signs else BUSSGANG
    fourth = 1.0 + 2.0 * (p + (1.0 - p) * 3.0 / (n + 2) if signs else r)
    return ((n - 1) * r + fourth) / (n - 1 + fourth)


def sign_alignment_at_width(n: int) -> float:
    """E cos²(w, sign w) = 2/pi + (1 - 2/pi)/n of a Gaussian row of n weights, exactly.

    Direction and norm of a Gaussian vector are independent, so the mean of the ratio is the ratio of the means.

    Raises:
      ValueError: n < 2.
    """
    return BUSSGANG + (1.0 - BUSSGANG) / ranges.width(n)


def ternary_at_width(threshold: float, n: int, moment: Callable[[ReluPerturbation], Values]) -> float:
    """An energy of `ternary_after_relu` (per unit variance of W x) at width n; threshold 0 is theorem 4's sign weights.

    Given its row, a pair of pre-activations is exactly Gaussian: for the row's means m of |w|, k of |w| over the kept,
    b of w² and c of the kept, scale and correlation are m sqrt(c/b) and k/sqrt(b c). The mean over rows is taken to
    second order in the four means' fluctuations.

    Args:
      moment: an energy from the `ReluPerturbation` of a row.

    Raises:
      ValueError: a negative threshold, or n < 2.
    """
    threshold, n = float(ranges.not_negative("threshold", threshold)), ranges.width(n)

    def of_row(means: Float64[np.ndarray, "4"]) -> float:
        m, k, b, c = means
        return b * float(moment(relu_perturbation(m * np.sqrt(c / b), min(k / np.sqrt(b * c), 1.0))))

    centre, covariance = _row_statistics(threshold)
    return of_row(centre) + 0.5 * float(np.sum(_hessian(of_row, centre) * covariance)) / n


def ternary_radial_fraction_at_width(threshold: float, n: int) -> float:
    """E<d, a>²/E[|d|²|a|²] over n hidden units for ternary rows (`ternary_after_relu`), to first order in 1/n.

    Raises:
      ValueError: a negative threshold, or n < 2.
    """
    scale, r = float(ternary_scale(threshold)), float(ternary_correlation(threshold))
    energy = ternary_at_width(threshold, n, lambda moments: moments.energy)
    cross = scale * float(relu_kernel(r)) / (2.0 * np.pi) - 0.5
    cross_at_width = ternary_at_width(threshold, n, _cross)
    fourth = relu_fourth_moments(scale, r)[2]
    c2 = cross_at_width**2 + (fourth - cross**2) / n
    return float(c2 / (0.5 * energy + (fourth - 0.5 * energy) / n))


def norm_difference_at_width(n: int) -> float:
    """|RMSNorm(Wq x) - RMSNorm(W x)|²/n = 2 (1 - cos) for sign weights of width n (theorem 4).

    The cosine of n pairs of correlation r is r (1 - (1 - r²)/(2n)) on average, with r² = `sign_alignment_at_width`.

    Raises:
      ValueError: n < 2.
    """
    r = np.sqrt(sign_alignment_at_width(n))
    return float(2.0 * (1.0 - r * (1.0 - (1.0 - r * r) / (2.0 * n))))


def _cross(moments: ReluPerturbation) -> Values:
    """E[a d] from the radial fraction; d shrinks a, so it is negative."""
    return -np.sqrt(moments.radial_fraction * moments.energy / 2.0)


def _row_statistics(threshold: float) -> tuple[Float64[np.ndarray, "4"], Float64[np.ndarray, "4 4"]]:
    """Mean and covariance of (|w|, |w| if kept, w², 1 if kept) for standard normal w, kept where |w| > threshold."""
    nodes, weights = np.polynomial.legendre.leggauss(64)
    rows, densities = [], []
    for low, high, kept in ((0.0, threshold, 0.0), (threshold, 12.0, 1.0)):
        w = (high - low) / 2.0 * nodes + (high + low) / 2.0
        densities.append((high - low) / 2.0 * weights * np.sqrt(2.0 / np.pi) * np.exp(-(w**2) / 2.0))
        rows.append(np.stack([w, w * kept, w**2, np.full_like(w, kept)]))
    values, density = np.concatenate(rows, axis=1), np.concatenate(densities)
    centre = values @ density
    return centre, (values * density) @ values.T - np.outer(centre, centre)


def _hessian(function: Callable, x: Float64[np.ndarray, " d"], step: float = 1e-3) -> Float64[np.ndarray, "d d"]:
    """Second derivatives by central differences."""
    steps = step * np.eye(len(x))

    def along(i: int, j: int) -> float:
        a, b = steps[i], steps[j]
        return (function(x + a + b) - function(x + a - b) - function(x - a + b) + function(x - a - b)) / (4 * step**2)

    return np.array([[along(i, j) for j in range(len(x))] for i in range(len(x))])

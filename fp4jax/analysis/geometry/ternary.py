"""Row-wise sign and ternary weights (arXiv 2605.18933, theorem 4): w → scale sign(w), or zero below a threshold."""

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from fp4jax.analysis.geometry import ranges
from fp4jax.analysis.geometry.perturbations import BUSSGANG, MEAN_ABSOLUTE, sign_perturbation
from fp4jax.analysis.geometry.ranges import Numbers, Values
from fp4jax.analysis.geometry.relu import ReluPerturbation, gate_flip_rate, relu_perturbation

ABSMEAN_THRESHOLD = MEAN_ABSOLUTE / 2.0  # BitNet b1.58 rounds w / mean|w|: zero below half of it


@dataclass(frozen=True)
class SignQuantization:
    """A Gaussian row against mean|w| sign(w), the best scale (theorem 4).

    Attributes:
      cos2: cos²(w, sign w) = 2/pi.
      sin2: 1 - 2/pi, the relative error of the weights.
      degrees: the angle, acos(sqrt(2/pi)).
      norm_difference: |RMSNorm(Wq x) - RMSNorm(W x)|²/n = 2 (1 - sqrt(2/pi)).
      gate_flips: acos(sqrt(2/pi))/pi.
      after_relu: the moments after a ReLU.
    """

    cos2: float
    sin2: float
    degrees: float
    norm_difference: float
    gate_flips: float
    after_relu: ReluPerturbation


def sign_quantization() -> SignQuantization:
    """Returns the closed forms of theorem 4 and of its error after a ReLU."""
    return SignQuantization(
        cos2=BUSSGANG,
        sin2=1.0 - BUSSGANG,
        degrees=float(np.degrees(np.arccos(MEAN_ABSOLUTE))),
        norm_difference=2.0 * (1.0 - MEAN_ABSOLUTE),
        gate_flips=float(gate_flip_rate(MEAN_ABSOLUTE)),
        # With the best scale, E|w|, scale and correlation are the same number.
        after_relu=relu_perturbation(MEAN_ABSOLUTE, MEAN_ABSOLUTE),
    )


def ternary_correlation(threshold: Numbers) -> Values:
    """cos(w, T(w)) for T(w) = sign(w) where |w| > threshold, else 0: 2 phi(t)/sqrt(2 Q(t)) for standard normal w.

    Derived here: E[|w|; |w| > t] = 2 phi(t) and P(|w| > t) = 2 Q(t). At t = 0 it is sqrt(2/pi).

    Raises:
      ValueError: a negative threshold.
    """
    t = ranges.not_negative("threshold", threshold)
    return np.sqrt(BUSSGANG) * np.exp(-(t**2) / 2.0) / np.sqrt(2.0 * ndtr(-t))


def ternary_scale(threshold: Numbers) -> Values:
    """rms of mean|w| T(w): the pre-activations' scale when the weights' scale is mean|w| (BitNet b1.58).

    Raises:
      ValueError: a negative threshold.
    """
    return MEAN_ABSOLUTE * np.sqrt(2.0 * ndtr(-ranges.not_negative("threshold", threshold)))


def ternary_after_relu(threshold: Numbers) -> ReluPerturbation:
    """The moments after a ReLU for weights mean|w| T(w); threshold 0 is theorem 4's, ABSMEAN_THRESHOLD is b1.58's.

    Raises:
      ValueError: a negative threshold.
    """
    return relu_perturbation(ternary_scale(threshold), ternary_correlation(threshold))


def ternary_linear_error(threshold: Numbers) -> tuple[Values, Values]:
    """Energy 1 + s² - 2 s rho and radial fraction (1 - s rho)²/energy of the error before a ReLU, per unit variance.

    Derived here, with s of `ternary_scale` and rho of `ternary_correlation`. At threshold 0 both are 1 - 2/pi.

    Raises:
      ValueError: a negative threshold.
    """
    scale, r = ternary_scale(threshold), ternary_correlation(threshold)
    energy = 1.0 + scale**2 - 2.0 * scale * r
    return energy, (1.0 - scale * r) ** 2 / energy


def equal_norm_rate() -> float:
    """(1 - 2/pi)/4: the sign-flip rate with the Frobenius norm of the sign quantization's error."""
    return (1.0 - BUSSGANG) / 4.0


def equal_norm_ratio() -> float:
    """Transverse energy of sign flips at `equal_norm_rate` over that of the sign quantization, after the ReLU."""
    return float(sign_perturbation(equal_norm_rate()).transverse / sign_quantization().after_relu.transverse)

"""Means and ratios of means over independent draws, with standard errors and confidence intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.stats import t as student

RESOLVED = 3.0  # standard errors from 0: what a trained model's tables and figures build on


@dataclass(frozen=True)
class Estimate:
    """A number from `draws` independent draws, with its standard error."""

    value: float
    standard_error: float
    draws: int

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The confidence interval, by Student's t with draws - 1 degrees of freedom.

        Raises:
          ValueError: level outside (0, 1).
        """
        if not 0.0 < level < 1.0:
            raise ValueError(f"level must be in (0, 1), got {level:g}")
        half = float(student.ppf((1.0 + level) / 2.0, self.draws - 1)) * self.standard_error
        return self.value - half, self.value + half

    def deviation(self, theory: float) -> float:
        """(value - theory) in standard errors; where nothing varied, 0 or infinite."""
        if self.standard_error == 0.0:
            return 0.0 if math.isclose(self.value, theory, rel_tol=1e-6) else math.inf
        return (self.value - theory) / self.standard_error


def mean(x: Float[np.ndarray, " draws"]) -> Estimate:
    """The mean.

    Raises:
      ValueError: fewer than 2 draws.
    """
    return ratio(x, np.ones_like(x))


def ratio(numerator: Float[np.ndarray, " draws"], denominator: Float[np.ndarray, " draws"]) -> Estimate:
    """sum(numerator)/sum(denominator), with the delta method's standard error for paired draws.

    Raises:
      ValueError: fewer than 2 draws.
    """
    draws = len(numerator)
    if draws < 2:
        raise ValueError(f"a standard error needs at least 2 draws, got {draws}")
    numerator, denominator = numerator.astype(np.float64), denominator.astype(np.float64)
    value = float(numerator.sum() / denominator.sum())
    residual = numerator - value * denominator
    error = math.sqrt(float(np.sum(residual**2)) / (draws * (draws - 1))) / abs(float(denominator.mean()))
    return Estimate(value, error, draws)


def extrapolate(widths: Sequence[int], estimates: Sequence[Estimate]) -> Estimate:
    """The value at 1/n → 0 of a line in 1/n through independent estimates, weighted by their standard errors.

    Raises:
      ValueError: fewer than 2 different widths.
    """
    if len(set(widths)) < 2:
        raise ValueError(f"an extrapolation in 1/n needs at least 2 widths, got {sorted(set(widths))}")
    weights = np.array([1.0 / estimate.standard_error for estimate in estimates])
    design = np.stack([np.ones(len(widths)), 1.0 / np.asarray(widths, np.float64)], axis=1) * weights[:, None]
    covariance = np.linalg.inv(design.T @ design)
    line = covariance @ design.T @ (weights * np.array([estimate.value for estimate in estimates]))
    return Estimate(float(line[0]), float(np.sqrt(covariance[0, 0])), min(e.draws for e in estimates))

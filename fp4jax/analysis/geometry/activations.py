"""The sign-to-magnitude ratio for other activations than ReLU: the paper's open problem O2 (derived here).

For an activation f with pre-activations of scale sigma, u ~ N(0, sigma²), and p → 0:

    sign flips        d = f'(u) 2 sqrt(p) xi                    xi independent of u, of scale sigma
    magnitude change  d = f'(u) 2 sqrt(p) (m u + sqrt(1-m²) xi)  m² = 2/pi

    c = sigma² E f'² / (sigma² (1 - m²) E f'² + m² (E[f'² u²] - E[f f' u]²/E f²))

The last bracket is what of f'(u) u is not along f(u). It vanishes for ReLU, where f' u = f, and for a linear f, so both
have c = pi/(pi-2); every other activation has less. c therefore depends on sigma, and tends to ReLU's for large and,
where f is linear at 0, for small sigma.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from scipy.special import expit, ndtr

from fp4jax.analysis.geometry import ranges
from fp4jax.analysis.geometry.perturbations import BUSSGANG, magnitude_correlation, magnitude_scale

_NODES = 200  # even, so that ReLU's kink falls between two nodes


@dataclass(frozen=True)
class Activation:
    """A function and its derivative, on float64 arrays."""

    function: Callable[[np.ndarray], np.ndarray]
    derivative: Callable[[np.ndarray], np.ndarray]


def _silu_derivative(x: np.ndarray) -> np.ndarray:
    return expit(x) * (1.0 + x * expit(-x))


def _gelu_derivative(x: np.ndarray) -> np.ndarray:
    return ndtr(x) + x * np.exp(-x * x / 2.0) / np.sqrt(2.0 * np.pi)


ACTIVATIONS = {
    "relu": Activation(lambda x: np.maximum(x, 0.0), lambda x: (x > 0.0).astype(np.float64)),
    "silu": Activation(lambda x: x * expit(x), _silu_derivative),
    "gelu": Activation(lambda x: x * ndtr(x), _gelu_derivative),  # the exact one, not the tanh approximation
}


def activation(name: str) -> Activation:
    """The activation of that name.

    Raises:
      ValueError: there is none of that name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; there are: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def activation_ratio_limit(name: str, sigma: float = 1.0) -> float:
    """The ratio of transverse energies for p → 0, by Gauss-Hermite quadrature of the equation above.

    Args:
      name: "relu", "silu" or "gelu".
      sigma: standard deviation of the pre-activations, above 0.

    Raises:
      ValueError: an unknown name, or sigma not above 0.
    """
    f, sigma = activation(name), _positive(sigma)
    z, weights = _hermite()
    u, slope, value = sigma * z, f.derivative(sigma * z), f.function(sigma * z)

    def mean(x: Float64[np.ndarray, " nodes"]) -> float:
        return float(np.sum(weights * x))

    energy = sigma**2 * mean(slope**2)
    off_axis = mean(slope**2 * u**2) - mean(value * slope * u) ** 2 / mean(value**2)
    return energy / ((1.0 - BUSSGANG) * energy + BUSSGANG * off_axis)


def activation_ratio(name: str, p: float, sigma: float = 1.0) -> float:
    """The same ratio at the rate p, infinite width, by quadrature in two dimensions; for smooth activations.

    Raises:
      ValueError: an unknown name, p outside (0, 0.5), or sigma not above 0.
    """
    f, sigma, p = activation(name), _positive(sigma), float(ranges.rate(p))
    signs = _transverse(f, sigma, 1.0, 1.0 - 2.0 * p)
    return signs / _transverse(f, sigma, float(magnitude_scale(p)), float(magnitude_correlation(p)))


def _transverse(f: Activation, sigma: float, scale: float, r: float) -> float:
    """E[d²] - E[f d]²/E[f²] for d = f(scale v) - f(u), where u and v have the correlation r."""
    z, weights = _hermite()
    u, xi = sigma * z[:, None], sigma * z[None, :]
    joint = weights[:, None] * weights[None, :]
    value = f.function(u)
    d = f.function(scale * (r * u + np.sqrt(1.0 - r * r) * xi)) - value
    return float(np.sum(joint * d**2) - np.sum(joint * value * d) ** 2 / np.sum(joint * value**2))


@functools.cache
def _hermite() -> tuple[Float64[np.ndarray, " nodes"], Float64[np.ndarray, " nodes"]]:
    """Nodes and weights of the expectation over a standard normal; they are kept, the nodes take 70 ms."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    weights /= weights.sum()
    nodes.flags.writeable = weights.flags.writeable = False
    return nodes, weights


def _positive(sigma: float) -> float:
    if not 0.0 < sigma < np.inf:
        raise ValueError(f"sigma must be finite and above 0, got {sigma:g}")
    return float(sigma)

"""Where a mean comes from: token frequencies (eq. 2) and operators (eq. 3). Closed forms for Gaussian inputs."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float64, Int
from scipy.special import expit

_NODES = 101


def expected_embedding(
    tokens: Int[np.ndarray, "..."], embedding: Float64[np.ndarray, "V D"]
) -> Float64[np.ndarray, " D"]:
    """sum_w p(w) e(w), p the tokens' frequencies (eq. 2); the mean over the same tokens' embeddings, exactly."""
    counts = np.bincount(np.ravel(tokens), minlength=len(embedding))
    return counts @ embedding / counts.sum()


def gaussian_mean(
    function: Callable[[np.ndarray], np.ndarray],
    mean: float | Float64[np.ndarray, "*n"],
    deviation: float | Float64[np.ndarray, "*n"],
) -> Float64[np.ndarray, "..."]:
    """E f(x) for x ~ N(mean, deviation²), elementwise, by Gauss-Hermite quadrature.

    Derived reading of eq. 3. For a symmetric x it is the mean of the even part of f, so that an odd f makes no mean.
    The converse does not hold: x² - 1 is even and makes none of N(0, 1).
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    points = np.asarray(mean)[..., None] + np.asarray(deviation)[..., None] * nodes
    return function(points) @ (weights / weights.sum())


def silu(x: np.ndarray) -> np.ndarray:
    """x sigmoid(x); its even part, x tanh(x/2) / 2, is positive: a mean from every symmetric input."""
    return x * expit(x)


def silu_slope(x: np.ndarray) -> np.ndarray:
    """The derivative of `silu`."""
    return expit(x) * (1.0 + x * expit(-x))


def swiglu_mean(
    gate_mean: Float64[np.ndarray, "*n"],
    gate_deviation: Float64[np.ndarray, "*n"],
    up_mean: Float64[np.ndarray, "*n"],
    covariance: Float64[np.ndarray, "*n"],
) -> Float64[np.ndarray, "*n"]:
    """E[silu(gate) up] for jointly Gaussian gate and up, by Stein's lemma:

        E[silu(gate)] E[up] + cov(gate, up) E[silu'(gate)]

    With an up without mean and uncorrelated with the gate it is 0: SwiGLU regenerates a mean only from one of the two.
    """
    regenerated = gaussian_mean(silu, gate_mean, gate_deviation) * up_mean
    return regenerated + covariance * gaussian_mean(silu_slope, gate_mean, gate_deviation)


def attention_parts(
    weights: Float64[np.ndarray, "queries keys"], values: Float64[np.ndarray, "keys n"]
) -> tuple[Float64[np.ndarray, "queries n"], Float64[np.ndarray, "queries n"]]:
    """Softmax weights applied to (the values' mean, their residual).

    Rows that sum to 1 pass the mean unchanged and average the residual: with n_eff = 1 / sum_j w_j² of independent
    tokens mixed, its energy falls by n_eff. So attention raises the mean's share without making a mean, exactly for
    weights independent of the values; values correlated with the weights move the output's mean.
    """
    mean = values.mean(axis=0)
    return weights @ np.broadcast_to(mean, values.shape), weights @ (values - mean)


def cosine(a: Float64[np.ndarray, "*n"], b: Float64[np.ndarray, "*n"]) -> float:
    """<a, b> / |a| |b|; 0 where one of them is 0."""
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norms if norms else 0.0

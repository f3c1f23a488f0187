"""Bounds on the mean's direction and on the largest entry, each with the exact value where there is one.

Theorem 3 follows the paper in its corrected form. The paper's theorems 1 and 2 stand here as derived readings of the
two claims they serve: that a strong mean is the leading singular direction, and that a mean makes large entries
likely. Entries are x_i = mu + sigma z_i, z_i independent standard normals; M = max_i |x_i| over l tokens.
"""

import numpy as np
from jaxtyping import Float64
from scipy.special import ndtr, ndtri


def alignment_bound(mean_energy: float, residual_norm2: float) -> float:
    """Theorem 1, derived reading: cos²(mu, v_1) >= 1 - |X_R|_2² / (l |mu|²), floored at 0.

    X^T X = l mu mu^T + X_R^T X_R, since X_R has no column mean. Its leading eigenvalue is at least l |mu|² and, at v_1,
    at most l |mu|² cos² + |X_R|_2².

    Args:
      mean_energy: l |mu|², above 0.
      residual_norm2: the squared spectral norm of X_R.
    """
    return max(0.0, 1.0 - residual_norm2 / mean_energy)


def tail_probability(mu: float, sigma: float, threshold: float) -> float:
    """P(|x| >= threshold) for one entry, exactly."""
    return float(ndtr((mu - threshold) / sigma) + ndtr((-mu - threshold) / sigma))


def tail_bound(mu: float, sigma: float, threshold: float) -> float:
    """Theorem 2, derived reading: P(|x| >= t) >= Phi((|mu| - t) / sigma): the tail on the mean's own side.

    Against sigma alone it is amplified by exp((2 t |mu| - mu²) / (2 sigma²)) / 2 or more, for t >= |mu| >= 0, since
    phi(a) / (phi(b)) is that factor and Mills' ratio falls.
    """
    return float(ndtr((abs(mu) - threshold) / sigma))


def tail_amplification_bound(mu: float, sigma: float, threshold: float) -> float:
    """The lower bound on P(|x| >= t; mu) / P(|x| >= t; 0) that `tail_bound` names, for t >= |mu|."""
    return float(np.exp((2.0 * threshold * abs(mu) - mu * mu) / (2.0 * sigma * sigma)) / 2.0)


def largest_entry_quantile(mu: float, sigma: float, tokens: int, delta: float) -> float:
    """Theorem 3, corrected: P(M >= |mu| + sigma Phi^-1(delta^(1/l))) >= 1 - delta.

    Equality would hold for the largest signed entry; the other sign's tail adds to it.
    """
    return abs(mu) + sigma * float(ndtri(delta ** (1.0 / tokens)))


def printed_quantile(mu: float, sigma: float, tokens: int, delta: float) -> float:
    """Theorem 3 with delta and 1 - delta exchanged, as printed: |mu| + sigma Phi^-1((1 - delta)^(1/l)).

    It fails: for l = 1, delta = .05 and a large mean, P(M >= it) is .05 and not .95.
    """
    return largest_entry_quantile(mu, sigma, tokens, 1.0 - delta)


def largest_entry_probability(mu: float, sigma: float, tokens: int, threshold: float) -> float:
    """P(M >= threshold), exactly; threshold <= 0 gives 1."""
    if threshold <= 0.0:
        return 1.0
    inside = ndtr((threshold - mu) / sigma) - ndtr((-threshold - mu) / sigma)
    return float(-np.expm1(tokens * np.log(inside))) if inside > 0.0 else 1.0


def exceeds_mean_bound(tokens: int) -> float:
    """P(M >= |mu|) >= 1 - 2^-l. An equality in the paper; it is a lower bound, reached for |mu| / sigma → inf."""
    return 1.0 - 2.0**-tokens


def largest_entry_upper(mu: float, sigma: float, tokens: int, delta: float) -> float:
    """|mu| + sigma t with (2 Phi(t) - 1)^l = 1 - delta: P(M >= it) <= delta, the bound from above (derived).

    M <= |mu| + sigma max|z|, and P(max|z| < t) = (2 Phi(t) - 1)^l.
    """
    level = np.exp(np.log1p(-delta) / tokens)
    return abs(mu) + sigma * float(ndtri((1.0 + level) / 2.0))


def simulate_largest(
    mu: float, sigma: float, tokens: int, draws: int, random: np.random.Generator
) -> Float64[np.ndarray, " draws"]:
    """M of `draws` independent sets of tokens."""
    return np.abs(mu + sigma * random.standard_normal((draws, tokens))).max(axis=1)

"""Arguments of the closed forms: float64, and inside their range."""

import numpy as np
from jaxtyping import Float, Float64

# What the closed forms take and give: a number, or an array of them.
Numbers = float | int | Float[np.ndarray, "..."]
Values = float | Float64[np.ndarray, "..."]


def _inside(name: str, x: Numbers, accepted: str, low: float, high: float, closed: tuple[bool, bool]) -> Values:
    values = np.asarray(x, np.float64)
    above = values >= low if closed[0] else values > low
    below = values <= high if closed[1] else values < high
    if not np.all(above & below):  # written so that NaN is refused too
        wrong = values[~(above & below)].ravel()[0]
        raise ValueError(f"{name} must be {accepted}, got {wrong:g}")
    return values[()]


def rate(p: Numbers) -> Values:
    """A sign-flip rate, in (0, .5)."""
    return _inside("p", p, "in (0, 0.5)", 0.0, 0.5, (False, False))


def correlation(r: Numbers) -> Values:
    """A correlation, in [-1, 1]."""
    return _inside("r", r, "in [-1, 1]", -1.0, 1.0, (True, True))


def amplitude(alpha: Numbers) -> Values:
    """One input's share of the input's norm, in [0, 1]."""
    return _inside("alpha", alpha, "in [0, 1]", 0.0, 1.0, (True, True))


def energy_share(gamma: Numbers, *, below_one: bool = False, name: str = "gamma") -> Values:
    """A group's share of the input's energy, in [0, 1], or in [0, 1) where a formula divides by the other's."""
    return _inside(name, gamma, "in [0, 1)" if below_one else "in [0, 1]", 0.0, 1.0, (True, not below_one))


def fraction(f: Numbers) -> Values:
    """A group's share of the columns, in (0, 1)."""
    return _inside("fraction", f, "in (0, 1)", 0.0, 1.0, (False, False))


def not_negative(name: str, x: Numbers) -> Values:
    """A scale, a threshold or a coefficient of variation: finite, and at least 0."""
    return _inside(name, x, "finite and at least 0", 0.0, np.inf, (True, False))


def width(n: int, least: int = 2) -> int:
    """A number of inputs."""
    if n < least:
        raise ValueError(f"n must be at least {least}, got {n}")
    return n

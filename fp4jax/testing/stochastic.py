"""Laws of stochastic rounding.

The mean over n draws at each of 98 points (seven in each interval of the grid, both signs) is held to Hoeffding's
bound: a draw lies in an interval of the width w of the grid's step, so |mean - v| > w sqrt(log(2 * 98 / p) / 2n)
has probability p at most for any of the points, over the choice of the keys, whatever the distribution.
"""

import math

import numpy as np

from fp4jax.testing import subject as grid
from fp4jax.testing.nearest import _all_reached, spread_data
from fp4jax.testing.subject import GRID, Subject, Violation

FALSE_ALARMS = 1e-6
_SEED = 20
# Eighths of every interval: a generator of 8 or 16 bits has these probabilities exactly.
POINTS = (GRID[:-1, None] + np.diff(GRID)[:, None] * np.arange(1, 8) / 8).reshape(-1)


def _drawn(subject: Subject, points, count, seed):
    """[points, count] results."""
    repeated = np.repeat(points, count).astype(np.float32)
    out = subject.draw(grid.on_grid(repeated), seed)
    return grid.from_grid(out.values, repeated.size).reshape(points.size, count)


def all_values(subject: Subject) -> str:
    out = _drawn(subject, POINTS, 256, _SEED)
    return _all_reached(out.reshape(-1), f"256 draws at {POINTS.size} points")


def neighbours_only(subject: Subject) -> str:
    rng = np.random.default_rng(3)
    points = np.concatenate([POINTS, GRID, rng.uniform(-6, 6, 400)]).astype(np.float32)
    out = _drawn(subject, points, 48, _SEED + 1)
    low, high = grid.neighbours(points)
    snapped = grid.snap(out.reshape(-1)).reshape(out.shape)
    wrong = ~((snapped == low[:, None]) | (snapped == high[:, None]))
    if wrong.any():
        at = tuple(np.argwhere(wrong)[0].tolist())
        seen = f"{points[at[0]]:g} came out as {out[at]:g}, its neighbours are {low[at[0]]:g} and {high[at[0]]:g}"
        raise Violation(f"{wrong.sum():,} of {wrong.size:,} draws: {seen}")
    return f"48 draws at {points.size} points; grid values stay"


def unbiased(subject: Subject) -> str:
    draws = subject.draws
    bound = math.sqrt(math.log(2 * POINTS.size / FALSE_ALARMS) / (2 * draws))
    out = _drawn(subject, POINTS, draws, _SEED + 2).astype(np.float64)
    low, high = grid.neighbours(POINTS)
    error = (out.mean(axis=1) - POINTS) / (high - low)
    worst = int(np.nanargmax(np.abs(error))) if np.isfinite(error).any() else 0
    if not np.all(np.abs(error) <= bound):
        share = int(np.sum(~(np.abs(error) <= bound)))
        raise Violation(
            f"{share} of {POINTS.size} points: the mean of {draws:,} draws at {POINTS[worst]:g} is "
            f"{out[worst].mean():.4f}; allowed is {bound:.3f} of the interval's width {high[worst] - low[worst]:g}"
        )
    return (
        f"{POINTS.size} points x {draws:,} draws, largest error {abs(error[worst]):.4f} of an interval, "
        f"allowed {bound:.3f} (false alarms < {FALSE_ALARMS:g})"
    )


def follows_its_key(subject: Subject) -> str:
    x = spread_data()
    first, again, other = (subject.draw(x, seed).values for seed in (1, 1, 2))
    if not np.array_equal(first, again):
        raise Violation(f"one key, two results: {np.sum(first != again)} of {x.size} values differ")
    if np.array_equal(first, other):
        raise Violation("two keys give one result: nothing is drawn")
    return "one key gives one result, two keys give two"


LAWS = (
    ("all 15 values, stochastic", all_values),
    ("stochastic: two neighbours only", neighbours_only),
    ("stochastic: E[SR(v)] = v", unbiased),
    ("stochastic: follows its key", follows_its_key),
)

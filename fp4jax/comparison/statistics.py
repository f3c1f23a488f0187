"""Loss gaps, their intervals and paired tests.

Loss gap of a recipe: (its validation loss - the baseline's) / the baseline's, in per cent, at equal tokens and with the
same seed: the same data from the same initial weights. A mean over seeds, with Student's t interval.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from fp4jax.comparison.records import Record

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` seeds; `half_width` of its 95 % interval and `p` (mean = 0, two-sided) are None for one seed."""

    mean: float
    half_width: float | None
    p: float | None
    n: int


@dataclass(frozen=True)
class Pair:
    """The paired difference of two recipes' loss gaps, `first` - `second`, in per cent of the baseline's loss.

    p_adjusted: by Holm's method over all secondary pairs; the primary one, declared beforehand, stands alone.
    """

    first: str
    second: str
    difference: Estimate
    p_adjusted: float | None
    primary: bool


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, interval and test of paired differences.

    Differences that are all the same leave no spread to judge by: their interval has no width, and p is 0, or 1 for
    differences that are all zero.
    """
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Estimate(mean, None, None, n)
    error = float(np.std(values, ddof=1)) / n**0.5
    half_width = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * error
    if error == 0:
        return Estimate(mean, 0.0, float(mean == 0), n)
    return Estimate(mean, half_width, float(2 * stats.t.sf(abs(mean) / error, n - 1)), n)


def gaps_by_seed(records: Sequence[Record], baseline: str) -> dict[str, dict[int, float]]:
    """Recipe → seed → loss gap in per cent, where both runs came to their end."""
    losses = {(record.recipe, record.seed): record.validation_loss for record in records}
    found: dict[str, dict[int, float]] = {record.recipe: {} for record in records}
    for (name, seed), loss in losses.items():
        reference = losses.get((baseline, seed))
        if loss is not None and reference is not None:
            found[name][seed] = 100 * (loss - reference) / reference
    return found


def gaps(records: Sequence[Record], baseline: str) -> dict[str, Estimate | None]:
    """Recipe → loss gap; None where no seed came to its end under both."""
    by_seed = gaps_by_seed(records, baseline)
    return {name: estimate(list(values.values())) if values else None for name, values in by_seed.items()}


def pairs(records: Sequence[Record], baseline: str, primary: tuple[str, str] | None) -> list[Pair]:
    """Every two recipes over the seeds that both finished: the primary pair first, the others by Holm's method."""
    by_seed = gaps_by_seed(records, baseline)
    names = sorted(by_seed, key=lambda name: name == baseline)  # a recipe minus the baseline, not the reverse
    wanted = [pair for pair in itertools.combinations(names, 2) if primary is None or set(pair) != set(primary)]
    differences = {}
    for first, second in [*([primary] if primary else []), *wanted]:
        seeds = by_seed.get(first, {}).keys() & by_seed.get(second, {}).keys()  # a declared one may not have run yet
        if seeds:
            differences[first, second] = estimate([by_seed[first][s] - by_seed[second][s] for s in sorted(seeds)])
    secondary = [pair for pair in differences if pair != primary]
    adjusted = dict(zip(secondary, holm([differences[pair].p for pair in secondary]), strict=True))
    return [
        Pair(*pair, difference, difference.p if pair == primary else adjusted[pair], pair == primary)
        for pair, difference in differences.items()
    ]


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's adjusted p values (Scand. J. Statist. 6, 1979); a None is no test and stays None."""
    order = sorted((i for i, p in enumerate(p_values) if p is not None), key=lambda i: p_values[i])
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min((len(order) - rank) * p_values[i], 1.0))
        adjusted[i] = largest
    return adjusted

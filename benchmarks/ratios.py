"""Ratios of paired times, with a bootstrap interval."""

from collections.abc import Sequence

import numpy as np

CONFIDENCE = 0.95
_RESAMPLES = 10_000


def paired_ratio(times: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Median over the turns of time / reference's time in the same turn, with the percentile bootstrap's 95 % interval.

    Raises:
      ValueError: the two have not as many turns, or none.
    """
    if len(times) != len(reference) or not times:
        raise ValueError(f"paired times are needed, got {len(times)} and {len(reference)}")
    ratios = np.asarray(times) / np.asarray(reference)
    drawn = np.random.default_rng(0).integers(0, len(ratios), (_RESAMPLES, len(ratios)))
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(np.median(ratios[drawn], axis=1), [tail, 100 - tail])
    return {"ratio": float(np.median(ratios)), "low": float(low), "high": float(high)}

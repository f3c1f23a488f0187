"""Matrices on which the order of the float32 operations shows: block scales and block errors within ulps of a tie."""

import ml_dtypes
import numpy as np

from tests.oracle import BLOCK, E2M1_VALUES, encode_nearest

_SCALES = np.arange(8, 120, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)  # normal, up to 240
_SCALE_TIES = (_SCALES[1:] + _SCALES[:-1]) / 2


def near_ties(rng, shape):
    """A float32 matrix. Block scales lie next to a tie of E4M3 for a tensor scale of amax / 2688 (even blocks) or of
    amax / 1536 (odd blocks), there with 1.5 times the scale or not; and where one element can make the squared errors
    of the two candidates of four-over-six equal, it does.
    """
    rows, columns = shape
    x = rng.uniform(-1, 1, (rows, columns // BLOCK, BLOCK))
    amax = rng.uniform(1, 2)
    largest = np.where(np.arange(columns // BLOCK) % 2 == 0, 2688.0, 1536.0)
    ties = rng.choice(_SCALE_TIES, x.shape[:2]) / rng.choice([1, 1.5], x.shape[:2])
    peak = ties * 6 * amax / largest
    x *= peak[..., None]
    x[..., 0] = peak
    x = _equal_errors(x, amax / 1536)
    x = _ulps_away(x, rng)
    x[0, 0, 0] = np.float32(amax)
    return x.reshape(shape)


def _equal_errors(x, tensor_scale):
    """Moves one element of each block to where both candidates' squared errors are equal, if that changes no code."""
    base = np.abs(x).max(axis=-1, keepdims=True) / 6 / tensor_scale
    steps = [np.minimum(base * f, 448).astype(ml_dtypes.float8_e4m3fn).astype(float) * tensor_scale for f in (1.5, 1)]
    codes = [encode_nearest(x / step) for step in steps]
    four, six = (E2M1_VALUES[code] * step for code, step in zip(codes, steps, strict=True))
    each = (four - x) ** 2 - (six - x) ** 2
    rest = each.sum(axis=-1, keepdims=True) - each
    with np.errstate(all="ignore"):
        moved = (rest + four**2 - six**2) / (2 * (four - six))
        same = [encode_nearest(moved / step) == code for step, code in zip(steps, codes, strict=True)]
    possible = same[0] & same[1] & (np.abs(moved) < 0.99 * np.abs(x[..., :1]))
    possible[..., 0] = False
    chosen = possible & (np.cumsum(possible, axis=-1) == 1)
    return np.where(chosen, moved, x)


def _ulps_away(x, rng):
    """float32 numbers up to two units in the last place from x."""
    return (x.astype(np.float32).view(np.int32) + rng.integers(-2, 3, x.shape, np.int32)).view(np.float32)

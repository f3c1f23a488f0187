"""What is under test, seen through one interface: values always, codes and scales where there are any.

`on_grid` makes a quantizer's element grid visible from outside: it puts a 6 into every block and 2688 into the first,
so that NVFP4 with its tensor scale (2688 / 2688), NVFP4 without one and MXFP4 (blocks of 32, scales that are powers of
two) all have the block scale 1. What comes out is then an element of the grid, exactly.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from fp4jax.numerics import NVFP4

BLOCK = NVFP4.block
DRAWS = 16_384
PER_BLOCK = BLOCK - 1  # free elements of a block whose first one fixes its scale
MAGNITUDES = np.array(NVFP4.element.magnitudes)
GRID = np.concatenate([-MAGNITUDES[:0:-1], MAGNITUDES])  # 15 values: zero has one sign
_ROW_BLOCKS = 64
_SKIPPED = 2  # the blocks beside 2688 hold no points, not in blocks of 32 either


@dataclasses.dataclass(frozen=True)
class Output:
    """What one call returned, in NumPy.

    `codes` (0..15, unpacked), `scales` (E4M3 bytes, one a block) and `amax` are None where only values were returned.
    `epsilon` is the relative error that the dtype of the values may have added.
    """

    values: np.ndarray
    epsilon: float
    codes: np.ndarray | None
    scales: np.ndarray | None
    amax: float | None


class NotApplicable(Exception):
    """The law asks for something that the quantizer does not show; the message says what."""


class Violation(Exception):
    """The law does not hold; the message says what was seen."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """The callables under test, each but the first may be None; `draws` for each mean of stochastic rounding."""

    nearest: Callable
    stochastic: Callable | None = None
    square: Callable | None = None
    draws: int = DRAWS

    def __call__(self, x) -> Output:
        return observe(self.nearest(jnp.asarray(x)), np.shape(x))

    def draw(self, x, seed: int) -> Output:
        if self.stochastic is None:
            raise NotApplicable("no stochastic_fn was given")
        return observe(self.stochastic(jnp.asarray(x), jax.random.key(seed)), np.shape(x))


def observe(result, shape: tuple[int, ...]) -> Output:
    """The `Output` of whatever a quantizer returned for an array of `shape`.

    Raises:
      Violation: the values have another shape, or codes, scales and amax do not fit it.
    """
    has_codes = all(hasattr(result, name) for name in ("codes", "scales", "amax", "dequantize"))
    values = np.asarray(result.dequantize() if has_codes else result)
    if values.shape != shape:
        raise Violation(f"values of shape {values.shape} for an array of shape {shape}")
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise Violation(f"values of dtype {values.dtype}: dequantized floating-point numbers are needed")
    epsilon = 4 * float(jnp.finfo(values.dtype).eps)
    if not has_codes:
        return Output(values.astype(np.float32), epsilon, None, None, None)
    packed, scales, amax = (np.asarray(part) for part in (result.codes, result.scales, result.amax))
    columns, blocks = -(-shape[-1] // BLOCK) * BLOCK, -(-shape[-1] // BLOCK)
    if packed.dtype != np.uint8 or packed.shape != (*shape[:-1], columns // 2):
        raise Violation(
            f"codes must be uint8 of shape {(*shape[:-1], columns // 2)}, two a byte along the last axis: "
            f"got {packed.dtype} of shape {packed.shape}"
        )
    if scales.dtype.itemsize != 1 or scales.shape[-1:] != (blocks,):
        raise Violation(f"scales must be {blocks} E4M3 bytes a row, got {scales.dtype} of shape {scales.shape}")
    if amax.size != 1:
        raise Violation(f"amax must be one number for a matrix, got shape {amax.shape}")
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*shape[:-1], columns)
    return Output(values.astype(np.float32), epsilon, codes, scales.view(np.uint8), float(amax.reshape(())))


def decoded_scales(scales: np.ndarray) -> np.ndarray:
    """float32 values of E4M3 bytes."""
    return scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def on_grid(points: np.ndarray) -> np.ndarray:
    """A matrix in which a quantizer sees each of `points` unscaled; `from_grid` finds them again."""
    row, skip = _ROW_BLOCKS * PER_BLOCK, _SKIPPED * PER_BLOCK
    rows = -(-(points.size + skip) // row)
    padded = np.zeros(max(8, 1 << (rows - 1).bit_length()) * row, np.float32)  # few shapes, so few compilations
    padded[skip : skip + points.size] = points
    blocks = padded.reshape(-1, PER_BLOCK)
    peaks = np.full((len(blocks), 1), NVFP4.element.max, np.float32)
    peaks[0] = NVFP4.range
    return np.concatenate([peaks, blocks], axis=1).reshape(-1, _ROW_BLOCKS * BLOCK)


def from_grid(values: np.ndarray, count: int) -> np.ndarray:
    """What became of the points of `on_grid`."""
    return values.reshape(-1, BLOCK)[_SKIPPED:, 1:].reshape(-1)[:count]


def snap(values: np.ndarray) -> np.ndarray:
    """Each value moved to the grid where it is within 2^-7 of it (scales kept in bfloat16 cost that), else NaN."""
    nearest = GRID[np.abs(values[:, None] - GRID).argmin(axis=1)]
    close = np.abs(values - nearest) <= 2.0**-7 * np.maximum(np.abs(nearest), 0.5)
    return np.where(close, nearest, np.nan)


def neighbours(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The grid values at or below and at or above each point, which lies within ±6."""
    above = np.searchsorted(GRID, points)
    exact = GRID[above] == points
    return np.where(exact, points, GRID[above - 1]), GRID[above]

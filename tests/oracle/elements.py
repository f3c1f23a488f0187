"""Element grids, from their published encodings, and rounding to them."""

import ml_dtypes
import numpy as np


def _float8(dtype, finite_codes):
    return np.arange(finite_codes, dtype=np.uint8).view(dtype).astype(np.float64)


# Non-negative values in the order of their codes; the sign is the bit above.
MAGNITUDES = {
    "e2m1": np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]),
    "e4m3": _float8(ml_dtypes.float8_e4m3fn, 127),
    "e5m2": _float8(ml_dtypes.float8_e5m2, 124),
    "int8": np.arange(128.0),
    "ternary": np.array([0.0, 1.0]),
    "sign": np.array([1.0]),
}
SIGN_BIT = {"e2m1": 8, "e4m3": 128, "e5m2": 128, "int8": 128, "ternary": 2, "sign": 1}
E2M1_MAGNITUDES = MAGNITUDES["e2m1"]
E2M1_VALUES = np.concatenate([E2M1_MAGNITUDES, -E2M1_MAGNITUDES])


def encode_nearest(v, element="e2m1"):
    """Codes by round to nearest, ties to the even code, saturating; the sign of a negative zero is kept."""
    grid = MAGNITUDES[element]
    magnitude = np.minimum(np.abs(np.asarray(v, np.float64)), grid[-1])
    high = np.clip(np.searchsorted(grid, magnitude, side="left"), min(1, len(grid) - 1), len(grid) - 1)
    low = np.maximum(high - 1, 0)
    below, above = magnitude - grid[low], grid[high] - magnitude
    even = np.where(low % 2 == 0, low, high)
    code = np.where(below < above, low, np.where(above < below, high, even))
    return (code + SIGN_BIT[element] * np.signbit(v)).astype(np.uint8)


def encode_stochastic(v, draws, element="e2m1"):
    """Codes by floor(position + draw / 65536), the position in the code domain rounded to 16 fraction bits."""
    grid = MAGNITUDES[element]
    magnitude = np.minimum(np.abs(np.asarray(v, np.float64)), grid[-1])
    position = np.interp(magnitude, grid, np.arange(float(len(grid))))
    fixed = np.rint(position * 65536).astype(np.int64)
    return (((fixed + draws) >> 16) + SIGN_BIT[element] * np.signbit(v)).astype(np.uint8)


def decode(codes, element="e2m1"):
    """float64 values."""
    sign = SIGN_BIT[element]
    return MAGNITUDES[element][codes & (sign - 1)] * np.where(codes & sign, -1.0, 1.0)


def pack(codes, axis=-1):
    """Two codes a byte along `axis`: the even index in the low nibble."""
    codes = np.moveaxis(np.asarray(codes), axis, -1)
    return np.moveaxis(codes[..., 0::2] | (codes[..., 1::2] << 4), -1, axis)

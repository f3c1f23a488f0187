"""The Hadamard transform and the column mean."""

import ml_dtypes
import numpy as np

from tests.oracle.draws import signs

HADAMARD_SIGNS = np.array([1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1], np.float64)


def hadamard_matrix(size=16, sign=None):
    """diag(s) @ H / sqrt(size), float64; H by Sylvester's construction; s None: the fixed signs of that size."""
    h = np.ones((1, 1))
    while h.shape[0] < size:
        h = np.block([[h, h], [h, -h]])
    if sign is None:
        sign = HADAMARD_SIGNS if size == 16 else signs((0, 0), size)
    return np.reshape(sign, (size, 1)) * h / np.sqrt(size)


def rotate(x, axis=-1, size=16, sign=None):
    """The transform of every group of `size` along `axis` (a multiple of it), in float64."""
    moved = np.moveaxis(np.asarray(x).astype(np.float64), axis, -1)
    groups = moved.reshape(*moved.shape[:-1], -1, size)
    return np.moveaxis((groups @ hadamard_matrix(size, sign)).reshape(moved.shape), -1, axis)


def hadamard(x, axis=-1, size=16, sign=None):
    """`rotate`, rounded once to bfloat16."""
    return rotate(x, axis, size, sign).astype(ml_dtypes.bfloat16)


def column_mean(x, one, batch_dims=0, axes=None):
    """float32 [*batch, columns]: mean of the rows where `one` is 1, summed in float64.

    With `axes` the mean over these axes, which are kept with size 1.
    """
    keep = axes is not None
    rows = axes if keep else tuple(range(batch_dims, x.ndim - 1))
    total = np.where(one > 0, np.asarray(x).astype(np.float64), 0).sum(axis=rows, keepdims=keep)
    return (total / np.maximum(one.sum(axis=rows, keepdims=keep), 1)).astype(np.float32)

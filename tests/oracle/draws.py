"""Random bits by counters: 16 for every element of a matrix."""

import numpy as np

SCALES = 0x5CA1E  # the stream of block scales inside the stream of their elements


def _u32(x):
    return np.asarray(x, np.uint64) & np.uint64(0xFFFFFFFF)


def mix(x):
    x = _u32(x)
    x = x ^ (x >> np.uint64(16))
    x = _u32(x * np.uint64(0x21F0AAAD))
    x = x ^ (x >> np.uint64(15))
    x = _u32(x * np.uint64(0x735A2D97))
    return x ^ (x >> np.uint64(15))


def fold(words, data):
    """Words of the sub-stream `data` (an integer or an array of integers)."""
    k0, k1 = _u32(words[0]), _u32(words[1])
    data = _u32(data)
    return mix(k0 ^ mix(_u32(data + np.uint64(0x9E3779B9)))), mix(_u32(k1 + mix(data ^ np.uint64(0x85EBCA6B))))


def draw(words, row, column, batch):
    """16-bit draws, int64, for broadcastable counters."""
    row, column, batch = (_u32(c) for c in (row, column, batch))
    k0, k1 = fold(words, batch)
    a = mix(row ^ k0)
    b = mix(_u32(a + k1))
    h = mix(_u32(a + _u32((column >> np.uint64(1)) * np.uint64(0x9E3779B9))) ^ b)
    return np.where(column % 2 == 0, h & np.uint64(0xFFFF), h >> np.uint64(16)).astype(np.int64)


def draws_like(words, shape, batch_dims=0):
    """The draw of every element of [*batch, *rows, columns]; one axis beyond the batch is a single row."""
    batch_shape, matrix = shape[:batch_dims], shape[batch_dims:]
    batches, columns = int(np.prod(batch_shape)), matrix[-1]
    rows = int(np.prod(matrix[:-1]))
    b, r, c = np.ogrid[:batches, :rows, :columns]
    return draw(words, r, c, b).reshape(shape)


def signs(words, size):
    """`size` random signs: -1 where the lowest bit of a draw of row 0 is set."""
    return np.where(draws_like(words, (1, size))[0] & 1, -1.0, 1.0)

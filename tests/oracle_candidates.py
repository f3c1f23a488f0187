"""Four-over-six in NumPy, from the description of its arithmetic; shares no code with fp4jax.

Each block is quantized twice, with a scale that sends its maximum to 6 and with one that sends it to 4 (1.5 times as
large), and keeps the copy with the smaller error, the one at 6 on a tie. Cook et al., "Four Over Six",
arXiv 2512.02010; the order of the float32 operations is that of Transformer Engine 2.20's reference.
"""

import ml_dtypes
import numpy as np

from tests.oracle import BLOCK, E2M1_VALUES, F32, FLT_MAX, Quantized, _block_amax, encode_nearest

RANGE = F32(6 * 256)  # the block scales use E4M3 up to 256, so that 1.5 times the largest is still one


def four_over_six(x, *, two_d=False, error="square"):
    """Blocks of 16 along the last axis of a matrix whose sizes are multiples of 16, or 16x16."""
    x = np.asarray(x).astype(F32)
    with np.errstate(all="ignore"):
        amax = np.abs(x).max()
        encode = np.minimum(RANGE / amax, FLT_MAX)
        encode = F32(1) if encode == 0 else encode
        base = _block_amax(np.abs(x), -1, BLOCK if two_d else 1) / F32(6) * encode
        six = _candidate(x, base, encode, amax, error)
        four = _candidate(x, base * F32(1.5), encode, amax, error)
        better = _per_block(four[2], two_d) < _per_block(six[2], two_d)
    codes, scales = (np.where(better, f, s) for f, s in zip(four[:2], six[:2], strict=True))
    return Quantized(codes, scales, np.asarray(amax, F32), 0)


def _candidate(x, scale, encode, amax, error):
    """Codes, scale bytes and the error of each element."""
    scale = np.minimum(scale, F32(448)).astype(ml_dtypes.float8_e4m3fn)
    decoded = scale.astype(F32)
    inverse = np.minimum(F32(1) / (decoded * (F32(1) / encode)), FLT_MAX)
    codes = encode_nearest(np.clip(x * inverse, F32(-6), F32(6)))
    difference = E2M1_VALUES.astype(F32)[codes] * decoded * amax / RANGE - x
    assert difference.dtype == F32
    return codes, scale.view(np.uint8), difference * difference if error == "square" else np.abs(difference)


def _per_block(error, two_d):
    """Each block's error, repeated to x's shape: left to right along a row, then halving over the rows of a tile."""
    rows, columns = error.shape
    blocks = error.reshape(rows, columns // BLOCK, BLOCK)
    total = np.zeros(blocks.shape[:2], F32)
    for index in range(BLOCK):
        total = total + blocks[:, :, index]
    if two_d:
        total = total.reshape(rows // BLOCK, BLOCK, -1)
        for half in (8, 4, 2, 1):
            total = total[:, :half] + total[:, half:]
        total = np.repeat(total[:, 0], BLOCK, axis=0)
    return np.repeat(total, BLOCK, axis=1)

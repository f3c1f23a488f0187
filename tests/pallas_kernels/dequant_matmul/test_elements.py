"""What the compiled kernel does to four bytes at once, on NumPy's integers: all bytes in all places."""

import jax.numpy as jnp
import numpy as np
import pytest

from fp4jax.numerics import E2M1, rounding
from pallas_kernels.dequant_matmul import elements


def permute(word, selector):
    """`prmt.b32` of a word and zeros: each nibble of the selector names a byte, 4 to 7 those of the second operand."""
    chosen = [selector >> 4 * i & 0xF for i in range(4)]
    return sum(
        (word >> np.uint32(8 * which) & np.uint32(0xFF) if which < 4 else 0) << 8 * i for i, which in enumerate(chosen)
    )


@pytest.mark.parametrize("neighbours", [0x00, 0xFF, 0xA5])
def test_four_bytes_at_once(neighbours):
    codes = np.full((4, 256, 4), neighbours, np.uint8)
    for place in range(4):
        codes[place, :, place] = np.arange(256)
    low, high = elements.halves(codes.view(np.uint32)[..., 0], permute)
    for half, shift in ((low, 0), (high, 4)):
        got = np.stack(half, axis=-1).astype(np.uint32).view(np.float16)
        want = np.asarray(rounding.decode(jnp.asarray(codes >> shift & 15, jnp.uint32), E2M1))
        np.testing.assert_array_equal(got.astype(np.float32) * 2.0**14, want)
        assert (np.signbit(got) == (codes >> shift & 8 != 0)).all()


def test_what_the_interpreter_runs_is_the_same():
    codes = np.arange(256, dtype=np.uint8)
    for half, shift in zip(elements.interpreted(jnp.asarray(codes)), (0, 4), strict=True):
        want = rounding.decode(jnp.asarray(codes >> shift & 15, jnp.uint32), E2M1)
        np.testing.assert_array_equal(np.asarray(half, np.float32) * 2.0**14, np.asarray(want))

"""Formats as rows of data agree with the published encodings."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from fp4jax.numerics import E2M1, E4M3, NVFP4, Rounding


def test_e2m1_magnitudes():
    assert E2M1.magnitudes == (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    expected = np.arange(8, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert np.array_equal(E2M1.magnitudes, expected)


def test_e4m3_magnitudes():
    expected = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.array_equal(E4M3.magnitudes, expected)
    assert E4M3.magnitudes[1] == E4M3.ulp_of_subnormals == 2.0**-9
    assert E4M3.magnitudes[8] == 2.0**E4M3.min_exponent


@pytest.mark.parametrize("element", [E2M1, E4M3], ids=lambda e: e.name)
def test_code_pieces_map_magnitudes_to_codes(element):
    pieces = np.array(element.code_pieces)
    codes = (np.array(element.magnitudes)[:, None] * pieces[:, 0] + pieces[:, 1]).min(axis=1)
    assert np.array_equal(codes, np.arange(len(element.magnitudes)))
    # The slopes are powers of two: multiplication by them is exact, contracted or not.
    assert np.all(np.frexp(pieces[:, 0])[0] == 0.5)


def test_nvfp4_row():
    assert (NVFP4.element, NVFP4.scale, NVFP4.block) == (E2M1, E4M3, 16)
    assert NVFP4.range == 2688
    assert NVFP4.inverse_peak == np.float32(1) / np.float32(6)
    assert NVFP4.inverse_peak.dtype == np.float32


def test_formats_are_values():
    assert hash(NVFP4) == hash(dataclasses.replace(NVFP4))
    assert dataclasses.replace(NVFP4, block=32) != NVFP4
    with pytest.raises(dataclasses.FrozenInstanceError):
        NVFP4.block = 32
    assert [str(r) for r in Rounding] == ["nearest", "stochastic"]

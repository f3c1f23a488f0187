"""Quantization to NVFP4, in blocks of 1x16 along rows and along columns, and of 16x16.

Twin: `fp4jax.numerics.quantize_blocks`.
"""

from pallas_kernels.quantize.api import (
    quantize_2d,
    quantize_columns,
    quantize_copies,
    quantize_rows,
    unsupported_reason,
)

__all__ = ["quantize_2d", "quantize_columns", "quantize_copies", "quantize_rows", "unsupported_reason"]

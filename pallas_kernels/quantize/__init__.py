"""Row-wise quantization to NVFP4 in blocks of 1x16. Twin: `fp4jax.numerics.quantize_blocks`."""

from pallas_kernels.quantize.api import quantize_rows, unsupported_reason

__all__ = ["quantize_rows", "unsupported_reason"]

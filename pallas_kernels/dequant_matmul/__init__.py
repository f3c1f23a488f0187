"""The product of two arrays quantized to NVFP4, decoded on the way into the tensor cores of Hopper GPUs.

Twin: the product of `QTensor.values` with float32 accumulation, times the tensor scales, up to the order of additions.
"""

from pallas_kernels.dequant_matmul.api import DTYPES, dequant_matmul, misfit, unsupported_reason

__all__ = ["DTYPES", "dequant_matmul", "misfit", "unsupported_reason"]

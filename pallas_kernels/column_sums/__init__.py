"""Column sums of an array quantized to NVFP4 along its rows. Twin: the sum of `QTensor.dequantize()` over the rows."""

from pallas_kernels.column_sums.api import column_sums

__all__ = ["column_sums"]

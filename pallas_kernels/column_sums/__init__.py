"""Column sums of an array quantized to NVFP4 along its rows. Twin: `fp4jax.numerics.column_sums`."""

from pallas_kernels.column_sums.api import column_sums

__all__ = ["column_sums"]

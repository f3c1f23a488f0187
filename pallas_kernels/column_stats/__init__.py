"""Sum, minimum and maximum of every column in one read. Twin: `fp4jax.numerics.column_stats`."""

from pallas_kernels.column_stats.api import column_stats

__all__ = ["column_stats"]

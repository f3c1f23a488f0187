"""The specification of every quantized value, in plain JAX on any backend; it imports nothing else of fp4jax."""

# What a number may be.
from fp4jax.numerics.formats import (
    E2M1, E4M3, FORMATS, FP8_E4M3, FP8_E5M2, INT8, MXFP4, MXFP8, NVFP4, NVFP4_256, NVFP4_EDEN, NVFP4_OUTER128,
    NVFP4_VECTOR, SIGN, TERNARY, Extent, Float, Format, Rounding, ScaleRounding, Statistic,
)  # fmt: skip

# How a tensor becomes such numbers, and back.
from fp4jax.numerics.qtensor import QTensor
from fp4jax.numerics.quantize import quantize, quantize_blocks

# What may be done to an operand before: transform and split.
from fp4jax.numerics.hadamard import hadamard, rotate
from fp4jax.numerics.low_rank import low_rank_factors
from fp4jax.numerics.column_stats import ColumnStats, column_stats
from fp4jax.numerics.column_sums import column_sums
from fp4jax.numerics.splits import column_mean, mask_rows, residual, row_count

# The noise of stochastic rounding.
from fp4jax.numerics.bits import draws, fold, key_words, matrix_draws

__all__ = [
    "E2M1", "E4M3", "FORMATS", "FP8_E4M3", "FP8_E5M2", "INT8", "MXFP4", "MXFP8", "NVFP4", "NVFP4_256", "NVFP4_EDEN",
    "NVFP4_OUTER128", "NVFP4_VECTOR", "SIGN", "TERNARY", "Extent", "Float", "Format", "Rounding", "ScaleRounding",
    "Statistic", "QTensor", "quantize", "quantize_blocks", "hadamard", "rotate", "low_rank_factors", "ColumnStats",
    "column_stats", "column_sums", "column_mean", "mask_rows", "residual", "row_count", "draws", "fold", "key_words",
    "matrix_draws",
]  # fmt: skip

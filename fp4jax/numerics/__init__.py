"""The specification of every quantized value, in plain JAX on any backend; it imports nothing else of fp4jax."""

# What a number may be.
from fp4jax.numerics.formats import E2M1, E4M3, NVFP4, Float, Format, Rounding

# How a tensor becomes such numbers, and back.
from fp4jax.numerics.qtensor import QTensor
from fp4jax.numerics.quantize import quantize, quantize_blocks

# What may be done to an operand before: transform and split.
from fp4jax.numerics.hadamard import hadamard
from fp4jax.numerics.splits import column_mean, mask_rows, residual, row_count

# The noise of stochastic rounding.
from fp4jax.numerics.bits import draws, fold, key_words, matrix_draws

__all__ = [
    "E2M1", "E4M3", "NVFP4", "Float", "Format", "Rounding", "QTensor", "quantize", "quantize_blocks", "hadamard",
    "column_mean", "mask_rows", "residual", "row_count", "draws", "fold", "key_words", "matrix_draws",
]  # fmt: skip

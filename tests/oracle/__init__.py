"""An independent NumPy oracle of the numerics: written from the specification's formulas, shares no code with fp4jax.

What decides a code or a scale is computed in IEEE float32 in the order the specification fixes, or exactly in
float64; the GEMMs of the linear layer are evaluated in float64 on the oracle's own quantized values. Arrays are plain
NumPy; bfloat16 comes in as ml_dtypes.bfloat16. Nothing here imports jax.

Conventions
    matrices        [*batch, *rows, columns]; a position's counters are the flat index of its batch, the flat index
                    over the row axes, and the column
    stream          the two uint32 words of a key: fold(words, slot) for the slots of `layer`
"""

from tests.oracle.draws import SCALES, draw, draws_like, fold, mix, signs
from tests.oracle.elements import (
    E2M1_MAGNITUDES, E2M1_VALUES, MAGNITUDES, decode, encode_nearest, encode_stochastic, pack,
)  # fmt: skip
from tests.oracle.formats import FORMATS, Format, Quantized, quantize
from tests.oracle.layer import Layer, linear_layer
from tests.oracle.plan import plan
from tests.oracle.transforms import HADAMARD_SIGNS, column_mean, hadamard, hadamard_matrix, rotate

__all__ = [
    "SCALES", "draw", "draws_like", "fold", "mix", "signs", "E2M1_MAGNITUDES", "E2M1_VALUES", "MAGNITUDES", "decode",
    "encode_nearest", "encode_stochastic", "pack", "FORMATS", "Format", "Quantized", "quantize", "Layer",
    "linear_layer", "plan", "HADAMARD_SIGNS", "column_mean", "hadamard", "hadamard_matrix", "rotate",
]  # fmt: skip

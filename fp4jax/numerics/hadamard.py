"""The 16-wide random Hadamard transform with fixed signs, along any axis.

x' = x.reshape(..., 16) @ (diag(s) H16) / 4 is orthogonal: applied to both operands of a matrix product along their
contraction axis it cancels, and spreads each outlier over 16 values. Signs and use (wgrad's operands only): NVIDIA,
"Pretraining LLMs with NVFP4", arXiv 2509.25149.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

SIZE = 16
SIGNS = np.array([1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1], np.float32)


def hadamard(x: Float[Array, "*shape"], axis: int) -> Float[Array, "*shape"]:
    """Transforms each group of 16 along `axis`; float32 in the order of a butterfly, then rounded to bfloat16.

    The rounding is part of the published recipe: maxima and quantization see bfloat16 values, whatever the input dtype.

    Args:
      x: any floating dtype; the size of `axis` is a multiple of 16.

    Returns:
      float32 holding bfloat16 values.
    """
    axis %= x.ndim
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    groups = x.astype(jnp.float32).reshape(*before, -1, SIZE, *after)
    groups = groups * SIGNS.reshape(*[1] * (axis + 1), SIZE, *[1] * len(after))
    for width in (1, 2, 4, 8):
        pairs = groups.reshape(*before, -1, 2, width, *after)
        even = lax.index_in_dim(pairs, 0, axis + 1, keepdims=False)
        odd = lax.index_in_dim(pairs, 1, axis + 1, keepdims=False)
        groups = jnp.stack([even + odd, even - odd], axis=axis + 1)
    return round_to_bfloat16(groups.reshape(x.shape) * np.float32(0.25))


def round_to_bfloat16(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Nearest bfloat16 as float32; `reduce_precision` is the one rounding that XLA never removes."""
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)

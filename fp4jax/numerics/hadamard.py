"""The random Hadamard transform: groups of 16 or 128 along any axis, with fixed or fresh signs.

x' = x.reshape(..., n) @ (diag(s) H_n) / sqrt(n) is orthogonal: applied to both operands of a matrix product along their
contraction axis it cancels, and spreads each outlier over n values. Width 16 with fixed signs, on wgrad's operands
only: NVIDIA, "Pretraining LLMs with NVFP4", arXiv 2509.25149. Width 128 with fresh signs: arXiv 2601.22813.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32

from fp4jax.numerics import bits

SIZES = (16, 128)
SIGNS = np.array([1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1], np.float32)


def hadamard(
    x: Float[Array, "*shape"], axis: int, size: int = 16, signs: Float32[Array, "..."] | None = None
) -> Float[Array, "*shape"]:
    """`rotate`, rounded to bfloat16.

    The rounding is part of the published recipe: maxima and quantization see bfloat16 values, whatever the input dtype.

    Returns:
      float32 holding bfloat16 values.
    """
    return round_to_bfloat16(rotate(x, axis, size, signs))


def rotate(
    x: Float[Array, "*shape"], axis: int, size: int = 16, signs: Float32[Array, "..."] | None = None
) -> Float32[Array, "*shape"]:
    """Transforms each group of `size` along `axis`; float32 in the order of a butterfly.

    Args:
      x: any floating dtype; `axis` is a multiple of `size`.
      size: 16 or 128.
      signs: of the group's elements, with x's rank and `size` entries along `axis`; None for fixed ones.
    """
    axis %= x.ndim
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    groups = x.astype(jnp.float32).reshape(*before, -1, size, *after)
    if signs is None:
        signs = fixed_signs(size).reshape(*[1] * axis, size, *[1] * len(after))
    groups = groups * jnp.expand_dims(signs, axis)
    width = 1
    while width < size:
        pairs = groups.reshape(*before, -1, 2, width, *after)
        even = lax.index_in_dim(pairs, 0, axis + 1, keepdims=False)
        odd = lax.index_in_dim(pairs, 1, axis + 1, keepdims=False)
        groups = jnp.stack([even + odd, even - odd], axis=axis + 1)
        width *= 2
    return groups.reshape(x.shape) * np.float32(size**-0.5)


def fixed_signs(size: int) -> Float32[Array, " size"]:
    """The published signs for 16; for other sizes those of the zero key."""
    return jnp.asarray(SIGNS) if size == len(SIGNS) else bits.signs(jnp.zeros(2, jnp.uint32), size)


def round_to_bfloat16(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Nearest bfloat16 as float32; `reduce_precision` is the one rounding that XLA never removes."""
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)

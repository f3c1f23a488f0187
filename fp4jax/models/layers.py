"""The parts of a transformer that are not its matrix products: norms, rotary positions, attention.

Shapes: B batch, T sequence, N query heads, K key/value heads, H head_dim, D hidden.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int


class RMSNorm(nnx.Module):
    """x / rms(x) × weight over the last axis, in float32 (Zhang & Sennrich 2019).

    The weight may have leading axes (stacked layers), which a scan takes off before it is applied.
    """

    def __init__(self, shape: tuple[int, ...], axes: tuple[str | None, ...], epsilon: float):
        self.weight = nnx.Param(jnp.ones(shape, jnp.float32), out_sharding=axes, eager_sharding=False)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Normalizes the last axis and returns x's dtype."""
        x_f32 = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True) + self.epsilon)
        weight = self.weight[...].reshape(*[1] * (x.ndim - 1), -1)
        return (x_f32 * scale * weight).astype(x.dtype)


def rotary_angles(
    positions: Int[Array, "*P"], head_dim: int, theta: float
) -> tuple[Float32[Array, "*P h"], Float32[Array, "*P h"]]:
    """Cosines and sines of position × theta^(-2i / head_dim), i < head_dim / 2 (Su et al. 2021)."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = jnp.multiply.outer(positions.astype(jnp.float32), frequencies)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x_BxTxNxH: Float[Array, "B T N H"], cos_sin: tuple[Float32[Array, "*P h"], Float32[Array, "*P h"]]
) -> Float[Array, "B T N H"]:
    """Rotary position embedding; the pairs are (i, i + head_dim / 2), the layout of Hugging Face weights.

    The angles are [T, h], or [B, T, h] where every sequence has positions of its own.
    """
    cos, sin = (table[..., None, :].reshape(-1, x_BxTxNxH.shape[1], 1, table.shape[-1]) for table in cos_sin)
    first, second = jnp.split(x_BxTxNxH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BxTxNxH.dtype)


def causal_attention(
    q_BxTxNxH: Float[Array, "B T N H"],
    k_BxTxKxH: Float[Array, "B T K H"],
    v_BxTxKxH: Float[Array, "B T K H"],
    segments_BxT: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Scaled dot-product attention with grouped heads, in the operands' dtype with a float32 softmax.

    With segments a token attends to the tokens before it that are in its own segment.
    """
    mask = None if segments_BxT is None else (segments_BxT[:, :, None] == segments_BxT[:, None, :])[:, None]
    return jax.nn.dot_product_attention(q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, mask=mask, is_causal=True)

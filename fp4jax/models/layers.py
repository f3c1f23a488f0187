"""The parts of a transformer that are not its matrix products: norms, rotary positions, attention.

Shapes: B batch, T sequence, N query heads, K key/value heads, H head_dim, D hidden.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int

from fp4jax import scopes
from fp4jax.hardware import Hardware, current

EVERY_SEGMENT = -(1 << 31)
"""The segment of tokens that all tokens behind them attend to, whatever their own."""

_CUDNN_LEAST_CAPABILITY = (8, 0)
_CUDNN_LARGEST_HEAD, _CUDNN_HEAD_MULTIPLE = 128, 8


class RMSNorm(nnx.Module):
    """x / rms(x) × weight over the last axis, in float32 (Zhang & Sennrich 2019).

    The weight may have leading axes (stacked layers), which a scan takes off before it is applied.
    """

    def __init__(self, shape: tuple[int, ...], axes: tuple[str | None, ...], epsilon: float):
        self.weight = nnx.Param(jnp.ones(shape, jnp.float32), out_sharding=axes, eager_sharding=False)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Normalizes the last axis and returns x's dtype."""
        return _rms_norm(x, self.weight[...].reshape(*[1] * (x.ndim - 1), -1), self.epsilon)


# Checkpointed: for the backward their inputs are kept, not the float32 values in between, which are twice as large, and
# cheap to make again while the inputs are read. Without the barriers that keep the two computations apart: a scan over
# layers does, and with them what comes before would be written to memory instead of being read as it is made.
@functools.partial(jax.checkpoint, static_argnums=2, prevent_cse=False)
def _rms_norm(x: Float[Array, "..."], weight: Float32[Array, "..."], epsilon: float) -> Float[Array, "..."]:
    x_f32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True) + epsilon)
    return (x_f32 * scale * weight).astype(x.dtype)


@functools.partial(jax.checkpoint, prevent_cse=False)
def swiglu(gate: Float[Array, "..."], up: Float[Array, "..."]) -> Float[Array, "..."]:
    """silu(gate) × up (Shazeer 2020)."""
    return jax.nn.silu(gate) * up


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
    implementation: str = "auto",
) -> Float[Array, "B T N H"]:
    """Scaled dot-product attention with grouped heads, in the operands' dtype with a float32 softmax.

    With segments a token attends to the tokens before it that are in its own segment or in EVERY_SEGMENT.

    Args:
      implementation: "xla", which holds the scores [B, N, T, T]; "cudnn", which holds a tile of them, and with
        segments a mask [B, 1, T, T] (NVIDIA GPUs); or
        "auto", as `attention_implementation` says for the device that is traced for.

    Raises:
      NotImplementedError: "cudnn" for operands or a device that it does not serve.
    """
    _, length, _, head_dim = q_BxTxNxH.shape
    odd_mask = segments_BxT is not None and length % 2 == 1
    implementation = attention_implementation(implementation, q_BxTxNxH.dtype, head_dim, current(), odd_mask)
    mask = None if segments_BxT is None else _segment_mask(segments_BxT)
    with scopes.of_step_part("attention"):
        return jax.nn.dot_product_attention(
            q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, mask=mask, is_causal=True, implementation=implementation
        )


def _segment_mask(segments_BxT: Int[Array, "B T"]) -> Bool[Array, "B 1 T T"]:
    of_query, of_key = segments_BxT[:, None, :, None], segments_BxT[:, None, None, :]
    return (of_query == of_key) | (of_key == EVERY_SEGMENT)


def attention_implementation(
    choice: str, dtype: jnp.dtype, head_dim: int, hardware: Hardware, odd_mask: bool = False
) -> str:
    """Returns "cudnn" or "xla"; "auto" takes cuDNN's flash attention where it serves such operands.

    odd_mask: there is a mask over an odd number of tokens.

    cuDNN sums a gradient in the order its blocks finish unless XLA_FLAGS holds --xla_gpu_deterministic_ops=true.

    Raises:
      NotImplementedError: "cudnn" where it does not, with what it would take.
      ValueError: an unknown choice.
    """
    if choice not in ("auto", "xla", "cudnn"):
        raise ValueError(f"attention must be auto, xla or cudnn, got {choice!r}")
    obstacle = None if choice == "xla" else _cudnn_obstacle(dtype, head_dim, hardware, odd_mask)
    if choice == "cudnn" and obstacle:
        raise NotImplementedError(f"attention='cudnn' {obstacle}; use attention='xla'")
    return "xla" if choice == "xla" or obstacle else "cudnn"


def _cudnn_obstacle(dtype: jnp.dtype, head_dim: int, hardware: Hardware, odd_mask: bool) -> str | None:
    if hardware.capability < _CUDNN_LEAST_CAPABILITY:
        return f"needs an NVIDIA GPU of compute capability 8.0 or above, and this is {hardware}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16, not {jnp.dtype(dtype).name}"
    if head_dim > _CUDNN_LARGEST_HEAD or head_dim % _CUDNN_HEAD_MULTIPLE:
        return f"takes heads of up to {_CUDNN_LARGEST_HEAD} in multiples of {_CUDNN_HEAD_MULTIPLE}, not {head_dim}"
    if odd_mask:
        return "takes segments in sequences of an even length"
    return None

"""Block quantization with two-level scaling, in plain JAX: the reference that every kernel equals bit for bit.

    amax  = max|x| over the matrix            S_enc = min(2688 / amax, FLT_MAX), 1 where amax is 0 or S_enc would be
    s_b   = e4m3(min(max|x_b| * (S_enc * float32(1/6)), 448))
    e_b   = min(1 / (s_b * (1 / S_enc)), FLT_MAX)
    q     = e2m1(clip(x * e_b, ±6))           x ≈ q * s_b * (amax / 2688)

Everything in float32, in this order (the order of NVIDIA's kernels; arXiv 2509.25149, appendix C). A block whose scale
underflows dequantizes to zero. Infinities and NaN reach the scales, so a tensor that holds them never looks finite.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, UInt32

from fp4jax.numerics import bits, formats, rounding
from fp4jax.numerics.formats import Format, Rounding
from fp4jax.numerics.qtensor import QTensor

_FLT_MAX = np.finfo(np.float32).max


def quantize(
    x: Float[Array, "*shape"],
    format: Format = formats.NVFP4,
    *,
    axis: int = -1,
    block: tuple[int, int] | None = None,
    rounding: str | Rounding = Rounding.NEAREST,
    key=None,
    batch_dims: int = 0,
) -> QTensor:
    """Quantizes an array. No gradient flows through it: rounding has none.

    Args:
      x: a floating-point array with at least one element.
      format: the number format.
      axis: the axis along which blocks run (the contraction axis of the product to come) and codes are packed.
      block: None for blocks of `format.block` along `axis`; (16, 16) for square blocks over the last two axes.
      rounding: "nearest" or "stochastic".
      key: a JAX random key, for stochastic rounding only.
      batch_dims: leading axes that count independent matrices, each with its own tensor scale.

    Returns:
      A `QTensor` of the same logical shape.

    Raises:
      ValueError: for anything above that is not so, saying what was given and what is accepted.
    """
    rounding = _parse_rounding(rounding)
    if not hasattr(x, "dtype"):
        raise ValueError(f"quantize takes an array, got {type(x).__name__}; convert with jnp.asarray(x)")
    axis, block = _check(x, format, axis, block, batch_dims)
    if rounding is Rounding.STOCHASTIC and key is None:
        raise ValueError("stochastic rounding needs a random key: pass key=jax.random.key(seed)")
    if rounding is Rounding.NEAREST and key is not None:
        raise ValueError("rounding to nearest draws nothing: leave key out, or pass rounding='stochastic'")
    words = bits.key_words(key) if rounding is Rounding.STOCHASTIC else None
    axes = (-2, -1) if block else (axis,)
    x = lax.stop_gradient(x)
    return quantize_blocks(x, format, axes=axes, pack_axis=axis, batch_dims=batch_dims, words=words)


def quantize_blocks(
    x: Float[Array, "*shape"],
    format: Format,
    *,
    axes: tuple[int, ...],
    pack_axis: int,
    batch_dims: int = 0,
    words: UInt32[Array, "2"] | None = None,
    amax: Float32[Array, "..."] | None = None,
) -> QTensor:
    """`quantize` without the checks: blocks over `axes` (negative), stochastic rounding exactly when `words` are given.

    Args:
      amax: the largest magnitude of each matrix where it is known, float32, size 1 on every axis behind `batch_dims`.
    """
    logical = x.shape
    x = _pad(x.astype(jnp.float32), axes, format.block)
    if amax is None:
        amax = jnp.max(jnp.abs(x), axis=tuple(range(batch_dims, x.ndim)), keepdims=True)
    blocked_shape, block_axes = _blocked_shape(x.shape, axes, format.block)
    blocks = x.reshape(blocked_shape)
    block_amax = jnp.max(jnp.abs(blocks), axis=block_axes, keepdims=True)
    tensor_amax = amax.reshape(*amax.shape[:batch_dims], *[1] * (len(blocked_shape) - batch_dims))
    scales, inverse = block_scales(block_amax, tensor_amax, format)
    scaled = (blocks * inverse).reshape(x.shape)
    if words is None:
        codes = rounding.encode_nearest(scaled, format.element)
    else:
        draws = bits.matrix_draws(words, x.shape, batch_dims, tuple(logical))
        codes = rounding.encode_stochastic(scaled, format.element, draws)
    return QTensor(
        codes=rounding.pack(codes, pack_axis),
        scales=scales.squeeze(block_axes),
        amax=amax,
        format=format,
        axis=pack_axis,
        blocked=tuple((axis, logical[axis]) for axis in axes),
    )


def block_scales(block_amax: Float32[Array, "..."], amax: Float32[Array, "..."], format: Format):
    """Scale byte and element multiplier of every block, from the block's and the tensor's largest magnitudes."""
    encode = encode_factor(amax, format)
    scale = jnp.minimum(block_amax * (encode * format.inverse_element_max), format.scale.max)
    byte = rounding.encode_scale(scale, format.scale)
    decoded = rounding.decode_scale(byte, format.scale)
    return byte, jnp.minimum(1.0 / (decoded * (1.0 / encode)), _FLT_MAX)


def encode_factor(amax: Float32[Array, "..."], format: Format) -> Float32[Array, "..."]:
    """S_enc: what the largest magnitude is multiplied by to become element max × scale max."""
    factor = jnp.minimum(format.range / amax, _FLT_MAX)
    return jnp.where((amax == 0) | (factor == 0), 1.0, factor)


def _blocked_shape(shape, axes, block):
    """`shape` with every axis of `axes` split into (blocks, block), and the positions of the inner axes."""
    new_shape, inner = [], []
    for axis, size in enumerate(shape):
        if axis - len(shape) in axes:
            new_shape += [size // block, block]
            inner.append(len(new_shape) - 1)
        else:
            new_shape.append(size)
    return tuple(new_shape), tuple(inner)


def _pad(x, axes, block):
    widths = [(0, -size % block if axis - x.ndim in axes else 0) for axis, size in enumerate(x.shape)]
    return jnp.pad(x, widths) if any(high for _, high in widths) else x


def _parse_rounding(rounding) -> Rounding:
    try:
        return Rounding(rounding)
    except ValueError:
        accepted = ", ".join(repr(str(r)) for r in Rounding)
        raise ValueError(f"rounding must be one of {accepted}, got {rounding!r}") from None


def _check(x, format, axis, block, batch_dims):
    if not isinstance(format, Format):
        raise ValueError(f"format must be a fp4jax.Format such as fp4jax.NVFP4, got {format!r}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"quantize takes floating-point arrays, got {x.dtype}; convert with x.astype(jnp.float32)")
    if x.ndim == 0 or x.size == 0:
        raise ValueError(f"quantize needs a non-empty array of at least one axis, got shape {x.shape}")
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis must be in [{-x.ndim}, {x.ndim}), got {axis}")
    axis = axis % x.ndim - x.ndim
    if block not in (None, (format.block, format.block)):
        raise ValueError(f"block must be None (1x{format.block} along axis) or {(format.block,) * 2}, got {block}")
    if block and (x.ndim < 2 or axis not in (-2, -1)):
        raise ValueError(f"square blocks lie in the last two axes: got shape {x.shape}, axis {axis}")
    first_blocked = x.ndim - 2 if block else x.ndim + axis
    if not 0 <= batch_dims <= first_blocked:
        raise ValueError(f"batch_dims must be in [0, {first_blocked}], in front of the blocked axes, got {batch_dims}")
    return axis, block

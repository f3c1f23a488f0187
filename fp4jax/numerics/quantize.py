"""Block quantization in plain JAX: the reference that every kernel equals bit for bit.

    amax  = max|x| over the matrix            S_enc = min(2688 / amax, FLT_MAX), 1 where amax is 0 or S_enc would be
    s_b   = e4m3(min(max|x_b| * (S_enc * float32(1/6)), 448))
    e_b   = min(1 / (s_b * (1 / S_enc)), FLT_MAX)
    q     = e2m1(clip(x * e_b, ±6))           x ≈ q * s_b * (amax / 2688)

Everything in float32, in this order (the order of NVIDIA's kernels; arXiv 2509.25149, appendix C). Other formats have
other numbers, lack one of the two scales, or take amax over less than the matrix. A block whose scale underflows
dequantizes to zero. Infinities and NaN reach the scales, so a tensor that holds them never looks finite.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, UInt32

from fp4jax.numerics import bits, formats, rounding
from fp4jax.numerics.blocks import Shape, blocked_shape, inner_axes, over_blocks, pad_to_blocks
from fp4jax.numerics.eden import corrected_scales
from fp4jax.numerics.formats import Extent, Format, Rounding, ScaleRounding
from fp4jax.numerics.qtensor import QTensor
from fp4jax.numerics.scales import block_scales, encode_factor, largest_magnitude, outer_statistic
from fp4jax.numerics.selection import best_scales


def quantize(
    x: Float[Array, "*shape"],
    format: Format = formats.NVFP4,
    *,
    axis: int = -1,
    block: tuple[int, int] | None = None,
    rounding: str | Rounding = Rounding.NEAREST,
    key=None,
    batch_dims: int = 0,
    candidates: tuple[float, ...] = (),
    scale_rounding: str | ScaleRounding | None = None,
    correction: int | None = None,
) -> QTensor:
    """Quantizes an array. No gradient flows through it: rounding has none.

    >>> x = jnp.array([[0.3, -6.0, 2.4, 1.1]])
    >>> quantize(x, formats.MXFP4, axis=-1).dequantize()
    Array([[ 0.5, -6. ,  2. ,  1. ]], dtype=float32)

    Args:
      x: a floating-point array with at least one element.
      format: the number format.
      axis: the axis along which blocks run (the contraction axis of the product to come) and codes are packed.
      block: None for blocks of `format.block` along `axis`; (16, 16) for square blocks over the last two axes.
      rounding: "nearest" or "stochastic".
      key: a JAX random key, where elements or scales are rounded stochastically, and only there.
      batch_dims: leading axes that count independent matrices, each with its own tensor scale.
      candidates: what the largest magnitude of a block may become in units of its scale; the one with the smallest
        squared error is taken, the first of equals: (6.0, 4.0) is four-over-six (arXiv 2512.02010; needs NVFP4_256).
        Errors are sums of squares in units of x, as TransformerEngine's: they underflow for data near 2^-60.
      scale_rounding: of the block scales; None for the format's own.
      correction: rescale groups of so many elements along `axis` to x·x / x·q (EDEN, arXiv 2601.22813), before the
        scales are rounded a second time.

    Returns:
      A `QTensor` of the same logical shape.

    Raises:
      ValueError: for anything above that is not so, saying what was given and what is accepted.
    """
    rounding = _parse(Rounding, "rounding", rounding)
    if scale_rounding is not None:
        scale_rounding = _parse(ScaleRounding, "scale_rounding", scale_rounding)
    if not hasattr(x, "dtype"):
        raise ValueError(f"quantize takes an array, got {type(x).__name__}; convert with jnp.asarray(x)")
    axis, block = _check(x, format, axis, block, batch_dims)
    check_options(format, block, candidates, scale_rounding, correction)
    stochastic = rounding is Rounding.STOCHASTIC, scale_rounding is ScaleRounding.STOCHASTIC
    if any(stochastic) and key is None:
        raise ValueError("stochastic rounding needs a random key: pass key=jax.random.key(seed)")
    if not any(stochastic) and key is not None:
        raise ValueError("rounding to nearest draws nothing: leave key out, or pass rounding='stochastic'")
    words = None if key is None else bits.key_words(key)
    return quantize_blocks(
        lax.stop_gradient(x), format, axes=(-2, -1) if block else (axis,), pack_axis=axis, batch_dims=batch_dims,
        words=words if stochastic[0] else None, candidates=candidates, scale_rounding=scale_rounding,
        scale_words=bits.fold(words, bits.SCALES) if stochastic[1] else None, correction=correction,
    )  # fmt: skip


def quantize_blocks(
    x: Float[Array, "*shape"],
    format: Format,
    *,
    axes: tuple[int, ...],
    pack_axis: int,
    batch_dims: int = 0,
    words: UInt32[Array, "2"] | None = None,
    amax: Float32[Array, "..."] | None = None,
    candidates: tuple[float, ...] = (),
    scale_rounding: ScaleRounding | None = None,
    scale_words: UInt32[Array, "2"] | None = None,
    correction: int | None = None,
    packed: bool = True,
) -> QTensor:
    """`quantize` without the checks: blocks over `axes` (negative), stochastic rounding exactly when `words` are given.

    Args:
      amax: the statistic of the float32 scale where it is known: float32, shaped as in `QTensor`.
      scale_words: random words for the block scales, exactly when they are rounded stochastically.
      packed: False leaves 4-bit codes one a byte, for products in the same program.
    """
    logical = x.shape
    x = pad_to_blocks(x.astype(jnp.float32), axes, format.granularity)
    blocks = block_amax = None
    if format.block is not None:
        blocks = x.reshape(blocked_shape(x.shape, axes, format.block))
        inner = inner_axes(x.ndim, axes)
        block_amax = largest_magnitude(blocks, inner)
    if amax is None and format.outer is not None:
        amax = outer_statistic(x, format, pack_axis, batch_dims, block_amax)
    if blocks is None:
        scales, scaled = None, x * encode_factor(amax, format)
        codes = _encode(scaled, format, words, batch_dims, logical)
    else:
        outer = None if amax is None else over_blocks(amax, x.shape, axes, format.block)
        encode = None if outer is None else encode_factor(outer, format)
        if candidates:
            scales, inverse = best_scales(blocks, outer, encode, format, axes, pack_axis, candidates)
        else:
            scales, inverse = block_scales(block_amax, encode, format, scale_rounding or format.scale_rounding)
        codes = _encode((blocks * inverse).reshape(x.shape), format, words, batch_dims, logical)
        if correction is None:
            scales = scales.squeeze(inner)
        else:
            in_blocks, at = codes.reshape(blocks.shape), pack_axis % x.ndim
            scaled = blocks if encode is None else blocks * encode
            scales = corrected_scales(scaled, in_blocks, scales, at, correction, format, batch_dims, scale_words)
    return QTensor(
        codes=rounding.pack(codes, pack_axis) if format.packs and packed else codes.astype(jnp.uint8),
        scales=scales,
        amax=amax,
        format=format,
        axis=pack_axis,
        blocked=tuple((axis, logical[axis]) for axis in axes) if format.block else (),
        packed=packed or not format.packs,
    )


def _encode(scaled, format: Format, words, batch_dims: int, logical: Shape):
    if words is None:
        return rounding.encode_nearest(scaled, format.element)
    draws = bits.matrix_draws(words, scaled.shape, batch_dims, tuple(logical))
    return rounding.encode_stochastic(scaled, format.element, draws)


def check_options(
    format: Format,
    block: tuple[int, int] | None,
    candidates: tuple[float, ...],
    scale_rounding: ScaleRounding | None,
    correction: int | None,
) -> None:
    """Raises ValueError for ways of choosing block scales that the format or each other rule out."""
    if format.block is None:
        if block or candidates or scale_rounding or correction:
            raise ValueError(f"{format} has no blocks: leave block, candidates, scale_rounding and correction out")
        return
    if block not in (None, (format.block, format.block)):
        raise ValueError(f"block must be None (1x{format.block} along axis) or {(format.block,) * 2}, got {block}")
    if block and format.outer not in (None, Extent.MATRIX):
        raise ValueError(f"square blocks need one float32 scale for the matrix, {format} has others")
    powers_of_two = {ScaleRounding.DOWN, ScaleRounding.UP}
    if scale_rounding and scale_rounding is not format.scale_rounding:
        if (scale_rounding in powers_of_two) != (format.scale.mantissa_bits == 0):
            raise ValueError(f"{format.scale.name} scales cannot be rounded {scale_rounding}")
        if scale_rounding is ScaleRounding.STOCHASTIC and correction is None:
            raise ValueError("block scales are rounded stochastically after a correction only: pass correction=128")
    if candidates and (format.outer is None or not format.scale.mantissa_bits or correction or scale_rounding):
        raise ValueError("candidates need E4M3 block scales under a float32 scale, rounded to nearest, uncorrected")
    if candidates and not all(0 < target <= format.element_peak for target in candidates):
        raise ValueError(f"candidates must be in (0, {format.element_peak}], got {candidates}")
    if correction is not None and (correction <= 0 or correction % format.block or block):
        raise ValueError(f"correction must be a multiple of the block, {format.block}, of 1x{format.block} blocks")
    if correction is not None and not format.scale.mantissa_bits:
        raise ValueError(f"{format.scale.name} scales are too coarse to take a correction")


def _parse(kind, name: str, value):
    try:
        return kind(value)
    except ValueError:
        accepted = ", ".join(repr(str(member)) for member in kind)
        raise ValueError(f"{name} must be one of {accepted}, got {value!r}") from None


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
    if block and (x.ndim < 2 or axis not in (-2, -1)):
        raise ValueError(f"square blocks lie in the last two axes: got shape {x.shape}, axis {axis}")
    first_blocked = x.ndim - 2 if block else x.ndim + axis
    if not 0 <= batch_dims <= first_blocked:
        raise ValueError(f"batch_dims must be in [0, {first_blocked}], in front of the blocked axes, got {batch_dims}")
    return axis, block

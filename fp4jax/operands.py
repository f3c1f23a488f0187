"""Preparing operands: split, transform and quantize X, W or D for the two products that each of them enters.

Arrays here are in canonical layout: X [*batch, *tokens, K] and D [*batch, *tokens, N] with at least one token axis, W
[*batch, K, N].
Token axes are never merged: blocks along the tokens run along the last token axis, each sequence padded by itself.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from fp4jax.numerics import QTensor, Rounding, column_mean, fold, hadamard, mask_rows, residual
from fp4jax.recipes import Center, MeanAxes, MeanSplit, Operand, Recipe

# Streams of random bits, one for every quantization of a linear layer; frozen, or runs would not repeat.
SLOTS = {
    "fprop.x": 0, "fprop.w": 1, "dgrad.g": 2, "dgrad.w": 3, "wgrad.x": 4, "wgrad.g": 5, "mean.x": 6, "mean.g": 7
}  # fmt: skip

# (x, format, axes=, pack_axis=, batch_dims=, words=) -> QTensor; `numerics.quantize_blocks` or a kernel that equals it.
Quantizer = Callable[..., QTensor]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part:
    """One operand of one GEMM, ready to be multiplied.

    Attributes:
      residual: what is left after the split; a `QTensor`, or an array where the operand stays in high precision.
      mean: the row split off, [*batch, *tokens or 1, features], or None.
      sums: column sums of the residual as quantized, shaped like the mean, where the weight gradient needs them.
    """

    residual: QTensor | Float[Array, "..."]
    mean: QTensor | Float32[Array, "..."] | None = None
    sums: Float32[Array, "..."] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prepared:
    """An operand of the forward product, prepared for both GEMMs that read it.

    Attributes:
      forward: for fprop. X: blocks along features; W: blocks along K.
      backward: for the backward pass. X: blocks along tokens (wgrad); W: blocks along N (dgrad).
      purpose: what it was prepared for, where a caller holds it between products.
    """

    forward: Part
    backward: Part
    purpose: "Purpose | None" = dataclasses.field(default=None, metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Purpose:
    """What a prepared operand can be used for: a product must agree with all of it."""

    recipe: Recipe
    side: str
    batch_dims: int
    masked: bool


@dataclasses.dataclass(frozen=True)
class Slots:
    """Which operands of a recipe prepare an array with tokens, and which random streams they draw from."""

    features: str
    tokens: str
    mean: str


X_SLOTS = Slots("fprop.x", "wgrad.x", "mean.x")
D_SLOTS = Slots("dgrad.g", "wgrad.g", "mean.g")


def prepare_tokens(x, recipe: Recipe, slots: Slots, batch_dims: int, words, row_mask, quantizer: Quantizer) -> Prepared:
    """Prepares an array whose rows are tokens: `forward` contracts its features, `backward` its tokens."""
    by_features, by_tokens = recipe.slots[slots.features], recipe.slots[slots.tokens]
    split = by_features.split or by_tokens.split
    mean = center = None
    if split:
        mean, center = _mean(x, split, batch_dims, _stream(words, split.mean, slots.mean), row_mask, quantizer)

    def part(operand: Operand, slot: str, axis: int) -> Part:
        rows = residual(x, center, row_mask) if operand.split else mask_rows(x, row_mask)
        stream = _stream(words, operand, slot)
        return Part(_quantize(rows, operand, axis, batch_dims, stream, quantizer), mean if operand.split else None)

    backward = part(by_tokens, slots.tokens, -2)
    if recipe.wgrad.lhs.split or recipe.wgrad.rhs.split:
        axes = mean_axes(recipe.wgrad.lhs.split or recipe.wgrad.rhs.split, x.ndim, batch_dims)
        sums = column_sums(backward.residual, axes, by_tokens.hadamard is not None, x.shape, row_mask)
        backward = dataclasses.replace(backward, sums=sums)
    return Prepared(part(by_features, slots.features, -1), backward)


def prepare_weights(w, recipe: Recipe, batch_dims: int, words, quantizer: Quantizer) -> Prepared:
    """Prepares weights [*batch, K, N]: `forward` contracts K, `backward` contracts N."""
    forward, backward = recipe.fprop.rhs, recipe.dgrad.rhs
    by_inputs = Part(_quantize(w, forward, -2, batch_dims, _stream(words, forward, "fprop.w"), quantizer))
    if forward == backward and forward.block and forward.rounding is Rounding.NEAREST:
        return Prepared(by_inputs, by_inputs)  # square blocks: W and its transpose are the same values
    stream = _stream(words, backward, "dgrad.w")
    return Prepared(by_inputs, Part(_quantize(w, backward, -1, batch_dims, stream, quantizer)))


def mean_axes(split: MeanSplit, rank: int, batch_dims: int) -> tuple[int, ...]:
    """The token axes over which a mean is taken."""
    return (rank - 2,) if split.axes is MeanAxes.SEQUENCE else tuple(range(batch_dims, rank - 1))


def dequantize(value: QTensor | Array) -> Float32[Array, "..."]:
    """The represented values in float32."""
    return value.dequantize() if isinstance(value, QTensor) else value.astype(jnp.float32)


def column_sums(
    value: QTensor | Array, axes: tuple[int, ...], transformed: bool, shape: tuple[int, ...], row_mask
) -> Float32[Array, "..."]:
    """Sums of a residual over tokens, 1ᵀR, kept with size 1 along `axes`.

    Under a Hadamard transform along the tokens the products hold H R, and 1ᵀR = (H 1)ᵀ(H R) because H is orthogonal.

    Args:
      shape: logical shape of the residual; row_mask: its real rows, the indicator that takes the place of 1.
    """
    if not transformed:
        return jnp.sum(dequantize(value), axis=axes, keepdims=True)
    ones = mask_rows(jnp.ones((*shape[:-1], 1), jnp.float32), row_mask)
    ones = hadamard(_pad_axis(ones, -2), -2)
    if isinstance(value, QTensor):
        value = value.values(padded=(-2,)) * value.tensor_scale
    return jnp.sum(value * ones, axis=axes, keepdims=True)


def _mean(x, split: MeanSplit, batch_dims, stream, row_mask, quantizer):
    """The mean as it enters products, and the row that is taken off X."""
    mean = column_mean(x, mean_axes(split, x.ndim, batch_dims), row_mask)
    as_operand = _quantize(mean, split.mean, -1, batch_dims, stream, quantizer)
    return as_operand, dequantize(as_operand) if split.center is Center.QUANTIZED_MEAN else mean


def _quantize(x, operand: Operand, axis: int, batch_dims: int, stream, quantizer: Quantizer) -> QTensor | Array:
    if operand.hadamard:
        x = hadamard(_pad_axis(x, axis), axis)
    if operand.format is None:
        return x
    axes = (-2, -1) if operand.block else (axis,)
    return quantizer(x, operand.format, axes=axes, pack_axis=axis, batch_dims=batch_dims, words=stream)


def _pad_axis(x, axis: int, multiple: int = 16):
    """Zeros behind the end of `axis` up to a multiple of the Hadamard width."""
    missing = -x.shape[axis] % multiple
    if not missing:
        return x
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, missing if i == axis % x.ndim else 0, 0) for i in range(x.ndim)])


def _stream(words, operand: Operand, slot: str):
    """Random words for a quantization, or None where it rounds to nearest."""
    return fold(words, SLOTS[slot]) if operand.rounding is Rounding.STOCHASTIC else None

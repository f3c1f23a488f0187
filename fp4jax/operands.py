"""Preparing operands: split, transform and quantize X, W or D for the two products that each of them enters.

Arrays here are in canonical layout: X [*batch, *tokens, K] and D [*batch, *tokens, N] with at least one token axis, W
[*batch, K, N].
Token axes are never merged: blocks along the tokens run along the last token axis, each sequence padded by itself.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32

from fp4jax import layout
from fp4jax.numerics import (
    QTensor,
    Rounding,
    ScaleRounding,
    bits,
    column_mean,
    fold,
    low_rank_factors,
    mask_rows,
    residual,
    rotate,
)  # fmt: skip
from fp4jax.numerics.blocks import Shape
from fp4jax.quantizers import Draws, Quantizer, Rows, pad_axis, pad_to, transformed
from fp4jax.recipes import Center, LowRankSplit, MeanAxes, MeanSplit, Operand, Recipe, Source

# Streams of random bits, one for every quantization of a linear layer; frozen, or runs would not repeat.
SLOTS = {
    "fprop.x": 0, "fprop.w": 1, "dgrad.g": 2, "dgrad.w": 3, "wgrad.x": 4, "wgrad.g": 5, "mean.x": 6, "mean.g": 7,
    "signs.x": 8, "signs.w": 9, "left.x": 10, "right.x": 11, "left.w": 12, "right.w": 13, "left.g": 14, "right.g": 15,
}  # fmt: skip


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """The part left · scale · right of a low-rank split.

    Attributes:
      left: [*batch, *rows, rank], quantized along the last axis of rows.
      scale: singular values [*batch, ..., 1, rank], size 1 on every axis of rows.
      right: [*batch, ..., rank, features], size 1 on every axis of rows but the last, which holds the rank.
    """

    left: QTensor | Float32[Array, "..."]
    scale: Float32[Array, "..."]
    right: QTensor | Float32[Array, "..."]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part:
    """One operand of one GEMM, ready to be multiplied.

    Attributes:
      residual: what is left after the split; a `QTensor`, or an array where the operand stays in high precision.
      mean: the row split off, [*batch, *tokens or 1, features], or None.
      sums: column sums of the residual as quantized, shaped like the mean, where they were taken when it was prepared.
      low_rank: the part of low rank split off, or None.
      signs: of the Hadamard transform where they are fresh, for the other operand of the product to take over.
    """

    residual: QTensor | Float[Array, "..."]
    mean: QTensor | Float32[Array, "..."] | None = None
    sums: Float32[Array, "..."] | None = None
    low_rank: LowRank | None = None
    signs: Float32[Array, "..."] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prepared:
    """An operand of the forward product, prepared for both GEMMs that read it.

    Attributes:
      forward: for fprop. X: blocks along features; W: blocks along K.
      backward: for the backward pass. X: blocks along tokens (wgrad); W: blocks along N (dgrad). None where it draws
        and no key was given: such an operand can be evaluated, not differentiated.
      purpose: what it was prepared for, where a caller holds it between products.
    """

    forward: Part
    backward: Part | None
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
    """Which operands of a recipe prepare an array, and the name of its random streams."""

    features: str
    tokens: str
    name: str


X_SLOTS = Slots("fprop.x", "wgrad.x", "x")
D_SLOTS = Slots("dgrad.g", "wgrad.g", "g")


@dataclasses.dataclass(frozen=True)
class _SplitOff:
    """What a split takes off an array, as it enters products beside the residual."""

    mean: QTensor | Array | None = None
    low_rank: LowRank | None = None


@dataclasses.dataclass(frozen=True)
class _Context:
    """What every quantization of one array shares.

    Attributes:
      in_shards: whether the last of the batch axes counts shards of the tokens, which devices have to themselves.
    """

    batch_dims: int
    words: Array | None
    quantizer: Quantizer
    in_shards: bool = False

    def stream(self, slot: str):
        return None if self.words is None else fold(self.words, SLOTS[slot])

    def quantize(self, rows: Rows, operand: Operand, slot: str, axis: int, signs=None) -> QTensor | Array:
        """`rows` centred, transformed and quantized as `operand` says, by blocks along `axis`."""
        if operand.format is None:
            return transformed(rows, operand, axis, signs)
        stream = self.stream(slot)
        drawn = Draws(
            elements=stream if operand.rounding is Rounding.STOCHASTIC else None,
            scales=fold(stream, bits.SCALES) if operand.scale_rounding is ScaleRounding.STOCHASTIC else None,
            signs=signs,
        )
        return self.quantizer.quantize(rows, operand, axis, self.batch_dims, drawn)

    def signs(self, operand: Operand, slot: str, shape: Shape, axis: int):
        """Fresh signs for a transform of an array of `shape` along `axis`: one set, repeated over the batch axes."""
        if not operand.fresh_signs:
            return None
        unit = [1] * len(shape)
        unit[axis] = operand.hadamard
        signs = bits.signs(self.stream(slot), operand.hadamard).reshape(unit)
        return jnp.broadcast_to(signs, (*shape[: self.batch_dims], *unit[self.batch_dims :]))


def prepare_tokens(
    x, recipe: Recipe, slots: Slots, batch_dims: int, words, row_mask, quantizer: Quantizer, partners=(None, None)
) -> Prepared:
    """Prepares an array whose rows are tokens: `forward` contracts its features, `backward` its tokens.

    Args:
      partners: for D, the other operands of dgrad and wgrad, whose fresh signs it takes over.
    """
    context = _Context(batch_dims, words, quantizer, in_shards=recipe.shard_axes > 0)
    by_features, by_tokens = recipe.slots[slots.features], recipe.slots[slots.tokens]
    split, rest = _split(x, by_features.split or by_tokens.split, context, slots.name, row_mask)
    whole = Rows(mask_rows(x, row_mask))
    feature_signs, token_signs = (partner and partner.signs for partner in partners)
    if feature_signs is not None:  # W has fewer axes
        feature_signs = feature_signs.reshape(
            *feature_signs.shape[:batch_dims], *[1] * (x.ndim - batch_dims - 1), feature_signs.shape[-1]
        )
    forward = _part(
        rest if by_features.split else whole, split, by_features, slots.features, -1, context, feature_signs
    )
    if by_tokens.draws and words is None:
        return Prepared(forward, None)
    if slots is X_SLOTS:
        token_signs = context.signs(by_tokens, "signs.x", x.shape, -2)
    backward = _backward_part(
        forward, rest if by_tokens.split else whole, split, by_tokens, slots.tokens, -2, context, token_signs
    )
    means = [s for s in (recipe.wgrad.lhs.split, recipe.wgrad.rhs.split) if isinstance(s, MeanSplit)]
    if means and by_tokens.hadamard:
        axes = mean_axes(means[0], x.ndim, batch_dims)
        sums = sums_before_rotation(backward.residual, axes, by_tokens.hadamard, x.shape, row_mask, token_signs)
        backward = dataclasses.replace(backward, sums=sums)
    return Prepared(forward, backward)


def prepare_weights(w, recipe: Recipe, batch_dims: int, words, quantizer: Quantizer) -> Prepared:
    """Prepares weights [*batch, K, N]: `forward` contracts K, `backward` contracts N."""
    context = _Context(batch_dims, words, quantizer)
    by_inputs, by_outputs = recipe.fprop.rhs, recipe.dgrad.rhs
    split, rest = _split(w, by_inputs.split or by_outputs.split, context, "w", None)
    forward = _part(rest if by_inputs.split else Rows(w), split, by_inputs, "fprop.w", -2, context, None)
    nearest = by_inputs.rounding is Rounding.NEAREST
    if by_inputs == by_outputs and by_inputs.block and nearest and not by_inputs.hadamard:
        return Prepared(forward, forward)  # square blocks: W and its transpose are the same values
    if by_outputs.draws and words is None:
        return Prepared(forward, None)
    signs = context.signs(by_outputs, "signs.w", w.shape, -1)
    rows = rest if by_outputs.split else Rows(w)
    return Prepared(forward, _backward_part(forward, rows, split, by_outputs, "dgrad.w", -1, context, signs))


def _part(rows: Rows, split: _SplitOff, operand: Operand, slot: str, axis: int, context: _Context, signs) -> Part:
    residual = context.quantize(rows, operand, slot, axis, signs)
    split = split if operand.split else _SplitOff()
    return Part(residual, mean=split.mean, low_rank=split.low_rank, signs=signs)


def _backward_part(
    forward: Part, rows: Rows, split: _SplitOff, operand: Operand, slot: str, axis: int, context, signs
) -> Part:
    """The copy for the backward, made from the original rows or from the forward's quantized ones."""
    if operand.is_copy:
        return forward
    if operand.source is Source.QUANTIZED:
        rows = Rows(dequantize(forward.residual))
    return _part(rows, split, operand, slot, axis, context, signs)


def packed(part: Prepared | Part | None) -> Prepared | Part | None:
    """With two 4-bit codes a byte, as it is kept from the forward pass for the backward."""
    return jax.tree.map(
        lambda leaf: leaf.pack() if isinstance(leaf, QTensor) else leaf, part, is_leaf=lambda x: isinstance(x, QTensor)
    )


def shared(prepared: Prepared, names: layout.Names | None) -> Prepared:
    """What is prepared from tokens that devices share, in packed codes, and kept where the tokens are.

    Args:
      names: of the last axes; under `vmap` there are more token axes in front. None: as it is.
    """
    return prepared if names is None else layout.place_all(packed(prepared), _all_axes(prepared, names))


def whole(prepared: Prepared | Part, names: layout.Names | None) -> Prepared | Part:
    """What is `shared`, with all tokens on every device: the codes are gathered.

    Products of one operand each ask for it. XLA then gathers once, if they ask for the same array.
    """
    if names is None:
        return prepared
    return layout.place_all(packed(prepared), _all_axes(prepared, layout.whole_along(names, "sequence")))


def _all_axes(prepared: Prepared | Part, names: layout.Names) -> layout.Names:
    rank = jax.tree.leaves(prepared)[0].ndim
    return (*[None] * (rank - len(names)), *names)


def mean_axes(split: MeanSplit, rank: int, batch_dims: int) -> tuple[int, ...]:
    """The token axes over which a mean is taken."""
    return (rank - 2,) if split.axes is MeanAxes.SEQUENCE else tuple(range(batch_dims, rank - 1))


def dequantize(value: QTensor | Array) -> Float32[Array, "..."]:
    """The represented values in float32."""
    return value.dequantize() if isinstance(value, QTensor) else value.astype(jnp.float32)


def sums_before_rotation(
    value: QTensor | Array, axes: tuple[int, ...], hadamard: int, shape: Shape, row_mask, signs
) -> Float32[Array, "..."]:
    """Sums over tokens of a residual R that is under a Hadamard transform H along them: 1ᵀR = (H 1)ᵀ(H R).

    Args:
      value: H R; hadamard: size of H.
      shape: logical shape of the residual; row_mask: its real rows, the indicator that takes the place of 1.
    """
    ones = mask_rows(jnp.ones((*shape[:-1], 1), jnp.float32), row_mask)
    ones = rotate(pad_axis(ones, -2, hadamard), -2, hadamard, signs)
    if isinstance(value, QTensor):
        value = value.scaled_values(padded=(-2,))
    return jnp.sum(pad_to(value, -2, ones.shape[-2]) * pad_to(ones, -2, value.shape[-2]), axis=axes, keepdims=True)


def _split(x, split: MeanSplit | LowRankSplit | None, context: _Context, name: str, row_mask):
    """(what is split off, the rows that are left)."""
    if split is None:
        return _SplitOff(), Rows(x)
    if isinstance(split, MeanSplit):
        return _split_mean(x, split, context, name, row_mask)
    return _split_low_rank(mask_rows(x, row_mask).astype(jnp.float32), split, context, name)


def _split_mean(x, split: MeanSplit, context: _Context, name: str, row_mask):
    axes = mean_axes(split, x.ndim, context.batch_dims)
    stats, of_matrix = None, axes == tuple(range(context.batch_dims, x.ndim - 1))
    if context.quantizer.column_stats and of_matrix and row_mask is None:
        stats = context.quantizer.column_stats(x, context.batch_dims)
    if stats is not None:
        mean = stats.mean(math.prod(x.shape[axis] for axis in axes))
    else:
        shards = layout.batch_shards(), layout.on_every_device, layout.sequence_shards()
        stages = layout.batch_stages() if of_matrix and not context.in_shards else ()
        mean = column_mean(x, axes, row_mask, *shards, stages)
    mean = layout.rows_everywhere(mean)
    as_operand = layout.rows_everywhere(context.quantize(Rows(mean), split.mean, f"mean.{name}", -1))
    center = _made_once(dequantize(as_operand)) if split.center is Center.QUANTIZED_MEAN else mean
    if row_mask is not None:
        return _SplitOff(mean=as_operand), Rows(residual(x, center, row_mask))
    amax = None if stats is None else stats.residual_amax(center, context.batch_dims)
    return _SplitOff(mean=as_operand), Rows(x, center, amax)


def _made_once(row: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """The same row, divided by a one that depends on it: XLA:CPU fuses what is cheap into every reader, here the
    decoding of a row into every element of a matrix, but no division, and looks through barriers.
    """
    return row / jnp.where(row != 0, np.float32(1), np.float32(2))


def _split_low_rank(x, split: LowRankSplit, context: _Context, name: str):
    exact = exact_low_rank(x, split, context.batch_dims)
    quantized = LowRank(
        context.quantize(Rows(exact.left), split.factor, f"left.{name}", -2),
        exact.scale,
        context.quantize(Rows(exact.right), split.factor, f"right.{name}", -1),
    )
    taken_off = quantized if split.centered else exact
    return _SplitOff(low_rank=quantized), Rows(x - low_rank_product(taken_off, context.batch_dims))


def exact_low_rank(x: Float32[Array, "..."], split: LowRankSplit, batch_dims: int) -> LowRank:
    """The part of x [*batch, *rows, features] that the split takes off, before its factors are quantized."""
    rows = math.prod(x.shape[batch_dims:-1])
    if not isinstance(rows, int):
        raise ValueError(
            "a split of low rank takes its rank from the number of tokens, which a symbol (jax.export) does not tell: "
            "export with fixed sizes, or under a recipe without such a split"
        )
    rank = max(1, round(split.rank_fraction * min(rows, x.shape[-1])))
    left, right = low_rank_factors(x, rank, batch_dims, split.iterations)
    rows_axes = tuple(range(batch_dims, x.ndim - 1))
    largest = jnp.max(jnp.abs(left), axis=rows_axes, keepdims=True)  # squares of x itself could over- or underflow
    unit = left / jnp.where(largest > 0, largest, 1.0)
    scale = largest * jnp.sqrt(jnp.sum(jnp.square(unit), axis=rows_axes, keepdims=True))
    right = right.reshape(*right.shape[:batch_dims], *[1] * (x.ndim - batch_dims - 2), *right.shape[batch_dims:])
    return LowRank(left / jnp.where(scale > 0, scale, 1.0), scale, right)


def low_rank_product(low_rank: LowRank, batch_dims: int) -> Float32[Array, "..."]:
    """left · scale · right, shaped like the array that was split."""
    left, right = low_rank_factors_of(low_rank, batch_dims)
    batch = tuple(range(batch_dims))
    contract = ((left.ndim - 1,), (batch_dims,))
    return lax.dot_general(left, right, (contract, (batch, batch)), precision=lax.Precision.HIGHEST)


def low_rank_factors_of(low_rank: LowRank, batch_dims: int) -> tuple[Float32[Array, "..."], Float32[Array, "..."]]:
    """(left × singular values [*batch, *rows, rank], right [*batch, rank, features]), dequantized."""
    right = dequantize(low_rank.right)
    return dequantize(low_rank.left) * low_rank.scale, right.reshape(*right.shape[:batch_dims], *right.shape[-2:])

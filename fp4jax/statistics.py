"""Sums and counts over quantized operands and over the split's terms: what the health of FP4 training is read from.

Only sums, so that microbatches and scanned layers may add them up; `fp4jax.training.health` takes the ratios. Those of
the gradient travel out of the backward pass as the cotangent of `probe`.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from fp4jax.numerics import QTensor, column_mean, hadamard, mask_rows, residual, row_count
from fp4jax.operands import Part, Prepared, dequantize, exact_low_rank, low_rank_product, mean_axes
from fp4jax.recipes import Center, LowRankSplit, MeanSplit, Operand, Recipe
from fp4jax.shards import in_shards

# Of one operand of one GEMM. Energies are sums of squares; the counts are zero for an operand in high precision.
OPERAND_STATISTICS = (
    "energy",  # of the operand as it comes in
    "mean_energy",  # of its mean over all tokens (of W: over the inputs), in every row
    "residual_energy",  # of what is left of it after the split
    "noise",  # of the difference between the operand as it is multiplied and as it comes in
    "elements",  # that are not zero when they are quantized: padding and masked rows count nowhere
    "underflows",  # those of them that have become zero, by their code or by their block's scale
    "saturated",  # those of the others whose code is the largest
    "blocks",  # that hold an element that is not zero
    "zero_scales",  # those of them whose scale is the byte 0
    "largest_scales",  # those whose scale is the largest finite one
)
# Of the weight gradient: its energy, the energy of all that a split adds to the product of the residuals, and of that
# the terms with the residuals' column sums, which are zero only before quantization.
SPLIT_STATISTICS = ("energy", "split_energy", "cross_energy")

FORWARD_OPERANDS = ("fprop.x", "fprop.w", "dgrad.w", "wgrad.x")
GRADIENT_OPERANDS = ("dgrad.g", "wgrad.g")
FORWARD_STATISTICS = tuple(f"{slot}.{name}" for slot in FORWARD_OPERANDS for name in OPERAND_STATISTICS)
GRADIENT_STATISTICS = (
    *(f"{slot}.{name}" for slot in GRADIENT_OPERANDS for name in OPERAND_STATISTICS),
    *(f"wgrad.{name}" for name in SPLIT_STATISTICS),
)

SCOPE = "fp4jax_statistics"
"""Named scope of every operation here: a compiled program without the statistics does not contain it."""


class Monitor:
    """Takes statistics out of a model's layers, stacked over them.

    Attributes:
      probes: linear layer → zeros of shape [*layers, len(GRADIENT_STATISTICS)], whose cotangents are the statistics of
        the backward pass; of layers that are not in it no statistics are taken.
      forward: linear layer → [*layers, len(FORWARD_STATISTICS)], filled while the model is traced: to be returned by
        the function that is.
      routing: sums over tokens that a layer with a router leaves here, by name, [*layers, ...]; filled likewise.
    """

    def __init__(self, probes: dict[str, Float32[Array, "..."]]):
        self.probes = probes
        self.forward = {}
        self.routing = {}

    @property
    def of_layer(self) -> tuple[dict[str, Array], dict[str, Array]]:
        """What one layer's monitor holds, for `append` once it is stacked."""
        return self.forward, self.routing

    def record(self, linear: str, x, xq: Prepared, w, wq: Prepared, recipe: Recipe, row_mask=None) -> None:
        """Takes the forward statistics of one linear layer."""
        self.forward[linear] = forward_statistics(x, xq, w, wq, recipe, row_mask)

    def append(self, forward: dict[str, Float32[Array, "..."]], routing: dict[str, Array] | None = None) -> None:
        """Adds what layers gave behind what is there."""
        for mine, found in ((self.forward, forward), (self.routing, routing or {})):
            for name, values in found.items():
                mine[name] = jnp.concatenate([*([mine[name]] if name in mine else []), values])


@jax.named_scope(SCOPE)
def forward_statistics(x, xq: Prepared, w, wq: Prepared, recipe: Recipe, row_mask=None) -> Float32[Array, " s"]:
    """FORWARD_STATISTICS of X [*batch, *tokens, K] and W [*batch, K, N] and their prepared copies.

    Those of independent matrices are added; no gradient flows through.
    """
    x, w = lax.stop_gradient((x, w))
    batch_dims = w.ndim - 2
    x = in_shards(x, recipe, batch_dims)
    row_mask = None if row_mask is None else in_shards(row_mask, recipe, batch_dims)
    found = (
        _of_tokens(x, xq.forward, recipe.fprop.lhs, -1, recipe, batch_dims, row_mask),
        operand_statistics(w, wq.forward, recipe.fprop.rhs, -2, batch_dims),
        operand_statistics(w, wq.backward, recipe.dgrad.rhs, -1, batch_dims),
        _of_tokens(x, xq.backward, recipe.wgrad.lhs, -2, recipe, batch_dims, row_mask),
    )
    found = jnp.concatenate(found, axis=-1)
    return found if batch_dims == 0 else jnp.sum(found, axis=tuple(range(batch_dims)))


@jax.named_scope(SCOPE)
def gradient_statistics(
    d, dq: Prepared, x: Part, dw, contract: Callable[[Part, Part], Array], recipe: Recipe, batch_dims: int, row_mask
) -> Float32[Array, "*batch s"]:
    """GRADIENT_STATISTICS of one output gradient [*batch, *tokens, N] and of the weight gradient it gives.

    Args:
      d: with an axis of shards in front of its tokens, where the recipe has them.
      dq: the prepared copies of d; x: the other operand of wgrad.
      dw: [*batch, K, N], what contract(x, dq.backward) gave; contract: wgrad on prepared operands.
    """
    found = (
        _of_tokens(d, dq.forward, recipe.dgrad.lhs, -1, recipe, batch_dims, row_mask),
        _of_tokens(d, dq.backward, recipe.wgrad.rhs, -2, recipe, batch_dims, row_mask),
        _split_statistics(x, dq.backward, dw, contract),
    )
    return jnp.concatenate(found, axis=-1)


def _of_tokens(x, part: Part, operand: Operand, axis: int, recipe: Recipe, batch_dims: int, row_mask):
    """`operand_statistics` of an operand whose rows are tokens, added over the recipe's shards of them."""
    found = operand_statistics(x, part, operand, axis, batch_dims + recipe.shard_axes, row_mask)
    return jnp.sum(found, axis=batch_dims) if recipe.shard_axes else found


@functools.partial(jax.jit, static_argnames=("operand", "axis", "batch_dims"))  # traced once for equal operands
def operand_statistics(
    x: Float[Array, "..."], part: Part, operand: Operand, axis: int, batch_dims: int = 0, row_mask=None
) -> Float32[Array, "*batch s"]:
    """OPERAND_STATISTICS of [*batch, *rows, features] prepared as `part` for a product that contracts `axis`.

    Rows are tokens (of W: inputs), over all of which the mean is taken.
    """
    if operand.format and not isinstance(part.residual, QTensor):
        operand = Operand()  # too short a contraction: the product left it in high precision
    axes = tuple(range(batch_dims, x.ndim))
    x = mask_rows(x.astype(jnp.float32), row_mask)
    mean_energy = jnp.square(column_mean(x, axes[:-1], row_mask)) * row_count(x.shape, axes[:-1], row_mask)
    added, left = _residuals(x, part, operand.split, batch_dims, row_mask)
    values = dequantize(part.residual)
    noise = values - _as_quantized(added, part, operand, axis, values.shape)
    counts = _counts(part.residual, values, _as_quantized(left, part, operand, axis, values.shape), axes)
    energies = [_energy(x, axes), jnp.sum(mean_energy, axis=axes), _energy(left, axes), _energy(noise, axes)]
    return jnp.stack([*energies, *counts], axis=-1)


def _energy(x, axes):
    return jnp.sum(jnp.square(x), axis=axes)


def _residuals(x, part: Part, split: MeanSplit | LowRankSplit | None, batch_dims: int, row_mask):
    """X without what products add back, and X without what was taken off: the latter's rounding is between them."""
    if part.mean is not None:
        mean = dequantize(part.mean)
        added = residual(x, mean, row_mask)
        if split is None or split.center is Center.QUANTIZED_MEAN:
            return added, added
        return added, residual(x, column_mean(x, mean_axes(split, x.ndim, batch_dims), row_mask), row_mask)
    if part.low_rank is not None:
        added = x - low_rank_product(part.low_rank, batch_dims)
        if split is None or split.centered:
            return added, added
        return added, x - low_rank_product(exact_low_rank(x, split, batch_dims), batch_dims)
    return x, x


def _as_quantized(x, part: Part, operand: Operand, axis: int, shape: tuple[int, ...]):
    """X as it meets the quantizer: padded to `shape`, transformed. The transform is orthogonal: energies stay."""
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, size - x.shape[i], 0) for i, size in enumerate(shape)])
    return hadamard(x, axis, operand.hadamard, part.signs) if operand.hadamard else x


def _counts(value, values, target, axes):
    """The six counts; `target` is what was quantized to `value`, which represents `values`."""
    if not isinstance(value, QTensor):
        return [jnp.zeros(target.shape[: axes[0]], jnp.float32)] * 6
    codes, largest_code = _magnitude_codes(value)
    nonzero = target != 0
    found = [nonzero, nonzero & (values == 0), (codes == largest_code) & (values != 0)]
    if value.scales is None:
        blocks = jnp.zeros_like(nonzero)
        found += [blocks] * 3
    else:
        blocks = _holds_any(nonzero, value)
        largest_scale = len(value.format.scale.magnitudes) - 1
        found += [blocks, blocks & (value.scales == 0), blocks & (value.scales == largest_scale)]
    return [jnp.sum(what, axis=axes, dtype=jnp.float32) for what in found]


def _magnitude_codes(value: QTensor):
    """Codes without their sign, in the logical shape, and the largest one."""
    element = value.format.element
    codes = value.element_codes
    codes = lax.slice(codes, [0] * codes.ndim, value.shape)
    return codes & ((1 << element.width) - 1), len(element.magnitudes) - 1


def _holds_any(nonzero, value: QTensor):
    """Which of the tensor's blocks hold an element that is not zero."""
    for axis, (padded, blocks) in enumerate(zip(value.padded_shape, value.scales.shape, strict=True)):
        widths = [(0, padded - nonzero.shape[axis] if i == axis else 0) for i in range(nonzero.ndim)]
        shape = (*nonzero.shape[:axis], blocks, padded // blocks, *nonzero.shape[axis + 1 :])
        nonzero = jnp.any(jnp.pad(nonzero, widths).reshape(shape), axis=axis + 1)
    return nonzero


def _split_statistics(x: Part, d: Part, dw, contract):
    """SPLIT_STATISTICS by subtraction, whatever the split: the products without its terms are made once more."""
    axes = (dw.ndim - 2, dw.ndim - 1)
    plain_x, plain_d = Part(x.residual), Part(d.residual)
    if all(part.mean is None and part.low_rank is None for part in (x, d)):
        return jnp.stack([_energy(dw, axes), *[jnp.zeros(dw.shape[:-2], jnp.float32)] * 2], axis=-1)
    split = dw - contract(plain_x, plain_d)
    cross = dw - contract(_without_sums(x, d), _without_sums(d, x))
    return jnp.stack([_energy(what.astype(jnp.float32), axes) for what in (dw, split, cross)], axis=-1)


def _without_sums(part: Part, other: Part) -> Part:
    """With sums of zero, in the shape in which they meet the other's mean."""
    if other.mean is None:
        return part
    return dataclasses.replace(part, sums=jnp.zeros((*other.mean.shape[:-1], part.residual.shape[-1]), jnp.float32))

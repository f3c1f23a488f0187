"""Between `lax.dot_general`'s general layout and the canonical one of the quantized products.

Canonical: activations [*batch, *tokens, K] with at least one token axis, weights [*batch, K, N]. Contracted axes are
merged into K and the weights' free axes into N; batch and token axes are permuted but never merged, because merging
axes that are sharded makes XLA gather them.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from fp4jax.numerics.blocks import Shape


@dataclasses.dataclass(frozen=True)
class Layout:
    """How to come back from canonical layout.

    Attributes:
      batch_dims: number of batch axes.
      shape: shape of the result: batch, lhs' free axes, rhs' free axes.
      row_axes: lhs' batch and free axes in canonical order, as positions among the axes of a row mask.
    """

    batch_dims: int
    shape: Shape
    row_axes: tuple[int, ...]

    @property
    def has_tokens(self) -> bool:
        return len(self.row_axes) > self.batch_dims

    def row_mask(self, mask):
        """A mask shaped like lhs without its contracted axes → [*batch, *tokens]."""
        mask = mask.transpose(self.row_axes)
        return mask if self.has_tokens else mask[..., None]

    def restore(self, y):
        """[*batch, *tokens, N] → the result of `lax.dot_general`."""
        return y.reshape(self.shape)


def canonicalize(lhs, rhs, dimension_numbers) -> tuple[Array, Array, Layout]:
    """Activations and weights in canonical layout, and the way back."""
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = _as_tuples(dimension_numbers, lhs.ndim, rhs.ndim)
    lhs_free = tuple(axis for axis in range(lhs.ndim) if axis not in lhs_contract + lhs_batch)
    rhs_free = tuple(axis for axis in range(rhs.ndim) if axis not in rhs_contract + rhs_batch)
    batch, tokens = (tuple(lhs.shape[axis] for axis in axes) for axes in (lhs_batch, lhs_free))
    contraction = math.prod(lhs.shape[axis] for axis in lhs_contract)
    out = tuple(rhs.shape[axis] for axis in rhs_free)
    x = _transpose(lhs, lhs_batch + lhs_free + lhs_contract).reshape(*batch, *(tokens or (1,)), contraction)
    w = _transpose(rhs, rhs_batch + rhs_contract + rhs_free).reshape(*batch, contraction, math.prod(out))
    kept = sorted(lhs_batch + lhs_free)
    row_axes = tuple(kept.index(axis) for axis in lhs_batch + lhs_free)
    return x, w, Layout(len(batch), batch + tokens + out, row_axes)


def result_type(lhs, rhs, dimension_numbers, preferred_element_type, out_sharding=None):
    """The type (shape, dtype, sharding) of `lax.dot_general`'s result; its errors for operands that do not fit."""
    types = []

    def product(lhs, rhs):
        result = lax.dot_general(
            lhs, rhs, dimension_numbers, preferred_element_type=preferred_element_type, out_sharding=out_sharding
        )
        types.append(jax.typeof(result))
        return result

    jax.eval_shape(product, lhs, rhs)
    return types[0]


def check_operands(lhs, rhs, dimension_numbers, row_mask) -> None:
    """Raises ValueError for operands that no recipe can take."""
    for name, operand in (("lhs", lhs), ("rhs", rhs)):
        if not hasattr(operand, "dtype"):
            raise ValueError(f"{name} must be an array, got {type(operand).__name__}; convert it with jnp.asarray")
        if not jnp.issubdtype(operand.dtype, jnp.floating):
            raise ValueError(
                f"{name} must be floating-point to be quantized, got {operand.dtype}; convert it, "
                "or use jax.lax.dot_general for integers"
            )
        if 0 in operand.shape:
            raise ValueError(f"{name} has an empty axis: shape {operand.shape}; every axis needs at least one element")
    if row_mask is None:
        return
    (lhs_contract, _), _ = _as_tuples(dimension_numbers, lhs.ndim, rhs.ndim)
    rows = tuple(size for axis, size in enumerate(lhs.shape) if axis not in lhs_contract)
    check_row_mask(row_mask, rows)


def check_row_mask(row_mask, rows: tuple[int, ...]) -> None:
    """Raises ValueError unless `row_mask` says of each of lhs' rows whether it is real."""
    if row_mask.shape != rows or row_mask.dtype != jnp.bool_:
        raise ValueError(
            f"row_mask must be bool{list(rows)}, lhs' shape without its contracted axes; "
            f"got {row_mask.dtype}{list(row_mask.shape)}"
        )


def check_canonical(lhs, rhs, dimension_numbers, lhs_given: bool, rhs_given: bool) -> None:
    """Raises ValueError if an operand that comes prepared is not in canonical layout already."""
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = _as_tuples(dimension_numbers, lhs.ndim, rhs.ndim)
    batch = tuple(range(len(lhs_batch)))
    if lhs_given and (lhs_contract, lhs_batch) != ((lhs.ndim - 1,), batch):
        raise ValueError(
            f"with lhs_q or axes, lhs must be [*batch, *tokens, K] contracted over its last axis: {lhs.shape}"
        )
    if rhs_given and ((rhs_contract, rhs_batch) != ((len(batch),), batch) or rhs.ndim != len(batch) + 2):
        raise ValueError(f"with rhs_q or axes, rhs must be [*batch, K, N] contracted over K, got shape {rhs.shape}")


def _as_tuples(dimension_numbers, lhs_rank, rhs_rank):
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    return (
        (_from_front(lhs_contract, lhs_rank), _from_front(rhs_contract, rhs_rank)),
        (_from_front(lhs_batch, lhs_rank), _from_front(rhs_batch, rhs_rank)),
    )


def _from_front(axes, rank) -> tuple[int, ...]:
    for axis in axes:
        if not -rank <= axis < rank:
            raise ValueError(f"dimension_numbers name axis {axis} of an operand with {rank} axes")
    return tuple(axis % rank for axis in axes)


def _transpose(x, axes):
    return x if axes == tuple(range(x.ndim)) else x.transpose(axes)

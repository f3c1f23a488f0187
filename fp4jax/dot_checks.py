"""What `dot_general` and `prepare` refuse before anything is traced."""

import dataclasses

import jax.numpy as jnp

from fp4jax.canonical import check_canonical, check_operands, check_row_mask
from fp4jax.layout import SEQUENCE, Names
from fp4jax.operands import Prepared, Purpose
from fp4jax.recipes import Recipe
from fp4jax.shards import shape_in_shards
from fp4jax.statistics import GRADIENT_STATISTICS

SIDES = {"lhs": True, "rhs": False}
"""Names of the operands, to whether it is activations."""


def check_preparable(x, side: str, row_mask, batch_dims: int, recipe: Recipe, axes: Names | None) -> None:
    """Raises ValueError for arguments of `prepare` that do not fit."""
    if side not in SIDES:
        raise ValueError(f"side must be 'lhs' (activations) or 'rhs' (weights), got {side!r}")
    is_lhs = SIDES[side]
    if x.ndim < batch_dims + 2 or x.size == 0 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"prepare takes a non-empty floating array of >= {batch_dims + 2} axes, got {x.dtype}{x.shape}"
        )
    if not is_lhs and (row_mask is not None or x.ndim != batch_dims + 2):
        raise ValueError(
            f"weights are [*batch, K, N] and have no row mask: got shape {x.shape}, batch_dims={batch_dims}"
        )
    if row_mask is not None:
        check_row_mask(row_mask, x.shape[:-1])
    if axes is not None and not is_lhs:
        raise ValueError(f"axes name those of activations that devices share; weights have none to share: {axes}")
    _check_axes(() if axes is None else (axes,), x.ndim, recipe)


def _check_prepared(name: str, operand, prepared, needed: Purpose) -> None:
    if not isinstance(prepared, Prepared) or prepared.purpose is None:
        raise ValueError(f"{name} must come from fp4jax.prepare, got {type(prepared).__name__}")
    for field in dataclasses.fields(Purpose):
        was, now = getattr(prepared.purpose, field.name), getattr(needed, field.name)
        if was != now:
            was, now = (getattr(value, "name", value) for value in (was, now))
            raise ValueError(f"{name} was prepared for {field.name} {was}, this product has {now}: prepare it for that")
    shape = operand.shape
    if SIDES[needed.side]:
        shape = shape_in_shards(shape, needed.recipe, needed.batch_dims)
    if prepared.forward.residual.shape != shape:
        raise ValueError(f"{name} was prepared from shape {prepared.forward.residual.shape}, this product has {shape}")


def check_product(lhs, rhs, dimension_numbers, recipe: Recipe, lhs_q, rhs_q, row_mask, probe, axes) -> None:
    """Raises ValueError for arguments of `dot_general` that do not fit."""
    check_operands(lhs, rhs, dimension_numbers, row_mask)
    named = tuple(names for names in axes if names is not None)
    check_canonical(lhs, rhs, dimension_numbers, bool(lhs_q or named), bool(rhs_q or named))
    _check_axes(named, lhs.ndim, recipe)
    batch_dims = len(dimension_numbers[1][0])
    for side, operand, prepared in (("lhs", lhs, lhs_q), ("rhs", rhs, rhs_q)):
        if prepared is not None:
            masked = SIDES[side] and row_mask is not None
            _check_prepared(f"{side}_q", operand, prepared, Purpose(recipe, side, batch_dims, masked))
    if probe is not None and (probe.shape != (len(GRADIENT_STATISTICS),) or probe.dtype != jnp.float32):
        raise ValueError(
            f"probe must be float32[{len(GRADIENT_STATISTICS)}] (fp4jax.GRADIENT_STATISTICS), "
            f"got {probe.dtype}{list(probe.shape)}"
        )


def _check_axes(axes: tuple[Names, ...], rank: int, recipe: Recipe) -> None:
    if axes and recipe.shards is not None:
        raise ValueError(f"axes: devices share no sequences under {recipe.name}, whose statistics are a shard's own")
    for names in axes:
        if len(names) != rank:
            raise ValueError(f"axes must name all {rank} axes, those that are not shared None: got {names}")
        if SEQUENCE not in names:
            raise ValueError(f"axes are named where devices share sequences, and none of {names} is {SEQUENCE!r}")

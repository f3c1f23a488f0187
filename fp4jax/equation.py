"""`einsum` of activations and weights under a recipe.

The equation is parsed here and not by `jnp.einsum`, which swaps operands for some equations before it multiplies: a
quantized product must know which of its operands is the weight.
"""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from fp4jax.dot import dot_general
from fp4jax.recipes import Recipe

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


@dataclasses.dataclass(frozen=True)
class _Equation:
    """A two-operand equation: one letter an axis, ellipses written out."""

    text: str
    first: str
    second: str
    result: str


def einsum(
    equation: str,
    first: Float[Array, "..."],
    second: Float[Array, "..."],
    *,
    recipe: str | Recipe,
    key=None,
    weight: int = 1,
    precision=None,
    preferred_element_type=None,
    out_sharding=None,
    backend: str = "auto",
    gemm: str = "auto",
) -> Float[Array, "..."]:
    """`jnp.einsum` of activations and weights under a recipe, differentiable in both.

    >>> x, w = jnp.ones((2, 8, 32)), jnp.ones((32, 4, 16))
    >>> jax.eval_shape(lambda x, w: einsum("btd,dnh->btnh", x, w, recipe="nvfp4"), x, w).shape
    (2, 8, 4, 16)

    Args:
      equation: any equation of two operands that a matrix product can express, with or without "->" and "...". A letter
        in both operands and in the result counts independent matrices (experts), each with its own statistics. A letter
        that is summed in one operand alone is summed there before anything is quantized.
      first, second: the operands in the equation's order.
      recipe, key, precision, preferred_element_type, backend, gemm: as in `fp4jax.dot_general`.
      weight: which operand holds the weights: 1 (the second) or 0 (the first). The other's free letters are tokens.
      out_sharding: of the result, as in `jnp.einsum`.

    Returns:
      The product with the equation's result shape.

    Raises:
      ValueError: an equation that is no product of two matrices, or operands that do not fit it.
    """
    if weight not in (0, 1):
        raise ValueError(f"weight says which operand holds the weights and must be 0 or 1, got {weight!r}")
    parsed = _parse(equation, (first.ndim, second.ndim))
    _check_sizes(parsed, first.shape, second.shape)
    pairs = [(first, parsed.first), (second, parsed.second)]
    (w, w_letters), (x, x_letters) = pairs[weight], pairs[1 - weight]
    x, x_letters = _sum_alone(x, x_letters, w_letters + parsed.result)
    w, w_letters = _sum_alone(w, w_letters, x_letters + parsed.result)
    shared = [letter for letter in w_letters if letter in x_letters]
    batch = [letter for letter in shared if letter in parsed.result]
    contracted = [letter for letter in shared if letter not in parsed.result]
    numbers = tuple((_axes(x_letters, letters), _axes(w_letters, letters)) for letters in (contracted, batch))
    free = [letter for letter in x_letters + w_letters if letter not in shared]
    produced = [*batch, *free]
    y = dot_general(
        x, w, numbers, precision, preferred_element_type,
        out_sharding=permuted_sharding(out_sharding, _axes(parsed.result, produced)),
        recipe=recipe, key=key, backend=backend, gemm=gemm,
    )  # fmt: skip
    return y.transpose(_axes(produced, parsed.result))


def permuted_sharding(sharding, axes: tuple[int, ...]):
    """`sharding` of an array after `transpose(axes)`; None stays None."""
    if sharding is None:
        return None
    spec = sharding.spec if isinstance(sharding, NamedSharding) else sharding
    entries = (*spec, *(None,) * (len(axes) - len(spec)))
    permuted = PartitionSpec(*(entries[axis] for axis in axes))
    return NamedSharding(sharding.mesh, permuted) if isinstance(sharding, NamedSharding) else permuted


def _axes(letters: Iterable[str], wanted: Iterable[str]) -> tuple[int, ...]:
    letters = list(letters)
    return tuple(letters.index(letter) for letter in wanted)


def _parse(equation: str, ranks: tuple[int, int]) -> _Equation:
    """The equation with ellipses written out, checked for what one matrix product can do."""
    text = equation.replace(" ", "")
    inputs, arrow, result = text.partition("->")
    operands = inputs.split(",")
    if len(operands) != 2:
        raise ValueError(
            f"einsum takes two operands, activations and weights; equation {equation!r} has {len(operands)}: multiply "
            "the others by jnp.einsum first"
        )
    named = {letter for letter in text if letter in _LETTERS}
    spare = [letter for letter in _LETTERS if letter not in named]
    hidden = [_hidden_axes(equation, operand, rank) for operand, rank in zip(operands, ranks, strict=True)]
    dots = "".join(spare[: max(hidden)])
    first, second = (
        operand.replace("...", dots[len(dots) - count :]) for operand, count in zip(operands, hidden, strict=True)
    )
    if not arrow:
        once = sorted(letter for letter in named if (first + second).count(letter) == 1)
        result = dots + "".join(once)
    result = result.replace("...", dots)
    _check_letters(equation, first, second, result, dots)
    return _Equation(equation, first, second, result)


def _hidden_axes(equation: str, operand: str, rank: int) -> int:
    """How many axes of an operand its ellipsis stands for."""
    letters = operand.replace("...", "", 1)
    strange = [letter for letter in letters if letter not in _LETTERS]
    if strange:
        raise ValueError(f"equation {equation!r} has {strange[0]!r}; an operand is letters and at most one '...'")
    missing = rank - len(letters)
    if missing < 0 or (missing and letters == operand):
        raise ValueError(
            f"equation {equation!r} gives {operand!r} for an operand of {rank} axes; write one letter an axis, or '...'"
        )
    return missing


def _check_letters(equation: str, first: str, second: str, result: str, dots: str) -> None:
    for letters in (first, second):
        twice = sorted({letter for letter in letters if letters.count(letter) > 1})
        if twice:
            raise ValueError(
                f"equation {equation!r} repeats {twice[0]!r} in one operand, which is no matrix product; take the "
                "diagonal first: jnp.einsum('ii->i', x)"
            )
    unknown = [letter for letter in result if letter not in first + second]
    if unknown or len(set(result)) < len(result):
        raise ValueError(f"the result of equation {equation!r} must name letters of the operands, each at most once")
    if any(letter not in result for letter in dots):
        raise ValueError(f"equation {equation!r} sums over '...'; write these axes as letters, or '...' in the result")


def _check_sizes(equation: _Equation, first: tuple[int, ...], second: tuple[int, ...]) -> None:
    sizes = dict(zip(equation.first, first, strict=True))
    for letter, size in zip(equation.second, second, strict=True):
        if sizes.setdefault(letter, size) != size:
            raise ValueError(
                f"equation {equation.text!r} has one letter for axes of sizes {sizes[letter]} and {size}: shapes "
                f"{first} and {second}; reshape or broadcast one of them first"
            )


def _sum_alone(x, letters: str, elsewhere: str):
    """Sums over the axes whose letters occur nowhere else."""
    alone = tuple(axis for axis, letter in enumerate(letters) if letter not in elsewhere)
    kept = "".join(letter for letter in letters if letter in elsewhere)
    return (jnp.sum(x, axis=alone) if alone else x), kept


def dot_general_in_any_order(
    product, lhs, rhs, dimension_numbers, weight: int, *, out_sharding=None, **options
) -> jax.Array:
    """`lax.dot_general` by `product`, which takes activations first, where either operand may hold the weights."""
    if weight:
        return product(lhs, rhs, dimension_numbers, out_sharding=out_sharding, **options)
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    batch = len(lhs_batch)
    w_free = lhs.ndim - batch - len(lhs_contract)
    x_free = rhs.ndim - batch - len(rhs_contract)
    # [batch, x, w] as the product makes it; [batch, w, x] as lax does.
    swap = (*range(batch), *range(batch + x_free, batch + x_free + w_free), *range(batch, batch + x_free))
    back = (*range(batch), *range(batch + w_free, batch + w_free + x_free), *range(batch, batch + w_free))
    numbers = ((rhs_contract, lhs_contract), (rhs_batch, lhs_batch))
    y = product(rhs, lhs, numbers, out_sharding=permuted_sharding(out_sharding, back), **options)
    return y.transpose(swap)

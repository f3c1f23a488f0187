"""Names of the quantized products in traces, profiles and compiled programs, and how to read them back.

A product of a linear layer runs under three names, outside in:

    fp4jax:averis                  the recipe
    fprop | dgrad | wgrad          the GEMM; a contraction too short to quantize adds its size: short_contraction:8
    quantized_product/NVFP4:4*NVFP4:4     the number of quantized operands; both formats with their bits an element

Around it stand products that are not one of the three GEMMs: `correction` (the terms of what a split took off) and
`prepare` (what quantizes the operands). JAX wraps names of a forward pass into `transpose(jvp(...))`.

Of a training step the parts that are no linear layer have names too: `attention`, `cross_entropy`, `optimizer`.
"""

import contextlib
import dataclasses
import re

import jax
from jaxtyping import Array

from fp4jax.numerics import QTensor

PRODUCT_SCOPES = ("high_precision_product", "half_quantized_product", "quantized_product")
CORRECTION = "correction"
PREPARATION = "prepare"
STEP_PARTS = ("attention", "cross_entropy", "optimizer")

_RECIPE = "fp4jax:"
_SHORT = "short_contraction:"
_RESERVED = re.compile(r"[/()*\s]")

_READ_RECIPE = re.compile(rf"{_RECIPE}([^/()]*)")
_READ_STEP_PART = re.compile(rf"(?:^|[/(])({'|'.join(STEP_PARTS)})(?:[/)]|$)")
_READ_GEMM = re.compile(rf"{_RECIPE}[^/()]*\)*/(fprop|dgrad|wgrad)")
_READ_SHORT = re.compile(rf"{_SHORT}(\d+)")
_READ_OPERANDS = re.compile(rf"({'|'.join(PRODUCT_SCOPES)})/([^/()*]+):(\d+)\*([^/()*]+):(\d+)")


@dataclasses.dataclass(frozen=True)
class Scope:
    """What the names around a product say.

    Attributes:
      recipe: its name; None outside of `fp4jax.dot_general`.
      gemm: "fprop", "dgrad" or "wgrad"; None where the product is in high precision as a whole and JAX differentiates.
      short_contraction: the contraction that was too short to quantize, or None.
      operands: the formats of both operands, and bits: of their elements; None where gemm is.
      quantized: how many operands are quantized.
      is_correction, is_preparation: not one of the three GEMMs.
      step_part: one of STEP_PARTS, or None.
    """

    recipe: str | None = None
    gemm: str | None = None
    short_contraction: int | None = None
    operands: tuple[str, str] | None = None
    bits: tuple[int, int] | None = None
    quantized: int = 0
    is_correction: bool = False
    is_preparation: bool = False
    step_part: str | None = None


def of_recipe(name: str) -> contextlib.AbstractContextManager:
    """The scope of everything that a recipe does."""
    return jax.named_scope(_RECIPE + _RESERVED.sub("_", name))


def of_gemm(gemm: str, short_contraction: int | None = None) -> contextlib.AbstractContextManager:
    """The scope of fprop, dgrad or wgrad, inside the recipe's."""
    return jax.named_scope(gemm if short_contraction is None else f"{gemm}/{_SHORT}{short_contraction}")


def of_operands(lhs: QTensor | Array, rhs: QTensor | Array) -> contextlib.AbstractContextManager:
    """The scope of one product."""
    quantized = PRODUCT_SCOPES[isinstance(lhs, QTensor) + isinstance(rhs, QTensor)]
    return jax.named_scope(f"{quantized}/{_operand(lhs)}*{_operand(rhs)}")


def of_correction() -> contextlib.AbstractContextManager:
    """The scope of a product with what a split took off: a mean, a factor of low rank."""
    return jax.named_scope(CORRECTION)


def of_preparation() -> contextlib.AbstractContextManager:
    """The scope of splitting, transforming and quantizing."""
    return jax.named_scope(PREPARATION)


def of_step_part(name: str) -> contextlib.AbstractContextManager:
    """The scope of a part of the training step, one of STEP_PARTS."""
    if name not in STEP_PARTS:
        raise ValueError(f"a part of a step is one of {', '.join(STEP_PARTS)}, got {name!r}")
    return jax.named_scope(name)


def read(path: str) -> Scope:
    """What a path of scopes says: of an equation, or an instruction's `op_name`."""
    recipe, gemm, short, operands, step_part = (
        expression.search(path)
        for expression in (_READ_RECIPE, _READ_GEMM, _READ_SHORT, _READ_OPERANDS, _READ_STEP_PART)
    )
    parts = frozenset(path.split("/"))
    return Scope(
        recipe and recipe[1],
        gemm and gemm[1],
        int(short[1]) if short else None,
        (operands[2], operands[4]) if operands else None,
        (int(operands[3]), int(operands[5])) if operands else None,
        PRODUCT_SCOPES.index(operands[1]) if operands else 0,
        is_correction=bool(recipe) and bool({CORRECTION} & parts),
        is_preparation=bool(recipe) and bool({PREPARATION} & parts),
        step_part=step_part and step_part[1],
    )


def _operand(value: QTensor | Array) -> str:
    if isinstance(value, QTensor):
        return f"{_RESERVED.sub('_', value.format.name)}:{value.format.element.width + 1}"
    return f"{value.dtype.name}:{value.dtype.itemsize * 8}"

"""What a program's products are: the GEMMs of linear layers, attention, corrections; in which precision and why."""

import collections
import dataclasses
import enum
import math
import re
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp

from fp4jax.reporting.walk import FUSED, Level, Origin, Product

_WRAPPERS = re.compile(r"[a-z_]+\(|\)|(^|/)(rematted_computation|checkpoint)(?=/|$)")
_LAYER_SUFFIX = re.compile(r"\.(kernel|weight)$")
_ORDER = ("fprop", "dgrad", "wgrad", "forward", "backward")
_MAX_LEAVES = 3
CORRECTION = "correction of a split"
"""The reason of a row that is no GEMM of a layer but a product with what a split took off."""


class Precision(enum.StrEnum):
    """Of the operands of a product, by the wider one."""

    FP4 = "FP4"  # both of at most 4 bits
    EIGHT = "8 bits"
    HALF = "one operand quantized"
    HIGH = "high precision"


@dataclasses.dataclass(frozen=True)
class Row:
    """Equal products of one layer.

    Attributes:
      layer: the argument that holds its weights, or file:line and function of the code that asked for the product.
      gemm: "fprop", "dgrad", "wgrad"; "forward" or "backward" for a product that is not a layer's; "" in `apart`.
      recomputed: once more, by remat.
      shape: of both operands.
      recipe: its name; None for a product that was not given to fp4jax.
      operands: the formats of both.
      precision: by the wider operand.
      execution: how a quantized product runs: "native", "fused", or "emulated" and the dtype it is multiplied in.
      count: executions of the function's one call; flops: multiply-adds x 2 of all of them.
      reason: why it is not in FP4; "" where it is. note: what encloses it that may run it another number of times.
    """

    layer: str
    source: str
    gemm: str
    recomputed: bool
    shape: str
    recipe: str | None
    operands: tuple[str, str]
    precision: Precision
    execution: str
    count: int
    flops: int
    reason: str
    note: str


def rows_of(products: Sequence[Product]) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """(products of layers and of activations, all others: corrections of splits, preparation, statistics).

    Products that no result depends on give a layer's name to its other products and are no rows.
    """
    gemms, others = [], []
    for product in products:
        (others if _aside(product) else gemms).append(product)
    rows = [_row(product, *found) for product, found in zip(gemms, _layers(gemms), strict=True) if product.is_live]
    first = {row.layer: number for number, row in reversed(list(enumerate(rows)))}
    rows.sort(key=lambda row: (first[row.layer], row.recomputed, _ORDER.index(row.gemm)))
    apart = [_row(product, _source(product), "", _aside(product)) for product in others if product.is_live]
    return _merged(rows), _merged(apart)


def _aside(product: Product) -> str:
    """Why a product is not one of a layer's GEMMs; "" if it is."""
    scope = product.scope
    if product.is_statistics:
        return "statistics"
    if scope.is_preparation:
        return "preparation of an operand"
    return CORRECTION if scope.is_correction else ""


def _key(product: Product) -> tuple:
    """The same for a product and for those of its backward pass."""
    path = _WRAPPERS.sub("", product.path)
    return product.source, re.sub(r"/(fprop|dgrad|wgrad)(/.*)?$", "", path).replace("//", "/").strip("/")


def _is_backward(product: Product) -> bool:
    return "transpose(" in product.path and not _is_recomputed(product)


def _is_recomputed(product: Product) -> bool:
    return "rematted_computation" in product.path


def _layers(products: Sequence[Product]) -> list[tuple[str, str, str]]:
    """(layer, GEMM, why it is no layer) of each product; a backward product takes them from its forward."""
    forward = collections.defaultdict(list)
    for product in products:
        if (product.scope.gemm or "fprop") == "fprop" and not _is_backward(product) and not _is_recomputed(product):
            forward[_key(product)].append(product)
    weight_gradients = collections.Counter()
    found = []
    for product in products:
        gemm, own = product.scope.gemm, _weights(product)
        backward = _is_backward(product) or gemm in ("dgrad", "wgrad")
        candidates = _candidates(product, forward[_key(product)]) if backward else [own]
        if gemm is None and not any(candidates):
            direction = "backward" if backward else "forward"
            found.append((_source(product), direction, "not a layer: activation x activation"))
            continue
        gemm = gemm or ("fprop" if not backward else "dgrad" if own in candidates else "wgrad")
        if gemm == "wgrad":  # the backward takes layers in the opposite order
            taken = _key(product), tuple(candidates)
            own = candidates[-1 - weight_gradients[taken] % len(candidates)]
            weight_gradients[taken] += 1
        found.append((_layer_name(own) or _source(product), gemm, ""))
    return found


def _candidates(product: Product, forward: Sequence[Product]) -> list[Origin | None]:
    """The weights of the forward products whose backward a product may be; None where these have none.

    Forward products with one key may be layers and attention. A gradient has an operand of its forward product, and
    its FLOPs.
    """
    weights = [_weights(other) for other in forward]
    if None in weights and any(weights):
        weights = [
            own for other, own in zip(forward, weights, strict=True)
            if other.flops == product.flops and set(other.shapes) & set(product.shapes)
        ]  # fmt: skip
        weights = [*filter(None, weights)] or [None]
    return weights or [_weights(product)]


def _weights(product: Product) -> Origin | None:
    """The operand that holds weights: the right one of ours, of others one that is given; None if both are computed."""
    lhs, rhs = product.origins
    if product.scope.recipe is not None:
        return rhs
    given = [origin for origin in (rhs, lhs) if origin.level is Level.GIVEN]
    return min(given, key=lambda origin: len(origin.leaves), default=None)


def _layer_name(origin: Origin | None) -> str:
    names = sorted(filter(None, origin.leaves)) if origin else []
    return " + ".join(_LAYER_SUFFIX.sub("", name) for name in names) if len(names) <= _MAX_LEAVES else ""


def _source(product: Product) -> str:
    if product.source is None:
        return "unknown source"
    place = product.source
    return f"{Path(place.file).name}:{place.line} {place.function}"


def _row(product: Product, layer: str, gemm: str, reason: str) -> Row:
    scope = product.scope
    operands = scope.operands or product.dtypes
    bits = scope.bits or tuple(jnp.dtype(dtype).itemsize * 8 for dtype in product.dtypes)
    precision = _precision(bits, scope.quantized)
    execution = "" if precision is Precision.HIGH else _execution(product)
    return Row(
        layer, _source(product), gemm, _is_recomputed(product), _shape(product), scope.recipe, operands, precision,
        execution, product.count, product.flops * product.count, reason or _reason(product, precision),
        ", ".join(product.inside),
    )  # fmt: skip


def _execution(product: Product) -> str:
    if product.primitive == FUSED:
        return "fused"
    return "native" if product.primitive.startswith("scaled_matmul") else f"emulated in {product.dtypes[0]}"


def _precision(bits: tuple[int, int], quantized: int) -> Precision:
    if max(bits) <= 4:
        return Precision.FP4
    if max(bits) <= 8:
        return Precision.EIGHT
    return Precision.HALF if quantized or min(bits) <= 8 else Precision.HIGH


def _reason(product: Product, precision: Precision) -> str:
    scope = product.scope
    if precision is Precision.FP4:
        return ""
    if scope.recipe is None:
        return "not given to fp4jax"
    if scope.short_contraction:
        return f"contraction {scope.short_contraction} < 16"
    return f"recipe {scope.recipe}"


def _shape(product: Product) -> str:
    shapes = product.shapes
    if product.scope.gemm == "wgrad" and all(len(shape) == 3 and shape[0] == 1 for shape in shapes):
        # On CPUs two matrices are contracted over one more axis, of size 1: `fp4jax.gemm` says why.
        shapes = tuple(shape[1:] for shape in shapes)
    return " x ".join("[" + ",".join(map(str, shape)) + "]" for shape in shapes)


def _merged(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Rows that differ in nothing but their number become one, in the order of their first."""
    counts, flops = collections.Counter(), collections.Counter()
    for row in rows:
        same = dataclasses.replace(row, count=0, flops=0)
        counts[same] += row.count
        flops[same] += row.flops
    return tuple(dataclasses.replace(row, count=counts[row], flops=flops[row]) for row in counts)


def share(rows: Sequence[Row], total: int) -> float:
    """Percent of the FLOPs `total` that `rows` have."""
    return 100 * math.fsum(row.flops for row in rows) / total if total else 0.0

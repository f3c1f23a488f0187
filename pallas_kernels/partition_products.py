"""Products of quantized operands on several devices: each multiplies the shards that lie on it.

XLA knows nothing of what is inside, a kernel or a call of a library. `product_over_shards` tells the partitioner how
the axes of both operands and of the result belong together, and gives it the program of one device. Sums over a
contraction that is cut over devices are scattered along the axes that the result is cut by, wherever it is cut by the
same axes of the mesh, and only what is left of them is added up on all: weight gradients of tokens on `data` and `fsdp`
travel whole along `fsdp` alone. (The rule of `jax.nn.scaled_matmul` scatters if both are cut by exactly the same axes.)
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from pallas_kernels import partition

Codes = UInt8[Array, "..."]
Names = tuple[str, ...]
"""Axes of a mesh, from the outermost."""


@dataclass(frozen=True)
class Operand:
    """Codes and scales in 1x16 blocks along a contracted axis, and what their axes are in the product.

    Attributes:
      codes: packed along the blocked axis; scales: one byte a block there, of the same shape elsewhere.
      labels: of every axis: "b0" of a batch, "k0" contracted, "m0" or "n0" for a row of the left or right operand.
    """

    codes: Codes
    scales: Codes
    labels: tuple[str, ...]

    def units(self) -> dict[str, int]:
        """How many parts an axis can be cut into: elements, or blocks."""
        return dict(zip(self.labels, self.scales.shape, strict=True))


def operand(codes: Codes, scales: Codes, contracted: Sequence[int], batch_dims: int, row: str) -> Operand:
    """Args: contracted: negative axes; row: "m" of the left operand, "n" of the right one."""
    labels, rows = [], 0
    for axis in range(codes.ndim):
        if axis < batch_dims:
            labels.append(f"b{axis}")
        elif axis - codes.ndim in contracted:
            labels.append(f"k{contracted.index(axis - codes.ndim)}")
        else:
            labels.append(f"{row}{rows}")
            rows += 1
    return Operand(codes, scales, tuple(labels))


def product_over_shards(
    function: Callable[..., Float[Array, "..."]],
    lhs: Operand,
    rhs: Operand,
    *of_batch: Array,
    dtype: DTypeLike = jnp.float32,
    least_rows: int = 1,
) -> Float[Array, "..."]:
    """function(lhs.codes, lhs.scales, rhs.codes, rhs.scales, *of_batch, dtype=dtype), computed where the operands lie.

    Args:
      function: a product [*batch, *rows of lhs, *rows of rhs] of whole arrays or of shards, rounded to `dtype`.
      of_batch: arrays whose axes are those of the batch.
      dtype: of the result; partial sums are in float32 until they are added up.
      least_rows: of either operand that `function` takes: rows are not cut into fewer.

    Raises:
      jax.errors.JaxRuntimeError: when it is compiled, what `function` raises of the shapes of shards.
    """
    result = _labels_of_result(lhs, rhs)
    operands = (lhs.codes, lhs.scales, rhs.codes, rhs.scales, *of_batch)
    labels = (lhs.labels, lhs.labels, rhs.labels, rhs.labels, *(lhs.labels[: array.ndim] for array in of_batch))

    def whole(*operands):
        return function(*operands, dtype=dtype)

    def partition_product(mesh, arguments, made):
        lies = zip((arguments[0], arguments[2], made), (lhs.codes, rhs.codes, made), strict=True)
        left, right, wanted = (partition.shards_of(mesh, on.sharding, array.shape) for on, array in lies)
        mesh = wanted.mesh
        sides = zip((lhs.labels, rhs.labels, result), (left, right, wanted), strict=True)
        names = [dict(zip(of, shards.names, strict=True)) for of, shards in sides]
        plan = _plan(*names, lhs.units() | rhs.units(), mesh.shape, least_rows)

        def placed(labels, cut):
            return NamedSharding(mesh, PartitionSpec(*(cut[label] or None for label in labels)))

        given = tuple(placed(of, plan.cut) for of in labels)
        run = partition.outside_meshes(_of_shards(function, dtype, plan, result))
        return mesh, run, placed(result, plan.of_result), given

    partitioned = custom_partitioning(whole)
    rule, sizes = _rule(operands, labels, result)
    partitioned.def_partition(partition_product, decode_shardings=False, sharding_rule=rule, **sizes)
    return partitioned(*operands)


@dataclass(frozen=True)
class _Plan:
    """Attributes:
    cut: label → the axes of the mesh that cut it, in the operands.
    scattered: label of the result → those along which partial sums are scattered over it.
    summed: those over which what is left is added up.
    """

    cut: Mapping[str, Names]
    scattered: Mapping[str, Names]
    summed: Names

    @property
    def of_result(self) -> dict[str, Names]:
        return {label: names + self.scattered.get(label, ()) for label, names in self.cut.items()}


def _plan(
    lhs: Mapping[str, Names],
    rhs: Mapping[str, Names],
    result: Mapping[str, Names],
    units: Mapping[str, int],
    mesh: Mapping[str, int],
    least_rows: int = 1,
) -> _Plan:
    """How a product is cut: each axis of the mesh cuts one axis of it, that of the left operand before the right one's.

    An operand that all devices hold is cut at no cost. One that is cut otherwise than the plan is exchanged by XLA.

    Args:
      lhs, rhs, result: label → axes of the mesh that cut it.
      units: label → how many parts it can be cut into; mesh: axis → its size.
      least_rows: of an operand that are left on a device, of all its axes that are not contracted.
    """

    def count(names: Names) -> int:
        return math.prod(mesh[name] for name in names)

    def fits(label: str, names: Names) -> bool:
        return units[label] % count(names) == 0

    def leaves_rows(label: str, names: Names) -> bool:
        rows = math.prod(size // count(cut[other]) for other, size in units.items() if other[0] == label[0])
        return label[0] not in "mn" or rows // count(names) >= least_rows

    cut: dict[str, Names] = {label: () for label in units}
    taken: set[str] = set()
    for side in (lhs, rhs, result):
        for label, names in side.items():
            free = tuple(name for name in names if name not in taken)
            if not cut[label] and fits(label, free) and leaves_rows(label, free):
                cut[label] = free
                taken.update(free)
    sums = [name for label, names in cut.items() if label.startswith("k") for name in names]
    scattered = {}
    for label, names in result.items():
        own, more = cut[label], names[len(cut[label]) :]
        if more and names == own + more and set(more) <= set(sums) and fits(label, names):
            scattered[label] = more
            sums = [name for name in sums if name not in more]
    return _Plan(cut, scattered, tuple(sums))


def _of_shards(function: Callable, dtype: DTypeLike, plan: _Plan, labels: Sequence[str]) -> Callable:
    is_partial = bool(plan.summed or plan.scattered)

    def run(*operands):
        value = function(*operands, dtype=jnp.float32 if is_partial else dtype)
        for axis, label in enumerate(labels):
            if names := plan.scattered.get(label):
                value = lax.psum_scatter(value, names, scatter_dimension=axis, tiled=True)
        value = lax.psum(value, plan.summed) if plan.summed else value
        # The barrier keeps XLA from taking the rounding back where the caller goes on in float32.
        return lax.optimization_barrier(value.astype(dtype)) if is_partial else value

    return run


def _labels_of_result(lhs: Operand, rhs: Operand) -> tuple[str, ...]:
    return tuple(
        label for kind, side in (("b", lhs), ("m", lhs), ("n", rhs)) for label in side.labels if label.startswith(kind)
    )


def _rule(
    operands: Sequence[Array], labels: Sequence[Sequence[str]], result: Sequence[str]
) -> tuple[str, dict[str, int]]:
    """Shardy's rule, and the sizes of the parts of an axis that stay in a block."""
    units: dict[str, int] = {}
    for array, of in zip(operands, labels, strict=True):
        units |= {label: min(size, units.get(label, size)) for label, size in zip(of, array.shape, strict=True)}
    sizes: dict[str, int] = {}

    def factors(label: str, size: int) -> str:
        if size == units[label]:
            return label
        sizes[f"{label}in"] = size // units[label]
        return f"({label} {label}in)"

    sides = [" ".join(map(factors, of, array.shape)) for array, of in zip(operands, labels, strict=True)]
    return f"{', '.join(sides)} -> {' '.join(result)}", sizes

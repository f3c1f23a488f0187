"""Kernels on several devices: each takes the shard of its operand that lies on it; no operand is ever gathered.

XLA knows nothing of a kernel and would gather what it reads. `over_shards` tells the partitioner instead, by a rule for
Shardy that carries shardings between operands and results, and by the program of one device, which is traced when the
sharding of the first operand is known. All other arrays follow the first: an axis of the same size is cut as that one
is, and so are the codes and scales of an axis in whole blocks. On one device, and under `jax.shard_map` over all axes
of a mesh, there is nothing to cut and the kernel runs as it is.

A shard must hold whole units of what an operation reads together: blocks, and for some axes more. One that would not is
refused by name where the program is compiled, because only a gather could serve it. An axis that is not cut may have
any size: the kernel pads it.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, UInt32

Shape = tuple[int, ...]
_PART = ":"  # between the name of a mesh's axis and the number of a part of it


@dataclass(frozen=True)
class Follows:
    """How arrays lie beside the first operand, by whose axes theirs are named.

    Attributes:
      units: axis of the first operand → how many of its elements a shard holds a multiple of, where that is more
        than one; the sizes of what follows such an axis are in proportion. The size of the axis is a multiple too, or
        the axis cannot be cut at all.
      what: the name of such a unit in errors: "block of 16".
    """

    units: Mapping[int, int]
    what: str

    def axes(self, array: Shape, first: Shape) -> tuple[int | None, ...]:
        """For every axis of `array` the axis of the first operand at its position, if it is cut with that one."""
        return tuple(i if i < len(first) and self._is_cut(i, size, first) else None for i, size in enumerate(array))

    def _is_cut(self, axis: int, size: int, first: Shape) -> bool:
        units = self._units(axis, first)
        if units is None:
            # What is padded to whole units inside may have the size of the axis by accident.
            return size == first[axis] and self.units.get(axis, 1) == 1
        return size == first[axis] or size % units == 0

    def _units(self, axis: int, first: Shape) -> int | None:
        unit = self.units.get(axis, 1)
        return first[axis] // unit if unit > 1 and first[axis] % unit == 0 else None

    def rule(self, operands: Sequence[Shape], results: Sequence[Shape]) -> tuple[str, dict[str, int]]:
        """Shardy's rule, and the sizes of the factors that are only a part of an axis."""
        first, arrays = operands[0], (*operands, *results)
        in_units = {
            axis: units
            for axis in self.units
            if (units := self._units(axis, first)) is not None
            # Without an array of one element a unit there is nothing that the axis would be in proportion to.
            and any(array[axis : axis + 1] == (units,) for array in arrays)
        }
        sizes: dict[str, int] = {}
        own = itertools.count()

        def factors(axis: int | None, size: int) -> str:
            if axis is None:
                return f"own{next(own)}"
            if size == in_units.get(axis, size):
                return f"x{axis}"
            inner = size // in_units[axis]
            sizes[f"x{axis}of{inner}"] = inner
            return f"(x{axis} x{axis}of{inner})"

        sides = [
            ", ".join(" ".join(map(factors, self.axes(shape, first), shape)) for shape in side)
            for side in (operands, results)
        ]
        return " -> ".join(sides), sizes


@dataclass(frozen=True)
class Shards:
    """How the first operand is cut over a mesh.

    Attributes:
      mesh: the program's, each axis split into axes of prime sizes: Shardy may cut by a part of an axis.
      names: for each axis of the operand the axes of the mesh that cut it, from the outermost.
      shape: of the whole operand; local: of a shard.
    """

    mesh: Mesh
    names: tuple[tuple[str, ...], ...]
    shape: Shape

    @property
    def local(self) -> Shape:
        return tuple(size // self.count(axis) for axis, size in enumerate(self.shape))

    def count(self, axis: int) -> int:
        """How many shards the axis is cut into."""
        return math.prod(self.mesh.shape[name] for name in self.names[axis])

    def across(self, axes: Sequence[int]) -> tuple[str, ...]:
        """The axes of the mesh that cut these axes of the operand."""
        return tuple(name for axis in axes for name in self.names[axis])

    def stages(self, axis: int) -> tuple[tuple[str, ...], ...]:
        """The axes of the mesh that cut an axis of the operand, from the innermost; the parts of one together."""
        whole = itertools.groupby(self.names[axis], key=lambda name: name.partition(_PART)[0])
        return tuple(tuple(parts) for _, parts in whole)[::-1]

    def start(self, axis: int) -> UInt32[Array, "1"]:
        """Inside the program of a device: where its shard begins along the axis."""
        if not self.names[axis]:
            return jnp.zeros(1, jnp.uint32)
        index = lax.axis_index(self.names[axis]).astype(jnp.uint32)
        return (index * jnp.uint32(self.local[axis])).reshape(1)

    def check(self, axis: int, unit: int, what: str) -> None:
        """Raises ValueError where a shard would not hold whole units along an axis of the operand that is cut.

        A kernel pads an axis that is not cut by itself.
        """
        if self.count(axis) == 1 or self.shape[axis] % (self.count(axis) * unit) == 0:
            return
        names = ", ".join(dict.fromkeys(repr(name.partition(_PART)[0]) for name in self.names[axis]))
        raise ValueError(
            f"axis {axis - len(self.shape)} of an array of shape {self.shape} is cut into {self.count(axis)} shards by "
            f"the mesh's {names}, and a shard must hold whole units of it: {what}. Shard another axis, choose a size "
            f'that divides by {self.count(axis) * unit}, or use backend="xla"'
        )


Local = Callable[[Shards], Callable[..., tuple[Array, ...]]]


def over_shards(
    function: Callable[..., tuple[Array, ...]], local: Local, follows: Follows, operands: Sequence[Array]
) -> tuple[Array, ...]:
    """function(*operands), computed where the first operand lies.

    Args:
      function: of whole arrays, without constants of its own; what runs where there is one device.
      local: how the first operand is cut → the same function of shards.
      follows: how the other operands and the results lie beside the first.

    Raises:
      jax.errors.JaxRuntimeError: when it is compiled; a shard would cut what has to stay together. The message names
        the axis.
    """
    results = jax.eval_shape(function, *operands)
    shapes = [operand.shape for operand in operands], [result.shape for result in results]

    def partition(mesh, arguments, _):
        shape = shapes[0][0]
        shards = shards_of(mesh, arguments[0].sharding, shape)
        for axis, unit in follows.units.items():
            shards.check(axis, unit, follows.what)
        given, made = (tuple(_placed(shards, follows, each) for each in side) for side in shapes)
        return shards.mesh, outside_meshes(local(shards)), made, given

    partitioned = custom_partitioning(function)
    text, sizes = follows.rule(*shapes)
    partitioned.def_partition(partition, decode_shardings=False, sharding_rule=text, **sizes)
    return partitioned(*operands)


def outside_meshes(function: Callable) -> Callable:
    """The program of one device, traced without the ambient mesh, whose Explicit axes would type what is inside."""

    def run(*operands):
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            return function(*operands)

    return run


def shards_of(mesh: Mesh, sharding: Sharding, shape: Shape) -> Shards:
    """The sharding in terms of a mesh, read off the places of the shards: it need not have names.

    Raises:
      ValueError: the devices are no mesh; or an axis is cut into unequal shards, by JAX.
    """
    if mesh.empty:
        raise ValueError(f"an operand of a kernel, of shape {shape}, lies on devices without a mesh: use jax.set_mesh")
    fine = _in_primes(mesh)
    begins = {device: [s.start or 0 for s in slices] for device, slices in sharding.devices_indices_map(shape).items()}
    by_device = np.array([begins[device] for device in fine.devices.flat]).reshape(*fine.devices.shape, len(shape))
    origin = by_device[(0,) * fine.devices.ndim]
    # What one step along an axis of the mesh moves a shard by; along the axes that do not cut, nothing.
    steps = [
        by_device[tuple(int(i == other) for other in range(fine.devices.ndim))] - origin
        for i in range(fine.devices.ndim)
    ]
    names = []
    for axis in range(len(shape)):
        cutting = [(step[axis], name) for step, name in zip(steps, fine.axis_names, strict=True) if step[axis]]
        names.append(tuple(name for _, name in sorted(cutting, reverse=True)))
    found = Shards(fine, tuple(names), shape)
    if found.local != sharding.shard_shape(shape):
        raise ValueError(f"an operand of a kernel, of shape {shape}, is cut in a way that {mesh} does not describe")
    return found


def _in_primes(mesh: Mesh) -> Mesh:
    """The same devices in the same order, each axis of the mesh split into axes of prime sizes."""
    axes = [(f"{name}{_PART}{i}", prime) for name, size in mesh.shape.items() for i, prime in enumerate(_primes(size))]
    return Mesh(mesh.devices.reshape([size for _, size in axes]), [name for name, _ in axes])


def _primes(size: int) -> list[int]:
    factor = next((f for f in range(2, size + 1) if size % f == 0), None)
    return [] if factor is None else [factor, *_primes(size // factor)]


def _placed(shards: Shards, follows: Follows, array: Shape) -> NamedSharding:
    axes = follows.axes(array, shards.shape)
    spec = [None if axis is None else shards.names[axis] or None for axis in axes]
    return NamedSharding(shards.mesh, PartitionSpec(*spec))

"""Which mesh axis shards what: one table for parameters and activations, and how a program is told.

`data` replicates the parameters and splits the batch; `fsdp` splits the batch and the parameters (ZeRO-3); `expert`
splits the batch, the experts, and the other parameters further than `fsdp` does; `tensor` splits heads, MLP width and
vocabulary and, where sequences are sharded, the tokens of the activations in between.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

from fp4jax.axes import BATCH_AXES, MESH_AXES

Names = tuple[str | None, ...]
"""Of the axes of an array: those of LOGICAL_AXES, None for one that is whole on every device."""

SEQUENCE = "sequence"
"""The axis of activations that devices along `tensor` share where sequences are sharded."""

LOGICAL_AXES: dict[str, tuple[str, ...]] = {
    # Of parameters, by the names in their NNX metadata.
    "embed": ("fsdp", "expert"),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "vocab": ("tensor",),
    "layers": (),
    "expert": ("expert",),
    # Of activations.
    "batch": BATCH_AXES,
    SEQUENCE: ("tensor",),
    "slots": ("data", "fsdp"),
}
"""Name of an array's axis to the mesh axes that shard it."""

BATCH = PartitionSpec(BATCH_AXES)
"""Batches are split along their sequences; a sequence stays whole."""


def partition_spec(names: Sequence[str | None] | None) -> PartitionSpec:
    """Returns the PartitionSpec of an array whose axes are called `names` (None: replicated).

    A mesh axis shards one axis of an array, the first that asks for it: of a square (embed, embed) matrix that is the
    first, of experts' kernels (expert, embed, mlp) `expert` is gone when `embed` comes.

    Raises:
      ValueError: a name that LOGICAL_AXES does not list.
    """
    taken: set[str] = set()
    entries = []
    for name in names or ():
        if name is not None and name not in LOGICAL_AXES:
            raise ValueError(f"unknown axis {name!r}; accepted: {', '.join(LOGICAL_AXES)}")
        axes = tuple(axis for axis in (LOGICAL_AXES[name] if name else ()) if axis not in taken)
        taken.update(axes)
        entries.append(axes if len(axes) > 1 else axes[0] if axes else None)
    return PartitionSpec(*entries)


def place(x: Array, names: Sequence[str | None], blocks: Sequence[int] | None = None) -> Array:
    """`x` where the compiler is told to keep it; as it is without a mesh of several devices whose axes are Auto.

    An axis that the devices would not divide evenly stays whole on all of them.

    Args:
      names: of x's axes, as in LOGICAL_AXES; None for an axis that is whole on every device.
      blocks: of every axis, how many neighbours must stay on one device; None: any may part.
    """
    sizes = auto_axes()
    if math.prod(sizes.values()) == 1:
        return x
    entries = []
    for entry, size, block in zip(partition_spec(names), x.shape, blocks or [1] * x.ndim, strict=True):
        axes = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        axes = tuple(axis for axis in axes if sizes.get(axis, 1) > 1)
        divides = size % (block * math.prod(sizes[axis] for axis in axes)) == 0
        entries.append(axes if axes and divides else None)
    return lax.with_sharding_constraint(x, PartitionSpec(*entries))


def place_all[Tree](tree: Tree, names: Sequence[str | None]) -> Tree:
    """`place` for every array of a tree, all of which have these axes, of any sizes; one there twice is placed once."""
    placed: dict[int, Array] = {}
    for leaf in jax.tree.leaves(tree):
        if id(leaf) not in placed:
            placed[id(leaf)] = place(leaf, names)
    return jax.tree.map(lambda leaf: placed[id(leaf)], tree)


def whole_along(names: Names, axis: str) -> Names:
    """The same names for an array whose axis of that name is whole on every device."""
    return tuple(None if name == axis else name for name in names)


def batch_shards() -> int:
    """How many devices share a batch on the ambient mesh, as far as the compiler shards it."""
    return _devices(BATCH_AXES)


def sequence_shards() -> int:
    """How many devices share a sequence likewise, where sequences are sharded."""
    return _devices(LOGICAL_AXES["sequence"])


def _devices(axes: Sequence[str]) -> int:
    sizes = auto_axes()
    return math.prod(sizes.get(axis, 1) for axis in axes)


def batch_stages() -> tuple[tuple[int, Callable[[Array], Array]], ...]:
    """How devices that share a batch along several axes of the mesh add up one row each: along the innermost first.

    Neighbours are near each other. With their sums as one row, little travels between those that are far apart.

    Returns:
      (groups, gather) for each axis but the outermost: `gather` takes rows [..., rows, features], of each device its
      own, and gives those of a group to all its devices.
    """
    sizes = auto_axes()
    axes = [axis for axis in BATCH_AXES if sizes.get(axis, 1) > 1]
    outer = (tuple(axes[:count]) for count in range(len(axes) - 1, 0, -1))
    return tuple((_devices(names), functools.partial(_rows_along, names=names)) for names in outer)


def _rows_along(rows: Array, names: tuple[str, ...]) -> Array:
    """Rows [..., rows, features] cut along these axes of the mesh and no others, if those divide them."""
    if rows.shape[-2] % _devices(names):
        return rows
    free = PartitionSpec.UNCONSTRAINED
    return lax.with_sharding_constraint(rows, PartitionSpec(*[free] * (rows.ndim - 2), names, free))


def on_every_device(rows: Array) -> Array:
    """Rows [..., rows, features], all of them on every device that has their features."""
    if batch_shards() * sequence_shards() == 1:
        return rows
    free = PartitionSpec.UNCONSTRAINED
    return lax.with_sharding_constraint(rows, PartitionSpec(*[free] * (rows.ndim - 2), None, free))


def rows_everywhere[Tree](tree: Tree) -> Tree:
    """Arrays of one row, [1, ..., 1, features] each, on every device that has their features; others as they are.

    Left to choose, the compiler cuts a row of statistics over the batch's devices, as it cuts the rows of the weight
    gradient that the row enters: by an all-to-all, and gathers it again for the tokens that it is subtracted from.
    """
    over = {name for name, size in auto_axes().items() if name in BATCH_AXES and size > 1}
    if not over:
        return tree
    # A sharding constraint cannot leave the features to some axes of the mesh and forbid them to others. What leaves a
    # shard_map over the latter can.
    whole = PartitionSpec()
    pinned = jax.jit(jax.shard_map(lambda row: row, in_specs=whole, out_specs=whole, axis_names=over))
    return jax.tree.map(lambda row: pinned(row) if math.prod(row.shape[:-1]) == 1 else row, tree)


def by_batch_shard(rowwise: Callable[[Array], Array], rows: Array) -> Array:
    """`rowwise(rows)`, whose rows depend on the same rows alone: every device takes those of its part of the batch.

    For operations that the compiler cannot split itself; where the devices do not divide the rows, it does as it can.

    Args:
      rowwise: called with the rows of one device.
    """
    over = tuple(name for name, size in auto_axes().items() if name in BATCH_AXES and size > 1)
    if not over or len(rows) % batch_shards():
        return rowwise(rows)
    split = PartitionSpec(over)
    return jax.jit(jax.shard_map(rowwise, in_specs=split, out_specs=split, axis_names=set(over)))(rows)


def auto_axes() -> dict[str, int]:
    """The sizes of those of our axes over which the compiler shards; of no others are we the master."""
    mesh = jax.sharding.get_abstract_mesh()
    return {
        name: size
        for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
        if kind == AxisType.Auto and name in MESH_AXES
    }

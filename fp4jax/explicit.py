"""Products under a mesh of Explicit axes, where every intermediate array carries its sharding in its type.

The dot reshapes into blocks and pads, which Explicit types would have to follow step by step. Instead it runs with
the axes turned to Auto and states the sharding of its results; cotangents then come back sharded like the primals.
"""

from collections.abc import Callable

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def explicit_mesh(*arrays):
    """The mesh with Explicit axes that the arrays live on, or None."""
    for array in arrays:
        mesh = getattr(getattr(jax.typeof(array), "sharding", None), "mesh", None)
        if mesh is not None and AxisType.Explicit in (mesh.axis_types or ()):
            return mesh
    return None


def with_auto_axes(function: Callable, mesh, out_sharding) -> Callable:
    """`function` run with the axes of `mesh` as Auto; `out_sharding`: a pytree of PartitionSpec for its outputs."""
    if mesh is None:
        return function
    auto = jax.sharding.auto_axes(function, out_sharding=out_sharding)

    def run(*args):
        if jax.sharding.get_abstract_mesh().empty:
            with jax.sharding.use_abstract_mesh(mesh):
                return auto(*args)
        return auto(*args)

    return run


def specs_like(x: jax.Array, tree, mesh, cut: int | None = None):
    """PartitionSpecs for arrays that have x's axes, some of them reduced, packed or in blocks.

    An axis is sharded as x's is where its size still divides by the number of shards.

    cut: the axis of x that the arrays have in two, of which the first is sharded.
    """
    spec = list(jax.typeof(x).sharding.spec)
    if cut is not None:
        spec.insert(cut + 1, None)
    shards = [_shards(entry, mesh) for entry in spec]

    def of(leaf):
        keep = (size > 1 and size % n == 0 for size, n in zip(leaf.shape, shards, strict=True))
        return NamedSharding(mesh, PartitionSpec(*(e if k else None for e, k in zip(spec, keep, strict=True))))

    return jax.tree.map(of, tree)


def _shards(entry, mesh) -> int:
    names = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
    count = 1
    for name in names:
        count *= mesh.shape[name]
    return count

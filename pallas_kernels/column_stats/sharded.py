"""`column_stats` on several devices, with the bits of one: the tree of sums is cut where the array is.

The rows of a shard that follow one another in the whole array, a run, divide into stretches of 2^k rows that are
subtrees of the whole sum. Each device adds up its stretches; their sums, few and small, are exchanged, along the mesh's
innermost axis first, and every device adds them by the same tree. Maxima and negated minima are reduced over the
devices, together.
"""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fp4jax.numerics.column_stats import added_up, stats_shape, tree_sum
from pallas_kernels.column_stats import kernel, local
from pallas_kernels.partition import Follows, Shards, over_shards

_STRETCH = f"stretch of {kernel.ROWS} rows"


def column_stats(x: Float[Array, "..."], *, batch_dims: int, interpret: bool) -> local.Stats:
    """`local.column_stats` of an array that may be cut along any axis, between stretches of 8 rows."""

    def of_whole(x):
        return local.column_stats(x, batch_dims=batch_dims, interpret=interpret)

    def of_shards(shards: Shards):
        inner = _innermost_cut(shards, batch_dims)
        after = math.prod(shards.shape[inner + 1 : -1])
        shards.check(inner, kernel.ROWS // math.gcd(kernel.ROWS, after), _STRETCH)
        return lambda x: _of_shard(x, shards, batch_dims, inner, interpret)

    return over_shards(of_whole, of_shards, Follows({}, _STRETCH), (x,))


def _innermost_cut(shards: Shards, batch_dims: int) -> int:
    """The last token axis that is cut; the first one where none is."""
    return max((axis for axis in range(batch_dims, len(shards.shape) - 1) if shards.names[axis]), default=batch_dims)


def _of_shard(x, shards: Shards, batch_dims: int, inner: int, interpret: bool) -> local.Stats:
    tokens = range(batch_dims, x.ndim - 1)
    if not shards.across(tokens):
        return local.column_stats(x, batch_dims=batch_dims, interpret=interpret)
    columns = x.shape[-1]
    runs = x.reshape(math.prod(x.shape[:inner]), -1, columns)
    sums, minima, maxima = local.stretches(runs, interpret=interpret)
    sums = sums.reshape(*x.shape[:inner], -1, columns)
    for axis in range(inner, batch_dims - 1, -1):
        for names in shards.stages(axis):
            sums = lax.all_gather(sums, names, axis=axis, tiled=True)
            # The next ones to exchange are farther from each other: they get one row of all these.
            sums = added_up(sums) if axis == inner else sums
    shape = stats_shape(x.shape, batch_dims)
    of_matrix = (*x.shape[:batch_dims], -1, columns)
    least = jnp.min(minima.reshape(of_matrix), axis=-2)
    largest = jnp.max(maxima.reshape(of_matrix), axis=-2)
    names = shards.across(tokens)
    negated, largest = lax.pmax(jnp.stack([-least, largest]), names)
    parts = tree_sum(sums.reshape(of_matrix)), -negated, largest
    return tuple(part.reshape(shape) for part in parts)

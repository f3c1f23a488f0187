"""Adding in registers, one number after another, by the balanced binary tree of `fp4jax.numerics.column_stats`."""

import jax.numpy as jnp
from jax import lax


def count_up(i, pending, total):
    """Adds step i's sum to the binary counter: (what is pending on each level, the sum of all levels).

    Sums go up as if each level had its left neighbour waiting. Where it had not, what arrives above is no carry; but
    the last write of a level before it is read is one, and in the last step all levels are waiting.
    """
    after = []
    for level, waiting in enumerate(pending):
        is_right_neighbour = (i >> level) & 1 == 1
        after.append(choose(is_right_neighbour, waiting, total))
        total = waiting + total
    return *after, total


def choose(condition, yes, no):
    """`jnp.where` for a scalar condition, which Mosaic does not broadcast by itself."""
    return jnp.where(lax.broadcast_in_dim(condition, yes.shape, ()), yes, no)

"""`column_sums` on several devices: each adds up its blocks, and the sums of the devices are added."""

import functools

from jax import lax

from pallas_kernels.column_sums import local
from pallas_kernels.partition import Follows, Shards, over_shards


def column_sums(codes, scales, *, batch_dims: int, interpret: bool):
    """`local.column_sums` of codes that may be cut along any axis, between blocks; equal to it up to rounding.

    An all-reduce adds what the devices have, in an order of its own.
    """
    run = functools.partial(local.column_sums, batch_dims=batch_dims, interpret=interpret)

    def of_shards(shards: Shards):
        names = shards.across(range(batch_dims, codes.ndim - 1))
        return lambda *operands: (lax.psum(run(*operands), names) if names else run(*operands),)

    follows = Follows({codes.ndim - 2: local.PACKED_BLOCK}, "block of 16")
    return over_shards(lambda *operands: (run(*operands),), of_shards, follows, (codes, scales))[0]

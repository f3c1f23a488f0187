"""The quantizers on several devices: `pallas_kernels.quantize.local` on each shard, with the bits of the whole array.

A shard has the amax of its whole matrix and the hashes of its rows as operands, which are cut beside it, and stochastic
rounding counts columns from where it begins. So nothing travels between devices, but the maximum after a Hadamard
transform, which only the kernel knows.
"""

import functools
import itertools

from jax import lax

from fp4jax.numerics import NVFP4
from pallas_kernels.partition import Follows, Shards, over_shards
from pallas_kernels.quantize import local
from pallas_kernels.quantize.local import Codes

_BLOCK = f"block of {NVFP4.block}"


def quantize_rows(x, factors, center=(), hashes=(), *, interpret: bool) -> Codes:
    """`local.quantize_rows` of an array that may be cut along any axis, between blocks."""
    run = functools.partial(local.quantize_rows, interpret=interpret)
    follows = Follows({x.ndim - 1: NVFP4.block}, _BLOCK)
    return _quantize(run, follows, x, factors, center, hashes)


def quantize_columns(x, factors, center=(), hashes=(), *, hadamard: bool, interpret: bool) -> Codes:
    """`local.quantize_columns` likewise; under stochastic rounding a shard holds an even number of columns."""
    run = functools.partial(local.quantize_columns, hadamard=hadamard, interpret=interpret)
    follows = Follows({x.ndim - 2: NVFP4.block}, _BLOCK)
    return _quantize(run, follows, x, factors, center, hashes)


def quantize_2d(x, factors, hashes=(), *, interpret: bool) -> Codes:
    """`local.quantize_2d` likewise."""
    follows = Follows({x.ndim - 2: NVFP4.block, x.ndim - 1: NVFP4.block}, f"{_BLOCK}x{NVFP4.block}")

    def run(x, factors, center, hashes, start):
        assert not center
        return local.quantize_2d(x, factors, hashes, start, interpret=interpret)

    return _quantize(run, follows, x, factors, (), hashes)


def quantize_copies(
    x,
    factors,
    center=(),
    row_hashes=(),
    column_hashes=(),
    *,
    hadamard: bool,
    sums: bool,
    batch_dims: int,
    interpret: bool,
):
    """`local.quantize_copies` likewise, cut between blocks of both copies; sums are added over the devices."""
    sizes = len(factors), len(center), len(row_hashes), len(column_hashes)
    run = functools.partial(local.quantize_copies, hadamard=hadamard, sums=sums, interpret=interpret)

    def unflatten(operands, start=()):
        x, rest = operands[0], iter(operands[1:])
        return run(x, *(tuple(itertools.islice(rest, size)) for size in sizes), start)

    def of_shards(shards: Shards):
        start = _start(shards, bool(row_hashes or column_hashes))
        names = shards.across(range(batch_dims, x.ndim - 1)) if sums else ()

        def of_shard(*operands):
            *copies, last = unflatten(operands, start())
            return (*copies, lax.psum(last, names) if names else last)

        return of_shard

    follows = Follows({x.ndim - 2: NVFP4.block, x.ndim - 1: NVFP4.block}, f"{_BLOCK}x{NVFP4.block}")
    operands = (x, *factors, *center, *row_hashes, *column_hashes)
    return over_shards(lambda *operands: unflatten(operands), of_shards, follows, operands)


def hadamard_amax(x, center=(), *, batch_dims: int, interpret: bool):
    """`local.hadamard_amax` likewise: the maximum over all shards of a matrix."""
    run = functools.partial(local.hadamard_amax, batch_dims=batch_dims, interpret=interpret)

    def of_whole(x, *center):
        return (run(x, center),)

    def of_shards(shards: Shards):
        names = shards.across(range(batch_dims, x.ndim))

        def of_shard(x, *center):
            largest = run(x, center)
            return (lax.pmax(largest, names) if names else largest,)

        return of_shard

    follows = Follows({x.ndim - 2: NVFP4.block}, _BLOCK)
    return over_shards(of_whole, of_shards, follows, (x, *center))[0]


def _quantize(run, follows: Follows, x, factors, center, hashes) -> Codes:
    def unflatten(operands, start=()):
        x, factors, *rest = operands
        return run(x, factors, tuple(rest[: len(center)]), tuple(rest[len(center) :]), start)

    def of_shards(shards: Shards):
        start = _start(shards, bool(hashes))
        return lambda *operands: unflatten(operands, start())

    return over_shards(lambda *operands: unflatten(operands), of_shards, follows, (x, factors, *center, *hashes))


def _start(shards: Shards, drawn: bool):
    """Inside the program of a device: the column where its shard begins, where random numbers count from it."""
    columns = len(shards.shape) - 1
    if not (drawn and shards.names[columns]):
        return lambda: ()
    shards.check(columns, 2, "the two columns of one random number")
    return lambda: (shards.start(columns),)

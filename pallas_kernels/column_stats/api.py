"""`column_stats`: what `fp4jax.numerics.column_stats` gives, by one kernel that reads the matrix once."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from fp4jax.numerics.column_stats import ColumnStats, check_shape
from pallas_kernels import compat, launch
from pallas_kernels.column_stats import local, sharded
from pallas_kernels.quantize.api import unsupported_reason

_DTYPES = (jnp.bfloat16, jnp.float32)


def column_stats(
    x: Float[Array, "*shape"],
    batch_dims: int = 0,
    *,
    device: compat.Device | None = None,
    partitioned: bool = False,
    interpret: bool = False,
) -> ColumnStats:
    """Sum, minimum and maximum of every column of [*batch, *tokens, features], in float32.

    Equals `fp4jax.numerics.column_stats(x, batch_dims)` bit for bit where the twin's result is specified: not in the
    sign of a minimum or maximum of zero, nor in those of a column with a NaN. It has no derivative. Features
    that are odd or fewer than 256 are padded first, by a copy.

    Args:
      x: bfloat16 or float32, with at least one token axis, and not empty.
      batch_dims: leading axes that count independent matrices.
      device: the device the program is compiled for; default: the first of `jax.devices()`.
      partitioned: x may be cut over the axes of a mesh, along tokens into shards of a multiple of 8 rows: each device
        reads its own, and the result has the bits of one device. It has no rule under `jax.vmap`. Without it XLA
        gathers what a kernel reads.
      interpret: run the kernel in Pallas' GPU interpreter instead, on any device: for tests.

    Raises:
      NotImplementedError: the device, the JAX release or the number of matrices is not served: the reason and the
        alternative.
      ValueError: x is of another dtype or empty, or has no token axis.
    """
    _check(x, batch_dims, device, interpret)
    run = sharded.column_stats if partitioned else local.column_stats
    return ColumnStats(*run(x, batch_dims=batch_dims, interpret=interpret))


def _check(x, batch_dims, device, interpret):
    if reason := compat.not_interpreted() if interpret else unsupported_reason(device):
        raise NotImplementedError(f"{reason}; use fp4jax.numerics.column_stats")
    if x.dtype not in _DTYPES:
        raise ValueError(f"column_stats takes bfloat16 or float32, got {x.dtype}; convert with x.astype(jnp.float32)")
    check_shape(x.shape, batch_dims)
    matrices = math.prod(x.shape[:batch_dims])
    if matrices > launch.GRID_LIMIT:
        raise NotImplementedError(
            f"a kernel takes {launch.GRID_LIMIT} matrices at most, got {matrices}; use fp4jax.numerics.column_stats"
        )

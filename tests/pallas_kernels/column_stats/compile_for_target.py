"""Compiles `column_stats` for a GPU that is not there: `compile_for_target.py TARGET DTYPE SHAPE`.

Prints the optimized HLO. One process for each program: Mosaic keeps compiled kernels without regard to the target.
"""

import sys

import jax
import jax.numpy as jnp

from pallas_kernels.column_stats import column_stats
from tests.pallas_kernels import targets


def main(target: str, dtype: str, shape: str) -> None:
    device = targets.device(target)
    sharding = jax.sharding.SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct(tuple(map(int, shape.split(","))), jnp.dtype(dtype), sharding=sharding)
    print(jax.jit(lambda x: column_stats(x, 1, device=device)).lower(x).compile().as_text())


if __name__ == "__main__":
    main(*sys.argv[1:])

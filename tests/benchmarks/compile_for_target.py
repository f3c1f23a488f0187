"""Compiles what `benchmarks.kernels` times for a GPU that is not there: `compile_for_target.py TARGET PASSES`.

Prints the optimized HLO of the statistics of four matrices.
"""

import functools
import sys

import jax
import jax.numpy as jnp

from benchmarks import timing
from pallas_kernels.column_stats import column_stats
from tests.pallas_kernels import targets


def main(target: str, passes: str) -> None:
    device = targets.device(target)
    x = jax.ShapeDtypeStruct((4096, 1024), jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(device))
    program = timing.over_all(functools.partial(column_stats, device=device), int(passes))
    print(program.lower([(x,)] * 4).compile().as_text())


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Compiles what `benchmarks.kernels` times for a GPU that is not there: `compile_for_target.py DESCRIPTION PASSES`.

Prints the optimized HLO of the statistics of four matrices.
"""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from benchmarks import timing
from pallas_kernels.column_stats import column_stats


def main(description: str, passes: str) -> None:
    jax.devices()  # registers the plug-ins
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", topology="1x1x1", target_config=Path(description).read_text()
    )
    device = topology.devices[0]
    x = jax.ShapeDtypeStruct((4096, 1024), jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(device))
    program = timing.over_all(functools.partial(column_stats, device=device), int(passes))
    print(program.lower([(x,)] * 4).compile().as_text())


if __name__ == "__main__":
    main(*sys.argv[1:])

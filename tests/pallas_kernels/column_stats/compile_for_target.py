"""Compiles `column_stats` for a GPU that is not there: `compile_for_target.py DESCRIPTION DTYPE SHAPE`.

Prints the optimized HLO. One process for each program: Mosaic keeps compiled kernels without regard to the target.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from pallas_kernels.column_stats import column_stats


def main(description: str, dtype: str, shape: str) -> None:
    jax.devices()  # registers the plug-ins
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", topology="1x1x1", target_config=Path(description).read_text()
    )
    device = topology.devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct(tuple(map(int, shape.split(","))), jnp.dtype(dtype), sharding=sharding)
    print(jax.jit(lambda x: column_stats(x, 1, device=device)).lower(x).compile().as_text())


if __name__ == "__main__":
    main(*sys.argv[1:])

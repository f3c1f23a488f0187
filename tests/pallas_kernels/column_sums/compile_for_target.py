"""Compiles `column_sums` for a GPU that is not there: `compile_for_target.py DESCRIPTION SHAPE`.

One process for each program: Mosaic keeps compiled kernels without regard to the target.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from fp4jax.numerics import NVFP4, QTensor
from pallas_kernels.column_sums import column_sums


def main(description: str, shape: str) -> None:
    jax.devices()  # registers the plug-ins
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", topology="1x1x1", target_config=Path(description).read_text()
    )
    device = topology.devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    batch, rows, columns = map(int, shape.split(","))

    def sums(codes, scales, amax):
        return column_sums(QTensor(codes, scales, amax, NVFP4, -2, ((-2, rows),)), 1, device=device)

    arguments = [
        jax.ShapeDtypeStruct((batch, rows // 2, columns), jnp.uint8, sharding=sharding),
        jax.ShapeDtypeStruct((batch, rows // NVFP4.block, columns), jnp.uint8, sharding=sharding),
        jax.ShapeDtypeStruct((batch, 1, 1), jnp.float32, sharding=sharding),
    ]
    jax.jit(sums).lower(*arguments).compile()


if __name__ == "__main__":
    main(*sys.argv[1:])

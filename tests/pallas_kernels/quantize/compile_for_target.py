"""Compiles `quantize_rows` for a GPU that is not there: `compile_for_target.py DESCRIPTION DTYPE ROUNDING SHAPE`.

Prints the optimized HLO. One process for each program: Mosaic keeps compiled kernels without regard to the target.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from pallas_kernels.quantize import quantize_rows, unsupported_reason


def main(description: str, dtype: str, rounding: str, shape: str) -> None:
    jax.devices()  # registers the plug-ins
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", topology="1x1x1", target_config=Path(description).read_text()
    )
    device = topology.devices[0]
    assert unsupported_reason(device) is None
    sharding = jax.sharding.SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct(tuple(map(int, shape.split(","))), jnp.dtype(dtype), sharding=sharding)
    amax = jax.ShapeDtypeStruct((x.shape[0], *[1] * (len(x.shape) - 1)), jnp.float32, sharding=sharding)
    words = jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=sharding)

    def quantize(x, amax, words):
        words = words if rounding == "stochastic" else None
        return quantize_rows(x, amax=amax * 2, words=words, batch_dims=1, device=device)

    print(jax.jit(quantize).lower(x, amax, words).compile().as_text())


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Compiles `dequant_matmul` for a GPU that is not there: `compile_for_target.py DESCRIPTION GEMM SIZES`.

SIZES: tokens, inputs, outputs. GEMM: fprop, dgrad or wgrad. Prints the optimized HLO. One process for each program:
Mosaic keeps compiled kernels without regard to the target.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from fp4jax.numerics import NVFP4, QTensor
from pallas_kernels.dequant_matmul import dequant_matmul


def main(description: str, gemm: str, shape: str) -> None:
    jax.devices()  # registers the plug-ins
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", topology="1x1x1", target_config=Path(description).read_text()
    )
    device = topology.devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    tokens, inputs, outputs = map(int, shape.split(","))
    x, d, w = (tokens, inputs), (tokens, outputs), (inputs, outputs)
    shapes, axes = {
        "fprop": ((x, w), (-1, -2)),
        "dgrad": ((d, w), (-1, -1)),
        "wgrad": ((x, d), (-2, -2)),
    }[gemm]

    def described(shape, axis):
        parts = []
        for unit in (2, NVFP4.block):
            sizes = list(shape)
            sizes[axis] //= unit
            parts.append(jax.ShapeDtypeStruct(tuple(sizes), jnp.uint8, sharding=sharding))
        amax = jax.ShapeDtypeStruct((1, 1), jnp.float32, sharding=sharding)
        return QTensor(*parts, amax, NVFP4, axis, ((axis, shape[axis]),))

    contracted = tuple((axis,) for axis in axes)
    operands = [described(*each) for each in zip(shapes, axes, strict=True)]
    product = jax.jit(lambda lhs, rhs: dequant_matmul(lhs, rhs, contracted, device=device))
    print(product.lower(*operands).compile().as_text())


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Compiles `column_sums` for a GPU that is not there: `compile_for_target.py TARGET SHAPE`.

One process for each program: Mosaic keeps compiled kernels without regard to the target.
"""

import sys

import jax
import jax.numpy as jnp

from fp4jax.numerics import NVFP4, QTensor
from pallas_kernels.column_sums import column_sums
from tests.pallas_kernels import targets


def main(target: str, shape: str) -> None:
    device = targets.device(target)
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

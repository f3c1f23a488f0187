"""Compiles `dequant_matmul` for a GPU that is not there: `compile_for_target.py TARGET GEMM SIZES [DTYPE]`.

SIZES: tokens, inputs, outputs. GEMM: fprop, dgrad or wgrad. DTYPE: of the result. Prints the optimized HLO. One process
for each program: Mosaic keeps compiled kernels without regard to the target.
"""

import sys

import jax
import jax.numpy as jnp

from fp4jax.numerics import NVFP4, QTensor
from pallas_kernels.dequant_matmul import dequant_matmul
from tests.pallas_kernels import targets


def main(target: str, gemm: str, shape: str, dtype: str = "float32") -> None:
    device = targets.device(target)
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
    product = jax.jit(lambda lhs, rhs: dequant_matmul(lhs, rhs, contracted, 0, dtype, device=device))
    print(product.lower(*operands).compile().as_text())


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Compiles a quantizer for a GPU that is not there: `compile_for_target.py TARGET KERNEL DTYPE SHAPE`.

KERNEL: rows, columns, 2d or copies, then any of stochastic, centered, hadamard, sums, joined by hyphens.

Prints the optimized HLO. One process for each program: Mosaic keeps compiled kernels without regard to the target.
"""

import sys

import jax
import jax.numpy as jnp

from pallas_kernels.quantize import quantize_2d, quantize_columns, quantize_copies, quantize_rows, unsupported_reason
from tests.pallas_kernels import targets


def main(target: str, kernel: str, dtype: str, shape: str) -> None:
    device = targets.device(target)
    assert unsupported_reason(device) is None
    orientation, *variants = kernel.split("-")
    sharding = jax.sharding.SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct(tuple(map(int, shape.split(","))), jnp.dtype(dtype), sharding=sharding)
    units = [1] * (len(x.shape) - 1)
    amax = jax.ShapeDtypeStruct((x.shape[0], *units), jnp.float32, sharding=sharding)
    center = jax.ShapeDtypeStruct((x.shape[0], *units[1:], x.shape[-1]), jnp.float32, sharding=sharding)
    words = jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=sharding)

    def both(x, amax, center, words):
        drawn = (words, words + 1) if "stochastic" in variants else (None, None)
        given = {"center": center} if "centered" in variants else {}
        given |= {name: name in variants for name in ("hadamard", "sums")}
        return quantize_copies(x, amax=(amax, amax * 2), words=drawn, batch_dims=1, device=device, **given)

    def quantize(x, amax, center, words):
        arguments = {"amax": amax * 2, "batch_dims": 1, "device": device}
        if "stochastic" in variants:
            arguments["words"] = words
        if orientation == "2d":
            return quantize_2d(x, **arguments)
        if "centered" in variants:
            arguments["center"] = center
        if orientation == "rows":
            return quantize_rows(x, **arguments)
        return quantize_columns(x, hadamard="hadamard" in variants, **arguments)

    if orientation == "copies":
        quantize = both

    print(jax.jit(quantize).lower(x, amax, center, words).compile().as_text())


if __name__ == "__main__":
    main(*sys.argv[1:])

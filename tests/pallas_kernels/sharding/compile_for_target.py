"""Compiles a linear layer, quantized by the kernels, for 8 GPUs that are not there: `compile_for_target.py TARGET CUT`.

CUT: how X [16, 4096, 1024], W [1024, 3072] and the gradient lie on a mesh of data 4 x tensor 2. Prints the optimized
HLO. One process for each program: Mosaic keeps compiled kernels without regard to the target.
"""

import sys

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fp4jax import dot_general
from fp4jax.plan import targets

BOTH = ("data", "tensor")
CUTS = {
    "batch": (P(BOTH), P(BOTH), P(BOTH)),  # as fsdp cuts: W is gathered, in codes
    "column-parallel": (P("data"), P(None, "tensor"), P("data", None, "tensor")),
    "row-parallel": (P("data", None, "tensor"), P("tensor"), P("data")),
    "sequence": (P("data", "tensor"), P(), P("data", "tensor")),
}
SHAPES = ((16, 4096, 1024), (1024, 3072), (16, 4096, 3072))


def main(target: str, cut: str) -> None:
    devices = targets.parse(target).devices()
    mesh = jax.make_mesh((4, 2), BOTH, axis_types=(AxisType.Auto,) * 2, devices=devices)
    operands = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(SHAPES, CUTS[cut], strict=True)
    ]

    def layer(x, w, g):
        def dot(x, w):
            key = jax.random.key(0)
            return dot_general(x, w, (((2,), (0,)), ((), ())), recipe="averis", key=key, backend="pallas")

        y, pull = jax.vjp(dot, x, w)
        return y, *pull(g)

    results = tuple(NamedSharding(mesh, spec) for spec in (CUTS[cut][2], *CUTS[cut][:2]))
    with jax.set_mesh(mesh):
        print(jax.jit(layer, out_shardings=results).lower(*operands).compile().as_text())


if __name__ == "__main__":
    main(*sys.argv[1:])

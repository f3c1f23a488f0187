"""The Mosaic GPU kernel: decodes tiles of two packed operands into shared memory and multiplies them from there.

A thread block of two warpgroups makes a tile of the result, half of its rows each. In a step both decode their part of
the next 128 elements along the contraction, for both operands, into one of two slots of shared memory, while the tensor
cores still multiply what the step before has put into the other. At the barrier all of it is written and the other slot
has been read to its end, so two slots are enough. What a step decodes was read from device memory in the step before:
each operand's next codes are asked for as soon as its current ones are used up, into the same registers.

A last tile that would reach beyond the result starts earlier instead, and repeats what its neighbour writes.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Shaped, UInt8

from pallas_kernels import compat, launch
from pallas_kernels.dequant_matmul import decode
from pallas_kernels.dequant_matmul.decode import Side

MIN_ROWS = 128
"""Of either operand: a tile."""

_WIDE = 256  # columns of a tile where there are so many: a tile of the left operand is decoded for each tile across
_SLOTS = 2
_SWIZZLE = 128  # bytes
_TRANSFORMS = (plgpu.TilingTransform((8, _SWIZZLE // 2)), plgpu.SwizzleTransform(_SWIZZLE))
Parts = tuple[UInt8[Array, "batch ..."], Shaped[Array, "batch ..."]]
"""Codes and scales of an operand, as `decode` describes them."""


# Lowered once for many calls; `fp4jax.report` knows it by its name.
@functools.partial(jax.jit, static_argnames=("lhs_columns", "rhs_columns", "dtype", "interpret"))
def fp4jax_dequant_matmul(
    scale: Float32[Array, " batch"],
    lhs: Parts,
    rhs: Parts,
    *,
    lhs_columns: bool,
    rhs_columns: bool,
    dtype: jnp.dtype,
    interpret: bool,
) -> Float[Array, "batch m n"]:
    """The product of elements × block scales, times `scale`, rounded to `dtype`.

    Args:
      lhs, rhs: of m and n rows, `MIN_ROWS` or more (n a multiple of 2), in whole tiles along the contraction.
      lhs_columns, rhs_columns: the contraction runs down the columns of that operand.
      interpret: run in the GPU interpreter, on any machine.
    """
    (batch, *left_sizes), (_, *right_sizes) = lhs[0].shape, rhs[0].shape
    m, n = left_sizes[lhs_columns], right_sizes[rhs_columns]
    left = Side(lhs_columns, MIN_ROWS, interpret)
    right = Side(rhs_columns, _WIDE if n >= _WIDE else MIN_ROWS, interpret)
    grid = {"batch": batch, "m": pl.cdiv(m, left.extent), "n": pl.cdiv(n, right.extent)}
    launch.check_grid(grid, "dequant_matmul")
    return plgpu.kernel(
        functools.partial(_kernel, left=left, right=right, steps=left_sizes[not lhs_columns] // decode.BYTES),
        out_type=jax.ShapeDtypeStruct((batch, m, n), dtype),
        scratch_types=(
            plgpu.SMEM((_SLOTS, *left.shape), jnp.float16, transforms=_TRANSFORMS),
            plgpu.SMEM((_SLOTS, *right.shape), jnp.float16, transforms=_TRANSFORMS),
            plgpu.Barrier(num_arrivals=decode.WARPGROUPS),
        ),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=decode.WARPGROUPS,
        thread_name="warpgroup",
        # Those of `commit_smem` and `decoded` are all that is needed.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        kernel_name="dequant_matmul",
    )(scale, *lhs, *rhs)


def _kernel(scale_ref, *refs, left: Side, right: Side, steps: int):
    left_refs, right_refs, (out_ref, left_tiles, right_tiles, decoded) = refs[:2], refs[2:4], refs[4:]
    batch, warpgroup = lax.axis_index("batch"), lax.axis_index("warpgroup")
    _, m, n = out_ref.shape
    row = jnp.minimum(lax.axis_index("m") * left.extent, m - left.extent)
    column = jnp.minimum(lax.axis_index("n") * right.extent, n - right.extent)
    load_left = functools.partial(left.load, *left_refs, batch, row, warpgroup)
    load_right = functools.partial(right.load, *right_refs, batch, column, warpgroup)
    mine = left.extent // decode.WARPGROUPS
    rows = pl.ds(pl.multiple_of(warpgroup * mine, mine), mine)

    def accumulate(total_ref):
        def step(i, loaded):
            of_left, of_right = loaded
            slot, following = lax.rem(i, _SLOTS), jnp.minimum(i + 1, steps - 1)
            left.decode(of_left, left_tiles.at[slot], warpgroup)
            of_left = load_left(following)
            right.decode(of_right, right_tiles.at[slot], warpgroup)
            of_right = load_right(following)
            plgpu.commit_smem()
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(decoded)
            plgpu.barrier_wait(decoded)
            for half in range(2):
                a, b = left_tiles.at[slot, half], right_tiles.at[slot, half]
                a = a.at[:, rows].transpose((1, 0)) if left.columns else a.at[rows]
                plgpu.wgmma(total_ref, a, b if right.columns else b.transpose((1, 0)))
            return of_left, of_right

        lax.fori_loop(0, steps, step, (load_left(0), load_right(0)))
        return total_ref[...]

    total = pl.run_scoped(accumulate, plgpu.ACC((mine, right.extent), jnp.float32))
    out = out_ref.at[batch, pl.ds(row + warpgroup * mine, mine), pl.ds(column, right.extent)]
    total = total * (scale_ref[batch] * decode.UNIT_PRODUCT)
    compat.store(out, total.astype(out_ref.dtype), plgpu.Layout.WGMMA)

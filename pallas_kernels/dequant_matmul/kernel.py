"""The Mosaic GPU kernel: decodes two packed operands tile by tile into shared memory, and multiplies them from there."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float32, Shaped, UInt8

from pallas_kernels import compat
from pallas_kernels.dequant_matmul import decode
from pallas_kernels.dequant_matmul.decode import Side

TILE_M = 128
MIN_ROWS = 128
"""Of either operand: a tile."""

_SLOTS = 2
_SWIZZLE = 128
_TRANSFORMS = (plgpu.TilingTransform((8, _SWIZZLE // 2)), plgpu.SwizzleTransform(_SWIZZLE))



def tile_n(n: int) -> int:
    """Columns of a tile: what is decoded of the left operand is decoded once for each tile across."""
    return 256 if n >= 256 else 128


@functools.partial(jax.jit, static_argnames=("lhs_columns", "rhs_columns", "interpret"))  # lowered once for many calls
def product(
    scale: Float32[Array, " batch"],
    lhs: tuple[UInt8[Array, "batch ..."], Shaped[Array, "batch ..."]],
    rhs: tuple[UInt8[Array, "batch ..."], Shaped[Array, "batch ..."]],
    *,
    lhs_columns: bool,
    rhs_columns: bool,
    interpret: bool,
) -> Float32[Array, "batch m n"]:
    (batch, *lhs_axes), (_, *rhs_axes) = lhs[0].shape, rhs[0].shape
    m, n = lhs_axes[lhs_columns], rhs_axes[rhs_columns]
    depth = 2 * lhs_axes[not lhs_columns]
    left, right = Side(lhs_columns, TILE_M), Side(rhs_columns, tile_n(n))
    run = plgpu.kernel(
        functools.partial(_kernel, left=left, right=right, steps=depth // decode.DEPTH),
        out_type=jax.ShapeDtypeStruct((batch, m, n), jnp.float32),
        scratch_types=dict(
            left_tiles=plgpu.SMEM((_SLOTS, *left.shape), jnp.float16, transforms=_TRANSFORMS),
            right_tiles=plgpu.SMEM((_SLOTS, *right.shape), jnp.float16, transforms=_TRANSFORMS),
            decoded=plgpu.Barrier(num_arrivals=decode.WARPGROUPS),
        ),
        grid=(batch, pl.cdiv(m, left.extent), pl.cdiv(n, right.extent)),
        grid_names=("batch", "m", "n"),
        num_threads=decode.WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        kernel_name="dequant_matmul",
    )
    return run(scale, *lhs, *rhs)


def _kernel(
    scale_ref, left_codes, left_scales, right_codes, right_scales, out_ref, left_tiles, right_tiles, decoded,
    *, left: Side, right: Side, steps: int,
):
    batch, warpgroup = lax.axis_index("batch"), lax.axis_index("warpgroup")
    _, m, n = out_ref.shape
    row = jnp.minimum(lax.axis_index("m") * left.extent, m - left.extent)
    column = jnp.minimum(lax.axis_index("n") * right.extent, n - right.extent)

    def load_left(step):
        return left.load(left_codes, left_scales, batch, row, step, warpgroup)

    def load_right(step):
        return right.load(right_codes, right_scales, batch, column, step, warpgroup)

    mine = left.extent // decode.WARPGROUPS
    rows = pl.ds(pl.multiple_of(warpgroup * mine, mine), mine)

    def accumulate(total_ref):
        def step(i, loaded):
            slot = lax.rem(i, _SLOTS)
            following = jnp.minimum(i + 1, steps - 1)
            left.decode(loaded[0], left_tiles.at[slot], warpgroup)
            next_left = load_left(following)
            right.decode(loaded[1], right_tiles.at[slot], warpgroup)
            next_right = load_right(following)
            plgpu.commit_smem()
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(decoded)
            plgpu.barrier_wait(decoded)
            for half in range(2):
                a = left_tiles.at[slot, half]
                a = a.at[:, rows].transpose((1, 0)) if left.columns else a.at[rows]
                b = right_tiles.at[slot, half]
                plgpu.wgmma(total_ref, a, b if right.columns else b.transpose((1, 0)))
            return next_left, next_right

        lax.fori_loop(0, steps, step, (load_left(0), load_right(0)))
        return total_ref[...]

    total = pl.run_scoped(accumulate, plgpu.ACC((mine, right.extent), jnp.float32))
    out = out_ref.at[batch, pl.ds(row + warpgroup * mine, mine), pl.ds(column, right.extent)]
    compat.store(out, total * (scale_ref[batch] * decode.UNIT_PRODUCT), plgpu.Layout.WGMMA)

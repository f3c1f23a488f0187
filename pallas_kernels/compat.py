"""What differs between JAX releases in Pallas Mosaic GPU, and register layouts that every kernel uses."""

import functools
from typing import Protocol

import jax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu


class Device(Protocol):
    """What kernels ask of a device: a `jax.Device`, or the description of one that is not here."""

    platform: str
    device_kind: str
    compute_capability: str


CAN_INTERPRET = hasattr(plgpu, "store")
"""Whether the GPU interpreter runs these kernels: from JAX 0.12 on."""


@functools.cache
def tiled_layout(tiles: tuple[tuple[int, ...], ...], warps: tuple[int, ...], lanes: tuple[int, ...], vector: int):
    """A layout in registers: `tiles` split the last axes in turn; `warps`, `lanes` and `vector` are axes after that."""
    layout = mgpu.TiledLayout(plgpu.Tiling(tiles), warps, lanes, vector, _check_canonical=False).canonicalize()
    return plgpu.Layout.TILED(
        layout.tiling, warp_dims=layout.warp_dims, lane_dims=layout.lane_dims, vector_dim=layout.vector_dim
    )


def load(ref, layout) -> jax.Array:
    """Reads from device memory in `layout`, by as wide accesses as it allows."""
    return plgpu.load(ref, layout=layout, optimized=False)


def store(ref, value: jax.Array, layout) -> None:
    """Writes to device memory, however narrow the accesses that `layout` gives; it must be the layout of `value`."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
        return

    # JAX 0.11 has no such store: what its own would do is written in the dialect.
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout))
    def write(_, memory, fragment):
        fragment.store_untiled(memory, optimized=False)

    write(ref, value)


def not_interpreted() -> str | None:
    """Why the GPU interpreter cannot run the kernels, or None where it can."""
    return None if CAN_INTERPRET else f"the GPU interpreter needs JAX 0.12.0 or newer, this is {jax.__version__}"

"""Launching kernels whose lanes read device memory and write other device memory, and share nothing on the way."""

from collections.abc import Callable, Mapping
from typing import Any

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

MIN_THREAD_BLOCKS = 1024
"""Enough to fill a GPU."""
MOST_STEPS = 8
GRID_LIMIT = 65535
"""Of all axes of a CUDA grid but its first, which is the last of Pallas'."""
_LAST_LIMIT = 2**31 - 1


def steps_each(steps: int, along: int, most: int | None = None) -> int:
    """Of so many steps in all, those of one thread block: more amortize its start, fewer leave enough of them.

    Args:
      along: how many of the steps lie along the axis of the grid that is divided by the result, to fit its limit.
      most: at most, unless the grid needs more; default: `MOST_STEPS`.
    """
    wanted = min(steps // MIN_THREAD_BLOCKS, MOST_STEPS if most is None else most)
    return max(1, wanted, pl.cdiv(along, GRID_LIMIT))


def check_grid(grid: Mapping[str, int], name: str) -> None:
    """Raises NotImplementedError for a grid that CUDA does not launch; it names the kernel's axis and its size."""
    *_, last = grid
    for axis, size in grid.items():
        limit = _LAST_LIMIT if axis == last else GRID_LIMIT
        if size > limit:
            raise NotImplementedError(
                f"{name}: a CUDA grid has {limit} thread blocks along {axis!r} at most, this array needs {size}; leave "
                "it to XLA"
            )


def kernel(body: Callable[..., None], out_type: Any, grid: Mapping[str, int], name: str, interpret: bool) -> Callable:
    """A function of arrays that runs `body` in a warpgroup for each point of the grid.

    Args:
      body: (references to the arrays, references to the results) → None.
      out_type: of the results.
      grid: name of an axis → its size.
      name: of the kernel in programs and profiles.
      interpret: run in the GPU interpreter, on any machine.

    Raises:
      NotImplementedError: the grid is larger than CUDA's.
    """
    check_grid(grid, name)
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        # No memory is both read and written, so the barriers around every load and store would only cost time.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        kernel_name=name,
    )

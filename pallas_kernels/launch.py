"""Launching kernels whose lanes read device memory and write other device memory, and share nothing on the way."""

from collections.abc import Callable, Mapping
from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu

MIN_THREAD_BLOCKS = 1024
"""Enough to fill a GPU."""
MOST_STEPS = 8


def steps_each(steps: int, most: int | None = None) -> int:
    """Of so many steps in all, those of one thread block: more amortize its start, fewer leave enough of them.

    Args:
      most: at most; default: `MOST_STEPS`.
    """
    return max(1, min(steps // MIN_THREAD_BLOCKS, MOST_STEPS if most is None else most))


def kernel(body: Callable[..., None], out_type: Any, grid: Mapping[str, int], name: str, interpret: bool) -> Callable:
    """A function of arrays that runs `body` in a warpgroup for each point of the grid.

    Args:
      body: (references to the arrays, references to the results) → None.
      out_type: of the results.
      grid: name of an axis → its size.
      name: of the kernel in programs and profiles.
      interpret: run in the GPU interpreter, on any machine.
    """
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

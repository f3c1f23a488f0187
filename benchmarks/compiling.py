"""Programs traced one after the other and compiled side by side, which is most of a short run's time on a GPU."""

import os
from collections.abc import Hashable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import jax


def side_by_side[Key: Hashable](programs: Mapping[Key, tuple[jax.stages.Wrapped, tuple]]) -> dict[Key, Future]:
    """Key → the compiled program, for a jitted function and its abstract arguments; all are ready on return.

    What one program raises, traced or compiled, `result()` of its own future raises: the others can still be measured.
    """
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        return {key: _submitted(pool, jitted, arguments) for key, (jitted, arguments) in programs.items()}


def _submitted(pool: ThreadPoolExecutor, jitted: jax.stages.Wrapped, arguments: tuple) -> Future:
    try:
        return pool.submit(jitted.lower(*arguments).compile)
    except Exception as error:
        failed: Future = Future()
        failed.set_exception(error)
        return failed

"""How programs are timed: several in turns, many calls to a launch, on inputs that together exceed every cache."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import jax
from jax import lax

WORKING_SET = 256 * 2**20
"""Bytes of input that a program goes through before it meets the same input again: several times any cache."""

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""Seconds that pass, or those that this process spends on a CPU, which other processes hardly lengthen."""

_MAX_INPUTS = 32
_MAX_CALLS = 64
_MIN_BYTES = 2 * 2**30  # read in one launch, which a GPU does in half a millisecond at least


def input_count(bytes_each: int) -> int:
    """How many inputs of this size exceed the cache; at least 2, or a program would be timed on what it just read."""
    return max(2, min(_MAX_INPUTS, -(-WORKING_SET // bytes_each)))


def pass_count(inputs: int, bytes_each: int) -> int:
    """How often one launch goes through all inputs, so that its start is not what is timed. Never 2: see `over_all`.

    On a CPU a start takes no time to speak of.
    """
    if jax.default_backend() == "cpu":
        return 1
    wanted = min(-(-_MIN_BYTES // (inputs * bytes_each)), _MAX_CALLS // inputs)
    return 1 if wanted < 2 else max(3, wanted)


def over_all(program: Callable, passes: int) -> Callable:
    """One jitted program: `program` of every input, `passes` times, returning the last outputs.

    The passes are a loop that carries the outputs, and a barrier ties the inputs of each to the outputs of the one
    before: XLA for GPUs then neither moves a call out of the loop nor drops one as a repetition. It opens a loop of one
    iteration and drops what is in it, and XLA:CPU looks through barriers.

    Raises:
      ValueError: two passes.
    """
    if passes == 2:
        raise ValueError("two passes: the compiler would drop the second as a repetition; take 1, or 3 or more")

    once = jax.jit(program)  # lowered once, however many inputs there are

    def one_pass(inputs: Sequence) -> list:
        return [once(*each) for each in inputs]

    def run(inputs: Sequence) -> list:
        def again(_, outputs):
            after, _ = lax.optimization_barrier((inputs, outputs))
            return one_pass(after)

        outputs = one_pass(inputs)
        return outputs if passes == 1 else lax.fori_loop(0, passes - 1, again, outputs)

    return jax.jit(run)


def in_turns(
    runs: Mapping[str, Callable[[], object]],
    repeats: int,
    launches: int = 1,
    after_turn: Callable[[dict[str, list[float]]], None] = lambda seconds: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of one launch of each program, `repeats` times; every turn runs all, each time another one first.

    `launches` are sent off one after the other and awaited together, so that the device never waits for Python. The
    first turn warms up and does not count. `after_turn` is given the seconds so far. `clock`: one of CLOCKS' values.
    """
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats + 1):
        first = repeat % len(names)
        for name in [*names[first:], *names[:first]]:
            start = clock()
            for _ in range(launches):
                result = runs[name]()
            jax.block_until_ready(result)
            del result
            if repeat:
                seconds[name].append((clock() - start) / launches)
        if repeat:
            after_turn(seconds)
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of each program."""
    return {name: statistics.median(times) for name, times in seconds.items()}

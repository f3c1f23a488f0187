"""Where a run's time goes: waiting for input, writing checkpoints, and steps that take far longer than the others."""

import collections
import contextlib
import statistics
import time
from collections.abc import Iterator

WINDOW = 50
"""Steps that the median is taken over."""

LEAST = 5
"""Steps before one can be called slow."""


class TimeAccount:
    """Seconds by what they were spent on, since the last `take`, and slow steps since the start.

    Waiting for input is the time in which the loop stood still for a batch. The device may have been at work in it, so
    it is an upper bound of what more reading ahead could save.
    """

    def __init__(self, slow_step: float):
        self._slow_step = slow_step
        self._steps = collections.deque(maxlen=WINDOW)
        self._slow = 0
        self._longest = 0.0
        self._spent: collections.Counter[str] = collections.Counter()
        self._since = self._step_start = time.perf_counter()
        self._aside = 0.0

    @contextlib.contextmanager
    def spent_on(self, what: str, within_step: bool = False) -> Iterator[None]:
        """Counts the block's time under `what`; unless it is `within_step`, no step is called slow for it."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self._spent[what] += seconds
            if not within_step:
                self._aside += seconds

    def step_done(self) -> float | None:
        """Called when a step's result has arrived; returns its seconds if it was slow, None if not."""
        now = time.perf_counter()
        seconds, self._step_start, self._aside = now - self._step_start - self._aside, now, 0.0
        slow = len(self._steps) >= LEAST and seconds > self._slow_step * statistics.median(self._steps)
        self._steps.append(seconds)
        self._longest = max(self._longest, seconds)
        self._slow += slow
        return seconds if slow else None

    def take(self) -> dict[str, float]:
        """The metrics since the last call: shares of the time, seconds, and the count of slow steps so far."""
        now = time.perf_counter()
        metrics = {
            "data_wait": self._spent["data"] / max(now - self._since, 1e-9),
            "checkpoint_seconds": self._spent["checkpoint"],
            "longest_step_seconds": self._longest,
            "slow_steps": float(self._slow),
        }
        self._since, self._longest = now, 0.0
        self._spent.clear()
        return metrics

"""A run that hangs ends itself: in a collective that another process never enters, a driver, a dead file system."""

import os
import sys
import threading
import time
from types import FrameType

HANGING = 124
"""Exit code of a run that hung, that of the `timeout` command."""


class Watchdog:
    """Ends the process when no `beat` comes for `timeout` seconds (0: never); a context manager.

    Its thread needs nothing of the main one, which may be waiting inside XLA.
    """

    def __init__(self, timeout: float):
        self._timeout = timeout
        self._beat = time.monotonic()
        self._doing = "starting"
        self._stopped = threading.Event()
        self._main = threading.get_ident()

    def beat(self, doing: str) -> None:
        """Something was done, and now `doing` begins."""
        self._beat, self._doing = time.monotonic(), doing

    def __enter__(self) -> "Watchdog":
        if self._timeout:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        self.beat(self._doing)
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(min(self._timeout / 4, 5)):
            silent = time.monotonic() - self._beat
            if silent > self._timeout:
                where = _innermost(sys._current_frames().get(self._main))
                print(
                    f"error: hanging: nothing done for {silent:.0f} s (watchdog.timeout={self._timeout:g}) in "
                    f"{self._doing}{where}; ended. Rerun the same command to go on from the last checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(HANGING)


def _innermost(frame: FrameType | None) -> str:
    """Our own innermost line of a stack, and the function it waits for."""
    if frame is None:
        return ""
    waiting_in = frame.f_code.co_name
    while frame and f"{os.sep}fp4jax{os.sep}" not in frame.f_code.co_filename:
        frame = frame.f_back
    return f", at {os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} ({waiting_in})" if frame else ""

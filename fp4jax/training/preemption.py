"""SIGTERM and SIGINT: the first asks for a stop at the next step boundary, the second ends the process at once.

Python runs a signal's handler only between two of its own instructions, and the main thread may wait inside XLA for
minutes, or for ever. So a thread reads the signals from the pipe that the interpreter's C code writes them to.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

SIGNALS = (signal.SIGTERM, signal.SIGINT)

SAME_REQUEST_SECONDS = 0.5
"""A batch system signals all processes of a job, and a parent among them passes its signal on: both are one request."""


class Preempted(Exception):
    """A run that was asked to stop, did, and is saved; `exit_code` is 128 + the signal, as shells have it."""

    def __init__(self, signum: int, step: int):
        name = signal.Signals(signum).name
        super().__init__(f"stopped by {name}: step {step:,} is saved; rerun the same command to go on")
        self.exit_code = 128 + signum


class StopRequest:
    """Whether the process was asked to stop; `signum` is the signal that did, None without one."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._since = 0.0

    def received(self, signum: int) -> None:
        """The first one is remembered, the second ends the process: checkpoints are renamed into place when whole."""
        name = signal.Signals(signum).name
        if self.signum is not None and time.monotonic() - self._since < SAME_REQUEST_SECONDS:
            return
        if self.signum is not None:
            print(f"second signal ({name}): ended at once, without a save", file=sys.stderr, flush=True)
            os._exit(128 + signum)
        self.signum, self._since = signum, time.monotonic()
        print(f"{name}: saving after this step; a second signal ends the run at once", file=sys.stderr, flush=True)


@contextlib.contextmanager
def listening(processes: int = 1) -> Iterator[StopRequest]:
    """Listens for SIGNALS in the block; afterwards they do what they did before.

    Signals reach the main thread alone: in another one nothing is listened for. Neither is it in a run of several
    `processes`, which would have to agree on the step: one that stops alone leaves the others in a collective.
    """
    request = StopRequest()
    if processes > 1 or threading.current_thread() is not threading.main_thread():
        yield request
        return
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    thread = threading.Thread(target=_listen, args=(read_end, request), name="signals", daemon=True)
    # A handler has to be set, or the signal would do its default; what is to be done is done by the thread.
    former = {signum: signal.signal(signum, lambda *_: None) for signum in SIGNALS}
    former_descriptor = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    thread.start()
    try:
        yield request
    finally:
        signal.set_wakeup_fd(former_descriptor)
        for signum, handler in former.items():
            signal.signal(signum, handler)
        os.close(write_end)
        thread.join()
        os.close(read_end)


def _listen(descriptor: int, request: StopRequest) -> None:
    while signals := os.read(descriptor, 16):
        for signum in signals:
            if signum in SIGNALS:
                request.received(signum)

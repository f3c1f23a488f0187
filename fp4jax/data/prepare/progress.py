"""What a person sees meanwhile: a bar on a terminal, a line now and then elsewhere."""

import multiprocessing
import time
from multiprocessing.sharedctypes import SynchronizedArray

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

LINE_SECONDS = 10.0


class Counters:
    """Documents, tokens and bytes of text of this run, counted by all processes."""

    def __init__(self, values: SynchronizedArray | None = None):
        self.values = multiprocessing.get_context("spawn").Array("q", 3) if values is None else values

    def add(self, documents: int, tokens: int, text_bytes: int) -> None:
        """Adds to the counts."""
        with self.values.get_lock():
            for index, more in enumerate((documents, tokens, text_bytes)):
                self.values[index] += more

    def read(self) -> tuple[int, int, int]:
        """The counts."""
        with self.values.get_lock():
            return tuple(self.values)


class Bar:
    """A context manager that shows how far the units are."""

    def __init__(self, console: Console, counters: Counters, units: int, done: int):
        self._console, self._counters = console, counters
        self._units, self._done = units, done
        self._started = self._shown = time.monotonic()
        columns = (BarColumn(), TextColumn("{task.fields[status]}"), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task("", total=units, completed=done, status="")

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def unit_done(self) -> None:
        """Moves the bar by one unit."""
        self._done += 1
        self.show()

    def show(self) -> None:
        """Brings the numbers up to date."""
        self._progress.update(self._task, completed=self._done, status=self._status())
        now = time.monotonic()
        if not self._console.is_terminal and now - self._shown >= LINE_SECONDS:
            self._shown = now
            self._console.print(self._status())

    def _status(self) -> str:
        documents, tokens, text_bytes = self._counters.read()
        seconds = max(time.monotonic() - self._started, 1e-3)
        return (
            f"{self._done:,} of {self._units:,} inputs, {documents:,} documents, {tokens:,} tokens, "
            f"{tokens / seconds:,.0f} tokens/s, {text_bytes / seconds / 1e6:.1f} MB/s"
        )

"""Gives damaged files to a reader: it reads them, or raises its one error in one line. Nothing else comes out."""

import contextlib
import pathlib
import signal
from collections.abc import Iterator, Sequence

from tests.fuzz.damage import Change, damaged
from tests.fuzz.readers import Reader

TIME_LIMIT = 60
"""Seconds after which a reader hangs."""


class Hanging(BaseException):
    """A reader did not come back; no `except Exception` hides it."""


class Stage:
    """A folder with a reader's whole files, to which every damaged one is put back."""

    def __init__(self, reader: Reader, folder: pathlib.Path):
        self._reader, self._folder = reader, folder
        reader.write(folder)
        self.files = sorted(path for path in folder.glob(reader.files) if path.is_file())
        self._whole = [path.read_bytes() for path in self.files]
        reader.read(folder)

    def read_damaged(self, number: int, changes: Sequence[Change]) -> str:
        """Reads with one file damaged; returns what the reader's error says, "" without one.

        Raises:
          AssertionError: an error of several lines, or one that does not name what is damaged.
          Exception: whatever else comes out of the reader.
        """
        path, whole = self.files[number % len(self.files)], self._whole[number % len(self.files)]
        path.write_bytes(damaged(whole, changes))
        try:
            with _limited():
                self._reader.read(self._folder)
        except self._reader.error as error:
            message = str(error)
            assert message and "\n" not in message, message
            assert not self._reader.names_file or path.name in message, message
            return message
        finally:
            path.write_bytes(whole)
        return ""


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hanging(f"no answer in {TIME_LIMIT} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(TIME_LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)

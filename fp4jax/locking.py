"""One process at work in a folder: a lock that the kernel releases with the process that holds it, however it ends."""

import contextlib
import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class InUseError(ValueError):
    """Another process is at work there; one line."""


@contextlib.contextmanager
def locked(path: Path, holder_does: str | None = None) -> Iterator[None]:
    """Holds the lock of the file `path` in the block. The file stays: removing it would let two in at a time.

    Args:
      path: of the lock file, which is made if it is missing.
      holder_does: what is said after "process 12 on host" if that one holds it; None waits until it is free.

    Raises:
      InUseError: another process holds it.
      OSError: the file cannot be made. A file system without locks is named on stderr, and nothing is locked.
    """
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if holder_does else 0))
        except BlockingIOError:
            file.seek(0)
            raise InUseError(f"{file.read() or 'another process'} {holder_does}") from None
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise
            print(f"warning: {path} cannot be locked ({error.strerror}): run one process at a time", file=sys.stderr)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield

"""Files that a run appends to. A disk that is full for a while costs none of their records.

What cannot be written waits in memory, and what was written of it by then is taken back: a line that a later one
follows on the same line could not be read.
"""

import json
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar

from fp4jax.data.json_files import parse_json, read_objects


class AppendedFile:
    """Takes records; the file and its folder appear with the first `flush`."""

    def __init__(self, path: Path):
        self.path = path
        self._pending: list[bytes] = []
        self._torn_at: int | None = None

    def flush(self) -> None:
        """Hands all records that wait to the system.

        Raises:
          OSError: it did not take them all; they wait for the next call.
        """
        if not self._pending:
            return
        self.path.parent.mkdir(exist_ok=True)
        self._take_back()
        # Unbuffered: a buffer would write its rest when it is closed, behind what is taken back.
        with self.path.open("ab", buffering=0) as file:
            self._torn_at = file.seek(0, os.SEEK_END)
            rest = memoryview(b"".join(self._pending))
            while rest:
                rest = rest[file.write(rest) :]
        self._torn_at = None
        self._pending.clear()

    def close(self) -> None:
        """Flushes; records that are lost are a warning on stderr.

        No error: how the run ended, with a signal for one, is what its exit code has to tell.
        """
        try:
            self.flush()
        except OSError as error:
            print(f"warning: {self.path}: {len(self._pending)} records are lost ({error.strerror})", file=sys.stderr)

    def _take_back(self) -> None:
        if self._torn_at is not None and self.path.exists() and self.path.stat().st_size > self._torn_at:
            os.truncate(self.path, self._torn_at)
        self._torn_at = None


class JsonLog(AppendedFile):
    """A file of JSON lines. `fields` are those that every line has, with their types."""

    def __init__(self, path: Path, fields: Mapping[str, Any]):
        super().__init__(path)
        self._fields = fields

    def add(self, value: Mapping[str, Any]) -> None:
        """Takes a line; `flush` writes it."""
        self._pending.append(json.dumps(value).encode() + b"\n")

    def keep(self, wanted: Callable[[dict], bool]) -> list[dict]:
        """Drops the other lines, and one that is unfinished; returns those in the file that stay.

        Raises:
          ValueError: a line is damaged; names it.
          OSError: the file cannot be changed. Where the lines to drop are the last ones this takes no space.
        """
        self._take_back()
        self._pending = [line for line in self._pending if wanted(parse_json(line))]
        values = read_objects(self.path, self._fields)
        kept = [value for value in values if wanted(value)]
        if not self.path.exists():
            return kept
        if kept == values[: len(kept)]:
            lines = self.path.read_bytes().split(b"\n")
            os.truncate(self.path, sum(len(line) + 1 for line in lines[: len(kept)]))
        else:
            replacement = self.path.with_suffix(".jsonl.tmp")
            replacement.write_text("".join(json.dumps(value) + "\n" for value in kept), encoding="utf-8")
            os.replace(replacement, self.path)
        return kept


class TensorBoardFile(AppendedFile):
    """An event file of TensorBoard with scalars.

    tensorboardX makes its records, but does not write them: the thread of its own writer ends at the first write that
    fails, and whoever logs afterwards waits for it for ever.
    """

    def __init__(self, folder: Path):
        # TensorBoard reads a folder's files in the order of their names.
        super().__init__(folder / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}")
        self._add(Event(file_version="brain.Event:2"))

    def forget_from(self, step: int) -> None:
        """TensorBoard shows nothing of `step` and later ones, in this file and in those before it, but what follows."""
        self._add(Event(step=step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, name: str, value: float | int, step: int) -> None:
        """Takes a point of the curve `name`; `flush` writes it."""
        self._add(Event(step=step, summary=scalar(name, value)))

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        checksums = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
        self._pending.append(length + next(checksums) + data + next(checksums))

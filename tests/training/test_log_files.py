"""A disk that is full for a while: no record is lost or damaged, and nothing waits for the disk."""

import json
import signal
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from fp4jax.data.json_files import read_objects
from fp4jax.training.log_files import JsonLog, TensorBoardFile
from fp4jax.training.metrics import FILE, MetricsWriter, read_metrics
from fp4jax.training.preemption import Preempted
from tests.test_checkpoint import full_disk

FIELDS = {"step": int}
LONG = "x" * 30_000


def events_in(folder):
    """The events in a folder's one file, whose checksums are right."""
    (path,) = folder.iterdir()
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack_from("<Q", data)
        header, body = data[:8], data[12 : 12 + length]
        checksums = data[8:12] + data[12 + length : 16 + length]
        assert struct.unpack("<II", checksums) == (masked_crc32c(header), masked_crc32c(body))
        found.append(Event.FromString(body))
        data = data[16 + length :]
    return found


def fill(log, steps):
    for step in steps:
        log.add({"step": step, "text": LONG})
        log.flush()


def steps_in(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_what_a_full_disk_does_not_take_is_written_later(tmp_path):
    path = tmp_path / "log.jsonl"
    log = JsonLog(path, FIELDS)
    with full_disk():
        fill(log, range(3))
        for step in (3, 4):
            with pytest.raises(OSError, match="File too large"):
                fill(log, [step])
            assert path.stat().st_size == 100_000
            assert [line["step"] for line in read_objects(path, FIELDS)] == [0, 1, 2]
    fill(log, [5])
    assert steps_in(path) == [0, 1, 2, 3, 4, 5]


def test_a_run_that_resumes_reads_what_one_left_on_a_full_disk(tmp_path):
    path = tmp_path / "log.jsonl"
    with full_disk():
        with pytest.raises(OSError, match="File too large"):
            fill(JsonLog(path, FIELDS), range(9))
        assert path.stat().st_size == 100_000
        resumed = JsonLog(path, FIELDS)
        assert [line["step"] for line in resumed.keep(lambda line: line["step"] < 2)] == [0, 1]
        assert steps_in(path) == [0, 1]
    fill(resumed, [2])
    assert steps_in(path) == [0, 1, 2]


def test_lines_that_wait_are_dropped_with_those_in_the_file(tmp_path):
    path = tmp_path / "log.jsonl"
    log = JsonLog(path, FIELDS)
    with full_disk():
        for step in range(6):
            log.add({"step": step, "text": LONG})
        with pytest.raises(OSError, match="File too large"):
            log.flush()
        assert log.keep(lambda line: line["step"] != 1) == []
    log.flush()
    assert steps_in(path) == [0, 2, 3, 4, 5]
    assert [line["step"] for line in log.keep(lambda line: line["step"] % 2 == 0)] == [0, 2, 4] == steps_in(path)


def test_tensorboard_goes_on_after_a_full_disk_and_nothing_waits_for_it(tmp_path):
    file = TensorBoardFile(tmp_path)
    file.forget_from(1)
    with full_disk():
        for step in range(1, 5):
            for number in range(500):
                file.add(f"curve/{number}/{'x' * 60}", step + number / 1000, step)
            if step >= 2:
                with pytest.raises(OSError, match="File too large"):
                    file.flush()
    file.flush()
    first, start, *points = events_in(tmp_path)
    assert first.file_version == "brain.Event:2" and first.wall_time > 0
    assert (start.step, start.session_log.status) == (1, SessionLog.START)
    assert [point.step for point in points] == [step for step in range(1, 5) for _ in range(500)]
    (value,) = points[-1].summary.value
    assert value.tag.startswith("curve/499/") and value.simple_value == pytest.approx(4.499)


def test_logs_that_cannot_be_closed_do_not_hide_how_the_run_ended(tmp_path, capsys):
    with pytest.raises(Preempted), MetricsWriter(tmp_path, 0) as writer:
        (tmp_path / FILE).symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space left"):
            writer.write(1, {"loss": 1.0})
        raise Preempted(signal.SIGTERM, 1)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"warning: {tmp_path / FILE}: 1 records are lost (No space left on device)"
    # The other files have what they could take.
    assert [event.step for event in events_in(tmp_path / "tensorboard")] == [0, 1, 1]
    (tmp_path / FILE).unlink()
    assert read_metrics(tmp_path) == []

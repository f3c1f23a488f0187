"""Two real processes over loopback, with four CPU devices each."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fp4jax.checkpoint import DAMAGED
from fp4jax.testing.kills import DETERMINISTIC
from fp4jax.testing.victim import _digest
from fp4jax.training.divergence import read_events
from fp4jax.training.metrics import read_metrics
from tests.training.two_processes import get_config

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "tests/training/two_processes.py"
SECONDS = 900.0  # of a run of a few steps, on a machine that does much else


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


_launched: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def _nothing_is_left_running():
    """However a test ends: what it started would train on beside the others."""
    yield
    while _launched:
        process = _launched.pop()
        process.kill()
        process.communicate()


def launch(command, devices):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
    }
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    _launched.append(process)
    return process


def start(script, *flags, processes=2):
    """The processes of one run, each with its share of eight devices."""
    flags = (*flags, f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={processes}", "--heartbeat_timeout=20")
    return [launch([script, *flags, f"--process_id={index}"], 8 // processes) for index in range(processes)]


def train(workdir, *flags, processes=2):
    return start("train.py", f"--config={CONFIG}", f"--workdir={workdir}", *flags, processes=processes)


def end(running):
    """(exit code, stdout, stderr) of each."""
    try:
        outputs = [process.communicate(timeout=SECONDS) for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(running, outputs, strict=True)]


def wait_for_step(workdir, step, running):
    deadline = time.monotonic() + SECONDS
    while max((line["step"] for line in read_metrics(workdir)), default=0) < step:
        assert time.monotonic() < deadline and all(process.poll() is None for process in running)
        time.sleep(0.05)


def numbers(workdir):
    return [{key: line.get(key) for key in DETERMINISTIC} for line in read_metrics(workdir)]


def test_two_processes_agree_and_share():
    address = f"127.0.0.1:{free_port()}"
    running = [launch(["tests/training/process_of_two.py", address, str(index)], 4) for index in range(2)]
    found = []
    for code, stdout, stderr in end(running):
        assert code == 0, stderr
        found.append(json.loads(next(line for line in stdout.splitlines() if line.startswith("{"))))
    first, second = found
    assert (first["first"], second["first"]) == (True, False)
    assert (first["prefix"], second["prefix"]) == ("", "process 1 of 2: ")
    assert first["share"] == [[0, 2], [0, 1], [1, 2]] and second["share"] == [[1, 2], [0, 1], [0, 2]]
    for process in found:
        assert process["from_first"] == 10
        assert process["everywhere"] == [False, True]
        assert process["rows"] == 2 * [[[2 * row, 2 * row + 1] for row in range(8)]]
        # Process 1 was asked before its second step, and both learn it at the third.
        assert process["stops"] == [None, None, signal.SIGTERM, signal.SIGTERM]
        assert "1 of 2 processes have none of them; set one axis to -1" in process["refused"][0]
    assert "process 0 has parts 0, 2, 4, 6 of the 8 of a batch, and it reads one block" in first["refused"][1]
    assert "process 1 has parts 1, 3, 5, 7" in second["refused"][1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The workdir of a run in one process of eight devices, with the same collectives."""
    workdir = tmp_path_factory.mktemp("whole")
    ((code, _, stderr),) = end(train(workdir, processes=1))
    assert code == 0, stderr
    assert [line["step"] for line in read_metrics(workdir)] == list(range(1, 9))
    return workdir


def assert_same_run(workdir, whole):
    assert numbers(workdir) == numbers(whole)
    assert _digest(get_config(), workdir) == _digest(get_config(), whole)


@pytest.mark.slow
def test_two_processes_stopped_by_a_signal_equal_one_bit_for_bit(whole, tmp_path):
    running = train(tmp_path)
    wait_for_step(tmp_path, 4, running)
    running[1].send_signal(signal.SIGTERM)
    (code, _, stderr), (other_code, other_stdout, other_stderr) = end(running)
    assert code == other_code == 128 + signal.SIGTERM
    stopped = max(line["step"] for line in read_metrics(tmp_path))
    assert 4 < stopped < 8
    assert f"stopped by SIGTERM: step {stopped} is saved" in stderr
    assert (tmp_path / "checkpoints" / str(stopped)).is_dir()
    assert "SIGTERM: saving after this step" in other_stderr and "loss" not in other_stdout

    for code, _, stderr in end(train(tmp_path)):
        assert code == 0, stderr
    assert_same_run(tmp_path, whole)
    parts = (tmp_path / "checkpoints" / "8" / "params").glob("ocdbt.process_*")
    assert {part.name for part in parts} == {"ocdbt.process_0", "ocdbt.process_1"}


@pytest.mark.slow
def test_an_evaluation_in_two_processes_is_that_of_one(whole):
    written = []
    for processes in (2, 1):
        ended = end(start("eval.py", f"--workdir={whole}", "--recipe=bf16", "--batches=3", processes=processes))
        for index, (code, stdout, stderr) in enumerate(ended):
            assert code == 0, stderr
            assert ("validation loss" in stdout) == (index == 0)
        written.append(json.loads((whole / "evaluation-bf16.json").read_text()))
    assert written[0] == written[1]
    assert written[0]["batches"] == 3 and written[0]["tokens"] == 3 * 8 * 32


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_and_the_restart_equals_one_bit_for_bit(victim, whole, tmp_path):
    running = train(tmp_path)
    wait_for_step(tmp_path, 7, running)
    running[victim].kill()
    ended = end(running)
    assert ended[victim][0] == -signal.SIGKILL
    code, _, stderr = ended[1 - victim]
    assert code not in (0, -signal.SIGKILL)
    assert "another process has ended" in stderr or "another task died" in stderr

    # What is damaged is found by process 0, for both.
    steps = [int(folder.name) for folder in (tmp_path / "checkpoints").iterdir() if folder.name.isdigit()]
    newest = tmp_path / "checkpoints" / str(max(steps))
    file = next(path for path in sorted((newest / "params").rglob("d/*")) if path.is_file())
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    for code, _, stderr in end(train(tmp_path)):
        assert code == 0, stderr
    assert (tmp_path / DAMAGED / newest.name).is_dir()
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
def test_an_error_of_all_is_one_line(tmp_path):
    ended = end(train(tmp_path, "--config.mesh.fsdp=4"))
    said = (
        "error: the mesh has 4 of 8 devices, and 1 of 2 processes have none of them; set one axis to -1 "
        "(--config.mesh.data=-1), or start fewer processes"
    )
    found = []
    for prefix, (code, _, stderr) in zip(("", "process 1 of 2: "), ended, strict=True):
        assert code not in (0, None) and "Traceback" not in stderr
        lines = [line for line in stderr.splitlines() if "the mesh has" in line]
        assert lines in ([], [prefix + said])
        # The one that is later may lose the other before it comes to the error itself.
        assert lines or "another process has ended" in stderr or "another task died" in stderr, stderr
        found += lines
    assert found


@pytest.mark.slow
def test_both_roll_back_and_stop_alike(tmp_path):
    flags = ("recipe=bf16", "optimizer.learning_rate=1e30", "optimizer.warmup_steps=0", "checkpoint.every=1")
    flags += ("on_nonfinite=rollback", "divergence.max_events=2")
    (code, _, stderr), (other_code, *_) = end(train(tmp_path, *(f"--config.{flag}" for flag in flags)))
    assert code == 1 and other_code not in (0, None)
    assert "stopped after divergence.max_events=2, step 1 is saved" in stderr
    events = read_events(tmp_path)
    assert [(event["event"], event["step"], event["after"]) for event in events] == [
        ("rollback", 2, 1),
        ("rollback", 2, 1),
        ("stopped", 2, 1),
    ]
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["1"]

import os
import socket
import subprocess
import sys

import jax
import pytest

from fp4jax import distributed
from fp4jax.distributed import ProcessesError, launched, start
from fp4jax.training import command, launch

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "a[1-2]", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        (SLURM | {"SLURM_NTASKS": "2"}, True),
        (SLURM | {"SLURM_NTASKS": "1"}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, False),  # in a batch script, outside srun
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        (KUBERNETES, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),  # a pod that is not of an indexed Job
    ],
)
def test_a_launcher_is_recognized_by_its_environment(environment, several, monkeypatch):
    monkeypatch.setattr(distributed, "_on_tpu", lambda: False)
    assert launched(environment) is several


def test_a_single_process_initializes_nothing(monkeypatch):
    for name in ("SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    start()
    assert not jax.distributed.is_initialized() and not distributed.several()
    assert distributed.is_first() and distributed.from_first(7) == 7 and distributed.prefix() == ""
    assert distributed.everywhere(True) and not distributed.everywhere(False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("10.0.0.1:99", 2, None), "^--process_id missing: by hand every process takes --coordinator"),
        ((None, 2, 0), "^--coordinator missing"),
        ((None, None, 1), "^--coordinator, --num_processes missing"),
        (("10.0.0.1", 2, 0), "it is HOST:PORT of process 0"),
        (("10.0.0.1:99999", 2, 0), "it is HOST:PORT of process 0"),
        ((":99", 2, 0), "it is HOST:PORT of process 0"),
        (("10.0.0.1:99", 2, 2), "--process_id=2 with --num_processes=2: it is from 0 to 1"),
        (("10.0.0.1:99", 2, -1), "--process_id=-1"),
        (("10.0.0.1:99", 0, 0), "--num_processes=0: it is at least 1"),
    ],
)
def test_arguments_that_cannot_be(arguments, message):
    with pytest.raises(ProcessesError, match=message) as caught:
        start(*arguments)
    assert "\n" not in str(caught.value)
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize("process", [0, 1])
def test_processes_that_do_not_come_end_the_wait_in_one_line(process):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    code = f"from fp4jax.distributed import start; start('127.0.0.1:{port}', 2, {process}, timeout=1)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: coordinator 127.0.0.1:{port}: it was not reached, or not all processes were there")
    assert "--coordinator_timeout" in line


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ProcessesError, match=f"--coordinator=127.0.0.1:{port}: process 0 cannot listen there"):
            start(f"127.0.0.1:{port}", 2, 0)
    assert not jax.distributed.is_initialized()


def test_a_traceback_of_one_of_several_processes_ends_it_at_once(monkeypatch, capsys):
    """Leaving in an orderly way would wait for the others, who wait for this one."""

    def fail(*_):
        raise ValueError("wrong")

    codes = []
    monkeypatch.setattr(command, "run", fail)
    with pytest.raises(ValueError, match="wrong"):
        launch.run(lambda: None, [])
    monkeypatch.setattr(distributed, "several", lambda: True)
    monkeypatch.setattr(os, "_exit", codes.append)
    launch.run(lambda: None, [])
    assert codes == [1] and "ValueError: wrong" in capsys.readouterr().err

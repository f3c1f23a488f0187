import errno
import fcntl
import os
import socket
import subprocess
import sys
import time

import pytest

from fp4jax import locking
from fp4jax.locking import InUseError, locked

HOLDER = """
import importlib.util, pathlib, sys, time
spec = importlib.util.spec_from_file_location("locking", sys.argv[1])
locking = importlib.util.module_from_spec(spec)
spec.loader.exec_module(locking)
with locking.locked(pathlib.Path(sys.argv[2]), "holds it"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_killed_process_frees_its_lock(tmp_path):
    path = tmp_path / "lock"
    command = [sys.executable, "-c", HOLDER, locking.__file__, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(InUseError) as caught, locked(path, "is at work in x; wait for it"):
                pass
            host = socket.gethostname()
            assert str(caught.value) == f"process {holder.pid} on {host} is at work in x; wait for it"
        finally:
            holder.kill()
    with locked(path, "is at work"):
        assert path.read_text() == f"process {os.getpid()} on {socket.gethostname()}"


def test_without_a_message_it_waits(tmp_path):
    path = tmp_path / "lock"
    command = [sys.executable, "-c", HOLDER.replace("sleep(60)", "sleep(0.5)"), locking.__file__, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        start = time.monotonic()
        with locked(path):
            assert time.monotonic() - start > 0.2


def test_a_file_system_without_locks_is_named_and_other_errors_are_errors(tmp_path, monkeypatch, capsys):
    def fails(number):
        def flock(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    fails(errno.ENOLCK)
    with locked(tmp_path / "lock", "is at work"):
        assert "cannot be locked (No locks available): run one process at a time" in capsys.readouterr().err
    fails(errno.EIO)
    with pytest.raises(OSError, match="Input/output error"), locked(tmp_path / "lock", "is at work"):
        pass

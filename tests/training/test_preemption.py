import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from fp4jax.config import mesh_of
from fp4jax.training import preemption
from fp4jax.training.mesh import make_mesh
from fp4jax.training.preemption import Agreement, Preempted, StopRequest, listening


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_is_a_request_and_handlers_are_put_back(signum, capfd):
    before = signal.getsignal(signum)
    with listening() as request:
        assert request.signum is None
        os.kill(os.getpid(), signum)
        wait_for(lambda: request.signum is not None)
        assert request.signum == signum
    assert signal.getsignal(signum) is before
    assert "a second signal ends the run at once" in capfd.readouterr().err


def test_an_agreement_is_about_the_step_before(capfd):
    request = StopRequest()
    agreement = Agreement(request, make_mesh(mesh_of(data=4, fsdp=2)))
    assert agreement() is None and agreement() is None
    request.received(signal.SIGINT)
    assert agreement() is None
    assert agreement() == agreement() == signal.SIGINT


HANGS = """
import hashlib, importlib.util, os, signal, sys, threading, time
spec = importlib.util.spec_from_file_location("preemption", sys.argv[1])
preemption = importlib.util.module_from_spec(spec)
spec.loader.exec_module(preemption)
with preemption.listening() as request:
    os.kill(os.getpid(), signal.SIGTERM)
    while request.signum is None:
        time.sleep(0.01)
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    # Without a bytecode in between, as inside a compiled program: Python's own handlers would wait for its end.
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


def test_second_signal_ends_the_process_though_the_main_thread_never_returns():
    result = subprocess.run(
        [sys.executable, "-c", HANGS, preemption.__file__], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 128 + signal.SIGINT
    assert "second signal (SIGINT): ended at once" in result.stderr


def test_one_request_may_come_as_several_signals(monkeypatch, capsys):
    now, ended = [100.0], []
    monkeypatch.setattr(preemption.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(preemption.os, "_exit", ended.append)
    request = StopRequest()
    for now[0], signum in ((100.0, signal.SIGTERM), (100.4, signal.SIGTERM)):
        request.received(signum)
    assert not ended and capsys.readouterr().err.count("saving after this step") == 1
    now[0] = 100.6
    request.received(signal.SIGTERM)
    assert ended == [143]


def test_exit_codes_are_those_of_shells():
    assert Preempted(signal.SIGTERM, 3).exit_code == 143
    assert Preempted(signal.SIGINT, 3).exit_code == 130
    assert str(Preempted(signal.SIGTERM, 3)) == "stopped by SIGTERM: step 3 is saved; rerun the same command to go on"


def test_another_thread_than_the_main_one_listens_for_nothing():
    found = []

    def use():
        with listening() as request:
            found.append(request)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert isinstance(found[0], StopRequest)

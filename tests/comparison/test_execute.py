"""A comparison whose runs are small programs in place of trainings."""

import dataclasses
import io
import os
import signal
import sys
import threading
import time

import pytest
from rich.console import Console

from fp4jax.comparison import execute as module
from fp4jax.comparison.execute import LOCK, RunFailedError, RunStopped, execute
from fp4jax.comparison.plan import Comparison
from fp4jax.comparison.run import CONFIG, LOG, SUMMARY
from fp4jax.config import default_config
from fp4jax.locking import InUseError, locked

# Says "ready", then waits for a signal, counts what comes within 0.3 s, and leaves as the case says.
WAITS = """
import os, signal, sys, time
count = []
for signum in (signal.SIGTERM, signal.SIGINT):
    signal.signal(signum, lambda *_: count.append(1))
print("ready", flush=True)
while not count:
    time.sleep(0.01)
time.sleep(0.3)
print(f"{len(count)} signals, step 7 is saved", flush=True)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def comparison(tmp_path):
    return Comparison(default_config(), ("bf16", "nvfp4"), (0,), "bf16", None, tmp_path)


@pytest.fixture
def made_by(monkeypatch):
    """made_by(program, *arguments): what a run executes."""

    def made_by(program, *arguments):
        monkeypatch.setattr(module, "_command", lambda run: [sys.executable, "-c", program, *map(str, arguments)])

    return made_by


def when_ready(signum, *logs):
    def wait():
        deadline = time.monotonic() + 20
        while not all(log.exists() and "ready" in log.read_text() for log in logs) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signum)

    threading.Thread(target=wait).start()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_once_and_its_code_comes_back(comparison, made_by, signum):
    made_by(WAITS, 128 + signum)
    before = signal.getsignal(signum)
    when_ready(signum, next(comparison.runs()).folder / LOG)
    with pytest.raises(RunStopped) as caught:
        execute(comparison, Console(file=io.StringIO()))
    assert caught.value.exit_code == 128 + signum
    assert str(caught.value) == "bf16, seed 0: 1 signals, step 7 is saved"
    assert signal.getsignal(signum) is before
    assert not (comparison.workdir / "nvfp4").exists()


def test_a_run_that_cannot_save_has_failed(comparison, made_by):
    made_by(WAITS, 1)
    when_ready(signal.SIGTERM, next(comparison.runs()).folder / LOG)
    with pytest.raises(RunFailedError, match=r"failed \(exit code 1\): 1 signals"):
        execute(comparison, Console(file=io.StringIO()))


def test_a_signal_before_the_first_step(comparison, made_by):
    made_by("print('ready', flush=True); import time; time.sleep(60)")
    when_ready(signal.SIGTERM, next(comparison.runs()).folder / LOG)
    with pytest.raises(RunStopped, match="SIGTERM came before its first step; rerun") as caught:
        execute(comparison, Console(file=io.StringIO()))
    assert caught.value.exit_code == 143


def test_commands_share_a_folder_but_not_a_run(comparison):
    run = next(comparison.runs())
    run.folder.mkdir(parents=True)
    message = r"^process \d+ on \S+ makes bf16, seed 0 in .*; wait for it, or give other --seeds$"
    with locked(run.folder / LOCK), pytest.raises(InUseError, match=message):
        execute(comparison, Console(file=io.StringIO()))
    assert not (run.folder / CONFIG).exists()


def test_what_another_command_made_in_the_meantime_is_not_repeated(comparison, made_by, monkeypatch):
    runs = list(comparison.runs())
    made_by("import pathlib, sys; [pathlib.Path(name).touch() for name in sys.argv[1:]]",
            *(run.folder / SUMMARY for run in runs))  # fmt: skip
    runs[1].folder.mkdir(parents=True)
    monkeypatch.setattr(module, "outcome", lambda run: "made")
    execute(comparison, Console(file=io.StringIO()))
    assert (runs[0].folder / CONFIG).exists() and not (runs[1].folder / CONFIG).exists()


def test_jobs_are_made_at_a_time_and_no_more(comparison, made_by, monkeypatch):
    # Every run waits until another one is beside it, and counts those that it sees.
    program = """
import pathlib, sys, time
root, folder, most = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), 0
(folder / "here").touch()
deadline = time.monotonic() + 20
while most < 2 and time.monotonic() < deadline:
    most = max(most, len(list(root.glob("*/*/here"))))
    time.sleep(0.01)
time.sleep(0.3)
(folder / "seen").write_text(str(max(most, len(list(root.glob("*/*/here"))))))
(folder / "here").unlink()
(folder / "summary.json").touch()
"""
    monkeypatch.setattr(
        module, "_command", lambda run: [sys.executable, "-c", program, str(comparison.workdir), str(run.folder)]
    )
    monkeypatch.setattr(module, "outcome", lambda run: "made")
    comparison = dataclasses.replace(comparison, seeds=(0, 1))
    console = io.StringIO()
    execute(comparison, Console(file=console, width=200), jobs=2)
    assert [(run.folder / "seen").read_text() for run in comparison.runs()] == ["2"] * 4
    assert console.getvalue().count("made; ") == 4


def test_a_signal_is_passed_on_to_every_run_under_way(comparison, made_by):
    made_by(WAITS, 128 + signal.SIGINT)
    runs = list(dataclasses.replace(comparison, seeds=(0, 1)).runs())
    when_ready(signal.SIGINT, *(run.folder / LOG for run in runs[:2]))
    with pytest.raises(RunStopped, match="1 signals, step 7 is saved"):
        execute(dataclasses.replace(comparison, seeds=(0, 1)), Console(file=io.StringIO()), jobs=2)
    assert all("1 signals, step 7 is saved" in (run.folder / LOG).read_text() for run in runs[:2])
    assert not runs[2].folder.exists()


def test_beside_one_that_fails_the_others_save_their_step(comparison, monkeypatch):
    fails = "import pathlib, sys, time\nwhile 'ready' not in pathlib.Path(sys.argv[1]).read_text(): time.sleep(0.01)"
    fails += "\nsys.exit('no such file')"
    runs = list(dataclasses.replace(comparison, seeds=(0, 1)).runs())
    programs = {runs[0]: [WAITS, str(128 + signal.SIGTERM)], runs[1]: [fails, str(runs[0].folder / LOG)]}
    monkeypatch.setattr(module, "_command", lambda run: [sys.executable, "-c", *programs[run]])
    with pytest.raises(RunFailedError, match=r"^nvfp4, seed 0 failed \(exit code 1\): no such file; see"):
        execute(dataclasses.replace(comparison, seeds=(0, 1)), Console(file=io.StringIO()), jobs=2)
    assert "1 signals, step 7 is saved" in (runs[0].folder / LOG).read_text()
    assert not runs[2].folder.exists()

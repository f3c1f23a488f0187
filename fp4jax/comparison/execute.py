"""The runs of a comparison that are not finished, one after the other."""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from fp4jax.comparison.plan import Comparison, Run, read_json
from fp4jax.comparison.records import load_record
from fp4jax.comparison.run import CONFIG, LOG, SUMMARIZED, SUMMARY, write_atomically
from fp4jax.locking import locked
from fp4jax.training.estimate import duration
from fp4jax.training.preemption import SIGNALS, Preempted

LOCK = "comparison.lock"
"""File of a run's folder, locked by the command that makes it; the training itself locks the folder as any workdir."""


class RunFailedError(ValueError):
    """A run ended with an error; names its log."""


class RunStopped(Preempted):
    """SIGTERM or SIGINT came while a run was training; says what became of it. `exit_code` is 128 + the signal."""

    def __init__(self, run: Run, signum: int, said: str):
        Exception.__init__(self, f"{run.recipe}, seed {run.seed}: {said}")
        self.exit_code = 128 + signum


def execute(comparison: Comparison, console: Console) -> None:
    """Makes every run that has no summary yet; one that was killed goes on from its last checkpoint.

    Commands with different seeds may work in one folder: each has locked the run that it makes.

    Raises:
      RunFailedError: a run could not be made. (One that diverged is a result.)
      InUseError: another command makes one of these runs.
      RunStopped: SIGTERM or SIGINT came; the run that was training has saved its step.
    """
    runs = list(comparison.runs())
    missing = [run for run in runs if not is_finished(run)]
    configs = {run: comparison.config_of(run) for run in missing}  # all of them before the first one starts
    if len(missing) < len(runs):
        console.print(f"{len(runs) - len(missing)} of {len(runs)} runs are done already")
    start = time.perf_counter()
    for i, run in enumerate(missing):
        console.print(f"run {i + 1} of {len(missing)}: {run.recipe}, seed {run.seed}; log: {run.folder / LOG}")
        run.folder.mkdir(parents=True, exist_ok=True)
        in_use = f"makes {run.recipe}, seed {run.seed} in {comparison.workdir}; wait for it, or give other --seeds"
        with locked(run.folder / LOCK, in_use):
            if not is_finished(run):  # by a command that worked beside this one
                write_atomically(run.folder / CONFIG, configs[run].to_dict())
                _train(run)
        taken = time.perf_counter() - start
        left = taken / (i + 1) * (len(missing) - i - 1)
        console.print(
            f"  {outcome(run)}; {duration(taken)} so far" + (f", about {duration(left)} left" if left else "")
        )


def is_finished(run: Run) -> bool:
    """Whether the run has come to its end, good or bad."""
    return (run.folder / SUMMARY).exists()


def outcome(run: Run) -> str:
    """One line about a finished run."""
    summary = read_json(run.folder / SUMMARY, SUMMARIZED)
    if summary["diverged"]:
        return f"diverged: {summary['diverged']}"
    return f"validation loss {load_record(run).validation_loss:.4f}"


def _train(run: Run) -> None:
    with (run.folder / LOG).open("a", encoding="utf-8") as log, _forwarding() as signals:
        # A group of its own: Ctrl-C reaches it through this process alone, once.
        process = subprocess.Popen(_command(run), stdout=log, stderr=subprocess.STDOUT, process_group=0)
        try:
            signals.to(process)
            code = process.wait()
        except BaseException:
            process.kill()  # its last checkpoint is whole, and it goes on from there
            process.wait()
            raise
    received = signals.received
    if received is not None and code == 128 + received:
        raise RunStopped(run, received, _last_line(run.folder / LOG))
    if received is not None and (code == -received or is_finished(run)):
        when = "after its last step" if is_finished(run) else "before its first step"
        raise RunStopped(run, received, f"{signal.Signals(received).name} came {when}; rerun the same command to go on")
    if code or not is_finished(run):
        raise RunFailedError(
            f"{run.recipe}, seed {run.seed} failed (exit code {code}): {_last_line(run.folder / LOG)}; "
            f"see {run.folder / LOG}, then rerun the same command"
        )


def _command(run: Run) -> list[str]:
    return [sys.executable, "-m", "fp4jax.comparison.run", str(run.folder)]


class _Signals:
    """The first signal that was received, and the process that it and those to come are for."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._process: subprocess.Popen | None = None

    def handle(self, signum: int, _: object) -> None:
        self.received = self.received or signum
        if self._process is not None:
            self._process.send_signal(signum)

    def to(self, process: subprocess.Popen) -> None:
        self._process = process
        if self.received is not None:
            process.send_signal(self.received)


@contextlib.contextmanager
def _forwarding() -> Iterator[_Signals]:
    """Passes SIGTERM and SIGINT on in the block. A process that waits for another runs its handlers."""
    signals = _Signals()
    former = {signum: signal.signal(signum, signals.handle) for signum in SIGNALS}
    try:
        yield signals
    finally:
        for signum, handler in former.items():
            signal.signal(signum, handler)


def _last_line(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "nothing was logged"

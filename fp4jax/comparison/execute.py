"""The runs of a comparison that are not finished, one after the other or several at a time."""

import collections
import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import ml_collections
from rich.console import Console

from fp4jax.comparison.plan import Comparison, Run, read_json
from fp4jax.comparison.records import load_record
from fp4jax.comparison.run import CONFIG, LOG, SUMMARIZED, SUMMARY, write_atomically
from fp4jax.locking import InUseError, locked
from fp4jax.training.estimate import duration
from fp4jax.training.preemption import SIGNALS, Preempted

LOCK = "comparison.lock"
"""File of a run's folder, locked by the command that makes it; the training itself locks the folder as any workdir."""


POLL_SECONDS = 0.05


class RunFailedError(ValueError):
    """A run ended with an error; names its log."""


class RunStopped(Preempted):
    """SIGTERM or SIGINT came while a run was training; says what became of it. `exit_code` is 128 + the signal."""

    def __init__(self, run: Run, signum: int, said: str):
        Exception.__init__(self, f"{run.recipe}, seed {run.seed}: {said}")
        self.exit_code = 128 + signum


def execute(comparison: Comparison, console: Console, jobs: int = 1) -> None:
    """Makes every run that has no summary yet; one that was killed goes on from its last checkpoint.

    Commands with different seeds may work in one folder: each has locked the runs that it makes.

    Args:
      comparison: whose runs are made, in their order.
      console: gets a line when a run begins and when it ends.
      jobs: runs that are made at a time.

    Raises:
      RunFailedError: a run could not be made; those beside it have saved their step. (One that diverged is a result.)
      InUseError: another command makes one of these runs.
      RunStopped: SIGTERM or SIGINT came; the runs that were training have saved their step.
    """
    runs = list(comparison.runs())
    missing = [run for run in runs if not is_finished(run)]
    configs = {run: comparison.config_of(run) for run in missing}  # all of them before the first one starts
    if len(missing) < len(runs):
        console.print(f"{len(runs) - len(missing)} of {len(runs)} runs are done already")
    start = time.perf_counter()

    def begin(run: Run) -> _Training:
        console.print(
            f"run {missing.index(run) + 1} of {len(missing)}: {run.recipe}, seed {run.seed}; log: {run.folder / LOG}"
        )
        in_use = f"makes {run.recipe}, seed {run.seed} in {comparison.workdir}; wait for it, or give other --seeds"
        return _Training(run, configs[run], in_use)

    def ended(run: Run, done: int) -> None:
        taken = time.perf_counter() - start
        left = taken / done * (len(missing) - done)
        name = f"{run.recipe}, seed {run.seed}: " if jobs > 1 else ""
        console.print(
            f"  {name}{outcome(run)}; {duration(taken)} so far" + (f", about {duration(left)} left" if left else "")
        )

    with _forwarding() as signals:
        _make_all(missing, begin, ended, jobs, signals)


def is_finished(run: Run) -> bool:
    """Whether the run has come to its end, good or bad."""
    return (run.folder / SUMMARY).exists()


def outcome(run: Run) -> str:
    """One line about a finished run."""
    summary = read_json(run.folder / SUMMARY, SUMMARIZED)
    if summary["diverged"]:
        return f"diverged: {summary['diverged']}"
    return f"validation loss {load_record(run).validation_loss:.4f}"


class _Training:
    """A run in the making: its process, its log, and the lock on its folder."""

    def __init__(self, run: Run, config: ml_collections.ConfigDict, in_use: str):
        """Starts it, unless a command that worked beside this one has made it by now.

        Raises:
          InUseError: another command is making it; says `in_use`.
        """
        self.run, self.process = run, None
        run.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as held:
            held.enter_context(locked(run.folder / LOCK, in_use))
            if not is_finished(run):
                write_atomically(run.folder / CONFIG, config.to_dict())
                log = held.enter_context((run.folder / LOG).open("a", encoding="utf-8"))
                # A group of its own: Ctrl-C reaches it through this process alone, once.
                self.process = subprocess.Popen(_command(run), stdout=log, stderr=subprocess.STDOUT, process_group=0)
            self._held = held.pop_all()

    def has_ended(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def close(self) -> None:
        """Lets the folder go; a process that still runs is killed: it goes on from its last checkpoint."""
        if not self.has_ended():
            self.process.kill()
            self.process.wait()
        self._held.close()

    def problem(self, received: int | None) -> Preempted | RunFailedError | None:
        """Why the run, which has ended, is not finished or must be the last one; `received`: a signal that it got."""
        run, code = self.run, self.process.returncode if self.process else 0
        if received is not None and code == 128 + received:
            return RunStopped(run, received, _last_line(run.folder / LOG))
        if received is not None and (code == -received or is_finished(run)):
            when = "after its last step" if is_finished(run) else "before its first step"
            said = f"{signal.Signals(received).name} came {when}; rerun the same command to go on"
            return RunStopped(run, received, said)
        if code or not is_finished(run):
            return RunFailedError(
                f"{run.recipe}, seed {run.seed} failed (exit code {code}): {_last_line(run.folder / LOG)}; "
                f"see {run.folder / LOG}, then rerun the same command"
            )
        return None


def _make_all(
    runs: Sequence[Run],
    begin: Callable[[Run], _Training],
    ended: Callable[[Run, int], None],
    jobs: int,
    signals: "_Signals",
) -> None:
    """Makes the runs, `jobs` at a time. After a signal or a failure none is begun, and those under way save their step.

    Args:
      runs: in the order in which they begin.
      begin: starts one.
      ended: is told of each that is finished, and how many are.
      jobs: how many at a time.
      signals: what was received, and what it is passed on to.
    """
    waiting, problems, done = collections.deque(runs), [], 0
    with contextlib.ExitStack() as cleanup:
        while waiting or signals.trainings:
            if problems or signals.received is not None:
                if not signals.trainings:
                    break
            elif waiting and len(signals.trainings) < jobs:
                try:
                    training = begin(waiting[0])
                except InUseError as error:
                    problems.append(error)
                    signals.pass_on(signal.SIGTERM)
                    continue
                waiting.popleft()
                cleanup.callback(training.close)
                signals.add(training)
                continue
            for training in [training for training in signals.trainings if training.has_ended()]:
                signals.trainings.remove(training)
                training.close()
                if problem := training.problem(signals.received):
                    problems.append(problem)
                    signals.pass_on(signals.received or signal.SIGTERM)
                else:
                    done += 1
                    ended(training.run, done)
            time.sleep(POLL_SECONDS if signals.trainings else 0)
    if problems:
        raise problems[0]
    if waiting:
        raise RunStopped(waiting[0], signals.received, "not begun; rerun the same command to go on")


def _command(run: Run) -> list[str]:
    return [sys.executable, "-m", "fp4jax.comparison.run", str(run.folder)]


class _Signals:
    """The first signal that was received, and the trainings that it and those to come are for."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.trainings: list[_Training] = []

    def handle(self, signum: int, _: object) -> None:
        self.received = self.received or signum
        self.pass_on(signum)

    def pass_on(self, signum: int) -> None:
        for training in self.trainings:
            if not training.has_ended():
                training.process.send_signal(signum)

    def add(self, training: _Training) -> None:
        self.trainings.append(training)
        if self.received is not None and not training.has_ended():
            training.process.send_signal(self.received)


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

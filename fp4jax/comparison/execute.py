"""The runs of a comparison that are not finished, one after the other."""

import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from fp4jax.comparison.plan import Comparison, Run, read_json
from fp4jax.comparison.records import load_record
from fp4jax.comparison.run import CONFIG, LOG, SUMMARIZED, SUMMARY, write_atomically
from fp4jax.training.estimate import duration


class RunFailedError(ValueError):
    """A run ended with an error; names its log."""


def execute(comparison: Comparison, console: Console) -> None:
    """Makes every run that has no summary yet; one that was killed goes on from its last checkpoint.

    Raises:
      RunFailedError: a run could not be made. (One that diverged is a result.)
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
    with (run.folder / LOG).open("a", encoding="utf-8") as log:
        command = [sys.executable, "-m", "fp4jax.comparison.run", str(run.folder)]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            code = process.wait()
        except BaseException:
            process.kill()  # its last checkpoint is whole, and it goes on from there
            process.wait()
            raise
    if code or not is_finished(run):
        raise RunFailedError(
            f"{run.recipe}, seed {run.seed} failed (exit code {code}): {_last_line(run.folder / LOG)}; "
            f"see {run.folder / LOG}, then rerun the same command"
        )


def _last_line(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "nothing was logged"

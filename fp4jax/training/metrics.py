"""Metrics on disk: `metrics.jsonl`, one JSON object a step that was logged, and TensorBoard files in `tensorboard/`.

`health.jsonl` beside it has one object for every step with a health measurement: long lines, a list with one value a
layer under each name. TensorBoard shows these as means over the layers.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from fp4jax.data.json_files import read_objects
from fp4jax.training.log_files import JsonLog, TensorBoardFile

FILE = "metrics.jsonl"
HEALTH_FILE = "health.jsonl"
FIELDS = {"step": int}


class MetricsWriter:
    """Writes a run's metrics; a context manager.

    A run that resumes after `start_step` steps first drops what an interrupted run had logged beyond them, so that
    every step stands in the file once. What a full disk does not take waits in memory and is written with what comes
    next; leaving the context tries once more, and says on stderr what is lost.
    """

    def __init__(self, workdir: Path, start_step: int):
        self._metrics, self._health = JsonLog(workdir / FILE, FIELDS), JsonLog(workdir / HEALTH_FILE, FIELDS)
        self._tensorboard = TensorBoardFile(workdir / "tensorboard")
        self._files = (self._metrics, self._health, self._tensorboard)
        self.rewind(start_step)

    def rewind(self, step: int) -> None:
        """Drops what was logged beyond `step`: the run goes on from there."""
        for log in (self._metrics, self._health):
            log.keep(lambda line: line["step"] <= step)
        self._tensorboard.forget_from(step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends {"step": step, **metrics}, without what is not finite; the system has it when this returns.

        Raises:
          OSError: it does not take it; the next call writes it too.
        """
        # JSON has no NaN: a skipped step's loss is not there.
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self._metrics.add({"step": step, **metrics})
        for name, value in metrics.items():
            self._tensorboard.add(name, value, step)
        self._flush()

    def write_health(
        self, step: int, table: Mapping[str, Sequence[float | None]], summary: Mapping[str, float | None]
    ) -> None:
        """Appends {"step": step, **summary, **table} to `health.jsonl`; a None is written as null.

        table: "ratio/operand/linear layer" → one value a layer; summary: numbers of the whole model.

        Raises:
          OSError: as `write`.
        """
        self._health.add({"step": step, **summary, **table})
        for name, value in summary.items():
            if value is not None:
                self._tensorboard.add(f"health/{name}", value, step)
        for name, values in table.items():
            known = [value for value in values if value is not None]
            if known:
                self._tensorboard.add(f"health/{name}", sum(known) / len(known), step)
        self._flush()

    def _flush(self) -> None:
        """Writes what can be written of every file."""
        errors = []
        for file in self._files:
            try:
                file.flush()
            except OSError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files:
            file.close()


def read_metrics(workdir: Path, file: str = FILE) -> list[dict]:
    """Returns the objects of `metrics.jsonl`, or of HEALTH_FILE, oldest first; none without a file.

    A last line that a killed run left unfinished is not a step that was logged: it is left out.

    Raises:
      ValueError: another line is damaged; names it.
    """
    path = Path(workdir) / file
    return read_objects(path, FIELDS)

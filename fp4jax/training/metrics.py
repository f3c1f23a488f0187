"""Metrics on disk: `metrics.jsonl`, one JSON object a step that was logged, and TensorBoard files in `tensorboard/`.

`health.jsonl` beside it has one object for every step with a health measurement: long lines, a list with one value a
layer under each name. TensorBoard shows these as means over the layers.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import tensorboardX

from fp4jax.data.json_files import read_objects

FILE = "metrics.jsonl"
HEALTH_FILE = "health.jsonl"


class MetricsWriter:
    """Writes a run's metrics; a context manager.

    A run that resumes after `start_step` steps first drops what an interrupted run had logged beyond them, so that
    every step stands in the file once.
    """

    def __init__(self, workdir: Path, start_step: int):
        self._workdir, self._health = workdir, workdir / HEALTH_FILE
        self._open(start_step)

    def _open(self, start_step: int) -> None:
        for path in (self._workdir / FILE, self._health):
            _drop_after(path, start_step)
        self._file = (self._workdir / FILE).open("a", encoding="utf-8")
        # purge_step makes TensorBoard forget the same steps.
        self._tensorboard = tensorboardX.SummaryWriter(str(self._workdir / "tensorboard"), purge_step=start_step + 1)

    def rewind(self, step: int) -> None:
        """Drops what was logged beyond `step`: the run goes back to it and takes another way."""
        self.__exit__()
        self._open(step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends {"step": step, **metrics}; on disk when this returns (TensorBoard's files follow within minutes)."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._tensorboard.add_scalar(name, value, step)

    def write_health(
        self, step: int, table: Mapping[str, Sequence[float | None]], summary: Mapping[str, float | None]
    ) -> None:
        """Appends {"step": step, **summary, **table} to `health.jsonl`; a None is written as null.

        table: "ratio/operand/linear layer" → one value a layer; summary: numbers of the whole model.
        """
        with self._health.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **summary, **table}) + "\n")
        for name, value in summary.items():
            if value is not None:
                self._tensorboard.add_scalar(f"health/{name}", value, step)
        for name, values in table.items():
            known = [value for value in values if value is not None]
            if known:
                self._tensorboard.add_scalar(f"health/{name}", sum(known) / len(known), step)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self._tensorboard.close()


def read_metrics(workdir: Path, file: str = FILE) -> list[dict]:
    """Returns the objects of `metrics.jsonl`, or of HEALTH_FILE, oldest first; none without a file.

    A last line that a killed run left unfinished is not a step that was logged: it is left out.

    Raises:
      ValueError: another line is damaged; names it.
    """
    path = Path(workdir) / file
    return read_objects(path, {"step": int})


def _drop_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [line for line in read_metrics(path.parent, path.name) if line["step"] <= step]
    replacement = path.with_suffix(".jsonl.tmp")
    replacement.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(replacement, path)

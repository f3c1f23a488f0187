"""Finished runs as numbers."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from fp4jax.comparison.plan import Run, read_json
from fp4jax.comparison.run import SUMMARIZED, SUMMARY
from fp4jax.data.json_files import check_fields, from_fields
from fp4jax.training.metrics import HEALTH_FILE, read_metrics


@dataclasses.dataclass(frozen=True)
class Record:
    """Attributes:
    steps, losses: of training, as logged, nats a token; one logged step is one batch.
    validation_steps, validation_losses: nats a token.
    diverged: why the run ended before its last step, or None.
    seconds_per_step: of the run's last process, without compilation, validation and saving; None if it was too short.
    tokens_per_step: real ones, of the last step.
    peak_memory_bytes: of the device, or of the process where the device keeps no count (`peak_memory_of`).
    health: the numbers of the last health measurement over all parameters; empty without one.
    """

    recipe: str
    seed: int
    steps: list[int]
    losses: list[float]
    validation_steps: list[int]
    validation_losses: list[float]
    diverged: str | None
    seconds_per_step: float | None
    tokens_per_step: float
    peak_memory_bytes: int
    peak_memory_of: str
    device: str
    jax: str
    health: dict[str, float | None]

    @property
    def validation_loss(self) -> float | None:
        """At the last step; None for a run that diverged."""
        return None if self.diverged else self.validation_losses[-1]


def load_record(run: Run) -> Record:
    """Reads a finished run.

    Raises:
      ValueError: it did not diverge, and its last step was not validated.
    """
    summary = read_json(run.folder / SUMMARY, SUMMARIZED)
    # A step whose update was skipped has no loss.
    lines = [line for line in read_metrics(run.folder) if "loss" in line]
    validations = [line for line in lines if "validation_loss" in line]
    for line in lines:
        _check_line(run, line)
    last = lines[-1] if lines else {"tokens": 0.0}
    if not summary["diverged"] and "validation_loss" not in last:
        raise ValueError(f"{run.folder} has no validation loss at its last step; delete the folder and run it again")
    speed = last.get("tokens_per_second")
    health = read_metrics(run.folder, HEALTH_FILE)
    return Record(
        recipe=run.recipe,
        seed=run.seed,
        steps=[line["step"] for line in lines],
        losses=[line["loss"] for line in lines],
        validation_steps=[line["step"] for line in validations],
        validation_losses=[line["validation_loss"] for line in validations],
        diverged=summary["diverged"],
        seconds_per_step=last["tokens"] / speed if speed else None,
        tokens_per_step=last["tokens"],
        health={k: v for k, v in health[-1].items() if k != "step" and "/" not in k} if health else {},
        **{key: summary[key] for key in ("peak_memory_bytes", "peak_memory_of", "device", "jax")},
    )


def _check_line(run: Run, line: dict[str, Any]) -> None:
    numbers = {"loss", "tokens", *({"tokens_per_second", "validation_loss"} & line.keys())}
    try:
        check_fields(line, dict.fromkeys(numbers, float))
    except ValueError as error:
        raise ValueError(f"{run.folder}, step {line['step']} of its metrics is damaged ({error})") from None


def to_json(records: Iterable[Record]) -> list[dict[str, Any]]:
    """What `from_json` reads back."""
    return [dataclasses.asdict(record) for record in records]


def from_json(values: Iterable[dict[str, Any]]) -> list[Record]:
    """The records that `to_json` wrote.

    Raises:
      ValueError: something else, also a run without a loss or with fewer of them than steps.
    """
    records = [from_fields(Record, value) for value in values]
    for record in records:
        pairs = ((record.steps, record.losses), (record.validation_steps, record.validation_losses))
        if any(len(steps) != len(losses) for steps, losses in pairs):
            raise ValueError(f"{record.recipe}, seed {record.seed} has not as many losses as steps")
        if not record.diverged and not record.validation_losses:
            raise ValueError(f"{record.recipe}, seed {record.seed} has no validation loss")
    return records


def smoothed(losses: list[float], weight: float = 0.9) -> Float[np.ndarray, " S"]:
    """Exponential moving average over logged steps, without the pull of its first value."""
    values, total, norm = [], 0.0, 0.0
    for loss in losses:
        total, norm = weight * total + (1 - weight) * loss, weight * norm + (1 - weight)
        values.append(total / norm)
    return np.array(values)


def common_steps(records: Iterable[Record]) -> Int[np.ndarray, " S"]:
    """Training steps that every record has logged."""
    return np.array(sorted(set.intersection(*(set(record.steps) for record in records))))

"""What a run does about a step that is not finite, a loss that spikes, and a checkpoint or log that is not written."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import ml_collections
from rich.console import Console

from fp4jax import distributed
from fp4jax.checkpoint import RERUN, StorageError
from fp4jax.data.pipeline import Dataset
from fp4jax.training.divergence import EventLog, SpikeDetector


class NonFiniteLossError(ValueError):
    """The loss or the gradient of a step is not finite; names the step.

    Attributes:
      step: that step.
      batch: the number of its batch.
      final: the run ends; otherwise it is to be rolled back.
    """

    def __init__(self, message: str, step: int, batch: int, final: bool):
        super().__init__(message)
        self.step, self.batch, self.final = step, batch, final


class Incidents:
    """Judges every step's numbers, and keeps the record. `events.jsonl` has it, and the console a line for each.

    No log that cannot be written ends a run.
    """

    def __init__(self, config: ml_collections.ConfigDict, workdir: Path, console: Console, data: Dataset, done: int):
        self._config, self._console, self._data = config, console, data
        self._events = EventLog(workdir, done, write=distributed.is_first())
        self._log_failed = False
        self.go_on(None)

    def go_on(self, loss_history: Mapping | None) -> None:
        """Spikes are told from here on by the losses that `loss_history` was taken after; None: by those to come."""
        self._spikes = SpikeDetector(self._config.divergence.spike, loss_history)

    def loss_history(self) -> dict[str, list[float]]:
        """What spikes are told by, for a checkpoint: a run that resumes finds those of one that was not disturbed."""
        return self._spikes.history()

    def judge(self, step: int, batch: int, values: Mapping[str, float], saved: Callable[[int], int | None]) -> None:
        """Takes the numbers of a step that read batch `batch`; saved(step): steps of the newest checkpoint.

        Raises:
          NonFiniteLossError: they are not finite, and the step was not skipped, or one too many was.
        """
        if math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
            if self._spikes.is_spike(values["loss"]):
                documents = self._record("spike", step, step - 1, batch, values)
                self._console.print(f"step {step:,}: loss {values['loss']:.4f} is a spike; read {documents}")
            return
        policy = self._config.on_nonfinite
        if policy == "skip" and self._events.count("skipped") < self._config.divergence.max_events:
            documents = self._record("skipped", step, step - 1, batch, values)
            self._console.print(f"step {step:,}: {_numbers(values)}; update skipped; read {documents}")
            return
        if policy == "rollback" and self._events.count("rollback") < self._config.divergence.max_events:
            raise NonFiniteLossError(f"step {step}: {_numbers(values)}", step, batch, final=False)
        saved = saved(step)
        self._record("stopped", step, step - 1, batch, values)
        limit = "" if policy == "stop" else f" after divergence.max_events={self._config.divergence.max_events}"
        raise NonFiniteLossError(
            f"step {step}: {_numbers(values)} at learning rate {values['learning_rate']:.3g}; stopped{limit}, "
            f"{'nothing' if saved is None else f'step {saved}'} is saved; "
            "try a smaller --config.optimizer.learning_rate or more --config.optimizer.warmup_steps",
            step,
            batch,
            final=True,
        )

    def rolled_back(self, error: NonFiniteLossError, to: int) -> None:
        """The run goes on after `to` steps, with the batch after the one that was not finite."""
        documents = self._documents(error.batch)
        skipped = error.step - to
        self._add("rollback", error.step, to, {"batch": error.batch, "batches": skipped, "documents": documents})
        self._console.print(
            f"{error}; back to step {to:,}, and past {skipped:,} batch{'es' if skipped > 1 else ''}; read {documents}"
        )

    def next_save(self, after: int) -> int:
        """The first step after step `after` that is saved in any case."""
        every = self._config.checkpoint.every
        return min(after // every * every + every, self._config.steps)

    def save_failed(self, step: int, error: StorageError, following: int | None) -> None:
        """Says where it is seen that a checkpoint is missing.

        following: the step that is saved next; None where it is not known that training goes on.
        """
        count = self._add("save_failed", step, step - 1, {"error": str(error)})
        goes_on = "" if following is None else f"; training goes on and saves again at step {following:,}"
        self._warn(f"{str(error).removesuffix(RERUN)}{goes_on} ({count} failed so far)")

    @contextmanager
    def logging(self, step: int) -> Iterator[None]:
        """Around what writes a log: an OSError is reported, once until all is written; what is unwritten waits."""
        try:
            yield
            self._events.flush()
        except OSError as error:
            if not self._log_failed:
                self._warn(f"step {step:,}: the logs cannot be written ({error.strerror}) and wait; training goes on")
            self._log_failed = True
        else:
            self._log_failed = False

    def close(self) -> None:
        """The end of the run: events that still wait are written, or lost."""
        self._events.close()

    def _warn(self, message: str) -> None:
        self._console.print(f"WARNING: {message}", style="bold red", markup=False)

    def counts(self) -> dict[str, float]:
        """How many there were of each kind that can go on; those that there were none of are left out."""
        counts = {name: float(self._events.count(kind)) for kind, name in _METRICS.items()}
        return {name: count for name, count in counts.items() if count}

    def _record(self, event: str, step: int, after: int, batch: int, values: Mapping[str, float]) -> str:
        documents = self._documents(batch)
        numbers = {name: repr(values[name]) for name in ("loss", "grad_norm")}
        self._add(event, step, after, {"batch": batch, "documents": documents, **numbers})
        return documents

    def _add(self, event: str, step: int, after: int, details: Mapping[str, object]) -> int:
        with self.logging(step):
            return self._events.add(event, step, after, details)

    def _documents(self, batch: int) -> str:
        return self._data.documents_in_batch(batch)


_METRICS = {
    "skipped": "skipped_steps",
    "rollback": "rollbacks",
    "spike": "loss_spikes",
    "save_failed": "failed_saves",
}


def _numbers(values: Mapping[str, float]) -> str:
    return f"loss {values['loss']:.6g}, gradient norm {values['grad_norm']:.6g}"

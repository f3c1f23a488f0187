"""When training diverges: what a step that is not finite does, losses that spike, and the record of both.

A skipped step leaves parameters and moments as they were; its number, its learning rate and its data are used up. A
rollback restores a checkpoint and passes over the data from there up to the step that was not finite: PaLM's remedy
(arXiv 2204.02311, section 5.1), which skipped 200 to 500 batches after going back about 100 steps.
"""

import collections
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, PyTree

from fp4jax.data.json_files import read_objects
from fp4jax.training.log_files import JsonLog

FILE = "events.jsonl"
FIELDS = {"event": str, "after": int}

NEAR = 10
WINDOW = 100
LEAST = 20
"""Steps that a loss is compared with, see `SpikeDetector`, and those that there must have been."""


def finite_or_former(
    loss: Float32[Array, ""], grad_norm: Float32[Array, ""], new: PyTree, former: PyTree
) -> tuple[PyTree, Float32[Array, ""]]:
    """Returns (`new`, 0) where loss and gradient norm are finite, else (`former`, 1), within a compiled step.

    new, former: (parameters, optimizer state) after and before the update. The schedule of the learning rate takes its
    step in any case, so that it stays that of the run's steps.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

    def choose(new: PyTree, former: PyTree) -> PyTree:
        if isinstance(new, optax.ScaleByScheduleState):
            return new
        return jnp.where(finite, new, former)

    chosen = jax.tree.map(choose, new, former, is_leaf=lambda node: isinstance(node, optax.ScaleByScheduleState))
    return chosen, 1 - finite.astype(jnp.float32)


class SpikeDetector:
    """Says which losses stand out from the ones before them.

    A loss is compared with the median of the last NEAR, which follows the curve's fall, and its distance from it with
    the last WINDOW such distances: their median absolute deviation, scaled to a normal distribution's standard
    deviation, which the spikes among them do not widen.

    Args:
      deviations: how many of these make a spike (0: nothing is one).
      history: another detector's, to go on as that one would; None begins anew.
    """

    def __init__(self, deviations: float, history: Mapping[str, Sequence[float]] | None = None):
        self._deviations = deviations
        history = history or {"losses": (), "distances": ()}
        self._losses = collections.deque(history["losses"], maxlen=NEAR)
        self._distances = collections.deque(history["distances"], maxlen=WINDOW)

    def history(self) -> dict[str, list[float]]:
        """What the next loss will be compared with, for JSON, which keeps every bit."""
        return {"losses": list(self._losses), "distances": list(self._distances)}

    def is_spike(self, loss: float) -> bool:
        """Takes the next loss, which is finite."""
        spike = False
        if self._losses:
            middle = statistics.median(self._losses)
            distance, usual = loss - middle, statistics.median(self._distances or [0.0])
            if self._deviations and len(self._distances) >= LEAST:
                spread = 1.4826 * statistics.median(abs(value - usual) for value in self._distances)
                spike = distance - usual > self._deviations * max(spread, 1e-6 * abs(middle))
            self._distances.append(distance)
        self._losses.append(loss)
        return spike


class EventLog:
    """`events.jsonl` in the workdir: skipped steps, rollbacks, spikes, failed saves, and a count of each kind.

    Every event says after how many steps of the state it took effect (`after`). A run that resumes from `start_step`
    drops those that it is about to repeat, so that each stands in the file once and the counts are those of a run
    that was never interrupted.
    """

    def __init__(self, workdir: Path, start_step: int, write: bool = True):
        self._log = JsonLog(workdir / FILE, FIELDS) if write else None
        kept = [event for event in read_events(workdir) if event["after"] < start_step]
        self._counts = collections.Counter(event["event"] for event in kept)
        if self._log:
            self._log.keep(lambda event: event["after"] < start_step)

    def add(self, event: str, step: int, after: int, details: Mapping[str, object]) -> int:
        """Takes an event of step `step`; returns how many of its kind there have been."""
        self._counts[event] += 1
        if self._log:
            self._log.add({"event": event, "step": step, "after": after, **details})
        return self._counts[event]

    def flush(self) -> None:
        """Writes the events that were added; those that a full disk does not take wait for the next call.

        Raises:
          OSError: it did not take them.
        """
        if self._log:
            self._log.flush()

    def close(self) -> None:
        """Flushes; events that are lost are a warning on stderr."""
        if self._log:
            self._log.close()

    def count(self, *events: str) -> int:
        """How many there have been of these kinds."""
        return sum(self._counts[event] for event in events)


def read_events(workdir: Path) -> list[dict]:
    """The objects of `events.jsonl`, oldest first; a line that a killed run left unfinished is left out.

    Raises:
      ValueError: another line is damaged; names it.
    """
    return read_objects(Path(workdir) / FILE, FIELDS)

"""The training run: data, state, steps, validation, checkpoints. Rerunning it in the same workdir continues it.

What may go wrong in it has files of its own: `preemption.py`, `incidents.py`, `watchdog.py`. While step t runs on the
device the host reads the metrics of step t-1, so the device never waits for a log line. Before a state is saved its own
step's metrics are read: a state whose loss was not finite is never written.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import jax
import ml_collections
import optax
from jax.sharding import Mesh
from rich.console import Console

from fp4jax import distributed, models
from fp4jax.checkpoint import (
    Checkpointer,
    StorageError,
    check_same_run,
    check_space,
    prepare_workdir,
    set_aside_damaged,
)
from fp4jax.config_checks import validate
from fp4jax.data.pipeline import BatchIterator, Dataset
from fp4jax.evaluation import EvaluationResult, evaluate
from fp4jax.locking import locked
from fp4jax.training.compilation import enable_compilation_cache
from fp4jax.training.console import ProgressBar, make_console, start_table
from fp4jax.training.estimate import StepTimer, duration, estimated_step_seconds, hint
from fp4jax.training.health import HealthMonitor
from fp4jax.training.incidents import Incidents, NonFiniteLossError
from fp4jax.training.mesh import make_mesh, put_batch
from fp4jax.training.metrics import MetricsWriter
from fp4jax.training.optimizer import make_optimizer
from fp4jax.training.preemption import Agreement, Preempted, StopAt, listening
from fp4jax.training.schedule import ByPhase, Phase, phase_at, phases, settle
from fp4jax.training.shares import open_share
from fp4jax.training.state import ModelTemplate, TrainState, create_state, model_template, sharded_abstract_state
from fp4jax.training.step import Metrics, make_loss_step, make_train_step
from fp4jax.training.timing import TimeAccount
from fp4jax.training.watchdog import Watchdog

LOCK = "lock"
"""File of the workdir that the process which trains in it has locked."""

LOSS_HISTORY = "loss_history"
"""Beside the data position in a checkpoint."""

STEPS_BEFORE_MEASURED_ESTIMATE = 3


def train(
    config: ml_collections.ConfigDict,
    workdir: str | Path,
    console: Console | None = None,
    allow_config_change: bool = False,
) -> None:
    """Trains to `config.steps`, from the workdir's newest checkpoint if it has one.

    Writes `checkpoints/`, `metrics.jsonl`, `events.jsonl`, `health.jsonl` if asked for, and `tensorboard/` in the
    workdir. A run that is complete is left as it is. With `allow_config_change` a run goes on with another
    configuration, as far as the state and the data position fit it.

    Raises:
      ConfigError, DataError, ValueError: a setting that cannot run, in any phase of the schedule.
      InUseError: another process trains in the workdir.
      CheckpointError: the workdir belongs to a run with another configuration.
      StorageError: the workdir cannot be written, or is full.
      NonFiniteLossError: training diverged.
      ProcessesError: of several processes, one has another workdir.
      Preempted: SIGTERM or SIGINT came; the state is saved.
    """
    console = console or make_console()
    validate(config, jax.device_count())
    config = settle(config)
    workdir = prepare_workdir(workdir)
    distributed.check_shared(workdir)
    in_use = f"is training in {workdir}; wait for it, stop it, or choose another --workdir"
    # Of several processes of one run the first holds the lock.
    with locked(workdir / LOCK, in_use) if distributed.is_first() else contextlib.nullcontext():
        _train_in(workdir, config, console, allow_config_change)


def _train_in(workdir: Path, config: ml_collections.ConfigDict, console: Console, allow_config_change: bool) -> None:
    done = check_same_run(workdir, config, allow_config_change)
    if done >= config.steps:
        console.print(f"{workdir} is done: {done:,} of {config.steps:,} steps. A larger --config.steps continues it.")
        return
    enable_compilation_cache()
    if done:
        console.print(
            f"continuing {workdir} after step {done:,}; the learning-rate schedule is that of {config.steps:,} steps"
            f"{', and so are the phases' if config.schedule else ''}"
        )
    run = _prepare(config, workdir, console)
    run.describe(done)
    set_aside_damaged(workdir, done)
    # Weights that cannot be continued are refused before anything is written.
    first_state = None if done else run.first_state()
    with (
        Checkpointer(workdir, **run.checkpoint_options()) as checkpointer,
        MetricsWriter(workdir, done) if distributed.is_first() else contextlib.nullcontext() as writer,
        contextlib.closing(Incidents(config, workdir, console, run.training_data, done)) as incidents,
    ):
        _Loop(run, checkpointer, writer, incidents, first_state).run(done)
    console.print(f"done: {config.steps:,} steps, checkpoint and metrics in {workdir}")


@dataclass(frozen=True)
class _Run:
    """What stays the same throughout a run."""

    config: ml_collections.ConfigDict
    workdir: Path
    console: Console
    mesh: Mesh
    template: ModelTemplate
    optimizer: optax.GradientTransformation
    training_data: Dataset
    validation_data: Dataset
    target: TrainState

    @functools.cached_property
    def phases(self) -> tuple[Phase, ...]:
        return phases(self.config)

    def first_state(self) -> TrainState:
        """Of a run that begins."""
        return create_state(self.config, self.template, self.optimizer, self.mesh)

    def describe(self, done: int) -> None:
        """Prints the data, the table, and what to change if it will take long."""
        config = self.config
        for line in self.training_data.describe(config.steps * config.batch_size * config.seq_len):
            self.console.print(line)
        parameters = *models.parameter_counts(config), models.active_parameters(config)
        seconds = estimated_step_seconds(config, parameters[2], self.mesh.size)
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.target))
        self.console.print(start_table(config, self.phases, self.mesh, parameters, size, done, seconds))
        self.print_hint(seconds * (config.steps - done))

    def print_hint(self, seconds: float) -> None:
        """Prints what to change, if `seconds` is over an hour."""
        advice = hint(self.config, seconds)
        if advice:
            self.console.print(advice)

    def checkpoint_options(self) -> dict:
        """The Checkpointer's arguments."""
        largest = max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.target))
        settings = self.config.checkpoint
        kept = {"keep": settings.keep, "keep_every": settings.keep_every}
        return {**kept, "asynchronous": settings.asynchronous, "largest_array": largest}


def _prepare(config: ml_collections.ConfigDict, workdir: Path, console: Console) -> _Run:
    mesh = make_mesh(config.mesh)
    template = model_template(config)
    optimizer = make_optimizer(config, template.logical_axes)
    target = sharded_abstract_state(template, optimizer, mesh)
    check_space(workdir, target)
    training_data, validation_data = (open_share(config, split, mesh) for split in ("train", "validation"))
    training_data.check_vocabulary(config.model.vocab_size)
    return _Run(config, workdir, console, mesh, template, optimizer, training_data, validation_data, target)


@dataclass
class _Running:
    """A step that was given to the device: its batch's number, and its metrics before and after they were read."""

    step: int
    batch: int
    metrics: Metrics
    values: dict[str, float] | None = None


@dataclass
class _Loop:
    """The steps themselves."""

    static: _Run
    checkpointer: Checkpointer
    writer: MetricsWriter | None
    incidents: Incidents
    first_state: TrainState | None = None
    timer: StepTimer = field(default_factory=StepTimer)

    def __post_init__(self) -> None:
        config = self.static.config
        self.account = TimeAccount(config.watchdog.slow_step)
        self.watchdog = Watchdog(config.watchdog.timeout)
        self.programs = ByPhase(config, self._compiled)

    def run(self, done: int) -> None:
        """All steps; goes back where `on_nonfinite` says so."""
        config = self.static.config
        with (
            ProgressBar(self.static.console, config.steps, done, config.log.progress) as bar,
            self.watchdog,
            listening() as request,
        ):
            self.watchdog.beat("the state that the run begins with")
            state, position = self._first_state(done)
            stop = Agreement(request, self.static.mesh) if distributed.several() else request.asked
            while (failure := self._run_from(done, state, position, bar, stop)) is not None:
                # The state that is not finite must be gone before another is restored.
                del state
                done, state, position = self._roll_back(failure)

    def _run_from(
        self, done: int, state: TrainState, position: dict | None, bar: ProgressBar, stop: StopAt
    ) -> NonFiniteLossError | None:
        """The steps after `done`; returns what is to be rolled back, None when all are done."""
        try:
            with contextlib.closing(self.static.training_data.batches(position)) as batches:
                self._steps(done, state, batches, bar, stop)
        except NonFiniteLossError as error:
            if error.final:
                raise
            return error.with_traceback(None)
        return None

    def _steps(self, done: int, state: TrainState, batches: BatchIterator, bar: ProgressBar, stop: StopAt) -> None:
        static, config = self.static, self.static.config
        passed_over = batches.get_state()["next_batch"] - done
        running: _Running | None = None
        for step in range(done + 1, config.steps + 1):
            self.watchdog.beat(f"step {step:,}")
            phase = phase_at(static.phases, step)
            if step in (done + 1, phase.first):
                self._start_phase(phase)
            train_step, loss_step, health = self.programs.at(step)
            with self.account.spent_on("data", within_step=True):
                batch = put_batch(next(batches), static.mesh)
            if health.due(step):
                if running:
                    self._report(running, bar)
                    running = None
                with self.account.spent_on("health"):
                    self.timer.exclude(health.measure(step, state, batch))
            state, metrics = train_step(state, batch)
            if running:
                self._report(running, bar)
            running = _Running(step, step - 1 + passed_over, metrics)
            stopping = stop()
            validates = step % config.evaluation.every == 0 or step == config.steps
            saves = step % config.checkpoint.every == 0 or step == config.steps or stopping is not None
            if validates or saves or step == phase.last:
                self._wait_for_step(running)
                start = time.perf_counter()
                result = self._validate(loss_step, state) if validates else None
                self.timer.exclude(time.perf_counter() - start)
                # Before the save: what a run that is killed in between has written is dropped when it goes on, and
                # what it has not written would be missing for good.
                self._report(running, bar, result)
                running = None
                if saves:
                    start = time.perf_counter()
                    self._save(step, state, batches, last=step == config.steps or stopping is not None)
                    self.timer.exclude(time.perf_counter() - start)
            if stopping is not None:
                raise Preempted(stopping, step)

    def _compiled(self, config: ml_collections.ConfigDict) -> tuple[Callable, Callable, HealthMonitor]:
        """The steps of one phase."""
        static, template = self.static, model_template(config)
        train_step = make_train_step(config, template, static.optimizer, static.mesh)
        health = HealthMonitor(config, template, static.mesh, self._write_health if self.writer else None)
        return train_step, make_loss_step(config, template, static.mesh), health

    def _start_phase(self, phase: Phase) -> None:
        """Another recipe takes another time a step: the measurement begins anew."""
        self.timer = StepTimer()
        if len(self.static.phases) > 1:
            number = f"phase {phase.number} of {len(self.static.phases)}"
            self.static.console.print(f"{number}, {phase}")

    def _first_state(self, done: int) -> tuple[TrainState, dict | None]:
        static = self.static
        if not done:
            self.incidents.go_on(None)
            # A rollback to the beginning makes it once more: the step that was given the first one has used it up.
            state, self.first_state = self.first_state or static.first_state(), None
            return state, None
        rest = {"step": static.target.step, "opt_state": static.target.opt_state}
        params, rest, position = self.checkpointer.restore(static.target.params, rest, step=done)
        self.incidents.go_on(position.pop(LOSS_HISTORY, None))  # one of an earlier version has none
        return TrainState(rest["step"], params, rest["opt_state"]), position

    def _roll_back(self, failure: NonFiniteLossError) -> tuple[int, TrainState, dict]:
        """Steps, state and data position to go on from: a former checkpoint's, past the data that was read since."""
        self.watchdog.beat("a rollback")
        self._check_saves(failure.step, self.checkpointer.wait)
        latest = failure.step - self.static.config.divergence.rollback_steps
        done = self.checkpointer.newest_until(latest)
        state, position = self._first_state(done)
        if position is None:
            with contextlib.closing(self.static.training_data.batches()) as batches:
                position = batches.get_state()
        self.checkpointer.delete_after(done)
        if self.writer:
            self.writer.rewind(done)
        self.incidents.rolled_back(failure, done)
        return done, state, position | {"next_batch": failure.batch + 1}

    def _save(self, step: int, state: TrainState, batches: BatchIterator, last: bool) -> None:
        """A save that fails, this one or the one before it, does not end the run, unless it is the `last`."""
        self.watchdog.beat(f"the checkpoint of step {step:,}")
        rest = {"step": state.step, "opt_state": state.opt_state}
        position = batches.get_state() | {LOSS_HISTORY: self.incidents.loss_history()}
        with self.account.spent_on("checkpoint"):
            self._check_saves(step, self.checkpointer.wait, following=step)
            try:
                self.checkpointer.save(step, state.params, rest, position, self.static.config)
                if last:
                    self.checkpointer.wait()
            except StorageError as error:
                if last:
                    raise
                self.incidents.save_failed(step, error, self.incidents.next_save(step))

    def _check_saves(self, step: int, check: Callable[[], None], following: int | None = None) -> None:
        try:
            check()
        except StorageError as error:
            self.incidents.save_failed(step, error, following)

    def _validate(self, loss_step: object, state: TrainState) -> EvaluationResult:
        static = self.static
        with contextlib.closing(static.validation_data.batches()) as batches, self.account.spent_on("validation"):
            on_devices = (put_batch(batch, static.mesh) for batch in map(self._beat_validation, batches))
            return evaluate(loss_step, state.params, on_devices, static.config.evaluation.batches)

    def _beat_validation[T](self, batch: T) -> T:
        self.watchdog.beat("validation")
        return batch

    def _wait_for_step(self, running: _Running) -> dict[str, float]:
        """Reads a step's metrics, which waits for it; once, they are judged."""
        if running.values is None:
            running.values = {name: float(value) for name, value in jax.device_get(running.metrics).items()}
            self.incidents.judge(running.step, running.batch, running.values, self._saved)
        return running.values

    def _saved(self, step: int) -> int | None:
        """Steps of the newest checkpoint, when the save that is being written has come to its end; step: which asks."""
        self._check_saves(step, self.checkpointer.wait)
        return self.checkpointer.latest_step()

    def _report(self, running: _Running, bar: ProgressBar, result: EvaluationResult | None = None) -> None:
        config, step = self.static.config, running.step
        values = dict(self._wait_for_step(running))
        values["phase"] = float(phase_at(self.static.phases, step).number)
        self.timer.step_done()
        slow = self.account.step_done()
        if slow:
            self.static.console.print(f"step {step:,} took {duration(slow)}, far longer than those before it")
        seconds = self.timer.seconds_per_step
        speed = left = None
        if seconds:
            speed, left = values["tokens"] / seconds, seconds * (config.steps - step)
            values["tokens_per_second"] = speed
        if result:
            values |= {"validation_loss": result.loss, "validation_perplexity": result.perplexity}
        bar.update(step, values["loss"], speed, left)
        if result or step == 1 or step % config.log.every == 0 or step == config.steps:
            self._check_saves(step, self.checkpointer.check, self.incidents.next_save(step - 1))
            bar.line(step, values["loss"], speed, left)
            self._write(step, values)
        if result:
            self._print_validation(step, result)
        if self.timer.measured_steps == STEPS_BEFORE_MEASURED_ESTIMATE:
            self.static.console.print(f"measured: {duration(seconds)} a step, {duration(left)} left")
            self.static.print_hint(left)

    def _write(self, step: int, values: dict[str, float]) -> None:
        values = values | self.incidents.counts() | self.account.take()
        if self.writer:
            with self.incidents.logging(step):
                self.writer.write(step, values)

    def _write_health(self, step: int, *numbers: Mapping) -> None:
        with self.incidents.logging(step):
            self.writer.write_health(step, *numbers)

    def _print_validation(self, step: int, result: EvaluationResult) -> None:
        below = self.static.training_data.stats.unigram_entropy - result.loss
        self.static.console.print(
            f"step {step:,}: validation loss {result.loss:.4f}, perplexity {result.perplexity:.2f}, "
            f"{result.tokens:,} tokens; {abs(below):.3f} nats {'below' if below > 0 else 'above'} the unigram entropy"
        )

"""What a run does when things go wrong in it: numbers that are not finite, a signal, a damaged file."""

import io
import os
import signal
import time
from unittest import mock

import jax
import numpy as np
import pytest
from rich.console import Console

from fp4jax.checkpoint import RERUN, Checkpointer, StorageError
from fp4jax.data.pipeline import BatchIterator, Dataset
from fp4jax.recipes import list_recipes
from fp4jax.training import divergence, loop
from fp4jax.training.divergence import read_events
from fp4jax.training.health import HealthMonitor
from fp4jax.training.incidents import Incidents, NonFiniteLossError
from fp4jax.training.metrics import HEALTH_FILE, read_metrics
from fp4jax.training.preemption import SIGNALS, Preempted
from tests.training.test_loop import deterministic, final_state, run

pytestmark = pytest.mark.standard_promotion


@pytest.fixture
def poison(monkeypatch):
    """poison(2, 5): the batches with these numbers hold a NaN, whenever they are read."""

    def poison(*numbers):
        original = BatchIterator.__next__

        def next_batch(self):
            number = self.get_state()["next_batch"]
            batch = original(self)
            if self._sequence["split"] == "train" and number in numbers:
                batch = batch | {"loss_mask": np.full_like(batch["loss_mask"], np.nan)}
            return batch

        monkeypatch.setattr(BatchIterator, "__next__", next_batch)

    return poison


def test_default_stops_and_names_the_documents(config, tmp_path, poison):
    poison(2)
    with pytest.raises(NonFiniteLossError, match=r"^step 3: loss nan, .*; stopped, step 2 is saved"):
        run(config, tmp_path)
    (event,) = read_events(tmp_path)
    assert (event["event"], event["step"], event["batch"]) == ("stopped", 3, 2)
    assert event["documents"].startswith(f"{config.data.source}: documents ")


@pytest.mark.slow
def test_skipped_steps_leave_the_state_and_are_counted(config, tmp_path, poison):
    config.on_nonfinite, config.steps = "skip", 6
    whole = run(config, tmp_path / "clean")
    assert "update skipped" not in whole
    poison(2, 3)
    output = run(config, tmp_path / "skipped")
    assert "step 3: loss nan" in output and "update skipped; read" in output
    assert [event["step"] for event in read_events(tmp_path / "skipped")] == [3, 4]
    lines = read_metrics(tmp_path / "skipped")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert "loss" not in lines[2] and lines[2]["skipped"] == 1.0 and lines[5]["skipped_steps"] == 2.0
    clean = read_metrics(tmp_path / "clean")
    assert [line["learning_rate"] for line in lines] == [line["learning_rate"] for line in clean]
    for leaf in jax.tree.leaves(final_state(config, tmp_path / "skipped")[:2]):
        assert np.isfinite(leaf).all()
    config.divergence.max_events = 1
    with pytest.raises(NonFiniteLossError, match=r"step 4: .* stopped after divergence.max_events=1"):
        run(config, tmp_path / "limited")


@pytest.mark.slow
def test_rollback_passes_over_the_data_and_resumes_exactly(config, tmp_path, poison, monkeypatch):
    config.on_nonfinite, config.steps, config.evaluation.every = "rollback", 7, 7
    poison(3, 6)
    output = run(config, tmp_path / "whole")
    assert "step 4: loss nan" in output and "back to step 2, and past 2 batches; read" in output
    events = [(event["step"], event["after"], event["batch"]) for event in read_events(tmp_path / "whole")]
    # Steps 3 and 4 are done again with batches 4 and 5; step 5 finds batch 6.
    assert events == [(4, 2, 3), (5, 4, 6)]
    lines = read_metrics(tmp_path / "whole")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7] and lines[-1]["rollbacks"] == 2.0
    position = final_state(config, tmp_path / "whole")[2]
    assert position["next_batch"] == 7 + 1 + 2

    # The same run, stopped after step 6 and started again.
    with monkeypatch.context() as patch:
        signal_at(patch, 5, signal.SIGTERM)
        with pytest.raises(Preempted, match="stopped by SIGTERM"):
            run(config, tmp_path / "stopped")
    run(config, tmp_path / "stopped")
    same(config, tmp_path, "whole", "stopped")
    assert read_events(tmp_path / "stopped") == read_events(tmp_path / "whole")


def signal_at(monkeypatch, batch, signum):
    """The signal comes while batch number `batch` is read."""
    original = BatchIterator.__next__

    def next_batch(self):
        if self._sequence["split"] == "train" and self.get_state()["next_batch"] == batch:
            os.kill(os.getpid(), signum)
        return original(self)

    monkeypatch.setattr(BatchIterator, "__next__", next_batch)


def same(config, folder, *names):
    whole, other = (final_state(config, folder / name) for name in names)
    jax.tree.map(np.testing.assert_array_equal, whole, other)
    assert deterministic(folder / names[0]) == deterministic(folder / names[1])


def test_a_step_that_validates_does_so_before_a_signal_ends_the_run(config, tmp_path, monkeypatch):
    config.evaluation.every = 1
    signal_at(monkeypatch, 1, signal.SIGTERM)
    with pytest.raises(Preempted) as caught:
        run(config, tmp_path)
    lines = read_metrics(tmp_path)
    assert f"step {len(lines)} is saved" in str(caught.value)
    assert all("validation_loss" in line for line in lines)


EXACT = {
    "validation": {"evaluation.every": 1},
    "accumulation": {"microbatches": 2},
    "phases": {"schedule": "bf16:50%,run:100%"},
    "every product rounded stochastically": {"recipe": "nvfp4+sr_all", "model.dtype": "bfloat16"},
} | {name: {"recipe": name} for name in list_recipes()}


@pytest.mark.slow
@pytest.mark.parametrize("changes", EXACT.values(), ids=EXACT)
def test_run_that_is_stopped_by_a_signal_resumes_exactly(config, tmp_path, monkeypatch, changes):
    config.recipe, config.checkpoint.every = "nvfp4", 3
    config.update_from_flattened_dict(changes)
    run(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        # The step that read batch 1 is the second; a third one may be on its way when the signal is seen.
        signal_at(patch, 1, signal.SIGINT)
        with pytest.raises(Preempted) as caught:
            run(config, tmp_path / "stopped")
    assert caught.value.exit_code == 130
    run(config, tmp_path / "stopped")
    same(config, tmp_path, "whole", "stopped")


@pytest.mark.slow
def test_a_run_that_resumes_finds_the_spikes_of_one_that_was_not_disturbed(config, tmp_path, monkeypatch):
    monkeypatch.setattr(divergence, "LEAST", 2)
    config.steps, config.divergence.spike, config.optimizer.learning_rate = 10, 0.01, 0.03
    run(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        signal_at(patch, 4, signal.SIGTERM)
        with pytest.raises(Preempted):
            run(config, tmp_path / "stopped")
    run(config, tmp_path / "stopped")
    same(config, tmp_path, "whole", "stopped")
    events = read_events(tmp_path / "whole")
    assert {event["event"] for event in events} == {"spike"} and any(6 < event["step"] < 10 for event in events)
    assert read_events(tmp_path / "stopped") == events


@pytest.mark.slow
def test_damaged_checkpoint_is_set_aside_and_the_run_ends_in_the_same_bits(config, tmp_path, capsys):
    run(config, tmp_path / "whole")
    config.steps = 4
    run(config, tmp_path / "damaged")
    folder = tmp_path / "damaged" / "checkpoints" / "4"
    path = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert "after step 2" in run(config, tmp_path / "damaged")
    assert "checkpoints/4 is damaged" in capsys.readouterr().err
    assert (tmp_path / "damaged" / "damaged_checkpoints" / "4").is_dir()
    same(config, tmp_path, "whole", "damaged")


@pytest.mark.parametrize("health", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_disk_that_is_full_for_a_while_does_not_end_the_run(config, tmp_path, monkeypatch, health):
    config.checkpoint.every, config.health.every = 1, health
    logs = [tmp_path / name for name in ("events.jsonl", "health.jsonl")[: 2 if health else 1]]
    save = Checkpointer.save

    def save_unless_full(self, step, *arguments):
        for log in logs:
            if step == 1:
                log.unlink(missing_ok=True)
                log.symlink_to("/dev/full")
            if step == 3:
                log.unlink()
        if step < 3:
            raise StorageError(f"the checkpoint of step {step} could not be written" + RERUN)
        save(self, step, *arguments)

    monkeypatch.setattr(Checkpointer, "save", save_unless_full)
    output = run(config, tmp_path)
    warnings = [line for line in output.splitlines() if line.startswith("WARNING")]
    assert warnings == [
        "WARNING: step 1: the logs cannot be written (No space left on device) and wait; training goes on",
        "WARNING: the checkpoint of step 1 could not be written; training goes on and saves again at step 2 "
        "(1 failed so far)",
        "WARNING: the checkpoint of step 2 could not be written; training goes on and saves again at step 3 "
        "(2 failed so far)",
    ]
    assert [(event["event"], event["step"]) for event in read_events(tmp_path)] == [
        ("save_failed", 1),
        ("save_failed", 2),
    ]
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert [line["step"] for line in read_metrics(tmp_path, HEALTH_FILE)] == ([2, 4] if health else [])
    assert final_state(config, tmp_path)[2]["next_batch"] == 4


def test_a_failed_save_is_told_with_the_step_of_the_next_one_if_there_is_one(config, tmp_path):
    console = Console(file=io.StringIO(), width=200)
    incidents = Incidents(config, tmp_path, console, mock.create_autospec(Dataset, instance=True), 0)
    assert [incidents.next_save(after) for after in (0, 1, 2, 3)] == [2, 2, 4, 4]
    incidents.save_failed(3, StorageError("full" + RERUN), 4)
    incidents.save_failed(3, StorageError("full" + RERUN), None)
    assert console.file.getvalue().splitlines() == [
        "WARNING: full; training goes on and saves again at step 4 (1 failed so far)",
        "WARNING: full (2 failed so far)",
    ]


def test_the_first_state_is_made_under_watchdog_and_signals(config, tmp_path, monkeypatch):
    original, found = loop._Loop._first_state, []

    def first_state(self, done):
        handled = all(signal.getsignal(signum) is not former[signum] for signum in SIGNALS)
        found.append((done, self.watchdog._doing, handled))
        return original(self, done)

    former = {signum: signal.getsignal(signum) for signum in SIGNALS}
    monkeypatch.setattr(loop._Loop, "_first_state", first_state)
    config.steps = 2
    run(config, tmp_path)
    config.steps = 3
    run(config, tmp_path)
    assert found == [(done, "the state that the run begins with", True) for done in (0, 2)]


def test_measuring_health_makes_no_step_long(config, tmp_path, monkeypatch):
    def measure(self, step, state, batch):
        time.sleep(2 if step == 4 else 0)
        return 2.0 if step == 4 else 0.0

    monkeypatch.setattr(HealthMonitor, "measure", measure)
    config.health.every = 1
    run(config, tmp_path)
    line = read_metrics(tmp_path)[-1]
    assert line["step"] == 4 and line["longest_step_seconds"] < 2


def test_metrics_say_where_the_time_goes(config, tmp_path):
    config.steps = 3
    run(config, tmp_path)
    lines = read_metrics(tmp_path)
    for line in lines:
        assert 0 <= line["data_wait"] < 1 and line["slow_steps"] == 0.0
        assert line["longest_step_seconds"] > 0
    # A step's line is written before its save.
    assert [line["checkpoint_seconds"] > 0 for line in lines] == [False, False, True]

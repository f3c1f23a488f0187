import os
import time

import pytest

from fp4jax.training.timing import TimeAccount
from fp4jax.training.watchdog import HANGING, Watchdog


@pytest.fixture
def exits(monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    return codes


def test_silence_ends_the_process_and_says_where(exits, capfd):
    with Watchdog(0.2) as watchdog:
        watchdog.beat("step 7")
        time.sleep(0.6)
    assert exits and set(exits) == {HANGING}
    first = capfd.readouterr().err.splitlines()[0]
    assert "error: hanging: nothing done for" in first and "watchdog.timeout=0.2) in step 7" in first


def test_beats_and_a_timeout_of_zero_keep_it_quiet(exits):
    with Watchdog(1.5) as watchdog:
        for _ in range(20):
            time.sleep(0.1)
            watchdog.beat("a step")
    with Watchdog(0.0):
        time.sleep(0.1)
    time.sleep(1.6)  # a watchdog that was left does not bark
    assert exits == []


def test_time_account(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    account = TimeAccount(slow_step=3.0)

    def step(seconds, data=0.0, checkpoint=0.0):
        with account.spent_on("data", within_step=True):
            now[0] += data
        with account.spent_on("checkpoint"):
            now[0] += checkpoint
        now[0] += seconds - data
        return account.step_done()

    assert [step(1.0, data=0.25) for _ in range(8)] == [None] * 8
    assert step(2.9) is None
    assert step(3.5) == 3.5
    assert step(1.0, checkpoint=30.0) is None
    metrics = account.take()
    assert metrics["checkpoint_seconds"] == 30.0 and metrics["slow_steps"] == 1.0
    assert metrics["data_wait"] == pytest.approx(2.0 / (8 + 2.9 + 3.5 + 31))
    assert metrics["longest_step_seconds"] == 3.5
    step(1.0)
    assert account.take() == {
        **{"data_wait": 0.0, "checkpoint_seconds": 0.0, "longest_step_seconds": 1.0, "slow_steps": 1.0}
    }

import time

import pytest

from fp4jax.training.estimate import StepTimer, duration, flops_per_token, hint


def test_flops_of_qwen3_0p6b(config):
    config.model.update({"vocab_size": 151936, "hidden_size": 1024, "num_layers": 28, "num_heads": 16, "head_dim": 128})
    config.seq_len = 4096
    expected = 6 * (440_467_456 + 151936 * 1024 + 28 * 16 * 128 * 4096)
    assert flops_per_token(config, 440_467_456) == expected
    assert round(expected / 1e9, 1) == 5.0
    config.model.tie_embeddings = False
    assert flops_per_token(config, 440_467_456) == expected - 6 * 151936 * 1024


def test_timer_leaves_out_compilation_and_pauses(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    timer = StepTimer()
    for seconds in (100, 50, 2, 4):
        now[0] += seconds
        timer.step_done()
    assert timer.seconds_per_step == 3
    now[0] += 30
    timer.exclude(30.0)
    assert timer.seconds_per_step == 3
    assert timer.measured_steps == 2


def test_nothing_measured_yet():
    timer = StepTimer()
    timer.step_done()
    assert timer.seconds_per_step is None and timer.measured_steps == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.234, "0.23 s"), (45.0, "45 s"), (200.0, "3 min 20 s"), (18720.0, "5 h 12 min"), (414720.0, "4.8 days")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_hint_only_for_long_runs(config):
    config.steps = 1000
    assert hint(config, 3600.0) is None
    assert "--config.steps=500" in hint(config, 7200.0)

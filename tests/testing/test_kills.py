import pytest

from fp4jax.testing.kills import kill_and_compare, tiny_config

pytestmark = pytest.mark.slow


def test_five_kills_leave_no_trace(tmp_path, monkeypatch):
    monkeypatch.setenv("FP4JAX_CACHE", str(tmp_path))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    outcome = kill_and_compare(tiny_config(5), tmp_path, 5, seed=1)
    assert outcome.failures == []
    assert len(outcome.lives) == 5 and sum(outcome.places.values()) == 5
    assert "the undisturbed run's bits" in str(outcome)

import pytest

from fp4jax.testing.kills import kill_and_compare, tiny_config


def quick_config(kills):
    """Half the CPU time: what is traced anew in every life is in BF16, of one microbatch, and has no validation."""
    config = tiny_config(kills)
    config.recipe, config.microbatches, config.evaluation.every = "bf16", 1, 10 * config.steps
    return config


@pytest.mark.parametrize(
    "config_of", [pytest.param(quick_config, id="quick"), pytest.param(tiny_config, id="fp4", marks=pytest.mark.slow)]
)
def test_five_kills_leave_no_trace(config_of, tmp_path, monkeypatch):
    monkeypatch.setenv("FP4JAX_CACHE", str(tmp_path))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    outcome = kill_and_compare(config_of(5), tmp_path, 5, seed=1)
    assert outcome.failures == []
    assert len(outcome.lives) == 5 and sum(outcome.places.values()) == 5
    assert "the undisturbed run's bits" in str(outcome)

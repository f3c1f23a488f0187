import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp4jax.training.optimizer import decayed, learning_rate_schedule, make_optimizer

pytestmark = pytest.mark.standard_promotion


def test_schedule_values(config):
    config.steps, config.optimizer.warmup_steps = 110, 10
    config.optimizer.learning_rate, config.optimizer.end_learning_rate_fraction = 1e-3, 0.1
    rates = np.array([float(learning_rate_schedule(config)(step)) for step in range(111)])
    np.testing.assert_allclose(rates[:10], 1e-4 * np.arange(1, 11), rtol=1e-6)
    progress = np.arange(101) / 100
    cosine = 1e-3 * (0.1 + 0.9 * (1 + np.cos(np.pi * progress)) / 2)
    np.testing.assert_allclose(rates[10:], cosine, rtol=1e-5)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (2, 2000), (10, 9), (5, 1)])
def test_schedule_of_short_runs(config, steps, warmup):
    config.steps, config.optimizer.warmup_steps = steps, warmup
    rates = [float(learning_rate_schedule(config)(step)) for step in range(steps)]
    peak = config.optimizer.learning_rate
    assert all(0 < rate <= peak * (1 + 1e-6) for rate in rates)
    np.testing.assert_allclose(rates[0], peak / max(warmup, 1), rtol=1e-6)


AXES = {"norm": ("layers", "embed"), "matrix": ("layers", "embed", "mlp"), "embedding": ("vocab", "embed")}


def test_only_matrices_decay():
    assert decayed(AXES) == {"norm": False, "matrix": True, "embedding": True}


def test_update_is_adamw(config):
    """The first update against the formula: clipped gradient's sign, decay, learning rate."""
    config.optimizer.update(
        {"learning_rate": 0.5, "warmup_steps": 0, "weight_decay": 0.1, "clip_norm": 1.0, "eps": 1e-8}
    )
    params = {"norm": jnp.full((1, 2), 3.0), "matrix": jnp.full((1, 2, 2), 3.0), "embedding": jnp.full((2, 2), 3.0)}
    gradients = jax.tree.map(lambda p: jnp.full_like(p, -7.0), params)
    optimizer = make_optimizer(config, AXES)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    np.testing.assert_allclose(updates["norm"], 0.5, rtol=1e-4)
    np.testing.assert_allclose(updates["matrix"], 0.5 - 0.5 * 0.1 * 3.0, rtol=1e-4)


def test_gradients_are_clipped_to_the_global_norm(config):
    config.optimizer.clip_norm = 1.0
    optimizer = make_optimizer(config, AXES)
    params = {name: jnp.ones((1,) * len(axes)) for name, axes in AXES.items()}
    gradients = jax.tree.map(lambda p: jnp.full_like(p, 100.0), params)
    _, state = optimizer.update(gradients, optimizer.init(params), params)
    moment = next(part for part in state if hasattr(part, "mu")).mu
    norm = np.sqrt(sum(float(jnp.sum(m**2)) for m in moment.values())) / (1 - config.optimizer.b1)
    np.testing.assert_allclose(norm, 1.0, rtol=1e-4)

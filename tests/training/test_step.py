import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp4jax.config import mesh_of
from fp4jax.training.health import make_health_step
from fp4jax.training.mesh import make_mesh, put_batch
from fp4jax.training.optimizer import learning_rate_schedule, make_optimizer
from fp4jax.training.state import TrainState, create_state, model_template, on_mesh
from fp4jax.training.step import loss_and_gradients, make_loss_step, make_train_step, split_batch

pytestmark = pytest.mark.standard_promotion

ONE = mesh_of()


def prepared(config, shape=None):
    mesh = make_mesh(shape or ONE)
    template = model_template(config)
    optimizer = make_optimizer(config, template.logical_axes)
    state = create_state(config, template, optimizer, mesh)
    return mesh, template, optimizer, state


def run_steps(config, batch, steps, shape=None):
    mesh, template, optimizer, state = prepared(config, shape)
    step = make_train_step(config, template, optimizer, mesh)
    metrics = []
    for _ in range(steps):
        state, values = step(state, put_batch(batch, mesh))
        metrics.append(jax.device_get(values))
    return metrics


def test_fp4_steps(averis_config, batch):
    """One compilation serves all steps, the state is donated, the loss falls, the noise is a function of the step."""
    config = averis_config
    mesh, template, optimizer, first = prepared(config)
    step = make_train_step(config, template, optimizer, mesh)
    copies = [jax.tree.map(jnp.copy, first) for _ in range(4)]
    copies[2] = TrainState(jax.device_put(jnp.int32(1), first.step.sharding), copies[2].params, copies[2].opt_state)
    repeated = [float(step(copy, put_batch(batch, mesh))[1]["grad_norm"]) for copy in copies[:3]]
    config.seed += 1  # which finds the program in the compilation cache
    other_seed = make_train_step(config, template, optimizer, mesh)
    repeated.append(float(other_seed(copies[3], put_batch(batch, mesh))[1]["grad_norm"]))
    assert repeated[0] == repeated[1] not in repeated[2:]

    state, losses, rates = first, [], []
    for _ in range(4):
        state, metrics = step(state, put_batch(batch, mesh))
        losses.append(float(metrics["loss"]))
        rates.append(float(metrics["learning_rate"]))
        assert float(metrics["tokens"]) == batch["loss_mask"].sum()
    assert step.__wrapped__._cache_size() == 1
    assert all(array.is_deleted() for array in first.params.values())
    assert int(state.step) == 4
    assert losses[-1] < losses[0] - 0.01
    np.testing.assert_allclose(rates, [float(learning_rate_schedule(config)(i)) for i in range(4)], rtol=1e-6)


@pytest.mark.slow
def test_runs_with_other_seeds_are_the_same_programs(config, batch):
    """Every draw of the recipe depends on the seed, which is an argument."""
    config.recipe, config.model.num_layers, config.microbatches = "nvfp4+sr_all", 1, 2
    mesh, template, optimizer, state = prepared(config)
    programs = []
    for config.seed in (0, 3):
        steps = (
            (make_train_step(config, template, optimizer, mesh), (state, batch)),
            (make_loss_step(config, template, mesh), (state.params, batch)),
            (make_health_step(config, template, mesh), (state.params, state.step, batch)),
        )
        with jax.set_mesh(mesh):
            programs.append([step.__wrapped__.lower(*arguments).as_text() for step, arguments in steps])
    assert programs[0] == programs[1]


def test_loss_is_the_mean_over_real_tokens(config, batch):
    mesh, template, _, state = prepared(config)
    total, count = make_loss_step(config, template, mesh)(state.params, put_batch(batch, mesh))
    assert float(count) == batch["loss_mask"].sum()
    metrics = run_steps(config, batch, 1)
    np.testing.assert_allclose(metrics[0]["loss"], float(total) / float(count), rtol=1e-6)


def test_accumulation_equals_one_batch(config, batch):
    """Rows have different numbers of real tokens: a mean of the microbatches' means would differ."""
    mesh, template, _, state = prepared(config)
    results = []
    for count in (1, 4):
        config.microbatches = count

        def gradients(params, batch):
            return loss_and_gradients(config.microbatches, template, mesh, params, batch, jax.random.key(0))[:2]

        results.append(on_mesh(jax.jit(gradients), mesh)(state.params, put_batch(batch, mesh)))
    (loss, whole), (accumulated_loss, accumulated) = results
    np.testing.assert_allclose(accumulated_loss, loss, rtol=1e-6)
    for name, gradient in whole.items():
        assert accumulated[name].dtype == jnp.float32
        np.testing.assert_allclose(
            accumulated[name], gradient, rtol=2e-4, atol=1e-6 * float(jnp.abs(gradient).max()), err_msg=name
        )


@pytest.mark.parametrize(
    ("mesh", "microbatches"),
    [
        pytest.param(mesh_of(data=8), 1, marks=pytest.mark.slow),
        pytest.param(mesh_of(fsdp=8), 1, marks=pytest.mark.slow),
        (mesh_of(data=2, fsdp=2, tensor=2), 2),
    ],
    ids=str,
)
def test_meshes_and_microbatches_equal_one_device(config, batch, mesh, microbatches):
    expected = run_steps(config, batch, 3)
    config.microbatches = microbatches
    for one, eight in zip(expected, run_steps(config, batch, 3, mesh), strict=True):
        np.testing.assert_allclose(eight["loss"], one["loss"], rtol=1e-5)
        np.testing.assert_allclose(eight["grad_norm"], one["grad_norm"], rtol=1e-4)


def test_split_batch_takes_every_row_once():
    mesh = make_mesh(mesh_of(data=4))
    rows = np.arange(8 * 16, dtype=np.int32).reshape(8, 16)
    parts = jax.jit(lambda batch: split_batch(batch, 2, mesh))(put_batch({"tokens": rows}, mesh))["tokens"]
    np.testing.assert_array_equal(parts, np.stack([rows[0::2], rows[1::2]]))

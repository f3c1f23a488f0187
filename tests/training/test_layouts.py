"""The training step on eight devices against the one: the same losses and gradients, and kernels that travel in codes.

Codes and draws bit for bit: tests/test_layout_invariance.py. Longer runs, all recipes: experiments/layouts.py.
"""

import jax
import numpy as np
import pytest

from fp4jax.config import mesh_of
from fp4jax.plan.program import Executions
from fp4jax.plan.step import kernel_shapes, weight_gathers
from fp4jax.reporting.optimized_hlo import Program
from fp4jax.training.mesh import make_mesh, put_batch
from fp4jax.training.state import on_mesh
from fp4jax.training.step import abstract_train_step, loss_and_gradients
from tests.training.test_step import prepared, run_steps

pytestmark = pytest.mark.standard_promotion

MIXED = mesh_of(data=2, fsdp=2, tensor=2)


@pytest.fixture
def wide_config(config):
    """Kernels that eight devices share in whole blocks of 16; a vocabulary of another size than any of theirs."""
    config.model.update({"hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "num_kv_heads": 4})
    config.model.update({"head_dim": 32, "vocab_size": 4096})
    return config


@pytest.mark.slow
def test_twenty_steps_in_high_precision(wide_config, batch):
    wide_config.steps = 20
    one, eight = ([values["loss"] for values in run_steps(wide_config, batch, 20, mesh)] for mesh in (None, MIXED))
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    assert one[-1] < one[0] - 0.1


def differentiated(config, batch, sizes):
    mesh, template, _, state = prepared(config, sizes)

    def run(params, batch):
        return loss_and_gradients(1, template, mesh, params, batch, jax.random.key(0))[:2]

    return jax.device_get(on_mesh(jax.jit(run), mesh)(state.params, put_batch(batch, mesh)))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["nvfp4", "averis"])
def test_one_step_in_fp4(wide_config, batch, recipe):
    wide_config.recipe = recipe
    (loss, gradients), (mesh_loss, on_eight) = (differentiated(wide_config, batch, mesh) for mesh in (None, MIXED))
    np.testing.assert_allclose(mesh_loss, loss, rtol=1e-6)
    squares = [(np.sum((on_eight[k] - gradients[k]) ** 2), np.sum(gradients[k] ** 2)) for k in gradients]
    difference, whole = np.sqrt(np.sum(squares, axis=0))
    assert difference <= 1e-3 * whole


def gathers(config, sizes, **model):
    config.mesh.update(sizes)
    config.model.update(model)
    mesh = make_mesh(config.mesh)
    step, state, batch = abstract_train_step(config, mesh)
    with jax.set_mesh(mesh):
        compiled = step.lower(state, batch).compile({"xla_backend_optimization_level": 0})
    found = Executions(Program(compiled.as_text())).gathers()
    return found, weight_gathers(found, kernel_shapes(config), config.mesh.tensor)


@pytest.mark.parametrize(
    "choice, microbatches", [("auto", 1), pytest.param("step", 2, marks=pytest.mark.slow)], ids=str
)
def test_kernels_travel_as_codes_and_scales_once_a_step(wide_config, choice, microbatches):
    wide_config.recipe, wide_config.microbatches, wide_config.batch_size = "averis", microbatches, 16
    found, of_kernels = gathers(wide_config, {"fsdp": 8}, gather_weights=choice)
    elements = wide_config.model.num_layers * 128 * (4 * 128 + 3 * 256)
    assert of_kernels == 2 * elements * 9 // 16  # two packings of 4 bits, and a byte for 16
    shapes = {f"{k},{n}" for k, n in kernel_shapes(wide_config)}
    assert not [array for array in found if not array.startswith("u8") and array[:-1].split("[")[1] in shapes]


@pytest.mark.slow
def test_kernels_in_high_precision_are_gathered_where_a_layer_needs_them(wide_config):
    wide_config.batch_size = 16
    elements = wide_config.model.num_layers * 128 * (4 * 128 + 3 * 256)
    _, each_time = gathers(wide_config, {"fsdp": 8})
    _, once = gathers(wide_config, {"fsdp": 8}, gather_weights="step")
    assert once == 4 * elements < each_time  # float32, as the activations

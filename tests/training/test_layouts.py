"""The training step on eight devices against the one: the same losses and gradients, and kernels that travel in codes.

Codes and draws bit for bit: tests/test_layout_invariance.py. Longer runs, all recipes: experiments/layouts.py.
"""

import jax
import numpy as np
import pytest

from experiments.layouts import WITHOUT_YNNPACK
from fp4jax.config import mesh_of
from fp4jax.plan.program import Executions
from fp4jax.plan.step import kernel_shapes, weight_gathers
from fp4jax.reporting.optimized_hlo import Program
from fp4jax.training.mesh import make_mesh, put_batch
from fp4jax.training.state import model_template, on_mesh, sharded_abstract_params
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
    """(loss, gradients) of the first step."""
    mesh, template, _, state = prepared(config, sizes)

    def run(params, batch):
        return loss_and_gradients(1, template, mesh, params, batch, jax.random.key(0))[:2]

    compiled = jax.jit(run, compiler_options=WITHOUT_YNNPACK)
    return jax.device_get(on_mesh(compiled, mesh)(state.params, put_batch(batch, mesh)))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["nvfp4", "averis", "averis_centered"])
def test_one_step_in_fp4(wide_config, batch, recipe):
    check_one_step(wide_config, batch, recipe, MIXED)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [mesh_of(expert=4), mesh_of(fsdp=2, expert=2, tensor=2)], ids=str)
def test_one_step_of_experts_in_fp4(config, batch, sizes):
    """Each expert has its own mean and scales, over the slots of all groups."""
    config.model.name = "qwen3_moe"
    config.model.moe.update({"num_experts": 4, "groups": 8})
    check_one_step(config, batch, "averis", sizes)


def check_one_step(config, batch, recipe, sizes):
    config.recipe = recipe
    (loss, gradients), (mesh_loss, on_eight) = (differentiated(config, batch, mesh) for mesh in (None, sizes))
    np.testing.assert_allclose(mesh_loss, loss, rtol=1e-6)
    squares = [(np.sum((on_eight[k] - gradients[k]) ** 2), np.sum(gradients[k] ** 2)) for k in gradients]
    difference, whole = np.sqrt(np.sum(squares, axis=0))
    assert difference <= 1e-3 * whole


@pytest.mark.slow
def test_shards_train_alike_on_one_device_and_on_eight(config, batch):
    """The first loss; later ones part, as rounding is discontinuous (RESULTS.md, "One device and eight")."""
    config.recipe, config.steps = "averis+nearest+shards8", 2
    one, eight = ([v["loss"] for v in run_steps(config, batch, 2, mesh)] for mesh in (None, mesh_of(data=8)))
    np.testing.assert_allclose(eight[0], one[0], rtol=1e-6)
    assert one[1] < one[0] and eight[1] < eight[0]
    config.recipe = "averis+nearest"
    assert run_steps(config, batch, 1)[0]["loss"] != one[0]


def gathered_when_prepared(config, **changes):
    """(every kind of array that is gathered, bytes of kernels) on eight devices while a step's kernels are prepared."""
    config.mesh.fsdp, config.recipe = 8, changes.pop("recipe", "averis")
    config.model.update(changes)
    mesh, template = make_mesh(config.mesh), model_template(config)
    with jax.set_mesh(mesh):
        prepare = jax.jit(lambda params, key: template.merge(params).prepare_weights(key))
        lowered = prepare.lower(sharded_abstract_params(template, mesh), jax.random.key(0))
        program = Program(lowered.compile({"xla_backend_optimization_level": 0}).as_text())
    found = Executions(program).gathers()
    return found, weight_gathers(found, kernel_shapes(config), tensor=1)


def elements(config):
    return config.model.num_layers * 128 * (4 * 128 + 3 * 256)


def test_kernels_travel_as_codes_and_scales(wide_config):
    """Two packings of 4 bits an element, and a byte for 16. Whole steps: tests/plan/test_compile.py."""
    found, of_kernels = gathered_when_prepared(wide_config)
    assert of_kernels == 2 * elements(wide_config) * 9 // 16
    assert {array.split("[")[0] for array in found} == {"u8"}


def test_a_step_gathers_them_once_for_all_its_microbatches(wide_config):
    """And not for every layer, its rematerialization and its backward again."""
    wide_config.mesh.fsdp, wide_config.recipe, wide_config.microbatches = 8, "nvfp4", 2
    wide_config.batch_size, wide_config.model.remat = 16, "linear_inputs"
    mesh = make_mesh(wide_config.mesh)
    step, *arguments = abstract_train_step(wide_config, mesh)
    with jax.set_mesh(mesh):
        program = Program(step.lower(*arguments).compile({"xla_backend_optimization_level": 0}).as_text())
    of_kernels = weight_gathers(Executions(program).gathers(), kernel_shapes(wide_config), tensor=1)
    assert of_kernels == 2 * elements(wide_config) * 9 // 16


@pytest.mark.parametrize(("recipe", "choice"), [("averis", "layer"), ("bf16", "auto"), ("bf16", "layer")])
def test_what_layers_gather_is_not_gathered_before(wide_config, recipe, choice):
    assert gathered_when_prepared(wide_config, recipe=recipe, gather_weights=choice)[1] == 0


def test_kernels_in_high_precision_are_gathered_once_if_asked(wide_config):
    _, of_kernels = gathered_when_prepared(wide_config, recipe="bf16", gather_weights="step")
    assert of_kernels == 4 * elements(wide_config)  # float32, as the activations

"""`model.sequence_sharding`: devices along `tensor` share the sequences of the residual stream.

The same losses and gradients as on one device; what travels instead of whole activations is packed codes and scales.
Codes and draws bit for bit: the layout "sequence" of tests/test_layout_invariance.py.
"""

import collections
import math

import jax
import numpy as np
import pytest

from fp4jax.config import mesh_of
from fp4jax.models import wire
from fp4jax.plan.program import Executions
from fp4jax.reporting.optimized_hlo import Program
from fp4jax.training.health import make_health_step
from fp4jax.training.mesh import make_mesh, put_batch
from fp4jax.training.state import model_template, on_mesh, sharded_abstract_params
from fp4jax.training.step import loss_and_gradients
from tests.training.test_step import prepared, run_steps

pytestmark = pytest.mark.standard_promotion

SEQUENCE = mesh_of(data=2, tensor=4)
COPIES = {"averis": 8 * 9 / 16, "nvfp4": 8 * 9 / 16, "bf16": 6 * 4}
"""Bytes an element of the stream that a layer gathers: in FP4 X forward and backward, for attention and MLP, and both
copies of two D; in high precision, here float32, the two of D are one."""


@pytest.fixture
def sequence_config(config):
    """Two layers whose sequences four devices share in whole blocks; three of its sizes are met nowhere else."""
    config.seq_len, config.model.sequence_sharding = 192, True
    config.model.update({"hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "num_kv_heads": 4})
    config.model.update({"head_dim": 32, "vocab_size": 320})
    return config


def step(config, template, mesh):
    def run(params, batch):
        return loss_and_gradients(1, template, mesh, params, batch, jax.random.key(0))[:2]

    return on_mesh(jax.jit(run), mesh)


def compiled(config):
    """What the gradient's program on eight devices executes."""
    mesh, template = make_mesh(SEQUENCE), model_template(config)
    rows = jax.ShapeDtypeStruct((config.batch_size, config.seq_len), np.int32)
    batch = {"tokens": rows, "targets": rows, "loss_mask": jax.ShapeDtypeStruct(rows.shape, np.float32)}
    with jax.set_mesh(mesh):
        run = step(config, template, mesh).__wrapped__
        program = run.lower(sharded_abstract_params(template, mesh), batch)
        return Executions(Program(program.compile({"xla_backend_optimization_level": 0}).as_text()))


@pytest.mark.parametrize("recipe", ["averis", pytest.param("nvfp4", marks=pytest.mark.slow), "bf16"])
def test_activations_travel_as_codes_and_scales(sequence_config, recipe):
    config = sequence_config
    config.recipe = recipe
    executions = compiled(config)
    kinds = executions.collectives()
    assert "all-to-all" not in kinds
    elements = config.batch_size // 2 * config.seq_len * config.model.hidden_size  # of a device's sequences
    found = collections.Counter()
    for array, of in executions.gathers().items():
        dtype, shape = array.removesuffix("]").split("[")
        size = math.prod(map(int, shape.split(",")))
        # Rows of means are small; scales are a sixteenth.
        found[dtype] += of["bytes"] if dtype == "u8" or size >= elements else 0
    of_layers = config.model.num_layers * elements * COPIES[recipe]
    around = 2 * 4 * elements  # the head's input, and the embedding's gradient
    if recipe == "bf16":
        assert found == {"f32": of_layers + around}
    else:
        assert found == {"u8": of_layers, "f32": around}


def test_without_it_nothing_is_gathered(sequence_config):
    sequence_config.model.sequence_sharding = False
    kinds = compiled(sequence_config).collectives()
    assert kinds.keys() == {"all-reduce"}


def differentiated(config, batch, sizes):
    mesh, template, _, state = prepared(config, sizes)
    return jax.device_get(step(config, template, mesh)(state.params, put_batch(batch, mesh)))


def assert_close(found, expected, tolerance):
    """Losses to 1e-6, gradients in the norm of all parameters."""
    (found_loss, found), (loss, expected) = found, expected
    np.testing.assert_allclose(found_loss, loss, rtol=1e-6)
    squares = [(np.sum((found[k] - expected[k]) ** 2), np.sum(expected[k] ** 2)) for k in expected]
    difference, whole = np.sqrt(np.sum(squares, axis=0))
    assert difference <= tolerance * whole


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["nvfp4", "averis"])
def test_one_step_equals_that_with_whole_sequences(sequence_config, batch, recipe):
    """On the same devices no sum has another order, so no code turns."""
    sequence_config.recipe = recipe
    found = differentiated(sequence_config, batch, SEQUENCE)
    sequence_config.model.sequence_sharding = False
    assert_close(found, differentiated(sequence_config, batch, SEQUENCE), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["bf16", "nvfp4"])  # FP4 on one device and on eight: RESULTS.md
def test_one_step_equals_that_on_one_device(config, recipe, request):
    config.seq_len, config.model.sequence_sharding, config.recipe = 64, True, recipe
    config.model.update({"hidden_size": 128, "intermediate_size": 256, "num_heads": 8, "num_kv_heads": 8})
    config.model.update({"head_dim": 16, "vocab_size": 512})
    batch = request.getfixturevalue("batch")
    tolerance = 1e-5 if recipe == "bf16" else 1e-3
    assert_close(differentiated(config, batch, SEQUENCE), differentiated(config, batch, None), tolerance)


@pytest.mark.slow
def test_twenty_steps_in_high_precision(sequence_config, batch):
    sequence_config.steps = 20
    one, eight = ([v["loss"] for v in run_steps(sequence_config, batch, 20, mesh)] for mesh in (None, SEQUENCE))
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    assert one[-1] < one[0] - 0.1


@pytest.mark.slow
def test_rematerialization_changes_nothing(sequence_config, batch):
    sequence_config.recipe = "averis"
    loss, gradients = differentiated(sequence_config, batch, SEQUENCE)
    sequence_config.model.remat = "linear_inputs"
    again, same = differentiated(sequence_config, batch, SEQUENCE)
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(same[name], gradient, rtol=1e-3, atol=1e-4 * np.abs(gradient).max(), err_msg=name)


@pytest.mark.slow
def test_health_steps(sequence_config, batch):
    """Statistics compare an array with its gathered copies."""
    sequence_config.recipe, sequence_config.model.num_layers = "averis", 1
    found = []
    for sizes in (None, SEQUENCE):
        mesh, template, _, state = prepared(sequence_config, sizes)
        health = make_health_step(sequence_config, template, mesh)
        found.append(jax.device_get(health(state.params, state.step, put_batch(batch, mesh))))
    for one, eight in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(eight, one, rtol=1e-2, atol=1e-2 * np.max(np.abs(one)))


def test_sequences_that_devices_cannot_share_stay_whole():
    """As when a model generates: less than a block of 16 for each, or one token."""
    with jax.set_mesh(make_mesh(SEQUENCE)):
        assert wire.activations(True, 128) == ("batch", "sequence", None)
        assert wire.activations(True, 128, "mlp") == ("batch", None, "mlp")
        assert wire.activations(True, 96) is wire.activations(True, 1) is wire.activations(False, 128) is None
    assert wire.activations(True, 128) is None  # one device

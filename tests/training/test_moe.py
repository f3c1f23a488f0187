"""Training a model with experts: what its routers add to the loss, what is logged, and that it resumes."""

import jax
import numpy as np
import pytest

from fp4jax.analysis.sensitivity.inputs import Amount, trained
from fp4jax.models.qwen3_moe import EXPERTS, LINEARS
from fp4jax.plan.program import Executions
from fp4jax.reporting.optimized_hlo import Program
from fp4jax.statistics import FORWARD_STATISTICS
from fp4jax.training import evaluate_workdir
from fp4jax.training.health import health_table, make_health_step
from fp4jax.training.mesh import make_mesh, put_batch
from fp4jax.training.metrics import read_metrics
from fp4jax.training.optimizer import make_optimizer
from fp4jax.training.state import create_state, model_template, sharded_abstract_params
from fp4jax.training.step import loss_and_gradients
from fp4jax.training.validation import restore_run
from tests import contract
from tests.training.test_loop import Killed, final_state, kill_at
from tests.training.test_loop import run as run_training

pytestmark = pytest.mark.standard_promotion

ROUTER = "layers.mlp.router.kernel"
ROUTING = ("load_balancing_loss", "dropped", "dropped_share", "largest_load")


@pytest.fixture
def moe_config(config):
    """Four experts with hardly any room: some tokens are dropped."""
    config.model.name, config.model.num_layers = "qwen3_moe", 1
    config.model.init_std = 0.2
    config.model.moe.update({"num_experts": 4, "capacity": "0.75", "router_loss_coefficient": 0.5})
    return config


def prepared(config):
    mesh, template = make_mesh(config.mesh), model_template(config)
    optimizer = make_optimizer(config, template.logical_axes)
    return mesh, template, optimizer, create_state(config, template, optimizer, mesh)


def differentiated(config, batch):
    """(loss, gradients, routing sums) of the first step."""
    mesh, template, _, state = prepared(config)

    def run(params, batch):
        loss, gradients, _, routing = loss_and_gradients(
            config.microbatches, template, mesh, params, batch, jax.random.key(0)
        )
        return loss, gradients, routing

    with jax.set_mesh(mesh):
        return jax.device_get(contract.jit(run)(state.params, put_batch(batch, mesh)))


@pytest.mark.slow
def test_router_is_trained_to_balance_and_the_loss_stays_that_of_the_tokens(moe_config, batch):
    """Microbatches add up their sums and take the balance's mean."""
    moe_config.microbatches = 2
    results = []
    for coefficient in (0.0, 0.5):
        moe_config.model.moe.router_loss_coefficient = coefficient
        results.append(differentiated(moe_config, batch))
    (loss, without, routing), (loss_again, with_it, routing_again) = results
    assert loss == loss_again
    for name in routing:
        np.testing.assert_array_equal(routing[name], routing_again[name])
    added = with_it[ROUTER] - without[ROUTER]
    assert np.linalg.norm(added) > 0.01 * np.linalg.norm(without[ROUTER])
    assert np.abs(with_it["layers.mlp.experts.up_proj.kernel"]).max() > 0
    np.testing.assert_array_equal(with_it["norm.weight"], without["norm.weight"])  # behind every router
    tokens = batch["tokens"].size
    assert routing["choices"].sum() == 2 * tokens and routing["choices"].shape == (1, 4)
    np.testing.assert_allclose(routing["probability"].sum(), tokens, rtol=1e-5)
    assert routing["dropped"].sum() >= 0.25 * 2 * tokens  # three quarters of the room that all would need
    assert 2 * 1.9 < routing["load_balancing_loss"] < 2 * 4


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize(
    "mesh",
    [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "expert": 2, "tensor": 2}, {"expert": 4, "tensor": 2}],
    ids=str,
)
def test_on_eight_devices_nothing_changes_but_the_order_of_additions(moe_config, batch, mesh, groups):
    moe_config.model.moe.groups = groups
    loss, gradients, routing = differentiated(moe_config, batch)
    moe_config.mesh.update(mesh)
    mesh_loss, on_mesh, mesh_routing = differentiated(moe_config, batch)
    np.testing.assert_allclose(mesh_loss, loss, rtol=1e-6)
    for name, value in routing.items():
        np.testing.assert_allclose(mesh_routing[name], value, rtol=1e-5, err_msg=name)
    for name, value in gradients.items():
        assert np.linalg.norm(on_mesh[name] - value) <= 1e-4 * np.linalg.norm(value), name


def moved(config, batch):
    """(bytes that all-to-alls move, dimensions of all arrays of floats that are gathered) by loss and gradients."""
    mesh, template = make_mesh(config.mesh), model_template(config)

    def run(params, batch):
        return loss_and_gradients(1, template, mesh, params, batch, jax.random.key(0))[:2]

    with jax.set_mesh(mesh):
        lowered = jax.jit(run).lower(sharded_abstract_params(template, mesh), put_batch(batch, mesh))
        program = Program(lowered.compile({"xla_backend_optimization_level": 0}).as_text())
    executions = Executions(program)
    gathered = {dimensions(array) for array in executions.gathers() if array.startswith("f32")}
    return executions.collectives()["all-to-all"]["bytes"], gathered


def dimensions(array):
    """Of "f32[1,64,32]": (32, 64)."""
    return tuple(sorted(int(size) for size in array[4:-1].split(",") if size != "1"))


def test_tokens_in_groups_travel_by_all_to_all_and_are_gathered_nowhere(moe_config, batch):
    """Two ways, and both again for the cotangents; the rest is masks, and the embedding's rows."""
    moe_config.mesh.update({"fsdp": 2, "expert": 4})
    shapes = model_template(moe_config).abstract.values()
    of_parameters = {tuple(sorted(size for size in leaf.shape[-2:] if size != 1)) for leaf in shapes}
    assert not moved(moe_config, batch)[1] <= of_parameters
    moe_config.model.moe.groups = 8
    sent, gathered = moved(moe_config, batch)
    slots = 4 * 16 * 32 * 4  # of a device's group: experts x slots x width x bytes
    assert 4 * slots <= sent < 5 * slots
    assert gathered <= of_parameters


@pytest.mark.slow
def test_a_run_goes_on_under_another_split_of_its_experts(moe_config, tmp_path, monkeypatch):
    """Two steps with experts on four devices, two more with them on two, from the checkpoint: one device's losses."""
    run_training(moe_config, tmp_path / "one")
    moe_config.mesh.expert = 4
    with monkeypatch.context() as patch:
        kill_at(patch, 3)
        with pytest.raises(Killed):
            run_training(moe_config, tmp_path / "split")
    moe_config.mesh.update({"fsdp": 2, "expert": 2, "tensor": 2})
    assert "after step 2" in run_training(moe_config, tmp_path / "split")
    one, split = ([line["loss"] for line in read_metrics(tmp_path / name)] for name in ("one", "split"))
    assert len(one) == 4
    np.testing.assert_allclose(split, one, rtol=1e-5)


@pytest.mark.slow
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(moe_config, tmp_path, monkeypatch):
    moe_config.recipe = "nvfp4"  # draws for every gradient
    output = run_training(moe_config, tmp_path / "whole")
    assert "of these active for a token" in output
    with monkeypatch.context() as patch:
        kill_at(patch, 3)
        with pytest.raises(Killed):
            run_training(moe_config, tmp_path / "resumed")
    assert "after step 2" in run_training(moe_config, tmp_path / "resumed")
    whole, resumed = (final_state(moe_config, tmp_path / name) for name in ("whole", "resumed"))
    for one, other in zip(*map(jax.tree.leaves, (whole, resumed)), strict=True):
        np.testing.assert_array_equal(one, other)
    logged = [
        [{name: line[name] for name in (*ROUTING, "loss", "grad_norm")} for line in read_metrics(tmp_path / name)]
        for name in ("whole", "resumed")
    ]
    assert logged[0] == logged[1] and len(logged[0]) == 4
    for step in logged[0]:  # of 512 choices, 128 an expert; ceil16(0.75 x 128) = 96 slots
        assert 128 <= step["dropped"] < 512
        np.testing.assert_allclose(step["dropped_share"], step["dropped"] / 512, rtol=1e-6)
        assert 1 <= step["largest_load"] <= 2 and 1.5 < step["load_balancing_loss"] < 4
    with pytest.raises(ValueError, match="dense models"):
        trained(tmp_path / "whole", None, None, Amount(1, 1, 16))


@pytest.fixture
def uncached():
    """XLA crashed once when it wrote this large program to the cache."""
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


@pytest.mark.slow
@pytest.mark.usefixtures("uncached")
def test_health_step_measures_the_experts(moe_config, batch):
    moe_config.recipe = "nvfp4+nearest"
    mesh, template, _, state = prepared(moe_config)
    health_step = make_health_step(moe_config, template, mesh)
    sums = jax.device_get(health_step(state.params, state.step, put_batch(batch, mesh)))
    gate, up, down = (sums.forward[name][0, FORWARD_STATISTICS.index("fprop.x.elements")] for name in EXPERTS)
    rows = gate / 32  # that found a slot: at most 96 in each of 4 experts, and 512 choices want one
    assert gate == up and rows == round(rows) and 256 < rows <= 384
    assert 0.99 < down / 64 / rows <= 1  # silu makes some zeros
    table = health_table(sums)
    assert {name.rpartition("/")[2] for name in table} == set(LINEARS)
    for linear in EXPERTS:
        for operand in ("fprop.x", "fprop.w", "dgrad.g", "wgrad.x", "wgrad.g"):
            assert 15 < table[f"sqnr_db/{operand}/{linear}"][0] < 30
        assert 0.5 < table[f"cosine/wgrad/{linear}"][0] < 1


@pytest.mark.slow
def test_a_run_in_groups_is_evaluated_on_batches_of_any_size(moe_config, tmp_path):
    """With as many of its groups as divide them, on devices that hold whole ones."""
    moe_config.steps, moe_config.model.moe.groups = 1, 4
    run_training(moe_config, tmp_path)
    for batch_size, groups, devices in ((1, 1, 1), (6, 2, 2), (8, 4, 4), (None, 4, 4)):
        config = restore_run(tmp_path, batch_size=batch_size).config
        assert (config.model.moe.groups, config.mesh.data) == (groups, devices)
    assert np.isfinite(evaluate_workdir(tmp_path, batches=1).result.loss)

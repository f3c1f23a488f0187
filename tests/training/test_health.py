import copy
import json

import jax
import numpy as np
import pytest

from fp4jax.config import mesh_of
from fp4jax.models.qwen3 import LINEARS
from fp4jax.statistics import FORWARD_STATISTICS, GRADIENT_STATISTICS, SCOPE
from fp4jax.training.health import (
    COMPARISON,
    OPERAND_RATIOS,
    OPERANDS,
    WGRAD_RATIOS,
    HealthMonitor,
    comparison_ratios,
    health_summary,
    health_table,
    make_health_step,
    operand_ratios,
)
from fp4jax.training.mesh import make_mesh, put_batch
from fp4jax.training.metrics import HEALTH_FILE, read_metrics
from fp4jax.training.optimizer import make_optimizer
from fp4jax.training.state import create_state, model_template
from fp4jax.training.step import make_train_step
from tests.training.test_loop import deterministic, final_state
from tests.training.test_loop import run as run_training

pytestmark = pytest.mark.standard_promotion

ONE = mesh_of()


def prepared(config, shape=None):
    mesh = make_mesh(shape or ONE)
    template = model_template(config)
    optimizer = make_optimizer(config, template.logical_axes)
    return mesh, template, optimizer, create_state(config, template, optimizer, mesh)


def measure(config, batch, shape=None):
    """(HealthSums, metrics of the training step) of the first step."""
    mesh, template, optimizer, state = prepared(config, shape)
    on_devices = put_batch(batch, mesh)
    sums = jax.device_get(make_health_step(config, template, mesh)(state.params, state.step, on_devices))
    return sums, jax.device_get(make_train_step(config, template, optimizer, mesh)(state, on_devices)[1])


def lowered(config, batch):
    """(program, names of its operations) of the training step and of the health step."""
    mesh, template, optimizer, state = prepared(config)
    steps = (
        (make_train_step(config, template, optimizer, mesh), (state, batch)),
        (make_health_step(config, template, mesh), (state.params, state.step, batch)),
    )
    with jax.set_mesh(mesh):
        programs = [step.__wrapped__.lower(*arguments) for step, arguments in steps]
    return [(program.as_text(), program.as_text(debug_info=True)) for program in programs]


def columns(statistics, names):
    return dict(zip(names, np.moveaxis(statistics, -1, 0), strict=True))


def test_training_step_is_the_same_program_and_holds_no_statistics(config, batch):
    config.health.every = 0
    (off, _), _ = lowered(config, batch)
    config.health.every = 1
    (on, names), (_, names_with_statistics) = lowered(config, batch)
    assert on == off
    assert SCOPE not in names and SCOPE in names_with_statistics


@pytest.fixture(scope="module")
def measured(request):
    """The first step of a run in FP4, measured; compiled once for this module."""
    found = {}

    def once(config, batch):
        if not found:
            found["it"] = measure(config, batch)
        return found["it"]

    return once


@pytest.fixture
def fp4(config, batch, measured):
    config.recipe = "nvfp4+nearest"
    return measured(config, batch)


@pytest.mark.slow
def test_measured_gradient_is_that_of_the_training_step(fp4, config, batch):
    sums, metrics = fp4
    everything = columns(sums.all_parameters, COMPARISON)
    np.testing.assert_allclose(np.sqrt(everything["energy"]), metrics["grad_norm"], rtol=1e-5)
    np.testing.assert_allclose(sums.loss, metrics["loss"], rtol=1e-6)
    config.recipe = "bf16"
    mesh, template, optimizer, state = prepared(config)
    _, exact = make_train_step(config, template, optimizer, mesh)(state, put_batch(batch, mesh))
    np.testing.assert_allclose(np.sqrt(everything["exact_energy"]), exact["grad_norm"], rtol=1e-5)
    np.testing.assert_allclose(sums.exact_loss, exact["loss"], rtol=1e-6)
    assert sums.loss != sums.exact_loss


@pytest.mark.slow
def test_noise_and_product_are_of_the_same_two_gradients(fp4):
    sums, _ = fp4
    assert list(sums.comparison) == sorted(LINEARS)
    for statistics in (*sums.comparison.values(), sums.all_parameters):
        found = columns(statistics, COMPARISON)
        expected = found["energy"] + found["exact_energy"] - 2 * found["product"]
        np.testing.assert_allclose(found["noise"], expected, rtol=1e-3)
        assert (found["noise"] > 1e-4 * found["energy"]).all()
    assert sum(of.sum() for of in columns(np.stack([*sums.comparison.values()]), COMPARISON)["energy"]) < float(
        columns(sums.all_parameters, COMPARISON)["energy"]
    )


@pytest.mark.slow
def test_statistics_belong_to_their_operand(fp4, config):
    """Inputs that linears share, weights as they were drawn, gradients of their own."""
    sums, _ = fp4
    forward = {name: columns(of, FORWARD_STATISTICS) for name, of in sums.forward.items()}
    q, k, gate, down = (
        forward[name] for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj")
    )
    np.testing.assert_array_equal(q["fprop.x.energy"], k["fprop.x.energy"])
    assert (q["fprop.x.energy"] != gate["fprop.x.energy"]).all()
    tokens = config.batch_size * config.seq_len
    np.testing.assert_allclose(q["fprop.x.energy"], tokens * 32, rtol=1e-2)  # after RMSNorm
    np.testing.assert_allclose(down["fprop.w.energy"], 64 * 32 * 0.02**2, rtol=0.1)
    assert (q["fprop.x.elements"] == tokens * 32).all() and (q["fprop.x.blocks"] == tokens * 2).all()
    assert (down["dgrad.w.elements"] == 64 * 32).all()
    for name, of in sums.gradient.items():
        found = columns(of, GRADIENT_STATISTICS)
        compared = columns(sums.comparison[name], COMPARISON)
        np.testing.assert_allclose(found["wgrad.energy"], compared["energy"], rtol=1e-5)
        assert (found["dgrad.g.energy"] == found["wgrad.g.energy"]).all()
        assert (found["dgrad.g.noise"] < 0.05 * found["dgrad.g.energy"]).all()
        assert (found["dgrad.g.noise"] > 0.001 * found["dgrad.g.energy"]).all()


@pytest.mark.slow
def test_table_has_every_ratio_and_survives_json(fp4):
    sums, _ = fp4
    table = json.loads(json.dumps(health_table(sums), allow_nan=False))
    wgrad = {f"{ratio}/wgrad/{linear}" for ratio in WGRAD_RATIOS for linear in LINEARS}
    assert set(table) == wgrad | {
        f"{ratio}/{operand}/{linear}" for ratio in OPERAND_RATIOS for operand in OPERANDS for linear in LINEARS
    }
    assert all(len(values) == 2 and None not in values for values in table.values())
    assert all(15 < value < 30 for name, values in table.items() if name.startswith("sqnr_db") for value in values)
    assert all(0.9 < value < 1 for name, values in table.items() if name.startswith("cosine") for value in values)
    assert table["cross_energy/wgrad/mlp.up_proj"] == [0.0, 0.0]
    summary = health_summary(sums)
    assert summary["below_stop_ratio"] == float(summary["gradient_to_noise"] < 1.7320508)


@pytest.mark.slow
def test_high_precision_is_exact_and_adds_up_over_microbatches_and_meshes(config, batch):
    sums, _ = measure(config, batch)
    table, summary = health_table(sums), health_summary(sums)
    assert summary == {
        "gradient_cosine": pytest.approx(1), "gradient_to_noise": None, "below_stop_ratio": None, "loss_gap": 0.0
    }  # fmt: skip
    for ratio in ("sqnr_db", "underflow", "saturated", "zero_scales", "largest_scales"):
        assert table[f"{ratio}/wgrad.g/mlp.up_proj"] == [None, None]
    assert table["residual_energy/fprop.x/mlp.up_proj"] == [1.0, 1.0]

    config.microbatches = 2
    split, _ = measure(config, batch, mesh_of(data=2, fsdp=2, tensor=2))
    for name in LINEARS:
        one, two = (columns(s.forward[name], FORWARD_STATISTICS) for s in (sums, split))
        np.testing.assert_allclose(two["wgrad.x.energy"], one["wgrad.x.energy"], rtol=1e-4)
        np.testing.assert_allclose(two["fprop.w.energy"], 2 * one["fprop.w.energy"], rtol=1e-4)
        one, two = (columns(s.gradient[name], GRADIENT_STATISTICS) for s in (sums, split))
        np.testing.assert_allclose(two["dgrad.g.energy"], one["dgrad.g.energy"], rtol=1e-4)
        np.testing.assert_allclose(split.comparison[name], sums.comparison[name], rtol=1e-3, atol=1e-12)


def test_ratios_of_known_sums():
    sums = {
        "energy": 100.0, "mean_energy": 36.0, "residual_energy": 64.0, "noise": 1.0, "elements": 50.0,
        "underflows": 10.0, "saturated": 5.0, "blocks": 4.0, "zero_scales": 2.0, "largest_scales": 1.0,
    }  # fmt: skip
    sums = {name: np.array([value]) for name, value in sums.items()}
    found = {name: value.item() for name, value in operand_ratios(sums).items()}
    assert found == pytest.approx(
        {
            "sqnr_db": 20, "underflow": 0.2, "saturated": 0.1, "zero_scales": 0.5, "largest_scales": 0.25,
            "mean_bias": 0.6, "residual_energy": 0.64,
        }
    )  # fmt: skip
    assert set(found) == set(OPERAND_RATIOS)
    assert all(np.isnan(value) for value in operand_ratios(dict.fromkeys(sums, np.zeros(1))).values())
    found = comparison_ratios(np.array([[6.0, 9.0, 16.0, 13.0], [0.0, 0.0, 0.0, 0.0]]))
    np.testing.assert_allclose(found["cosine"], [0.5, np.nan])
    np.testing.assert_allclose(found["gradient_to_noise"], [(16 / 13) ** 0.5, np.nan])


def test_due_on_every_nth_step(config):
    config.health.every = 3
    monitor = HealthMonitor(config, model_template(config), make_mesh(ONE), None)
    assert [step for step in range(1, 10) if monitor.due(step)] == [3, 6, 9]
    config.health.every = 0
    monitor = HealthMonitor(config, model_template(config), make_mesh(ONE), None)
    assert not any(monitor.due(step) for step in range(1, 10))


def check_that_health_changes_nothing(config, tmp_path):
    with_health = copy.deepcopy(config)
    with_health.health.every = 2
    run_training(config, tmp_path / "off")
    run_training(with_health, tmp_path / "on")
    assert deterministic(tmp_path / "on") == deterministic(tmp_path / "off")
    for one, other in zip(
        *(jax.tree.leaves(final_state(config, tmp_path / name)) for name in ("on", "off")), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    assert not (tmp_path / "off" / HEALTH_FILE).exists()
    return read_metrics(tmp_path / "on", HEALTH_FILE)


def test_run_with_health_is_the_same_run(config, tmp_path):
    lines = check_that_health_changes_nothing(config, tmp_path)
    assert [line["step"] for line in lines] == [2, 4]
    assert all(line["gradient_cosine"] == pytest.approx(1) for line in lines)


@pytest.mark.slow
def test_fp4_run_with_health_is_the_same_run_and_continues(averis_config, tmp_path):
    config = averis_config
    config.microbatches = 2
    lines = check_that_health_changes_nothing(config, tmp_path)
    assert [line["step"] for line in lines] == [2, 4]
    assert all(0.5 < line["gradient_cosine"] < 1 for line in lines)
    assert all(0 < value < 1 for value in lines[0]["cross_energy/wgrad/mlp.up_proj"])
    config.steps, config.health.every = 6, 3  # may change when a run goes on
    run_training(config, tmp_path / "on")
    assert [line["step"] for line in read_metrics(tmp_path / "on", HEALTH_FILE)] == [2, 4, 6]

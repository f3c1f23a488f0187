"""Which recipe a step is trained with: the schedule's form, its mistakes, and runs in phases bit for bit."""

import contextlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp4jax.checkpoint import Checkpointer, CheckpointError
from fp4jax.config import ConfigError, default_config
from fp4jax.config_checks import validate
from fp4jax.data.pipeline import open_dataset
from fp4jax.policy import PolicyFile
from fp4jax.training import evaluate_workdir, loop, make_loss_step, make_mesh, make_optimizer, make_train_step
from fp4jax.training.mesh import put_batch
from fp4jax.training.metrics import read_metrics
from fp4jax.training.schedule import ByPhase, Phase, phase_at, phases, settle
from fp4jax.training.state import TrainState, create_state, model_template
from tests.training.test_loop import final_state, run

pytestmark = pytest.mark.standard_promotion


def scheduled(schedule, steps=1000, recipe="averis"):
    config = default_config()
    config.schedule, config.steps, config.recipe = schedule, steps, recipe
    validate(config)
    return config


# ---------------------------------------------------------------- the form


def test_without_a_schedule_there_is_one_phase():
    assert phases(scheduled("", 7, "nvfp4")) == (Phase(1, "nvfp4", 1, 7),)


@pytest.mark.parametrize(
    ("schedule", "steps", "expected"),
    [
        ("run:100%", 10, [("averis", 1, 10)]),
        ("bf16:1%,run:80%,nvfp4:100%", 1000, [("bf16", 1, 10), ("averis", 11, 800), ("nvfp4", 801, 1000)]),
        ("run:9,run+fwd_bf16:100%", 10, [("averis", 1, 9), ("averis+fwd_bf16", 10, 10)]),
        (" bf16:10 , averis:100% ", 100, [("bf16", 1, 10), ("averis", 11, 100)]),
        ("bf16:10,run:50%,nvfp4:100", 100, [("bf16", 1, 10), ("averis", 11, 50), ("nvfp4", 51, 100)]),
        ("bf16:7%,run:100%", 100, [("bf16", 1, 7), ("averis", 8, 100)]),  # 0.07 * 100 > 7 in floating point
        ("bf16:0.1%,run:100%", 10, [("bf16", 1, 1), ("averis", 2, 10)]),  # rounded up
        ("bf16:12.5%,run:100%", 100, [("bf16", 1, 13), ("averis", 14, 100)]),
        ("run:50%,bf16:60%,run:100%", 10, [("averis", 1, 5), ("bf16", 6, 6), ("averis", 7, 10)]),
    ],
)  # fmt: skip
def test_phases(schedule, steps, expected):
    found = phases(scheduled(schedule, steps))
    assert [(phase.recipe, phase.first, phase.last) for phase in found] == expected
    assert [phase.number for phase in found] == list(range(1, len(expected) + 1))
    in_order = [phase_at(found, step).recipe for step in range(1, steps + 1)]
    assert in_order == [name for name, first, last in expected for _ in range(first, last + 1)]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("averis", "phase 'averis' is not of the form RECIPE:END, END in percent of the steps or a step number"),
        ("bf16:1%,", "phase '' is not of the form"),
        ("bf16@1%,run:100%", "phase 'bf16@1%' is not of the form"),
        ("bf16:-1%,run:100%", "phase 'bf16:-1%' is not of the form"),
        ("bf16:0.5,run:100%", "phase 'bf16:0.5' is not of the form"),
        ("bf16:0%,run:100%", "phase 'bf16:0%' must end above 0% and at most 100%"),
        ("bf16:1%,run:101%", "phase 'run:101%' must end above 0% and at most 100%"),
        ("bf16:0,run:100%", "phase 'bf16:0' must end from 1 to 1,000"),
        ("bf16:1,run:1001", "phase 'run:1001' must end from 1 to 1,000"),
        ("bf16:80%,run:1%", "phase 'run:1%' ends at step 10, where the phase before it has already ended (step 800"),
        ("bf16:80%,run:800,bf16:100%", "phase 'run:800' ends at step 800, where the phase before it has already ended"),
        ("bf16:1%,run:80%", "schedule='bf16:1%,run:80%' ends at step 800 of 1,000; let its last phase end at 100%"),
        ("averiz:1%,run:100%", "schedule phase 'averiz:1%': unknown recipe 'averiz'; known: bf16"),
        ("bf16:1%,run+fast:100%", "schedule phase 'run+fast:100%': unknown variant 'fast' in 'averis+fast'"),
        ("bf16:1%,nvfp4:100%", "never uses recipe='averis'; set recipe to one of the schedule's, or write 'run'"),
    ],
)  # fmt: skip
def test_mistake_is_named_in_one_line(schedule, message):
    config = scheduled(schedule)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        phases(config)
    assert "\n" not in str(caught.value)


def test_unknown_recipe_without_a_schedule():
    with pytest.raises(ConfigError, match="recipe='averiz': unknown recipe 'averiz'"):
        phases(scheduled("", recipe="averiz"))


def test_shards_that_the_batch_does_not_hold():
    config = scheduled("bf16:1%,run:100%", recipe="averis+shards8")
    assert settle(config).recipe == "averis+shards8"
    config.microbatches = 2
    message = (
        "recipe 'averis+shards8' cuts the sequences of a microbatch into 8 shards, and there are 4 (batch_size / "
        "microbatches); use batch_size=16 or a multiple, or shards4"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        settle(config)


def test_shards_and_shared_sequences_exclude_each_other():
    config = scheduled("bf16:1%,run:100%", recipe="averis+shards8")
    config.model.sequence_sharding = True
    with pytest.raises(ConfigError, match="'averis.shards8' has statistics of each shard's own, which model.sequence_"):
        settle(config)


def test_settled_config_refers_to_nothing_and_can_be_made_longer(tmp_path):
    PolicyFile((("mlp", "run"), (".", "bf16"))).save(tmp_path / "scan.json")
    config = scheduled("bf16:10, run:1000")
    config.policy = str(tmp_path / "scan.json")
    settled = settle(config)
    assert settled.policy == '[["mlp", "run"], [".", "bf16"]]'
    assert settled.schedule == "bf16:10,run:100%" and phases(settled) == phases(config)
    assert config.policy.endswith("scan.json"), "the caller's own is left alone"
    assert settle(settled) == settled
    config.policy = '[["mlp", "run"], ["attention", "bf16"]]'
    with pytest.raises(ValueError, match="rule 'attention' matches none of the 28 linear layers"):
        settle(config)


def test_each_phase_is_made_once_when_needed_and_let_go():
    made, alive = [], []

    class Program:
        def __init__(self, config):
            assert not alive, "the one before is still held"
            alive.append(id(self))
            made.append((config.recipe, config.schedule))

        def __del__(self):
            alive.clear()

    by_phase = ByPhase(scheduled("bf16:2,run:4,nvfp4:100%", 6), Program)
    assert made == []
    programs = [id(by_phase.at(step)) for step in range(3, 7)]
    assert made == [("averis", ""), ("nvfp4", "")]
    assert programs[0] == programs[1] and programs[2] == programs[3]


# ---------------------------------------------------------------- runs


@pytest.fixture
def three_phases(config):
    """Steps 1-2 in high precision, 3-5 in NVFP4, 6 in high precision."""
    config.recipe, config.schedule = "nvfp4+nearest", "bf16:2,run:5,bf16:100%"
    config.steps, config.evaluation.every = 6, 3
    config.checkpoint.every, config.checkpoint.keep, config.checkpoint.asynchronous = 1, 10, False
    return config


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The workdir of the uninterrupted run of `three_phases`, filled by the first test that asks for it."""
    return tmp_path_factory.mktemp("whole")


def filled(whole, config):
    if not (whole / "checkpoints").exists():
        run(config, whole)
    return read_metrics(whole)


def dataset(config, split):
    return open_dataset(
        config.data, seq_len=config.seq_len, batch_size=config.batch_size, seed=config.seed, split=split
    )


def by_hand(config, recipes):
    """Losses of all steps and validation losses by step, with the recipe of each step set by hand."""
    mesh = make_mesh(config.mesh)
    optimizer = make_optimizer(config, model_template(config).logical_axes)
    state = create_state(config, model_template(config), optimizer, mesh)
    losses, validation, step_of = [], {}, {}
    with contextlib.closing(dataset(config, "train").batches(None)) as batches:
        for number, recipe in enumerate(recipes, 1):
            one = config.copy_and_resolve_references()
            one.recipe, one.schedule = recipe, ""
            template = model_template(one)
            if recipe not in step_of:
                step_of[recipe] = make_train_step(one, template, optimizer, mesh)
            state, metrics = step_of[recipe](state, put_batch(next(batches), mesh))
            losses.append(float(metrics["loss"]))
            if number % config.evaluation.every == 0:
                with contextlib.closing(dataset(config, "validation").batches()) as held_out:
                    total, tokens = make_loss_step(one, template, mesh)(state.params, put_batch(next(held_out), mesh))
                validation[number] = float(total) / int(tokens)
    return losses, validation


@pytest.fixture
def recorded(monkeypatch):
    """The recipes of all steps and of all validations, of runs with programs that only record them."""
    trained, validated = [], []

    def make_recorded_step(config, *_):
        def step(state, batch):
            trained.append(config.recipe)
            metrics = dict.fromkeys(("loss", "grad_norm", "learning_rate", "tokens"), jnp.float32(1))
            return TrainState(state.step + 1, state.params, state.opt_state), metrics

        return step

    def make_recorded_loss(config, *_):
        def loss(params, batch):
            validated.append(config.recipe)
            return jnp.float32(1), jnp.float32(1)

        return loss

    monkeypatch.setattr(loop, "make_train_step", make_recorded_step)
    monkeypatch.setattr(loop, "make_loss_step", make_recorded_loss)
    return trained, validated


def test_the_loop_takes_each_step_and_validation_from_its_phase(three_phases, tmp_path, recorded):
    trained, validated = recorded
    three_phases.evaluation.every = 1
    output = run(three_phases, tmp_path)
    assert trained == validated == ["bf16"] * 2 + ["nvfp4+nearest"] * 3 + ["bf16"]
    assert [line["phase"] for line in read_metrics(tmp_path)] == [1, 1, 2, 2, 2, 3]
    for expected in (
        *("phase 1 of 3, steps 1 to 2: bf16", "phase 2 of 3, steps 3 to 5: nvfp4+nearest", "phase 3 of 3, steps 6 to"),
        *("recipe nvfp4+nearest", "schedule", "all_linear: nvfp4+nearest in 14 of 14 linear layers"),
    ):  # fmt: skip
        assert output.count(expected) == 1


@pytest.mark.slow
def test_every_step_and_validation_runs_under_the_recipe_of_its_phase(three_phases, tmp_path):
    three_phases.recipe, three_phases.schedule = "nvfp4", "bf16:2,run:5,run+fwd_bf16:100%"
    run(three_phases, tmp_path)
    metrics = read_metrics(tmp_path)
    losses, validation = by_hand(three_phases, ("bf16",) * 2 + ("nvfp4",) * 3 + ("nvfp4+fwd_bf16",))
    assert [line["phase"] for line in metrics] == [1, 1, 2, 2, 2, 3]
    assert [line["loss"] for line in metrics] == losses
    assert {line["step"]: line["validation_loss"] for line in metrics if "validation_loss" in line} == validation
    evaluation = evaluate_workdir(tmp_path)
    assert (evaluation.recipe, evaluation.trained_with) == ("nvfp4+fwd_bf16",) * 2
    np.testing.assert_allclose(evaluation.result.loss, validation[6], rtol=1e-6)
    assert evaluate_workdir(tmp_path, "nvfp4").recipe == "nvfp4"


@pytest.mark.slow
@pytest.mark.parametrize("done", [pytest.param(2, id="at a boundary"), pytest.param(4, id="inside a phase")])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(three_phases, whole, tmp_path, done):
    filled(whole, three_phases)
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    for folder in (tmp_path / "checkpoints").iterdir():
        if int(folder.name) > done:
            shutil.rmtree(folder)
    output = run(three_phases, tmp_path)
    assert f"after step {done}" in output and "so are the phases" in output
    assert "phase 1 of 3" not in output and "phase 2 of 3, steps 3 to 5" in output
    keys = ("step", "loss", "grad_norm", "validation_loss", "phase")
    found, expected = ([[line.get(k) for k in keys] for line in read_metrics(d)] for d in (tmp_path, whole))
    assert found == expected
    states = (final_state(three_phases, d) for d in (tmp_path, whole))
    for one, other in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(one, other)


def test_another_schedule_is_another_run(three_phases, tmp_path, recorded):
    run(three_phases, tmp_path)
    three_phases.schedule = "bf16:3,run:5,bf16:100%"
    with pytest.raises(CheckpointError, match=r"schedule 'bf16:2,run:5,bf16:100%' → 'bf16:3,run:5,bf16:100%'"):
        run(three_phases, tmp_path)


def test_another_policy_file_is_another_run(config, tmp_path):
    """The rules are compared, not the name; without the file the run can still be evaluated."""
    config.steps, config.policy = 1, str(tmp_path / "scan.json")
    PolicyFile((("mlp", "run"),)).save(tmp_path / "scan.json")
    assert '[["mlp", "run"]]: bf16 in 14 of 14 linear layers' in run(config, tmp_path / "run")
    PolicyFile((("mlp", "run"),), {"note": "the same rules"}).save(tmp_path / "scan.json")
    assert "is done" in run(config, tmp_path / "run")
    PolicyFile((("down_proj", "run"),)).save(tmp_path / "scan.json")
    with pytest.raises(CheckpointError, match="policy .*mlp.* → .*down_proj"):
        run(config, tmp_path / "run")
    (tmp_path / "scan.json").unlink()
    with Checkpointer(tmp_path / "run", read_only=True) as checkpointer:
        assert checkpointer.saved_config()["policy"] == '[["mlp", "run"]]'
    assert evaluate_workdir(tmp_path / "run").step == 1


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("schedule", "bf16:50%", "let its last phase end at 100%"),
        ("schedule", "run:50%,averiz:100%", "unknown recipe 'averiz'"),
        ("policy", '[["q_prj", "run"]]', "policy rule 'q_prj' matches none of the 14 linear layers"),
        ("policy", "scan.json", "policy file scan.json cannot be read"),
    ],
)
def test_mistakes_come_before_any_work(config, tmp_path, key, value, message):
    config[key] = value
    with pytest.raises(ValueError, match=re.escape(message)):
        run(config, tmp_path)
    assert not list(tmp_path.iterdir())

import io
import json
import os
import shutil
import socket

import jax
import numpy as np
import pytest
from rich.console import Console

from fp4jax.checkpoint import Checkpointer, CheckpointError
from fp4jax.config import ConfigError, mesh_of
from fp4jax.data.prepare.command import main as prepare_main
from fp4jax.locking import InUseError, locked
from fp4jax.training import evaluate_workdir, loop, train
from fp4jax.training.mesh import make_mesh
from fp4jax.training.metrics import read_metrics
from fp4jax.training.optimizer import make_optimizer
from fp4jax.training.state import model_template, sharded_abstract_state

pytestmark = pytest.mark.standard_promotion

DETERMINISTIC = ("step", "loss", "grad_norm", "learning_rate", "tokens", "validation_loss")


def run(config, workdir):
    output = io.StringIO()
    train(config, workdir, Console(file=output, width=200))
    return output.getvalue()


def final_state(config, workdir):
    template = model_template(config)
    target = sharded_abstract_state(template, make_optimizer(config, template.logical_axes), make_mesh(config.mesh))
    with Checkpointer(workdir, read_only=True) as checkpointer:
        assert checkpointer.latest_step() == config.steps
        return checkpointer.restore(target.params, {"step": target.step, "opt_state": target.opt_state})


def deterministic(workdir):
    return [{key: line[key] for key in DETERMINISTIC if key in line} for line in read_metrics(workdir)]


class Killed(Exception):
    pass


def kill_at(monkeypatch, step):
    """The run dies when it would report `step`."""
    report = loop._Loop._report

    def die(self, running, *arguments):
        if running.step == step:
            raise Killed
        report(self, running, *arguments)

    monkeypatch.setattr(loop._Loop, "_report", die)


def test_resumed_fp4_run_equals_the_uninterrupted_one_bit_for_bit(averis_config, tmp_path, monkeypatch):
    config = averis_config
    output = run(config, tmp_path / "whole")
    for expected in ("train data:", "unigram entropy", "averis", "parameters", "wgrad.g", "mesh", "validation loss"):
        assert expected in output
    with monkeypatch.context() as patch:
        kill_at(patch, 4)
        with pytest.raises(Killed):
            run(config, tmp_path / "resumed")
    # A step is reported before it is saved.
    with Checkpointer(tmp_path / "resumed", read_only=True) as checkpointer:
        assert checkpointer.latest_step() == 2
    assert "after step 2" in run(config, tmp_path / "resumed")

    assert [line["step"] for line in deterministic(tmp_path / "resumed")] == [1, 2, 3, 4]
    assert deterministic(tmp_path / "resumed") == deterministic(tmp_path / "whole")
    whole, resumed = (final_state(config, tmp_path / name) for name in ("whole", "resumed"))
    for one, other in zip(*map(jax.tree.leaves, (whole, resumed)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert "is done: 4 of 4 steps" in run(config, tmp_path / "resumed")


@pytest.mark.slow
def test_a_run_on_prepared_data_with_documents_apart_resumes(config, corpus, tmp_path, monkeypatch):
    flags = (f"--source={corpus}", f"--output={tmp_path / 'set'}", "--validation_fraction=0.1", "--language=any")
    prepare_main([*flags, "--workers=1", "--record_tokens=50"])
    config.data.source = f"{tmp_path / 'set'}:0.7,{corpus}:0.3"
    config.data.document_mask, config.microbatches = True, 2
    run(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        kill_at(patch, 3)
        with pytest.raises(Killed):
            run(config, tmp_path / "resumed")
    assert "after step 2" in run(config, tmp_path / "resumed")
    assert deterministic(tmp_path / "resumed") == deterministic(tmp_path / "whole")


def test_done_then_more_steps_then_another_config_then_evaluation(config, tmp_path):
    config.steps = 2
    run(config, tmp_path)
    config.steps = 3
    output = run(config, tmp_path)
    assert "after step 2" in output and "schedule is that of 3 steps" in output
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]

    config.seed = 5
    with pytest.raises(CheckpointError, match="seed 0 → 5"):
        run(config, tmp_path)

    evaluation = evaluate_workdir(tmp_path)
    last = read_metrics(tmp_path)[-1]
    np.testing.assert_allclose(evaluation.result.loss, last["validation_loss"], rtol=1e-6)
    assert (evaluation.step, evaluation.recipe, evaluation.trained_with) == (3, "bf16", "bf16")
    assert "step 3, recipe bf16 (trained with bf16): validation loss" in str(evaluation)
    written = json.loads((tmp_path / "evaluation-bf16.json").read_text())
    assert written["validation_loss"] == evaluation.result.loss
    assert evaluate_workdir(tmp_path, batches=0).result.tokens > evaluation.result.tokens
    with pytest.raises(ValueError, match="unknown recipe 'bf17'"):
        evaluate_workdir(tmp_path, "bf17")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["ternary", "ternary_absmean"])
def test_ternary_weights_train_and_evaluate(config, tmp_path, recipe):
    config.recipe = recipe
    run(config, tmp_path)
    lines = read_metrics(tmp_path)
    losses = [line["loss"] for line in lines]
    assert losses[-1] < losses[0] - 0.01
    evaluation = evaluate_workdir(tmp_path)
    assert (evaluation.recipe, evaluation.trained_with) == (recipe, recipe)
    assert evaluation.result.loss == pytest.approx(lines[-1]["validation_loss"], rel=1e-6)
    # The master weights are another model than the ternary ones that were trained.
    assert abs(evaluate_workdir(tmp_path, "bf16").result.loss - evaluation.result.loss) > 1e-4


def test_loss_that_is_not_finite_stops_the_run(config, tmp_path):
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 1e30, 0
    config.checkpoint.every = 1
    with pytest.raises(
        loop.NonFiniteLossError, match=r"^step 2: loss \S+, gradient norm (nan|inf) .* step 1 is saved"
    ) as caught:
        run(config, tmp_path)
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("recipe", "averiz", "unknown recipe 'averiz'"), ("policy", "alllinear", "alllinear"), ("steps", 0, "steps=0")],
)
def test_mistakes_come_before_any_work(config, tmp_path, key, value, message):
    config[key] = value
    with pytest.raises(ValueError, match=message):
        run(config, tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_another_process_in_the_workdir(config, tmp_path):
    with locked(tmp_path / loop.LOCK):
        with pytest.raises(InUseError) as caught:
            run(config, tmp_path)
    message = f"is training in {tmp_path}; wait for it, stop it, or choose another --workdir"
    assert str(caught.value) == f"process {os.getpid()} on {socket.gethostname()} {message}"
    assert [path.name for path in tmp_path.iterdir()] == [loop.LOCK]


def test_batch_that_does_not_fit_the_mesh(config, tmp_path):
    config.mesh.data, config.batch_size = 8, 12
    with pytest.raises(ConfigError, match="use batch_size=16"):
        run(config, tmp_path)


def test_vocabulary_smaller_than_the_tokenizer(config, tmp_path):
    config.model.vocab_size = 1024
    with pytest.raises(ValueError, match="smaller than the 4,096 tokens"):
        run(config, tmp_path)


def test_evaluation_without_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        evaluate_workdir(tmp_path)


@pytest.mark.slow
def test_a_checkpoint_of_eight_devices_goes_on_on_two_and_on_one(config, tmp_path):
    """The same bits of parameters and moments on every mesh, and from there the same loss."""
    config.recipe, config.steps, config.mesh.fsdp = "averis", 2, 8
    run(config, tmp_path / "eight")
    saved, losses = final_state(config, tmp_path / "eight"), []
    for devices in (8, 2, 1):
        config.steps, config.mesh = 2, mesh_of(fsdp=devices)
        for one, other in zip(*map(jax.tree.leaves, (saved, final_state(config, tmp_path / "eight"))), strict=True):
            np.testing.assert_array_equal(one, other)
        shutil.copytree(tmp_path / "eight", tmp_path / str(devices))
        config.steps = 3
        assert "after step 2" in run(config, tmp_path / str(devices))
        losses.append(read_metrics(tmp_path / str(devices))[-1]["loss"])
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)

"""Continued training: the state holds the weights, a run of other sizes or tokens is refused, and resuming is exact."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from configs import smollm2_135m
from fp4jax import models
from fp4jax.checkpoint import CheckpointError
from fp4jax.config import ConfigError
from fp4jax.config_checks import validate
from fp4jax.data import open_dataset
from fp4jax.models.hugging_face import stored_tensors
from fp4jax.models.pretrained import parameter_shapes
from fp4jax.training import train
from fp4jax.training.mesh import make_mesh
from fp4jax.training.optimizer import make_optimizer
from fp4jax.training.state import create_state, model_template
from tests.models import hf_folders

pytestmark = pytest.mark.standard_promotion


@pytest.fixture
def continued(config, tmp_path):
    """(a run that starts from a random model in a folder, the folder)."""
    rng = np.random.default_rng(0)
    config.model.vocab_size, config.model.name, config.model.tie_embeddings = 258, "qwen3", True
    sizes = {
        "model_type": "qwen3", "vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "tie_word_embeddings": True,
    }  # fmt: skip
    shapes = parameter_shapes(models.Qwen3Config.from_config(config.model))
    weights = {}
    for parameter, shape in shapes.items():
        for _, name, stored in stored_tensors(parameter, shape):
            weights[name] = rng.uniform(0.5, 1.5, stored) if "norm" in name else rng.normal(0, 0.2, stored)
            weights[name] = weights[name].astype(np.float32)
    folder = hf_folders.write(tmp_path / "weights", sizes, weights)
    (folder / "tokenizer.json").write_text(hf_folders.tokenizer_json())
    config.init_from = config.data.tokenizer = str(folder)
    return config, folder


def state_of(config):
    template = model_template(config)
    optimizer = make_optimizer(config, template.logical_axes)
    return create_state(config, template, optimizer, make_mesh(config.mesh))


def run(config, workdir):
    train(config, workdir, Console(file=io.StringIO(), width=200))
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_the_first_state_holds_the_weights_in_their_shards(continued):
    config, folder = continued
    config.mesh.fsdp, config.mesh.tensor = 2, 2
    state, loaded = state_of(config), models.load_parameters(folder)
    for name, value in loaded.params.items():
        assert np.array_equal(state.params[name], value), name
    assert state.params["layers.mlp.up_proj.kernel"].sharding.shard_shape((2, 32, 64)) == (2, 16, 32)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == (2, 32, 64)]
    assert moments and all(leaf.sharding.shard_shape(leaf.shape) == (2, 16, 32) for leaf in moments)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.opt_state)) and state.step == 0


def test_another_model_is_refused_with_all_differences(continued):
    config, folder = continued
    config.model.num_layers, config.model.rms_norm_eps, config.model.init_std = 3, 1e-5, 0.5
    with pytest.raises(ConfigError) as raised:
        state_of(config)
    message = str(raised.value)
    assert "model.num_layers=3, it has 2; model.rms_norm_eps=1e-05, it has 1e-06; give" in message
    assert "init_std" not in message
    config.model.name = "llama"
    with pytest.raises(ConfigError, match="model.name='llama', it is 'qwen3'"):
        state_of(config)


def test_another_tokenizer_is_refused(continued):
    config, folder = continued
    config.data.tokenizer = "embedded"
    with pytest.raises(ConfigError, match=f"data.tokenizer='embedded' is not the .* --config.data.tokenizer={folder}"):
        state_of(config)
    (folder / "tokenizer.json").unlink()
    state_of(config)


@pytest.mark.parametrize("fault", ["another model", "no weights"])
def test_weights_that_cannot_be_continued_leave_nothing_behind(continued, tmp_path, fault):
    config, folder = continued
    if fault == "another model":
        config.model.intermediate_size = 96
    else:
        (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="intermediate_size=96|safetensors"):
        run(config, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


def test_the_config_of_smollm2_is_valid():
    config = smollm2_135m.get_config()
    validate(config)
    assert models.parameter_counts(config)[0] == 134_515_008


@pytest.mark.slow
def test_a_run_continues_the_weights_and_resumes_exactly(continued, tmp_path):
    config, folder = continued
    whole = run(config, tmp_path / "whole")
    dataset = open_dataset(config.data, seq_len=config.seq_len, batch_size=config.batch_size, seed=config.seed)
    batch = {name: jnp.asarray(value) for name, value in next(dataset.batches()).items()}
    expected, tokens = models.loss(models.load(folder), batch)
    np.testing.assert_allclose(whole[0]["loss"], expected / tokens, rtol=1e-5)
    config.steps = 2
    run(config, tmp_path / "half")
    (folder / "model.safetensors").unlink()  # they are read once
    config.steps = 4
    assert [row["loss"] for row in run(config, tmp_path / "half")] == [row["loss"] for row in whole]
    config.init_from = ""
    config.steps = 5
    with pytest.raises(CheckpointError, match="init_from '.*weights' → ''"):
        run(config, tmp_path / "half")

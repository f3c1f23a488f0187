"""A run's newest checkpoint as a pretrained model: read, converted, started from."""

import json

import numpy as np
import pytest

from fp4jax import models
from fp4jax.checkpoint import Checkpointer
from fp4jax.config import default_config
from fp4jax.models.convert import convert
from fp4jax.models.pretrained import parameter_shapes

pytestmark = pytest.mark.standard_promotion


@pytest.fixture
def saved(tmp_path):
    """(workdir of a run that saved random parameters, its configuration, the parameters)."""
    config = default_config()
    config.recipe, config.policy = "averis", '[["mlp", "run"]]'
    config.model.update(
        {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "intermediate_size": 48}
    )
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(models.Qwen3Config.from_config(config.model))
    params = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    with Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(3, params, {"step": np.int32(3)}, {}, config)
    return tmp_path / "run", config, params


def test_a_run_is_read(saved):
    workdir, config, params = saved
    loaded = models.load_parameters(workdir, dtype="bfloat16")
    assert loaded.config == models.Qwen3Config.from_config(config.model)
    assert loaded.params.keys() == params.keys()
    assert all(np.array_equal(loaded.params[name], value) for name, value in params.items())
    assert loaded.tokenizer.name == "embedded"


def test_a_run_is_converted_with_its_tokenizer_and_under_its_recipe(saved, tmp_path):
    workdir, _, params = saved
    assert "MB" in convert(str(workdir), str(tmp_path / "plain"))
    plain = models.load_parameters(tmp_path / "plain")
    assert all(np.array_equal(plain.params[name], value) for name, value in params.items())
    assert plain.tokenizer.encode("state of the union") == models.load_parameters(workdir).tokenizer.encode(
        "state of the union"
    )
    said = convert(str(workdir), str(tmp_path / "nvfp4"), format="nvfp4")
    assert "6 linear layers" in said  # the policy leaves attention in high precision
    content = json.loads((tmp_path / "nvfp4" / "config.json").read_text())
    assert len(content["quantization_config"]["ignore"]) == 9 and content["max_position_embeddings"] == 256


def test_a_workdir_without_a_checkpoint(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no checkpoint"):
        models.load_parameters(tmp_path / "run")

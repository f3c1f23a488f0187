"""Building models from configurations, their sizes and their loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import averis_0p6b, averis_moe_7b_a1p5b, averis_moe_tiny, averis_tiny
from fp4jax import models

pytestmark = pytest.mark.standard_promotion


def test_parameter_counts_of_qwen3_0p6b():
    assert models.parameter_counts(averis_0p6b.get_config()) == (596_049_920, 440_467_456)


def test_parameter_counts_of_a_model_with_experts():
    """Active are those of 8 of 64 experts; a dense model's are all active."""
    config = averis_moe_7b_a1p5b.get_config()
    total, without_embedding = models.parameter_counts(config)
    embedding = 151936 * 2048
    assert total == 2 * embedding + 2048 + 16 * (
        64 * 3 * 2048 * 1024 + 64 * 2048 + 2048 * 128 * (16 + 8 + 8 + 16) + 2 * 2048 + 2 * 128
    )
    assert total - without_embedding == embedding
    active = models.active_parameters(config)
    assert active == without_embedding - 16 * 56 * 3 * 2048 * 1024
    assert (round(total / 1e9, 2), round((active + embedding) / 1e9, 2)) == (7.27, 1.63)
    dense = averis_tiny.get_config()
    assert models.active_parameters(dense) == models.parameter_counts(dense)[1]


def test_experts_that_cannot_be_built_are_refused():
    config = averis_moe_tiny.get_config()
    config.model.moe.capacity = "lots"
    with pytest.raises(ValueError, match="capacity must be 'full' or a number above 0 such as '1.25', got 'lots'"):
        models.linear_recipes(config)


def test_the_tiny_configuration_is_tiny():
    total, without_embedding = models.parameter_counts(averis_tiny.get_config())
    assert 3e6 < without_embedding < total < 8e6


def test_an_untied_head_counts_beside_the_embedding():
    config = averis_tiny.get_config()
    tied = models.parameter_counts(config)
    config.model.tie_embeddings = False
    embedding = config.model.vocab_size * config.model.hidden_size
    assert models.parameter_counts(config) == (tied[0] + embedding, tied[1] + embedding)


def test_a_llama_is_trained_like_any_model_and_lacks_the_norms_of_heads():
    config = averis_tiny.get_config()
    total, _ = models.parameter_counts(config)
    config.model.name = "llama"
    assert models.parameter_counts(config)[0] == total - 2 * config.model.num_layers * config.model.head_dim
    model = nnx.eval_shape(lambda: models.build(config, nnx.Rngs(0)))
    assert isinstance(model, models.Llama) and model.config == models.LlamaConfig.from_config(config.model)


def test_unknown_names_are_refused():
    for key, message in (("model.name", "unknown model 'x'"), ("recipe", "unknown recipe"), ("policy", "policy 'x'")):
        config = averis_tiny.get_config()
        config.update_from_flattened_dict({key: "x"})
        with pytest.raises(ValueError, match=message):
            nnx.eval_shape(lambda config=config: models.build(config, nnx.Rngs(0)))


def test_linear_recipes_are_those_of_the_model():
    config = averis_tiny.get_config()
    config.policy = "nvidia"
    recipes = models.linear_recipes(config)
    assert len(recipes) == 7 * config.model.num_layers
    assert recipes["layers.2.mlp.down_proj"].name == "averis"
    assert {value.name for path, value in recipes.items() if path.startswith("layers.3.")} == {"bf16"}
    model = nnx.eval_shape(lambda: models.build(config, nnx.Rngs(0)))
    assert [list(layers) for layers, _ in model.segments] == [[0, 1, 2], [3]]
    built = [value for layers, products in model.segments for _ in layers for value in products.recipes]
    assert built == list(recipes.values())
    config.model.num_layers = 1
    with pytest.raises(ValueError, match="policy 'nvidia' keeps the last blocks .* this model has 1"):
        models.linear_recipes(config)


def test_loss_counts_real_targets_only():
    config = averis_tiny.get_config()
    config.recipe = "bf16"
    config.model.update(hidden_size=32, num_layers=1, head_dim=16, num_heads=2, num_kv_heads=1, intermediate_size=32)
    model = models.build(config, nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, config.model.vocab_size)
    mask = jnp.ones((2, 16)).at[1, 8:].set(0.0)
    total, count = models.loss(model, dict(tokens=tokens, targets=tokens, loss_mask=mask))
    log_p = np.asarray(jax.nn.log_softmax(model(tokens)), np.float64)
    nll = -np.take_along_axis(log_p, np.asarray(tokens)[..., None], axis=-1)[..., 0]
    assert count == 24
    np.testing.assert_allclose(total, (nll * np.asarray(mask)).sum(), rtol=1e-5)


def test_loss_gives_the_model_the_documents_that_the_data_have():
    class Recorder(nnx.Module):
        head = jnp.zeros((8, 4))

        def hidden(self, tokens, **kwargs):
            given.append({name for name, value in kwargs.items() if value is not None})
            return jnp.zeros((*tokens.shape, 4))

    given = []
    tokens = jnp.zeros((1, 4), jnp.int32)
    batch = {"tokens": tokens, "targets": tokens, "loss_mask": jnp.ones((1, 4))}
    models.loss(Recorder(), batch)
    models.loss(Recorder(), batch | {"segment_ids": tokens, "positions": tokens})
    assert given == [set(), {"segment_ids", "positions"}]

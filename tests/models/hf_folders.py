"""Small Hugging Face folders: the models of the fixtures, and tokenizers."""

import json
import pathlib

import ml_dtypes
import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import pre_tokenizers

from tests.models.gguf_files import FIXTURES

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def read_fixture(name: str) -> tuple[dict, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(config.json, everything in the file, weights by name)."""
    data = dict(np.load(FIXTURES / f"{name}.npz"))
    weights = {key.removeprefix("weight:"): value for key, value in data.items() if key.startswith("weight:")}
    config = json.loads(str(data["config"]))
    if config["model_type"] == "qwen3_moe":
        config["router_aux_loss_coef"] = 0.001
    return config, data, weights


def write(folder: pathlib.Path, config: dict, weights: dict[str, np.ndarray], shards: int = 1) -> pathlib.Path:
    """Writes a folder; with several shards the tensors are dealt out in turn, and there is an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        safetensors.numpy.save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(weights.items())[number::shards])
        safetensors.numpy.save_file(part, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_fixture(folder: pathlib.Path, name: str, dtype: str = "float32", shards: int = 1, **changes):
    """(the folder with a fixture's model in `dtype`, everything in the fixture); None takes a key out of its config."""
    config, data, weights = read_fixture(name)
    config = {key: value for key, value in (config | changes).items() if value is not None}
    return write(folder, config, {k: w.astype(DTYPES[dtype]) for k, w in weights.items()}, shards), data


def read_tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder that has no float8, read by the library."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= safetensors.numpy.load_file(path)
    return tensors


def tokenizer_json(vocab_size: int = 257, first: str = "<|endoftext|>") -> str:
    """A byte-level tokenizer without merges."""
    tokens = [first, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {token: index for index, token in enumerate(tokens[:vocab_size])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([first])
    return tokenizer.to_str()

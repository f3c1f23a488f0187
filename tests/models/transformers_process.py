"""What `transformers` and `compressed-tensors` make of folders of ours; run with .venv-peer's Python, by the test.

    python transformers_process.py JOBS.json

JOBS.json is a list of {"do": NAME, ...}, done in order:

    logits      folder, tokens (.npy), out: logits float32 of the model, loaded as its config.json says; out gets them,
                and with "text" also the ids that the folder's tokenizer gives it
    decompress  folder, out: every NVFP4 layer, read by the library's compressor, by name as float32
    save        folder, config, seed, dtype, max_shard_size: a random model of transformers', written by itself
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file


def logits(folder, tokens, out, text=None):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    wrong = {key: sorted(found) for key, found in info.items() if found}
    assert not wrong, f"{folder}: {wrong}"
    with torch.no_grad():
        result = {"logits": model(torch.from_numpy(np.load(tokens)).long()).logits.float().numpy()}
    if text is not None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        result["ids"] = tokenizer(text, add_special_tokens=False)["input_ids"]
    np.savez(out, **result)


def decompress(folder, out):
    config = QuantizationConfig(**json.loads(Path(folder, "config.json").read_text())["quantization_config"])
    (scheme,) = config.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(config.format)
    tensors = load_file(Path(folder, "model.safetensors"))
    layers = {}
    for name in tensors:
        if name.endswith(".weight_packed"):
            layer = name.removesuffix(".weight_packed")
            parts = {
                key.rpartition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{layer}.weight")
            }
            layers[layer] = compressor.decompress(parts, scheme)["weight"].float().numpy()
    np.savez(out, **layers)


def save(folder, config, seed, dtype, max_shard_size):
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        {"logits": logits, "decompress": decompress, "save": save}[job.pop("do")](**job)

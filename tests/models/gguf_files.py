"""Small GGUF files: the tiny Llama of a fixture, and a byte-level tokenizer."""

import json
import pathlib

import gguf
import numpy as np
from tokenizers import pre_tokenizers

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk",
}  # fmt: skip


def read_fixture(name: str = "llama_gqa_tied") -> tuple[dict, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(Hugging Face configuration, everything in the file, weights by their GGUF names with rotary pairs adjacent)."""
    data = dict(np.load(FIXTURES / f"{name}.npz"))
    config = json.loads(str(data["config"]))
    tensors = {}
    for key, weight in data.items():
        if key.startswith("weight:"):
            name = key.removeprefix("weight:")
            if "q_proj" in name or "k_proj" in name:
                weight = adjacent_pairs(weight, config["head_dim"])
            for theirs, ours in NAMES.items():
                name = name.replace(theirs, ours)
            tensors[name] = weight
    return config, data, tensors


def adjacent_pairs(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Row by row: rows i and i + head_dim / 2 of a head, which turn together, become rows 2i and 2i + 1."""
    result = np.empty_like(weight)
    for head in range(0, len(weight), head_dim):
        for i in range(head_dim // 2):
            result[head + 2 * i] = weight[head + i]
            result[head + 2 * i + 1] = weight[head + i + head_dim // 2]
    return result


def metadata_of(config: dict) -> dict:
    return {
        "llama.block_count": config["num_hidden_layers"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.key_length": config["head_dim"],
        "llama.rope.freq_base": config["rope_theta"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
    }


def tokenizer_metadata(vocab_size: int) -> dict:
    """All 256 bytes, "<|endoftext|>", a few merges ("Ġ" is a space; one spans digits, which are never joined)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["h e", "he l", "Ġ t", "1 2"]
    tokens = ["<|endoftext|>", *alphabet, *(merge.replace(" ", "") for merge in merges)]
    tokens += [f"<unused{i}>" for i in range(vocab_size - len(tokens))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1 if token in alphabet or len(token) < 5 else 3 for token in tokens],
        "tokenizer.ggml.merges": merges,
    }


def write(path: pathlib.Path, metadata: dict, tensors: dict, architecture: str = "llama", **types: str) -> pathlib.Path:
    """Writes a file; `types` gives tensors a quantized type by the last part of their name (ffn_up="Q8_0")."""
    writer = gguf.GGUFWriter(path, architecture)
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    for key, value in metadata.items():
        add[type(value)](key, value)
    for name, weight in tensors.items():
        kind = types.get(name.split(".")[-2])
        if kind is None:
            writer.add_tensor(name, weight)
        else:
            quantized_type = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quantize(weight, quantized_type), raw_dtype=quantized_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

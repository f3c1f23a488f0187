"""A Llama in a GGUF file, as a configuration and parameters of ours."""

import math
import re
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from fp4jax.data.errors import DataError
from fp4jax.data.gguf import GGUFFile
from fp4jax.models.llama import LlamaConfig
from fp4jax.models.problems import raise_problems

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
# Our parameter → the tensor's name in GGUF. Parameters below "layers." are stacked, one tensor for each layer.
_TENSORS = {
    "embedding": _EMBEDDING,
    "norm.weight": "output_norm.weight",
    "lm_head": _HEAD,
    "layers.input_layernorm.weight": "blk.{}.attn_norm.weight",
    "layers.self_attn.q_proj.kernel": "blk.{}.attn_q.weight",
    "layers.self_attn.k_proj.kernel": "blk.{}.attn_k.weight",
    "layers.self_attn.v_proj.kernel": "blk.{}.attn_v.weight",
    "layers.self_attn.o_proj.kernel": "blk.{}.attn_output.weight",
    "layers.post_attention_layernorm.weight": "blk.{}.ffn_norm.weight",
    "layers.mlp.gate_proj.kernel": "blk.{}.ffn_gate.weight",
    "layers.mlp.up_proj.kernel": "blk.{}.ffn_up.weight",
    "layers.mlp.down_proj.kernel": "blk.{}.ffn_down.weight",
}
# What a config.json calls what the model needs not: key → key in GGUF.
_REST = {
    "max_position_embeddings": "llama.context_length",
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
}


def read_config(file: GGUFFile, dtype: str) -> LlamaConfig:
    """The hyperparameters of a file, for activations of `dtype`.

    Raises:
      DataError: another architecture, a missing hyperparameter, or scaled rotary positions; all of them are listed.
    """
    architecture = file.value("general.architecture", str)
    if architecture != "llama":
        raise DataError(f"{file.path} holds a model of architecture {architecture!r}; supported: 'llama'")
    sizes = {
        "num_layers": "llama.block_count",
        "hidden_size": "llama.embedding_length",
        "intermediate_size": "llama.feed_forward_length",
        "num_heads": "llama.attention.head_count",
        "rope_theta": "llama.rope.freq_base",
        "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    }
    problems = [f"no {key!r}" for key in sizes.values() if key not in file]
    problems += [f"no tensor {_EMBEDDING!r}"] * (_EMBEDDING not in file.shapes)
    unsupported = ("llama.rope.scaling.type", "llama.rope.scale_linear", "llama.expert_count")
    problems += [f"unsupported {key!r}" for key in unsupported if key in file]
    _raise_problems(file, problems)
    kinds = {"rope_theta": float, "rms_norm_eps": float}
    values = {name: file.value(key, kinds.get(name, int)) for name, key in sizes.items()}
    problems = [f"{key}={values[name]}" for name, key in sizes.items() if not 0 < values[name] < math.inf]
    if values["num_layers"] > len(file.shapes):
        problems.append(f"{values['num_layers']:,} blocks in {len(file.shapes):,} tensors")
    _raise_problems(file, problems)
    heads = values["num_heads"]
    head_dim = _optional(file, "llama.attention.key_length", values["hidden_size"] // heads)
    rotated = _optional(file, "llama.rope.dimension_count", head_dim)
    _raise_problems(file, [f"rotary positions on {rotated} of {head_dim} dimensions"] * (rotated != head_dim))
    try:
        return LlamaConfig(
            **values,
            num_kv_heads=_optional(file, "llama.attention.head_count_kv", heads),
            head_dim=head_dim,
            vocab_size=file.shapes[_EMBEDDING][0],
            tie_embeddings=_HEAD not in file.shapes,
            dtype=dtype,
        )
    except ValueError as error:
        raise DataError(f"{file.path}: {error}") from error


def read_parameters(
    file: GGUFFile, config: LlamaConfig, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Float32[Array, "..."]]:
    """Every parameter by its dotted path, dequantized.

    Args:
      shapes: the model's parameters and their shapes.

    Raises:
      DataError: tensors that are missing, of another shape or not known; they are listed.
    """
    expected = {}
    for name, shape in shapes.items():
        stacked = name.startswith("layers.")
        of_one = _file_order(name, shape[1:] if stacked else shape)
        expected |= {_TENSORS[name].format(layer): of_one for layer in range(shape[0] if stacked else 1)}
    problems = [f"no tensor {name!r}" for name in expected if name not in file.shapes]
    problems += [f"tensor {name!r} is not part of a Llama" for name in file.shapes if name not in expected]
    for name, shape in expected.items():
        if file.shapes.get(name, shape) != shape:
            problems.append(f"tensor {name!r} is {list(file.shapes[name])}, expected {list(shape)}")
    _raise_problems(file, problems)
    return {name: _parameter(file, config, name) for name in shapes}


def read_rest(file: GGUFFile) -> dict[str, int]:
    """What a Hugging Face `config.json` would say besides the hyperparameters."""
    return {key: file.value(theirs, int) for key, theirs in _REST.items() if theirs in file}


def _parameter(file: GGUFFile, config: LlamaConfig, name: str) -> Float32[Array, "..."]:
    if not name.startswith("layers."):
        return jnp.asarray(file.tensor(_TENSORS[name]))
    layers = [file.tensor(_TENSORS[name].format(layer)) for layer in range(config.num_layers)]
    if re.search(r"[qk]_proj", name):
        layers = [_half_split(weight, config.head_dim) for weight in layers]
    return jnp.asarray(np.stack([weight.T for weight in layers]))


def _half_split(weight: Float32[np.ndarray, "out in"], head_dim: int) -> Float32[np.ndarray, "out in"]:
    """Rows of q or k from GGUF's rotary pairs, (2i, 2i + 1) of a head, to ours, (i, i + head_dim / 2)."""
    paired = weight.reshape(-1, head_dim // 2, 2, weight.shape[1])
    return paired.swapaxes(1, 2).reshape(weight.shape)


def _file_order(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The file holds kernels as [outputs, inputs], we as [inputs, outputs]."""
    return shape[::-1] if name.endswith(".kernel") else shape


def _optional(file: GGUFFile, key: str, default: int) -> int:
    return file.value(key, int) if key in file else default


def _raise_problems(file: GGUFFile, problems: list[str]) -> None:
    raise_problems(file.path, "is not a Llama that fp4jax can run", problems)

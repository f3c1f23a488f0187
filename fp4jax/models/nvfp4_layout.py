"""NVFP4 weights as the library `compressed-tensors` stores them ("nvfp4-pack-quantized"), which vLLM and others read.

A weight [outputs, inputs] becomes three tensors (read from the source of version 0.20.0, `compressors/nvfp4`):

    NAME.weight_packed        uint8 [outputs, inputs / 2]     two E2M1 codes a byte, the even input in the low nibble
    NAME.weight_scale         E4M3 [outputs, inputs / 16]     one for every 16 inputs
    NAME.weight_global_scale  float32 [1]                     the reciprocal of our tensor scale: 2688 / amax

    value = code × (weight_scale / weight_global_scale)       in float32; that library then rounds to bfloat16

Our `QTensor` computes code × weight_scale × (amax / 2688): the same but for the last bits of float32. Layers that are
multiplied as one (q, k, v; gate, up) share a global scale, because inference engines keep one for all of them.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jaxtyping import Float32, Shaped, UInt8

from fp4jax.numerics import E2M1, E4M3, Extent, quantize_blocks
from fp4jax.recipes import Operand

FORMAT = "nvfp4-pack-quantized"
QUANT_METHOD = "compressed-tensors"
BLOCK = 16
PARTS = PACKED, SCALE, GLOBAL_SCALE = "weight_packed", "weight_scale", "weight_global_scale"
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one module that share a global scale."""

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
# What the layout cannot say otherwise, by the keys of a group's "weights".
_WEIGHTS = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": BLOCK, "symmetric": True}


def can_store(operand: Operand) -> bool:
    """Whether the layout holds what the operand does to a weight: NVFP4 codes and scales of the weight itself."""
    format = operand.format
    if format is None or operand != Operand(format=format, block=operand.block, candidates=operand.candidates):
        return False
    return (format.element, format.block, format.scale, format.outer) == (E2M1, BLOCK, E4M3, Extent.MATRIX)


def quantize_weights(
    kernels: Mapping[str, Float32[np.ndarray, "inputs outputs"]], operands: Mapping[str, Operand]
) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The layout's tensors of the kernels of one module by their full names, each without "weight" at its end.

    Args:
      kernels: by the path that their tensors will have ("model.layers.0.mlp.up_proj"); `inputs` a multiple of 16.
      operands: how each is quantized; `can_store` of each.
    """
    amax = {name: np.max(np.abs(kernel)).reshape(1, 1) for name, kernel in kernels.items()}
    tensors = {}
    for name, kernel in kernels.items():
        shared = [amax[other] for other in kernels if _fused(name, other) and operands[other] == operands[name]]
        q = _quantize(kernel, np.max(shared, axis=0), operands[name])
        scales = np.asarray(q.scales)
        if operands[name].block:
            scales = np.repeat(scales, BLOCK, axis=1)[:, : kernel.shape[1]]
        codes = np.asarray(q.codes)[:, : kernel.shape[1]]
        tensors[f"{name}.{PACKED}"] = np.ascontiguousarray(codes.T)
        tensors[f"{name}.{SCALE}"] = np.ascontiguousarray(scales.T).view(ml_dtypes.float8_e4m3fn)
        tensors[f"{name}.{GLOBAL_SCALE}"] = _global_scale(q)
    return tensors


@functools.partial(jax.jit, static_argnames="operand")
def _quantize(kernel, amax, operand: Operand):
    return quantize_blocks(
        kernel, operand.format, axes=(-2, -1) if operand.block else (-2,), pack_axis=-2, amax=amax,
        candidates=operand.candidates,
    )  # fmt: skip


def _global_scale(q) -> Float32[np.ndarray, "1"]:
    amax = np.asarray(q.amax, np.float32).reshape(1)
    if amax[0] == 0:
        return np.ones(1, np.float32)
    with np.errstate(over="ignore"):
        return np.minimum(np.float32(q.format.range) / amax, np.finfo(np.float32).max)


def _fused(name: str, other: str) -> bool:
    """Whether two layers are one product to an inference engine; a layer and itself are."""
    (parent, _, layer), (other_parent, _, other_layer) = name.rpartition("."), other.rpartition(".")
    return parent == other_parent and (layer == other_layer or any({layer, other_layer} <= set(f) for f in FUSED))


def dequantize(
    packed: UInt8[np.ndarray, "outputs half"],
    scale: Shaped[np.ndarray, "outputs blocks"],
    global_scale: Float32[np.ndarray, "1"],
) -> Float32[np.ndarray, "outputs inputs"]:
    """The values of the three tensors, in the layout's own order of operations."""
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(packed.shape[0], -1)
    factors = scale.astype(np.float32) / global_scale
    return _E2M1[codes] * np.repeat(factors, BLOCK, axis=1)


def dequantize_named(tensors: Mapping[str, Shaped[np.ndarray, "..."]], name: str) -> Float32[np.ndarray, "..."]:
    """The weight of the layer `name` among the layout's tensors."""
    return dequantize(*(np.asarray(tensors[f"{name}.{suffix}"]) for suffix in PARTS))


def shapes(weight: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Suffix → (shape, safetensors dtype) of the tensors of a weight [outputs, inputs]."""
    outputs, inputs = weight
    return {
        PACKED: ((outputs, inputs // 2), "U8"),
        SCALE: ((outputs, inputs // BLOCK), "F8_E4M3"),
        GLOBAL_SCALE: ((1,), "F32"),
    }


def quantization_config(high_precision: Sequence[str]) -> dict[str, Any]:
    """What `config.json` says of a model whose linear layers are stored so, but for those named."""
    weights = _WEIGHTS | {"dynamic": False, "scale_dtype": "torch.float8_e4m3fn"}
    group = {"format": FORMAT, "targets": ["Linear"], "weights": weights}
    group |= {"input_activations": None, "output_activations": None}
    return {
        "quant_method": QUANT_METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(high_precision),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def config_problems(content: object) -> list[str]:
    """Why a "quantization_config" is not of this layout; empty where it is."""
    if not isinstance(content, dict):
        return [f"quantization_config={content!r}"]
    method, layout = content.get("quant_method"), content.get("format")
    if (method, layout) != (QUANT_METHOD, FORMAT):
        return [f"quantized by {method!r} in format {layout!r}, supported: {QUANT_METHOD!r} in {FORMAT!r}"]
    groups = content.get("config_groups")
    schemes = groups.values() if isinstance(groups, dict) else [None]
    problems = []
    for scheme in schemes:
        weights = scheme.get("weights") if isinstance(scheme, dict) else None
        if not isinstance(weights, dict):
            problems.append("quantization_config has a group without weights")
            continue
        problems += [
            f"quantized weights have {k}={weights[k]!r}" for k, v in _WEIGHTS.items() if weights.get(k, v) != v
        ]
    return problems

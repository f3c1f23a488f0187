"""NVFP4 in the layout of `compressed-tensors`: read by its own definition, written with our quantizer's bits."""

import functools

import jax
import ml_dtypes
import numpy as np
import pytest

from fp4jax import NVFP4, quantize
from fp4jax.models import nvfp4_layout
from fp4jax.numerics import NVFP4_256
from fp4jax.recipes import Operand, recipe

LAYER = "model.layers.0.mlp.down_proj"
NVFP4_ROWS, NVFP4_SQUARES = Operand(NVFP4), Operand(NVFP4, block=(16, 16))


@functools.partial(jax.jit, static_argnames="operand")
def quantized_values(kernel, operand):
    options = dict(axis=-2, block=operand.block, candidates=operand.candidates)
    return quantize(kernel, operand.format, **options).dequantize()


def random_kernel(seed, shape, scale=1.0):
    rng = np.random.default_rng(seed)
    return (scale * rng.standard_normal(shape) * np.exp(rng.standard_normal(shape))).astype(np.float32)


def element_by_element(tensors, name):
    """The layout's definition, one element at a time: bits of E2M1 from scratch, ml_dtypes for E4M3."""
    packed, scale, total = (
        np.asarray(tensors[f"{name}.weight_{part}"]) for part in ("packed", "scale", "global_scale")
    )
    weight = np.empty((packed.shape[0], packed.shape[1] * 2), np.float32)
    for row, column in np.ndindex(*weight.shape):
        code = int(packed[row, column // 2]) >> (4 * (column % 2)) & 15
        exponent, mantissa = code >> 1 & 3, code & 1
        magnitude = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
        factor = np.float32(scale[row, column // 16]) / np.float32(total[0])
        weight[row, column] = np.float32(-magnitude if code & 8 else magnitude) * factor
    return weight


@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e4])
@pytest.mark.parametrize(
    "operand",
    [
        pytest.param(NVFP4_ROWS, id="1x16"),
        pytest.param(NVFP4_SQUARES, id="16x16", marks=pytest.mark.slow),
        pytest.param(Operand(NVFP4_256, candidates=(6.0, 4.0)), id="4/6", marks=pytest.mark.slow),
    ],
)
def test_the_tensors_hold_what_our_quantizer_gives(operand, scale):
    kernel = random_kernel(0, (48, 20), scale)
    tensors = nvfp4_layout.quantize_weights({LAYER: kernel}, {LAYER: operand})
    expected = {
        LAYER + ".weight_packed": (20, 24),
        LAYER + ".weight_scale": (20, 3),
        LAYER + ".weight_global_scale": (1,),
    }
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected
    assert tensors[LAYER + ".weight_scale"].dtype == ml_dtypes.float8_e4m3fn
    values = nvfp4_layout.dequantize_named(tensors, LAYER)
    assert np.array_equal(values, element_by_element(tensors, LAYER))
    ours = quantized_values(kernel, operand)
    np.testing.assert_allclose(values.T, ours, rtol=2**-22)
    assert 0.02 < np.linalg.norm(values.T - kernel) / np.linalg.norm(kernel) < 0.25  # squares of heavy tails


def test_layers_that_engines_fuse_share_a_global_scale():
    names = [f"model.layers.0.{layer}" for layer in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj")]
    kernels = {name: random_kernel(i, (32, 16), 10.0**i) for i, name in enumerate(names)}
    tensors = nvfp4_layout.quantize_weights(kernels, dict.fromkeys(names, NVFP4_ROWS))
    q, k, o = (tensors[name + ".weight_global_scale"].item() for name in names)
    assert q == k == pytest.approx(2688 / float(np.abs(kernels[names[1]]).max()), rel=1e-6) and o != q
    for name, kernel in kernels.items():
        values = nvfp4_layout.dequantize_named(tensors, name)
        assert np.linalg.norm(values.T - kernel) / np.linalg.norm(kernel) < 0.15, name


def test_zeros_stay_zeros():
    tensors = nvfp4_layout.quantize_weights({LAYER: np.zeros((16, 4), np.float32)}, {LAYER: NVFP4_ROWS})
    assert tensors[LAYER + ".weight_global_scale"] == 1 and not nvfp4_layout.dequantize_named(tensors, LAYER).any()


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        *[(name, True) for name in ("nvfp4", "averis", "nvfp4_hadamard", "four_over_six", "quartet2")],
        *[(name, False) for name in ("bf16", "fp8", "mxfp4", "mxfp8", "metis", "tetrajet2", "ternary")],
    ],
)
def test_which_recipes_can_be_stored(name, stored):
    assert nvfp4_layout.can_store(recipe(name).fprop.rhs) is stored


def test_configs_of_other_layouts_are_refused():
    config = nvfp4_layout.quantization_config(["lm_head"])
    assert nvfp4_layout.config_problems(config) == []
    weights = config["config_groups"]["group_0"]["weights"]
    other = config | {"config_groups": {"a": {"weights": weights | {"group_size": 32}}, "b": {}}}
    assert nvfp4_layout.config_problems(other) == [
        "quantized weights have group_size=32",
        "quantization_config has a group without weights",
    ]
    assert nvfp4_layout.config_problems(config | {"format": "pack-quantized"}) == [
        "quantized by 'compressed-tensors' in format 'pack-quantized', "
        "supported: 'compressed-tensors' in 'nvfp4-pack-quantized'"
    ]

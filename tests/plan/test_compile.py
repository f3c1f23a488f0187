"""A small model's step compiled for machines that are not there, by the command itself (`make test-compile`)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fp4jax.plan import targets

REPOSITORY = Path(__file__).resolve().parents[2]
LAYERS, LINEARS, MICROBATCHES = 2, 7, 2
TINY = {
    "batch_size": 16, "microbatches": MICROBATCHES, "seq_len": 128, "mesh.fsdp": -1, "model.vocab_size": 512,
    "model.hidden_size": 128, "model.num_layers": LAYERS, "model.num_heads": 2, "model.num_kv_heads": 2,
    "model.head_dim": 64, "model.intermediate_size": 256,
}  # fmt: skip

# Kernels that quantize. Weights: rows for one product and columns for the other, of every linear layer, once a step. Of
# every microbatch: column means, rows and columns of what goes into q, k and v together, into gate and up together,
# into o and into down, and of every linear layer's output gradient. With one microbatch 47 calls a layer. Without those
# in fusions, where XLA has put kernels that cut a layer's weights out of their stack, it would be fewer.
OF_WEIGHTS, OF_INPUTS, OF_GRADIENTS = 2 * LINEARS, 3 * 4, 3 * LINEARS
CALLS = LAYERS * (OF_WEIGHTS + MICROBATCHES * (OF_INPUTS + OF_GRADIENTS))

pytestmark = pytest.mark.slow


def plan_of(target, folder, config="averis_tiny", **changes):
    try:
        targets.parse(target).check_installed()
    except ValueError as error:
        pytest.skip(str(error))
    out = folder / "plan.json"
    command = [
        sys.executable,
        "-m",
        "fp4jax.plan",
        f"--config=configs/{config}.py",
        f"--target={target}",
        f"--out={out}",
    ]
    command += [f"--config.{key}={value}" for key, value in (TINY | changes).items()]
    run = subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert f"{target}: " in run.stdout
    written = json.loads(out.read_text())
    assert written["commit"] and written["command"].startswith("python -m fp4jax.plan --config=configs/averis_")
    assert str(folder) not in out.read_text()
    (plan,) = written["plans"]
    assert plan["unknown_loops"] == 0
    found = plan["memory"]
    # The peak is of what is live at once; temporaries are the space that is allotted, gaps between arrays included.
    assert 0 < found["temporaries"] < 1.1 * found["peak"] and 0 < found["aliased"] <= found["results"]
    assert plan["quantization"]["coded"] == plan["quantization"]["operands"]
    assert (plan["quantization"]["operands"] > 0) == (changes.get("recipe") != "bf16")
    assert plan["quantization"]["folded"] == []
    return plan


def each(way):
    return {gemm: {way: LAYERS * LINEARS * MICROBATCHES} for gemm in ("fprop", "dgrad", "wgrad")}


def test_blackwell_multiplies_every_linear_layer_natively(tmp_path):
    plan = plan_of("b200:1", tmp_path)
    assert plan["memory"]["peak"] <= plan["memory"]["arguments"] + plan["memory"]["temporaries"] + 4096
    assert plan["gemms"] == each("native")
    assert plan["corrections"] == {"native": 2 * LAYERS * LINEARS * MICROBATCHES}  # the means, fprop and dgrad
    assert plan["quantization"]["emulated"] == []
    # The loops multiplied, and no call that is not one of these.
    calls = sum(plan["custom_calls"][name] for name in plan["custom_calls"] if "blockScaledDot" in name)
    assert calls == (3 + 2) * LAYERS * LINEARS * MICROBATCHES


def test_blackwell_multiplies_every_expert_natively(tmp_path):
    """Products of gate, up and down are of all experts at once; with attention's four they are seven a layer too."""
    plan = plan_of("b200:1", tmp_path, "averis_moe_tiny")
    assert plan["gemms"] == each("native")
    assert plan["corrections"] == {"native": 2 * LAYERS * LINEARS * MICROBATCHES}
    assert plan["quantization"]["emulated"] == []
    assert plan["custom_calls"]["__cudnn$blockScaledDot"] == (3 + 2) * LAYERS * LINEARS * MICROBATCHES


def test_hopper_emulates_and_has_kernels_without_spills(tmp_path):
    plan = plan_of("h200:1", tmp_path, **{"model.dtype": "bfloat16"})
    attention = {name: count for name, count in plan["custom_calls"].items() if "fmha" in name}
    assert sorted(attention.values()) == [LAYERS * MICROBATCHES] * 2, attention  # forward and backward
    assert plan["gemms"] == each("emulated in bfloat16")
    assert plan["collectives"] == {} and plan["quantization"]["native"] == []
    assert plan["custom_calls"]["mosaic_gpu_v2"] == CALLS
    names = {kernel["name"].rsplit("_", 1)[0] for kernel in plan["kernels"]}
    assert {"column_stats", "quantize_rows_centered", "quantize_columns_centered"} <= names
    check_kernels(plan)


def check_kernels(plan):
    limit = 232_448  # bytes of shared memory that a block of an H200 may ask for
    for kernel in plan["kernels"]:
        assert kernel["spill_bytes"] == 0 and 0 < kernel["registers"] <= 255, kernel
        assert kernel["static_shared_bytes"] + kernel["dynamic_shared_bytes"] <= limit, kernel


FUSED = {"gemm": "fused", "model.dtype": "bfloat16"}


def check_every_product_is_fused(plan):
    assert plan["gemms"] == each("fused")
    found = plan["quantization"]
    assert found["fused"] == [f"{gemm} NVFP4 x NVFP4" for gemm in ("dgrad", "fprop", "wgrad")]
    assert found["emulated"] == found["native"] == []
    # Most of them in fusions, which cut a layer's codes out of a stack.
    assert plan["custom_calls"]["mosaic_gpu_v2"] == CALLS + 3 * LAYERS * LINEARS * MICROBATCHES
    check_kernels(plan)
    products = [kernel for kernel in plan["kernels"] if kernel["name"].startswith("dequant_matmul")]
    assert products and all(kernel["dynamic_shared_bytes"] > 100_000 for kernel in products)


def test_hopper_multiplies_codes_in_one_kernel(tmp_path):
    check_every_product_is_fused(plan_of("h200:1", tmp_path, **FUSED))


def test_eight_hopper_gpus_multiply_codes_and_scatter_gradients(tmp_path):
    plan = plan_of("h200:8", tmp_path, **FUSED, **{"mesh.data": 2, "mesh.fsdp": 4})
    check_every_product_is_fused(plan)
    hidden, inside, vocabulary = (TINY[f"model.{name}"] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    weights = LAYERS * (4 * hidden * hidden + 3 * hidden * inside)
    assert plan["collectives"]["reduce-scatter"]["bytes"] >= 4 * MICROBATCHES * weights  # in float32
    # Both packings of every weight in codes and scales, once a step; a microbatch's activations would come on top.
    codes = {array: found for array, found in plan["gathers"].items() if array.startswith("u8[")}
    assert sum(found["count"] for found in codes.values()) == 2 * 2 * LAYERS * LINEARS
    assert sum(found["bytes"] for found in codes.values()) == plan["weight_gathers"]
    # The others: token numbers, the embedding, rows of partial sums from the devices of one axis.
    for array in plan["gathers"].keys() - codes.keys():
        dtype, shape = array.removesuffix("]").split("[")
        sizes = [int(size) for size in shape.split(",") if size != "1"]
        assert dtype == "s32" or vocabulary in sizes or (len(sizes) == 2 and sizes[0] in (2, 4)), array


def test_a_mean_adds_little_to_the_memory_traffic(tmp_path):
    """Of layers as large as Qwen3-0.6B's, nearly all of it: the vocabulary is small."""
    large = {"model.hidden_size": 1024, "model.num_heads": 16, "model.num_kv_heads": 8, "model.head_dim": 128}
    large |= {"model.intermediate_size": 3072, "seq_len": 4096, "microbatches": 1, "backend": "pallas"}
    large |= {"model.remat": "linear_inputs", "model.dtype": "bfloat16"}
    averis, nvfp4 = (plan_of("h200:1", tmp_path, recipe=recipe, **large) for recipe in ("averis", "nvfp4"))
    assert averis["bytes_accessed"] <= 1.03 * nvfp4["bytes_accessed"]


def test_eight_gpus_exchange_gradients(tmp_path):
    plan = plan_of("b200:8", tmp_path)
    assert (plan["devices"], plan["mesh"]["fsdp"]) == (8, 8)
    assert plan["gemms"] == each("native")
    whole = plan_of("b200:8", tmp_path, recipe="bf16")
    assert 0 < plan["weight_gathers"] <= 0.30 * whole["weight_gathers"]
    # Beside codes and scales (an axis of 128 / 16) nothing travels that a plain program does not gather too: rows of
    # means at most.
    for array in plan["gathers"].keys() - whole["gathers"].keys():
        dtype, shape = array.removesuffix("]").split("[")
        sizes = [int(size) for size in shape.split(",") if size != "1"]
        assert dtype in ("u8", "s8", "f8e4m3fn") or len(sizes) <= 1 or 8 in sizes, array


def test_tpus(tmp_path):
    plan = plan_of("v5e:2x2", tmp_path)
    assert plan["devices"] == 4 and plan["kernels"] == []
    assert plan["gemms"] == each("emulated in bfloat16")
    assert plan["collectives"]


def test_a_configuration_that_does_not_fit_is_refused_in_one_line(tmp_path):
    try:
        targets.parse("b200:8").check_installed()
    except ValueError as error:
        pytest.skip(str(error))
    command = [sys.executable, "-m", "fp4jax.plan", "--config=configs/averis_tiny.py", "--target=b200:8"]
    run = subprocess.run(
        [*command, "--config.mesh.data=16"], cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 1 and "error: b200:8: mesh data=16" in run.stderr and run.stderr.count("\n") == 1

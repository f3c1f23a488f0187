"""What the committed programs of Qwen3-0.6B on one GPU show (results/plan/*_0p6b_*.json): see RESULTS.md."""

from itertools import product

import pytest

from scripts.markdown import read

REMAT = ("linear_inputs", "none")
RECIPES = ("averis", "bf16")
PROGRAMS = tuple(product(RECIPES, REMAT))
LINEARS = 28 * 7
GEMMS = ("fprop", "dgrad", "wgrad")


def plans(recipe, remat):
    return read(f"results/plan/{recipe}_0p6b_{remat}.json")["plans"]


def of(target, recipe, remat):
    (plan,) = [plan for plan in plans(recipe, remat) if plan["target"] == target]
    return plan


@pytest.mark.parametrize(("recipe", "remat"), PROGRAMS)
def test_the_programs_are_of_sixteen_sequences_of_4096_tokens(recipe, remat):
    found = plans(recipe, remat)
    assert "h200:1" in {plan["target"] for plan in found}
    for plan in found:
        assert (plan["batch_size"], plan["microbatches"], plan["seq_len"]) == (16, 1, 4096)
        assert (plan["recipe"], plan["remat"], plan["devices"]) == (recipe, remat, 1)
        assert plan["config"] == f"configs/{recipe}_0p6b.py" and plan["unknown_loops"] == 0


@pytest.mark.parametrize(("remat", "most"), [("linear_inputs", 0.6), ("none", 0.9)])
def test_averis_takes_less_memory_than_bfloat16(remat, most):
    averis, bf16 = (of("h200:1", recipe, remat)["memory"]["temporaries"] for recipe in RECIPES)
    assert 0 < averis <= most * bf16


def test_blackwell_multiplies_every_product_natively():
    plan = of("b200:1", "averis", "linear_inputs")
    assert {gemm: plan["gemms"][gemm] for gemm in GEMMS} == {gemm: {"native": LINEARS} for gemm in GEMMS}
    assert set(plan["gemms"]["fprop again"]) == {"native"}
    assert plan["quantization"]["emulated"] == []


@pytest.mark.parametrize("remat", REMAT)
def test_no_kernel_spills(remat):
    kernels = of("h200:1", "averis", remat)["kernels"]
    assert kernels and {kernel["architecture"] for kernel in kernels} == {"sm_90a"}
    assert sum(kernel["spill_bytes"] for kernel in kernels) == 0


@pytest.mark.parametrize("remat", REMAT)
def test_every_quantized_operand_is_coded(remat):
    for plan in plans("averis", remat):
        found = plan["quantization"]
        assert 0 < found["operands"] == found["coded"] and found["folded"] == [], plan["target"]

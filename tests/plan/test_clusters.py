"""What the committed programs of clusters show (results/plan/clusters.json): see RESULTS.md."""

import pytest

from scripts.markdown import read

PLANS = {(plan["target"], plan["config"]): plan for plan in read("results/plan/clusters.json")["plans"]}


def of(target, recipe):
    return PLANS[target, f"configs/{recipe}_0p6b.py"]


def moved(plan):
    return sum(found["bytes"] for found in plan["collectives"].values())


def test_kernels_travel_as_codes():
    assert 0 < of("h200:8", "averis")["weight_gathers"] <= 0.30 * of("h200:8", "bf16")["weight_gathers"]


@pytest.mark.parametrize(("target", "most"), [("h200:8", 0.01), ("h200:256", 0.03)])
def test_what_a_mean_adds_to_the_collectives(target, most):
    averis, nvfp4 = moved(of(target, "averis")), moved(of(target, "nvfp4"))
    assert 0 < averis - nvfp4 <= most * averis


def test_no_array_of_tokens_is_gathered_that_a_plain_program_does_not_gather():
    """Beside codes and scales rows of partial sums: one for each of eight devices."""
    averis, bf16 = (of("h200:8", recipe)["gathers"] for recipe in ("averis", "bf16"))
    others = [array for array in averis.keys() - bf16.keys() if not array.startswith("u8[")]
    assert others and all(array.startswith("f32[8,") and array.count(",") == 1 for array in others)

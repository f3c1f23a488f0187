"""Every recipe's six slots, pinned against the published descriptions; variants, contradictions, errors, identity."""

import dataclasses
import inspect

import pytest

from fp4jax import recipes
from fp4jax.numerics import NVFP4, Rounding
from fp4jax.recipes import Center, Gemm, MeanAxes, MeanSplit, Operand, Recipe, as_recipe, list_recipes, recipe

HIGH = "high precision"
RNE, SR = "NVFP4, 1x16, nearest", "NVFP4, 1x16, stochastic"
SQUARE = "NVFP4, 16x16, nearest"
ROTATED = ", Hadamard-16"


def mean(operand, center="mean", row=None):
    """The text of a mean split whose mean is rounded like `row` (by default like the operand itself)."""
    return f"{operand}, minus {center} [{row or operand.removesuffix(ROTATED)}]"


def centered(operand):
    return mean(operand, "quantized mean", RNE)


# fprop.x, fprop.w, dgrad.g, dgrad.w, wgrad.x, wgrad.g
SLOTS = {
    "bf16": (HIGH,) * 6,
    "nvfp4": (RNE, RNE, SR, RNE, RNE, SR),
    "nvfp4_hadamard": (RNE, SQUARE, SR, SQUARE, RNE + ROTATED, SR + ROTATED),
    "averis": (mean(RNE), RNE, mean(SR), RNE, mean(RNE), mean(SR)),
    "averis_centered": (centered(RNE), RNE, centered(SR), RNE, centered(RNE), centered(SR)),
    "averis_hadamard": (mean(RNE), RNE, mean(SR), RNE, mean(RNE + ROTATED), mean(SR + ROTATED)),
    "averis_centered_hadamard": (
        *(centered(RNE), RNE, centered(SR), RNE),
        *(centered(RNE + ROTATED), centered(SR + ROTATED)),
    ),
    # Variants.
    "averis+nearest": (mean(RNE), RNE, mean(RNE), RNE, mean(RNE), mean(RNE)),
    "averis+sr_all": (mean(SR), SR, mean(SR), SR, mean(SR), mean(SR)),
    "nvfp4+nearest": (RNE,) * 6,
    "nvfp4+sr_all": (SR,) * 6,
    "nvfp4_hadamard+sr_all": (
        *(SR, SQUARE.replace("nearest", "stochastic"), SR, SQUARE.replace("nearest", "stochastic")),
        *(SR + ROTATED, SR + ROTATED),
    ),
    "averis+mean_bf16": (mean(RNE, row=HIGH), RNE, mean(SR, row=HIGH), RNE, mean(RNE, row=HIGH), mean(SR, row=HIGH)),
    "averis+x_only": (mean(RNE), RNE, SR, RNE, mean(RNE), SR),
    "averis+d_only": (RNE, RNE, mean(SR), RNE, RNE, mean(SR)),
    "averis+per_sequence": tuple(
        text.replace("minus mean", "minus mean per sequence")
        for text in (mean(RNE), RNE, mean(SR), RNE, mean(RNE), mean(SR))
    ),
    "averis+fwd_bf16": (HIGH, HIGH, mean(SR), RNE, mean(RNE), mean(SR)),
    "averis_centered+sr_all": (
        *(mean(SR, "quantized mean", SR), SR, mean(SR, "quantized mean", SR), SR),
        *(mean(SR, "quantized mean", SR), mean(SR, "quantized mean", SR)),
    ),
    "averis_centered+x_only+per_sequence+nearest": (
        *(centered(RNE).replace("mean [", "mean per sequence ["), RNE, RNE, RNE),
        *(centered(RNE).replace("mean [", "mean per sequence ["), RNE),
    ),
}


@pytest.mark.parametrize("name", SLOTS)
def test_slots(name):
    value = recipe(name)
    names = ("fprop.x", "fprop.w", "dgrad.g", "dgrad.w", "wgrad.x", "wgrad.g")
    assert tuple(value.slots) == names
    assert tuple(map(str, value.slots.values())) == SLOTS[name]
    assert value.name == name


def test_every_recipe_is_pinned():
    assert set(list_recipes()) <= set(SLOTS)
    assert all(any(f"+{variant}" in name for name in SLOTS) for variant in recipes.list_variants())


def test_slots_are_the_operands_of_the_gemms():
    value = recipe("averis_hadamard")
    gemms = (value.fprop, value.dgrad, value.wgrad)
    assert tuple(value.slots.values()) == tuple(operand for gemm in gemms for operand in (gemm.lhs, gemm.rhs))
    assert value.fprop.lhs.format is NVFP4 and value.fprop.lhs.split == MeanSplit(Center.MEAN, Operand(NVFP4))
    assert value.wgrad.rhs == Operand(
        NVFP4, None, Rounding.STOCHASTIC, 16, MeanSplit(Center.MEAN, Operand(NVFP4, None, Rounding.STOCHASTIC))
    )
    assert recipe("averis+per_sequence").fprop.lhs.split.axes is MeanAxes.SEQUENCE
    assert recipe("nvfp4_hadamard").fprop.rhs.block == (16, 16)


# ---------------------------------------------------------------- what draws


@pytest.mark.parametrize(
    "name, forward, gradient",
    [
        ("bf16", False, False),
        ("nvfp4", False, True),
        ("averis", False, True),
        ("averis+nearest", False, False),
        ("averis+sr_all", True, True),
        ("averis_centered+sr_all+x_only", True, True),
    ],
)
def test_draws(name, forward, gradient):
    assert (recipe(name).forward_draws, recipe(name).gradient_draws) == (forward, gradient)


def test_a_mean_that_draws_makes_its_recipe_draw():
    split = MeanSplit(Center.MEAN, Operand(NVFP4, rounding=Rounding.STOCHASTIC))
    operand = Operand(NVFP4, split=split)
    assert operand.draws
    assert Recipe("mine", dgrad=Gemm(operand)).gradient_draws
    assert Recipe("mine", wgrad=Gemm(operand)).forward_draws  # X is prepared in the forward


def test_high_precision():
    assert recipe("bf16").is_high_precision and Recipe("mine").is_high_precision
    assert not recipe("nvfp4").is_high_precision
    assert not Recipe("mine", wgrad=Gemm(Operand(), Operand(NVFP4))).is_high_precision
    split = MeanSplit(Center.MEAN, Operand())
    assert not Operand(split=split).is_high_precision


# ---------------------------------------------------------------- values


def test_recipes_are_values():
    assert recipe("averis") is recipe("averis")
    again = recipe("averis").map_operands(lambda slot, operand: dataclasses.replace(operand))
    assert again == recipe("averis") and hash(again) == hash(recipe("averis"))
    assert len({recipe(name) for name in SLOTS}) == len(SLOTS)
    assert recipe("averis") != recipe("averis_centered")
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe("averis").name = "other"


def test_the_order_of_independent_variants_does_not_matter():
    ab, ba = recipe("averis+nearest+x_only"), recipe("averis+x_only+nearest")
    assert ab.slots == ba.slots and ab.name != ba.name


def test_map_operands():
    slots = []
    value = recipe("averis").map_operands(lambda slot, operand: slots.append(slot) or Operand(), "emptied")
    assert slots == list(recipe("averis").slots)
    assert value == Recipe("emptied")


def test_str_is_the_table():
    lines = str(recipe("averis")).splitlines()
    assert lines[0] == "recipe averis"
    assert lines[3] == f"  dgrad.g  {mean(SR)}"
    assert len(lines) == 7


def test_lists():
    assert list(list_recipes())[:4] == ["bf16", "nvfp4", "nvfp4_hadamard", "averis"]
    variants = {"nearest", "sr_all", "mean_bf16", "x_only", "d_only", "per_sequence", "fwd_bf16"}
    assert set(recipes.list_variants()) == variants
    assert all(line and "\n" not in line for line in (list_recipes() | recipes.list_variants()).values())


def test_as_recipe():
    mine = Recipe("mine", fprop=Gemm(Operand(NVFP4), Operand(NVFP4)))
    assert as_recipe(mine) is mine
    assert as_recipe("averis") is recipe("averis")
    with pytest.raises(ValueError, match="recipe must be a name or a fp4jax.Recipe, got int"):
        inspect.unwrap(as_recipe)(4)  # without the type checker of the tests, which would be first


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "name, message",
    [
        ("averes", "unknown recipe 'averes'; known: bf16, nvfp4,"),
        ("", "unknown recipe ''"),
        ("averis+nearst", "unknown variant 'nearst' in 'averis.nearst'; known: nearest, sr_all,"),
        ("averis+", "unknown variant ''"),
        ("averis+nearest+nearest", "contradict or repeat"),
        ("averis+nearest+sr_all", "contradict or repeat"),
        ("averis+x_only+d_only", "contradict or repeat"),
        ("averis_centered+mean_bf16", "recipe averis_centered centres on the quantized mean"),
        ("bf16+nearest", "recipe bf16 rounds nothing"),
        ("bf16+sr_all", "recipe bf16 rounds nothing"),
        ("nvfp4+mean_bf16", "recipe nvfp4 splits nothing off"),
        ("nvfp4+per_sequence", "recipe nvfp4 splits nothing off"),
        ("nvfp4+x_only", "recipe nvfp4 has no split left"),
        ("bf16+d_only", "recipe bf16 has no split left"),
        ("bf16+fwd_bf16", "recipe bf16 has its forward in high precision already"),
    ],
)
def test_bad_names(name, message):
    with pytest.raises(ValueError, match=message) as raised:
        recipe(name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Operand(NVFP4, hadamard=32), "hadamard must be None or 16, got 32"),
        (lambda: Operand(NVFP4, block=(8, 8)), r"block must be None or \(16, 16\), got \(8, 8\)"),
        (lambda: Operand(block=(16, 16)), "neither blocks nor rounding"),
        (lambda: Operand(rounding=Rounding.STOCHASTIC), "neither blocks nor rounding"),
        (lambda: Gemm(Operand(hadamard=16), Operand()), "cancels only if both operands"),
        (
            lambda: Recipe("mine", fprop=Gemm(Operand(), Operand(NVFP4, split=MeanSplit(Center.MEAN, Operand())))),
            "recipe mine: weights cannot be mean-split",
        ),
        (
            lambda: Recipe(
                "mine",
                fprop=Gemm(Operand(NVFP4, split=MeanSplit(Center.MEAN, Operand()))),
                wgrad=Gemm(Operand(NVFP4, split=MeanSplit(Center.MEAN, Operand(NVFP4)))),
            ),
            "recipe mine: both copies of X must be split alike",
        ),
        (
            lambda: Recipe(
                "mine",
                dgrad=Gemm(Operand(NVFP4, split=MeanSplit(Center.MEAN, Operand()))),
                wgrad=Gemm(Operand(), Operand(NVFP4, split=MeanSplit(Center.QUANTIZED_MEAN, Operand(NVFP4)))),
            ),
            "both copies of D must be split alike",
        ),
    ],
)
def test_contradictions_in_operands(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_one_copy_of_an_operand_may_go_unsplit():
    split = MeanSplit(Center.MEAN, Operand(NVFP4))
    assert Recipe("mine", fprop=Gemm(Operand(NVFP4, split=split), Operand(NVFP4)), wgrad=Gemm(Operand(NVFP4)))

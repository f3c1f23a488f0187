"""Every recipe's six slots, pinned against the published descriptions; variants, contradictions, errors, identity."""

import dataclasses
import inspect

import pytest

from fp4jax import recipes
from fp4jax.numerics import NVFP4, Rounding
from fp4jax.recipes import (
    Center,
    Gemm,
    MeanAxes,
    MeanSplit,
    Operand,
    Recipe,
    as_recipe,
    list_recipes,
    recipe,
)  # fmt: skip

HIGH = "high precision"
RNE, SR = "NVFP4, 1x16, nearest", "NVFP4, 1x16, stochastic"
SQUARE = "NVFP4, 16x16, nearest"
ROTATED = ", Hadamard-16"


def mean(operand, center="mean", row=None):
    """The text of a mean split whose mean is rounded like `row` (by default like the operand itself)."""
    return f"{operand}, minus {center} [{row or operand.removesuffix(ROTATED)}]"


def centered(operand):
    return mean(operand, "quantized mean", RNE)


def of_operands(forward, gradient):
    return (forward, forward, gradient, forward, forward, gradient)


def of_stages(forward, backward):
    again = backward + COPY
    return (forward, forward, backward, again, again, backward)


COPY, FORWARDS = ", from the forward's copy", "the forward's copy"
MXFP4_SR = "MXFP4, 1x32, stochastic, scales up"
SIX_OR_FOUR, SIX_OR_FOUR_SR = (f"NVFP4-256, 1x16, {rounding}, 6 or 4" for rounding in ("nearest", "stochastic"))
SIGNS = ", Hadamard-128 with fresh signs"
EDEN = f"NVFP4-EDEN, 1x16, nearest{SIGNS}, corrected per 128, scales stochastic"
OUTER, OUTER_SR = (f"NVFP4/128, 1x16, {rounding}" for rounding in ("nearest", "stochastic"))
INT8 = "INT8, per vector, nearest"


def low_rank(operand):
    return f"{operand}, minus low rank 1.5% [{operand}]"


def best(operand):
    return f"{operand}, minus quantized low rank 1.5% [{SIX_OR_FOUR}]"


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
    "fp8": of_operands("FP8 E4M3, per matrix, nearest", "FP8 E5M2, per matrix, nearest"),
    "mxfp8": ("MXFP8, 1x32, nearest",) * 6,
    "mxfp4": of_operands("MXFP4, 1x32, nearest", MXFP4_SR),
    "four_over_six": of_operands(SIX_OR_FOUR, SIX_OR_FOUR_SR),
    "averis_best": (best(SIX_OR_FOUR), SIX_OR_FOUR, best(SIX_OR_FOUR_SR), SIX_OR_FOUR)
    + (best(SIX_OR_FOUR), best(SIX_OR_FOUR_SR)),
    "quartet2": of_stages(SIX_OR_FOUR, EDEN),
    "tetrajet2": of_stages(OUTER, OUTER_SR + ROTATED),
    "metis": of_operands(low_rank(RNE), low_rank(SR)),
    "ternary": (INT8, "sign, per vector, nearest", HIGH, FORWARDS, FORWARDS, HIGH),
    "ternary_absmean": (INT8, "ternary, per matrix, nearest", HIGH, FORWARDS, FORWARDS, HIGH),
    # Variants.
    "fp8+sr_all": of_operands("FP8 E4M3, per matrix, stochastic", "FP8 E5M2, per matrix, stochastic"),
    "mxfp8+2d": tuple(f"MXFP8, {block}, nearest" for block in ("1x32", "32x32", "1x32", "32x32", "1x32", "1x32")),
    "mxfp8+sr_all": ("MXFP8, 1x32, stochastic, scales up",) * 6,
    "mxfp4+nearest": ("MXFP4, 1x32, nearest",) * 6,
    "mxfp4+sr_all": (MXFP4_SR,) * 6,
    "nvfp4+2d": (RNE, SQUARE, SR, SQUARE, RNE, SR),
    "nvfp4+four_six": of_operands(SIX_OR_FOUR, SIX_OR_FOUR_SR),
    "nvfp4+w_bf16": (RNE, HIGH, SR, HIGH, RNE, SR),
    "nvfp4+fwd_bf16": (HIGH, HIGH, SR, RNE, RNE, SR),
    "nvfp4_hadamard+four_six": (
        *(SIX_OR_FOUR, SIX_OR_FOUR.replace("1x16", "16x16"), SIX_OR_FOUR_SR, SIX_OR_FOUR.replace("1x16", "16x16")),
        *(f"NVFP4-256, 1x16, {rounding}{ROTATED}, 6 or 4" for rounding in ("nearest", "stochastic")),
    ),
    "averis_centered+four_six": (
        *(mean(SIX_OR_FOUR, "quantized mean", SIX_OR_FOUR), SIX_OR_FOUR),
        *(mean(SIX_OR_FOUR_SR, "quantized mean", SIX_OR_FOUR), SIX_OR_FOUR),
        *(mean(x, "quantized mean", SIX_OR_FOUR) for x in (SIX_OR_FOUR, SIX_OR_FOUR_SR)),
    ),
    "averis+fwd_bf16": (HIGH, HIGH, mean(SR), RNE, mean(RNE), mean(SR)),
    "quartet2+nearest": of_stages(
        SIX_OR_FOUR, EDEN.replace(SIGNS, ", Hadamard-128").removesuffix(", scales stochastic")
    ),
    "quartet2+w_bf16": (
        SIX_OR_FOUR,
        HIGH,
        EDEN,
        "high precision" + SIGNS,
        EDEN + COPY,
        EDEN,
    ),
    "quartet2+fwd_bf16": (HIGH, HIGH, EDEN, EDEN, EDEN, EDEN),
    "tetrajet2+sr_all": of_stages(OUTER_SR, OUTER_SR + ROTATED),
    "metis+x_only": (low_rank(RNE), RNE, SR, RNE, low_rank(RNE), SR),
    "metis+2d": (
        *(low_rank(RNE), low_rank(RNE).replace("1x16", "16x16", 1), low_rank(SR)),
        *(low_rank(RNE).replace("1x16", "16x16", 1), low_rank(RNE), low_rank(SR)),
    ),
    "metis+sr_all": (low_rank(SR),) * 6,
    "ternary+w_bf16": (INT8, HIGH, HIGH, HIGH, FORWARDS, HIGH),
    "averis+shards8": (mean(RNE), RNE, mean(SR), RNE, mean(RNE), mean(SR)),
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
    variants = [variant.replace("shardsN", "shards8") for variant in recipes.list_variants()]
    assert all(any(f"+{variant}" in name for name in SLOTS) for variant in variants)


def test_shards_are_the_recipe_s_and_stay_with_its_variants():
    assert recipe("averis").shards is None and recipe("averis+shards8").shards == 8
    assert recipe("averis+shards16+nearest") == dataclasses.replace(
        recipe("averis+nearest"), name="averis+shards16+nearest", shards=16
    )
    assert str(recipe("averis+shards8")).startswith("recipe averis+shards8, statistics of each of 8 shards of the tok")
    with pytest.raises(ValueError, match="shards must be at least 1, or None, got 0"):
        Recipe("mine", shards=0)


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
    "name, forward, operand, gradient",
    [
        ("bf16", False, False, False),
        ("nvfp4", False, False, True),
        ("averis", False, False, True),
        ("averis+nearest", False, False, False),
        ("averis+sr_all", True, True, True),
        ("averis_centered+sr_all+x_only", True, True, True),
        ("fp8", False, False, False),
        ("mxfp4", False, False, True),
        ("mxfp4+sr_all", True, True, True),
        ("quartet2", False, True, True),
        ("quartet2+nearest", False, False, False),
        ("quartet2+w_bf16", False, True, True),
        ("tetrajet2", False, True, True),
        ("metis", False, False, True),
        ("metis+nearest", False, False, False),
        ("ternary", False, False, False),
    ],
)
def test_draws(name, forward, operand, gradient):
    value = recipe(name)
    assert (value.forward_draws, value.operand_draws, value.gradient_draws) == (forward, operand, gradient)


def test_a_mean_that_draws_makes_its_recipe_draw():
    split = MeanSplit(Center.MEAN, Operand(NVFP4, rounding=Rounding.STOCHASTIC))
    operand = Operand(NVFP4, split=split)
    assert operand.draws
    assert Recipe("mine", dgrad=Gemm(operand)).gradient_draws
    x = Recipe("mine", wgrad=Gemm(operand))
    assert x.operand_draws and x.gradient_draws and not x.forward_draws  # for wgrad's copy alone


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
    assert list(list_recipes())[:5] == ["bf16", "fp8", "mxfp8", "mxfp4", "nvfp4"]
    assert set(recipes.list_variants()) == {
        *("nearest", "sr_all", "mean_bf16", "x_only", "d_only", "per_sequence", "2d", "four_six", "w_bf16", "fwd_bf16"),
        "shardsN",
    }
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
        ("averes", "unknown recipe 'averes'; known: bf16, fp8, mxfp8,"),
        ("", "unknown recipe ''"),
        ("averis+nearst", "unknown variant 'nearst' in 'averis.nearst'; known: nearest, sr_all,"),
        ("averis+", "unknown variant ''"),
        ("averis+nearest+nearest", "contradict or repeat"),
        ("averis+nearest+sr_all", "contradict or repeat"),
        ("averis+x_only+d_only", "contradict or repeat"),
        ("averis_centered+mean_bf16", "recipe averis_centered centres on the quantized mean"),
        ("bf16+nearest", "recipe bf16 rounds nothing"),
        ("bf16+sr_all", "recipe bf16 rounds nothing"),
        ("nvfp4+mean_bf16", "recipe nvfp4 splits no mean off"),
        ("nvfp4+per_sequence", "recipe nvfp4 splits no mean off"),
        ("nvfp4+x_only", "recipe nvfp4 has no split left"),
        ("bf16+d_only", "recipe bf16 has no split left"),
        ("metis+mean_bf16", "recipe metis splits no mean off"),
        ("averis+x_only+d_only", "contradict or repeat"),
        ("nvfp4+w_bf16+2d", "contradict or repeat"),
        ("quartet2+sr_all", "recipe quartet2 has operands that only work rounded to nearest .NVFP4-EDEN"),
        ("ternary+sr_all", "recipe ternary has operands that only work rounded to nearest .sign"),
        ("ternary_absmean+sr_all", "recipe ternary_absmean has operands that only work rounded to nearest .ternary"),
        ("fp8+2d", "recipe fp8 has no weights in 1x16 blocks to make square"),
        ("nvfp4_hadamard+2d", "recipe nvfp4_hadamard has no weights in 1x16 blocks to make square"),
        ("quartet2+2d", "recipe quartet2 cannot have square weight blocks: correction"),
        ("tetrajet2+2d", "recipe tetrajet2 cannot have square weight blocks: .* one float32 scale"),
        ("fp8+four_six", "recipe fp8 has no plain NVFP4 operand"),
        ("four_over_six+four_six", "recipe four_over_six has no plain NVFP4 operand"),
        ("quartet2+four_six", "recipe quartet2 has no plain NVFP4 operand"),
        ("bf16+w_bf16", "recipe bf16 has no quantized weights"),
        ("bf16+fwd_bf16", "recipe bf16 has its forward in high precision already"),
        ("averis+shards", "unknown variant 'shards' in 'averis.shards'; known: .*, shardsN"),
        ("averis+shards0", "unknown variant 'shards0'"),
        ("averis+shards8+shards4", "contradict or repeat"),
        ("bf16+shards8", "recipe bf16 has no statistic of all tokens"),
        ("ternary+shards8", "recipe ternary has no statistic of all tokens"),
        ("mxfp4+shards8", "recipe mxfp4 has no statistic of all tokens"),
        ("tetrajet2+shards8", "recipe tetrajet2 has no statistic of all tokens"),
        ("ternary+fwd_bf16", "recipe ternary quantizes nothing but the forward"),
    ],
)
def test_bad_names(name, message):
    with pytest.raises(ValueError, match=message) as raised:
        recipe(name)
    assert "\n" not in str(raised.value)


# ---------------------------------------------------------------- python -m fp4jax.recipes


def test_command_prints_the_slots_of_the_recipes_named(capsys):
    assert recipes.main(["quartet2", "averis+nearest"]) == 0
    assert capsys.readouterr().out == f"{recipe('quartet2')}\n\n{recipe('averis+nearest')}\n"


def test_command_without_a_name_lists_everything(capsys):
    assert recipes.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, line in list_recipes().items():
        assert any(text.split() == [name, *line.split()] for text in lines)
    for name, line in recipes.list_variants().items():
        assert any(text.split() == [f"+{name}", *line.split()] for text in lines)
    assert max(map(len, lines)) <= 160


def test_command_answers_a_wrong_name_in_one_line(capsys):
    assert recipes.main(["averis", "avers"]) == 1
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: unknown recipe 'avers'; known: bf16, ") and err.count("\n") == 1

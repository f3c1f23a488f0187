"""The recipes by name, and their variants.

A new recipe is one entry in `_RECIPES`, built from operands; a variant (`"averis+nearest"`) is a function from recipe
to recipe in `_VARIANTS`. Nothing else in the project knows a recipe by its name. `python -m fp4jax.recipes [NAME ...]`
lists them, or prints the six slots of those named.
"""

import dataclasses
import functools
import re
import sys
from collections.abc import Callable

from fp4jax.numerics import (
    FP8_E4M3,
    FP8_E5M2,
    INT8,
    MXFP4,
    MXFP8,
    NVFP4,
    NVFP4_256,
    NVFP4_EDEN,
    NVFP4_OUTER128,
    SIGN,
    TERNARY,
    Extent,
    Format,
    Rounding,
    ScaleRounding,
    Statistic,
)  # fmt: skip
from fp4jax.recipe_types import Center, Gemm, LowRankSplit, MeanAxes, MeanSplit, Operand, Recipe, Source

__all__ = [
    "Center", "Gemm", "LowRankSplit", "MeanAxes", "MeanSplit", "Operand", "Recipe", "Source", "as_recipe",
    "list_recipes", "list_variants", "recipe",
]  # fmt: skip

_FOUR_OVER_SIX = (6.0, 4.0)  # six where both err alike, as in TransformerEngine
_LOW_RANK = 0.015  # of the smaller side of a matrix; Metis' choice

_NEAREST = Operand(NVFP4)
_STOCHASTIC = Operand(NVFP4, rounding=Rounding.STOCHASTIC)


def _of_operands(name: str, forward: Operand, gradient: Operand) -> Recipe:
    """X and W prepared like `forward`, D like `gradient`."""
    return Recipe(name, Gemm(forward, forward), Gemm(gradient, forward), Gemm(forward, gradient))


def _of_stages(name: str, forward: Operand, backward: Operand) -> Recipe:
    """fprop on `forward`; dgrad and wgrad on `backward`, X and W made from the forward's copies."""
    again = dataclasses.replace(backward, source=Source.QUANTIZED)
    return Recipe(name, Gemm(forward, forward), Gemm(backward, again), Gemm(again, backward))


def _nvfp4(name: str) -> Recipe:
    """1x16 blocks everywhere, stochastic rounding on gradients, no transform."""
    return _of_operands(name, _NEAREST, _STOCHASTIC)


def _mxfp4(name: str) -> Recipe:
    """OCP's scales, but under stochastic rounding those that saturate nothing: E[SR(x)] = x for every element."""
    gradient = Operand(MXFP4, rounding=Rounding.STOCHASTIC, scale_rounding=ScaleRounding.UP)
    return _of_operands(name, Operand(MXFP4), gradient)


def _four_over_six(recipe: Recipe) -> Recipe:
    """The choice for every NVFP4 operand, and for what is split off. It looks at rounding to nearest in any case."""

    def choose(operand):
        operand = dataclasses.replace(operand, split=operand.split and operand.split.map_parts(choose))
        plain = operand.format is NVFP4
        return dataclasses.replace(operand, format=NVFP4_256, candidates=_FOUR_OVER_SIX) if plain else operand

    changed = recipe.map_operands(lambda slot, operand: choose(operand))
    if changed == recipe:
        raise ValueError(f"recipe {recipe.name} has no plain NVFP4 operand to choose a scale for")
    return changed


def _square_weights(recipe: Recipe) -> Recipe:
    def square(slot, operand):
        if not slot.endswith(".w") or not (operand.format and operand.format.block):
            return operand
        try:
            return dataclasses.replace(operand, block=(operand.format.block,) * 2)
        except ValueError as error:
            raise ValueError(f"recipe {recipe.name} cannot have square weight blocks: {error}") from None

    changed = recipe.map_operands(square)
    if changed == recipe:
        raise ValueError(f"recipe {recipe.name} has no weights in 1x16 blocks to make square")
    return changed


def _wgrad_hadamard(recipe: Recipe) -> Recipe:
    def transform(slot, operand):
        return dataclasses.replace(operand, hadamard=16) if slot.startswith("wgrad") else operand

    return recipe.map_operands(transform)


def _split(recipe: Recipe, **splits: MeanSplit | LowRankSplit) -> Recipe:
    """The recipe with `splits`, by operand: x, w, g."""
    return recipe.map_operands(lambda slot, operand: dataclasses.replace(operand, split=splits.get(slot[-1])))


def _averis(name: str) -> Recipe:
    """The mean of X rounded like X, the mean of D rounded like D, both independently of the residual."""
    return _split(_nvfp4(name), x=MeanSplit(Center.MEAN, _NEAREST), g=MeanSplit(Center.MEAN, _STOCHASTIC))


def _averis_centered(name: str) -> Recipe:
    """Residuals against the quantized mean, rounded to nearest: any fixed centre keeps the gradient unbiased."""
    split = MeanSplit(Center.QUANTIZED_MEAN, _NEAREST)
    return _split(_nvfp4(name), x=split, g=split)


def _averis_best(name: str) -> Recipe:
    """`averis_centered` carried on: the mean is the first of several directions that all tokens share.

    Residuals against the quantized low-rank part, so that the split is exact and its factors may be rounded to nearest.
    """
    split = LowRankSplit(_LOW_RANK, _NEAREST, centered=True)
    return _four_over_six(_split(_nvfp4(name), x=split, g=split))


def _quartet2(name: str) -> Recipe:
    """Rotated operands of the backward are unbiased by rescaling (EDEN), not by rounding every element at random."""
    backward = Operand(
        NVFP4_EDEN, hadamard=128, fresh_signs=True, correction=128, scale_rounding=ScaleRounding.STOCHASTIC
    )
    return _of_stages(name, Operand(NVFP4_256, candidates=_FOUR_OVER_SIX), backward)


def _tetrajet2(name: str) -> Recipe:
    backward = Operand(NVFP4_OUTER128, rounding=Rounding.STOCHASTIC, hadamard=16)
    return _of_stages(name, Operand(NVFP4_OUTER128), backward)


def _metis(name: str) -> Recipe:
    forward, gradient = (LowRankSplit(_LOW_RANK, factor) for factor in (_NEAREST, _STOCHASTIC))
    return _split(_nvfp4(name), x=forward, w=forward, g=gradient)


def _ternary(name: str, weights: Format) -> Recipe:
    """Straight-through: the backward differentiates the product of the quantized operands as if they were exact."""
    copy = Operand(source=Source.QUANTIZED)
    return Recipe(name, Gemm(Operand(INT8), Operand(weights)), Gemm(Operand(), copy), Gemm(copy, Operand()))


_RECIPES: dict[str, tuple[str, Callable[[str], Recipe]]] = {
    "bf16": ("no quantization: the baseline, in the inputs' own precision", Recipe),
    "fp8": (
        "per-tensor E4M3 forward, E5M2 gradients (TransformerEngine's current scaling)",
        lambda name: _of_operands(name, Operand(FP8_E4M3), Operand(FP8_E5M2)),
    ),
    "mxfp8": ("E4M3 in blocks of 32 (OCP MX)", lambda name: _of_operands(name, Operand(MXFP8), Operand(MXFP8))),
    "mxfp4": ("E2M1 in blocks of 32, stochastic rounding on gradients (OCP MX; 2505.14669's baseline)", _mxfp4),
    "nvfp4": ("vanilla NVFP4: 1x16 blocks, stochastic rounding on gradients (2603.10444, section 6)", _nvfp4),
    "nvfp4_hadamard": (
        "NVIDIA's: 16x16 weights, Hadamard-16 in wgrad, stochastic rounding on gradients (2509.25149)",
        lambda name: _wgrad_hadamard(_square_weights(_nvfp4(name))),
    ),
    "four_over_six": (
        "nvfp4 with the better of two scales for each block (2512.02010)",
        lambda name: _four_over_six(_nvfp4(name)),
    ),
    "averis": ("mean-residual split of X and D, means quantized independently (2603.10444, eq. 11-12)", _averis),
    "averis_centered": ("averis with residuals against the quantized mean: an exact split", _averis_centered),
    "averis_hadamard": (
        "averis with Hadamard-16 on the wgrad residuals (2603.10444 v2)",
        lambda name: _wgrad_hadamard(_averis(name)),
    ),
    "averis_centered_hadamard": (
        "averis_centered with Hadamard-16 on the wgrad residuals",
        lambda name: _wgrad_hadamard(_averis_centered(name)),
    ),
    "averis_best": (
        "residuals of X and D against a quantized low-rank part, the mean included, four-over-six: an exact split",
        _averis_best,
    ),
    "quartet2": (
        "four-over-six forward; backward on forward's copies under Hadamard-128 with EDEN's correction (2601.22813)",
        _quartet2,
    ),
    "tetrajet2": (
        "a float32 scale for every 128 elements; backward on forward's copies, Hadamard-16, stochastic (2510.27527)",
        _tetrajet2,
    ),
    "metis": ("low-rank split of X, W and D, rank 1.5 %, factors quantized (2509.00404)", _metis),
    "ternary": (
        "sign(w) × mean|w| of each output, 8-bit activations, straight-through gradients (2605.18933, section 2.3)",
        lambda name: _ternary(name, SIGN),
    ),
    "ternary_absmean": (
        "weights -1, 0, 1 × mean|w|, 8-bit activations, straight-through gradients (BitNet b1.58, 2402.17764)",
        lambda name: _ternary(name, TERNARY),
    ),
}


def _on_means(recipe: Recipe, change: Callable[[MeanSplit], MeanSplit]) -> Recipe:
    """Applies `change` to every mean split; raises if the recipe has none."""
    if not any(isinstance(operand.split, MeanSplit) for operand in recipe.slots.values()):
        raise ValueError(f"recipe {recipe.name} splits no mean off")

    def apply(slot, operand):
        is_mean = isinstance(operand.split, MeanSplit)
        return dataclasses.replace(operand, split=change(operand.split)) if is_mean else operand

    return recipe.map_operands(apply)


def _round_all(recipe: Recipe, rounding: Rounding) -> Recipe:
    if not any(operand.format for operand in recipe.slots.values()):
        raise ValueError(f"recipe {recipe.name} rounds nothing")
    stochastic = rounding is Rounding.STOCHASTIC

    def set_rounding(operand):
        operand = dataclasses.replace(
            operand, split=operand.split and operand.split.map_parts(set_rounding), fresh_signs=False
        )
        format = operand.format
        if format is None:
            return operand
        if stochastic and (operand.correction or format.statistic is Statistic.MEAN):
            raise ValueError(f"recipe {recipe.name} has operands that only work rounded to nearest ({operand})")
        saturates = stochastic and format.scale_rounding is ScaleRounding.DOWN
        return dataclasses.replace(operand, rounding=rounding, scale_rounding=ScaleRounding.UP if saturates else None)

    return recipe.map_operands(lambda slot, operand: set_rounding(operand))


def _mean_in_high_precision(recipe: Recipe) -> Recipe:
    def change(split):
        if split.center is Center.QUANTIZED_MEAN:
            raise ValueError(f"recipe {recipe.name} centres on the quantized mean, which cannot be in high precision")
        return dataclasses.replace(split, mean=Operand())

    return _on_means(recipe, change)


def _split_only(side: str, recipe: Recipe) -> Recipe:
    if not any(operand.split for slot, operand in recipe.slots.items() if slot.endswith(side)):
        raise ValueError(f"recipe {recipe.name} has no split left with it")

    def keep(slot, operand):
        return operand if slot.endswith(side) else dataclasses.replace(operand, split=None)

    return recipe.map_operands(keep)


def _unquantized(operand: Operand) -> Operand:
    """In high precision, but still transformed, since its partner is."""
    return Operand(hadamard=operand.hadamard, fresh_signs=operand.fresh_signs)


def _weights_in_high_precision(recipe: Recipe) -> Recipe:
    if not any(operand.format for slot, operand in recipe.slots.items() if slot.endswith(".w")):
        raise ValueError(f"recipe {recipe.name} has no quantized weights")
    return recipe.map_operands(lambda slot, operand: _unquantized(operand) if slot.endswith(".w") else operand)


def _in_shards(recipe: Recipe, number: int) -> Recipe:
    tokens = [operand for slot, operand in recipe.slots.items() if not slot.endswith(".w")]
    if not any(operand.split or (operand.format and operand.format.outer is Extent.MATRIX) for operand in tokens):
        raise ValueError(f"recipe {recipe.name} has no statistic of all tokens that a shard could have its own of")
    return dataclasses.replace(recipe, shards=number)


def _forward_in_high_precision(recipe: Recipe) -> Recipe:
    """The backward's operands then have no quantized copy to be made from: they are made from the original."""
    if recipe.fprop.is_high_precision:
        raise ValueError(f"recipe {recipe.name} has its forward in high precision already")
    changed = recipe.map_operands(
        lambda slot, o: Operand() if slot.startswith("fprop") else dataclasses.replace(o, source=Source.ORIGINAL)
    )
    if changed.is_high_precision:
        raise ValueError(f"recipe {recipe.name} quantizes nothing but the forward")
    return changed


_VARIANTS: dict[str, tuple[str, Callable[[Recipe], Recipe]]] = {
    "nearest": ("round to nearest everywhere: deterministic", lambda r: _round_all(r, Rounding.NEAREST)),
    "sr_all": ("stochastic rounding of every quantized operand", lambda r: _round_all(r, Rounding.STOCHASTIC)),
    "mean_bf16": ("means kept in high precision", _mean_in_high_precision),
    "x_only": ("split activations only", functools.partial(_split_only, ".x")),
    "d_only": ("split output gradients only", functools.partial(_split_only, ".g")),
    "per_sequence": (
        "a mean for every sequence instead of one for the batch",
        lambda r: _on_means(r, lambda split: dataclasses.replace(split, axes=MeanAxes.SEQUENCE)),
    ),
    "2d": ("square weight blocks: W and its transpose quantize to the same values", _square_weights),
    "four_six": ("the better of two scales for each NVFP4 block, in the means too", _four_over_six),
    "w_bf16": ("weights kept in high precision", _weights_in_high_precision),
    "fwd_bf16": ("forward product in high precision", _forward_in_high_precision),
}
_NUMBERED: dict[str, tuple[str, Callable[[Recipe, int], Recipe]]] = {
    "shards": ("means and float32 scales of each of N equal shards of the batch (shards8), not of all", _in_shards),
}
"""Variants that end in a number."""
_CONTRADICTIONS = (
    {"nearest", "sr_all"}, {"x_only", "d_only"}, {"w_bf16", "2d"}
)  # fmt: skip


@functools.cache
def recipe(name: str) -> Recipe:
    """The recipe of that name, with its variants: `recipe("averis")`, `recipe("averis+sr_all+mean_bf16")`.

    >>> print(recipe("nvfp4+2d"))
    recipe nvfp4+2d
      fprop.x  NVFP4, 1x16, nearest
      fprop.w  NVFP4, 16x16, nearest
      dgrad.g  NVFP4, 1x16, stochastic
      dgrad.w  NVFP4, 16x16, nearest
      wgrad.x  NVFP4, 1x16, nearest
      wgrad.g  NVFP4, 1x16, stochastic
    >>> recipe("averis").gradient_draws, recipe("averis+nearest").gradient_draws
    (True, False)

    Raises:
      ValueError: an unknown recipe or variant, a variant given twice, or variants that contradict each other or the
        recipe.
    """
    base, *variants = name.split("+")
    if base not in _RECIPES:
        raise ValueError(f"unknown recipe {base!r}; known: {', '.join(_RECIPES)}")
    changes = {variant: _variant(variant, name) for variant in variants}
    kinds = {variant if variant in _VARIANTS else variant.rstrip("0123456789") for variant in variants}
    if any(pair <= kinds for pair in _CONTRADICTIONS) or len(kinds) != len(variants):
        raise ValueError(f"the variants of {name!r} contradict or repeat each other")
    result = _RECIPES[base][1](base)
    for variant in variants:
        result = changes[variant](result)
    return dataclasses.replace(result, name=name)


def _variant(variant: str, name: str) -> Callable[[Recipe], Recipe]:
    """What a variant does."""
    if variant in _VARIANTS:
        return _VARIANTS[variant][1]
    numbered = re.fullmatch(r"(\D+)([1-9]\d*)", variant)
    if numbered is None or numbered[1] not in _NUMBERED:
        raise ValueError(f"unknown variant {variant!r} in {name!r}; known: {', '.join(list_variants())}")
    return functools.partial(_NUMBERED[numbered[1]][1], number=int(numbered[2]))


def as_recipe(value: str | Recipe) -> Recipe:
    """A recipe given as itself or by name."""
    if isinstance(value, Recipe):
        return value
    if not isinstance(value, str):
        raise ValueError(f"recipe must be a name or a fp4jax.Recipe, got {type(value).__name__}")
    return recipe(value)


def list_recipes() -> dict[str, str]:
    """Every recipe with one line about it.

    >>> list_recipes()["bf16"]
    "no quantization: the baseline, in the inputs' own precision"
    """
    return {name: line for name, (line, _) in _RECIPES.items()}


def list_variants() -> dict[str, str]:
    """Every variant (`recipe+variant`) with one line about it; N stands for a number.

    >>> list_variants()["nearest"]
    'round to nearest everywhere: deterministic'
    """
    numbered = {f"{name}N": line for name, (line, _) in _NUMBERED.items()}
    return {name: line for name, (line, _) in _VARIANTS.items()} | numbered


def main(names: list[str]) -> int:
    """Prints the six slots of the recipes named, or the list of recipes and variants; returns the exit code."""
    try:
        print("\n\n".join(str(recipe(name)) for name in names) if names else _overview())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _overview() -> str:
    width = max(map(len, [*_RECIPES, *_VARIANTS])) + 2
    recipes = [f"  {name:{width}}{line}" for name, line in list_recipes().items()]
    variants = [f"  +{name:{width - 1}}{line}" for name, line in list_variants().items()]
    usage = "python -m fp4jax.recipes averis+nearest nvfp4   prints what happens to each of the six operands"
    return "\n".join(["recipes", *recipes, "", "variants", *variants, "", usage])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

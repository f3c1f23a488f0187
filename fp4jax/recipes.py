"""Recipes: the format, rounding, transform and split of each operand of the three GEMMs of a linear layer.

For Y = X W with X [tokens, K], W [K, N] and D = dL/dY a recipe fills six slots:

    fprop   Y  = X W      lhs X, rhs W    contracts features K
    dgrad   dX = D Wᵀ     lhs D, rhs W    contracts features N
    wgrad   dW = Xᵀ D     lhs X, rhs D    contracts tokens

A recipe is a value. A new one is one entry in `_RECIPES`, built from operands; a variant (`"averis+nearest"`) is a
function from recipe to recipe in `_VARIANTS`. Nothing else in the project knows a recipe by its name.
"""

import dataclasses
import enum
import functools
from collections.abc import Callable

from fp4jax.numerics import NVFP4, Format, Rounding
from fp4jax.numerics.hadamard import SIZE as HADAMARD_SIZE


class Center(enum.StrEnum):
    """The row that a mean split takes off every token."""

    MEAN = "mean"  # the column mean itself; its quantization error is shared by all tokens
    QUANTIZED_MEAN = "quantized_mean"  # the quantized column mean: the split stays exact


class MeanAxes(enum.StrEnum):
    """The tokens that share a mean."""

    BATCH = "batch"
    SEQUENCE = "sequence"  # the last token axis only: one mean for every sequence


@dataclasses.dataclass(frozen=True)
class MeanSplit:
    """X = 1 c + R (arXiv 2603.10444, equation 9), with `mean` saying how the row c is quantized for its products."""

    center: Center
    mean: "Operand"
    axes: MeanAxes = MeanAxes.BATCH


@dataclasses.dataclass(frozen=True)
class Operand:
    """How one operand of one GEMM is prepared: split, then transform, then quantize.

    Attributes:
      format: None keeps the operand in the precision it comes in.
      block: None for blocks along the contraction axis; (16, 16) for square blocks.
      rounding: of the elements. Block scales are rounded to nearest.
      hadamard: width of the Hadamard transform along the contraction axis, or None.
      split: the part taken off before quantization, or None.
    """

    format: Format | None = None
    block: tuple[int, int] | None = None
    rounding: Rounding = Rounding.NEAREST
    hadamard: int | None = None
    split: MeanSplit | None = None

    def __post_init__(self):
        if self.hadamard not in (None, HADAMARD_SIZE):
            raise ValueError(f"hadamard must be None or {HADAMARD_SIZE}, got {self.hadamard}")
        if self.format and self.block not in (None, (self.format.block,) * 2):
            raise ValueError(f"block must be None or {(self.format.block,) * 2}, got {self.block}")
        if self.format is None and (self.block or self.rounding is not Rounding.NEAREST):
            raise ValueError("an operand without a format has neither blocks nor rounding")

    @property
    def draws(self) -> bool:
        """Whether preparing it needs random bits."""
        mean_draws = self.split is not None and self.split.mean.draws
        return mean_draws or self.rounding is Rounding.STOCHASTIC

    @property
    def is_high_precision(self) -> bool:
        return self == Operand()

    def __str__(self) -> str:
        if self.is_high_precision:
            return "high precision"
        parts = [self.format.name if self.format else "high precision"]
        if self.format:
            rows, columns = self.block or (1, self.format.block)
            parts.append(f"{rows}x{columns}")
            parts.append(self.rounding.value)
        if self.hadamard:
            parts.append(f"Hadamard-{self.hadamard}")
        if self.split:
            per = "" if self.split.axes is MeanAxes.BATCH else " per sequence"
            parts.append(f"minus {self.split.center.value.replace('_', ' ')}{per} [{self.split.mean}]")
        return ", ".join(parts)


@dataclasses.dataclass(frozen=True)
class Gemm:
    """The operands of one matrix product."""

    lhs: Operand = Operand()
    rhs: Operand = Operand()

    def __post_init__(self):
        if self.lhs.hadamard != self.rhs.hadamard:
            raise ValueError("a Hadamard transform cancels only if both operands of a GEMM have it")

    @property
    def is_high_precision(self) -> bool:
        return self == Gemm()


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Three GEMMs. Frozen and hashable; `str` gives the six-slot table."""

    name: str
    fprop: Gemm = Gemm()
    dgrad: Gemm = Gemm()
    wgrad: Gemm = Gemm()

    def __post_init__(self):
        splits = {operand.split for operand in (self.fprop.rhs, self.dgrad.rhs) if operand.split}
        if splits:
            raise ValueError(f"recipe {self.name}: weights cannot be mean-split, their rows are not tokens")
        for a, b, which in ((self.fprop.lhs, self.wgrad.lhs, "X"), (self.dgrad.lhs, self.wgrad.rhs, "D")):
            if a.split and b.split and a.split != b.split:
                raise ValueError(f"recipe {self.name}: both copies of {which} must be split alike, or one of them not")
        x, g = self.wgrad.lhs.split, self.wgrad.rhs.split
        if x and g and x.axes is not g.axes:
            raise ValueError(f"recipe {self.name}: the means of X and D must be over the same tokens in wgrad")

    @property
    def slots(self) -> dict[str, Operand]:
        """The six operands by the name of their slot."""
        return {
            "fprop.x": self.fprop.lhs, "fprop.w": self.fprop.rhs, "dgrad.g": self.dgrad.lhs,
            "dgrad.w": self.dgrad.rhs, "wgrad.x": self.wgrad.lhs, "wgrad.g": self.wgrad.rhs,
        }  # fmt: skip

    @property
    def is_high_precision(self) -> bool:
        return all(operand.is_high_precision for operand in self.slots.values())

    @property
    def forward_draws(self) -> bool:
        """Whether preparing X and W needs random bits."""
        return any(operand.draws for slot, operand in self.slots.items() if not slot.endswith(".g"))

    @property
    def gradient_draws(self) -> bool:
        """Whether preparing D needs random bits."""
        return self.dgrad.lhs.draws or self.wgrad.rhs.draws

    def map_operands(self, function: Callable[[str, Operand], Operand], name: str | None = None) -> "Recipe":
        """The recipe with `function(slot, operand)` in every slot."""
        new = {slot: function(slot, operand) for slot, operand in self.slots.items()}
        return Recipe(
            name or self.name,
            fprop=Gemm(new["fprop.x"], new["fprop.w"]),
            dgrad=Gemm(new["dgrad.g"], new["dgrad.w"]),
            wgrad=Gemm(new["wgrad.x"], new["wgrad.g"]),
        )

    def __str__(self) -> str:
        return "\n".join([f"recipe {self.name}", *(f"  {slot:8} {operand}" for slot, operand in self.slots.items())])


_NEAREST = Operand(NVFP4)
_STOCHASTIC = Operand(NVFP4, rounding=Rounding.STOCHASTIC)


def _nvfp4(name: str) -> Recipe:
    """1x16 blocks everywhere, stochastic rounding on gradients, no transform."""
    return Recipe(name, Gemm(_NEAREST, _NEAREST), Gemm(_STOCHASTIC, _NEAREST), Gemm(_NEAREST, _STOCHASTIC))


def _square_weights(recipe: Recipe) -> Recipe:
    def square(slot, operand):
        return dataclasses.replace(operand, block=(16, 16)) if slot.endswith(".w") else operand

    return recipe.map_operands(square)


def _wgrad_hadamard(recipe: Recipe) -> Recipe:
    def transform(slot, operand):
        return dataclasses.replace(operand, hadamard=HADAMARD_SIZE) if slot.startswith("wgrad") else operand

    return recipe.map_operands(transform)


def _split(recipe: Recipe, x: MeanSplit, g: MeanSplit) -> Recipe:
    splits = {"x": x, "g": g, "w": None}
    return recipe.map_operands(lambda slot, operand: dataclasses.replace(operand, split=splits[slot[-1]]))


def _averis(name: str) -> Recipe:
    """The mean of X rounded like X, the mean of D rounded like D, both independently of the residual."""
    return _split(_nvfp4(name), MeanSplit(Center.MEAN, _NEAREST), MeanSplit(Center.MEAN, _STOCHASTIC))


def _averis_centered(name: str) -> Recipe:
    """Residuals against the quantized mean, rounded to nearest: any fixed centre keeps the gradient unbiased."""
    split = MeanSplit(Center.QUANTIZED_MEAN, _NEAREST)
    return _split(_nvfp4(name), split, split)


_RECIPES: dict[str, tuple[str, Callable[[str], Recipe]]] = {
    "bf16": ("no quantization: the baseline, in the inputs' own precision", Recipe),
    "nvfp4": ("vanilla NVFP4: 1x16 blocks, stochastic rounding on gradients (2603.10444, section 6)", _nvfp4),
    "nvfp4_hadamard": (
        "NVIDIA's: 16x16 weights, Hadamard-16 in wgrad, stochastic rounding on gradients (2509.25149)",
        lambda name: _wgrad_hadamard(_square_weights(_nvfp4(name))),
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
}


def _on_splits(recipe: Recipe, change: Callable[[str, MeanSplit], MeanSplit | None]) -> Recipe:
    """Applies `change(slot, split)` to every split; raises if the recipe has none."""
    if not any(operand.split for operand in recipe.slots.values()):
        raise ValueError(f"recipe {recipe.name} splits nothing off")

    def apply(slot, operand):
        return dataclasses.replace(operand, split=change(slot, operand.split)) if operand.split else operand

    return recipe.map_operands(apply)


def _round_all(recipe: Recipe, rounding: Rounding) -> Recipe:
    if recipe.is_high_precision:
        raise ValueError(f"recipe {recipe.name} rounds nothing")

    def mean(split):
        return dataclasses.replace(split, mean=set_rounding(split.mean)) if split else None

    def set_rounding(operand):
        operand = dataclasses.replace(operand, split=mean(operand.split))
        return dataclasses.replace(operand, rounding=rounding) if operand.format else operand

    return recipe.map_operands(lambda slot, operand: set_rounding(operand))


def _mean_in_high_precision(recipe: Recipe) -> Recipe:
    def change(slot, split):
        if split.center is Center.QUANTIZED_MEAN:
            raise ValueError(f"recipe {recipe.name} centres on the quantized mean, which cannot be in high precision")
        return dataclasses.replace(split, mean=Operand())

    return _on_splits(recipe, change)


def _split_only(side: str, recipe: Recipe) -> Recipe:
    if not any(operand.split for slot, operand in recipe.slots.items() if slot.endswith(side)):
        raise ValueError(f"recipe {recipe.name} has no split left with it")
    return _on_splits(recipe, lambda slot, split: split if slot.endswith(side) else None)


def _forward_in_high_precision(recipe: Recipe) -> Recipe:
    if recipe.fprop.is_high_precision:
        raise ValueError(f"recipe {recipe.name} has its forward in high precision already")
    return dataclasses.replace(recipe, fprop=Gemm())


_VARIANTS: dict[str, tuple[str, Callable[[Recipe], Recipe]]] = {
    "nearest": ("round to nearest everywhere: deterministic", lambda r: _round_all(r, Rounding.NEAREST)),
    "sr_all": ("stochastic rounding of every quantized operand", lambda r: _round_all(r, Rounding.STOCHASTIC)),
    "mean_bf16": ("means kept in high precision", _mean_in_high_precision),
    "x_only": ("split activations only", functools.partial(_split_only, ".x")),
    "d_only": ("split output gradients only", functools.partial(_split_only, ".g")),
    "per_sequence": (
        "a mean for every sequence instead of one for the batch",
        lambda r: _on_splits(r, lambda slot, split: dataclasses.replace(split, axes=MeanAxes.SEQUENCE)),
    ),
    "fwd_bf16": ("fprop in high precision, dgrad and wgrad as they are", _forward_in_high_precision),
}
_CONTRADICTIONS = ({"nearest", "sr_all"}, {"x_only", "d_only"})


@functools.cache
def recipe(name: str) -> Recipe:
    """The recipe of that name, with its variants: `recipe("averis")`, `recipe("averis+sr_all+mean_bf16")`.

    Raises:
      ValueError: an unknown recipe or variant, a variant given twice, or variants that contradict each other or the
        recipe.
    """
    base, *variants = name.split("+")
    if base not in _RECIPES:
        raise ValueError(f"unknown recipe {base!r}; known: {', '.join(_RECIPES)}")
    for variant in variants:
        if variant not in _VARIANTS:
            raise ValueError(f"unknown variant {variant!r} in {name!r}; known: {', '.join(_VARIANTS)}")
    contradictory = any(pair <= set(variants) for pair in _CONTRADICTIONS)
    if contradictory or len(set(variants)) != len(variants):
        raise ValueError(f"the variants of {name!r} contradict or repeat each other")
    result = _RECIPES[base][1](base)
    for variant in variants:
        result = _VARIANTS[variant][1](result)
    return dataclasses.replace(result, name=name)


def as_recipe(value: "str | Recipe") -> Recipe:
    """A recipe given as itself or by name."""
    if isinstance(value, Recipe):
        return value
    if not isinstance(value, str):
        raise ValueError(f"recipe must be a name or a fp4jax.Recipe, got {type(value).__name__}")
    return recipe(value)


def list_recipes() -> dict[str, str]:
    """Every recipe with one line about it."""
    return {name: line for name, (line, _) in _RECIPES.items()}


def list_variants() -> dict[str, str]:
    """Every variant (`recipe+variant`) with one line about it."""
    return {name: line for name, (line, _) in _VARIANTS.items()}

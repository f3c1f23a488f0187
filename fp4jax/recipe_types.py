"""What a recipe is made of: format, rounding, transform and split of each operand of a linear layer's three GEMMs.

For Y = X W with X [tokens, K], W [K, N] and D = dL/dY a recipe fills six slots:

    fprop   Y  = X W      lhs X, rhs W    contracts features K
    dgrad   dX = D Wᵀ     lhs D, rhs W    contracts features N
    wgrad   dW = Xᵀ D     lhs X, rhs D    contracts tokens

A recipe is a value of the types here; the published ones stand in `fp4jax.recipes`.
"""

import dataclasses
import enum
from collections.abc import Callable

from fp4jax.numerics import Format, Rounding, ScaleRounding
from fp4jax.numerics.hadamard import SIZES as HADAMARD_SIZES
from fp4jax.numerics.quantize import check_options


class Center(enum.StrEnum):
    """The row that a mean split takes off every token."""

    MEAN = "mean"  # the column mean itself; its quantization error is shared by all tokens
    QUANTIZED_MEAN = "quantized_mean"  # the quantized column mean: the split stays exact


class MeanAxes(enum.StrEnum):
    """The tokens that share a mean."""

    BATCH = "batch"
    SEQUENCE = "sequence"  # the last token axis only: one mean for every sequence


class Source(enum.StrEnum):
    """What a backward operand is made from."""

    ORIGINAL = "original"
    QUANTIZED = "quantized"  # the forward's copy, so that the gradient is that of the product that was computed


@dataclasses.dataclass(frozen=True)
class MeanSplit:
    """X = 1 c + R (arXiv 2603.10444, equation 9), with `mean` saying how the row c is quantized for its products."""

    center: Center
    mean: "Operand"
    axes: MeanAxes = MeanAxes.BATCH

    def __post_init__(self):
        mean = self.mean
        if mean.split or mean.hadamard or mean.block or mean.source is not Source.ORIGINAL:
            raise ValueError("a mean has neither a split, a transform nor square blocks, and is made from the original")
        if self.center is Center.QUANTIZED_MEAN and mean.format is None:
            raise ValueError("a quantized mean as centre needs a format for the mean")

    @property
    def draws(self) -> bool:
        return self.mean.draws

    def map_parts(self, function: "Callable[[Operand], Operand]") -> "MeanSplit":
        """The split with `function` applied to the operand that is split off."""
        return dataclasses.replace(self, mean=function(self.mean))

    def __str__(self) -> str:
        per = "" if self.axes is MeanAxes.BATCH else " per sequence"
        return f"minus {self.center.value.replace('_', ' ')}{per} [{self.mean}]"


@dataclasses.dataclass(frozen=True)
class LowRankSplit:
    """X = U S V + R with rank U = `rank_fraction` of the smaller side of X (Metis, arXiv 2509.00404).

    Attributes:
      rank_fraction: of the smaller of rows and columns; at least rank 1.
      factor: how U and V are quantized; the k singular values stay in float32.
      iterations: of the randomized range finder.
      centered: take off the product of the quantized factors, so that the split stays exact.
    """

    rank_fraction: float
    factor: "Operand"
    iterations: int = 1
    centered: bool = False

    def __post_init__(self):
        if not 0 < self.rank_fraction <= 1:
            raise ValueError(f"rank_fraction must be in (0, 1], got {self.rank_fraction}")
        if self.iterations not in (1, 2):
            raise ValueError(f"iterations must be 1 or 2, got {self.iterations}")
        if self.factor.split or self.factor.hadamard or self.factor.block or self.factor.source is not Source.ORIGINAL:
            raise ValueError("the factors of a low-rank split have neither a split, a transform nor square blocks")

    @property
    def draws(self) -> bool:
        return self.factor.draws

    def map_parts(self, function: "Callable[[Operand], Operand]") -> "LowRankSplit":
        """The split with `function` applied to the operand that is split off."""
        return dataclasses.replace(self, factor=function(self.factor))

    def __str__(self) -> str:
        what = "quantized low rank" if self.centered else "low rank"
        return f"minus {what} {self.rank_fraction:.1%} [{self.factor}]"


@dataclasses.dataclass(frozen=True)
class Operand:
    """How one operand of one GEMM is prepared: split, then transform, then quantize.

    Attributes:
      format: None keeps the operand in the precision it comes in (a Hadamard transform rounds it to bfloat16).
      block: None for blocks along the contraction axis; (16, 16) for square blocks.
      rounding: of the elements.
      hadamard: width of the Hadamard transform along the contraction axis, 16 or 128, or None.
      split: the part taken off before quantization, or None.
      fresh_signs: draw the transform's signs anew each time instead of using fixed ones.
      scale_rounding: of the block scales; None for the format's own.
      candidates: four-over-six, see `fp4jax.quantize`.
      correction: EDEN's rescaling, see `fp4jax.quantize`.
      source: for operands of the backward, what they are made from.
    """

    format: Format | None = None
    block: tuple[int, int] | None = None
    rounding: Rounding = Rounding.NEAREST
    hadamard: int | None = None
    split: MeanSplit | LowRankSplit | None = None
    fresh_signs: bool = False
    scale_rounding: ScaleRounding | None = None
    candidates: tuple[float, ...] = ()
    correction: int | None = None
    source: Source = Source.ORIGINAL

    def __post_init__(self):
        if self.hadamard not in (None, *HADAMARD_SIZES):
            sizes = " or ".join(map(str, HADAMARD_SIZES))
            raise ValueError(f"hadamard must be None, {sizes}, got {self.hadamard}")
        if self.fresh_signs and not self.hadamard:
            raise ValueError("fresh signs are those of a Hadamard transform, and there is none")
        if self.hadamard and isinstance(self.split, LowRankSplit):
            raise ValueError("a low-rank split and a Hadamard transform cannot be had together")
        if self.format:
            check_options(self.format, self.block, self.candidates, self.scale_rounding, self.correction)
        elif self.block or self.rounding is not Rounding.NEAREST or self.candidates or self.correction:
            raise ValueError("an operand without a format has neither blocks nor rounding")
        elif self.scale_rounding:
            raise ValueError("an operand without a format has no block scales to round")
        if self.correction and (self.correction != self.hadamard or self.rounding is not Rounding.NEAREST):
            raise ValueError("a correction is that of rounding to nearest under a Hadamard transform of its width")

    @property
    def draws(self) -> bool:
        """Whether preparing it needs random bits."""
        return (
            self.rounding is Rounding.STOCHASTIC
            or self.scale_rounding is ScaleRounding.STOCHASTIC
            or self.fresh_signs
            or (self.split is not None and self.split.draws)
        )

    @property
    def is_high_precision(self) -> bool:
        return self == Operand()

    @property
    def is_copy(self) -> bool:
        """Whether it is the forward's copy, split and all, as it is."""
        return self == Operand(source=Source.QUANTIZED)

    def __str__(self) -> str:
        if self.is_high_precision:
            return "high precision"
        if self.is_copy:
            return "the forward's copy"
        parts = [self.format.name if self.format else "high precision"]
        if self.format:
            parts += self._scaling()
            parts.append(self.rounding.value)
        if self.hadamard:
            parts.append(f"Hadamard-{self.hadamard}" + (" with fresh signs" if self.fresh_signs else ""))
        if self.candidates:
            parts.append(" or ".join(f"{target:g}" for target in self.candidates))
        if self.correction:
            parts.append(f"corrected per {self.correction}")
        if self.scale_rounding:
            parts.append(f"scales {self.scale_rounding.value}")
        if self.split:
            parts.append(str(self.split))
        if self.source is Source.QUANTIZED:
            parts.append("from the forward's copy")
        return ", ".join(parts)

    def _scaling(self) -> list[str]:
        if self.format.block:
            rows, columns = self.block or (1, self.format.block)
            return [f"{rows}x{columns}"]
        return [f"per {self.format.outer}"]


@dataclasses.dataclass(frozen=True)
class Gemm:
    """The operands of one matrix product."""

    lhs: Operand = Operand()
    rhs: Operand = Operand()

    def __post_init__(self):
        if (self.lhs.hadamard, self.lhs.fresh_signs) != (self.rhs.hadamard, self.rhs.fresh_signs):
            raise ValueError("a Hadamard transform cancels only if both operands of a GEMM have it")

    @property
    def is_high_precision(self) -> bool:
        return self == Gemm()


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Three GEMMs. Frozen and hashable; `str` gives the six-slot table.

    Attributes:
      shards: equal parts that the first token axis is cut into, each with means, low-rank parts and float32 scales of
        its own (`fp4jax.shards`); None: all tokens share them.

    >>> from fp4jax.numerics import NVFP4
    >>> forward_only = Recipe("forward_only", fprop=Gemm(Operand(NVFP4), Operand(NVFP4)))
    >>> str(forward_only.slots["fprop.x"]), str(forward_only.slots["wgrad.g"])
    ('NVFP4, 1x16, nearest', 'high precision')
    """

    name: str
    fprop: Gemm = Gemm()
    dgrad: Gemm = Gemm()
    wgrad: Gemm = Gemm()
    shards: int | None = None

    def __post_init__(self):
        if self.shards is not None and self.shards < 1:
            raise ValueError(f"recipe {self.name}: shards must be at least 1, or None, got {self.shards}")
        self._check_splits()
        if self.fprop.lhs.fresh_signs:
            raise ValueError(
                f"recipe {self.name}: fresh signs are for dgrad and wgrad, whose D takes over its partner's"
            )
        for slot in ("fprop.x", "fprop.w", "dgrad.g", "wgrad.g"):
            if self.slots[slot].source is not Source.ORIGINAL:
                raise ValueError(f"recipe {self.name}: {slot} has no earlier copy to be made from")
        for forward, backward in ((self.fprop.lhs, self.wgrad.lhs), (self.fprop.rhs, self.dgrad.rhs)):
            if backward.source is not Source.QUANTIZED:
                continue
            if forward.hadamard:
                raise ValueError(f"recipe {self.name}: the forward's copy is transformed, nothing else is made from it")
            if not backward.is_copy and forward.split != backward.split:
                raise ValueError(f"recipe {self.name}: an operand made from the forward's copy has the forward's split")
        if self.wgrad.lhs.is_copy and isinstance(self.fprop.lhs.split, MeanSplit):
            raise ValueError(
                f"recipe {self.name}: wgrad needs a mean-split X in blocks of its own, not the forward's copy"
            )

    def _check_splits(self):
        w = [operand.split for operand in (self.fprop.rhs, self.dgrad.rhs) if operand.split]
        if any(isinstance(split, MeanSplit) for split in w):
            raise ValueError(f"recipe {self.name}: weights cannot be mean-split, their rows are not tokens")
        pairs = (
            (self.fprop.lhs, self.wgrad.lhs, "X"), (self.dgrad.lhs, self.wgrad.rhs, "D"),
            (self.fprop.rhs, self.dgrad.rhs, "W"),
        )  # fmt: skip
        for a, b, which in pairs:
            if a.split and b.split and a.split != b.split:
                raise ValueError(f"recipe {self.name}: both copies of {which} must be split alike, or one of them not")
        for gemm, which in ((self.fprop, "fprop"), (self.dgrad, "dgrad")):
            if gemm.lhs.split and gemm.lhs.hadamard:
                raise ValueError(
                    f"recipe {self.name}: {which} cannot have a transform, its mean row is not transformed"
                )
        x, g = self.wgrad.lhs.split, self.wgrad.rhs.split
        if x and g and type(x) is not type(g):
            raise ValueError(f"recipe {self.name}: X and D must both be mean-split in wgrad, or both of low rank")
        if isinstance(x, MeanSplit) and isinstance(g, MeanSplit) and x.axes is not g.axes:
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
        """Whether the forward product needs random bits."""
        return self.fprop.lhs.draws or self.fprop.rhs.draws

    @property
    def operand_draws(self) -> bool:
        """Whether preparing X and W, for forward and backward, needs random bits."""
        return any(operand.draws for slot, operand in self.slots.items() if not slot.endswith(".g"))

    @property
    def gradient_draws(self) -> bool:
        """Whether the two products of the backward need random bits."""
        return any(operand.draws for slot, operand in self.slots.items() if not slot.startswith("fprop"))

    @property
    def shard_axes(self) -> int:
        """1 where an axis of shards stands in front of the token axes of what is prepared from tokens, else 0."""
        return 0 if self.shards is None else 1

    def map_operands(self, function: Callable[[str, Operand], Operand], name: str | None = None) -> "Recipe":
        """The recipe with `function(slot, operand)` in every slot."""
        new = {slot: function(slot, operand) for slot, operand in self.slots.items()}
        return dataclasses.replace(
            self,
            name=name or self.name,
            fprop=Gemm(new["fprop.x"], new["fprop.w"]),
            dgrad=Gemm(new["dgrad.g"], new["dgrad.w"]),
            wgrad=Gemm(new["wgrad.x"], new["wgrad.g"]),
        )

    def __str__(self) -> str:
        parts = "" if self.shards is None else f", statistics of each of {self.shards} shards of the tokens"
        slots = (f"  {slot:8} {operand}" for slot, operand in self.slots.items())
        return "\n".join([f"recipe {self.name}{parts}", *slots])

"""Number formats as rows of data: what an element, a block scale and a float32 scale may be.

A format never appears as a string in a condition: code reads the fields below, so that a new format is one new row.

| format | element | block | block scale | float32 scale |
|---|---|---|---|---|
| NVFP4 | E2M1 | 16 | E4M3 | of the matrix |
| NVFP4_256 | E2M1 | 16 | E4M3, at most 256 | of the matrix |
| NVFP4_EDEN | E2M1 | 16 | E4M3, at most 256, blocks clipped by 1.2 % | of the matrix |
| NVFP4_OUTER128 | E2M1 | 16 | E4M3 | of 128 elements |
| NVFP4_VECTOR | E2M1 | 16 | E4M3 | of a row of the product |
| MXFP4 | E2M1 | 32 | E8M0 | none |
| MXFP8 | E4M3 | 32 | E8M0 | none |
| FP8_E4M3, FP8_E5M2 | E4M3, E5M2 | none | none | of the matrix |
| INT8 | integers to 127 | none | none | of a row of the product |
| TERNARY | -1, 0, 1 | none | none | of the matrix: mean magnitude |
| SIGN | -1, 1 | none | none | of a row of the product: mean magnitude |

Sources: OCP Microscaling v1.0 (E2M1, E4M3, E5M2, E8M0, MX); NVIDIA, arXiv 2509.25149 (NVFP4); arXiv 2512.02010 (scales
up to 256); arXiv 2601.22813 (EDEN); arXiv 2510.27527 (outer blocks of 128); arXiv 2402.17764 (ternary, 8-bit
activations); arXiv 2605.18933 (sign).
"""

import dataclasses
import enum
import functools

import numpy as np


class Rounding(enum.StrEnum):
    """How an element is rounded to its grid."""

    NEAREST = "nearest"  # to nearest, ties to even
    STOCHASTIC = "stochastic"  # up with a probability equal to the position between the two neighbours


class ScaleRounding(enum.StrEnum):
    """How a block scale is rounded to its type."""

    NEAREST = "nearest"  # to nearest, ties to even
    STOCHASTIC = "stochastic"  # like a stochastic element: the scale is right in the mean
    DOWN = "down"  # OCP's power of two: 2^floor(log2 amax) / 2^emax; elements above the largest saturate
    UP = "up"  # the smallest power of two under which no element saturates


class Extent(enum.StrEnum):
    """The elements that share a float32 scale; an int stands for that many along the contraction axis."""

    MATRIX = "matrix"
    VECTOR = "vector"  # the whole contraction axis: a scale for each row or column of the product


class Statistic(enum.StrEnum):
    """What a scale follows."""

    MAX = "max"
    MEAN = "mean"  # of the magnitudes


@dataclasses.dataclass(frozen=True)
class Float:
    """A small floating-point type with subnormals and without infinities; without exponent bits a uniform grid.

    Attributes:
      name: the field's name for it, for example `"E2M1"`.
      exponent_bits, mantissa_bits, bias: its layout below the sign bit.
      max: its largest finite magnitude (not always the largest code: E4M3's last code is NaN).
      has_zero: False for types whose lowest code is a power of two (E8M0).
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    max: float
    has_zero: bool = True

    @property
    def width(self) -> int:
        """Bits of a magnitude's code, below the sign bit."""
        return self.exponent_bits + self.mantissa_bits

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number."""
        return 1 - self.bias

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest number."""
        return int(np.floor(np.log2(self.max)))

    @property
    def ulp_of_subnormals(self) -> float:
        return 2.0 ** (self.min_exponent - self.mantissa_bits)

    @functools.cached_property
    def magnitudes(self) -> tuple[float, ...]:
        """The non-negative values, in the order of their codes."""
        values = []
        for code in range(2**self.width):
            exponent, mantissa = divmod(code, 2**self.mantissa_bits)
            fraction = mantissa / 2**self.mantissa_bits
            if exponent or not self.has_zero:
                values.append((1 + fraction) * 2.0 ** (exponent - self.bias))
            else:
                values.append(fraction * 2.0**self.min_exponent)
        return tuple(value for value in values if value <= self.max)

    @functools.cached_property
    def code_pieces(self) -> tuple[tuple[float, float], ...]:
        """(slope, offset) of the lines whose minimum maps a magnitude to its position among the codes.

        The codes of a floating-point type grow linearly inside an octave and half as fast in the next one: the map from
        magnitude to code is concave and piecewise linear, hence the minimum of its pieces.
        """
        values, per_octave, pieces = self.magnitudes, 2**self.mantissa_bits, []
        for start in range(per_octave, len(values), per_octave):
            octave = values[start]
            slope = per_octave / octave
            pieces.append((slope, start - slope * octave))
        return tuple(pieces) or ((1 / self.ulp_of_subnormals, 0.0),)


E2M1 = Float("E2M1", exponent_bits=2, mantissa_bits=1, bias=1, max=6.0)
E4M3 = Float("E4M3", exponent_bits=4, mantissa_bits=3, bias=7, max=448.0)
E5M2 = Float("E5M2", exponent_bits=5, mantissa_bits=2, bias=15, max=57344.0)
E8M0 = Float("E8M0", exponent_bits=8, mantissa_bits=0, bias=127, max=2.0**127, has_zero=False)
INTEGER8 = Float("INT8", exponent_bits=0, mantissa_bits=7, bias=-6, max=127.0)
TRIT = Float("ternary", exponent_bits=0, mantissa_bits=1, bias=0, max=1.0)
UNIT = Float("sign", exponent_bits=0, mantissa_bits=0, bias=0, max=1.0, has_zero=False)


@dataclasses.dataclass(frozen=True)
class Format:
    """A number format for the elements of a matrix and their scales; value = element × block scale × float32 scale.

    Attributes:
      name: the field's name for it.
      element: type of the elements.
      block: elements that share one block scale, along the contraction axis; None without block scales.
      scale: type of the block scales, or None.
      outer: the elements that share a float32 scale, or None without one.
      scale_max: the largest block scale that is given out (default: `scale.max`).
      peak: what the largest magnitude of a block becomes in units of its scale (default: `element.max`).
      scale_rounding: how block scales are rounded where an operand does not say otherwise.
      statistic: what the float32 scale follows: the largest magnitude, which becomes peak × scale_max, or the mean
        magnitude, which becomes 1.
    """

    name: str
    element: Float
    block: int | None
    scale: Float | None
    outer: Extent | int | None = Extent.MATRIX
    scale_max: float | None = None
    peak: float | None = None
    scale_rounding: ScaleRounding = ScaleRounding.NEAREST
    statistic: Statistic = Statistic.MAX

    @property
    def element_peak(self) -> float:
        return self.peak or self.element.max

    @property
    def largest_scale(self) -> float:
        """The block scale of the block with the largest magnitude."""
        if self.scale is None:
            return 1.0
        return self.scale_max or self.scale.max

    @property
    def range(self) -> float:
        """What the float32 scale's statistic becomes when divided by that scale (2688 for NVFP4)."""
        return 1.0 if self.statistic is Statistic.MEAN else self.element_peak * self.largest_scale

    @property
    def inverse_peak(self) -> np.float32:
        """float32(1/6) for NVFP4; a factor, because XLA rewrites a division by a constant into a multiplication."""
        return np.float32(1.0 / self.element_peak)

    @property
    def granularity(self) -> int:
        """Blocked axes are padded to a multiple of this."""
        return max(self.block or 1, self.outer if isinstance(self.outer, int) else 1)

    @property
    def packs(self) -> bool:
        """Whether two codes share a byte: 4-bit elements, whose blocks have even sizes."""
        return self.element.width < 4 and self.block is not None

    def __repr__(self) -> str:
        return self.name


NVFP4 = Format("NVFP4", E2M1, 16, E4M3)
NVFP4_256 = dataclasses.replace(NVFP4, name="NVFP4-256", scale_max=256.0)
NVFP4_EDEN = dataclasses.replace(NVFP4_256, name="NVFP4-EDEN", peak=6 / (17 / 16 * 0.93))
NVFP4_OUTER128 = dataclasses.replace(NVFP4, name="NVFP4/128", outer=128)
NVFP4_VECTOR = dataclasses.replace(NVFP4, name="NVFP4/vector", outer=Extent.VECTOR)
MXFP4 = Format("MXFP4", E2M1, 32, E8M0, outer=None, scale_rounding=ScaleRounding.DOWN)
MXFP8 = Format("MXFP8", E4M3, 32, E8M0, outer=None, scale_rounding=ScaleRounding.DOWN)
FP8_E4M3 = Format("FP8 E4M3", E4M3, None, None)
FP8_E5M2 = Format("FP8 E5M2", E5M2, None, None)
INT8 = Format("INT8", INTEGER8, None, None, outer=Extent.VECTOR)
TERNARY = Format("ternary", TRIT, None, None, statistic=Statistic.MEAN)
SIGN = Format("sign", UNIT, None, None, outer=Extent.VECTOR, statistic=Statistic.MEAN)

FORMATS = (
    NVFP4, NVFP4_256, NVFP4_EDEN, NVFP4_OUTER128, NVFP4_VECTOR, MXFP4, MXFP8, FP8_E4M3, FP8_E5M2, INT8, TERNARY, SIGN
)  # fmt: skip

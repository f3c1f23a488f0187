"""Number formats as rows of data: what an element, a block scale and a tensor scale may be.

A format never appears as a string in a condition: code reads the fields below, so that a new format is one new row.

| format | element | block | block scale | tensor scale |
|---|---|---|---|---|
| NVFP4 | E2M1 | 16 | E4M3 | FP32 |

Sources: OCP Microscaling v1.0 (E2M1, E4M3); NVIDIA, "Pretraining LLMs with NVFP4", arXiv 2509.25149 (two-level
scaling).
"""

import dataclasses
import enum
import functools

import numpy as np


class Rounding(enum.StrEnum):
    """How an element is rounded to its grid."""

    NEAREST = "nearest"  # to nearest, ties to even
    STOCHASTIC = "stochastic"  # up with a probability equal to the position between the two neighbours


@dataclasses.dataclass(frozen=True)
class Float:
    """A small floating-point type with subnormals and without infinities.

    Attributes:
      name: the field's name for it, for example `"E2M1"`.
      exponent_bits, mantissa_bits, bias: its layout below the sign bit.
      max: its largest finite magnitude (not always the largest code: E4M3's last code is NaN).
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    max: float

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number."""
        return 1 - self.bias

    @property
    def ulp_of_subnormals(self) -> float:
        return 2.0 ** (self.min_exponent - self.mantissa_bits)

    @functools.cached_property
    def magnitudes(self) -> tuple[float, ...]:
        """The non-negative values, in the order of their codes."""
        values = []
        for code in range(2 ** (self.exponent_bits + self.mantissa_bits)):
            exponent, mantissa = divmod(code, 2**self.mantissa_bits)
            fraction = mantissa / 2**self.mantissa_bits
            normal = (1 + fraction) * 2.0 ** (exponent - self.bias)
            values.append(normal if exponent else fraction * 2.0**self.min_exponent)
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
        return tuple(pieces)


E2M1 = Float("E2M1", exponent_bits=2, mantissa_bits=1, bias=1, max=6.0)
E4M3 = Float("E4M3", exponent_bits=4, mantissa_bits=3, bias=7, max=448.0)


@dataclasses.dataclass(frozen=True)
class Format:
    """A block-scaled number format.

    Attributes:
      name: the field's name for it.
      element: type of the elements.
      block: elements that share one block scale, along the contraction axis.
      scale: type of the block scales.
    A tensor scale in float32 completes it, so that the largest element times the largest block scale is the tensor's
    largest magnitude.
    """

    name: str
    element: Float
    block: int
    scale: Float

    @property
    def range(self) -> float:
        """Largest magnitude before the tensor scale (2688 for NVFP4)."""
        return self.element.max * self.scale.max

    @property
    def inverse_element_max(self) -> np.float32:
        """float32(1/6) for E2M1: written as a multiplication because XLA rewrites a division by a constant into one."""
        return np.float32(1.0 / self.element.max)

    def __repr__(self) -> str:
        return self.name


NVFP4 = Format("NVFP4", element=E2M1, block=16, scale=E4M3)

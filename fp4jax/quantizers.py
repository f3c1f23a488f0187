"""What quantizes an operand: XLA everywhere, or the Pallas kernels where a GPU runs them. Both give the same bits."""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, UInt32

from fp4jax.numerics import NVFP4, QTensor, hadamard, quantize_blocks, residual
from fp4jax.numerics.blocks import Size
from fp4jax.recipe_types import Operand

_log = logging.getLogger(__name__)
_FEWEST_ROWS = 16  # below, a kernel would mostly quantize padding: the row that a mean split takes off


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """An array and the row still to be subtracted from it, which a kernel does while it reads.

    Attributes:
      x: [*batch, *tokens, features].
      center: float32, shaped like x with size 1 on token axes; None for nothing to subtract.
    """

    x: Float[Array, "..."]
    center: Float32[Array, "..."] | None = None

    def array(self) -> Float[Array, "..."]:
        """The difference, in float32; x as it is where nothing is subtracted."""
        return self.x if self.center is None else residual(self.x, self.center)


@dataclasses.dataclass(frozen=True)
class Draws:
    """Random words of one quantization, each where something is drawn: elements, block scales, signs."""

    elements: UInt32[Array, "2"] | None = None
    scales: UInt32[Array, "2"] | None = None
    signs: Float32[Array, "..."] | None = None


# (rows, operand, axis of the blocks, batch_dims, draws) → the quantized operand
Quantizer = Callable[[Rows, Operand, int, int, Draws], QTensor]


def transformed(rows: Rows, operand: Operand, axis: int, signs: Float32[Array, "..."] | None) -> Float[Array, "..."]:
    """The array that is quantized: centred, and padded and Hadamard-transformed along `axis` where the operand says."""
    x = rows.array()
    if not operand.hadamard:
        return x
    return hadamard(pad_axis(x, axis, operand.hadamard), axis, operand.hadamard, signs)


def quantize_by_xla(rows: Rows, operand: Operand, axis: int, batch_dims: int, draws: Draws) -> QTensor:
    """Any operand of any recipe, on any device."""
    return quantize_blocks(
        transformed(rows, operand, axis, draws.signs), operand.format, axes=(-2, -1) if operand.block else (axis,),
        pack_axis=axis, batch_dims=batch_dims, words=draws.elements, candidates=operand.candidates,
        scale_rounding=operand.scale_rounding, correction=operand.correction, scale_words=draws.scales,
    )  # fmt: skip


def quantize_by_kernels(rows: Rows, operand: Operand, axis: int, batch_dims: int, draws: Draws) -> QTensor:
    """By one kernel where there is one for the operand, by XLA (logged) otherwise."""
    from pallas_kernels import quantize as kernels  # on demand: it needs Mosaic GPU

    if math.prod(rows.x.shape[:-1]) < _FEWEST_ROWS:
        return quantize_by_xla(rows, operand, axis, batch_dims, draws)
    if reason := _no_kernel(operand, axis, draws):
        _report_by_xla(reason)
        return quantize_by_xla(rows, operand, axis, batch_dims, draws)
    x, center = rows.x, rows.center
    if axis == -1 and center is not None and any(size != 1 for size in center.shape[batch_dims:-1]):
        x, center = rows.array(), None  # a mean for each sequence
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        x = x.astype(jnp.float32)
    if axis == -1:
        return kernels.quantize_rows(x, batch_dims=batch_dims, center=center, words=draws.elements)
    return kernels.quantize_columns(
        x, batch_dims=batch_dims, center=center, words=draws.elements, hadamard=bool(operand.hadamard)
    )


def _no_kernel(operand: Operand, axis: int, draws: Draws) -> str | None:
    """Why no kernel serves the operand, or None."""
    if operand.format != NVFP4:
        return f"{operand.format}"
    if operand.block:
        return "square blocks"
    if operand.candidates or operand.scale_rounding or operand.correction:
        return "block scales other than the format's own"
    if operand.hadamard and (operand.hadamard != NVFP4.block or draws.signs is not None or axis != -2):
        return f"a Hadamard transform of {operand.hadamard} along axis {axis}, or with fresh signs"
    return None


@functools.cache
def _report_by_xla(reason: str) -> None:
    """Says so once."""
    _log.info("backend='pallas': no kernel for %s, quantized by XLA", reason)


def by_xla() -> Quantizer:
    """`quantize_by_xla`."""
    return quantize_by_xla


@functools.cache
def by_kernels() -> Quantizer:
    """`quantize_by_kernels`.

    Raises:
      NotImplementedError: this device cannot run them; names it and the alternative.
    """
    from pallas_kernels import quantize as kernels

    if reason := kernels.unsupported_reason():
        raise NotImplementedError(f"backend='pallas': {reason}; backend='xla' gives the same bits on any device")
    return quantize_by_kernels


def pad_axis(x, axis: int, multiple: int):
    """Zeros behind the end of `axis` up to a multiple."""
    return pad_to(x, axis, -(-x.shape[axis] // multiple) * multiple)


def pad_to(x, axis: int, size: Size):
    """Zeros behind the end of `axis` up to `size`."""
    missing = size - x.shape[axis]
    if isinstance(missing, int) and missing <= 0:
        return x
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, missing if i == axis % x.ndim else 0, 0) for i in range(x.ndim)])

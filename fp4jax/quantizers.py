"""What quantizes an operand: XLA everywhere, or the Pallas kernels where a GPU runs them.

Of the same rows both give the same bits. What differs is the column mean: the kernel adds in the order that
`numerics.column_stats` defines, XLA's reduction in an order of its own, and the sums agree to rounding.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, UInt32

from fp4jax import hardware
from fp4jax.numerics import NVFP4, ColumnStats, QTensor, hadamard, quantize_blocks, residual
from fp4jax.numerics.blocks import Shape, Size
from fp4jax.recipe_types import Operand

_log = logging.getLogger(__name__)
_MOST_SEQUENCES = 65535  # of a CUDA grid
_HOPPER = 9  # the major number of its compute capability
_STRETCH = 8  # rows, of `pallas_kernels.column_stats`
_FEWEST_ROWS = 16  # below, a kernel would mostly quantize padding: the row that a mean split takes off


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """An array and the row still to be subtracted from it, which a kernel does while it reads.

    Attributes:
      x: [*batch, *tokens, features].
      center: float32, shaped like x with size 1 on token axes; None for nothing to subtract.
      amax: the largest magnitude of the difference, of each matrix, where it is known already.
    """

    x: Float[Array, "..."]
    center: Float32[Array, "..."] | None = None
    amax: Float32[Array, "..."] | None = None

    def array(self) -> Float[Array, "..."]:
        """The difference, in float32; x as it is where nothing is subtracted."""
        return self.x if self.center is None else residual(self.x, self.center)


@dataclasses.dataclass(frozen=True)
class Draws:
    """Random words of one quantization, each where something is drawn: elements, block scales, signs."""

    elements: UInt32[Array, "2"] | None = None
    scales: UInt32[Array, "2"] | None = None
    signs: Float32[Array, "..."] | None = None


ColumnSums = Callable[[QTensor | Array, int], Float32[Array, "..."] | None]


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """What quantizes, and what tells the columns' statistics in one read where there is such a thing.

    Attributes:
      name: for reports.
      quantize: (rows, operand, axis of the blocks, batch_dims, draws) → the quantized operand.
      column_stats: (x, batch_dims) → `numerics.ColumnStats` over all token axes, or None for an array that the kernel
        does not take; None: XLA's own reductions serve.
      column_sums: (an operand in blocks along the tokens, batch_dims) → sums of its values over all token axes, or None
        for an operand that the kernel does not take; None: XLA's own reductions serve.
    """

    name: str
    quantize: Callable[[Rows, Operand, int, int, Draws], QTensor]
    column_stats: Callable[[Float[Array, "..."], int], ColumnStats | None] | None = None
    column_sums: ColumnSums | None = None


def transformed(rows: Rows, operand: Operand, axis: int, signs: Float32[Array, "..."] | None) -> Float[Array, "..."]:
    """The array that is quantized: centred, and padded and Hadamard-transformed along `axis` where the operand says."""
    x = rows.array()
    if not operand.hadamard:
        return x
    return hadamard(pad_axis(x, axis, operand.hadamard), axis, operand.hadamard, signs)


def quantize_by_xla(rows: Rows, operand: Operand, axis: int, batch_dims: int, draws: Draws) -> QTensor:
    """Any operand of any recipe, on any device; the codes are not packed yet."""
    return quantize_blocks(
        transformed(rows, operand, axis, draws.signs), operand.format, axes=(-2, -1) if operand.block else (axis,),
        pack_axis=axis, batch_dims=batch_dims, words=draws.elements, candidates=operand.candidates,
        scale_rounding=operand.scale_rounding, correction=operand.correction, scale_words=draws.scales, packed=False,
    )  # fmt: skip


def quantize_by_kernels(rows: Rows, operand: Operand, axis: int, batch_dims: int, draws: Draws) -> QTensor:
    """By one kernel where there is one for the operand, by XLA (logged) otherwise."""
    from pallas_kernels import quantize as kernels  # on demand: it needs Mosaic GPU

    if reason := _no_kernel(rows.x.shape, operand, axis, draws):
        _report_by_xla(reason)
        return quantize_by_xla(rows, operand, axis, batch_dims, draws)
    if operand.block:
        x = rows.array()
        x = x if x.dtype == jnp.bfloat16 else x.astype(jnp.float32)
        return kernels.quantize_2d(x, batch_dims=batch_dims, amax=rows.amax, words=draws.elements, **_where())
    x, center = rows.x, rows.center
    if axis == -1 and center is not None and any(size != 1 for size in center.shape[batch_dims:-1]):
        x, center = rows.array(), None  # a mean for each sequence
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        x = x.astype(jnp.float32)
    given = {"batch_dims": batch_dims, "center": center, "words": draws.elements, **_where()}
    given["amax"] = None if operand.hadamard else rows.amax
    if axis == -1:
        return kernels.quantize_rows(x, **given)
    return kernels.quantize_columns(x, hadamard=bool(operand.hadamard), **given)


def quantize_by_measured_kernels(rows: Rows, operand: Operand, axis: int, batch_dims: int, draws: Draws) -> QTensor:
    """By the kernels that were measured on hardware; square blocks, whose kernel was not, by XLA."""
    by = quantize_by_xla if operand.block else quantize_by_kernels
    return by(rows, operand, axis, batch_dims, draws)


def _where() -> dict[str, Any]:
    """The device, as kernels take it; with several, an operand may be cut over them."""
    device = hardware.current()
    return {"device": device, "partitioned": device.devices > 1}


def _no_kernel(shape: Shape, operand: Operand, axis: int, draws: Draws) -> str | None:
    """Why no kernel serves the operand, or None."""
    if not all(isinstance(size, int) for size in shape):
        return "symbolic shapes"
    if math.prod(shape[:-1]) < _FEWEST_ROWS:
        return f"fewer than {_FEWEST_ROWS} rows"
    if math.prod(shape[:-2]) > _MOST_SEQUENCES:
        return f"more than {_MOST_SEQUENCES} sequences"
    if operand.format != NVFP4:
        return f"{operand.format}"
    if operand.block and (axis != -2 or operand.hadamard):
        return f"square blocks packed along axis {axis}" if axis != -2 else "transformed square blocks"
    if operand.candidates or operand.scale_rounding or operand.correction:
        return "block scales other than the format's own"
    if operand.hadamard and (operand.hadamard != NVFP4.block or draws.signs is not None or axis != -2):
        return f"a Hadamard transform of {operand.hadamard} along axis {axis}, or with fresh signs"
    return None


@functools.cache
def _report_by_xla(reason: str) -> None:
    """Says so once."""
    _log.info("backend='pallas': no kernel for %s, quantized by XLA", reason)


def stats_by_kernel(x: Float[Array, "..."], batch_dims: int) -> ColumnStats | None:
    """By one kernel for bfloat16 and float32; other dtypes are converted first. None for what does not fit its grid."""
    from pallas_kernels import column_stats as kernels

    if not _fits_grid(x.shape, batch_dims):
        return None
    return kernels.column_stats(x if x.dtype == jnp.bfloat16 else x.astype(jnp.float32), batch_dims, **_where())


def stats_in_whole_stretches(x: Float[Array, "..."], batch_dims: int) -> ColumnStats | None:
    """By the kernel where sequences are whole stretches of its rows; None for others, which XLA's mean takes.

    Devices that share a batch of others would cut through stretches, and the kernel exchanges none that are shorter. On
    one device it would serve, but then a mean's last bit would depend on the devices. (Shared sequences are in whole
    blocks, or the quantizers refuse them.)
    """
    rows = x.shape[-2]
    return None if isinstance(rows, int) and rows % _STRETCH else stats_by_kernel(x, batch_dims)


def sums_by_kernel(q: QTensor | Array, batch_dims: int) -> Float32[Array, "..."] | None:
    """By one kernel that reads codes; None where `has_column_sums` is not so."""
    if not has_column_sums(q):
        return None
    from pallas_kernels import column_sums as kernels

    return kernels.column_sums(q.pack(), batch_dims, **_where())


def has_column_sums(value: QTensor | Array) -> bool:
    """Whether a kernel adds an operand up: NVFP4 in 1x16 blocks along the tokens, of a shape that fits its grid."""
    if not isinstance(value, QTensor) or value.format != NVFP4 or [axis for axis, _ in value.blocked] != [-2]:
        return False
    return _fits_grid(value.shape, len(value.shape) - 2)


def _fits_grid(shape: Shape, axes: int) -> bool:
    """Whether all sizes are known, and the first `axes` axes hold no more than one axis of a grid."""
    return all(isinstance(size, int) for size in shape) and math.prod(shape[:axes]) <= _MOST_SEQUENCES


def by_xla() -> Quantizer:
    """XLA, on any device."""
    return _BY_XLA


def by_kernels() -> Quantizer:
    """The Pallas kernels.

    Raises:
      NotImplementedError: this device cannot run them; names it and the alternative.
    """
    from pallas_kernels import quantize as kernels

    if reason := kernels.unsupported_reason(hardware.current()):
        raise NotImplementedError(f"backend='pallas': {reason}; backend='xla' gives the same bits on any device")
    return Quantizer("Pallas kernels", quantize_by_kernels, stats_by_kernel, sums_by_kernel)


def best() -> Quantizer:
    """The kernels on Hopper GPUs, where they were measured (docs/benchmarks.md); XLA everywhere else.

    They were measured on one. On several, each runs the same kernel on its shard, with the bits of one by construction.
    The kernel of square blocks was not run on hardware, that of column sums only within a training step: both are taken
    by `backend="pallas"` alone.
    """
    device = hardware.current()
    if device.capability[0] != _HOPPER:
        return by_xla()
    from pallas_kernels import quantize as kernels

    if kernels.unsupported_reason(device):
        return by_xla()
    return dataclasses.replace(
        by_kernels(),
        quantize=quantize_by_measured_kernels,
        column_stats=stats_in_whole_stretches,
        column_sums=None,
    )


_BY_XLA = Quantizer("XLA", quantize_by_xla)


def pad_axis(x, axis: int, multiple: int):
    """Zeros behind the end of `axis` up to a multiple."""
    return pad_to(x, axis, -(-x.shape[axis] // multiple) * multiple)


def pad_to(x, axis: int, size: Size):
    """Zeros behind the end of `axis` up to `size`."""
    missing = size - x.shape[axis]
    if isinstance(missing, int) and missing <= 0:
        return x
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, missing if i == axis % x.ndim else 0, 0) for i in range(x.ndim)])

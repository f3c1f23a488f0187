"""`dequant_matmul` on one device: from codes and scales to the kernel's arrays and back."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Shaped, UInt8

from fp4jax.numerics import NVFP4
from pallas_kernels.dequant_matmul import kernel
from pallas_kernels.dequant_matmul.decode import DEPTH
from pallas_kernels.partition_products import Codes

_VECTOR = 4  # columns of a lane, neighbours in memory: of codes, scales and results
_WORD = 4  # bytes
Axes = tuple[int, ...]


@dataclass(frozen=True)
class Operand:
    """Packed codes and scales of one operand as `decode` takes them.

    Attributes:
      codes, scales: each [batch, extent, ...] or, where `columns`, [batch, ..., extent], padded.
      columns: the contraction runs down the columns.
      extent: without the padding.
    """

    codes: UInt8[Array, "batch ..."]
    scales: Shaped[Array, "batch ..."]
    columns: bool
    extent: int


def product(
    contracted: tuple[Axes, Axes],
    batch_dims: int,
    codes: Codes,
    scales: Codes,
    rhs_codes: Codes,
    rhs_scales: Codes,
    scale: Float32[Array, "*batch"],
    *,
    dtype: jnp.dtype,
    interpret: bool,
) -> Float[Array, "..."]:
    """The product of elements × block scales, times `scale`: [*batch, *lhs rows, *rhs rows].

    Args:
      codes, scales: of each operand, as `QTensor.along` gives them, along the last of its contracted axes.

    Raises:
      ValueError: fewer rows than a tile.
    """
    lhs, rows = _operand(codes, scales, contracted[0], batch_dims)
    rhs, columns = _operand(rhs_codes, rhs_scales, contracted[1], batch_dims)
    if min(lhs.extent, rhs.extent) < kernel.MIN_ROWS:
        raise ValueError(
            f"dequant_matmul: a device has {lhs.extent} x {rhs.extent} of a product, the kernel makes tiles of "
            f'{kernel.MIN_ROWS}: cut it over fewer devices, or use gemm="emulated"'
        )
    result = kernel.fp4jax_dequant_matmul(
        scale.reshape(-1),
        (lhs.codes, lhs.scales),
        (rhs.codes, rhs.scales),
        lhs_columns=lhs.columns,
        rhs_columns=rhs.columns,
        dtype=dtype,
        interpret=interpret,
    )
    return result[:, : lhs.extent, : rhs.extent].reshape(*scale.shape, *rows, *columns)


def _operand(codes: Codes, scales: Codes, contracted: Axes, batch_dims: int) -> tuple[Operand, tuple[int, ...]]:
    """(the operand, the sizes of its axes that are not contracted)."""
    axis = contracted[-1]
    rows = codes.shape[batch_dims:-1] if axis == -1 else codes.shape[-1:]
    batch, extent = math.prod(codes.shape[:batch_dims]), math.prod(rows)
    order = (batch, extent, -1) if axis == -1 else (batch, -1, extent)
    flat = _padded(codes.reshape(order), DEPTH // 2, axis), _padded(scales.reshape(order), DEPTH // NVFP4.block, axis)
    if axis == -1:
        words = lax.bitcast_convert_type(flat[1].reshape(*flat[1].shape[:-1], -1, _WORD), jnp.uint32)
        flat = flat[0], words
    return Operand(*flat, axis != -1, extent), rows


def _padded(part: UInt8[Array, "batch a b"], unit: int, axis: int) -> UInt8[Array, "batch c d"]:
    """Zeros up to whole tiles along the contraction, whole vectors across it: blocks of zeros, with scales of zero."""
    units = (_VECTOR, unit) if axis == -1 else (unit, _VECTOR)
    missing = [-size % each for size, each in zip(part.shape[1:], units, strict=True)]
    return jnp.pad(part, [(0, 0), *((0, m) for m in missing)]) if any(missing) else part

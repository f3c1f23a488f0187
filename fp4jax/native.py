"""Products on FP4 tensor cores: NVFP4 operands handed to `jax.nn.scaled_matmul` as they are stored.

On Blackwell XLA makes a call of cuDNN of it (`__cudnn$blockScaledDot`), elsewhere, where it is of no use, a product in
float32. Elements are E2M1, a scale in E4M3 stands for every 16 along the contraction, sums are in float32; the float32
scales of the operands multiply the result, outside of here. So the result is the emulation's up to the order of
additions.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, UInt8

from fp4jax import hardware
from fp4jax.numerics import QTensor, formats

_BLOCK = 16
_LEAST_CAPABILITY = (10, 0)
Axes = tuple[int, ...]
Codes = UInt8[Array, "..."]


def unsupported_reason() -> str | None:
    """Why the device that a program is traced for has no FP4 tensor cores; None where it has."""
    device = hardware.current()
    if device.capability >= _LEAST_CAPABILITY:
        return None
    return (
        f"FP4 tensor cores need an NVIDIA GPU of compute capability 10.0 (Blackwell) or higher, the device is {device}"
    )


def misfit(lhs: QTensor, rhs: QTensor, contracted: tuple[tuple[int, ...], tuple[int, ...]]) -> str | None:
    """Why the tensor cores cannot multiply these operands over the axes `contracted` (negative); None if they can."""
    for value, axes in zip((lhs, rhs), contracted, strict=True):
        format = value.format
        if (format.element, format.block, format.scale) != (formats.E2M1, _BLOCK, formats.E4M3):
            return f"{format} is not E2M1 in blocks of 16 with scales in E4M3"
        if value.amax is not None and any(value.amax.shape[axis] != 1 for axis in axes):
            return f"the float32 scale of {format} changes along the contraction"
        if dict(value.blocked).keys().isdisjoint(axes):
            return f"the blocks of {format} run along another axis"
    sizes = [tuple(value.padded_shape[a] for a in axes) for value, axes in zip((lhs, rhs), contracted, strict=True)]
    return None if sizes[0] == sizes[1] else f"the operands are padded to different sizes, {sizes[0]} and {sizes[1]}"


def product(lhs: QTensor, rhs: QTensor, contracted: tuple[Axes, Axes], batch_dims: int) -> Float32[Array, "..."]:
    """The product of elements × block scales, without the float32 scales: [*batch, *lhs rows, *rhs rows].

    Args:
      contracted: of each operand, the axes that are summed over (negative, ascending); one of them is blocked.
      batch_dims: leading axes of both that count independent products.
    """
    multiply = functools.partial(_scaled_matmul, contracted, batch_dims)
    left, right = (_along(value, axes) for value, axes in zip((lhs, rhs), contracted, strict=True))
    if hardware.current().devices == 1:
        return multiply(*left, *right)
    from pallas_kernels import partition_products as several  # on demand: few programs need it

    operands = (
        several.operand(*parts, axes, batch_dims, row)
        for parts, axes, row in zip((left, right), contracted, ("m", "n"), strict=True)
    )
    return several.product_over_shards(multiply, *operands)


def _along(value: QTensor, contracted: Axes) -> tuple[Codes, Codes]:
    return value.along(next(axis for axis, _ in value.blocked if axis in contracted))


def _scaled_matmul(
    contracted: tuple[Axes, Axes], batch_dims: int,
    codes: Codes, scales: Codes, rhs_codes: Codes, rhs_scales: Codes, *, dtype: DTypeLike = jnp.float32,
) -> Float[Array, "..."]:  # fmt: skip
    """`product` of codes and scales in blocks along a contracted axis, of one device."""
    (x, x_scales, x_rows), (w, w_scales, w_rows) = (
        _operand(*parts, axes, batch_dims)
        for parts, axes in zip(((codes, scales), (rhs_codes, rhs_scales)), contracted, strict=True)
    )
    result = jax.nn.scaled_matmul(x, w, x_scales, w_scales, preferred_element_type=dtype)
    return result.reshape(*codes.shape[:batch_dims], *x_rows, *w_rows)


def _operand(codes: Codes, scales: Codes, contracted: Axes, batch_dims: int):
    """(elements [batch, rows, K], scales [batch, rows, K / 16], sizes of the rows).

    Axes are moved while two codes share a byte: as elements of half a byte they would be moved one by one.
    """
    rows = tuple(a for a in range(batch_dims - codes.ndim, 0) if a not in contracted)
    sizes = tuple(codes.shape[a] for a in rows)
    order = tuple(range(batch_dims)) + tuple(a % codes.ndim for a in rows + contracted)
    batch = _count(codes.shape[:batch_dims])
    flat = tuple(
        a.transpose(order).reshape(batch, _count(sizes), _count(a.shape[i] for i in contracted))
        for a in (codes, scales)
    )
    elements = lax.bitcast_convert_type(flat[0], jnp.float4_e2m1fn)  # [..., 2]: the low nibble first
    elements = elements.reshape(*elements.shape[:-2], -1)
    return elements, lax.bitcast_convert_type(flat[1], jnp.float8_e4m3fn), sizes


def _count(sizes) -> int:
    result = 1
    for size in sizes:  # `math.prod` makes an array of a symbolic size
        result = result * size
    return result

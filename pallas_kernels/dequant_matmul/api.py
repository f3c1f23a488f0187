"""`dequant_matmul`: the product of two quantized operands by one kernel that reads their codes."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from fp4jax.numerics import E2M1, E4M3, NVFP4, QTensor
from pallas_kernels import compat, launch, partition_products
from pallas_kernels.dequant_matmul import kernel, local

DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))
"""Of results."""

_CAPABILITY = "9.0"
Axes = tuple[int, ...]


def unsupported_reason(device: compat.Device | None = None) -> str | None:
    """Why the kernel cannot serve `device` (default: the first of `jax.devices()`), or None where it can.

    It is of Hopper alone: its instruction, `wgmma`, is gone from Blackwell, which multiplies FP4 natively.
    """
    device = device or jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    if device.platform in ("gpu", "cuda") and capability == _CAPABILITY:
        return None
    found = capability if device.platform in ("gpu", "cuda") else device.platform
    return (
        f"wgmma needs an NVIDIA GPU of compute capability {_CAPABILITY}, the device is {device.device_kind} ({found})"
    )


def misfit(lhs: QTensor, rhs: QTensor, contracted: tuple[Axes, Axes], batch_dims: int = 0) -> str | None:
    """Why the kernel does not multiply these operands over the axes `contracted`, or None if it does."""
    for value, axes in zip((lhs, rhs), contracted, strict=True):
        if (reason := _unfit(value, axes, batch_dims)) is not None:
            return reason
    for what, left, right in (
        ("contracted sizes", *(tuple(v.shape[a] for a in c) for v, c in zip((lhs, rhs), contracted, strict=True))),
        ("batch sizes", lhs.shape[:batch_dims], rhs.shape[:batch_dims]),
    ):
        if left != right:
            return f"the operands have different {what}, {left} and {right}"
    return None


def dequant_matmul(
    lhs: QTensor,
    rhs: QTensor,
    contracted: tuple[Axes, Axes],
    batch_dims: int = 0,
    dtype: DTypeLike = jnp.float32,
    *,
    device: compat.Device | None = None,
    partitioned: bool = False,
    interpret: bool = False,
) -> Float[Array, "..."]:
    """The product of the represented values, [*batch, *lhs rows, *rhs rows], accumulated in float32.

    Element × block scale is exact in what is multiplied, products are added in an order that the shape decides, and the
    tensor scales multiply the sum at the end. Where the products of elements × block scales are multiples of one number
    and their magnitudes add up to less than 2^24 of it, the sum is exact; elsewhere it is within k 2^-23 of the sum of
    their magnitudes, k the length of the contraction. A block that is not finite makes its row or column so. It has no
    derivative.

    Args:
      lhs, rhs: E2M1 in blocks of 16 with scales in E4M3 and one float32 scale a matrix, logical shapes [*batch, *rows,
        features] with blocks along the last axis, or [*batch, *tokens, features] with blocks along the last axis but
        one, or 16x16 over both; at least 128 rows, of a shard too.
      contracted: of each operand the axes that are summed over, negative and ascending: (-1,), or all behind the batch
        but the last.
      batch_dims: leading axes of both that count independent products.
      dtype: float32, or bfloat16 to which the sum is rounded once, before it is written.
      device: the device the program is compiled for; default: the first of `jax.devices()`.
      partitioned: on a mesh, multiply the shards where they lie.
      interpret: run the kernel in Pallas' GPU interpreter instead, on any device: for tests.

    Raises:
      NotImplementedError: the device or the JAX release is not served.
      ValueError: another dtype; the operands are none that the kernel multiplies: `misfit` says why.
    """
    reason = compat.not_interpreted() if interpret else unsupported_reason(device)
    if reason:
        raise NotImplementedError(f"{reason}; multiply the dequantized operands instead")
    if reason := misfit(lhs, rhs, contracted, batch_dims):
        raise ValueError(f"dequant_matmul: {reason}")
    left, right = (
        partition_products.operand(*value.along(axes[-1]), axes, batch_dims, row)
        for value, axes, row in ((lhs, contracted[0], "m"), (rhs, contracted[1], "n"))
    )
    batch = lhs.shape[:batch_dims]
    scale = lhs.tensor_scale.reshape(batch) * rhs.tensor_scale.reshape(batch)
    dtype = jnp.dtype(dtype)
    if dtype not in DTYPES:
        raise ValueError(f"dequant_matmul: a result is of float32 or bfloat16, got {dtype}")
    multiply = functools.partial(local.product, contracted, batch_dims, interpret=interpret)
    if partitioned:
        return partition_products.product_over_shards(
            multiply, left, right, scale, dtype=dtype, least_rows=kernel.MIN_ROWS
        )
    return multiply(left.codes, left.scales, right.codes, right.scales, scale, dtype=dtype)


def _unfit(value: QTensor, axes: Axes, batch_dims: int) -> str | None:
    format, shape = value.format, value.shape
    if (format.element, format.block, format.scale) != (E2M1, NVFP4.block, E4M3):
        return f"{format} is not E2M1 in blocks of {NVFP4.block} with scales in E4M3"
    if not all(isinstance(size, int) for size in shape):
        return "symbolic shapes"
    one_a_matrix = (*shape[:batch_dims], *[1] * (len(shape) - batch_dims))
    if value.amax is None or value.amax.shape != one_a_matrix:
        return f"{format} has no float32 scale that is one number a matrix"
    behind_batch = tuple(range(batch_dims - len(shape), 0))
    if axes not in ((-1,), behind_batch[:-1]):
        return f"axes {axes} of {shape} are neither the last one nor all behind the batch but the last"
    if axes[-1] not in dict(value.blocked):
        return f"the blocks of {format} run along another axis"
    rows = math.prod(size for i, size in zip(behind_batch, shape[batch_dims:], strict=True) if i not in axes)
    products, most = math.prod(shape[:batch_dims]), kernel.MIN_ROWS * launch.GRID_LIMIT
    if rows < kernel.MIN_ROWS:
        return f"a kernel takes {kernel.MIN_ROWS} rows or more, got {rows}"
    if rows > most:
        return f"a kernel takes {most} rows at most, got {rows}"
    if products > launch.GRID_LIMIT:
        return f"a kernel takes {launch.GRID_LIMIT} products at most, got {products}"
    return None

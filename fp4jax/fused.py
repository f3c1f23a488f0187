"""Products by one kernel that decodes packed NVFP4 operands as it multiplies them: `pallas_kernels.dequant_matmul`.

For Hopper GPUs, which have no FP4 tensor cores: the emulation writes dequantized operands to memory and reads them
again, the kernel reads 4.5 bits an element. Exact up to the order of additions, as the emulation is.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from fp4jax import hardware
from fp4jax.numerics import QTensor

Axes = tuple[int, ...]


def unsupported_reason() -> str | None:
    """Why the device that a program is traced for does not run the kernel; None where it does."""
    from pallas_kernels import dequant_matmul as kernels  # on demand: it needs Mosaic GPU

    return kernels.unsupported_reason(hardware.current())


def misfit(lhs: QTensor, rhs: QTensor, contracted: tuple[Axes, Axes], batch_dims: int) -> str | None:
    """Why the kernel does not multiply these operands over the axes `contracted` (negative); None if it does."""
    from pallas_kernels import dequant_matmul as kernels

    return kernels.misfit(lhs, rhs, contracted, batch_dims)


def product(
    lhs: QTensor, rhs: QTensor, contracted: tuple[Axes, Axes], batch_dims: int, dtype: jnp.dtype
) -> Float[Array, "..."]:
    """The product of the represented values, accumulated in float32 and rounded once: to `dtype`, if the kernel has it.

    Args:
      contracted: of each operand, the axes that are summed over (negative, ascending); the last of them is blocked.
      batch_dims: leading axes of both that count independent products.
    """
    from pallas_kernels import dequant_matmul as kernels

    device, dtype = hardware.current(), jnp.dtype(dtype)
    dtype = dtype if dtype in kernels.DTYPES else jnp.dtype(jnp.float32)
    return kernels.dequant_matmul(
        lhs, rhs, contracted, batch_dims, dtype, device=device, partitioned=device.devices > 1
    )

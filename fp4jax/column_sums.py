"""Column sums of a prepared residual, 1ᵀR, which the weight gradient of a mean split needs.

They are taken where they are needed: by a kernel from the codes or, without one, from the array that the product
multiplies, so that nothing is quantized or kept for their sake. Where a residual is prepared would be too early: in a
scan over layers XLA lets the kernel that quantizes write into the array of all layers, if nothing else reads its codes.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32

from fp4jax import hardware
from fp4jax.numerics import QTensor
from fp4jax.operands import Part, dequantize
from fp4jax.quantizers import ColumnSums


def column_sums(
    part: Part, axes: tuple[int, ...], batch_dims: int, is_lhs: bool, kernel: ColumnSums | None = None
) -> Float32[Array, "..."]:
    """Sums of a residual over tokens, 1ᵀR, kept with size 1 along `axes`.

    Args:
      is_lhs: the residual is the lhs of the weight gradient.
      kernel: `quantizers.Quantizer.column_sums`, taken where it serves.
    """
    value = part.residual
    if part.sums is not None:
        return part.sums
    if kernel and _over_all_tokens(value, axes, batch_dims) and (sums := kernel(value, batch_dims)) is not None:
        return sums
    if not _sums_as_product(value, axes, batch_dims):
        sums = jnp.sum(_dequantized_from_product(value), axis=axes, keepdims=True)
        # Behind a barrier: XLA:CPU would sum within the product that needs the sums, where it is slower.
        return lax.optimization_barrier(sums)
    values = value.values(hardware.emulation_dtype())
    ones = jnp.ones((*values.shape[:-1], hardware.CPU_ROWS), values.dtype)
    over = ((axes, axes), (tuple(range(batch_dims)),) * 2)
    sums = lax.dot_general(*((values, ones) if is_lhs else (ones, values)), over, preferred_element_type=jnp.float32)
    sums = lax.index_in_dim(sums, 0, axis=-1 if is_lhs else -2, keepdims=False)
    return sums.reshape(*values.shape[:batch_dims], *[1] * len(axes), -1) * value.tensor_scale


def _sums_as_product(value: QTensor | Array, axes: tuple[int, ...], batch_dims: int) -> bool:
    """Whether the sums are taken by a product with ones, from the very array that the weight gradient multiplies.

    XLA:CPU makes that array in the two axes that its products have, and for a sum over more axes once more, quantizing
    everything again. Over a single one the sum reads the same array.
    """
    return (
        hardware.current().is_cpu
        and isinstance(value, QTensor)
        and value.tensor_scale is not None
        and all(size == 1 for size in value.tensor_scale.shape[batch_dims:])
        and _over_all_tokens(value, axes, batch_dims)
        and len(axes) > 1
    )


def _over_all_tokens(value: QTensor | Array, axes: tuple[int, ...], batch_dims: int) -> bool:
    return axes == tuple(range(batch_dims, len(value.shape) - 1))


def _dequantized_from_product(value: QTensor | Array) -> Float32[Array, "..."]:
    """`dequantize` from the array that products multiply, which is the same values: XLA then makes it once."""
    if not isinstance(value, QTensor) or value.tensor_scale is None or isinstance(value.format.outer, int):
        return dequantize(value)
    return value.values(hardware.emulation_dtype()).astype(jnp.float32) * value.tensor_scale

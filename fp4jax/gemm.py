"""The three products of a linear layer on prepared operands.

With X = 1 m + R (the mean split) a product of operands is the product of the residuals plus rank-one corrections:

    fprop   Y  = R W + 1 (m W)                                      dgrad likewise with D and Wᵀ
    wgrad   dW = Rxᵀ Rd + (Rxᵀ 1) md + mxᵀ (1ᵀ Rd) + l mxᵀ md       l: number of tokens

The middle terms are there because a quantized residual is no longer exactly zero-mean (arXiv 2603.10444, equations
11-12, leave them out); the matrix 1 m is never formed.

Products are emulated: element × block scale has at most 6 significant bits, so float32 and bfloat16 hold it exactly,
and a GEMM with float32 accumulation equals FP4 tensor cores up to the order of additions. Tensor scales multiply the
result.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fp4jax.numerics import QTensor, row_count
from fp4jax.operands import Part, dequantize, mean_axes
from fp4jax.recipes import Recipe


def contract_features(
    lhs: Part, rhs: Part, rhs_axis: int, batch_dims: int, dtype, precision, row_mask
) -> Float[Array, "..."]:
    """fprop (`rhs_axis` -2: W's K) and dgrad (-1: W's N): [*batch, *tokens, features] × W → [*batch, *tokens, out]."""
    product = functools.partial(_product, rhs=rhs.residual, rhs_axis=rhs_axis, batch_dims=batch_dims, dtype=dtype)
    result = product(lhs.residual, precision=precision)
    if lhs.mean is None:
        return result
    # One row: its cost is nothing, so a mean in high precision is multiplied in full float32 on every backend.
    mean_precision = precision if isinstance(lhs.mean, QTensor) else lax.Precision.HIGHEST
    row = product(lhs.mean, precision=mean_precision)
    return result + (row if row_mask is None else jnp.where(row_mask[..., None], row, 0.0))


def contract_tokens(
    x: Part, d: Part, recipe: Recipe, shape: tuple[int, ...], batch_dims: int, dtype, precision, row_mask
) -> Float[Array, "*batch K N"]:
    """wgrad: Xᵀ D over every token axis. `shape` is X's logical shape [*batch, *tokens, K]."""
    rank = len(shape)
    tokens = tuple(range(batch_dims, rank - 1))
    batch = tuple(range(batch_dims))
    contract = functools.partial(lax.dot_general, dimension_numbers=((tokens, tokens), (batch, batch)))
    x_values, x_scale = _operand(x.residual, -2, dtype)
    d_values, d_scale = _operand(d.residual, -2, dtype)
    x_values, d_values = _same_size(*_same_dtype(x_values, d_values), -2, -2)
    precision = _precision_of(x.residual, d.residual, precision)
    result = contract(x_values, d_values, precision=precision, preferred_element_type=_accumulator(x_values))
    for scale in (x_scale, d_scale):
        if scale is not None:
            result = result * _per_matrix(scale, batch_dims, result.ndim)
    # Corrections: rows summed over the averaged tokens, one outer product for every mean.
    outer = functools.partial(contract, precision=lax.Precision.HIGHEST)
    x_mean, d_mean = (part.mean if part.mean is None else dequantize(part.mean) for part in (x, d))
    if d_mean is not None:
        result = result + outer(x.sums, d_mean)
    if x_mean is not None:
        x_sums = d.sums
        if d_mean is not None:
            axes = mean_axes(recipe.wgrad.lhs.split, rank, batch_dims)
            x_sums = x_sums + row_count(shape, axes, row_mask) * d_mean
        result = result + outer(x_mean, x_sums)
    return result


def _product(lhs, *, rhs, rhs_axis, batch_dims, dtype, precision):
    lhs_values, lhs_scale = _operand(lhs, -1, dtype)
    rhs_values, rhs_scale = _operand(rhs, rhs_axis, dtype)
    lhs_values, rhs_values = _same_size(*_same_dtype(lhs_values, rhs_values), -1, rhs_axis)
    batch = tuple(range(batch_dims))
    dimension_numbers = (((lhs_values.ndim - 1,), (rhs_values.ndim + rhs_axis,)), (batch, batch))
    result = lax.dot_general(
        lhs_values,
        rhs_values,
        dimension_numbers,
        precision=_precision_of(lhs, rhs, precision),
        preferred_element_type=_accumulator(lhs_values),
    )
    for scale in (lhs_scale, rhs_scale):
        if scale is not None:
            result = result * _per_matrix(scale, batch_dims, result.ndim)
    return result


def _precision_of(lhs, rhs, precision):
    """The caller's precision is for operands in high precision: quantized ones are exact as they are."""
    return None if isinstance(lhs, QTensor) and isinstance(rhs, QTensor) else precision


def _accumulator(values):
    """float32, or float64 for operands that stayed in it."""
    return jnp.float64 if values.dtype == jnp.float64 else jnp.float32


def _operand(value: QTensor | Array, axis: int, dtype):
    """Values to multiply (padding kept along the contracted axis) and the tensor scale, None in high precision."""
    if isinstance(value, QTensor):
        return value.values(dtype, padded=(axis,)), value.tensor_scale
    return value, None


def _same_dtype(lhs, rhs):
    """Both in the wider of two dtypes: quantized values are exact in any."""
    if lhs.dtype == rhs.dtype:
        return lhs, rhs
    with jax.numpy_dtype_promotion("standard"):  # a caller may have it strict; here it is meant
        wider = jnp.promote_types(lhs.dtype, rhs.dtype)
    return lhs.astype(wider), rhs.astype(wider)


def _same_size(lhs, rhs, lhs_axis, rhs_axis):
    """Zero-pads the shorter contracted axis: a quantized operand comes in whole blocks, the other one may not."""
    size = max(lhs.shape[lhs_axis], rhs.shape[rhs_axis])
    return _pad_to(lhs, lhs_axis, size), _pad_to(rhs, rhs_axis, size)


def _pad_to(x, axis, size):
    missing = size - x.shape[axis]
    if not missing:
        return x
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, missing if i == axis % x.ndim else 0, 0) for i in range(x.ndim)])


def _per_matrix(scale, batch_dims, rank):
    """A tensor scale [*batch, 1, ...] shaped to multiply a result of `rank` axes."""
    return scale.reshape(*scale.shape[:batch_dims], *[1] * (rank - batch_dims))


def emulation_dtype() -> jnp.dtype:
    """What quantized values are multiplied in: bfloat16 where the device has units for it, float32 elsewhere.

    Both give the same result up to the order of additions. CPUs are judged by their instruction set and not by a
    measurement, so that the same machine repeats the same run bit for bit.
    """
    units = {"cpu": _cpu_has_bfloat16_units}.get(jax.default_backend(), lambda: True)
    return jnp.dtype(jnp.bfloat16 if units() else jnp.float32)


@functools.cache
def _cpu_has_bfloat16_units() -> bool:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next((line for line in file if line.startswith("flags")), "").split()
    except OSError:  # not Linux: nothing is known of its units
        return False
    return bool({"avx512_bf16", "amx_bf16"} & set(flags))

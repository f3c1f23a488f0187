"""The three products of a linear layer on prepared operands.

With X = 1 m + R (the mean split) a product of operands is the product of the residuals plus rank-one corrections:

    fprop   Y  = R W + 1 (m W)                                      dgrad likewise with D and Wᵀ
    wgrad   dW = Rxᵀ Rd + (Rxᵀ 1) md + mxᵀ (1ᵀ Rd) + l mxᵀ md       l: number of tokens

The middle terms are there because a quantized residual is no longer exactly zero-mean (arXiv 2603.10444, equations
11-12, leave them out); the matrix 1 m is never formed. With a low-rank split X = U S V + R, of W too, it is the same
algebra: rows of X meet W = Uw Sw Vw + Rw as they are, those of V do so once, and U S is multiplied with their result.

Products of two quantized operands run on FP4 tensor cores where the device has them and the operands fit
(`fp4jax.native`), by a kernel that decodes them on the way where that is asked for (`fp4jax.fused`), else they are
emulated: element × block scale has at most 8 significant bits, so float32 and bfloat16
hold it exactly, and a GEMM with float32 accumulation equals FP4 tensor cores up to the order of additions. Float32
scales multiply the result; those that change along the contraction enter the operand, which then is multiplied in
float32.
"""

import dataclasses
import functools
import logging
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jaxtyping import Array, Float

from fp4jax import fused, hardware, native, scopes
from fp4jax.column_sums import column_sums
from fp4jax.numerics import QTensor, row_count
from fp4jax.numerics.blocks import Shape
from fp4jax.operands import Part, dequantize, low_rank_factors_of, mean_axes
from fp4jax.quantizers import ColumnSums
from fp4jax.recipes import Recipe

_log = logging.getLogger("fp4jax")


@dataclasses.dataclass(frozen=True)
class Execution:
    """How quantized operands are multiplied.

    Attributes:
      dtype: of the emulation.
      native: on FP4 tensor cores, where both operands are of the kind that these take.
      fused: by the kernel that decodes them, likewise; never with `native`.
      rounded: a product of features that corrections are added to is rounded to the result's dtype before. On GPUs XLA
        writes it to memory between the two, and with it in float32 a mean costs more in traffic than in anything else;
        elsewhere the sum is one with the product, in float32.
    """

    dtype: jnp.dtype
    native: bool = False
    fused: bool = False
    rounded: bool = False

    def __str__(self) -> str:
        emulated = f"emulated in {self.dtype}"
        way = "native" if self.native else "fused" if self.fused else ""
        return f"{way} where both operands are NVFP4, else {emulated}" if way else emulated


def contract_features(
    lhs: Part, rhs: Part, rhs_axis: int, batch_dims: int, execution: Execution, precision, row_mask, dtype: jnp.dtype,
    shard_axes: int = 0,
) -> Float[Array, "..."]:  # fmt: skip
    """fprop (`rhs_axis` -2: W's K) and dgrad (-1: W's N): [*batch, *tokens, features] × W → [*batch, *tokens, out].

    Args:
      dtype: what the caller rounds the result to, which is in float32 here.
      shard_axes: behind the batch axes, those of lhs that count shards of the tokens.
    """
    product = functools.partial(
        _times_weights, weights=rhs, rhs_axis=rhs_axis, batch_dims=batch_dims, execution=execution, precision=precision
    )
    result = product(lhs.residual, dtype=dtype)
    if lhs.mean is None and lhs.low_rank is None:
        return result
    if execution.rounded and jnp.dtype(dtype).itemsize < result.dtype.itemsize:
        # The barrier keeps XLA from taking the rounding back (xla_allow_excess_precision).
        result = lax.optimization_barrier(result.astype(dtype))
    result = result.astype(_accumulator(result))
    with scopes.of_correction():
        if lhs.mean is not None:
            row = product(lhs.mean, few_rows=True)
            result = result + (row if row_mask is None else jnp.where(row_mask[..., None], row, 0.0))
        if lhs.low_rank is not None:
            row_dims = batch_dims + shard_axes
            left, right = low_rank_factors_of(lhs.low_rank, row_dims)
            result = result + _exact(left, product(right, few_rows=True), ((left.ndim - 1,), (row_dims,)), row_dims)
    return result


def contract_tokens(
    x: Part, d: Part, recipe: Recipe, shape: Shape, batch_dims: int, execution: Execution, precision, row_mask,
    sums: ColumnSums | None = None,
) -> Float[Array, "*batch K N"]:  # fmt: skip
    """wgrad: Xᵀ D over every token axis.

    Args:
      shape: X's logical shape [*batch, *tokens, K]; shards are token axes.
      sums: the quantizer's `column_sums`.
    """
    batch_dims += recipe.shard_axes
    product = functools.partial(
        _over_tokens, rank=len(shape), batch_dims=batch_dims, execution=execution, precision=precision
    )

    few = functools.partial(product, execution=dataclasses.replace(execution, fused=False))  # columns: less than a tile

    def against(columns, product=product):
        """Xᵀ times [*batch, *tokens, columns]."""
        result = product(x.residual, columns)
        if x.low_rank is None:
            return result
        with scopes.of_correction():
            _, right = low_rank_factors_of(x.low_rank, batch_dims)
            of_left = few(x.low_rank.left, columns) * _as_rows(x.low_rank.scale, batch_dims)
            return result + _exact(right, of_left, ((batch_dims,), (batch_dims,)), batch_dims)

    result = against(d.residual)
    with scopes.of_correction():
        if d.low_rank is not None:
            _, right = low_rank_factors_of(d.low_rank, batch_dims)
            left = jnp.swapaxes(_as_rows(d.low_rank.scale, batch_dims), -1, -2) * against(d.low_rank.left, few)
            result = result + _exact(left, right, ((batch_dims + 1,), (batch_dims,)), batch_dims)
        result = result + _mean_corrections(x, d, recipe, shape, batch_dims, row_mask, sums)
        return jnp.sum(result, axis=-3) if recipe.shard_axes else result


def _mean_corrections(x: Part, d: Part, recipe: Recipe, shape, batch_dims, row_mask, sums: ColumnSums | None):
    """Rows summed over the averaged tokens, one outer product for every mean."""
    tokens, batch = tuple(range(batch_dims, len(shape) - 1)), tuple(range(batch_dims))
    outer = functools.partial(
        lax.dot_general, dimension_numbers=((tokens, tokens), (batch, batch)), precision=lax.Precision.HIGHEST
    )
    x_mean, d_mean = (part.mean if part.mean is None else dequantize(part.mean) for part in (x, d))
    result = jnp.float32(0)
    if d_mean is not None:
        axes = mean_axes(recipe.wgrad.rhs.split, len(shape), batch_dims)
        result = result + outer(column_sums(x, axes, batch_dims, is_lhs=True, kernel=sums), d_mean)
    if x_mean is not None:
        axes = mean_axes(recipe.wgrad.lhs.split, len(shape), batch_dims)
        d_sums = column_sums(d, axes, batch_dims, is_lhs=False, kernel=sums)
        if d_mean is not None:
            d_sums = d_sums + row_count(shape, axes, row_mask) * d_mean
        result = result + outer(x_mean, d_sums)
    return result


def _times_weights(rows, *, weights: Part, rhs_axis, batch_dims, execution, precision, few_rows=False, dtype=None):
    """[*batch, *rows, features] × W or, for `rhs_axis` -1, Wᵀ.

    dtype: what the result may be rounded to, where it is written in that once.
    """
    if few_rows:  # less than a tile of the kernel
        execution = dataclasses.replace(execution, fused=False)
    if few_rows and not isinstance(rows, QTensor):
        # They cost little: a mean in high precision, or a factor, is multiplied in full float32 on every backend.
        precision = lax.Precision.HIGHEST
    product = functools.partial(_product, batch_dims=batch_dims, execution=execution)
    if weights.low_rank is None:
        return product(rows, weights.residual, rhs_axis, precision=precision, dtype=dtype)
    result = product(rows, weights.residual, rhs_axis, precision=precision)
    with scopes.of_correction():
        left, right = low_rank_factors_of(weights.low_rank, batch_dims)  # W = left · right
        first, second = (left, right) if rhs_axis == -2 else (right, left)
        inner = product(rows, first, rhs_axis, precision=lax.Precision.HIGHEST)
        return result + _exact(inner, second, ((inner.ndim - 1,), (batch_dims + rhs_axis + 2,)), batch_dims)


def _as_rows(scale, batch_dims: int):
    """Singular values as [*batch, rank, 1]."""
    return scale.reshape(*scale.shape[:batch_dims], -1, 1)


def _exact(lhs, rhs, contract, batch_dims: int):
    """A product with a factor of low rank, which costs little: in full float32."""
    batch = tuple(range(batch_dims))
    return lax.dot_general(lhs, rhs, (contract, (batch, batch)), precision=lax.Precision.HIGHEST)


def _over_tokens(lhs, rhs, *, rank, batch_dims, execution, precision):
    """[*batch, *tokens, i] × [*batch, *tokens, j] → [*batch, i, j]."""
    tokens = tuple(range(batch_dims - rank, -1))
    result, lhs_scale, rhs_scale = _unscaled(lhs, rhs, (tokens, tokens), (-2, -2), batch_dims, execution, precision)
    if lhs_scale is not None:
        scale = lhs_scale.reshape(*lhs_scale.shape[:batch_dims], lhs_scale.shape[-1])
        result = result * scale[..., :, None]
    if rhs_scale is not None:
        scale = rhs_scale.reshape(*rhs_scale.shape[:batch_dims], rhs_scale.shape[-1])
        result = result * scale[..., None, :]
    return result


def _product(lhs, rhs, rhs_axis, *, batch_dims, execution, precision, dtype=None):
    """[*batch, *rows, features] × [*batch, features, out], or its transpose for `rhs_axis` -1."""
    axes = (-1, rhs_axis)
    contracted = ((-1,), (rhs_axis,))
    result, lhs_scale, rhs_scale = _unscaled(lhs, rhs, contracted, axes, batch_dims, execution, precision, dtype)
    if lhs_scale is not None:
        result = result * lhs_scale
    if rhs_scale is not None:
        scale = rhs_scale.squeeze(rhs_axis)
        result = result * scale.reshape(*scale.shape[:-1], *[1] * (result.ndim - scale.ndim), scale.shape[-1])
    return result


def _unscaled(lhs, rhs, contracted, axes, batch_dims, execution: Execution, precision, dtype=None):
    """(the product without the float32 scales that are given back, the lhs' scale or None, the rhs' scale or None).

    Args:
      contracted: of each operand, the axes summed over (negative); axes: that of them which is in whole blocks.
      dtype: as in `_times_weights`; None: float32.
    """
    if isinstance(lhs, QTensor) and isinstance(rhs, QTensor):
        found = _from_codes(lhs, rhs, contracted, batch_dims, execution, dtype or jnp.dtype(jnp.float32))
        if found is not None:
            return found
    (lhs_values, lhs_scale), (rhs_values, rhs_scale) = (
        _operand(value, over, axis, execution.dtype)
        for value, over, axis in zip((lhs, rhs), contracted, axes, strict=True)
    )
    lhs_values, rhs_values = _same_size(*_same_dtype(lhs_values, rhs_values), *axes)
    lhs_values, rhs_values, contracted = _for_device(lhs_values, rhs_values, contracted)
    one_row = _is_slow_row(lhs_values, contracted, batch_dims)
    if one_row:
        lhs_values = _pad_to(lhs_values, -2, hardware.CPU_ROWS)
    over = tuple(tuple(a % v.ndim for a in c) for v, c in zip((lhs_values, rhs_values), contracted, strict=True))
    batch = tuple(range(batch_dims))
    with scopes.of_operands(lhs, rhs):
        result = lax.dot_general(
            lhs_values,
            rhs_values,
            (over, (batch, batch)),
            precision=_precision_of(lhs, lhs_scale, rhs, rhs_scale, precision),
            preferred_element_type=_accumulator(lhs_values),
        )
    if one_row:
        result = lax.slice_in_dim(result, 0, 1, axis=result.ndim - 2)
    return result, lhs_scale, rhs_scale


def _from_codes(lhs: QTensor, rhs: QTensor, contracted, batch_dims, execution: Execution, dtype):
    """`_unscaled` by what takes the operands as they are stored, or None."""
    if execution.native:
        reason = _partly_manual() or native.misfit(lhs, rhs, contracted)
        if reason is None:
            with scopes.of_operands(lhs, rhs):
                return native.product(lhs, rhs, contracted, batch_dims), lhs.tensor_scale, rhs.tensor_scale
        _report_emulation(str(lhs.format), str(rhs.format), f"not on FP4 tensor cores: {reason}")
    if execution.fused:
        reason = _partly_manual() or fused.misfit(lhs, rhs, contracted, batch_dims)
        if reason is None:
            with scopes.of_operands(lhs, rhs):
                return fused.product(lhs, rhs, contracted, batch_dims, dtype), None, None
        _report_emulation(str(lhs.format), str(rhs.format), f"not by the kernel: {reason}")
    return None


def _partly_manual() -> str | None:
    """Why a call that cuts itself over devices cannot stand here, or None: JAX gives it no mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    shared = [kind for kind, size in zip(mesh.axis_types, mesh.axis_sizes, strict=True) if size > 1]
    is_manual = [kind == AxisType.Manual for kind in shared]
    return "inside of a shard_map over some axes of the mesh only" if any(is_manual) and not all(is_manual) else None


def _for_device(lhs, rhs, contracted):
    """(lhs, rhs, contracted axes) of an equal product that XLA multiplies faster.

    XLA:CPU has a fast product for operands that are contracted along their last and first axes, and brings others into
    that form: but not two matrices whose first axes are contracted, which it multiplies in float32. These get another
    contracted axis, of size 1.
    """
    if hardware.current().is_cpu and lhs.ndim == rhs.ndim == 2 and contracted == ((-2,), (-2,)):
        return lhs[None], rhs[None], ((-3, -2), (-3, -2))
    return lhs, rhs, contracted


def _is_slow_row(lhs, contracted, batch_dims: int) -> bool:
    """Whether lhs is one row of bfloat16, as a mean is.

    XLA:CPU multiplies a vector in float32, and makes a float32 copy of the other operand for it, quantizing that once
    more. With further rows, of zeros, it reads the copy that the product of the residual reads.
    """
    return (
        hardware.current().is_cpu
        and lhs.dtype == jnp.bfloat16
        and contracted[0] == (-1,)
        and lhs.ndim >= batch_dims + 2
        and math.prod(lhs.shape[batch_dims:-1]) == 1
    )


@functools.cache
def _report_emulation(lhs: str, rhs: str, reason: str) -> None:
    """Says so once for every pair of formats."""
    _log.warning("products of %s x %s are emulated, %s", lhs, rhs, reason)


def _precision_of(lhs, lhs_scale, rhs, rhs_scale, precision):
    """The caller's precision is for operands in high precision: quantized values are exact in any.

    Those with a float32 scale folded in are neither, and are multiplied in full float32.
    """
    quantized = [(q, scale) for q, scale in ((lhs, lhs_scale), (rhs, rhs_scale)) if isinstance(q, QTensor)]
    if any(q.amax is not None and scale is None for q, scale in quantized):
        return lax.Precision.HIGHEST
    return None if len(quantized) == 2 else precision


def _accumulator(values):
    """float32, or float64 for operands that stayed in it."""
    return jnp.float64 if values.dtype == jnp.float64 else jnp.float32


def _operand(value: QTensor | Array, contracted: tuple[int, ...], axis: int, dtype):
    """Values to multiply (padding kept along `axis`), and the float32 scale to multiply the result with.

    The scale is None in high precision, for formats without one, and where it changes along the contracted axes: then
    it is in the values, which are float32.
    """
    if not isinstance(value, QTensor):
        return value, None
    scale = value.tensor_scale
    if scale is not None and any(scale.shape[a] != 1 for a in contracted):
        return value.scaled_values(padded=(axis,)), None
    return value.values(dtype, padded=(axis,)), scale


def _same_dtype(lhs, rhs):
    """Both in the wider of two dtypes: quantized values are exact in any."""
    if lhs.dtype == rhs.dtype:
        return lhs, rhs
    with jax.numpy_dtype_promotion("standard"):  # a caller may have it strict; here it is meant
        wider = jnp.promote_types(lhs.dtype, rhs.dtype)
    return lhs.astype(wider), rhs.astype(wider)


def _same_size(lhs, rhs, lhs_axis, rhs_axis):
    """Zero-pads the shorter contracted axis: a quantized operand comes in whole blocks, the other one may not."""
    sizes = lhs.shape[lhs_axis], rhs.shape[rhs_axis]
    size = sizes[0] if sizes[0] == sizes[1] else max(sizes)  # symbols (`jax.export`) may have no order
    return _pad_to(lhs, lhs_axis, size), _pad_to(rhs, rhs_axis, size)


def _pad_to(x, axis, size):
    missing = size - x.shape[axis]
    if isinstance(missing, int) and missing == 0:
        return x
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, missing if i == axis % x.ndim else 0, 0) for i in range(x.ndim)])


def best() -> Execution:
    """The execution for this device: native where it has FP4 tensor cores."""
    return Execution(hardware.emulation_dtype(), native=native.unsupported_reason() is None, rounded=_rounded())


def emulated() -> Execution:
    """The execution that every device has."""
    return Execution(hardware.emulation_dtype(), rounded=_rounded())


def _rounded() -> bool:
    return hardware.current().is_gpu


def native_or_error() -> Execution:
    """The native execution; raises NotImplementedError where there is none, naming the device."""
    reason = native.unsupported_reason()
    if reason:
        raise NotImplementedError(f"gemm='native': {reason}; gemm='emulated' gives the same values on any device")
    return best()


def fused_or_error() -> Execution:
    """The execution by `fp4jax.fused`; raises NotImplementedError where there is none, naming the device."""
    reason = fused.unsupported_reason()
    if reason:
        raise NotImplementedError(f"gemm='fused': {reason}; gemm='emulated' gives the same values on any device")
    return dataclasses.replace(emulated(), fused=True)

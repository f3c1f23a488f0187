"""`column_sums`: the sums over the rows of a quantized array, by one kernel that reads its codes."""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32

from fp4jax.numerics import NVFP4, QTensor
from pallas_kernels import compat
from pallas_kernels.column_sums import kernel
from pallas_kernels.quantize.api import unsupported_reason


def column_sums(
    q: QTensor, batch_dims: int = 0, *, device: compat.Device | None = None, interpret: bool = False
) -> Float32[Array, "..."]:
    """Sums of the represented values over all tokens of each matrix, [*batch, 1, ..., 1, features].

    Equals the sum of `q.dequantize()` up to the order of additions: blocks of 16 rows are summed exactly, then added in
    an order that the shape alone decides, and multiplied by the float32 scale last. It has no derivative.

    Args:
      q: NVFP4 in 1x16 blocks along the last axis but one; [*batch, *tokens, features] in logical shape.
      batch_dims: leading axes that count independent matrices, as when it was quantized.
      device: the device the program is compiled for; default: the first of `jax.devices()`.
      interpret: run the kernel in Pallas' GPU interpreter instead, on any device: for tests.

    Raises:
      NotImplementedError: the device or the JAX release is not served.
      ValueError: q is quantized in another way.
    """
    reason = compat.not_interpreted() if interpret else unsupported_reason(device)
    if reason:
        raise NotImplementedError(f"{reason}; sum q.dequantize() instead")
    if q.format != NVFP4 or q.axis != -2 or [axis for axis, _ in q.blocked] != [-2]:
        raise ValueError(f"column_sums takes NVFP4 in 1x16 blocks along axis -2, got {q.format}, blocked {q.blocked}")
    *lead, length, width = q.padded_shape
    groups, batch = math.prod(lead), math.prod(lead[:batch_dims])
    codes, scales = (_words(part.reshape(groups, -1, width)) for part in (q.codes, q.scales))
    codes = codes.reshape(groups, length // NVFP4.block, 2, 2, 2, -1)
    sums = jnp.stack(kernel.partial_sums(codes, scales, interpret=interpret), axis=-1)
    sums = jnp.sum(sums.reshape(batch, -1, sums.shape[2] * kernel.COLUMNS), axis=1)[:, :width]
    shape = (*lead[:batch_dims], *[1] * (len(q.shape) - batch_dims - 1), width)
    return sums.reshape(shape) * q.tensor_scale


def _words(part):
    """uint32 words of 4 neighbouring columns' bytes, at least a strip of them."""
    width = part.shape[-1]
    missing = max(width + -width % kernel.COLUMNS, kernel.STRIP * kernel.COLUMNS) - width
    part = jnp.pad(part, [(0, 0), (0, 0), (0, missing)]) if missing else part
    return lax.bitcast_convert_type(part.reshape(*part.shape[:-1], -1, kernel.COLUMNS), jnp.uint32)

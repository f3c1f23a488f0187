"""`column_sums`: the sums over the rows of a quantized array, by one kernel that reads its codes."""

from jaxtyping import Array, Float32

from fp4jax.numerics import NVFP4, QTensor
from pallas_kernels import compat
from pallas_kernels.column_sums import local, sharded
from pallas_kernels.quantize.api import unsupported_reason


def column_sums(
    q: QTensor,
    batch_dims: int = 0,
    *,
    device: compat.Device | None = None,
    partitioned: bool = False,
    interpret: bool = False,
) -> Float32[Array, "..."]:
    """Sums of the represented values over all tokens of each matrix, [*batch, 1, ..., 1, features].

    Equals the sum of `q.dequantize()` up to the order of additions: blocks of 16 rows are summed exactly, then added in
    an order that the shape alone decides, and multiplied by the float32 scale last. It has no derivative.

    Args:
      q: NVFP4 in 1x16 blocks along the last axis but one; [*batch, *tokens, features] in logical shape.
      batch_dims: leading axes that count independent matrices, as when it was quantized.
      device: the device the program is compiled for; default: the first of `jax.devices()`.
      partitioned: q may be cut over the axes of a mesh: each device adds up its shard, and what they have is added.
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
    run = sharded.column_sums if partitioned else local.column_sums
    return run(q.codes, q.scales, batch_dims=batch_dims, interpret=interpret) * q.tensor_scale

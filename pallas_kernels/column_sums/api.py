"""`column_sums`: the sums over the rows of a quantized array, by one kernel that reads its codes."""

from jaxtyping import Array, Float32

from fp4jax.numerics import QTensor
from fp4jax.numerics.column_sums import check_blocks
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

    Equals `fp4jax.numerics.column_sums(q, batch_dims)` bit for bit on one device. Where devices share the tokens of a
    matrix their sums are added by an all-reduce, in an order of its own: equal up to rounding. It has no derivative.

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
    check_blocks(q)
    run = sharded.column_sums if partitioned else local.column_sums
    return run(q.codes, q.scales, batch_dims=batch_dims, interpret=interpret) * q.tensor_scale

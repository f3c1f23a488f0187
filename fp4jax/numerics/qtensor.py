"""`QTensor`: a block-quantized array as a plain pytree."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, UInt8

from fp4jax.numerics import formats, rounding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor:
    """Codes, block scales and tensor maximum of a quantized array; value = element × block scale × tensor scale.

    Invariants (`validate` checks them):
      * `codes` holds two 4-bit codes a byte along `axis` (low nibble = even index) and is zero-padded to whole blocks.
      * `scales` has one byte for each block (sign bit clear): the size of a blocked axis divided by the block, the full
        size elsewhere. Bytes and not `float8_e4m3fn`, because `jax.checkpoint` passes what it saves through
        `lax.reduce_precision`, whose 4 + 3 bits end at 240 and would turn the scale 448 into infinity.
      * `amax` is float32 with one entry for each matrix of the batch: size 1 on every other axis.
      * axes in `blocked` are negative, so that a leading axis may be added (vmap) or sliced (scan).

    Attributes:
      codes: packed element codes.
      scales: codes of the block scales (E4M3 for NVFP4).
      amax: the tensor's largest magnitude, from which the tensor scale follows.
      format: the number format.
      axis: the axis (negative) along which codes are packed.
      blocked: (axis, logical size) of every blocked axis: one for 1x16 blocks, two for 16x16.
    """

    codes: UInt8[Array, "..."]
    scales: UInt8[Array, "..."]
    amax: Float32[Array, "..."]
    format: formats.Format = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(metadata={"static": True})
    blocked: tuple[tuple[int, int], ...] = dataclasses.field(metadata={"static": True})

    @property
    def padded_shape(self) -> tuple[int, ...]:
        """Shape in whole blocks."""
        shape = list(self.codes.shape)
        shape[self.axis] *= 2
        return tuple(shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape, without padding."""
        shape = list(self.padded_shape)
        for axis, size in self.blocked:
            shape[axis] = size
        return tuple(shape)

    @property
    def tensor_scale(self) -> Float32[Array, "..."]:
        """amax / 2688 for NVFP4.

        XLA turns a division by a constant or a broadcast scalar into an inexact multiplication by its reciprocal, even
        one behind an optimization barrier: so the divisor depends on amax, to no effect.
        """
        return self.amax / jnp.where(self.amax > 0, np.float32(self.format.range), np.float32(1))

    def values(self, dtype=jnp.float32, padded: tuple[int, ...] = ()) -> Float[Array, "..."]:
        """Element × block scale, without the tensor scale: at most 6 significant bits, exact in bfloat16.

        Args:
          dtype: float32 or bfloat16.
          padded: axes (negative) that keep their padding; the others are cut to their logical size.
        """
        elements = rounding.decode(rounding.unpack(self.codes, self.axis), self.format.element)
        scales = rounding.decode_scale(self.scales, self.format.scale)
        for axis, _ in self.blocked:
            scales = jnp.repeat(scales, self.format.block, axis=axis)
        values = (elements * scales).astype(dtype)
        for axis, size in self.blocked:
            if axis not in padded:
                values = lax.slice_in_dim(values, 0, size, axis=axis % values.ndim)
        return values

    def dequantize(self, dtype=jnp.float32) -> Float[Array, "..."]:
        """The represented values, shape `self.shape`."""
        return (self.values() * self.tensor_scale).astype(dtype)

    def validate(self) -> None:
        """Raises ValueError naming the first invariant of this class that does not hold; not under jit."""
        padded = self.padded_shape
        scales = list(padded)
        batch_dims = max((i + 1 for i, size in enumerate(self.amax.shape) if size > 1), default=0)
        per_matrix = self.amax.shape == padded[:batch_dims] + (1,) * (len(padded) - batch_dims)
        amax_ok = per_matrix and all(batch_dims <= len(padded) + axis for axis, _ in self.blocked)
        amax = f"{self.amax.dtype}{list(self.amax.shape)}"
        for axis, size in self.blocked:
            scales[axis] //= self.format.block
            if axis >= 0 or padded[axis] != -(-size // self.format.block) * self.format.block:
                raise ValueError(f"QTensor: axis {axis} of logical size {size} cannot be padded to {padded[axis]}")
        checks = (
            (self.codes.dtype == jnp.uint8, f"codes must be uint8, got {self.codes.dtype}"),
            (self.scales.dtype == jnp.uint8, f"scales must be uint8, got {self.scales.dtype}"),
            (self.scales.shape == tuple(scales), f"scales must have shape {tuple(scales)}, got {self.scales.shape}"),
            (self.amax.dtype == jnp.float32 and amax_ok, f"amax must be float32 with one entry a matrix, got {amax}"),
            (self.axis in dict(self.blocked), f"packing axis {self.axis} is not among the blocked {self.blocked}"),
        )
        for holds, message in checks:
            if not holds:
                raise ValueError(f"QTensor: {message}")
        if jnp.any(lax.bitcast_convert_type(self.scales, jnp.uint8) >> 7 == 1):
            raise ValueError("QTensor: scales must be non-negative, got a byte with its sign bit set")
        codes = rounding.unpack(self.codes, self.axis)
        for axis, size in self.blocked:
            if jnp.any(lax.slice_in_dim(codes, size, padded[axis], axis=axis % codes.ndim)):
                raise ValueError(f"QTensor: codes must be zero in the padding of axis {axis}, from index {size} on")

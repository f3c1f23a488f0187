"""`QTensor`: a block-quantized array as a plain pytree."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, UInt8, UInt32

from fp4jax.numerics import formats, rounding
from fp4jax.numerics.blocks import Shape, Size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor:
    """Codes and scales of a quantized array; value = element × block scale × float32 scale.

    Invariants (`validate` checks them):
      * `codes` holds two 4-bit codes a byte along `axis` (low nibble = even index), or one code a byte for elements
        that are wider or have no blocks, and while not `packed`; it is zero-padded to whole blocks.
      * `scales` has one byte for each block (sign bit clear): the size of a blocked axis divided by the block, the full
        size elsewhere. Bytes and not `float8_e4m3fn`, because `jax.checkpoint` passes what it saves through
        `lax.reduce_precision`, whose 4 + 3 bits end at 240 and would turn the scale 448 into infinity. None for formats
        without blocks.
      * `amax` is float32 with one entry for each extent of the float32 scale: size 1 on axes that share one (for NVFP4
        all behind the batch). None for formats without such a scale.
      * axes in `blocked` are negative, so that a leading axis may be added (vmap) or sliced (scan).

    Attributes:
      codes: element codes.
      scales: codes of the block scales (E4M3 for NVFP4).
      amax: the largest magnitude (the mean one, for some formats), from which the float32 scale follows.
      format: the number format.
      axis: the axis (negative) of the contraction to come, along which codes are packed.
      blocked: (axis, logical size) of every blocked axis: one for 1x16 blocks, two for 16x16.
      packed: False for 4-bit codes that are still one a byte, as between a quantizer and a product of one program:
        XLA then goes from x to what is multiplied without interleaving lanes. What is kept is packed.
    """

    codes: UInt8[Array, "..."]
    scales: UInt8[Array, "..."] | None
    amax: Float32[Array, "..."] | None
    format: formats.Format = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(metadata={"static": True})
    blocked: tuple[tuple[int, Size], ...] = dataclasses.field(metadata={"static": True})
    packed: bool = dataclasses.field(default=True, metadata={"static": True})

    @property
    def padded_shape(self) -> Shape:
        """Shape in whole blocks."""
        shape = list(self.codes.shape)
        if self._two_a_byte:
            shape[self.axis] *= 2
        return tuple(shape)

    @property
    def shape(self) -> Shape:
        """Logical shape, without padding."""
        shape = list(self.padded_shape)
        for axis, size in self.blocked:
            shape[axis] = size
        return tuple(shape)

    @property
    def element_codes(self) -> UInt32[Array, "..."]:
        """One code (sign above magnitude) for every element, padding included."""
        return rounding.unpack(self.codes, self.axis) if self._two_a_byte else self.codes.astype(jnp.uint32)

    @property
    def _two_a_byte(self) -> bool:
        return self.format.packs and self.packed

    def pack(self) -> "QTensor":
        """The same with two 4-bit codes a byte, as it is kept."""
        if self.packed:
            return self
        codes = rounding.pack(self.element_codes, self.axis) if self.format.packs else self.codes
        return dataclasses.replace(self, codes=codes, packed=True)

    def along(self, axis: int) -> tuple[UInt8[Array, "..."], UInt8[Array, "..."]]:
        """Codes and scales as those of 1x16 blocks along `axis`, which is blocked: two codes a byte, padded along it.

        Square blocks repeat their scale, and where they are packed along their other axis they are packed anew; of
        that axis the padding is cut off.
        """
        codes, scales = self.pack().codes, self.scales
        if self.axis != axis:
            codes = rounding.pack(self.element_codes, axis)
        for blocked, size in self.blocked:
            if blocked != axis:
                scales = jnp.repeat(scales, self.format.block, axis=blocked)
                codes, scales = (lax.slice_in_dim(a, 0, size, axis=blocked % a.ndim) for a in (codes, scales))
        return codes, scales

    @property
    def tensor_scale(self) -> Float32[Array, "..."] | None:
        """The float32 scales, shaped like `amax`: amax / 2688 for NVFP4.

        XLA turns a division by a constant or a broadcast scalar into an inexact multiplication by its reciprocal, even
        one behind an optimization barrier: so the divisor depends on amax, to no effect.
        """
        if self.amax is None:
            return None
        return self.amax / jnp.where(self.amax > 0, np.float32(self.format.range), np.float32(1))

    def values(self, dtype=jnp.float32, padded: tuple[int, ...] = ()) -> Float[Array, "..."]:
        """Element × block scale, without the float32 scale: at most 8 significant bits (NVFP4: 6), exact in bfloat16.

        Args:
          dtype: float32 or bfloat16.
          padded: axes (negative) that keep their padding; the others are cut to their logical size.
        """
        return self._cut(_exactly(self._padded_values(), dtype), padded)

    def scaled_values(self, padded: tuple[int, ...] = ()) -> Float32[Array, "..."]:
        """The represented values, with the padding of the axes in `padded`."""
        scale, values = self.tensor_scale, self._padded_values()
        if scale is None:
            return self._cut(values, padded)
        if isinstance(self.format.outer, int):
            scale = jnp.repeat(scale, self.format.outer, axis=self.axis)
        return self._cut(values * scale, padded)

    def dequantize(self, dtype=jnp.float32) -> Float[Array, "..."]:
        """The represented values, shape `self.shape`."""
        return self.scaled_values().astype(dtype)

    def _padded_values(self):
        elements = rounding.decode(self.element_codes, self.format.element)
        if self.scales is None:
            return elements
        scales = rounding.decode_scale(self.scales, self.format.scale)
        for axis, _ in self.blocked:
            scales = jnp.repeat(scales, self.format.block, axis=axis)
        return elements * scales

    def _cut(self, values, padded):
        for axis, size in self.blocked:
            if axis not in padded:
                values = lax.slice_in_dim(values, 0, size, axis=axis % values.ndim)
        return values

    def validate(self) -> None:
        """Raises ValueError naming the first invariant of this class that does not hold; not under jit.

        Looks at the bytes on the host: nothing is compiled for them.
        """
        padded, format = self.padded_shape, self.format
        for axis, size in self.blocked:
            if axis >= 0 or padded[axis] != -(-size // format.granularity) * format.granularity:
                raise ValueError(f"QTensor: axis {axis} of logical size {size} cannot be padded to {padded[axis]}")
        for holds, message in (*self._scale_checks(), *self._amax_checks()):
            if not holds:
                raise ValueError(f"QTensor: {message}")
        codes = np.asarray(self.codes)
        if self._two_a_byte:
            codes = np.stack([codes & 15, codes >> 4], axis=self.axis % codes.ndim + 1).reshape(padded)
        if np.any(codes >> (format.element.width + 1)):
            raise ValueError(f"QTensor: codes of {format.element.name} have {format.element.width + 1} bits")
        for axis, size in self.blocked:
            if np.any(np.take(codes, range(size, padded[axis]), axis)):
                raise ValueError(f"QTensor: codes must be zero in the padding of axis {axis}, from index {size} on")

    def _scale_checks(self):
        shape = list(self.padded_shape)
        for axis, _ in self.blocked:
            shape[axis] //= self.format.block
        if self.format.block is None:
            return [
                (self.codes.dtype == jnp.uint8, f"codes must be uint8, got {self.codes.dtype}"),
                (self.scales is None and not self.blocked, f"{self.format} has no blocks and no block scales"),
            ]
        dtype, got = self.scales.dtype, self.scales.shape
        signed = dtype == jnp.uint8 and self.format.scale.has_zero and bool(np.any(np.asarray(self.scales) >> 7))
        return [
            (self.codes.dtype == jnp.uint8, f"codes must be uint8, got {self.codes.dtype}"),
            (dtype == jnp.uint8, f"scales must be uint8, got {dtype}"),
            (got == tuple(shape), f"scales must have shape {tuple(shape)}, got {got}"),
            (self.axis in dict(self.blocked), f"packing axis {self.axis} is not among the blocked {self.blocked}"),
            (not signed, "scales must be non-negative, got a byte with its sign bit set"),
        ]

    def _amax_checks(self):
        outer, padded = self.format.outer, self.padded_shape
        if outer is None:
            return [(self.amax is None, f"{self.format} has no float32 scale")]
        shape = list(padded)
        if outer is formats.Extent.MATRIX:
            batch_dims = max((i + 1 for i, size in enumerate(self.amax.shape) if size > 1), default=0)
            shape[batch_dims:] = [1] * (len(padded) - batch_dims)
            fits = all(batch_dims <= len(padded) + axis for axis, _ in self.blocked)
            what = "one entry a matrix"
        else:
            shape[self.axis] = 1 if outer is formats.Extent.VECTOR else shape[self.axis] // outer
            fits, what = True, f"shape {tuple(shape)}"
        good = self.amax.dtype == jnp.float32 and self.amax.shape == tuple(shape) and fits
        return [(good, f"amax must be float32 with {what}, got {self.amax.dtype}{list(self.amax.shape)}")]


def _exactly(values: Float32[Array, "*shape"], dtype) -> Float[Array, "*shape"]:
    """float32 that `dtype` holds exactly. bfloat16 is its upper half, taken by a shift: XLA removes a conversion that
    is converted back, and would keep the values twice where one reader needs float32 and another bfloat16.
    """
    if dtype != jnp.bfloat16:
        return values.astype(dtype)
    upper = lax.bitcast_convert_type(values, jnp.uint32) >> 16
    return lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)

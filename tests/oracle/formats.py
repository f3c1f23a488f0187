"""Formats by their published numbers, and quantization to them."""

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from tests.oracle.elements import MAGNITUDES, decode, encode_nearest, encode_stochastic

F32 = np.float32
FLT_MAX = np.finfo(F32).max


@dataclass(frozen=True)
class Format:
    """value = element × block scale × float32 scale.

    block, scale    elements that share a block scale, and its type: "e4m3", "e8m0" or None
    outer           what shares a float32 scale: "matrix", "vector" (along the blocked axis), an int, or None
    peak            what a block's largest magnitude becomes in units of its scale
    scale_cap       the block scale of the block that holds amax
    mean            the float32 scale is the mean magnitude, not amax / (peak × scale_cap)
    """

    element: str
    block: int | None = None
    scale: str | None = None
    outer: str | int | None = "matrix"
    peak: float | None = None
    scale_cap: float = 1.0
    mean: bool = False

    @property
    def range(self):
        return F32(1.0 if self.mean else (self.peak or MAGNITUDES[self.element][-1]) * self.scale_cap)


NVFP4 = Format("e2m1", 16, "e4m3", scale_cap=448)
FORMATS = {
    "nvfp4": NVFP4,
    "nvfp4-256": replace(NVFP4, scale_cap=256),
    "nvfp4-eden": replace(NVFP4, scale_cap=256, peak=6 / (17 / 16 * 0.93)),
    "nvfp4/128": replace(NVFP4, outer=128),
    "nvfp4/vector": replace(NVFP4, outer="vector"),
    "mxfp4": Format("e2m1", 32, "e8m0", None),
    "mxfp8": Format("e4m3", 32, "e8m0", None),
    "e4m3": Format("e4m3"),
    "e5m2": Format("e5m2"),
    "int8": Format("int8", outer="vector"),
    "ternary": Format("ternary", mean=True),
    "sign": Format("sign", outer="vector", mean=True),
}


@dataclass
class Quantized:
    """codes (uint8) as x; scale_bytes repeated to x's shape, or None; amax float32, one entry for each extent."""

    codes: np.ndarray
    scale_bytes: np.ndarray | None
    amax: np.ndarray | None
    batch_dims: int
    format: Format = NVFP4
    axis: int = -1

    @property
    def scales(self):
        return decode_scale(self.scale_bytes, self.format.scale)

    def unscaled(self):
        """Element × block scale, without the float32 scale (exact)."""
        values = decode(self.codes, self.format.element)
        return values if self.scale_bytes is None else values * self.scales.astype(np.float64)

    def _outer_scale(self):
        if self.amax is None:
            return F32(1)
        scale = (np.asarray(self.amax, F32) / self.format.range).astype(F32)
        return _over_elements(scale, self.codes.shape, self.axis, self.format)

    def dequantize(self):
        """float32, in the specification's order."""
        with np.errstate(all="ignore"):
            return self.unscaled().astype(F32) * self._outer_scale()

    def exact(self):
        """float64 values with the same float32 scale, not rounded again."""
        return self.unscaled() * np.asarray(self._outer_scale(), np.float64)


def decode_scale(scale_bytes, scale):
    """float32 values. E8M0's lowest, a float32 denormal, is taken as zero."""
    if scale == "e4m3":
        return scale_bytes.view(ml_dtypes.float8_e4m3fn).astype(F32)
    return np.where(scale_bytes == 0, F32(0), scale_bytes.view(ml_dtypes.float8_e8m0fnu).astype(F32))


def _over_elements(outer, shape, axis, format):
    """`outer`, one entry for each extent, shaped to meet the elements."""
    if not isinstance(format.outer, int):
        return outer
    return np.take(np.repeat(outer, format.outer, axis), np.arange(shape[axis]), axis)


def _tiles(x, axis, rows, block):
    """[..., R, rows, C, block] of x zero-padded, `axis` last; `rows` along the other one of the last two axes."""
    moved = np.moveaxis(x, axis, -1)
    moved = moved if moved.ndim > 1 else moved[None]
    pad = [(0, 0)] * (moved.ndim - 2) + [(0, -moved.shape[-2] % rows), (0, -moved.shape[-1] % block)]
    moved = np.pad(moved, pad)
    return moved.reshape(*moved.shape[:-2], moved.shape[-2] // rows, rows, moved.shape[-1] // block, block)


def _untile(per_tile, x, axis, rows, block):
    """[..., R, 1, C, 1] repeated to x's shape."""
    moved = np.moveaxis(x, axis, -1)
    full = np.repeat(np.repeat(per_tile, rows, -3), block, -1)
    full = full.reshape(*full.shape[:-4], full.shape[-4] * rows, full.shape[-2] * block)
    height = moved.shape[-2] if moved.ndim > 1 else 1
    return np.moveaxis(full[..., :height, : moved.shape[-1]].reshape(moved.shape), -1, axis)


def statistic(x, axis, format, batch_dims):
    """amax (or mean magnitude), float32, one entry for each extent; reduced axes keep size 1."""
    magnitude = np.abs(x)
    if isinstance(format.outer, int):
        moved = np.moveaxis(magnitude, axis, -1)
        moved = np.pad(moved, [(0, 0)] * (moved.ndim - 1) + [(0, -moved.shape[-1] % format.outer)])
        return np.moveaxis(moved.reshape(*moved.shape[:-1], -1, format.outer).max(-1), -1, axis)
    axes = (axis,) if format.outer == "vector" else tuple(range(batch_dims, x.ndim))
    if format.mean:
        total = magnitude.astype(np.float64).sum(axis=axes, keepdims=True).astype(F32)
        return total / F32(np.prod([x.shape[a] for a in axes]))
    return magnitude.max(axis=axes, keepdims=True)


def quantize(
    x, axis=-1, *, format="nvfp4", two_d=False, batch_dims=0, draws=None, amax=None, scales="down", six_or_four=False,
    eden=None,
):  # fmt: skip
    """x in blocks along `axis` (or square over the last two axes); `draws` given means stochastic rounding.

    Ragged ends are zero-padded for the maxima; the answer has x's own shape.

    scales          of E8M0: "down" (OCP) or "up"
    six_or_four     four-over-six
    eden            the correction per 128, and how corrected scales are rounded: the draws of the scales, shaped like
                    them, or "nearest". Along `axis` x is a multiple of 128.
    """
    format = FORMATS[format]
    x = np.asarray(x).astype(F32)
    with np.errstate(all="ignore"):
        if amax is None and format.outer:
            amax = statistic(x, axis, format, batch_dims)
        encode = None
        if format.outer:
            encode = np.minimum(format.range / amax, FLT_MAX)
            encode = np.where((amax == 0) | (encode == 0), F32(1), encode).astype(F32)
            encode = _over_elements(encode, x.shape, axis, format)
        if format.block is None:
            scale_bytes, scaled = None, x * encode
        else:
            rows = format.block if two_d else 1
            peak = _untile(
                _tiles(np.abs(x), axis, rows, format.block).max((-3, -1), keepdims=True), x, axis, rows, format.block
            )
            if six_or_four:
                scale_bytes, scaled = _six_or_four(x, axis, rows, peak, encode, amax, format)
            else:
                scale_bytes, scaled = _block_scaled(x, peak, encode, format, scales)
    assert scaled.dtype == F32
    element = format.element
    codes = encode_nearest(scaled, element) if draws is None else encode_stochastic(scaled, draws, element)
    if eden is not None:
        scale_bytes = _corrected(x * encode, codes, scale_bytes, axis, format, eden)
    return Quantized(codes, scale_bytes, amax, batch_dims, format, axis)


def _block_scaled(x, peak, encode, format, scales):
    """(scale bytes, elements in units of their scales), element-wise."""
    if format.scale == "e8m0":
        scale_bytes = _power_of_two(peak, MAGNITUDES[format.element][-1], scales)
        return scale_bytes, x * np.minimum(F32(1) / decode_scale(scale_bytes, "e8m0"), FLT_MAX)
    inverse_peak = F32(1.0 / (format.peak or MAGNITUDES[format.element][-1]))
    scale = np.minimum(peak * (encode * inverse_peak), F32(format.scale_cap)).astype(ml_dtypes.float8_e4m3fn)
    return scale.view(np.uint8), _in_units(x, scale.astype(F32), encode)


def _in_units(x, scale, encode):
    return x * np.minimum(F32(1) / (scale * (F32(1) / encode)), FLT_MAX)


def _power_of_two(peak, largest, scales):
    """E8M0 bytes: 2^(floor(log2 peak) - emax), or the smallest power of two with peak <= largest × scale."""
    exponent = np.frexp(peak.astype(np.float64))[1] - 1 - int(np.floor(np.log2(largest)))
    if scales == "up":
        exponent = np.where(peak > largest * np.exp2(exponent.astype(np.float64)), exponent + 1, exponent)
    scale_bytes = np.where(peak > 0, np.clip(exponent + 127, 0, 254), 0)
    return np.where(np.isfinite(peak), scale_bytes, 255).astype(np.uint8)


def _six_or_four(x, axis, rows, peak, encode, amax, format):
    """The scale under which a block's largest magnitude is 6, or 4 where that errs less; TransformerEngine's order."""
    base = (peak / F32(6)) * encode
    best = None
    for factor in (F32(1), F32(1.5)):
        scale = np.minimum(base * factor, F32(448)).astype(ml_dtypes.float8_e4m3fn)
        scaled = _in_units(x, scale.astype(F32), encode)
        values = decode(encode_nearest(scaled)).astype(F32) * scale.astype(F32)
        difference = (values * amax) / format.range - x
        squares = _tiles(difference * difference, axis, rows, 16)
        error = np.zeros_like(squares[..., :1])
        for i in range(16):
            error = error + squares[..., i : i + 1]
        while error.shape[-3] > 1:
            half = error.shape[-3] // 2
            error = error[..., :half, :, :] + error[..., half:, :, :]
        if best is None:
            best = scale.view(np.uint8), scaled, error
        else:
            four = _untile(error < best[2], x, axis, rows, 16)
            best = np.where(four, scale.view(np.uint8), best[0]), np.where(four, scaled, best[1]), None
    return best[:2]


def _corrected(scaled, codes, scale_bytes, axis, format, eden):
    """Block scales times x·x / x·q over groups of 128, rounded to E4M3."""

    def over_group(x):
        moved = np.moveaxis(x, axis, -1)
        sums = moved.reshape(*moved.shape[:-1], -1, 128).sum(-1, keepdims=True)
        return np.moveaxis(np.repeat(sums, 128, -1).reshape(moved.shape), -1, axis)

    x, scale = scaled.astype(np.float64), decode_scale(scale_bytes, "e4m3").astype(np.float64)
    product = over_group(x * decode(codes) * scale)
    ratio = np.divide(over_group(x * x), product, out=np.ones_like(product), where=product > 0)
    corrected = np.minimum((scale * ratio), 448.0)
    if isinstance(eden, str):
        return encode_nearest(corrected, "e4m3")
    return encode_stochastic(corrected, np.repeat(eden, format.block, axis), "e4m3")

"""An independent NumPy oracle of the numerics: written from the specification's formulas, shares no code with fp4jax.

What decides a code or a scale is computed in IEEE float32 in the order the specification fixes, or exactly in
float64; the GEMMs of the linear layer are evaluated in float64 on the oracle's own quantized values. Arrays are plain
NumPy; bfloat16 comes in as ml_dtypes.bfloat16. Nothing here imports jax.

Conventions
    matrices        [*batch, *rows, columns]; a position's counters are the flat index of its batch, the flat index
                    over the row axes, and the column
    stream          the two uint32 words of a key: fold(words, slot) for the slots below
    one             the column of ones of a mean split: 1 on real rows, 0 on masked ones
"""

from dataclasses import dataclass, field

import ml_dtypes
import numpy as np

# The random stream of each operand: stream = fold(words of the key, slot).
SLOTS = {
    "fprop.x": 0,
    "fprop.w": 1,
    "dgrad.g": 2,
    "dgrad.w": 3,
    "wgrad.x": 4,
    "wgrad.g": 5,
    "mean.x": 6,
    "mean.g": 7,
}

E2M1_MAGNITUDES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E2M1_VALUES = np.concatenate([E2M1_MAGNITUDES, -E2M1_MAGNITUDES])
HADAMARD_SIGNS = np.array([1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1], np.float64)
BLOCK = 16
F32 = np.float32
FLT_MAX = np.finfo(F32).max


# ---------------------------------------------------------------- random bits


def _u32(x):
    return np.asarray(x, np.uint64) & np.uint64(0xFFFFFFFF)


def mix(x):
    x = _u32(x)
    x = x ^ (x >> np.uint64(16))
    x = _u32(x * np.uint64(0x21F0AAAD))
    x = x ^ (x >> np.uint64(15))
    x = _u32(x * np.uint64(0x735A2D97))
    return x ^ (x >> np.uint64(15))


def fold(words, data):
    """Words of the sub-stream `data` (an integer or an array of integers)."""
    k0, k1 = _u32(words[0]), _u32(words[1])
    data = _u32(data)
    return mix(k0 ^ mix(_u32(data + np.uint64(0x9E3779B9)))), mix(_u32(k1 + mix(data ^ np.uint64(0x85EBCA6B))))


def draw(words, row, column, batch):
    """16-bit draws, int64, for broadcastable counters."""
    row, column, batch = (_u32(c) for c in (row, column, batch))
    k0, k1 = fold(words, batch)
    a = mix(row ^ k0)
    b = mix(_u32(a + k1))
    h = mix(_u32(a + _u32((column >> np.uint64(1)) * np.uint64(0x9E3779B9))) ^ b)
    return np.where(column % 2 == 0, h & np.uint64(0xFFFF), h >> np.uint64(16)).astype(np.int64)


def draws_like(words, shape, batch_dims=0):
    """The draw of every element of [*batch, *rows, columns]; one axis beyond the batch is a single row."""
    batch_shape, matrix = shape[:batch_dims], shape[batch_dims:]
    batches, columns = int(np.prod(batch_shape)), matrix[-1]
    rows = int(np.prod(matrix[:-1]))
    b, r, c = np.ogrid[:batches, :rows, :columns]
    return draw(words, r, c, b).reshape(shape)


# ---------------------------------------------------------------- rounding to the element grid


def encode_nearest(v):
    """E2M1 codes, round to nearest, ties to the even code, saturating; the sign of a negative zero is kept."""
    magnitude = np.minimum(np.abs(np.asarray(v, np.float64)), 6.0)
    high = np.clip(np.searchsorted(E2M1_MAGNITUDES, magnitude, side="left"), 1, 7)
    low = high - 1
    below, above = magnitude - E2M1_MAGNITUDES[low], E2M1_MAGNITUDES[high] - magnitude
    even = np.where(low % 2 == 0, low, high)
    code = np.where(below < above, low, np.where(above < below, high, even))
    return (code + 8 * np.signbit(v)).astype(np.uint8)


def encode_stochastic(v, draws):
    """E2M1 codes by floor(position + draw / 65536), the position in the code domain rounded to 16 fraction bits."""
    magnitude = np.minimum(np.abs(np.asarray(v, np.float64)), 6.0)
    position = np.interp(magnitude, E2M1_MAGNITUDES, np.arange(8.0))
    fixed = np.rint(position * 65536).astype(np.int64)
    return (((fixed + draws) >> 16) + 8 * np.signbit(v)).astype(np.uint8)


# ---------------------------------------------------------------- NVFP4


@dataclass
class Quantized:
    """codes (uint8, 0..15) as x; scale_bytes: E4M3 bytes repeated to x's shape; amax float32 [*batch]."""

    codes: np.ndarray
    scale_bytes: np.ndarray
    amax: np.ndarray
    batch_dims: int

    @property
    def scales(self):
        return self.scale_bytes.view(ml_dtypes.float8_e4m3fn).astype(F32)

    def unscaled(self):
        """q * s_b, without the tensor scale (exact)."""
        return E2M1_VALUES[self.codes] * self.scales.astype(np.float64)

    def _tensor_scale(self):
        scale = (self.amax / F32(2688)).astype(F32)
        return scale.reshape(scale.shape + (1,) * (self.codes.ndim - self.batch_dims))

    def dequantize(self):
        """float32, in the specification's order."""
        with np.errstate(all="ignore"):
            return self.unscaled().astype(F32) * self._tensor_scale()

    def exact(self):
        """float64 values with the same float32 tensor scale, not rounded again."""
        return self.unscaled() * self._tensor_scale().astype(np.float64)


def _block_amax(magnitude, axis, rows):
    """max over blocks: 16 along `axis`, and `rows` along the other one of the last two axes; repeated to the shape."""
    moved = np.moveaxis(magnitude, axis, -1)
    length, height = moved.shape[-1], moved.shape[-2] if moved.ndim > 1 else 1
    moved = moved if moved.ndim > 1 else moved[None]
    pad = [(0, 0)] * (moved.ndim - 2) + [(0, -height % rows), (0, -length % BLOCK)]
    padded = np.pad(moved, pad)
    tiles = padded.reshape(*padded.shape[:-2], padded.shape[-2] // rows, rows, padded.shape[-1] // BLOCK, BLOCK)
    peak = np.broadcast_to(tiles.max(axis=(-3, -1), keepdims=True), tiles.shape).reshape(padded.shape)
    peak = peak[..., :height, :length].reshape(np.moveaxis(magnitude, axis, -1).shape)
    return np.moveaxis(peak, -1, axis)


def quantize(x, axis=-1, *, two_d=False, batch_dims=0, draws=None, amax=None):
    """NVFP4 of x: blocks of 16 along `axis` (or 16x16 over the last two axes); `draws` given means stochastic rounding.

    Ragged ends are zero-padded for the maxima; the answer has x's own shape.
    """
    x = np.asarray(x).astype(F32)
    one_sixth = F32(1.0) / F32(6.0)
    with np.errstate(all="ignore"):
        if amax is None:
            amax = np.abs(x).max(axis=tuple(range(batch_dims, x.ndim)))
        amax = np.asarray(amax, F32)
        encode = np.minimum(F32(2688) / amax, FLT_MAX)
        encode = np.where((amax == 0) | (encode == 0), F32(1), encode).astype(F32)
        encode = encode.reshape(encode.shape + (1,) * (x.ndim - batch_dims))
        peak = _block_amax(np.abs(x), axis, BLOCK if two_d else 1)
        scale = np.minimum(peak * (encode * one_sixth), F32(448)).astype(ml_dtypes.float8_e4m3fn)
        inverse = np.minimum(F32(1) / (scale.astype(F32) * (F32(1) / encode)), FLT_MAX)
        scaled = np.clip(x * inverse, F32(-6), F32(6))
    assert scaled.dtype == F32
    codes = encode_nearest(scaled) if draws is None else encode_stochastic(scaled, draws)
    return Quantized(codes, scale.view(np.uint8), amax, batch_dims)


def pack(codes, axis=-1):
    """Two codes a byte along `axis`: the even index in the low nibble."""
    codes = np.moveaxis(np.asarray(codes), axis, -1)
    return np.moveaxis(codes[..., 0::2] | (codes[..., 1::2] << 4), -1, axis)


# ---------------------------------------------------------------- transforms


def hadamard_matrix():
    """diag(s) @ H16 / 4, float64; H16 by Sylvester's construction."""
    h = np.ones((1, 1))
    while h.shape[0] < BLOCK:
        h = np.block([[h, h], [h, -h]])
    return HADAMARD_SIGNS[:, None] * h / 4


def hadamard(x, axis=-1):
    """The 16-wide transform along `axis` (a multiple of 16), exact in float64, rounded once to bfloat16."""
    return _transform(np.asarray(x).astype(np.float64), axis).astype(ml_dtypes.bfloat16)


def _transform(x, axis):
    moved = np.moveaxis(x, axis, -1)
    blocks = moved.reshape(*moved.shape[:-1], -1, BLOCK)
    return np.moveaxis((blocks @ hadamard_matrix()).reshape(moved.shape), -1, axis)


def column_mean(x, one, batch_dims=0):
    """float32 [*batch, columns]: mean of the real rows, summed in float64."""
    rows = tuple(range(batch_dims, x.ndim - 1))
    total = np.where(one > 0, np.asarray(x).astype(np.float64), 0).sum(axis=rows)
    return (total / np.maximum(one.sum(axis=rows), 1)).astype(F32)


# ---------------------------------------------------------------- the linear layer


@dataclass(frozen=True)
class Plan:
    """What a recipe asks for: the slots that are rounded stochastically, and the switches of the split."""

    stochastic: frozenset = field(default_factory=frozenset)
    split: bool = False
    quantized_center: bool = False
    quantize_mean: bool = True
    two_d_weights: bool = False
    wgrad_hadamard: bool = False


def plan(recipe):
    """The Plan of "name+variant+variant"."""
    name, *variants = recipe.split("+")
    split = name.startswith("averis")
    centered = "centered" in name
    stochastic = {"dgrad.g", "wgrad.g"} | ({"mean.g"} if split and not centered else set())
    for variant in variants:
        if variant == "nearest":
            stochastic = set()
        elif variant == "sr_all":
            stochastic = set(SLOTS)  # every FP4 operand, the means too
        elif variant != "mean_bf16":
            raise ValueError(variant)
    return Plan(
        stochastic=frozenset(stochastic),
        split=split,
        quantized_center=centered,
        quantize_mean="mean_bf16" not in variants,
        two_d_weights=name == "nvfp4_hadamard",
        wgrad_hadamard=name.endswith("hadamard"),
    )


@dataclass
class Layer:
    """The outputs of `averis_layer` in float64, and every quantized operand by slot."""

    y: np.ndarray
    dx: np.ndarray
    dw: np.ndarray
    operands: dict


class _Layer:
    def __init__(self, plan_, words, batch_dims, hadamard_fn):
        self.plan, self.words, self.batch_dims, self.hadamard_fn = plan_, words, batch_dims, hadamard_fn
        self.operands = {}

    def quantize(self, x, slot, axis, two_d=False, counted=None):
        """`counted`: the shape whose positions are counted where x is that shape padded at its ends with zeros."""
        draws = None
        if slot in self.plan.stochastic:
            draws = draws_like(fold(self.words, SLOTS[slot]), counted or x.shape, self.batch_dims)
            draws = np.pad(draws, [(0, size - n) for size, n in zip(x.shape, draws.shape, strict=True)])
        q = quantize(x, axis, two_d=two_d, batch_dims=self.batch_dims, draws=draws)
        self.operands[slot] = q
        return q.exact()

    def split(self, x, one, slot, mean):
        """(float32 residual with masked rows zero, float64 mean that multiplies, [*batch, columns])."""
        x = np.asarray(x).astype(F32)
        if not self.plan.split:
            return np.where(one > 0, x, F32(0)), None
        mean = column_mean(x, one, self.batch_dims) if mean is None else np.asarray(mean, F32)
        value = mean.astype(np.float64)
        center = mean
        if self.plan.quantize_mean:
            value = self.quantize(mean, slot, -1)
            if self.plan.quantized_center:
                center = self.operands[slot].dequantize()
        shape = mean.shape[:-1] + (1,) * (x.ndim - mean.ndim) + mean.shape[-1:]
        return np.where(one > 0, x - center.reshape(shape), F32(0)), value

    def token_copy(self, residual, one, slot):
        """(Copy in blocks along the last token axis, each sequence padded by itself; the column of ones), flattened."""
        counted = residual.shape
        pad = [(0, 0)] * residual.ndim
        pad[-2] = (0, -residual.shape[-2] % BLOCK)
        residual, one = np.pad(residual, pad), np.pad(one, pad)
        if self.plan.wgrad_hadamard:  # padded rows are no longer zero: they are rows like the others, and counted
            residual, one = self.hadamard_fn(residual, axis=-2), _transform(one, -2)
            counted = residual.shape
        value = self.quantize(residual, slot, -2, counted=counted)
        return self.flat(value), self.flat(one)

    def flat(self, x):
        return x.reshape(*x.shape[: self.batch_dims], -1, x.shape[-1])


def averis_layer(
    x, w, g, recipe, *, words=(0, 0), batch_dims=0, row_mask=None, mean_x=None, mean_g=None, hadamard_fn=hadamard
):
    """The three GEMMs of a quantized linear layer, in float64 on the oracle's quantized values.

    x [*batch, *tokens, K]; w [*batch, K, N]; g [*batch, *tokens, N]; row_mask bool [*batch, *tokens], True = real.
    mean_x [*batch, K] and mean_g [*batch, N]: float32 means computed elsewhere (float32 sums depend on their order);
    hadamard_fn likewise replaces the oracle's transform. Masked rows enter nothing, and y and dx are zero there.
    """
    p = plan(recipe)
    layer = _Layer(p, words, batch_dims, hadamard_fn)
    one = np.ones(x.shape[:-1]) if row_mask is None else np.asarray(row_mask).astype(np.float64)
    one = one[..., None]
    x_residual, mu_x = layer.split(x, one, "mean.x", mean_x)
    g_residual, mu_g = layer.split(g, one, "mean.g", mean_g)
    w_fprop = layer.quantize(w, "fprop.w", -2, p.two_d_weights)
    w_dgrad = layer.quantize(w, "dgrad.w", -1, p.two_d_weights)

    ones = layer.flat(one)
    y = layer.flat(layer.quantize(x_residual, "fprop.x", -1)) @ w_fprop
    dx = layer.flat(layer.quantize(g_residual, "dgrad.g", -1)) @ np.swapaxes(w_dgrad, -1, -2)
    xr, xr_one = layer.token_copy(x_residual, one, "wgrad.x")
    gr, gr_one = layer.token_copy(g_residual, one, "wgrad.g")
    dw = np.swapaxes(xr, -1, -2) @ gr
    if p.split:
        mu_x, mu_g = mu_x[..., None, :], mu_g[..., None, :]
        y = y + ones * (mu_x @ w_fprop)
        dx = dx + ones * (mu_g @ np.swapaxes(w_dgrad, -1, -2))
        x_sums, g_sums = np.swapaxes(xr, -1, -2) @ xr_one, np.swapaxes(gr_one, -1, -2) @ gr
        length = ones.sum(axis=(-2, -1), keepdims=True)
        dw = dw + x_sums @ mu_g + np.swapaxes(mu_x, -1, -2) @ g_sums
        dw = dw + length * np.swapaxes(mu_x, -1, -2) @ mu_g
    return Layer(y.reshape(g.shape), dx.reshape(x.shape), dw, layer.operands)

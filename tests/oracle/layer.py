"""The linear layer under a recipe: three GEMMs in float64 on the oracle's own quantized values."""

from dataclasses import dataclass

import numpy as np

from tests.oracle.draws import SCALES, draws_like, fold, signs
from tests.oracle.formats import quantize
from tests.oracle.plan import LOW_RANK, plan
from tests.oracle.transforms import column_mean, hadamard, rotate

# The random stream of each quantization: stream = fold(words of the key, slot).
SLOTS = {
    "fprop.x": 0, "fprop.w": 1, "dgrad.g": 2, "dgrad.w": 3, "wgrad.x": 4, "wgrad.g": 5, "mean.x": 6, "mean.g": 7,
    "signs.x": 8, "signs.w": 9, "left.x": 10, "right.x": 11, "left.w": 12, "right.w": 13, "left.g": 14, "right.g": 15,
}  # fmt: skip
F32 = np.float32


@dataclass
class Layer:
    """The outputs of `linear_layer` in float64, every quantized operand by slot, and residuals before quantization."""

    y: np.ndarray
    dx: np.ndarray
    dw: np.ndarray
    operands: dict
    residuals: dict


def _pad(x, axis, multiple):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return np.pad(x, widths)


class _Layer:
    def __init__(self, rules, words, batch_dims, hadamard_fn, factors_fn):
        self.rules, self.words, self.batch_dims = rules, words, batch_dims
        self.hadamard_fn, self.factors_fn = hadamard_fn, factors_fn
        self.operands, self.residuals = {}, {}

    def stream(self, slot):
        return fold(self.words, SLOTS[slot])

    def signs(self, rule, which, rank, axis):
        """The signs of a rule's transform along `axis` of an array of `rank` axes; None: the fixed ones."""
        if not rule.fresh:
            return None
        shape = [1] * rank
        shape[axis] = rule.hadamard
        return signs(self.stream(f"signs.{which}"), rule.hadamard).reshape(shape)

    def quantize(self, x, rule, slot, axis, which=None):
        """float64 values that multiply; `which` operand the signs of the transform are those of."""
        if rule.hadamard:
            sign = self.signs(rule, which, x.ndim, axis)
            x = np.asarray(self.hadamard_fn(_pad(x, axis, rule.hadamard), axis, rule.hadamard, sign)).astype(F32)
        self.residuals[slot] = x
        if rule.format is None:
            return x.astype(np.float64)
        stream, eden = self.stream(slot), rule.eden
        if eden == "stochastic":
            shape = list(x.shape)
            shape[axis] //= 16
            eden = draws_like(fold(stream, SCALES), tuple(shape), self.batch_dims)
        draws = draws_like(stream, x.shape, self.batch_dims) if rule.stochastic else None
        q = self.operands[slot] = quantize(
            x, axis, format=rule.format, two_d=rule.square, batch_dims=self.batch_dims, draws=draws,
            scales=rule.scales, six_or_four=rule.six_or_four, eden=eden,
        )  # fmt: skip
        return q.exact()

    def split(self, x, one, rule, name):
        """(float32 residual with masked rows zero, float64 part that was split off, under the mask)."""
        x = np.where(one > 0, np.asarray(x).astype(F32), F32(0))
        if rule.split is None:
            return x, 0.0
        if rule.split.endswith("low rank"):
            return self.split_low_rank(x, rule, name)
        axes = (x.ndim - 2,) if rule.per_sequence else tuple(range(self.batch_dims, x.ndim - 1))
        mean = column_mean(x, one, axes=axes)
        value = self.quantize(mean, rule.part, f"mean.{name}", -1)
        center = self.operands[f"mean.{name}"].dequantize() if rule.split == "centered" else mean
        return np.where(one > 0, x - center, F32(0)), one * value

    def split_low_rank(self, x, rule, name):
        rows = np.prod(x.shape[self.batch_dims : -1])
        rank = max(1, round(LOW_RANK * min(rows, x.shape[-1])))
        left, right = (np.asarray(t) for t in self.factors_fn(x, rank, self.batch_dims))
        taken = self.product(left.astype(np.float64), right.astype(np.float64))
        over = tuple(range(self.batch_dims, x.ndim - 1))
        norm = np.sqrt(np.square(left.astype(np.float64)).sum(axis=over, keepdims=True)).astype(F32)
        left = left / np.where(norm > 0, norm, F32(1))
        left = self.quantize(left, rule.part, f"left.{name}", -2) * norm
        right = self.quantize(right, rule.part, f"right.{name}", -1)
        product = self.product(left, right)
        return (x - (product if rule.split.startswith("centered") else taken)).astype(F32), product

    def product(self, rows, matrix):
        """[*batch, *rows, i] × [*batch, i, j]."""
        flat = rows.reshape(*rows.shape[: self.batch_dims], -1, rows.shape[-1])
        return (flat @ matrix).reshape(*rows.shape[:-1], matrix.shape[-1])

    def backward_rows(self, rule, residual, forward):
        """What the copy for the backward is made from."""
        return self.operands[forward].dequantize() if rule.copy else residual

    def token_copy(self, x, one, slot, forward=None):
        """Values in blocks along the last token axis, and under the slot's transform, each sequence padded by itself.

        With what was split off back in them: it holds rows 1 c, which the transform turns into (H 1) c.
        """
        rule = self.rules[slot]
        residual, off = self.split(x, one, rule, slot[-1])
        if rule.copy and rule.format is None:
            return self.operands[forward].exact()
        value = self.quantize(self.backward_rows(rule, residual, forward), rule, slot, -2, "x")
        if rule.split:
            off = _pad(off, -2, rule.hadamard or 1)
            value = value + (rotate(off, -2, rule.hadamard) if rule.hadamard else off)
        return value


def linear_layer(
    x, w, g, recipe, *, words=(0, 0), batch_dims=0, row_mask=None, hadamard_fn=hadamard, factors_fn=None
):  # fmt: skip
    """The three GEMMs of a quantized linear layer, in float64 on the oracle's quantized values.

    x [*batch, *tokens, K]; w [*batch, K, N]; g [*batch, *tokens, N]; row_mask bool [*batch, *tokens], True = real.
    Where the order of float32 sums decides codes, the sums may come from elsewhere: hadamard_fn(x, axis, size, signs)
    replaces the oracle's transform, factors_fn(x, rank, batch_dims) gives (left, right) of a low-rank split. Masked
    rows enter nothing, and y and dx are zero there.
    """
    rules = plan(recipe)
    layer = _Layer(rules, words, batch_dims, hadamard_fn, factors_fn)
    one = np.ones(x.shape[:-1]) if row_mask is None else np.asarray(row_mask).astype(np.float64)
    one, every = one[..., None], np.ones((*w.shape[:-1], 1))

    residual, off = layer.split(x, one, rules["fprop.x"], "x")
    x_forward = off + layer.quantize(residual, rules["fprop.x"], "fprop.x", -1)
    residual, off = layer.split(w, every, rules["fprop.w"], "w")
    w_forward = off + layer.quantize(residual, rules["fprop.w"], "fprop.w", -2)
    y = layer.product(x_forward, w_forward)

    rule = rules["dgrad.w"]
    residual, off = layer.split(w, every, rule, "w")
    if rule.copy and rule.format is None:
        w_backward = layer.operands["fprop.w"].exact()
    else:
        rows = layer.backward_rows(rule, residual, "fprop.w")
        w_backward = off + layer.quantize(rows, rule, "dgrad.w", -1, "w")
    residual, off = layer.split(g, one, rules["dgrad.g"], "g")
    g_rows = off + layer.quantize(residual, rules["dgrad.g"], "dgrad.g", -1, "w")
    dx = layer.product(g_rows, np.swapaxes(w_backward, -1, -2))

    columns = []
    for operand, slot, forward in ((x, "wgrad.x", "fprop.x"), (g, "wgrad.g", None)):
        value = layer.token_copy(operand, one, slot, forward)
        columns.append(value.reshape(*value.shape[:batch_dims], -1, value.shape[-1]))
    dw = np.swapaxes(columns[0], -1, -2) @ columns[1]
    return Layer(y, dx, dw, layer.operands, layer.residuals)

"""What instructions compute: functions of arrays with an entry a lane, as the PTX manual defines them.

A result that is NaN is the canonical one, 0x7FFFFFFF.
"""

import operator
from collections.abc import Callable

import ml_dtypes
import numpy as np

NAN = np.uint32(0x7FFFFFFF)
_UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
Function = Callable[..., np.ndarray]


def integer(width: int, signed: bool = False) -> np.dtype:
    """Of registers, a predicate has the width 1."""
    return np.dtype(f"int{width}") if signed else np.dtype(_UNSIGNED[width])


def floats(function: Callable) -> Function:
    """Of bits of float32, which `function` takes as such."""

    def apply(*operands):
        with np.errstate(all="ignore"):
            result = function(*(each.view(np.float32) for each in operands)).astype(np.float32)
        return np.where(np.isnan(result), NAN, result.view(np.uint32))

    return apply


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c, rounded once: in float64 to odd, which float32 rounds as it would the exact sum."""
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    bits = total.view(np.int64)
    inexact = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    away = (error > 0) == (total > 0)
    return np.where(inexact, bits + np.where(away, 1, -1), bits).view(np.float64)


def least(a: np.ndarray, b: np.ndarray, sign: int = 1) -> np.ndarray:
    """min.NaN.f32, and with the sign -1 max.NaN.f32: of NaN and of the sign of zeros as IEEE 754's `minimum`."""
    x, y = (sign * each.view(np.float32) for each in (a, b))
    either = (a | b) if sign > 0 else (a & b)  # zeros differ in their signs only
    chosen = np.where(x < y, a, np.where(y < x, b, either))
    return np.where(np.isnan(x) | np.isnan(y), NAN, chosen)


def permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt.b32: four bytes of eight, those of a first."""
    pair = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros(a.shape, np.uint32)
    for i in range(4):
        nibble = selector >> np.uint32(4 * i) & np.uint32(15)
        byte = (pair >> (np.uint64(8) * (nibble & np.uint32(7)).astype(np.uint64)) & np.uint64(255)).astype(np.uint32)
        sign = np.where(byte & 128 != 0, np.uint32(255), np.uint32(0))
        result |= np.where(nibble & 8 != 0, sign, byte) << np.uint32(8 * i)
    return result


def halves(function: Callable) -> Function:
    """Of two float16 in 32 bits each."""

    def apply(*operands):
        with np.errstate(all="ignore"):
            result = function(*(np.ascontiguousarray(each).view(np.float16) for each in operands))
        result = np.where(np.isnan(result), np.uint16(0x7FFF), result.view(np.uint16))
        return np.ascontiguousarray(result).view(np.uint32)

    return apply


def pairs(function: Function) -> Function:
    """f32x2: two float32 in 64 bits each."""

    def apply(*operands):
        parts = [np.ascontiguousarray(each).view(np.uint32) for each in operands]
        return np.ascontiguousarray(function(*parts)).view(np.uint64)

    return apply


def shift(function: Callable, width: int) -> Function:
    """By 32 bits of distance; from the width on nothing is left."""

    def apply(value, distance):
        within = np.minimum(distance, width - 1).astype(value.dtype)
        return np.where(distance < width, function(value, within), value.dtype.type(0))

    return apply


def funnel(low: np.ndarray, high: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """shf.l.wrap.b32: the upper word of the pair, shifted left."""
    pair = high.astype(np.uint64) << np.uint64(32) | low.astype(np.uint64)
    return (pair << (distance & np.uint32(31)).astype(np.uint64) >> np.uint64(32)).astype(np.uint32)


def ordered(choose: Callable, dtype: np.dtype) -> Function:
    """min or max of integers."""
    return lambda a, b: choose(a.view(dtype), b.view(dtype)).view(a.dtype)


def field(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bfe.u32, bfe.u64: so many bits, less than all, from a position within the register on."""
    ones = (np.uint64(1) << length.astype(np.uint64)) - np.uint64(1)
    return (a.astype(np.uint64) >> position.astype(np.uint64) & ones).astype(a.dtype)


def wide(signed: bool) -> Function:
    """mul.wide: 64 bits of the product of two 32."""

    def apply(a, b):
        a, b = (each.view(integer(32, signed)).astype(integer(64, signed)) for each in (a, b))
        return (a * b).view(np.uint64)

    return apply


def e4m3_pair(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """cvt.rn.satfinite.e4m3x2.f32."""
    codes = []
    for bits in (upper, lower):
        value = bits.view(np.float32)
        clipped = np.clip(value, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        codes.append(np.where(np.isnan(value), np.uint8(0x7F), clipped.view(np.uint8)).astype(np.uint16))
    return codes[0] << np.uint16(8) | codes[1]


def halves_of_e4m3(pair: np.ndarray) -> np.ndarray:
    """cvt.rn.f16x2.e4m3x2."""
    parts = np.stack([pair & np.uint16(255), pair >> np.uint16(8)], axis=-1).astype(np.uint8)
    values = parts.view(ml_dtypes.float8_e4m3fn).astype(np.float16)
    bits = np.where(np.isnan(values), np.uint16(0x7FFF), values.view(np.uint16))
    return np.ascontiguousarray(bits).view(np.uint32)[..., 0]


def bfloat16_pair(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """cvt.rn.bf16x2.f32."""
    bits = []
    for each in (upper, lower):
        value = each.view(np.float32)
        code = value.astype(ml_dtypes.bfloat16).view(np.uint16)
        bits.append(np.where(np.isnan(value), np.uint16(0x7FFF), code).astype(np.uint32))
    return bits[0] << np.uint32(16) | bits[1]


def _compared(name: str) -> Callable:
    return {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt,
            "ge": operator.ge}[name]  # fmt: skip


def comparison(relation: str, kind: str) -> Function:
    """setp of two values of a type: "b32", "s32", "u64", "f32"."""
    compare, width = _compared(relation), int(kind[1:])
    if kind == "f32":
        return lambda a, b: compare(a.view(np.float32), b.view(np.float32))
    return lambda a, b: compare(a.view(integer(width, kind[0] == "s")), b.view(integer(width, kind[0] == "s")))


def conversion(to: str, source: str) -> Function | None:
    """cvt between integers: bits are cut off, or added by the source's sign; None for other types."""
    if not {to[0], source[0]} <= set("su"):
        return None
    narrow, wide_ = integer(int(source[1:]), source[0] == "s"), integer(int(to[1:]))
    return lambda x: x.view(narrow).astype(np.int64 if source[0] == "s" else np.uint64).astype(wide_)


# Opcode → (function, widths of the operands, width of the result).
TABLE: dict[str, tuple[Function, tuple[int, ...], int]] = {
    "cvta.to.global.u64": (lambda a: a, (64,), 64),
    "prmt.b32": (permute, (32, 32, 32), 32),
    "bfe.u32": (field, (32, 32, 32), 32),
    "bfe.u64": (field, (64, 32, 32), 64),
    "shf.l.wrap.b32": (funnel, (32, 32, 32), 32),
    "min.NaN.f32": (least, (32, 32), 32),
    "max.NaN.f32": (lambda a, b: least(a, b, -1), (32, 32), 32),
    "abs.f32": (lambda a: a & np.uint32(0x7FFFFFFF), (32,), 32),
    "neg.f32": (lambda a: a ^ np.uint32(0x80000000), (32,), 32),
    "fma.rn.f32": (floats(fma), (32, 32, 32), 32),
    "mul.f16x2": (halves(operator.mul), (32, 32), 32),
    "mul.wide.s32": (wide(signed=True), (32, 32), 64),
    "mul.wide.u32": (wide(signed=False), (32, 32), 64),
    "cvt.rn.f32.s32": (lambda a: a.view(np.int32).astype(np.float32).view(np.uint32), (32,), 32),
    "cvt.rn.f32.u32": (lambda a: a.astype(np.float32).view(np.uint32), (32,), 32),
    "cvt.f32.f16": (lambda a: a.view(np.float16).astype(np.float32).view(np.uint32), (16,), 32),
    "cvt.f32.bf16": (lambda a: a.astype(np.uint32) << np.uint32(16), (16,), 32),
    "cvt.rn.satfinite.e4m3x2.f32": (e4m3_pair, (32, 32), 16),
    "cvt.rn.f16x2.e4m3x2": (halves_of_e4m3, (16,), 32),
    "cvt.rn.bf16x2.f32": (bfloat16_pair, (32, 32), 32),
}
for _width in (1, 16, 32, 64):
    _kind = "pred" if _width == 1 else f"b{_width}"
    for _name, _function in (("and", operator.and_), ("or", operator.or_), ("xor", operator.xor)):
        TABLE[f"{_name}.{_kind}"] = (_function, (_width, _width), _width)
    TABLE[f"not.{_kind}"] = (np.invert, (_width,), _width)
for _width in (16, 32, 64):
    TABLE[f"shl.b{_width}"] = (shift(operator.lshift, _width), (_width, 32), _width)
    TABLE[f"shr.u{_width}"] = (shift(operator.rshift, _width), (_width, 32), _width)
    for _sign in "su":
        TABLE[f"add.{_sign}{_width}"] = (operator.add, (_width, _width), _width)
        TABLE[f"sub.{_sign}{_width}"] = (operator.sub, (_width, _width), _width)
        TABLE[f"mul.lo.{_sign}{_width}"] = (operator.mul, (_width, _width), _width)
        for _name, _choice in (("min", np.minimum), ("max", np.maximum)):
            TABLE[f"{_name}.{_sign}{_width}"] = (ordered(_choice, integer(_width, _sign == "s")), (_width,) * 2, _width)
        TABLE[f"mad.lo.{_sign}{_width}"] = (lambda a, b, c: a * b + c, (_width,) * 3, _width)
for _rounding in ("", ".rn"):
    for _name, _function in (("add", operator.add), ("sub", operator.sub), ("mul", operator.mul)):
        TABLE[f"{_name}{_rounding}.f32"] = (floats(_function), (32, 32), 32)
for _name, _floats in (("add", operator.add), ("sub", operator.sub), ("mul", operator.mul)):
    for _rounding in ("", ".rn"):
        TABLE[f"{_name}{_rounding}.f32x2"] = (pairs(floats(_floats)), (64, 64), 64)
TABLE["fma.rn.f32x2"] = (pairs(floats(fma)), (64, 64, 64), 64)

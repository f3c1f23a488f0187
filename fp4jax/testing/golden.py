"""Golden vectors of NVFP4, and its two-level scaling on data of many magnitudes."""

import dataclasses

import ml_dtypes
import numpy as np

from fp4jax.numerics import NVFP4
from fp4jax.testing.subject import BLOCK, MAGNITUDES, NotApplicable, Output, Subject, Violation, decoded_scales, observe

VALUES = np.concatenate([MAGNITUDES, -MAGNITUDES]).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Vector:
    """An input with its packed codes (of the first rows), scale bytes and amax; values follow from them."""

    name: str
    x: np.ndarray
    codes: np.ndarray
    scales: np.ndarray
    amax: float

    @property
    def elements(self) -> np.ndarray:
        return np.stack([self.codes & 15, self.codes >> 4], axis=-1).reshape(len(self.codes), -1)

    @property
    def values(self) -> np.ndarray:
        scales = decoded_scales(self.scales[: len(self.codes)]).repeat(BLOCK, axis=-1)
        return VALUES[self.elements] * scales * np.float32(self.amax / NVFP4.range)


def _vector(name, x, codes, scales, amax):
    return Vector(name, x.astype(np.float32), np.array(codes, np.uint8), np.array(scales, np.uint8), amax)


RAMP = _vector(
    "ramp",
    np.arange(32)[None] / 4 - 4,
    [[255, 239, 238, 222, 221, 204, 171, 154, 16, 34, 67, 84, 101, 102, 118, 119]],
    [[126, 125]],
    4.0,
)
TWO_ROWS = _vector(
    "two rows",
    (np.arange(64) * 37 % 29 - 14).reshape(2, 32) / 8,
    [
        [223, 98, 190, 116, 13, 245, 60, 230, 90, 215, 97, 191, 115, 158, 245, 45],
        [230, 75, 215, 80, 207, 99, 174, 117, 29, 246, 59, 231, 89, 223, 98, 190],
    ],
    [[126, 126], [126, 126]],
    1.75,
)
SQUARE = _vector(
    "16x16",
    (np.arange(512) * 7919 % 1009 - 504).reshape(16, 32) / 64,
    [[111, 20, 219, 126, 53, 200, 254, 86, 162, 237, 103, 4, 219, 111, 37, 201]],  # the first row's
    [[126, 126]],
    7.875,
)


def golden_values(subject: Subject) -> str:
    for vector in (RAMP, TWO_ROWS):
        _check_values(subject(vector.x), vector)
    return "2 vectors"


def golden_codes(subject: Subject) -> str:
    for vector in (RAMP, TWO_ROWS):
        _check_codes(_with_codes(subject(vector.x)), vector)
    return "2 vectors, bit for bit"


def golden_scales(subject: Subject) -> str:
    for vector in (RAMP, TWO_ROWS):
        _check_scales(_with_codes(subject(vector.x)), vector)
    return "2 vectors, bit for bit"


def golden_square(subject: Subject) -> str:
    if subject.square is None:
        raise NotApplicable("no square_fn was given")
    out = observe(subject.square(SQUARE.x), SQUARE.x.shape)
    _check_values(out, SQUARE)
    if out.codes is None:
        return "values only"
    _check_codes(out, SQUARE)
    _check_scales(out, SQUARE)
    return "values, codes, scales and amax"


def amax_is_the_maximum(subject: Subject) -> str:
    for seed, x in enumerate(_matrices()):
        amax = _with_codes(subject(x)).amax
        if amax != np.abs(x).max():
            raise Violation(f"amax {amax} where the largest magnitude is {np.abs(x).max()} (matrix {seed})")
    return f"{len(_matrices())} matrices, bit for bit"


def block_scales(subject: Subject) -> str:
    """s_b = E4M3(min(max|x_b| * (2688 / amax * float32(1/6)), 448)), in float32 in this order."""
    for x in _matrices():
        scales = _with_codes(subject(x)).scales
        peaks = np.abs(x).reshape(len(x), -1, BLOCK).max(axis=-1)
        factor = np.float32(NVFP4.range) / np.abs(x).max() * NVFP4.inverse_element_max
        expected = np.minimum(peaks * factor, np.float32(NVFP4.scale.max)).astype(ml_dtypes.float8_e4m3fn)
        wrong = np.argwhere(scales != expected.view(np.uint8))
        if len(wrong):
            at = tuple(wrong[0].tolist())
            seen, wanted = decoded_scales(scales)[at], float(expected[at])
            raise Violation(f"{len(wrong)} of {scales.size} scales differ: block {at} has {seen}, expected {wanted}")
    return f"{len(_matrices())} matrices, bit for bit"


def values_follow_from_codes(subject: Subject) -> str:
    for x in _matrices():
        out = _with_codes(subject(x))
        columns = x.shape[-1]
        elements = VALUES[out.codes[..., :columns]] * decoded_scales(out.scales).repeat(BLOCK, -1)[..., :columns]
        expected = elements * np.float32(out.amax / NVFP4.range)
        off = np.abs(out.values - expected) > out.epsilon * np.abs(expected)
        if off.any():
            at = tuple(np.argwhere(off)[0].tolist())
            raise Violation(f"dequantized {out.values[at]} at {at}, code x scale x amax / 2688 is {expected[at]}")
    return f"element x block scale x amax / 2688, {len(_matrices())} matrices"


def _matrices() -> list[np.ndarray]:
    """Normal numbers at three magnitudes, their blocks spread over eight octaves."""
    rng = np.random.default_rng(2)
    spread = np.exp2(-8 * rng.random((16, 8))).repeat(BLOCK, axis=1)
    x = rng.standard_normal((16, 8 * BLOCK)) * spread
    return [(x * scale).astype(np.float32) for scale in (1, 1e-6, 1e6)]


def _with_codes(out: Output) -> Output:
    if out.codes is None:
        raise NotApplicable("only values were returned: no codes, scales and amax")
    return out


def _check_values(out, vector):
    got = out.values[: len(vector.codes)]
    off = ~(np.abs(got - vector.values) <= out.epsilon * np.abs(vector.values))
    if off.any():
        at = tuple(np.argwhere(off)[0].tolist())
        raise Violation(f"{vector.name}: {vector.x[at]} came out as {got[at]}, expected {vector.values[at]}")


def _check_codes(out, vector):
    wrong = np.argwhere(out.codes[: len(vector.codes)] != vector.elements)
    if len(wrong):
        at = tuple(wrong[0].tolist())
        raise Violation(f"{vector.name}: code {out.codes[at]} for {vector.x[at]}, expected {vector.elements[at]}")


def _check_scales(out, vector):
    if out.scales.tolist() != vector.scales.tolist():
        raise Violation(f"{vector.name}: scale bytes {out.scales.tolist()}, expected {vector.scales.tolist()}")
    if out.amax != vector.amax:
        raise Violation(f"{vector.name}: amax {out.amax}, expected {vector.amax}")


LAWS = (
    ("golden vectors: values", golden_values),
    ("golden vectors: codes", golden_codes),
    ("golden vectors: scales and amax", golden_scales),
    ("golden vector of 16x16 blocks", golden_square),
    ("amax is the largest magnitude", amax_is_the_maximum),
    ("block scales", block_scales),
    ("values follow from codes", values_follow_from_codes),
)

"""Laws of rounding to nearest: the grid, its ties, and what scaling the input may and may not do."""

import jax.numpy as jnp
import numpy as np

from fp4jax.testing import subject as grid
from fp4jax.testing.subject import BLOCK, GRID, MAGNITUDES, Subject, Violation

_SWEEP = np.linspace(-6, 6, 4801, dtype=np.float32)
EXPONENTS = range(-30, 31)


def all_values(subject: Subject) -> str:
    out = grid.from_grid(subject(grid.on_grid(_SWEEP)).values, _SWEEP.size)
    return _all_reached(out, f"a sweep of {_SWEEP.size:,} points over [-6, 6]")


def _all_reached(out, what) -> str:
    snapped = grid.snap(out)
    missing = sorted(set(GRID.tolist()) - set(snapped[~np.isnan(snapped)].tolist()))
    if missing:
        raise Violation(f"never seen: {', '.join(f'{value:g}' for value in missing)} ({what})")
    if np.isnan(snapped).any():
        raise Violation(f"{out[np.isnan(snapped)][0]:g} came out, which is no E2M1 value ({what})")
    return what


def nearest_ties_to_even(subject: Subject) -> str:
    ties = (MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2
    even = np.where(np.arange(7) % 2 == 0, MAGNITUDES[:-1], MAGNITUDES[1:])
    step = np.float32(2.0**-20)
    points = np.concatenate([ties, ties * (1 - step), ties * (1 + step), MAGNITUDES]).astype(np.float32)
    expected = np.concatenate([even, MAGNITUDES[:-1], MAGNITUDES[1:], MAGNITUDES])
    points, expected = np.concatenate([points, -points]), np.concatenate([expected, -expected])
    out = grid.from_grid(subject(grid.on_grid(points)).values, points.size)
    wrong = ~(grid.snap(out) == expected)
    if wrong.any():
        first = [f"{points[i]:.7g} → {out[i]:g} not {expected[i]:g}" for i in np.flatnonzero(wrong)[:6]]
        raise Violation(f"{wrong.sum()} of {points.size} points: {', '.join(first)}")
    return f"{points.size} points at and beside every tie"


def saturates(subject: Subject) -> str:
    x = grid.on_grid(np.zeros(64, np.float32))
    x.reshape(-1, BLOCK)[3] = 6.24  # 6.24 / 6 rounds to the scale 1
    out = subject(x).values.reshape(-1, BLOCK)[3]
    if not np.all(grid.snap(out) == 6):
        raise Violation(f"a block of 6.24, whose scale is 1, came out as {out[0]:g}, expected 6")
    return "a block of 6.24, whose scale rounds down to 1, gives 6"


def idempotence(subject: Subject) -> str:
    x = spread_data()
    once = subject(x)
    twice = subject(once.values)
    off = ~(np.abs(twice.values - once.values) <= once.epsilon * np.abs(once.values))
    if off.any():
        at = tuple(np.argwhere(off)[0].tolist())
        raise Violation(f"{off.sum()} of {off.size} values move: {once.values[at]} became {twice.values[at]}")
    if once.codes is None:
        return "values"
    for name in ("codes", "scales"):
        moved = getattr(once, name) != getattr(twice, name)
        if moved.any():
            raise Violation(f"{moved.sum()} of {moved.size} {name} move")
    return "values, codes and scales"


def scale_equivariance(subject: Subject) -> str:
    x = spread_data()
    base = subject(x)
    broken = {}
    for k in sorted(EXPONENTS, key=abs):
        factor = np.float32(2.0**k)
        out = subject(x * factor)
        parts = {"values": out.values != base.values * factor}
        if base.codes is not None:
            parts |= {"codes": out.codes != base.codes, "block scales": out.scales != base.scales}
        changed = [f"{wrong.sum()} of {wrong.size} {name} differ" for name, wrong in parts.items() if wrong.any()]
        if changed:
            broken[k] = changed[0] if out.values.any() else "all zeros"
    if broken:
        zeros = [k for k, what in broken.items() if what == "all zeros"]
        first = next(iter(broken))
        more = f"; all zeros from 2^{max(zeros)} down" if zeros else ""
        raise Violation(f"broken at {len(broken)} of {len(EXPONENTS)} exponents: 2^{first}: {broken[first]}{more}")
    return f"quantize(2^k x) = 2^k quantize(x), k = {EXPONENTS[0]} to {EXPONENTS[-1]}, exactly"


def negation(subject: Subject) -> str:
    x = spread_data()
    difference = subject(-x).values != -subject(x).values
    if difference.any():
        raise Violation(f"quantize(-x) is not -quantize(x) for {difference.sum()} of {x.size} values")
    return "quantize(-x) = -quantize(x)"


def bfloat16_input(subject: Subject) -> str:
    x = jnp.asarray(spread_data(), jnp.bfloat16)
    narrow, wide = subject(x), subject(x.astype(jnp.float32))
    off = ~(np.abs(narrow.values - wide.values) <= max(narrow.epsilon, wide.epsilon) * np.abs(wide.values))
    if off.any():
        at = tuple(np.argwhere(off)[0].tolist())
        raise Violation(
            f"{off.sum()} of {off.size} values differ: {float(x[at]):g} gives {narrow.values[at]:g} in bfloat16, "
            f"{wide.values[at]:g} in float32"
        )
    return "as its float32 copy"


def spread_data() -> np.ndarray:
    """Normal numbers whose blocks spread over eight octaves: every block scale of NVFP4 is a normal number."""
    rng = np.random.default_rng(1)
    spread = np.exp2(-8 * rng.random((16, 8))).repeat(BLOCK, axis=1)
    x = rng.standard_normal((16, 8 * BLOCK)) * spread
    x[:, ::BLOCK] = np.copysign(2 * spread[:, ::BLOCK], x[:, ::BLOCK])  # no block is small by chance
    return x.astype(np.float32)


LAWS = (
    ("all 15 values, nearest", all_values),
    ("nearest value, ties to even", nearest_ties_to_even),
    ("saturates at 6", saturates),
    ("idempotence", idempotence),
    ("scale equivariance", scale_equivariance),
    ("negation", negation),
    ("bfloat16 input", bfloat16_input),
)

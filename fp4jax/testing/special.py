"""Laws of zeros, of blocks that underflow, and of what is not finite; they hold for both roundings."""

from collections.abc import Iterator

import numpy as np

from fp4jax.numerics import NVFP4
from fp4jax.testing.nearest import spread_data
from fp4jax.testing.subject import BLOCK, Output, Subject, Violation

# Half the smallest block scale, as a share of amax: below it the scale is zero.
_EDGE = NVFP4.scale.ulp_of_subnormals / 2 / NVFP4.scale.max


def _both(subject: Subject, x) -> Iterator[tuple[str, Output]]:
    yield "nearest", subject(x)
    if subject.stochastic is not None:
        yield "stochastic", subject.draw(x, 5)


def zero(subject: Subject) -> str:
    x = np.zeros((16, 8 * BLOCK), np.float32)
    beside = x.copy()
    beside[0] = 1.0
    for what, array in (("zeros", x), ("a zero block beside others", beside)):
        for how, out in _both(subject, array):
            if out.values[1:].any() or (array is x and out.values.any()):
                raise Violation(f"{what} ({how}) came out as {out.values[np.nonzero(out.values[1:])][:1]}")
            if out.scales is not None and out.scales[1:].any():
                raise Violation(f"{what} ({how}) has the scale byte {out.scales[1:].max()}, expected 0")
    return "a zero tensor, and zero blocks beside others"


def underflow(subject: Subject) -> str:
    x = np.zeros((4, 8 * BLOCK), np.float32)
    x[0, 0] = 1.0
    x[1], x[2] = 0.99 * _EDGE, 1.01 * _EDGE
    for how, out in _both(subject, x):
        if out.values[1].any():
            raise Violation(f"{x[1, 0]:.3g} beside an amax of 1 ({how}) came out as {out.values[1, 0]:.3g}, expected 0")
        if not out.values[2].all() or not np.all(np.abs(out.values[2]) <= 2 * x[2]):
            raise Violation(f"{x[2, 0]:.3g} beside an amax of 1 ({how}) came out as {out.values[2, 0]:.3g}")
    return f"below {_EDGE:.3g} amax a block is zero, above it is not"


def infinity(subject: Subject) -> str:
    return _not_hidden(subject, (np.inf, -np.inf))


def nan(subject: Subject) -> str:
    return _not_hidden(subject, (np.nan,))


def _not_hidden(subject, bad) -> str:
    positions = ((0, 0), (7, 20), (15, 8 * BLOCK - 1))
    for value in bad:
        for at in positions:
            x = spread_data()
            x[at] = value
            for how, out in _both(subject, x):
                if np.isfinite(out.values[at]):
                    raise Violation(f"{value} at {at} ({how}) came out as {out.values[at]:g}")
    return f"{len(positions)} positions: what comes out there is not finite"


LAWS = (
    ("zero", zero),
    ("underflow", underflow),
    ("infinity is not hidden", infinity),
    ("NaN is not hidden", nan),
)

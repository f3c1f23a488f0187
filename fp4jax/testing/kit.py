"""`conformance`: every law on one quantizer."""

from collections.abc import Callable

from fp4jax.testing import golden, nearest, programs, special, stochastic
from fp4jax.testing.subject import DRAWS, NotApplicable, Subject, Violation
from fp4jax.testing.table import Row, Table

LAWS = (*golden.LAWS, *nearest.LAWS, *special.LAWS, *stochastic.LAWS, *programs.LAWS)


def conformance(
    quantize_fn: Callable,
    stochastic_fn: Callable | None = None,
    *,
    square_fn: Callable | None = None,
    draws: int = DRAWS,
    name: str | None = None,
) -> Table:
    """Holds a quantizer, ours or another package's, to the laws of NVFP4 with two-level scaling.

    A quantizer takes a matrix, float32 or bfloat16 [rows, columns] with columns a multiple of 128, in blocks of 16
    along the last axis. It returns either
      * an array of the same shape: the dequantized values. Laws about codes, scales and amax then do not apply; or
      * an object with `codes` (uint8, two a byte along the last axis, the even index in the low nibble), `scales`
        (E4M3 bytes, one a block), `amax` and `dequantize()`, like `fp4jax.QTensor`: every law applies. A pytree, if
        jit is to return it.
    Under `jax.jit` it is several times faster to check; the law "jit = eager" unwraps it.
    A quantizer that raises breaks the law that was being checked; the others go on.

    Args:
      quantize_fn: `f(x)`, to nearest.
      stochastic_fn: `f(x, key)` with a typed JAX key, stochastic rounding; without it, its laws do not apply.
      square_fn: `f(x)` with 16x16 blocks, for its golden vector.
      draws: of stochastic rounding, at each of the 98 points where the mean is checked: the error that is allowed there
        falls as 1/sqrt(draws) and is 0.024 of an interval at the default.
      name: the table's title; default: the callable's name.

    Returns:
      A `Table`: `print` it, or ask for `table.passed`, `table.failures` and `table["zero"]`.
    """
    subject = Subject(quantize_fn, stochastic_fn, square_fn, draws)
    rows = tuple(check_law(law, check, subject) for law, check in LAWS)
    return Table(name or getattr(quantize_fn, "__name__", type(quantize_fn).__name__), rows)


def check_law(law: str, check: Callable, subject: Subject) -> Row:
    """The row of one law."""
    try:
        return Row(law, True, check(subject))
    except Violation as violation:
        return Row(law, False, str(violation))
    except NotApplicable as reason:
        return Row(law, None, str(reason))
    except Exception as error:  # whatever it is, it is what the quantizer does on a valid input: the row says so
        first_line = (str(error).splitlines() or [""])[0]
        return Row(law, False, f"raised {type(error).__name__}: {first_line[:120]}")

"""`conformance`: every law on one quantizer."""

from collections.abc import Callable

from fp4jax.testing import golden, nearest, programs, special, stochastic
from fp4jax.testing.subject import NotApplicable, Subject, Violation
from fp4jax.testing.table import Row, Table

LAWS = (*golden.LAWS, *nearest.LAWS, *special.LAWS, *stochastic.LAWS, *programs.LAWS)


def conformance(
    quantize_fn: Callable,
    stochastic_fn: Callable | None = None,
    *,
    square_fn: Callable | None = None,
    name: str | None = None,
) -> Table:
    """Holds a quantizer, ours or another package's, to the laws of NVFP4 with two-level scaling.

    A quantizer takes a matrix, float32 or bfloat16 [rows, columns] with columns a multiple of 128, in blocks of 16
    along the last axis. It returns either
      * an array of the same shape: the dequantized values. Laws about codes, scales and amax then do not apply; or
      * an object with `codes` (uint8, two a byte along the last axis, the even index in the low nibble), `scales`
        (E4M3 bytes, one a block), `amax` and `dequantize()`, like `fp4jax.QTensor`: every law applies. A pytree, if
        jit is to return it.
    A quantizer that raises breaks the law that was being checked; the others go on.

    Args:
      quantize_fn: `f(x)`, to nearest.
      stochastic_fn: `f(x, key)` with a typed JAX key, stochastic rounding; without it, its laws do not apply.
      square_fn: `f(x)` with 16x16 blocks, for its golden vector.
      name: the table's title; default: the callable's name.

    Returns:
      A `Table`: `print` it, or ask for `table.passed`, `table.failures` and `table["zero"]`.
    """
    subject = Subject(quantize_fn, stochastic_fn, square_fn)
    rows = tuple(_check(law, check, subject) for law, check in LAWS)
    return Table(name or getattr(quantize_fn, "__name__", type(quantize_fn).__name__), rows)


def _check(law: str, check: Callable, subject: Subject) -> Row:
    try:
        return Row(law, True, check(subject))
    except Violation as violation:
        return Row(law, False, str(violation))
    except NotApplicable as reason:
        return Row(law, None, str(reason))
    except Exception as error:  # whatever it is, it is what the quantizer does on a valid input: the row says so
        first_line = (str(error).splitlines() or [""])[0]
        return Row(law, False, f"raised {type(error).__name__}: {first_line[:120]}")

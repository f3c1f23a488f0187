"""The kernels that are measured: each with its twin, what both are given, and the bytes that have to move.

A new kernel is a new row of OPERATIONS.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from fp4jax.numerics import NVFP4, column_stats, key_words, quantize_blocks
from pallas_kernels import column_stats as column_stats_kernel
from pallas_kernels import quantize

Matrix = Float[Array, "tokens features"]


@dataclass(frozen=True)
class Operation:
    """kernel, twin: (x, *given) → outputs, to be equal bit for bit; given: of x, made before anything is timed.

    written: bytes that the kernel writes for each element it reads.
    """

    kernel: Callable[..., PyTree]
    twin: Callable[..., PyTree]
    given: Callable[[Matrix], tuple]
    written: float


def _words() -> Array:
    return key_words(jax.random.key(1))


def _amax(x: Matrix) -> tuple[Array]:
    """In training the statistics pass gives it."""
    return (jnp.max(jnp.abs(x.astype(jnp.float32)), keepdims=True),)


def _nothing(x: Matrix) -> tuple:
    del x
    return ()


def _quantized(q) -> tuple:
    return q.codes, q.scales


def _rows(x: Matrix, amax: Array, *, stochastic: bool) -> tuple:
    return _quantized(quantize.quantize_rows(x, amax=amax, words=_words() if stochastic else None))


def _rows_twin(x: Matrix, amax: Array, *, stochastic: bool) -> tuple:
    words = _words() if stochastic else None
    return _quantized(quantize_blocks(x, NVFP4, axes=(-1,), pack_axis=-1, words=words, amax=amax))


_PACKED = 0.5 + 1 / NVFP4.block


def _quantize_rows(stochastic: bool) -> Operation:
    kernel, twin = (functools.partial(f, stochastic=stochastic) for f in (_rows, _rows_twin))
    return Operation(kernel, twin, _amax, _PACKED)


OPERATIONS = {
    "column_stats": Operation(column_stats_kernel.column_stats, column_stats, _nothing, 0.0),
    "quantize_rows": _quantize_rows(stochastic=False),
    "quantize_rows stochastic": _quantize_rows(stochastic=True),
}

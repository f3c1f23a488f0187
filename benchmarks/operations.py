"""The kernels that are measured: each with its twin, what both are given, and the bytes that have to move.

A new kernel is a new row of OPERATIONS, another way to quantize one of _QUANTIZATIONS.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from fp4jax.numerics import NVFP4, column_stats, hadamard, key_words, quantize_blocks
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


def _nothing(x: Matrix) -> tuple:
    del x
    return ()


@dataclass(frozen=True)
class _Quantization:
    """One way to quantize, along rows or columns. The tensor maximum is given, as in training by the statistics."""

    columns: bool = False
    centered: bool = False
    hadamard: bool = False
    stochastic: bool = False

    @property
    def name(self) -> str:
        words = [word for word in ("centered", "hadamard", "stochastic") if getattr(self, word)]
        return " ".join(["quantize_columns" if self.columns else "quantize_rows", *words])

    @property
    def _words(self) -> Array | None:
        return key_words(jax.random.key(1)) if self.stochastic else None

    def given(self, x: Matrix) -> tuple[Array | None, Array]:
        """(center, largest magnitude of what is quantized)."""
        center = column_stats(x).mean(x.shape[0]) if self.centered else None
        return center, jnp.max(jnp.abs(self._prepared(x, center)), keepdims=True)

    def kernel(self, x: Matrix, center: Array | None, amax: Array) -> tuple[Array, Array]:
        arguments = {"amax": amax, "words": self._words, "center": center}
        if self.columns:
            q = quantize.quantize_columns(x, hadamard=self.hadamard, **arguments)
        else:
            q = quantize.quantize_rows(x, **arguments)
        return q.codes, q.scales

    def twin(self, x: Matrix, center: Array | None, amax: Array) -> tuple[Array, Array]:
        axis = -2 if self.columns else -1
        x = self._prepared(x, center)
        q = quantize_blocks(x, NVFP4, axes=(axis,), pack_axis=axis, words=self._words, amax=amax)
        return q.codes, q.scales

    def _prepared(self, x: Matrix, center: Array | None) -> Matrix:
        x = x.astype(jnp.float32) if center is None else x.astype(jnp.float32) - center
        return hadamard(x, -2) if self.hadamard else x


_QUANTIZATIONS = (
    _Quantization(),
    _Quantization(stochastic=True),
    _Quantization(centered=True),
    _Quantization(columns=True),
    _Quantization(columns=True, stochastic=True),
    _Quantization(columns=True, centered=True),
    _Quantization(columns=True, hadamard=True),
)

OPERATIONS = {"column_stats": Operation(column_stats_kernel.column_stats, column_stats, _nothing, written=0.0)} | {
    each.name: Operation(each.kernel, each.twin, each.given, written=0.5 + 1 / NVFP4.block) for each in _QUANTIZATIONS
}

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


_ROWS, _COLUMNS, _SQUARE = (-1,), (-2,), (-2, -1)
_FUNCTIONS = {_ROWS: "quantize_rows", _COLUMNS: "quantize_columns", _SQUARE: "quantize_2d"}


@dataclass(frozen=True)
class _Quantization:
    """One way to quantize. The tensor maximum is given, as in training by the statistics.

    axes: of the blocks: rows, columns or, in blocks of 16x16, both.
    """

    axes: tuple[int, ...] = _ROWS
    centered: bool = False
    hadamard: bool = False
    stochastic: bool = False

    @property
    def name(self) -> str:
        words = [word for word in ("centered", "hadamard", "stochastic") if getattr(self, word)]
        return " ".join([_FUNCTIONS[self.axes], *words])

    @property
    def written(self) -> float:
        """Bytes for each element: its code, and its share of the byte of a scale."""
        return 0.5 + 1 / NVFP4.block ** len(self.axes)

    @property
    def words(self) -> Array | None:
        return key_words(jax.random.key(1)) if self.stochastic else None

    def given(self, x: Matrix) -> tuple[Array | None, Array]:
        """(center, largest magnitude of what is quantized)."""
        center = column_stats(x).mean(x.shape[0]) if self.centered else None
        return center, jnp.max(jnp.abs(self._prepared(x, center)), keepdims=True)

    def kernel(self, x: Matrix, center: Array | None, amax: Array) -> tuple[Array, Array]:
        arguments = {"amax": amax, "words": self.words}
        if self.axes != _SQUARE:
            arguments["center"] = center
        if self.axes == _COLUMNS:
            arguments["hadamard"] = self.hadamard
        q = getattr(quantize, _FUNCTIONS[self.axes])(x, **arguments)
        return q.codes, q.scales

    def twin(self, x: Matrix, center: Array | None, amax: Array) -> tuple[Array, Array]:
        x = self._prepared(x, center)
        q = quantize_blocks(x, NVFP4, axes=self.axes, pack_axis=self.axes[0], words=self.words, amax=amax)
        return q.codes, q.scales

    def _prepared(self, x: Matrix, center: Array | None) -> Matrix:
        x = x.astype(jnp.float32) if center is None else x.astype(jnp.float32) - center
        return hadamard(x, -2) if self.hadamard else x


_QUANTIZATIONS = (
    _Quantization(),
    _Quantization(stochastic=True),
    _Quantization(centered=True),
    _Quantization(_COLUMNS),
    _Quantization(_COLUMNS, stochastic=True),
    _Quantization(_COLUMNS, centered=True),
    _Quantization(_COLUMNS, hadamard=True),
    _Quantization(_SQUARE),
    _Quantization(_SQUARE, stochastic=True),
)


def _copies(along: _Quantization, down: _Quantization) -> Operation:
    """Both copies by one kernel, against both twins."""

    def kernel(x: Matrix, center: Array | None, amax: Array) -> list[Array]:
        arguments = {"amax": (amax, amax), "words": (along.words, down.words), "center": center}
        return [part for q in quantize.quantize_copies(x, **arguments) for part in (q.codes, q.scales)]

    def twins(*inputs) -> tuple[Array, ...]:
        return (*along.twin(*inputs), *down.twin(*inputs))

    return Operation(kernel, twins, along.given, written=along.written + down.written)


_COPIES = {
    "quantize_copies": _copies(_Quantization(), _Quantization(_COLUMNS)),
    "quantize_copies centered": _copies(_Quantization(centered=True), _Quantization(_COLUMNS, centered=True)),
    "quantize_copies stochastic": _copies(_Quantization(stochastic=True), _Quantization(_COLUMNS, stochastic=True)),
}

OPERATIONS = {"column_stats": Operation(column_stats_kernel.column_stats, column_stats, _nothing, written=0.0)} | {
    each.name: Operation(each.kernel, each.twin, each.given, written=each.written) for each in _QUANTIZATIONS
}
OPERATIONS |= _COPIES

"""The kernels that are measured: each with its twin, what both are given, and the bytes that have to move.

A new kernel is a new row of OPERATIONS, another way to quantize one of _QUANTIZATIONS.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from fp4jax.numerics import NVFP4, QTensor, column_stats, hadamard, key_words, quantize_blocks
from pallas_kernels import column_stats as column_stats_kernel
from pallas_kernels import column_sums as column_sums_kernel
from pallas_kernels import quantize
from pallas_kernels.quantize.shapes import EXPERT_SHAPES, SHAPES, WEIGHT_SHAPES, Shape

Matrix = Float[Array, "*batch tokens features"]
ACTIVATIONS = (*SHAPES, *EXPERT_SHAPES)
SUMS_TOLERANCE = 1e-5  # of the largest sum of random values; one code of 65,536 that is wrong is more


@dataclasses.dataclass(frozen=True)
class Operation:
    """A kernel and what it is measured by.

    Attributes:
      kernel, twin: (x, *given) → outputs, to be equal bit for bit.
      given: of x, made before anything is timed.
      written: bytes that the kernel writes for each element of x.
      read: likewise those that it reads; None: x itself.
      tolerance: how far a float output may be from the twin's, as a share of its largest magnitude, where the order of
        additions is another one. Codes and scales have none.
      shapes: those on which it is timed.
      was_measured: on hardware, some time. What was not comes last: it may break the device for what follows.
    """

    kernel: Callable[..., PyTree]
    twin: Callable[..., PyTree]
    given: Callable[[Matrix], tuple]
    written: float
    read: float | None = None
    tolerance: float = 0.0
    shapes: tuple[Shape, ...] = ACTIVATIONS
    was_measured: bool = False


def batch_dims(x: Matrix) -> int:
    """Axes of experts: each has statistics of its own."""
    return x.ndim - 2


def _nothing(x: Matrix) -> tuple:
    del x
    return ()


_ROWS, _COLUMNS, _SQUARE = (-1,), (-2,), (-2, -1)
_FUNCTIONS = {_ROWS: "quantize_rows", _COLUMNS: "quantize_columns", _SQUARE: "quantize_2d"}


@functools.cache
def _statistics(centered: bool, transformed: bool) -> Callable[[Matrix], tuple]:
    """x → (center, largest magnitude of what is quantized). One function for all that are given the same."""

    def given(x: Matrix) -> tuple[Array | None, Array]:
        center = column_stats(x, batch_dims(x)).mean(x.shape[-2]) if centered else None
        return center, jnp.max(jnp.abs(_prepared(x, center, transformed)), axis=(-2, -1), keepdims=True)

    return given


def _prepared(x: Matrix, center: Array | None, transformed: bool) -> Matrix:
    x = x.astype(jnp.float32) if center is None else x.astype(jnp.float32) - center
    return hadamard(x, -2) if transformed else x


@dataclasses.dataclass(frozen=True)
class _Quantization:
    """One way to quantize. The tensor maximum is given, as in training by the statistics.

    axes: of the blocks: rows, columns or, in blocks of 16x16, both.
    """

    axes: tuple[int, ...] = _ROWS
    centered: bool = False
    hadamard: bool = False
    stochastic: bool = False
    was_measured: bool = False

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

    @property
    def given(self) -> Callable[[Matrix], tuple]:
        return _statistics(self.centered, self.hadamard)

    def kernel(self, x: Matrix, center: Array | None, amax: Array) -> tuple[Array, Array]:
        arguments = {"amax": amax, "words": self.words, "batch_dims": batch_dims(x)}
        if self.axes != _SQUARE:
            arguments["center"] = center
        if self.axes == _COLUMNS:
            arguments["hadamard"] = self.hadamard
        q = getattr(quantize, _FUNCTIONS[self.axes])(x, **arguments)
        return q.codes, q.scales

    def quantized(self, x: Matrix, center: Array | None, amax: Array) -> QTensor:
        """By the twin."""
        x = _prepared(x, center, self.hadamard)
        given = {"batch_dims": batch_dims(x), "words": self.words, "amax": amax}
        return quantize_blocks(x, NVFP4, axes=self.axes, pack_axis=self.axes[0], **given)

    def twin(self, x: Matrix, center: Array | None, amax: Array) -> tuple[Array, Array]:
        q = self.quantized(x, center, amax)
        return q.codes, q.scales

    @property
    def operation(self) -> Operation:
        shapes = WEIGHT_SHAPES if self.axes == _SQUARE else ACTIVATIONS
        written, known = self.written, self.was_measured
        return Operation(self.kernel, self.twin, self.given, written, shapes=shapes, was_measured=known)


# Averis quantizes x centered, to nearest, and every gradient centered and stochastically, each along both axes.
_QUANTIZATIONS = (
    _Quantization(was_measured=True),
    _Quantization(stochastic=True, was_measured=True),
    _Quantization(centered=True, was_measured=True),
    _Quantization(centered=True, stochastic=True),
    _Quantization(_COLUMNS, was_measured=True),
    _Quantization(_COLUMNS, stochastic=True, was_measured=True),
    _Quantization(_COLUMNS, centered=True, was_measured=True),
    _Quantization(_COLUMNS, centered=True, stochastic=True),
    _Quantization(_COLUMNS, hadamard=True, was_measured=True),
    _Quantization(_SQUARE),
    _Quantization(_SQUARE, stochastic=True),
)


def _sums(q: QTensor) -> Array:
    """1ᵀQ of every matrix, by XLA."""
    return jnp.sum(q.dequantize(), axis=-2, keepdims=True)


def _copies(sums: bool = False, **how: bool) -> tuple[str, Operation]:
    """Both copies by one kernel, against both twins; with the column sums that the weight gradient needs of one."""
    along, down = _Quantization(**how), _Quantization(_COLUMNS, **how)

    def kernel(x: Matrix, center: Array | None, amax: Array) -> list[Array]:
        arguments = {"amax": (amax, amax), "words": (along.words, down.words), "center": center}
        rows, columns, *total = quantize.quantize_copies(x, **arguments, sums=sums, batch_dims=batch_dims(x))
        return [rows.codes, rows.scales, columns.codes, columns.scales, *total]

    def twins(x: Matrix, center: Array | None, amax: Array) -> list[Array]:
        rows, columns = (way.quantized(x, center, amax) for way in (along, down))
        return [rows.codes, rows.scales, columns.codes, columns.scales, *([_sums(columns)] if sums else [])]

    name = " ".join(["quantize_copies", *how, *(["sums"] if sums else [])])
    written = along.written + down.written
    return name, Operation(kernel, twins, along.given, written, tolerance=SUMS_TOLERANCE)


def _column_sums() -> Operation:
    """The sums of a residual's stored copy, which `backend="pallas"` takes from its codes."""
    way = _Quantization(_COLUMNS, centered=True, stochastic=True)

    def given(x: Matrix) -> tuple[QTensor]:
        return (way.quantized(x, *way.given(x)),)

    def kernel(x: Matrix, q: QTensor) -> Array:
        return column_sums_kernel.column_sums(q, batch_dims(x))

    return Operation(
        kernel, lambda x, q: _sums(q), given, written=0.0, read=way.written, tolerance=SUMS_TOLERANCE
    )  # fmt: skip


def _column_stats(x: Matrix) -> PyTree:
    return column_stats_kernel.column_stats(x, batch_dims(x))


def _column_stats_twin(x: Matrix) -> PyTree:
    return column_stats(x, batch_dims(x))


OPERATIONS: dict[str, Operation] = dict(
    [
        ("column_stats", Operation(_column_stats, _column_stats_twin, _nothing, written=0.0, was_measured=True)),
        *((each.name, each.operation) for each in _QUANTIZATIONS),
        ("column_sums", _column_sums()),
        _copies(),
        _copies(stochastic=True),
        _copies(centered=True, sums=True),
        _copies(centered=True, stochastic=True, sums=True),
    ]
)

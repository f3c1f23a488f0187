"""`quantize_rows`, `quantize_columns`, `quantize_2d`: what `fp4jax.numerics.quantize_blocks` gives, by one kernel."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt32

from fp4jax.numerics import NVFP4, Format, QTensor
from pallas_kernels import compat, launch
from pallas_kernels.quantize import elements, local, sharded

_CAPABILITY = (9, 0)
_DTYPES = (jnp.bfloat16, jnp.float32)


def unsupported_reason(device: compat.Device | None = None) -> str | None:
    """Why the kernel cannot serve `device` (default: the first of `jax.devices()`), or None where it can."""
    device = device or jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    major, _, minor = capability.partition(".")
    needed = f"Pallas Mosaic GPU needs an NVIDIA GPU of compute capability {_CAPABILITY[0]}.{_CAPABILITY[1]} or higher"
    if device.platform not in ("gpu", "cuda") or not (major.isdecimal() and minor.isdecimal()):
        return f"{needed}, the device is {device.device_kind} ({device.platform})"
    if (int(major), int(minor)) < _CAPABILITY:
        return f"{needed}, the device is {device.device_kind} with {capability}"
    return None


def quantize_rows(
    x: Float[Array, "*shape"],
    format: Format = NVFP4,
    *,
    amax: Float32[Array, "..."] | None = None,
    words: UInt32[Array, "2"] | None = None,
    center: Float32[Array, "..."] | None = None,
    batch_dims: int = 0,
    device: compat.Device | None = None,
    partitioned: bool = False,
    interpret: bool = False,
) -> QTensor:
    """Quantizes an array to NVFP4 in blocks of 16 along its last axis.

    Equals `quantize_blocks(x - center, format, axes=(-1,), pack_axis=-1, batch_dims=batch_dims, words=words,
    amax=amax)` bit for bit where x is finite and no block's largest magnitude lies in (0, 2e-37). Where the twin is not
    finite (infinities, NaN in x) neither is the result, but its codes may differ. It has no derivative.

    Args:
      x: bfloat16 or float32, at least one axis. Blocks are padded with zeros if 16 does not divide the last axis.
      format: NVFP4.
      amax: largest magnitude of each matrix (of x - center) where it is known, float32 with size 1 on every axis behind
        `batch_dims`; XLA computes it otherwise.
      words: the two words of a random stream (`fp4jax.numerics.key_words`): stochastic rounding exactly when given.
      center: a row to subtract from every row of its matrix, float32, shaped like x with size 1 on the axes between
        `batch_dims` and the last: the mean split's residual without a pass over memory.
      batch_dims: leading axes that count independent matrices, each with its own tensor scale.
      device: the device the program is compiled for; default: the first of `jax.devices()`.
      partitioned: x may be cut over the axes of a mesh: each device quantizes its shard, to the bits of the whole. It
        has no rule under `jax.vmap`. Without it XLA gathers what a kernel reads.
      interpret: run the kernel in Pallas' GPU interpreter instead, on any device: for tests.

    Raises:
      NotImplementedError: the device, the JAX release, the format or the size is not served: the reason and the
        alternative.
      ValueError: x is of another dtype or empty, or `batch_dims`, `amax` or `center` does not fit it.
    """
    _check(x, format, amax, batch_dims, device, interpret)
    expected = (*x.shape[:batch_dims], *[1] * (x.ndim - batch_dims - 1), x.shape[-1])
    if center is not None and center.shape != expected:
        raise ValueError(f"center must be of shape {expected}, got {center.shape}")
    return _quantize_rows(x, amax, words, center, batch_dims, partitioned, interpret)


def quantize_columns(
    x: Float[Array, "*shape"],
    format: Format = NVFP4,
    *,
    amax: Float32[Array, "..."] | None = None,
    words: UInt32[Array, "2"] | None = None,
    center: Float32[Array, "..."] | None = None,
    hadamard: bool = False,
    batch_dims: int = 0,
    device: compat.Device | None = None,
    partitioned: bool = False,
    interpret: bool = False,
) -> QTensor:
    """Quantizes an array to NVFP4 in blocks of 16 along its last axis but one, the tokens of a sequence.

    Equals `quantize_blocks(r, format, axes=(-2,), pack_axis=-2, batch_dims=batch_dims, words=words, amax=amax)` bit for
    bit, with r = x - center, or `numerics.hadamard(r, -2)` of that padded to whole blocks; conditions and arguments
    as for `quantize_rows`, but for:

    Args:
      x: bfloat16 or float32, at least two axes. Blocks are padded with zeros if 16 does not divide the rows.
      center: a row to subtract; shaped like x with size 1 on the last axis but one, and there or on all axes
        between `batch_dims` and the last (one mean a sequence, or one a matrix).
      hadamard: transform each block with the fixed signs. The largest magnitude after the transform takes a pass of
        its own over x, where `amax` is not given.

    Raises:
      NotImplementedError, ValueError: as `quantize_rows`.
    """
    _check(x, format, amax, batch_dims, device, interpret)
    if x.ndim - batch_dims < 2:
        raise ValueError(f"quantize_columns needs two axes behind batch_dims={batch_dims}, got shape {x.shape}")
    lead, width = x.shape[:-2], x.shape[-1]
    accepted = (*lead[:batch_dims], *[1] * (len(lead) - batch_dims), 1, width), (*lead, 1, width)
    if center is not None and center.shape not in accepted:
        raise ValueError(f"center must be of shape {accepted[0]} or {accepted[1]}, got {center.shape}")
    if center is not None and x.shape[-2] % NVFP4.block:
        # Padding must stay zero, and zero minus the center is not.
        x, center = x.astype(jnp.float32) - center, None
    return _quantize_columns(x, amax, words, center, hadamard, batch_dims, partitioned, interpret)


def quantize_2d(
    x: Float[Array, "*shape"],
    format: Format = NVFP4,
    *,
    amax: Float32[Array, "..."] | None = None,
    words: UInt32[Array, "2"] | None = None,
    batch_dims: int = 0,
    device: compat.Device | None = None,
    partitioned: bool = False,
    interpret: bool = False,
) -> QTensor:
    """Quantizes an array to NVFP4 in blocks of 16x16 over its last two axes: weights, which then equal their transpose.

    Equals `quantize_blocks(x, format, axes=(-2, -1), pack_axis=-2, batch_dims=batch_dims, words=words, amax=amax)` bit
    for bit; conditions and arguments as for `quantize_rows`, but for:

    Args:
      x: bfloat16 or float32, at least two axes behind `batch_dims`. Blocks are padded with zeros.

    Raises:
      NotImplementedError, ValueError: as `quantize_rows`.
    """
    _check(x, format, amax, batch_dims, device, interpret)
    if x.ndim - batch_dims < 2:
        raise ValueError(f"quantize_2d needs two axes behind batch_dims={batch_dims}, got shape {x.shape}")
    amax = _largest(x, None, batch_dims) if amax is None else amax
    hashes = () if words is None else _row_hashes(words, list(x.shape[:-1]), batch_dims)
    run = sharded.quantize_2d if partitioned else local.quantize_2d
    codes, scales = run(x, elements.factors(amax), hashes, interpret=interpret)
    blocked = ((-2, x.shape[-2]), (-1, x.shape[-1]))
    return QTensor(codes=codes, scales=scales, amax=amax, format=NVFP4, axis=-2, blocked=blocked)


def quantize_copies(
    x: Float[Array, "*shape"],
    *,
    amax: tuple[Float32[Array, "..."] | None, Float32[Array, "..."] | None] = (None, None),
    words: tuple[UInt32[Array, "2"] | None, UInt32[Array, "2"] | None] = (None, None),
    center: Float32[Array, "..."] | None = None,
    hadamard: bool = False,
    sums: bool = False,
    batch_dims: int = 0,
    device: compat.Device | None = None,
    partitioned: bool = False,
    interpret: bool = False,
) -> tuple[QTensor, QTensor] | tuple[QTensor, QTensor, Float32[Array, "..."]]:
    """What `quantize_rows` and `quantize_columns` give, bit for bit, in one read of x: both copies of an operand.

    Args:
      x: bfloat16 or float32, at least two axes behind `batch_dims`; 16 divides the last axis but one.
      amax, words: of the copy along rows and of the one along columns.
      center: one row for each matrix, subtracted for both copies.
      hadamard: of the copy along columns.
      sums: give `column_sums` of the copy along columns too, [*batch, 1, ..., 1, features], to the order of additions.
      batch_dims, device, partitioned, interpret: as for `quantize_rows`.

    Raises:
      NotImplementedError: as `quantize_rows`; or the rows are no whole blocks.
      ValueError: as `quantize_columns`; or the sums of a transformed copy, which are none of the array's.
    """
    for each in amax:
        _check(x, NVFP4, each, batch_dims, device, interpret)
    if x.ndim - batch_dims < 2:
        raise ValueError(f"quantize_copies needs two axes behind batch_dims={batch_dims}, got shape {x.shape}")
    if x.shape[-2] % NVFP4.block:
        raise NotImplementedError(f"quantize_copies takes rows in whole blocks of 16, got shape {x.shape}")
    if sums and hadamard:
        raise ValueError("quantize_copies: sums=True needs hadamard=False, a transformed block has other sums")
    expected = (*x.shape[:batch_dims], *[1] * (x.ndim - batch_dims - 1), x.shape[-1])
    if center is not None and center.shape != expected:
        raise ValueError(f"center must be of shape {expected}, got {center.shape}")
    by_row, by_column = amax
    by_row = _largest(x, center, batch_dims) if by_row is None else by_row
    if by_column is None and hadamard:
        where = sharded if partitioned else local
        by_column = where.hadamard_amax(x, _maybe(center), batch_dims=batch_dims, interpret=interpret)
    elif by_column is None:
        by_column = _largest(x, center, batch_dims)
    hashes = [() if each is None else _row_hashes(each, list(x.shape[:-1]), batch_dims) for each in words]
    factors = elements.factors(by_row), elements.factors(by_column)
    run = functools.partial(sharded.quantize_copies, batch_dims=batch_dims) if partitioned else local.quantize_copies
    parts = run(x, factors, _maybe(center), *hashes, hadamard=hadamard, sums=sums, interpret=interpret)
    by_rows = QTensor(*parts[:2], amax=by_row, format=NVFP4, axis=-1, blocked=((-1, x.shape[-1]),))
    by_columns = QTensor(*parts[2:4], amax=by_column, format=NVFP4, axis=-2, blocked=((-2, x.shape[-2]),))
    return by_rows, by_columns, *(total * by_columns.tensor_scale for total in parts[4:])


def _quantize_rows(x, amax, words, center, batch_dims: int, partitioned: bool, interpret: bool) -> QTensor:
    *lead, width = x.shape
    if amax is None:
        amax = _largest(x, center, batch_dims)
    hashes = () if words is None else _row_hashes(words, lead, batch_dims)
    run = sharded.quantize_rows if partitioned else local.quantize_rows
    codes, scales = run(x, elements.factors(amax), _maybe(center), hashes, interpret=interpret)
    return QTensor(codes=codes, scales=scales, amax=amax, format=NVFP4, axis=-1, blocked=((-1, width),))


def _quantize_columns(
    x, amax, words, center, hadamard: bool, batch_dims: int, partitioned: bool, interpret: bool
) -> QTensor:
    *lead, length, _ = x.shape
    # A transform fills the padding: its rows count.
    counted = -(-length // NVFP4.block) * NVFP4.block if hadamard else length
    where = sharded if partitioned else local
    if amax is None and hadamard:
        amax = where.hadamard_amax(x, _maybe(center), batch_dims=batch_dims, interpret=interpret)
    elif amax is None:
        amax = _largest(x, center, batch_dims)
    hashes = () if words is None else _row_hashes(words, [*lead, counted], batch_dims)
    codes, scales = where.quantize_columns(
        x, elements.factors(amax), _maybe(center), hashes, hadamard=hadamard, interpret=interpret
    )
    return QTensor(codes=codes, scales=scales, amax=amax, format=NVFP4, axis=-2, blocked=((-2, counted),))


def _row_hashes(words, shape: list[int], batch_dims: int):
    """`elements.row_hashes` for [*batch, *tokens], tokens counted in row-major order."""
    batch, rows = math.prod(shape[:batch_dims]), math.prod(shape[batch_dims:])
    return tuple(h.reshape(shape) for h in elements.row_hashes(words, batch, rows))


def _maybe(value) -> tuple:
    return () if value is None else (value,)


def _largest(x, center, batch_dims: int):
    """The largest magnitude of each matrix of x - center."""
    residual = x.astype(jnp.float32) if center is None else x.astype(jnp.float32) - center
    return jnp.max(jnp.abs(residual), axis=tuple(range(batch_dims, x.ndim)), keepdims=True)


def _check(x, format, amax, batch_dims, device, interpret):
    if reason := compat.not_interpreted() if interpret else unsupported_reason(device):
        raise NotImplementedError(f'{reason}; use backend="xla"')
    if format != NVFP4:
        raise NotImplementedError(f'the kernels quantize to {NVFP4}, not to {format}; use backend="xla"')
    if x.dtype not in _DTYPES:
        raise ValueError(f"the kernels take bfloat16 or float32, got {x.dtype}; convert with x.astype(jnp.float32)")
    if x.ndim == 0 or x.size == 0:
        raise ValueError(f"the kernels need a non-empty array of at least one axis, got shape {x.shape}")
    if not 0 <= batch_dims < x.ndim:
        raise ValueError(f"batch_dims must be in [0, {x.ndim}), got {batch_dims}")
    expected = (*x.shape[:batch_dims], *[1] * (x.ndim - batch_dims))
    if amax is not None and (amax.shape != expected or amax.dtype != jnp.float32):
        raise ValueError(f"amax must be float32 of shape {expected}, got {amax.dtype} of shape {amax.shape}")
    sequences = math.prod(x.shape[:-2])
    if sequences > launch.GRID_LIMIT:
        raise NotImplementedError(
            f'a kernel takes {launch.GRID_LIMIT} sequences at most, got {sequences}; use backend="xla"'
        )

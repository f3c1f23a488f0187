"""`quantize_rows`, `quantize_columns`: what `fp4jax.numerics.quantize_blocks` gives for 1x16 blocks, by one kernel."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, UInt32

from fp4jax.numerics import NVFP4, Format, QTensor
from fp4jax.numerics.blocks import pad_to_blocks
from pallas_kernels import compat
from pallas_kernels.quantize import columns, elements, rows

_CAPABILITY = (9, 0)
_DTYPES = (jnp.bfloat16, jnp.float32)
_GRID_LIMIT = 65535  # of all axes of a CUDA grid but the first


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
    interpret: bool = False,
) -> QTensor:
    """Quantizes an array to NVFP4 in blocks of 16 along its last axis.

    Equals `quantize_blocks(x - center, format, axes=(-1,), pack_axis=-1, batch_dims=batch_dims, words=words,
    amax=amax)` bit for bit where x is finite and no block's largest magnitude lies in (0, 2e-37). Where the twin is not
    finite (infinities, NaN in x) neither is the result, but its codes may differ. It has no derivative. Under sharding
    call it inside `jax.shard_map`, with the `amax` of the whole matrix: XLA would gather the operand of a bare kernel.
    Stochastic rounding counts the rows and columns of the array it is given.

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
    return _quantize_rows(x, amax, words, center, batch_dims, interpret)


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
    return _quantize_columns(x, amax, words, center, hadamard, batch_dims, interpret)


def _quantize_rows(x, amax, words, center, batch_dims: int, interpret: bool) -> QTensor:
    *lead, width = x.shape
    batch, count = math.prod(lead[:batch_dims]), math.prod(lead[batch_dims:])
    if amax is None:
        amax = _largest(x, center, batch_dims)
    x = _at_least(x.reshape(batch, count, width), (0, rows.TILE_ROWS[_word_dtype(x)], 16 * rows.TILE_BLOCKS))
    x = pad_to_blocks(x, (-1,), NVFP4.block)
    centers = () if center is None else _words_of_center(_widened(center.reshape(batch, width), x.shape[-1]), x.dtype)
    groups = 2 if x.dtype == jnp.bfloat16 else 4
    codes, scales = rows.quantize(
        _words(x).reshape(*x.shape[:2], -1, groups, 4),
        elements.factors(amax.reshape(batch)),
        tuple(part.reshape(batch, -1, groups, 4) for part in centers),
        () if words is None else elements.row_hashes(words, batch, x.shape[1]),
        interpret=interpret,
    )
    blocks = -(-width // NVFP4.block)
    codes = lax.bitcast_convert_type(codes, jnp.uint8).reshape(batch, x.shape[1], -1)
    return QTensor(
        codes=codes[:, :count, : blocks * NVFP4.block // 2].reshape(*lead, -1),
        scales=scales[:, :count, :blocks].reshape(*lead, -1),
        amax=amax,
        format=NVFP4,
        axis=-1,
        blocked=((-1, width),),
    )


def _quantize_columns(x, amax, words, center, hadamard: bool, batch_dims: int, interpret: bool) -> QTensor:
    *lead, length, width = x.shape
    batch, sequences = math.prod(lead[:batch_dims]), math.prod(lead)
    if amax is None and not hadamard:
        amax = _largest(x, center, batch_dims)
    full = pad_to_blocks(x, (-2,), NVFP4.block)
    blocks = full.shape[-2] // NVFP4.block
    full = full.reshape(sequences, -1, width)
    full = _at_least(full, (0, 0, columns.STRIP * (2 if x.dtype == jnp.bfloat16 else 1)))
    full = pad_to_blocks(full, (-1,), 2 * columns.VECTOR)
    centers = ()
    if center is not None:
        centers = _words_of_center(_widened(center.reshape(-1, width), full.shape[-1]), x.dtype)
    if amax is None:
        largest = columns.hadamard_maxima(_words(full), centers, interpret=interpret)
        amax = jnp.max(largest.reshape(batch, -1), axis=1).reshape(*lead[:batch_dims], *[1] * (x.ndim - batch_dims))
    hashes = ()
    if words is not None:
        counted = full.shape[1] if hadamard else length  # a transform fills the padding: its rows count
        by_row = elements.row_hashes(words, batch, sequences // batch * counted)
        hashes = tuple(pad_to_blocks(h.reshape(sequences, counted), (-1,), NVFP4.block) for h in by_row)
    codes, scales = columns.quantize(
        _words(full), elements.factors(amax.reshape(batch)), centers, hashes, hadamard=hadamard, interpret=interpret
    )
    return QTensor(
        codes=_bytes(codes)[..., :width].reshape(*lead, blocks * NVFP4.block // 2, width),
        scales=_bytes(scales)[..., :width].reshape(*lead, blocks, width),
        amax=amax,
        format=NVFP4,
        axis=-2,
        blocked=((-2, blocks * NVFP4.block if hadamard else length),),
    )


def _word_dtype(x):
    return jnp.dtype(jnp.uint32 if x.dtype == jnp.bfloat16 else jnp.float32)


def _words(x):
    """The kernels' view of [..., columns]: pairs of bfloat16 in uint32 words, float32 as it is."""
    if x.dtype == jnp.float32:
        return x
    return lax.bitcast_convert_type(x.reshape(*x.shape[:-1], -1, 2), jnp.uint32)


def _words_of_center(center, dtype):
    """The center [..., columns] as the kernels take it: one array for each column of a word."""
    return (center[..., 0::2], center[..., 1::2]) if dtype == jnp.bfloat16 else (center,)


def _bytes(words):
    """uint8 [..., columns] of the bytes in words."""
    if words.dtype == jnp.uint8:
        return words
    return lax.bitcast_convert_type(words, jnp.uint8).reshape(*words.shape[:-1], -1)


def _at_least(x, sizes):
    """Zeros behind the ends of axes that are shorter than `sizes`."""
    missing = [max(0, size - now) for size, now in zip(sizes, x.shape, strict=True)]
    return jnp.pad(x, [(0, m) for m in missing]) if any(missing) else x


def _widened(center, width: int):
    return jnp.pad(center, [(0, 0), (0, width - center.shape[-1])])


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
    if sequences > _GRID_LIMIT:
        raise NotImplementedError(f'a kernel takes {_GRID_LIMIT} sequences at most, got {sequences}; use backend="xla"')

"""`quantize_rows`: what `fp4jax.numerics.quantize_blocks` gives for 1x16 blocks along the last axis, by one kernel."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, UInt32

from fp4jax.numerics import NVFP4, Format, QTensor, bits
from fp4jax.numerics.quantize import encode_factor
from pallas_kernels.quantize import kernel

_CAPABILITY = (9, 0)
_DTYPES = (jnp.bfloat16, jnp.float32)
_BATCH_LIMIT = 65535  # the second axis of a CUDA grid


def unsupported_reason(device: jax.Device | None = None) -> str | None:
    """Why the kernel cannot serve `device` (default: the first of `jax.devices()`), or None where it can."""
    if reason := _too_old():
        return reason
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
    batch_dims: int = 0,
    device: jax.Device | None = None,
    interpret: bool = False,
) -> QTensor:
    """Quantizes an array to NVFP4 in blocks of 16 along its last axis.

    Equals `quantize_blocks(x, format, axes=(-1,), pack_axis=-1, batch_dims=batch_dims, words=words, amax=amax)` bit for
    bit where x is finite and no block's largest magnitude lies in (0, 2e-37). Where the twin is not finite (infinities,
    NaN in x) neither is the result, but its codes may differ. It has no derivative. Under sharding call it inside
    `jax.shard_map`, with the `amax` of the whole matrix: XLA would gather the operand of a bare kernel. Stochastic
    rounding counts the rows and columns of the array it is given.

    Args:
      x: bfloat16 or float32, at least one axis. Blocks are padded with zeros if 16 does not divide the last axis.
      format: NVFP4.
      amax: largest magnitude of each matrix where it is known, float32 with size 1 on every axis behind `batch_dims`;
        XLA computes it otherwise.
      words: the two words of a random stream (`fp4jax.numerics.key_words`): stochastic rounding exactly when given.
      batch_dims: leading axes that count independent matrices, each with its own tensor scale.
      device: the device the program is compiled for; default: the first of `jax.devices()`.
      interpret: run the kernel in Pallas' GPU interpreter instead, on any device: for tests.

    Raises:
      NotImplementedError: the device, the JAX release, the format or the size is not served: the reason and the
        alternative.
      ValueError: x is of another dtype or empty, or `batch_dims` or `amax` does not fit it.
    """
    _check(x, format, amax, batch_dims, device, interpret)
    *lead, columns = x.shape
    if amax is None:
        axes = tuple(range(batch_dims, x.ndim))
        amax = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=axes, keepdims=True)
    padding = -columns % NVFP4.block
    if padding:
        x = jnp.pad(x, [(0, 0)] * len(lead) + [(0, padding)])
    blocks_per_row = (columns + padding) // NVFP4.block
    batch = math.prod(lead[:batch_dims])
    codes, scales = kernel.quantize_block_list(
        _block_list(x, batch),
        _factors(amax.reshape(batch)),
        None if words is None else jnp.stack(bits.fold_parts(words, lax.iota(jnp.uint32, batch)), axis=-1),
        blocks_per_row=blocks_per_row,
        interpret=interpret,
    )
    blocks = math.prod(lead[batch_dims:]) * blocks_per_row
    codes, scales = codes[:, :blocks], scales[:, :blocks]
    return QTensor(
        codes=lax.bitcast_convert_type(codes, jnp.uint8).reshape(*lead, blocks_per_row * NVFP4.block // 2),
        scales=scales.reshape(*lead, blocks_per_row),
        amax=amax,
        format=NVFP4,
        axis=-1,
        blocked=((-1, columns),),
    )


def _block_list(x, batch):
    """The kernel's view of x, [batch, blocks, groups, 4], lengthened with zero blocks to one tile."""
    if x.dtype == jnp.bfloat16:
        blocks = lax.bitcast_convert_type(x.reshape(batch, -1, 2, 4, 2), jnp.uint32)
    else:
        blocks = x.reshape(batch, -1, 4, 4)
    missing = max(0, kernel.TILE[blocks.dtype] - blocks.shape[1])
    return jnp.pad(blocks, [(0, 0), (0, missing), (0, 0), (0, 0)]) if missing else blocks


def _factors(amax):
    """[batch, 9]: what gives the block scale, then the element multiplier for each scale of the top octave."""
    encode = encode_factor(amax, NVFP4)[:, None]
    scales = jnp.asarray(kernel.TOP_SCALES)[None, :]
    return jnp.concatenate([encode * NVFP4.inverse_peak, 1.0 / (scales * (1.0 / encode))], axis=1)


def _too_old():
    if hasattr(plgpu, "store") and hasattr(plgpu, "InterpretGPUParams"):
        return None
    return f"the Mosaic GPU quantizer needs JAX 0.12.0 or newer, this is {jax.__version__}"


def _check(x, format, amax, batch_dims, device, interpret):
    if reason := _too_old() if interpret else unsupported_reason(device):
        raise NotImplementedError(f'{reason}; use backend="xla"')
    if format != NVFP4:
        raise NotImplementedError(f'the kernel quantizes to {NVFP4}, not to {format}; use backend="xla"')
    if x.dtype not in _DTYPES:
        raise ValueError(f"quantize_rows takes bfloat16 or float32, got {x.dtype}; convert with x.astype(jnp.float32)")
    if x.ndim == 0 or x.size == 0:
        raise ValueError(f"quantize_rows needs a non-empty array of at least one axis, got shape {x.shape}")
    if not 0 <= batch_dims < x.ndim:
        raise ValueError(f"batch_dims must be in [0, {x.ndim}), got {batch_dims}")
    expected = (*x.shape[:batch_dims], *[1] * (x.ndim - batch_dims))
    if amax is not None and (amax.shape != expected or amax.dtype != jnp.float32):
        raise ValueError(f"amax must be float32 of shape {expected}, got {amax.dtype} of shape {amax.shape}")
    matrices = math.prod(x.shape[:batch_dims])
    if matrices > _BATCH_LIMIT:
        raise NotImplementedError(f'a kernel takes {_BATCH_LIMIT} matrices at most, got {matrices}; use backend="xla"')

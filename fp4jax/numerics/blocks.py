"""Arrays as grids of blocks: shapes, padding, and what one scale for each block or for more than a block lines up with.

Blocked axes are negative numbers. An array with axes [..., n, ...] in blocks of b along n has the shape
[..., n / b, b, ...]; what belongs to a block has size 1 in place of b.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Shaped

Size = Any
"""An int. Under `jax.export` it may be a symbolic dimension, whose class JAX keeps to itself."""
Shape = tuple[Size, ...]


def blocked_shape(shape: Shape, axes: tuple[int, ...], block: int) -> Shape:
    """`shape` with every axis of `axes` split into (blocks, block)."""
    new_shape = []
    for axis, size in enumerate(shape):
        new_shape += [size // block, block] if axis - len(shape) in axes else [size]
    return tuple(new_shape)


def inner_axes(rank: int, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Where, in the blocked shape of an array of `rank` axes, the insides of the blocks lie."""
    ordered = sorted(axis % rank for axis in axes)
    return tuple(axis + count + 1 for count, axis in enumerate(ordered))


def pad_to_blocks(x: Shaped[Array, "..."], axes: tuple[int, ...], multiple: int) -> Shaped[Array, "..."]:
    """Zeros behind the end of every axis of `axes` up to a multiple."""
    widths = [whole(size, multiple) - size if axis - x.ndim in axes else 0 for axis, size in enumerate(x.shape)]
    if all(isinstance(width, int) and width == 0 for width in widths):
        return x
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, width, 0) for width in widths])


def whole(size: Size, multiple: int) -> Size:
    """The next multiple, in a form that JAX simplifies for symbolic dimensions where it is subtracted or halved."""
    return -(-size // multiple) * multiple


def over_blocks(outer: Float32[Array, "..."], shape: Shape, axes: tuple[int, ...], block: int) -> Float32[Array, "..."]:
    """What belongs to a matrix, a vector or several blocks, shaped to meet what belongs to each block.

    Args:
      outer: size 1 along blocked axes, or one entry for several blocks.
      shape: of the array in whole blocks.
    """
    new_shape = []
    for axis, size in enumerate(outer.shape):
        if axis - len(shape) in axes and not isinstance(size, int):
            raise ValueError(
                "a scale for several blocks along an axis whose size is a symbol (jax.export) is not supported: export "
                "with fixed sizes, or under a recipe whose formats have no such scale"
            )
        if axis - len(shape) in axes and size > 1:
            blocks = shape[axis] // block
            outer = jnp.repeat(outer, blocks // size, axis=axis)
            size = blocks
        new_shape += [size, 1] if axis - len(shape) in axes else [size]
    return outer.reshape(new_shape)

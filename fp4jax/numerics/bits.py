"""Counter-based random bits: 16 bits for every element of a matrix, a pure function of key and position.

The draw for an element depends on the two words of a key and on three separate uint32 counters: its global row, its
global column and the index of its matrix in a batch. It does not depend on how the matrix is sharded, tiled or
scanned, nor on the backend, so stochastic rounding repeats itself under any mesh, under rematerialization, and after
a resume.

    mix(x):       x ^= x >> 16; x *= 0x21F0AAAD; x ^= x >> 15; x *= 0x735A2D97; x ^= x >> 15
    fold(k, d):   (mix(k0 ^ mix(d + 0x9E3779B9)), mix(k1 + mix(d ^ 0x85EBCA6B)))
    draw(k, row, column, batch):
        k = fold(k, batch);  a = mix(row ^ k0);  b = mix(a + k1)
        h = mix((a + (column >> 1) * 0x9E3779B9) ^ b)
        the low 16 bits of h for an even column, the high 16 bits for an odd one

The key's words are JAX's two; the four words of an rbg key become (w0 ^ mix(w2 + 0x9E3779B9), w1 ^ mix(w3 +
0x9E3779B9)). All arithmetic is modulo 2^32. `mix` is a bijection with an avalanche bias below 0.11 bits (constants
found by C. Wellons' hash-prospector search). One hash serves two columns; a and b are per row. A golden vector in the
tests freezes it.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Integer, Key, UInt32

from fp4jax.numerics.blocks import Shape, Size

SCALES = 0x5CA1E  # the stream of block scales inside the stream of the elements they scale

_WEYL = 0x9E3779B9
_SALT = 0x85EBCA6B


def mix(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """A bijection of 32-bit words that changes half of the output bits for every input bit changed."""
    x = (x ^ x >> 16) * jnp.uint32(0x21F0AAAD)
    x = (x ^ x >> 15) * jnp.uint32(0x735A2D97)
    return x ^ x >> 15


def key_words(key: Key[Array, "..."] | Integer[Array, "..."]) -> UInt32[Array, "2"]:
    """The two words of a JAX random key: typed (`jax.random.key`), raw (`jax.random.PRNGKey`), threefry or rbg.

    Raises:
      ValueError: `key` is not one key of two or four words.
    """
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    words = jax.random.key_data(key) if typed else jnp.asarray(key)
    if words.dtype != jnp.uint32 or words.shape not in ((2,), (4,)):
        raise ValueError(
            f"key must be one JAX random key of 2 or 4 uint32 words, got {words.dtype}{list(words.shape)}; "
            "make one with jax.random.key(seed)"
        )
    return words if words.shape == (2,) else words[:2] ^ mix(words[2:] + jnp.uint32(_WEYL))


def fold(words: UInt32[Array, "2"], data) -> UInt32[Array, "2"]:
    """Derives the words of another stream from `words` and an integer (slot, batch index)."""
    first, second = fold_parts(words, jnp.asarray(data).astype(jnp.uint32))
    return jnp.stack([first, second])


def fold_parts(words: UInt32[Array, "2"], data: UInt32[Array, "*shape"]):
    """`fold` for an array of integers: the two words as two arrays of its shape."""
    first = mix(words[0] ^ mix(data + jnp.uint32(_WEYL)))
    return first, mix(words[1] + mix(data ^ jnp.uint32(_SALT)))


def draws(
    words: UInt32[Array, "2"],
    row: UInt32[Array, "..."],
    column: UInt32[Array, "..."],
    batch: UInt32[Array, "..."],
) -> UInt32[Array, "..."]:
    """16 random bits in [0, 65536) for every position; the counters broadcast against each other."""
    first, second = fold_parts(words, batch)
    a = mix(row ^ first)
    b = mix(a + second)
    h = mix((a + (column >> 1) * jnp.uint32(_WEYL)) ^ b)
    return jnp.where(column & 1 == 1, h >> 16, h & jnp.uint32(0xFFFF))


def signs(words: UInt32[Array, "2"], size: int) -> Float32[Array, " size"]:
    """`size` random signs, +1 or -1: the low bits of one row of draws."""
    drawn = draws(words, jnp.zeros((1,), jnp.uint32), lax.iota(jnp.uint32, size), jnp.zeros((1,), jnp.uint32))
    return jnp.where(drawn & 1 == 1, jnp.float32(-1), jnp.float32(1))


def matrix_draws(
    words: UInt32[Array, "2"], shape: Shape, batch_dims: int, counted_shape: Shape | None = None
) -> UInt32[Array, "*shape"]:
    """Draws for an array of matrices: `batch_dims` leading axes count matrices, the last axis is the column, the axes
    between them count rows in row-major order.

    Args:
      counted_shape: the shape to count in, where `shape` is that shape padded at the ends (padding repeats counters,
        which is harmless because padding is zero and zero needs no draw).
    """
    counted_shape = counted_shape or shape
    rank = len(shape)
    batch = _row_major(shape, counted_shape, 0, batch_dims)
    row = _row_major(shape, counted_shape, batch_dims, rank - 1)
    column = _iota(shape, rank - 1)
    return draws(words, row, column, batch)


def _iota(shape, axis):
    unit = [1] * len(shape)
    unit[axis] = shape[axis]
    return lax.broadcasted_iota(jnp.uint32, unit, axis)


def _row_major(shape, counted_shape, start, stop):
    index = jnp.zeros([1] * len(shape), jnp.uint32)
    for axis in range(start, stop):
        index = index * _counter(counted_shape[axis]) + _iota(shape, axis)
    return index


def _counter(size: Size) -> UInt32[Array, ""]:
    """A size modulo 2^32; under `jax.export` it may be a symbol, which is an int32 when the program runs."""
    return jnp.uint32(size % 2**32) if isinstance(size, int) else jnp.asarray(size).astype(jnp.uint32)

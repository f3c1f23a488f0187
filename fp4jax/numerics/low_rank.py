"""The dominant singular directions of a matrix, without a singular value decomposition.

X ≈ A V with orthonormal rows V spanning nearly the span of the k largest right singular vectors of X: a randomized
range finder with power iterations on a sample of the rows (Halko, Martinsson & Tropp, arXiv 0909.4061, algorithm 4.4;
Metis, arXiv 2509.00404, decomposes operands so). It costs two products with the sampled rows and one factorization of a
[features, k] matrix for each iteration; a full decomposition would cost more than the layer itself.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32

from fp4jax.numerics import bits

SAMPLED_ROWS = 1024


def low_rank_factors(
    x: Float32[Array, "*shape"], rank: int, batch_dims: int, iterations: int
) -> tuple[Float32[Array, "..."], Float32[Array, "..."]]:
    """(left, right) with left · right near the best approximation of x of that rank.

    Args:
      x: [*batch, *rows, features]; rows that do not count are zero.
      rank: at most the number of features.
      iterations: of the power method: 1 or 2.

    Returns:
      left [*batch, *rows, rank] = x · rightᵀ, float32; right [*batch, rank, features] with orthonormal rows.

    The start of the iteration is a fixed random matrix, so the factors are a function of x alone.
    """
    sample = _sample(x, batch_dims)
    # Scaled by the largest magnitude: products of products stay far from the ends of float32, at any scale of x.
    amax = jnp.max(jnp.abs(sample), axis=(-2, -1), keepdims=True)
    sample = sample / jnp.where(amax > 0, amax, 1.0)
    start = bits.matrix_draws(jnp.zeros(2, jnp.uint32), (rank, sample.shape[-2]), 0)
    start = start.astype(jnp.int32).astype(jnp.float32) / 32767.5 - 1.0
    right = _times(jnp.broadcast_to(start, (*sample.shape[:-2], *start.shape)), sample)
    for _ in range(iterations):
        right = _times(_times(_orthonormal(right), jnp.swapaxes(sample, -1, -2)), sample)
    right = _orthonormal(right)
    batch = tuple(range(batch_dims))
    left = lax.dot_general(
        x, right, (((x.ndim - 1,), (batch_dims + 1,)), (batch, batch)), precision=lax.Precision.HIGHEST
    )
    return left, right


def _sample(x, batch_dims: int):
    """[*batch, at most about SAMPLED_ROWS, features]: every n-th row along the last axis of rows."""
    rows = 1
    for size in x.shape[batch_dims:-1]:
        rows *= size
    stride = max(1, min(rows // SAMPLED_ROWS, x.shape[-2]))
    x = lax.slice_in_dim(x, 0, None, stride=stride, axis=x.ndim - 2)
    return x.reshape(*x.shape[:batch_dims], -1, x.shape[-1])


def _orthonormal(rows):
    """An orthonormal basis of the span of [*batch, rank, features], as rows."""
    basis, _ = jnp.linalg.qr(jnp.swapaxes(rows, -1, -2))
    return jnp.swapaxes(basis, -1, -2)


def _times(a, b):
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)

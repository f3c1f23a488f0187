"""`fp4jax.ragged_dot`: `lax.ragged_dot` in high precision; under a recipe every group is a matrix by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp4jax.dot import dot_general
from fp4jax.ragged import ragged_dot
from tests import contract

SIZES = (5, 0, 17, 8)
ROWS = 32  # two more than the groups have
X = jnp.asarray(contract.gridded((ROWS, 24), 1))
W = jnp.asarray(contract.gridded((len(SIZES), 24, 16), 2))
G = jnp.asarray(contract.gridded((ROWS, 16), 3))


def result_and_gradients(function, x, w):
    y, pull = jax.vjp(function, x, w)
    return y, *pull(G)


def test_in_high_precision_it_is_lax_ragged_dot():
    sizes = jnp.asarray(SIZES)

    @jax.jit
    def both(x, w):
        reference = lambda x, w: jax.lax.ragged_dot(x, w, sizes, precision="highest")  # noqa: E731
        ours = lambda x, w: ragged_dot(x, w, sizes, "bf16", precision="highest")  # noqa: E731
        return result_and_gradients(ours, x, w), result_and_gradients(reference, x, w)

    got, expected = both(X, W)
    real = sum(SIZES)
    assert not np.any(got[0][real:])
    for ours, theirs in zip(got, expected, strict=True):
        rows = slice(real) if ours.shape[0] == ROWS else slice(None)
        np.testing.assert_allclose(ours[rows], theirs[rows], rtol=1e-4, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["averis+nearest", "nvfp4+nearest"])
def test_every_group_is_a_matrix_by_itself(name):
    got = jax.jit(lambda x, w: result_and_gradients(lambda x, w: ragged_dot(x, w, jnp.asarray(SIZES), name), x, w))(
        X, W
    )
    start = 0
    for number, size in enumerate(SIZES):
        rows = slice(start, start + size)
        start += size
        if not size:
            assert not np.any(got[2][number])
            continue
        y, pull = jax.vjp(lambda x, w: dot_general(x, w, (((1,), (0,)), ((), ())), recipe=name), X[rows], W[number])
        for ours, alone in zip((got[0][rows], got[1][rows], got[2][number]), (y, *pull(G[rows])), strict=True):
            contract.assert_close(ours, alone)


@pytest.mark.parametrize(
    "x, w, sizes", [(X, W[:2], SIZES), (X[0], W, SIZES), (X, W[0], SIZES), (X, W, 5), (X, W[..., 0], SIZES)]
)
def test_shapes_are_checked(x, w, sizes):
    unchecked = ragged_dot.__wrapped__  # the suite's type checker would be first
    with pytest.raises(ValueError, match=r"takes x \[M, K\], w \[G, K, N\] and group_sizes \[G\]"):
        unchecked(x, w, jnp.asarray(sizes), "bf16")

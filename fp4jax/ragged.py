"""`ragged_dot` under a recipe: the rows of x in consecutive groups, each with a weight matrix of its own (experts)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fp4jax.dot import dot_general
from fp4jax.recipes import Recipe


def ragged_dot(
    x: Float[Array, "M K"],
    w: Float[Array, "G K N"],
    group_sizes: Int[Array, " G"],
    recipe: str | Recipe,
    key=None,
    *,
    precision=None,
    preferred_element_type=None,
    backend: str = "auto",
    gemm: str = "auto",
) -> Float[Array, "M N"]:
    """`jax.lax.ragged_dot` under a recipe, differentiable in x and w.

    >>> x, w = jnp.ones((5, 16)), jnp.stack([jnp.ones((16, 16)), 2 * jnp.ones((16, 16))])
    >>> y = jax.jit(lambda x, w: ragged_dot(x, w, jnp.array([3, 2]), "nvfp4"))(x, w)
    >>> print(y[:, 0])
    [16. 16. 16. 32. 32.]

    Every group is a matrix by itself: means, maxima and blocks of 16 tokens are those of its own rows alone, as if it
    were multiplied by itself.

    Args:
      x: activations; the first group_sizes[0] rows belong to group 0, and so on.
      w: one weight matrix a group.
      group_sizes: number of rows of each group. Rows behind the last group give zeros, and sizes that sum to more
        than M are cut off there.
      recipe, key, precision, preferred_element_type, backend, gemm: as in `fp4jax.dot_general`.

    Returns:
      x's rows times their group's matrix.

    Memory and work are those of G groups of M rows, as any group may have all of them: G times the activations, of
    which the groups' real rows are one G-th. It is made to be right; for many groups prefer batch dimensions with a
    capacity (`fp4jax.einsum("gck,gkn->gcn", ...)`).

    Raises:
      ValueError: shapes that do not fit, or as `fp4jax.dot_general`.
    """
    if (x.ndim, w.ndim, group_sizes.ndim) != (2, 3, 1) or w.shape[:2] != (*group_sizes.shape, x.shape[1]):
        raise ValueError(
            f"ragged_dot takes x [M, K], w [G, K, N] and group_sizes [G], got {x.shape}, {w.shape} and "
            f"{group_sizes.shape}"
        )
    count = x.shape[0]
    ends = jnp.minimum(jnp.cumsum(group_sizes), count)
    starts = jnp.concatenate([jnp.zeros(1, ends.dtype), ends[:-1]])
    rows = jnp.arange(count, dtype=ends.dtype)
    # Each group's rows are moved to its beginning, so that blocks of tokens begin where the group does.
    positions = starts[:, None] + rows[None, :]
    is_real = positions < ends[:, None]
    grouped = jnp.take(x, jnp.minimum(positions, count - 1), axis=0)
    y = dot_general(
        grouped, w, (((2,), (1,)), ((0,), (0,))), precision, preferred_element_type,
        recipe=recipe, key=key, row_mask=is_real, backend=backend, gemm=gemm,
    )  # fmt: skip
    group = jnp.minimum(jnp.searchsorted(ends, rows, side="right"), len(ends) - 1).astype(ends.dtype)
    own = y[group, jnp.clip(rows - starts[group], 0, count - 1)]
    return jax.lax.select(jnp.broadcast_to((rows < ends[-1])[:, None], own.shape), own, jnp.zeros_like(own))

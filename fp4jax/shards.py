"""Tokens in shards that share no statistics: the first token axis cut in two, [*batch, shards, tokens / shards, ...].

A recipe with `shards` (the variant `+shards8`) takes means, low-rank parts and float32 scales of every shard by itself,
and draws for it as for a matrix of its own; weights are what they are without. A shard is to the tokens what a matrix
of a batch is to a product, so that all of the preparation serves it unchanged, and the two products with weights too.
The weight gradient is the sum of the shards', each multiplied with its own scales first,

    dW = sum over shards s of  (Xrₛᵀ Drₛ + (Xrₛᵀ 1) μ_Dₛ + μ_Xₛᵀ (1ᵀ Drₛ) + lₛ μ_Xₛᵀ μ_Dₛ)

which is exact for whatever is split off where. Where a device holds whole shards, the sum is the reduction that data
parallelism has in any case, and no statistic of tokens travels. The number is the recipe's and not the mesh's: one
device computes the same, and so does any other mesh.
"""

from jaxtyping import Array, Shaped

from fp4jax.numerics.blocks import Shape
from fp4jax.recipe_types import Recipe


def in_shards(rows: Shaped[Array, "..."], recipe: Recipe, batch_dims: int) -> Shaped[Array, "..."]:
    """[*batch, tokens, ...] → [*batch, shards, tokens / shards, ...] under a recipe with shards, else as it is.

    Raises:
      ValueError: the tokens do not divide.
    """
    return rows if recipe.shards is None else rows.reshape(shape_in_shards(rows.shape, recipe, batch_dims))


def shape_in_shards(shape: Shape, recipe: Recipe, batch_dims: int) -> Shape:
    """The shape of `in_shards`."""
    if recipe.shards is None:
        return shape
    tokens = shape[batch_dims]
    if not isinstance(tokens, int):
        raise ValueError(
            f"recipe {recipe.name} cuts tokens into {recipe.shards} shards, and their number is a symbol (jax.export): "
            "export with fixed sizes, or under the recipe without shards"
        )
    if tokens % recipe.shards:
        raise ValueError(
            f"recipe {recipe.name} cuts the first token axis into {recipe.shards} shards, and it has {tokens}: use a "
            f"multiple of {recipe.shards}, or the recipe without shards"
        )
    return (*shape[:batch_dims], recipe.shards, tokens // recipe.shards, *shape[batch_dims + 1 :])

"""The slot in flax.linen: `nn.Dense(1024, dot_general_cls=fp4jax.linen.dot_general_cls("averis"))`.

Dense and DenseGeneral make one `DotGeneral` a layer, so its random stream is the layer's own.
"""

import functools

import flax.linen as nn
import jax

from fp4jax.dot import dot_general
from fp4jax.recipes import Recipe, as_recipe

RNG_STREAM = "fp4"


class DotGeneral(nn.Module):
    """`jax.lax.dot_general` under a recipe, with the key drawn from a named random stream.

    Attributes:
      recipe: what happens to each operand.
      rng_stream: the stream to pass to `apply(..., rngs={"fp4": key})` when training with stochastic rounding.
        Without it evaluation works, and differentiation raises a ValueError.
      backend, gemm: as in `fp4jax.dot_general`.
    """

    recipe: str | Recipe
    rng_stream: str = RNG_STREAM
    backend: str = "auto"
    gemm: str = "auto"

    @nn.compact
    def __call__(self, lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None, *, out_sharding=None):
        """`lax.dot_general`'s signature: the layer passes its input and its kernel."""
        recipe = as_recipe(self.recipe)
        key = None
        if recipe.forward_draws or recipe.gradient_draws:
            if self.has_rng(self.rng_stream):
                key = self.make_rng(self.rng_stream)
            elif self.is_initializing():
                key = jax.random.key(0)  # shapes are all that initialization takes from the product
        return dot_general(
            lhs, rhs, dimension_numbers, precision, preferred_element_type, out_sharding=out_sharding,
            recipe=recipe, key=key, backend=self.backend, gemm=self.gemm,
        )  # fmt: skip


def dot_general_cls(
    recipe: str | Recipe, *, rng_stream: str = RNG_STREAM, backend: str = "auto", gemm: str = "auto"
) -> functools.partial:
    """What Linen layers take as `dot_general_cls`.

    Args:
      recipe: a name (`fp4jax.list_recipes()`), with variants if wanted, or a `Recipe`.
      rng_stream: name of the random stream for stochastic rounding.

    Raises:
      ValueError: an unknown recipe.
    """
    return functools.partial(DotGeneral, recipe=as_recipe(recipe), rng_stream=rng_stream, backend=backend, gemm=gemm)

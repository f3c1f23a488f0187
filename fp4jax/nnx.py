"""The slot in flax.nnx: `nnx.Linear(512, 1024, dot_general=fp4jax.nnx.DotGeneral("averis", rngs=rngs), rngs=rngs)`."""

from flax import nnx

from fp4jax.dot import dot_general
from fp4jax.recipes import Recipe, as_recipe

RNG_STREAM = "fp4"


class DotGeneral(nnx.Module):
    """`jax.lax.dot_general` under a recipe, with a random stream of its own where the recipe draws.

    The stream is part of the model's state, as Dropout's is: saved and restored with it. Give each layer its own
    `DotGeneral`; layers that share one draw from one stream.
    """

    def __init__(
        self,
        recipe: str | Recipe,
        *,
        rngs: nnx.Rngs | None = None,
        rng_stream: str = RNG_STREAM,
        deterministic: bool = False,
        backend: str = "auto",
        gemm: str = "auto",
    ):
        """Makes the slot.

        Args:
          recipe: a name (`fp4jax.list_recipes()`), with variants if wanted, or a `Recipe`.
          rngs: forked for the stream `rng_stream` (or the default stream); may be None if the recipe draws nothing.
          deterministic: draw no keys, for evaluation; `model.eval()` sets it. Differentiating a recipe that rounds
            gradients stochastically then raises a ValueError.

        Raises:
          ValueError: an unknown recipe, or one that draws without `rngs`.
        """
        self.recipe = as_recipe(recipe)
        draws = self.recipe.forward_draws or self.recipe.gradient_draws
        if draws and rngs is None:
            raise ValueError(f"recipe {self.recipe.name} rounds stochastically: pass rngs=nnx.Rngs({rng_stream}=0)")
        self.stream = rngs[rng_stream].fork() if draws else None
        self.deterministic = deterministic
        self.backend = backend
        self.gemm = gemm

    def __call__(self, lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None, *, out_sharding=None):
        """`lax.dot_general`'s signature: the layer passes its input and its kernel."""
        needs_key = self.stream is not None and (self.recipe.forward_draws or not self.deterministic)
        return dot_general(
            lhs, rhs, dimension_numbers, precision, preferred_element_type, out_sharding=out_sharding,
            recipe=self.recipe, key=self.stream() if needs_key else None, backend=self.backend, gemm=self.gemm,
        )  # fmt: skip

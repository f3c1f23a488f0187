"""Policies: which layer gets which recipe."""

import dataclasses
import re
from collections.abc import Iterable

from fp4jax.recipes import Recipe, as_recipe, recipe

_HIGH_PRECISION = "bf16"


@dataclasses.dataclass(frozen=True)
class Policy:
    """Ordered rules from layer path to recipe: the first that matches wins, a layer without a match is not quantized.

    Attributes:
      rules: (regular expression, recipe) pairs; the expression is searched for in paths such as
        `"layers.3.mlp.down_proj"`.
    """

    rules: tuple[tuple[str, str | Recipe], ...]

    def __post_init__(self):
        rules = tuple((pattern, as_recipe(value)) for pattern, value in self.rules)
        object.__setattr__(self, "rules", rules)
        for pattern, _ in rules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"policy rule {pattern!r} is not a regular expression: {error}") from None

    @classmethod
    def of(cls, *rules: tuple[str, str | Recipe]) -> "Policy":
        """A policy from (regular expression, recipe or its name) pairs."""
        return cls(rules)

    def recipe_for(self, path: str) -> Recipe:
        """The recipe of the layer at `path`."""
        return next((found for pattern, found in self.rules if re.search(pattern, path)), recipe(_HIGH_PRECISION))

    def assign(self, paths: Iterable[str]) -> dict[str, Recipe]:
        """The recipe of every layer.

        Raises:
          ValueError: a rule whose expression no path matches; it is most likely misspelt.
        """
        paths = list(paths)
        for pattern, _ in self.rules:
            if not any(re.search(pattern, path) for path in paths):
                example = f", for example {paths[0]!r}" if paths else ""
                raise ValueError(f"policy rule {pattern!r} matches none of the {len(paths)} linear layers{example}")
        return {path: self.recipe_for(path) for path in paths}


def policy(name: str, recipe: str | Recipe) -> Policy:
    """A shipped policy applied to a recipe: `"all_linear"` gives it to every linear layer (arXiv 2603.10444).

    Raises:
      ValueError: an unknown name.
    """
    if name not in _POLICIES:
        raise ValueError(f"unknown policy {name!r}; known: {', '.join(_POLICIES)}")
    return _POLICIES[name](as_recipe(recipe))


_POLICIES = {"all_linear": lambda value: Policy.of((".", value))}

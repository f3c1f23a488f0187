"""Writes docs/recipe_tables.md: the six slots of every recipe, as `python -m fp4jax.recipes` prints them.

    python scripts/make_recipe_tables.py

A test compares the page with the recipes.
"""

from pathlib import Path

from fp4jax.recipes import list_recipes, recipe

PAGE = Path(__file__).resolve().parent.parent / "docs" / "recipe_tables.md"

HEAD = """# The six slots of every recipe

Made by `python scripts/make_recipe_tables.py` from [`fp4jax/recipes.py`](../fp4jax/recipes.py); `python -m
fp4jax.recipes NAME` prints one, with variants too. What the fields mean: [numerics.md](numerics.md); where each recipe
comes from: [recipes.md](recipes.md).
"""


def page() -> str:
    """The page's text."""
    parts = (f"## {name}\n\n{line}\n\n```text\n{recipe(name)}\n```\n" for name, line in list_recipes().items())
    return "\n".join([HEAD, *parts])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

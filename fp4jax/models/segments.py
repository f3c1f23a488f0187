"""Which layers of a model share a program: runs of neighbours whose recipes agree."""

import dataclasses
from collections.abc import Sequence

from fp4jax.policy import Policy
from fp4jax.recipes import Recipe


@dataclasses.dataclass(frozen=True)
class Products:
    """Everything static about a block's matrix products."""

    recipes: tuple[Recipe, ...]  # of the block's linears, in order
    backend: str
    gemm: str


def segments(
    linears: Sequence[str], num_layers: int, policy: Policy, backend: str, gemm: str
) -> tuple[tuple[range, Products], ...]:
    """Runs of neighbouring layers whose recipes agree: each is one scan.

    Args:
      linears: the linear layers of a block, in order; policies know them as "layers.{i}.{linear}".

    Raises:
      ValueError: a rule of the policy that matches no layer.
    """
    paths = tuple(f"layers.{layer}.{linear}" for layer in range(num_layers) for linear in linears)
    recipes = tuple(policy.assign(paths).values())
    found: list[tuple[range, Products]] = []
    for layer in range(num_layers):
        first = layer * len(linears)
        products = Products(recipes[first : first + len(linears)], backend, gemm)
        if found and found[-1][1] == products:
            found[-1] = (range(found[-1][0].start, layer + 1), products)
        else:
            found.append((range(layer, layer + 1), products))
    return tuple(found)

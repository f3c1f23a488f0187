"""The type checker that tests put around every function of fp4jax: beartype, with one exemption."""

import functools
from collections.abc import Callable

import jax
from beartype import beartype


def check(function: Callable) -> Callable:
    """`beartype(function)`. The constructor of a registered pytree is left unchecked.

    JAX rebuilds pytrees with whatever stands for their leaves at the time: abstract values, axis numbers, None.
    """
    checked = beartype(function)
    if function.__name__ != "__init__":
        return checked

    @functools.wraps(function)
    def init(self, *args, **kwargs):
        is_pytree = not jax.tree_util.all_leaves([self])
        return None if is_pytree else checked(self, *args, **kwargs)

    return init

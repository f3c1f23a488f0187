"""Equinox: a model of equinox modules under a policy, inside the function that is differentiated.

    def loss(model, x, y, key):
        model = fp4jax.equinox.quantize(model, "averis", key=key)
        return jnp.mean((jax.vmap(model)(x) - y) ** 2)

The model that is trained and saved stays as it is. Equinox models take one example and are vmapped over the batch:
under `vmap` the examples are tokens of one product, which share means and maxima (a single token would be its own
mean).

A layer that is called several times draws the same bits in every call, as its key is part of the model: quantize a
recurrent cell where it is called, with a key for every step.

    def step(h, x_and_key):
        x, key = x_and_key
        h = fp4jax.equinox.quantize(cell, "averis", key=key)(x, h)
        return h, h

    jax.lax.scan(step, h, (xs, jax.random.split(key, len(xs))))
"""

from collections.abc import Callable

import jax
import numpy as np

try:
    import equinox as eqx
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("fp4jax.equinox needs the package equinox: pip install equinox") from error

from fp4jax import intercept
from fp4jax.dot import dot_general
from fp4jax.policy import Policy, as_policy
from fp4jax.recipes import Recipe

_ROOT = "model"  # the path of a model that is itself one layer
_NOT_LINEAR = (eqx.nn.Embedding, eqx.nn.Conv, eqx.nn.ConvTranspose, eqx.nn.LayerNorm, eqx.nn.RMSNorm, eqx.nn.GroupNorm)


class Quantized(eqx.Module):
    """A module whose call has the products of its own weights quantized; its fields are the module's.

    Attributes:
      module: as it was.
      key: a JAX random key, or None.
    """

    module: eqx.Module
    key: jax.Array | None
    recipe: Recipe = eqx.field(static=True)
    path: str = eqx.field(static=True)
    backend: str = eqx.field(static=True)
    gemm: str = eqx.field(static=True)

    def __call__(self, *args, **kwargs):
        """The module's call."""
        drawn = 0

        def product(lhs, rhs, dimension_numbers, **options):
            nonlocal drawn
            key = None if self.key is None else jax.random.fold_in(self.key, drawn)
            drawn += 1
            return dot_general(
                lhs, rhs, dimension_numbers, recipe=self.recipe, key=key, backend=self.backend, gemm=self.gemm,
                **options,
            )  # fmt: skip

        module = intercept.as_jax(self.module)
        arguments = intercept.arguments_as_jax((args, kwargs))
        leaves, structure = jax.tree.flatten(arguments)

        def call():
            result = module(*arguments[0], **arguments[1])
            intercept.check_arguments(arguments, leaves, structure, self.path)
            return result

        result, replaced = intercept.call(call, _own_weights(module), product, self.path)
        if not replaced:
            intercept.report_no_product(self.path)
        return result

    def __getattr__(self, name: str):
        if name.startswith("__") or name == "module":
            raise AttributeError(name)
        value = getattr(self.module, name)
        if callable(getattr(type(self.module), name, None)):
            intercept.report_left((self.path,), f"its method {name} is not __call__ and stays as it is")
        return value


def quantize(
    model: eqx.Module, policy: Policy | str | Recipe, *, key=None, backend: str = "auto", gemm: str = "auto"
) -> eqx.Module:
    """The model with its linear layers under a policy. Call it in the loss, with a fresh key every step.

    Args:
      model: any Equinox model. Its linear layers are the modules that own an array of two axes or more (also in a
        list, tuple or dictionary) and have a `__call__`, but embeddings, convolutions and norms of Equinox. Other
        modules that own such an array are logged as a warning. In a model of stacked layers that are scanned, quantize
        the layer in the scan's body.
      policy: rules over the layers' paths, such as "layers.0"; or one recipe for all of them.
      key: a JAX random key, needed where a recipe draws: for gradients only when differentiated. Every layer folds
        its own from it, and its calls draw the same bits: quantize one that is called several times (a recurrent cell,
        shared blocks) where it is called, with a key for every call.

    Returns:
      A copy of the model; `layers` lists the recipes.

    Raises:
      ValueError: a model without linear layers or quantized already, a rule that matches no layer. When called: a
        product of a weight that cannot be replaced (`fp4jax.origins`).
    """
    assigned = layers(model, policy)
    numbers = {path: number for number, path in enumerate(assigned)}

    def wrap(path, module):
        if not callable(module) or assigned[path].is_high_precision:
            return module
        own_key = None if key is None else jax.random.fold_in(key, numbers[path])
        return Quantized(module, own_key, assigned[path], path, backend, gemm)

    return _map_owners(wrap, model)


def layers(model: eqx.Module, policy: Policy | str | Recipe) -> dict[str, Recipe]:
    """The recipe that `quantize` gives every linear layer, by its path.

    >>> model = eqx.nn.MLP(16, 4, width_size=32, depth=1, key=jax.random.key(0))
    >>> policy = Policy.of(("layers.1", "bf16"), (".", "averis"))
    >>> {path: recipe.name for path, recipe in layers(model, policy).items()}
    {'layers.0': 'averis', 'layers.1': 'bf16'}

    Raises:
      ValueError: as `quantize`.
    """
    paths, left = [], []

    def note(path, module):
        if isinstance(module, Quantized):
            raise ValueError(f"{path} is quantized already: quantize the model as it was")
        (paths if callable(module) else left).append(path)
        return module

    _map_owners(note, model)
    if not paths:
        raise ValueError(
            f"{type(model).__name__} has no linear layer: no module in it has a __call__ and owns an array of two axes "
            "or more"
        )
    if left:
        intercept.report_left(tuple(left), f"modules of {type(model).__name__} without a __call__")
    return as_policy(policy).assign(paths)


def _map_owners(function: Callable, node: eqx.Module, path: tuple[str, ...] = ()) -> eqx.Module:
    """The model with `function(path, module)` in the place of every module that owns a matrix, inner ones first."""
    children, tree = jax.tree_util.tree_flatten_with_path(
        node, is_leaf=lambda child: child is not node and isinstance(child, eqx.Module)
    )
    parts = [tuple(str(getattr(key, "name", getattr(key, "idx", getattr(key, "key", key)))) for key in keys)
             for keys, _ in children]  # fmt: skip
    mapped = [
        _map_owners(function, child, path + part) if isinstance(child, eqx.Module) else child
        for part, (_, child) in zip(parts, children, strict=True)
    ]
    node = jax.tree.unflatten(tree, mapped)
    return function(".".join(path) or _ROOT, node) if _owns_a_matrix(node) else node


def _owns_a_matrix(node) -> bool:
    if isinstance(node, Quantized):
        return True
    if not isinstance(node, eqx.Module) or isinstance(node, _NOT_LINEAR):
        return False
    return any(weight.ndim >= 2 for weight in _own_weights(node))


def _own_weights(module: eqx.Module) -> list[jax.Array | np.ndarray]:
    """The arrays among the module's own fields, also in containers."""
    leaves = jax.tree.leaves(vars(module), is_leaf=lambda child: isinstance(child, eqx.Module))
    return [leaf for leaf in leaves if eqx.is_inexact_array(leaf) and isinstance(leaf, jax.Array | np.ndarray)]

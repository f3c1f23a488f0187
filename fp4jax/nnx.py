"""flax.nnx: the slot of one layer, and whole models that others wrote.

    nnx.Linear(512, 1024, dot_general=fp4jax.nnx.DotGeneral("averis", rngs=rngs), rngs=rngs)
    fp4jax.nnx.quantize(model, fp4jax.Policy.of(("lm_head", "bf16"), (".", "averis")), rngs=nnx.Rngs(fp4=0))

`nnx.Linear`, `LinearGeneral` (so `MultiHeadAttention`) and `Einsum` have slots. Any other module that owns a weight of
two axes or more (a subclass of these with a `__call__` of its own, too) gets a generated subclass, whose `__call__` is
that of the module with the products of its own weights quantized (`fp4jax.intercept`).
"""

import functools
import logging
from collections.abc import Iterator

import jax
import numpy as np
from flax import nnx

from fp4jax import intercept, nnx_call
from fp4jax.dot import dot_general, implementation
from fp4jax.equation import einsum
from fp4jax.policy import Policy, as_policy, describe
from fp4jax.recipes import Recipe, as_recipe

RNG_STREAM = "fp4"

_ATTRIBUTE = "fp4"  # of an intercepted module: its `DotGeneral`
_ROOT = "model"  # the path of a model that is itself one layer
# Own weights of two axes or more which they do not multiply by, or multiply as something else than a matrix.
_NOT_LINEAR = (nnx.Embed, nnx.Conv, nnx.ConvTranspose, nnx.LayerNorm, nnx.RMSNorm, nnx.BatchNorm, nnx.GroupNorm)
# Hold other modules' weights and multiply nothing themselves.
_CONTAINERS = (nnx.List, nnx.Dict, list, tuple, dict)
# Classes of flax.nnx whose `__call__` multiplies by what this attribute holds.
_SLOTS = {nnx.Linear: "dot_general", nnx.LinearGeneral: "dot_general", nnx.Einsum: "einsum_op"}
_log = logging.getLogger("fp4jax")


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
        _check_stream(self.recipe, rngs, rng_stream)
        self.stream = rngs[rng_stream].fork() if _draws(self.recipe) else None
        self.deterministic = deterministic
        self.backend = backend
        self.gemm = gemm

    def __call__(self, lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None, *, out_sharding=None):
        """`lax.dot_general`'s signature: the layer passes its input and its kernel."""
        return dot_general(
            lhs, rhs, dimension_numbers, precision, preferred_element_type, out_sharding=out_sharding,
            recipe=self.recipe, key=self.draw_key(), backend=self.backend, gemm=self.gemm,
        )  # fmt: skip

    def draw_key(self) -> jax.Array | None:
        """The next key of the stream, or None where the recipe needs none."""
        needs_key = self.stream is not None and (self.recipe.forward_draws or not self.deterministic)
        return self.stream() if needs_key else None


def _draws(recipe: Recipe) -> bool:
    return recipe.forward_draws or recipe.gradient_draws


def _check_stream(recipe: Recipe, rngs: nnx.Rngs | None, name: str) -> None:
    if _draws(recipe) and (rngs is None or not {name, "default"} & set(rngs)):
        raise ValueError(f"recipe {recipe.name} rounds stochastically: pass rngs=nnx.Rngs({name}=0)")


class Einsum(DotGeneral):
    """`jnp.einsum` under a recipe, as `nnx.Einsum` calls its `einsum_op`: (equation, activations, weights)."""

    def __call__(self, equation, x, w, *, precision=None, preferred_element_type=None, out_sharding=None):
        return einsum(
            equation, x, w, precision=precision, preferred_element_type=preferred_element_type,
            out_sharding=out_sharding, recipe=self.recipe, key=self.draw_key(), backend=self.backend, gemm=self.gemm,
        )  # fmt: skip


def quantize(
    model: nnx.Module,
    policy: Policy | str | Recipe,
    *,
    rngs: nnx.Rngs | None = None,
    rng_stream: str = RNG_STREAM,
    backend: str = "auto",
    gemm: str = "auto",
) -> dict[str, Recipe]:
    """Puts the linear layers of a whole model under a policy, in place; `restore` takes it back.

    >>> model = nnx.Sequential(nnx.Linear(64, 32, rngs=nnx.Rngs(0)), nnx.relu)
    >>> {path: recipe.name for path, recipe in quantize(model, "averis", rngs=nnx.Rngs(fp4=0)).items()}
    {'layers.0': 'averis'}
    >>> restore(model)
    ['layers.0']

    Parameters stay what and where they are. Every quantized layer gets a random stream of its own, which is part of the
    model's state as Dropout's is. Layers that the policy leaves in high precision are not touched. All layers are
    checked before the first is changed: a model that is refused is as it was.

    Args:
      model: any nnx model. Its linear layers are `nnx.Linear`, `LinearGeneral`, `Einsum`, and the modules that own an
        `nnx.Param` of two axes or more (also in an `nnx.List` or `nnx.Dict`) and have a `__call__`, but embeddings,
        convolutions and norms of flax.nnx. Other modules that own such a weight are logged as a warning.
      policy: rules over the layers' paths, such as "layers.3.mlp.gate_proj"; or one recipe for all of them.
      rngs: forked for the stream `rng_stream`; may be None if no recipe draws.

    Returns:
      The recipe of every linear layer by its path, those in high precision too.

    Raises:
      ValueError: a model without linear layers, one that is quantized already or has products of its own in a slot; a
        rule that matches no layer; a recipe that draws without `rngs`; an unknown `backend` or `gemm`. In a later call:
        a product of a weight that cannot be replaced (`fp4jax.origins`); an intercepted layer that changes a list or
        dictionary among its arguments, or a plain attribute (`fp4jax.nnx_call`).
      NotImplementedError: a `backend` or `gemm` that this device cannot serve.
    """
    layers = _linear_layers(model)
    assigned = as_policy(policy).assign(layers)
    options = {"rngs": rngs, "rng_stream": rng_stream, "backend": backend, "gemm": gemm}
    quantized = {path: recipe for path, recipe in assigned.items() if not recipe.is_high_precision}
    implementation(backend, gemm)
    for path, recipe in quantized.items():
        _check_stream(recipe, rngs, rng_stream)
        _check_free(layers[path], path)
        _check_not_stacked(layers[path], path)
    for path, recipe in quantized.items():
        _install(layers[path], path, _new_slot(layers[path], recipe, options))
    _log.info("%s", describe(assigned))
    return assigned


def restore(model: nnx.Module) -> list[str]:
    """Undoes `quantize`: the modules, their classes and their state as they were before.

    Returns:
      The paths of the layers that were quantized.

    Raises:
      ValueError: a model without quantized layers.
    """
    found = []
    for path, module in nnx.iter_modules(model):
        if _is_intercepted(module):
            module.__class__ = type(module).__base__
            delattr(module, _ATTRIBUTE)
            delattr(module, _PATH)
        elif isinstance(module, nnx.Linear | nnx.LinearGeneral) and isinstance(module.dot_general, DotGeneral):
            module.dot_general = nnx.static(jax.lax.dot_general)
        elif isinstance(module, nnx.Einsum) and isinstance(module.einsum_op, Einsum):
            module.einsum_op = nnx.static(jax.numpy.einsum)
        else:
            continue
        found.append(_dotted(path))
    if not found:
        raise ValueError("the model has no quantized layers to restore; fp4jax.nnx.quantize(model, policy) makes them")
    return found


_PATH = "fp4_path"


def _dotted(path) -> str:
    return ".".join(map(str, path)) or _ROOT


def _linear_layers(model: nnx.Module) -> dict[str, nnx.Module]:
    found, left = {}, []
    for path, module in nnx.iter_modules(model):
        if _is_intercepted(module) or isinstance(module, DotGeneral):
            raise ValueError(f"{_dotted(path)} is quantized already; call fp4jax.nnx.restore(model) first")
        if not isinstance(module, _CONTAINERS + _NOT_LINEAR) and _owns_a_matrix(module):
            if callable(module):
                found[_dotted(path)] = module
            else:
                left.append(_dotted(path))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no linear layer: no module in it has a __call__ and owns an nnx.Param of two "
            "axes or more"
        )
    if left:
        intercept.report_left(tuple(left), f"modules of {type(model).__name__} without a __call__")
    return found


def _slot_of(module: nnx.Module) -> str | None:
    """The attribute that holds the module's product, if its call is that of flax.nnx: another's may not use it."""
    return next((name for cls, name in _SLOTS.items() if type(module).__call__ is cls.__call__), None)


def _owns_a_matrix(module: nnx.Module) -> bool:
    return any(weight.ndim >= 2 for weight in _own_weights(module))


def _own_weights(module: nnx.Module) -> list[jax.Array | np.ndarray]:
    """The values of the Params that are the module's own attributes, or in a container that is one.

    Raw: what a variable's `on_get_value` makes of them is computed in the call, from these.
    """
    return [leaf for variable in _own_params(vars(module)) for leaf in jax.tree.leaves(variable.get_raw_value())]


def _own_params(values: dict) -> Iterator[nnx.Param]:
    for name, value in values.items():
        if isinstance(value, nnx.Param):
            yield value
        elif isinstance(value, _CONTAINERS) and not str(name).startswith("_pytree"):
            inner = vars(value) if isinstance(value, nnx.Module) else value
            yield from _own_params(inner if isinstance(inner, dict) else dict(enumerate(inner)))


def _is_intercepted(module: nnx.Module) -> bool:
    return _ATTRIBUTE in vars(module) and isinstance(getattr(module, _ATTRIBUTE), DotGeneral)


def _new_slot(module: nnx.Module, recipe: Recipe, options) -> DotGeneral:
    return (Einsum if _slot_of(module) == "einsum_op" else DotGeneral)(recipe, **options)


def _install(module: nnx.Module, path: str, slot: DotGeneral) -> None:
    name = _slot_of(module)
    if name is not None:
        setattr(module, name, nnx.data(slot))
        return
    setattr(module, _ATTRIBUTE, slot)
    setattr(module, _PATH, path)
    module.__class__ = _intercepting(type(module))


def _check_free(module: nnx.Module, path: str) -> None:
    name = _slot_of(module) or _ATTRIBUTE
    value = getattr(module, "dot_general_cls", None) if name == "dot_general" else None
    value = value or getattr(module, name, None)
    if not any(value is free for free in (None, jax.lax.dot_general, jax.numpy.einsum)):
        raise ValueError(
            f"{path} has a {name} of its own ({value!r}): leave the layer out by a rule (its path, 'bf16') before the "
            "others, or set it back"
        )


def _check_not_stacked(module: nnx.Module, path: str) -> None:
    """One stream cannot serve layers that `nnx.scan` takes apart; for classes whose kernel's axes are known."""
    match _slot_of(module), module:
        case "dot_general", nnx.Linear():
            axes = 2
        case "dot_general", _:
            axes = len(module.batch_axis) + len(module.axis) + len(module.out_features)
        case "einsum_op", _:
            axes = len(module.kernel_shape)
        case _:
            return
    if module.kernel.ndim != axes:
        raise ValueError(
            f"{path} has a kernel of {module.kernel.ndim} axes in place of {axes}, as layers stacked by nnx.vmap have: "
            "call fp4jax.nnx.quantize on the layer inside the function that is vmapped"
        )


@functools.cache
def _intercepting(cls: type) -> type:
    """The subclass of a module's class whose `__call__` multiplies by the module's weights under its recipe."""

    def __call__(self, *args, **kwargs):
        slot, path = getattr(self, _ATTRIBUTE), getattr(self, _PATH)
        return nnx_call.call(self, cls.__call__, args, kwargs, _own_weights(self), slot, path)

    names = ("__module__", "__qualname__", "__doc__")
    return type(cls)(cls.__name__, (cls,), {"__call__": __call__} | {name: getattr(cls, name) for name in names})

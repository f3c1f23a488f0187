"""flax.linen: the slot of one layer, and whole models that others wrote.

    nn.Dense(1024, dot_general_cls=fp4jax.linen.dot_general_cls("averis"))
    model = fp4jax.linen.quantize(model, fp4jax.Policy.of(("lm_head", "bf16"), (".", "averis")))

Dense and DenseGeneral make one `DotGeneral` a layer, so its random stream is the layer's own. `quantize` needs no slot:
it intercepts the calls of the modules that own weights (`nn.intercept_methods`, `fp4jax.intercept`).
"""

import contextlib
import dataclasses
import functools
import logging

import flax.linen as nn
import jax
import numpy as np

from fp4jax import intercept, scopes
from fp4jax.dot import dot_general
from fp4jax.policy import Policy, as_policy, describe
from fp4jax.recipes import Recipe, as_recipe

RNG_STREAM = "fp4"

# Own weights of two axes or more which they do not multiply by, or multiply as something else than a matrix.
_NOT_LINEAR = (nn.Embed, nn.Conv, nn.ConvTranspose, nn.ConvLocal, nn.LayerNorm, nn.RMSNorm, nn.BatchNorm, nn.GroupNorm)
_ROOT = "model"  # the path of a model that is itself one layer
_ARRAYS = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)
_log = logging.getLogger("fp4jax")

# Part of the key of JAX's caches. `nn.jit` keeps what it traced by module and shapes, which are the same with and
# without a policy: without this a model and its quantized self would be given each other's programs.
_QUANTIZED = jax.make_user_context(None)


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


def quantize(
    module: nn.Module,
    policy: Policy | str | Recipe,
    *,
    rng_stream: str = RNG_STREAM,
    backend: str = "auto",
    gemm: str = "auto",
) -> "Quantized":
    """A whole model under a policy: to be initialized and applied as `module` is, with the same variables.

    >>> import jax.numpy as jnp
    >>> model, x = quantize(nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(16)]), "averis"), jnp.ones((4, 64))
    >>> variables = jax.eval_shape(model.init, jax.random.key(0), x)
    >>> {path: recipe.name for path, recipe in model.layers(variables, x).items()}
    {'layers_0': 'averis', 'layers_2': 'averis'}

    Pass the random stream to `apply`: `rngs={"fp4": key}`, under `nn.scan` also `split_rngs={"fp4": True}`. Without it
    evaluation works, and differentiation of a recipe that draws raises a ValueError.

    Args:
      module: any Linen model. Its linear layers are the modules that own a parameter of two axes or more and multiply
        by it in their `__call__`; embeddings, convolutions and norms of Linen are none.
      policy: rules over the layers' paths, such as "layer_0.attn.q_einsum"; or one recipe for all of them.

    Raises:
      ValueError: no Linen module, or an unknown recipe. When applied: a product of a weight that cannot be replaced
        (`fp4jax.origins`).
    """
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"quantize takes a flax.linen module, got {type(module).__name__}; see fp4jax.nnx for nnx models"
        )
    return Quantized(module, as_policy(policy), rng_stream, backend, gemm)


@dataclasses.dataclass(frozen=True, eq=False)  # as a key of caches it is itself alone: `_seen` is of its own traces
class Quantized:
    """A Linen module whose every call runs under a policy; `module` is the module as it was.

    `apply`, `init` and the module's other methods and fields are the module's own; they are run with its layers
    quantized.
    """

    module: nn.Module
    policy: Policy
    rng_stream: str
    backend: str
    gemm: str
    # Products of every layer met so far, by path. Calls that find their program in a cache meet none.
    _seen: dict[str, int] = dataclasses.field(default_factory=dict, init=False, repr=False)
    _told: set[tuple] = dataclasses.field(default_factory=set, repr=False)  # warnings that were logged

    def __getattr__(self, name: str):
        if name.startswith("__") or name == "module":  # as copies and pickles ask before there are fields
            raise AttributeError(name)
        value = getattr(self.module, name)
        if not callable(value):
            return value

        @functools.wraps(value)
        def under_the_policy(*args, **kwargs):
            with self._intercepted():
                result = value(*args, **kwargs)
            if isinstance(result, nn.Module):
                raise ValueError(
                    f"{name} gives a module that is not under the policy: use apply, or quantize what {name} of the "
                    "module itself gives"
                )
            return result

        return under_the_policy

    def apply(self, variables, *args, rngs=None, method=None, **kwargs):
        """`module.apply`.

        Raises:
          ValueError: a whole model (no other `method` than "__call__") has no linear layer, or a rule of the policy
            matches none.
        """
        args, kwargs = intercept.arguments_as_jax((args, kwargs))
        with self._intercepted():
            result = self.module.apply(intercept.as_jax(variables), *args, rngs=rngs, method=method, **kwargs)
        if method in (None, "__call__"):
            self._check()
        return result

    def layers(self, variables, *args, **kwargs) -> dict[str, Recipe]:
        """The recipe of every linear layer that `apply(variables, ...)` multiplies by, by path; nothing is computed.

        Raises:
          ValueError: as `apply`.
        """
        fresh = dataclasses.replace(self)  # has met nothing and traces everything
        leaves, tree = jax.tree.flatten(((variables, *args), kwargs))
        arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, _ARRAYS)}

        def apply(arrays):
            args, kwargs = jax.tree.unflatten(tree, [arrays.get(i, leaf) for i, leaf in enumerate(leaves)])
            return self.module.apply(*args, **kwargs)

        with fresh._intercepted(shapes_only=True):
            jax.eval_shape(apply, arrays)
        fresh._check()
        return {path: self.policy.recipe_for(path) for path in fresh._seen}

    @contextlib.contextmanager
    def _intercepted(self, shapes_only: bool = False):
        with _QUANTIZED(self), nn.intercept_methods(_Interceptor(self, self._seen, shapes_only)):
            yield

    def _check(self) -> None:
        if not self._seen:
            raise ValueError(
                f"{type(self.module).__name__} has no linear layer: no module in it multiplies by its own parameter"
            )
        _log.debug("%s", describe(self.policy.assign(self._seen)))


@dataclasses.dataclass
class _Interceptor:
    """What `nn.intercept_methods` calls in place of every method.

    Attributes:
      seen: products of every layer by its path, filled as layers are called.
      shapes_only: nothing is computed, and a missing random stream is no error.
      running: the paths of the layers whose calls are under way.
    """

    model: Quantized
    seen: dict[str, int]
    shapes_only: bool
    running: list[str] = dataclasses.field(default_factory=list)

    def __call__(self, method, args, kwargs, context):
        module, name = context.module, context.method_name
        if module.scope is None or module.is_initializing() or not _may_be_linear(module):
            return method(*args, **kwargs)
        path = ".".join(module.path) or _ROOT
        recipe = self.model.policy.recipe_for(path)
        if name != "__call__":
            result = method(*args, **kwargs)
            if not recipe.is_high_precision:
                self._report_left(module, path, name)
            return result
        self.running.append(path)
        try:
            return self._run(module, path, recipe, method, args, kwargs)
        finally:
            self.running.pop()

    def _run(self, module: nn.Module, path: str, recipe: Recipe, method, args, kwargs):
        state = _MutableState(module.scope)

        def function():
            result = method(*args, **kwargs)
            return result, state.changes()

        product = functools.partial(self._product, module, recipe)
        (result, changes), replaced = intercept.call(
            function, _own_weights(module), product, path, refuse=not recipe.is_high_precision
        )
        state.write(changes)
        if replaced:
            self.seen[path] = self.seen.get(path, 0) + replaced
        elif not recipe.is_high_precision and path not in self.seen and self.running.count(path) == 1:
            intercept.report_no_product(path, self.model._told)  # nor did a call of the same layer, as `super()`'s
        return result

    def _report_left(self, module: nn.Module, path: str, method_name: str) -> None:
        if method_name == "setup":
            for name in _changed_in_setup(module):
                why = f"setup changes the weight in {name}, which is not followed: cast or reshape it in __call__"
                intercept.report_left((path,), why, self.model._told)
        elif path not in self.running:
            why = f"its method {method_name} is not __call__ and stays as it is"
            intercept.report_left((path,), why, self.model._told)

    def _product(self, module: nn.Module, recipe: Recipe, lhs, rhs, dimension_numbers, **options):
        if recipe.is_high_precision:  # as it was written, integers too
            with scopes.of_recipe(recipe.name):
                return jax.lax.dot_general(lhs, rhs, dimension_numbers, **options)
        stream, key = self.model.rng_stream, None
        if recipe.forward_draws or recipe.gradient_draws:
            if module.has_rng(stream):
                key = module.make_rng(stream)
            elif self.shapes_only:
                key = jax.random.key(0)
        return dot_general(
            lhs, rhs, dimension_numbers, recipe=recipe, key=key, backend=self.model.backend, gemm=self.model.gemm,
            **options,
        )  # fmt: skip


class _MutableState:
    """The variables that a call may change (`sow`, running statistics), to carry what it changed out of a trace."""

    def __init__(self, scope):
        self.scope = scope
        self.before = self._values()

    def _values(self) -> dict:
        """A copy of the dictionaries; the arrays are the same objects."""
        return jax.tree.map(lambda leaf: leaf, dict(self.scope.mutable_variables()))

    def changes(self) -> dict:
        """Collections with a value that is new."""
        now = self._values()
        return {name: tree for name, tree in now.items() if not _same(tree, self.before.get(name))}

    def write(self, changes: dict) -> None:
        for collection, tree in changes.items():
            _write(self.scope._mutable_collection(collection), tree)


def _same(tree, other) -> bool:
    leaves, others = jax.tree.leaves(tree), jax.tree.leaves(other)
    return len(leaves) == len(others) and all(a is b for a, b in zip(leaves, others, strict=True))


def _write(target: dict, tree: dict) -> None:
    """`tree`'s leaves into the nested dictionaries of `target`, which scopes of submodules share."""
    for name, value in tree.items():
        if isinstance(value, dict) and isinstance(target.get(name), dict):
            _write(target[name], value)
        else:
            target[name] = value


def _own_weights(module: nn.Module) -> list[jax.Array]:
    """The parameters of the module itself, without those of its submodules."""
    own = module.scope.variables().get("params", {})
    return [leaf for value in own.values() if not isinstance(value, dict) for leaf in jax.tree.leaves(value)]


def _changed_in_setup(module: nn.Module) -> list[str]:
    """Attributes that `setup` has made of a weight which it has not kept itself, as their sizes tell."""
    fields = {field.name for field in dataclasses.fields(module)}
    made = {name: jax.tree.leaves(value) for name, value in vars(module).items() if name not in fields}
    kept = {id(leaf) for leaves in made.values() for leaf in leaves}
    changed = {weight.size for weight in _own_weights(module) if weight.ndim >= 2 and id(weight) not in kept}
    own = {id(weight) for weight in _own_weights(module)}
    return [
        name for name, leaves in made.items()
        if any(isinstance(leaf, jax.Array) and id(leaf) not in own and leaf.size in changed for leaf in leaves)
    ]  # fmt: skip


def _may_be_linear(module: nn.Module) -> bool:
    if isinstance(module, (*_NOT_LINEAR, DotGeneral)):
        return False
    return any(weight.ndim >= 2 for weight in _own_weights(module))

"""Quantized products inside code that offers no slot: trace the call, follow the weights, replace what they multiply.

A layer's call is traced to a jaxpr. An array that is computed from the layer's weights alone (cast, transposed, a slice
of them) is a weight; anything that depends on the call's inputs is data. The products of data and a weight are then
evaluated under the recipe, everything else as it was written. So `jnp.einsum`, `jnp.dot`, `@` and `lax.dot_general` are
all found, attention products never are, and nothing is guessed from shapes. Nothing global is replaced either:
`jnp.dot` and its like are cached by JAX once traced, so a replaced `lax.dot_general` would stay in them.
"""

import enum
from collections.abc import Callable, Sequence

import jax
from jax.extend import core

from fp4jax.equation import dot_general_in_any_order

# Called as `lax.dot_general`, with activations first.
Product = Callable[..., jax.Array]


class Origin(enum.Enum):
    """What an array is computed from."""

    CONSTANT = 0  # nothing but literals
    WEIGHT = 1  # weights, and constants
    DATA = 2


_INLINED = frozenset({"jit", "pjit", "closed_call", "core_call"})
_REMATERIALIZED = frozenset({"checkpoint", "remat", "remat2"})
# Primitives with a body whose products cannot be replaced: the body, and the operands that are its arguments.
_LOOPS = {
    "scan": lambda params, operands: [(params["jaxpr"], operands)],
    "while": lambda params, operands: [(params["body_jaxpr"], operands[params["cond_nconsts"] :])],
    "cond": lambda params, operands: [(branch, operands[1:]) for branch in params["branches"]],
}


def call(function: Callable, weights: Sequence[jax.Array], product: Product, where: str):
    """`function()` with every product of data and one of `weights` made by `product`.

    Args:
      function: of no arguments; `weights` are arrays that it closes over.
      where: the layer's path, for errors.

    Returns:
      (function's result, number of products that were replaced).

    Raises:
      ValueError: a product of two weights, or of a weight inside a loop, with what to do instead.
    """
    static = {}

    def arrays():
        leaves, static["tree"] = jax.tree.flatten(function())
        static["leaves"] = [None if _is_array(leaf) else leaf for leaf in leaves]
        return [leaf for leaf in leaves if _is_array(leaf)]

    closed = jax.make_jaxpr(arrays)()
    owned = {id(weight) for weight in weights}
    origins = [Origin.WEIGHT if id(const) in owned else Origin.DATA for const in closed.consts]
    evaluation = _Evaluation(product, where)
    results = iter(evaluation.run(closed.jaxpr, closed.consts, (), origins, ())[0])
    leaves = [next(results) if leaf is None else leaf for leaf in static["leaves"]]
    return jax.tree.unflatten(static["tree"], leaves), evaluation.replaced


def _is_array(leaf) -> bool:
    return hasattr(leaf, "dtype") and hasattr(leaf, "shape")


class _Evaluation:
    """Evaluates a jaxpr with the origin of every value beside it."""

    def __init__(self, product: Product, where: str):
        self.product = product
        self.where = where
        self.replaced = 0

    def run(self, jaxpr, consts, args, const_origins, arg_origins) -> tuple[list, list[Origin]]:
        known = {}

        def read(atom):
            return (atom.val, Origin.CONSTANT) if isinstance(atom, core.Literal) else known[atom]

        known.update(zip(jaxpr.constvars, zip(consts, const_origins, strict=True), strict=True))
        known.update(zip(jaxpr.invars, zip(args, arg_origins, strict=True), strict=True))
        for equation in jaxpr.eqns:
            values, origins = zip(*map(read, equation.invars), strict=True) if equation.invars else ((), ())
            with equation.ctx.manager:
                results, result_origins = self.equation(equation, values, origins)
            known.update(zip(equation.outvars, zip(results, result_origins, strict=True), strict=True))
        pairs = [read(atom) for atom in jaxpr.outvars]
        return [value for value, _ in pairs], [origin for _, origin in pairs]

    def equation(self, equation, values, origins):
        """(results, their origins) of one equation."""
        name, params = equation.primitive.name, equation.params
        if name in _INLINED:
            body = params.get("jaxpr", params.get("call_jaxpr"))
            return self._inline(body, values, origins)
        if name in _REMATERIALIZED:
            return self._rematerialized(params, values, origins)
        origin = max(origins, key=lambda origin: origin.value, default=Origin.CONSTANT)
        if name == "dot_general" and Origin.WEIGHT in origins:
            self._refuse_two_weights(origins)
            if Origin.DATA in origins:
                with jax.named_scope(str(equation.source_info.name_stack) or "linear"):
                    return [self._multiply(*values, origins, **params)], [Origin.DATA]
        for body, positions in _LOOPS.get(name, lambda *_: [])(params, list(range(len(values)))):
            self._refuse_weights_in(name, body, [origins[position] for position in positions])
        bound = equation.primitive.get_bind_params(params)
        # Before JAX 0.12 a pair: functions that were parameters, and the rest.
        subfunctions, bound = bound if isinstance(bound, tuple) else ((), bound)
        results = equation.primitive.bind(*subfunctions, *values, **bound)
        results = list(results) if equation.primitive.multiple_results else [results]
        return results, [origin] * len(results)

    def _multiply(self, lhs, rhs, origins, dimension_numbers, **options):
        self.replaced += 1
        weight = origins.index(Origin.WEIGHT)
        return dot_general_in_any_order(self.product, lhs, rhs, dimension_numbers, weight, **options)

    def _inline(self, body, values, origins):
        jaxpr, consts = (body.jaxpr, body.consts) if isinstance(body, core.ClosedJaxpr) else (body, ())
        return self.run(jaxpr, consts, values, [Origin.CONSTANT] * len(consts), origins)

    def _rematerialized(self, params, values, origins):
        result_origins = []

        def body(*values):
            results, result_origins[:] = self._inline(params["jaxpr"], values, origins)
            return results

        results = jax.checkpoint(body, prevent_cse=params["prevent_cse"], policy=params["policy"])(*values)
        return results, result_origins

    def _refuse_two_weights(self, origins) -> None:
        if origins.count(Origin.WEIGHT) == 2:
            raise ValueError(
                f"{self.where} multiplies two of its own weights, and which holds activations is not known: leave "
                "it out by a rule (its path, 'bf16') before the others, or call fp4jax.einsum in it"
            )

    def _refuse_weights_in(self, name: str, body, origins) -> None:
        """Raises if a loop multiplies by a weight: its body cannot be given another product from outside."""
        probe = _Evaluation(self.product, self.where)
        probe.product = lambda lhs, rhs, numbers, **options: jax.lax.dot_general(lhs, rhs, numbers, **options)
        jaxpr = body.jaxpr if isinstance(body, core.ClosedJaxpr) else body

        def trace(*args):
            return probe._inline(body, args, origins)[0]

        jax.eval_shape(trace, *(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in jaxpr.invars))
        if probe.replaced:
            raise ValueError(
                f"{self.where} multiplies by its weight inside a {name}, where products cannot be replaced: quantize "
                "the module that the loop calls, call fp4jax.dot_general in it, or leave it out by a rule (its path, "
                "'bf16')"
            )

"""Quantized products inside code that offers no slot: trace the call, follow the weights, replace what they multiply.

A layer's call is traced to a jaxpr. An array that is computed from the layer's weights alone (cast, transposed, a slice
of them) is a weight; anything that depends on the call's inputs is data. The products of data and a weight are then
evaluated under the recipe, everything else as it was written. So `jnp.einsum`, `jnp.dot`, `@` and `lax.dot_general` are
all found, attention products never are, and nothing is guessed from shapes. What cannot be replaced is refused
(`fp4jax.origins`). Nothing global is replaced either: `jnp.dot` and its like are cached by JAX once traced, so a
replaced `lax.dot_general` would stay in them.
"""

import contextlib
import logging
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core, source_info_util

from fp4jax.equation import dot_general_in_any_order
from fp4jax.origins import CONSTANT, INLINED, REMATERIALIZED, Follower, Origin, Source, is_product

# Called as `lax.dot_general`, with activations first.
Product = Callable[..., jax.Array]

_log = logging.getLogger("fp4jax")


def call(
    function: Callable, weights: Sequence[jax.Array | np.ndarray], product: Product, where: str, refuse: bool = True
):
    """`function()` with every product of data and one of `weights` made by `product`.

    Args:
      function: of no arguments; `weights` are arrays that it closes over, JAX's and not NumPy's (`as_jax`).
      where: the layer's path, for errors.
      refuse: whether a product of a weight that cannot be replaced raises; False leaves it as it was written.

    Returns:
      (function's result, number of products that were replaced or, where they are not refused, left).

    Raises:
      ValueError: a product of a weight that cannot be replaced, or that `product` refuses, with what to do instead.
    """
    if any(isinstance(weight, np.ndarray) for weight in weights):
        raise ValueError(f"{where} owns a NumPy array, which a trace does not know again: make it a jax.Array")
    static = {}

    def arrays():
        leaves, static["tree"] = jax.tree.flatten(function())
        static["leaves"] = [None if _is_array(leaf) else leaf for leaf in leaves]
        return [leaf for leaf in leaves if _is_array(leaf)]

    closed = jax.make_jaxpr(arrays)()
    evaluation = _Evaluation(Follower(weights, where, refuse), product, where)
    results = iter(evaluation.run(closed.jaxpr, closed.consts, (), ())[0])
    leaves = [next(results) if leaf is None else leaf for leaf in static["leaves"]]
    return jax.tree.unflatten(static["tree"], leaves), evaluation.follower.products


def as_jax(tree):
    """The tree with NumPy arrays, as checkpoints give them, turned into JAX's: those a trace knows again."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, tree)


def arguments_as_jax(tree):
    """`as_jax` of a call's arguments, so that they count as data, whatever registered dataclass holds them."""
    return as_jax(tree)


def check_arguments(arguments, leaves: Sequence, structure, where: str, is_leaf: Callable | None = None) -> None:
    """Refuses a call that left in a list or dictionary of its arguments what they did not hold before.

    Args:
      arguments: those the call was given, copies of the caller's.
      leaves, structure: of these before the call.
      is_leaf: as it was used for the structure.

    Raises:
      ValueError: they differ.
    """
    now, structure_now = jax.tree.flatten(arguments, is_leaf=is_leaf)
    if structure_now != structure or any(new is not old for new, old in zip(now, leaves, strict=True)):
        raise ValueError(
            f"{where} changes a list or dictionary among its arguments in place, which a traced call loses: return "
            "what it adds, or leave the layer out by a rule (its path, 'bf16') before the others"
        )


_told: set[tuple] = set()  # by models that remember nothing between their calls


def report_no_product(where: str, told: set[tuple] = _told) -> None:
    """Says so, if `told` has not seen it said; give every model a set of its own."""
    _warn_once(told, "%s owns a weight and multiplied nothing by it: nothing of it runs under its recipe", where)


def report_left(paths: tuple[str, ...], why: str, told: set[tuple] = _told) -> None:
    """Says which modules own weights that stay in high precision, if `told` has not seen it said."""
    _warn_once(told, "weights left in high precision: %s: %s", why, ", ".join(paths))


def _warn_once(told: set[tuple], *message: str) -> None:
    if message not in told:
        told.add(message)
        _log.warning(*message)


def _is_array(leaf) -> bool:
    return hasattr(leaf, "dtype") and hasattr(leaf, "shape")


def _where_it_was_written(equation) -> contextlib.AbstractContextManager:
    """Keeps an equation's scopes and line, by which profiles and `fp4jax.report` know it."""
    written = equation.source_info
    name_stack = source_info_util.current_name_stack() + written.name_stack
    return source_info_util.user_context(written.traceback, name_stack=name_stack)


class _Evaluation:
    """Evaluates a jaxpr with the source of every value beside it."""

    def __init__(self, follower: Follower, product: Product, where: str):
        self.follower = follower
        self.product = product
        self.where = where

    def run(self, jaxpr, consts, args, arg_sources) -> tuple[list, list[Source]]:
        known = {}

        def read(atom):
            return (atom.val, CONSTANT) if isinstance(atom, core.Literal) else known[atom]

        known.update(zip(jaxpr.constvars, ((const, self.follower.const(const)) for const in consts), strict=True))
        known.update(zip(jaxpr.invars, zip(args, arg_sources, strict=True), strict=True))
        for equation in jaxpr.eqns:
            values, sources = zip(*map(read, equation.invars), strict=True) if equation.invars else ((), ())
            with _where_it_was_written(equation), equation.ctx.manager:
                results, result_sources = self.equation(equation, values, sources)
            known.update(zip(equation.outvars, zip(results, result_sources, strict=True), strict=True))
        pairs = [read(atom) for atom in jaxpr.outvars]
        return [value for value, _ in pairs], [source for _, source in pairs]

    def equation(self, equation, values, sources):
        """(results, their sources) of one equation."""
        name, params = equation.primitive.name, equation.params
        if name in INLINED:
            body = params.get("jaxpr", params.get("call_jaxpr"))
            return self._inline(body, values, sources)
        if name in REMATERIALIZED:
            return self._rematerialized(params, values, sources)
        result_sources = self.follower.equation(equation, sources)
        if is_product(equation, sources):
            return [self._multiply(*values, sources, **params)], result_sources
        bound = equation.primitive.get_bind_params(params)
        # Before JAX 0.12 a pair: functions that were parameters, and the rest.
        subfunctions, bound = bound if isinstance(bound, tuple) else ((), bound)
        results = equation.primitive.bind(*subfunctions, *values, **bound)
        results = list(results) if equation.primitive.multiple_results else [results]
        return results, result_sources

    def _multiply(self, lhs, rhs, sources, dimension_numbers, **options):
        weight = [source.origin for source in sources].index(Origin.WEIGHT)
        try:
            return dot_general_in_any_order(self.product, lhs, rhs, dimension_numbers, weight, **options)
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from error

    def _inline(self, body, values, sources):
        jaxpr, consts = (body.jaxpr, body.consts) if isinstance(body, core.ClosedJaxpr) else (body, ())
        return self.run(jaxpr, consts, values, sources)

    def _rematerialized(self, params, values, sources):
        result_sources = []

        def body(*values):
            results, result_sources[:] = self._inline(params["jaxpr"], values, sources)
            return results

        results = jax.checkpoint(body, prevent_cse=params["prevent_cse"], policy=params["policy"])(*values)
        return results, result_sources

"""A function traced to its jaxpr without running it: plain or jitted, on arrays, shapes or NNX modules."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence

import jax
from flax import nnx
from jax.extend.core import Jaxpr


@dataclasses.dataclass(frozen=True)
class Traced:
    """A program.

    Attributes:
      name: of the function.
      jaxpr: its equations.
      arguments: a name for each argument, such as "params.Dense_0.kernel".
      lower: gives the `jax.stages.Lowered`.
    """

    name: str
    jaxpr: Jaxpr
    arguments: tuple[str, ...]
    lower: Callable[[], jax.stages.Lowered]


def trace(function, args: tuple, kwargs: dict) -> Traced:
    """Traces `function(*args, **kwargs)`; arrays may be `jax.ShapeDtypeStruct`, what is no array is static.

    Raises:
      ValueError: `function` cannot be called.
    """
    if not callable(function):
        raise ValueError(
            f"report takes a function and its arguments, got {type(function).__name__} as the function; "
            "for a module that is lambda module, x: module(x), with the module as an argument"
        )
    leaves, tree = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=_is_module)
    # The trace of `nnx.jit` does not say what its arguments are.
    is_flax = type(function).__module__.startswith("flax.")
    is_jitted = isinstance(function, jax.stages.Wrapped) and hasattr(function, "trace") and not is_flax
    if is_jitted and not any(_is_module(leaf) for _, leaf in leaves):
        traced = function.trace(*args, **kwargs)
        paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(traced.args_info)[0]]
        positional = _positions_of_arrays(paths, traced.jaxpr.debug_info.arg_names)
    else:
        traced, paths = _trace_taken_apart(function, leaves, tree)
        positional = _positions(function)
    name = getattr(function, "__name__", type(function).__name__)
    return Traced(name, traced.jaxpr, _names(paths, positional), traced.lower)


def _is_module(leaf) -> bool:
    return isinstance(leaf, nnx.Module | nnx.Optimizer | nnx.Rngs)


def _trace_taken_apart(function: Callable, leaves: Sequence[tuple], tree) -> tuple[jax.stages.Traced, list[tuple]]:
    """`function` traced on the arrays in its arguments; what it writes into modules comes out as a result."""
    modules = {i: leaf for i, (_, leaf) in enumerate(leaves) if _is_module(leaf)}
    arrays = {i: leaf for i, (_, leaf) in enumerate(leaves) if i not in modules and hasattr(leaf, "dtype")}
    static = {i: leaf for i, (_, leaf) in enumerate(leaves) if i not in modules and i not in arrays}
    graph, state = nnx.split(modules)

    def pure(state, arrays):
        modules = nnx.merge(graph, state)
        whole = modules | arrays | static
        args, kwargs = jax.tree.unflatten(tree, [whole[i] for i in range(len(leaves))])
        result = function(*args, **kwargs)
        return nnx.split((result, modules))[1]

    inside = [path for path, _ in jax.tree_util.tree_flatten_with_path((state, arrays))[0]]
    paths = [(*leaves[path[1].key][0], *path[2:]) for path in inside]
    return jax.jit(pure).trace(state, arrays), paths


def _positions(function: Callable) -> dict[int, str]:
    """The names of the parameters that take positional arguments."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # built in
        parameters = ()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return dict(enumerate(named))


def _positions_of_arrays(paths: Sequence[tuple], names: Sequence[str]) -> dict[int, str]:
    """Those of a jitted function, counted without its static arguments; `names` are JAX's, "params['w']"."""
    return {
        path[1].idx: name.removesuffix(jax.tree_util.keystr(path[2:])).replace("[", ".").replace("]", "")
        for path, name in zip(paths, names, strict=True) if not path[0].idx
    }  # fmt: skip


def _names(paths: Sequence[tuple], positional: dict[int, str]) -> tuple[str, ...]:
    """Names from paths into (args, kwargs)."""

    def name(path) -> str:
        is_keyword, first, *rest = map(_key, path)
        if not int(is_keyword):
            first = positional.get(int(first), f"args.{first}")
        if rest[-1:] == ["value"]:  # of an NNX variable
            rest = rest[:-1]
        return ".".join([first, *rest])

    return tuple(map(name, paths))


def _key(key) -> str:
    """One step of a path: an attribute, a dictionary's key or a position."""
    return str(next(getattr(key, field) for field in ("name", "key", "idx") if hasattr(key, field)))

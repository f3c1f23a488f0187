"""One call of an NNX module with the products of its own weights quantized.

A trace may not change variables from outside of it, and what a call leaves in a list or an attribute would be a tracer.
So the call is traced on copies of the module and of the NNX objects among its arguments. Variables that it changed or
added (random streams, running statistics, what `sow` keeps) are written back to the originals; any other change would
be lost, and is refused.
"""

import collections
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from flax import nnx

from fp4jax import intercept


def call(
    module: nnx.Module, method: Callable, args, kwargs, own: Sequence[jax.Array | np.ndarray], product, where: str
):
    """`method(module, *args, **kwargs)` with its products of data and the weights `own` made by `product`.

    Args:
      own: the raw values of the module's own weights.
      product, where: as `intercept.call`.

    Raises:
      ValueError: as `intercept.call`; a call that changes a list or dictionary among its arguments, or a plain
        attribute of a module.
    """
    leaves, structure = jax.tree.flatten((args, kwargs), is_leaf=_is_node)
    leaves = [leaf if _is_node(leaf) else intercept.as_jax(leaf) for leaf in leaves]
    nodes = (module, *filter(_is_node, leaves))
    graph, state = nnx.split(nodes)
    stored, tree = jax.tree.flatten(state)
    arrays = intercept.as_jax(stored)
    known = {id(old): new for old, new in zip(stored, arrays, strict=True)}
    state = jax.tree.unflatten(tree, arrays)
    lists, paths = _plain_lists(graph), []

    def function():
        copy, *copies = copied = nnx.merge(graph, state, copy=True)
        rest = iter(copies)
        given = [next(rest) if _is_node(leaf) else leaf for leaf in leaves]
        arguments = jax.tree.unflatten(structure, given)
        result = method(copy, *arguments[0], **arguments[1])
        intercept.check_arguments(arguments, given, structure, where, _is_node)
        changed = _changed(state, copied)
        _check_attributes(graph, state, copied, where)
        _check_lists(lists, _plain_lists(graph), where)
        paths[:] = changed
        return result, [*changed.values()]

    (result, values), replaced = intercept.call(function, [known[id(weight)] for weight in own], product, where)
    if not replaced:
        intercept.report_no_product(where)
    _write_back(nodes, state, dict(zip(paths, values, strict=True)))
    return result


def _is_node(value) -> bool:
    """Whether NNX keeps its identity: a module, `Rngs`, an optimizer, a variable."""
    return isinstance(value, nnx.Pytree | nnx.Variable)


def _flat(state) -> dict:
    return dict(nnx.to_flat_state(state))


def _changed(state, copied) -> dict:
    """{path: value} of the variables and arrays that are not those of `state`."""
    before = {path: jax.tree.leaves(value) for path, value in _flat(state).items()}

    def is_old(path, value) -> bool:
        old, new = before.get(path), jax.tree.leaves(value)
        return old is not None and len(old) == len(new) and all(map(lambda a, b: a is b, old, new))

    return {path: value for path, value in _flat(nnx.state(copied)).items() if not is_old(path, value)}


def _check_attributes(graph, state, copied, where: str) -> None:
    """Refuses every change but those of variables' values and of new variables; takes the new ones off the copies."""
    before = _flat(state)
    for path, value in _flat(nnx.state(copied)).items():
        if path not in before and isinstance(value, nnx.Variable):
            parent = _at(copied, path[:-1])
            if isinstance(parent, nnx.Module) and not isinstance(parent, nnx.List):
                delattr(parent, path[-1])
    now, _ = nnx.split(copied)
    if now == graph:
        return
    raise _lost(where, next(_differences(now.attributes, graph.attributes), "of a list"))


def _differences(now: list, before: list) -> Iterator[str]:
    """The names of attributes that were set, added or deleted."""
    keys, old_keys = (collections.Counter(str(key) for key, _ in attributes) for attributes in (now, before))
    moved = (keys - old_keys) + (old_keys - keys)
    unequal = moved or [str(key) for (key, new), (_, old) in zip(now, before, strict=True) if new != old]
    return (name for name in unequal if not name.startswith("_pytree__"))


def _plain_lists(graph) -> list[tuple[str, list]]:
    """(name, leaves) of the lists and dictionaries that are plain attributes: these are shared with the copies."""
    values = ((str(key), getattr(attribute, "value", None)) for key, attribute in graph.attributes)
    return [(name, jax.tree.leaves(value)) for name, value in values if isinstance(value, list | dict)]


def _check_lists(before: list, now: list, where: str) -> None:
    for (name, old), (_, new) in zip(before, now, strict=True):
        known = {id(leaf) for leaf in old}
        if any(isinstance(leaf, jax.core.Tracer) and id(leaf) not in known for leaf in new):
            raise _lost(where, name)


def _lost(where: str, name: str) -> ValueError:
    return ValueError(
        f"{where} changes the attribute {name!r} in its call, which is no nnx.Variable and which a traced call loses: "
        "keep it in one that __init__ makes, or leave the layer out by a rule (its path, 'bf16') before the others"
    )


def _at(nodes, path):
    for key in path:
        nodes = nodes[key] if isinstance(nodes, nnx.List | nnx.Dict | list | tuple | dict) else getattr(nodes, key)
    return nodes


def _write_back(nodes, state, changed: dict) -> None:
    """Only what changed: other variables may belong to an outer trace, where they may not be written."""
    before = _flat(state)
    for path, value in changed.items():
        if path not in before:
            setattr(_at(nodes, path[:-1]), path[-1], value)
    nnx.update(nodes, nnx.from_flat_state([(path, value) for path, value in changed.items() if path in before]))

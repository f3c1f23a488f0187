"""What the values of a jaxpr are computed from, and which of its products multiply data by a weight.

A value computed from a layer's weights alone is a weight, however it was cast, transposed, sliced or scaled by
constants. Anything that depends on the call's inputs is data. In between is a weight that data has masked, scaled or
chosen: no matrix of the layer any more, so a product with it is refused. Nothing here is evaluated.
"""

import enum
from collections.abc import Collection, Sequence
from typing import NamedTuple

import jax
from jax.extend import core

from fp4jax import scopes


class Origin(enum.IntEnum):
    """What a value is computed from; of several, the largest."""

    CONSTANT = 0  # literals, and arrays of NumPy
    WEIGHT = 1  # weights, and constants
    CHANGED = 2  # a weight of two axes or more that data has masked, scaled or chosen
    DATA = 3


class Source(NamedTuple):
    """The origin of a value, and of how many elements it was made: broadcasting adds none."""

    origin: Origin
    elements: int = 0


CONSTANT, DATA = Source(Origin.CONSTANT), Source(Origin.DATA)

INLINED = frozenset({"jit", "pjit", "closed_call", "core_call"})
REMATERIALIZED = frozenset({"checkpoint", "remat", "remat2"})
# Primitives whose bodies can be read, though not given another product: the parameter with the body.
_BODIES = {
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vmap_call": "call",
    "shard_map": "jaxpr",
}
_LOOPS = frozenset({"scan", "while", "cond"})
_INSTEAD = "leave it out by a rule (its path, 'bf16') before the others"
_PRODUCTS = {
    "conv_general_dilated": f"convolutions run in high precision: {_INSTEAD}",
    "ragged_dot_general": f"call fp4jax.ragged_dot in it, or {_INSTEAD}",
}
_SCALINGS = frozenset({"mul", "div", "select_n"})
_CHOICES = frozenset({"gather", "dynamic_slice"})
# Of several operands, each of which is given back by itself.
_ONE_TO_ONE = frozenset({"optimization_barrier", "device_put", "pvary", "psum", "psum_invariant"})
# What leaves the elements of a weight as they are, or nearly so.
_LAYOUTS = frozenset(
    """broadcast_in_dim concatenate convert_element_type copy copy_p mesh_cast neg optimization_barrier reduce_precision
    reshape reshard rev sharding_constraint slice split squeeze transpose""".split()
)
# Primitives of several operands that multiply no matrices. Any other one that takes a weight and data is refused.
_NO_PRODUCTS = (
    _SCALINGS
    | _CHOICES
    | _LAYOUTS
    | frozenset(
        """add add_any all_gather all_to_all and atan2 betainc clamp complex cummax cummin cumsum debug_callback
        debug_print device_put dynamic_update_slice eq eq_to ge gt igamma igammac le le_to lt lt_to max min
        ne nextafter or pad polygamma pow ppermute psum psum_invariant pvary random_bits random_fold_in
        random_split random_wrap reduce reduce_window rem scatter scatter-add scatter_add scatter_max
        scatter_min scatter_mul select_and_gather_add select_and_scatter_add shift_left
        shift_right_arithmetic shift_right_logical sort sub threefry2x32 top_k xor zeta""".split()
    )
)


def is_product(equation, sources: Sequence[Source]) -> bool:
    """Whether an equation is a matrix product of data and a weight, and not fp4jax's own already."""
    if equation.primitive.name != "dot_general" or _is_ours(equation):
        return False
    (contracted, _), _ = equation.params["dimension_numbers"]
    origins = [source.origin for source in sources]
    return bool(contracted) and Origin.WEIGHT in origins and max(origins) > Origin.WEIGHT


class Follower:
    """Follows one layer's weights through equations.

    Attributes:
      where: the layer's path, for errors.
      refuses: whether what cannot be replaced raises; otherwise it is counted.
      products: how many products of data and a weight were found.
    """

    def __init__(self, weights: Collection[jax.Array], where: str, refuses: bool = True):
        self.where = where
        self.refuses = refuses
        self.products = 0
        self._owned = {id(weight): weight for weight in weights}  # which also keeps the ids valid

    def const(self, value) -> Source:
        """The source of an array that a traced function closes over."""
        if not isinstance(value, jax.Array):
            return CONSTANT
        return Source(Origin.WEIGHT, value.size) if id(value) in self._owned else DATA

    def body(self, jaxpr, args: Sequence[Source]) -> list[Source]:
        """The sources of a body's results."""
        consts = ()
        if isinstance(jaxpr, core.ClosedJaxpr):
            # A body that closes over a weight keeps it among its own constants.
            jaxpr, consts = jaxpr.jaxpr, map(self.const, jaxpr.consts)
        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

        def read(atom):
            return CONSTANT if isinstance(atom, core.Literal) else known[atom]

        for equation in jaxpr.eqns:
            known.update(zip(equation.outvars, self.equation(equation, [*map(read, equation.invars)]), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, equation, sources: Sequence[Source]) -> list[Source]:
        """The sources of an equation's results.

        Raises:
          ValueError: a product of a weight that cannot be replaced, with what to do instead.
        """
        name, params = equation.primitive.name, equation.params
        if name in INLINED or name in REMATERIALIZED:
            return self.body(params.get("jaxpr", params.get("call_jaxpr")), sources)
        if name in _ONE_TO_ONE and len(sources) == len(equation.outvars):
            return [*sources]
        if name == "cond":
            return self._refuse_products_in(name, self._cond, equation, sources)
        if name in _LOOPS:
            self._refuse_products_in(name, self._loop, name, params, sources)
        elif name in _BODIES:
            return self._refuse_products_in(name, self.body, params[_BODIES[name]], sources)
        elif name == "dot_general" and not _is_ours(equation):
            self._check_product(equation, sources)
            if is_product(equation, sources):
                self.products += 1
                return [DATA]
        return [self._mixture(equation, sources, variable.aval) for variable in equation.outvars]

    def _refuse(self, message: str) -> None:
        if self.refuses:
            raise ValueError(f"{self.where} {message}")
        self.products += 1

    def _check_product(self, equation, sources) -> None:
        (contracted, _), _ = equation.params["dimension_numbers"]
        if not contracted:
            return
        origins = sorted(source.origin for source in sources)
        if origins == [Origin.WEIGHT, Origin.WEIGHT]:
            self._refuse(
                "multiplies two of its own weights, and which holds activations is not known: leave "
                "it out by a rule (its path, 'bf16') before the others, or call fp4jax.einsum in it"
            )
        if origins[0] == Origin.CHANGED:
            self._refuse(
                f"multiplies by a weight that data has masked, scaled or chosen: mask or scale the "
                f"activations or the result instead, call fp4jax.einsum in it, or {_INSTEAD}"
            )

    def _mixture(self, equation, sources, result) -> Source:
        """The source of a result of an equation without a product of its own."""
        name = equation.primitive.name
        origin = max((source.origin for source in sources), default=Origin.CONSTANT)
        size = getattr(result, "size", 0)
        made_of = [source.elements for source in sources]
        elements = min(size, sum(made_of) if name == "concatenate" else max(made_of, default=0))
        matrices = [
            source for source, atom in zip(sources, equation.invars, strict=True)
            if source.origin in (Origin.WEIGHT, Origin.CHANGED) and len(getattr(atom.aval, "shape", ())) >= 2
        ]  # fmt: skip
        if not matrices or origin < Origin.CHANGED:
            return Source(origin, elements)
        if origin == Origin.CHANGED:
            return Source(origin, elements) if name in _LAYOUTS | _SCALINGS else DATA
        if name == "dot_general":  # of no contracted axis: scales, as does `mul`
            return DATA if _is_ours(equation) else Source(Origin.CHANGED, elements)
        if name in _PRODUCTS:
            self._refuse(f"multiplies by its weight in {name}, which is not replaced: {_PRODUCTS[name]}")
        if name not in _NO_PRODUCTS | _LOOPS:
            self._refuse(f"gives its weight and data to {name}, and what that multiplies is not known: {_INSTEAD}")
        is_scaled = name in _SCALINGS and any(source.elements == size for source in matrices)
        is_chosen = name in _CHOICES and sum(size > 1 for size in equation.params["slice_sizes"]) >= 2
        return Source(Origin.CHANGED, size) if is_scaled or is_chosen else DATA

    def _refuse_products_in(self, name: str, follow, *args) -> list[Source] | None:
        before = self.products
        results = follow(*args)
        if self.products > before:
            self._refuse(
                f"multiplies by its weight inside a {name}, where products cannot be replaced: quantize "
                f"the module that is called there, call fp4jax.dot_general in it, or {_INSTEAD}"
            )
        return results

    def _cond(self, equation, sources) -> list[Source]:
        """The sources of the branches' results joined: a matrix that data chooses is none of the layer any more."""
        predicate, *operands = sources
        branches = [self.body(branch, operands) for branch in equation.params["branches"]]

        def join(variable, *results: Source) -> Source:
            elements = max(result.elements for result in results)
            origin = max(predicate.origin, *(result.origin for result in results))
            shape = getattr(variable.aval, "shape", ())
            is_matrix = len(shape) >= 2 and elements == variable.aval.size
            is_own = any(result.origin in (Origin.WEIGHT, Origin.CHANGED) for result in results)
            return Source(Origin.CHANGED if is_own and is_matrix and origin > Origin.WEIGHT else origin, elements)

        return [*map(join, equation.outvars, *branches)]

    def _loop(self, name: str, params, sources) -> None:
        # What starts as a constant is data from the second step on.
        sources = [DATA if source.origin == Origin.CONSTANT else source for source in sources]
        if name == "while":
            self.body(params["body_jaxpr"], sources[params["cond_nconsts"] :])
        else:
            self.body(params["jaxpr"], sources)


def _is_ours(equation) -> bool:
    return scopes.read(str(equation.source_info.name_stack)).recipe is not None

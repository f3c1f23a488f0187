"""Finds every matrix product of a traced function, however deep it stands, and where its operands come from.

Origins flow through the program: an array is *given* while it has met no matrix product since it came in as an argument
(weights, their quantized copies), *computed* behind one (activations, gradients). Loops are walked once, so that what a
carry holds is judged by its first iteration.
"""

import dataclasses
import enum
import functools
import itertools
import math
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Var

from fp4jax import scopes
from fp4jax.statistics import SCOPE as STATISTICS

_PRODUCTS = {"dot_general", "conv_general_dilated", "ragged_dot_general", "scaled_matmul_wrapper", "scaled_matmul"}
# cuDNN's attention is one primitive: scores and values; backward, scores again and four gradients.
_ATTENTION = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}
# The jitted function of a kernel that multiplies, by its name; fp4jax.fused.
FUSED = "fp4jax_dequant_matmul"
_OPAQUE = ("ffi_call", "custom_call", "dot_product_attention", "pure_callback")
_OURS = Path(__file__).resolve().parents[1]
_KERNELS = _OURS.parent / "pallas_kernels"
_STANDARD_LIBRARY = sysconfig.get_path("stdlib") + "/"
_LIBRARIES = ("jax", "jaxlib", "jaxtyping", "beartype", "flax", "equinox", "haiku", "optax")


class Level(enum.IntEnum):
    """How far an array is from the program's arguments."""

    CONSTANT = 0  # literals, integers, random keys
    GIVEN = 1
    COMPUTED = 2


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where an array comes from; `leaves`: the arguments that a given one is made of."""

    level: Level = Level.CONSTANT
    leaves: frozenset[str] = frozenset()

    @classmethod
    def join(cls, origins: Sequence["Origin"]) -> "Origin":
        """The origin of what is made of several arrays."""
        level = max((origin.level for origin in origins), default=Level.CONSTANT)
        if level is Level.COMPUTED:
            return COMPUTED
        return cls(level, frozenset().union(*(origin.leaves for origin in origins)))


COMPUTED = Origin(Level.COMPUTED)


class Source(NamedTuple):
    """A place in somebody's code; the columns tell products of one line apart."""

    file: str
    line: int
    columns: tuple[int | None, int | None]
    function: str


@dataclasses.dataclass(frozen=True)
class Product:
    """One equation of a program.

    Attributes:
      primitive: "dot_general" ...
      path: the scopes around it, outside in.
      source: the code that asked for it, without JAX, Flax and this package's products.
      shapes: of both operands; dtypes: theirs.
      origins: theirs.
      contraction: elements that are multiplied and added for one element of the result.
      flops: multiply-adds x 2 of one execution.
      count: executions; a `while` loop counts once.
      inside: what encloses it that is not certain to run, or to run once.
      is_live: whether a result of the program depends on it; otherwise the compiler leaves it out.
    """

    primitive: str
    path: str
    source: Source | None
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtypes: tuple[str, str]
    origins: tuple[Origin, Origin]
    contraction: int
    flops: int
    count: int
    inside: tuple[str, ...]
    is_live: bool

    @property
    def scope(self) -> scopes.Scope:
        return scopes.read(self.path)

    @property
    def is_statistics(self) -> bool:
        return STATISTICS in self.path


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where in the program an equation stands."""

    path: tuple[str, ...] = ()
    count: int = 1
    inside: tuple[str, ...] = ()
    is_live: bool = True
    source: Source | None = None


def find_products(jaxpr: Jaxpr, arguments: Sequence[str]) -> tuple[list[Product], list[str]]:
    """The products in the order of the program, and the primitives that may hide some.

    Args:
      arguments: a name for every argument.
    """
    walk = _Walk()
    origins = [_given(v.aval, name) for v, name in zip(jaxpr.invars, arguments, strict=True)]
    walk.run(jaxpr, origins, _Place(), [True] * len(jaxpr.outvars))
    return walk.products, sorted(walk.opaque)


def _given(aval, name: str) -> Origin:
    if not jnp.issubdtype(getattr(aval, "dtype", jnp.int32), jnp.floating):
        return Origin()
    return Origin(Level.GIVEN, frozenset({name}))


class _Walk:
    def __init__(self):
        self.products: list[Product] = []
        self.opaque: set[str] = set()

    def run(self, jaxpr: Jaxpr, origins: Sequence[Origin], place: _Place, needed: Sequence[bool]) -> list[Origin]:
        """Walks the equations; returns the origins of the results, of which some are `needed`."""
        known = {var: _given(var.aval, "") for var in jaxpr.constvars}
        known.update(zip(jaxpr.invars, origins, strict=True))

        def of(atom) -> Origin:
            return known[atom] if isinstance(atom, Var) else Origin()

        for eqn, results_needed, is_live in _with_liveness(jaxpr, needed):
            here = place if is_live else dataclasses.replace(place, is_live=False)
            results = self._equation(eqn, [of(v) for v in eqn.invars], here, results_needed)
            known.update(zip(eqn.outvars, results, strict=True))
        return [of(v) for v in jaxpr.outvars]

    def _equation(self, eqn: JaxprEqn, origins: list[Origin], place: _Place, needed: list[bool]) -> list[Origin]:
        name = eqn.primitive.name
        if name in _PRODUCTS:
            product = _product(eqn, origins, place)
            self.products.append(product)
            of_operands = product.scope.is_preparation  # factors of the weights are still weights
            return [Origin.join(origins) if of_operands else COMPUTED] * len(eqn.outvars)
        if name == "jit" and eqn.params["name"] == FUSED:
            self.products.append(_fused(eqn, origins, place))
            return [COMPUTED]
        if name in _ATTENTION:
            self.products.append(_attention(eqn, origins, place))
            return [COMPUTED] * len(eqn.outvars)
        if name.startswith(_OPAQUE):
            self.opaque.add(name)
        place = dataclasses.replace(
            place,
            path=(*place.path, *filter(None, [str(eqn.source_info.name_stack)])),
            source=place.source or (_source(eqn) if name == "custom_vmap_call" else None),
        )
        match name:
            case "cond":
                return self._branches(eqn, origins, place, needed)
            case "while":
                return self._while(eqn, origins, place)
            case "scan":
                # Not stacked means carried, and each iteration reads what the one before has left.
                pairs = zip(eqn.outvars, eqn.params["jaxpr"].outvars, needed, strict=True)
                needed = [is_needed or whole.aval.shape == one.aval.shape for whole, one, is_needed in pairs]
                place = dataclasses.replace(place, count=place.count * eqn.params["length"])
            case "shard_map":
                shape = eqn.params["mesh"].shape
                axes = eqn.params.get("newly_manual_axes", eqn.params.get("manual_axes", shape))
                shards = math.prod(size for axis, size in shape.items() if axis in axes)
                place = dataclasses.replace(place, count=place.count * shards)
            case "pallas_call":
                grid = [size for size in eqn.params["grid_mapping"].grid if isinstance(size, int)]
                place = dataclasses.replace(place, count=place.count * math.prod(grid))
        return self._inner(eqn, origins, place, needed)

    def _inner(self, eqn: JaxprEqn, origins: list[Origin], place: _Place, needed: list[bool]) -> list[Origin]:
        results = [Origin.join(origins)] * len(eqn.outvars)
        for jaxpr in _jaxprs(eqn.params):
            inputs = origins if len(jaxpr.invars) == len(origins) else [Origin.join(origins)] * len(jaxpr.invars)
            outputs = needed if len(jaxpr.outvars) == len(needed) else [True] * len(jaxpr.outvars)
            found = self.run(jaxpr, inputs, place, outputs)
            if len(found) == len(eqn.outvars):
                results = found
        return results

    def _branches(self, eqn: JaxprEqn, origins: list[Origin], place: _Place, needed: list[bool]) -> list[Origin]:
        branches = eqn.params["branches"]
        place = dataclasses.replace(place, inside=(*place.inside, f"one of {len(branches)} branches"))
        results = [self.run(branch, origins[1:], place, needed) for branch in branches]
        return [Origin.join(of_branches) for of_branches in zip(*results, strict=True)]

    def _while(self, eqn: JaxprEqn, origins: list[Origin], place: _Place) -> list[Origin]:
        place = dataclasses.replace(place, inside=(*place.inside, "each iteration of a while loop"))
        of_condition, of_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        body, carry = origins[of_condition : of_condition + of_body], origins[of_condition + of_body :]
        self.run(eqn.params["cond_jaxpr"], [*origins[:of_condition], *carry], place, [True])
        results = self.run(eqn.params["body_jaxpr"], [*body, *carry], place, [True] * len(carry))
        return [Origin.join(pair) for pair in zip(carry, results, strict=True)]


def _with_liveness(jaxpr: Jaxpr, needed: Sequence[bool]) -> list[tuple[JaxprEqn, list[bool], bool]]:
    """Each equation, which of its results are needed, and whether it is: for one of them or for an effect."""
    read = {v for v, is_needed in zip(jaxpr.outvars, needed, strict=True) if is_needed and isinstance(v, Var)}
    found = []
    for eqn in reversed(jaxpr.eqns):
        results = [v in read for v in eqn.outvars]
        is_live = any(results) or bool(eqn.effects)
        found.append((eqn, results, is_live))
        if is_live:
            read.update(v for v in eqn.invars if isinstance(v, Var))
    return found[::-1]


def _jaxprs(params: dict) -> Iterator[Jaxpr]:
    for value in params.values():
        yield from (v for v in (value if isinstance(value, tuple | list) else (value,)) if isinstance(v, Jaxpr))


def _product(eqn: JaxprEqn, origins: list[Origin], place: _Place) -> Product:
    lhs, rhs = (var.aval for var in eqn.invars[:2])
    result = math.prod(eqn.outvars[0].aval.shape)
    contraction = _contraction(eqn, lhs.shape, rhs.shape)
    path = "/".join((*place.path, *filter(None, [str(eqn.source_info.name_stack)])))
    return Product(
        eqn.primitive.name, path, place.source or _source(eqn), (lhs.shape, rhs.shape),
        (lhs.dtype.name, rhs.dtype.name), (origins[0], origins[1]), contraction, 2 * result * contraction,
        place.count, place.inside, place.is_live,
    )  # fmt: skip


def _fused(eqn: JaxprEqn, origins: list[Origin], place: _Place) -> Product:
    """The kernel's operands: a scale a product, then codes and scales of each side, packed along the contraction."""
    _, codes, scales, rhs_codes, _ = (var.aval for var in eqn.invars)
    (batch, *rows), down_columns = eqn.outvars[0].aval.shape, scales.dtype == jnp.uint8
    contraction = 2 * codes.shape[1 if down_columns else 2]
    path = "/".join((*place.path, *filter(None, [str(eqn.source_info.name_stack)])))
    return Product(
        FUSED, path, place.source or _source(eqn), ((batch, rows[0], contraction), (batch, rows[1], contraction)),
        (codes.dtype.name, rhs_codes.dtype.name), (Origin.join(origins[1:3]), Origin.join(origins[3:5])), contraction,
        2 * batch * math.prod(rows) * contraction, place.count, place.inside, place.is_live,
    )  # fmt: skip


def _attention(eqn: JaxprEqn, origins: list[Origin], place: _Place) -> Product:
    """Its products as executions of one: each has as many FLOPs as the scores, those behind a causal mask included."""
    query, key = (var.aval for var in eqn.invars[:2])
    batch, heads, length, head_dim = query.shape
    keys = key.shape[2]
    if eqn.params["layout"] == 0:  # [batch, length, heads, head_dim]
        length, heads, keys = heads, length, key.shape[1]
    path = "/".join((*place.path, *filter(None, [str(eqn.source_info.name_stack)])))
    return Product(
        "dot_product_attention", path, place.source or _source(eqn), (query.shape, key.shape),
        (query.dtype.name, key.dtype.name), (origins[0], origins[1]), head_dim,
        2 * batch * heads * length * keys * head_dim, place.count * _ATTENTION[eqn.primitive.name], place.inside,
        place.is_live,
    )  # fmt: skip


def _contraction(eqn: JaxprEqn, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> int:
    match eqn.primitive.name:
        case "dot_general":
            (axes, _), _ = eqn.params["dimension_numbers"]
            return math.prod(lhs[axis] for axis in axes)
        case "ragged_dot_general":
            numbers = eqn.params["ragged_dot_dimension_numbers"]
            (axes, _), _ = numbers.dot_dimension_numbers
            size = math.prod(lhs[axis] for axis in axes)
            # Groups along the contraction share its elements out among the results.
            groups = eqn.outvars[0].aval.shape[0] if set(numbers.lhs_ragged_dimensions) & set(axes) else 1
            return max(size // groups, 1)
        case "conv_general_dilated":
            outputs = eqn.params["dimension_numbers"].rhs_spec[0]
            return math.prod(size for axis, size in enumerate(rhs) if axis != outputs)
        case _:  # scaled_matmul: [batch, rows, contraction] each
            return lhs[-1]


def _source(eqn: JaxprEqn) -> Source | None:
    """The innermost frame of code that is neither a library's nor this package's own machinery."""
    traceback = eqn.source_info.traceback
    for code, instruction in zip(*traceback.raw_frames(), strict=True) if traceback else ():
        if not _is_machinery(code.co_filename):
            line, _, start, end = next(itertools.islice(code.co_positions(), instruction // 2, None))
            return Source(code.co_filename, line or code.co_firstlineno, (start, end), code.co_qualname)
    return None


@functools.cache
def _is_machinery(file: str) -> bool:
    """A file of the standard library, of JAX and what builds models on it, or of this package below the models."""
    ours = Path(file).parent in (_OURS, _OURS / "numerics", _OURS / "reporting") or file.startswith("<@beartype")
    ours = ours or _KERNELS in Path(file).parents
    return ours or file.startswith(_STANDARD_LIBRARY) and "/site-packages/" not in file or any(
        f"/site-packages/{library}/" in file for library in _LIBRARIES
    )  # fmt: skip

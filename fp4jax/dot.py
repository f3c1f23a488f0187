"""`dot_general` whose forward and backward products run under a recipe: the centre of fp4jax.

    fprop  Y = Q(X) Q(W)        dgrad  dX = Q(D) Q(W)ᵀ        wgrad  dW = Q(X)ᵀ Q(D)

X [*batch, *tokens, K] holds activations, W [*batch, K, N] weights, D = dL/dY output gradients; tokens are the left
operand's free axes, batch axes count independent matrices (experts). What Q does to each of the six operands is the
recipe's business (`fp4jax.recipes`), how split operands multiply is `fp4jax.gemm`'s. Here live the custom VJP, its
rules under vmap, and the choice of an implementation.

The custom VJP takes (x, w, xq, wq, ...): x and w only route cotangents, everything computed comes from the prepared
xq and wq. So linears that share an input share its one saved copy in 4.5 bits, and weights can be prepared once
outside of a microbatch loop.
"""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from fp4jax import gemm as gemms
from fp4jax import scopes
from fp4jax.batching import once_differentiable, vary_alike, vmappable
from fp4jax.canonical import canonicalize, result_type
from fp4jax.dot_checks import SIDES, check_preparable, check_product
from fp4jax.explicit import explicit_mesh, specs_like, with_auto_axes
from fp4jax.layout import Names
from fp4jax.numerics import key_words, mask_rows
from fp4jax.operands import D_SLOTS, X_SLOTS, Prepared, Purpose, packed, prepare_tokens, prepare_weights, shared, whole
from fp4jax.quantizers import Quantizer, best, by_kernels, by_xla
from fp4jax.recipes import Gemm, Recipe, as_recipe
from fp4jax.shards import in_shards
from fp4jax.statistics import gradient_statistics

# Name of prepared activations for `jax.checkpoint_policies.save_only_these_names`.
LINEAR_INPUTS = "fp4jax_linear_inputs"

_MIN_CONTRACTION = 16
_PROGRAMS = 1024  # static specifications kept; one that was dropped is only traced again
_HOW_TO_PASS_A_KEY = (
    "pass key=jax.random.key(seed) (in flax.linen rngs={'fp4': key}, under nn.scan also split_rngs={'fp4': True})"
)
_log = logging.getLogger("fp4jax")


@dataclasses.dataclass(frozen=True)
class _Spec:
    """Everything static about a product."""

    recipe: Recipe
    batch_dims: int
    dtype: jnp.dtype
    lhs_dtype: jnp.dtype
    rhs_dtype: jnp.dtype
    execution: gemms.Execution
    precision: object
    quantizer: Quantizer
    short: tuple[int | None, int | None]  # contractions over inputs, outputs that are too short to quantize
    axes: tuple[Names | None, Names | None]  # names of the axes of X, D where devices share sequences

    def with_batch_dims(self, batch_dims: int) -> "_Spec":
        return dataclasses.replace(self, batch_dims=batch_dims)


def dot_general(
    lhs: Float[Array, "..."],
    rhs: Float[Array, "..."],
    dimension_numbers,
    precision=None,
    preferred_element_type=None,
    *,
    out_sharding=None,
    recipe: str | Recipe,
    key=None,
    lhs_q: Prepared | None = None,
    rhs_q: Prepared | None = None,
    row_mask: Bool[Array, "*tokens"] | None = None,
    probe: Float[Array, " statistics"] | None = None,
    backend: str = "auto",
    gemm: str = "auto",
    axes: tuple[Names | None, Names | None] = (None, None),
) -> Float[Array, "..."]:
    """`jax.lax.dot_general` of activations and weights under a recipe, differentiable in both.

    >>> product = jax.jit(lambda x, w: dot_general(x, w, (((1,), (0,)), ((), ())), recipe="nvfp4"))
    >>> product(jnp.ones((16, 64)), jnp.ones((64, 32))).shape
    (16, 32)

    Args:
      lhs: activations. Its free axes are tokens; blocks of the weight gradient run along the last of them.
      rhs: weights. Batch dimensions are independent matrices, each with its own means and tensor scales.
      dimension_numbers, precision, preferred_element_type, out_sharding: as in `jax.lax.dot_general`. `precision` is
        that of operands in high precision; quantized ones multiply exactly.
      recipe: a name (`fp4jax.list_recipes()`), with variants if wanted ("averis+nearest"), or a `Recipe`.
      key: a JAX random key, needed where the recipe rounds stochastically: for gradients only when differentiated.
      lhs_q, rhs_q: the operands as `prepare` returns them, to share them between products. The operands themselves must
        then be in canonical layout, and serve to route cotangents only.
      row_mask: True for real tokens, shaped like lhs without its contracted axes. Others count in no statistic.
      probe: zeros of shape [len(GRADIENT_STATISTICS)], float32; its cotangent is the sum of those statistics.
      backend: quantizer: "auto", "xla" or "pallas".  gemm: product: "auto", "native", "emulated" or "fused".
      axes: names (`fp4jax.layout`) of the axes of lhs, and of the result and its gradient, each where one of them is
        "sequence": tokens are then prepared where they are, and gathered for the products in codes.

    Returns:
      The product with lax's result shape and dtype. Masked rows are zero, and so is their gradient.

    Under `jax.vmap` over lhs alone the examples are more tokens of one product: they share statistics, and the weight
    gradient is summed inside. Weight gradients of single examples exist only if the weights are mapped too.

    Raises:
      ValueError: arguments that do not fit, saying what was given, what is accepted and what to do.
      NotImplementedError: a backend or product asked for by name that this device cannot serve.
    """
    recipe = as_recipe(recipe)
    check_product(lhs, rhs, dimension_numbers, recipe, lhs_q, rhs_q, row_mask, probe, axes)
    quantizer, execution = implementation(backend, gemm)
    if recipe.is_high_precision and all(a is None for a in (lhs_q, rhs_q, row_mask, probe, *axes)):
        asked = (dimension_numbers, precision, preferred_element_type)
        with scopes.of_recipe(recipe.name):
            return lax.dot_general(lhs, rhs, *asked, out_sharding=out_sharding)
    result = result_type(lhs, rhs, dimension_numbers, preferred_element_type, out_sharding)
    run = functools.partial(_product, dimension_numbers, recipe, result.dtype, precision, quantizer, execution, axes)
    arrays = vary_alike(lhs, rhs, lhs_q, rhs_q, None if key is None else key_words(key), row_mask, probe)
    return with_auto_axes(run, explicit_mesh(lhs, rhs), result.sharding)(*arrays)


def prepare(
    x: Float[Array, "..."],
    recipe: str | Recipe,
    side: str = "lhs",
    key=None,
    row_mask: Bool[Array, "..."] | None = None,
    *,
    batch_dims: int = 0,
    backend: str = "auto",
    forward_kept: bool = True,
    axes: Names | None = None,
) -> Prepared:
    """Quantizes an operand once for several products; no gradient flows through it.

    >>> product = lambda x, w: dot_general(
    ...     x, w, (((1,), (0,)), ((), ())), recipe="nvfp4", lhs_q=prepare(x, "nvfp4"))
    >>> jax.eval_shape(product, jnp.ones((16, 64)), jnp.ones((64, 32))).shape
    (16, 32)

    Args:
      x: activations [*batch, *tokens, K] (`side="lhs"`) or weights [*batch, K, N] (`side="rhs"`).
      batch_dims: leading axes that count independent matrices.
      key, row_mask, backend: as in `dot_general`. Give every product of one layer the same key.
      forward_kept: False where activations' copy for the forward product is used in the program that makes it and not
        kept beyond, as under `jax.checkpoint` with LINEAR_INPUTS: it is then not packed, which is faster on CPUs.
      axes: names of x's axes, if the products are given them: the copies are packed, and stay where the names say.

    Returns:
      What `dot_general` takes as `lhs_q` or `rhs_q`, under the same recipe.

    Raises:
      ValueError: an unknown side or recipe, a non-floating or empty array, too few axes, a missing key.
    """
    recipe = as_recipe(recipe)
    check_preparable(x, side, row_mask, batch_dims, recipe, axes)
    is_lhs = SIDES[side]
    quantizer, _ = implementation(backend, "auto")
    fitting = _for_contractions(recipe, *(x.shape[-1], _MIN_CONTRACTION) if is_lhs else x.shape[-2:])

    def preparation(x, words, row_mask):
        if is_lhs:
            x, row_mask = _in_shards(x, row_mask, fitting, batch_dims)
        pair = (x, None) if is_lhs else (None, x)
        prepared = _prepare(fitting, batch_dims, quantizer, *pair, words, row_mask)[0 if is_lhs else 1]
        forward = prepared.forward if is_lhs and not forward_kept else packed(prepared.forward)
        return shared(Prepared(forward, packed(prepared.backward)), axes)

    args = (x, None if key is None else key_words(key), row_mask)
    mesh = explicit_mesh(x)
    # Shapes without shardings: not every step inside can be typed with Explicit axes.
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), args)
    cut = batch_dims if is_lhs and recipe.shard_axes else None
    specs = None if mesh is None else specs_like(x, jax.eval_shape(preparation, *shapes), mesh, cut)
    prepared = with_auto_axes(preparation, mesh, specs)(*args)
    if is_lhs:
        prepared = jax.tree.map(lambda leaf: checkpoint_name(leaf, LINEAR_INPUTS), prepared)
    if recipe.is_high_precision:
        prepared = Prepared(prepared.forward, prepared.forward)  # one array, saved once
    return dataclasses.replace(prepared, purpose=Purpose(recipe, side, batch_dims, row_mask is not None))


def _product(
    dimension_numbers, recipe, dtype, precision, quantizer, execution, axes,
    lhs, rhs, lhs_q, rhs_q, words, row_mask, probe,
):  # fmt: skip
    """`dot_general` after its checks, under Auto axes: static arguments first, then arrays."""
    precision = tuple(precision) if isinstance(precision, list) else precision
    x, w, layout = canonicalize(lhs, rhs, dimension_numbers)
    asked, recipe = recipe, _for_contractions(recipe, x.shape[-1], w.shape[-1])
    short = tuple(size if size < _MIN_CONTRACTION and recipe != asked else None for size in (x.shape[-1], w.shape[-1]))
    spec = _Spec(recipe, layout.batch_dims, dtype, x.dtype, w.dtype, execution, precision, quantizer, short, axes)
    x, mask = _in_shards(x, None if row_mask is None else layout.row_mask(row_mask), recipe, layout.batch_dims)
    raw_x, raw_w = x if lhs_q is None else None, w if rhs_q is None else None
    new_x, new_w = _prepare(recipe, spec.batch_dims, quantizer, raw_x, raw_w, words, mask)
    xq, wq = lhs_q or shared(new_x, axes[0]), rhs_q or new_w
    return layout.restore(_differentiable(spec)(x, w, xq, wq, words, mask, probe))


def _in_shards(x, row_mask, recipe: Recipe, batch_dims: int):
    """Tokens and their mask with the axis of shards of the recipe, where it has one."""
    return tuple(array if array is None else in_shards(array, recipe, batch_dims) for array in (x, row_mask))


def _prepare(recipe: Recipe, batch_dims: int, quantizer: Quantizer, x, w, words, mask):
    """(Prepared or None, Prepared or None), outside of differentiation."""
    if recipe.forward_draws and words is None and (x is not None or w is not None):
        raise ValueError(f"recipe {recipe.name} rounds stochastically in the forward: {_HOW_TO_PASS_A_KEY}")
    x, w = lax.stop_gradient((x, w))
    # Words that nothing reads would tie what is prepared to them: `vmap` over keys would prepare it for every key.
    return _preparation(recipe, batch_dims, quantizer)(x, w, (), words if recipe.operand_draws else None, mask)


@functools.lru_cache(_PROGRAMS)
def _differentiable(spec: _Spec):
    """The custom VJP of one static specification."""

    def product(xq, wq, mask):
        return _fprop(spec)((), wq.forward, whole(xq.forward, spec.axes[0]), None, mask)[0]

    @jax.custom_vjp
    def dot(x, w, xq, wq, words, mask, probe):
        return product(xq, wq, mask)

    def forward(x, w, xq, wq, words, mask, probe):
        once_differentiable(x, w)
        if spec.recipe.gradient_draws and words is None:
            name = spec.recipe.name
            raise ValueError(
                f"recipe {name} rounds gradients stochastically: {_HOW_TO_PASS_A_KEY}, or use {name}+nearest"
            )
        for side, operand in (("lhs", xq), ("rhs", wq)):
            if operand.backward is None:
                raise ValueError(f"{side}_q was prepared without a key, which its copy for the backward needs")
        return product(xq, wq, mask), (packed(xq.backward), packed(wq.backward), words, mask, probe)

    def backward(residuals, d):
        once_differentiable(d)
        x, w, words, mask, probe = residuals
        x = whole(x, spec.axes[0])
        dx, dw, statistics = _dgrad_and_wgrad(spec, probe is not None)(d, w, x, words, mask)
        if statistics is not None:
            statistics = statistics.reshape(-1, statistics.shape[-1]).sum(0)
        return dx, dw, None, None, None, None, statistics

    dot.defvjp(forward, backward)
    return dot


# The three stages. All take (dense, weights, prepared, words, mask), so that one rule serves them under vmap.


@functools.lru_cache(_PROGRAMS)
def _preparation(recipe: Recipe, batch_dims: int, quantizer: Quantizer):
    def stage(x, w, unused, words, mask):
        del unused
        with scopes.of_recipe(recipe.name), scopes.of_preparation():
            row_dims = batch_dims + recipe.shard_axes
            return (
                None if x is None else prepare_tokens(x, recipe, X_SLOTS, row_dims, words, mask, quantizer),
                None if w is None else prepare_weights(w, recipe, batch_dims, words, quantizer),
            )

    def again(batch_dims):
        return _preparation(recipe, batch_dims, quantizer)

    return vmappable(stage, batch_dims, again, per_token=(True, False), shard_axes=recipe.shard_axes)


@functools.lru_cache(_PROGRAMS)
def _fprop(spec: _Spec):
    def stage(unused, w, x, words, mask):
        del unused, words
        with scopes.of_recipe(spec.recipe.name), scopes.of_gemm("fprop", spec.short[0]):
            how = (spec.execution, spec.precision, mask, spec.dtype, spec.recipe.shard_axes)
            y = gemms.contract_features(x, w, -2, spec.batch_dims, *how)
        return (y.astype(spec.dtype),)

    def again(batch_dims):
        return _fprop(spec.with_batch_dims(batch_dims))

    return vmappable(stage, spec.batch_dims, again, per_token=(True,), shard_axes=spec.recipe.shard_axes)


@functools.lru_cache(_PROGRAMS)
def _dgrad_and_wgrad(spec: _Spec, with_statistics: bool):
    def stage(d, w, x, words, mask):
        recipe, batch_dims, shard_axes = spec.recipe, spec.batch_dims, spec.recipe.shard_axes
        d = mask_rows(d, mask)
        with scopes.of_recipe(recipe.name), scopes.of_preparation():
            dq = prepare_tokens(
                d, recipe, D_SLOTS, batch_dims + shard_axes, words, mask, spec.quantizer, partners=(w, x)
            )
            dq = whole(shared(dq, spec.axes[1]), spec.axes[1])
        how = (spec.execution, spec.precision, mask)

        def contract(x, d_part):
            return gemms.contract_tokens(x, d_part, recipe, d.shape, batch_dims, *how, spec.quantizer.column_sums)

        with scopes.of_recipe(recipe.name), scopes.of_gemm("dgrad", spec.short[0] or spec.short[1]):
            dx = gemms.contract_features(dq.forward, w, -1, batch_dims, *how, spec.lhs_dtype, shard_axes)
        with scopes.of_recipe(recipe.name), scopes.of_gemm("wgrad", spec.short[0]):
            dw = contract(x, dq.backward)
        statistics = None
        if with_statistics:
            statistics = gradient_statistics(d, dq, x, dw, contract, recipe, batch_dims, mask)
        return dx.astype(spec.lhs_dtype), dw.astype(spec.rhs_dtype), statistics

    def again(batch_dims):
        return _dgrad_and_wgrad(spec.with_batch_dims(batch_dims), with_statistics)

    per_token, shard_axes = (True, False, False), spec.recipe.shard_axes
    return vmappable(stage, spec.batch_dims, again, per_token, shard_axes)


def _for_contractions(recipe: Recipe, inputs: int, outputs: int) -> Recipe:
    """The recipe with GEMMs that contract fewer than 16 features left in high precision."""
    if recipe.is_high_precision or min(inputs, outputs) >= _MIN_CONTRACTION:
        return recipe
    _report_high_precision(recipe.name, inputs, outputs)
    if inputs < _MIN_CONTRACTION:
        return Recipe(recipe.name, shards=recipe.shards)
    return dataclasses.replace(recipe, dgrad=Gemm())


@functools.cache
def _report_high_precision(name: str, inputs: int, outputs: int) -> None:
    """Says so once for every shape."""
    what = "all three GEMMs" if inputs < _MIN_CONTRACTION else "dgrad"
    _log.warning("%s: %s of a %d -> %d product in high precision (contraction below 16)", name, what, inputs, outputs)


def implementation(backend: str = "auto", gemm: str = "auto") -> tuple[Quantizer, gemms.Execution]:
    """What serves `backend` and `gemm` here: the function that quantizes, and how its results are multiplied.

    The one place where implementations are chosen. Products are accumulated in float32.

    Raises:
      ValueError: an unknown name.
      NotImplementedError: one that this device cannot serve, with the reason.
    """
    for name, value, table in (("backend", backend, _QUANTIZERS), ("gemm", gemm, _PRODUCTS)):
        if value not in table:
            raise ValueError(f"{name} must be one of {', '.join(table)}, got {value!r}")
    quantizer, execution = _QUANTIZERS[backend](), _PRODUCTS[gemm]()
    _report_implementation(quantizer.name, execution)
    return quantizer, execution


@functools.cache
def _report_implementation(quantizer: str, execution: gemms.Execution) -> None:
    """Says so once."""
    _log.info("quantizer: %s; products: %s, accumulated in float32", quantizer, execution)


_QUANTIZERS = {"auto": best, "xla": by_xla, "pallas": by_kernels}
_PRODUCTS = {
    "auto": gemms.best,
    "emulated": gemms.emulated,
    "native": gemms.native_or_error,
    "fused": gemms.fused_or_error,
}

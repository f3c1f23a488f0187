"""What could go silently wrong around `dot_general`: each case works, or raises and names the cure."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fp4jax.dot import dot_general, prepare
from fp4jax.numerics import quantize

NUMBERS = (((1,), (0,)), ((), ()))
RECIPE = "nvfp4+nearest"
KEYS = jax.random.split(jax.random.key(3), 2)
X, W, D = (jax.random.normal(key, shape) for key, shape in zip(
    jax.random.split(jax.random.key(0), 3), ((32, 32), (32, 16), (32, 16)), strict=True))  # fmt: skip
dot = functools.partial(dot_general, dimension_numbers=NUMBERS, recipe=RECIPE)
# Without the type checker of the tests, which would raise before the library's own error.
unchecked_dot = functools.partial(inspect.unwrap(dot_general), dimension_numbers=NUMBERS, recipe=RECIPE)


def test_every_mapped_key_draws_for_its_own_weights():
    weights = jnp.stack([W, 2 * W])

    @jax.jit
    def codes(w, key):
        return prepare(w, "nvfp4+sr_all", "rhs", key).forward.residual.codes

    mapped = jax.jit(jax.vmap(codes))(weights, KEYS)
    for i in range(2):
        np.testing.assert_array_equal(mapped[i], codes(weights[i], KEYS[i]))


def test_every_mapped_key_matters_to_tokens_that_share_statistics():
    @jax.jit
    def codes(keys):
        xs = jnp.stack([X, X + 1])
        return jax.vmap(lambda x, key: prepare(x, "nvfp4+sr_all", key=key).forward.residual.codes)(xs, keys)

    other = jnp.stack([KEYS[0], jax.random.key(99)])
    assert jnp.any(codes(KEYS) != codes(other))
    np.testing.assert_array_equal(codes(KEYS), codes(KEYS))


@pytest.mark.parametrize(
    "second_order",
    [
        lambda f: jax.hessian(lambda w: jnp.sum(f(X, w) ** 2))(W),
        lambda f: jax.grad(lambda w: jnp.sum(jax.grad(lambda x: jnp.sum(f(x, w) * D))(X) ** 2))(W),
    ],
    ids=["hessian", "gradient penalty"],
)
def test_second_derivatives_raise_and_do_not_come_out_as_zero(second_order):
    with pytest.raises(NotImplementedError, match="differentiated once"):
        jax.eval_shape(lambda: second_order(dot))  # tracing is enough
    assert jnp.linalg.norm(second_order(functools.partial(dot, recipe="bf16"))) > 0


def check_prepared_operands():
    mask = jnp.arange(32) < 8
    xq = prepare(X, RECIPE)
    cases = (
        (dict(lhs_q=xq, row_mask=mask), "masked False, this product has True"),
        (dict(lhs_q=prepare(X, RECIPE, row_mask=mask)), "masked True, this product has False"),
        (dict(lhs_q=prepare(X[:, :16], RECIPE)), r"from shape \(32, 16\), this product has \(32, 32\)"),
        (dict(lhs_q=prepare(W, RECIPE, "rhs")), "side rhs, this product has lhs"),
        (dict(rhs_q=xq), "side lhs, this product has rhs"),
        (dict(lhs_q=quantize(X)), "must come from fp4jax.prepare, got QTensor"),
    )
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            unchecked_dot(X, W, **options)


def test_prepared_operands_must_stand_for_the_operands():
    jax.eval_shape(check_prepared_operands)  # tracing is enough


def test_precision_leaves_quantized_products_exact():
    """Sums up to 2688² overflow float16: the caller's algorithm is for operands in high precision."""
    np.testing.assert_array_equal(dot(X, W, precision=lax.DotAlgorithmPreset.F16_F16_F16), dot(X, W))
    np.testing.assert_array_equal(dot(X, W, precision=["highest", "highest"]), dot(X, W))


@pytest.mark.parametrize("check_vma", [True, False])
def test_gradients_in_shard_map_with_replicated_weights(check_vma):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    xs = jnp.concatenate([X] * 8)

    def gradient(product):
        sharded = jax.shard_map(product, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"), check_vma=check_vma)
        return jax.grad(lambda w: jnp.sum(sharded(xs, w) * jnp.concatenate([D] * 8)))(W)

    # Every shard holds the same rows, so its statistics are those of one shard alone.
    alone = jax.jit(jax.grad(lambda w: jnp.sum(dot(X, w) * D)))(W)
    np.testing.assert_allclose(jax.jit(lambda: gradient(dot))(), 8 * alone, rtol=1e-5, atol=1e-4)


def test_mesh_with_explicit_and_auto_axes():
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Explicit, AxisType.Auto))
    with jax.set_mesh(mesh):
        y = jax.jit(dot)(jax.device_put(X, NamedSharding(mesh, P("data"))), W)
        assert jax.typeof(y).sharding.spec[0] == "data"
    np.testing.assert_allclose(np.asarray(y), dot(X, W), rtol=1e-6, atol=1e-6)


def test_no_gradient_flows_through_quantize():
    assert not jnp.any(jax.grad(lambda x: jnp.sum(quantize(x).dequantize()))(X))


def test_float64_operands_in_high_precision_stay_float64():
    with jax.enable_x64(True):
        a, b = (jnp.asarray(np.asarray(v)[:8, :8], jnp.float64) for v in (X, W))
        y = dot(a, b)  # K = 8: below a block
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(y, np.asarray(a) @ np.asarray(b), rtol=1e-13)


def test_operands_that_are_no_arrays():
    for lhs in (2.0, [[1.0] * 32]):
        with pytest.raises(ValueError, match="lhs must be an array, got"):
            unchecked_dot(lhs, W)

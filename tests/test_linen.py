"""The slot in flax.linen: a layer with it is the product with the layer's own key."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fp4jax
from fp4jax.linen import DotGeneral, dot_general_cls
from tests import contract
from tests.contract import assert_close, assert_identical

pytestmark = pytest.mark.standard_promotion  # flax's layers need it

X = jnp.asarray(contract.gridded((2, 8, 24), 1))
KEY = jax.random.key(4)
FEATURES = 40


def loss_and_gradients(layer, variables, x, key):
    """(loss, gradients of parameters and x) with the stream `fp4` at `key`."""

    def loss(variables, x):
        y = layer.apply(variables, x, rngs={} if key is None else {"fp4": key})
        return jnp.sum(jnp.sin(y)), y

    (_, y), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(variables, x)
    return y, *gradients


def key_of(layer_with, variables, x, key):
    """The key that the slot of a layer draws: that of any module of the slot's class name in its place."""
    keys = []

    class DotGeneral(nn.Module):
        @nn.compact
        def __call__(self, *args, **kwargs):
            keys.append(self.make_rng("fp4"))
            return jax.lax.dot_general(*args, **kwargs)

    layer_with(DotGeneral).apply(variables, x, rngs={"fp4": key})
    return keys[0]


def dense(cls):
    return nn.Dense(FEATURES, dot_general_cls=cls)


def several_axes(cls):
    return nn.DenseGeneral((4, 9), axis=(-2, -1), dot_general_cls=cls)


@pytest.mark.parametrize(
    "layer_with, shape", [(dense, (2, 8, 24)), pytest.param(several_axes, (2, 8, 6, 4), marks=pytest.mark.slow)]
)
def test_layer_is_the_product_with_its_key(layer_with, shape):
    x = X.reshape(shape)
    layer = layer_with(dot_general_cls("averis"))
    variables = layer_with(None).init(jax.random.key(0), x)
    assert jax.tree.structure(jax.eval_shape(layer.init, jax.random.key(0), x)) == jax.tree.structure(variables)

    @contract.jit
    def both(variables, x, key):
        kernel, bias = variables["params"]["kernel"], variables["params"]["bias"]
        contracted = kernel.ndim - bias.ndim
        numbers = (tuple(range(x.ndim - contracted, x.ndim)), tuple(range(contracted))), ((), ())
        drawn = key_of(layer_with, variables, x, key)

        def expected(kernel, bias, x):
            y = fp4jax.dot_general(x, kernel, numbers, recipe="averis", key=drawn) + bias
            return jnp.sum(jnp.sin(y)), y

        (_, y), (dkernel, dbias, dx) = jax.value_and_grad(expected, argnums=(0, 1, 2), has_aux=True)(kernel, bias, x)
        expected = (y, {"params": {"kernel": dkernel, "bias": dbias}}, dx)
        return loss_and_gradients(layer, variables, x, key), expected

    got, expected = both(variables, x, KEY)
    assert_close(got, expected)
    other = both(variables, x, jax.random.key(5))[0]
    assert_identical(other[0], got[0])
    assert not np.array_equal(other[1]["params"]["kernel"], got[1]["params"]["kernel"])


def test_layers_of_one_model_draw_differently():
    class Twins(nn.Module):
        @nn.compact
        def __call__(self, x):
            return [nn.Dense(FEATURES, use_bias=False, dot_general_cls=dot_general_cls("nvfp4"))(x) for _ in range(2)]

    @contract.jit
    def gradients(kernel, x, key):
        params = {"params": {f"Dense_{i}": {"kernel": kernel} for i in range(2)}}
        return jax.grad(lambda p: sum(jnp.sum(jnp.sin(y)) for y in Twins().apply(p, x, rngs={"fp4": key})))(params)

    first, second = jax.tree.leaves(gradients(jnp.asarray(contract.weights()), X, KEY))
    assert not np.array_equal(first, second)
    assert np.linalg.norm(first - second) < 0.5 * np.linalg.norm(first)


def test_scanned_layers_draw_differently():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            y = nn.Dense(FEATURES, use_bias=False, dot_general_cls=dot_general_cls("nvfp4"), name="dense")(x)
            return x, y

    stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True, "fp4": True}, length=2)()
    shapes = jax.eval_shape(stack.init, jax.random.key(0), X, None)
    assert shapes["params"]["dense"]["kernel"].shape == (2, 24, FEATURES)

    @contract.jit
    def run(kernel, x, key):
        params = {"params": {"dense": {"kernel": jnp.stack([kernel, kernel])}}}

        def loss(params):
            ys = stack.apply(params, x, None, rngs={"fp4": key})[1]
            return jnp.sum(jnp.sin(ys)), ys

        gradients, ys = jax.grad(loss, has_aux=True)(params)
        return gradients["params"]["dense"]["kernel"], ys

    dw, ys = run(jnp.asarray(contract.weights()), X, KEY)
    assert_identical(ys[0], ys[1])
    assert np.isfinite(dw).all() and not np.array_equal(dw[0], dw[1])


def test_without_the_stream():
    """Evaluation works; gradients say what is missing; a deterministic recipe needs nothing."""
    layer = dense(dot_general_cls("averis"))
    variables = jax.eval_shape(layer.init, jax.random.key(0), X)
    assert jax.eval_shape(layer.apply, variables, X).shape == (2, 8, FEATURES)
    with pytest.raises(ValueError, match="averis rounds gradients stochastically: pass key"):
        jax.eval_shape(lambda v, x: loss_and_gradients(layer, v, x, None), variables, X)
    with pytest.raises(ValueError, match="averis.sr_all rounds stochastically in the forward"):
        jax.eval_shape(dense(dot_general_cls("averis+sr_all")).apply, variables, X)
    nearest = dense(dot_general_cls("averis+nearest"))
    jax.eval_shape(lambda v, x: loss_and_gradients(nearest, v, x, None), variables, X)


def test_a_stream_of_another_name():
    layer = dense(dot_general_cls("averis+sr_all", rng_stream="dropout"))
    variables = jax.eval_shape(dense(None).init, jax.random.key(0), X)
    jax.eval_shape(lambda v, x: layer.apply(v, x, rngs={"dropout": KEY}), variables, X)
    with pytest.raises(ValueError, match="rounds stochastically"):
        jax.eval_shape(lambda v, x: layer.apply(v, x, rngs={"fp4": KEY}), variables, X)


def test_options():
    with pytest.raises(ValueError, match="unknown recipe 'averes'"):
        dot_general_cls("averes")
    slot = dot_general_cls("nvfp4", backend="xla", gemm="emulated")()
    assert isinstance(slot, DotGeneral) and (slot.backend, slot.gemm) == ("xla", "emulated")
    with pytest.raises(NotImplementedError, match="gemm='native'"):
        jax.eval_shape(dense(dot_general_cls("nvfp4", gemm="native")).init, jax.random.key(0), X)


def test_precision_and_dtype_reach_the_product():
    layer = nn.Dense(FEATURES, dtype=jnp.bfloat16, dot_general_cls=dot_general_cls("averis"))
    variables = jax.eval_shape(layer.init, jax.random.key(0), X)
    assert jax.eval_shape(layer.apply, variables, X).dtype == jnp.bfloat16

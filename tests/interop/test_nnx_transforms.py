"""Quantized NNX models under NNX's transforms: the numbers of the plain calls with the same keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fp4jax
from tests import contract
from tests.contract import assert_close, assert_identical
from tests.interop.models import LAYERS, WEIGHTS, X, loss_of, next_keys, nnx_model, plain_step, plain_value_and_grad

pytestmark = pytest.mark.standard_promotion  # flax's layers need it

KINDS = ["slot", pytest.param("own", marks=pytest.mark.slow)]


def jit(function):
    """`nnx.jit`, which takes no compiler options, with those of `contract.jit`."""

    def run(model, x):
        graph, state = nnx.split(model)

        @contract.jit
        def pure(state, x):
            model = nnx.merge(graph, state)
            return function(model, x), nnx.state(model)

        result, state = pure(state, x)
        nnx.update(model, state)
        return result

    return run


def params_of(gradients) -> list:
    return [leaf for leaf in jax.tree.leaves(gradients) if leaf.shape[-1] == X.shape[-1]]


@pytest.mark.parametrize("kind", KINDS)
def test_jit_and_value_and_grad(kind):
    model = nnx_model(kind)

    @nnx.jit
    def step(model, x):
        return nnx.value_and_grad(lambda model, x: loss_of(model(x)), argnums=(0, 1))(model, x)

    plain = jax.jit(plain_value_and_grad)  # compiled with LLVM's optimizations, as by nnx.jit
    for _ in range(2):  # the second call draws anew
        expected, (dw, dx) = plain(list(WEIGHTS), X, next_keys(model))
        got, (gradients, got_dx) = step(model, X)
        assert_identical((got, params_of(gradients), got_dx), (expected, dw, dx))
    assert all(layer.stream.count[...] == 2 for layer in model.layers)


@pytest.mark.parametrize("kind", KINDS)
def test_remat(kind):
    model = nnx_model(kind)
    expected, (dw, _) = plain_step(list(WEIGHTS), X, next_keys(model))

    def loss(model, x):
        for layer in model.layers:
            x = nnx.remat(lambda layer, x: layer(x))(layer, x)
        return loss_of(x)

    got, gradients = jit(nnx.value_and_grad(loss))(model, X)
    assert_identical((got, params_of(gradients)), (expected, dw))


def stacked(kind: str, recipe="averis"):
    """Both layers in one module, made by nnx.vmap and quantized inside of it."""

    @nnx.split_rngs(splits=len(WEIGHTS))
    @nnx.vmap(in_axes=(0, 0))
    def make(w, rngs):
        layer = LAYERS[kind](w)
        fp4jax.nnx.quantize(layer, recipe, rngs=rngs)
        return layer

    return make(WEIGHTS, nnx.Rngs(fp4=7))


@pytest.mark.parametrize("kind", ["own", pytest.param("slot", marks=pytest.mark.slow)])
def test_scan(kind):
    layers = stacked(kind)
    streams = nnx.clone(layers.stream)
    keys = nnx.vmap(lambda stream: stream())(streams)
    expected, (dw, _) = plain_step(list(WEIGHTS), X, list(keys))

    def loss(layers, x):
        return loss_of(nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, layers))

    got, gradients = jit(nnx.value_and_grad(loss))(layers, X)
    assert_identical((got, params_of(gradients)[0]), (expected, jnp.stack(dw)))
    assert np.array_equal(layers.stream.count[...], [1, 1])


def test_stacked_layers_quantized_from_outside_are_refused():
    @nnx.vmap(in_axes=0)
    def make(w):
        return LAYERS["slot"](w)

    with pytest.raises(ValueError, match="linear has a kernel of 3 axes in place of 2.*inside the function.*vmapped"):
        fp4jax.nnx.quantize(make(WEIGHTS), "averis", rngs=nnx.Rngs(fp4=7))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["slot", "own"])
def test_vmap_shares_statistics_between_examples(kind):
    """Examples are tokens of one product: the whole batch in one call, but for the order of its sums."""
    model = nnx_model(kind)
    keys = next_keys(model)

    @jit
    def step(model, x):
        def loss(model, x):
            return loss_of(nnx.vmap(lambda model, x: model(x), in_axes=(nnx.StateAxes({...: None}), 0))(model, x))

        return nnx.value_and_grad(loss)(model, x)

    expected, (dw, _) = plain_step(list(WEIGHTS), X, keys)
    got, gradients = step(model, X)
    assert_close((got, params_of(gradients)), (expected, dw))

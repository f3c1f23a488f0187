"""Quantized models beside optax: the plain calls' gradients, and what the optimizer makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests import contract
from tests.contract import assert_close, assert_identical
from tests.interop.models import KEY, WEIGHTS, LinenStack, X, linen_model, loss_of, next_keys, nnx_model, plain_step

pytestmark = pytest.mark.standard_promotion  # flax's layers need it


def decayed(params):
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


OPTIMIZERS = {
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
    "masked weight decay": optax.adamw(1e-2, weight_decay=0.1, mask=decayed),
    "MultiSteps": optax.MultiSteps(optax.sgd(1e-2), every_k_schedule=2).gradient_transformation(),
    "apply_if_finite": optax.apply_if_finite(optax.sgd(1e-2), max_consecutive_errors=3),
}
MODEL = linen_model("own", LinenStack("own"))
VARIABLES = {"params": {f"layer_{number}": {"w": w} for number, w in enumerate(WEIGHTS)}}


def plain_gradients(x, key):
    """Of both weights, by the plain calls with the keys that the layers draw."""
    recorded = LinenStack("own", record=True).apply(VARIABLES, x, rngs={"fp4": key}, mutable=["keys"])[1]
    return plain_step(list(WEIGHTS), x, jax.tree.leaves(recorded))[1][0]


def trained(optimizer, batches):
    """(parameters after every step, those of the optimizer by itself on the same gradients)."""

    @contract.jit
    def step(variables, state, x, key):
        gradients = jax.grad(lambda variables: loss_of(MODEL.apply(variables, x, rngs={"fp4": key})))(variables)
        updates, state = optimizer.update(gradients, state, variables)
        return optax.apply_updates(variables, updates), state, gradients

    variables, state, steps = VARIABLES, optimizer.init(VARIABLES), []
    for number, x in enumerate(batches):
        before = variables, state
        variables, state, gradients = step(variables, state, x, jax.random.fold_in(KEY, number))
        steps.append((before, gradients, (variables, state)))
    return steps


@pytest.mark.parametrize(
    "name", ["chain", *(pytest.param(name, marks=pytest.mark.slow) for name in OPTIMIZERS if name != "chain")]
)
def test_a_step_is_the_optimizer_s_on_the_plain_gradients(name):
    optimizer = OPTIMIZERS[name]
    steps = trained(optimizer, [X, -X])
    assert_identical(steps[0][1], plain_gradients(X, jax.random.fold_in(KEY, 0)))
    for (variables, state), gradients, (after, after_state) in steps:
        updates, expected_state = contract.jit(optimizer.update)(gradients, state, variables)
        assert_close(after, optax.apply_updates(variables, updates))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9), after_state, expected_state)
    moved = [not np.array_equal(*map(lambda tree: jax.tree.leaves(tree)[0], (before[0], after[0])))
             for before, _, after in steps]  # fmt: skip
    assert moved == ([False, True] if name == "MultiSteps" else [True, True])


def test_what_is_not_finite_is_not_laundered_and_apply_if_finite_skips_it():
    for bad in (jnp.nan, jnp.inf):
        ((variables, _), gradients, (after, state)), *_ = trained(
            OPTIMIZERS["apply_if_finite"], [X.at[0, 0, 0].set(bad)]
        )
        assert not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
        assert_identical(after, variables)
        assert state.notfinite_count == 1


def test_nnx_optimizer_updates_parameters_and_no_stream():
    model = nnx_model("slot")
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2, weight_decay=0.1, mask=decayed), wrt=nnx.Param)
    graph, state = nnx.split((model, optimizer))

    @contract.jit
    def step(state, x):
        model, optimizer = nnx.merge(graph, state)
        gradients = nnx.grad(lambda model: loss_of(model(x)))(model)
        optimizer.update(model, gradients)
        return nnx.state((model, optimizer)), gradients

    keys = next_keys(model)
    base = [layer.stream.key[...] for layer in model.layers]
    state, gradients = step(state, X)
    model, _ = nnx.merge(graph, state)
    assert_identical(jax.tree.leaves(gradients), plain_step(list(WEIGHTS), X, keys)[1][0])
    for layer, key, w in zip(model.layers, base, WEIGHTS, strict=True):
        assert layer.stream.count[...] == 1 and layer.stream.key[...] == key
        assert np.abs(layer.linear.kernel[...] - w).max() > 1e-3

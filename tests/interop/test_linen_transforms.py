"""Quantized Linen models under Linen's transforms: the numbers of the plain calls with the same keys."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from tests import contract
from tests.contract import assert_identical
from tests.interop.models import KEY, WEIGHTS, LinenLayer, LinenStack, X, linen_model, loss_of, plain_step

pytestmark = pytest.mark.standard_promotion  # flax's layers need it

LIFTS = {"plain": lambda layer: layer, "remat": nn.remat, "jit": nn.jit}


def params_of(kind: str, weights) -> dict:
    return {"linear": {"kernel": weights}} if kind == "slot" else {"w": weights}


def unrolled(kind):
    return {"params": {f"layer_{number}": params_of(kind, w) for number, w in enumerate(WEIGHTS)}}


def step(model, variables, x, *rest):
    def loss(variables, x):
        result = model.apply(variables, x, *rest, rngs={"fp4": KEY})
        return loss_of(result[0] if rest else result)

    return contract.jit(jax.value_and_grad(loss, argnums=(0, 1)))(variables, x)


@pytest.mark.parametrize(
    "lift, kind",
    [
        ("plain", "own"),
        ("remat", "slot"),
        *(pytest.param(*cell, marks=pytest.mark.slow)
          for cell in (("remat", "own"), ("jit", "own"), ("plain", "slot"), ("jit", "slot"))),
    ],
)  # fmt: skip
def test_layers(lift, kind):
    variables = unrolled(kind)
    record = LinenStack(kind, True, lift=LIFTS[lift])
    keys = jax.tree.leaves(record.apply(variables, X, rngs={"fp4": KEY}, mutable=["keys"])[1])
    got, (gradients, dx) = step(linen_model(kind, LinenStack(kind, lift=LIFTS[lift])), variables, X)
    expected, (dw, expected_dx) = plain_step(list(WEIGHTS), X, keys)
    assert_identical((got, jax.tree.leaves(gradients), dx), (expected, dw, expected_dx))


def scanned(kind, record=False, lift=lambda layer: layer, split=True):
    rngs = {"params": True} | ({"fp4": True} if split else {})
    return nn.scan(lift(LinenLayer), variable_axes={"params": 0, "keys": 0}, split_rngs=rngs, length=2)(kind, record)


@pytest.mark.parametrize(
    "lift, kind",
    [
        ("remat", "own"),
        *(pytest.param(*cell, marks=pytest.mark.slow)
          for cell in (("plain", "own"), ("plain", "slot"), ("remat", "slot"))),
    ],
)  # fmt: skip
def test_scan(lift, kind):
    variables = {"params": params_of(kind, WEIGHTS)}
    record = scanned(kind, True, LIFTS[lift])
    (keys,) = jax.tree.leaves(record.apply(variables, X, None, rngs={"fp4": KEY}, mutable=["keys"])[1])
    got, (gradients, dx) = step(linen_model(kind, scanned(kind, lift=LIFTS[lift])), variables, X, None)
    expected, (dw, expected_dx) = plain_step(list(WEIGHTS), X, list(keys))
    assert_identical((got, *jax.tree.leaves(gradients), dx), (expected, jnp.stack(dw), expected_dx))


@pytest.mark.parametrize("kind", ["slot", "own"])
def test_a_scan_without_the_stream_says_what_to_pass(kind):
    variables = {"params": params_of(kind, WEIGHTS)}
    model = linen_model(kind, scanned(kind, split=False))

    def loss(variables):
        return loss_of(model.apply(variables, X, None, rngs={"fp4": KEY})[0])

    assert jax.eval_shape(loss, variables).shape == ()  # evaluation draws nothing
    with pytest.raises(ValueError, match=r"under nn.scan also split_rngs=\{'fp4': True\}"):
        jax.eval_shape(jax.grad(loss), variables)

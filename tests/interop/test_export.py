"""Quantized functions through `jax.export`: the same numbers from the exported program, for symbolic sizes too."""

import importlib.util

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import export

import fp4jax
from fp4jax.recipes import list_recipes
from tests import contract
from tests.contract import assert_close, assert_identical
from tests.interop.models import KEY, WEIGHTS, WIDTH, X, plain_step, product

pytestmark = pytest.mark.standard_promotion  # flax's layers need it

W = WEIGHTS[0]
FIXED_SIZES_ONLY = {"averis_best": "split of low rank", "metis": "split of low rank", "tetrajet2": "several blocks"}


def test_a_training_step():
    args = list(WEIGHTS), X, list(jax.random.split(KEY, 2))
    exported = export.export(plain_step)(*args)
    assert_identical(contract.jit(exported.call)(*args), plain_step(*args))


@pytest.mark.skipif(importlib.util.find_spec("flatbuffers") is None, reason="jax.export writes with flatbuffers")
def test_a_model_written_and_read():
    model = fp4jax.linen.quantize(nn.Dense(WIDTH, use_bias=False), "averis")
    forward = contract.jit(lambda kernel, x: model.apply({"params": {"kernel": kernel}}, x))
    read = export.deserialize(export.export(forward)(W, X).serialize())
    assert_identical(contract.jit(read.call)(W, X), forward(W, X))


def step(name):
    def loss(w, x):
        return jnp.sum(product(x, w, KEY, name) ** 2)

    return contract.jit(jax.value_and_grad(loss, argnums=(0, 1)))


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("averis_hadamard", "b, 32"),
        *(pytest.param(name, "b, t, 32", marks=pytest.mark.slow)
          for name in list_recipes() if name not in FIXED_SIZES_ONLY),
    ],
)  # fmt: skip
def test_sizes_that_are_symbols(name, sizes):
    """One program, with gradients and random draws, for numbers of tokens that fill blocks and that do not."""
    x = jax.ShapeDtypeStruct(export.symbolic_shape(sizes), jnp.float32)
    exported = contract.jit(export.export(step(name))(W, x).call)
    for tokens in (16, 8):
        x = X.reshape(16, WIDTH)[:tokens]
        x = x if sizes == "b, 32" else x.reshape(2, -1, WIDTH)
        assert_close(exported(W, x), step(name)(W, x))


@pytest.mark.parametrize("name, reason", FIXED_SIZES_ONLY.items())
def test_recipes_that_need_fixed_sizes_say_so(name, reason):
    x = jax.ShapeDtypeStruct(export.symbolic_shape("b, 32"), jnp.float32)
    with pytest.raises(ValueError, match=f"{reason}.*export with fixed sizes"):
        export.export(step(name))(W, x)

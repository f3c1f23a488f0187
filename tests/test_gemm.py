"""What is promised of the products themselves, read from the traced program."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.extend import core

from fp4jax.dot import dot_general
from fp4jax.gemm import emulation_dtype
from fp4jax.recipes import list_recipes, recipe

X, W = jax.ShapeDtypeStruct((2, 48, 80), jnp.bfloat16), jax.ShapeDtypeStruct((80, 64), jnp.float32)


@pytest.fixture
def accelerator():
    """The ambient mesh of a device that is not there."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    types = (jax.sharding.AxisType.Auto,)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("data",), types, abstract_device=device)):
        yield


def products(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive is lax.dot_general_p:
            yield equation
        for inner in core.jaxprs_in_params(equation.params):
            yield from products(inner)


# A product with an operand in high precision has the caller's precision, as without a recipe.
QUANTIZED = [name for name in list_recipes() if all(operand.format for operand in recipe(name).slots.values())]


@pytest.mark.parametrize("name", QUANTIZED)
def test_float32_is_multiplied_in_full(accelerator, name):
    """On a matrix unit the default precision would round float32 operands to bfloat16 or TensorFloat-32."""

    def gradients(x, w):
        def loss(x, w):
            contract = (((2,), (0,)), ((), ()))
            y = dot_general(x, w, contract, preferred_element_type=x.dtype, recipe=name, key=jax.random.key(0))
            return jnp.sum(y.astype(jnp.float32))

        return jax.grad(loss, (0, 1))(x, w)

    found = list(products(jax.make_jaxpr(gradients)(X, W).jaxpr))
    assert len(found) >= 3
    for equation in found:
        if any(operand.aval.dtype == jnp.float32 for operand in equation.invars):
            assert equation.params["precision"] == (lax.Precision.HIGHEST,) * 2, [str(v.aval) for v in equation.invars]


def test_products_are_for_the_meshs_device(accelerator):
    assert emulation_dtype() == jnp.bfloat16

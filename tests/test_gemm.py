"""What is promised of the products themselves, read from the traced program."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.extend import core

from benchmarks import peers
from fp4jax import dot, gemm
from fp4jax.dot import dot_general
from fp4jax.hardware import emulation_dtype
from fp4jax.recipes import list_recipes, recipe
from tests.contract import assert_identical

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


def outputs_of(name, dtype):
    x, w = (jax.random.normal(jax.random.key(i), shape) + 0.5 for i, shape in enumerate([(48, 80), (80, 64)]))
    contract = (((1,), (0,)), ((), ()))
    x = x.astype(jnp.bfloat16).astype(dtype)
    return dot_general(x, w, contract, preferred_element_type=dtype, recipe=name, key=jax.random.key(0))


def test_where_it_is_asked_for_a_product_is_rounded_before_a_mean_is_added(monkeypatch):
    """What is added to is in the result's dtype; what is added, and the sum, in float32."""
    whole = outputs_of("averis", jnp.float32)
    once = outputs_of("averis", jnp.bfloat16)
    nothing_added = outputs_of("nvfp4", jnp.bfloat16)
    emulated = gemm.emulated()
    assert not emulated.rounded  # on a CPU
    monkeypatch.setitem(dot._PRODUCTS, "auto", lambda: dataclasses.replace(emulated, rounded=True))
    assert_identical(outputs_of("averis", jnp.float32), whole)
    assert_identical(outputs_of("nvfp4", jnp.bfloat16), nothing_added)
    twice = outputs_of("averis", jnp.bfloat16)
    assert not jnp.array_equal(twice, once)
    half_unit = 2.0 ** (int(jnp.log2(jnp.max(jnp.abs(whole)))) - 8)  # of the largest value's last place
    errors = [float(jnp.max(jnp.abs(found.astype(jnp.float32) - whole))) for found in (once, twice)]
    assert errors[0] <= half_unit < errors[1] <= 2 * half_unit


def test_gpus_round_before_a_mean_is_added(accelerator):
    assert gemm.best().rounded and gemm.emulated().rounded
    jaxpr = jax.make_jaxpr(functools.partial(outputs_of, "averis"), static_argnums=0)(jnp.bfloat16)
    assert "optimization_barrier" in str(jaxpr)


@pytest.mark.skipif(emulation_dtype() != jnp.bfloat16, reason="a CPU without bfloat16 units")
@pytest.mark.parametrize(("tokens", "products"), [((64,), 5), ((2, 64), 7)], ids=str)
def test_a_mean_costs_no_product_in_float32_on_a_cpu(tokens, products):
    """Three GEMMs and the mean's row in two of them; over several token axes also the column sums of X and D."""
    x, w = jnp.ones((*tokens, 256)), jnp.ones((256, 128))

    def run(x, w, key):
        y, pull = jax.vjp(
            lambda x, w: dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())), recipe="averis", key=key), x, w
        )
        return y, *pull(y)

    text = jax.jit(run).lower(x, w, jax.random.key(0)).compile().as_text()
    assert peers.products(text) == {"bf16 * bf16 -> f32": products}

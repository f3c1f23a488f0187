"""The names of products say what they are, also where JAX wraps them."""

import jax
import jax.numpy as jnp
import pytest

from fp4jax import scopes
from fp4jax.numerics import NVFP4, quantize


def name_of(*contexts):
    """The path that nested scopes give an equation."""

    def function(x):
        for context in contexts:
            context.__enter__()
        try:
            return x + 1
        finally:
            for context in reversed(contexts):
                context.__exit__(None, None, None)

    (equation,) = jax.make_jaxpr(function)(jnp.float32(0)).eqns
    return str(equation.source_info.name_stack)


def test_a_product_is_read_back():
    x = jnp.ones((16, 16))
    codes = jax.eval_shape(lambda x: quantize(x, NVFP4, axis=-1), x)
    operands = scopes.of_operands(codes, x)
    path = name_of(scopes.of_recipe("mine/(v2)"), scopes.of_gemm("dgrad", 8), operands)
    expected = scopes.Scope("mine__v2_", "dgrad", 8, ("NVFP4", "float32"), (4, 32), quantized=1)
    assert scopes.read(path) == expected
    assert scopes.read(f"jit(step)/transpose(jvp(layers))/while/body/{path}/dot_general") == expected


@pytest.mark.parametrize(
    ("context", "field"), [(scopes.of_correction, "is_correction"), (scopes.of_preparation, "is_preparation")]
)
def test_other_products_are_told_apart(context, field):
    assert getattr(scopes.read(name_of(scopes.of_recipe("averis"), context())), field)
    assert not getattr(scopes.read(name_of(scopes.of_recipe("averis"))), field)
    assert not getattr(scopes.read(name_of(context())), field)  # somebody else's scope of that name


def test_jax_wraps_a_recipe():
    assert scopes.read("transpose(jvp(fp4jax:bf16))/dot_general") == scopes.Scope("bf16")
    assert scopes.read("jit(f)/mlp/dot_general") == scopes.Scope()


@pytest.mark.parametrize("part", scopes.STEP_PARTS)
def test_parts_of_a_step_are_read_back(part):
    assert scopes.read(name_of(scopes.of_step_part(part))).step_part == part
    assert scopes.read(f"jit(step)/transpose(jvp({part}))/while/body/mul").step_part == part
    assert scopes.read(f"jit(step)/my_{part}_2/mul").step_part is None
    with pytest.raises(ValueError, match="attention, cross_entropy, optimizer"):
        scopes.of_step_part("norms")

"""The reader of optimized HLO finds what it is there to find, in programs compiled for the CPU."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from fp4jax.numerics import FORMATS, quantize
from fp4jax.reporting.optimized_hlo import Program

X = jax.ShapeDtypeStruct((32, 64), jnp.float32)


def sources(function, *shapes):
    """For every product, the precise source of its left operand, by opcode."""
    program = Program(jax.jit(function).lower(*shapes).compile().as_text())
    found = [program.precise_source(program.operands(product)[0]) for product in program.products()]
    assert found
    return [source and source.opcode for source in found]


def product(values, w):
    return lax.dot_general(values, w, (((1,), (0,)), ((), ())))


def quantized(x, format):
    return quantize(x, format, axis=-1).scaled_values()


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_quantized_values_have_no_precise_source(format):
    assert sources(lambda x, w: product(quantized(x, format), w), X, X.update(shape=(64, 8))) == [None]


@pytest.mark.parametrize(
    "prepare",
    [
        lambda x: x,
        lambda x: x * 2 + jnp.max(jnp.abs(x)),
        lambda x: jnp.where(x > 0, x, jnp.float32(0)),
        lambda x: x + quantized(x, FORMATS[0]),
        lambda x: lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.uint32) | jnp.uint32(1), jnp.float32),
        lambda x: lax.bitcast_convert_type(
            lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000), jnp.float32
        ),
        lambda x: lax.reduce_precision(x, 8, 7),
        lambda x: x.reshape(4, 8, 64).sum(0),
    ],
    ids=["as it is", "affine", "selected", "residual added", "one bit set", "bfloat16 by bits", "bfloat16", "summed"],
)
def test_a_path_in_more_bits_is_found(prepare):
    assert sources(lambda x, w: product(prepare(x), w), X, X.update(shape=(64, 8))) == ["parameter"]


def test_paths_go_through_loops():
    """The carry's first entry is what the program was given, then codes; the second is quantized from the start."""

    def through_loop(x, w, skip):
        def step(carry, kernel):
            first, second = carry
            y = product(second if skip else first, kernel)
            return (quantized(y, FORMATS[0]), quantized(jnp.sin(y), FORMATS[0])), None

        return lax.scan(step, (x, quantized(x, FORMATS[0])), w)[0]

    kernels = jax.ShapeDtypeStruct((3, 64, 64), jnp.float32)
    assert sources(lambda x, w: through_loop(x, w, skip=False), X, kernels) == ["parameter"]
    assert sources(lambda x, w: through_loop(x, w, skip=True), X, kernels) == [None]


@pytest.mark.parametrize("both", [True, False], ids=["in both branches", "in one branch"])
def test_paths_go_through_branches(both):
    def through_branches(x, w, index):
        branches = [lambda x: quantized(x, FORMATS[0]), lambda x: quantized(jnp.sin(x), FORMATS[0]) if both else x * 2]
        return product(lax.switch(index, branches, x), w)

    found = sources(through_branches, X, X.update(shape=(64, 8)), jax.ShapeDtypeStruct((), jnp.int32))
    assert found == [None if both else "parameter"]


def test_a_product_is_a_precise_source():
    def twice(x, w):
        return product(jnp.tanh(product(x, w)), w)

    assert "dot" in sources(twice, X, X.update(shape=(64, 64)))


# As XLA for GPUs writes a fusion that runs beside others, by hand.
BESIDE = """HloModule m

%inside (n: f32[16,16]) -> f32[16,16] {
  %n = f32[16,16]{1,0} parameter(0)
  %few = s4[16,16]{1,0} convert(%n)
  ROOT %wide = f32[16,16]{1,0} convert(%few)
}

ENTRY %main (x: f32[16,16]) -> f32[16,16] {
  %x = f32[16,16]{1,0} parameter(0)
  %begun = ((f32[16,16]{1,0}), f32[16,16]{1,0}, u32[]) fusion-start(%x), kind=kLoop, calls=%inside
  %y = f32[16,16]{1,0} fusion-done(%begun)
  ROOT %z = f32[16,16]{1,0} dot(%y, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


@pytest.mark.parametrize(("text", "source"), [(BESIDE, None), (BESIDE.replace("s4", "f32"), "parameter")])
def test_paths_go_through_fusions_that_run_beside_others(text, source):
    program = Program(text)
    (dot,) = program.products()
    found = program.precise_source(program.operands(dot)[0])
    assert (found and found.opcode) == source


def test_text_that_is_no_module():
    with pytest.raises(ValueError, match="no HLO module"):
        Program("")

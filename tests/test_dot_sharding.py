"""The dot on meshes of 8 devices equals the dot on one: the same codes, scales and draws, however the operands are cut.

Inputs are the contract's, whose means are exact: only the order of the products' last sums may differ.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fp4jax.dot import dot_general, prepare
from tests import contract
from tests.contract import assert_close

KEY = jax.random.key(9)
AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
RECIPE = "averis_hadamard"  # draws for both copies of D and for its mean


def mesh(sizes, kind):
    return jax.make_mesh(sizes, AXES, axis_types=(kind,) * 3, devices=jax.devices()[: int(np.prod(sizes))])


def tensors():
    (x, g), w = contract.inputs(), contract.weights()
    return x, w, g


def place(mesh, specs):
    return [jax.device_put(t, NamedSharding(mesh, spec)) for t, spec in zip(tensors(), specs, strict=True)]


def product(x, w, g, key, prepared):
    options = dict(lhs_q=prepare(x, RECIPE, key=key), rhs_q=prepare(w, RECIPE, "rhs", key=key)) if prepared else {}
    dot = functools.partial(
        dot_general, dimension_numbers=contract.DIMENSION_NUMBERS, recipe=RECIPE, key=key, **options
    )
    y, pull = jax.vjp(dot, x, w)
    return y, *pull(g)


# A new one for every test: the trace depends on the mesh in scope.
def compiled(prepared=False):
    return contract.jit(functools.partial(product, prepared=prepared))


@functools.cache
def on_one_device():
    return tuple(np.asarray(t) for t in compiled()(*map(jnp.asarray, tensors()), KEY))


AUTO = {
    "data": ((4, 1, 1), (P("data"), P(), P("data"))),
    "fsdp": ((1, 4, 1), (P("fsdp"), P("fsdp"), P("fsdp"))),
    "column parallel": ((2, 2, 2), (P(BATCH), P("fsdp", "tensor"), P(BATCH, None, "tensor"))),
    "row parallel": ((2, 1, 4), (P("data", None, "tensor"), P("tensor"), P("data"))),
    "sequence": ((2, 1, 2), (P("data", "tensor"), P(None, "tensor"), P("data", "tensor"))),
}


@pytest.mark.parametrize(
    "layout, prepared",
    [("column parallel", True), *(pytest.param(n, p, marks=pytest.mark.slow) for n in AUTO for p in (False, True))],
)
def test_auto_mesh_equals_one_device(layout, prepared):
    sizes, specs = AUTO[layout]
    here = mesh(sizes, AxisType.Auto)
    with jax.set_mesh(here):
        got = compiled(prepared)(*place(here, specs), KEY)
    assert_close(got, on_one_device())


def test_a_sharded_batch_is_not_gathered():
    """Statistics and dW are reduced over the devices; no activation, whole or quantized, travels."""
    sizes, specs = AUTO["data"]
    program = compiled().lower(*place(mesh(sizes, AxisType.Auto), specs), KEY).compile()
    text = program.as_text()
    assert "all-reduce" in text
    assert not re.findall(r"all-gather|all-to-all", text)
    passed_on = re.findall(r"= (\S+) collective-permute\(", text)  # means, in an order that no layout changes
    assert passed_on and all(re.match(r"f32\[1,1,\d+\]", shape) for shape in passed_on)
    y, dx, dw = program(*place(mesh(sizes, AxisType.Auto), specs), KEY)
    assert_close((y, dx, dw), on_one_device())
    assert y.sharding.spec == P("data") and dx.sharding.spec == P("data")


EXPLICIT = {
    "column parallel": ((2, 2, 2), (P(BATCH, None, None), P(None, "tensor"), P(BATCH, None, "tensor"))),
    "data": ((8 // 2, 1, 1), (P("data", None, None), P(None, None), P("data", None, None))),
}


@pytest.mark.parametrize(
    "layout, prepared, in_scope",
    [
        ("column parallel", True, True),
        ("column parallel", False, False),
        pytest.param("column parallel", False, True, marks=pytest.mark.slow),
        pytest.param("column parallel", True, False, marks=pytest.mark.slow),
        pytest.param("data", True, True, marks=pytest.mark.slow),
        pytest.param("data", False, False, marks=pytest.mark.slow),
    ],
)
def test_explicit_mesh_equals_one_device(layout, prepared, in_scope):
    sizes, specs = EXPLICIT[layout]
    here = mesh(sizes, AxisType.Explicit)
    run = compiled(prepared)
    if in_scope:
        with jax.set_mesh(here):
            got = run(*place(here, specs), KEY)
    else:
        got = run(*place(here, specs), KEY)
    assert_close(got, on_one_device())
    for tensor, spec in zip(got, (specs[2], *specs[:2]), strict=True):  # Y like D, gradients like the primals
        assert tensor.sharding.is_equivalent_to(NamedSharding(here, spec), tensor.ndim)


def test_types_on_an_explicit_mesh():
    """What lax gives the result; prepared arrays are sharded like what they were made from."""
    sizes, specs = EXPLICIT["column parallel"]
    here = mesh(sizes, AxisType.Explicit)
    x, w, _ = place(here, specs)

    def types(x, w):
        y = dot_general(x, w, contract.DIMENSION_NUMBERS, recipe=RECIPE)
        assert jax.typeof(y) == jax.typeof(jax.lax.dot_general(x, w, contract.DIMENSION_NUMBERS))
        xq, wq = prepare(x, RECIPE), prepare(w, RECIPE, "rhs")
        assert jax.typeof(xq.forward.residual.codes).sharding.spec == specs[0]
        assert jax.typeof(xq.forward.residual.amax).sharding.spec == P(None, None, None)
        assert jax.typeof(wq.forward.residual.codes).sharding.spec == specs[1]
        return y

    jax.eval_shape(types, x, w)


def test_out_sharding():
    """As lax has it: it names Explicit axes, Auto ones are the compiler's."""
    dot = functools.partial(dot_general, dimension_numbers=contract.DIMENSION_NUMBERS, recipe=RECIPE)
    for kind in (AxisType.Explicit, AxisType.Auto):
        here = mesh((2, 2, 2), kind)
        x, w, _ = place(here, (P("data", None, None), P(None, None), P()))
        wanted = NamedSharding(here, P("data", None, "tensor"))
        run = contract.jit(functools.partial(dot, out_sharding=wanted))
        with jax.set_mesh(here):
            if kind is AxisType.Auto:
                with pytest.raises(ValueError, match="cannot contain axis names that are of type Auto"):
                    run(x, w)
                continue
            y = run(x, w)
        assert y.sharding.is_equivalent_to(wanted, 3)
        assert_close(y, on_one_device()[0])

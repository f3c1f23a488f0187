"""`dot_general(axes=)`: devices that share the sequences of an operand gather its copies, and these are codes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fp4jax.axes import MESH_AXES
from fp4jax.dot import dot_general, prepare
from fp4jax.plan.program import Executions
from fp4jax.reporting.optimized_hlo import Program
from tests import contract
from tests.contract import DIMENSION_NUMBERS, assert_close

KEY = jax.random.key(5)
RECIPE = "averis_hadamard"  # draws for both copies of D and for its mean
BATCH, LENGTH, INPUTS, OUTPUTS = 4, 64, 64, 128
STREAM, SPLIT = ("batch", "sequence", None), P("data", "tensor")
# Of the product: the names it is given, and how X, W and D lie.
LAYOUTS = {
    "column parallel": ((STREAM, None), (SPLIT, P(None, "tensor"), P("data", None, "tensor"))),
    "row parallel": ((None, STREAM), (P("data", None, "tensor"), P("tensor"), SPLIT)),
}


def tensors():
    """Multiples of a quarter, whose means are exact."""
    random = np.random.default_rng(0)
    shapes = (BATCH, LENGTH, INPUTS), (INPUTS, OUTPUTS), (BATCH, LENGTH, OUTPUTS)
    return [random.integers(-16, 17, shape).astype(np.float32) / 4 for shape in shapes]


def results(x, w, d, axes, prepared):
    """(Y, dX, dW)"""
    given = {"lhs_q": prepare(x, RECIPE, key=KEY, axes=axes[0])} if prepared else {}
    dot = functools.partial(
        dot_general, dimension_numbers=DIMENSION_NUMBERS, recipe=RECIPE, key=KEY, axes=axes, **given
    )
    y, pull = jax.vjp(dot, x, w)
    return y, *pull(d)


@functools.cache
def on_one_device():
    run = contract.jit(functools.partial(results, axes=(None, None), prepared=False))
    return jax.device_get(run(*map(jnp.asarray, tensors())))


def mesh():
    return jax.make_mesh((2, 1, 1, 4), MESH_AXES, axis_types=(AxisType.Auto,) * 4)


@pytest.mark.parametrize("layout, prepared", [("column parallel", True), ("column parallel", False),
                                              ("row parallel", False)])  # fmt: skip
def test_codes_are_gathered(layout, prepared):
    axes, specs = LAYOUTS[layout]
    here = mesh()
    placed = [jax.device_put(x, NamedSharding(here, spec)) for x, spec in zip(tensors(), specs, strict=True)]
    with jax.set_mesh(here):
        program = contract.jit(functools.partial(results, axes=axes, prepared=prepared)).lower(*placed).compile()
    assert_close(jax.device_get(program(*placed)), on_one_device())
    executions = Executions(Program(program.as_text()))
    assert "all-to-all" not in executions.collectives()
    codes, others = 0, [0]
    for array, found in executions.gathers().items():
        if array.startswith("u8"):
            codes += found["bytes"]
        else:
            others.append(found["bytes"])
    width = INPUTS if axes[0] else OUTPUTS
    assert codes == 2 * (BATCH // 2) * LENGTH * width * 9 // 16  # two copies
    assert max(others) <= 4 * BATCH * 4 * width  # sums of columns, one for each device


def test_names_are_of_the_last_axes_under_vmap():
    x, w, d = map(jnp.asarray, tensors())
    many = jax.vmap(lambda x: dot_general(x, w, DIMENSION_NUMBERS, recipe="nvfp4", key=KEY, axes=(STREAM, STREAM)))

    def run(x, d):
        y, pull = jax.vjp(many, x)
        return y, *pull(d)

    pairs = [t.reshape(2, BATCH // 2, LENGTH, -1) for t in (x, d)]
    expected = jax.device_get(contract.jit(run)(*pairs))
    with jax.set_mesh(mesh()):
        found = jax.device_get(contract.jit(lambda *args: run(*args))(*pairs))
    assert_close(found, expected)


def test_names_that_do_not_fit():
    x, w, _ = map(jnp.asarray, tensors())
    with pytest.raises(ValueError, match=r"axes must name all 3 axes, .*: got \('batch', 'sequence'\)"):
        dot_general(x, w, DIMENSION_NUMBERS, recipe="nvfp4", axes=(("batch", "sequence"), None))
    with pytest.raises(ValueError, match="unknown axis 'tokens'; accepted: "), jax.set_mesh(mesh()):
        jax.jit(
            lambda x, w: dot_general(
                x, w, DIMENSION_NUMBERS, recipe="bf16", axes=(("batch", "sequence", "tokens"), None)
            )
        )(x, w)
    with pytest.raises(ValueError, match="with lhs_q or axes, lhs must be"):
        dot_general(x.swapaxes(1, 2), w, (((1,), (0,)), ((), ())), recipe="nvfp4", axes=(STREAM, None))
    with pytest.raises(ValueError, match="none of \\('batch', None, None\\) is 'sequence'"):
        dot_general(x, w, DIMENSION_NUMBERS, recipe="nvfp4", axes=(("batch", None, None), None))
    with pytest.raises(ValueError, match="devices share no sequences under nvfp4\\+shards2"):
        dot_general(x, w, DIMENSION_NUMBERS, recipe="nvfp4+shards2", axes=(STREAM, None))
    with pytest.raises(ValueError, match="weights have none to share"):
        prepare(w, "nvfp4", "rhs", axes=("embed", "sequence"))

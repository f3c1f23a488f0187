"""`gemm="fused"`: products whose codes a kernel decodes as it multiplies, in the GPU interpreter and on Hopper GPUs."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import fp4jax
from fp4jax import fused, gemm, hardware
from fp4jax.dot import dot_general, implementation
from fp4jax.hardware import emulation_dtype
from pallas_kernels import compat, dequant_matmul
from tests.test_native import assert_near, on_mesh_of, random

KEY = jax.random.key(3)
# At least 128 rows on every side of the three products; sizes end inside of tiles.
TOKENS, INPUTS, OUTPUTS, EXPERTS = (2, 72), 136, 152, 2


@pytest.fixture(
    params=[
        pytest.param(
            True, id="interpreter", marks=pytest.mark.skipif(not compat.CAN_INTERPRET, reason="needs JAX 0.12")
        ),
        pytest.param(False, id="gpu", marks=pytest.mark.gpu),
    ]
)
def hopper(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(fused, "unsupported_reason", lambda: None)
        interpreted = functools.partial(dequant_matmul.dequant_matmul, interpret=True)
        monkeypatch.setattr(dequant_matmul, "dequant_matmul", lambda *a, device, partitioned: interpreted(*a))


def product_and_gradients(recipe, how, experts=False, dtype=jnp.float32):
    batch = (EXPERTS,) if experts else ()
    numbers = (((3,), (1,)), ((0,), (0,))) if experts else (((2,), (0,)), ((), ()))
    shapes = (*batch, *TOKENS, INPUTS), (*batch, INPUTS, OUTPUTS), (*batch, *TOKENS, OUTPUTS)
    x, w, d = (random(*shape, seed=i) for i, shape in enumerate(shapes))

    def all_three(x, w, d):
        run = functools.partial(
            dot_general, dimension_numbers=numbers, preferred_element_type=dtype, recipe=recipe, key=KEY, gemm=how
        )
        y, pull = jax.vjp(run, x, w)
        return y, *pull(d)

    return all_three, (x.astype(dtype), w, d.astype(dtype))


@pytest.mark.parametrize(
    ("recipe", "experts"),
    [
        ("averis", False),
        pytest.param("averis", True, marks=pytest.mark.slow),
        pytest.param("nvfp4_hadamard", False, marks=pytest.mark.slow),  # 16x16 blocks of W
        pytest.param("metis", False, marks=pytest.mark.slow),
    ],
)
def test_results_are_the_emulations_up_to_the_order_of_additions(hopper, recipe, experts):
    function, arguments = product_and_gradients(recipe, "fused", experts)
    want = product_and_gradients(recipe, "emulated", experts)[0]
    assert_near(jax.jit(function)(*arguments), jax.jit(want)(*arguments))
    report = fp4jax.report(function, *arguments, compile_program=False)
    found = [(row.gemm, row.execution, row.count) for row in report.fp4]
    assert found == [(name, "fused", 1) for name in ("fprop", "dgrad", "wgrad")]


def test_the_report_tells_shapes_and_source(hopper):
    function, arguments = product_and_gradients("averis", "fused")
    rows = fp4jax.report(function, *arguments, compile_program=False).fp4
    tokens, depth = TOKENS[0] * TOKENS[1], 256  # contractions in whole tiles
    assert [row.flops for row in rows] == [
        2 * tokens * OUTPUTS * depth,
        2 * tokens * INPUTS * depth,
        2 * INPUTS * OUTPUTS * depth,
    ]
    assert {row.source.split(":")[0] for row in rows} == {"test_fused.py"}


@pytest.mark.slow
def test_products_are_rounded_once(hopper):
    """In bfloat16 without a mean: what the kernel writes is the float32 result, rounded."""
    (function, arguments), (whole, _) = (
        product_and_gradients("nvfp4", "fused", dtype=dtype) for dtype in (jnp.bfloat16, jnp.float32)
    )
    y, dx, dw = jax.jit(function)(*arguments)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    want = jax.jit(whole)(*(x.astype(jnp.float32) for x in arguments))
    for got, exact in zip((y, dx), want, strict=False):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(exact.astype(jnp.bfloat16)))


def test_what_the_kernel_does_not_take_is_emulated_and_says_so(hopper, caplog):
    gemm._report_emulation.cache_clear()
    function, arguments = product_and_gradients("mxfp4", "fused")
    with caplog.at_level(logging.WARNING, "fp4jax"):
        report = fp4jax.report(function, *arguments, compile_program=False)
    assert {row.execution for row in report.fp4} == {"emulated in " + emulation_dtype().name}
    assert "products of MXFP4 x MXFP4 are emulated, not by the kernel: MXFP4 is not" in caplog.text


def test_means_are_emulated_and_that_is_no_warning(hopper, caplog):
    gemm._report_emulation.cache_clear()
    function, arguments = product_and_gradients("averis", "fused")
    with caplog.at_level(logging.WARNING, "fp4jax"):
        rows = fp4jax.report(function, *arguments, compile_program=False).apart
    means = [row.execution for row in rows if "NVFP4" in row.operands]
    assert means == ["emulated in " + emulation_dtype().name] * 2 and not caplog.records


def test_factors_of_low_rank_are_emulated_and_that_is_no_warning(hopper, caplog):
    gemm._report_emulation.cache_clear()
    function, arguments = product_and_gradients("metis", "fused")
    with caplog.at_level(logging.WARNING, "fp4jax"):
        report = fp4jax.report(function, *arguments, compile_program=False)
    assert {row.execution for row in report.fp4} == {"fused"} and not caplog.records


def test_in_a_shard_map_over_some_axes_products_are_emulated(hopper, caplog):
    """JAX gives no mesh to a call that cuts itself over devices there."""
    gemm._report_emulation.cache_clear()
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    x, w = random(4, *TOKENS, INPUTS), random(INPUTS, OUTPUTS, seed=1)

    def product(x, w):
        return dot_general(x, w, (((3,), (0,)), ((), ())), recipe="nvfp4", gemm="fused")

    def both(x, w):
        run = functools.partial(jax.shard_map, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
        return run(product, axis_names={"data"})(x, w)

    with jax.set_mesh(mesh), caplog.at_level(logging.WARNING, "fp4jax"):
        report = fp4jax.report(both, x, w, compile_program=False)
    assert {row.execution for row in report.fp4} == {"emulated in " + emulation_dtype().name}
    assert "not by the kernel: inside of a shard_map over some axes of the mesh only" in caplog.text


def test_a_function_of_that_name_is_somebody_elses():
    @jax.jit
    def dequant_matmul(x, q, s):
        return x @ (q * s)

    arguments = random(4, 8), random(8, 4), random(1, 4)
    (row,) = fp4jax.report(lambda *a: dequant_matmul(*a), *arguments, compile_program=False).rows
    assert row.execution == ""


@pytest.mark.parametrize(("kind", "platform"), [("NVIDIA B200", "gpu"), ("TPU v5 lite", "tpu")])
def test_elsewhere_it_is_an_error(kind, platform):
    with on_mesh_of(kind, platform):
        expected = rf"gemm='fused': wgmma needs .* 9.0, .*{kind}.*; gemm='emulated' gives the same"
        with pytest.raises(NotImplementedError, match=expected):
            implementation(gemm="fused")


def test_only_by_name():
    """It is not measured yet: "auto" emulates on Hopper."""
    with on_mesh_of("NVIDIA H200"):
        assert hardware.current().compute_capability == "9.0"
        assert not gemm.best().fused and implementation(gemm="fused")[1].fused

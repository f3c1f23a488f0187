"""Native products: what is handed to the tensor cores, and when.

`jax.nn.scaled_matmul` runs on a CPU too, as a product in float32; so everything but the hardware is under test here.
"""

import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fp4jax
from fp4jax import gemm, hardware, native, scopes
from fp4jax.dot import dot_general
from fp4jax.numerics import MXFP4, NVFP4, NVFP4_OUTER128, QTensor, quantize_blocks

KEY = jax.random.key(3)
# Sizes that end inside of a block; two token axes.
TOKENS, INPUTS, OUTPUTS, EXPERTS = (2, 24), 40, 56, 3
NATIVE = (
    "nvfp4", "nvfp4_hadamard", "averis", "averis+per_sequence", "averis_centered_hadamard", "averis_best",
    "four_over_six", "quartet2", "metis",
)  # fmt: skip
QUICK = (("averis", False), ("averis", True), ("nvfp4_hadamard", False))  # square blocks too


@pytest.fixture
def blackwell(monkeypatch):
    monkeypatch.setattr(native, "unsupported_reason", lambda: None)


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) + 0.5, jnp.float32)


def quantized(*shape, axis, axes=None, batch_dims=0):
    return quantize_blocks(random(*shape), NVFP4, axes=axes or (axis,), pack_axis=axis, batch_dims=batch_dims)


def as_stored(value: QTensor, contracted, batch_dims):
    """Element × block scale of `native._operand`, back in the order [*batch, *rows, *contracted]."""
    elements, scales, rows = native._operand(*native._along(value, contracted), contracted, batch_dims)
    assert (elements.dtype, scales.dtype) == (jnp.float4_e2m1fn, jnp.float8_e4m3fn)
    assert elements.shape[-1] == 16 * scales.shape[-1] and elements.ndim == scales.ndim == 3
    values = elements.astype(jnp.float32) * jnp.repeat(scales.astype(jnp.float32), 16, axis=-1)
    sizes = [value.padded_shape[a] for a in contracted]
    return np.asarray(values.reshape(*value.shape[:batch_dims], *rows, *sizes))


CASES = {
    "features of X": (dict(axis=-1), (*TOKENS, INPUTS), (-1,), 0),
    "tokens of X": (dict(axis=-2), (*TOKENS, INPUTS), (-3, -2), 0),
    "inputs of W": (dict(axis=-2), (INPUTS, OUTPUTS), (-2,), 0),
    "outputs of W": (dict(axis=-1), (INPUTS, OUTPUTS), (-1,), 0),
    "square W": (dict(axis=-2, axes=(-2, -1)), (INPUTS, OUTPUTS), (-2,), 0),
    "square W, transposed": (dict(axis=-2, axes=(-2, -1)), (INPUTS, OUTPUTS), (-1,), 0),
    "tokens of experts": (dict(axis=-2, batch_dims=1), (EXPERTS, 24, INPUTS), (-2,), 1),
    "square W of experts": (dict(axis=-2, axes=(-2, -1), batch_dims=1), (EXPERTS, INPUTS, OUTPUTS), (-1,), 1),
}


@pytest.mark.parametrize("case", CASES)
def test_operands_are_what_the_emulation_multiplies(case):
    how, shape, contracted, batch_dims = CASES[case]
    value = quantized(*shape, **how)
    if value.axis not in contracted:  # as `scaled_matmul` takes it, packed along the contraction
        assert len(value.blocked) == 2
    expected = np.asarray(value.values(padded=contracted))
    kept = [a for a in range(batch_dims - expected.ndim, 0) if a not in contracted]
    expected = expected.transpose(*range(batch_dims), *(a % expected.ndim for a in (*kept, *contracted)))
    got = as_stored(value, contracted, batch_dims)
    np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))


def product_and_gradients(recipe, how, experts=False, factor=1):
    """factor: of all sizes but the number of experts."""
    batch = (EXPERTS,) if experts else ()
    numbers = (((3,), (1,)), ((0,), (0,))) if experts else (((2,), (0,)), ((), ()))
    *tokens, inputs, outputs = (factor * size for size in (*TOKENS, INPUTS, OUTPUTS))
    x, w = random(*batch, *tokens, inputs), random(*batch, inputs, outputs, seed=1)

    def product(x, w):
        return dot_general(x, w, numbers, recipe=recipe, key=KEY, gemm=how)

    def all_three(x, w, d):
        y, pull = jax.vjp(product, x, w)
        return y, *pull(d)

    return all_three, (x, w, random(*batch, *tokens, outputs, seed=2))


def assert_near(got, expected, of_largest=3e-6):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=of_largest * np.abs(b).max())


@pytest.mark.parametrize(
    ("recipe", "experts"),
    [
        pytest.param(name, experts, marks=() if (name, experts) in QUICK else pytest.mark.slow)
        for name in NATIVE
        for experts in (False, True)
    ],
)
def test_results_are_the_emulations_up_to_the_order_of_additions(blackwell, recipe, experts):
    function, arguments = product_and_gradients(recipe, "native", experts)
    assert_near(
        jax.jit(function)(*arguments), jax.jit(product_and_gradients(recipe, "emulated", experts)[0])(*arguments)
    )
    report = fp4jax.report(function, *arguments, compile_program=False)
    assert [(row.gemm, row.execution, row.count) for row in report.fp4] == [
        (name, "native", 1) for name in ("fprop", "dgrad", "wgrad")
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("factor", [1, 8], ids=["ragged", "whole blocks"])
@pytest.mark.parametrize(
    ("recipe", "experts"), [("nvfp4", False), ("averis", False), ("averis", True), ("nvfp4_hadamard", False)]
)
def test_tensor_cores_give_the_emulations_results(recipe, experts, factor):
    """What no other test sees: the hardware, and that it is reached."""
    if reason := native.unsupported_reason():
        pytest.skip(reason)
    function, arguments = product_and_gradients(recipe, "native", experts, factor)
    program = jax.jit(function).lower(*arguments).compile()
    if factor > 1:
        assert program.as_text().count("blockScaledDot") >= 3
    emulated = jax.jit(product_and_gradients(recipe, "emulated", experts, factor)[0])(*arguments)
    assert_near(program(*arguments), emulated, of_largest=1e-5)


def test_what_tensor_cores_do_not_take_is_emulated_and_says_so(blackwell, caplog):
    gemm._report_emulation.cache_clear()
    function, arguments = product_and_gradients("mxfp4", "native")
    with caplog.at_level(logging.WARNING, "fp4jax"):
        report = fp4jax.report(function, *arguments, compile_program=False)
    assert {row.execution for row in report.fp4} == {"emulated in " + hardware.emulation_dtype().name}
    assert re.search("products of MXFP4 x MXFP4 are emulated, not on FP4 tensor cores: MXFP4 is not", caplog.text)


def test_the_mean_is_multiplied_natively_too(blackwell):
    function, arguments = product_and_gradients("averis", "native")
    rows = [row for row in fp4jax.report(function, *arguments, compile_program=False).apart if "NVFP4" in row.operands]
    assert [(row.gemm, row.execution) for row in rows] == [("", "native")] * 2  # fprop and dgrad


def test_emulated_by_name_stays_emulated(blackwell):
    function, arguments = product_and_gradients("nvfp4", "emulated")
    executions = {row.execution for row in fp4jax.report(function, *arguments, compile_program=False).fp4}
    assert executions == {"emulated in " + hardware.emulation_dtype().name}


def test_vmap_over_experts(blackwell):
    (_, arguments), numbers = product_and_gradients("averis+nearest", "native", experts=True), (((2,), (0,)), ((), ()))

    def product(how):
        one = lambda x, w: dot_general(x, w, numbers, recipe="averis+nearest", gemm=how)  # noqa: E731
        return jax.jit(jax.vmap(one))(*arguments[:2])

    np.testing.assert_allclose(product("native"), product("emulated"), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (dict(format=MXFP4, size=32), "MXFP4 is not E2M1 in"),
        (dict(format=NVFP4_OUTER128, size=256), "the float32 scale of NVFP4/128 changes along the contraction"),
        (dict(format=NVFP4, size=32, axis=-1), "the blocks of NVFP4 run along another axis"),
        (dict(format=NVFP4, size=48), "padded to different sizes"),
    ],
)
def test_misfits(how, reason):
    axis = how.get("axis", -2)
    rhs = quantize_blocks(random(how["size"], 16), how["format"], axes=(axis,), pack_axis=axis)
    assert reason in native.misfit(quantized(4, 32, axis=-1), rhs, ((-1,), (-2,)))


def on_mesh_of(kind, platform="gpu"):
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=100, platform=platform)
    types = (jax.sharding.AxisType.Auto,)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("data",), types, abstract_device=device))


@pytest.mark.parametrize("kind", ["NVIDIA B200", "NVIDIA GB300", "NVIDIA GeForce RTX 5090"])
def test_auto_is_native_on_blackwell(kind):
    with on_mesh_of(kind):
        assert gemm.best() == gemm.Execution(jnp.dtype(jnp.bfloat16), True, rounded=True) == gemm.native_or_error()


@pytest.mark.parametrize(("kind", "platform"), [("NVIDIA H200", "gpu"), ("TPU v5 lite", "tpu"), ("AMD MI355X", "gpu")])
def test_elsewhere_auto_is_emulated_and_native_raises(kind, platform):
    with on_mesh_of(kind, platform):
        expected = gemm.Execution(jnp.dtype(jnp.bfloat16), rounded=platform == "gpu")
        assert gemm.best() == gemm.emulated() == expected
        expected = rf"gemm='native': .* compute capability 10.0 .*{kind} \({platform}\); gemm='emulated' gives the same"
        with pytest.raises(NotImplementedError, match=expected):
            gemm.native_or_error()


def test_products_keep_their_names(blackwell):
    function, arguments = product_and_gradients("nvfp4", "native")
    program = jax.jit(function).lower(*arguments).as_text(debug_info=True)
    found = {
        scopes.read(path).gemm for path in re.findall(r'"([^"]*quantized_product/NVFP4:4\*NVFP4:4/[^"]*)"', program)
    }
    assert found == {"fprop", "dgrad", "wgrad"}


@pytest.mark.parametrize("axis", ["tokens", "features"])
def test_on_several_devices(blackwell, axis):
    """`scaled_matmul` partitions itself: X split along its sequences (D and dW's contraction too), or W by columns."""
    mesh = jax.make_mesh((2,), ("shards",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    specs = {"tokens": (P("shards"), P(), P("shards")), "features": (P(), P(None, "shards"), P(None, None, "shards"))}
    function, arguments = product_and_gradients("averis", "native")
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arguments, specs[axis], strict=True)]
    with jax.set_mesh(mesh):
        got = jax.jit(function)(*placed)
    assert_near(got, jax.jit(function)(*arguments))

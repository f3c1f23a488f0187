"""The kernels as a backend of the dot: what XLA gives, for every kind of operand, those that have no kernel too."""

import functools
import logging
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels.column_stats
import pallas_kernels.column_sums
import pallas_kernels.quantize
from fp4jax import dot_general, quantizers
from fp4jax.recipes import as_recipe
from pallas_kernels import compat
from tests import contract
from tests.contract import assert_identical

pytestmark = pytest.mark.skipif(not compat.CAN_INTERPRET, reason="the GPU interpreter needs JAX 0.12")

DIMENSIONS = (((2,), (0,)), ((), ()))
KERNELS = (
    (pallas_kernels.quantize, "quantize_rows"),
    (pallas_kernels.quantize, "quantize_columns"),
    (pallas_kernels.quantize, "quantize_2d"),
    (pallas_kernels.column_stats, "column_stats"),
    (pallas_kernels.column_sums, "column_sums"),
)


@pytest.fixture
def calls(monkeypatch):
    """Kernels run in the interpreter, on any device; which ran."""
    called = []

    def counted(kernel, name, *arguments, **options):
        called.append(name)
        # The interpreter runs on one device alone, and arrays here lie on one: cut ones are test_quantizers_sharding's.
        return kernel(*arguments, **options | {"interpret": True, "partitioned": False})

    for module, name in KERNELS:
        monkeypatch.setattr(module, name, functools.partial(counted, getattr(module, name), name))
    monkeypatch.setattr(pallas_kernels.quantize, "unsupported_reason", lambda device=None: None)
    return called


@functools.cache
def tensors(tokens):
    """X with a mean, W and D."""
    x = (
        jax.random.normal(jax.random.key(0), (*tokens, 48), jnp.bfloat16)
        + jnp.arange(48.0, dtype=jnp.bfloat16)[None, None] / 8
    )
    w = jax.random.normal(jax.random.key(1), (48, 32), jnp.float32)
    return x, w, jax.random.normal(jax.random.key(2), (*tokens, 32), jnp.bfloat16)


def results(recipe, backend, tokens=(2, 32)):
    """Output and both gradients of a linear layer."""
    key = jax.random.key(3)

    def of(x, w, g):
        y, pull = jax.vjp(lambda x, w: dot_general(x, w, DIMENSIONS, recipe=recipe, key=key, backend=backend), x, w)
        return y, *pull(g.astype(y.dtype))

    return contract.jit(of)(*tensors(tokens))


def largest_error(got, want):
    """|difference| / |want| of the output or gradient where it is largest."""
    pairs = [[np.asarray(side, np.float64) for side in pair] for pair in zip(got, want, strict=True)]
    return max(np.linalg.norm(left - right) / np.linalg.norm(right) for left, right in pairs)


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4_hadamard", pytest.param("nvfp4+2d", marks=pytest.mark.slow)])
def test_without_a_mean_all_is_identical(recipe, calls):
    assert_identical(results(recipe, "pallas"), results(recipe, "xla"))
    assert {"quantize_rows", "quantize_columns"} <= set(calls)
    assert "column_stats" not in calls
    assert ("quantize_2d" in calls) == (recipe != "nvfp4")  # square blocks of W


@pytest.mark.parametrize(
    "recipe", ["averis", pytest.param("averis_centered", marks=pytest.mark.slow), "averis_centered_hadamard"]
)
def test_with_a_mean_the_order_of_its_sum_is_what_differs(recipe, calls, monkeypatch):
    want = results(recipe, "xla")
    assert largest_error(results(recipe, "pallas"), want) < 0.02
    assert calls.count("column_stats") == 2  # of X and of D
    assert calls.count("column_sums") == (0 if "hadamard" in recipe else 2)
    plain = quantizers.Quantizer("without statistics", quantizers.quantize_by_kernels)
    monkeypatch.setattr(quantizers, "_BY_XLA", plain)
    assert largest_error(results(recipe, "xla"), want) < 1e-6  # one code more or less is 1e-4


def test_column_sums_are_taken_in_the_backward(calls):
    """Taken where X is quantized they would be a second reader of its codes, which a scan over layers then copies."""

    def forward(x, w):
        return jax.vjp(
            lambda x, w: dot_general(x, w, DIMENSIONS, recipe="averis", key=jax.random.key(3), backend="pallas"), x, w
        )

    shapes = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2, 32, 48), (48, 32)))
    jax.eval_shape(forward, *shapes)
    assert "quantize_columns" in calls and "column_sums" not in calls


@pytest.mark.parametrize("recipe", ["averis+per_sequence", "averis_centered+x_only"])
def test_means_that_the_statistics_do_not_give(recipe, calls):
    results(recipe, "pallas")
    assert calls.count("column_stats") == (0 if "sequence" in recipe else 1)
    assert "quantize_columns" in calls


def test_what_has_no_kernel_is_quantized_by_xla_and_said(calls, caplog):
    quantizers._report_by_xla.cache_clear()
    with caplog.at_level(logging.INFO, logger="fp4jax.quantizers"):
        assert_identical(results("mxfp4", "pallas"), results("mxfp4", "xla"))
    assert not calls
    assert "no kernel for" in caplog.text


@pytest.mark.parametrize(
    "platforms, capability, chosen",
    [
        (["gpu"], "9.0", "Pallas kernels"),
        (["gpu"], "8.0", "XLA"),
        (["gpu"], "10.0", "XLA"),
        (["gpu", "gpu"], "9.0", "Pallas kernels"),
        (["cpu"], None, "XLA"),
        (["tpu"], None, "XLA"),
    ],
    ids=str,
)
def test_auto_takes_the_kernels_where_they_were_measured(platforms, capability, chosen, calls, monkeypatch):
    devices = [mock.Mock(spec=jax.Device, platform=platform, device_kind="?") for platform in platforms]
    for device in devices:
        device.compute_capability = capability
    monkeypatch.setattr(quantizers.jax, "devices", lambda *_: devices)
    assert quantizers.best().name == chosen


def test_auto_leaves_square_blocks_to_xla(calls):
    """Their kernel was not run on hardware yet."""
    _, w, _ = tensors((2, 32))
    operand = as_recipe("nvfp4+2d").fprop.rhs

    def quantized(quantize):
        return contract.jit(lambda w: quantize(quantizers.Rows(w), operand, -2, 0, quantizers.Draws()).pack())(w)

    assert_identical(*map(quantized, (quantizers.quantize_by_measured_kernels, quantizers.quantize_by_kernels)))
    assert calls == ["quantize_2d"]


def test_few_rows_are_left_to_xla(calls):
    results("nvfp4", "pallas", tokens=(1, 1))
    assert calls.count("quantize_rows") == 1  # W alone

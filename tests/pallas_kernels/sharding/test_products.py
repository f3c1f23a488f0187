"""Products of codes that are cut over 8 devices: what one device computes, and what travels for it."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fp4jax import native
from fp4jax.numerics import NVFP4, quantize_blocks
from pallas_kernels import compat
from pallas_kernels.dequant_matmul import dequant_matmul
from tests.pallas_kernels.sharding import in_xla
from tests.pallas_kernels.sharding.test_sharding import gathered

pytestmark = pytest.mark.skipif(not compat.CAN_INTERPRET, reason="the GPU interpreter needs JAX 0.12")
TOKENS, INPUTS, OUTPUTS = (8, 256), 256, 512
X, D, W = (*TOKENS, INPUTS), (*TOKENS, OUTPUTS), (INPUTS, OUTPUTS)
BOTH = ("data", "tensor")
FPROP, DGRAD, WGRAD = ((-1,), (-2,)), ((-1,), (-1,)), ((-3, -2), (-3, -2))
# The contraction; how both operands and the result are cut; collectives on sums, and elements that are gathered.
CASES = {
    "batch": (FPROP, P(BOTH), P(), P(BOTH), {}, 0),
    "batch, W as fsdp cuts it": (FPROP, P(BOTH), P(BOTH), P(BOTH), {}, INPUTS // 2 * OUTPUTS),
    "tokens": (FPROP, P("data", "tensor"), P(), P("data", "tensor"), {}, 0),
    "by columns": (FPROP, P("data"), P(None, "tensor"), P("data", None, "tensor"), {}, 0),
    "by rows": (FPROP, P("data", None, "tensor"), P("tensor"), P("data"), {"all-reduce": 1}, 0),
    "by rows, W whole": (FPROP, P("data", None, "tensor"), P(), P("data"), {"all-reduce": 1}, 0),
    "by rows, sums to sequences": (
        FPROP, P("data", None, "tensor"), P("tensor"), P("data", "tensor"), {"reduce-scatter": 1}, 0,
    ),
    "dgrad by columns": (DGRAD, P("data", None, "tensor"), P(None, "tensor"), P("data"), {"all-reduce": 1}, 0),
    "wgrad": (WGRAD, P(BOTH), P(BOTH), P(), {"all-reduce": 1}, 0),
    "wgrad as fsdp cuts it": (WGRAD, P(BOTH), P(BOTH), P(BOTH), {"reduce-scatter": 1}, 0),
    "wgrad of its columns": (WGRAD, P(BOTH), P(BOTH), P(None, BOTH), {"reduce-scatter": 1}, 0),
    "wgrad, tokens of more axes": (
        WGRAD, P(BOTH), P(BOTH), P("tensor"), {"reduce-scatter": 1, "all-reduce": 1}, 0,
    ),
    "wgrad by rows": (
        WGRAD, P("data", None, "tensor"), P("data"), P("tensor", "data"), {"reduce-scatter": 1}, 0,
    ),
    "wgrad of shared sequences": (WGRAD, P("data", "tensor"), P("data", "tensor"), P("data"), None, 0),
}  # fmt: skip

QUICK = {
    "natively": ("by rows, sums to sequences", "wgrad, tokens of more axes"),
    "by_kernel": (
        "batch, W as fsdp cuts it", "by columns", "by rows, sums to sequences", "wgrad as fsdp cuts it",
        "wgrad, tokens of more axes", "wgrad of shared sequences",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), BOTH, axis_types=(AxisType.Auto,) * 2)


@pytest.fixture
def emulated(monkeypatch):
    in_xla.install(monkeypatch)


def operands(contracted, seed=0, shapes=None):
    shapes = shapes or {FPROP: (X, W), DGRAD: (D, W), WGRAD: (X, D)}[contracted]
    rng = np.random.default_rng(seed)
    return [
        quantize_blocks(
            jnp.asarray(rng.standard_normal(shape), jnp.float32), NVFP4, axes=(axes[-1],), pack_axis=axes[-1]
        )
        for shape, axes in zip(shapes, contracted, strict=True)
    ]


def natively(lhs, rhs, contracted):
    return native.product(lhs, rhs, contracted, 0) * lhs.tensor_scale.reshape(()) * rhs.tensor_scale.reshape(())


def by_kernel(lhs, rhs, contracted, dtype=jnp.float32):
    return dequant_matmul(lhs, rhs, contracted, 0, jnp.dtype(dtype), partitioned=True, interpret=True)


def on(mesh, product, pair, specs, result):
    """(the product of operands that lie as `specs` say, its program)."""
    placed = [
        jax.tree.map(lambda leaf, s=spec: jax.device_put(leaf, NamedSharding(mesh, s if leaf.size > 1 else P())), q)
        for q, spec in zip(pair, specs, strict=True)
    ]
    program = jax.jit(product, out_shardings=NamedSharding(mesh, result)).lower(*placed).compile()
    return program(*placed), program.as_text()


def exact(lhs, rhs, contracted):
    """[*lhs rows, *rhs rows] in float64, and the same of magnitudes."""
    a, b = (np.asarray(q.dequantize(), np.float64) for q in (lhs, rhs))
    return tuple(np.tensordot(f(a), f(b), contracted) for f in (np.asarray, np.abs))


@pytest.mark.parametrize(
    ("case", "product"),
    [
        pytest.param(case, product, marks=() if case in QUICK[product.__name__] else pytest.mark.slow)
        for case in CASES
        for product in (natively, by_kernel)
    ],
)
def test_products(case, product, mesh, emulated):
    contracted, left, right, result, sums, most = CASES[case]
    pair = operands(contracted)
    got, program = on(mesh, functools.partial(product, contracted=contracted), pair, (left, right), result)
    want, magnitudes = exact(*pair, contracted)
    assert (np.abs(np.asarray(got, np.float64) - want) <= 1e-6 * magnitudes).all()
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, result), got.ndim)
    assert max(gathered(program), default=0) <= most
    found = {kind: len(re.findall(rf" {kind}(?:-start)?\(", program)) for kind in ("reduce-scatter", "all-reduce")}
    if sums is not None:
        assert {kind: count for kind, count in found.items() if count} == sums


@pytest.mark.parametrize("product", [pytest.param(natively, marks=pytest.mark.slow), by_kernel])
def test_blocks_that_devices_do_not_divide_are_gathered(product, mesh, emulated):
    """9 blocks of the contraction on two devices, whose 72 bytes of codes are cut."""
    pair = operands(FPROP, shapes=((8, 128, 144), (144, 256)))
    cut = NamedSharding(mesh, P("data", None, "tensor"))

    def run(lhs, rhs):
        lhs = dataclasses.replace(lhs, codes=lax.with_sharding_constraint(lhs.codes, cut))
        return product(lhs, rhs, FPROP)

    got, _ = on(mesh, run, pair, (P("data"), P()), P("data"))
    want, magnitudes = exact(*pair, FPROP)
    assert (np.abs(np.asarray(got, np.float64) - want) <= 1e-6 * magnitudes).all()


def test_partial_sums_are_rounded_once(mesh, emulated):
    """Summed over devices in float32, then rounded to bfloat16."""
    pair = operands(FPROP)
    run = functools.partial(by_kernel, contracted=FPROP, dtype=jnp.bfloat16)
    got, program = on(mesh, run, pair, (P("data", None, "tensor"), P("tensor")), P("data"))
    once, _ = on(mesh, functools.partial(by_kernel, contracted=FPROP), pair, (P(), P()), P())
    assert got.dtype == jnp.bfloat16 and re.search(r"f32\[[\d,]*\]\S* all-reduce", program)
    assert np.mean(np.asarray(got) == np.asarray(once.astype(jnp.bfloat16))) > 0.999


@pytest.mark.parametrize("right", [P(), P(None, BOTH)], ids=["whole", "cut"])
def test_rows_are_not_cut_into_less_than_a_tile(right, mesh, emulated):
    """512 columns on 8 devices would be 64 each: all devices have all of them."""
    pair = operands(FPROP, shapes=((8, 256, 128), (128, 512)))
    run = functools.partial(by_kernel, contracted=FPROP)
    got, _ = on(mesh, run, pair, (P(), right), P(None, None, BOTH))
    want, magnitudes = exact(*pair, FPROP)
    assert (np.abs(np.asarray(got, np.float64) - want) <= 1e-6 * magnitudes).all()

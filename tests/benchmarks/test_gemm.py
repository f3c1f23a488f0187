"""The benchmark of the matrix products, at sizes for a CPU."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import gemm
from fp4jax import fused, native
from fp4jax.gemm import Execution, emulated
from pallas_kernels.quantize.shapes import WEIGHT_SHAPES, Shape

SMALL = Shape(64, 48, "a layer", ("0p6b",))
EXPERTS = Shape(64, 48, "experts", ("0p6b",), batch=2)
NEW = Execution(jnp.dtype(jnp.float32))  # stands for a kernel that no device here runs


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(gemm.timing, "WORKING_SET", 2**12)
    monkeypatch.setattr(gemm, "WEIGHT_SHAPES", (SMALL, EXPERTS))
    for way in (fused, native):  # on a GPU too
        monkeypatch.setattr(way, "unsupported_reason", lambda: "not in this test")


def add_way(monkeypatch, run):
    """A way named "fused" whose program is `run(product, left, right)`."""
    by_codes = gemm.by_codes
    monkeypatch.setattr(gemm, "ways", lambda: {"bf16": None, "emulated": emulated(), "fused": NEW})

    def chosen(product, execution):
        right = by_codes(product, emulated())
        return (lambda *pair: run(product, right, *pair)) if execution is NEW else right

    monkeypatch.setattr(gemm, "by_codes", chosen)


def rows(folder, *flags):
    try:
        gemm.main(["--tokens=32", "--repeats=2", f"--out={folder}", *flags])
    finally:
        found = json.loads((folder / "gemm.json").read_text())
    return found["rows"]


def test_products_of_layers_and_of_experts_are_measured(tmp_path, capsys):
    found = rows(tmp_path)
    assert [(row["layer"], row["gemm"]) for row in found] == [
        (layer, kind) for layer in ("a layer", "experts") for kind in ("fprop", "dgrad", "wgrad")
    ]
    for row in found:
        assert row["bf16_us"] > 0 and row["emulated_us"] > 0 and row["emulated_over_bf16"]["ratio"] > 0
        flops = 2 * row["experts"] * row["rows"] * row["inputs"] * row["outputs"]
        assert row["bf16_tflop_s"] == pytest.approx(flops / row["bf16_us"] / 1e6)
    assert "emulated/bf16" in capsys.readouterr().out


@pytest.mark.parametrize("kind", gemm.CONTRACTED)
@pytest.mark.parametrize("weight", [SMALL, EXPERTS], ids=lambda shape: shape.operands)
def test_a_wrong_product_has_no_time_and_the_others_have(weight, kind):
    product = gemm.Product(kind, weight, 32)
    right = gemm.by_codes(product, emulated())
    programs = gemm.compile_all([product], {"bf16": None, "emulated": emulated()})
    wrong = jax.jit(lambda pairs: [right(*pair).at[..., 0, 0].add(jnp.bfloat16(9)) for pair in pairs])
    programs[product, "emulated"].result()
    futures = gemm.compiling.side_by_side({0: (wrong, ([abstract_pair(product)] * product.count,))})
    row = gemm.measure(product, ("bf16", "emulated"), programs | {(product, "emulated"): futures[0]}, repeats=2)
    assert "product is off by" in row["emulated_error"] and row["bf16_us"] > 0 and "emulated_us" not in row


def abstract_pair(product):
    left, right = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in product.operands)
    return jax.eval_shape(lambda *pair: gemm.quantized(product, *pair), left, right)


def test_a_new_way_is_measured_beside_the_known_ones(tmp_path, monkeypatch):
    add_way(monkeypatch, lambda product, right, *pair: right(*pair))
    for row in rows(tmp_path, "--weights=2x64x48"):
        assert row["fused_us"] > 0 and row["fused_over_emulated"]["ratio"] > 0 and row["fused_over_bf16"]["ratio"] > 0
        assert row["emulated_over_bf16"]["ratio"] > 0


def broken(product, right, *pair):
    raise RuntimeError("ptxas says no")


def wrong(product, right, *pair):
    return 2 * right(*pair)


@pytest.mark.parametrize("run, message", [(broken, "ptxas says no"), (wrong, "the fused product is off by")])
def test_a_way_that_fails_costs_no_other_its_times(run, message, tmp_path, monkeypatch):
    add_way(monkeypatch, run)
    with pytest.raises(ValueError, match=r"not every product has a time: fused; see .*gemm.json"):
        rows(tmp_path, "--weights=64x48")
    found = json.loads((tmp_path / "gemm.json").read_text())["rows"]
    assert len(found) == 3
    for row in found:
        assert message in row["fused_error"] and "fused_us" not in row
        assert row["emulated_over_bf16"]["ratio"] > 0 and "emulated_error" not in row


def test_a_device_that_a_new_way_breaks_has_been_measured_before(tmp_path, monkeypatch):
    """All emulated products, of every layer, precede the first product of the new way; a fault then costs its own."""
    add_way(monkeypatch, lambda product, right, *pair: right(*pair))
    in_turns, seen = gemm.timing.in_turns, []

    def breaks(runs, *arguments, **named):
        seen.append(tuple(runs))
        if "fused" in [name for names in seen for name in names]:
            raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")
        return in_turns(runs, *arguments, **named)

    monkeypatch.setattr(gemm.timing, "in_turns", breaks)
    with pytest.raises(ValueError, match="not every product has a time: fused; see"):
        rows(tmp_path, "--weights=64x48")
    assert seen[:3] == [("bf16", "emulated")] * 3
    for row in json.loads((tmp_path / "gemm.json").read_text())["rows"]:
        assert "ILLEGAL_ADDRESS" in row["fused_error"] and row["emulated_us"] > 0


def test_ways_are_those_of_the_device(monkeypatch):
    assert list(gemm.ways()) == ["bf16", "emulated"]
    monkeypatch.setattr(fused, "unsupported_reason", lambda: None)
    assert list(gemm.ways()) == ["bf16", "emulated", "fused"]
    assert gemm.ways()["fused"].fused and not gemm.ways()["fused"].native
    monkeypatch.setattr(native, "unsupported_reason", lambda: None)
    assert gemm.ways()["native"].native and not gemm.ways()["native"].fused


@pytest.mark.parametrize("kind", gemm.CONTRACTED)
@pytest.mark.parametrize("weight", [SMALL, EXPERTS], ids=lambda shape: shape.operands)
def test_native_products_are_right(weight, kind):
    """`jax.nn.scaled_matmul` runs on a CPU too."""
    product = gemm.Product(kind, weight, 48)
    execution = dataclasses.replace(emulated(), native=True)
    programs = gemm.compile_all([product], {"bf16": None, "native": execution})
    row = gemm.measure(product, ("bf16", "native"), programs, repeats=2)
    assert row["native_over_bf16"]["ratio"] > 0, row


def test_fused_products_are_what_the_model_runs(monkeypatch):
    """Written in bfloat16 by the kernel, but for the weight gradient; what it does not take is no product of its."""
    dtypes = []

    def product(lhs, rhs, contracted, batch_dims, dtype):
        dtypes.append(dtype.name)
        rows = [(set(range(-2, 0)) - set(axes)).pop() for axes in contracted]
        return jnp.zeros((*lhs.shape[:batch_dims], lhs.shape[rows[0]], rhs.shape[rows[1]]), dtype)

    monkeypatch.setattr(fused, "product", product)
    execution = dataclasses.replace(emulated(), fused=True)
    for kind in gemm.CONTRACTED:
        each = gemm.Product(kind, Shape(256, 256, "", batch=2), 5120)
        assert jax.eval_shape(gemm.by_codes(each, execution), *abstract_pair(each)).dtype == jnp.bfloat16
    assert dtypes == ["bfloat16", "bfloat16", "float32"]
    few = gemm.Product("fprop", SMALL, 32)
    with pytest.raises(ValueError, match="a kernel takes 128 rows or more, got 32"):
        jax.eval_shape(gemm.by_codes(few, execution), *abstract_pair(few))


def test_sizes_are_those_of_the_models():
    experts = next(shape for shape in WEIGHT_SHAPES if shape.batch > 1)
    assert gemm.Product("fprop", experts, 16384).operands == ((64, 2560, 2048), (64, 2048, 1024))
    assert gemm.Product("dgrad", experts, 16384).operands == ((64, 2560, 1024), (64, 2048, 1024))
    assert gemm.Product("wgrad", WEIGHT_SHAPES[0], 16384).operands == ((16384, 1024), (16384, 2048))


@pytest.mark.parametrize(
    "flag, message", [("--weights=5x5", "unknown weight '5x5'; known: 64x48, 2x64x48"), ("--models=8b", "'8b'")]
)
def test_flags_that_do_not_fit_are_refused(flag, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        gemm.main([flag, f"--out={tmp_path / 'results'}"])
    assert not list(tmp_path.iterdir())

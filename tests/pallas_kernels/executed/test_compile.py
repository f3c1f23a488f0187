"""Kernels as they were compiled for Hopper and Blackwell, executed a statement at a time on a machine without a GPU.

Against what the interpreter is tested with: the twins' bits. What Mosaic made of a kernel, barriers and swizzled tiles
included, is seen by no other test here; what ptxas and the hardware make of it by those marked `gpu` alone.
"""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp4jax import numerics
from fp4jax.numerics import NVFP4, hadamard, key_words, quantize_blocks
from pallas_kernels import column_stats, column_sums, dequant_matmul, quantize
from tests.pallas_kernels import targets
from tests.pallas_kernels.dequant_matmul.test_dequant_matmul import quantized, sums_of_magnitudes
from tests.pallas_kernels.executed.emulation import by_compiled_program
from tests.pallas_kernels.quantize.test_quantize_rows import assert_same, values
from tests.ptx import machine
from tests.ptx.memory import Fault

KERNELS = Path(__file__).parents[1]
WORDS = key_words(jax.random.key(7))
pytestmark = targets.COMPILES


def compiled(name, folder, *arguments, target="h200"):
    targets.run(KERNELS / name / "compile_for_target.py", target, *arguments, dump=folder)
    return folder


def quantize_arguments(x, variant):
    """(arguments of a quantizer, what is quantized)."""
    center = jnp.mean(x.astype(jnp.float32), axis=(0, 1), keepdims=True) if "centered" in variant else None
    of = x if center is None else x.astype(jnp.float32) - center
    return {"center": center} if "centered" in variant else {}, of


def twin(x, axes, words):
    """Nothing is transformed or centered in it; a matrix a batch."""
    run = functools.partial(quantize_blocks, format=NVFP4, axes=axes, pack_axis=axes[0], batch_dims=1)
    return jax.jit(lambda x: run(x, words=words))(x)


@pytest.mark.parametrize(
    ("target", "kernel", "dtype", "shape"),
    [
        ("b200", "rows", "float32", (2, 136, 272)),
        ("h200", "rows-stochastic-centered", "bfloat16", (1, 136, 272)),
        ("b200", "rows-stochastic-centered", "bfloat16", (1, 136, 272)),
        ("h200", "columns-stochastic-centered", "bfloat16", (1, 144, 264)),
        ("b200", "columns-stochastic-centered", "bfloat16", (1, 144, 264)),
        ("h200", "columns-stochastic-hadamard", "float32", (1, 128, 136)),
        ("h200", "2d", "bfloat16", (2, 144, 144)),
        ("b200", "2d-stochastic", "float32", (1, 128, 272)),
    ],
    ids=str,
)
def test_quantizers(kernel, dtype, shape, target, tmp_path):
    orientation, *variant = kernel.split("-")
    compiled("quantize", tmp_path, kernel, dtype, ",".join(map(str, shape)), target=target)
    x = values(shape, jnp.dtype(dtype))
    given, of = quantize_arguments(x, variant)
    of = hadamard(of.astype(jnp.float32), -2) if "hadamard" in variant else of
    words = WORDS if "stochastic" in variant else None
    axes = {"rows": (-1,), "columns": (-2,), "2d": (-2, -1)}[orientation]
    want = twin(of, axes, words)
    if "hadamard" in variant:
        given["hadamard"] = True
    run = getattr(quantize, f"quantize_{orientation}")
    for contract in (False, True):
        with by_compiled_program(tmp_path, machine.Choices(contract=contract)) as called:
            got = run(x, amax=want.amax, words=words, batch_dims=1, interpret=True, **given)
        assert len(called) == 1
        assert_same(got, want)


@pytest.mark.parametrize("kernel", ["copies-stochastic-centered-sums", "copies-hadamard"])
def test_copies(kernel, tmp_path):
    shape, (_, *variant) = (1, 144, 272), kernel.split("-")
    compiled("quantize", tmp_path, kernel, "bfloat16", ",".join(map(str, shape)))
    x = values(shape, jnp.bfloat16)
    given, of = quantize_arguments(x, variant)
    flags = {name: name in variant for name in ("hadamard", "sums")}
    transformed = hadamard(of.astype(jnp.float32), -2) if flags["hadamard"] else of
    words = (WORDS, WORDS + 1) if "stochastic" in variant else (None, None)
    want = [twin(each, (axis,), drawn) for each, axis, drawn in zip((of, transformed), (-1, -2), words, strict=True)]
    with by_compiled_program(tmp_path, machine.Choices(contract=True)):
        along, down, *sums = quantize.quantize_copies(
            x, amax=tuple(q.amax for q in want), words=words, batch_dims=1, interpret=True, **given, **flags
        )
    for got, expected in zip((along, down), want, strict=True):
        assert_same(got, expected)
    for total in sums:
        represented = np.asarray(down.dequantize(), np.float64)
        assert (
            np.abs(np.asarray(total) - represented.sum(1, keepdims=True)) <= 1e-6 * np.abs(represented).sum(1)
        ).all()


def test_column_stats(tmp_path):
    compiled("column_stats", tmp_path, "bfloat16", "2,200,256")
    x = values((2, 200, 256), jnp.bfloat16)
    want = jax.jit(functools.partial(numerics.column_stats, batch_dims=1))(x)
    with by_compiled_program(tmp_path, machine.Choices(contract=True)):
        got = column_stats.column_stats(x, 1, interpret=True)
    for name in want._fields:
        np.testing.assert_array_equal(np.asarray(getattr(got, name)), np.asarray(getattr(want, name)), err_msg=name)


def test_column_sums(tmp_path):
    compiled("column_sums", tmp_path, "2,144,256")
    q = twin(values((2, 144, 256), jnp.float32), (-2,), WORDS)
    want = jax.jit(functools.partial(numerics.column_sums, batch_dims=1))(q)
    with by_compiled_program(tmp_path, machine.Choices(contract=True)):
        got = column_sums.column_sums(q, 1, interpret=True)
    np.testing.assert_array_equal(np.asarray(got).view(np.uint32), np.asarray(want).view(np.uint32))


def test_a_nan_stays_in_its_column(tmp_path):
    """In the bits that PTX gives it, ones behind the sign; two columns of bfloat16 are a word."""
    shape = (1, 128, 264)
    compiled("quantize", tmp_path, "columns", "bfloat16", ",".join(map(str, shape)))
    x = values(shape, jnp.bfloat16)
    bad = x.at[0, 5, 20].set(jnp.nan).at[0, 9, 33].set(jnp.nan)  # an even and an odd column
    want = twin(x, (-2,), None)
    with by_compiled_program(tmp_path, machine.Choices()):
        got = quantize.quantize_columns(bad, amax=want.amax, batch_dims=1, interpret=True)
    others = np.delete(np.arange(shape[-1]), [20, 33])
    for mine, other in ((got.codes, want.codes), (got.scales, want.scales)):
        np.testing.assert_array_equal(np.asarray(mine)[..., others], np.asarray(other)[..., others])
    assert (np.asarray(got.scales)[0, 0, [20, 33]] & 0x7F == 0x7F).all()


# Tokens, inputs, outputs: sizes end inside of tiles, contractions take one step and several.
PRODUCTS = {
    "fprop": ("136,272,264", ((136, 272), (272, 264)), (-1, -2)),
    "dgrad": ("200,144,144", ((200, 144), (144, 144)), (-1, -1)),
    "wgrad": ("400,136,144", ((400, 136), (400, 144)), (-2, -2)),
}


@pytest.fixture(scope="module")
def product(request, tmp_path_factory):
    """(the folder of a product's program, its operands, the axes summed over, its dtype)."""
    gemm, dtype = request.param
    sizes, shapes, axes = PRODUCTS[gemm]
    pair = [quantized(shape, (axis,), seed) for seed, (shape, axis) in enumerate(zip(shapes, axes, strict=True))]
    folder = compiled("dequant_matmul", tmp_path_factory.mktemp("mosaic"), gemm, sizes, dtype)
    return folder, pair, tuple((axis,) for axis in axes), jnp.dtype(dtype)


SCHEDULES = [(order, late) for order in machine.ORDERS for late in (True, False)]


@pytest.mark.parametrize(
    ("product", "order", "late"),
    [((gemm, "float32"), *schedule) for gemm in PRODUCTS for schedule in SCHEDULES]
    + [((gemm, "bfloat16"), "backwards", True) for gemm in PRODUCTS],
    indirect=["product"],
    ids=str,
)
def test_products(order, late, product):
    """Whatever warp comes first, and however late tensor cores read what they multiply."""
    folder, pair, contracted, dtype = product
    with by_compiled_program(folder, machine.Choices(order, late)) as called:
        got = dequant_matmul.dequant_matmul(*pair, contracted, 0, dtype, interpret=True)
    a, b = (np.asarray(q.dequantize(), np.float64) for q in pair)
    want = np.tensordot(a, b, contracted)
    tolerance = 1e-5 * sums_of_magnitudes(pair, contracted, 0)
    tolerance += 2.0**-8 * np.abs(want) if dtype == jnp.bfloat16 else 0
    assert called == ["dequant_matmul"] and got.dtype == dtype
    assert (np.abs(np.asarray(got, np.float64) - want) <= tolerance).all()
    assert np.abs(want).max() > 0


@pytest.mark.parametrize("product", [("fprop", "float32")], indirect=True, ids=str)
@pytest.mark.parametrize(
    ("left_out", "instead", "fault"),
    [
        ("fence.proxy.async.shared::cta", "", "without fence.proxy.async"),
        ("wgmma.fence.sync.aligned", "", "without wgmma.fence"),
        ("wgmma.wait_group.sync.aligned", "", "not waited for"),
        ("mbarrier.try_wait.parity.shared.b64", "setp.eq.b32 P1, 0, 0;", "without a barrier|not known to be done with"),
    ],
)
def test_what_keeps_order_is_needed(left_out, instead, fault, product, tmp_path):
    """Without it the same program is refused."""
    folder, pair, contracted, dtype = product
    (ptx,), (layout,) = folder.glob("*.ptx"), folder.glob("*.after_layout_inference.txt")
    text, count = re.subn(rf"{re.escape(left_out)}\b[^;]*;", instead, ptx.read_text(errors="replace"))
    assert count
    (tmp_path / ptx.name).write_text(text)
    (tmp_path / layout.name).write_text(layout.read_text())
    with by_compiled_program(tmp_path, machine.Choices()), pytest.raises(Fault, match=fault):
        dequant_matmul.dequant_matmul(*pair, contracted, 0, dtype, interpret=True)

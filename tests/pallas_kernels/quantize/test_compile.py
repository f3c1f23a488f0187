"""The kernels compile for Hopper (sm_90a) and Blackwell (sm_100a), from descriptions, on a machine without a GPU."""

import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fp4jax.plan.targets import DESCRIPTIONS

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[2]
# Blocks of 128 threads on each multiprocessor at least: 4 for rows, 2 for others, with 16 reads a lane under way.
MAX_REGISTERS = {"rows": 128, "columns": 255, "2d": 255, "copies": 255}

ARCHITECTURES = {"h200": "sm_90a", "b200": "sm_100a"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None,
        reason='needs the CUDA compiler, no GPU: pip install "jax[cuda13]" (4.4 GB)',
    ),
]


@pytest.fixture(
    scope="module",
    params=[
        ("h200", "rows", "bfloat16", "1,16,4096,1024"),
        ("h200", "rows-stochastic-centered", "bfloat16", "1,16,4096,3072"),
        ("h200", "rows", "float32", "1,16,4096,1024"),
        ("h200", "rows-stochastic", "float32", "8,4096,3072"),
        ("h200", "columns", "bfloat16", "1,16,4096,1024"),
        ("h200", "columns-stochastic-centered", "bfloat16", "1,16,4096,3072"),
        ("h200", "columns-stochastic-centered-hadamard", "bfloat16", "8,4096,3072"),
        ("h200", "columns-stochastic", "float32", "8,4096,3072"),
        ("h200", "copies-centered", "bfloat16", "1,16,4096,1024"),
        ("h200", "copies-stochastic-centered", "bfloat16", "1,16,4096,3072"),
        ("h200", "copies-stochastic-centered-hadamard", "float32", "8,4096,3072"),
        ("h200", "copies-stochastic-centered-sums", "bfloat16", "1,16,4096,3072"),
        ("b200", "copies-stochastic-centered-hadamard", "bfloat16", "8,4096,3072"),
        ("h200", "2d", "bfloat16", "1,1024,3072"),
        ("h200", "2d-stochastic", "float32", "8,1024,3072"),
        ("b200", "2d-stochastic", "bfloat16", "1,1024,3072"),
        ("b200", "rows-stochastic-centered", "bfloat16", "1,16,4096,3072"),
        ("b200", "rows-stochastic", "float32", "8,4096,3072"),
        ("b200", "columns-stochastic-centered-hadamard", "bfloat16", "8,4096,3072"),
        ("b200", "columns-stochastic", "float32", "8,4096,3072"),
    ],
    ids=" ".join,
)
def compiled(request, tmp_path_factory):
    target, kernel, dtype, shape = request.param
    dump = tmp_path_factory.mktemp("mosaic")
    settings = {"JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_TO": str(dump), "MOSAIC_GPU_DUMP_PTXAS": "1"}
    run = subprocess.run(
        [
            sys.executable,
            HERE / "compile_for_target.py",
            DESCRIPTIONS / f"{target}.txtpb",
            *(kernel, dtype, shape),
        ],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **settings},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return dump, kernel, run.stdout, ARCHITECTURES[target]


def read(dump: Path, suffix: str) -> str:
    files = list(dump.glob(f"quantize_*.{suffix}"))
    assert len(files) == 1, f"expected one .{suffix} of the kernel, found {sorted(dump.iterdir())}"
    return files[0].read_text(errors="replace")


def test_no_register_spills(compiled):
    report = read(compiled[0], "ptxas")
    assert f"for '{compiled[3]}'" in report
    spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spills.groups() == ("0", "0", "0")
    assert 0 < int(re.search(r"Used (\d+) registers", report)[1]) <= MAX_REGISTERS[compiled[1].partition("-")[0]]


def test_wide_accesses(compiled):
    ptx = read(compiled[0], "ptx")
    if compiled[1].startswith("rows"):  # 32 bfloat16 or 16 float32 values in flight for each lane; centers beside them
        assert len(re.findall(r"\bld\.(?:v4\.b32|v2\.b64)", ptx)) >= 4
        assert re.search(r"\bst\.v(?:2\.b32|4\.b16)", ptx)
    else:  # 8 bytes a lane, neighbours side by side, for each of 16 rows
        assert len(re.findall(r"\bld\.(?:v2\.b32|b64)", ptx)) >= 16
        assert re.search(r"\bst\.(?:b32|v2\.b8)", ptx)


def test_arithmetic_is_exact(compiled):
    """No approximate instruction, and no fused multiply-add but by a power of two: those could differ from the twin.

    Column sums add products that are exact in float32, so there a fused one gives the same.
    """
    ptx = read(compiled[0], "ptx")
    assert f".target {compiled[3]}" in ptx
    assert not re.findall(r"\b(?:rcp|div|ex2|lg2)\.\S*f32|\S+\.ftz\S*|\S+\.approx\S*", ptx)
    fused = [operands.split(", ") for operands in re.findall(r"\bfma\S*\s+(.*);", ptx)]
    assert fused
    for _, *factors, _ in [] if "sums" in compiled[1] else fused:
        assert any(constant(factor, ptx) in ("0f3F000000", "0f40000000") for factor in factors), factors


def test_maxima_keep_nan(compiled):
    """A block that holds NaN must not look finite; `max.f32` would give the other operand."""
    ptx = read(compiled[0], "ptx")
    maxima = re.findall(r"\bmax\S*\.f32\b", ptx)
    assert maxima and set(maxima) == {"max.NaN.f32"}


def constant(factor: str, ptx: str) -> str:
    """The constant that a factor is: as it stands, or on Blackwell a pair of one in registers."""
    pair = re.search(rf"mov\.b64\s+{re.escape(factor)}, \{{(%r\d+), \1\}};", ptx)
    if pair is None:
        return factor
    value = re.search(rf"mov\.b32\s+{re.escape(pair[1])}, (\S+);", ptx)
    return value[1] if value else factor


def test_reshapes_and_bitcasts_copy_nothing(compiled):
    hlo = compiled[2]
    entry = hlo[hlo.index("\nENTRY") :]
    assert entry.count('custom_call_target="mosaic_gpu_v2"') == 1
    for shape, operation in re.findall(r" = \w+\[([\d,]*)\]\S* ([\w-]+)\(", entry):
        if operation not in ("parameter", "bitcast", "get-tuple-element"):
            size = math.prod(map(int, filter(None, shape.split(","))))
            # The kernel's partial sums are added up behind it: a row for each of its stretches of tokens.
            assert size < (2**21 if "sums" in compiled[1] else 1000), f"{operation} of [{shape}]"

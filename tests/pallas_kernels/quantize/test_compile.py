"""The kernels compile for Hopper (sm_90a) and Blackwell (sm_100a), from descriptions, on a machine without a GPU."""

import math
import re
from pathlib import Path

import pytest

from tests.pallas_kernels import targets

SCRIPT = Path(__file__).with_name("compile_for_target.py")
# Blocks of 128 threads on each multiprocessor at least: 4 for rows, 2 for others, with 16 reads a lane under way.
MAX_REGISTERS = {"rows": 128, "columns": 255, "2d": 255, "copies": 255}

pytestmark = targets.COMPILES


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
    return targets.compiled(SCRIPT, tmp_path_factory.mktemp("mosaic"), *request.param), request.param[1]


def test_no_register_spills(compiled):
    program, kernel = compiled
    program.check_registers(MAX_REGISTERS[kernel.partition("-")[0]])


def test_wide_accesses(compiled):
    ptx = compiled[0].ptx
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
    ptx = compiled[0].ptx
    assert f".target {targets.ARCHITECTURES[compiled[0].target]}" in ptx
    assert not re.findall(r"\b(?:rcp|div|ex2|lg2)\.\S*f32|\S+\.ftz\S*|\S+\.approx\S*", ptx)
    fused = [operands.split(", ") for operands in re.findall(r"\bfma\S*\s+(.*);", ptx)]
    assert fused
    for _, *factors, _ in [] if "sums" in compiled[1] else fused:
        assert any(constant(factor, ptx) in ("0f3F000000", "0f40000000") for factor in factors), factors


def test_maxima_keep_nan(compiled):
    """A block that holds NaN must not look finite; `max.f32` would give the other operand."""
    ptx = compiled[0].ptx
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
    for shape, operation in re.findall(r" = \w+\[([\d,]*)\]\S* ([\w-]+)\(", compiled[0].entry):
        if operation not in ("parameter", "bitcast", "get-tuple-element"):
            size = math.prod(map(int, filter(None, shape.split(","))))
            # The kernel's partial sums are added up behind it: a row for each of its stretches of tokens.
            assert size < (2**21 if "sums" in compiled[1] else 1000), f"{operation} of [{shape}]"

"""The kernels compile for Hopper (sm_90a) and Blackwell (sm_100a), from descriptions, on a machine without a GPU."""

import math
import re
from pathlib import Path

import pytest

from tests.pallas_kernels import targets

SCRIPT = Path(__file__).with_name("compile_for_target.py")
pytestmark = targets.COMPILES


# target, dtype, shape, registers at most (128: 16 warps for each multiprocessor at least), width of a load in bits.
@pytest.fixture(
    scope="module",
    params=[
        ("h200", "bfloat16", "1,4,1024,1024", 96, 128),
        ("h200", "float32", "1,4,1024,3072", 96, 128),
        ("h200", "bfloat16", "8,4096,768", 96, 32),
        ("h200", "bfloat16", "3,1001,1024", 168, 128),
        ("b200", "bfloat16", "1,4,1024,1024", 96, 128),
        ("b200", "float32", "1,4,1024,3072", 96, 128),
    ],
    ids=lambda param: " ".join(map(str, param[:3])),
)
def compiled(request, tmp_path_factory):
    target, dtype, shape, registers, bits = request.param
    return targets.compiled(SCRIPT, tmp_path_factory.mktemp("mosaic"), target, dtype, shape), registers, bits


def test_no_register_spills(compiled):
    program, registers, _ = compiled
    program.check_registers(registers)


def test_eight_wide_loads_in_flight(compiled):
    loads = re.findall(r"\bld\.(v\d\.b\d+|b32)\b", compiled[0].ptx)
    wide = [load for load in loads if math.prod(map(int, re.findall(r"\d+", load))) == compiled[2]]
    assert len(wide) == 8


def test_sums_are_plain_additions(compiled):
    """A fused multiply-add or a flush to zero could differ from the twin."""
    ptx = compiled[0].ptx
    assert re.search(r"\badd\S*f32", ptx)
    assert not re.findall(r"\bfma\S*f32|\S+\.ftz\S*|\S+\.approx\S*", ptx)


def test_the_matrix_is_read_once_and_never_copied(compiled):
    entry = compiled[0].entry
    matrix = re.search(r" = \w+\[([\d,]*)\]\S* parameter\(", entry)[1]
    size = math.prod(map(int, matrix.split(",")))
    for shape, operation in re.findall(r" = \w+\[([\d,]*)\]\S* ([\w-]+)\(", entry):
        if operation not in ("parameter", "bitcast", "get-tuple-element"):
            assert math.prod(map(int, filter(None, shape.split(",")))) < size / 8, f"{operation} of [{shape}]"

"""The kernel compiles for Hopper (sm_90a), from its description, on a machine without a GPU."""

import re
from pathlib import Path

import pytest

from tests.pallas_kernels import targets

SCRIPT = Path(__file__).with_name("compile_for_target.py")
MAX_REGISTERS = 255  # of two warpgroups: one thread block at least fits a multiprocessor
pytestmark = targets.COMPILES


@pytest.fixture(
    scope="module",
    params=[
        ("fprop", "4096,1024,3072"),
        ("dgrad", "4096,1024,3072"),
        ("wgrad", "4096,1024,3072"),
        ("fprop", "128,1024,128"),
        ("wgrad", "4096,128,128"),
    ],
    ids=" ".join,
)
def compiled(request, tmp_path_factory):
    return targets.compiled(SCRIPT, tmp_path_factory.mktemp("mosaic"), "h200", *request.param)


def test_no_register_spills(compiled):
    compiled.check_registers(MAX_REGISTERS)
    assert "serialized" not in compiled.report  # what ptxas says where products wait for one another


def test_tensor_cores_multiply_what_lies_in_shared_memory(compiled):
    ptx = compiled.ptx
    products = re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.f16\.f16", ptx)
    assert len(products) == 8 and len(set(products)) == 1  # a tile of 128 along the contraction
    assert len(re.findall(r"\bst\.shared\.v[24]\.b32", ptx)) >= 16
    assert not re.findall(r"\bst\.local|\bld\.local|\.ftz\b", ptx)


def test_operands_are_read_as_they_are_stored(compiled):
    copies = re.findall(r" = u8\[\S+ (?:fusion|copy|transpose)\(", compiled.entry)
    assert not copies, copies

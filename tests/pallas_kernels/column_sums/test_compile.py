"""The kernels compile for Hopper (sm_90a) and Blackwell (sm_100a), from descriptions, on a machine without a GPU."""

import re
from pathlib import Path

import pytest

from tests.pallas_kernels import targets

SCRIPT = Path(__file__).with_name("compile_for_target.py")
MAX_REGISTERS = 64  # 8 thread blocks of 128 threads for each multiprocessor at least
pytestmark = targets.COMPILES


@pytest.mark.parametrize("target, shape", [("h200", "1,16384,1024"), ("h200", "8,4096,3072"), ("b200", "8,4096,3072")])
def test_compiles_without_spills(target, shape, tmp_path):
    program = targets.compiled(SCRIPT, tmp_path, target, shape)
    program.check_registers(MAX_REGISTERS)
    assert len(re.findall(r"\bld\.b32", program.ptx)) >= 9  # 8 words of codes and one of scales under way for each lane

"""The kernels compile for Hopper (sm_90a) and Blackwell (sm_100a), from descriptions, on a machine without a GPU."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fp4jax.plan.targets import DESCRIPTIONS

HERE = Path(__file__).parent
MAX_REGISTERS = 64  # 8 thread blocks of 128 threads for each multiprocessor at least

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None,
        reason='needs the CUDA compiler, no GPU: pip install "jax[cuda13]" (4.4 GB)',
    ),
]


@pytest.mark.parametrize(
    "target, architecture, shape",
    [
        ("h200", "sm_90a", "1,16384,1024"),
        ("h200", "sm_90a", "8,4096,3072"),
        ("b200", "sm_100a", "8,4096,3072"),
    ],
)
def test_compiles_without_spills(target, architecture, shape, tmp_path):
    settings = {"JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_TO": str(tmp_path), "MOSAIC_GPU_DUMP_PTXAS": "1"}
    run = subprocess.run(
        [sys.executable, HERE / "compile_for_target.py", DESCRIPTIONS / f"{target}.txtpb", shape],
        env={**os.environ, "PYTHONPATH": str(HERE.parents[2]), **settings},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    report, ptx = (next(tmp_path.glob(f"column_sums*.{end}")).read_text(errors="replace") for end in ("ptxas", "ptx"))
    assert f"for '{architecture}'" in report
    assert re.search(r"\b0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", report)
    assert 0 < int(re.search(r"Used (\d+) registers", report)[1]) <= MAX_REGISTERS
    assert len(re.findall(r"\bld\.b32", ptx)) >= 9  # 8 words of codes and one of scales under way for each lane

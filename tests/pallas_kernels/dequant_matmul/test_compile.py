"""The kernel compiles for Hopper (sm_90a), from its description, on a machine without a GPU."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fp4jax.plan.targets import DESCRIPTIONS

HERE = Path(__file__).parent

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
        ("fprop", "4096,1024,3072"),
        ("dgrad", "4096,1024,3072"),
        ("wgrad", "4096,1024,3072"),
        ("fprop", "128,1024,128"),
        ("wgrad", "4096,128,128"),
    ],
    ids=" ".join,
)
def compiled(request, tmp_path_factory):
    dump = tmp_path_factory.mktemp("mosaic")
    settings = {"JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_TO": str(dump), "MOSAIC_GPU_DUMP_PTXAS": "1"}
    run = subprocess.run(
        [sys.executable, HERE / "compile_for_target.py", DESCRIPTIONS / "h200.txtpb", *request.param],
        env={**os.environ, "PYTHONPATH": str(HERE.parents[2]), **settings},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    report, ptx = (next(dump.glob(f"dequant_matmul*.{end}")).read_text(errors="replace") for end in ("ptxas", "ptx"))
    return report, ptx, run.stdout


def test_no_register_spills(compiled):
    report, ptx, _ = compiled
    assert "for 'sm_90a'" in report
    assert re.search(r"\b0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", report)
    # Two warpgroups: one thread block at least fits a multiprocessor.
    assert 0 < int(re.search(r"Used (\d+) registers", report)[1]) <= 255
    assert "serialized" not in report  # what ptxas says where products wait for one another


def test_tensor_cores_multiply_what_lies_in_shared_memory(compiled):
    _, ptx, _ = compiled
    products = re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.f16\.f16", ptx)
    assert len(products) == 8 and len(set(products)) == 1  # a tile of 128 along the contraction
    assert len(re.findall(r"\bst\.shared\.v[24]\.b32", ptx)) >= 16
    assert not re.findall(r"\bst\.local|\bld\.local|\.ftz\b", ptx)


def test_operands_are_read_as_they_are_stored(compiled):
    hlo = compiled[2]
    entry = hlo[hlo.index("\nENTRY") :]
    assert entry.count('custom_call_target="mosaic_gpu_v2"') == 1
    copies = re.findall(r" = u8\[\S+ (?:fusion|copy|transpose)\(", entry)
    assert not copies, copies

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

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None,
        reason='needs the CUDA compiler, no GPU: pip install "jax[cuda13]" (4.4 GB)',
    ),
]


ARCHITECTURES = {"h200": "sm_90a", "b200": "sm_100a"}


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
    dump = tmp_path_factory.mktemp("mosaic")
    settings = {"JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_TO": str(dump), "MOSAIC_GPU_DUMP_PTXAS": "1"}
    run = subprocess.run(
        [sys.executable, HERE / "compile_for_target.py", DESCRIPTIONS / f"{target}.txtpb", dtype, shape],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **settings},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return dump, run.stdout, registers, bits, ARCHITECTURES[target]


def read(dump: Path, suffix: str) -> str:
    files = list(dump.glob(f"column_stats*.{suffix}"))
    assert len(files) == 1, f"expected one .{suffix} of the kernel, found {sorted(dump.iterdir())}"
    return files[0].read_text(errors="replace")


def test_no_register_spills(compiled):
    report = read(compiled[0], "ptxas")
    assert f"for '{compiled[4]}'" in report
    spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spills.groups() == ("0", "0", "0")
    assert 0 < int(re.search(r"Used (\d+) registers", report)[1]) <= compiled[2]


def test_eight_wide_loads_in_flight(compiled):
    loads = re.findall(r"\bld\.(v\d\.b\d+|b32)\b", read(compiled[0], "ptx"))
    wide = [load for load in loads if math.prod(map(int, re.findall(r"\d+", load))) == compiled[3]]
    assert len(wide) == 8


def test_sums_are_plain_additions(compiled):
    """A fused multiply-add or a flush to zero could differ from the twin."""
    ptx = read(compiled[0], "ptx")
    assert re.search(r"\badd\S*f32", ptx)
    assert not re.findall(r"\bfma\S*f32|\S+\.ftz\S*|\S+\.approx\S*", ptx)


def test_the_matrix_is_read_once_and_never_copied(compiled):
    hlo = compiled[1]
    entry = hlo[hlo.index("\nENTRY") :]
    assert entry.count('custom_call_target="mosaic_gpu_v2"') == 1
    matrix = re.search(r" = \w+\[([\d,]*)\]\S* parameter\(", entry)[1]
    size = math.prod(map(int, matrix.split(",")))
    for shape, operation in re.findall(r" = \w+\[([\d,]*)\]\S* ([\w-]+)\(", entry):
        if operation not in ("parameter", "bitcast", "get-tuple-element"):
            assert math.prod(map(int, filter(None, shape.split(",")))) < size / 8, f"{operation} of [{shape}]"

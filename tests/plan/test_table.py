"""Reports of ptxas and launches of Mosaic, and a plan as text."""

import pytest

from fp4jax.plan import kernels, table
from fp4jax.plan.kernels import Kernel

REPORT = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'quantize_rows_kernel' for 'sm_90a'
ptxas info    : Function properties for quantize_rows_kernel
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 46 registers, used 1 barriers{shared}
"""
# Twice, as every pass of the compiler prints it; the constant's name changes.
LAUNCH = """// -----// IR Dump Before a pass //----- //
    %c1 = arith.constant 1 : index loc(#loc1)
    %wide = arith.constant 77 : i64 loc(#loc1)
    %map3A_5 = arith.constant {bytes} : i32 loc(#loc4)
    %other = arith.constant 5 : i32 loc(#loc4)
    %9 = gpu.launch async [%6] blocks(%b) in (%a = %c1) threads(%t) in (%c = %c1) dynamic_shared_memory_size %map3A_5 {{
// -----// IR Dump Before another pass //----- //
    %c3_i32 = arith.constant 3 : i32 loc(#loc1)
    %9 = gpu.launch async [%6] blocks(%b) in (%a = %c1) threads(%t) in (%c = %c1) dynamic_shared_memory_size %c3_i32 {{
"""
OF_KERNEL = {"architecture": "sm_90a", "spill_bytes": 0, "static_shared_bytes": 8, "dynamic_shared_bytes": 2048}
PLAN = {
    "target": "h200:8", "device": "NVIDIA H200", "devices": 4, "idle_devices": 4, "jax": "0.12.0",
    "mesh": {"data": 4, "fsdp": 1}, "recipe": "averis", "batch_size": 64, "microbatches": 2, "seq_len": 128,
    "remat": "none", "quantizer": "XLA", "products": "emulated in bfloat16", "compile_seconds": 1.5,
    "memory": {"arguments": 2**30, "results": 2**30, "aliased": 2**29, "temporaries": 3 * 2**40, "peak": 100},
    "matrix_flops": 12e12, "bytes_accessed": 2**20, "unknown_loops": 1,
    "collectives": {"all-reduce": {"count": 1200, "bytes": 2048}}, "weight_gathers": 3072, "between_machines": {},
    "gemms": {"fprop": {"native": 28, "emulated in bfloat16": 1}}, "corrections": {"native": 2}, "high_precision": 3,
    "quantization": {"products": 2, "operands": 4, "coded": 3, "folded": ["NOT QUANTIZED: x"]},
    "kernels": [
        {"name": f"quantize_rows_{n}", "registers": 40 + n} | OF_KERNEL for n in range(3)
    ],
}  # fmt: skip


def write(folder, name="quantize_rows_0", **values):
    values = {"stack": 0, "stores": 0, "loads": 0, "shared": "", "bytes": 0} | values
    (folder / f"{name}.ptxas").write_text(REPORT.format(**values))
    (folder / f"{name}.mlir-passes.log").write_text(LAUNCH.format(**values))
    return folder


def test_a_report_of_ptxas(tmp_path):
    assert kernels.read(write(tmp_path)) == [Kernel("quantize_rows_0", "sm_90a", 46, 0, 0, 0)]
    (spilled,) = kernels.read(write(tmp_path, stack=8, stores=12, loads=20, shared=", 4096 bytes smem"))
    assert (spilled.spill_bytes, spilled.static_shared_bytes) == (32, 4096)


def test_the_shared_memory_of_a_launch(tmp_path):
    """Not that of a file of Mosaic's with the same name, which may be of another kernel."""
    (tmp_path / "quantize_rows_0.resources.txt").write_text("Resources(smem_scratch_bytes=131072, tmem_scratch_cols=0)")
    (kernel,) = kernels.read(write(tmp_path, shared=", 17 bytes smem", bytes=196616))
    assert (kernel.static_shared_bytes, kernel.dynamic_shared_bytes) == (17, 196616)


@pytest.mark.parametrize("left", ["nothing", "no launch"])
def test_a_kernel_without_a_launch_is_refused(tmp_path, left):
    log = write(tmp_path) / "quantize_rows_0.mlir-passes.log"
    log.unlink()
    if left == "no launch":
        log.write_text("%c0_i32 = arith.constant 0 : i32 loc(#loc1)")
    with pytest.raises(ValueError, match=r"quantize_rows_0.mlir-passes.log: no launch"):
        kernels.read(tmp_path)


def test_a_report_that_says_nothing_is_refused(tmp_path):
    (tmp_path / "broken.ptxas").write_text("ptxas fatal")
    with pytest.raises(ValueError, match="broken.ptxas: .*no line 'Used ... registers'"):
        kernels.read(tmp_path)


def test_no_kernels(tmp_path):
    assert kernels.read(tmp_path) == []


def test_a_plan_as_text():
    text = "\n".join(table.lines(PLAN))
    for said in (
        "h200:8: 4 x NVIDIA H200 (data 4 x fsdp 1); 4 more idle", "64 x 128 tokens in 2 microbatches", "peak 100 B",
        "temporaries 3.00 TiB", "1.2e+13", "1.00 MiB on a device; 1 loops of unknown length", "1,200 x, 2.00 KiB",
        "28 native, 1 emulated in bfloat16", "3 of 4 quantized operands", "NOT QUANTIZED: x",
        "kernel quantize_rows (sm_90a)", "40 to 42 registers, no spills, 2,056 bytes of shared memory in 3 programs",
    ):  # fmt: skip
        assert said in text
    assert "with a mean or factor" in text and "collectives" not in text


def test_a_plan_without_fp4_or_collectives():
    bare = PLAN | {
        "gemms": {},
        "corrections": {},
        "collectives": {},
        "weight_gathers": 0,
        "between_machines": {},
        "kernels": [],
        "unknown_loops": 0,
        "idle_devices": 0,
    }
    text = "\n".join(table.lines(bare))
    assert "FP4 products" in text and "collectives" in text
    assert "with a mean" not in text and "kernel" not in text and "idle" not in text

"""Kernels compiled for a GPU that is not there, each in a process of its own, and what the compilers say of them.

Mosaic keeps compiled kernels without regard to the target, and is told by variables at its start where to leave what.
"""

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from fp4jax.plan import kernels, targets

REPOSITORY = Path(__file__).parents[2]
ARCHITECTURES = {"h200": "sm_90a", "b200": "sm_100a"}
COMPILES = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None,
        reason='needs the CUDA compiler, no GPU: pip install "jax[cuda13]" (4.4 GB)',
    ),
]


def compiles(test):
    """Marks one test so."""
    for mark in COMPILES:
        test = mark(test)
    return test


def device(target: str) -> jax.Device:
    """One GPU of that kind, "h200" or "b200"."""
    return targets.parse(f"{target}:1").devices()[0]


def run(script: Path, *arguments: str, dump: Path | None = None) -> str:
    """What a script prints, run by this Python; Mosaic leaves its files in `dump`."""
    reports = {} if dump is None else kernels.environment(dump)
    process = subprocess.run(
        [sys.executable, script, *arguments],
        env={**os.environ, **reports, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program with one kernel.

    Attributes:
      target: "h200".
      hlo: what the script printed, the optimized program.
      report, ptx: of the kernel, by ptxas and for it.
    """

    target: str
    hlo: str
    report: str
    ptx: str

    @property
    def entry(self) -> str:
        """The program's own instructions, of which one is the kernel."""
        found = self.hlo[self.hlo.index("\nENTRY") :]
        assert found.count('custom_call_target="mosaic_gpu_v2"') == 1
        return found

    def check_registers(self, most: int) -> None:
        """For its architecture, without spills, with so many registers."""
        assert f"for '{ARCHITECTURES[self.target]}'" in self.report
        assert re.search(r"\b0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", self.report)
        assert 0 < int(re.search(r"Used (\d+) registers", self.report)[1]) <= most


def compiled(script: Path, dump: Path, target: str, *arguments: str) -> Compiled:
    """The program that `script TARGET *arguments` compiles."""
    printed = run(script, target, *arguments, dump=dump)
    files = [list(dump.glob(f"*.{suffix}")) for suffix in ("ptxas", "ptx")]
    assert [len(found) for found in files] == [1, 1], f"expected one kernel, found {sorted(dump.iterdir())}"
    return Compiled(target, printed, *(found[0].read_text(errors="replace") for found in files))

"""`benchmarks/gpu.sh`: all parts are run in their order, inside nine minutes; one that fails does not stop others."""

import os
import re
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"
PARTS = ["pytest", "benchmarks.kernels", "benchmarks.step", "benchmarks.gemm"]
FAKE = """#!/bin/bash
echo "$2" >> {calls}
case "$2" in {failing}) echo broken >&2; exit 3;; esac
"""


@pytest.mark.parametrize("failing, code", [("nothing", 0), ("pytest", 1), ("benchmarks.step", 1)])
def test_every_part_runs_once(failing, code, tmp_path):
    calls, fake, out = tmp_path / "calls", tmp_path / "python", tmp_path / "out" / "new"
    fake.write_text(FAKE.format(calls=calls, failing=failing))
    fake.chmod(0o755)
    run = subprocess.run([SCRIPT, out, fake], capture_output=True, text=True, timeout=60, env=os.environ)
    assert run.returncode == code, run.stdout
    assert calls.read_text().split() == PARTS
    parts = (out / "parts.txt").read_text()
    assert re.findall(r"== (\w+): exit code (\d+)", parts) == [
        (name, "3" if part == failing else "0")
        for name, part in zip(["tests", "kernels", "step", "gemm"], PARTS, strict=True)
    ]
    if code:
        assert "broken" in (out / f"{failing.removeprefix('benchmarks.').replace('pytest', 'tests')}.log").read_text()


def test_the_parts_have_nine_minutes_at_most():
    limits = [int(seconds) for seconds in re.findall(r"^part \w+ (\d+) ", SCRIPT.read_text(), re.MULTILINE)]
    assert len(limits) == len(PARTS)
    assert sum(limits) <= 9 * 60


def test_without_a_folder_it_says_how_it_is_called():
    run = subprocess.run([SCRIPT], capture_output=True, text=True, timeout=60)
    assert run.returncode != 0
    assert "usage: benchmarks/gpu.sh OUT" in run.stderr

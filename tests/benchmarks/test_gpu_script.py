"""`benchmarks/gpu.sh`: all parts are run in their order, inside nine minutes; one that fails does not stop others."""

import importlib
import os
import re
import shlex
import subprocess
from pathlib import Path

import jax
import pytest

from benchmarks import device
from benchmarks.step import rounds
from fp4jax.cli import run

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"
PARTS = {
    "device": "benchmarks.device",
    "tests": "pytest",
    "products": "pytest",
    "kernels": "benchmarks.kernels",
    "step": "benchmarks.step",
    "gemm": "benchmarks.gemm",
}
MOST_SECONDS = 515
FAKE = """#!/bin/bash
printf '%q ' "$@" >> {calls}; echo >> {calls}
case "$*" in *{failing}*) echo broken >&2; exit 3;; esac
"""


def run_script(folder, failing="nothing", before=""):
    """(what the script did, the arguments of every call of Python)."""
    calls, fake = folder / "calls", folder / "python"
    fake.write_text(FAKE.format(calls=calls, failing=failing))
    fake.chmod(0o755)
    path = {"PATH": f"{before}:{os.environ['PATH']}"} if before else {}
    done = subprocess.run(
        [SCRIPT, folder / "out" / "new", fake], capture_output=True, text=True, timeout=60, env=os.environ | path
    )
    return done, [shlex.split(line) for line in calls.read_text().splitlines()]


@pytest.mark.parametrize("failing", ["nothing", "tests/pallas_kernels", "benchmarks.step"])
def test_every_part_runs_once(failing, tmp_path):
    done, calls = run_script(tmp_path, failing)
    assert done.returncode == (failing != "nothing"), done.stdout
    assert [arguments[1] for arguments in calls] == list(PARTS.values())
    failed = next((name for name, words in zip(PARTS, calls, strict=True) if failing in words), None)
    out = tmp_path / "out" / "new"
    assert re.findall(r"== (\w+): exit code (\d+)", (out / "parts.txt").read_text()) == [
        (name, "3" if name == failed else "0") for name in PARTS
    ]
    if failed:
        assert "broken" in (out / f"{failed}.log").read_text()


def test_without_a_gpu_it_ends_at_once(tmp_path):
    """All tests would be skipped, and that is no failure for pytest."""
    done, calls = run_script(tmp_path, "benchmarks.device")
    assert done.returncode == 1 and len(calls) == 1


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="shows what happens without a GPU")
def test_the_first_part_fails_where_jax_sees_no_gpu(capsys):
    assert run(device.main, []) == 1
    assert "sees no GPU, its device is cpu" in capsys.readouterr().err


def test_the_parts_have_nine_minutes_at_most():
    """Counted: every limit, the time after it in which what does not end is killed, and the query of the GPU."""
    text = SCRIPT.read_text()
    limits = [int(seconds) for seconds in re.findall(r"^part \w+ (\d+) ", text, re.MULTILINE)]
    (kill_after,) = re.findall(r"--kill-after=(\d+) ", text)
    (query,) = re.findall(r"^timeout -s KILL (\d+) nvidia-smi ", text, re.MULTILINE)
    assert len(limits) == len(PARTS)
    assert sum(limits) + len(limits) * int(kill_after) + int(query) <= MOST_SECONDS
    # Nothing else can take time: no other call of Python or of the driver.
    assert text.count('"$python"') == len(PARTS) and text.count("nvidia-smi") == 1


def test_a_query_that_hangs_is_killed(tmp_path):
    hanging = tmp_path / "nvidia-smi"
    hanging.write_text("#!/bin/bash\ntrap '' TERM\nsleep 30\n")
    hanging.chmod(0o755)
    done, calls = run_script(tmp_path, before=str(tmp_path))
    assert done.returncode == 0 and len(calls) == len(PARTS)


def test_the_benchmarks_take_their_flags_and_the_tests_are_there(tmp_path):
    _, calls = run_script(tmp_path)
    for _, module, *flags in calls:
        if module == "pytest":
            paths = [flag for flag in flags if flag.startswith("tests/")]
            assert paths and all((SCRIPT.parents[1] / path).exists() for path in paths)
        elif module != "benchmarks.device":
            importlib.import_module(module)._parse(flags)


def test_products_are_tested_and_timed_as_the_model_runs_them(tmp_path):
    _, calls = run_script(tmp_path)
    (products,), (step,) = ([c for c in calls if word in c] for word in ("tests/test_fused.py", "benchmarks.step"))
    assert "tests/test_native.py" in products and products[2:][products[2:].index("-m") + 1] == "gpu"
    recipes = next(flag for flag in step if flag.startswith("--recipes=")).removeprefix("--recipes=").split(",")
    assert {"bf16", "nvfp4@pallas", "averis@pallas", "nvfp4_hadamard@pallas"} <= set(recipes)
    assert {"nvfp4@pallas/fused", "averis@pallas/fused"} <= set(recipes)
    assert rounds(recipes)[0][0] == "bf16"  # what all losses are compared with


def test_without_a_folder_it_says_how_it_is_called():
    run = subprocess.run([SCRIPT], capture_output=True, text=True, timeout=60)
    assert run.returncode != 0
    assert "usage: benchmarks/gpu.sh OUT" in run.stderr

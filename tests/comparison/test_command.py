import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = {
    "steps": 4, "seq_len": 32, "batch_size": 4, "log.every": 1, "evaluation.every": 2, "evaluation.batches": 1,
    "checkpoint.every": 2, "model.num_layers": 1, "model.hidden_size": 32, "model.intermediate_size": 32,
    "model.num_heads": 2, "model.num_kv_heads": 1, "model.head_dim": 16,
}  # fmt: skip


def command(workdir, *flags, **config):
    return [
        *(sys.executable, "-m", "fp4jax.compare", f"--config={ROOT / 'configs/averis_tiny.py'}"),
        f"--workdir={workdir}", *(f"--config.{key}={value}" for key, value in (TINY | config).items()), *flags,
    ]  # fmt: skip


PROCESS = {"cwd": ROOT, "text": True, "env": os.environ | {"JAX_PLATFORMS": "cpu"}}


def compare(workdir, *flags, **config):
    return subprocess.run(command(workdir, *flags, **config), capture_output=True, **PROCESS)


@pytest.mark.slow
def test_a_comparison_from_start_to_report(tmp_path):
    first = compare(tmp_path, "--recipes=bf16,nvfp4", "--primary=nvfp4:bf16")
    assert first.returncode == 0, first.stderr
    numbers = json.loads((tmp_path / "comparison.json").read_text())
    assert [(run["recipe"], run["seed"]) for run in numbers["runs"]] == [("bf16", 0), ("nvfp4", 0)]
    assert all(len(run["losses"]) == 4 and run["peak_memory_bytes"] > 1e8 for run in numbers["runs"])
    assert numbers["runs"][0]["losses"][0] != numbers["runs"][1]["losses"][0]
    # Run again: nothing is made anew. More seeds: only they are.
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/seed0/metrics.jsonl")}
    again = compare(tmp_path, "--recipes=bf16,nvfp4", "--primary=nvfp4:bf16", "--seeds=0,1")
    assert again.returncode == 0, again.stderr
    assert "2 of 4 runs are done already" in again.stdout and "4 of 4 runs" in again.stdout
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    runs = json.loads((tmp_path / "comparison.json").read_text())["runs"]
    assert runs[:2] == numbers["runs"] and runs[2]["losses"] != runs[0]["losses"]
    # A report alone, of more than there is.
    flags = ("--recipes=bf16,nvfp4,averis", "--primary=nvfp4:bf16", "--seeds=0,1,2", "--only_report")
    only = compare(tmp_path, *flags)
    assert only.returncode == 0 and "4 of 9 runs" in only.stdout, only.stderr
    report = json.loads((tmp_path / "comparison.json").read_text())
    assert report["runs"] == runs and report["missing_runs"] == 5 and not (tmp_path / "averis").exists()


@pytest.mark.slow
def test_a_signal_saves_the_run_and_the_same_command_goes_on(tmp_path):
    flags, config = ("--recipes=bf16,fp8",), {"steps": 40, "evaluation.every": 40, "checkpoint.every": 1000}
    metrics = tmp_path / "bf16/seed0/metrics.jsonl"
    with subprocess.Popen(command(tmp_path, *flags, **config), stderr=subprocess.PIPE, **PROCESS) as process:
        deadline = time.monotonic() + 300
        while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        error = process.communicate()[1]
    assert process.returncode == 143
    step = re.fullmatch(r"bf16, seed 0: stopped by SIGTERM: step (\d+) is saved; rerun .* to go on\n", error)[1]
    assert 0 < int(step) < 40
    again = compare(tmp_path, *flags, **config)
    assert again.returncode == 0, again.stderr
    assert f"after step {step};" in (tmp_path / "bf16/seed0/log.txt").read_text()
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(1, 41))


@pytest.mark.slow
def test_a_run_that_fails_names_its_log_and_one_that_diverges_is_a_result(tmp_path):
    failed = compare(tmp_path / "failed", "--recipes=bf16,nvfp4", **{"data.source": tmp_path / "nowhere"})
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert "nowhere" in failed.stderr and "log.txt" in failed.stderr
    diverged = compare(tmp_path / "diverged", "--recipes=bf16,nvfp4", **{"optimizer.learning_rate": 1e38})
    assert diverged.returncode == 0, diverged.stderr
    assert "Diverged: `bf16` (seed 0), `nvfp4` (seed 0)." in (tmp_path / "diverged/report.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--recipes=bf16"], "needs two recipes"),
        (["--seeds=0,x"], "--seeds takes whole numbers"),
        (["--primary=averis"], "takes two recipes, first:second"),
    ],
)
@pytest.mark.slow
def test_wrong_flags_are_one_line(tmp_path, flags, message):
    found = compare(tmp_path / "none", *flags)
    assert found.returncode == 1 and message in found.stderr and len(found.stderr.splitlines()) == 1
    assert not (tmp_path / "none").exists()

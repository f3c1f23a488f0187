"""train.py, eval.py and fp4jax.sample as a person runs them; the runs themselves are tested in tests/training."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.overheads import main as overheads
from fp4jax import cli
from tests.fuzz.__main__ import main as fuzz

ROOT = Path(__file__).parent.parent
TINY = "--config=configs/averis_tiny.py"


def run(script, *arguments, cwd=ROOT):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    where = ["-m", script] if "." in script and not script.endswith(".py") else [str(ROOT / script)]
    command = [sys.executable, *where, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is missing; for a first run: --config=configs/averis_tiny.py"),
        (["--config=configs/none.py"], "--config=configs/none.py: there is no such file"),
        ([TINY, "--config.stepz=3"], "unknown config key 'stepz'; did you mean 'steps'?"),
        ([TINY, "--config.steps=many"], "flag --config.steps=many: invalid literal"),
        ([TINY, "--confg.steps=3"], "Unknown command line flag 'confg.steps'"),
        pytest.param([TINY, "--config.recipe=averiz"], "unknown recipe 'averiz'", marks=pytest.mark.slow),
        ([TINY, "steps=3"], "unknown argument 'steps=3'; flags are written --name=value"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistake_gives_one_line(tmp_path, arguments, message):
    result = run("train.py", *arguments, f"--workdir={tmp_path}")
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1 and message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(tmp_path):
    result = run("train.py", TINY, "--config.steps=0", f"--workdir={tmp_path}", "--debug")
    assert result.returncode == 1 and "Traceback" in result.stderr and "ConfigError: steps=0" in result.stderr


def test_unexpected_errors_name_their_type(tmp_path):
    (tmp_path / "broken.py").write_text("def get_config():\n    return 1 / 0\n")
    result = run("train.py", f"--config={tmp_path / 'broken.py'}")
    assert result.returncode == 1
    assert result.stderr == "error: ZeroDivisionError: division by zero (--debug shows where)\n"


def test_eval_without_a_run(tmp_path):
    result = run("eval.py", f"--workdir={tmp_path / 'none'}")
    assert result.returncode == 1
    assert "none holds no checkpoint; train with this --workdir first" in result.stderr
    assert "--workdir is missing" in run("eval.py").stderr


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("eval.py", ["--tasks=mmlu", "--model=some"], "unknown task 'mmlu'; accepted: arc_challenge,arc_easy,boolq"),
        pytest.param("eval.py", ["--tasks=all"], "give one of --workdir", marks=pytest.mark.slow),
        pytest.param("eval.py", ["--limit=3"], "--limit: for downstream tasks, and --tasks", marks=pytest.mark.slow),
        pytest.param("eval.py", ["--tasks=all", "--batches=3"], "--batches is for the", marks=pytest.mark.slow),
        pytest.param("fp4jax.sample", [], "--prompt is missing", marks=pytest.mark.slow),
        ("fp4jax.sample", ["--prompt=a", "--top_p=2"], "top_p=2.0: must be greater than 0 and at most 1"),
        pytest.param("fp4jax.sample", ["--prompt=a", "--model=none.gguf"], "none.gguf cannot", marks=pytest.mark.slow),
    ],
)
def test_mistake_in_an_evaluation_gives_one_line(script, arguments, message):
    result = run(script, *arguments)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1 and message in result.stderr


def test_help():
    result = run("train.py", "--help")
    assert "--workdir" in result.stdout and "Rerunning the same command continues" in result.stdout


@pytest.mark.slow
def test_train_then_eval(tmp_path):
    small = [f"--config.model.{key}={value}" for key, value in (("num_layers", 1), ("hidden_size", 32))]
    small += ["--config.seq_len=32", "--config.evaluation.batches=1", "--config.recipe=bf16"]
    command = ["train.py", TINY, *small, "--config.steps=2", f"--workdir={tmp_path / 'run'}"]
    first = run(*command)
    assert first.returncode == 0 and "done: 2 steps" in first.stdout, first.stderr
    assert first.stderr == ""
    again = run(*command)
    assert again.returncode == 0 and "is done: 2 of 2 steps" in again.stdout
    other = run(*command, "--config.seed=1")
    assert other.returncode == 1 and "seed 0 → 1" in other.stderr
    evaluation = run("eval.py", f"--workdir={tmp_path / 'run'}", "--recipe=nvfp4")
    assert evaluation.returncode == 0 and "recipe nvfp4 (trained with bf16): validation loss" in evaluation.stdout
    assert (tmp_path / "run" / "evaluation-nvfp4.json").exists()
    assert evaluation.stderr == ""
    sample = ["fp4jax.sample", f"--workdir={tmp_path / 'run'}", "--prompt=Fellow", "--prompt=I have the"]
    text = run(*sample, "--max_tokens=6", "--temperature=1", "--top_k=50")
    assert text.returncode == 0 and text.stdout.startswith("Fellow") and "\n\nI have the" in text.stdout, text.stderr
    assert "12 tokens in " in text.stderr and "bf16 in 7 of 7 linear layers" in text.stderr
    empty = run(*sample[:2], "--prompt=", "--max_tokens=2")
    assert empty.returncode == 0 and "an empty --prompt is continued as what follows the end" in empty.stderr
    long = run(*sample, "--max_tokens=30")
    assert long.returncode == 1 and "--max_tokens=30 exceed the 32 tokens that the model takes" in long.stderr


def test_tables_are_what_their_json_says():
    result = subprocess.run(
        [sys.executable, "-m", "scripts.results_tables", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (fuzz, ["--examples=0"], "'0' is not a whole number from 1"),
        (fuzz, ["--reader=nope"], "invalid choice: 'nope'"),
        (fuzz, ["--output=/nowhere/fuzz.json"], "there is no folder /nowhere"),
        (overheads, ["time", "--workdir=runs/x", "--out=/nowhere/x.json"], "there is no folder /nowhere"),
        (overheads, ["memory", "--steps=10", "--workdir=runs/x", "--out=x.json"], "too short to compare windows"),
    ],
)
def test_measurements_refuse_in_one_line_before_they_begin(main, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.run(main, arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and list(tmp_path.iterdir()) == []

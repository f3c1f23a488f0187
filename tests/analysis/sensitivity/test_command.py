"""`python -m fp4jax.analyze sensitivity` on a run: what it writes, what can be done with it, and its errors."""

import json

import numpy as np
import pytest

from fp4jax import analyze
from fp4jax.analysis.sensitivity import inputs
from fp4jax.analysis.sensitivity.command import main
from fp4jax.config import default_config
from fp4jax.training import train

WORDS = "the of union state people congress year government nation peace war law".split()


@pytest.fixture
def config(tmp_path, monkeypatch):
    """One step of a model of two blocks on random words, in high precision."""
    monkeypatch.setenv("FP4JAX_CACHE", str(tmp_path / "cache"))
    random = np.random.default_rng(0)
    lines = (json.dumps({"text": " ".join(random.choice(WORDS, 80))}) for _ in range(100))
    (tmp_path / "shard.jsonl").write_text("\n".join(lines))
    config = default_config()
    config.recipe, config.model.dtype, config.steps, config.batch_size, config.seq_len = "bf16", "float32", 1, 4, 32
    config.model.update(
        {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16, "intermediate_size": 64}
    )
    config.data.source, config.data.validation_fraction = str(tmp_path / "shard.jsonl"), 0.2
    config.evaluation.batches, config.log.progress, config.checkpoint.asynchronous = 1, False, False
    return config


@pytest.mark.slow
@pytest.mark.standard_promotion  # optax
def test_a_scanned_run_trains_under_the_policy_file(config, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    train(config, run)
    main([f"--workdir={run}", "--recipe=nvfp4+nearest", "--rows=2", "--keep=20", f"--out={out}"])
    printed = capsys.readouterr().out
    assert f"--config.policy={out / 'policy.json'}" in printed and "whole policies" in printed
    assert (out / "sensitivity.png").stat().st_size > 10_000
    record = json.loads((out / "sensitivity.json").read_text())
    assert record["recipe"] == "nvfp4+nearest" and record["tokens"] == 64
    kinds = [effect["kind"] for effect in record["effects"]]
    assert [kinds.count(kind) for kind in ("type", "block", "policy")] == [7, 2, 3]
    errors = {effect["name"]: effect["total_gradient_error"] for effect in record["effects"]}
    assert 0 < errors["policy.json"] < errors["all_linear"]
    kept = sum(layer["parameters"] for layer in record["ranking"] if layer["kept"])
    assert 0 < kept <= 0.2 * sum(layer["parameters"] for layer in record["ranking"])

    config.recipe, config.policy = "nvfp4+nearest", str(out / "policy.json")
    train(config, tmp_path / "spared")
    (line,) = (json.loads(line) for line in (tmp_path / "spared" / "metrics.jsonl").read_text().splitlines())
    assert np.isfinite(line["loss"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "what is to be measured"),
        (["--model=smollm2-135m", "--workdir=x"], "give one or the other"),
        (["--model=smollm2-135m", "--keep=101"], r"--keep must be a percentage in \[0, 100\], got 101"),
        (["--model=smollm2-135m", "--keep=-1"], r"--keep must be a percentage in \[0, 100\], got -1"),
        (["--model=smollm2-135m", "--seeds=0"], "--seeds must be at least 1, got 0"),
        (["--model=smollm2-135m", "--seq-len=0"], "--seq-len must be at least 1, got 0"),
        (["--model=smollm2-135m", "--recipe=nvfp5"], "unknown recipe 'nvfp5'"),
        (["--model=smollm2-135m", "--recipe=bf16"], "recipe 'bf16' quantizes nothing"),
        (["--model=none.gguf"], "none.gguf cannot be read"),
        (["--workdir=nowhere"], "nowhere holds no checkpoint; train with this --workdir first"),
        (["--config=none.py"], "--config=none.py: there is no such file"),
        (["--config=empty.py", "--workdir=x"], "--config=empty.py: it has no function get_config"),
    ],
)
def test_errors_are_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.py").touch()
    assert analyze.main(["sensitivity", *arguments]) == 1
    captured = capsys.readouterr().err
    assert captured.startswith("error: ") and captured.count("\n") == 1
    with pytest.raises((ValueError, OSError), match=message):
        main(arguments)


def test_a_config_of_another_model_is_an_error(config, tmp_path):
    saved = config.to_dict()
    config.model.hidden_size = 64
    with pytest.raises(ValueError, match=r"another model than --config: model.hidden_size 32 and not 64; leave"):
        inputs._measured_config(tmp_path, saved, config)


def test_a_config_gives_recipe_and_data_but_not_policy_and_dtype(config, tmp_path):
    saved = config.to_dict()
    config.recipe, config.policy, config.model.dtype, config.seq_len = "averis", "nvidia", "bfloat16", 16
    measured = inputs._measured_config(tmp_path, saved, config)
    assert (measured.recipe, measured.policy, measured.model.dtype, measured.seq_len) == (
        "averis", "all_linear", "float32", 16,
    )  # fmt: skip

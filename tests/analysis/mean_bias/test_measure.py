"""The passes over a model: what they capture is what the model computes, and the commands show it."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fp4jax import analyze
from fp4jax.analysis.mean_bias import command, figures, tables
from fp4jax.analysis.mean_bias.capture import SITES, capture
from fp4jax.analysis.mean_bias.measure import measure, whitened_ratios
from fp4jax.analysis.mean_bias.subject import Subject
from fp4jax.models.qwen3 import Qwen3, Qwen3Config
from fp4jax.policy import Policy

SKIP = 2


@pytest.fixture(scope="module")
def subject():
    """Two layers with random parameters, large enough that layers and operators differ."""
    config = Qwen3Config(61, 32, 2, 4, 2, 8, 48, init_std=0.3, dtype="float32")
    chunks = np.random.default_rng(0).integers(0, 61, (2, 2, 16)).astype(np.int32)
    return Subject("tiny", Qwen3(config, policy=Policy.of(), rngs=nnx.Rngs(0)), chunks)


@pytest.mark.slow
def test_captures_what_the_model_computes(subject):
    tokens = jnp.asarray(subject.chunks[0])
    embedded, record = capture(subject.model, tokens, skip=SKIP)
    stream = record["sites"][SITES[0]]
    assert stream.shape == (2, 2 * (16 - SKIP), 32)
    final = subject.model.norm(stream[-1]).reshape(2, 16 - SKIP, 32)
    np.testing.assert_allclose(final, subject.model.hidden(tokens)[:, SKIP:], rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(embedded, subject.model.embedding[...][tokens[:, SKIP:]].reshape(-1, 32))
    uniform = np.asarray(record["softmax"]["uniform"])
    assert np.all((0.05 < uniform) & (uniform <= 1.0))


@pytest.mark.slow
def test_measures_and_shows(subject, tmp_path, monkeypatch, capsys):
    result = measure(subject.model, subject.chunks, skip=SKIP)
    entries = [entry for of_layers in result["sites"].values() for entry in of_layers]
    assert len(entries) == 3 + 2 + 2
    assert max(entry["identity_error"] for entry in entries) < 1e-12
    assert all(abs(sum(entry["top"].values()) - 1.0) < 1e-9 for entry in entries)
    assert result["expected_embedding"]["error"] < 1e-6
    ratios = [entry["ratio"] for entry in result["sites"][SITES[0]]]
    whitened = whitened_ratios(subject.model, subject.chunks, skip=SKIP)
    np.testing.assert_allclose(whitened["as it is"], ratios, rtol=1e-5)
    assert whitened["centred"][0] < 1e-5 and whitened["whitened"][0] < 1e-4

    monkeypatch.setattr(command, "pretrained", lambda *_: subject)
    monkeypatch.setattr(command, "enable_compilation_cache", lambda: None)
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 4.0}\n{"step": 2, "loss": 3.0, "validation_loss": 3.5}\n'
    )
    command.draw_figures(["--model=x", f"--skip={SKIP}", f"--out={tmp_path}", f"--losses={workdir}"])
    assert tables.outliers(result) in capsys.readouterr().out
    names = {*figures.FIGURES, "fig5", "theorems"}
    assert {path.stem for path in tmp_path.glob("*.png")} == names
    recorded = json.loads((tmp_path / "figures.json").read_text())["results"]["tiny"]
    assert recorded["operators"] == result["operators"] and recorded["whitened"].keys() == whitened.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mean-bias"], "give --model or --workdir, one of them"),
        (["outliers", "--model=a", "--workdir=b"], "give --model or --workdir, one of them"),
        (["operators", "--model=a", "--tokens=0"], "--tokens must be at least 1"),
        (["figures", "--model=a", "--seq_len=8", "--skip=8"], "--skip must be at least 0 and below --seq_len"),
        (["mean-bias", "--workdir=nowhere"], "nowhere holds no checkpoint; train with this --workdir first"),
    ],
)
def test_errors_are_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert analyze.main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1

"""Measurements of a small random model under recipes: what must hold of the numbers, the table and the command."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from fp4jax.analysis.ptq import command
from fp4jax.analysis.ptq.measure import Measurement, Sample, measure
from fp4jax.analysis.ptq.table import render
from fp4jax.data.tokenizers import Tokenizer
from fp4jax.models.llama import Llama, LlamaConfig
from fp4jax.models.pretrained import LoadedModel
from fp4jax.policy import Policy

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=48,
    init_std=0.3, dtype="float32",
)  # fmt: skip


class Bytes(Tokenizer):
    """A tokenizer whose tokens are bytes, modulo the vocabulary."""

    name, vocab_size, end_of_text, fingerprint = "bytes", CONFIG.vocab_size, 0, "bytes"

    def decode(self, ids):
        return bytes(ids).decode("ascii")

    def encode_batch(self, texts):
        return [[byte % CONFIG.vocab_size for byte in text.encode()] for text in texts]

    def encode_array(self, text):
        return np.array(self.encode_batch([text])[0], np.uint32)


@pytest.fixture(scope="module")
def loaded():
    state = nnx.state(Llama(CONFIG, policy=Policy.of(), rngs=nnx.Rngs(0)))
    params = {".".join(map(str, path)): variable[...] for path, variable in nnx.to_flat_state(state)}
    return LoadedModel(CONFIG, params, Bytes())


@pytest.fixture(scope="module")
def batches():
    return np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 2, 33)).astype(np.int32)


@pytest.fixture(scope="module")
def measured(loaded, batches):
    return {m.recipe: m for m in measure(loaded, batches, ["bf16", "mxfp8", "nvfp4"], [0, 1])}


@pytest.mark.slow
def test_high_precision_has_no_error(measured):
    exact = measured["bf16"]
    assert exact.loss_gap == pytest.approx(0, abs=1e-6)
    assert exact.mean("divergence") == pytest.approx(0, abs=1e-6)
    assert exact.mean("gradient_error") < 1e-4 and exact.mean("cosine") == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_fewer_bits_cost_more(measured):
    exact, eight, four = (measured[name] for name in ("bf16", "mxfp8", "nvfp4"))
    for field in ("divergence", "gradient_error"):
        assert exact.mean(field) < eight.mean(field) / 10 < eight.mean(field) < four.mean(field) / 2
    assert 0.3 < four.mean("cosine") < eight.mean("cosine") < 1
    # |g - e|² = |g|² - 2 g·e + |e|²: error and cosine bound each other.
    assert all(s.gradient_error >= (1 - s.cosine**2) ** 0.5 - 1e-5 for s in four.samples)


@pytest.mark.slow
def test_the_exact_loss_is_the_models(loaded, batches, measured):
    logits = loaded.model("bf16")(jax.numpy.asarray(batches[0][:, :-1]))
    chosen = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), batches[0][:, 1:, None], axis=-1)
    assert measured["nvfp4"].samples[0].exact_loss == pytest.approx(-chosen.mean(), rel=1e-5)


@pytest.mark.slow
def test_seeds_decide_the_noise(loaded, batches, measured):
    again = next(measure(loaded, batches, ["nvfp4"], [0, 1]))
    other = next(measure(loaded, batches, ["nvfp4"], [5]))
    assert again == measured["nvfp4"]
    assert other.samples[0].loss == again.samples[0].loss  # the forward draws nothing
    assert other.samples[0].gradient_error != again.samples[0].gradient_error


@pytest.mark.slow
def test_without_gradients(loaded, batches, measured):
    found = next(measure(loaded, batches, ["nvfp4"], [0], with_gradients=False))
    assert found.loss_gap == pytest.approx(measured["nvfp4"].loss_gap, rel=1e-4)
    assert found.mean("gradient_error") is None
    assert render("", [found]).splitlines()[2].split()[0] == "nvfp4"


def test_loss_gap_and_its_error():
    samples = [Sample(2.2, 2.0, 0.1, None, None), Sample(4.2, 4.0, 0.3, None, None), Sample(3.5, 3.0, 0.2, None, None)]
    found = Measurement("x", tuple(samples))
    assert found.loss_gap == pytest.approx(0.9 / 9)
    assert found.loss_gap_error == pytest.approx(np.std([0.2, 0.2, 0.5], ddof=1) / 3**0.5 / 3)


def test_nothing_to_measure(loaded, batches):
    with pytest.raises(ValueError, match="got 2 batches, 0 recipes, 1 seeds"):
        next(measure(loaded, batches, [], [0]))


# ---------------------------------------------------------------- the command


def run(monkeypatch, loaded, out, *arguments):
    monkeypatch.setattr(command, "load_parameters", lambda path, dtype: loaded)
    command.main(["--tokens=64", "--seq_len=32", "--batch_size=2", "--seeds=0", f"--out={out}", *arguments])


def test_command(monkeypatch, loaded, tmp_path, capsys):
    run(monkeypatch, loaded, tmp_path, "--recipes=nvfp4,mxfp8", "--no_gradients")
    printed = capsys.readouterr().out
    assert "activations quantized in all linear layers" in printed and "64 tokens, seeds [0]" in printed
    record = json.loads((tmp_path / "ptq.json").read_text())
    assert list(record["measurements"]) == ["nvfp4", "mxfp8", "nvfp4+w_bf16", "mxfp8+w_bf16"]
    assert (tmp_path / "ptq.png").stat().st_size > 1000

    monkeypatch.setattr(command, "measure", None)  # nothing is measured twice
    run(monkeypatch, loaded, tmp_path, "--recipes=mxfp8", "--no_gradients")
    assert json.loads((tmp_path / "ptq.json").read_text()) == record
    with pytest.raises(ValueError, match="holds measurements with .* use another --out"):
        run(monkeypatch, loaded, tmp_path, "--recipes=mxfp8")


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--tokens=0", "--tokens must be at least 1, got 0"),
        ("--seeds=a", "--seeds must be whole numbers"),
        ("--recipes=nvfp5", "unknown recipe 'nvfp5'"),
        ("--model=nowhere", "nowhere"),
    ],
)
def test_bad_arguments(argument, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        command.main([argument, f"--out={tmp_path}"])

"""The benchmark of peers, at sizes for a test."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import linears, peers, transformer

QWIX = importlib.util.find_spec("qwix") is not None
SMALL = transformer.Sizes(sequences=2, length=16, width=32, heads=2, hidden=64, layers=2, vocabulary=64)


@pytest.mark.standard_promotion
def test_a_layer_is_compared_with_float64_and_timed(tmp_path, capsys):
    contenders = "f32,bf16,nvfp4,nvfp4_forward,scaled_dot_general_amax"
    peers.main(["--shape=64,48,32", f"--contenders={contenders}", "--repeats=2", "--clock=cpu", f"--out={tmp_path}"])
    found = json.loads((tmp_path / "peers_linear_64x48x32.json").read_text())
    assert (found["clock"], found["repeats"]) == ("cpu", 2)
    rows = {row["contender"]: row for row in found["rows"]}
    assert list(rows) == contenders.split(",")
    for row in rows.values():
        assert len(row["seconds"]) == 2 and row["compile_seconds"] > 0 and row["trace_seconds"] > 0
        assert sum(row["products"].values()) == 3
    errors = {name: row["relative_error"] for name, row in rows.items()}
    assert max(errors["f32"].values()) < 1e-6 < min(errors["bf16"].values()) < max(errors["bf16"].values()) < 0.01
    assert all(0.05 < error < 0.3 for error in errors["nvfp4"].values())
    # Both quantize the forward alone, by the same scales.
    assert errors["nvfp4_forward"] == pytest.approx(errors["scaled_dot_general_amax"], rel=1e-3, abs=1e-5)
    assert rows["nvfp4"]["over_f32"]["ratio"] > 0 and "over_nvfp4" not in rows["nvfp4"]
    assert "ms" in capsys.readouterr().out


@pytest.mark.standard_promotion
def test_a_wrong_result_gets_no_time(tmp_path, monkeypatch):
    double = {"double": lambda: lambda x, w, key: 2 * (x @ w)}
    monkeypatch.setattr(linears, "_CONTENDERS", linears._CONTENDERS | double)
    with pytest.raises(ValueError, match="without a time: double; see"):
        peers.main(["--shape=32,32,32", "--contenders=f32,double", "--repeats=1", f"--out={tmp_path}"])
    rows = json.loads((tmp_path / "peers_linear_32x32x32.json").read_text())["rows"]
    assert "off by" in rows[1]["error"] and "seconds" not in rows[1] and "seconds" in rows[0]


@pytest.mark.standard_promotion
@pytest.mark.skipif(QWIX, reason="shows what happens without qwix")
def test_a_peer_that_is_not_installed_is_a_row_with_its_error():
    row, ready = peers.measured("qwix", lambda product: product, (), {}, tolerance=0.5)
    assert ready is None and "qwix" in row["error"]


def test_products_are_read_from_the_optimized_program():
    def run(x, w):
        return jax.lax.dot_general(x, w, (((1,), (0,)), ((), ())))

    text = jax.jit(run).lower(jnp.ones((64, 64)), jnp.ones((64, 64))).compile().as_text()
    assert peers.products(text) == {"f32 * f32 -> f32": 1}


def test_the_transformer_learns_and_its_layers_are_the_contenders():
    params = transformer.parameters(SMALL, jax.random.key(0))
    tokens = jnp.tile(jnp.arange(17)[None], (2, 1))
    seen = []

    def product(x, w, key):
        seen.append((x.shape[1], w.shape[1]))
        return linears.linear("f32")(x, w, key)

    step = jax.jit(transformer.training_step(product, SMALL))
    losses = []
    for _ in range(8):
        params, loss, _ = step(params, tokens, jax.random.key(1))
        losses.append(float(loss))
    assert np.isfinite(losses).all() and losses[-1] < 0.8 * losses[0]
    assert set(seen) == {(32, 96), (32, 32), (32, 128), (64, 32)}


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        *((f"--shape={shape}", f"--shape={shape}: give tokens,inputs,outputs") for shape in ("1,2", "a,b,c", "0,1,2")),
        ("--contenders=f32,f32", "--contenders names one twice"),
        ("--contenders=f32,nope", "'nope' is none of f32, bf16, nvfp4_forward, qwix"),
    ],
)
def test_flags_that_do_not_fit_are_refused_before_anything_is_written(flag, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        peers.main([flag, f"--out={tmp_path / 'results'}"])
    assert not list(tmp_path.iterdir())


@pytest.mark.standard_promotion
def test_without_any_result_there_is_no_time(tmp_path, monkeypatch):
    double = {"double": lambda: lambda x, w, key: 2 * (x @ w)}
    monkeypatch.setattr(linears, "_CONTENDERS", linears._CONTENDERS | double)
    with pytest.raises(ValueError, match="no contender gives a result; see .*peers_linear_64x48x32.json"):
        peers.main(["--shape=64,48,32", "--contenders=double", "--repeats=1", f"--out={tmp_path}"])

"""From a made-up health.jsonl to arrays, text and figures."""

import json

import matplotlib.image
import numpy as np

from fp4jax import analyze
from fp4jax.analysis.health.numbers import describe, load_health
from fp4jax.analysis.health.plots import TITLES, draw
from fp4jax.training.health import OPERAND_RATIOS, OPERANDS, WGRAD_RATIOS

LINEARS = ("mlp.up_proj", "self_attn.q_proj")


def line(step, *, gradient_to_noise=2.0, **changed):
    """One measurement of two linears in three layers; values grow with the layer."""
    table = {f"{r}/{o}/{name}": [0.1, 0.2, 0.3] for r in OPERAND_RATIOS for o in OPERANDS for name in LINEARS}
    table |= {f"{ratio}/wgrad/{name}": [0.5, 0.6, 0.7] for ratio in WGRAD_RATIOS for name in LINEARS}
    summary = {"gradient_cosine": 0.9, "gradient_to_noise": gradient_to_noise, "loss_gap": -0.01}
    return {"step": step, **summary, **table, **changed}


def write(folder, *lines):
    (folder / "health.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_rows_are_the_layers_of_each_linear(tmp_path):
    later = line(20, **{"sqnr_db/fprop.x/self_attn.q_proj": [20.0, None, 22.0]})
    del later["cosine/wgrad/mlp.up_proj"]
    health = load_health(write(tmp_path, line(10), later))
    assert health.names == tuple(f"layers.{layer}.{linear}" for linear in LINEARS for layer in range(3))
    assert health.groups == {"mlp.up_proj": 3, "self_attn.q_proj": 3}
    np.testing.assert_array_equal(health.steps, [10, 20])
    np.testing.assert_array_equal(
        health.ratios["sqnr_db"]["fprop.x"], [[0.1] * 2, [0.2] * 2, [0.3] * 2, [0.1, 20], [0.2, np.nan], [0.3, 22]]
    )
    np.testing.assert_array_equal(health.ratios["cosine"]["wgrad"][:3, 1], [np.nan] * 3)
    np.testing.assert_array_equal(health.summary["loss_gap"], [-0.01, -0.01])


def test_text_names_the_extreme_of_the_last_step_and_the_stop_rule(tmp_path):
    last = line(20, **{"sqnr_db/fprop.x/mlp.up_proj": [9.0, 3.0, 9.0], "underflow/fprop.x/mlp.up_proj": [0, 0.9, 0]})
    last["gradient_to_noise/wgrad/mlp.up_proj"] = [1.0, 1.8, 3.0]
    last |= {f"saturated/{operand}/{name}": [None] * 3 for operand in OPERANDS for name in LINEARS}
    text = list(describe(load_health(write(tmp_path, line(10), last))))
    assert "step 20, all parameters: cosine to the exact gradient 0.9000" in text[1] and "-0.0100 nats" in text[1]
    assert "not met; met by 4 of 6 linear layers" in text[2]
    rows = {tuple(row.split()[:2]): row.split()[2:] for row in text[4:]}
    assert rows["sqnr_db", "fprop.x"][1:] == ["0.1", "layers.0.self_attn.q_proj"]
    assert rows["underflow", "fprop.x"][1:] == ["0.9", "layers.1.mlp.up_proj"]
    assert not any(ratio == "saturated" for ratio, _ in rows)

    text = list(describe(load_health(write(tmp_path, line(10, gradient_to_noise=1.7)))))
    assert ": met;" in text[2]
    text = list(describe(load_health(write(tmp_path, line(10, gradient_to_noise=None)))))
    assert not any("stop rule" in row for row in text)


def test_a_figure_for_every_ratio_that_is_defined(tmp_path):
    kept = ("sqnr_db/", "zero_scales/", "cosine/")
    lines = [{name: v for name, v in line(step).items() if "/" not in name or name.startswith(kept)} for step in (1, 2)]
    for one in lines:
        one |= {f"zero_scales/{operand}/{name}": [None] * 3 for operand in OPERANDS for name in LINEARS}
    paths = draw(load_health(write(tmp_path, *lines)), tmp_path / "out")
    assert {path.stem for path in paths} == {"summary", "sqnr_db", "cosine"}
    for path in paths:
        assert matplotlib.image.imread(path).std() > 0.01


def test_command(tmp_path, capsys):
    write(tmp_path, {name: value for name, value in line(10).items() if "/" not in name or name.startswith("cosine")})
    assert analyze.main(["health", f"--workdir={tmp_path}", f"--out={tmp_path / 'figures'}"]) == 0
    assert "cosine.png" in capsys.readouterr().out and (tmp_path / "figures" / "cosine.png").exists()
    assert analyze.main(["health", f"--workdir={tmp_path / 'figures'}"]) == 1
    assert capsys.readouterr().err.endswith(
        "holds no health.jsonl; train with --config.health.every=100 in this --workdir first\n"
    )


def test_every_ratio_has_a_title():
    assert set(TITLES) == {*OPERAND_RATIOS, *WGRAD_RATIOS}

"""The benchmark of the training step, at sizes for a CPU."""

import json
import math

import jax
import pytest

from benchmarks import step


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() == "gpu", reason="shows what happens without a GPU")
@pytest.mark.standard_promotion
def test_a_tiny_step_is_measured_on_any_device(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"without a time: nvfp4@pallas; see .*step.json"):
        step.main(
            ["--model=tiny", "--layers=1", "--sequences=1", "--length=32", "--repeats=2", f"--out={tmp_path}"]
            + ["--recipes=bf16,nvfp4@pallas,nvfp4,averis@xla"]
        )
    found = json.loads((tmp_path / "step.json").read_text())
    assert (found["layers"], found["sequences"], found["length"]) == (1, 1, 32)
    rows = {row["recipe"]: row for row in found["rows"]}
    assert list(rows) == ["bf16", "nvfp4@pallas", "nvfp4", "averis@xla"]
    assert "needs an NVIDIA GPU" in rows.pop("nvfp4@pallas")["error"]
    for row in rows.values():
        assert len(row["seconds"]) == 2 and row["temporary_bytes"] > 0 and row["compile_seconds"] > 0
        assert row["loss"] == pytest.approx(math.log(4096), rel=0.05)
        assert row["tokens_per_second"] == pytest.approx(32 / row["median_seconds"])
    assert rows["nvfp4"]["over_bf16"]["ratio"] > 0 and "over_nvfp4" in rows["bf16"]
    # nvfp4 ran under another backend: no ratio to it.
    assert "over_bf16" in rows["averis@xla"] and "over_nvfp4" not in rows["averis@xla"]
    assert "tokens/s" in capsys.readouterr().out


TIMES = {"bf16": [1.0, 2.0], "nvfp4": [2.0, 4.0], "nvfp4@pallas": [1.5, 3.0], "averis@pallas": [3.0, 6.0]}


@pytest.mark.parametrize(
    "name, over_bf16, over_nvfp4",
    [("bf16", None, 0.5), ("nvfp4", 2.0, None), ("nvfp4@pallas", 1.5, None), ("averis@pallas", 3.0, 2.0)],
)
def test_ratios_are_to_nvfp4_under_the_same_backend(name, over_bf16, over_nvfp4):
    found = step.summary(name, TIMES, tokens=30)
    ratio = {
        reference: found[f"over_{reference}"]["ratio"] for reference in step.REFERENCES if f"over_{reference}" in found
    }
    want = {"bf16": over_bf16, "nvfp4": over_nvfp4}
    assert ratio == pytest.approx({key: value for key, value in want.items() if value is not None})
    assert found["tokens_per_second"] == pytest.approx(30 / (1.5 * TIMES[name][0]))


@pytest.mark.parametrize("loss, grad_norm", [(math.nan, 1.0), (8.0, math.inf), (9.0, 1.0)])
def test_a_loss_that_cannot_be_right_ends_the_run(loss, grad_norm):
    reference = {"recipe": "bf16", "loss": 8.0, "grad_norm": 1.0}
    step.check([reference])
    with pytest.raises(ValueError, match="averis: loss .* no time is reported"):
        step.check([reference, {"recipe": "averis", "loss": loss, "grad_norm": grad_norm}])


def test_nothing_to_measure_is_an_error():
    with pytest.raises(ValueError, match="no recipe could be run"):
        step.check([])


def test_a_recipe_twice_is_refused():
    with pytest.raises(ValueError, match="--recipes names one twice"):
        step.main(["--recipes=bf16,bf16"])

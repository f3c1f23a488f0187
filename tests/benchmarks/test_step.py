"""The benchmark of the training step, at sizes for a CPU."""

import json
import math
from concurrent.futures import Future
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from benchmarks import step
from fp4jax.cli import Parser


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


TIMES = {
    "bf16": [1.0, 2.0],
    "nvfp4": [2.0, 4.0],
    "nvfp4@pallas": [1.5, 3.0],
    "averis@pallas": [3.0, 6.0],
    "nvfp4@pallas/fused": [4.0, 8.0],
    "averis@pallas/fused": [6.0, 12.0],
    "averis/fused": [5.0, 10.0],
}


@pytest.mark.parametrize(
    "name, over",
    [
        ("bf16", {"nvfp4": 0.5}),
        ("nvfp4", {"bf16": 2.0}),
        ("nvfp4@pallas", {"bf16": 1.5}),
        ("averis@pallas", {"bf16": 3.0, "nvfp4": 2.0}),
        ("nvfp4@pallas/fused", {"bf16": 4.0, "auto": 4 / 1.5}),
        ("averis@pallas/fused", {"bf16": 6.0, "nvfp4": 1.5, "auto": 2.0}),
        ("averis/fused", {"bf16": 5.0}),  # nvfp4/fused was not measured
    ],
)
def test_ratios_are_to_nvfp4_under_the_same_backend_and_product(name, over):
    found = step.summary(name, TIMES, tokens=30)
    ratios = {key.removeprefix("over_"): value["ratio"] for key, value in found.items() if key.startswith("over_")}
    assert ratios == pytest.approx(over)
    assert found["tokens_per_second"] == pytest.approx(30 / (1.5 * TIMES[name][0]))


@pytest.mark.parametrize(
    "name, want",
    [
        ("averis", ("averis", "auto", "auto")),
        ("averis+per_sequence@pallas", ("averis+per_sequence", "pallas", "auto")),
        ("averis@pallas/fused", ("averis", "pallas", "fused")),
        ("averis/native", ("averis", "auto", "native")),
    ],
)
def test_a_name_gives_backend_and_product(name, want):
    parser = Parser("benchmarks.step", "")
    step.add_program_flags(parser, model="tiny")
    config = step.configuration(parser.parse_args([]), name)
    assert (config.recipe, config.backend, config.gemm) == want


@pytest.mark.parametrize("name", ["averis@", "averis/", "averis@/fused", "averis@pallas/"])
def test_half_a_name_is_refused(name):
    with pytest.raises(ValueError, match="leaves out what it announces"):
        step.main([f"--recipes=bf16,{name}"])


@pytest.mark.parametrize(
    "name, what", [("averis@palas", "backend 'palas'"), ("averis@pallas/quick", "product 'quick'")]
)
def test_an_unknown_backend_or_product_is_refused_before_anything_is_written(name, what, tmp_path):
    with pytest.raises(ValueError, match=f"unknown {what} in '{name}'; known: auto, "):
        step.main([f"--recipes=bf16,{name}", f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def fake_program(name, fault=None):
    """Steps that do nothing, but for one that breaks."""

    def run(state, batch):
        if fault:
            raise RuntimeError(fault)
        return state, {"loss": jnp.float32(8), "grad_norm": jnp.float32(1)}

    program = mock.Mock(side_effect=run, compile_seconds=1.0, bytes={"held": 1, "temporary": 1})
    program.name = name
    return program


def run_with(monkeypatch, folder, *programs):
    """What `step.main` writes for them."""
    futures = {program.name: Future() for program in programs}
    for program in programs:
        futures[program.name].set_result(program)
    monkeypatch.setattr(step, "compile_all", lambda configs, mesh: futures)
    monkeypatch.setattr(step, "initial_state", lambda config, mesh: jnp.zeros(()))
    names = ",".join(futures)
    try:
        step.main(["--model=tiny", f"--recipes={names}", "--repeats=2", f"--out={folder}"])
    finally:
        rows = json.loads((folder / "step.json").read_text())["rows"]
    return rows


FAULT = "an illegal memory access was encountered"


def test_programs_that_name_a_product_join_when_the_others_have_their_times(monkeypatch, tmp_path):
    plain, late = fake_program("bf16"), fake_program("averis/fused")
    other = fake_program("averis")
    rows = run_with(monkeypatch, tmp_path, plain, late, other)
    assert [row["recipe"] for row in rows] == ["bf16", "averis", "averis/fused"]
    assert all(len(row["seconds"]) == 2 for row in rows) and "over_auto" in rows[2]
    # A first step, and in each round a turn that does not count and two that do.
    assert (plain.call_count, other.call_count, late.call_count) == (7, 7, 4)


@pytest.mark.parametrize("fails", ["in its first step", "later"])
def test_a_product_that_breaks_the_device_costs_no_other_program_its_time(fails, monkeypatch, tmp_path):
    plain, late = fake_program("bf16"), fake_program("averis/fused", fault=FAULT if "first" in fails else None)
    if fails == "later":
        good = late.side_effect
        late.side_effect = lambda *a: good(*a) if late.call_count == 1 else fake_program("", fault=FAULT)(*a)
    with pytest.raises(ValueError, match="without a time: averis/fused; see"):
        run_with(monkeypatch, tmp_path, plain, late)
    first, broken = json.loads((tmp_path / "step.json").read_text())["rows"]
    assert len(first["seconds"]) == 2 and "error" not in first
    assert FAULT in broken["error"] and "seconds" not in broken


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

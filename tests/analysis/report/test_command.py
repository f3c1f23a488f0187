"""`python -m fp4jax.analyze report`, and that a Qwen3's training step has every linear layer's GEMMs in FP4."""

import collections
import json

import pytest

from fp4jax import analyze
from fp4jax.analysis.report.command import training_step_report
from fp4jax.config import default_config, mesh_of
from fp4jax.models.qwen3 import LINEARS
from fp4jax.reporting import Precision

GEMMS = {"fprop", "dgrad", "wgrad"}
LAYERS, MICROBATCHES = 2, 2


def tiny_config(**changes):
    config = default_config()
    config.batch_size, config.microbatches, config.seq_len = 8, MICROBATCHES, 32
    config.mesh = mesh_of()
    config.model.update(
        {"hidden_size": 32, "num_layers": LAYERS, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16}
        | {"intermediate_size": 64, "vocab_size": 256}
    )
    config.update(changes)
    return config


def counts(report):
    """(layer, GEMM) → executions of products in FP4, and the rows that are not in FP4 by their reason."""
    in_fp4, others = collections.Counter(), collections.defaultdict(list)
    for row in report.rows:
        if row.precision is Precision.FP4:
            in_fp4[row.layer.removeprefix("state.params."), row.gemm] += row.count
        else:
            others[row.reason].append(row)
    return in_fp4, others


EVERY_GEMM = {(f"layers.{linear}", gemm): LAYERS * MICROBATCHES for linear in LINEARS for gemm in GEMMS}


@pytest.mark.standard_promotion  # jax.nn.dot_product_attention
def test_every_gemm_of_a_training_step_is_in_fp4():
    report = training_step_report(tiny_config(recipe="averis"), compile_program=False)
    in_fp4, others = counts(report)
    assert in_fp4 == EVERY_GEMM
    assert set(others) == {"not a layer: activation x activation", "not given to fp4jax"}
    attention = others["not a layer: activation x activation"]
    # And the head's weight gradient, which the loss takes while a chunk's logits are there.
    assert sum(row.count for row in attention) == (6 * LAYERS + 1) * MICROBATCHES
    assert {row.layer for row in others["not given to fp4jax"]} == {"state.params.embedding"}
    assert {row.reason for row in report.apart} == {"correction of a split"}


@pytest.mark.slow
@pytest.mark.standard_promotion
@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_compiled_training_step_keeps_every_quantization(remat):
    config = tiny_config(recipe="averis")
    config.model.remat = remat
    report = training_step_report(config)
    # A block's last product is not repeated: nothing of the backward needs its result.
    again = {at: count for at, count in EVERY_GEMM.items() if at[1] == "fprop" and "down_proj" not in at[0]}
    assert counts(report)[0] == collections.Counter(EVERY_GEMM) + collections.Counter(again if remat == "full" else {})
    assert report.compiled.folded == ()
    assert report.compiled.operands == report.compiled.coded >= 2 * len(EVERY_GEMM)


@pytest.mark.standard_promotion
def test_a_policy_shows_in_the_command(tmp_path, capsys):
    file = tmp_path / "tiny.py"
    file.write_text(
        "from fp4jax.config import default_config\n\n\ndef get_config():\n    config = default_config()\n"
        "    config.model.update({'hidden_size': 32, 'num_layers': 2, 'intermediate_size': 64})\n    return config\n"
    )
    arguments = [
        "report", f"--config={file}", "--trace-only", f"--json={tmp_path / 'report.json'}", "--config.recipe=nvfp4",
        "--config.schedule=bf16:50%,run:100%", '--config.policy=[["down_proj", "run"]]', "--config.mesh.data=1",
    ]  # fmt: skip
    assert analyze.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "bf16\ntrain_step: 0 of " in printed and "nvfp4\ntrain_step: 6 of " in printed
    first, second = (json.loads((tmp_path / f"report_{number}.json").read_text()) for number in (1, 2))
    assert (first["fp4_products"], second["fp4_products"]) == (0, 6)
    in_fp4 = {row["layer"] for row in second["rows"] if row["precision"] == "FP4"}
    assert in_fp4 == {"state.params.layers.mlp.down_proj"}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "error: report: the following arguments are required: --config (--help lists the flags)"),
        (["--config=no.py"], "error: --config=no.py: there is no such file"),
        (["--config=no.py", "--json=/"], "error: --json=/ is a folder; name a file"),
        (
            ["--config=no.py", "--json=/nowhere/x.json"],
            "error: --json=/nowhere/x.json: there is no folder /nowhere; make it, or name another file",
        ),
        (["--config.recepi=nvfp4"], "error: unknown config key 'recepi'; did you mean 'recipe'?"),
        (
            ["--config=configs/averis_tiny.py", "--config.steps=many"],
            "error: --config.steps=many: steps must be int, got 'many'",
        ),
    ],
)
def test_errors_are_one_line(arguments, line, capsys):
    assert analyze.main(["report", *arguments]) == 1
    assert capsys.readouterr().err == line + "\n"

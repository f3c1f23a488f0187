"""One optimizer step compiles under every recipe for a TPU slice and for a Hopper GPU, on a machine with neither.

And its matrix products still multiply what the recipe says: see `optimized_hlo`.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fp4jax.plan import targets
from fp4jax.recipes import Operand, Source, list_recipes, recipe

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
TARGETS = ("v5e:2x2", "h200:1")
BUDGET = 1500  # seconds for one target, which takes 7 minutes of processor time at most

pytestmark = pytest.mark.slow


def _is_installed(target: str) -> bool:
    return importlib.util.find_spec(targets.parse(target).package) is not None


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """One process for each target that can be compiled for, side by side; all recipes share its start."""
    folder, running = tmp_path_factory.mktemp("targets"), {}
    environment = os.environ | targets.ENVIRONMENT | {"PYTHONPATH": str(REPOSITORY)}
    for target in TARGETS:
        if _is_installed(target):
            out, log = folder / f"{target}.jsonl", folder / f"{target}.log"
            command = [sys.executable, HERE / "compile_for_target.py", target]
            with out.open("w") as stdout, log.open("w") as stderr:
                running[target] = subprocess.Popen(command, env=environment, stdout=stdout, stderr=stderr), out, log
    yield running
    for process, _, _ in running.values():
        process.kill()


@pytest.fixture(scope="module", params=TARGETS)
def reports(request, processes):
    """What was found for each recipe that came through, and the end of the log."""
    if not _is_installed(request.param):
        pytest.skip(f"needs the compiler for {request.param}, no such device: make test-compile installs it")
    process, out, log = processes[request.param]
    process.wait(timeout=BUDGET)
    found = {report["recipe"]: report for report in map(json.loads, out.read_text().splitlines())}
    return request.param, found, log.read_text()[-3000:]


@pytest.mark.parametrize("name", list_recipes())
def test_step_compiles_and_stays_quantized(reports, name, capsys):
    target, found, log = reports
    assert name in found, log
    report = found[name]
    assert "error" not in report, report["error"]
    with capsys.disabled():
        print(f"\n{target} {name}: {report['seconds']} s of processor time")
    assert not report["wide"]
    kinds = {(product["stage"], product["quantized"]) for product in report["products"]}
    assert expected_products(name) | expected_products("bf16") <= kinds
    control = {product["stage"] for product in report["products"] if not product["quantized"] and not product["coded"]}
    assert control == {"fprop", "dgrad", "wgrad"}, "the layers in bfloat16 must have precise sources"
    for product in report["products"]:
        assert product["coded"] >= product["quantized"], f"reached in full precision: {product}"
        # Values with a float32 scale folded in are not exact in bfloat16: several passes on a matrix unit.
        if product["quantized"] == 2 and any(dtype.startswith("f32") for dtype in product["types"]):
            assert product["highest"], f"multiplied in less than float32: {product}"


def expected_products(name: str) -> set[tuple[str, int]]:
    """(stage, number of quantized operands) of the three products of the recipe's residuals."""
    value = recipe(name)
    forward_x, forward_w = value.fprop.lhs, value.fprop.rhs
    pairs = {
        "fprop": ((forward_x, None), (forward_w, None)),
        "dgrad": ((value.dgrad.lhs, None), (value.dgrad.rhs, forward_w)),
        "wgrad": ((value.wgrad.lhs, forward_x), (value.wgrad.rhs, None)),
    }
    return {(stage, sum(_is_quantized(*pair) for pair in of_stage)) for stage, of_stage in pairs.items()}


def _is_quantized(operand: Operand, forward: Operand | None) -> bool:
    copies = operand.source is Source.QUANTIZED and not operand.hadamard
    return operand.format is not None or bool(copies and forward.format)

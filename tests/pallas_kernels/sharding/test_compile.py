"""A linear layer on the kernels, compiled for 8 GPUs that are not there: no activation is gathered, whatever is cut."""

import math
import re
from pathlib import Path

import pytest

from fp4jax.plan import kernels
from tests.pallas_kernels import targets

SCRIPT = Path(__file__).with_name("compile_for_target.py")
pytestmark = targets.COMPILES
# The elements of W, [1024, 3072], which data parallelism gathers; a shard of X or of a gradient has 2.7 times as many.
WEIGHTS = 1024 * 3072


@pytest.fixture(
    scope="module",
    params=[
        ("h200:8", "batch", WEIGHTS),
        ("h200:8", "column-parallel", 0),
        ("h200:8", "row-parallel", 0),
        ("h200:8", "sequence", 0),
        ("b200:8", "batch", WEIGHTS),
    ],
    ids=lambda param: " ".join(param[:2]),
)
def compiled(request, tmp_path_factory):
    target, cut, most = request.param
    dump = tmp_path_factory.mktemp("mosaic")
    return targets.run(SCRIPT, target, cut, dump=dump), most, kernels.read(dump)


def moved(program: str) -> list[int]:
    """Elements of every array that an operation makes of parts that lie on other devices, largest last."""
    lines = re.findall(r" = (.*?) (?:all-gather|all-to-all|collective-permute|ragged-all-to-all)[\w-]*\(", program)
    shapes = [shape for line in lines for shape in re.findall(r"\w+\[([\d,]*)\]", line)]
    return sorted(math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes)


def test_only_weights_and_sums_of_columns_travel(compiled):
    program, most, _ = compiled
    sums_of_columns = 16 * 2 * 3072  # of every sequence and both its halves
    found = moved(program)
    assert found  # the sums
    assert max(found) <= max(most, sums_of_columns)


def test_every_device_runs_the_kernels(compiled):
    program, _, found = compiled
    # Statistics, sums, rows and columns of X and of the gradient; rows and columns of W.
    assert program.count('custom_call_target="mosaic_gpu_v2"') == 10
    assert {"column_stats", "column_sums"} <= {kernel.name.rpartition("_")[0] for kernel in found}
    assert any("stochastic" in kernel.name for kernel in found)
    assert all(kernel.spill_bytes == 0 for kernel in found), found

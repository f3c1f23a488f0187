"""The benchmark of the kernels never prints a number that it did not measure, nor one of a wrong result."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import compiling, kernels, operations, records
from benchmarks.operations import OPERATIONS, Operation
from fp4jax import provenance
from fp4jax.cli import run
from pallas_kernels import column_stats, column_sums, compat, quantize
from pallas_kernels.quantize.shapes import EXPERT_SHAPES, SHAPES, WEIGHT_SHAPES, Shape, scaled_down
from scripts import speed_tables

without_gpu = pytest.mark.skipif(jax.default_backend() == "gpu", reason="shows what happens without a GPU")
SMALL = Shape(64, 512, "", ("0p6b",))
BFLOAT16 = jnp.dtype(jnp.bfloat16)


@without_gpu
def test_without_a_gpu_it_says_so_in_one_line_and_prints_no_table(capsys, tmp_path):
    assert run(kernels.main, [f"--out={tmp_path}"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: nothing to measure: ") and printed.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--operations=column_stats,sort", "unknown operation 'sort'; known: column_stats, "),
        ("--shapes=5x5", "unknown shape '5x5'; known: 65536x1024, "),
        ("--models=0p6b,8b", "unknown model '8b'; known: 0p6b, 7b_a1p5b"),
        ("--models=0p6b --shapes=64x10240x2048", "unknown shape '64x10240x2048'"),
    ],
)
def test_flags_that_do_not_fit_are_refused(argument, message):
    with pytest.raises(ValueError, match=message):
        kernels.main(argument.split())


@pytest.fixture
def interpreted(monkeypatch):
    for module, names in (
        (quantize, ("quantize_rows", "quantize_columns", "quantize_2d", "quantize_copies")),
        (column_stats, ("column_stats",)),
        (column_sums, ("column_sums",)),
    ):
        for name in names:
            kernel = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *a, kernel=kernel, **k: kernel(*a, **k, interpret=True))


@pytest.mark.skipif(not compat.CAN_INTERPRET, reason="the GPU interpreter needs JAX 0.12.0")
@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_compares_like_with_like(name, batch, interpreted):
    operation = OPERATIONS[name]
    shape = scaled_down(next(shape for shape in operation.shapes if (shape.batch > 1) == (batch > 1)), 32)
    shape = dataclasses.replace(shape, tokens=min(shape.tokens, 320))
    x = kernels.make_inputs(shape, BFLOAT16)[0]
    assert x.shape == shape.array and shape.batch == batch
    given = (x, *jax.jit(operation.given)(x))
    got, want = jax.jit(operation.kernel)(*given), jax.jit(operation.twin)(*given)
    assert kernels.differences(got, want, operation.tolerance) == {}
    # Statistics and sums are a few rows for many tokens: nothing for each element.
    packed = [out for out in jax.tree.leaves(want) if out.dtype == jnp.uint8]
    assert operation.written == sum(out.nbytes for out in packed) / x.size
    assert (operation.tolerance > 0) == (name == "column_sums" or "copies" in name)
    if operation.read is not None:
        assert operation.read == sum(a.nbytes for q in given[1:] for a in (q.codes, q.scales)) / x.size


def test_everything_that_averis_runs_is_among_them():
    """Gradients, in both directions, are centered and rounded stochastically; their sums are taken from the codes."""
    wanted = {f"quantize_{axis} centered{how}" for axis in ("rows", "columns") for how in ("", " stochastic")}
    wanted |= {"column_stats", "column_sums", "quantize_copies centered stochastic sums"}
    assert wanted <= set(OPERATIONS)


def test_square_blocks_are_timed_on_weights_and_nothing_else_is():
    for name, operation in OPERATIONS.items():
        assert set(operation.shapes) == set(WEIGHT_SHAPES if "2d" in name else (*SHAPES, *EXPERT_SHAPES))


def test_one_wrong_code_is_more_than_the_tolerance_of_sums():
    sums = 256 * jax.random.normal(jax.random.key(0), (1, 64))  # as of 65,536 rows
    wrong = sums.at[0, 5].add(0.25 / 6)  # half a step of the smallest codes, in a block of scale 1 / 6
    assert kernels.differences(sums, sums * (1 + 1e-6), operations.SUMS_TOLERANCE) == {}
    assert kernels.differences(wrong, sums, operations.SUMS_TOLERANCE) == {"output 0 of 64": 1}
    assert kernels.differences(sums.at[0, 1].set(jnp.nan), sums, operations.SUMS_TOLERANCE) == {"output 0 of 64": 1}


def test_what_no_gpu_has_run_comes_last_on_every_shape():
    """A fault breaks the device for all that follows."""
    order = [(name, shape) for shape, names in kernels.schedule(list(OPERATIONS), SHAPES) for name in names]
    known = [OPERATIONS[name].was_measured for name, _ in order]
    assert known == sorted(known, reverse=True) and set(known) == {True, False}
    assert order[0] == ("column_stats", SHAPES[0]) and SHAPES[0].tokens == 65536


def faulty(operation):
    def kernel(*given):
        outputs, tree = jax.tree.flatten(operation.twin(*given))
        return jax.tree.unflatten(tree, [out.at[0, 0].set(1) for out in outputs])

    return dataclasses.replace(operation, kernel=kernel)


@pytest.fixture
def right(monkeypatch):
    monkeypatch.setattr(kernels, "unsupported_reason", lambda: None)
    monkeypatch.setattr(kernels.timing, "WORKING_SET", 2**20)
    twin = operations.column_stats
    return Operation(twin, twin, OPERATIONS["column_stats"].given, 0.0, shapes=(SMALL,))


def rows_of(folder):
    return json.loads((folder / "kernels.json").read_text())["rows"]


def test_a_wrong_result_gives_no_time_and_fails_the_run(right, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(kernels, "OPERATIONS", {"wrong": faulty(right), "right": right})
    with pytest.raises(ValueError, match=r"outputs differ from the twin: wrong; see .*kernels.json"):
        kernels.main(["--operations=wrong,right", "--repeats=2", f"--out={tmp_path}"])
    written = json.loads((tmp_path / "kernels.json").read_text())
    wrong, fine = written["rows"]
    assert wrong["differing"] and "kernel_us" not in wrong
    assert fine["kernel_us"] > 0 and 0 < fine["share_of_copy_bandwidth"]
    assert written["jax"] == jax.__version__ and written["command"].startswith("python -m benchmarks.kernels")
    assert "differs from its twin, no time" in capsys.readouterr().out


@pytest.mark.parametrize("when", ["traced", "run"])
def test_an_operation_that_fails_is_a_row_and_the_others_are_timed(right, when, monkeypatch, tmp_path, capsys):
    def kernel(x):
        raise RuntimeError("no such instruction")

    measure = kernels.measure

    def fault(name, *arguments):
        if name == "broken":
            raise RuntimeError("an illegal memory access was encountered")
        return measure(name, *arguments)

    if when == "run":
        monkeypatch.setattr(kernels, "measure", fault)
    broken = right if when == "run" else dataclasses.replace(right, kernel=kernel)
    monkeypatch.setattr(kernels, "OPERATIONS", {"broken": broken, "right": right})
    with pytest.raises(ValueError, match=r"failed: broken; see .*kernels.json"):
        kernels.main(["--repeats=2", "--models=0p6b", "--operations=broken,right", f"--out={tmp_path}"])
    failed, fine = rows_of(tmp_path)
    assert ("no such instruction" if when == "traced" else "illegal memory access") in failed["error"]
    assert fine["kernel_us"] > 0 and fine["operation"] == "right"
    assert "error: " in capsys.readouterr().out


def test_a_device_that_is_broken_is_every_later_row(right, monkeypatch, tmp_path):
    def make_inputs(shape, dtype):
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")

    monkeypatch.setattr(kernels, "OPERATIONS", {"a": right, "b": right})
    monkeypatch.setattr(kernels, "make_inputs", make_inputs)
    with pytest.raises(ValueError, match="failed: a, b; see"):
        kernels.main(["--operations=a,b", f"--out={tmp_path}"])
    assert all("CUDA_ERROR_ILLEGAL_ADDRESS" in row["error"] for row in rows_of(tmp_path))


def test_operations_of_a_shape_share_its_copy_and_what_they_are_given(right, monkeypatch):
    seen = []
    monkeypatch.setattr(compiling, "side_by_side", lambda programs: seen.extend(programs) or programs)
    kernels.compiled(SMALL, ["quantize_rows", "quantize_columns", "quantize_rows stochastic"], BFLOAT16)
    assert seen.count("copy") == 1 and len(seen) == 1 + 1 + 3 * 2


def test_one_program_that_fails_to_compile_costs_no_other():
    x = jax.ShapeDtypeStruct((3,), jnp.float32)
    found = compiling.side_by_side({0: (jax.jit(lambda x: x + 1.0), (x,)), 1: (jax.jit(lambda x: x.nope), (x,))})
    assert found[0].result()(jnp.zeros(3)).tolist() == [1, 1, 1]
    with pytest.raises(AttributeError, match="nope"):
        found[1].result()


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPERATIONS)
def test_it_measures_a_shape(name):
    (row,) = kernels.measure_shape(OPERATIONS[name].shapes[0], [name], BFLOAT16, repeats=3)
    assert "error" not in row, row["error"]
    assert row["kernel_us"] > 0
    assert 0 < row["share_of_copy_bandwidth"] < 2


def test_results_are_replaced_whole_and_say_where_they_are_from(tmp_path):
    path = tmp_path / "new" / "x.json"
    for rows in ([{"a": 1}], [{"a": 1}, {"a": 2}]):
        records.write(path, "benchmarks.x", rows, sizes=3)
        found = json.loads(path.read_text())
        assert found["rows"] == rows and found["sizes"] == 3
        assert found["device"] and found["commit"]
    assert [file.name for file in path.parent.iterdir()] == ["x.json"]


def test_the_default_folder_is_named_after_the_device(monkeypatch):
    monkeypatch.setattr(records, "about", lambda command: {"device": "NVIDIA H100 80GB HBM3"})
    assert records.default_folder() == provenance.ROOT / "benchmarks" / "results" / "nvidia_h100_80gb_hbm3"


def test_the_table_has_the_rows_with_a_time(monkeypatch):
    timed = {"kernel_us": 5.0, "kernel_gb_s": 1.0, "share_of_copy_bandwidth": 0.5, "xla_over_kernel": 2.0}
    sizes = {"tokens": 640, "features": 1024}
    rows = [
        {"operation": "a", **sizes, **timed},  # as committed: without a batch
        {"operation": "b", "batch": 64, **sizes, **timed},
        {"operation": "c", "batch": 1, **sizes, "error": "error: no"},
    ]
    monkeypatch.setattr(speed_tables, "read", lambda path: {"rows": rows})
    table = speed_tables.kernels().splitlines()[2:]
    assert [line.split(" | ")[:2] for line in table] == [["| `a`", "640 x 1024"], ["| `b`", "64 x 640 x 1024"]]

"""The benchmark of the kernels never prints a number that it did not measure, nor one of a wrong result."""

import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import kernels, operations, records
from benchmarks.operations import OPERATIONS, Operation
from fp4jax.cli import run
from pallas_kernels import column_stats, compat, quantize
from pallas_kernels.quantize.shapes import SHAPES, Shape

without_gpu = pytest.mark.skipif(jax.default_backend() == "gpu", reason="shows what happens without a GPU")
SMALL = Shape(64, 512, "")


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
        ("--tokens=5", "--tokens=5: choose from 4096, 16384, 65536"),
    ],
)
def test_flags_that_do_not_fit_are_refused(argument, message):
    with pytest.raises(ValueError, match=message):
        kernels.main([argument])


def inputs(operation):
    x = kernels.make_inputs(SMALL, jnp.dtype(jnp.bfloat16))[0]
    return (x, *jax.jit(operation.given)(x))


@pytest.mark.skipif(not compat.CAN_INTERPRET, reason="the GPU interpreter needs JAX 0.12.0")
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_compares_like_with_like(name, monkeypatch):
    for function in ("quantize_rows", "quantize_columns", "quantize_2d", "quantize_copies"):
        kernel = getattr(quantize, function)
        monkeypatch.setattr(quantize, function, lambda *a, kernel=kernel, **k: kernel(*a, **k, interpret=True))
    operation = OPERATIONS[name]
    if name == "column_stats":
        operation = Operation(
            lambda x: column_stats.column_stats(x, interpret=True), *list(vars(operation).values())[1:]
        )
    given = inputs(operation)
    assert kernels.differences(operation, given) == {}
    outputs = jax.tree.leaves(jax.eval_shape(operation.twin, *given))
    written = sum(out.size * out.dtype.itemsize for out in outputs) / given[0].size
    # Statistics are a few rows for many tokens: nothing for each element.
    assert operation.written == (written if name != "column_stats" else 0)


def faulty(operation):
    def kernel(*given):
        outputs, tree = jax.tree.flatten(operation.twin(*given))
        return jax.tree.unflatten(tree, [out.at[0, 0].set(1) for out in outputs])

    return Operation(kernel, operation.twin, operation.given, operation.written)


def test_a_wrong_result_gives_no_time_and_fails_the_run(monkeypatch, tmp_path, capsys):
    twin = operations.column_stats
    right = Operation(twin, twin, OPERATIONS["column_stats"].given, 0.0)
    monkeypatch.setattr(kernels, "OPERATIONS", {"wrong": faulty(right), "right": right})
    monkeypatch.setattr(kernels, "unsupported_reason", lambda: None)
    monkeypatch.setattr(kernels, "SHAPES", (SMALL._replace(tokens=4096),))
    monkeypatch.setattr(kernels.timing, "WORKING_SET", 2**20)
    with pytest.raises(ValueError, match=r"outputs differ from the twin: wrong; see .*kernels.json"):
        kernels.main(["--operations=wrong,right", "--tokens=4096", "--repeats=2", f"--out={tmp_path}"])
    written = json.loads((tmp_path / "kernels.json").read_text())
    wrong, fine = written["rows"]
    assert wrong["differing"] and "kernel_us" not in wrong
    assert fine["kernel_us"] > 0 and 0 < fine["share_of_copy_bandwidth"]
    assert written["jax"] == jax.__version__ and written["command"].startswith("python -m benchmarks.kernels")
    assert "differs from its twin, no time" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPERATIONS)
def test_it_measures_a_shape(name):
    xs = kernels.make_inputs(SHAPES[0], jnp.dtype(jnp.bfloat16))
    row = kernels.measure(name, OPERATIONS[name], SHAPES[0], xs, repeats=3)
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


def test_the_commit_of_a_copy_without_history_can_be_told(monkeypatch):
    monkeypatch.setattr(records, "REPOSITORY", records.Path("/"))
    assert records.commit() == "unknown"
    monkeypatch.setenv("FP4JAX_COMMIT", "abc1234")
    assert records.commit() == "abc1234"


def test_the_default_folder_is_named_after_the_device(monkeypatch):
    monkeypatch.setattr(records, "about", lambda command: {"device": "NVIDIA H100 80GB HBM3"})
    assert records.default_folder() == records.REPOSITORY / "benchmarks" / "results" / "nvidia_h100_80gb_hbm3"

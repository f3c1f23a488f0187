"""Every kernel over the shapes of real models: time, share of the device's own copy bandwidth, the XLA path beside it.

    python -m benchmarks.kernels [--operations=column_stats,quantize_rows] [--shapes=65536x1024,64x10240x2048]
                                 [--models=0p6b] [--out=FOLDER]

For each shape the outputs are first compared with the twin's on the same device, bit for bit (sums in another order: to
rounding); where they differ the difference is reported and no time. Kernel, XLA path and a copy (x → -x) then take
turns. Bandwidth counts what has to move: the input once and the outputs once.

An operation that fails is a row with its error. Kernels that no GPU has run yet come last, after all the others on all
shapes: a fault would break the device for whatever follows in this process.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks import compiling, records, timing
from benchmarks.flags import choose
from benchmarks.operations import OPERATIONS, Operation
from fp4jax.cli import Parser, output_folder, positive, run
from fp4jax.cli import describe as describe_error
from pallas_kernels.quantize import unsupported_reason
from pallas_kernels.quantize.shapes import MODELS, Shape

COMMAND = "benchmarks.kernels"
Given = Callable[[jax.Array], tuple]


def main(arguments: Sequence[str]) -> None:
    """Measures and writes FOLDER/kernels.json.

    Raises:
      NotImplementedError: there is no GPU that the kernels serve.
      ValueError: an unknown operation, shape or model; or, at the end, a kernel that differs from its twin or failed.
    """
    flags = _parse(arguments)
    if reason := unsupported_reason():
        raise NotImplementedError(f"nothing to measure: {reason}")
    path = output_folder(flags.out or records.default_folder()) / "kernels.json"
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, {flags.dtype}")
    print(f"{'operation':36} {'shape':>14} {'us':>8} {'GB/s':>6} {'of copy':>7} {'XLA/kernel':>10}")
    rows: list[dict] = []
    for shape, names in schedule(flags.operations, flags.shapes):
        for row in measure_shape(shape, names, jnp.dtype(flags.dtype), flags.repeats):
            print(describe(row), flush=True)
            rows.append(row)
            records.write(path, COMMAND, rows, models={name: MODELS[name] for name in flags.models})
    for wrong, what in (("differing", "outputs differ from the twin"), ("error", "failed")):
        if names := sorted({row["operation"] for row in rows if wrong in row}):
            raise ValueError(f"{what}: {', '.join(names)}; see {path}")


def schedule(operations: Sequence[str], shapes: Sequence[Shape]) -> Iterator[tuple[Shape, list[str]]]:
    """What is measured together, in its order: first the operations that were measured before, on every shape."""
    for was_measured in (True, False):
        for shape in shapes:
            names = [name for name in operations if OPERATIONS[name].was_measured == was_measured]
            if names := [name for name in names if shape in OPERATIONS[name].shapes]:
                yield shape, names


def measure_shape(shape: Shape, names: Sequence[str], dtype: jnp.dtype, repeats: int) -> Iterator[dict]:
    """A row for every operation, which share the inputs, the copy and what they are given."""
    programs = compiled(shape, names, dtype)
    xs: list[jax.Array] = []
    given: dict[Given, list[tuple]] = {}
    for name in names:
        row = {"operation": name, "tokens": shape.tokens, "features": shape.features, "batch": shape.batch}
        row |= {"operands": shape.operands, "dtype": dtype.name}
        operation = OPERATIONS[name]
        try:
            xs = xs or make_inputs(shape, dtype)
            if operation.given not in given:
                given[operation.given] = [programs[operation.given].result()(x) for x in xs]
            inputs = [(x, *more) for x, more in zip(xs, given[operation.given], strict=True)]
            row |= measure(name, operation, inputs, programs, repeats)
        except Exception as error:  # such as memory, or a kernel that does not compile
            row |= {"error": describe_error(error)}
        yield row


def compiled(shape: Shape, names: Sequence[str], dtype: jnp.dtype) -> dict[object, Future]:
    """The programs of a shape: the copy, what makes the given of each kind, kernel and twin of each operation."""
    x = jax.ShapeDtypeStruct(shape.array, dtype)
    count, passes = _counts(x)
    programs: dict[object, tuple] = {"copy": (timing.over_all(lambda x: -x, passes), ([(x,)] * count,))}
    for name in names:
        operation = OPERATIONS[name]
        inputs = [(x, *jax.eval_shape(operation.given, x))] * count
        programs[operation.given] = jax.jit(operation.given), (x,)
        programs[name, "kernel"] = timing.over_all(operation.kernel, passes), (inputs,)
        programs[name, "xla"] = timing.over_all(operation.twin, passes), (inputs,)
    return compiling.side_by_side(programs)


def make_inputs(shape: Shape, dtype: jnp.dtype) -> list[jax.Array]:
    """Matrices that together exceed the cache."""
    count, _ = _counts(jax.ShapeDtypeStruct(shape.array, dtype))
    make = jax.jit(lambda key: jax.random.normal(key, shape.array, dtype))
    return [make(key) for key in jax.random.split(jax.random.key(0), count)]


def _counts(x: jax.Array | jax.ShapeDtypeStruct) -> tuple[int, int]:
    """(inputs, passes) of one launch."""
    bytes_each = x.size * x.dtype.itemsize
    count = timing.input_count(bytes_each)
    return count, timing.pass_count(count, bytes_each)


def measure(
    name: str, operation: Operation, inputs: Sequence[tuple], programs: Mapping[object, Future], repeats: int
) -> dict:
    """Compares one kernel with its twin, then times both and a copy."""
    x = inputs[0][0]
    count, passes = _counts(x)
    kernel, twin, copy = (programs[key].result() for key in ((name, "kernel"), (name, "xla"), "copy"))
    if differing := differences(kernel(inputs)[0], twin(inputs)[0], operation.tolerance):
        return {"differing": differing}
    copied = [(each[0],) for each in inputs]
    runs = {"kernel": lambda: kernel(inputs), "xla": lambda: twin(inputs), "copy": lambda: copy(copied)}
    times = timing.in_turns(runs, repeats, launches=3)
    seconds = {name: median / (count * passes) for name, median in timing.medians(times).items()}
    read = x.nbytes if operation.read is None else operation.read * x.size
    moved = read + operation.written * x.size
    copy_bandwidth = 2 * x.nbytes / seconds["copy"]
    return {
        "kernel_us": seconds["kernel"] * 1e6,
        "xla_us": seconds["xla"] * 1e6,
        "copy_us": seconds["copy"] * 1e6,
        "kernel_gb_s": moved / seconds["kernel"] / 1e9,
        "copy_gb_s": copy_bandwidth / 1e9,
        "share_of_copy_bandwidth": moved / seconds["kernel"] / copy_bandwidth,
        "xla_over_kernel": seconds["xla"] / seconds["kernel"],
        "inputs": count,
        "passes": passes,
        "repeats": repeats,
    }


def differences(kernels: object, twins: object, tolerance: float = 0.0) -> dict[str, int]:
    """Output → how many of its values differ from the twin's; empty if they are equal bit for bit.

    tolerance: as `Operation` has it.
    """
    got, want = jax.tree.leaves(kernels), jax.tree.leaves(twins)
    counts = (int(_differing(*pair, tolerance)) for pair in zip(got, want, strict=True))
    return {f"output {i} of {math.prod(got[i].shape)}": count for i, count in enumerate(counts) if count}


def _differing(left: jax.Array, right: jax.Array, tolerance: float) -> jax.Array:
    if tolerance == 0 or not jnp.issubdtype(left.dtype, jnp.floating):
        return jnp.sum(left != right)
    return jnp.sum(~(jnp.abs(left - right) <= tolerance * jnp.max(jnp.abs(right))))


def describe(row: dict) -> str:
    """One line of the table."""
    shape = "x".join(str(row[key]) for key in ("batch", "tokens", "features") if key != "batch" or row[key] > 1)
    start = f"{row['operation']:36} {shape:>14}"
    if "error" in row:
        return f"{start} {row['error']}"
    if "differing" in row:
        return f"{start} differs from its twin, no time: {row['differing']}"
    return (
        f"{start} {row['kernel_us']:8.1f} {row['kernel_gb_s']:6.0f} {row['share_of_copy_bandwidth']:7.1%} "
        f"{row['xla_over_kernel']:10.2f}"
    )


def _parse(arguments: Sequence[str]):
    parser = Parser(COMMAND, (__doc__ or "").partition("\n")[0])
    parser.add_argument("--operations", default=",".join(OPERATIONS), help="which, separated by commas")
    parser.add_argument("--models", default=",".join(MODELS), help="whose shapes, separated by commas")
    parser.add_argument("--shapes", help="those alone, in this order, such as 65536x1024; by default all of the models")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=positive, default=10)
    parser.add_argument("--out", type=Path, help="folder for kernels.json; by default benchmarks/results/<device>")
    flags = parser.parse_args(arguments)
    flags.operations = list(choose(parser, "operation", flags.operations, OPERATIONS))
    flags.models = list(choose(parser, "model", flags.models, MODELS))
    shapes = {shape.name: shape for operation in OPERATIONS.values() for shape in operation.shapes}
    shapes = {name: shape for name, shape in shapes.items() if set(shape.models) & set(flags.models)}
    flags.shapes = list(choose(parser, "shape", flags.shapes or ",".join(shapes), shapes).values())
    return flags


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))

"""Every kernel over the shapes of real models: time, share of the device's own copy bandwidth, the XLA path beside it.

    python -m benchmarks.kernels [--operations=column_stats,quantize_rows] [--tokens=4096,65536] [--out=FOLDER]

For each shape the outputs are first compared with the twin's on the same device, bit for bit; where they differ the
difference is reported and no time. Kernel, XLA path and a copy (x → -x) then take turns. Bandwidth counts what has to
move: the input once and the outputs once.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks import records, timing
from benchmarks.operations import OPERATIONS, Operation
from fp4jax.cli import Parser, output_folder, positive, run
from pallas_kernels.quantize import unsupported_reason
from pallas_kernels.quantize.shapes import SHAPES, TOKENS, Shape

COMMAND = "benchmarks.kernels"


def main(arguments: Sequence[str]) -> None:
    """Measures and writes FOLDER/kernels.json.

    Raises:
      NotImplementedError: there is no GPU that the kernels serve.
      ValueError: an unknown operation or number of tokens, or a kernel that differs from its twin.
    """
    flags = _parse(arguments)
    if reason := unsupported_reason():
        raise NotImplementedError(f"nothing to measure: {reason}")
    path = output_folder(flags.out or records.default_folder()) / "kernels.json"
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, {flags.dtype}")
    print(f"{'operation':28} {'tokens':>6} {'features':>8} {'us':>8} {'GB/s':>6} {'of copy':>7} {'XLA/kernel':>10}")
    rows: list[dict] = []
    for shape in SHAPES:
        if shape.tokens in flags.tokens:
            xs = make_inputs(shape, jnp.dtype(flags.dtype))
            for name in flags.operations:
                row = measure(name, OPERATIONS[name], shape, xs, flags.repeats)
                print(describe(row), flush=True)
                rows.append(row)
                records.write(path, COMMAND, rows)
    if wrong := sorted({row["operation"] for row in rows if "differing" in row}):
        raise ValueError(f"outputs differ from the twin: {', '.join(wrong)}; see {path}")


def make_inputs(shape: Shape, dtype: jnp.dtype) -> list[jax.Array]:
    """Matrices that together exceed the cache."""
    count = timing.input_count(shape.tokens * shape.features * dtype.itemsize)
    make = jax.jit(lambda key: jax.random.normal(key, (shape.tokens, shape.features), dtype))
    return [make(key) for key in jax.random.split(jax.random.key(0), count)]


def measure(name: str, operation: Operation, shape: Shape, xs: Sequence[jax.Array], repeats: int) -> dict:
    """Compares one kernel with its twin, then times both and a copy."""
    row = {"operation": name, "tokens": shape.tokens, "features": shape.features, "dtype": xs[0].dtype.name}
    given = jax.jit(operation.given)
    inputs = [(x, *given(x)) for x in xs]
    if differing := differences(operation, inputs[0]):
        return row | {"differing": differing}
    passes = timing.pass_count(len(xs), xs[0].nbytes)
    programs = {"kernel": operation.kernel, "xla": operation.twin, "copy": lambda x, *_: -x}
    jitted = {name: timing.over_all(program, passes) for name, program in programs.items()}
    runs = {name: (lambda program=program: program(inputs)) for name, program in jitted.items()}
    times = timing.in_turns(runs, repeats, launches=3)
    seconds = {name: median / (len(xs) * passes) for name, median in timing.medians(times).items()}
    moved = xs[0].nbytes + operation.written * xs[0].size
    copy_bandwidth = 2 * xs[0].nbytes / seconds["copy"]
    return row | {
        "kernel_us": seconds["kernel"] * 1e6,
        "xla_us": seconds["xla"] * 1e6,
        "copy_us": seconds["copy"] * 1e6,
        "kernel_gb_s": moved / seconds["kernel"] / 1e9,
        "copy_gb_s": copy_bandwidth / 1e9,
        "share_of_copy_bandwidth": moved / seconds["kernel"] / copy_bandwidth,
        "xla_over_kernel": seconds["xla"] / seconds["kernel"],
        "inputs": len(xs),
        "passes": passes,
        "repeats": repeats,
    }


def differences(operation: Operation, inputs: tuple) -> dict[str, int]:
    """Output → how many of its values differ from the twin's; empty if they are equal bit for bit."""
    got, want = (jax.tree.leaves(jax.jit(f)(*inputs)) for f in (operation.kernel, operation.twin))
    counts = (int(jnp.sum(left != right)) for left, right in zip(got, want, strict=True))
    return {f"output {i} of {math.prod(got[i].shape)}": count for i, count in enumerate(counts) if count}


def describe(row: dict) -> str:
    """One line of the table."""
    start = f"{row['operation']:28} {row['tokens']:6} {row['features']:8}"
    if "differing" in row:
        return f"{start} differs from its twin, no time: {row['differing']}"
    return (
        f"{start} {row['kernel_us']:8.1f} {row['kernel_gb_s']:6.0f} {row['share_of_copy_bandwidth']:7.1%} "
        f"{row['xla_over_kernel']:10.2f}"
    )


def _parse(arguments: Sequence[str]):
    parser = Parser(COMMAND, (__doc__ or "").partition("\n")[0])
    parser.add_argument("--operations", default=",".join(OPERATIONS), help="which, separated by commas")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="numbers of tokens, separated by commas")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=positive, default=10)
    parser.add_argument("--out", type=Path, help="folder for kernels.json; by default benchmarks/results/<device>")
    flags = parser.parse_args(arguments)
    flags.operations = flags.operations.split(",")
    if unknown := [name for name in flags.operations if name not in OPERATIONS]:
        parser.error(f"unknown operation {unknown[0]!r}; known: {', '.join(OPERATIONS)}")
    accepted = dict(zip(map(str, TOKENS), TOKENS, strict=True))
    if unknown := [text for text in flags.tokens.split(",") if text not in accepted]:
        parser.error(f"--tokens={unknown[0]}: choose from {', '.join(accepted)}")
    flags.tokens = [accepted[text] for text in flags.tokens.split(",")]
    return flags


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))

"""fp4jax beside other JAX packages and no quantization, on the same linear layer or small transformer: time and error.

    python -m pip install --no-deps qwix==0.1.8
    python -m benchmarks.peers [--what=linear|transformer] [--shape=2048,512,1536] [--clock=cpu] [--out=FOLDER]

Results are first compared with the exact ones: float64 for a linear layer, the float32 program for the transformer.
What is not finite or too far off gets no time. Contenders (`benchmarks.linears`) then take turns, each turn beginning
with another one; ratios are medians over turns of times in one turn, with a bootstrap interval. `--clock=cpu` counts
the seconds that this process spends on CPUs: other processes hardly lengthen them. Pin it to one core (taskset -c 0),
or waiting threads are counted too.
"""

import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from benchmarks import linears, ratios, records, timing, transformer
from fp4jax.cli import Parser, output_folder, positive, run
from fp4jax.cli import describe as describe_error

COMMAND = "benchmarks.peers"
CONTENDERS = (
    "f32,bf16,nvfp4,averis,averis_centered,nvfp4_hadamard,nvfp4+nearest,nvfp4_forward,"
    "qwix,qwix_all,scaled_dot_general,scaled_dot_general_amax"
)
REFERENCES = ("f32", "bf16", "nvfp4", "qwix", "qwix_all", "scaled_dot_general_amax")
SHAPE = "2048,512,1536"
_TOLERANCE = {"linear": 0.5, "transformer": 1.1}
"""Relative error, in the norm, beyond which a result is wrong and not merely 4-bit. Through a whole transformer the
errors of a gradient in which everything is quantized add up to .7; what is all zeros is off by 1, and shown."""

_NAMED = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = ([a-z0-9]+)\[")
_DOT = re.compile(r" = ([a-z0-9]+)\[[^=]*? dot\(%?([\w.\-]+), %?([\w.\-]+)\)")


def main(arguments: Sequence[str]) -> None:
    """Measures and writes FOLDER/peers_WHAT.json.

    Raises:
      ValueError: flags that do not fit, or at the end contenders without a time.
    """
    flags = _parse(arguments)
    what = flags.what if flags.what == "transformer" else f"linear_{'x'.join(map(str, flags.shape))}"
    path = output_folder(flags.out or records.default_folder()) / f"peers_{what}.json"
    task = _transformer() if flags.what == "transformer" else _linear(*flags.shape)
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, {what}, {flags.clock} time")
    about = {"what": what, "clock": flags.clock, "repeats": flags.repeats}
    rows, runs = [], {}
    for name in flags.contenders:
        row, ready = measured(name, *task, _TOLERANCE[flags.what])
        rows.append(row)
        if ready:
            runs[name] = ready
        print(describe(row), flush=True)
        records.write(path, COMMAND, rows, **about)

    def report(times: dict[str, list[float]]) -> None:
        for row in rows:
            if row["contender"] in times:
                row |= summary(row["contender"], times)
        records.write(path, COMMAND, rows, **about)

    if not runs:
        raise ValueError(f"no contender gives a result; see {path}")
    times = timing.in_turns(runs, flags.repeats, clock=timing.CLOCKS[flags.clock])
    report(times)
    for row in rows:
        print(describe(row))
    if wrong := [row["contender"] for row in rows if "error" in row]:
        raise ValueError(f"without a time: {', '.join(wrong)}; see {path}")


def measured(
    name: str, program: Callable, arguments: tuple, exact: dict[str, np.ndarray], tolerance: float
) -> tuple[dict, Callable]:
    """(What is known of a contender before it is timed, what runs it once); None for the latter where it is wrong.

    Args:
      program: linear → function of `arguments` that returns what `exact` holds under the same names.
    """
    try:
        start = time.process_time()
        lowered = jax.jit(program(linears.linear(name))).lower(*arguments)
        traced = time.process_time()
        compiled = lowered.compile()
        seconds = {"trace_seconds": traced - start, "compile_seconds": time.process_time() - traced}
        errors = {key: relative_error(value, exact[key]) for key, value in compiled(*arguments).items()}
        if not all(error <= tolerance for error in errors.values()):
            raise ValueError(f"off by {errors}")
    except Exception as error:  # what another package raises need not cost the others their time
        return {"contender": name, "error": describe_error(error)}, None
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    row = {
        "contender": name,
        "relative_error": errors,
        "products": products(compiled.as_text()),
        "held_bytes": held,
        "temporary_bytes": memory.temp_size_in_bytes,
        **seconds,
    }
    return row, lambda: compiled(*arguments)


def relative_error(value, exact: np.ndarray) -> float:
    """‖value - exact‖ / ‖exact‖, in float64."""
    difference = np.asarray(value, np.float64) - exact
    return float(np.linalg.norm(difference.ravel()) / np.linalg.norm(exact.ravel()))


def products(text: str) -> dict[str, int]:
    """Matrix products in an optimized program by dtypes, such as {"bf16 * bf16 -> f32": 3}.

    A product in a loop counts once; one that has become a call of a library does not count.
    """
    dtypes = {match[1]: match[2] for match in map(_NAMED.match, text.splitlines()) if match}
    found = (_DOT.search(line) for line in text.splitlines())
    return dict(Counter(f"{dtypes[m[2]]} * {dtypes[m[3]]} -> {m[1]}" for m in found if m))


def summary(name: str, times: dict[str, list[float]]) -> dict:
    """Median, and ratios to the references that ran."""
    found = {"seconds": times[name], "median_seconds": timing.medians(times)[name]}
    beside = [reference for reference in REFERENCES if reference in times and reference != name]
    return found | {f"over_{other}": ratios.paired_ratio(times[name], times[other]) for other in beside}


def describe(row: dict) -> str:
    """One line of the table."""
    if "error" in row:
        return f"{row['contender']:24} {row['error']}"
    errors = " ".join(f"{key} {error:.2e}" for key, error in row["relative_error"].items())
    line = f"{row['contender']:24} {errors}  {row['temporary_bytes'] / 2**20:6.1f} MiB  {row['products']}"
    if "median_seconds" not in row:
        return line
    shown = (f"/{other} {r['ratio']:.3f} [{r['low']:.3f}, {r['high']:.3f}]"
             for other in ("f32", "nvfp4") if (r := row.get(f"over_{other}")))  # fmt: skip
    return f"{row['contender']:24} {row['median_seconds'] * 1e3:8.1f} ms  {'  '.join(shown)}"


def _linear(tokens: int, inputs: int, outputs: int) -> tuple[Callable, tuple, dict[str, np.ndarray]]:
    """The exact products are in float64. Activations have a mean, as in models; gradients are of the order of 1: qwix,
    which has no float32 scale of a matrix, turns those of a training step into zeros.
    """
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (tokens, inputs)) + jax.random.normal(keys[1], (1, inputs))
    w = jax.random.normal(keys[2], (inputs, outputs)) * inputs**-0.5
    d = jax.random.normal(keys[3], (tokens, outputs))

    def program(product: linears.Linear) -> Callable:
        run = linears.with_gradients(product)
        return lambda *arguments: dict(zip(("y", "dx", "dw"), run(*arguments), strict=True))

    x64, w64, d64 = (np.asarray(a, np.float64) for a in (x, w, d))
    return program, (x, w, d, keys[4]), {"y": x64 @ w64, "dx": d64 @ w64.T, "dw": x64.T @ d64}


def _transformer() -> tuple[Callable, tuple, dict[str, np.ndarray]]:
    sizes = transformer.Sizes()
    keys = jax.random.split(jax.random.key(0), 3)
    tokens = jax.random.randint(keys[1], (sizes.sequences, sizes.length + 1), 0, sizes.vocabulary)
    arguments = transformer.parameters(sizes, keys[0]), tokens, keys[2]

    def program(product: linears.Linear) -> Callable:
        step = transformer.training_step(product, sizes)

        def run(params: PyTree, tokens, key) -> dict:
            params, loss, gradients = step(params, tokens, key)
            flat = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(gradients)])
            moved = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(params)])
            return {"loss": loss, "gradient": flat, "parameters": moved}

        return run

    exact = jax.jit(program(linears.linear("f32")))(*arguments)
    return program, arguments, {name: np.asarray(value, np.float64) for name, value in exact.items()}


def _parse(arguments: Sequence[str]):
    parser = Parser(COMMAND, (__doc__ or "").partition("\n")[0])
    parser.add_argument("--what", choices=("linear", "transformer"), default="linear")
    parser.add_argument("--shape", default=SHAPE, help="of the linear layer: tokens,inputs,outputs")
    parser.add_argument("--contenders", default=CONTENDERS, help="separated by commas: see benchmarks/linears.py")
    parser.add_argument("--repeats", type=positive, default=100)
    parser.add_argument("--clock", choices=tuple(timing.CLOCKS), default="wall")
    parser.add_argument("--out", type=Path, help="folder for the JSON; by default benchmarks/results/<device>")
    flags = parser.parse_args(arguments)
    flags.contenders = flags.contenders.split(",")
    sizes = flags.shape.split(",")
    if len(sizes) != 3 or not all(size.isdigit() and int(size) > 0 for size in sizes):
        parser.error(f"--shape={flags.shape}: give tokens,inputs,outputs, such as {SHAPE}")
    flags.shape = tuple(map(int, sizes))
    if len(set(flags.contenders)) < len(flags.contenders):
        parser.error("--contenders names one twice")
    for name in flags.contenders:
        linears.check(name)
    return flags


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))

"""Where a training step's time goes, by recipe: a stacked bar from `jax.profiler`, on a CPU.

    taskset -c 0 python -m benchmarks.profile                       # configs/averis_tiny.py, five recipes
    taskset -c 0 python -m benchmarks.profile --recipes=bf16,averis --layers=2 --out=FOLDER

Every recipe's step is compiled, warmed up and traced for some steps. An instruction of the compiled program is counted
to the part that its scope names (`fp4jax.scopes`); one that several were fused into has the scope of the last of them.
On one core (taskset) the times of instructions add up to the step; on several, of those that run side by side each
counts.
"""

import itertools
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from matplotlib.figure import Figure

from benchmarks import records
from benchmarks.step import (
    Program,
    add_program_flags,
    compile_all,
    configuration,
    initial_state,
    make_batch,
    split_name,
    split_recipes,
)
from fp4jax import scopes
from fp4jax.cli import Parser, output_folder, positive, run
from fp4jax.comparison.figures import COLOURS, png
from fp4jax.config import mesh_of
from fp4jax.recipes import as_recipe
from fp4jax.training import make_mesh
from fp4jax.training.state import TrainState
from fp4jax.training.step import Batch

COMMAND = "benchmarks.profile"
PARTS = ("products", "quantization", "corrections", "attention", "cross_entropy", "optimizer", "rest")
"""Of linear layers: fprop, dgrad and wgrad; splitting, quantizing and decoding; products with what a split took off.
rest: norms, SwiGLU, embedding, moving data, and instructions without a scope."""

_NAMED = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name="([^"]*)"', re.MULTILINE)
_SECOND = 1e9


def main(arguments: Sequence[str]) -> None:
    """Writes FOLDER/profile_MODEL.json and FOLDER/profile_MODEL.png.

    Raises:
      NotImplementedError: the device is no CPU: its traces name instructions in another way.
      ValueError: flags that do not fit.
    """
    flags = _parse(arguments)
    device = jax.devices()[0]
    if device.platform != "cpu":
        raise NotImplementedError(
            f"benchmarks.profile reads traces of CPUs, and this is {device.device_kind}: take a trace with "
            "jax.profiler.trace and open it in XProf or Perfetto, where the scopes are names of instructions"
        )
    path = output_folder(flags.out or records.default_folder()) / f"profile_{flags.model}.json"
    mesh = make_mesh(mesh_of())
    configs = {name: configuration(flags, name) for name in flags.recipes}
    first = next(iter(configs.values()))
    batch = make_batch(first, mesh)
    sizes = {"layers": first.model.num_layers, "sequences": first.batch_size, "length": first.seq_len}
    rows = []
    for name, compilation in compile_all(configs, mesh).items():
        parts = profiled(compilation.result(), initial_state(first, mesh), batch, flags.repeats)
        rows.append({"recipe": name, "seconds": parts})
        print(describe(rows[-1]), flush=True)
        records.write(path, COMMAND, rows, model=flags.model, repeats=flags.repeats, **sizes)
    path.with_suffix(".png").write_bytes(png(draw(rows)))


def profiled(program: Program, state: TrainState, batch: Batch, repeats: int) -> dict[str, float]:
    """Seconds of a step by part, the mean over `repeats` steps behind a first one."""
    state, _ = jax.block_until_ready(program(state, batch))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(repeats):
                state, _ = jax.block_until_ready(program(state, batch))
        instructions = read_trace(Path(folder))
    seconds = by_part(instructions, dict(_NAMED.findall(program.step.as_text())))
    return {part: total / repeats for part, total in seconds.items()}


def read_trace(folder: Path) -> Counter[str]:
    """Seconds of every instruction in the one trace below `folder`."""
    (file,) = folder.rglob("*.xplane.pb")
    seconds: Counter[str] = Counter()
    with warnings.catch_warnings():
        # Of the reader's own types; where warnings are errors it would end the process.
        warnings.simplefilter("ignore", DeprecationWarning)
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for event in itertools.chain.from_iterable(line.events for line in plane.lines):
                if "hlo_op" in dict(event.stats):
                    seconds[event.name] += event.duration_ns / _SECOND
    return seconds


def by_part(instructions: Mapping[str, float], names: Mapping[str, str]) -> dict[str, float]:
    """The instructions' seconds added up.

    Args:
      names: instruction → the scopes around it; those that are absent have none.
    """
    seconds = dict.fromkeys(PARTS, 0.0)
    for instruction, duration in instructions.items():
        seconds[part_of(names.get(instruction, ""))] += duration
    return seconds


def part_of(path: str) -> str:
    """One of PARTS for a path of scopes."""
    scope = scopes.read(path)
    if scope.recipe is None:
        return scope.step_part or "rest"
    if scope.is_correction:
        return "corrections"
    is_product = scope.quantized > 0 or scope.operands is not None or path.endswith("/dot_general")
    return "products" if is_product and not scope.is_preparation else "quantization"


def describe(row: Mapping) -> str:
    """One line of the table."""
    parts = "  ".join(f"{part} {1e3 * seconds:.1f}" for part, seconds in row["seconds"].items())
    return f"{row['recipe']:20} {1e3 * sum(row['seconds'].values()):8.1f} ms:  {parts}"


def draw(rows: Sequence[Mapping]) -> Figure:
    """A bar for every recipe, of its parts."""
    figure = Figure(figsize=(8, 1.2 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names, left = [row["recipe"] for row in rows], [0.0] * len(rows)
    for part, colour in zip(PARTS, (*COLOURS, "#999999"), strict=True):
        widths = [1e3 * row["seconds"][part] for row in rows]
        axes.barh(names, widths, left=left, color=colour, label=part.replace("_", " "))
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("ms a step")
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return figure


def _parse(arguments: Sequence[str]):
    parser = Parser(COMMAND, (__doc__ or "").partition("\n")[0])
    add_program_flags(parser, model="tiny")
    parser.add_argument("--repeats", type=positive, default=10)
    parser.add_argument("--out", type=Path, help="folder for the results; by default benchmarks/results/<device>")
    flags = parser.parse_args(arguments)
    flags.recipes = split_recipes(parser, flags.recipes)
    for name in flags.recipes:
        as_recipe(split_name(name)[0])
    return flags


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))

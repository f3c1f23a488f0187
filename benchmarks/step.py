"""The whole training step by recipe, all in one run: ratios to bf16 and nvfp4, tokens a second, memory, compilation.

    python -m benchmarks.step                                      # Qwen3-0.6B, 4 sequences of 4096 tokens, on a GPU
    python -m benchmarks.step --layers=4 --recipes=bf16,nvfp4,averis@pallas
    python -m benchmarks.step --model=tiny --repeats=3             # on a CPU

A recipe may name its backend and its product (averis@pallas, averis@pallas/fused). Every program first takes one step
from the same initial state: its loss must be finite and near the first program's, or the run ends without a time. Then
they take turns, all on one state that goes from hand to hand, and results are written after every turn. A ratio is the
median over turns of the times in one turn, with a bootstrap interval.

Programs that name a product follow when the others have their times, and all take turns once more: their kernels are
the newest, and a fault breaks the device for whatever comes after it.
"""

import functools
import importlib
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import ml_collections
import numpy as np
from jax.sharding import NamedSharding

from benchmarks import ratios, records, timing
from fp4jax.cli import Parser, output_folder, positive, run
from fp4jax.cli import describe as describe_error
from fp4jax.config import mesh_of
from fp4jax.config_checks import BACKENDS, GEMMS
from fp4jax.training import create_state, make_mesh, make_optimizer, model_template
from fp4jax.training.mesh import BATCH
from fp4jax.training.state import TrainState
from fp4jax.training.step import Batch, abstract_train_step

COMMAND = "benchmarks.step"
MODELS = {"0p6b": "configs.qwen3_0p6b", "tiny": "configs.averis_tiny"}
RECIPES = "bf16,nvfp4,nvfp4_hadamard,averis,averis_centered"
REFERENCES = ("bf16", "nvfp4")
AUTO = "auto"  # what a program has for the part that its name leaves out
_LOSS_TOLERANCE = 0.05  # an untrained model's loss hardly depends on the recipe


@dataclass(frozen=True)
class Program:
    """One compiled step. bytes: of its arguments and outputs, donated ones once, and of its temporaries."""

    name: str
    step: jax.stages.Compiled
    config: ml_collections.ConfigDict
    compile_seconds: float
    bytes: dict[str, int]

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        key_data = np.asarray(jax.random.key_data(jax.random.key(self.config.seed)))
        return self.step(state, batch, key_data)


def main(arguments: Sequence[str]) -> None:
    """Measures and writes FOLDER/step.json.

    Raises:
      ValueError: flags that do not fit, a loss that is not what it must be, or, at the end, a recipe that failed.
    """
    flags = _parse(arguments)
    path = output_folder(flags.out or records.default_folder()) / "step.json"
    configs = {name: configuration(flags, name) for name in flags.recipes}
    first = next(iter(configs.values()))
    mesh = make_mesh(mesh_of())
    tokens = first.batch_size * first.seq_len
    sizes = {"model": flags.model, "layers": first.model.num_layers, "sequences": first.batch_size}
    sizes |= {"length": first.seq_len, "remat": first.model.remat, "repeats": flags.repeats, "clock": flags.clock}
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, {sizes}")
    batch = make_batch(first, mesh)
    initial = functools.partial(initial_state, first, mesh)
    compilations = compile_all(configs, mesh)
    programs, rows = [], []

    def write() -> None:
        records.write(path, COMMAND, rows, **sizes)

    for names in rounds(flags.recipes):
        joining = []
        for name in names:
            program, row = prepared(name, compilations[name], initial, batch)
            joining += [program] if program else []
            rows.append(row)
            write()
        check([row for row in rows if "error" not in row])
        programs += joining
        if joining:
            report = functools.partial(keep, rows, tokens, write)
            turns = functools.partial(in_turns, programs, initial, batch, flags.repeats, report)
            attempt(turns, timing.CLOCKS[flags.clock], rows, write)
    good = [row for row in rows if "error" not in row]
    for row in good:
        print(describe(row))
    if len(good) < len(rows):
        raise ValueError(f"without a time: {', '.join(row['recipe'] for row in rows if 'error' in row)}; see {path}")


def rounds(names: Sequence[str]) -> list[list[str]]:
    """Programs by when they join: those of no product in particular, then the others."""
    joined = ([name for name in names if bool(split_name(name)[2]) == late] for late in (False, True))
    return [group for group in joined if group]


def attempt(turns: Callable, clock: Callable[[], float], rows: Sequence[dict], write: Callable[[], None]) -> None:
    """Takes the turns; what ends them is the error of every row that has no time yet."""
    try:
        turns(clock)
    except Exception as error:  # such as a device that one of the programs broke
        print(describe_error(error), flush=True)
        for row in rows:
            if "seconds" not in row:
                row.setdefault("error", describe_error(error))
        write()


def keep(rows: Sequence[dict], tokens: int, write: Callable[[], None], times: dict[str, list[float]]) -> None:
    """Puts times into the rows and writes them. Those of a later round replace others when they are as many."""
    for row in rows:
        seconds = times.get(row["recipe"], [])
        if "error" not in row and len(seconds) >= len(row.get("seconds", [0])):
            row |= {"seconds": list(seconds), **summary(row["recipe"], times, tokens)}
    write()


def split_name(name: str) -> tuple[str, str, str]:
    """(recipe, backend, product) of a program's name, "" for what it leaves out."""
    rest, _, product = name.partition("/")
    recipe, _, backend = rest.partition("@")
    return recipe, backend, product


def configuration(flags, name: str) -> ml_collections.ConfigDict:
    """The configuration of one program."""
    config = importlib.import_module(MODELS[flags.model]).get_config()
    config.recipe, backend, product = split_name(name)
    config.backend, config.gemm = backend or AUTO, product or AUTO
    config.batch_size = flags.sequences or (4 if flags.model == "0p6b" else config.batch_size)
    config.seq_len = flags.length or config.seq_len
    config.microbatches = flags.microbatches
    config.model.num_layers = flags.layers or config.model.num_layers
    config.model.remat = flags.remat or config.model.remat
    return config


def make_batch(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> Batch:
    """Random tokens: time does not depend on them."""
    rows = np.random.default_rng(0).integers(0, config.model.vocab_size, (config.batch_size, config.seq_len + 1))
    tokens, targets = rows[:, :-1].astype(np.int32), rows[:, 1:].astype(np.int32)
    batch = {"tokens": tokens, "targets": targets, "loss_mask": np.ones(tokens.shape, np.float32)}
    return jax.device_put(batch, NamedSharding(mesh, BATCH))


def initial_state(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> TrainState:
    """The same for every recipe."""
    template = model_template(config)
    return create_state(config, template, make_optimizer(config, template.logical_axes), mesh)


def compile_all(configs: Mapping[str, ml_collections.ConfigDict], mesh: jax.sharding.Mesh) -> dict[str, Future]:
    """The step of `fp4jax.training` under every configuration; it donates its state.

    Traced one after the other, compiled side by side: each program's own seconds of tracing and of compiling are kept.
    """
    with ThreadPoolExecutor(max_workers=len(configs)) as pool:
        return {name: pool.submit(*_traced(name, config, mesh)) for name, config in configs.items()}


def _traced(name: str, config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> tuple:
    """What is left to be called, with its arguments; an error is raised there."""
    start = time.perf_counter()
    try:
        step, *arguments = abstract_train_step(config, mesh)
        with jax.set_mesh(mesh):
            lowered = step.lower(*arguments)
    except Exception as error:  # whatever stops one recipe need not cost the time of the others
        return _raise, error
    return _compiled, name, lowered, config, time.perf_counter() - start


def _raise(error: Exception) -> None:
    raise error


def _compiled(name: str, lowered: jax.stages.Lowered, config: ml_collections.ConfigDict, seconds: float) -> Program:
    start = time.perf_counter()
    step = lowered.compile()
    seconds += time.perf_counter() - start
    memory = step.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Program(name, step, config, seconds, {"held": held, "temporary": memory.temp_size_in_bytes})


def prepared(name: str, compilation: Future, initial, batch: Batch) -> tuple[Program | None, dict]:
    """A program after its first step and what is known of it; None where it fails: the others can still be measured."""
    try:
        program = compilation.result()
        row = first_step(program, initial(), batch)
    except Exception as error:  # such as memory
        print(f"{name:24} {describe_error(error)}", flush=True)
        return None, {"recipe": name, "error": describe_error(error)}
    print(f"{name:24} traced and compiled in {row['compile_seconds']:.0f} s, loss {row['loss']:.4f}", flush=True)
    return program, row


def first_step(program: Program, state: TrainState, batch: Batch) -> dict:
    """What one step gives, and the memory that the process has taken at most until after it."""
    _, metrics = jax.block_until_ready(program(state, batch))
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "recipe": program.name,
        "loss": float(metrics["loss"]),
        "grad_norm": float(metrics["grad_norm"]),
        "compile_seconds": program.compile_seconds,
        "held_bytes": program.bytes["held"],
        "temporary_bytes": program.bytes["temporary"],
        "peak_bytes_of_process_so_far": stats.get("peak_bytes_in_use"),
    }


def check(rows: Sequence[dict]) -> None:
    """Raises ValueError where loss or gradient cannot be right, or there is nothing to measure."""
    if not rows:
        raise ValueError("no recipe could be run")
    for row in rows:
        difference = abs(row["loss"] / rows[0]["loss"] - 1)
        if not math.isfinite(row["grad_norm"]) or not difference <= _LOSS_TOLERANCE:
            raise ValueError(
                f"{row['recipe']}: loss {row['loss']}, gradient {row['grad_norm']} beside {rows[0]['recipe']}'s "
                f"loss {rows[0]['loss']}: no time is reported"
            )


def in_turns(
    programs: Sequence[Program],
    initial: Callable[[], TrainState],
    batch: Batch,
    repeats: int,
    after_turn: Callable[[dict[str, list[float]]], None],
    clock: Callable[[], float],
) -> None:
    """Seconds of every program's step in every turn. One state serves all: each step takes the one before's."""
    held = [initial()]

    def step(program: Program) -> dict:
        held[0], metrics = program(held[0], batch)
        return metrics

    runs = {program.name: functools.partial(step, program) for program in programs}
    timing.in_turns(runs, repeats, after_turn=after_turn, clock=clock)


def summary(name: str, times: dict[str, list[float]], tokens: int) -> dict:
    """Median, tokens a second, and ratios: to the references under the same backend and product, to bf16 under any, and
    of a program that names its product to the one that does not.
    """
    median = timing.medians(times)[name]
    found = {"median_seconds": median, "tokens_per_second": tokens / median}
    recipe, _, product = split_name(name)
    suffix = name.removeprefix(recipe)
    beside = {reference: [reference + suffix] for reference in REFERENCES}
    beside["bf16"].append("bf16")
    beside[AUTO] = [name.removesuffix(f"/{product}")] if product else []
    for reference, others in beside.items():
        other = next((other for other in others if other in times), name)
        if other != name:
            found[f"over_{reference}"] = ratios.paired_ratio(times[name], times[other])
    return found


def describe(row: dict) -> str:
    """One line of the table."""
    shown = "  ".join(
        f"/{reference} {ratio['ratio']:.4f} [{ratio['low']:.4f}, {ratio['high']:.4f}]"
        for reference in (*REFERENCES, AUTO)
        if (ratio := row.get(f"over_{reference}"))
    )
    memory = (row["held_bytes"] + row["temporary_bytes"]) / 2**30
    return (
        f"{row['recipe']:24} {row['median_seconds'] * 1e3:9.1f} ms {row['tokens_per_second']:10,.0f} tokens/s "
        f"{memory:7.2f} GiB  {shown}"
    )


def add_program_flags(parser: Parser, model: str) -> None:
    """What `configuration` reads, and --recipes.

    model: the default.
    """
    parser.add_argument("--model", choices=tuple(MODELS), default=model)
    parser.add_argument(
        "--recipes", default=RECIPES, help="separated by commas, each with @backend/product, either or neither"
    )
    parser.add_argument("--layers", type=positive, help="by default the model's")
    parser.add_argument("--sequences", type=positive, help="by default 4, of the tiny model its configuration's")
    parser.add_argument("--length", type=positive, help="tokens in a sequence; by default the configuration's")
    parser.add_argument("--microbatches", type=positive, default=1)
    parser.add_argument("--remat", choices=("none", "linear_inputs", "full"), help="by default the configuration's")


def split_recipes(parser: Parser, listed: str) -> list[str]:
    """The names of --recipes, each once."""
    names = listed.split(",")
    if len(set(names)) < len(names):
        parser.error("--recipes names one twice")
    if halves := [name for name in names if name.endswith(("@", "/")) or "@/" in name]:
        parser.error(f"--recipes: {halves[0]!r} leaves out what it announces; write recipe@backend/product")
    for name in names:
        for what, value, known in zip(("backend", "product"), split_name(name)[1:], (BACKENDS, GEMMS), strict=True):
            if value and value not in known:
                parser.error(f"--recipes: unknown {what} {value!r} in {name!r}; known: {', '.join(known)}")
    return names


def _parse(arguments: Sequence[str]):
    parser = Parser(COMMAND, (__doc__ or "").partition("\n")[0])
    add_program_flags(parser, model="0p6b")
    parser.add_argument("--repeats", type=positive, default=10)
    parser.add_argument("--clock", choices=tuple(timing.CLOCKS), default="wall")
    parser.add_argument("--out", type=Path, help="folder for step.json; by default benchmarks/results/<device>")
    flags = parser.parse_args(arguments)
    flags.recipes = split_recipes(parser, flags.recipes)
    return flags


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))

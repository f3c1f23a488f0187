"""`python -m fp4jax.analyze geometry`: the tables of arXiv 2605.18933 with theory, paper and ours side by side.

Without --model the theory and its simulations; with it the experiments on a trained model.
"""

import json
import platform
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int32

from fp4jax import recipes
from fp4jax.analysis.geometry import experiments, figures
from fp4jax.analysis.geometry.tables import Grid, Table, render
from fp4jax.cli import Parser, output_folder

JUDGED_BY = 3.0  # standard errors
_ROWS, _TOKENS = 4, 256  # of text, for a model
_BRIDGED = ("nvfp4", "averis", "ternary")  # the recipes, with those that begin with such a name, of the bridge


def main(arguments: Sequence[str]) -> None:
    """Runs the experiments, prints their tables, writes them as JSON, and the figures.

    Raises:
      ValueError: an argument that cannot be used; a model or a text that cannot be read.
      OSError: a folder that cannot be written.
    """
    options = _parse(arguments)
    output_folder(options.out)
    start = time.perf_counter()
    tables = []
    for table in _of_model(options) if options.model else _of_theory(options):
        tables.append(table)
        print(render(table), end="\n\n", flush=True)
    if not options.model:
        print(_verdict(tables))
    drawn = figures.draw(tables, options.out)
    seconds = time.perf_counter() - start
    path = options.out / ("model.json" if options.model else "geometry.json")
    path.write_text(json.dumps(_record(arguments, tables, seconds), indent=1) + "\n", encoding="utf-8")
    print(f"{path} and {len(drawn)} figures written after {seconds:.0f} s")


def _parse(arguments: Sequence[str]) -> Any:
    parser = Parser(
        "fp4jax.analyze geometry",
        "Sign and magnitude perturbations (arXiv 2605.18933): theory, simulation, real models.",
    )
    parser.add_argument("--quick", action="store_true", help="smaller widths, fewer draws: less than a minute")
    parser.add_argument("--out", type=Path, default=Path("runs/geometry"), help="folder for the JSON and the figures")
    parser.add_argument("--seed", type=int, default=0, help="of all experiments, at least 0")
    parser.add_argument(
        "--model",
        nargs="?",
        const="smollm2-135m",
        help="measure this dense model instead: smollm2-135m, a .gguf file, a Hugging Face folder or a run's workdir",
    )
    parser.add_argument("--text", type=Path, help="a UTF-8 text to measure the model on; by default held-out text")
    parser.add_argument("--rows", type=int, help=f"rows of text; by default {_ROWS}")
    parser.add_argument("--tokens", type=int, help=f"tokens a row; by default {_TOKENS}")
    parser.add_argument("--recipes", help="of the bridge, with commas; by default nvfp4, averis and ternary ones")
    options = parser.parse_args(list(arguments))
    if not 0 <= options.seed < 2**32:
        parser.error(f"--seed must be in [0, 2**32), got {options.seed}")
    of_a_model = {name: getattr(options, name) for name in ("text", "rows", "tokens", "recipes")}
    given = [f"--{name}" for name, value in of_a_model.items() if value is not None]
    if given and not options.model:
        parser.error(f"{', '.join(given)}: of a model's measurement; add --model")
    options.rows = _ROWS if options.rows is None else options.rows
    options.tokens = _TOKENS if options.tokens is None else options.tokens
    if options.rows < 1 or options.tokens < 2:
        parser.error(f"--rows must be at least 1 and --tokens at least 2, got {options.rows} and {options.tokens}")
    options.recipes = _bridged() if options.recipes is None else options.recipes.split(",")
    if len(set(options.recipes)) < len(options.recipes):
        parser.error(f"--recipes={','.join(options.recipes)} names a recipe twice")
    for name in options.recipes:
        if recipes.recipe(name).forward_draws:
            parser.error(f"--recipes: {name} draws random bits in the forward; the bridge has none")
    return options


def _of_theory(options: Any) -> Iterator[Table]:
    settings = (experiments.quick if options.quick else experiments.full)(options.seed)
    yield experiments.closed_form_table()
    for experiment in experiments.EXPERIMENTS:
        yield from experiment(settings)


def _of_model(options: Any) -> Iterator[Grid]:
    text = None if options.text is None else _read(options.text)  # before the model, which takes longer
    # Loaded here: the models and the data pipeline take seconds to import, and the theory needs neither.
    from fp4jax.analysis.geometry import real_tables
    from fp4jax.models.pretrained import load_parameters

    loaded = load_parameters(options.model)
    tokens = _tokens(options, text, loaded.tokenizer)
    settings = real_tables.RealSettings(options.seed, tuple(options.recipes))
    if options.quick:
        settings = real_tables.RealSettings(options.seed, tuple(options.recipes), (0.001, 0.005, 1.0), 2, 8, 32)
    subject = real_tables.Subject.of(str(options.model), loaded, tokens)
    for experiment in real_tables.REAL_EXPERIMENTS:
        yield from experiment(subject, settings)


def _bridged() -> list[str]:
    return [name for name in recipes.list_recipes() if name in _BRIDGED or name.startswith("ternary")]


def _read(path: Path) -> str:
    """The text of a file.

    Raises:
      ValueError: it is empty or not UTF-8.
      OSError: it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text={path} is not UTF-8 (byte {error.start:,}); convert it") from error
    except OSError as error:
        raise OSError(f"--text={path} cannot be read: {error.strerror}") from error
    if not text.strip():
        raise ValueError(f"--text={path} is empty: it must hold at least --rows times --tokens tokens")
    return text


def _tokens(options: Any, text: str | None, tokenizer: Any) -> Int32[np.ndarray, "B T"]:
    """Rows of tokens: the text's beginning, or the first rows of the held-out text.

    Raises:
      ValueError: a text that is too short.
    """
    from fp4jax.config import default_config
    from fp4jax.data import held_out_text

    if text is None:
        data = default_config().data
        return held_out_text(data, tokenizer, seq_len=options.tokens, rows=options.rows).tokens
    ids, wanted = tokenizer.encode(text), options.rows * options.tokens
    if len(ids) < wanted:
        raise ValueError(
            f"--text={options.text} must hold at least {wanted:,} tokens, {options.rows} rows of {options.tokens}, and "
            f"has {len(ids):,}; ask for fewer with --rows and --tokens"
        )
    return np.array(ids[:wanted], np.int32).reshape(options.rows, options.tokens)


def _verdict(tables: Sequence[Table]) -> str:
    """One line: how many of the simulated numbers are within JUDGED_BY standard errors of their closed form."""
    judged = [(abs(row.deviation), f"{table.name}: {row.label}") for table in tables for row in table.rows
              if row.deviation is not None]  # fmt: skip
    inside = sum(deviation <= JUDGED_BY for deviation, _ in judged)
    worst, label = max(judged)
    return (
        f"{inside} of {len(judged)} simulated numbers are within {JUDGED_BY:g} standard errors of their closed form; "
        f"largest deviation {worst:.1f} ({label})"
    )


def _record(arguments: Sequence[str], tables: Sequence[Table | Grid], seconds: float) -> dict[str, Any]:
    return {
        "command": " ".join(["python -m fp4jax.analyze geometry", *arguments]),
        "jax": jax.__version__,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {platform.machine()}",
        "seconds": round(seconds, 1),
        "tables": [table.as_json() for table in tables],
    }

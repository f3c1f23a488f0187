"""`python -m fp4jax.analyze geometry`: every table of arXiv 2605.18933 with theory, paper and ours side by side."""

import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from fp4jax.analysis.arguments import Parser
from fp4jax.analysis.geometry import experiments, figures
from fp4jax.analysis.geometry.tables import Table, render

JUDGED_BY = 3.0  # standard errors


def main(arguments: Sequence[str]) -> None:
    """Runs the experiments, prints their tables, writes geometry.json and the figures.

    Raises:
      ValueError: an argument that cannot be used.
      OSError: a folder that cannot be written.
    """
    options = _parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    settings = (experiments.quick if options.quick else experiments.full)(options.seed)
    tables = [experiments.closed_form_table()]
    print(render(tables[0]), end="\n\n")
    for experiment in experiments.EXPERIMENTS:
        for table in experiment(settings):
            tables.append(table)
            print(render(table), end="\n\n", flush=True)
    print(_verdict(tables))
    drawn = figures.draw(tables, options.out)
    seconds = time.perf_counter() - start
    path = options.out / "geometry.json"
    path.write_text(json.dumps(_record(arguments, tables, seconds), indent=1) + "\n", encoding="utf-8")
    print(f"{path} and {len(drawn)} figures written after {seconds:.0f} s")


def _parse(arguments: Sequence[str]) -> Any:
    parser = Parser("geometry", "Theory and simulation of sign and magnitude perturbations (arXiv 2605.18933).")
    parser.add_argument("--quick", action="store_true", help="smaller widths and fewer draws: less than a minute")
    parser.add_argument("--out", type=Path, default=Path("runs/geometry"), help="folder for geometry.json and figures")
    parser.add_argument("--seed", type=int, default=0, help="of all experiments, at least 0")
    options = parser.parse_args(list(arguments))
    if not 0 <= options.seed < 2**32:
        parser.error(f"--seed must be in [0, 2**32), got {options.seed}")
    return options


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


def _record(arguments: Sequence[str], tables: Sequence[Table], seconds: float) -> dict[str, Any]:
    return {
        "command": " ".join(["python -m fp4jax.analyze geometry", *arguments]),
        "jax": jax.__version__,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {platform.machine()}",
        "seconds": round(seconds, 1),
        "tables": [table.as_json() for table in tables],
    }

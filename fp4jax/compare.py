r"""Compares precision modes: trains under several recipes and seeds, and writes a report.

    python -m fp4jax.compare --config=configs/averis_tiny.py --recipes=bf16,nvfp4,averis_centered --seeds=0,1,2 \
        --workdir=runs/comparison [--primary=averis_centered:nvfp4] [--config.key=value ...]

Runs that are done are not repeated; the same command continues a comparison that was interrupted, and more recipes or
seeds may be added to it. In the workdir: report.html, report.md, the figures, comparison.json with every number, and a
folder a run. --redraw makes the report again from comparison.json alone.
"""

import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from fp4jax.comparison import report, tables
from fp4jax.comparison.execute import execute, is_finished
from fp4jax.comparison.plan import Comparison
from fp4jax.comparison.records import load_record
from fp4jax.training.command import run
from fp4jax.training.console import make_console

CONFIG = config_flags.DEFINE_config_file("config", None, "File with the runs' configuration.", lock_config=True)
RECIPES = flags.DEFINE_list("recipes", ["bf16", "nvfp4", "nvfp4_hadamard", "averis", "averis_centered"], "To compare.")
SEEDS = flags.DEFINE_list("seeds", ["0"], "Of every recipe; an interval needs two or more.")
BASELINE = flags.DEFINE_string("baseline", "bf16", "Recipe that loss gaps are measured from.")
PRIMARY = flags.DEFINE_string("primary", None, "first:second, the one comparison that is declared before the runs.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of runs and report; by default runs/compare_<config's name>.")
JOBS = flags.DEFINE_integer("jobs", 1, "Runs made at a time, on the same devices.", lower_bound=1)
ONLY_REPORT = flags.DEFINE_bool("only_report", False, "Make no run; report the finished ones among those asked for.")
REDRAW = flags.DEFINE_bool("redraw", False, "Only make the report again, from comparison.json in --workdir.")


def main() -> None:
    if REDRAW.value:
        if WORKDIR.value is None:
            raise ValueError("--redraw needs the --workdir of a comparison")
        print(report.redraw(Path(WORKDIR.value)))
        return
    if CONFIG.value is None:
        raise ValueError("--config is missing; for a first comparison: --config=configs/averis_tiny.py")
    path = Path(config_flags.get_config_filename(flags.FLAGS["config"]))
    if not path.is_file():
        raise ValueError(f"--config={path}: there is no such file")
    comparison = Comparison(
        CONFIG.value,
        tuple(RECIPES.value),
        tuple(map(_seed, SEEDS.value)),
        BASELINE.value,
        None if PRIMARY.value is None else _primary(PRIMARY.value),
        Path(WORKDIR.value or Path("runs") / f"compare_{path.stem}"),
    )
    for planned in comparison.runs():
        comparison.config_of(planned)
    comparison.declare()
    try:
        if not ONLY_REPORT.value:
            execute(comparison, make_console(), JOBS.value)
    finally:
        _report(comparison)


def _report(comparison: Comparison) -> None:
    """Of what is finished, be the comparison whole or not."""
    runs = list(comparison.runs())
    finished = [planned for planned in runs if is_finished(planned)]
    if finished:
        command = " ".join(["python -m fp4jax.compare", *sys.argv[1:]])
        found = [load_record(planned) for planned in finished]
        page = report.write(
            comparison.workdir, found, comparison.declaration(), command, missing=len(runs) - len(finished)
        )
        primary = comparison.primary
        for line in tables.headline(found, comparison.baseline, primary):
            print(line.replace("`", "").replace("**", ""))
        print(f"{len(finished)} of {len(runs)} runs; report: {page}")


def _seed(text: str) -> int:
    if not text.strip().isdigit():
        raise ValueError(f"--seeds takes whole numbers separated by commas, got {text!r}")
    return int(text)


def _primary(text: str) -> tuple[str, str]:
    first, colon, second = text.partition(":")
    if not colon:
        raise ValueError(f"--primary={text} takes two recipes, first:second")
    return first, second


if __name__ == "__main__":
    sys.exit(run(main))

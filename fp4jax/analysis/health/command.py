"""`python -m fp4jax.analyze health`: the health of a run, drawn by layer and step."""

from collections.abc import Sequence
from pathlib import Path

from fp4jax.analysis.health.numbers import describe, load_health
from fp4jax.analysis.health.plots import draw
from fp4jax.cli import Parser


def run(arguments: Sequence[str]) -> None:
    """Prints the last measurement and writes a figure for every ratio.

    Raises:
      ValueError: a flag that is unknown or missing, a folder without measurements.
      OSError: figures that cannot be written.
    """
    parser = Parser(
        "fp4jax.analyze health", "The health of a run's FP4 products, from a run with --config.health.every=N."
    )
    parser.add_argument("--workdir", type=Path, required=True, help="of the run")
    parser.add_argument("--out", type=Path, help="folder for the figures; WORKDIR/health if not given")
    flags = parser.parse_args(arguments)
    health = load_health(flags.workdir)
    for line in describe(health):
        print(line)
    out = flags.out or flags.workdir / "health"
    print(f"written: {', '.join(path.name for path in draw(health, out))} in {out}")

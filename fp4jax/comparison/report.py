"""The report of a comparison: comparison.json, report.md, report.html and the figures as PNG files.

Everything is made from comparison.json, which holds every number of every run: `python -m fp4jax.compare --redraw`
makes the rest of it again.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fp4jax.comparison import figures, records, tables
from fp4jax.comparison.pages import Page, Section, html, markdown
from fp4jax.comparison.plan import DECLARED, read_json
from fp4jax.comparison.records import Record
from fp4jax.comparison.run import write_atomically
from fp4jax.data.json_files import check_fields
from fp4jax.locking import locked

NUMBERS = "comparison.json"
LOCK = "report.lock"
_NUMBERS = {"command": str, "declaration": dict[str, Any], "missing_runs": int, "runs": list[dict[str, Any]]}


def write(workdir: Path, found: Sequence[Record], declaration: dict, command: str, missing: int) -> Path:
    """Writes the numbers and the report; returns the path of the HTML page."""
    value = {
        "command": command,
        "declaration": declaration,
        "missing_runs": missing,
        "runs": records.to_json(found),
    }
    # Commands with other seeds of the same comparison may be at their reports, too.
    with locked(workdir / LOCK):
        write_atomically(workdir / NUMBERS, value)
        return _draw(workdir)


def redraw(workdir: Path) -> Path:
    """Makes the report from comparison.json alone; returns the path of the HTML page.

    Raises:
      ValueError: there is none, or it is damaged.
    """
    read_numbers(workdir)  # before a lock is put into a folder that holds no comparison
    with locked(workdir / LOCK):
        return _draw(workdir)


def _draw(workdir: Path) -> Path:
    value, found = read_numbers(workdir)
    declaration = value["declaration"]
    drawn = figures.draw(found, declaration["baseline"])
    page = _page(found, declaration, value["command"], value["missing_runs"], drawn)
    for name, figure in drawn.items():
        write_atomically(workdir / f"{name}.png", figures.png(figure))
    write_atomically(workdir / "report.md", markdown(page).encode())
    path = workdir / "report.html"
    write_atomically(path, html(page).encode())
    return path


def read_numbers(workdir: Path) -> tuple[dict, list[Record]]:
    """What comparison.json says, and its runs.

    Raises:
      ValueError: it is missing or damaged.
    """
    path = workdir / NUMBERS
    if not path.exists():
        raise ValueError(f"{workdir} holds no {NUMBERS}: make the comparison first")
    value = read_json(path, _NUMBERS)
    try:
        declared = check_fields(value["declaration"], DECLARED)
        if declared["primary"] is not None and len(declared["primary"]) != 2:
            raise ValueError("the primary comparison has not two recipes")
        found = records.from_json(value["runs"])
        if not found:
            raise ValueError("no runs")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); restore it, or make the comparison again") from None
    return value, found


def _page(
    found: Sequence[Record], declaration: dict, command: str, missing: int, drawn: dict[str, Figure]
) -> Page:  # fmt: skip
    baseline, primary = declaration["baseline"], declaration["primary"]
    names = list(dict.fromkeys(record.recipe for record in found))
    summary = [*tables.headline(found, baseline, primary and tuple(primary))]
    if missing:
        summary.append(f"Not finished: {missing} runs are missing.")
    health = tables.health_tables(found)
    sections = [
        Section("Loss gap", [tables.GAP_MEANS], [tables.gap_table(found, baseline)], ["loss_gap", "gap_by_step"]),
        Section(
            "Differences between recipes",
            [tables.pairs_note(primary)],
            [tables.pair_table(found, baseline, primary and tuple(primary))],
            [],
        ),
        Section("Curves", [tables.CURVES_MEAN], [], ["validation_loss", "training_loss"]),
        Section("Cost", [tables.COST_MEANS], [tables.cost_table(found, baseline)], []),
        Section("Health", [tables.HEALTH_MEANS if health else tables.HEALTH_MISSING], health, []),
        Section("Recipes", [tables.RECIPES_MEAN], [tables.recipe_table(names)], []),
        Section("Published gaps, for orientation", [tables.PUBLISHED_MEANS], [tables.published_table()], []),
        Section("How it was made", tables.made_by(found, declaration, command), [], []),
    ]
    return Page("Comparison of precision modes", summary, sections, drawn)

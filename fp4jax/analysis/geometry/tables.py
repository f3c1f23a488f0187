"""Rows of theory, paper and ours side by side; as text and as JSON."""

import math
import textwrap
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from fp4jax.analysis.geometry.estimates import Estimate


@dataclass(frozen=True)
class Row:
    """One number.

    Attributes:
      label: what it is, at which setting.
      theory: the closed form in infinite width.
      paper: the paper's number, or None where it gives none.
      ours: the simulation, or None for a row of closed forms.
      at_width: the closed form at the simulated width, which `ours` is judged by; None where width plays no part.
      judged: False where the closed form leaves out terms that the simulated width has, so that no deviation is given.
    """

    label: str
    theory: float
    paper: float | None = None
    ours: Estimate | None = None
    at_width: float | None = None
    judged: bool = True

    @property
    def expected(self) -> float:
        return self.theory if self.at_width is None else self.at_width

    @property
    def deviation(self) -> float | None:
        """(ours - expected) in standard errors; None where there is nothing to judge."""
        return self.ours.deviation(self.expected) if self.judged and self.ours is not None else None

    def as_json(self) -> dict[str, Any]:
        numbers = asdict(self) | {"deviation": self.deviation}
        if self.ours is not None:
            numbers["ours"] |= {"interval_95": list(self.ours.interval())}
        return numbers


@dataclass(frozen=True)
class Table:
    """Rows with a title, the settings they were made with, and what is to be said about them."""

    name: str
    title: str
    rows: list[Row]
    settings: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "title": self.title,
            "settings": self.settings,
            "note": self.note,
            "rows": [row.as_json() for row in self.rows],
        }


_HEADER = ("", "theory", "at width", "paper", "ours", "+-", "dev.", "ours/paper")


@dataclass(frozen=True)
class Grid:
    """Numbers of a trained model: a label and a number for every column, an `Estimate` where it was sampled.

    Attributes:
      columns: their names, all different: they are keys in the JSON.
      points: what a figure of single points needs beside the rows, name → its (x, y); not in the JSON.

    Raises:
      ValueError: two columns of one name.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, list[float | Estimate | None]]]
    settings: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    points: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def __post_init__(self):
        if len(set(self.columns)) < len(self.columns):
            raise ValueError(f"table {self.name} has two columns of one name: {', '.join(self.columns)}")

    def column(self, name: str) -> list[float | Estimate | None]:
        """The cells of a column, from the first row to the last."""
        index = self.columns.index(name)
        return [cells[index] for _, cells in self.rows]

    def as_json(self) -> dict[str, Any]:
        rows = [
            {"label": label} | {column: _cell_json(cell) for column, cell in zip(self.columns, cells, strict=True)}
            for label, cells in self.rows
        ]
        return {"name": self.name, "title": self.title, "settings": self.settings, "note": self.note, "rows": rows}


def _cell_json(cell: float | Estimate | None) -> Any:
    if isinstance(cell, Estimate):
        return asdict(cell) | {"interval_95": list(cell.interval())}
    return cell


def render(table: Table | Grid) -> str:
    """Returns the table as text: dev. is (ours - theory at that width) in standard errors."""
    if isinstance(table, Grid):
        lines = [("", *table.columns), *((label, *map(_cell, cells)) for label, cells in table.rows)]
    else:
        lines = [_HEADER, *map(_cells, table.rows)]
    used = [column for column in range(len(lines[0])) if any(line[column] for line in lines[1:])]
    widths = {column: max(len(line[column]) for line in lines) for column in used}
    text = [table.title]
    if table.settings:
        text.append("  (" + ", ".join(f"{key} {value}" for key, value in table.settings.items()) + ")")
    for line in lines:
        first, rest = line[used[0]].ljust(widths[used[0]]), [line[c].rjust(widths[c]) for c in used[1:]]
        text.append("  " + "  ".join([first, *rest]).rstrip())
    if table.note:
        text.append(textwrap.fill(table.note, 110, initial_indent="  ", subsequent_indent="  "))
    return "\n".join(text)


def _cells(row: Row) -> tuple[str, ...]:
    ours, paper = row.ours, row.paper
    compared = row.theory if ours is None else ours.value
    return (
        row.label,
        _number(row.theory),
        "" if row.at_width is None else _number(row.at_width),
        "" if paper is None else f"{paper:g}",
        "" if ours is None else _number(ours.value),
        "" if ours is None else f"{ours.standard_error:.1g}",
        "" if row.deviation is None else f"{row.deviation:+.1f}",
        "" if not paper else f"{compared / paper - 1.0:+.2%}",
    )


def _cell(cell: float | Estimate | None) -> str:
    """A number; an estimate with its standard error, in as many digits as that has."""
    if isinstance(cell, Estimate):
        return f"{_number(cell.value)} +- {cell.standard_error:.1g}"
    return "" if cell is None else _number(cell)


def _number(x: float) -> str:
    """Five significant digits."""
    if x == 0.0 or not math.isfinite(x):
        return f"{x:g}"
    return f"{x:.{max(4 - math.floor(math.log10(abs(x))), 0)}f}"

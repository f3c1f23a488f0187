"""The paper's figures, drawn from finished tables. matplotlib is imported when something is drawn."""

import os
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fp4jax.analysis.geometry import activations, outliers, paper, perturbations, real_figures, ternary
from fp4jax.analysis.geometry.tables import Grid, Row, Table


def draw(tables: Sequence[Table | Grid], folder: Path) -> list[Path]:
    """Writes a PNG for every table that has a figure, into `folder`; returns their paths."""
    os.environ.setdefault("MPLBACKEND", "agg")
    from matplotlib import pyplot

    paths = []
    for table in tables:
        if table.name not in _FIGURES:
            continue
        figure, axes = pyplot.subplots(figsize=(6.0, 4.0), layout="constrained")
        _FIGURES[table.name](axes, table)
        axes.set_title(textwrap.fill(table.title, 80), fontsize=9)
        paths.append(folder / f"{table.name}.png")
        figure.savefig(paths[-1], dpi=150)
        pyplot.close(figure)
    return paths


def _starting(table: Table, start: str, end: str = "") -> list[Row]:
    return [row for row in table.rows if row.label.startswith(start) and row.label.endswith(end)]


def _points(axes: Any, x: Sequence[float | int], rows: Sequence[Row], label: str, **style: Any) -> None:
    """Our estimates with their 95 % intervals."""
    values = np.array([row.ours.value for row in rows])
    low, high = np.array([row.ours.interval() for row in rows]).T
    axes.errorbar(x, values, yerr=(values - low, high - values), fmt="o", ms=4, capsize=3, label=label, **style)


def _ratio(axes: Any, table: Table) -> None:
    p = np.geomspace(1e-4, 0.2, 200)
    axes.plot(p, perturbations.ratio_exact(p), label="exact limit")
    axes.plot(p, perturbations.ratio_paper(p), "--", label="the paper's form")
    axes.plot(paper.RATES, paper.RATIO_MEASURED, "x", label="the paper's measurement")
    width = max(table.settings["widths"])
    _points(axes, paper.RATES, _starting(table, "c(", f"width {width}"), f"ours, width {width}")
    axes.set(xscale="log", xlabel="sign-flip rate p", ylabel="transverse energy, sign / magnitude")
    axes.legend()


def _radial(axes: Any, table: Table) -> None:
    widths = list(table.settings["widths"])
    for name, colour in (("R_sign", "C0"), ("R_magnitude", "C1")):
        rows = [_starting(table, f"{name}(p=0.01)", f"width {width}")[0] for width in widths]
        axes.plot(widths, [row.at_width for row in rows], color=colour, label=f"{name}, p = .01, at width")
        axes.axhline(rows[0].theory, ls=":", color=colour)
        _points(axes, widths, rows, f"{name}, ours", color=colour)
    axes.set(xscale="log", yscale="log", xlabel="width", ylabel="radial fraction (dotted: limit)")
    axes.legend()


def _depth(papers: Sequence[float]) -> Callable[[Any, Table], None]:
    def plot(axes: Any, table: Table) -> None:
        layers = np.arange(1, len(papers) + 1)
        width = min(table.settings["widths"])
        for reading in ("chord", "own_norm", "transverse"):
            rows = _starting(table, f"{reading}, ", f"width {width}")
            (line,) = axes.plot(layers, [row.theory for row in rows], label=f"{reading}, limit")
            axes.plot(layers, [row.at_width for row in rows], "--", color=line.get_color())
            _points(axes, layers.tolist(), rows, f"{reading}, width {width}", color=line.get_color())
        axes.plot(layers, papers, "kx", label="paper")
        axes.set(xlabel="layer", ylabel="sign / magnitude (dashed: at width)")
        axes.legend(fontsize=7)

    return plot


def _quadrants(axes: Any, table: Table) -> None:
    width = max(table.settings["widths"])
    bottoms = np.zeros(2)
    for part in ("both open", "closing", "opening"):
        rows = [_starting(table, f"{kind}, {part}", f"width {width}")[0] for kind in ("sign", "absmean")]
        heights = np.array([row.ours.value for row in rows])
        axes.bar(("sign", "absmean"), heights, bottom=bottoms, label=part, width=0.5)
        bottoms += heights
    for index, threshold in enumerate((0.0, ternary.ABSMEAN_THRESHOLD)):
        axes.plot(index, ternary.ternary_after_relu(threshold).energy, "k_", ms=40)
    axes.set(ylabel="energy of the error after ReLU (line: theory)", xlim=(-0.6, 1.6))
    axes.legend()


def _leverage(axes: Any, table: Table) -> None:
    alpha = np.geomspace(0.01, 0.7, 200)
    axes.plot(alpha, outliers.leverage(alpha, paper.LEVERAGE_WIDTH), label="theorem 6, exact")
    axes.plot(alpha, outliers.leverage_leading(alpha, paper.LEVERAGE_WIDTH), "--", label="leading order")
    axes.axvline(outliers.leverage_crossover(paper.LEVERAGE_WIDTH), color="gray", ls=":", label="1/sqrt(n)")
    _points(axes, list(paper.LEVERAGE), table.rows, "ours")
    axes.set(xscale="log", yscale="log", xlabel="amplitude alpha of the outlier", ylabel="leverage")
    axes.legend()


def _columns(axes: Any, table: Table) -> None:
    gamma = np.linspace(0.01, 0.99, 200)
    axes.plot(gamma, outliers.column_ratio(gamma), label="5 % of the columns")
    _points(axes, list(paper.COLUMN_RATIO), _starting(table, "R_col"), "ours")
    axes.set(yscale="log", xlabel="energy share Gamma of the outlier columns", ylabel="damage per column")
    axes.legend()


def _activations(axes: Any, table: Table) -> None:
    sigmas = np.geomspace(0.05, 20.0, 60)
    for name in activations.ACTIVATIONS:
        axes.plot(sigmas, [activations.activation_ratio_limit(name, float(s)) for s in sigmas], label=name)
    axes.set(xscale="log", xlabel="scale of the pre-activations", ylabel="sign / magnitude for p → 0")
    axes.legend()


_FIGURES: dict[str, Callable[[Any, Any], None]] = real_figures.FIGURES | {
    "V1": _ratio,
    "D4": _radial,
    "V2": _depth(paper.DEPTH_PLAIN),
    "V3": _depth(paper.DEPTH_RESIDUAL),
    "G5": _quadrants,
    "T6": _leverage,
    "F": _columns,
    "O2": _activations,
}

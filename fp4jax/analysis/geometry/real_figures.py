"""Figures of a trained model's tables; `fp4jax.analysis.geometry.figures` draws them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fp4jax.analysis.geometry import paper
from fp4jax.analysis.geometry.estimates import RESOLVED, Estimate
from fp4jax.analysis.geometry.tables import Grid


def _values(cells: Sequence[float | Estimate | None]) -> np.ndarray:
    """The numbers of a column, NaN where there is none: matplotlib leaves those out."""
    return np.array([np.nan if cell is None else getattr(cell, "value", cell) for cell in cells], np.float64)


def _errors(cells: Sequence[float | Estimate | None]) -> np.ndarray:
    return np.array([cell.standard_error if isinstance(cell, Estimate) else np.nan for cell in cells])


def _by_layer(axes: Any, ylabel: str) -> None:
    axes.set(xlabel="layer", ylabel=ylabel)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()


def _ratios(axes: Any, grid: Grid) -> None:
    layers = np.arange(len(grid.rows))
    for name, colour in (("ReLU", "C0"), ("SiLU", "C1")):
        axes.plot(layers, _values(grid.column(f"{name}, Gaussian")), "--", color=colour, label=f"{name}, Gaussian")
        cells = grid.column(name)
        axes.errorbar(layers, _values(cells), yerr=_errors(cells), fmt="o-", ms=3, color=colour, label=name)
    _by_layer(axes, "transverse energy, sign / magnitude")


def _rates(axes: Any, grid: Grid) -> None:
    rates = np.array([float(label) for label, _ in grid.rows])
    for name, colour in (("outliers", "C0"), ("others", "C1")):
        cells = grid.column(f"rise, {name}")
        axes.errorbar(rates, _values(cells), yerr=_errors(cells), fmt="o-", ms=4, color=colour, label=name)
    leverage = axes.twinx()
    cells = [
        cell if cell is not None and cell.deviation(0.0) > RESOLVED else None for cell in grid.column("NLL leverage")
    ]
    leverage.errorbar(rates, _values(cells), yerr=_errors(cells), fmt="s", color="C2", label="leverage")
    leverage.plot(list(paper.NLL_LEVERAGE), list(paper.NLL_LEVERAGE.values()), "kx", label="leverage, paper")
    for axis, label in ((axes, "rise of the loss, nats per token"), (leverage, "NLL leverage")):
        axis.set(xscale="log", yscale="log", ylabel=label)  # what is not above 0 is left out
    axes.set_xlabel("flip rate of the outlier columns' weights")
    axes.figure.legend(loc="outside lower center", ncols=4)


def _scatter(ylabel: str) -> Callable[[Any, Grid], None]:
    def plot(axes: Any, grid: Grid) -> None:
        for name, (alpha2, effect) in grid.points.items():
            axes.plot(alpha2, effect, "o", ms=3, alpha=0.6, label=name)
        x, y = (np.concatenate(values) for values in zip(*grid.points.values(), strict=True))
        some = (x > 0) & (y > 0)
        ends = np.array([x[some].min(), x[some].max()])
        scale = np.exp(np.mean(np.log(y[some] / x[some])))
        axes.plot(ends, scale * ends, "k--", label="slope 1")
        axes.set(xscale="log", yscale="log", xlabel="alpha², the column's share of energy", ylabel=ylabel)
        axes.legend()

    return plot


def _layers(ylabel: str) -> Callable[[Any, Grid], None]:
    def plot(axes: Any, grid: Grid) -> None:
        for recipe in grid.columns:
            axes.plot(np.arange(len(grid.rows)), _values(grid.column(recipe)), "o-", ms=3, label=recipe)
        axes.set_yscale("log")
        _by_layer(axes, ylabel)

    return plot


FIGURES: dict[str, Callable[[Any, Grid], None]] = {
    "B": _ratios,
    "DE": _rates,
    "F-real": _scatter("energy after the activation"),
    "G-real": _scatter("size of the loss's change"),
    "bridge-layer-radial": _layers("radial share"),
    "bridge-stack-radial": _layers("radial share"),
    "bridge-stack-after": _layers("|difference|²/n behind RMSNorm"),
}

"""The bar chart of several recipes' measurements."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from fp4jax.analysis.ptq.measure import Measurement


def draw(groups: Mapping[str, Sequence[Measurement]], path: Path) -> None:
    """Writes a PNG: the loss gap and the error of the weight gradients of every recipe, one colour a group."""
    names = list(dict.fromkeys(m.recipe for measurements in groups.values() for m in measurements))
    panels = [("loss gap to high precision, %", _gap), ("error of the weight gradients", _gradient_error)]
    figure = Figure(figsize=(10, 0.8 + 0.34 * len(names) * max(len(groups), 1)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True)
    height = 0.8 / max(len(groups), 1)
    for axis, (title, value) in zip(axes, panels, strict=True):
        for i, (group, measurements) in enumerate(groups.items()):
            at = np.array([names.index(m.recipe) for m in measurements]) + (i - (len(groups) - 1) / 2) * height
            values, errors = zip(*map(value, measurements), strict=True)
            bars = axis.barh(at, values, height, xerr=errors, label=group, capsize=2)
            labels = ["" if np.isnan(value) else f"{value:.2f}" for value in values]
            axis.bar_label(bars, labels, padding=3, fontsize=7)
        axis.set_title(title)
        axis.set_yticks(range(len(names)), names)
        axis.margins(x=0.15, y=0.01)
        if _spans_decades([bar.get_width() for bar in axis.patches]):
            axis.set_xscale("log")
    axes[0].invert_yaxis()
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=max(len(groups), 1))
    figure.savefig(path, dpi=150)


def _spans_decades(lengths: Sequence[float]) -> bool:
    known = [float(length) for length in lengths if not np.isnan(length)]
    return bool(known) and min(known) > 0 and max(known) > 100 * min(known)


def _gap(m: Measurement) -> tuple[float, float]:
    return 100 * m.loss_gap, np.nan_to_num(100 * m.loss_gap_error)


def _gradient_error(m: Measurement) -> tuple[float, float]:
    error = m.mean("gradient_error")
    if error is None:
        return np.nan, 0.0  # no bar
    spread = np.std([s.gradient_error for s in m.samples]) / max(len(m.samples) - 1, 1) ** 0.5
    return error, float(spread)

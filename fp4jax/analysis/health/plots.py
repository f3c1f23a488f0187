"""Heat maps of a run's health: layers down, steps across, one figure a ratio with a panel for every operand."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fp4jax.analysis.health.numbers import Health
from fp4jax.training.health import STOP_RATIO

TITLES = {
    "sqnr_db": "signal-to-quantization-noise ratio, dB",
    "underflow": "share of non-zero elements that became 0",
    "saturated": "share of non-zero elements with the largest code",
    "zero_scales": "share of non-zero blocks whose scale is 0",
    "largest_scales": "share of blocks with the largest scale",
    "mean_bias": r"mean-bias ratio $R = |\mu| / \sqrt{\|X\|_F^2 / l}$",
    "residual_energy": "share of the energy left by the split",
    "split_energy": "energy of the split's terms by that of the weight gradient",
    "cross_energy": "energy of the column-sum terms by that of the weight gradient",
    "cosine": "cosine of the weight gradient to the exact one",
    "gradient_to_noise": r"|exact weight gradient| / |noise| (FP4 stops helping below $\sqrt{3}$)",
}
SUMMARIES = {
    "gradient_cosine": "cosine to the exact gradient",
    "gradient_to_noise": "|exact gradient| / |noise|",
    "loss_gap": "loss - exact loss, nats",
}
MAX_TICKS = 6


def draw(health: Health, folder: Path) -> list[Path]:
    """Writes the figures; returns their paths. A ratio that is nowhere defined has none."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [_save(_summary(health), folder / "summary.png")]
    for ratio, by_operand in health.ratios.items():
        panels = {operand: values for operand, values in by_operand.items() if not np.all(np.isnan(values))}
        if panels:
            written.append(_save(_heat_maps(health, ratio, panels), folder / f"{ratio}.png"))
    return written


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    return path


def _summary(health: Health) -> Figure:
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, len(SUMMARIES)), SUMMARIES.items(), strict=True):
        axes.plot(health.steps, health.summary[name], marker=".")
        axes.set(xlabel="step", title=label)
        axes.grid(alpha=0.3)
        if name == "gradient_to_noise":
            axes.axhline(STOP_RATIO, color="tab:red", linestyle="--", label=r"stop rule, $\sqrt{3}$")
            axes.legend()
    return figure


def _heat_maps(health: Health, ratio: str, panels: dict[str, np.ndarray]) -> Figure:
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    height = max(2.6, 1 + 0.035 * len(health.names))
    figure = Figure(figsize=(2.4 + 3.4 * columns, height * rows + 0.5), layout="constrained")
    every_axes = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    finite = np.concatenate([values[np.isfinite(values)] for values in panels.values()])
    low, high = finite.min(), finite.max()
    for axes, (operand, values) in zip(every_axes, panels.items(), strict=False):
        # A map of one colour still needs a range.
        image = axes.imshow(
            values,
            aspect="auto",
            interpolation="nearest",
            cmap="viridis",
            vmin=low,
            vmax=high if high > low else low + 1,
        )
        axes.set_title(operand, fontsize=10)
        _label(axes, health)
    for axes in every_axes[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle(f"{TITLES[ratio]}\nlayers of each linear, the first on top", fontsize=10)
    figure.colorbar(image, ax=every_axes.tolist(), shrink=0.9)
    return figure


def _label(axes: Axes, health: Health) -> None:
    """Steps across; down the linear layers, each a group of rows from the first layer to the last."""
    count = len(health.steps)
    shown = np.unique(np.linspace(0, count - 1, min(count, MAX_TICKS)).round().astype(int))
    axes.set_xticks(shown, [f"{health.steps[i]:,}" for i in shown], fontsize=8)
    axes.set_xlabel("step", fontsize=8)
    sizes = list(health.groups.values())
    ends = np.cumsum(sizes)
    axes.set_yticks(ends - np.array(sizes) / 2 - 0.5, list(health.groups), fontsize=8)
    for end in ends[:-1]:
        axes.axhline(end - 0.5, color="white", linewidth=1.5)

"""The figures of a comparison; one colour a recipe in all of them, the baseline in grey."""

import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fp4jax.comparison.records import Record, common_steps, smoothed
from fp4jax.comparison.statistics import gaps

# Okabe and Ito's colours, which people who see fewer colours tell apart; recipes beyond them differ by their dashes.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("-", "--", "-.", ":")
BASELINE_COLOUR = "#666666"


def draw(records: Sequence[Record], baseline: str) -> dict[str, Figure]:
    """Name → figure."""
    return {
        "validation_loss": _curves(records, baseline, "validation loss, nats a token", _validation_curve),
        "training_loss": _curves(records, baseline, "training loss, smoothed, nats a token", _training_curve),
        "gap_by_step": _gap_by_step(records, baseline),
        "loss_gap": _final_gaps(records, baseline),
    }


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def svg(figure: Figure) -> str:
    """The figure as an element for an HTML page, its letters as text."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fp4jax"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _styles(records: Sequence[Record], baseline: str) -> dict[str, dict]:
    others = [name for name in dict.fromkeys(record.recipe for record in records) if name != baseline]
    styles = {
        name: {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i // len(COLOURS) % len(DASHES)]}
        for i, name in enumerate(others)
    }
    return {baseline: {"color": BASELINE_COLOUR, "linestyle": "-"}} | styles


def _axes(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("tokens")
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    return figure, axes


def _band(axes: Axes, x: np.ndarray, by_seed: np.ndarray, label: str, style: dict) -> None:
    """The mean over seeds, and from the lowest to the highest of them."""
    axes.plot(x, by_seed.mean(0), label=label, **style)
    if len(by_seed) > 1:
        axes.fill_between(x, by_seed.min(0), by_seed.max(0), color=style["color"], alpha=0.2, linewidth=0)


def _training_curve(record: Record) -> dict[int, float]:
    return dict(zip(record.steps, smoothed(record.losses).tolist(), strict=True))


def _validation_curve(record: Record) -> dict[int, float]:
    return dict(zip(record.validation_steps, record.validation_losses, strict=True))


def _curves(records: Sequence[Record], baseline: str, title: str, curve) -> Figure:
    figure, axes = _axes(title)
    for name, style in _styles(records, baseline).items():
        of_recipe = [record for record in records if record.recipe == name]
        curves = [found for record in of_recipe if (found := curve(record))]
        steps = sorted(set.intersection(*map(set, curves))) if curves else []
        if steps:
            tokens = np.array(steps) * of_recipe[0].tokens_per_step
            _band(axes, tokens, np.array([[found[step] for step in steps] for found in curves]), name, style)
    axes.legend(frameon=False, fontsize="small")
    return figure


def _gap_by_step(records: Sequence[Record], baseline: str) -> Figure:
    """Of the smoothed training losses: on the same batches, so that their noise is nearly the same and falls out."""
    figure, axes = _axes("gap of the smoothed training loss, %")
    references = {record.seed: record for record in records if record.recipe == baseline}
    axes.axhline(0, color=BASELINE_COLOUR)
    for name, style in _styles(records, baseline).items():
        curves = []
        for record in records:
            if name != baseline and record.recipe == name and record.seed in references:
                reference = references[record.seed]
                steps = common_steps([*(r for r in records if r.recipe == name), *references.values()])
                ours, theirs = _training_curve(record), _training_curve(reference)
                curves.append([100 * (ours[step] / theirs[step] - 1) for step in steps.tolist()])
        if curves and curves[0]:
            _band(axes, steps * record.tokens_per_step, np.array(curves), name, style)
    if len(axes.lines) > 1:
        axes.legend(frameon=False, fontsize="small")
    return figure


def _final_gaps(records: Sequence[Record], baseline: str) -> Figure:
    found = {name: gap for name, gap in gaps(records, baseline).items() if name != baseline and gap is not None}
    figure = Figure(figsize=(7, 1.2 + 0.4 * max(len(found), 1)), layout="constrained")
    axes = figure.subplots()
    styles = _styles(records, baseline)
    for i, (name, gap) in enumerate(found.items()):
        bars = axes.barh(i, gap.mean, 0.6, xerr=gap.half_width, color=styles[name]["color"], capsize=3)
        axes.bar_label(bars, [f"{gap.mean:+.2f}"], padding=4, fontsize="small")
    axes.axvline(0, color=BASELINE_COLOUR, linewidth=1)
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"loss gap to {baseline}, %, with 95 % intervals over seeds", loc="left")
    return figure

"""The paper's five figures in its arrangement, and two of our own: the mechanism and the theorems' tightness."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fp4jax.analysis.mean_bias import theorems
from fp4jax.analysis.mean_bias.attribution import TERMS
from fp4jax.analysis.mean_bias.capture import SITES
from fp4jax.analysis.mean_bias.measure import BINS, LEADING

PARTS = ("mean", "spike", "tail")


def depths(count: int) -> dict[str, int]:
    """Indices of the residual stream: the embedding, and a shallow, a middle and a deep layer of `count` - 1."""
    layers = count - 1
    return {"embedding": 0, "shallow": max(1, layers // 6), "middle": max(1, layers // 2), "deep": max(1, layers - 1)}


def draw(name: str, results: Mapping[str, Mapping[str, Any]], folder: Path) -> Path:
    """Writes figure `name`, a key of FIGURES, of the measured models (name → what `measure` returned)."""
    figure = FIGURES[name](results)
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=130)
    return path


def _directions(results: Mapping[str, Any]) -> Figure:
    """Fig. 1 of the last model: signs of the projections (a), cosines with the right singular vectors (b)."""
    name, result = list(results.items())[-1]
    stream = result["sites"][SITES[0]]
    figure = Figure(figsize=(11, 6), layout="constrained")
    figure.suptitle(f"{name}: residual stream and its mean over tokens")
    axes = figure.subplots(2, 4)
    for column, (depth, index) in enumerate(depths(len(stream)).items()):
        entry = stream[index]
        axes[0, column].stairs(np.array(entry["histogram"]) / sum(entry["histogram"]), BINS, fill=True)
        axes[0, column].axvline(0.0, color="k", lw=0.8)
        axes[0, column].set(
            title=f"{depth} ({index}): {entry['sign_consistency']:.1%} above 0", xlabel="projection / rms"
        )
        axes[1, column].bar(range(1, LEADING + 1), entry["cosines"])
        axes[1, column].set(ylim=(0, 1), xlabel="right singular vector")
    axes[0, 0].set_ylabel("(a) share of tokens")
    axes[1, 0].set_ylabel("(b) |cos| with the mean")
    return figure


def _stacks(results: Mapping[str, Any], field: str, terms: Sequence[str], title: str) -> Figure:
    """A row for each model, a column for each site: `field`'s shares by layer, negative ones below 0."""
    figure = Figure(figsize=(13, 0.8 + 3.2 * len(results)), layout="constrained")
    grid = figure.subplots(len(results), len(SITES), squeeze=False)
    for axes, (name, result) in zip(grid, results.items(), strict=True):
        for axis, site in zip(axes, SITES, strict=True):
            entries = result["sites"][site]
            layers = np.arange(len(entries))
            above, below = np.zeros(len(entries)), np.zeros(len(entries))
            for term in terms:
                values = np.array([entry[field][term] for entry in entries])
                axis.bar(layers, values, 0.9, bottom=np.where(values >= 0, above, below), label=term)
                above, below = above + np.maximum(values, 0), below + np.minimum(values, 0)
            axis.axhline(0.0, color="k", lw=0.6)
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.set(title=f"{name}: {site}", xlabel="layer (0: embedding)" if site == SITES[0] else "layer")
        axes[0].set_ylabel(title)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(terms))
    return figure


def _operators(results: Mapping[str, Any]) -> Figure:
    """Fig. 3: the mean's share of the energy before and after attention's softmax and SwiGLU."""
    figure = Figure(figsize=(12, 0.6 + 3.6 * len(results)), layout="constrained")
    grid = figure.subplots(len(results), 2, squeeze=False)
    panels = (
        ("attention", ("values", "attention output")),
        ("SwiGLU", ("gate", "up", "silu(gate)", "SwiGLU output")),
    )
    for axes, (name, result) in zip(grid, results.items(), strict=True):
        for axis, (panel, operators) in zip(axes, panels, strict=True):
            for operator in operators:
                axis.plot(result["operators"]["mean_share"][operator], "o-", ms=3, label=operator)
            axis.set(title=f"{name}: {panel}", xlabel="layer", ylabel="mean's share of energy", ylim=(0, 1))
            axis.legend(fontsize=8)
        uniform = result["operators"]["uniform_attention"]
        axes[0].plot(uniform, "k:", label="softmax weights (1: uniform)")
        axes[0].legend(fontsize=8)
    return figure


def _mechanism(results: Mapping[str, Any]) -> Figure:
    """Eq. 3-5 and section 7: increments, growth, predicted operator means, the embedding whitened."""
    name, result = list(results.items())[-1]
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    figure.suptitle(f"{name}: where the mean comes from")
    (norms, cosines), (predicted, whitened) = figure.subplots(2, 2)
    norms.plot([entry["norm"] for entry in result["sites"][SITES[0]]], "o-", ms=3, label="|mean|")
    norms.plot(np.arange(1, len(result["increments"]["norm"]) + 1), result["increments"]["norm"], "o-", ms=3,
               label="|increment|")  # fmt: skip
    norms.set(yscale="log", xlabel="residual stream after layer", title="mean of the residual stream")
    norms.legend()
    cosines.plot(np.arange(1, len(result["increments"]["cosine"]) + 1), result["increments"]["cosine"], "o-", ms=3,
                 label="cos(increment, mean before)")  # fmt: skip
    cosines.plot(result["growth"], "s-", ms=3, label="exponent of |mean| in width")
    cosines.axhline(0.5, color="k", ls=":", lw=0.8)
    cosines.set(xlabel="residual stream after layer", title="eq. 4 and 5")
    cosines.legend()
    for label, agreement in result["operators"]["predicted"].items():
        predicted.plot(agreement["error"], "o-", ms=3, label=label)
    predicted.set(yscale="log", xlabel="layer", title="relative error of the mean predicted by eq. 3")
    predicted.legend(fontsize=7)
    for label, ratios in result["whitened"].items():
        whitened.plot(ratios, "o-", ms=3, label=f"embedding {label}")
    whitened.set(xlabel="residual stream after layer", ylabel="R", ylim=(0, 1), title="the embedding alone changed")
    whitened.legend()
    return figure


FIGURES: dict[str, Callable[[Mapping[str, Any]], Figure]] = {
    "fig1": _directions,
    "fig2": lambda results: _stacks(results, "energy", PARTS, "share of energy"),
    "fig3": _operators,
    "fig4": lambda results: _stacks(results, "top", TERMS, "share of top 0.1 % entries"),
    "mechanism": _mechanism,
}


def draw_losses(workdirs: Sequence[Path], path: Path) -> None:
    """Fig. 5: training losses, and validation losses as points, of runs.

    Raises:
      OSError: a workdir without metrics.
    """
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axis = figure.subplots()
    for index, workdir in enumerate(workdirs):
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        for key, style in (("loss", "-"), ("validation_loss", "o")):
            points = [(line["step"], line[key]) for line in lines if key in line]
            if points:
                label = workdir.name if key == "loss" else f"{workdir.name}, validation"
                axis.plot(*zip(*points, strict=True), style, color=f"C{index}", ms=4, label=label)
    axis.set(xlabel="step", ylabel="loss, nats a token")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def draw_theorems(path: Path) -> None:
    """The bounds of theorems 2 and 3 beside the exact probabilities: where they are tight."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    tail, largest, mean = figure.subplots(1, 3)
    thresholds = np.linspace(0.0, 6.0, 121)
    for index, mu in enumerate((0.0, 1.0, 3.0)):
        exact = [theorems.tail_probability(mu, 1.0, t) for t in thresholds]
        tail.plot(thresholds, exact, color=f"C{index}", label=f"exact, mean {mu:g}")
        tail.plot(thresholds, [theorems.tail_bound(mu, 1.0, t) for t in thresholds], "--", color=f"C{index}")
    tail.set(yscale="log", ylim=(1e-9, 2), xlabel="threshold / sigma", title="theorem 2 (dashed: bound)")
    tail.legend()
    tokens = np.unique(np.geomspace(1, 10_000, 40).astype(int))
    for index, mu in enumerate((0.0, 0.5, 3.0)):
        for quantile, style in ((theorems.largest_entry_quantile, "-"), (theorems.printed_quantile, ":")):
            values = [
                theorems.largest_entry_probability(mu, 1.0, n, quantile(mu, 1.0, n, 0.05)) for n in tokens.tolist()
            ]
            largest.plot(tokens, values, style, color=f"C{index}", label=f"mean {mu:g}" if style == "-" else None)
    largest.axhline(0.95, color="k", lw=0.8)
    largest.set(xscale="log", ylim=(0, 1.05), xlabel="tokens", ylabel="P(M >= quantile), .95 promised",
                title="theorem 3 (dotted: as printed)")  # fmt: skip
    largest.legend(loc="center right")
    few = np.arange(1, 11)
    for index, mu in enumerate((0.2, 1.0, 3.0)):
        exact = [theorems.largest_entry_probability(mu, 1.0, n, mu) for n in few.tolist()]
        mean.plot(few, exact, "o-", color=f"C{index}", label=f"exact, mean {mu:g}")
    mean.plot(few, [theorems.exceeds_mean_bound(n) for n in few.tolist()], "k--", label="1 - 2^-tokens")
    mean.set(xlabel="tokens", ylabel="P(M >= |mean|)", title="a bound, no equality")
    mean.legend()
    figure.savefig(path, dpi=130)

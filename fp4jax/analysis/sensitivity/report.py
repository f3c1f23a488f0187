"""A scan as a table, as a figure and as JSON."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fp4jax.analysis.sensitivity.ranking import RankBy, RankedLayer, quantized_mask
from fp4jax.analysis.sensitivity.scan import Effect, Scan
from fp4jax.models.qwen3 import LINEARS

_HEADER = ("", "loss gap", "", "own gradient", "cosine", "total gradient", "cosine")
_SHOWN_LAYERS = 12


def effects_table(title: str, effects: Sequence[Effect], loss: float, rank_by: RankBy) -> str:
    """The effects, the worst first; the loss gap in nats and in percent of the high-precision loss."""
    worst_first = sorted(effects, key=rank_by.score, reverse=True)
    rows = [
        (
            effect.choice.name,
            f"{effect.loss_gap:+.4f}",
            f"{effect.loss_gap / loss:+.2%}",
            _percent(effect.own.relative),
            _cosine(effect.own.cosine),
            _percent(effect.total.relative),
            _cosine(effect.total.cosine),
        )
        for effect in worst_first
    ]
    return "\n".join([title, *_aligned([_HEADER, *rows])])


def ranking_table(ranked: Sequence[RankedLayer], rank_by: RankBy, measured: bool) -> str:
    """The worst layers, and what is kept."""
    unit = "share of total gradient error, squared" if rank_by is RankBy.GRADIENT else "share of loss gap"
    whole = sum(layer.score for layer in ranked) or math.nan
    rows = [
        (layer.path, f"{layer.score / whole:.2%}", f"{layer.parameters:,}", "kept" if layer.kept else "")
        for layer in ranked[:_SHOWN_LAYERS]
    ]
    how = "measured" if measured else "estimated from its block's and its type's"
    kept = [layer for layer in ranked if layer.kept]
    share = sum(layer.parameters for layer in kept) / sum(layer.parameters for layer in ranked)
    title = f"worst linear layers, {how}"
    footer = f"kept in high precision: {len(kept)} of {len(ranked)} linear layers, {share:.1%} of their parameters"
    return "\n".join([title, *_aligned([("", unit, "parameters", ""), *rows]), footer])


def scan_json(scan: Scan, ranked: Sequence[RankedLayer]) -> dict[str, Any]:
    """Every number of the scan; what is not a number is null."""
    return {
        "loss": scan.loss,
        "tokens": scan.tokens,
        "effects": [_effect_json(effect) for effect in scan.effects],
        "ranking": [
            {"layer": layer.path, "score": layer.score, "parameters": layer.parameters, "kept": layer.kept}
            for layer in ranked
        ],
    }


def draw(scan: Scan, ranked: Sequence[RankedLayer], rank_by: RankBy, title: str, path: Path) -> None:
    """Writes bars for types and blocks (gradient error above, loss gap below) and the map of linear layers."""
    os.environ.setdefault("MPLBACKEND", "agg")
    from matplotlib import pyplot

    groups = [[effect for effect in scan.effects if effect.choice.kind == kind] for kind in ("type", "block")]
    figure = pyplot.figure(figsize=(10.0, 8.0), layout="constrained")
    wide = max(1.0, len(groups[1]) / len(groups[0]))
    axes = figure.subplot_mosaic(
        [["type total", "block total"], ["type loss", "block loss"], ["map", "map"]], width_ratios=[1.0, min(wide, 3.0)]
    )  # fmt: skip
    for kind, effects in zip(("type", "block"), groups, strict=True):
        names = [effect.choice.name for effect in effects]
        _bars(axes[f"{kind} total"], names, [100 * effect.total.relative for effect in effects], "C0")
        _bars(axes[f"{kind} loss"], names, [100 * effect.loss_gap / scan.loss for effect in effects], "C1")
        axes[f"{kind} total"].set_title(f"one {kind} quantized at a time", fontsize=9)
        axes[f"{kind} loss"].set_xlabel(kind)
    axes["type total"].set_ylabel("error of total gradient, %")
    axes["type loss"].set_ylabel("loss gap, %")
    _map(figure, axes["map"], ranked, rank_by)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _bars(axes: Any, names: Sequence[str], values: Sequence[float], colour: str) -> None:
    axes.bar(range(len(names)), values, color=colour)
    step = math.ceil(len(names) / 16)
    axes.set_xticks(range(0, len(names), step), names[::step], rotation=0 if names[0].isdigit() else 45)
    axes.axhline(0.0, color="black", lw=0.5)


def _map(figure: Any, axes: Any, ranked: Sequence[RankedLayer], rank_by: RankBy) -> None:
    """Scores by type and block; a dot marks a layer that is kept."""
    num_layers = len(ranked) // len(LINEARS)
    scores = np.zeros((len(LINEARS), num_layers))
    for layer in ranked:
        _, block, name = layer.path.split(".", 2)
        scores[LINEARS.index(name), int(block)] = layer.score
    image = axes.imshow(100 * scores / (scores.sum() or math.nan), aspect="auto", cmap="viridis")
    kept_blocks, kept_types = np.nonzero(~quantized_mask(ranked))
    axes.plot(kept_blocks, kept_types, "o", color="white", mec="black", ms=5, ls="", label="kept in BF16")
    axes.set_yticks(range(len(LINEARS)), [name.split(".")[1] for name in LINEARS])
    axes.set_xticks(range(0, num_layers, math.ceil(num_layers / 32)))
    axes.set_xlabel("block")
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), fontsize=7)
    what = "total gradient error, squared" if rank_by is RankBy.GRADIENT else "loss gap"
    figure.colorbar(image, ax=axes, label=f"% of {what}")


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2%}"


def _cosine(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.5f}"


def _effect_json(effect: Effect) -> dict[str, Any]:
    numbers = {
        "loss": effect.loss,
        "loss_gap": effect.loss_gap,
        "own_gradient_error": effect.own.relative,
        "own_gradient_cosine": effect.own.cosine,
        "total_gradient_error": effect.total.relative,
        "total_gradient_cosine": effect.total.cosine,
    }
    finite = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
    return {"kind": effect.choice.kind, "name": effect.choice.name} | finite

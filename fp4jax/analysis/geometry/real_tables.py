"""The tables of a trained model: weights, experiments B, D, E, F, G, and the bridge to the FP4 recipes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64, Int
from scipy.stats import spearmanr

from fp4jax.analysis.geometry import activations, column_flips, paper, perturbations, real_model
from fp4jax.analysis.geometry.estimates import RESOLVED, Estimate, mean, ratio
from fp4jax.analysis.geometry.experiments import energies
from fp4jax.analysis.geometry.tables import Grid
from fp4jax.models.pretrained import LoadedModel
from fp4jax.models.qwen3 import LINEARS
from fp4jax.recipes import recipe

_PROXIES = {"relu": jax.nn.relu, "silu": jax.nn.silu}


@dataclass(frozen=True)
class RealSettings:
    """How much is measured.

    Attributes:
      rates: flip rates of experiments D and E, ascending; 1 flips every outlier column.
      draws: sets of flips for each rate.
      columns: columns of experiment G.
      energy_tokens: tokens of experiment F.
      recipes: of the bridge.
    """

    seed: int
    recipes: tuple[str, ...]
    rates: tuple[float, ...] = (0.0005, 0.001, 0.005, 0.02, 0.1, 1.0)
    draws: int = 6
    columns: int = 24
    energy_tokens: int = 128


@dataclass(frozen=True)
class Subject:
    """A model on a text: parameters by path, its float32 forward, its loss, its trace."""

    name: str
    loaded: LoadedModel
    tokens: Int[np.ndarray, "B T"]
    traced: dict[str, Any]

    @classmethod
    def of(cls, name: str, loaded: LoadedModel, tokens: Int[np.ndarray, "B T"]) -> "Subject":
        """Traces the model on the tokens.

        Raises:
          ValueError: an empty text, rows of fewer than 2 tokens, or a model whose layers are not dense.
        """
        if loaded.config.linears != LINEARS:
            raise ValueError(
                f"{name} is a mixture of experts; these experiments are of dense layers with {', '.join(LINEARS)}"
            )
        if tokens.size == 0 or tokens.shape[1] < 2:
            raise ValueError(
                f"the text must have rows of at least 2 tokens, got {tokens.shape[0]} of {tokens.shape[1]}"
            )
        return cls(name, loaded, tokens, real_model.trace(loaded.model("bf16"), jnp.asarray(tokens)))

    @property
    def about(self) -> dict[str, Any]:
        return {"model": self.name, "rows": self.tokens.shape[0], "tokens a row": self.tokens.shape[1]}

    def kernel(self, linear: str):
        return self.loaded.params[f"layers.{linear}.kernel"]

    def alpha2(self, linear: str):
        return self.traced[f"alpha2 {linear}"]

    def loss(self, params: dict[str, Any]):
        """Nats per token, of every token but the first of a row."""
        model = LoadedModel(self.loaded.config, params, self.loaded.tokenizer).model("bf16")
        tokens = jnp.asarray(self.tokens)
        logits = jax.nn.log_softmax(model(tokens)[:, :-1])
        return -jnp.mean(jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1))


def weight_table(subject: Subject, settings: RealSettings) -> list[Grid]:
    """Row-wise cos²(w, sign w) over all matrices, against 2/pi."""
    rows = []
    for linear in LINEARS:
        found = np.asarray(real_model.row_alignments(subject.kernel(linear)), np.float64)
        quantiles = [float(q) for q in np.quantile(found, (0.0, 0.5, 1.0))]
        rows.append((linear, [perturbations.BUSSGANG, float(found.mean()), *quantiles]))
    columns = ("Gaussian", "mean", "smallest", "median", "largest")
    return [Grid("weights", "cos²(w, sign w) of every row of the model's matrices", columns, rows, subject.about)]


def depth_table(subject: Subject, settings: RealSettings) -> list[Grid]:
    """Experiment B: the transverse ratio of every layer's MLP, with ReLU and SiLU between gate and down."""
    p, key = paper.DEPTH_RATE, jax.random.key(settings.seed)
    gate, down = subject.kernel("mlp.gate_proj"), subject.kernel("mlp.down_proj")
    found = {
        name: real_model.mlp_ratio_sums(key, jnp.float32(p), subject.traced["mlp"], gate, down, activation=function)
        for name, function in _PROXIES.items()
    }
    transverse = {name: energies(np.asarray(x["sums"], np.float64))[0] for name, x in found.items()}
    scales = [float(scale) for scale in found["silu"]["scale"]]
    rows = [
        (
            f"layer {layer}",
            [
                float(perturbations.ratio_exact(p)),
                ratio(*transverse["relu"][layer]),
                activations.activation_ratio("silu", p, scale),
                ratio(*transverse["silu"][layer]),
                scale,
            ],
        )
        for layer, scale in enumerate(scales)
    ]
    columns = ("ReLU, Gaussian", "ReLU", "SiLU, Gaussian", "SiLU", "scale of gate")
    note = "Gaussian: the closed form at that scale. Standard errors are over tokens; the flips are one draw."
    title = "Experiment B: sign flips over magnitude change in the model's MLPs, by depth"
    return [Grid("B", title, columns, rows, subject.about | {"p": p, "seed": settings.seed}, note)]


def flip_table(subject: Subject, settings: RealSettings) -> list[Grid]:
    """Experiments D and E: outlier columns against others at equal flip counts, in NLL and in perplexity."""
    masks = {linear: column_flips.outlier_columns(subject.alpha2(linear), paper.COLUMN_FRACTION) for linear in LINEARS}
    draw = column_flips.count_matched_flips(
        subject.loaded.params, {f"layers.{linear}.kernel": mask for linear, mask in masks.items()}, subject.loss
    )
    keys = [jax.random.fold_in(jax.random.key(settings.seed), index) for index in range(settings.draws)]
    rows, rises = [], []
    for rate in settings.rates:
        drawn = [draw(key, jnp.float32(rate)) for key in keys]
        outliers, others, matched = np.array([result.loss for result in drawn], np.float64).T
        rises.append(mean(outliers))
        flips = float(np.mean([result.flips for result in drawn]))
        nll, with_norms = _leverage(outliers, others), _leverage(outliers, matched)
        perplexity = _leverage(np.expm1(outliers), np.expm1(others))
        leverages = [nll, paper.NLL_LEVERAGE.get(rate), with_norms, perplexity, paper.PERPLEXITY_LEVERAGE.get(rate)]
        rows.append((f"{rate:g}", [flips, rises[-1], mean(others), *leverages]))
    shares = [float(jnp.mean(jnp.sum(jnp.where(m, subject.alpha2(name), 0.0), axis=1))) for name, m in masks.items()]
    share = float(np.mean(shares))
    odds = (1 - paper.COLUMN_FRACTION) / paper.COLUMN_FRACTION * share / (1 - share)
    note = (
        "Rates are of the outlier columns' weights; the others flip as many. Outlier columns hold "
        f"{share:.1%} of their layer's input energy on average, {odds:.1f} times the others' per column. "
        + _linear_response(settings.rates, rises)
    )
    columns = (
        "flips", "rise, outliers", "rise, others", "NLL leverage", "paper, NLL", "norms matched",
        "perplexity leverage", "paper, perplexity",
    )  # fmt: skip
    about = subject.about | {"draws": settings.draws, "seed": settings.seed, "outlier columns": "5 %"}
    title = "Experiments D and E: signs flipped in outlier columns against as many in the others, by rate"
    return [Grid("DE", title, columns, rows, about, note)]


def _leverage(outliers: Float64[np.ndarray, " draws"], others: Float64[np.ndarray, " draws"]) -> Estimate | None:
    """Mean rise over mean rise; None where so few signs flipped that the others' flips changed nothing at all."""
    return ratio(outliers, others) if others.sum() else None


def _linear_response(rates: Sequence[float], rises: Sequence[Estimate]) -> str:
    """A sentence on where the outliers' loss rises in proportion to the rate."""
    resolved = [index for index, rise in enumerate(rises) if rise.value > RESOLVED * rise.standard_error]
    if not resolved:
        return "These draws do not resolve the rise of the outliers' loss at any rate."
    first = resolved[0]
    if first == len(rates) - 1:
        return f"Only at {rates[first]:g} is the rise of the outliers' loss above three standard errors."
    threshold = column_flips.linear_response_threshold(
        np.array(rates[first:]), np.array([rise.value for rise in rises[first:]])
    )
    return (
        f"The rise of the outliers' loss is above three standard errors from {rates[first]:g} on, and from there in "
        f"proportion to the rate, within 25 %, up to {threshold:g}."
    )


def energy_table(subject: Subject, settings: RealSettings) -> list[Grid]:
    """Experiment F: energy after the activation against alpha², column by column."""
    layers, rows, points = subject.loaded.config.num_layers, [], {}
    kernel, alphas2 = subject.kernel("mlp.gate_proj"), np.asarray(subject.alpha2("mlp.gate_proj"), np.float64)
    for layer in sorted({0, layers // 2, layers - 1}):
        x, alpha2 = subject.traced["mlp"][layer, : settings.energy_tokens], alphas2[layer]
        energies_of = {
            name: np.asarray(real_model.column_energies(x, kernel[layer], activation=f), np.float64)
            for name, f in _PROXIES.items()
        }
        amplitudes = [float(np.sqrt(np.median(alpha2))), float(np.sqrt(alpha2.max()))]
        found = [_correlation(alpha2, energy) for energy in energies_of.values()]
        rows.append((f"layer {layer}", [*amplitudes, *found[0], *found[1]]))
        points[f"layer {layer}, ReLU"] = alpha2, energies_of["relu"]
    rows.append(("paper, TinyLlama", [*paper.AMPLITUDES, paper.ENERGY_SPEARMAN[0], None, None, None]))
    columns = ("median alpha", "largest", "Spearman, ReLU", "slope, ReLU", "Spearman, SiLU", "slope, SiLU")
    note = "Slopes are of log energy over log alpha²; the theory's is 1, less a correction of order alpha."
    about = subject.about | {"tokens used": settings.energy_tokens}
    title = "Experiment F: energy after the activation of a flipped column against alpha²"
    return [Grid("F-real", title, columns, rows, about, note, points)]


def column_table(subject: Subject, settings: RealSettings) -> list[Grid]:
    """Experiment G: change of the loss for single flipped columns of the middle layer's gate_proj against alpha²."""
    layer, path = subject.loaded.config.num_layers // 2, "layers.mlp.gate_proj.kernel"
    alpha2 = np.asarray(subject.alpha2("mlp.gate_proj")[layer], np.float64)
    # Half of the columns spread over all ranks, half the largest, where alpha varies most.
    order, half = np.argsort(alpha2), settings.columns // 2
    spread = order[np.linspace(0, len(order) - 1, settings.columns - half).round().astype(int)]
    columns = np.unique(np.concatenate([spread, order[-half:]]))
    rises = column_flips.single_column_flips(subject.loaded.params, path, layer, columns, subject.loss)
    rises = rises.astype(np.float64)
    rank, slope = _correlation(alpha2[columns], np.abs(rises))
    rows = [
        (f"layer {layer}", [rank, slope, float(np.mean(rises < 0)), float(rises.max())]),
        ("paper, TinyLlama", [paper.ENERGY_SPEARMAN[1], None, None, None]),
    ]
    about = subject.about | {"columns": len(columns)}
    title = "Experiment G: size of the loss's change for single flipped columns against alpha²"
    headings, points = ("Spearman", "log-log slope", "falls", "largest rise"), {}
    for name, chosen in (("rises", rises > 0), ("falls", rises < 0)):
        points[name] = alpha2[columns][chosen], np.abs(rises[chosen])
    return [Grid("G-real", title, headings, rows, about, "", points)]


def _correlation(alpha2: np.ndarray, effect: np.ndarray) -> tuple[float, float]:
    """Spearman's rank correlation, and the slope of the logarithms where both are above 0."""
    positive = (alpha2 > 0) & (effect > 0)
    slope = np.polyfit(np.log(alpha2[positive]), np.log(effect[positive]), 1)[0]
    return float(spearmanr(alpha2, effect).statistic), float(slope)


def bridge_table(subject: Subject, settings: RealSettings) -> list[Grid]:
    """The radial share and the size of the recipes' forward errors: of each product, of one layer, of the stack."""
    found: dict[str, dict[str, list]] = {name: {} for name in _BRIDGES}
    for chosen in settings.recipes:
        sums = real_model.quantization_errors(
            subject.loaded.model("bf16"), jnp.asarray(subject.tokens), recipe=recipe(chosen)
        )
        sums = {key: np.asarray(value, np.float64) for key, value in sums.items()}
        sums["product"] = sums.pop("products").transpose(1, 2, 0, 3).reshape(len(LINEARS), 3, -1)
        for (what, reading), cells in found.items():
            cells[chosen] = [_READINGS[reading][1](of_row) for of_row in sums[what]]
    layers = [f"layer {layer}" for layer in range(subject.loaded.config.num_layers)]
    note = (
        "Radial is the share of the error's energy along what it is added to, which the next RMSNorm removes, as a "
        f"mean over tokens; a random direction has 1/n, here {1 / subject.loaded.config.hidden_size:.4f}. "
        f"Row-wise sign weights have {1 - perturbations.BUSSGANG:.4f} on Gaussian weights and inputs."
    )
    grids = []
    for (what, reading), cells in found.items():
        labels = LINEARS if what == "product" else layers
        rows = [(label, list(row)) for label, *row in zip(labels, *cells.values(), strict=True)]
        title = f"The bridge: {_READINGS[reading][0]} of {_BRIDGED[what]}"
        text = "" if grids else note
        grids.append(Grid(f"bridge-{what}-{reading}", title, settings.recipes, rows, subject.about, text))
    return grids


def _radial(sums: Float64[np.ndarray, "3 tokens"]) -> float | None:
    """Radial share, the mean over the tokens that have an error; None where none has."""
    y2, yd, d2 = sums
    some = d2 > 0
    return float((yd[some] ** 2 / (y2[some] * d2[some])).mean()) if some.any() else None


def _size(sums: Float64[np.ndarray, "3 tokens"]) -> float:
    """|d|²/|y|², the mean over tokens."""
    return float((sums[2] / sums[0]).mean())


def _after_norm(sums: Float64[np.ndarray, "3 tokens"]) -> float:
    """|RMSNorm(y') - RMSNorm(y)|²/n, the mean over tokens: what is left of the error once the norm is taken out."""
    return float(energies(sums[None])[2].mean())


# What the sums of `real_model.quantization_errors` are of, and what is read from them.
_BRIDGED = {
    "product": "the error of one product",
    "layer": "the residual stream's error, one layer quantized",
    "stack": "the residual stream's error, all layers so far quantized",
}
_READINGS: dict[str, tuple[str, Callable]] = {
    "radial": ("radial share", _radial),
    "size": ("size |d|²/|y|²", _size),
    "after": ("size behind RMSNorm, |difference|²/n,", _after_norm),
}
_BRIDGES = (
    ("product", "radial"), ("product", "size"),  # by itself a product's output reaches no RMSNorm
    *((what, reading) for what in ("layer", "stack") for reading in _READINGS),
)  # fmt: skip


REAL_EXPERIMENTS: Sequence[Callable[[Subject, RealSettings], list[Grid]]] = (
    weight_table, depth_table, energy_table, bridge_table, column_table, flip_table,
)  # fmt: skip

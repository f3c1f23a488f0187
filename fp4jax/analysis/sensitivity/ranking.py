"""From measured effects to a ranking of linear layers and a policy that keeps the worst in high precision."""

import dataclasses
import enum
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float

from fp4jax.analysis.sensitivity.scan import Effect
from fp4jax.models.qwen3 import LINEARS
from fp4jax.policy import RUN_RECIPE, PolicyFile


class RankBy(enum.StrEnum):
    """What a layer is judged by; both add up over layers, to first order."""

    GRADIENT = "gradient"  # squared relative error of the total gradient: errors of different layers hardly correlate
    LOSS = "loss"  # loss gap, where it is positive

    def score(self, effect: Effect) -> float:
        """The number that adds up, at least 0."""
        return effect.total.relative**2 if self is RankBy.GRADIENT else max(effect.loss_gap, 0.0)


@dataclasses.dataclass(frozen=True)
class RankedLayer:
    """Attributes:
    path: "layers.3.mlp.down_proj".
    score: see `layer_scores`.
    parameters: of its kernel.
    kept: in high precision.
    """

    path: str
    score: float
    parameters: int
    kept: bool


def layer_scores(effects: Iterable[Effect], rank_by: RankBy, num_layers: int) -> Float[np.ndarray, "L linears"]:
    """The score of every linear layer.

    It is the layer's own where every layer was measured. Otherwise it is estimated as block x type / sum of types,
    which has the measured types' proportions in every block and the measured blocks' in every type.

    Raises:
      ValueError: neither all layers nor all blocks and all types are among the effects.
    """
    found = {(effect.choice.kind, effect.choice.name): rank_by.score(effect) for effect in effects}
    paths = [[f"layers.{block}.{name}" for name in LINEARS] for block in range(num_layers)]
    if all(("layer", path) in found for row in paths for path in row):
        return np.array([[found["layer", path] for path in row] for row in paths])
    types = [found.get(("type", name.split(".")[1])) for name in LINEARS]
    blocks = [found.get(("block", str(block))) for block in range(num_layers)]
    if None in types or None in blocks:
        raise ValueError("a ranking needs every linear layer, or every block and every type, to be measured")
    return np.outer(blocks, types) / max(sum(types), np.finfo(float).tiny)


def rank(
    scores: Float[np.ndarray, "L linears"], kernel_sizes: Mapping[str, int], keep_percent: float
) -> list[RankedLayer]:
    """All linear layers, the worst first, the worst of them kept in high precision.

    Going down the ranking a layer is kept if all that are kept still hold at most `keep_percent` of the parameters of
    linear layers. Parameters count and not layers, because a layer's share of the time and the memory that FP4 saves is
    its share of them.

    Args:
      scores: of `layer_scores`.
      kernel_sizes: parameters of one kernel, by the names of LINEARS.

    Raises:
      ValueError: a percentage outside [0, 100].
    """
    if not 0 <= keep_percent <= 100:
        raise ValueError(f"keep must be a percentage in [0, 100], got {keep_percent:g}")
    num_layers = len(scores)
    budget = keep_percent / 100 * num_layers * sum(kernel_sizes.values())
    ranked, used = [], 0
    for index in np.argsort(-scores, axis=None, kind="stable"):
        block, linear = divmod(int(index), len(LINEARS))
        name = LINEARS[linear]
        kept = used + kernel_sizes[name] <= budget
        used += kernel_sizes[name] * kept
        ranked.append(RankedLayer(f"layers.{block}.{name}", float(scores[block, linear]), kernel_sizes[name], kept))
    return ranked


def quantized_mask(ranked: Sequence[RankedLayer]) -> Bool[np.ndarray, "L linears"]:
    """Which layers the ranking leaves in FP4."""
    kept = {layer.path for layer in ranked if layer.kept}
    num_layers = len(ranked) // len(LINEARS)
    return np.array([[f"layers.{block}.{name}" not in kept for name in LINEARS] for block in range(num_layers)])


def policy_file(ranked: Sequence[RankedLayer], provenance: Mapping[str, object]) -> PolicyFile:
    """Rules that give kept layers "bf16", one rule a block, and all others the recipe of the run."""
    kept = ~quantized_mask(ranked)
    rules = []
    for block in np.flatnonzero(kept.any(1)):
        names = "|".join(re.escape(name) for name, is_kept in zip(LINEARS, kept[block], strict=True) if is_kept)
        rules.append((rf"^layers\.{block}\.({names})$", "bf16"))
    return PolicyFile((*rules, (".", RUN_RECIPE)), provenance)

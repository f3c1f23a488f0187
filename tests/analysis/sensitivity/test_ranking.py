"""Scores, what is kept, and the policy file, on made-up numbers."""

import numpy as np
import pytest

from fp4jax import models
from fp4jax.analysis.sensitivity import report
from fp4jax.analysis.sensitivity.ranking import RankBy, layer_scores, policy_file, quantized_mask, rank
from fp4jax.analysis.sensitivity.scan import Effect, GradientError, Scan, blocks, layers, types
from fp4jax.config import default_config
from fp4jax.models.qwen3 import LINEARS

SIZES = dict(zip(LINEARS, (4, 2, 2, 4, 8, 8, 8), strict=True))  # 36 parameters a block


def effects(choices, scores):
    """An effect of every choice, whose squared gradient error and loss gap are the sum of its layers' scores."""
    sums = [float(scores[choice.mask].sum()) for choice in choices]
    return [
        Effect(choice, 2 + total, total, GradientError(0.5, 0.9), GradientError(total**0.5, 0.9))
        for choice, total in zip(choices, sums, strict=True)
    ]


@pytest.fixture
def scores():
    return np.random.default_rng(0).permutation(21).reshape(3, 7) + 1.0


@pytest.mark.parametrize("rank_by", RankBy)
def test_measured_layers_have_their_own_score(rank_by, scores):
    found = layer_scores(effects([*types(3), *blocks(3), *layers(3)], scores), rank_by, 3)
    np.testing.assert_allclose(found, scores)


@pytest.mark.parametrize("rank_by", RankBy)
def test_estimate_is_exact_where_types_are_alike_in_all_blocks(rank_by):
    scores = np.outer([3.0, 1.0, 2.0], np.arange(1.0, 8.0))
    np.testing.assert_allclose(layer_scores(effects([*types(3), *blocks(3)], scores), rank_by, 3), scores)


def test_a_gain_in_loss_is_no_sensitivity():
    effect = Effect(types(3)[0], 1.9, -0.1, GradientError(0.5, 0.9), GradientError(0.5, 0.9))
    assert RankBy.LOSS.score(effect) == 0
    assert RankBy.GRADIENT.score(effect) == 0.25


@pytest.mark.parametrize("choices", (types(3), blocks(3), [*types(3), *blocks(3)[:2]]))
def test_ranking_needs_all_parts(choices, scores):
    with pytest.raises(ValueError, match="every block and every type"):
        layer_scores(effects(choices, scores), RankBy.GRADIENT, 3)


@pytest.mark.parametrize("keep", (0.0, 1.0, 5.0, 15.0, 50.0, 99.0, 100.0))
def test_the_worst_that_fit_are_kept(keep, scores):
    ranked = rank(scores, SIZES, keep)
    assert [layer.score for layer in ranked] == sorted(scores.ravel(), reverse=True)
    assert {layer.path for layer in ranked} == {f"layers.{block}.{name}" for block in range(3) for name in LINEARS}
    budget, used = keep / 100 * 3 * 36, 0
    for layer in ranked:
        assert layer.kept == (used + layer.parameters <= budget)
        used += layer.parameters * layer.kept
    assert used <= budget
    assert all(layer.kept for layer in ranked) == (keep == 100)
    assert any(layer.kept for layer in ranked) == (keep >= 5)


@pytest.mark.parametrize("keep", (-1.0, 100.5, float("nan")))
def test_keep_is_a_percentage(keep, scores):
    with pytest.raises(ValueError, match=r"^keep must be a percentage in \[0, 100\]"):
        rank(scores, SIZES, keep)


@pytest.mark.parametrize("keep", (0.0, 15.0, 50.0, 100.0))
def test_policy_file_gives_kept_layers_high_precision(keep, scores, tmp_path):
    ranked = rank(scores, SIZES, keep)
    file = tmp_path / "policy.json"
    policy_file(ranked, {"command": "made up"}).save(file)
    config = default_config()
    config.policy, config.recipe, config.model.num_layers = str(file), "averis", 3
    found = models.linear_recipes(config)
    assert {path for path, recipe in found.items() if recipe.name == "bf16"} == {
        layer.path for layer in ranked if layer.kept
    }
    assert {recipe.name for recipe in found.values()} <= {"bf16", "averis"}
    mask = quantized_mask(ranked)
    assert [not recipe.is_high_precision for recipe in found.values()] == list(mask.ravel())


def test_paths_are_matched_whole():
    scores = np.zeros((12, 7))
    scores[1, 6] = 1.0  # layers.1, and not layers.11
    ranked = rank(scores, dict.fromkeys(LINEARS, 1), 1.2)
    assert policy_file(ranked, {}).policy("averis").recipe_for("layers.11.mlp.down_proj").name == "averis"
    assert policy_file(ranked, {}).policy("averis").recipe_for("layers.1.mlp.down_proj").name == "bf16"


def test_tables_are_aligned_and_worst_first(scores):
    text = report.effects_table("types", effects(types(3), scores), 2.0, RankBy.GRADIENT).splitlines()
    assert text[0] == "types" and len(text) == 2 + 7
    order = [name.split(".")[1] for name in np.array(LINEARS)[np.argsort(-scores.sum(0))]]
    assert [line.split()[0] for line in text[2:]] == order
    assert len({len(line) for line in text[1:]}) == 1
    ranked = report.ranking_table(rank(scores, SIZES, 15.0), RankBy.LOSS, measured=False)
    assert "estimated" in ranked and "of 21 linear layers" in ranked


def test_figure_and_json(scores, tmp_path):
    scan = Scan(2.0, tuple(effects([*types(3), *blocks(3)], scores)), 64)
    ranked = rank(scores, SIZES, 15.0)
    report.draw(scan, ranked, RankBy.GRADIENT, "made up", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    record = report.scan_json(scan, ranked)
    assert [e["name"] for e in record["effects"][:2]] == ["q_proj", "k_proj"]
    assert record["effects"][0]["total_gradient_error"] ** 2 == pytest.approx(scores[:, 0].sum())
    assert len(record["ranking"]) == 21

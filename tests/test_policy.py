"""Policies: the first rule that matches wins, and a rule that matches nothing is a mistake."""

import pytest

from fp4jax.policy import Policy, policy
from fp4jax.recipes import Recipe, recipe

PATHS = [f"layers.{i}.{name}" for i in range(3) for name in ("attention.q_proj", "mlp.gate_proj", "mlp.down_proj")]


def test_the_first_match_wins():
    chosen = Policy.of((r"layers\.2\.", "bf16"), ("down_proj", "nvfp4"), ("mlp", "averis")).assign(PATHS)
    assert list(chosen) == PATHS
    assert {path: value.name for path, value in chosen.items()} == {
        **{f"layers.{i}.attention.q_proj": "bf16" for i in range(3)},  # no match: high precision
        **{f"layers.{i}.mlp.gate_proj": "averis" for i in range(2)},
        **{f"layers.{i}.mlp.down_proj": "nvfp4" for i in range(2)},
        **{f"layers.2.mlp.{name}_proj": "bf16" for name in ("gate", "down")},
    }


def test_recipe_for_searches_anywhere_in_the_path():
    rules = Policy.of(("q_proj$", "averis"), ("^layers", "nvfp4"))
    assert rules.recipe_for("layers.0.attention.q_proj") is recipe("averis")
    assert rules.recipe_for("layers.0.attention.k_proj") is recipe("nvfp4")
    assert rules.recipe_for("lm_head").is_high_precision


def test_a_rule_may_hold_a_recipe_of_ones_own():
    mine = Recipe("mine")
    assert Policy.of((".", mine)).recipe_for("anything") is mine


def test_a_rule_that_matches_nothing_is_named():
    rules = Policy.of(("mlp", "averis"), ("down_prj", "nvfp4"))
    with pytest.raises(ValueError, match="rule 'down_prj' matches none of the 9 linear layers, for example 'layers.0"):
        rules.assign(PATHS)
    with pytest.raises(ValueError, match="matches none of the 0 linear layers$"):
        rules.assign([])


def test_a_shadowed_rule_is_not_an_error():
    """It matches layers, though earlier rules take them all."""
    assert Policy.of((".", "averis"), ("mlp", "bf16")).assign(PATHS)[PATHS[1]].name == "averis"


def test_bad_rules():
    with pytest.raises(ValueError, match=r"rule 'mlp\(' is not a regular expression"):
        Policy.of(("mlp(", "averis"))
    with pytest.raises(ValueError, match="unknown recipe 'averes'"):
        Policy.of(("mlp", "averes"))


def test_all_linear():
    chosen = policy("all_linear", "averis+nearest").assign(PATHS)
    assert set(chosen.values()) == {recipe("averis+nearest")}
    with pytest.raises(ValueError, match="unknown policy 'all_liner'; known: all_linear"):
        policy("all_liner", "averis")


def test_policies_are_values():
    assert policy("all_linear", "averis") == policy("all_linear", "averis") != policy("all_linear", "nvfp4")
    assert hash(policy("all_linear", "averis")) == hash(policy("all_linear", "averis"))
